"""Where a budget is spent best: least predicted loss over R, P, N and D subject to cost(N, D, R, P) = budget.

The cost is a function that is passed in (`analysis.cost`: to train, to serve a token, over a lifetime); no rule of thumb stands
in for it. One coordinate follows from the others and the budget: D, or N where the tokens are given.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.allocation import Allocation, Bounds, allocate
from analysis.budget import Cost
from analysis.convention import Convention
from analysis.design import LEVEL_WIDTH
from analysis.flat import THRESHOLD, FlatRange, describe_cut, flat_ranges
from analysis.identify import may_be_zero
from analysis.intervals import ends
from analysis.result import FitResult
from dlcm.errors import UserError, nearest

Array = np.ndarray
_EDGE, _ROUNDING = 0.01, 1e-6
_SPANS = 0.8


@dataclasses.dataclass(frozen=True)
class Choice:
    """One coordinate of the optimum.

    Attributes:
        value: where the predicted loss is least.
        low: lower end of its 95% bootstrap interval; None without a bootstrap. high: upper end.
        searched: the range that was searched; for what follows from the budget, the range in the data.
        censored: which ends of the interval are an end of what was searched, beyond which the refits might have gone.
        status: `ok`, `held` (one value in the data), or `not identified`, with the reason.
        at_edge: `lower` or `upper` where the optimum lies on that edge of what was searched: the best one may lie beyond.
        given: other coordinates that lie on an edge: value and interval hold for them there, and may not beyond.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    searched: tuple[float, float]
    status: str
    reason: str = ""
    censored: tuple[bool, bool] = (False, False)
    at_edge: str = ""
    given: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: value and interval, or `not identified` and why."""
        if self.status == "not identified":
            return f"{self.name}: not identified: {self.reason}"
        text = f"{self.name} = {self.value:.4g}"
        if self.status == "held":
            return f"{text} (held: {self.reason})"
        if self.low is None:
            return f"{text}  no interval (no bootstrap)"
        given = f", given {' and '.join(self.given)} on the edge of what was searched" if self.given else ""
        return f"{text}  95% {self.low:.4g} to {self.high:.4g}{describe_cut(self.censored)}{given}"


@dataclasses.dataclass(frozen=True, eq=False)
class Optimum:
    """The best allocation of one budget under one fit.

    Attributes:
        budget: what may be spent, in `unit`.
        unit: what the budget counts: training FLOPs, inference FLOPs per token, or FLOPs over a lifetime.
        tokens: D where it was given; None where it was chosen.
        choices: N, D, R and P.
        loss: predicted loss there, nats per token, with its interval.
        flat: how far each coordinate may be moved for next to nothing, the others chosen again.
        decades_outside: input -> how far it lies outside the data, in powers of ten.
        replicates: (n, 5) of N, D, R, P and loss, one bootstrap refit a row.
        data_hash: of the runs behind the fit.
    """

    law: str
    budget: float
    unit: str
    tokens: float | None
    choices: tuple[Choice, ...]
    loss: float
    loss_low: float | None
    loss_high: float | None
    flat: tuple[FlatRange, ...]
    decades_outside: Mapping[str, float]
    notes: tuple[str, ...]
    replicates: Array
    convention: Convention
    data_hash: str

    def __getitem__(self, name: str) -> Choice:
        """One coordinate: `optimum["R"].value`."""
        for choice in self.choices:
            if choice.name == name:
                return choice
        raise UserError(f"an optimum has no {name!r}{nearest(name, [c.name for c in self.choices])}")

    @property
    def point(self) -> tuple[float, float, float, float]:
        """N, D, R and P where the predicted loss is least, whether or not each is identified."""
        N, D, R, P = (choice.value for choice in self.choices)
        return N, D, R, P

    @property
    def identified(self) -> bool:
        """Whether something was searched, and all of that is identified."""
        states = {c.status for c in self.choices}
        return "ok" in states and "not identified" not in states

    @property
    def verdict(self) -> str:
        """`identified`, `not identified`, or that there was nothing to choose."""
        if all(c.status == "held" for c in self.choices):
            return "nothing to choose"
        return "identified" if self.identified else "not identified"

    @property
    def extrapolation(self) -> str:
        """How far from the data, in words."""
        return describe_outside(self.decades_outside)

    @property
    def headline(self) -> str:
        """Loss, interval and distance from the data in one line."""
        interval = f" (95% {self.loss_low:.4g} to {self.loss_high:.4g})" if self.loss_low is not None else ""
        tokens = "" if self.tokens is None else f" and D = {self.tokens:.3g} tokens"
        spent = f"{self.budget:.3g} {self.unit}{tokens} ({self.law})"
        return f"Least predicted loss at {spent}: {self.loss:.4f} nats{interval}, {self.extrapolation}"

    @property
    def flat_lines(self) -> list[str]:
        """One line a coordinate: `any P in 0.48 to 0.66 costs < 0.1% loss`."""
        return [flat.describe() for flat in self.flat]

    def report(self) -> str:
        """The optimum as text."""
        lines = [self.headline, *(f"  {c.describe()}" for c in self.choices)]
        if self.flat:
            lines += ["  flat directions, the other coordinates chosen again:", *(f"    {x}" for x in self.flat_lines)]
        return "\n".join([*lines, *(f"  - {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a coordinate that is not identified has value null and its working value beside it."""
        choices = []
        for c in self.choices:
            known = c.value if c.status != "not identified" else None
            choices.append({**dataclasses.asdict(c), "value": known, "working_value": c.value})
        return {
            "law": self.law,
            "budget_flops": self.budget,
            "unit": self.unit,
            "tokens": self.tokens,
            "loss_nats": self.loss,
            "loss_interval": None if self.loss_low is None else [self.loss_low, self.loss_high],
            "identified": self.identified,
            "decades_outside": dict(self.decades_outside),
            "choices": choices,
            "flat": [{**dataclasses.asdict(f), "text": f.describe()} for f in self.flat],
            "notes": list(self.notes),
        }


