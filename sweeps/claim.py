"""Which run a worker takes next: the longest that is open, that nobody holds, and that can begin."""

import contextlib
import time
from collections.abc import Callable, Collection, Generator

from dlcm.record import RunBusyError, is_locked
from sweeps.heartbeat import BEAT_S, MAX_DEATHS, MAX_STARTS
from sweeps.lease import LEASE_S, Lease, beats_elsewhere, lease
from sweeps.states import run_state
from sweeps.store import CLAIM, StoredRun, StoredSweep, read_record
from sweeps.trunks import Start, families, start_of

Claim = tuple[StoredRun, Lease, Start, tuple[StoredRun, ...]]


@contextlib.contextmanager
def claim_next(
    sweep: StoredSweep,
    submission: int,
    tried: set[str],
    stop: Callable[[], bool],
    *,
    only: Collection[str] | None = None,
    only_branches: bool,
) -> Generator[Claim | None]:
    """Hold the longest open run that can begin; none where no run is open to this worker.

    Args:
        sweep: all of it: a run may go on from one that this worker must not take, or that has ended long ago.
        submission: number of the submission.
        tried: run ids that this worker has taken already.
        stop: whether to leave.
        only: run ids that may be taken; all where absent.
        only_branches: take no run that is trained from its start.
    """
    # A run whose worker was just lost on another machine looks held until its lease has run out: that long we stay.
    leave_at = time.monotonic() + LEASE_S + 2 * BEAT_S
    chosen = {run.run_id for run in sweep.runs} if only is None else frozenset(only)
    runs = sorted((run for run in sweep.runs if run.run_id in chosen), key=lambda r: -r.flops_planned)
    shared = families(sweep.runs)

    def is_expected(run: StoredRun) -> bool:
        return _is_held(run) or (run.run_id in chosen - tried and is_open(run, sweep, submission))

    while True:
        doubtful = waiting = False
        for run in runs:
            if run.run_id in tried or not is_open(run, sweep, submission):
                continue
            if beats_elsewhere(run.path, CLAIM):
                doubtful = True
                continue
            family = shared.get(run.family or "", ())
            start = start_of(run, family, is_expected)
            if not start.ready:
                waiting = True
                continue
            if only_branches and start.trunk is None:
                continue
            with contextlib.ExitStack() as stack:
                try:
                    held = stack.enter_context(lease(run.path, CLAIM, {"submission": submission}))
                except RunBusyError:
                    continue
                # Between the look and the claim another worker may have ended the run.
                if is_open(run, sweep, submission, mine=True):
                    yield run, held, start, family
                    return
        # The worker of a trunk takes up its branches itself, so that others of an allocation need not wait for it.
        waits = (waiting and not only_branches) or (doubtful and time.monotonic() < leave_at)
        if not waits or stop():
            yield None
            return
        time.sleep(BEAT_S)


def _is_held(run: StoredRun) -> bool:
    return is_locked(run.path, CLAIM) or is_locked(run.path) or beats_elsewhere(run.path, CLAIM)


def is_open(run: StoredRun, sweep: StoredSweep, submission: int, mine: bool = False) -> bool:
    """Whether the run's files leave work to do and nobody on this machine holds it (`mine`: but for our own claim)."""
    if not run.in_plan or (not mine and is_locked(run.path, CLAIM)) or is_locked(run.path):
        return False
    if (run.path / "cancelled.json").exists():
        return False
    failure, beat = (read_record(run.path / name) for name in ("failure.json", "status.json"))
    if failure is not None and failure["submission"] >= submission:
        return False
    tried = beat is not None and beat["submission"] >= submission
    if beat is not None and tried and (beat["deaths"] >= MAX_DEATHS or beat.get("starts", 1) >= MAX_STARTS):
        return False
    result = read_record(run.path / "result.json")
    if result is None:
        return True
    return result["status"] == "finished" and bool(run_state(run, tuple(sweep.tasks)).missing_evaluations)
