"""Getting a plan run: submitit jobs, each a worker on the sweep directory. The only importer of submitit.

`debug` works in this process, `local` in processes of this machine that outlive the command, `slurm` in job arrays.
What a worker does is in `sweeps.worker`. Whether it still lives is asked of the kernel or the scheduler, never waited
for through submitit, whose `result()` has no bound when a job dies without accounting.
"""

import contextlib
import math
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths, UncompletedJobError
from submitit.helpers import DelayedSubmission

from dlcm.errors import UserError
from dlcm.record import RunBusyError, run_lock
from sweeps.jobs import (
    Cluster,
    Job,
    append_job,
    check_submit,
    job_key,
    job_states,
    jobs_folder,
    max_array_size,
    process_created,
    read_jobs,
)
from sweeps.store import (
    RunState,
    Saved,
    StoredRun,
    StoredSweep,
    check_sweep_dir,
    load_sweep,
    read_record,
    save_sweep,
    sweep_states,
)
from sweeps.worker import THREAD_VARIABLES, packages_root, thread_environment, work

if TYPE_CHECKING:
    from dlcm.train import Progress
    from sweeps.plan import Plan

# submitit wants a limit for local jobs; ours end when no run is left.
_LOCAL_LIMIT_MIN = 60 * 24 * 365
# A long run goes through many time-outs: each requeue resumes from its checkpoint. This many without an end is a fault.
_MAX_TIMEOUTS = 50
_SIGNAL_LEAD_S = 90


@dataclass(frozen=True)
class Submission:
    """What was submitted, and what was not because nothing was left to do."""

    sweep_dir: Path
    number: int
    cluster: Cluster
    job_ids: tuple[str, ...]
    to_train: tuple[str, ...]
    skipped: tuple[RunState, ...]
    saved: Saved | None = None


