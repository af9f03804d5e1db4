import importlib
import shutil
import socket
import time

import pytest

from dlcm.errors import UserError
from dlcm.record import run_lock, write_json
from sweeps.jobs import JobState
from sweeps.lease import LEASE_S
from sweeps.states import SILENT_S, Evidence, run_state, sweep_states
from sweeps.store import CLAIM, find_sweep, load_sweep, save_sweep
from tests.sweeps.tiny import beat, fail, finish, make_plan


def with_job(submission, state="running", job_id="1"):
    """Evidence of one job."""
    return Evidence({"job": JobState(job_id, submission, "slurm", state)})


@pytest.fixture
def sweep(tmp_path):
    save_sweep(make_plan(tmp_path), tmp_path / "runs" / "tiny")
    return load_sweep(tmp_path / "runs" / "tiny")


@pytest.fixture
def run(sweep):
    return sweep.runs[0]


def test_a_stored_sweep_gives_back_every_config_and_its_evaluation(tmp_path):
    plan = make_plan(tmp_path, evaluate=["corpus"])
    save_sweep(plan, tmp_path / "runs" / "tiny")
    stored = load_sweep(tmp_path / "runs" / "tiny")
    assert [run.config for run in stored.runs] == [run.config for run in plan.runs]
    assert [run.flops_planned for run in stored.runs] == [run.flops_train_planned for run in plan.runs]
    assert stored.spec.evaluate == ("corpus",)


def test_a_sweep_directory_is_read_where_neither_corpus_nor_sweep_file_exist(tmp_path):
    save_sweep(make_plan(tmp_path), tmp_path / "runs" / "tiny")
    (tmp_path / "corpus.jsonl").unlink()
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    assert len(load_sweep(tmp_path / "elsewhere" / "tiny").runs) == 3


