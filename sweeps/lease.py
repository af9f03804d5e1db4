"""Exactly one trainer per run: a lock with a lease, for file systems whose locks reach across machines and for those that do not.

Two things together make a claim:

- **The kernel's lock** on `<name>`. Where locks reach (one machine, most mounts), it is exact, and free at the holder's death.
- **A lease**: the file `<name>.d/<generation>`, made by a hard link, which one process only can do. The holder touches it with
  every heartbeat. A lease of another machine counts for `LEASE_S` after its last touch; then the next generation may be made.

Ages are differences of two times that the *file system* gave, so that neither wrong clocks nor jumps of a clock break a lease.

A holder that was frozen and comes back finds the next generation made: `Lease.check`, called before each write, raises, and the
process leaves without touching the run. Between that check and the write lies a moment that only the storage could close;
a metrics log with rows of two writers is refused by `collect`, and all other files are replaced whole.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any

from dlcm.errors import UserError
from dlcm.record import RunBusyError, is_locked

LEASE_S = 60.0
# A reader that asks whether a lock is held takes it shared for some microseconds; a claim must not fail on that.
_TRIES, _PAUSE_S = 5, 0.02


class LeaseLostError(UserError):
    """Another process has taken the run over: this one was silent for too long."""


class Lease:
    """A held claim. Made by `acquire`, given up by `release`; the death of its process frees it as well."""

    def __init__(self, lock: IO[str], path: Path, folder: Path) -> None:
        self._lock, self._path, self._folder = lock, path, folder
        self._next = folder / _name(_number(path) + 1)

    @property
    def generation(self) -> int:
        """How many holders there were, this one included."""
        return _number(self._path)

    def touch(self) -> None:
        """Say that the holder lives. The time is that of the file system."""
        with contextlib.suppress(OSError):  # a file system that does not answer must not end the holder
            os.utime(self._path)

    def check(self) -> None:
        """Refuse to go on where another process has taken over.

        Raises:
            LeaseLostError: it has.
        """
        if self._next.exists():
            raise LeaseLostError(f"{self._folder.parent}: another process has taken this run over; this one leaves it")

    def release(self) -> None:
        """Give the claim up."""
        with contextlib.suppress(OSError):
            self._path.with_suffix(".released").touch()
        self._lock.close()


@contextlib.contextmanager
def lease(folder: Path, name: str, facts: Mapping[str, Any] | None = None) -> Generator[Lease]:
    """Hold `name` of a folder.

    Args:
        folder: directory of the run or the sweep, made where absent.
        name: file of the lock, such as `.claim`.
        facts: stored in the lease for people who look.

    Raises:
        RunBusyError: another process holds it, or held it a moment ago on another machine.
    """
    held = acquire(folder, name, facts)
    try:
        yield held
    finally:
        held.release()


def acquire(folder: Path, name: str, facts: Mapping[str, Any] | None = None) -> Lease:
    """As `lease`, for those that release it themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    busy = RunBusyError(f"{folder}: another process is working on this; wait for it or cancel it")
    lock = (folder / name).open("w")
    try:
        if not _locked(lock) or beats_elsewhere(folder, name):
            raise busy
        place = folder / f"{name}.d"
        place.mkdir(exist_ok=True)
        before = _latest(place)
        path = place / _name(_number(before) + 1 if before else 1)
        told = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time(), **(facts or {})}
        if not _make(path, json.dumps(told)):
            raise busy
    except BaseException:
        lock.close()
        raise
    # Only the newest generation means anything.
    for old in place.iterdir():
        if _number(old) < _number(path):
            old.unlink(missing_ok=True)
    return Lease(lock, path, place)


def is_held(folder: Path, name: str) -> bool:
    """Whether a process holds `name`: by the kernel's lock, or by a lease of another machine that has not run out."""
    return is_locked(folder, name) or beats_elsewhere(folder, name)


def beats_elsewhere(folder: Path, name: str) -> bool:
    """Whether another machine holds a lease that has not run out."""
    try:
        path = _latest(folder / f"{name}.d")
        if path is None or path.with_suffix(".released").exists():
            return False
        told = json.loads(path.read_text())
        if told["host"] == socket.gethostname():
            return False  # here the kernel's lock says it exactly
        return file_age(path) < LEASE_S
    except (FileNotFoundError, json.JSONDecodeError):
        return False  # taken away since we looked


def file_age(path: Path) -> float:
    """Seconds since a file was written, both ends by the clock of its file system.

    Raises:
        FileNotFoundError: it is not there.
    """
    return now_at(path.parent) - path.stat().st_mtime


def now_at(folder: Path) -> float:
    """The time by the clock of a folder's file system; by our own where the folder cannot be written to."""
    probe = folder / f".now-{uuid.uuid4().hex}"
    try:
        probe.touch()
        found = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return found


def _locked(file: IO[str]) -> bool:
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_S)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def _make(path: Path, text: str) -> bool:
    """Make a file with its text, whole; False where it is there already. A link is exclusive on every file system."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_text(text)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _latest(place: Path) -> Path | None:
    if not place.is_dir():
        return None
    return max((p for p in place.iterdir() if p.suffix == ".lease"), key=_number, default=None)


def _name(generation: int) -> str:
    return f"{generation:08d}.lease"


def _number(path: Path) -> int:
    stem = path.name.partition(".")[0]
    return int(stem) if stem.isdigit() else 1 << 62  # a draft of another process: not ours to take away
