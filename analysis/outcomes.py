"""What each run did on each item of each task, so that two runs are compared item by item."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.data import ResultsData
from dlcm.errors import UserError
from dlcm.record import read_json

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class TaskOutcomes:
    """One run on one task.

    Attributes:
        task_hash: of items and scoring; only runs of one hash are paired.
        correct: whether each item was answered right, (n,).
    """

    task_hash: str
    correct: Array


Outcomes = Mapping[str, Mapping[str, TaskOutcomes]]
"""Run -> task -> what it did."""


def difference_error(one: TaskOutcomes | None, other: TaskOutcomes | None) -> float | None:
    """Standard error of the difference of two accuracies on the same items: that of the mean of the differences.

    None where one is missing, where they are of other items, or where there are fewer than two.
    """
    if one is None or other is None or one.task_hash != other.task_hash or len(one.correct) != len(other.correct):
        return None
    n = len(one.correct)
    if n < 2:
        return None
    differences: Any = one.correct.astype(float) - other.correct.astype(float)
    return float(differences.std(ddof=1) / np.sqrt(n))


def load_outcomes(data: ResultsData) -> Outcomes:
    """What the run directories beside the results hold of single items; empty where results stand apart from their sweep."""
    folder = Path(data.source).parent
    found: dict[str, dict[str, TaskOutcomes]] = {}
    for run in data.run_ids:
        for path in sorted((folder / run / "eval").glob("*.json")):
            record = read_json(path)
            if "correct" in record and "task_hash" in record:
                found.setdefault(run, {})[path.stem] = TaskOutcomes(record["task_hash"], _read(path, record["correct"]))
    return found


def _read(path: Path, text: Any) -> Array:
    """`correct` of `eval/<task>.json`: a 1 for each item that was answered right and a 0 for each other."""
    if not isinstance(text, str) or set(text) - {"0", "1"}:
        raise UserError(f"{path}: `correct` is not a text of 0 and 1; delete it and evaluate the run again")
    return np.frombuffer(text.encode(), dtype=np.uint8) == ord("1")
