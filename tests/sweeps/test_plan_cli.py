"""`dlcm sweep plan` and `dlcm flops ...` as a person runs them: tables, JSON, CSV, and errors on one line with status 2."""

import csv
import json
from pathlib import Path

import pytest

from sweeps import Sweep, plan
from sweeps.store import save_sweep

SWEEP = """
base: {size: 0.4M, concept_share: 0.5}
axes: {grid: {compression_ratio: [2, 4]}}
budgets: {tokens: [100k]}
baseline: {match: parameters}
"""


@pytest.fixture
def sweep_file(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SWEEP)
    return path


@pytest.mark.slow
def test_plan_prints_shape_size_ratio_tokens_and_cost_of_every_run(dlcm, sweep_file):
    status, out, err = dlcm("sweep", "plan", sweep_file)
    lines = out.splitlines()
    # a machine that is slow shows its progress, and nothing else
    assert (status, [line for line in err.splitlines() if not line.startswith("simulating")]) == (0, [])
    assert lines[0].split() == ["run", "shape", "N", "P", "R", "tokens", "FLOPs", "share"]
    assert "3 runs (2 dlcm, 1 dense)" in lines[1 + 3]
    # No processor is calibrated in the cache of the tests.
    assert lines[1 + 3 + 1].startswith("no time estimate")


@pytest.mark.slow
def test_plan_as_json_and_csv_hold_every_run(dlcm, sweep_file, tmp_path):
    status, out, _ = dlcm("sweep", "plan", sweep_file, "--json", "--csv", tmp_path / "plan.csv")
    assert status == 0
    runs = json.loads(out)["runs"]
    with (tmp_path / "plan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [run["run_id"] for run in runs] == [row["run_id"] for row in rows]
    assert all(run["config"]["train"]["tokens"] == run["tokens"] for run in runs)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("compression_ratio", "compresion_ratio", "did you mean 'compression_ratio'?"),
        ("budgets", "budget", "did you mean 'budgets'?"),
        ("[2, 4]", "[2, 1]", "R must be above 1"),
        ("0.4M", "0.004M", "no integer shape within tolerance"),
        ("[100k]", "[100]", "less than one step"),
        ("size: 0.4M", "size: 0.4M, data: {corpus: absent.txt}", "'absent.txt' is neither a known name nor a file"),
        ("base:", "base: [", "small.yaml:"),
    ],
)
def test_a_faulty_sweep_file_is_one_line_and_writes_nothing(dlcm, sweep_file, tmp_path, old, new, words):
    sweep_file.write_text(SWEEP.replace(old, new))
    status, out, err = dlcm("sweep", "plan", sweep_file, "--csv", tmp_path / "plan.csv")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(sweep_file) in err
    assert words in err
    assert not (tmp_path / "plan.csv").exists()


