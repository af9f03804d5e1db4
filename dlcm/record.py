"""The run directory is the record: atomic files, a metrics log that can be cut back, and one writer at a time.

Nothing here knows about models or schedulers; `train` writes with it and `sweeps` reads with it.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from dlcm.errors import UserError


class RunBusyError(UserError):
    """Another process holds the run."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Delete what processes that were killed in the middle of `write_atomic` left in a folder that nobody else writes to."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as indented JSON, atomically."""
    write_atomic(path, json.dumps(data, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable or not a JSON object.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); restore it or delete it and run again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line to a metrics log with a single write."""
    with path.open("ab") as file:
        file.write((json.dumps(row) + "\n").encode())


def begin_metrics(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Begin a metrics log with these lines, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(path: Path, *, running: bool = False) -> list[dict[str, Any]]:
    """All rows of a metrics log.

    Args:
        path: `metrics.jsonl` of a run.
        running: a last line without its newline is being written right now: leave it out instead of refusing it.

    Raises:
        UserError: a torn or foreign line, named by number. It is never replaced or skipped in silence.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()
    if tail and not running:
        lines.append(tail)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError:
            raise UserError(
                f"{path}:{number}: torn metrics line; submit the run again to rewrite it from its last checkpoint, "
                "or delete the line"
            ) from None
        rows.append(row)
    return rows


def sync_metrics(path: Path) -> None:
    """Bring the lines of a metrics log to the disk, before anything that relies on them."""
    if path.exists():
        with path.open("ab") as file:
            os.fsync(file.fileno())


def cut_metrics(path: Path, step: int, due: int) -> None:
    """Keep the rows up to `step`: what a resumed run will write again is dropped, a torn tail with it.

    Args:
        path: `metrics.jsonl` of a run.
        step: where the run goes on from.
        due: step of the last row that was written before; 0 where there was none.

    Raises:
        UserError: rows up to `due` are lost or torn, and no resumed run would write them again; the file is left as it is.
    """
    kept, last = [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break  # everything from a torn line on is later than the checkpoint, or will be written again
        if row["step"] > step:
            break
        kept.append(line + b"\n")
        last = int(row["step"])
    if last < due:
        raise UserError(
            f"{path}: it is whole up to step {last}, and the checkpoint of step {step} has lines up to {due} behind it; "
            f"restore it, or delete {path.parent / 'checkpoints'} to train the run anew"
        )
    if kept or path.exists():
        write_atomic(path, b"".join(kept))


# A reader that asks whether a lock is held takes it shared for some microseconds; a claim must not fail on that.
_CLAIM_TRIES, _CLAIM_PAUSE_S = 5, 0.02


@contextlib.contextmanager
def run_lock(run_dir: Path, name: str = ".lock") -> Generator[None]:
    """Hold a run for this process; the kernel lets go when the process dies, however it dies.

    Args:
        run_dir: the run's directory, made where absent.
        name: file of the lock: training takes the default, a sweep's worker claims the run under a name of its own.

    Raises:
        RunBusyError: another process holds it.
        UserError: a file stands in the place of the directory.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{run_dir}: a file, where the directory of a run is wanted; choose another") from None
    with (run_dir / name).open("w") as file:
        for attempt in range(_CLAIM_TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt == _CLAIM_TRIES - 1:
                    raise RunBusyError(
                        f"{run_dir}: another process is working on this run; wait for it or cancel it"
                    ) from None
                time.sleep(_CLAIM_PAUSE_S)
        yield


def is_locked(run_dir: Path, name: str = ".lock") -> bool:
    """Whether some live process on a machine that shares the file system's locks holds the run."""
    try:
        file = (run_dir / name).open("r")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
