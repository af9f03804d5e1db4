"""The run is its own witness: status.json, written every two seconds by the process that works on it, and what befell it."""

import contextlib
import os
import socket
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dlcm.config import SCHEMA_VERSION
from dlcm.record import write_json
from sweeps.store import StoredRun, read_record

if TYPE_CHECKING:
    from sweeps.lease import Lease

BEAT_S = 2.0
# A run that takes its process with it (out of memory, a crash in native code) must not do so for ever.
MAX_DEATHS = 3
# Nor may one that never ends go through requeues for ever: each continues from a checkpoint.
MAX_STARTS = 50
STOPPED = 75  # a worker's exit status: told to stop, and the run can go on later (EX_TEMPFAIL)
REFUSED = 78  # ... and: this worker cannot work at all; its one line is on stderr (EX_CONFIG)


class Heartbeat:
    """Writes status.json from a thread of its own, so that a long step is not taken for a death, and keeps the lease alive.

    Args:
        run: the run that was claimed.
        submission: number of the submission that the worker belongs to.
        job_id: the scheduler's id of the worker.
        lease: the claim.
    """

    def __init__(self, run: StoredRun, submission: int, job_id: str, lease: "Lease | None" = None) -> None:
        self._path, self._lease = run.path / "status.json", lease
        now = time.time()
        before = read_record(self._path) or {}
        again = before.get("submission") == submission
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
            "deaths": before["deaths"] if again else 0,
            "starts": before.get("starts", 1) + 1 if again else 1,
            "step": before.get("step", 0),
            "n_steps": run.n_steps,
            "tokens_per_s": None,
            "mfu": None,
            "loss_nats": None,
            "note": before.get("note"),
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
        if self._lease is not None:
            self._lease.touch()
            self._lease.check()
        write_json(self._path, {**self._facts, "time": time.time()})

    def __enter__(self) -> "Heartbeat":
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from sweeps.lease import LeaseLostError

        self._stop.set()
        self._thread.join()
        self._facts |= {"state": "stopped", "reason": getattr(error, "reason", kind.__name__) if kind else None}
        with contextlib.suppress(OSError, LeaseLostError):  # what belongs to another process now is left alone
            self._write()


def record_death(run: StoredRun, pid: int, reason: str, note: str | None = None) -> int:
    """Say in status.json that the process of a run died. The caller holds the run.

    Args:
        run: the run.
        pid: the process that died.
        reason: how.
        note: what was done about it.

    Returns:
        Deaths of the run in this submission, this one included; 0 where it was another process that held the run.
    """
    path = run.path / "status.json"
    facts = read_record(path)
    if facts is None or facts["pid"] != pid or facts["state"] != "running":
        return 0
    facts |= {"state": "died", "reason": reason, "deaths": facts["deaths"] + 1, "time": time.time()}
    if note:
        facts["note"] = note
    write_json(path, facts)
    return facts["deaths"]


def lower_memory(run: StoredRun, cause: str) -> str | None:
    """Let a run that was out of memory go on with half its micro-batch (same global batch), once.

    Args:
        run: the run; held by the caller.
        cause: what happened, in words.

    Returns:
        What was done, in words; None where it was done before, or no smaller micro-batch exists.
    """
    from dlcm.memory_fault import smaller_micro_batch

    path = run.path / "memory.json"
    smaller = None if path.exists() else smaller_micro_batch(run.config, None)
    if smaller is None:
        return None
    before = run.config.train.micro_batch_tokens or run.config.train.batch_tokens
    note = f"out of memory with micro-batches of {before:,} tokens; goes on with {smaller:,} (same global batch)"
    write_json(
        path,
        {"schema": SCHEMA_VERSION, "run_id": run.run_id, "micro_batch_tokens": smaller, "note": note, "cause": cause},
    )
    return note
