"""What the DLCM saves against the dense baseline: the FLOPs that a dense model needs for the same predicted loss.

Of training, of a lifetime of served tokens, or of serving a token at the same number of training tokens: whatever the budget of
the optimum counts. Where the tokens are given, the dense model has the same.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from analysis.allocation import replicate_columns, require_known_tokens
from analysis.budget import find_root, price, sizes_for_budget
from analysis.cost import training_of
from analysis.intervals import interval
from analysis.optimum import Optimum, describe_outside, edge_of
from analysis.result import FitResult
from analysis.search import Cost, Search
from dlcm.errors import UserError

Array = np.ndarray
Columns = Mapping[str, Array]

_DECADES = 3.0
_EXACT = 1e-11
_REACH = _DECADES * np.log(10)


@dataclasses.dataclass(frozen=True)
class Savings:
    """FLOPs saved at equal predicted loss; negative where the dense model needs fewer.

    Attributes:
        budget: FLOPs of the DLCM, in `unit`. unit: what is counted.
        tokens: D of both, where it was given.
        dense_flops: what the dense model needs for the same loss; None where it is beyond three decades of the budget.
        share: 1 - budget / dense_flops.
        low: lower end of the 95% interval of `share`; None without bootstraps, or where more than 2.5% of the pairs have no
            answer. high: upper end.
        decades_outside: how far that dense model lies outside the dense runs.
        status: `ok`; `lower bound` where a choice of the DLCM lies on an edge of what was searched, beyond which it may save
            more; `upper bound` where the dense size is the smallest or largest that may be chosen, beyond which a dense model may
            need less; `not identified` where it does not follow which family is cheaper.
        text: the finding in a sentence.
        dense_size: N of that dense model.
    """

    budget: float
    unit: str
    tokens: float | None
    dense_flops: float | None
    share: float | None
    low: float | None
    high: float | None
    decades_outside: Mapping[str, float]
    status: str
    text: str
    dense_size: float | None = None
    dense_at_edge: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**dataclasses.asdict(self), "decades_outside": dict(self.decades_outside)}


def savings(best: Optimum, dense: FitResult, cost: Cost, *, sizes: tuple[float, float] | None = None) -> Savings:
    """Compare a DLCM's optimum with the dense frontier at equal predicted loss.

    Bootstrap refits of both are paired in the order of their draws: independent, or the same runs where both families were
    fitted together.

    Args:
        best: the DLCM's optimum.
        dense: the fit of the dense baseline.
        cost: what the budget counts, for either family, `cost(N, D, R, P)`; the dense model is R = 1, P = 0.
        sizes: dense model sizes that may be chosen. By default those between the dense runs, so that no size is extrapolated;
            any where the tokens are given, since nothing but the size can make up for the loss then.

    Raises:
        UserError: the two fits are under different conventions, `dense` is no fit of the dense baseline, or its runs do not tell
            what tokens are worth.
    """
    if dense.law.family != "dense":
        raise UserError(f"savings: law {dense.law.name} is not a law of the dense baseline")
    best.convention.require_same(dense.convention, "savings")
    baseline = DenseBaseline(dense, cost, best.budget, best.tokens, sizes)
    own = {name: np.array([value]) for name, value in dense.values.items()}
    flops = float(baseline.flops_for_losses(own, np.array([best.loss]))[0])
    needed = flops if 0 < flops < np.inf else None
    share = None if needed is None else 1 - best.budget / needed
    low = high = None
    if n := min(len(dense.replicates), len(best.replicates)):
        columns = {name: column[:n] for name, column in replicate_columns(dense).items()}
        with np.errstate(divide="ignore"):
            # out of reach counts as all saved above the budget, and as lost without bound below it
            drawn = 1 - best.budget / baseline.flops_for_losses(columns, best.replicates[:n, 4])
        low, high = (float(v) for v in interval(drawn, between=False))
    outside = baseline.outside(needed) if needed is not None else {}
    size, at_edge = baseline.size(needed) if needed is not None else (None, False)
    status, text = _judge(best, needed, share, low, high, dense, outside, at_edge)
    finite = [None if v is None or not np.isfinite(v) else v for v in (low, high)]
    return Savings(
        best.budget, best.unit, best.tokens, needed, share, finite[0], finite[1], outside, status, text, size, at_edge
    )


def _judge(
    best: Optimum,
    needed: float | None,
    share: float | None,
    low: float | None,
    high: float | None,
    dense: FitResult,
    outside: Mapping[str, float],
    dense_at_edge: bool,
) -> tuple[str, str]:
    walls = [choice.name for choice in best.choices if choice.at_edge]
    remarks = [f"dense: the fit behind it is {dense.status}"] if dense.status != "certified" else []
    remarks += [f"DLCM: {note}" for note in best.notes[:1]]
    if outside:
        remarks.append(f"that dense model lies {describe_outside(outside)}")
    if walls:
        lie = f"{' and '.join(walls)} of the DLCM {'lies' if len(walls) == 1 else 'lie'}"
        remarks.append(f"{lie} on the edge of what was searched, beyond which it may save more")
    if dense_at_edge:
        remarks.append(
            "the dense size is the smallest or largest of its runs, beyond which a dense model may need less"
        )
    rest = "".join(f"; {remark}" for remark in remarks)
    unit = best.unit if best.tokens is None else f"{best.unit} at D = {best.tokens:.3g}"
    if share is None or needed is None:
        return "not identified", (
            f"no dense model within {_DECADES:g} decades of {best.budget:.3g} {unit} has a predicted loss of {best.loss:.4f}: "
            f"the savings are not identified{rest}"
        )
    interval = "no interval" if low is None or high is None else f"95% {100 * low:+.0f}% to {100 * high:+.0f}%"
    needs = f"{needed:.3g} {unit} for the loss that the DLCM reaches with {best.budget:.3g} "
    undecided = low is not None and high is not None and low < 0 < high
    # What is known from one side only decides nothing where the other side might.
    undecided |= bool(walls and share < 0) or (dense_at_edge and share > 0)
    winner = "the dense model wins at this scale: it" if share < 0 and not undecided else "the dense model"
    bound = "" if undecided else "at least " * bool(walls) or "at most " * dense_at_edge
    fact = f"{winner} needs {needs}"
    fact += f"(saved by the DLCM: {bound}{100 * share:+.0f}%, {interval})"
    if undecided:
        return "not identified", f"which family is cheaper is not identified: {fact}{rest}"
    return "lower bound" if walls else "upper bound" if dense_at_edge else "ok", fact + rest


class DenseBaseline:
    """The least FLOPs at which a dense law has a predicted loss, searched over three decades to either side of a budget.

    Args:
        dense: a fit of the dense family.
        cost: `cost(N, D, R, P)`.
        budget: in the unit of the cost.
        tokens: D where it is given, and N is what may vary.
        sizes: sizes that may be chosen; see `savings` for the default.
    """

    def __init__(
        self,
        dense: FitResult,
        cost: Cost,
        budget: float,
        tokens: float | None = None,
        sizes: tuple[float, float] | None = None,
    ):
        require_known_tokens(dense, dense.law, tokens)
        self.dense, self.cost, self.budget, self.tokens = dense, cost, budget, tokens
        self.sizes = sizes or (dense.ranges["N"] if tokens is None else None)

    def flops_for_losses(self, values: Columns, losses: Array) -> Array:
        """The FLOPs at which the least loss under each set of constants is `losses`, (S,).

        Infinite where even three decades more are not enough, 0 where three decades less are more than enough.
        """
        return self._by_size(values, losses) if self.tokens is not None else self._by_budget(values, losses)

    def losses(self, values: Columns, budgets: Array) -> Array:
        """Least predicted loss at a budget of its own for each set of constants, (S,); infinite where it pays for no model."""
        return self.points(values, budgets)[:, 4]

    def outside(self, budget: float) -> dict[str, float]:
        """How far the best dense model of a budget lies outside the dense runs, in decades, by N, D and C."""
        own = {name: np.array([value]) for name, value in self.dense.values.items()}
        N, D = self.points(own, np.array([budget]))[0, :2].tolist()
        found = self.dense.outside(N=N, D=D)
        training = training_of(self.cost)
        if training is not None and self.dense.ranges["C"][1] > 0:
            found |= self.dense.outside(C=float(training(N, D, 1.0, 0.0)))
        return found

    def size(self, budget: float) -> tuple[float, bool]:
        """The best dense size of a budget, and whether it is the smallest or largest that may be chosen."""
        own = {name: np.array([value]) for name, value in self.dense.values.items()}
        size = float(self.points(own, np.array([budget]))[0, 0])
        if self.sizes is None:
            return size, False
        return size, bool(edge_of(*np.log([size, *self.sizes]).tolist()))

    def points(self, values: Columns, budgets: Array) -> Array:
        """The best dense model of each budget: N, D, R = 1, P = 0 and its loss, (S, 5); infinite loss where there is none."""
        box = {"N": self.sizes or (0.0, np.inf), "R": (1.0, 1.0), "P": (0.0, 0.0)}
        solve = "D" if self.tokens is None else "N"
        search = Search(self.dense.law, self.cost, budgets, box, solve=solve, tokens=self.tokens)
        return search.minimise_many(values, coarse=True, allow_none=True)

    def _by_budget(self, values: Columns, losses: Array) -> Array:
        """Tokens are chosen: the root of the least loss in the log of the budget."""
        centre = np.full(losses.shape, np.log(self.budget))
        return np.exp(_falling_root(lambda x: self.losses(values, np.exp(x)), losses, centre - _REACH, centre + _REACH))

    def _by_size(self, values: Columns, losses: Array) -> Array:
        """Tokens are given: the loss falls with N alone, at whatever that costs."""
        D = np.full(losses.shape, self.tokens)
        if self.sizes is not None:
            ends = [np.full(losses.shape, end) for end in self.sizes]
        else:
            budgets = self.budget * np.exp([-_REACH, _REACH])
            ends = [sizes_for_budget(self.cost, b, D, 1.0, 0.0) for b in budgets]
            ends[0] = np.where(np.isfinite(ends[0]), ends[0], 1.0)
        low, high = (np.log(end) for end in ends)

        def loss(x: Array) -> Array:
            variables = self.dense.law.compute_variables({"N": np.exp(x), "D": D, "R": 1.0, "P": 0.0})
            return self.dense.law.evaluate(values, variables, gradient=False)[0]

        x = _falling_root(loss, losses, low, high)
        known = np.isfinite(x)
        spent = price(self.cost, np.exp(np.where(known, x, (low + high) / 2)), D, 1.0, 0.0)
        return np.where(known, spent, np.exp(x))


def _falling_root(fun: Callable[[Array], Array], goal: Array, low: Array, high: Array) -> Array:
    """Where a falling positive function has the value `goal`, elementwise; -inf where it is below at `low`, inf where never."""
    at_low, at_high, middle = fun(low), fun(high), (low + high) / 2
    step = 0.1 * (high - low)
    with np.errstate(all="ignore"):
        slope = np.log(fun(middle) / fun(middle + step)) / step
    slope = np.where(np.isfinite(slope) & (slope > 0), slope, 1.0)

    def gap(x: Array) -> Array:  # rises, by about 1 a unit of x
        with np.errstate(divide="ignore"):
            return np.log(goal / fun(x)) / slope

    within = (at_low > goal) & (at_high <= goal)
    found, _ = find_root(gap, low, np.where(within, high, low), np.where(within, middle, low), _EXACT)
    return np.where(at_low <= goal, -np.inf, np.where(within, found, np.inf))
