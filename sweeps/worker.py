"""A worker: takes the longest run that nobody holds, trains and evaluates it, and goes on until none is left.

The same function serves one process, a pool on this machine and the tasks of a SLURM array. Workers never talk to each
other: the kernel's lock on the run is the claim, so the run of a killed worker is free at once.
"""

import contextlib
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dlcm.config import SCHEMA_VERSION
from dlcm.errors import UserError
from dlcm.record import RunBusyError, is_locked, run_lock, write_json
from sweeps.store import CLAIM, STALE_S, StoredRun, StoredSweep, load_sweep, read_record, run_state

if TYPE_CHECKING:
    from dlcm.train import Progress

BEAT_S = 2.0
# A run that takes its worker with it (out of memory, a crash in native code) must not take all of them.
MAX_DEATHS = 2
PACKAGES = ("dlcm", "flops", "sweeps", "analysis")
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class CancelledError(Exception):
    """The run was cancelled by the user."""


@dataclass
class WorkerReport:
    """What one worker did, by run id."""

    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    @property
    def n_taken(self) -> int:
        """Runs that this worker worked on."""
        return len(self.finished) + len(self.failed) + len(self.cancelled)


def packages_root() -> Path:
    """The one directory that holds all four packages.

    Raises:
        UserError: they come from different places: another distribution, or a half-made checkout, is in the way.
    """
    import importlib

    roots = {}
    for name in PACKAGES:
        file = importlib.import_module(name).__file__
        roots[name] = Path(file).resolve().parent.parent if file else None
    if len(set(roots.values())) != 1 or (root := roots["sweeps"]) is None:
        found = ", ".join(f"{name} from {place}" for name, place in roots.items())
        raise UserError(f"the packages do not come from one place ({found}); use an environment of this project alone")
    return root


def work(
    sweep_dir: Path,
    *,
    submission: int,
    threads: int | None = None,
    max_runs: int | None = None,
    only: Sequence[str] | None = None,
    root: Path | None = None,
    capture: bool = True,
    job_id: str | None = None,
    fatal: tuple[type[Exception], ...] = (),
    on_run: Callable[[StoredRun], None] | None = None,
    on_step: Callable[["Progress"], None] | None = None,
) -> WorkerReport:
    """Train and evaluate runs of a sweep directory until none is left for this worker.

    Args:
        sweep_dir: a directory that `save_sweep` wrote.
        submission: number of the submission: a run that failed in it is not tried again by it.
        threads: CPU threads of torch; unchanged where absent.
        max_runs: leave after this many runs.
        only: take no other runs than these.
        root: where the submitter had the packages; a worker with another code refuses to run.
        capture: send what the run prints, native code included, to `<run_id>/logs/worker.log`.
        job_id: the scheduler's id of this worker.
        fatal: exceptions that end the worker instead of failing its run: the scheduler's own.
        on_run: called as a run is taken.
        on_step: called with each `Progress` of the training.

    Raises:
        UserError: the packages are not those of the submitter, or the directory is not a sweep.
    """
    here = packages_root()
    if root is not None and here != root.resolve():
        raise UserError(
            f"this worker imports the packages from {here}, the submitter from {root}; share one installation"
        )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    job_id = job_id or str(os.getpid())
    report, tried = WorkerReport(), set()
    while max_runs is None or report.n_taken < max_runs:
        # Read anew each time: a later submission may have added runs, or changed what is evaluated.
        sweep = load_sweep(sweep_dir)
        if only is not None:
            sweep = replace(sweep, runs=tuple(run for run in sweep.runs if run.run_id in only))
        with _claim_next(sweep, submission, tried) as run:
            if run is None:
                return report
            tried.add(run.run_id)
            if on_run is not None:
                on_run(run)
            with _captured(run.path / "logs" / "worker.log") if capture else contextlib.nullcontext():
                _work_on(run, sweep, Heartbeat(run, submission, job_id), on_step, report, fatal)
    return report


@contextlib.contextmanager
def _claim_next(sweep: StoredSweep, submission: int, tried: set[str]) -> Iterator[StoredRun | None]:
    """Hold the longest open run; none where no run is open to this worker."""
    # A run whose worker was just lost on another machine looks alive until its heartbeat is stale: that long we stay.
    leave_at = time.monotonic() + STALE_S + 2 * BEAT_S
    while True:
        doubtful = False
        for run in sorted(sweep.runs, key=lambda r: -r.flops_planned):
            if run.run_id in tried or not _is_open(run, sweep, submission):
                continue
            if _beats_elsewhere(run):
                doubtful = True
                continue
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(run_lock(run.path, CLAIM))
                except RunBusyError:
                    continue
                # Between the look and the claim another worker may have ended the run.
                if _is_open(run, sweep, submission, mine=True):
                    yield run
                    return
        if not doubtful or time.monotonic() > leave_at:
            yield None
            return
        time.sleep(BEAT_S)


