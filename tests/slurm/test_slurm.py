import contextlib
import importlib
import io
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dlcm.errors import UserError
from dlcm.record import read_json, read_metrics
from sweeps import Sweep, plan
from sweeps.control import cancel
from sweeps.evaluations import evaluate_and_show
from sweeps.jobs import job_states, max_array_size, read_jobs
from sweeps.launch import launch
from sweeps.session import Options
from sweeps.store import load_sweep
from sweeps.submit import worker_faults
from sweeps.watch import take_snapshot, watch
from tests.slurm.cluster import loopback_cluster, why_not
from tests.sweeps.test_launch import contents
from tests.sweeps.tiny import make_plan, sweep_dict

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}"),
]
WAIT_S = 180.0
CLUSTER = {"time": "10", "threads": 1}


@pytest.fixture(scope="module")
def cluster():
    with loopback_cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def client(cluster, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SLURM_CONF", str(cluster.config))
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(importlib.import_module("sweeps.watch"), "_SQUEUE_EVERY_S", 0.5)


def show(folder):
    return watch(folder, stream=io.StringIO(), stall_s=WAIT_S)


def until(condition, what):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.1)


def test_a_sweep_on_slurm_ends_with_every_run_finished_in_one_array(tmp_path):
    folder = tmp_path / "s"
    submission = launch(make_plan(tmp_path, cluster=CLUSTER), folder, "slurm", concurrency=2)
    snapshot = show(folder)
    assert snapshot.overview.n_complete == 3, (snapshot.states, worker_faults(folder, 1))
    assert len({job_id.split("_")[0] for job_id in submission.job_ids}) == 1
    assert {state.state for state in job_states(folder).values()} == {"gone"}
    for run in load_sweep(folder).runs:
        env = read_json(run.path / "env.json")
        assert env["slurm"]["SLURM_ARRAY_JOB_ID"] == submission.job_ids[0].split("_")[0]
        assert env["threads"] == 1


def test_a_run_that_is_out_of_time_is_requeued_and_resumes_to_the_same_bits(tmp_path, cluster):
    plan = make_plan(tmp_path, steps=150, seeds=(0,), cluster=CLUSTER)
    launch(plan, tmp_path / "reference", "debug", threads=1)
    folder = tmp_path / "s"
    submission = launch(plan, folder, "slurm")
    until(lambda: take_snapshot(folder).states[0].step >= 10, "ten steps")
    # What slurmctld sends ahead of the time limit.
    cluster.client(["scancel", "--signal=USR2", submission.job_ids[0]])
    until(lambda: take_snapshot(folder).states[0].status == "queued", "the requeue")
    stopped_at = take_snapshot(folder).states[0].step
    assert 10 <= stopped_at < 150
    snapshot = show(folder)
    assert snapshot.overview.n_complete == 1
    assert read_json(next(folder.glob("*/env.json")))["slurm"]["SLURM_RESTART_COUNT"] == "1"
    assert contents(folder) == contents(tmp_path / "reference")


def test_waiting_jobs_are_queued_and_cancelling_the_sweep_ends_them(tmp_path):
    folder = tmp_path / "s"
    launch(make_plan(tmp_path, steps=5000, cluster=CLUSTER), folder, "slurm", concurrency=1)
    until(lambda: any(state.step > 0 for state in take_snapshot(folder).states), "a first step")
    assert sorted(state.status for state in take_snapshot(folder).states) == ["queued", "queued", "running"]
    told = cancel(folder)
    assert len(told.job_ids) == 3
    until(lambda: take_snapshot(folder).is_over, "the end of the jobs")
    assert {state.status for state in take_snapshot(folder).states} == {"cancelled"}


def test_a_job_that_sbatch_refuses_is_one_line_and_leaves_no_job(tmp_path):
    with pytest.raises(UserError, match="sbatch refused the job: .*partition"):
        launch(make_plan(tmp_path, cluster=CLUSTER | {"partition": "nowhere"}), tmp_path / "s", "slurm")
    assert read_jobs(tmp_path / "s") == []


