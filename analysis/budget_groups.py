"""Runs of nearly equal training FLOPs as curves over N, R or P, what else they could differ in being held."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.data import ResultsData
from analysis.design import find_levels
from analysis.frames import numeric_column
from dlcm.errors import UserError

Array = np.ndarray
MIN_RUNS = 5
"""Runs near one C from which it counts as a budget."""
_SHARE_WIDTH = 0.05
"""Shares P within this distance are one level: shapes come in whole layers and heads."""
_SAME_PLACE = 1.01
_FEW = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """Runs of one budget and one set of held values.

    Attributes:
        held: what they share.
        budget: training FLOPs.
        rows: their positions in the data, (n,).
        x: log N, log R or the log odds of P, (n,).
        excess: log of their C over the budget, (n,).
        log_tokens: log of the D that the budget would have bought each, (n,): C goes as D at fixed N, R and P.
        middle: N, R and P at their medians.
    """

    held: Mapping[str, float | str]
    budget: float
    rows: Array
    x: Array
    excess: Array
    log_tokens: Array
    middle: Mapping[str, float]

    @property
    def levels(self) -> Array:
        """Distinct places, ascending; those within 1% are one, for which the lowest stands."""
        found: list[float] = []
        for value in np.sort(self.x).tolist():
            if not found or value - found[-1] > np.log(_SAME_PLACE):
                found.append(value)
        return np.array(found)


def place_of(over: str, value: Any) -> Any:
    """A coordinate on the axis of a profile: its logarithm, of P the log odds."""
    return np.log(value / (1 - value)) if over == "P" else np.log(value)


def value_at(over: str, place: Any) -> Any:
    """The inverse of `place_of`."""
    return 1 / (1 + np.exp(-place)) if over == "P" else np.exp(place)


def curves_of(
    data: ResultsData, over: str, budgets: Sequence[float] | None, tolerance: float
) -> tuple[list[Curve], int]:
    """The curves over one coordinate, by held values, then by budget; and how many runs belong to none.

    Args:
        data: runs of one family.
        over: N, R or P.
        budgets: training FLOPs; found in the data where None.
        tolerance: relative distance of C from its budget.

    Raises:
        UserError: a budget that is no positive number, or a P that is no share where the profiles run over P.
    """
    if budgets is not None and not all(np.isfinite(b) and b > 0 for b in budgets):
        raise UserError(f"budgets = {', '.join(f'{b:g}' for b in budgets)}; give training FLOPs above 0")
    if over == "P" and not np.all((data.P > 0) & (data.P < 1)):
        raise UserError(f"{data.source}: profiles over P need shares between 0 and 1, and dense runs have P = 0")
    width = float(np.log1p(tolerance))
    given = np.unique(budgets) if budgets is not None else np.empty(0)
    centres = np.log(given) if budgets is not None else find_budgets(np.log(data.C), 2 * width)
    if not len(centres):
        return [], len(data)
    distance = np.abs(np.log(data.C)[:, None] - centres)
    nearest = np.where(distance.min(axis=1) <= width * (1 + 1e-9), distance.argmin(axis=1), -1)
    curves = []
    for held, members in _groups(data, over):
        for i in range(len(centres)):
            rows = members[nearest[members] == i]
            if len(rows) >= _FEW:
                curves.append(_curve(data, over, held, rows, None if budgets is None else float(given[i])))
    used = {int(row) for curve in curves for row in curve.rows}
    return curves, len(data) - len(used)


def find_budgets(log_c: Array, width: float) -> Array:
    """Places of the budgets: the windows of this width that hold most runs, one after the other, ascending.

    A budget is the middle between the lowest and the highest C of its window. Windows of fewer than MIN_RUNS runs are no budgets.
    """
    left, found = np.sort(log_c), []
    while len(left) >= MIN_RUNS:
        counts = np.searchsorted(left, left + width * (1 + 1e-9), side="right") - np.arange(len(left))
        first = int(np.argmax(counts))
        if counts[first] < MIN_RUNS:
            break
        window = left[first : first + counts[first]]
        found.append(float(window[0] + window[-1]) / 2)
        left = np.delete(left, np.arange(first, first + counts[first]))
    return np.sort(found)


def slopes_of_best(curves: Sequence[Curve], log_losses: Sequence[float]) -> Array:
    """D log(loss) / d log C along the best sizes, at each curve, (curves,).

    At a minimum over N this is also the slope at fixed N (envelope theorem), by which runs that spent a little more or less than
    the budget are brought to it. From the curves of the same held values; 0 where these are fewer than two.

    Args:
        curves: the curves.
        log_losses: log loss at each vertex; NaN where there is none.
    """
    slopes = np.zeros(len(curves))
    known = np.isfinite(log_losses)
    keys = [tuple(curve.held.items()) for curve in curves]
    log_c = np.log([curve.budget for curve in curves])
    for key in dict.fromkeys(keys):
        own = np.array([k == key for k in keys])
        at = own & known
        if at.sum() < 2 or np.ptp(log_c[at]) == 0:
            continue
        degree = 1 if at.sum() < 4 else 2
        line = np.polynomial.Polynomial.fit(log_c[at], np.asarray(log_losses)[at], degree)
        slopes[own] = np.minimum(line.deriv()(log_c[own]), 0.0)
    return slopes


def _curve(data: ResultsData, over: str, held: Mapping[str, float | str], rows: Array, budget: float | None) -> Curve:
    budget = float(np.median(data.C[rows])) if budget is None else budget
    excess = np.log(data.C[rows] / budget)
    return Curve(
        held=held,
        budget=budget,
        rows=rows,
        x=place_of(over, data.values(over)[rows]),
        excess=excess,
        log_tokens=np.log(data.D[rows]) - excess,
        middle={name: float(np.median(data.values(name)[rows])) for name in "NRP"},
    )


def _groups(data: ResultsData, over: str) -> list[tuple[dict[str, float | str], Array]]:
    """Sets of runs that differ in the coordinate and in C alone, each with what it holds; seeds are one set."""
    keys: dict[str, tuple[Array, list[float] | list[str]]] = {}
    for name in "NRP":
        if name != over and np.ptp(data.values(name)) > 0:
            keys[name] = _levels(data, name)
    kinds = sorted(set(data.frame["boundary"].astype(str))) if "boundary" in data.frame else []
    if len(kinds) > 1:
        at = np.array([kinds.index(str(kind)) for kind in data.frame["boundary"]])
        keys["boundary"] = (at, kinds)
    if not keys:
        return [({}, np.arange(len(data)))]
    table = np.stack([at for at, _ in keys.values()], axis=1)
    combinations, of_row = np.unique(table, axis=0, return_inverse=True)
    return [
        (
            {name: values[int(i)] for (name, (_, values)), i in zip(keys.items(), combination)},
            np.flatnonzero(of_row.ravel() == k),
        )
        for k, combination in enumerate(combinations)
    ]


def _levels(data: ResultsData, name: str) -> tuple[Array, list[float]]:
    """Level of each run, and the levels: of R as it was asked for, where that is known."""
    values = data.values(name)
    if name == "R" and "compression_target" in data.frame:
        values = numeric_column(data.frame, "compression_target", data.source)
    if name == "P":
        order = np.argsort(values, kind="stable")
        starts = np.concatenate([[True], np.diff(values[order]) > _SHARE_WIDTH])
        at = np.empty(len(values), dtype=int)
        at[order] = np.cumsum(starts) - 1
        return at, [float(np.median(values[at == i])) for i in range(at.max() + 1)]
    return find_levels(values)
