import pandas as pd
import pytest

from dlcm.errors import UserError
from dlcm.record import write_json
from flops import count, parameters
from sweeps.collect import COLUMNS, TASK_COLUMNS, collect
from sweeps.store import load_sweep, save_sweep
from tests.sweeps.tiny import beat, fail, finish, make_plan

DENSE = {"baseline": {"match": "parameters", "sizes": [20_000]}, "shape": {}}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "tiny"
    save_sweep(make_plan(tmp_path), path)
    return path


def test_the_table_has_exactly_the_columns_of_the_schema_with_their_dtypes(folder):
    finish(load_sweep(folder).runs[0])
    frame = collect(folder)
    assert list(frame.columns) == list(COLUMNS)
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {n: c.dtype for n, c in COLUMNS.items()}
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), frame)


def test_dtypes_stay_the_same_when_no_run_has_a_result(folder):
    frame = collect(folder)
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {n: c.dtype for n, c in COLUMNS.items()}
    assert list(frame["status"]) == ["planned"] * 3
    assert frame[["tokens", "loss_nats", "flops_train", "device", "wall_s"]].isna().all(axis=None)
    assert frame[["params_total", "flops_train_planned", "lr_token", "compression_target"]].notna().all(axis=None)


def test_flops_are_counted_at_the_ratio_realised_in_training_and_at_evaluation(folder):
    run = load_sweep(folder).runs[0]
    finish(run)
    row = collect(folder).iloc[0]
    model, seq_len = run.config.model, run.config.data.seq_len
    assert row["flops_train"] == count(model, seq_len, 4.1).training_per_token * run.config.tokens
    assert row["flops_per_token_forward"] == count(model, seq_len, 3.9).forward_per_token
    assert row["flops_train_planned"] == pytest.approx(
        count(model, seq_len, 4.0).training_per_token * run.config.tokens
    )
    assert row["concept_share"] == parameters(model).concept_share


def test_a_dense_run_has_no_boundary_no_concepts_and_one_token_to_the_unit(tmp_path):
    path = tmp_path / "runs" / "tiny"
    save_sweep(make_plan(tmp_path, **DENSE), path)
    run = next(run for run in load_sweep(path).runs if run.config.model.is_dense)
    finish(run, tokens_per_concept=None, tokens_per_concept_train=None)
    row = collect(path).set_index("run_id").loc[run.run_id]
    assert (row["model"], row["boundary"], row["concept_share"], row["params_concept"]) == ("dense", "none", 0, 0)
    assert row["compression_target"] == row["tokens_per_concept"] == row["tokens_per_concept_train"] == 1
    assert row["lr_concept"] == row["lr_token"]
    assert row["flops_train"] == pytest.approx(row["flops_train_planned"])


def test_unfinished_runs_have_rows_with_their_status(folder):
    first, second, third = load_sweep(folder).runs
    finish(first, "diverged")
    fail(second)
    beat(third)
    frame = collect(folder)
    assert list(frame["status"]) == ["diverged", "failed", "lost"]
    assert frame["loss_nats"].isna().all()
    assert frame["tokens"].notna().tolist() == [True, False, False]


def test_a_finished_run_that_left_the_sweep_file_stays_in_the_table(tmp_path, folder):
    finish(load_sweep(folder).runs[0])
    save_sweep(make_plan(tmp_path, seeds=(2,)), folder)
    frame = collect(folder)
    assert sorted(zip(frame["seed"], frame["status"])) == [(0, "finished"), (2, "planned")]


def test_each_evaluated_task_has_its_columns_beside_the_schema(folder):
    first, second, _ = load_sweep(folder).runs
    finish(first)
    finish(second)
    scores = {
        "acc": 0.5,
        "acc_stderr": 0.1,
        "acc_norm": 0.6,
        "bits_per_byte": 1.5,
        "bits_per_byte_stderr": 0.2,
        "n": 500,
        "constant": 0.276,
        "chance": 0.25,
    }
    write_json(first.path / "eval" / "openbook_qa.json", scores)
    write_json(second.path / "eval" / "corpus.json", {"acc": 0.25, "acc_stderr": 0.05})
    frame = collect(folder)
    expected = [pattern.replace("<task>", task) for task in ("corpus", "openbook_qa") for pattern in TASK_COLUMNS]
    assert list(frame.columns) == [*COLUMNS, *expected]
    assert frame.loc[0, "acc_norm_openbook_qa"] == 0.6
    assert (frame.loc[0, "n_openbook_qa"], frame.loc[0, "chance_openbook_qa"]) == (500, 0.25)
    assert frame.loc[1, "acc_corpus"] == 0.25
    assert frame.loc[1, "acc_openbook_qa":].isna().all()
    assert set(map(str, frame[expected].dtypes)) == {"float64"}


def test_a_torn_metrics_line_is_refused_by_file_and_line_and_the_old_table_stays(folder):
    run = load_sweep(folder).runs[0]
    finish(run)
    collect(folder)
    before = (folder / "results.parquet").read_bytes()
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"metrics.jsonl:{run.config.n_steps}: torn metrics line"):
        collect(folder)
    assert (folder / "results.parquet").read_bytes() == before


def test_files_of_a_run_that_contradict_each_other_are_refused(folder):
    first, second, third = load_sweep(folder).runs
    finish(first, step=99)
    with pytest.raises(UserError, match="do not lead to step 99"):
        collect(folder)
    (first.path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="missing or empty"):
        collect(folder)
    (first.path / "result.json").unlink()
    finish(second, params={"total": 7, "embedding": 1, "token": 3, "concept": 3})
    with pytest.raises(UserError, match="params.total = 7"):
        collect(folder)
    (second.path / "result.json").unlink()
    write_json(third.path / "result.json", {"schema": 1, "status": "finished", "step": 1})
    with pytest.raises(UserError, match="no key"):
        collect(folder)


def test_a_row_names_the_code_that_trained_it_and_counts_full_squares_beside(folder):
    run = load_sweep(folder).runs[0]
    finish(run)
    write_json(run.path / "env.json", {"schema": 1, "git_commit": "abc", "git_dirty_hash": "d1"})
    row = collect(folder).iloc[0]
    assert row["commit"] == "abc+d1"
    full = count(run.config.model, run.config.data.seq_len, 4.1).full_square
    assert row["flops_train_full"] == full.training_per_token * run.config.tokens > row["flops_train"]
