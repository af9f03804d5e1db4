import numpy as np
import pandas as pd
import pytest

from analysis import ResultsData, load_results
from analysis.columns import parse_columns
from analysis.data import concat
from analysis.exclude import exclude_by_text
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


def users_table(**more) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    N = 10 ** rng.uniform(7, 10, 12)
    D = 10 ** rng.uniform(9, 11, 12)
    columns = {"params": N, "Training FLOP": 6 * N * D, "val_loss": 1.8 + 480 * N**-0.35 + 2100 * D**-0.37}
    return pd.DataFrame({**columns, **more})


def test_a_users_table_is_read_through_a_mapping_with_arithmetic(write_results):
    frame = users_table()
    mapping = {"N": "params", "C": "Training FLOP", "D": "C/(6*N)", "loss": "val_loss"}
    data = load_results(write_results(frame, "mine.csv"), columns=mapping)
    np.testing.assert_allclose(data.N, frame["params"], rtol=1e-12)
    np.testing.assert_allclose(data.D, frame["Training FLOP"] / (6 * frame["params"]), rtol=1e-12)
    np.testing.assert_allclose(data.loss, frame["val_loss"], rtol=1e-12)
    assert data.run_ids == [f"row{i}" for i in range(1, 13)]
    assert len(data.dense) == 12
    assert (data.R == 1).all()
    card = data.convention.definitions()
    assert card["N"] == "as given (N = params)"
    assert card["D"] == "as given (D = C/(6*N))"


def test_the_user_may_say_what_the_mapped_n_is(write_results):
    path = write_results(users_table(), "mine.csv")
    mapping = {"N": "params", "D": "1e9 + 0*params", "loss": "val_loss"}
    data = load_results(path, columns=mapping, n="total")
    assert data.convention.n == "total"
    assert np.isnan(data.C).all()
    assert data.convention.definitions()["C"] == "not given"
    with pytest.raises(UserError, match="conventions differ"):
        data.convention.require_same(load_results(path, columns=mapping).convention, "these")


def test_a_table_with_columns_n_d_and_loss_needs_no_mapping(write_results):
    frame = pd.DataFrame({"N": [1e7, 1e8, 1e9], "D": [1e9, 2e9, 4e9], "loss": [4.0, 3.5, 3.0], "R": [1, 2, 4]})
    data = load_results(write_results(frame, "mine.csv"))
    np.testing.assert_array_equal(data.N, frame["N"])
    assert data.frame["model"].tolist() == ["dense", "dlcm", "dlcm"]


def test_symbols_may_be_mapped_over_the_toolkits_own_table(demo_frame, write_results):
    path = write_results(demo_frame.assign(loss_nats_code=demo_frame["loss_nats"] + 1))
    data = load_results(path, columns={"loss": "loss_nats_code"})
    np.testing.assert_allclose(data.loss, demo_frame["loss_nats"] + 1)
    np.testing.assert_array_equal(data.N, load_results(path).N)
    assert data.convention.n == "non_embedding"


def test_columns_of_the_toolkit_may_be_mapped_so_that_both_conventions_are_known(write_results):
    frame = users_table(all_params=2 * users_table()["params"])
    mapping = {
        "params_total": "all_params",
        "params_embedding": "all_params-params",
        "tokens": "`Training FLOP`/6/params",
    }
    path = write_results(frame, "mine.csv")
    data = load_results(path, columns={**mapping, "loss": "val_loss"})
    np.testing.assert_allclose(data.N, frame["params"])
    np.testing.assert_allclose(data.under("total").N, 2 * frame["params"])
    assert (
        data.under("total").convention
        == load_results(path, columns={**mapping, "loss": "val_loss"}, n="total").convention
    )


def test_rows_of_one_mapped_run_are_its_checkpoints_and_equal_rows_are_duplicates(write_results):
    frame = pd.DataFrame({"N": [1e7] * 4, "D": [1e8, 2e8, 4e8, 4e8], "loss": [4.0, 3.5, 3.0, 3.0], "name": ["a"] * 4})
    data = load_results(
        write_results(frame, "mine.csv"), columns={k: k for k in ("N", "D", "loss")} | {"run_id": "name"}
    )
    assert data.run_ids == ["a"] * 3
    assert len(set(data.clusters)) == 1
    assert [e.reason for e in data.exclusions] == ["duplicate of row 3"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"N": "param", "D": "1e9", "loss": "val_loss"}, r"names 'param', which is no column; did you mean 'params'"),
        ({"N": "params", "loss": "val_loss"}, r"nothing says what D is; give it with --columns D=\.\.\., from: params"),
        ({"N": "params", "D": "C", "C": "D", "loss": "val_loss"}, "circle"),
        ({"N": "params", "D": "__import__('os').getcwd()", "loss": "val_loss"}, "is not arithmetic"),
        ({"N": "params", "D": "params.size", "loss": "val_loss"}, "is not arithmetic"),
        ({"N": "params", "D": "1e9 if 1 else 2", "loss": "val_loss"}, "is not arithmetic"),
        ({"N": "params", "D": "9**9**9**9*0+1e9 +", "loss": "val_loss"}, "is no expression"),
        ({"N": "params", "D": "1e9", "loss": "note"}, "column 'note' holds 'bad' in row 2; expected a number"),
        ({"N": "params", "D": "1e9", "loss": "val_loss", "family": "note"}, "a family is dense or dlcm"),
    ],
)
def test_a_mapping_that_cannot_be_is_one_line_with_a_way_out(write_results, mapping, message):
    frame = users_table(note=["3.1", "bad", *["3.2"] * 10])
    with pytest.raises(UserError, match=message) as error:
        load_results(write_results(frame, "mine.csv"), columns=mapping)
    assert "\n" not in str(error.value)