def optimum(
    result: FitResult,
    cost: Cost,
    budget: float,
    *,
    tokens: float | None = None,
    bounds: Bounds | None = None,
    family: str | None = None,
    flat: float | None = THRESHOLD,
    limit: float | None = None,
    force: bool = False,
) -> Optimum:
    """Least predicted loss at a budget.

    N, R and P are searched where the data have them; sizes farther, by as many decades as the budget lies outside the budgets
    of the data.

    Args:
        result: a fit of a dense or a DLCM law. For a dense one R = 1 and P = 0 are held.
        cost: `cost(N, D, R, P)` in the unit of the budget: training FLOPs where it does not say otherwise, see `analysis.cost`.
        budget: what to spend.
        tokens: D, where it is given and not to be chosen: N then follows from the budget. An inference budget needs it.
        bounds: search ranges of N, R, P where they should differ from the ranges in the data.
        family: `dense` or `dlcm`, for a law that describes both.
        flat: relative rise of the loss within which a direction counts as flat; None to leave the flat directions out.
        limit: decades outside the data that are allowed: of N, D and the training FLOPs. 1 for a sound fit by default, 0.3 for
            one that hit a bound, did not converge, or had too few runs.
        force: go as far as the budget does.

    Raises:
        UserError: budget or bounds make no sense, the cost is not usable, or the optimum lies too far outside the data.
    """
    problem = allocate(result, cost, budget, tokens=tokens, bounds=bounds, family=family)
    best = problem.best()
    outside = problem.refuse_far(best, limit=limit, force=force)
    if flat is not None and not (np.isfinite(flat) and flat > 0):
        raise UserError(f"flat = {flat:g}; give a relative rise of the loss above 0, such as 0.001")
    return describe(problem, best, problem.replicates(), outside, flat)


def describe(
    problem: Allocation, best: Array, replicates: Array, outside: Mapping[str, float], flat: float | None
) -> Optimum:
    """What was found, with what may be said of each coordinate."""
    result = problem.result
    loss_ends = ends(replicates[:, 4]) if len(replicates) else (None, None)
    return Optimum(
        law=problem.law.name,
        budget=problem.budget,
        unit=problem.unit,
        tokens=problem.tokens,
        choices=tuple(judge_choices(problem, best, replicates).values()),
        loss=float(best[4]),
        loss_low=loss_ends[0],
        loss_high=loss_ends[1],
        flat=() if flat is None else flat_ranges(problem, best, flat),
        decades_outside=outside,
        notes=fit_notes(result),
        replicates=replicates,
        convention=result.convention,
        data_hash=result.data_hash,
    )


