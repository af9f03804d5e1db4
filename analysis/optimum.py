"""Where a budget is spent best: least predicted loss over R, P, N and D subject to cost(N, D, R, P) = budget.

The cost is a function that is passed in (training FLOPs of a shape, vectorised); no rule of thumb stands in for it. D
follows from the other three and the budget, so the search runs over a box of (log N, P, log R) that the data span.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.data import Convention
from analysis.result import FitResult
from analysis.search import Cost, Search
from dlcm.errors import UserError, nearest

Array = np.ndarray
_EDGE = 0.01
_SPANS = 0.8
_FAR = 0.3
_LEVEL = 1.12


@dataclasses.dataclass(frozen=True)
class Choice:
    """One coordinate of the optimum.

    Attributes:
        value: where the predicted loss is least.
        low: lower end of its 95% bootstrap interval; None without a bootstrap. high: upper end.
        searched: the range that was searched; for D, the range in the data.
        status: `ok`, `held` (one value in the data), or `not identified`, with the reason.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    searched: tuple[float, float]
    status: str
    reason: str = ""

    def describe(self) -> str:
        """One line: value and interval, or `not identified` and why."""
        if self.status == "not identified":
            return f"{self.name}: not identified: {self.reason}"
        text = f"{self.name} = {self.value:.4g}"
        if self.status == "held":
            return f"{text} (held: {self.reason})"
        return text + (
            f"  95% {self.low:.4g} to {self.high:.4g}" if self.low is not None else "  no interval (no bootstrap)"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Optimum:
    """The best allocation of one budget under one fit.

    Attributes:
        budget: training FLOPs.
        choices: N, D, R and P.
        loss: predicted loss there, nats per token, with its interval.
        decades_outside: input -> how far it lies outside the data, in powers of ten.
        replicates: (n, 5) of N, D, R, P and loss, one bootstrap refit a row.
    """

    law: str
    budget: float
    choices: tuple[Choice, ...]
    loss: float
    loss_low: float | None
    loss_high: float | None
    decades_outside: Mapping[str, float]
    notes: tuple[str, ...]
    replicates: Array
    convention: Convention

    def __getitem__(self, name: str) -> Choice:
        """One coordinate: `optimum["R"].value`."""
        for choice in self.choices:
            if choice.name == name:
                return choice
        raise UserError(f"an optimum has no {name!r}{nearest(name, [c.name for c in self.choices])}")

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
        if not self.decades_outside:
            return "inside the data"
        return "outside the data: " + ", ".join(f"{k} by {v:.2g} decades" for k, v in self.decades_outside.items())

    @property
    def headline(self) -> str:
        """Loss, interval and distance from the data in one line."""
        interval = f" (95% {self.loss_low:.4g} to {self.loss_high:.4g})" if self.loss_low is not None else ""
        spent = f"{self.budget:.3g} training FLOPs ({self.law})"
        return f"Least predicted loss at {spent}: {self.loss:.4f} nats{interval}, {self.extrapolation}"

    def report(self) -> str:
        """The optimum as text."""
        return "\n".join(
            [self.headline, *(f"  {c.describe()}" for c in self.choices), *(f"  - {note}" for note in self.notes)]
        )

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
            "loss_nats": self.loss,
            "loss_interval": None if self.loss_low is None else [self.loss_low, self.loss_high],
            "identified": self.identified,
            "decades_outside": dict(self.decades_outside),
            "choices": choices,
            "notes": list(self.notes),
        }