@dataclass(frozen=True)
class Worker:
    """The job: pickled by submitit, and put back into the queue as it is after a time-out or a preemption."""

    sweep_dir: Path
    submission: int
    threads: int
    root: Path
    max_runs: int | None = None
    only: tuple[str, ...] | None = None

    def __call__(self) -> dict[str, list[str]]:
        """Work on the sweep directory until no run is left for this worker."""
        report = work(
            self.sweep_dir,
            submission=self.submission,
            threads=self.threads,
            max_runs=self.max_runs,
            only=self.only,
            root=self.root,
            job_id=submitit.JobEnvironment().job_id,
            fatal=(UncompletedJobError,),
        )
        return asdict(report)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues: the same worker; what is done and what is not stands in the run directories."""
        return DelayedSubmission(self)


def launch(
    plan: "Plan",
    sweep_dir: Path,
    cluster: Cluster = "local",
    *,
    concurrency: int | None = None,
    threads: int | None = None,
    runs_per_task: int = 1,
    on_run: Callable[[StoredRun], None] | None = None,
    on_step: Callable[["Progress"], None] | None = None,
) -> Submission:
    """Store the plan in `sweep_dir` and submit workers for whatever is not finished.

    Args:
        plan: the planned runs.
        sweep_dir: directory of the sweep, usually `runs/<sweep>`.
        cluster: `local` (processes of this machine), `slurm`, or `debug` (this process, one run after the other).
        concurrency: runs at once; the sweep file's `cluster` block where absent.
        threads: CPU threads of one run; the sweep file's `cluster` block where absent.
        runs_per_task: runs that one task of a SLURM array trains, one after the other; its wall time grows with it.
        on_run: `debug` only: called as a run is taken.
        on_step: `debug` only: called with each `Progress` of the training.

    Returns:
        At once with the job ids; with `debug`, when all is done.

    Raises:
        UserError: the directory is not a sweep, another submit is writing to it, or the cluster refuses the job.
    """
    check_submit(cluster, concurrency, threads, runs_per_task)
    check_sweep_dir(sweep_dir)  # before the lock puts a file into it
    with _submit_lock(sweep_dir):
        saved = save_sweep(plan, sweep_dir)
    return resubmit(
        sweep_dir,
        cluster,
        concurrency=concurrency,
        threads=threads,
        runs_per_task=runs_per_task,
        on_run=on_run,
        on_step=on_step,
        saved=saved,
    )


def resubmit(
    sweep_dir: Path,
    cluster: Cluster = "local",
    *,
    concurrency: int | None = None,
    threads: int | None = None,
    runs_per_task: int = 1,
    run_ids: Sequence[str] | None = None,
    on_run: Callable[[StoredRun], None] | None = None,
    on_step: Callable[["Progress"], None] | None = None,
    saved: Saved | None = None,
) -> Submission:
    """Submit workers for the unfinished runs of a stored sweep, or for those of `run_ids` alone.

    The other arguments and the errors are those of `launch`.
    """
    check_submit(cluster, concurrency, threads, runs_per_task)
    sweep_dir = sweep_dir.resolve()
    with _submit_lock(sweep_dir):
        sweep = load_sweep(sweep_dir)
        jobs = read_jobs(sweep_dir)
        states = sweep_states(sweep, job_states(sweep_dir))
        only = None if run_ids is None else tuple(sweep.run(name).run_id for name in run_ids)
        todo = [state for state in states if is_to_train(state) and (only is None or state.run_id in only)]
        number = _next_submission(sweep, jobs)
        for state in todo:
            (sweep_dir / state.run_id / "cancelled.json").unlink(missing_ok=True)
        threads = threads or sweep.spec.cluster.threads
        job_ids: list[str] = []
        if todo and cluster != "debug":
            submit = _submit_local if cluster == "local" else _submit_slurm
            max_runs = runs_per_task if cluster == "slurm" else None
            worker = Worker(sweep_dir, number, threads, packages_root(), max_runs, only)
            job_ids = submit(sweep, worker, len(todo), concurrency)
        elif todo:
            job_ids = [str(os.getpid())]
            _record(sweep_dir, number, "debug", job_ids, {"threads": threads})
    if todo and cluster == "debug":
        with run_lock(jobs_folder(sweep_dir, number)):
            work(
                sweep_dir,
                submission=number,
                threads=threads,
                only=only,
                capture=False,
                on_run=on_run,
                on_step=on_step,
            )
    return Submission(
        sweep_dir=sweep_dir,
        number=number,
        cluster=cluster,
        job_ids=tuple(job_ids),
        to_train=tuple(state.run_id for state in todo),
        skipped=tuple(state for state in states if state.in_plan and not is_to_train(state)),
        saved=saved,
    )


def _next_submission(sweep: StoredSweep, jobs: Sequence[Job]) -> int:
    """A number above all that stand in the runs' files too: a failure of this submission would not be retried by it."""
    numbers = [job.submission for job in jobs]
    for run in sweep.runs:
        for name in ("failure.json", "status.json"):
            if record := read_record(run.path / name):
                numbers.append(record["submission"])
    return max(numbers, default=0) + 1


def is_to_train(state: RunState) -> bool:
    """Whether a submit would send workers for this run: nobody is at it, and something is left to do."""
    return state.in_plan and not state.is_complete and state.status not in ("running", "queued")


@contextlib.contextmanager
def _submit_lock(sweep_dir: Path) -> Iterator[None]:
    try:
        with run_lock(sweep_dir, ".submit"):
            yield
    except RunBusyError:
        raise UserError(f"{sweep_dir}: another submit of this sweep is at work; wait for it") from None


def _record(sweep_dir: Path, number: int, cluster: Cluster, job_ids: list[str], options: dict[str, Any]) -> None:
    for job_id in job_ids:
        append_job(
            sweep_dir,
            Job(
                submission=number,
                cluster=cluster,
                job_id=job_id,
                host=socket.gethostname(),
                created=None if cluster == "slurm" else process_created(int(job_id)),
                submitted_at=time.time(),
                options=options,
            ),
        )


def _submit_local(sweep: StoredSweep, worker: Worker, n_runs: int, concurrency: int | None) -> list[str]:
    n_workers = min(concurrency or sweep.spec.cluster.concurrency, n_runs)
    gpus = _local_gpus(sweep.spec.cluster.gpus, n_workers)
    options = {"concurrency": concurrency, "threads": worker.threads}
    executor = submitit.LocalExecutor(jobs_folder(worker.sweep_dir, worker.submission))
    job_ids = []
    for mine in gpus:
        executor.update_parameters(timeout_min=_LOCAL_LIMIT_MIN, gpus_per_node=len(mine), visible_gpus=mine)
        with thread_environment(worker.threads), _signals_ignored(signal.SIGINT, signal.SIGHUP):
            job_id = executor.submit(worker).job_id
        _record(worker.sweep_dir, worker.submission, "local", [job_id], options)
        job_ids.append(job_id)
    return job_ids