def test_runs_added_to_the_sweep_file_are_added_and_removed_ones_are_kept(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    save_sweep(make_plan(tmp_path, seeds=(0, 1)), folder)
    saved = save_sweep(make_plan(tmp_path, seeds=(1, 2)), folder)
    assert len(saved.added) == len(saved.removed) == 1
    assert {run.config.seed: run.in_plan for run in load_sweep(folder).runs} == {0: False, 1: True, 2: True}


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_was(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and not a sweep"):
        save_sweep(make_plan(tmp_path), folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_run_is_found_by_its_hash_and_a_misspelt_one_names_the_nearest(sweep, run):
    assert sweep.run(run.run_id[-10:]) is run
    with pytest.raises(UserError, match=f"did you mean '{run.run_id}'"):
        sweep.run(run.run_id.replace("dlcm", "dclm"))
    with pytest.raises(UserError, match="name of 3 runs"):
        sweep.run("dlcm")


def test_a_sweep_is_found_by_directory_name_or_file_and_a_misspelt_one_names_the_nearest(tmp_path, sweep):
    runs = tmp_path / "runs"
    assert find_sweep(str(runs / "tiny"), tmp_path) == runs / "tiny"
    assert find_sweep("tiny", runs) == runs / "tiny"
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        find_sweep("tniy", runs)
    with pytest.raises(UserError, match="nor any other"):
        find_sweep("tiny", tmp_path / "empty")


def test_untouched_runs_are_planned_and_those_of_a_live_job_queued(sweep):
    assert {state.status for state in sweep_states(sweep, {})} == {"planned"}
    jobs = {"1:7": JobState("7", 1, "slurm", "pending")}
    assert {state.status for state in sweep_states(sweep, jobs)} == {"queued"}
    gone = {"1:7": JobState("7", 1, "slurm", "gone")}
    assert {(s.status, s.reason) for s in sweep_states(sweep, gone)} == {("planned", "no worker is left; submit again")}


def test_a_held_run_is_running_with_its_progress_and_time_left(run):
    beat(run)
    with run_lock(run.path, CLAIM):
        state = run_state(run)
    assert (state.status, state.step, state.loss_nats, state.phase) == ("running", 3, 4.5, "train")
    assert state.seconds_left == pytest.approx((run.config.n_steps - 3) * 128 / 100.0)


def test_a_run_whose_process_died_is_lost_with_the_reason(run):
    beat(run)
    state = run_state(run)
    assert state.status == "lost"
    assert "died at step 3" in (state.reason or "")


def test_a_run_whose_worker_was_stopped_waits_for_its_job_and_is_lost_without_one(run):
    beat(run, state="stopped")
    assert run_state(run, evidence=with_job(1)).status == "queued"
    assert run_state(run).status == "lost"


@pytest.mark.parametrize(("age_s", "status"), [(1.0, "running"), (3600.0, "lost")])
def test_on_another_machine_the_heartbeat_decides(run, age_s, status):
    beat(run, host=f"not-{socket.gethostname()}", age_s=age_s)
    assert run_state(run).status == status


def test_a_held_run_without_heartbeats_is_running_and_says_so(run):
    beat(run, age_s=600.0)
    with run_lock(run.path):
        state = run_state(run)
    assert state.status == "running"
    assert "no heartbeat for 600 s" in (state.reason or "")


def test_results_failures_and_cancellations_are_what_their_files_say(sweep):
    first, second, third = sweep.runs
    finish(first)
    fail(second)
    write_json(third.path / "cancelled.json", {})
    assert [state.status for state in sweep_states(sweep, {})] == ["finished", "failed", "cancelled"]
    finish(third, "diverged")
    state = run_state(third)
    assert (state.status, state.reason, state.is_complete) == ("diverged", "loss is nan at step 3", True)


def test_a_failed_run_is_queued_once_a_later_submission_has_a_job(run):
    fail(run, submission=2)
    assert run_state(run, evidence=with_job(2)).status == "failed"
    assert run_state(run, evidence=with_job(3)).status == "queued"


def test_a_finished_run_is_complete_only_when_it_is_evaluated(run):
    finish(run)
    fail(run, stage="evaluate")
    state = run_state(run, ["corpus"])
    assert (state.status, state.missing_evaluations, state.is_complete) == ("finished", ("corpus",), False)
    assert "evaluation failed" in (state.reason or "")
    write_json(run.path / "eval" / "corpus.json", {})
    state = run_state(run, ["corpus"])
    assert state.is_complete
    assert state.reason is None


def test_a_torn_record_is_refused_by_name(run):
    run.path.mkdir()
    (run.path / "result.json").write_text('{"schema": 1,')
    with pytest.raises(UserError, match="result.json: not readable as JSON"):
        run_state(run)


def test_a_silent_run_of_another_machine_is_lost_as_soon_as_its_job_is_gone_and_held_while_its_job_runs(run):
    beat(run, host="elsewhere", age_s=SILENT_S + 5, job_id="7_1")
    assert run_state(run, evidence=with_job(1, "running", "7_1")).status == "running"
    assert "no heartbeat for" in str(run_state(run, evidence=with_job(1, "running", "7_1")).reason)
    assert (
        run_state(run, evidence=with_job(1, "unknown", "7_1")).status == "running"
    )  # SLURM does not answer: wait a minute
    assert run_state(run, evidence=with_job(1, "gone", "7_1")).status == "lost"
    beat(run, host="elsewhere", age_s=LEASE_S + 5, job_id="7_1")
    assert run_state(run, evidence=with_job(1, "unknown", "7_1")).status == "lost"
    assert run_state(run, evidence=with_job(1, "running", "7_1")).status == "running"


def test_a_fresh_heartbeat_is_trusted_whatever_the_scheduler_says(run):
    beat(run, host="elsewhere", job_id="7_1")
    assert run_state(run, evidence=with_job(1, "gone", "7_1")).status == "running"


def test_accounting_adds_its_word_to_a_lost_run_and_silence_adds_nothing(tmp_path, run, monkeypatch):
    beat(run, host="elsewhere", age_s=LEASE_S + 5, job_id="7_1")
    sweep, jobs = load_sweep(run.path.parent), {"1:7_1": JobState("7_1", 1, "slurm", "gone")}
    (tmp_path / "bin").mkdir()
    sacct = tmp_path / "bin" / "sacct"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for script, words in (
        ("echo '7_1|NODE_FAIL'", "(SLURM: NODE_FAIL)"),
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", "died at step"),
    ):
        sacct.write_text(f"#!/bin/sh\n{script}\n")
        sacct.chmod(0o755)
        state = next(s for s in sweep_states(sweep, jobs) if s.run_id == run.run_id)
        assert state.status == "lost"
        assert words in str(state.reason)
    monkeypatch.setattr(importlib.import_module("sweeps.jobs"), "_SACCT_TIMEOUT_S", 0.2)
    sacct.write_text("#!/bin/sh\nexec sleep 30\n")
    start = time.monotonic()
    assert next(s for s in sweep_states(sweep, jobs) if s.run_id == run.run_id).status == "lost"
    assert time.monotonic() - start < 10  # bounded, not timed: the script would sleep for thirty
