"""Progress of one long job: a live line where a person watches, plain lines now and then where a file does."""

import sys
import time
from types import TracebackType
from typing import TextIO

_PLAIN_INTERVAL_S = 10.0


class Reporter:
    """Context manager that shows what is being done, how far it is, the time left, and a note.

    On a terminal the line is redrawn in place and gone at the end; elsewhere a plain line is written every ten seconds
    and when something else begins. Everything goes to stderr, so stdout holds only the result.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        """Prepare; `quiet` shows nothing."""
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._live = None
        self._what = ""
        self._started = self._written = self._first = 0.0

    def __enter__(self) -> "Reporter":
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()]
            columns += [TextColumn("{task.fields[note]}"), TimeRemainingColumn(elapsed_when_finished=True)]
            self._live = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, what: str, done: float, total: float | None, note: str = "") -> None:
        """Say that `done` of `total` (None: not known) of `what` is done."""
        if self._quiet:
            return
        new = what != self._what
        if new:
            # What was done before this began, as by a run that goes on, says nothing about the pace.
            self._what, self._started, self._written, self._first = what, time.monotonic(), 0.0, done
        if self._live is not None:
            if new or not self._live.tasks:
                for task in self._live.tasks:
                    self._live.remove_task(task.id)
                self._live.add_task(what, total=total, note=note, completed=int(done))
            self._live.update(self._live.tasks[-1].id, completed=done, total=total, note=note)
        elif new or time.monotonic() - self._written >= _PLAIN_INTERVAL_S:
            self._written = time.monotonic()
            print(self._plain(done, total, note), file=self._stream, flush=True)

    def _plain(self, done: float, total: float | None, note: str) -> str:
        parts = [self._what]
        if total:
            parts.append(f"{min(done / total, 1.0):.0%}")
            if self._first < done < total:
                left = (time.monotonic() - self._started) * (total - done) / (done - self._first)
                parts.append(f"{left:.0f} s left")
        return ", ".join([*parts, note] if note else parts)