def describe_outside(decades: Mapping[str, float]) -> str:
    """`inside the data`, or by how much outside."""
    if not decades:
        return "inside the data"
    return "outside the data: " + ", ".join(f"{k} by {v:.2g} decades" for k, v in decades.items())


def fit_notes(result: FitResult) -> tuple[str, ...]:
    """What is to be said beside an optimum of the fit that it rests on."""
    unknown = [p.name for p in result.parameters if p.status == "not_identified" and not may_be_zero(result.law, p)]
    notes = [f"the fit behind it is {result.status}"] if result.status != "certified" else []
    if unknown:
        notes.append(f"it rests on constants that are not identified: {', '.join(unknown)}")
    return tuple(notes)


def judge_choices(problem: Allocation, best: Array, replicates: Array) -> dict[str, Choice]:
    """What may be said of N, D, R and P."""
    found = {name: judge_choice(name, problem, best, replicates) for name in "NDRP"}
    walls = tuple(name for name, choice in found.items() if choice.at_edge)
    return {name: dataclasses.replace(c, given=walls) if c.status == "ok" else c for name, c in found.items()}


def judge_choice(name: str, problem: Allocation, best: Array, replicates: Array) -> Choice:
    """What may be said of one coordinate: a value with its interval, that it was held, or why it is not identified."""
    column = "NDRP".index(name)
    value = float(best[column])
    low, high = ends(replicates[:, column]) if len(replicates) else (None, None)
    if name == "D" and problem.tokens is not None:
        return Choice(name, value, None, None, (value, value), "held", "given")
    if name == problem.solve:
        return _judge_follower(name, problem, best, replicates, (value, low, high))
    searched = problem.box[name]
    if searched[0] == searched[1]:
        one = problem.result.ranges[name]
        given = "the data hold one value" if one[1] <= one[0] * LEVEL_WIDTH else "given"
        reason = "dense" if problem.law.family == "dense" and name in "RP" else given
        return Choice(name, value, None, None, searched, "held", reason)
    position = (lambda v: v) if name == "P" else np.log
    span = position(searched[1]) - position(searched[0])
    reason = ""
    if value_at_edge := edge_of(position(value), position(searched[0]), position(searched[1])):
        reason = f"the optimum lies on the {value_at_edge} edge of what was searched ({searched[0]:.3g} to {searched[1]:.3g})"
    elif low is not None and high is not None and position(high) - position(low) > _SPANS * span:
        reason = f"its 95% interval ({low:.3g} to {high:.3g}) spans the searched range ({searched[0]:.3g} to {searched[1]:.3g})"
    at_ends = [
        v is not None and edge_of(position(v), position(searched[0]), position(searched[1]), _ROUNDING) == end
        for v, end in ((low, "lower"), (high, "upper"))
    ]
    status = "not identified" if reason else "ok"
    return Choice(name, value, low, high, searched, status, reason, (at_ends[0], at_ends[1]), value_at_edge)


def _judge_follower(
    name: str, problem: Allocation, best: Array, replicates: Array, found: tuple[float, float | None, float | None]
) -> Choice:
    """What follows from the others and the budget is known as well as they are."""
    value, low, high = found
    searched = problem.result.ranges[name]
    others = [judge_choice(n, problem, best, replicates) for n in "NRP" if n != name]
    if all(c.status == "held" for c in others):
        return Choice(name, value, None, None, searched, "held", "it follows from the others and the budget")
    unknown = [c.name for c in others if c.status == "not identified"]
    reason = f"it follows from {', '.join(unknown)} and the budget" if unknown else ""
    return Choice(name, value, low, high, searched, "not identified" if reason else "ok", reason)


def edge_of(value: float, low: float, high: float, share: float = _EDGE) -> str:
    """`lower` or `upper` where a value lies within a share of a range of that end of it; else empty."""
    margin = share * (high - low)
    return "lower" if value <= low + margin else "upper" if value >= high - margin else ""