def _is_open(run: StoredRun, sweep: StoredSweep, submission: int, mine: bool = False) -> bool:
    """Whether the run's files leave work to do and nobody on this machine holds it (`mine`: but for our own claim)."""
    if not run.in_plan or (not mine and is_locked(run.path, CLAIM)) or is_locked(run.path):
        return False
    if (run.path / "cancelled.json").exists():
        return False
    failure, beat = (read_record(run.path / name) for name in ("failure.json", "status.json"))
    if failure is not None and failure["submission"] >= submission:
        return False
    if beat is not None and beat["submission"] >= submission and beat["state"] == "running":
        n_deaths = beat["deaths"] + 1  # nobody holds the run, so the last try died as well
        if n_deaths >= MAX_DEATHS:
            return False
    result = read_record(run.path / "result.json")
    if result is None:
        return True
    return result["status"] == "finished" and bool(run_state(run, sweep.spec.evaluate).missing_evaluations)


def _beats_elsewhere(run: StoredRun) -> bool:
    beat = read_record(run.path / "status.json")
    if beat is None or beat["state"] != "running" or beat["host"] == socket.gethostname():
        return False
    return time.time() - beat["time"] < STALE_S


class Heartbeat:
    """Writes status.json every two seconds from a thread of its own, so that a long step is not taken for a death."""

    def __init__(self, run: StoredRun, submission: int, job_id: str) -> None:
        self._path = run.path / "status.json"
        now = time.time()
        before = read_record(self._path)
        died = before is not None and before["state"] == "running" and before["submission"] == submission
        self._facts: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "run_id": run.run_id,
            "state": "running",
            "phase": "prepare",
            "reason": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "job_id": job_id,
            "submission": submission,
            "deaths": (before["deaths"] + 1) if before is not None and died else 0,
            "step": before["step"] if before else 0,
            "n_steps": run.config.n_steps,
            "tokens_per_s": None,
            "loss_nats": None,
            "started_at": now,
            "progress_at": now,
            "time": now,
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def submission(self) -> int:
        """Number of the submission that the worker belongs to."""
        return self._facts["submission"]

    def update(self, **facts: Any) -> None:
        """Take over progress; it is written with the next beat."""
        self._facts = {**self._facts, **facts, "progress_at": time.time()}

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a full disk must not end the run; a silent heartbeat is seen
                self._write()

    def _write(self) -> None:
        write_json(self._path, {**self._facts, "time": time.time()})

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        # submitit leaves by SystemExit on a time-out or a preemption, after putting the job back into the queue.
        reason = "time-out or preemption" if kind is SystemExit else kind.__name__ if kind else None
        self._facts |= {"state": "stopped", "reason": reason}
        self._write()


def _work_on(
    run: StoredRun,
    sweep: StoredSweep,
    heartbeat: Heartbeat,
    on_step: Callable[["Progress"], None] | None,
    report: WorkerReport,
    fatal: tuple[type[Exception], ...],
) -> None:
    from dlcm.train import train

    def follow(progress: "Progress") -> None:
        loss = progress.loss_nats if math.isfinite(progress.loss_nats) else None
        heartbeat.update(phase="train", step=progress.step, tokens_per_s=progress.tokens_per_s, loss_nats=loss)
        if on_step is not None:
            on_step(progress)
        _stop_if_cancelled(run)

    stage = "train"
    # A run that someone trains outside the sweep is busy, not failed.
    with contextlib.suppress(CancelledError, RunBusyError), heartbeat:
        # Removed only now, so that the run never looks as if nobody had tried it.
        (run.path / "failure.json").unlink(missing_ok=True)
        try:
            result = train(run.config, run.path, on_step=follow)
            stage = "evaluate"
            if result.status == "finished":
                _evaluate(run, sweep, heartbeat)
            report.finished.append(run.run_id)
        except CancelledError:
            report.cancelled.append(run.run_id)
            raise
        except (RunBusyError, *fatal):
            raise
        except Exception as error:
            report.failed.append(run.run_id)
            _record_failure(run, stage, heartbeat.submission, error)


def _stop_if_cancelled(run: StoredRun) -> None:
    if (run.path / "cancelled.json").exists():
        raise CancelledError


def _evaluate(run: StoredRun, sweep: StoredSweep, beat: Heartbeat) -> None:
    missing = run_state(run, sweep.spec.evaluate).missing_evaluations
    if missing:
        from dlcm.evaluate import evaluate

        beat.update(phase="evaluate")
        # One call for all tasks loads the model once.
        evaluate(run.path, missing, progress=lambda *_: _stop_if_cancelled(run))


def _record_failure(run: StoredRun, stage: str, submission: int, error: Exception) -> None:
    trace = "".join(traceback.format_exception(error))
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = lines[-1].strip() if lines else type(error).__name__
    print(trace, file=sys.stderr, flush=True)
    failure = {
        "schema": SCHEMA_VERSION,
        "run_id": run.run_id,
        "stage": stage,
        "exception": type(error).__name__,
        "message": message if isinstance(error, UserError) else f"{type(error).__name__}: {message}",
        "traceback": trace,
        "submission": submission,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
    }
    write_json(run.path / "failure.json", failure)


@contextlib.contextmanager
def _captured(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to `path`, so that the last words of native code are kept as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    try:
        with path.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in enumerate(saved, 1):
            os.dup2(old, number)
            os.close(old)


@contextlib.contextmanager
def thread_environment(threads: int) -> Iterator[None]:
    """Set the thread counts of the numerical libraries for the processes started inside: they read them at import."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
