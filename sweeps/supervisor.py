"""The job of a scheduler: a light process that keeps workers going, and outlives those that die.

A worker (`sweeps.worker`) holds torch and the runs, one after the other. Its supervisor starts it, several where runs share
a device, starts another one where one was killed, says in the run's files how it died, and passes signals on:

- USR2 (time-out, preemption): the workers save a checkpoint after the step they are in and leave; then the job is requeued.
- TERM (cancelling, an external requeue, shutdown): the same, without a requeue of our own.

Workers die with their supervisor (Linux tells them), so that no process trains a run that nobody watches.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dlcm.config import SCHEMA_VERSION
from dlcm.errors import UserError
from dlcm.record import RunBusyError, write_json
from sweeps.heartbeat import MAX_DEATHS, REFUSED, STOPPED, lower_memory, record_death
from sweeps.lease import lease
from sweeps.store import CLAIM, StoredRun, load_sweep, read_record

_POLL_S = 0.2
# Starts of a worker that died before it took a run: beyond, the fault is not a run's.
_MAX_EMPTY_STARTS = 3


@dataclass
class _Slot:
    """A place for a worker, and what it said last."""

    process: subprocess.Popen[bytes]
    pipe: int
    report: list[dict[str, Any]] = field(default_factory=list)
    run_id: str | None = None
    rest: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """What came of a supervised job.

    Attributes:
        stopped: whether it was told to stop, by the name of the signal.
        report: runs by what became of them.
    """

    stopped: str | None
    report: dict[str, list[str]]


def supervise(payload: dict[str, Any], n_workers: int, *, grace_s: float) -> Outcome:
    """Keep `n_workers` workers going until none of them finds a run.

    Args:
        payload: arguments of `sweeps.worker.work` by name, as JSON can hold them.
        n_workers: workers at once.
        grace_s: how long workers may take to save a checkpoint once they are told to stop.

    Raises:
        UserError: a worker refused to work, or workers died before they took any run.
    """
    stop: list[str] = []
    report: dict[str, list[str]] = {"finished": [], "failed": [], "cancelled": []}
    n_empty = 0
    with _signals_into(stop):
        slots = [_start(payload) for _ in range(n_workers)]
        try:
            while slots and not stop:
                _listen(slots)
                for slot in [s for s in slots if s.process.poll() is not None]:
                    slots.remove(slot)
                    _drain(slot, report)
                    status = slot.process.returncode
                    if status == REFUSED:
                        raise UserError(_last_word(slot))
                    if status < 0 or status not in (0, STOPPED):
                        n_empty += slot.run_id is None
                        _bury(payload, slot)
                        if n_empty >= _MAX_EMPTY_STARTS:
                            raise UserError(f"workers end before they take a run ({_cause(status)}); see the job's log")
                        slots.append(_start(payload))
        finally:
            _end(slots, grace_s, report)
    return Outcome(stop[0] if stop else None, report)


def _start(payload: dict[str, Any]) -> _Slot:
    reader, writer = os.pipe()
    command = [sys.executable, "-u", "-P", "-m", "sweeps.worker", json.dumps(payload), str(writer), str(os.getpid())]
    process = subprocess.Popen(command, pass_fds=[writer], start_new_session=False)
    os.close(writer)
    os.set_blocking(reader, False)
    return _Slot(process, reader)


def _listen(slots: list[_Slot]) -> None:
    """Take in what the workers say, for a moment."""
    with selectors.DefaultSelector() as selector:
        for slot in slots:
            selector.register(slot.pipe, selectors.EVENT_READ, slot)
        for key, _ in selector.select(_POLL_S):
            _read(key.data)
    time.sleep(_POLL_S / 10)  # a closed pipe is always ready


def _read(slot: _Slot) -> None:
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(slot.pipe, 1 << 16):
            *lines, slot.rest = (slot.rest + chunk).split(b"\n")
            for line in lines:
                told = json.loads(line)
                slot.run_id = told.get("run_id", slot.run_id)
                slot.report.append(told)


def _drain(slot: _Slot, report: dict[str, list[str]]) -> None:
    _read(slot)
    os.close(slot.pipe)
    for told in slot.report:
        for name, run_ids in told.get("report", {}).items():
            report.setdefault(name, []).extend(run_ids)


def _last_word(slot: _Slot) -> str:
    return next((told["error"] for told in reversed(slot.report) if "error" in told), "a worker refused to work")


def _end(slots: list[_Slot], grace_s: float, report: dict[str, list[str]]) -> None:
    """Tell the workers to stop, wait, and end those that do not."""
    for slot in slots:
        with contextlib.suppress(ProcessLookupError):
            slot.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for slot in slots:
        with contextlib.suppress(subprocess.TimeoutExpired):
            slot.process.wait(max(deadline - time.monotonic(), 0.1))
        if slot.process.poll() is None:
            slot.process.kill()
            slot.process.wait()
        _drain(slot, report)


def _bury(payload: dict[str, Any], slot: _Slot) -> None:
    """Record the death of a worker in the files of its run, and give the run up where it dies again and again."""
    if slot.run_id is None:
        return
    run = load_sweep(Path(payload["sweep_dir"])).run(slot.run_id)
    cause = _cause(slot.process.returncode)
    out_of_memory = slot.process.returncode == -signal.SIGKILL and _memory_was_short()
    if out_of_memory:
        cause += ": out of memory"
    # Nobody else may write: where another worker has the run already, it counts a start.
    with contextlib.suppress(RunBusyError), lease(run.path, CLAIM):
        note = lower_memory(run, cause) if out_of_memory else None
        n_deaths = record_death(run, slot.process.pid, cause, note)
        with (run.path / "logs" / "worker.log").open("a") as log:
            print(f"worker {slot.process.pid} {cause}", file=log)
        if n_deaths >= MAX_DEATHS:
            _give_up(run, payload["submission"], f"its process died {n_deaths} times, the last time {cause}")


def _give_up(run: StoredRun, submission: int, message: str) -> None:
    phase = (read_record(run.path / "status.json") or {}).get("phase")
    stage = "evaluate" if phase == "evaluate" else "train"
    facts = {"schema": SCHEMA_VERSION, "run_id": run.run_id, "stage": stage, "exception": "Death", "message": message}
    write_json(
        run.path / "failure.json",
        facts | {"traceback": message, "submission": submission, "time": time.time(), "pid": os.getpid()},
    )


def _cause(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
        return f"killed by signal {-status}"
    return f"ended with status {status}"


def _memory_was_short() -> bool:
    """Whether the kernel has killed a process of our control group for want of memory."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = next(line.rpartition(":")[2] for line in lines if line.startswith("0::"))
        events = Path(f"/sys/fs/cgroup{group}/memory.events").read_text()
    except (OSError, StopIteration):
        return False
    counts = dict(line.split() for line in events.splitlines())
    return int(counts.get("oom_kill", 0)) > 0


@contextlib.contextmanager
def _signals_into(stop: list[str]) -> Generator[None]:
    def note(number: int, _frame: FrameType | None) -> None:
        stop.append(signal.Signals(number).name)

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, note) for number in (signal.SIGUSR2, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