def test_the_command_line_submits_waits_and_reports(tmp_path, capsys, monkeypatch):
    from dlcm.cli import main
    from tests.sweeps.tiny import sweep_dict

    (tmp_path / "tiny.yaml").write_text(json.dumps(sweep_dict(tmp_path, seeds=(0, 1), cluster=CLUSTER)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["dlcm", "sweep", "submit", "tiny.yaml", "--cluster", "slurm", "--runs-per-task", "2", "--wait"]
    )
    with pytest.raises(SystemExit) as code:
        main()
    assert code.value.code == 0, capsys.readouterr()
    assert len(read_jobs(Path("runs/tiny"))) == 1
    assert "all 2 runs complete" in capsys.readouterr().out


def test_all_runs_are_evaluated_on_the_cluster_and_one_that_is_out_of_time_goes_on(
    tmp_path, cluster, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "s"
    plan = make_plan(tmp_path, seeds=(0, 1), cluster=CLUSTER)
    launch(plan, folder, "debug", threads=1)
    rows = [{"query": f"alpha {i} was", "choices": ["so", "in it"], "gold": i % 2} for i in range(3000)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"limit": None, "force": False, "as_json": False}
    options = Options("slurm", {}, concurrency=2)
    assert evaluate_and_show(folder, ["many.jsonl"], options, detach=None, **how) == 0
    assert "submission 2: 2 slurm jobs" in capsys.readouterr().out
    jobs = [job for job in read_jobs(folder) if job.cluster == "slurm"]
    until(lambda: "evaluate" in [state.phase for state in take_snapshot(folder).states], "an evaluation")
    cluster.client(["scancel", "--signal=USR2", jobs[0].job_id])
    assert show(folder).overview.n_complete == 2, (take_snapshot(folder).states, worker_faults(folder, 2))
    assert {len(read_json(path)["correct"]) for path in folder.glob("*/eval/many.json")} == {3000}
    assert evaluate_and_show(folder, ["many.jsonl"], options, detach=False, **how) == 0
    assert "0 runs to evaluate, 2 done before (skipped)" in capsys.readouterr().out


def test_the_limit_of_an_array_is_the_clusters():
    assert max_array_size() == 1001
    assert os.environ["SLURM_CONF"].startswith("/tmp/slurm-")


def test_a_run_over_two_tasks_gives_what_one_gives_and_survives_a_time_out(tmp_path, cluster):
    train = {"batch_tokens": 256, "tokens": 256 * 120, "checkpoint_every": 20, "log_every": 1}
    base = {**make_plan(tmp_path).sweep.base, **{f"train.{key}": value for key, value in train.items()}}
    spec = {"name": "ranks", "base": base, "axes": {"grid": {"seed": [0]}}, "minimum": {"steps": 0}}
    one = plan(Sweep.from_dict(spec))
    launch(one, tmp_path / "reference", "debug", threads=1)
    folder = tmp_path / "s"
    submission = launch(one, folder, "slurm", settings={"time": "10", "ranks_per_node": 2})
    until(lambda: take_snapshot(folder).states[0].step >= 10, "ten steps")
    with contextlib.suppress(subprocess.TimeoutExpired):
        command = ["scancel", "--signal=USR2", submission.job_ids[0]]
        subprocess.run(command, env=cluster.environment, timeout=3, check=False)
    snapshot = show(folder)
    assert snapshot.overview.n_complete == 1, (snapshot.states, worker_faults(folder, 1))
    (run,) = load_sweep(folder).runs
    env, reference = read_json(run.path / "env.json"), tmp_path / "reference" / run.run_id
    assert env["n_ranks"] == 2
    assert env["slurm"]["SLURM_RESTART_COUNT"] == "1"
    losses, expected = (
        [row["loss_nats"] for row in read_metrics(path / "metrics.jsonl")][:20] for path in (run.path, reference)
    )
    assert losses == pytest.approx(expected, rel=2e-3)


def test_another_user_than_root_submits_and_its_runs_are_its_own(tmp_path, cluster):
    """Everything of a sweep as a plain user: the client reads the cluster's files, and the run's files are the user's."""
    user = pwd.getpwnam("nobody")
    home = Path(tempfile.mkdtemp(prefix="dlcm-user-", dir="/tmp"))
    try:
        (home / "tiny.yaml").write_text(json.dumps(sweep_dict(home, seeds=(0,), cluster=CLUSTER)))
        for path in (home, *home.iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)
        if not reads(user, Path(sys.executable)) or not reads(user, Path(__file__)):
            pytest.skip("the environment of the tests is closed to other users")
        environment = {**cluster.environment, "HOME": str(home), "DLCM_CACHE": str(home / "cache")}
        command = [sys.executable, "-c", "from dlcm.cli import main; main()", "sweep", "submit", "tiny.yaml"]
        done = subprocess.run(
            [*command, "--cluster", "slurm", "--wait"],
            env=environment, cwd=home, user=user.pw_uid, group=user.pw_gid, extra_groups=[],
            capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        results = list(home.glob("runs/tiny/*/result.json"))
        assert len(results) == 1
        assert results[0].stat().st_uid == user.pw_uid
    finally:
        shutil.rmtree(home, ignore_errors=True)


def reads(user, path):
    command = ["test", "-r", str(path.resolve())]
    return subprocess.run(command, user=user.pw_uid, group=user.pw_gid, extra_groups=[], check=False).returncode == 0
