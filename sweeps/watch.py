"""Showing how a sweep stands: a live table on a terminal, plain lines elsewhere, numbers for `--json`."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sweeps.jobs import JobState, job_states
from sweeps.states import STATUSES, RunState, Status, sweep_states
from sweeps.store import StoredSweep, load_sweep

if TYPE_CHECKING:
    from rich.console import RenderableType

_POLL_S = 0.5
_SQUEUE_EVERY_S = 10.0
_PLAIN_EVERY_S = 30.0
# Watching ends, with a word, when nothing has moved for this long: a machine may hang where no heartbeat tells.
STALL_S = 3600.0
_COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "diverged": "magenta", "lost": "red"}
_MAX_ROWS = 30
# A pace is told from this share of the FLOPs on; before, it would be the start-up that is measured.
_PACE_SHARE = 0.05


@dataclass(frozen=True)
class Overview:
    """A sweep at one moment, in a line."""

    n_runs: int
    counts: dict[Status, int]
    n_complete: int
    flops_planned: float
    flops_spent: float
    share_done: float
    seconds_left: float | None
    n_workers: int
    n_waiting_workers: int

    def line(self) -> str:
        """The overview for people."""
        told = [f"{self.counts[status]} {status}" for status in STATUSES if self.counts.get(status)]
        left = f", about {format_duration(self.seconds_left)} left" if self.seconds_left is not None else ""
        workers = f"; workers: {self.n_workers} running" if self.n_workers or self.n_waiting_workers else ""
        workers += f", {self.n_waiting_workers} waiting" if self.n_waiting_workers else ""
        spent = f"{self.flops_spent:.3g} of {self.flops_planned:.3g} FLOPs ({self.share_done:.0%})"
        done = f"{self.n_complete}/{self.n_runs} runs complete, {spent}{left}"
        return f"{done} ({', '.join(told)}{workers})"


@dataclass(frozen=True)
class Snapshot:
    """Everything that is shown of a sweep at one moment."""

    sweep: StoredSweep
    states: tuple[RunState, ...]
    jobs: dict[str, JobState]
    pace: float | None = None  # share of the FLOPs a second since the watching began

    @property
    def overview(self) -> Overview:
        """Counts, share of the planned FLOPs that is done, and the time that is left.

        The time is told from the pace since the watching began, which has evaluation and start-up in it; a single look has
        only the present speed of the running runs to go by.
        """
        pairs = [(run, state) for run, state in zip(self.sweep.runs, self.states) if run.in_plan]
        total = sum(run.flops_planned for run, _ in pairs)
        done = sum(run.flops_planned * state.share_done for run, state in pairs)
        running = [(run, state) for run, state in pairs if state.status == "running" and state.tokens_per_s]
        rate = sum(run.flops_planned / run.tokens * (state.tokens_per_s or 0) for run, state in running)
        open_ = [(run, s) for run, s in pairs if s.status in ("planned", "queued", "running", "lost")]
        share_done, left = done / total if total else 1.0, None
        if self.pace and open_:
            left = (1 - share_done) / self.pace
        elif rate > 0:
            at_least = max((state.seconds_left or 0.0 for _, state in running), default=0.0)
            left = max(sum(run.flops_planned * (1 - s.share_done) for run, s in open_) / rate, at_least)
        lives = Counter(job.state for job in self.jobs.values())
        return Overview(
            n_runs=len(pairs),
            counts=dict(Counter(state.status for _, state in pairs)),
            n_complete=sum(state.is_complete for _, state in pairs),
            flops_planned=total,
            flops_spent=done,
            share_done=share_done,
            seconds_left=left,
            n_workers=lives["running"],
            n_waiting_workers=lives["pending"] + lives["unknown"],
        )

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen any more: no worker is left and no run is held."""
        alive = any(job.state in ("pending", "running", "unknown") for job in self.jobs.values())
        return not alive and not any(state.status == "running" for state in self.states)

    @property
    def incomplete(self) -> list[RunState]:
        """Planned runs without a result, or without their evaluation."""
        return [state for state in self.states if state.in_plan and not state.is_complete]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "sweep": self.sweep.name,
            "dir": str(self.sweep.path),
            "overview": asdict(self.overview),
            "runs": [asdict(state) | {"share_done": state.share_done} for state in self.states],
            "jobs": [asdict(job) for job in self.jobs.values() if job.state != "gone"],
        }


