"""Where a budget is spent best: least predicted loss over R, P, N and D subject to cost(N, D, R, P) = budget.

The cost is a function that is passed in (training FLOPs of a shape, vectorised); no rule of thumb stands in for it. D
follows from the other three and the budget, so the search runs over a box of (log N, P, log R) that the data span.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize as scipy_optimize

from analysis.data import Convention
from analysis.result import FitResult
from dlcm.errors import UserError, nearest

Array = np.ndarray
Cost = Callable[..., Any]
"""cost(N, D, R, P) -> training FLOPs, vectorised, rising in D; P = 0 and R = 1 mean a dense model."""

_GRID = 17
_GRID_1D = 65
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
    grid = _Search(result, cost, float(budget), box)
    best = grid.minimise(result.values)
    replicates = np.array([grid.minimise(v) for v in result.replicate_values()]).reshape(-1, 5)
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


class _Search:
    """A grid of (N, R, P) with the D that the budget buys, shared by the fit and its bootstrap refits."""

    def __init__(self, result: FitResult, cost: Cost, budget: float, box: Mapping[str, tuple[float, float]]):
        self.law, self.cost, self.budget = result.law, cost, budget
        self.lower = np.array([np.log(box["N"][0]), np.log(box["R"][0]), box["P"][0]])
        self.upper = np.array([np.log(box["N"][1]), np.log(box["R"][1]), box["P"][1]])
        self.open = self.upper > self.lower
        n = _GRID_1D if self.open.sum() == 1 else _GRID
        axes = [np.linspace(lo, hi, n if o else 1) for lo, hi, o in zip(self.lower, self.upper, self.open)]
        self.points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        self.steps = (self.upper - self.lower) / max(n - 1, 1)
        self.tokens = self._tokens(self.points)

    def _tokens(self, points: Array) -> Array:
        return tokens_for_budget(self.cost, self.budget, np.exp(points[:, 0]), np.exp(points[:, 1]), points[:, 2])

    def _loss(self, values: Mapping[str, float], points: Array, tokens: Array) -> Array:
        N, R, P = np.exp(points[:, 0]), np.exp(points[:, 1]), points[:, 2]
        return self.law.predict(values, N=N, D=tokens, R=R, P=P)

    def minimise(self, values: Mapping[str, float]) -> Array:
        """N, D, R, P and loss where the law at `values` is least: grid, then a descent inside the neighbouring cells."""
        point = self.points[int(np.argmin(self._loss(values, self.points, self.tokens)))].copy()
        if self.open.any():
            point = self._polish(values, point)
        tokens = self._tokens(point[None])
        loss = float(self._loss(values, point[None], tokens)[0])
        return np.array([np.exp(point[0]), tokens[0], np.exp(point[1]), point[2], loss])

    def _polish(self, values: Mapping[str, float], start: Array) -> Array:
        free = np.flatnonzero(self.open)
        width = (self.upper - self.lower)[free]

        def place(x: Array) -> Array:
            points = np.broadcast_to(start, (*x.shape[:-1], 3)).copy()
            points[..., free] = self.lower[free] + x * width
            return points

        def value_and_slope(x: Array) -> tuple[float, Array]:
            # central differences, all in one vectorised call; 1e-5 of the range keeps their error below 1e-9
            h = 1e-5
            moves = np.vstack([np.zeros(len(free)), h * np.eye(len(free)), -h * np.eye(len(free))])
            points = place(x + moves)
            losses = self._loss(values, points, self._tokens(points))
            n = len(free)
            return float(losses[0]), (losses[1 : n + 1] - losses[n + 1 :]) / (2 * h)

        x0 = (start[free] - self.lower[free]) / width
        low = np.clip(x0 - 2 * self.steps[free] / width, 0, 1)
        high = np.clip(x0 + 2 * self.steps[free] / width, 0, 1)
        scale = 1e-3 * abs(value_and_slope(x0)[0])
        answer = scipy_optimize.minimize(
            lambda x: tuple(v / scale for v in value_and_slope(x)),
            x0,
            jac=True,
            method="L-BFGS-B",
            bounds=np.column_stack([low, high]),
            options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 200},
        )
        better = value_and_slope(np.clip(answer.x, 0, 1))[0] <= value_and_slope(x0)[0]
        return place(np.clip(answer.x, 0, 1)) if better else start


def tokens_for_budget(cost: Cost, budget: float, N: Array, R: Array, P: Array) -> Array:
    """D with cost(N, D, R, P) = budget, elementwise.

    One step where the cost is proportional to D, as it is for packed windows of fixed length; a secant in log D otherwise.

    Raises:
        UserError: the cost is not positive and rising in D.
    """
    log_d = np.full(np.shape(N), np.log(1e6))
    goal = np.log(budget)
    slope = np.ones_like(log_d)
    for _ in range(60):
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            value = np.log(np.asarray(cost(N, np.exp(log_d), R, P), dtype=float))
        if not np.all(np.isfinite(value)):
            raise UserError(
                "cost(N, D, R, P) is not a positive number everywhere in the search range; check the cost function"
            )
        gap = goal - value
        if np.max(np.abs(gap)) < 1e-12:
            return np.exp(log_d)
        step = gap / slope
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            moved = np.log(np.asarray(cost(N, np.exp(log_d + step), R, P), dtype=float)) - value
            slope = np.where(np.abs(step) > 1e-9, moved / step, slope)
        if not np.all(slope > 1e-3):
            raise UserError("cost(N, D, R, P) does not rise with D; check the cost function")
        log_d = log_d + gap / slope
    if np.max(np.abs(gap)) > 1e-9:
        raise UserError("cost(N, D, R, P) = budget could not be solved for D; check the cost function")
    return np.exp(log_d)


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
