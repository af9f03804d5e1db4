"""What the DLCM saves against the dense baseline: the FLOPs that a dense model needs for the same predicted loss."""

import dataclasses
from typing import Any

import numpy as np

from analysis.optimum import Optimum
from analysis.result import FitResult
from analysis.search import Cost, tokens_for_budget
from dlcm.errors import UserError

Array = np.ndarray

_DECADES = 3.0
_POINTS = 121
_SIZES = 81


@dataclasses.dataclass(frozen=True)
class Savings:
    """FLOPs saved at equal predicted loss; negative where the dense model needs fewer.

    Attributes:
        budget: training FLOPs of the DLCM.
        dense_flops: what the dense model needs for the same loss; None where it is beyond three decades of the budget.
        share: 1 - budget / dense_flops.
        low: lower end of the 95% interval of `share`; None without bootstraps, or where more than 2.5% of the pairs have no
            answer. high: upper end.
        text: the finding in a sentence.
    """

    budget: float
    dense_flops: float | None
    share: float | None
    low: float | None
    high: float | None
    status: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return dataclasses.asdict(self)


def savings(best: Optimum, dense: FitResult, cost: Cost, *, sizes: tuple[float, float] | None = None) -> Savings:
    """Compare a DLCM's optimum with the dense frontier at equal predicted loss.

    Bootstrap refits of both are paired at random order of their draws, which are independent.

    Args:
        best: the DLCM's optimum.
        dense: the fit of the dense baseline.
        cost: training FLOPs of either, `cost(N, D, R, P)`; the dense model is R = 1, P = 0.
        sizes: dense model sizes that may be chosen; those between the dense runs by default: no size is extrapolated.

    Raises:
        UserError: the two fits are under different conventions, or `dense` is no fit of the dense baseline.
    """
    if dense.law.family != "dense":
        raise UserError(f"savings: law {dense.law.name} is not a law of the dense baseline")
    best.convention.require_same(dense.convention, "savings")
    frontier = DenseFrontier(dense, cost, best.budget, sizes)
    needed = frontier.flops_for_loss(dense.values, best.loss)
    share = None if needed is None else 1 - best.budget / needed
    drawn = []
    for values, loss in zip(dense.replicate_values(), best.replicates[:, 4]):
        flops = frontier.flops_for_loss(values, float(loss))
        # beyond the searched decades: as good as never (all saved) above, as good as free (lost without bound) below
        drawn.append(1 - best.budget / flops if flops else (1.0 if frontier.never(values, float(loss)) else -np.inf))
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest") if drawn else (None, None)
    low, high = (None if v is None else float(v) for v in (low, high))
    status, text = _judge(best, needed, share, low, high, dense)
    finite = [None if v is None or not np.isfinite(v) else v for v in (low, high)]
    return Savings(best.budget, needed, share, finite[0], finite[1], status, text)


def _judge(
    best: Optimum, needed: float | None, share: float | None, low: float | None, high: float | None, dense: FitResult
) -> tuple[str, str]:
    remarks = [f"dense: the fit behind it is {dense.status}"] if dense.status != "converged" else []
    remarks += [f"DLCM: {note}" for note in best.notes[:1]]
    if needed is not None and (beyond := dense.outside(C=needed)) and dense.ranges["C"][1] > 0:
        remarks.append(f"the dense FLOPs lie {beyond['C']:.2g} decades outside the dense runs")
    rest = "".join(f"; {remark}" for remark in remarks)
    if share is None or needed is None:
        return "not identified", (
            f"no dense model within {_DECADES:g} decades of {best.budget:.3g} FLOPs has a predicted loss of {best.loss:.4f}: "
            f"the savings are not identified{rest}"
        )
    interval = "no interval" if low is None or high is None else f"95% {100 * low:+.0f}% to {100 * high:+.0f}%"
    needs = f"{needed:.3g} FLOPs for the loss that the DLCM reaches with {best.budget:.3g} "
    undecided = low is not None and high is not None and low < 0 < high
    winner = "the dense model wins at this scale: it" if share < 0 and not undecided else "the dense model"
    fact = f"{winner} needs {needs}"
    fact += f"(saved by the DLCM: {100 * share:+.0f}%, {interval})"
    if undecided:
        return "not identified", f"which family is cheaper is not identified: {fact}{rest}"
    return "ok", fact + rest


class DenseFrontier:
    """Least predicted loss of the dense model against its training FLOPs, three decades to either side of a budget."""

    def __init__(self, dense: FitResult, cost: Cost, budget: float, sizes: tuple[float, float] | None = None):
        low, high = sizes or dense.ranges["N"]
        self.law = dense.law
        self.budgets = budget * 10 ** np.linspace(-_DECADES, _DECADES, _POINTS)
        n = np.geomspace(low, high, _SIZES)
        ones, zeros = np.ones_like(n), np.zeros_like(n)
        self.N = n
        self.D = np.stack([tokens_for_budget(cost, c, n, ones, zeros) for c in self.budgets])

    def losses(self, values: dict[str, float]) -> Array:
        """Least loss at each of `budgets`, interpolated between sizes by a parabola in log N."""
        table = self.law.predict(values, N=self.N, D=self.D)
        best = np.argmin(table, axis=1)
        inner = np.clip(best, 1, table.shape[1] - 2)
        rows = np.arange(len(table))
        left, middle, right = table[rows, inner - 1], table[rows, inner], table[rows, inner + 1]
        curvature = left - 2 * middle + right
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = middle - (left - right) ** 2 / (8 * curvature)
        return np.where((best == inner) & (curvature > 0), vertex, table[rows, best])

    def flops_for_loss(self, values: dict[str, float], loss: float) -> float | None:
        """FLOPs at which the frontier reaches `loss`; None outside the searched decades."""
        frontier = np.minimum.accumulate(self.losses(values))
        if not frontier[-1] <= loss <= frontier[0]:
            return None
        return float(np.exp(np.interp(-loss, -frontier, np.log(self.budgets))))

    def never(self, values: dict[str, float], loss: float) -> bool:
        """Whether even the largest budget searched stays above `loss`."""
        return bool(self.losses(values)[-1] > loss)
