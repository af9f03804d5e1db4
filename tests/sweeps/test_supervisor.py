"""A supervisor keeps workers going, says how they died, and stops them in time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dlcm.errors import UserError
from dlcm.record import read_json
from sweeps import supervisor
from sweeps.code import packages_root
from sweeps.heartbeat import MAX_DEATHS, record_death
from sweeps.states import run_state
from sweeps.store import load_sweep, save_sweep
from sweeps.supervisor import supervise
from tests.sweeps.tiny import beat, finish, make_plan

# Stands in for `python -m sweeps.worker PAYLOAD PIPE PARENT`: what a worker tells, without what it does.
TELLING = """
import json, os, signal, sys, time
def tell(**facts): os.write(int(sys.argv[2]), (json.dumps(facts) + "\\n").encode())
"""


@pytest.fixture
def run(tmp_path):
    save_sweep(make_plan(tmp_path), tmp_path / "s")
    return load_sweep(tmp_path / "s").runs[0]


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Replaces the worker by a script."""

    def use(script):
        path = tmp_path / "worker.py"
        path.write_text(TELLING + script)
        start = subprocess.Popen

        def popen(command, **options):
            i = command.index("sweeps.worker")
            return start([command[0], str(path), *command[i + 1 :]], **options)

        monkeypatch.setattr(supervisor.subprocess, "Popen", popen)

    return use


def payload(run, **more):
    return {"sweep_dir": str(run.path.parent), "submission": 1, "root": str(packages_root()), **more}


def test_reports_of_all_workers_come_together(run, worker):
    worker('tell(run_id="a"); tell(report={"finished": [str(os.getpid())], "failed": ["x"]})')
    outcome = supervise(payload(run), 3, grace_s=5)
    assert outcome.stopped is None
    assert len(set(outcome.report["finished"])) == 3
    assert outcome.report["failed"] == ["x"] * 3


def test_a_worker_that_cannot_work_ends_the_job_with_its_line(run, worker):
    worker('tell(error="another installation"); sys.exit(78)')
    with pytest.raises(UserError, match="another installation"):
        supervise(payload(run), 2, grace_s=5)


def test_workers_that_end_before_they_take_a_run_are_not_started_for_ever(run, worker):
    worker("os.kill(os.getpid(), signal.SIGABRT)")
    with pytest.raises(UserError, match="workers end before they take a run .killed by SIGABRT"):
        supervise(payload(run), 1, grace_s=5)


def test_a_run_that_kills_its_worker_again_and_again_has_failed_and_the_others_go_on(run, worker):
    (run.path / "logs").mkdir(parents=True)
    status = run.path / "status.json"
    beat(run)
    # As a worker does: leaves its pid in the heartbeat, takes the run up to the bound, then finds nothing more.
    worker(f"""
from pathlib import Path
path = Path({str(status)!r})
facts = json.loads(path.read_text())
if facts["deaths"] >= {MAX_DEATHS}:
    tell(report={{"finished": ["another"]}})
    sys.exit(0)
path.write_text(json.dumps(facts | {{"pid": os.getpid(), "state": "running"}}))
tell(run_id={run.run_id!r})
os.kill(os.getpid(), signal.SIGSEGV)
""")
    outcome = supervise(payload(run), 1, grace_s=5)
    assert outcome.report["finished"] == ["another"]
    state = run_state(run)
    assert state.status == "failed"
    assert state.reason == f"its process died {MAX_DEATHS} times, the last time killed by SIGSEGV"
    assert (run.path / "logs" / "worker.log").read_text().count("killed by SIGSEGV") == MAX_DEATHS


def test_a_kill_for_want_of_memory_halves_the_micro_batch(run, worker, monkeypatch):
    (run.path / "logs").mkdir(parents=True)
    monkeypatch.setattr(supervisor, "_memory_was_short", lambda: True)
    beat(run)
    worker(f"""
from pathlib import Path
path = Path({str(run.path / "status.json")!r})
if Path({str(run.path / "memory.json")!r}).exists():
    sys.exit(0)
path.write_text(json.dumps(json.loads(path.read_text()) | {{"pid": os.getpid()}}))
tell(run_id={run.run_id!r})
os.kill(os.getpid(), signal.SIGKILL)
""")
    supervise(payload(run), 1, grace_s=5)
    assert read_json(run.path / "memory.json")["micro_batch_tokens"] == 64
    state = run_state(run)
    assert "killed by SIGKILL: out of memory" in str(state.reason)
    assert "goes on with 64" in str(state.note)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_reaches_the_workers_and_is_told(run, worker, tmp_path, number):
    worker(f"""
signal.signal(signal.SIGTERM, lambda *_: (tell(report={{"stopped": ["r"]}}), sys.exit(75)))
tell(run_id="r")
Path = __import__("pathlib").Path
Path({str(tmp_path / "ready")!r}).touch()
os.kill(int(sys.argv[3]), {int(number)})
time.sleep(60)
""")
    outcome = supervise(payload(run), 1, grace_s=20)
    assert outcome.stopped == signal.Signals(number).name
    assert outcome.report["stopped"] == ["r"]


@pytest.mark.slow
def test_a_worker_that_does_not_stop_is_ended_after_the_grace(run, worker):
    worker("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
tell(run_id="r")
os.kill(int(sys.argv[3]), signal.SIGUSR2)
time.sleep(60)
""")
    start = time.monotonic()
    assert supervise(payload(run), 1, grace_s=0.5).stopped == "SIGUSR2"
    assert time.monotonic() - start < 30  # bounded, not timed: it would sleep for sixty


def test_the_death_of_another_process_is_not_recorded(run):
    beat(run)
    assert record_death(run, 999_999, "killed") == 0
    assert read_json(run.path / "status.json")["state"] == "running"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_workers_die_with_their_supervisor(run, tmp_path):
    code = f"""
import subprocess, sys, time
from tests.sweeps.test_supervisor import dying
dying({str(tmp_path)!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=packages_root())
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def dying(folder):
    """Start a child that dies with this process, and wait."""
    code = (
        "import os, sys, time; from pathlib import Path; from sweeps.worker import _die_with; _die_with(int(sys.argv[1]));"
        " Path(sys.argv[2], 'pid').write_text(str(os.getpid())); time.sleep(60)"
    )
    subprocess.Popen([sys.executable, "-c", code, str(os.getpid()), folder], cwd=Path.cwd())
    time.sleep(60)


@pytest.mark.slow
def test_several_runs_share_a_task(tmp_path, monkeypatch):
    """Two workers at once, real training, one supervisor."""
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    save_sweep(make_plan(tmp_path, seeds=range(4)), tmp_path / "s")
    outcome = supervise(payload(load_sweep(tmp_path / "s").runs[0], threads=1, only=None, max_runs=2), 2, grace_s=5)
    assert len(outcome.report["finished"]) == 4
    finish_pids = {read_json(path)["pid"] for path in (tmp_path / "s").glob("*/status.json")}
    assert len(finish_pids) == 2
    assert finish is not None
