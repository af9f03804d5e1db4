"""Acting on a sweep that is under way: cancelling runs, finding out which may be retried, reading logs."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlcm.config import SCHEMA_VERSION
from dlcm.errors import UserError
from dlcm.record import is_locked, write_json
from sweeps.jobs import Job, cancel_jobs, job_key, job_states, jobs_folder, read_jobs
from sweeps.lease import is_held, lease
from sweeps.states import RunState, Status, sweep_states
from sweeps.store import CLAIM, StoredRun, StoredSweep, load_sweep, read_record

_GRACE_S = 15.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Cancelled:
    """What `cancel` did."""

    run_ids: tuple[str, ...]
    still_running: tuple[str, ...]
    job_ids: tuple[str, ...]


def cancel(sweep_dir: Path, run_ids: Sequence[str] = (), *, grace_s: float = _GRACE_S) -> Cancelled:
    """Cancel the named runs, or all that are unfinished together with their jobs. Checkpoints stay.

    A run is cancelled by a file that its worker sees after each step. With no run named the workers are ended as well:
    SLURM jobs at once, processes of this machine when they have not left within `grace_s`.

    Args:
        sweep_dir: directory of the sweep.
        run_ids: runs, by id or by the beginning or end of one.
        grace_s: how long running steps may take to end.

    Raises:
        UserError: unknown run, or one that is complete; nothing is cancelled then.
    """
    sweep = load_sweep(sweep_dir)
    states = {state.run_id: state for state in sweep_states(sweep)}
    if run_ids:
        runs = [sweep.run(name) for name in run_ids]
        if over := [run.run_id for run in runs if states[run.run_id].is_complete]:
            raise UserError(f"{over[0]}: already {states[over[0]].status}; nothing to cancel")
    else:
        runs = [run for run in sweep.runs if run.in_plan and not states[run.run_id].is_complete]
    for run in runs:
        write_json(run.path / "cancelled.json", {"schema": SCHEMA_VERSION, "run_id": run.run_id, "time": time.time()})
    jobs = [] if run_ids else read_jobs(sweep.path)
    slurm = [job for job in jobs if job.cluster == "slurm"]
    ended = cancel_jobs(slurm, job_states(sweep.path)) if slurm else []
    held = _wait_until_free(runs, grace_s)
    local = [job for job in jobs if job.cluster == "local"]
    if local:
        _wait_until_gone(sweep.path, local, 0.0 if held else grace_s)
        ended += cancel_jobs(local, job_states(sweep.path))
        held = _wait_until_free(held, grace_s)
    return Cancelled(tuple(run.run_id for run in runs), tuple(run.run_id for run in held), tuple(ended))


def _is_held(run: StoredRun) -> bool:
    return is_held(run.path, CLAIM) or is_locked(run.path)


def _wait_until_free(runs: Sequence[StoredRun], grace_s: float) -> list[StoredRun]:
    deadline = time.monotonic() + grace_s
    held = [run for run in runs if _is_held(run)]
    while held and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        held = [run for run in held if _is_held(run)]
    return held


def _wait_until_gone(sweep_dir: Path, jobs: Sequence[Job], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        states = job_states(sweep_dir)
        if all(states[job_key(job)].state == "gone" for job in jobs):
            return
        time.sleep(_POLL_S)


RETRIED: tuple[Status, ...] = ("failed", "lost", "cancelled")


def retryable(
    sweep: StoredSweep, states: Sequence[RunState], run_ids: Sequence[str], kinds: Sequence[Status] = ()
) -> list[str]:
    """The runs that a retry sends out again.

    Args:
        sweep: a loaded sweep.
        states: of its runs.
        run_ids: runs by name; all of `kinds` by default.
        kinds: statuses that are retried; those of `RETRIED`, and finished runs that lack an evaluation, by default. A diverged
            run is a result: it must be asked for.

    Raises:
        UserError: a named run is finished, running or queued, or diverged without `diverged` among the kinds.
    """
    by_id = {state.run_id: state for state in states}
    if not run_ids:
        wanted = kinds or RETRIED
        return [s.run_id for s in states if s.in_plan and (s.status in wanted or (not kinds and _lacks(s)))]
    chosen = [sweep.run(name).run_id for name in run_ids]
    for run_id in chosen:
        state = by_id[run_id]
        if state.status == "diverged" and "diverged" not in kinds:
            raise UserError(
                f"{run_id}: diverged, and the same config diverges again on the same device; add --diverged to train it anew, "
                "or change the sweep file"
            )
        if state.status in ("running", "queued") or (state.is_complete and state.status != "diverged"):
            raise UserError(f"{run_id}: {state.status}; nothing to retry")
    return chosen


def set_aside(run: StoredRun) -> Path:
    """Move what a run has left into `attempts/<n>` of its directory, so that it begins anew and nothing is lost.

    Raises:
        RunBusyError: somebody works on the run.
    """
    with lease(run.path, CLAIM):
        place = run.path / "attempts"
        number = 1 + max((int(p.name) for p in place.glob("[0-9]*") if p.name.isdigit()), default=0)
        target = place / f"{number:03d}"
        target.mkdir(parents=True)
        # The result goes first: without it the run counts as unfinished, whatever happens next.
        measured = ("eval", "inside.json")
        for name in (
            "result.json",
            "failure.json",
            "metrics.jsonl",
            "checkpoints",
            "status.json",
            "env.json",
            *measured,
        ):
            if (run.path / name).exists():
                (run.path / name).rename(target / name)
    return target


def _lacks(state: RunState) -> bool:
    return state.status == "finished" and bool(state.missing_evaluations)


def log_path(run: StoredRun) -> Path:
    """The log of a run.

    Raises:
        UserError: there is none (yet).
    """
    path = run.path / "logs" / "worker.log"
    if path.exists():
        return path
    if (run.path / "status.json").exists():
        raise UserError(f"{run.run_id}: no log: it ran in the foreground (--cluster debug); its record is {run.path}")
    raise UserError(f"{run.run_id}: no log: it has not started; see `dlcm sweep status`")


def worker_logs(sweep_dir: Path) -> list[Path]:
    """Logs of the workers of the latest submission, error streams first.

    Raises:
        UserError: the sweep was never submitted to a scheduler.
    """
    latest = max((job.submission for job in read_jobs(sweep_dir)), default=0)
    found = sorted(jobs_folder(sweep_dir, latest).glob("*_log.err")) + sorted(
        jobs_folder(sweep_dir, latest).glob("*_log.out")
    )
    if not found:
        raise UserError(f"{sweep_dir}: no worker has written a log; submit the sweep, or name a run")
    return found


def tail(path: Path, n_lines: int) -> list[str]:
    """The last lines of a text file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=n_lines)]


def follow(run: StoredRun, path: Path) -> Iterator[str]:
    """Text that is added to the log, until nobody holds the run."""
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, 2)
        while True:
            held = _is_held(run)
            if text := file.read():
                yield text
            if not held:
                return
            time.sleep(_POLL_S)


def read_failure(run: StoredRun) -> dict | None:
    """`failure.json` of a run that failed."""
    return read_record(run.path / "failure.json")
