"""What a choice of model costs against the best at the same budget: the difference of the two predicted losses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.allocation import Allocation, Bounds, allocate, replicate_columns
from analysis.budget import Cost
from analysis.intervals import ends
from analysis.optimum import describe_outside
from analysis.result import FitResult
from analysis.search import Search
from dlcm.errors import UserError

Array = np.ndarray
_OVERSPENT = 1e-3


@dataclasses.dataclass(frozen=True)
class Regret:
    """Predicted loss of a choice less that of the optimum, at one budget and under one fit.

    Attributes:
        N: parameters. D: tokens. R: tokens per concept. P: concept share of the choice.
        chosen: the coordinates that were given; the others are the best that go with them.
        loss: predicted loss of the choice. best_loss: of the optimum, which may take any value that the choice takes.
        value: the difference, nats per token; 0 or above.
        low: lower end of its 95% interval, from the two under one bootstrap refit each; None without a bootstrap.
        decades_outside: how far the choice lies outside the data.
    """

    budget: float
    unit: str
    chosen: tuple[str, ...]
    N: float
    D: float
    R: float
    P: float
    loss: float
    best_loss: float
    value: float
    low: float | None
    high: float | None
    decades_outside: Mapping[str, float]

    @property
    def text(self) -> str:
        """The finding in a sentence."""
        choice = ", ".join(f"{name} = {getattr(self, name):.4g}" for name in "NDRP")
        interval = "no interval" if self.low is None else f"95% {self.low:.4f} to {self.high:.4f}"
        return (
            f"Choosing {choice} at {self.budget:.3g} {self.unit} gives a predicted loss of {self.loss:.4f}, which is "
            f"{self.value:.4f} nats ({100 * self.value / self.best_loss:.2g}%) above the least ({interval}), "
            f"{describe_outside(self.decades_outside)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**dataclasses.asdict(self), "decades_outside": dict(self.decades_outside), "text": self.text}


def regret(
    result: FitResult,
    cost: Cost,
    budget: float,
    *,
    N: float | None = None,
    D: float | None = None,
    R: float | None = None,
    P: float | None = None,
    tokens: float | None = None,
    bounds: Bounds | None = None,
    family: str | None = None,
    limit: float | None = None,
    force: bool = False,
) -> Regret:
    """Loss that a choice gives away at a budget.

    Coordinates that are not given are chosen best for those that are, at the fit's own constants; one of them (D, or else N)
    follows from the budget. Where all are given the choice may cost less than the budget. The optimum that it is compared
    with is searched where the data are, and as far as the choice lies. Each bootstrap refit gives both losses, so that the
    interval is that of their difference.

    Args:
        result: a fit.
        cost: `cost(N, D, R, P)`.
        budget: in the unit of the cost.
        N: parameters.
        D: training tokens.
        R: tokens per concept.
        P: concept share of the parameters.
        tokens: D where the optimum has no choice of it either; an inference budget needs it.
        bounds: as for `optimum`.
        family: as for `optimum`.
        limit: decades outside the data that are allowed of the choice, as for `optimum`.
        force: as for `optimum`.

    Raises:
        UserError: nothing is chosen, the choice costs more than the budget, or it lies too far outside the data.
    """
    given = {k: float(v) for k, v in (("N", N), ("D", D), ("R", R), ("P", P)) if v is not None}
    _check(given, tokens)
    problem = allocate(result, cost, budget, tokens=tokens, bounds=bounds, family=family)
    if problem.law.family == "dense":
        given = {"R": 1.0, "P": 0.0, **given}
        if given["R"] != 1 or given["P"] != 0:
            raise UserError("a dense model has R = 1 and P = 0; leave them out, or choose with the fit of the DLCM")
    if tokens is not None:
        given["D"] = float(tokens)
    point = _complete(problem, given)
    outside = problem.refuse_far(point, limit=limit, force=force, what="the choice and what follows from it")
    wide = dataclasses.replace(problem, box=_widened(problem, point))
    best = wide.best()[4]
    inputs: dict[str, Any] = dict(zip("NDRP", point))
    loss = float(problem.law.predict(result.values, **inputs))
    low = high = None
    if len(result.replicates):
        variables = problem.law.compute_variables(inputs)
        columns: Any = replicate_columns(result)
        drawn = problem.law.evaluate(columns, variables, gradient=False)[0] - wide.replicates()[:, 4]
        low, high = ends(drawn)
    chosen = tuple(k for k, v in (("N", N), ("D", D), ("R", R), ("P", P)) if v is not None)
    N, D, R, P = (float(v) for v in point)
    return Regret(
        problem.budget, problem.unit, chosen, N, D, R, P, loss, float(best), loss - float(best), low, high, outside
    )


def _check(given: Mapping[str, float], tokens: float | None) -> None:
    if not given:
        raise UserError("a regret is that of a choice; give at least one of N, D, R and P (--at N=1e9,R=4,P=0.5)")
    for name, value in given.items():
        least = 1.0 if name == "R" else 0.0
        if not np.isfinite(value) or value < least or (value <= 0 and name != "P") or (name == "P" and value >= 1):
            raise UserError(
                f"{name} = {value:g} is no choice: N and D are above 0, R is 1 or above, P from 0 to below 1"
            )
    if tokens is not None and given.get("D", tokens) != tokens:
        raise UserError(f"D = {given['D']:g} is chosen although the tokens are given as {tokens:g}; leave one out")


def _complete(problem: Allocation, given: Mapping[str, float]) -> Array:
    """N, D, R and P of the choice."""
    if set(given) == set("NDRP"):
        point = np.array([given[name] for name in "NDRP"])
        spent = float(problem.cost(*point))
        if not spent <= problem.budget * (1 + _OVERSPENT):
            raise UserError(
                f"the choice costs {spent:.4g} {problem.unit}, more than the budget of {problem.budget:.4g}; "
                "leave out one of its coordinates, so that it follows from the budget"
            )
        return point
    if {"N", "D"} <= set(given) and "R" in given:
        raise UserError("the choice gives N, D and R but no P, and a budget does not tell P; give P as well")
    box = {**problem.box, **{k: (v, v) for k, v in given.items() if k in "NRP"}}
    solve = "D" if "D" not in given else "N" if "N" not in given else "R"
    search = Search(problem.law, problem.cost, problem.budget, box, solve=solve, tokens=given.get("D"))
    return search.minimise(problem.result.values)[:4]


def _widened(problem: Allocation, point: Array) -> dict[str, tuple[float, float]]:
    """The box of the optimum, so far that it holds the choice."""
    box: dict[str, tuple[float, float]] = {}
    for name, value in zip("NRP", point[[0, 2, 3]]):
        low, high = problem.box[name]
        box[name] = (min(low, float(value)), max(high, float(value)))
    return box
