"""What the verbs of `dlcm sweep` show and say: one person, one command, from start to exit code."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlcm.errors import UserError
from sweeps.clusters import parse_settings
from sweeps.control import RETRIED, Cancelled, follow, log_path, read_failure, retryable, set_aside, tail, worker_logs
from sweeps.jobs import check_submit, read_jobs
from sweeps.states import STATUSES, RunState, Status, sweep_states
from sweeps.store import StoredRun, check_sweep_dir, load_sweep
from sweeps.watch import Snapshot, explain_incomplete, format_table, render, take_snapshot, watch

if TYPE_CHECKING:
    from dlcm.train import Progress as StepProgress
    from sweeps.launch import Submission
    from sweeps.plan import Plan

_PLAIN_EVERY_S = 10.0
_MAX_FAULTS = 3


@dataclass(frozen=True)
class Options:
    """How to submit."""

    cluster: str
    settings: dict[str, Any]
    concurrency: int | None = None
    threads: int | None = None
    runs_per_task: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `launch` and `resubmit`."""
        return {
            "settings": self.settings,
            "concurrency": self.concurrency,
            "threads": self.threads,
            "runs_per_task": self.runs_per_task,
        }


def check_options(
    cluster: str | None,
    settings: Sequence[str],
    concurrency: int | None,
    threads: int | None,
    runs_per_task: int | None,
    *,
    sweep_dir: Path | None = None,
) -> Options:
    """The options of a submit; where no cluster is named, that of the sweep's last submit, with its settings.

    Raises:
        UserError: unknown setting, or a number below 1.
    """
    given = parse_settings(settings)
    if cluster is None:
        jobs = read_jobs(sweep_dir) if sweep_dir else []
        cluster = str(jobs[-1].options.get("name", jobs[-1].cluster)) if jobs else "local"
        given = {**(jobs[-1].options.get("settings", {}) if jobs else {}), **given}
    check_submit(concurrency, threads, runs_per_task)
    return Options(cluster, given, concurrency, threads, runs_per_task)


def show_dry_run(planned: "Plan", sweep_dir: Path, *, as_json: bool) -> None:
    """Print the plan with its costs, and what a submit would train; nothing is written."""
    from sweeps.costs import costed
    from sweeps.plan_table import format_plan, plan_json

    check_sweep_dir(sweep_dir)
    ids = {run.run_id for run in planned.runs}
    states: list[RunState] = []
    if (sweep_dir / "plan.parquet").exists():
        states = [state for state in sweep_states(load_sweep(sweep_dir)) if state.run_id in ids]
    busy = [s.run_id for s in states if s.is_complete or s.status in ("running", "queued")]
    costs = costed(planned)
    if as_json:
        told = {
            "plan": plan_json(planned, costs),
            "dir": str(sweep_dir),
            "skipped": busy,
            "to_train": sorted(ids - set(busy)),
        }
        print(json.dumps(told, indent=2))
        return
    print(format_plan(planned, costs))
    print(f"dry run: would train {len(ids) - len(busy)} of {len(ids)} runs in {sweep_dir}{_told_skipped(states)}")


def launch_and_show(planned: "Plan", sweep_dir: Path, options: Options, *, detach: bool | None, as_json: bool) -> int:
    """Submit a plan and, unless detached, show it to its end. Returns the exit code."""
    from sweeps.doubts import plan_doubts
    from sweeps.launch import launch

    for doubt in plan_doubts(planned):
        print(f"warning: {doubt}", file=sys.stderr)

    def submit(**more: Any) -> "Submission":
        return launch(planned, sweep_dir, options.cluster, **options.arguments(), **more)

    return _submit_and_show(submit, sweep_dir, options, detach, as_json)


def retry_and_show(
    sweep_dir: Path,
    runs: Sequence[str],
    kinds: Sequence[Status],
    options: Options,
    *,
    detach: bool | None,
    as_json: bool,
) -> int:
    """Submit the runs that failed, were lost or cancelled, those of `kinds`, or those named. Returns the exit code."""
    sweep = load_sweep(sweep_dir)
    states = sweep_states(sweep)
    chosen = retryable(sweep, states, runs, kinds)
    if not chosen:
        print(f"{sweep_dir}: no run is {' or '.join(kinds or RETRIED)}; nothing to retry", file=sys.stderr)
    for run_id in [s.run_id for s in states if s.status == "diverged" and s.run_id in chosen]:
        set_aside(sweep.run(run_id))
    from sweeps.launch import resubmit

    def submit(**more: Any) -> "Submission":
        return resubmit(sweep_dir, options.cluster, run_ids=chosen, **options.arguments(), **more)

    return _submit_and_show(submit, sweep_dir, options, detach, as_json)


