"""Evaluating all finished runs of a sweep: asked for in its directory, done by the workers that train, shown as a table.

What is asked for stands in `evaluate.json`; a run that lacks the result of a task is open to any worker. So what was killed
goes on where it stopped, a run at a time, and runs that are trained later are evaluated as well.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dlcm.errors import UserError
from dlcm.record import read_json
from dlcm.tasks import check_tasks, expand_tasks, parse_task
from sweeps.launch import Submission, resubmit, submit_lock
from sweeps.session import Options, count_of, watch_ways
from sweeps.states import RunState, sweep_states
from sweeps.store import StoredRun, StoredSweep, load_sweep, save_asked
from sweeps.watch import explain_incomplete, watch

OnProgress = Callable[[str, int, int], None]
"""Called with what is done, how many runs it is done for, and how many there are."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation of a sweep comes to.

    Attributes:
        tasks: their words, files by absolute path.
        hours: run id of each run to be evaluated -> how long it will take, estimated; not a number where that is not known.
        done: finished runs that have all results already.
        busy: runs that a worker holds.
        untrained: planned runs without a result.
    """

    tasks: tuple[str, ...]
    hours: Mapping[str, float]
    done: tuple[str, ...]
    busy: tuple[str, ...]
    untrained: tuple[str, ...]


def ask(
    sweep_dir: Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    force: bool = False,
    progress: OnProgress = lambda *_: None,
) -> Asked:
    """Write down which tasks the finished runs of a sweep are to be evaluated on, and find those that are not yet.

    A result of other items, of another number of them, or of other weights is deleted: it would be measured anew anyway.

    Args:
        sweep_dir: directory of the sweep.
        tasks: words of `dlcm.tasks`.
        limit: items of each task, at most.
        force: measure again what was measured.
        progress: told how many runs were looked at.

    Raises:
        UserError: what `dlcm.evaluate.evaluate` refuses, before anything is written; or not a sweep.
    """
    from dlcm.evaluate import pending

    check_tasks(tasks)
    words = tuple(_absolute(word) for word in expand_tasks(tasks))
    sweep = load_sweep(sweep_dir)
    states = {state.run_id: state for state in sweep_states(sweep)}
    finished = [run for run in sweep.runs if states[run.run_id].status == "finished"]
    found = {}
    for number, run in enumerate(finished):
        progress("looking at runs", number, len(finished))
        found[run.run_id] = pending(run.path, words, limit=limit, force=force)
    with submit_lock(sweep_dir):
        save_asked(sweep_dir, {**load_sweep(sweep_dir).asked, **dict.fromkeys(words, limit)})
        for run in finished:
            for word in found[run.run_id].tasks:
                result_path(run, word).unlink(missing_ok=True)
    return Asked(
        words,
        {
            run.run_id: run.hours * found[run.run_id].n_tokens / run.tokens
            for run in finished
            if found[run.run_id].tasks
        },
        tuple(run.run_id for run in finished if not found[run.run_id].tasks),
        tuple(run_id for run_id, state in states.items() if state.status == "running"),
        tuple(s.run_id for s in states.values() if s.in_plan and s.status not in ("finished", "diverged", "running")),
    )


def evaluate_run_and_show(
    run_dir: Path, tasks: Sequence[str], *, limit: int | None, force: bool, as_json: bool
) -> None:
    """Evaluate one run in this process and print its results."""
    from dlcm.console import Reporter
    from dlcm.evaluate import evaluate, format_results

    with Reporter() as report:
        results = evaluate(run_dir, tasks, limit=limit, force=force, progress=report)
    print(json.dumps([asdict(result) for result in results], indent=2) if as_json else format_results(results))


def evaluate_and_show(
    sweep_dir: Path,
    tasks: Sequence[str],
    options: Options,
    *,
    limit: int | None,
    force: bool,
    detach: bool | None,
    as_json: bool,
) -> int:
    """Evaluate the finished runs of a sweep and, unless detached, show how it goes and what comes out. Returns the exit code."""
    from dlcm.console import Reporter

    out = sys.stderr if as_json else sys.stdout
    with Reporter() as report:
        asked = ask(sweep_dir, tasks, limit=limit, force=force, progress=report)
    print(f"{sweep_dir}: {count_of(len(asked.hours), 'run')} to evaluate{_told(asked)}", file=out, flush=True)
    try:
        submission = _submit(sweep_dir, asked, options, out)
        wait = options.cluster != "slurm" if detach is None else not detach
        if submission.job_ids and submission.cluster != "debug":
            print(
                f"submission {submission.number}: {count_of(len(submission.job_ids), submission.cluster + ' job')}",
                file=out,
            )
            if not wait:
                print(f"submitted; {watch_ways(sweep_dir)}", file=out)
                return 0
            watch(sweep_dir, stream=out)
    except KeyboardInterrupt:
        print(f"\nthe workers go on; {watch_ways(sweep_dir)}", file=sys.stderr)
        return 130
    return _conclude(load_sweep(sweep_dir), asked, as_json)


def _submit(sweep_dir: Path, asked: Asked, options: Options, out: Any) -> Submission:
    def say(run: StoredRun) -> None:
        print(f"evaluating {run.run_id}", file=out, flush=True)

    return resubmit(
        sweep_dir, options.cluster, **options.arguments(), run_ids=tuple(asked.hours), hours=asked.hours, on_run=say
    )


def _told(asked: Asked) -> str:
    told = ((asked.done, "done before"), (asked.busy, "at work"), (asked.untrained, "not trained"))
    return "".join(f", {len(runs)} {how} (skipped)" for runs, how in told if runs)


def _conclude(sweep: StoredSweep, asked: Asked, as_json: bool) -> int:
    """Print the accuracies, and what is missing. Exit code 1 where a finished run lacks a result."""
    rows = accuracies(sweep, asked.tasks)
    states = {state.run_id: state for state in sweep_states(sweep)}
    lacking: list[RunState] = [states[run_id] for run_id in asked.hours if states[run_id].missing_evaluations]
    if as_json:
        missing = {state.run_id: state.missing_evaluations for state in lacking}
        print(json.dumps({"dir": str(sweep.path), "tasks": asked.tasks, "rows": rows, "missing": missing}, indent=2))
    else:
        print(format_accuracies(rows, [parse_task(word).name for word in asked.tasks]))
    for line in explain_incomplete(lacking):
        print(line, file=sys.stderr)
    if lacking:
        print(f"not complete: {count_of(len(lacking), 'run')}; the same command goes on", file=sys.stderr)
        return 1
    if not as_json:
        print(f"next: dlcm sweep collect {sweep.path}, then dlcm analyze export {sweep.path}")
    return 0


def result_path(run: StoredRun, word: str) -> Path:
    """Where a run has the result of a task."""
    return run.path / "eval" / f"{parse_task(word).name}.json"


def accuracies(sweep: StoredSweep, words: Sequence[str]) -> list[dict[str, Any]]:
    """One row a run that was evaluated: its id, and accuracy, standard error, chance and bits per byte by the task's name."""
    rows = []
    for run in sweep.runs:
        found = {parse_task(word).name: result_path(run, word) for word in words}
        records = {name: read_json(path) for name, path in found.items() if path.exists()}
        if records:
            keys = ("acc", "acc_stderr", "chance", "constant", "bits_per_byte", "bits_per_byte_stderr", "n")
            told = {name: {key: record.get(key) for key in keys} for name, record in records.items()}
            rows.append({"run_id": run.run_id, "tasks": told})
    return rows