def optimum(
    result: FitResult,
    cost: Cost,
    budget: float,
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    extrapolate: bool = False,
) -> Optimum:
    """Least predicted loss at a budget.

    Args:
        result: a fit of a dense or a DLCM law. For a dense one R = 1 and P = 0 are held.
        cost: training FLOPs, `cost(N, D, R, P)`.
        budget: training FLOPs to spend.
        bounds: search ranges of N, R, P where they should differ from the ranges in the data.
        extrapolate: go beyond the data although the fit hit a bound, did not converge, or had too few runs.

    Raises:
        UserError: budget or bounds make no sense, the cost is not usable, or an unsound fit would be extrapolated.
    """
    if not (np.isfinite(budget) and budget > 0):
        raise UserError(f"budget = {budget:g} FLOPs; give a number above 0")
    box = _box(result, bounds)
    search = Search(result.law, cost, float(budget), box)
    best = search.minimise(result.values)
    replicates = np.array([search.minimise(v) for v in result.replicate_values()]).reshape(-1, 5)
    outside = {
        k: v for k, v in result.outside(**dict(zip("NDRP", best[:4]))).items() if k in result.law.inputs or k in "ND"
    }
    if result.ranges["C"][1] > 0 and (beyond := result.outside(C=float(budget))):
        outside |= beyond
    if not result.sound and not extrapolate and max(outside.values(), default=0.0) > _FAR:
        far = ", ".join(f"{k} by {v:.2g} decades" for k, v in outside.items())
        raise UserError(
            f"law {result.law.name}: the fit is {result.status}, and {budget:.3g} FLOPs lie outside the data ({far}); "
            "mend the fit, choose a budget inside the data, or pass extrapolate=True (--extrapolate)"
        )
    interval = np.percentile(replicates[:, 4], [2.5, 97.5]) if len(replicates) else (None, None)
    return Optimum(
        law=result.law.name,
        budget=float(budget),
        choices=tuple(_choice(name, best, replicates, box, result) for name in "NDRP"),
        loss=float(best[4]),
        loss_low=None if interval[0] is None else float(interval[0]),
        loss_high=None if interval[1] is None else float(interval[1]),
        decades_outside=outside,
        notes=_notes(result),
        replicates=replicates,
        convention=result.convention,
    )


def _notes(result: FitResult) -> tuple[str, ...]:
    unknown = [p.name for p in result.parameters if p.status == "not_identified"]
    notes = [f"the fit behind it is {result.status}"] if result.status != "converged" else []
    if unknown:
        notes.append(f"it rests on constants that are not identified: {', '.join(unknown)}")
    return tuple(notes)


def _box(result: FitResult, bounds: Mapping[str, tuple[float, float]] | None) -> dict[str, tuple[float, float]]:
    box = {name: result.ranges[name] for name in "NRP"}
    for name, given in (bounds or {}).items():
        if name not in box:
            raise UserError(f"bounds: {name!r} is not searched{nearest(name, box)}")
        if not given[0] <= given[1] or given[0] < 0 or (name != "P" and given[0] <= 0):
            raise UserError(f"bounds: {name} from {given[0]:g} to {given[1]:g} is no range")
        box[name] = (float(given[0]), float(given[1]))
    if result.law.family == "dense":
        box |= {"R": (1.0, 1.0), "P": (0.0, 0.0)}
    for name in "NR":
        low, high = box[name]
        if high <= low * _LEVEL and not (bounds and name in bounds):
            middle = float(np.sqrt(low * high))
            box[name] = (middle, middle)
    return box


def _choice(
    name: str, best: Array, replicates: Array, box: Mapping[str, tuple[float, float]], result: FitResult
) -> Choice:
    column = "NDRP".index(name)
    value = float(best[column])
    low, high = (
        (float(v) for v in np.percentile(replicates[:, column], [2.5, 97.5])) if len(replicates) else (None, None)
    )
    searched = box.get(name, result.ranges["D"])
    if name != "D" and searched[0] == searched[1]:
        reason = "dense" if result.law.family == "dense" and name in "RP" else "the data hold one value"
        return Choice(name, value, None, None, searched, "held", reason)
    position = (lambda v: v) if name == "P" else np.log
    span = position(searched[1]) - position(searched[0])
    reason = ""
    if name == "D":
        others = [_choice(n, best, replicates, box, result) for n in "NRP"]
        if all(c.status == "held" for c in others):
            return Choice(name, value, None, None, searched, "held", "it follows from the others and the budget")
        unknown = [c.name for c in others if c.status == "not identified"]
        if unknown:
            reason = f"it follows from {', '.join(unknown)} and the budget"
    elif value_at_edge := _edge(position(value), position(searched[0]), position(searched[1])):
        reason = f"the optimum lies on the {value_at_edge} edge of what was searched ({searched[0]:.3g} to {searched[1]:.3g})"
    elif low is not None and high is not None and position(high) - position(low) > _SPANS * span:
        reason = f"its 95% interval ({low:.3g} to {high:.3g}) spans the searched range ({searched[0]:.3g} to {searched[1]:.3g})"
    return Choice(name, value, low, high, searched, "not identified" if reason else "ok", reason)


def _edge(value: float, low: float, high: float) -> str:
    margin = _EDGE * (high - low)
    return "lower" if value <= low + margin else "upper" if value >= high - margin else ""
