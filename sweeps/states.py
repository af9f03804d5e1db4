"""How each run stands: derived from its files, the kernel's lock on it, and, where it is silent, the scheduler's word on its job.

Never from anything that was printed. Nothing here waits: a scheduler that does not answer is a word that is missing.
"""

import functools
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dlcm.record import is_locked
from sweeps.jobs import JobState, end_reasons, job_states
from sweeps.lease import LEASE_S, now_at
from sweeps.store import CLAIM, StoredRun, StoredSweep, read_record

Status = Literal["planned", "queued", "running", "finished", "failed", "diverged", "cancelled", "lost"]
STATUSES: tuple[Status, ...] = ("planned", "queued", "running", "finished", "failed", "diverged", "cancelled", "lost")

SILENT_S = 10.0  # a heartbeat comes every 2 s: after this long others are asked about the run


@dataclass(frozen=True)
class RunState:
    """Status and progress of one run at one moment."""

    run_id: str
    status: Status
    reason: str | None = None
    phase: str | None = None  # prepare, train or evaluate, while it runs
    step: int = 0
    n_steps: int = 0
    tokens_per_s: float | None = None
    mfu: float | None = None
    loss_nats: float | None = None
    seconds_left: float | None = None
    host: str | None = None
    pid: int | None = None
    job_id: str | None = None
    missing_evaluations: tuple[str, ...] = ()
    in_plan: bool = True
    note: str | None = None  # what was done to keep it going, such as a smaller micro-batch

    @property
    def share_done(self) -> float:
        """Share of the training steps that are done."""
        return 1.0 if self.status in ("finished", "diverged") else self.step / max(self.n_steps, 1)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do for this run: trained or diverged, and evaluated."""
        return self.status in ("finished", "diverged") and not self.missing_evaluations


@dataclass(frozen=True)
class Evidence:
    """What speaks for and against silent runs.

    Attributes:
        jobs: states of the sweep's jobs.
        now: time by the clock of the sweep's file system; asked where absent.
        reasons: why jobs ended, by job id, where accounting tells.
    """

    jobs: Mapping[str, JobState]
    now: float | None = None
    reasons: Mapping[str, str] | None = None

    @functools.cached_property
    def latest(self) -> int:
        """Number of the latest submission that still has a job; 0 for none."""
        return max((job.submission for job in self.jobs.values() if job.state != "gone"), default=0)

    @functools.cached_property
    def _lives(self) -> Mapping[tuple[int, str], str]:
        return {(job.submission, job.job_id): job.state for job in self.jobs.values()}

    def life(self, beat: Mapping[str, Any]) -> str:
        """The scheduler's word on the job that a heartbeat names; `unknown` where it has none."""
        return self._lives.get((beat["submission"], str(beat["job_id"])), "unknown")

    def age(self, path: Path) -> float:
        """Seconds since a file was written, by the clock of its file system."""
        return (now_at(path.parent) if self.now is None else self.now) - path.stat().st_mtime


def sweep_states(sweep: StoredSweep, jobs: Mapping[str, JobState] | None = None) -> list[RunState]:
    """Status and progress of every run, in plan order.

    Args:
        sweep: a loaded sweep.
        jobs: what `sweeps.jobs.job_states` said of the sweep's jobs; asked anew where absent.
    """
    evidence = Evidence(job_states(sweep.path) if jobs is None else jobs, now_at(sweep.path))
    present = {entry.name for entry in os.scandir(sweep.path)} if sweep.path.is_dir() else set()
    tasks = tuple(sweep.tasks)
    states = [
        run_state(run, tasks, evidence) if run.run_id in present else _untouched(run, evidence) for run in sweep.runs
    ]
    lost = [state.job_id for state in states if state.status == "lost" and state.job_id]
    if not lost or not any(job.cluster == "slurm" for job in evidence.jobs.values()):
        return states
    reasons = end_reasons(lost)
    return [_with_reason(state, reasons) for state in states] if reasons else states


def _with_reason(state: RunState, reasons: Mapping[str, str]) -> RunState:
    told = reasons.get(state.job_id or "")
    return replace(state, reason=f"{state.reason} (SLURM: {told})") if told and state.status == "lost" else state


def _untouched(run: StoredRun, evidence: Evidence) -> RunState:
    status, reason = _derive(None, "", None, None, False, evidence)
    return RunState(run.run_id, status, reason, n_steps=run.n_steps, in_plan=run.in_plan)


