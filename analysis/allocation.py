"""One budget to be spent under one fit: what is searched, how far that lies from the data, and when it is refused."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import cast

import numpy as np

from analysis.budget import Cost, tokens_for_budget
from analysis.cost import InferenceCost, training_of, unit_of
from analysis.design import LEVEL_WIDTH
from analysis.law import Family, Law
from analysis.result import INSIDE, FitResult
from analysis.search import Search, Solve
from analysis.unknown import unknown_inputs
from dlcm.errors import UserError, nearest

Array = np.ndarray
Bounds = Mapping[str, tuple[float, float]]

LIMIT, LIMIT_UNSOUND = 1.0, 0.3
"""Decades outside the data up to which a sound fit, or one that is not, is followed without being told to."""
_ANY_SIZE = (0.0, np.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """Least predicted loss over N, D, R and P subject to cost(N, D, R, P) = budget.

    Attributes:
        result: the fit.
        law: its law, of the family that is allocated.
        tokens: D where it is given; N follows from the budget then, otherwise D does.
        box: ranges of N, R and P; equal ends hold a coordinate.
    """

    result: FitResult
    law: Law
    cost: Cost
    budget: float
    tokens: float | None
    box: Mapping[str, tuple[float, float]]

    @property
    def solve(self) -> Solve:
        """The coordinate that follows from the others and the budget."""
        return "D" if self.tokens is None else "N"

    @property
    def unit(self) -> str:
        """What the budget counts."""
        return unit_of(self.cost)

    @property
    def stated(self) -> str:
        """The budget in words."""
        tokens = "" if self.tokens is None else f" and D = {self.tokens:.3g} tokens"
        return f"{self.budget:.3g} {self.unit}{tokens}"

    def is_open(self, name: str) -> bool:
        """Whether a coordinate is searched."""
        return name not in ("D", self.solve) and self.box[name][1] > self.box[name][0]

    @functools.cached_property
    def search(self) -> Search:
        """The search of the box."""
        return Search(self.law, self.cost, self.budget, self.box, solve=self.solve, tokens=self.tokens)

    def best(self) -> Array:
        """N, D, R, P and loss at the fit's constants, (5,)."""
        return self.search.minimise(self.result.values)

    def replicates(self) -> Array:
        """The same for each bootstrap refit, (n, 5)."""
        if not len(self.result.replicates):
            return np.empty((0, 5))
        return self.search.minimise_many(replicate_columns(self.result))

    def outside(self, point: Array) -> dict[str, float]:
        """How far N, D, R, P and the training FLOPs of a model lie outside the data, in decades, by name; empty inside."""
        named = dict(zip("NDRP", (float(v) for v in point[:4])))
        found = {k: v for k, v in self.result.outside(**named).items() if k in self.law.inputs or k in "ND"}
        training = training_of(self.cost)
        if training is not None and self.result.ranges["C"][1] > 0:
            found |= self.result.outside(C=float(training(*point[:4])))
        return found

    def refuse_far(self, point: Array, *, limit: float | None, force: bool, what: str = "") -> dict[str, float]:
        """`outside`, unless that is too far.

        Args:
            point: N, D, R and P.
            limit: decades that are allowed; 1 for a sound fit and 0.3 for one that is not by default.
            force: allow any distance.
            what: lies outside; the budget by default.

        Raises:
            UserError: how far, how far is allowed, and the way out.
        """
        outside = self.outside(point)
        for name in unknown_inputs(self.law):
            if outside.get(name, 0.0) > INSIDE:
                raise UserError(
                    f"law {self.result.law.name}: {what or self.stated} need another {name} than the runs have, which hold one "
                    f"({self.result.describe_range(name)}); what it does to the loss is not known; add runs with others"
                )
        refuse_outside(self.result, outside, f"{what or self.stated} lie", "a budget", limit=limit, force=force)
        return outside


def refuse_outside(
    result: FitResult, outside: Mapping[str, float], what: str, choose: str, *, limit: float | None, force: bool
) -> None:
    """Refuse what lies too far outside the data of a fit.

    Args:
        result: the fit.
        outside: decades by name.
        what: lies outside, with its verb.
        choose: what to choose inside the data instead.
        limit: decades that are allowed; 1 for a sound fit and 0.3 for one that is not by default.
        force: allow any distance.

    Raises:
        UserError: how far, how far is allowed, and the way out.
    """
    sound = result.sound
    if limit is not None and not (np.isfinite(limit) and limit >= 0):
        raise UserError(f"limit = {limit:g} decades; give a number, 0 or above")
    allowed = limit if limit is not None else LIMIT if sound else LIMIT_UNSOUND
    if force or max(outside.values(), default=0.0) <= allowed + INSIDE:
        return
    far = ", ".join(f"{k} by {v:.2g} decades" for k, v in outside.items())
    state = "" if sound else f"the fit is {result.status}, and "
    mend = "" if sound else "mend the fit, "
    raise UserError(
        f"law {result.law.name}: {state}{what} outside the data ({far}; {allowed:g} are allowed); "
        f"{mend}choose {choose} inside the data, raise limit (--limit), or pass force=True (--force)"
    )