def take_snapshot(sweep_dir: Path, jobs: dict[str, JobState] | None = None) -> Snapshot:
    """Read the sweep directory now; `jobs` spares the scheduler where they were asked a moment ago."""
    jobs = job_states(sweep_dir) if jobs is None else jobs
    sweep = load_sweep(sweep_dir)
    return Snapshot(sweep, tuple(sweep_states(sweep, jobs)), jobs)


def snapshots(sweep_dir: Path, *, poll_s: float = _POLL_S, stall_s: float = STALL_S) -> Iterator[Snapshot]:
    """Snapshots until the sweep is over or nothing has moved for `stall_s`. SLURM is asked every ten seconds only."""
    asked, jobs, moved, seen = 0.0, None, time.monotonic(), None
    began, share_then = time.monotonic(), None
    while True:
        slurm = jobs is not None and any(job.cluster == "slurm" for job in jobs.values())
        if jobs is None or time.monotonic() - asked > (_SQUEUE_EVERY_S if slurm else 0.0):
            jobs, asked = job_states(sweep_dir), time.monotonic()
        snapshot = take_snapshot(sweep_dir, jobs)
        if snapshot.is_over and asked < moved:
            jobs = None  # the jobs' word is older than the runs': ask once more before ending
            continue
        share = snapshot.overview.share_done
        share_then = share if share_then is None else share_then
        if share - share_then > _PACE_SHARE:
            snapshot = replace(snapshot, pace=(share - share_then) / (time.monotonic() - began))
        yield snapshot
        now = [(state.status, state.step, state.phase) for state in snapshot.states]
        if now != seen:
            moved, seen = time.monotonic(), now
        if snapshot.is_over or time.monotonic() - moved > stall_s:
            return
        time.sleep(poll_s)


def watch(sweep_dir: Path, *, stream: TextIO | None = None, stall_s: float = STALL_S) -> Snapshot:
    """Show a sweep until it is over. Ctrl-C ends the watching, not the work.

    Args:
        sweep_dir: directory of the sweep.
        stream: where to show it; stdout by default. A terminal gets a live table, anything else plain lines.
        stall_s: give up watching when no run has moved for this long.

    Returns:
        The last snapshot.
    """
    from rich.console import Console

    out: TextIO = sys.stdout if stream is None else stream
    show = _show_live if Console(file=out).is_terminal else _show_plain
    return show(snapshots(sweep_dir, stall_s=stall_s), out)


def _show_live(shots: Iterator[Snapshot], stream: TextIO) -> Snapshot:
    from rich.console import Console
    from rich.live import Live

    snapshot = next(shots)
    with Live(render(snapshot), console=Console(file=stream), refresh_per_second=4, transient=False) as live:
        for snapshot in shots:
            live.update(render(snapshot))
    return snapshot


def _show_plain(shots: Iterator[Snapshot], stream: TextIO) -> Snapshot:
    before: dict[str, str] = {}
    told = time.monotonic()
    snapshot = None
    for snapshot in shots:
        changed = [state for state in snapshot.states if before.get(state.run_id, "queued") != state.status]
        if not before:  # what was done long ago is no news
            changed = [state for state in changed if not state.is_complete] if len(changed) > _MAX_ROWS else changed
        before = {state.run_id: state.status for state in snapshot.states}
        for state in changed:
            if state.status != "planned":
                print(f"  {state.run_id}: {_tell(state)}", file=stream)
        if changed or time.monotonic() - told > _PLAIN_EVERY_S:
            print(f"[{time.strftime('%H:%M:%S')}] {snapshot.overview.line()}", file=stream, flush=True)
            told = time.monotonic()
    assert snapshot is not None  # `snapshots` yields at least once
    return snapshot


