"""A worker: takes the longest run that nobody holds, trains and evaluates it, and goes on until none is left.

The same function serves one process, a pool on this machine and the tasks of a SLURM array (`sweeps.supervisor` starts it there,
as `python -m sweeps.worker`). Workers never talk to each other: the lease of the run is the claim, so the run of a killed
worker is free at once on its machine, and after a minute elsewhere.
"""

import contextlib
import gc
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlcm.config import SCHEMA_VERSION
from dlcm.errors import UserError
from dlcm.record import RunBusyError, read_json, write_json
from sweeps.claim import claim_next
from sweeps.code import check_code
from sweeps.heartbeat import REFUSED, STOPPED, Heartbeat, lower_memory
from sweeps.lease import Lease, LeaseLostError
from sweeps.states import run_state
from sweeps.store import StoredRun, StoredSweep, load_sweep, read_record
from sweeps.trunks import steps_to_keep, tidy

if TYPE_CHECKING:
    from dlcm.train import Progress

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class CancelledError(Exception):
    """The run was cancelled by the user."""

    reason = "cancelled"


@dataclass
class WorkerReport:
    """What one worker did, by run id."""

    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    @property
    def n_taken(self) -> int:
        """Runs that this worker worked on."""
        return sum(len(runs) for runs in asdict(self).values())


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
    stop: Callable[[], bool] = lambda: False,
    announce: Callable[[dict[str, Any]], Any] | None = None,
    on_run: Callable[[StoredRun], None] | None = None,
    on_step: Callable[["Progress"], None] | None = None,
) -> WorkerReport:
    """Train and evaluate runs of a sweep directory until none is left for this worker.

    Args:
        sweep_dir: a directory that `save_sweep` wrote.
        submission: number of the submission: a run that failed in it is not tried again by it.
        threads: CPU threads of torch; unchanged where absent.
        max_runs: leave after this many runs; those that branch off a trunk are not counted, they come with it.
        only: take no other runs than these; their trunks may be others.
        root: the code of the submitter; a worker with another refuses to work.
        capture: send what the run prints, native code included, to `<run_id>/logs/worker.log`.
        job_id: the scheduler's id of this worker.
        stop: asked after each step: whether to save a checkpoint and leave.
        announce: tells the other ranks of this job what is trained now: the run and its micro-batch.
        on_run: called as a run is taken.
        on_step: called with each `Progress` of the training.

    Raises:
        UserError: the code is not that of the submitter, or the directory is not a sweep.
    """
    if root is not None:
        check_code(root)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    job_id = job_id or str(os.getpid())
    report, tried, n_alone = WorkerReport(), set(), 0
    while not stop():
        # Read anew each time: a later submission may have added runs, or changed what is evaluated.
        sweep = load_sweep(sweep_dir)
        full = max_runs is not None and n_alone >= max_runs
        with claim_next(sweep, submission, tried, stop, only=only, only_branches=full) as claim:
            if claim is None:
                return report
            run, held, start, family = claim
            tried.add(run.run_id)
            n_alone += start.trunk is None
            if on_run is not None:
                on_run(run)
            with _captured(run.path / "logs" / "worker.log") if capture else contextlib.nullcontext():
                beat = Heartbeat(run, submission, job_id, held)
                _Task(run, sweep, held, beat, report, stop, on_step, announce, start.trunk, family).do()
            tidy(family)
    return report