def allocate(
    result: FitResult,
    cost: Cost,
    budget: float,
    *,
    tokens: float | None = None,
    bounds: Bounds | None = None,
    family: str | None = None,
) -> Allocation:
    """The problem of spending a budget under a fit; see `analysis.optimum.optimum` for the arguments.

    Raises:
        UserError: budget, tokens or bounds make no sense, or the law describes no trade between size and tokens.
    """
    unit = unit_of(cost)
    if not (np.isfinite(budget) and budget > 0):
        raise UserError(f"budget = {budget:g} {unit}; give a number above 0")
    if tokens is not None and not (np.isfinite(tokens) and tokens > 0):
        raise UserError(f"tokens D = {tokens:g}; give a number above 0")
    if tokens is None and isinstance(cost, InferenceCost):
        raise UserError(f"a budget in {unit} says nothing of training; give the tokens D as well (tokens=, --tokens)")
    law = law_of(result, family)
    missing = [name for name in law.inputs if name not in "NDRP"]
    if missing or law.target != "loss":
        raise UserError(
            f"law {law.name}: predicts {law.target} from {', '.join(law.inputs)}; an optimum needs a loss of N, D, R and P"
        )
    require_known_tokens(result, law, tokens)
    box = _box(result, law, bounds)
    if tokens is not None:
        box["N"] = _ANY_SIZE
    elif not (bounds and "N" in bounds):
        box["N"] = _carried_along(result, cost, budget, box)
    return Allocation(result, law, cost, float(budget), None if tokens is None else float(tokens), box)


def require_known_tokens(result: FitResult, law: Law, tokens: float | None) -> None:
    """Refuse to choose tokens, or to take others than the runs have, where these hold one number of them.

    Raises:
        UserError: what tokens are worth is not known.
    """
    if "D" not in unknown_inputs(law):
        return
    one = f"law {law.name}: the runs hold one number of tokens (D = {result.describe_range('D')}), so what"
    if tokens is None:
        raise UserError(
            f"{one} tokens are worth is not known and cannot be traded for size; give the tokens (tokens=, --tokens) with an "
            "inference budget, or add runs with other numbers of them"
        )
    if result.outside(D=tokens):
        raise UserError(f"{one} D = {tokens:.3g} does to the loss is not known; take theirs, or add runs with others")


def law_of(result: FitResult, family: str | None = None) -> Law:
    """The law of a fit; of one for both families, what it says of one of them.

    Raises:
        UserError: it is a law for both families and none is named, or a law of the other family.
    """
    if family is None:
        if result.law.is_joint:
            raise UserError(f"law {result.law.name} describes both families; say which with family='dlcm' or 'dense'")
        return result.law
    return result.law.for_family(cast("Family", family))


def replicate_columns(result: FitResult) -> dict[str, Array]:
    """Constant -> its values over the bootstrap refits, (n,)."""
    return {p.name: result.replicates[:, column] for column, p in enumerate(result.parameters)}


def _box(result: FitResult, law: Law, bounds: Bounds | None) -> dict[str, tuple[float, float]]:
    box = {name: result.ranges[name] for name in "NRP"}
    for name, given in (bounds or {}).items():
        if name not in box:
            raise UserError(f"bounds: {name!r} is not searched{nearest(name, box)}")
        if not given[0] <= given[1] or given[0] < 0 or (name != "P" and given[0] <= 0):
            raise UserError(f"bounds: {name} from {given[0]:g} to {given[1]:g} is no range")
        box[name] = (float(given[0]), float(given[1]))
    if law.family == "dense":
        box |= {"R": (1.0, 1.0), "P": (0.0, 0.0)}
    for name in "NR":
        low, high = box[name]
        if high <= low * LEVEL_WIDTH and not (bounds and name in bounds):
            middle = float(np.sqrt(low * high))
            box[name] = (middle, middle)
    return box


def _carried_along(result: FitResult, cost: Cost, budget: float, box: Bounds) -> tuple[float, float]:
    """The sizes in the data; where the budget lies outside the budgets of the data, farther by as many decades.

    A model of the largest size in the data, on all the tokens that the budget buys for it, costs more than any run then.
    """
    low, high = box["N"]
    if high <= low:
        return low, high
    R, P = float(np.sqrt(np.prod(box["R"]))), float(np.mean(box["P"]))
    N, ends = np.array([low, high]), []
    D = tokens_for_budget(cost, budget, N, R, P)
    training = training_of(cost)
    if training is not None and result.ranges["C"][1] > 0:
        spent, (least, most) = np.asarray(training(N, D, R, P), dtype=float), result.ranges["C"]
    else:
        spent, (least, most) = D, result.ranges["D"]
    for beyond in (least / spent[0], spent[1] / most):
        ends.append(float(beyond) if np.isfinite(beyond) and beyond > 10**INSIDE else 1.0)
    return low / ends[0], high * ends[1]
