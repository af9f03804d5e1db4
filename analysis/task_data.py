"""The runs that were evaluated on a task: accuracy, what predicts it, items, and what guessing scores."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from analysis.data import Exclusion, ResultsData, numeric_column
from dlcm.errors import UserError, nearest

Array = np.ndarray
Source = Literal["loss", "bpb"]
SOURCES: tuple[Source, ...] = ("loss", "bpb")


def task_data(data: ResultsData, task: str, source: Source = "loss") -> ResultsData:
    """The runs that were evaluated on a task, with what predicts their accuracy as `loss`.

    Args:
        data: results with `acc_<task>`, and `bpb_<task>` for the source `bpb`.
        task: its name.
        source: what predicts: `loss`, or `bpb`, the bits per byte of the right answer. A law that is fitted to what is returned
            is then one of that, and can be chained with the curve.

    Raises:
        UserError: no such task or source, no run was evaluated, or an accuracy that is no share.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}{nearest(source, SOURCES)}")
    accuracy = _column(data, "acc", task)
    known = np.isfinite(accuracy)
    predictor = data.loss if source == "loss" else _column(data, "bpb", task)
    known &= np.isfinite(predictor)
    if not known.any():
        raise UserError(
            f"{data.source}: no run has an accuracy on {task}; evaluate the runs and collect the sweep again"
        )
    bad = np.flatnonzero(known & ~((accuracy >= 0) & (accuracy <= 1)))
    if bad.size:
        raise UserError(
            f"{data.source}: run {data.run_ids[bad[0]]}: acc_{task} = {accuracy[bad[0]]:g} is no share from 0 to 1; "
            f"of percentages write --columns acc_{task}=acc_{task}/100"
        )
    left_out = tuple(Exclusion(data.run_ids[i], f"not evaluated on {task}") for i in np.flatnonzero(~known))
    convention = data.convention
    if source == "bpb":
        convention = dataclasses.replace(convention, loss=f"bits per byte of the right answer, task {task}")
    whole = dataclasses.replace(data, loss=predictor, convention=convention, exclusions=(*data.exclusions, *left_out))
    return whole.take(known)


def _column(data: ResultsData, kind: str, task: str) -> Array:
    name = f"{kind}_{task}"
    if name in data.frame:
        return numeric_column(data.frame, name, data.source)
    prefix = f"{kind}_"
    tasks = [
        str(c).removeprefix(prefix)
        for c in data.frame
        if str(c).startswith(prefix) and not str(c).endswith("_stderr") and not str(c).startswith("acc_norm_")
    ]
    what = "accuracy" if kind == "acc" else "bits per byte"
    known = nearest(task, tasks) if tasks else "; it has none of any task"
    raise UserError(
        f"{data.source}: no {what} on task {task!r} (column {name}){known} (or map one: --columns {name}=...)"
    )


def find_chance(data: ResultsData, task: str, given: float | None = None) -> float:
    """Accuracy of guessing: as given, or from a column `chance_<task>`, or from the evaluation records beside the results.

    Raises:
        UserError: not known, not the same in all runs, or no share below 1.
    """
    found = {given} if given is not None else {round(v, 9) for v in _recorded(data, "chance", task).tolist() if v == v}
    if not found:
        raise UserError(
            f"{data.source}: what guessing scores on {task} is not recorded (column chance_{task}); give it with --chance, "
            "such as 0.25 for four choices, 0 for an open answer"
        )
    if len(found) > 1:
        raise UserError(
            f"{data.source}: chance on {task} is {min(found)} in some runs and {max(found)} in others; give --chance"
        )
    chance = float(found.pop() or 0.0)
    if not 0 <= chance < 1:
        raise UserError(f"chance on {task} = {chance:g}; give a share from 0 up to 1, such as 0.25")
    return chance


def find_items(data: ResultsData, task: str) -> Array:
    """Items of the task that each run answered, (runs,), NaN where not known: recorded, or from the accuracy's standard error.

    The error is that of a mean of zeros and ones, sqrt(p (1 - p) / (items - 1)), which lm-evaluation-harness writes.
    """
    items = _recorded(data, "n", task)
    if f"acc_{task}_stderr" in data.frame:
        p, error = (numeric_column(data.frame, name, data.source) for name in (f"acc_{task}", f"acc_{task}_stderr"))
        with np.errstate(divide="ignore", invalid="ignore"):
            told = 1 + p * (1 - p) / error**2
        items = np.where(np.isnan(items) & np.isfinite(told) & (p > 0) & (p < 1), told, items)
    return np.where(items >= 1, items, np.nan)


def _recorded(data: ResultsData, key: str, task: str) -> Array:
    """A figure of the task's evaluation for each run: the column `<key>_<task>`, or else eval/<task>.json of the run."""
    if f"{key}_{task}" in data.frame:
        return numeric_column(data.frame, f"{key}_{task}", data.source)
    folder = Path(data.source.partition(" where ")[0]).parent
    found = np.full(len(data), np.nan)
    for i, run in enumerate(data.run_ids):
        file = folder / run / "eval" / f"{task}.json"
        if file.is_file():
            try:
                found[i] = float(json.loads(file.read_text()).get(key) or 0.0)
            except (OSError, ValueError, TypeError, AttributeError):
                continue
    return found