def _local_gpus(per_run: int, n_workers: int) -> list[tuple[int, ...]]:
    """GPUs of each local worker, dealt round; submitit hides all others from it."""
    if per_run == 0:
        return [()] * n_workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and all(part.strip().isdigit() for part in visible.split(",")):
        found = [int(part) for part in visible.split(",")]
    else:
        found = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    if len(found) < per_run:
        raise UserError(
            f"cluster.gpus = {per_run}, but this machine shows {len(found)}; lower it or use --cluster slurm"
        )
    return [tuple(found[(i * per_run + j) % len(found)] for j in range(per_run)) for i in range(n_workers)]


@contextlib.contextmanager
def _signals_ignored(*signals: signal.Signals) -> Iterator[None]:
    """Processes started inside ignore `signals`: Ctrl-C or a closed terminal ends the watching, not the work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _submit_slurm(sweep: StoredSweep, worker: Worker, n_runs: int, concurrency: int | None) -> list[str]:
    cluster, per_task = sweep.spec.cluster, worker.max_runs or 1
    n_tasks, limit = math.ceil(n_runs / per_task), max_array_size()
    n_arrays = math.ceil(n_tasks / limit)
    parallel = max(1, (concurrency or cluster.array_parallelism) // n_arrays)  # the cap holds for each array apart
    options = {"concurrency": concurrency, "threads": worker.threads, "runs_per_task": per_task}
    try:
        executor = submitit.SlurmExecutor(
            jobs_folder(worker.sweep_dir, worker.submission), max_num_timeout=_MAX_TIMEOUTS
        )
    except RuntimeError:
        raise UserError("--cluster slurm: no srun on PATH, so this is no SLURM machine; use --cluster local") from None
    executor.update_parameters(**_slurm_parameters(sweep, worker, parallel))
    job_ids = []
    for start in range(0, n_tasks, limit):
        try:
            with executor.batch():
                jobs = [executor.submit(worker) for _ in range(min(limit, n_tasks - start))]
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            raise UserError(
                f"sbatch refused the job: {lines[-1]} (partition, account, time and memory: `cluster` block)"
            ) from None
        ids = [job.job_id for job in jobs]
        _record(worker.sweep_dir, worker.submission, "slurm", ids, options)
        job_ids += ids
    return job_ids


def _slurm_parameters(sweep: StoredSweep, worker: Worker, parallel: int) -> dict[str, Any]:
    cluster = sweep.spec.cluster
    minutes = cluster.time_minutes * (worker.max_runs or 1)
    exports = [f"export {name}={worker.threads}" for name in THREAD_VARIABLES]
    optional = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "gpus_per_node": cluster.gpus or None,
        "mem": f"{cluster.memory_bytes >> 20}M" if cluster.memory_bytes else None,
    }
    return {
        "job_name": f"dlcm-{sweep.name}",
        "time": minutes,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": max(cluster.cpus_per_run, worker.threads),
        "array_parallelism": parallel,
        "signal_delay_s": min(_SIGNAL_LEAD_S, minutes * 60 // 4),
        "setup": [*exports, *cluster.setup],
        **{name: value for name, value in optional.items() if value is not None},
    }


def worker_faults(sweep_dir: Path, submission: int) -> dict[str, str]:
    """Why workers of a submission ended before the work did: job id -> the last line of what they said."""
    faults = {}
    states = job_states(sweep_dir)
    for job in read_jobs(sweep_dir):
        if job.submission != submission or job.cluster == "debug" or states[job_key(job)].state != "gone":
            continue
        paths = JobPaths(jobs_folder(sweep_dir, submission), job_id=job.job_id, task_id=0)
        if not paths.result_pickle.exists():
            faults[job.job_id] = f"ended without a word: killed, out of memory or out of time ({paths.stderr})"
            continue
        outcome, answer = pickle.loads(paths.result_pickle.read_bytes())
        if outcome == "error":
            lines = [line for line in answer.splitlines() if line.strip()]
            faults[job.job_id] = lines[-1].strip() if lines else "unknown error"
    return faults