def _tell(state: RunState) -> str:
    loss = f", loss {state.loss_nats:.4f} nats" if state.status == "finished" and state.loss_nats is not None else ""
    note = f"; {state.note}" if state.note else ""
    resumed = f" from step {state.step}" if state.status == "running" and state.step else ""
    if state.status == "running" and state.step >= state.n_steps:
        resumed = " (evaluate)"
    if state.missing_evaluations and state.status == "finished":
        note += f"; evaluations left: {len(state.missing_evaluations)}"
    return f"{state.status}{resumed}{loss}{f' ({state.reason})' if state.reason else ''}{note}"


def render(snapshot: Snapshot, max_rows: int | None = _MAX_ROWS) -> "RenderableType":
    """The table of a sweep for rich: the overview, then the runs; of many, those that move or need a look."""
    from rich import box
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    states = list(snapshot.states)
    hidden = 0
    if max_rows is not None and len(states) > max_rows:
        rank = ("running", "failed", "lost", "diverged", "cancelled", "queued", "planned", "finished")
        first = {s.run_id for s in sorted(states, key=lambda s: rank.index(s.status))[:max_rows]}
        hidden, states = len(states) - max_rows, [s for s in states if s.run_id in first]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "status", "step", "progress", "tokens/s", "MFU", "loss (nats)", "left"):
        table.add_column(
            name, justify="left" if name in ("run", "status", "progress") else "right", no_wrap=name == "run"
        )
    for state in states:
        table.add_row(
            state.run_id,
            Text(_status_cell(state), style=_COLOURS.get(state.status, "")),
            f"{state.step}/{state.n_steps}",
            ProgressBar(total=1.0, completed=state.share_done, width=16),
            *_numbers(state),
        )
    overview = snapshot.overview
    head = Text(f"{snapshot.sweep.name}: {overview.line()}")
    bar = ProgressBar(total=1.0, completed=overview.share_done, width=60)
    return Group(head, bar, table, *([Text(f"… and {hidden} more")] if hidden else []))


def format_table(snapshot: Snapshot) -> str:
    """The table of a sweep as plain text, one line a run."""
    width = max((len(state.run_id) for state in snapshot.states), default=3)
    lines = [f"{'run':{width}}  {'status':<10} {'step':>13} {'tokens/s':>9} {'MFU':>6} {'loss (nats)':>11} {'left':>8}"]
    for state in snapshot.states:
        speed, mfu, loss, left = _numbers(state)
        step = f"{state.step}/{state.n_steps}"
        note = f"  {state.reason}" if state.reason else ""
        note += f"  [{state.note}]" if state.note else ""
        note += "" if state.in_plan else "  (no longer in the sweep file)"
        lines.append(
            f"{state.run_id:{width}}  {state.status:<10} {step:>13} {speed:>9} {mfu:>6} {loss:>11} {left:>8}{note}"
        )
    return "\n".join([*lines, snapshot.overview.line()])


def _status_cell(state: RunState) -> str:
    phase = f" ({state.phase})" if state.phase in ("prepare", "evaluate") else ""
    return f"{state.status}{phase}{f': {state.reason}' if state.reason else ''}"


def _numbers(state: RunState) -> tuple[str, str, str, str]:
    running = state.status == "running"
    speed = f"{state.tokens_per_s:,.0f}" if running and state.tokens_per_s else ""
    mfu = f"{state.mfu:.1%}" if running and state.mfu is not None else ""
    loss = f"{state.loss_nats:.4f}" if state.loss_nats is not None else ""
    return speed, mfu, loss, format_duration(state.seconds_left) if running and state.seconds_left is not None else ""


def format_duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def explain_incomplete(states: Sequence[RunState]) -> list[str]:
    """One line for each distinct reason why runs are not complete."""
    groups: dict[str, list[str]] = {}
    for state in states:
        missing = f"not evaluated on {', '.join(state.missing_evaluations)}" if state.missing_evaluations else None
        groups.setdefault(f"{state.status}: {state.reason or missing or 'no worker took it'}", []).append(state.run_id)
    return [
        f"{len(ids)} {reason} ({ids[0]}{f' and {len(ids) - 1} more' if len(ids) > 1 else ''})"
        for reason, ids in groups.items()
    ]
