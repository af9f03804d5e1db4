"""Getting a plan run: stored, and whatever of it is not finished sent out (`sweeps.submit`).

`debug` works in this process, `local` in processes of this machine that outlive the command, `slurm` in job arrays.
What a worker does is in `sweeps.worker`. Whether it still lives is asked of the kernel or the scheduler, never waited
for through submitit, whose `result()` has no bound when a job dies without accounting.
"""

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlcm.errors import UserError
from dlcm.record import RunBusyError, run_lock
from dlcm.tracking import check_trackers
from sweeps.clusters import resolve_target
from sweeps.jobs import Job, check_submit, jobs_folder, read_jobs
from sweeps.lease import lease
from sweeps.states import RunState, sweep_states
from sweeps.store import Saved, StoredRun, StoredSweep, check_sweep_dir, load_sweep, read_record, save_sweep
from sweeps.submit import Submitting
from sweeps.worker import work

if TYPE_CHECKING:
    from dlcm.train import Progress
    from sweeps.plan import Plan


@dataclass(frozen=True)
class Submission:
    """What was submitted, and what was not because nothing was left to do."""

    sweep_dir: Path
    number: int
    cluster: str
    job_ids: tuple[str, ...]
    to_train: tuple[str, ...]
    skipped: tuple[RunState, ...]
    saved: Saved | None = None


def launch(
    plan: "Plan",
    sweep_dir: Path,
    cluster: str = "local",
    *,
    settings: Mapping[str, Any] | None = None,
    concurrency: int | None = None,
    threads: int | None = None,
    runs_per_task: int | None = None,
    on_run: Callable[[StoredRun], None] | None = None,
    on_step: Callable[["Progress"], None] | None = None,
) -> Submission:
    """Store the plan in `sweep_dir` and submit workers for whatever is not finished.

    Args:
        plan: the planned runs.
        sweep_dir: directory of the sweep, usually `runs/<sweep>`.
        cluster: `local` (processes of this machine), `slurm`, `debug` (this process, one run after the other), or a name in the
            user's file of clusters.
        settings: fields of `ClusterConfig` in place of those of that cluster and of the sweep file.
        concurrency: runs at once; the sweep file's `cluster` block where absent.
        threads: CPU threads of one run; the sweep file's `cluster` block where absent.
        runs_per_task: runs that one task of a SLURM array trains; its wall time grows with it.
        on_run: `debug` only: called as a run is taken.
        on_step: `debug` only: called with each `Progress` of the training.

    Returns:
        At once with the job ids; with `debug`, when all is done.

    Raises:
        UserError: the directory is not a sweep, another submit is writing to it, or the cluster refuses the job.
    """
    check_submit(concurrency, threads, runs_per_task)
    resolve_target(cluster, plan.sweep.cluster, settings)  # a fault is told before anything is written
    check_sweep_dir(sweep_dir)  # before the lock puts a file into it
    with submit_lock(sweep_dir):
        saved = save_sweep(plan, sweep_dir)
    return resubmit(
        sweep_dir,
        cluster,
        settings=settings,
        concurrency=concurrency,
        threads=threads,
        runs_per_task=runs_per_task,
        on_run=on_run,
        on_step=on_step,
        saved=saved,
    )


def resubmit(
    sweep_dir: Path,
    cluster: str = "local",
    *,
    settings: Mapping[str, Any] | None = None,
    concurrency: int | None = None,
    threads: int | None = None,
    runs_per_task: int | None = None,
    run_ids: Sequence[str] | None = None,
    on_run: Callable[[StoredRun], None] | None = None,
    on_step: Callable[["Progress"], None] | None = None,
    saved: Saved | None = None,
    hours: Mapping[str, float] | None = None,
) -> Submission:
    """Submit workers for the unfinished runs of a stored sweep, or for those of `run_ids` alone.

    `hours` are estimates in place of the plan's, for runs by id. The other arguments and the errors are those of `launch`.
    """
    check_submit(concurrency, threads, runs_per_task)
    sweep_dir = sweep_dir.resolve()
    with submit_lock(sweep_dir):
        sweep = load_sweep(sweep_dir)
        check_trackers(sweep.spec.track)
        is_slurm = resolve_target(cluster, sweep.spec.cluster).scheduler == "slurm"
        at_once = "array_parallelism" if is_slurm else "concurrency"
        given = {at_once: concurrency, "threads": threads, "runs_per_task": runs_per_task}
        merged = {**(settings or {}), **{key: value for key, value in given.items() if value is not None}}
        target = resolve_target(cluster, sweep.spec.cluster, merged)
        states = sweep_states(sweep)
        chosen = None if run_ids is None else {sweep.run(name).run_id for name in run_ids}
        todo = [state for state in states if is_to_train(state) and (chosen is None or state.run_id in chosen)]
        number = _next_submission(sweep, read_jobs(sweep_dir))
        for state in todo:
            (sweep_dir / state.run_id / "cancelled.json").unlink(missing_ok=True)
        submitting = Submitting(sweep, target, number, tuple(state.run_id for state in todo), merged, hours or {})
        job_ids: list[str] = []
        if todo and target.scheduler == "debug":
            job_ids = [str(os.getpid())]
            submitting.record(job_ids)
        elif todo:
            job_ids = submitting.local() if target.scheduler == "local" else submitting.slurm()
    if todo and target.scheduler == "debug":
        with run_lock(jobs_folder(sweep_dir, number)):
            work(
                sweep_dir,
                submission=number,
                threads=target.config.threads,
                only=None if chosen is None else tuple(chosen),
                capture=False,
                on_run=on_run,
                on_step=on_step,
            )
    return Submission(
        sweep_dir=sweep_dir,
        number=number,
        cluster=target.scheduler,
        job_ids=tuple(job_ids),
        to_train=tuple(state.run_id for state in todo),
        skipped=tuple(state for state in states if state.in_plan and not is_to_train(state)),
        saved=saved,
    )


def _next_submission(sweep: StoredSweep, jobs: Sequence[Job]) -> int:
    """A number above all that stand in the runs' files too: a failure of this submission would not be retried by it."""
    numbers = [job.submission for job in jobs]
    present = {entry.name for entry in os.scandir(sweep.path)}
    for run in sweep.runs:
        for name in ("failure.json", "status.json"):
            if run.run_id in present and (record := read_record(run.path / name)):
                numbers.append(record["submission"])
    return max(numbers, default=0) + 1


def is_to_train(state: RunState) -> bool:
    """Whether a submit would send workers for this run: nobody is at it, and something is left to do."""
    return state.in_plan and not state.is_complete and state.status not in ("running", "queued")


@contextlib.contextmanager
def submit_lock(sweep_dir: Path) -> Generator[None]:
    """Hold a sweep's directory against other submits.

    Raises:
        UserError: another one is at work.
    """
    try:
        with lease(sweep_dir, ".submit"):
            yield
    except RunBusyError:
        raise UserError(f"{sweep_dir}: another submit of this sweep is at work; wait for it") from None