def format_accuracies(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Accuracies in percent with standard errors, one line a run; above them those of guessing and of one answer always."""

    def cell(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "-"
        error = found["acc_stderr"]
        return f"{100 * found['acc']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")

    if not rows:
        return "no run has been evaluated"

    def floor(key: str, name: str) -> str:
        found = [
            row["tasks"][name][key] for row in rows if name in row["tasks"] and row["tasks"][name][key] is not None
        ]
        return f"{100 * found[0]:.1f}" if found else "-"

    lines = [["accuracy, %", *names]]
    lines += [[f"({key})", *(floor(key, name) for name in names)] for key in ("chance", "constant")]
    lines += [[row["run_id"], *(cell(row["tasks"].get(name)) for name in names)] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(part.ljust(width) for part, width in zip(line, widths)).rstrip() for line in lines)


def _absolute(word: str) -> str:
    task = parse_task(word)
    return replace(task, target=str(Path(task.target).resolve())).word if task.kind == "file" else word


def check_evaluation(run_dir: Path | None, sweep: str | None, elsewhere: Mapping[str, object]) -> None:
    """Refuse a run beside a sweep, neither, or options of a sweep for a run.

    Args:
        run_dir: directory of a run.
        sweep: a sweep.
        elsewhere: options of a sweep by name; those that were given are not None.

    Raises:
        UserError: which of these.
    """
    if (run_dir is None) == (sweep is None):
        raise UserError("give the directory of a run, or --sweep with that of a sweep")
    given = [name for name, value in elsewhere.items() if value is not None]
    if run_dir is not None and given:
        raise UserError(f"--{given[0]} goes with --sweep: one run is evaluated in this process")
    if run_dir is not None and (run_dir / "plan.parquet").exists():
        raise UserError(f"{run_dir}: is a sweep; evaluate its runs with --sweep {run_dir}")