def _submit_and_show(
    submit: Callable[..., "Submission"], sweep_dir: Path, options: Options, detach: bool | None, as_json: bool
) -> int:
    out = sys.stderr if as_json else sys.stdout
    try:
        if options.cluster == "debug":
            with _foreground(out) as callbacks:
                submission = submit(**callbacks)
            _announce(submission, out)
        else:
            submission = submit()
            _announce(submission, out)
        wait = options.cluster != "slurm" if detach is None else not detach
        if submission.job_ids and options.cluster != "debug" and wait:
            snapshot = watch(sweep_dir, stream=out)
        else:
            snapshot = take_snapshot(sweep_dir)
    except KeyboardInterrupt:
        if options.cluster == "debug":
            print(f"\nstopped; submit again to resume, status: dlcm sweep status {sweep_dir}", file=sys.stderr)
        else:
            print(f"\nthe workers go on; {watch_ways(sweep_dir)}", file=sys.stderr)
        return 130
    if as_json:
        told = {"submission": submission.number, "job_ids": submission.job_ids, "trained": submission.to_train}
        print(json.dumps(told | snapshot.to_json(), indent=2))
    if not snapshot.is_over:
        print(f"submitted; {watch_ways(sweep_dir)}", file=out)
        return 0 if options.cluster == "slurm" or not wait else 1
    return _conclude(snapshot, submission, out)


def watch_ways(sweep_dir: Path) -> str:
    """The commands that watch and cancel what was submitted."""
    return f"watch: dlcm sweep status {sweep_dir} --watch   cancel: dlcm sweep cancel {sweep_dir}"


def _announce(submission: "Submission", out: Any) -> None:
    saved = submission.saved
    if saved is not None and saved.removed:
        n = len(saved.removed)
        print(f"no longer in the sweep file, kept but not trained: {n} ({_some(saved.removed)})", file=out)
    told = _told_skipped(submission.skipped)
    print(f"{submission.sweep_dir}: {count_of(len(submission.to_train), 'run')} to train{told}", file=out)
    if submission.job_ids and submission.cluster != "debug":
        n = len(submission.job_ids)
        print(
            f"submission {submission.number}: {count_of(n, submission.cluster + ' job')} ({_some(submission.job_ids)})",
            file=out,
        )
    out.flush()


def _told_skipped(states: Sequence[RunState]) -> str:
    counts = Counter(state.status for state in states if state.is_complete or state.status in ("running", "queued"))
    return "".join(f", {counts[status]} {status} (skipped)" for status in STATUSES if counts[status])


