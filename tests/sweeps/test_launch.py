import contextlib
import importlib
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dlcm.errors import UserError
from dlcm.record import read_json, read_metrics, run_lock, write_json
from sweeps.collect import collect
from sweeps.control import cancel, retryable, set_aside
from sweeps.jobs import append_jobs, job_states, kill_tree, read_jobs
from sweeps.launch import launch, resubmit
from sweeps.states import sweep_states
from sweeps.store import load_sweep, save_sweep
from sweeps.submit import Worker, worker_faults
from sweeps.watch import take_snapshot, watch
from tests.sweeps.tiny import FakeTrain, fail, finish, make_plan

submit_module = importlib.import_module("sweeps.submit")
WAIT_S = 120.0


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def until(condition, what):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.05)


def show(folder):
    return watch(folder, stream=io.StringIO(), stall_s=WAIT_S)


def contents(folder, run_ids=None):
    """What runs are, bit by bit, without what depends on the clock; all of the sweep by default."""
    found = {}
    for run in load_sweep(folder).runs:
        if run_ids is not None and run.run_id not in run_ids:
            continue
        result = {key: value for key, value in read_json(run.path / "result.json").items() if key != "wall_s"}
        rows = [
            {k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")}
            for row in read_metrics(run.path / "metrics.jsonl")
        ]
        newest = max((run.path / "checkpoints").glob("*.pt"))
        weights = torch.load(newest, weights_only=True)["model"]
        digest = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
        found[run.run_id] = (result, rows, digest)
    return found


# ---- what is sent out, without a scheduler


class FakeSlurm:
    """Records the arrays that would be submitted."""

    arrays: list = []  # noqa: RUF012
    parameters: dict = {}  # noqa: RUF012
    all_parameters: list = []  # noqa: RUF012

    def __init__(self, folder, max_num_timeout):
        self.pending = None

    def update_parameters(self, **parameters):
        FakeSlurm.parameters = parameters
        FakeSlurm.all_parameters.append(parameters)

    @contextlib.contextmanager
    def batch(self):
        self.pending = []
        yield
        FakeSlurm.arrays.append(self.pending)

    def submit(self, worker):
        job = type("Job", (), {"job_id": f"{100 + len(FakeSlurm.arrays)}_{len(self.pending)}"})()
        self.pending.append(worker)
        return job


@pytest.fixture
def slurm(monkeypatch):
    FakeSlurm.arrays, FakeSlurm.parameters, FakeSlurm.all_parameters = [], {}, []
    monkeypatch.setattr(submit_module.submitit, "SlurmExecutor", FakeSlurm)
    monkeypatch.setattr(submit_module, "max_array_size", lambda: 1001)
    return FakeSlurm


def test_slurm_gets_one_task_a_run_with_the_threads_set_before_python_starts(tmp_path, slurm):
    cluster = {
        "partition": "gpu",
        "time": "2:00:00",
        "gpus": 1,
        "cpus_per_run": 4,
        "memory": "8GB",
        "setup": ["module load x"],
    }
    submission = launch(make_plan(tmp_path, cluster=cluster), tmp_path / "s", "slurm", threads=2, concurrency=3)
    assert [len(array) for array in slurm.arrays] == [3]
    assert submission.job_ids == ("100_0", "100_1", "100_2")
    p = slurm.parameters
    assert (p["partition"], p["time"], p["gpus_per_node"], p["cpus_per_task"], p["mem"]) == ("gpu", 120, 1, 4, "8192M")
    assert p["array_parallelism"] == 3
    assert p["setup"][-1] == "module load x"
    assert "export OMP_NUM_THREADS=2" in p["setup"]
    assert {job.cluster for job in read_jobs(tmp_path / "s")} == {"slurm"}


def test_several_runs_to_a_task_ask_for_as_much_more_time(tmp_path, slurm):
    plan = make_plan(tmp_path, seeds=range(5), cluster={"time": "1:00:00"})
    launch(plan, tmp_path / "s", "slurm", runs_per_task=2)
    # Two full tasks, and a third with one run: half the time.
    assert [len(array) for array in slurm.arrays] == [2, 1]
    assert [p["time"] for p in slurm.all_parameters] == [120, 60]
    assert slurm.arrays[0][0].max_runs == 2


def test_arrays_are_cut_at_the_limit_of_the_cluster_and_share_the_cap(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(submit_module, "max_array_size", lambda: 4)
    launch(make_plan(tmp_path, seeds=range(10)), tmp_path / "s", "slurm", concurrency=6)
    assert [len(array) for array in slurm.arrays] == [4, 4, 2]
    assert slurm.parameters["array_parallelism"] == 2


def test_a_finished_run_is_not_sent_again_and_is_said_to_be_skipped(tmp_path, slurm):
    plan = make_plan(tmp_path)
    save_sweep(plan, tmp_path / "s")
    first, second, third = load_sweep(tmp_path / "s").runs
    finish(first)
    finish(second, "diverged")
    fail(third)
    submission = launch(plan, tmp_path / "s", "slurm")
    assert submission.to_train == (third.run_id,)
    assert [state.status for state in submission.skipped] == ["finished", "diverged"]


def test_a_machine_without_slurm_says_so_and_records_no_job(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no srun on PATH"):
        launch(make_plan(tmp_path), tmp_path / "s", "slurm")
    assert read_jobs(tmp_path / "s") == []


def test_gpus_that_are_not_there_are_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match="cluster.gpus = 2, but this machine shows 1"):
        launch(make_plan(tmp_path, cluster={"gpus": 2}), tmp_path / "s", "local")
    assert submit_module._local_gpus(1, 3) == [(3,), (3,), (3,)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert submit_module._local_gpus(2, 2) == [(0, 1), (2, 0)]


def test_two_submits_at_once_are_refused(tmp_path):
    with run_lock(tmp_path / "s", ".submit"), pytest.raises(UserError, match="another submit"):
        launch(make_plan(tmp_path), tmp_path / "s", "debug")


def test_a_worker_goes_back_into_the_queue_as_it_is(tmp_path):
    worker = Worker(tmp_path, 3, 1, tmp_path)
    assert worker.checkpoint().function == worker


def test_what_was_measured_of_a_run_is_set_aside_with_it(tmp_path):
    save_sweep(make_plan(tmp_path), tmp_path / "s")
    run = load_sweep(tmp_path / "s").runs[0]
    finish(run)
    for name in ("eval/corpus.json", "inside.json"):
        write_json(run.path / name, {})
    kept = set_aside(run)
    assert {"result.json", "eval", "inside.json"} <= {path.name for path in kept.iterdir()}
    assert not (run.path / "inside.json").exists()
    assert not (run.path / "result.json").exists()


def test_a_retry_takes_what_failed_was_lost_or_cancelled_and_refuses_the_rest(tmp_path, monkeypatch):
    save_sweep(make_plan(tmp_path, seeds=range(4)), tmp_path / "s")
    sweep = load_sweep(tmp_path / "s")
    first, second, third, fourth = sweep.runs
    finish(first)
    finish(second, "diverged")
    fail(third)
    states = sweep_states(sweep, {})
    assert retryable(sweep, states, ()) == [third.run_id]
    assert retryable(sweep, states, [fourth.run_id]) == [fourth.run_id]
    with pytest.raises(UserError, match="diverges again"):
        retryable(sweep, states, [second.run_id])
    with pytest.raises(UserError, match="nothing to retry"):
        retryable(sweep, states, [first.run_id])
    fake = FakeTrain().install(monkeypatch)
    resubmit(tmp_path / "s", "debug", run_ids=[third.run_id])
    assert fake.calls == [third.run_id]


def test_cancelled_runs_are_trained_by_the_next_submit(tmp_path, monkeypatch):
    fake = FakeTrain().install(monkeypatch)
    save_sweep(make_plan(tmp_path), tmp_path / "s")
    told = cancel(tmp_path / "s")
    assert len(told.run_ids) == 3
    assert {state.status for state in sweep_states(load_sweep(tmp_path / "s"), {})} == {"cancelled"}
    launch(make_plan(tmp_path), tmp_path / "s", "debug")
    assert len(fake.calls) == 3


def test_a_debug_job_lives_as_long_as_its_work_not_as_its_process(tmp_path, monkeypatch):
    seen = []
    FakeTrain(lambda config: seen.extend(job.state for job in job_states(tmp_path / "s").values())).install(monkeypatch)
    launch(make_plan(tmp_path), tmp_path / "s", "debug")
    assert set(seen) == {"running"}
    assert {job.state for job in job_states(tmp_path / "s").values()} == {"gone"}


def test_a_process_id_that_came_back_is_not_taken_for_the_job(tmp_path):
    from sweeps.jobs import Job, process_created

    created = process_created(os.getpid())
    job = Job(1, "local", str(os.getpid()), os.uname().nodename, created, time.time())
    append_jobs(tmp_path, [job])
    assert job_states(tmp_path)[f"1:{os.getpid()}"].state == "running"
    append_jobs(tmp_path, [Job(2, "local", str(os.getpid()), os.uname().nodename, created - 100.0, time.time())])
    assert job_states(tmp_path)[f"2:{os.getpid()}"].state == "gone"


# ---- real training


@pytest.mark.slow
def test_a_sweep_in_this_process_ends_in_a_full_table(tmp_path):
    seen = []
    plan = make_plan(tmp_path, seeds=(0, 1), baseline={"match": "parameters", "sizes": [20_000], "seeds": [0]})
    launch(plan, tmp_path / "s", "debug", threads=1, on_step=lambda progress: seen.append(progress.step))
    snapshot = take_snapshot(tmp_path / "s")
    assert snapshot.is_over
    assert snapshot.overview.n_complete == 3
    assert seen == list(range(1, 9)) * 3
    frame = collect(tmp_path / "s")
    filled = frame.drop(columns=["budget", "trunk", "loss_nats_stable"])
    assert filled.notna().all(axis=None)
    assert sorted(frame["model"]) == ["dense", "dlcm", "dlcm"]
    again = launch(plan, tmp_path / "s", "debug")
    assert (again.to_train, len(again.skipped), again.job_ids) == ((), 3, ())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Three runs, trained one after the other in one process."""
    folder = tmp_path_factory.mktemp("reference")
    os.environ["DLCM_CACHE"] = str(folder / "cache")
    launch(make_plan(folder, steps=60), folder / "s", "debug", threads=1)
    return folder


def step_of(folder, run_id):
    path = folder / run_id / "status.json"
    return read_json(path)["step"] if path.exists() else 0


def kill_one(folder, *, at_step=12, whole_job=False):
    """kill -9 a worker's process in the middle of a run, or its whole job; returns the run."""
    ids = [run.run_id for run in load_sweep(folder).runs]

    def victim():
        for run_id in ids:
            path = folder / run_id / "metrics.jsonl"
            if (
                path.exists()
                and len(read_metrics(path, running=True)) >= at_step
                and not (folder / run_id / "result.json").exists()
            ):
                return run_id
        return None

    until(victim, "a run in its middle")
    run_id = victim()
    if whole_job:
        kill_tree(int(read_jobs(folder)[0].job_id))
    else:
        os.kill(read_json(folder / run_id / "status.json")["pid"], signal.SIGKILL)
    return run_id


@pytest.mark.slow
def test_a_killed_run_resumes_on_resubmit_to_the_bits_of_an_uninterrupted_sweep(tmp_path, uninterrupted):
    (tmp_path / "corpus.jsonl").write_bytes((uninterrupted / "corpus.jsonl").read_bytes())
    # Run ids hold the path of the corpus: the same file for both.
    plan = make_plan(uninterrupted, steps=60)
    folder = tmp_path / "s"
    first = launch(plan, folder, "local", concurrency=1, threads=1)
    killed = kill_one(folder, whole_job=True)
    snapshot = show(folder)
    states = {state.run_id: state for state in snapshot.states}
    assert snapshot.is_over
    assert states[killed].status == "lost"
    assert "died at step" in (states[killed].reason or "")
    assert "ended without a word" in worker_faults(folder, first.number)[first.job_ids[0]]
    done = {run_id for run_id, state in states.items() if state.status == "finished"}

    again = launch(plan, folder, "local", concurrency=2, threads=1)
    assert set(again.to_train) == set(states) - done
    assert show(folder).overview.n_complete == 3
    assert worker_faults(folder, again.number) == {}
    assert contents(folder) == contents(uninterrupted / "s")
    log = (folder / killed / "checkpoints").glob("*.pt")
    assert len(list(log)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 2])
def test_the_run_of_a_killed_worker_goes_on_by_itself_and_its_death_is_told(tmp_path, uninterrupted, concurrency):
    folder = tmp_path / "s"
    launch(make_plan(uninterrupted, steps=60), folder, "local", concurrency=concurrency, threads=1)
    killed = kill_one(folder)
    snapshot = show(folder)
    assert snapshot.overview.n_complete == 3, [state.reason for state in snapshot.states]
    record = read_json(folder / killed / "status.json")
    # Its supervisor buries it, unless another worker was faster: then that is one start more.
    assert record["deaths"] == 1 or (concurrency == 2 and record["starts"] == 2)
    assert contents(folder) == contents(uninterrupted / "s")


@pytest.mark.slow
def test_cancelling_a_sweep_ends_its_runs_and_its_processes(tmp_path):
    folder = tmp_path / "s"
    launch(make_plan(tmp_path, steps=5000), folder, "local", concurrency=2, threads=1)
    until(lambda: any(s.step > 0 for s in take_snapshot(folder).states), "a first step")
    told = cancel(folder)
    snapshot = take_snapshot(folder)
    assert told.still_running == ()
    assert snapshot.is_over
    assert {state.status for state in snapshot.states} == {"cancelled"}


@pytest.mark.slow
def test_workers_ignore_the_interrupt_that_ends_the_watching(tmp_path):
    folder = tmp_path / "s"
    launch(make_plan(tmp_path, steps=40, seeds=(0,)), folder, "local", concurrency=1, threads=1)
    until(lambda: any(s.step > 0 for s in take_snapshot(folder).states), "a first step")
    record = read_json(next(folder.glob("*/status.json")))
    os.kill(record["pid"], signal.SIGINT)
    os.kill(int(read_jobs(folder)[0].job_id), signal.SIGINT)
    assert show(folder).overview.n_complete == 1


@pytest.mark.slow
def test_the_environment_of_a_worker_has_its_threads_before_torch_is_imported(tmp_path):
    folder = tmp_path / "s"
    launch(make_plan(tmp_path, steps=2, seeds=(0,)), folder, "local", concurrency=1, threads=1)
    until(lambda: list(folder.glob("*/status.json")), "a heartbeat")
    pid = json.loads(next(folder.glob("*/status.json")).read_text())["pid"]
    with contextlib.suppress(FileNotFoundError):  # it may be done already
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in variables
    assert show(folder).overview.n_complete == 1
    assert read_json(next(folder.glob("*/env.json")))["threads"] == 1
