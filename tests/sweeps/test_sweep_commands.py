"""The verbs submit, status, logs, cancel, retry, collect as a person meets them: what is printed, and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.store import load_sweep, save_sweep
from tests.sweeps.tiny import FakeTrain, beat, fail, finish, make_plan, sweep_dict


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def stored(place):
    save_sweep(make_plan(place), place / "runs" / "tiny")
    return load_sweep(place / "runs" / "tiny")


def write_sweep(place, **options):
    path = place / "tiny.yaml"
    path.write_text(json.dumps(sweep_dict(place, **options)))  # JSON is YAML
    return path


def refused(answer, *words):
    """One line on stderr that says `words`, exit code 2, nothing on stdout."""
    code, out, err = answer
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    return True


def test_submit_trains_and_submitting_again_skips_what_is_finished(dlcm, place, monkeypatch):
    fake = FakeTrain().install(monkeypatch)
    write_sweep(place)
    code, out, _ = dlcm("sweep", "submit", "tiny.yaml", "--cluster", "debug")
    assert code == 0
    assert "3 runs to train" in out
    assert "all 3 runs complete" in out
    code, out, _ = dlcm("sweep", "submit", "tiny.yaml", "--cluster", "debug")
    assert code == 0
    assert "0 runs to train, 3 finished (skipped)" in out
    assert len(fake.calls) == 3


def test_a_failed_run_makes_the_exit_code_1_and_says_why_and_retry_mends_it(dlcm, place, monkeypatch):
    def no_corpus(config):
        if config.seed:
            raise ValueError("no such corpus")

    FakeTrain(no_corpus).install(monkeypatch)
    write_sweep(place)
    code, _, err = dlcm("sweep", "submit", "tiny.yaml", "--cluster", "debug")
    assert code == 1
    assert "2 failed: ValueError: no such corpus" in err
    assert "not complete: 2 runs" in err
    fake = FakeTrain().install(monkeypatch)
    code, out, _ = dlcm("sweep", "retry", "tiny")  # on the cluster of the last submit
    assert code == 0
    assert len(fake.calls) == 2
    assert "all 3 runs complete" in out


def test_a_changed_sweep_file_adds_runs_and_keeps_removed_ones_and_says_so(dlcm, place, monkeypatch):
    FakeTrain().install(monkeypatch)
    write_sweep(place, seeds=(0, 1))
    dlcm("sweep", "submit", "tiny.yaml", "--cluster", "debug")
    write_sweep(place, seeds=(1, 2))
    code, out, _ = dlcm("sweep", "submit", "tiny.yaml", "--cluster", "debug")
    assert code == 0
    assert "no longer in the sweep file, kept but not trained: 1 (" in out
    assert "1 run to train, 1 finished (skipped)" in out
    code, out, _ = dlcm("sweep", "status", "tiny")
    assert "no longer in the sweep file" in out


def test_a_dry_run_prints_the_plan_and_writes_nothing(dlcm, place):
    write_sweep(place)
    code, out, _ = dlcm("sweep", "submit", "tiny.yaml", "--dry-run")
    assert code == 0
    assert "would train 3 of 3 runs" in out
    assert not (place / "runs").exists()
    code, out, _ = dlcm("sweep", "submit", "tiny.yaml", "--dry-run", "--json")
    assert len(json.loads(out)["to_train"]) == 3


def test_json_of_submit_is_alone_on_stdout(dlcm, place, monkeypatch):
    FakeTrain().install(monkeypatch)
    write_sweep(place)
    code, out, err = dlcm("sweep", "submit", "tiny.yaml", "--cluster", "debug", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["overview"]["n_complete"] == 3
    assert {run["status"] for run in told["runs"]} == {"finished"}
    assert "runs to train" in err


def test_status_shows_each_run_and_json_the_same(dlcm, stored):
    first, second, third = stored.runs
    finish(first)
    fail(second)
    beat(third)
    code, out, _ = dlcm("sweep", "status", "tiny")
    assert code == 0
    for run, word in ((first, "finished"), (second, "failed"), (third, "lost")):
        line = next(line for line in out.splitlines() if line.startswith(run.run_id))
        assert word in line
    told = json.loads(dlcm("sweep", "status", "tiny", "--json")[1])
    assert [run["status"] for run in told["runs"]] == ["finished", "failed", "lost"]


def test_status_can_be_watched_to_the_end(dlcm, stored):
    for run in stored.runs:
        finish(run)
    code, out, _ = dlcm("sweep", "status", "tiny", "--watch")
    assert code == 0
    assert "3/3 runs complete" in out
    assert refused(dlcm("sweep", "status", "tiny", "--watch", "--json"), "--watch")


def test_logs_show_the_last_lines_and_the_failure(dlcm, stored):
    run = stored.runs[0]
    fail(run)
    (run.path / "logs").mkdir()
    (run.path / "logs" / "worker.log").write_text("".join(f"line {i}\n" for i in range(100)))
    code, out, _ = dlcm("sweep", "logs", "tiny", run.run_id[-10:], "--lines", "2")
    assert code == 0
    assert out.splitlines() == ["line 98", "line 99", "failed in train: ValueError: no"]
    told = json.loads(dlcm("sweep", "logs", "tiny", run.run_id, "--json")[1])
    assert told["failure"]["message"] == "ValueError: no"
    code, out, _ = dlcm("sweep", "logs", "tiny", run.run_id, "--follow")  # nobody holds the run: ends at once
    assert code == 0


def test_cancel_marks_the_named_run_alone(dlcm, stored):
    first, second, _ = stored.runs
    finish(first)
    code, out, _ = dlcm("sweep", "cancel", "tiny", second.run_id)
    assert code == 0
    assert f"cancelled 1 run ({second.run_id})" in out
    told = json.loads(dlcm("sweep", "status", "tiny", "--json")[1])
    assert [run["status"] for run in told["runs"]] == ["finished", "cancelled", "planned"]
    assert refused(dlcm("sweep", "cancel", "tiny", first.run_id), "already finished")


def test_collect_writes_the_table_and_says_where(dlcm, stored):
    finish(stored.runs[0])
    code, out, _ = dlcm("sweep", "collect", "tiny")
    assert code == 0
    assert "runs/tiny/results.parquet: 3 runs (2 planned, 1 finished)" in out
    told = json.loads(dlcm("sweep", "collect", "tiny", "--json")[1])
    assert told["rows"][0]["loss_nats"] == 4.0
    assert told["rows"][1]["loss_nats"] is None


@pytest.mark.parametrize("verb", ["status", "logs", "cancel", "retry", "collect"])
def test_a_sweep_that_is_not_there_is_refused_with_the_nearest_name(dlcm, stored, verb):
    assert refused(dlcm("sweep", verb, "tinny"), "runs/tinny: no such sweep", "did you mean 'tiny'")


@pytest.mark.parametrize("verb", ["logs", "cancel", "retry"])
def test_a_run_that_is_not_there_is_refused_with_the_nearest_name(dlcm, stored, verb):
    run_id = stored.runs[0].run_id
    assert refused(dlcm("sweep", verb, "tiny", run_id.replace("dlcm", "dclm")), "no run", run_id)


@pytest.mark.slow
def test_a_run_without_a_log_says_why(dlcm, stored):
    run = stored.runs[0]
    assert refused(dlcm("sweep", "logs", "tiny", run.run_id), "has not started")
    assert refused(dlcm("sweep", "logs", "tiny"), "no worker has written a log")


def test_a_cluster_that_is_not_there_is_refused_with_the_nearest_name(dlcm, place):
    write_sweep(place)
    assert refused(dlcm("sweep", "submit", "tiny.yaml", "--cluster", "slrum"), "did you mean 'slurm'")
    assert refused(dlcm("sweep", "submit", "tiny.yaml", "--concurrency", "0"), "--concurrency 0")
    assert not (place / "runs").exists()


def test_submitting_to_slurm_without_slurm_is_refused(dlcm, place, monkeypatch):
    write_sweep(place)
    monkeypatch.setenv("PATH", "/nowhere")
    assert refused(dlcm("sweep", "submit", "tiny.yaml", "--cluster", "slurm"), "no srun on PATH")


def test_a_folder_in_the_way_is_refused_and_left_as_it_was(dlcm, place):
    write_sweep(place)
    (place / "runs" / "tiny").mkdir(parents=True)
    (place / "runs" / "tiny" / "notes.txt").write_text("mine")
    assert refused(dlcm("sweep", "submit", "tiny.yaml", "--cluster", "debug"), "not empty and not a sweep")
    assert [path.name for path in (place / "runs" / "tiny").iterdir()] == ["notes.txt"]


def test_a_torn_metrics_line_is_refused_with_its_place_and_no_table_is_written(dlcm, stored):
    run = stored.runs[0]
    finish(run)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert refused(dlcm("sweep", "collect", "tiny"), "metrics.jsonl:9", "torn metrics line")
    assert not (stored.path / "results.parquet").exists()


def test_a_damaged_plan_is_refused(dlcm, stored):
    (stored.path / "plan.parquet").write_bytes(b"PAR1 not really")
    assert refused(dlcm("sweep", "status", "tiny"), "plan.parquet: not readable")


@pytest.mark.slow
def test_the_installed_command_gives_the_same_error_and_exit_code(place):
    program = Path(sys.executable).with_name("dlcm")
    answer = subprocess.run([program, "sweep", "status", "nothing"], capture_output=True, text=True, timeout=60)
    assert refused((answer.returncode, answer.stdout, answer.stderr), "no such sweep")
