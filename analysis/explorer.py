"""The allocation explorer of the report: best allocations over budgets, and what any other R and P would lose, as tables.

Everything that a reader may ask of it is computed here; the page only looks up and interpolates.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from analysis.allocation import Allocation, allocate, replicate_columns
from analysis.budget import Cost
from analysis.frontier import COORDINATES, Frontier, frontier
from analysis.intervals import interval
from analysis.optimum import describe_outside
from analysis.result import FitResult

Array = np.ndarray

_SIZES = 121
"""Sizes among which the best is taken for a given R and P; the loss is flat there, so that the grid costs it about 1e-6."""
_REFITS = 200
"""Bootstrap refits behind the intervals: enough for a page that is looked at."""


@dataclasses.dataclass(frozen=True, eq=False)
class Explorer:
    """One kind of budget.

    Attributes:
        best: over the budgets, with intervals.
        ratios: R of the choices, (r,). shares: P of the choices, (s,).
        N: best size for each budget and choice, (b, s, r). D: tokens that the budget leaves for it, (b, s, r).
        loss: predicted there, nats, (b, s, r); NaN where the budget pays for no such model.
        regret: the loss above the least of the budget, (b, s, r), with a 95% interval: low, high.
    """

    best: Frontier
    ratios: Array
    shares: Array
    N: Array
    D: Array
    loss: Array
    regret: Array
    low: Array | None
    high: Array | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, rounded to what a page shows; null where nothing can be said."""
        b = self.best
        rows = []
        for i, budget in enumerate(b.budgets.tolist()):
            row: dict[str, Any] = {"budget": budget, "outside": describe_outside(b.outside[i]) if b.outside[i] else ""}
            for k, name in enumerate((*COORDINATES, "loss")):
                ends = None if b.low is None or b.high is None else [_round(b.low[i, k]), _round(b.high[i, k])]
                status = "ok" if name == "loss" else b.statuses[name][i]
                row[name] = {"value": _round(b.points[i, k]), "interval": ends, "status": status}
            rows.append(row)
        grids = {name: _nested(getattr(self, name)) for name in ("N", "D", "loss", "regret", "low", "high")}
        return {
            "unit": b.unit,
            "tokens": b.tokens,
            "law": b.law,
            "budgets": rows,
            "ratios": _nested(self.ratios),
            "shares": _nested(self.shares),
            "data": {name: list(ends) for name, ends in b.data.items()},
            **grids,
        }


def explore(
    result: FitResult,
    cost: Cost,
    budgets: Array,
    *,
    tokens: float | None = None,
    n_ratios: int = 13,
    n_shares: int = 13,
    tell: Callable[[str], None] | None = None,
) -> Explorer:
    """Best allocations at `budgets`, and the regret of every choice of R and P in the data.

    Args:
        result: the fit of a DLCM law.
        cost: `cost(N, D, R, P)` in the unit of the budgets.
        budgets: ascending, (b,).
        tokens: D where it is given, for inference budgets.
        n_ratios: values of R, evenly in its logarithm over the data.
        n_shares: values of P, evenly over the data.
        tell: called with a line before each budget.

    Raises:
        UserError: what `frontier` raises.
    """
    few = dataclasses.replace(result, replicates=result.replicates[:_REFITS])
    best = frontier(few, cost, budgets, tokens=tokens, force=True, tell=tell)
    ratios, shares = _axis(result.ranges["R"], n_ratios, geometric=True), _axis(result.ranges["P"], n_shares)
    tables = [_choices(allocate(few, cost, c, tokens=tokens), ratios, shares) for c in best.budgets.tolist()]
    stacked = {name: np.stack([table[name] for table in tables]) for name in tables[0]}
    drawn = "low" in stacked
    return Explorer(
        best=best,
        ratios=ratios,
        shares=shares,
        **{name: stacked[name] for name in ("N", "D", "loss", "regret")},
        low=stacked["low"] if drawn else None,
        high=stacked["high"] if drawn else None,
    )


def _axis(ends: tuple[float, float], n: int, *, geometric: bool = False) -> Array:
    low, high = ends
    if high <= low:
        return np.array([low])
    return np.geomspace(low, high, n) if geometric else np.linspace(low, high, n)


def _choices(problem: Allocation, ratios: Array, shares: Array) -> Mapping[str, Array]:
    """At one budget: the best size for each share and ratio, and the loss above the optimum, each (s, r)."""
    sizes = np.zeros(1)  # where the tokens are given the size follows from the budget
    if problem.solve == "D":
        low, high = np.log(problem.box["N"])
        sizes = np.linspace(low, high, _SIZES if high > low else 1)
    P, R, size = np.meshgrid(shares, np.log(ratios), sizes, indexing="ij")
    points = np.stack([size, R, P], axis=-1).reshape(-1, 3)
    N, D, R_, P_ = (np.asarray(v, dtype=float).reshape(P.shape) for v in problem.search.complete(points))
    usable = np.isfinite(N) & np.isfinite(D) & (D > 0)
    inputs = {k: np.where(usable, v, 1.0) for k, v in (("N", N), ("D", D), ("R", R_), ("P", P_))}
    loss = np.where(usable, problem.law.predict(problem.result.values, **inputs), np.nan)
    at = np.argmin(np.where(usable, loss, np.inf), axis=-1)[..., None]
    N, D, loss, R_, P_ = (np.take_along_axis(v, at, axis=-1)[..., 0] for v in (N, D, loss, R_, P_))
    least = problem.best()[4]
    found = {"N": np.where(np.isfinite(loss), N, np.nan), "D": np.where(np.isfinite(loss), D, np.nan), "loss": loss}
    found["regret"] = np.maximum(loss - least, 0.0)
    if len(problem.result.replicates):
        found |= _intervals(problem, N, D, R_, P_, loss)
    return found


def _intervals(problem: Allocation, N: Array, D: Array, R: Array, P: Array, loss: Array) -> dict[str, Array]:
    """95% interval of the regret of each choice: each refit's loss there less its own least."""
    least = problem.replicates()[:, 4]
    columns: Any = {name: values[:, None] for name, values in replicate_columns(problem.result).items()}
    known = np.isfinite(loss)
    inputs = {k: v[known] for k, v in (("N", N), ("D", D), ("R", R), ("P", P))}
    variables = problem.law.compute_variables(inputs)
    drawn = problem.law.evaluate(columns, variables, gradient=False)[0] - least[:, None]
    found = {}
    for name, end in zip(("low", "high"), interval(drawn)):
        found[name] = np.full(loss.shape, np.nan)
        found[name][known] = np.maximum(end, 0.0)
    return found


def _round(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _nested(values: Array | None) -> Any:
    """Lists of numbers of five digits, null where not finite."""
    if values is None:
        return None
    return [_nested(v) for v in values] if np.ndim(values) else _round(float(values))