def test_flops_table_shows_each_shape_of_a_sweep_once(dlcm, sweep_file):
    status, out, _ = dlcm("flops", "table", sweep_file, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert len(rows) == 3
    for row in rows:
        assert row["training_per_token"] == pytest.approx(3 * row["forward_per_token"])
        assert row["forward_per_token_full_square"] > row["forward_per_token"]


def test_flops_table_of_the_papers_two_models_has_its_published_figures(dlcm):
    recipe = Path(__file__).parents[2] / "sweeps" / "recipes" / "table3.yaml"
    status, out, _ = dlcm("flops", "table", recipe, "--json")
    dense, found = json.loads(out)["rows"]
    assert status == 0
    assert (dense["params_total"], found["params_total"]) == (1_226_295_808, 2_231_630_080)
    assert found["concept_share_of_total"] == pytest.approx(0.609, abs=0.0005)
    assert found["concept_share"] == pytest.approx(0.740, abs=0.0005)
    assert 0.92 <= found["forward_over_dense"] <= 0.94
    assert found["backbone"] / found["forward_per_token"] == pytest.approx(0.33, abs=0.005)
    assert "of dense" in dlcm("flops", "table", recipe)[1]


@pytest.mark.slow
def test_flops_table_takes_sweeps_runs_and_configs_side_by_side(dlcm, sweep_file, tmp_path):
    _, out, _ = dlcm("sweep", "plan", sweep_file, "--json")
    run = json.loads(out)["runs"][0]
    config, folder = tmp_path / "one.json", tmp_path / run["run_id"]
    config.write_text(json.dumps(run["config"]["model"]))
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"schema": 1, "run_id": run["run_id"], "config": run["config"]}))
    (folder / "result.json").write_text(json.dumps({"tokens_per_concept": 3.0, "tokens_per_concept_train": 3.5}))
    rows = json.loads(dlcm("flops", "table", sweep_file, config, folder, "--json")[1])["rows"]
    assert len(rows) == 5
    assert rows[3]["name"] == "one"
    assert rows[4]["tokens_per_concept"] == 3.5  # realised, where the plan has the target
    rows = json.loads(dlcm("flops", "table", sweep_file, "--seq-len", 64, "-r", 2, "--json")[1])["rows"]
    assert {row["seq_len"] for row in rows} == {64}
    assert {row["tokens_per_concept"] for row in rows if row["model"] == "dlcm"} == {2}
    status, out, _ = dlcm("flops", "table", sweep_file, "--csv", "-")
    assert status == 0
    assert [row["model"] for row in csv.DictReader(out.splitlines())] == ["dlcm", "dlcm", "dense"]
    assert dlcm("flops", "table", tmp_path / "absent.yaml")[0] == 2


def test_flops_table_of_a_stored_sweep_shows_every_run(dlcm, sweep_file, tmp_path):
    planned = plan(Sweep.from_yaml(sweep_file))
    save_sweep(planned, tmp_path / "runs" / "small")
    rows = json.loads(dlcm("flops", "table", tmp_path / "runs" / "small", "--json")[1])["rows"]
    assert [row["name"] for row in rows] == [run.run_id for run in planned.runs]
    assert [row["training_per_token"] for row in rows] == [run.flops.training_per_token for run in planned.runs]


@pytest.mark.slow
def test_flops_show_reads_a_model_a_run_config_and_a_run_folder(dlcm, sweep_file, tmp_path):
    _, out, _ = dlcm("sweep", "plan", sweep_file, "--json")
    run = json.loads(out)["runs"][1]
    folder = tmp_path / run["run_id"]
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"schema": 1, "run_id": run["run_id"], "config": run["config"]}))
    config, model = tmp_path / "run_config.json", tmp_path / "model.json"
    config.write_text(json.dumps(run["config"]))
    model.write_text(json.dumps(run["config"]["model"]))
    shown = [json.loads(dlcm("flops", "show", path, "--json")[1]) for path in (folder, config, model)]
    assert shown[0] == shown[1]
    assert shown[0]["flops_train"] == pytest.approx(run["flops_train_planned"])
    assert shown[2]["params"] == shown[0]["params"]
    assert shown[2]["tokens"] is None
    assert "backbone" in dlcm("flops", "show", folder)[1]
    (folder / "result.json").write_text(json.dumps({"tokens_per_concept": 3.0, "tokens_per_concept_train": 3.5}))
    assert json.loads(dlcm("flops", "show", folder, "--json")[1])["tokens_per_concept"] == 3.5


@pytest.mark.parametrize(
    ("content", "words"), [("d_tokn: 3\n", "'d_tokn'; did you mean 'd_token'?"), (SWEEP, "this is a sweep")]
)
def test_flops_show_refuses_what_is_no_model(dlcm, tmp_path, content, words):
    path = tmp_path / "model.yaml"
    path.write_text(content)
    status, _, err = dlcm("flops", "show", path)
    assert status == 2
    assert words in err
    assert dlcm("flops", "show", tmp_path)[0] == 2


@pytest.mark.slow
def test_flops_check_agrees_on_the_examples(dlcm):
    status, out, _ = dlcm("flops", "check", "--json")
    assert status == 0
    assert json.loads(out)["agrees"]