@dataclass(frozen=True)
class _Task:
    """The work on one run that is held."""

    run: StoredRun
    sweep: StoredSweep
    lease: Lease
    beat: Heartbeat
    report: WorkerReport
    stop: Callable[[], bool]
    on_step: Callable[["Progress"], None] | None
    announce: Callable[[dict[str, Any]], Any] | None = None
    trunk: StoredRun | None = None
    family: tuple[StoredRun, ...] = ()

    def do(self) -> None:
        """Train and evaluate; a fault is recorded in the run's files."""
        from dlcm.train import StopTraining

        run_id, stage = self.run.run_id, "train"
        # A run that someone trains outside the sweep is busy, and one that was taken over is another's: neither has failed.
        with contextlib.suppress(CancelledError, RunBusyError, LeaseLostError, StopTraining), self.beat:
            # Removed only now, so that the run never looks as if nobody had tried it.
            (self.run.path / "failure.json").unlink(missing_ok=True)
            try:
                result = self._train()
                stage = "evaluate"
                if result.status == "finished":
                    self._evaluate()
                self.report.finished.append(run_id)
            except CancelledError:
                self.report.cancelled.append(run_id)
                raise
            except StopTraining:
                self.report.stopped.append(run_id)
                raise
            except (RunBusyError, LeaseLostError):
                raise
            except Exception as error:
                self.lease.check()
                self.report.failed.append(run_id)
                _record_failure(self.run, stage, self.beat.submission, error)
                if self.announce is not None and stage == "train" and not isinstance(error, UserError):
                    raise  # the other ranks are in the middle of something: see `sweeps.ranks`

    def _train(self) -> Any:
        """Train: alone where the trunk's state is damaged, again with half the micro-batch where memory did not suffice."""
        from dlcm.memory_fault import is_out_of_memory
        from dlcm.train import train
        from dlcm.trunk import UnusableBranchError

        def once(trunk: StoredRun | None) -> Any:
            micro = (read_record(self.run.path / "memory.json") or {}).get("micro_batch_tokens")
            how = {
                "micro_batch_tokens": micro,
                "trunk": None if trunk is None else trunk.path,
                "keep": steps_to_keep(self.run, self.family),
                "trackers": self.sweep.spec.track,
            }
            if self.announce is not None:
                self.announce({"run_id": self.run.run_id, **how})
            return train(self.run.config, self.run.path, on_step=self._follow, guard=self.lease.check, **how)

        def from_trunk() -> Any:
            try:
                return once(self.trunk)
            except UnusableBranchError as error:
                self._note(str(error))
                return once(None)

        try:
            return from_trunk()
        except Exception as error:
            note = lower_memory(self.run, _last_line(error)) if is_out_of_memory(error) else None
            if note is None or self.announce is not None:
                raise
            self._note(note)
        # The traceback holds the tensors of the failed try: only outside of its handler are they free.
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return from_trunk()

    def _note(self, note: str) -> None:
        self.beat.update(note=note)
        print(note, file=sys.stderr, flush=True)

    def _follow(self, progress: "Progress") -> None:
        loss = progress.loss_nats if math.isfinite(progress.loss_nats) else None
        speed = {"tokens_per_s": progress.tokens_per_s, "mfu": progress.mfu}
        self.beat.update(phase="train", step=progress.step, loss_nats=loss, **speed)
        if self.on_step is not None:
            self.on_step(progress)
        self._may_go_on()

    def _may_go_on(self) -> None:
        from dlcm.train import StopTraining

        if (self.run.path / "cancelled.json").exists():
            raise CancelledError
        if self.stop():
            error = StopTraining("told to stop: time-out, preemption or shutdown")
            error.reason = "time-out, preemption or shutdown"  # what status.json will say
            raise error

    def _evaluate(self) -> None:
        limits = self.sweep.tasks
        missing = run_state(self.run, tuple(limits)).missing_evaluations
        for limit in sorted({limits[task] for task in missing}, key=lambda n: n or 0):
            from dlcm.evaluate import evaluate

            self.beat.update(phase="evaluate")
            # One call for all tasks loads the model once.
            tasks = [task for task in missing if limits[task] == limit]
            evaluate(self.run.path, tasks, limit=limit, progress=lambda *_: self._may_go_on())


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _record_failure(run: StoredRun, stage: str, submission: int, error: Exception) -> None:
    trace = "".join(traceback.format_exception(error))
    message = _last_line(error)
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
def _captured(path: Path) -> Generator[None]:
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
def thread_environment(threads: int) -> Generator[None]:
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


def main(arguments: Sequence[str]) -> int:
    """`python -m sweeps.worker PAYLOAD PIPE PARENT`: a worker under a supervisor; tells it about runs through a pipe."""
    payload, pipe, parent = json.loads(arguments[0]), int(arguments[1]), int(arguments[2])
    stopping = threading.Event()
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    _die_with(parent)

    def tell(**facts: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(pipe, (json.dumps(facts) + "\n").encode())

    try:
        group = payload.pop("only")
        report = work(
            Path(payload.pop("sweep_dir")),
            only=None if group is None else read_json(Path(group))["run_ids"],
            root=Path(payload.pop("root")),
            stop=stopping.is_set,
            on_run=lambda run: tell(run_id=run.run_id),
            **payload,
        )
    except UserError as error:
        tell(error=str(error))
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    tell(report=asdict(report))
    return STOPPED if stopping.is_set() else 0


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent (Linux; elsewhere the lease runs out)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has died in the meantime
        sys.exit(STOPPED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