def test_powers_overflow_instead_of_filling_the_memory(write_results):
    mapping = {"N": "params", "D": "9**9**9**9", "loss": "val_loss"}
    with pytest.raises(
        UserError, match=r"none of 12 runs is usable; the first, row1: D \(9\*\*9\*\*9\*\*9\) is missing"
    ):
        load_results(write_results(users_table(), "mine.csv"), columns=mapping)


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(UserError, match=r"none\.csv: not readable as csv"):
        load_results(tmp_path / "none.csv")
    (tmp_path / "head.csv").write_text("N,D,loss\n")
    with pytest.raises(UserError, match=r"head\.csv: no rows"):
        load_results(tmp_path / "head.csv")


def test_the_text_of_the_option_is_parsed():
    text = "N=params, D=`Training FLOP`/(6*N),loss=val loss"
    assert parse_columns(text) == {"N": "params", "D": "`Training FLOP`/(6*N)", "loss": "val loss"}
    for bad in ("N", "N=", "=params", "N=a,N=b"):
        with pytest.raises(UserError, match="--columns"):
            parse_columns(bad)


def test_exclusions_carry_their_reason_into_the_fit(demo_frame, write_results):
    data = load_results(write_results(demo_frame))
    left = exclude_by_text(data, [f"{data.run_ids[0]}=loss spiked", "model == 'dense' and C > 2e12: another cluster"])
    dropped = {e.run_id: e.reason for e in left.exclusions}
    assert dropped[data.run_ids[0]] == "loss spiked"
    assert (
        sum(r == "another cluster" for r in dropped.values())
        == ((data.frame["model"] == "dense") & (data.C > 2e12)).sum()
    )
    assert len(left) == len(data) - len(dropped)
    assert not set(dropped) & set(left.run_ids)


def test_the_largest_losses_of_each_family_are_dropped_with_a_reason(demo_frame, write_results):
    data = load_results(write_results(demo_frame))
    left = data.drop_largest_losses(2)
    for family in ("dense", "dlcm"):
        expected = np.sort(data.of_family(family).loss)[:-2]
        np.testing.assert_array_equal(np.sort(left.of_family(family).loss), expected)
    assert {e.reason for e in left.exclusions} == {"among the 2 largest losses"}
    with pytest.raises(UserError, match="cannot drop the 6 largest losses of 6 runs"):
        data.drop_largest_losses(6)


def test_a_fit_of_one_family_speaks_of_the_exclusions_of_its_own(demo_frame, write_results):
    frame = demo_frame.copy()
    frame.loc[frame.index[frame["model"] == "dlcm"][0], "status"] = "diverged"
    data = load_results(write_results(frame))
    data = data.exclude([data.dense.run_ids[0]], "restarted")
    assert [e.reason for e in data.exclusions] == ["diverged", "restarted"]
    assert [e.reason for e in data.dense.exclusions] == ["restarted"]
    assert [e.reason for e in data.dlcm.exclusions] == ["diverged"]


def test_an_exclusion_without_reason_or_without_effect_is_refused(demo_frame, write_results):
    data = load_results(write_results(demo_frame))
    for text, message in (
        ("loss > 4", "has no reason"),
        ("loss > 4:", "needs a reason"),
        ("loss > 400: outlier", "nothing to leave out"),
        ("loss > 0: all", "none would be left"),
        (f"{data.run_ids[0][:-1]}=typo", f"did you mean '{data.run_ids[0]}'"),
        ("los > 4: outlier", "did you mean 'loss'"),
        ("model > 'dense': text", "text has no order"),
        ("loss + 4: sum", "is no condition"),
    ):
        with pytest.raises(UserError, match=message):
            exclude_by_text(data, [text])


def test_a_selection_names_itself_as_the_source(demo_frame, write_results):
    data = load_results(write_results(demo_frame)).select("P == 0.5 or not model == 'dlcm'")
    assert set(data.frame["model"]) == {"dense"} | ({"dlcm"} if (data.P == 0.5).any() else set())
    assert data.source.endswith("where P == 0.5 or not model == 'dlcm'")
    assert not data.exclusions


def test_results_of_other_conventions_are_not_joined(demo_frame, write_results):
    path = write_results(demo_frame)
    data = load_results(path)
    assert len(concat([data, data])) == 2 * len(data)
    with pytest.raises(UserError, match="conventions differ"):
        concat([data, load_results(path, n="total")])
