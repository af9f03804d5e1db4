import numpy as np
import pandas as pd
import pytest

from analysis import ResultsData, load_results
from dlcm.errors import UserError


@pytest.mark.parametrize("name", ["results.parquet", "results.csv"])
def test_conventions_are_derived_from_the_facts(demo_frame, write_results, name):
    path = write_results(demo_frame, name)
    data = load_results(path)
    without = demo_frame["params_total"] - demo_frame["params_embedding"]
    np.testing.assert_array_equal(data.N, without)
    np.testing.assert_allclose(data.P, demo_frame["params_concept"] / without)
    np.testing.assert_allclose(data.R, demo_frame["tokens_per_concept"])
    np.testing.assert_array_equal(load_results(path, n="total").N, demo_frame["params_total"])
    assert (data.dense.R == 1).all()
    assert (data.dense.P == 0).all()
    assert len(data.dense) == 6
    assert len(data.dlcm) == 12


def test_a_folder_is_read_through_its_results_file(demo_frame, write_results):
    path = write_results(demo_frame)
    assert load_results(path.parent).hash == load_results(path).hash


def test_unusable_runs_are_left_out_each_with_its_reason(demo_frame, write_results):
    frame = demo_frame.copy()
    frame.loc[0, ["status", "loss_nats"]] = ["diverged", np.nan]
    frame.loc[1, "status"] = "failed"
    frame.loc[2, "loss_nats"] = np.nan
    frame.loc[3, "tokens_per_concept"] = np.nan
    frame = pd.concat([frame, frame.iloc[[5]]])
    data = load_results(write_results(frame))
    reasons = {e.run_id: e.reason for e in data.exclusions}
    assert len(data) == len(demo_frame) - 4
    assert reasons[frame["run_id"].iloc[0]] == "diverged"
    assert reasons[frame["run_id"].iloc[1]] == "failed"
    assert reasons[frame["run_id"].iloc[2]] == "missing loss"
    assert "tokens_per_concept" in reasons[frame["run_id"].iloc[3]]
    assert "duplicate of row 6" in reasons[frame["run_id"].iloc[5]]


def test_a_failed_first_try_does_not_hide_the_finished_one(demo_frame, write_results):
    failed = demo_frame.iloc[[0]].assign(status="failed")
    data = load_results(write_results(pd.concat([failed, demo_frame])))
    assert len(data) == len(demo_frame)
    assert [e.reason for e in data.exclusions] == ["failed"]


def test_a_missing_column_is_named_with_file_and_nearest(demo_frame, write_results):
    path = write_results(demo_frame.rename(columns={"loss_nats": "loss_nat"}))
    with pytest.raises(UserError, match=r"results\.parquet: no column 'loss_nats'; did you mean 'loss_nat'"):
        load_results(path)


def test_every_unreadable_input_is_one_line_with_a_way_out(demo_frame, write_results, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_results(tmp_path / "absent.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no results.parquet in this folder"):
        load_results(tmp_path / "empty")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="not readable as parquet"):
        load_results(tmp_path / "torn.parquet")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="from .parquet or .csv"):
        load_results(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="holds 'many' in row 1"):
        load_results(write_results(demo_frame.assign(tokens="many"), "words.csv"))
    with pytest.raises(UserError, match="none of 18 runs is usable"):
        load_results(write_results(demo_frame.assign(status="lost"), "lost.csv"))
    with pytest.raises(UserError, match="did you mean 'total'"):
        load_results(write_results(demo_frame), n="totl")  # type: ignore[arg-type]


def test_full_square_flops_need_their_column(demo_frame, write_results):
    with pytest.raises(UserError, match="flops_train_full"):
        load_results(write_results(demo_frame), c="full")
    wider = demo_frame.assign(flops_train_full=2 * demo_frame["flops_train"])
    np.testing.assert_allclose(load_results(write_results(wider), c="full").C, 2 * demo_frame["flops_train"])


def test_conventions_are_not_mixed(demo_frame, write_results):
    path = write_results(demo_frame)
    first, second = load_results(path), load_results(path, n="total")
    with pytest.raises(UserError, match="conventions differ"):
        first.convention.require_same(second.convention, "savings")


def test_the_hash_follows_the_numbers():
    same = [ResultsData.from_arrays(N=[1e6, 2e6], D=1e8, loss=[3.0, x]) for x in (2.9, 2.9, 2.90001)]
    assert same[0].hash == same[1].hash != same[2].hash