def count_of(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _conclude(snapshot: Snapshot, submission: "Submission", out: Any) -> int:
    """Say how it ended. Exit code 1 where a planned run has no result."""
    incomplete = snapshot.incomplete
    diverged = [state for state in snapshot.states if state.status == "diverged" and state.in_plan]
    for line in explain_incomplete(diverged):
        print(line, file=out)
    if not incomplete:
        print(f"all {snapshot.overview.n_runs} runs complete; next: dlcm sweep collect {snapshot.sweep.path}", file=out)
        return 0
    for line in explain_incomplete(incomplete):
        print(line, file=sys.stderr)
    if submission.job_ids:
        from sweeps.submit import worker_faults

        faults = worker_faults(submission.sweep_dir, submission.number)
        for job_id, fault in list(faults.items())[:_MAX_FAULTS]:
            print(f"worker {job_id}: {fault}", file=sys.stderr)
        if len(faults) > _MAX_FAULTS:
            print(f"... and {len(faults) - _MAX_FAULTS} more workers; their logs: dlcm sweep logs", file=sys.stderr)
    print(f"not complete: {count_of(len(incomplete), 'run')}; submit again to go on", file=sys.stderr)
    return 1


@contextmanager
def _foreground(out: Any) -> Generator[dict[str, Callable[..., None]]]:
    """Callbacks that show the progress of runs in this process: a bar on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=out)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:

            def on_run(run: StoredRun) -> None:
                bar.add_task(run.run_id, total=run.n_steps, told="")

            def on_step(progress: "StepProgress") -> None:
                task = bar.task_ids[-1]
                bar.update(task, completed=progress.step, total=progress.n_steps, told=_told(progress))

            yield {"on_run": on_run, "on_step": on_step}
        return
    last = [0.0]

    def say_run(run: StoredRun) -> None:
        print(f"{run.run_id}: {run.n_steps} steps", file=out, flush=True)

    def say_step(progress: "StepProgress") -> None:
        if progress.step == progress.n_steps or time.monotonic() - last[0] > _PLAIN_EVERY_S:
            last[0] = time.monotonic()
            print(f"  step {progress.step}/{progress.n_steps}  {_told(progress)}", file=out, flush=True)

    yield {"on_run": say_run, "on_step": say_step}


def _told(progress: "StepProgress") -> str:
    mfu = "" if progress.mfu is None else f", MFU {progress.mfu:.1%}"
    return f"loss {progress.loss_nats:.4f} nats, {progress.tokens_per_s:,.0f} tokens/s{mfu}"


def show_status(sweep_dir: Path, *, keep_watching: bool, as_json: bool) -> None:
    """Print the table of a sweep, or keep it on the screen until nothing runs."""
    if as_json and keep_watching:
        raise UserError("--json and --watch exclude each other; call `status --json` as often as needed")
    if keep_watching:
        with suppress(KeyboardInterrupt):
            watch(sweep_dir)
        return
    snapshot = take_snapshot(sweep_dir)
    if as_json:
        print(json.dumps(snapshot.to_json(), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(render(snapshot, max_rows=None))
    else:
        print(format_table(snapshot))


def show_logs(sweep_dir: Path, run: str | None, *, n_lines: int, keep_following: bool, as_json: bool) -> None:
    """Print the end of a run's log and its failure, or the workers' logs."""
    if run is None:
        logs = {str(path): tail(path, n_lines) for path in worker_logs(sweep_dir)}
        if as_json:
            print(json.dumps({"logs": logs}, indent=2))
            return
        for name, lines in logs.items():
            print(f"==> {name} <==", *lines, sep="\n")
        return
    stored = load_sweep(sweep_dir).run(run)
    failure = read_failure(stored)
    try:
        path = log_path(stored)
        lines = tail(path, n_lines)
    except UserError:
        if failure is None:
            raise
        path, lines = None, failure["traceback"].splitlines()[-n_lines:]
    if as_json:
        told = {"run_id": stored.run_id, "path": str(path) if path else None, "lines": lines, "failure": failure}
        print(json.dumps(told, indent=2))
        return
    print(*lines, sep="\n")
    if failure is not None:
        print(f"failed in {failure['stage']}: {failure['message']}")
    if keep_following and path is not None:
        with suppress(KeyboardInterrupt):
            for text in follow(stored, path):
                print(text, end="", flush=True)


def show_cancelled(cancelled: Cancelled, *, as_json: bool) -> None:
    """Say what was cancelled."""
    if as_json:
        print(json.dumps(asdict(cancelled), indent=2))
        return
    if not cancelled.run_ids:
        print("nothing to cancel: every run is complete")
        return
    jobs = (
        f"; ended {count_of(len(cancelled.job_ids), 'job')} ({_some(cancelled.job_ids)})" if cancelled.job_ids else ""
    )
    print(f"cancelled {count_of(len(cancelled.run_ids), 'run')} ({_some(cancelled.run_ids)}){jobs}")
    if cancelled.still_running:
        print(f"still in a step, stopping after it: {_some(cancelled.still_running)}")


def collect_and_show(sweep_dir: Path, *, as_json: bool) -> None:
    """Write results.parquet and say what is in it."""
    from sweeps.collect import collect, told_accuracies
    from sweeps.epochs import describe_repeats

    frame = collect(sweep_dir)
    repeats = describe_repeats(frame["epochs"])
    path = sweep_dir / "results.parquet"
    counts = Counter(frame["status"])
    if as_json:
        told = {
            "path": str(path),
            "n_runs": len(frame),
            "counts": dict(counts),
            "warnings": [repeats] if repeats else [],
        }
        rows = json.loads(frame.to_json(orient="records", double_precision=15))
        print(json.dumps(told | {"rows": rows}, indent=2))
        return
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    print(f"{path}: {count_of(len(frame), 'run')} ({told}), {len(frame.columns)} columns")
    for line in told_accuracies(frame):
        print(line)
    if len(frame) > counts["finished"]:
        print("runs without a result are rows with nulls; see `dlcm sweep status`")
    if repeats:
        print(f"warning: {repeats}", file=sys.stderr)