def run_state(run: StoredRun, tasks: Sequence[str] = (), evidence: Evidence | None = None) -> RunState:
    """Derive the state of one run.

    Args:
        run: the run.
        tasks: evaluation tasks of the sweep.
        evidence: of the sweep's jobs; none by default.

    Raises:
        UserError: a file of the run that cannot be read.
    """
    evidence = evidence or Evidence({})
    # The order matters: a run that ends between two reads must look running or ended, never lost.
    beat = read_record(f"{run.path}/status.json")
    held = _held(run, beat, evidence)
    result = read_record(f"{run.path}/result.json")
    failure = read_record(f"{run.path}/failure.json")
    cancelled = os.path.exists(f"{run.path}/cancelled.json")  # noqa: PTH110 (thousands of runs are looked at)
    status, reason = _derive(beat, held, result, failure, cancelled, evidence)
    missing = ()
    if result and result["status"] == "finished":
        missing = _missing_evaluations(run, tasks)
        reason = reason if missing else result.get("reason")  # a failure that was mended is no news
    beat = beat or {}
    left = None
    if status == "running" and beat.get("tokens_per_s"):
        left = (run.n_steps - beat["step"]) * run.tokens / run.n_steps / beat["tokens_per_s"]
    return RunState(
        run_id=run.run_id,
        status=status,
        reason=reason,
        phase=beat.get("phase") if status == "running" else None,
        step=result["step"] if result else beat.get("step", 0),
        n_steps=run.n_steps,
        tokens_per_s=beat.get("tokens_per_s"),
        mfu=beat.get("mfu"),
        loss_nats=result["loss_nats"] if result else beat.get("loss_nats"),
        seconds_left=left,
        host=beat.get("host"),
        pid=beat.get("pid"),
        job_id=str(beat["job_id"]) if beat else None,
        missing_evaluations=missing,
        in_plan=run.in_plan,
        note=beat.get("note"),
    )


def _held(run: StoredRun, beat: Mapping[str, Any] | None, evidence: Evidence) -> str:
    """How a run is held: empty for not at all, `held`, or what is odd about it, in words.

    On this machine the kernel knows. Of another, locks may not reach here (local file systems, some mounts): there the heartbeat
    speaks, and of one that is silent the scheduler.
    """
    running = beat is not None and beat["state"] == "running"
    if not running and beat is not None:
        over = os.path.exists(f"{run.path}/result.json")  # noqa: PTH110 (most runs: nobody holds what has ended)
        return "held" if not over and is_locked(run.path) else ""
    locked = is_locked(run.path, CLAIM) or is_locked(run.path)
    if beat is None or not running:
        return "held" if locked else ""
    elsewhere = beat["host"] != socket.gethostname()
    if not locked and not elsewhere:
        return ""
    try:
        age = evidence.age(run.path / "status.json")
    except FileNotFoundError:
        age = 0.0
    if age < SILENT_S:
        return "held"
    life = evidence.life(beat)
    if not locked and (life == "gone" or (life != "running" and age > LEASE_S)):
        return ""
    return f"no heartbeat for {age:.0f} s: stopped, or its machine is overloaded"


def _derive(
    beat: dict | None, held: str, result: dict | None, failure: dict | None, cancelled: bool, evidence: Evidence
) -> tuple[Status, str | None]:
    latest = evidence.latest
    if held:
        if cancelled:
            return "running", "cancelling: stops at its next step"
        return "running", None if held == "held" else held
    if result is not None:
        failed = failure is not None and failure["stage"] == "evaluate"
        reason = f"evaluation failed: {failure['message']}" if failed and failure else result.get("reason")
        return ("diverged" if result["status"] == "diverged" else "finished"), reason
    if cancelled:
        return "cancelled", None
    if failure is not None:
        return ("queued", None) if latest > failure["submission"] else ("failed", failure["message"])
    if beat is not None and beat["state"] in ("running", "died"):
        how = "died" if beat["state"] == "running" else str(beat["reason"])
        told = f"process {beat['pid']} on {beat['host']} {how} at step {beat['step']}"
        if beat["state"] == "died" and latest:
            return "queued", f"{told}; it goes on from its last checkpoint"
        next_step = "a live worker may take it up" if latest else "submit again to resume it"
        return "lost", f"{told}; {next_step}"
    if latest:
        return "queued", None
    if beat is not None:
        why = beat.get("reason") or "no reason given"
        return "lost", f"its worker stopped at step {beat['step']} ({why}); submit again to resume it"
    return "planned", "no worker is left; submit again" if evidence.jobs else None


def _missing_evaluations(run: StoredRun, tasks: Sequence[str]) -> tuple[str, ...]:
    if not tasks:
        return ()
    from dlcm.tasks import task_name

    return tuple(task for task in tasks if not (run.path / "eval" / f"{task_name(task)}.json").exists())
