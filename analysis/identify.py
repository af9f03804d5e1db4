"""Which constants of a fitted law the data pin down. A constant that they do not is reported as that, never as a number."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from scipy import stats

from analysis.data import ResultsData
from analysis.descent import minimise, refit
from analysis.design import Axis, levels
from analysis.laws import VARIABLES, Change, Law, Parameter
from analysis.objective import Problem

Array = np.ndarray

WIDE_RATIO = {"exponent": 3.0, "floor": 3.0, "other": 10.0, "offset": 100.0, "ceiling": 10.0, "amplitude": 1e3}
"""Upper over lower end of a 95% interval beyond which a constant is not identified; an amplitude in natural units moves by
orders of magnitude with its exponent, so more is let through there."""
AT_BOUND = 1e-6
_NULL = 1e-7
_HUGE_CORRELATION = 0.9
_REACHES_0 = "its interval reaches 0"


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Local geometry of the objective at the answer, on centred and scaled constants.

    Attributes:
        number: condition number of the Jacobian with unit columns; infinite where a direction is flat.
        correlations: pairs of constants whose estimates move together, |correlation| >= 0.9.
        flat: constant -> why it cannot be told locally.
    """

    number: float
    correlations: tuple[tuple[str, str, float], ...]
    flat: Mapping[str, str]


def conditioning(problem: Problem, theta: Array) -> Conditioning:
    """Singular values and correlations of the Jacobian of the residuals."""
    names = [p.name for p in problem.law.free]
    if not names:
        return Conditioning(1.0, (), {})
    jacobian = problem.residuals_and_jacobian(theta)[1]
    norms = np.linalg.norm(jacobian, axis=0)
    flat = {name: "the loss does not depend on it at the answer" for name, norm in zip(names, norms) if norm < 1e-12}
    unit = jacobian / np.where(norms > 0, norms, 1.0)
    _, sizes, directions = np.linalg.svd(unit, full_matrices=True)
    sizes = np.concatenate([sizes, np.zeros(len(names) - len(sizes))])
    for size, direction in zip(sizes, directions):
        if size > _NULL * sizes[0]:
            continue
        involved = [name for name, weight in zip(names, direction) if abs(weight) > 0.1]
        for name in involved:
            others = ", ".join(o for o in involved if o != name) or "nothing else"
            flat.setdefault(name, f"runs cannot tell it from {others}")
    number = float(sizes[0] / sizes[-1]) if sizes[-1] > 0 else float("inf")
    return Conditioning(number, _correlations(unit, names), flat)


def correlation_matrix(jacobian: Array) -> Array:
    """Correlations of the estimates at a minimum with this Jacobian of the residuals (n, p): (p, p)."""
    norms = np.linalg.norm(jacobian, axis=0)
    unit = jacobian / np.where(norms > 0, norms, 1.0)
    covariance = np.linalg.pinv(unit.T @ unit, hermitian=True)
    spread = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    return np.clip(covariance / np.outer(spread, spread), -1.0, 1.0)


def _correlations(unit: Array, names: list[str]) -> tuple[tuple[str, str, float], ...]:
    matrix = correlation_matrix(unit)
    pairs = [
        (names[i], names[j], float(matrix[i, j]))
        for i in range(len(names))
        for j in range(i)
        if abs(matrix[i, j]) >= _HUGE_CORRELATION
    ]
    return tuple(sorted(pairs, key=lambda p: -abs(p[2])))


def bound_hits(problem: Problem, theta: Array) -> dict[str, str]:
    """Constants that lie on a bound. An offset of 0, or a ceiling at its bound, is the law without it, and no fault."""
    lower, upper = problem.bounds()
    hits = {}
    if not problem.law.inputs:
        return hits  # a mean alone: its bounds are the data's own
    for p, value, low, high in zip(problem.law.free, theta, lower, upper):
        margin = AT_BOUND * (high - low)
        if value <= low + margin and p.kind != "offset":
            end = ": its term vanishes" if p.kind == "amplitude" else f" {p.bounds[0]:g}"
            hits[p.name] = "at its lower bound" + end
        elif value >= high - margin and p.kind != "ceiling":
            end = f" {p.bounds[1]:g}" if p.kind in ("exponent", "other") else ""
            hits[p.name] = "at its upper bound" + end
    return hits


def flat_profiles(problem: Problem, theta: Array) -> dict[str, str]:
    """Constants that can be halved or doubled, the others refitted, without a loss of fit that the F test would notice.

    Taken on squares, where the test holds: accepted while RSS <= RSS_min (1 + F_.95(1, n - p) / (n - p)). Errors are relative
    ones, but where the fit itself is of errors as they are.
    """
    squares = problem if problem.loss == "mse" else problem.with_loss("log_mse")
    spare = len(problem) - len(theta)
    if spare < 1:
        return {}
    optimum, value = minimise(squares, theta, rounds=3)
    allowed = value * (1 + float(stats.f.ppf(0.95, 1, spare)) / spare)
    values = squares.values(optimum)
    flat = {}
    for p in problem.law.free:
        if p.kind in ("amplitude", "offset", "ceiling"):
            continue  # an amplitude follows its exponent; an offset or a ceiling is judged by its interval
        for factor in (0.5, 2.0):
            trial = values[p.name] * factor
            if not p.bounds[0] <= trial <= p.bounds[1]:
                continue
            if trial == values[p.name] or (p.kind == "floor" and trial >= problem.target_scale * problem.target.min()):
                continue
            held = squares.with_law(Change("fix", p.name, value=trial))
            if refit(held, held.theta(values))[1] <= allowed:
                flat[p.name] = f"{'half' if factor < 1 else 'double'} its value fits as well"
                break
    return flat


def design_limits(law: Law, data: ResultsData) -> dict[str, str]:
    """Constants that the design cannot give whatever the noise: too few values of what they act on."""
    limits: dict[str, str] = {}
    if "N" not in law.inputs:
        return limits
    one_size = len(levels(data.N)) == 1
    for term in law.terms:
        for factor in term.factors:
            if "N" in VARIABLES[factor.variable].inputs and factor.variable != "N" and one_size:
                size = f"only one model size (N = {np.median(data.N):.3g}); the share P alone moves it"
                limits[factor.exponent] = size
                limits[term.amplitude] = size
    return limits


def arbitrary_choices(law: Law) -> dict[str, str]:
    """Constants that depend on what a reduction chose: an exponent held at a value of no meaning, a term left in the floor.

    Only changes that carry a reason were made because of the data; the others are the user's own.
    """
    reasons: dict[str, str] = {}
    for change in (c for c in law.changes if c.reason):
        if change.op == "drop":
            reasons[law.floor or ""] = f"it contains the term of {change.parameter}"
        for term in law.terms:
            exponents = [f.exponent for f in term.factors if f.sign < 0]
            if change.op == "fix" and change.parameter in exponents:
                reason = f"it follows {change.parameter}, which is held at a value of no meaning"
                reasons[term.amplitude] = reasons[law.floor or ""] = reason
    return reasons


def wide_interval(parameter: Parameter, low: float, high: float) -> str | None:
    """Why a 95% interval is too wide to name a value, or None."""
    if parameter.kind == "offset":
        return None if low > 0 and high / low <= WIDE_RATIO["offset"] else f"{_REACHES_0} (95% below {high:.3g})"
    if parameter.kind == "ceiling" and high >= parameter.bounds[1]:
        return f"its interval reaches {parameter.bounds[1]:g} (95% above {low:.3g})"
    if low <= 0 <= high:
        return "its 95% interval contains 0"
    ratio = max(abs(low), abs(high)) / min(abs(low), abs(high))
    if ratio > WIDE_RATIO[parameter.kind]:
        return f"its 95% interval spans a factor {ratio:.2g}"
    return None


class _Judged(Protocol):
    """An estimate, which `analysis.result` defines above this module."""

    @property
    def name(self) -> str: ...
    @property
    def reason(self) -> str: ...


def may_be_zero(law: Law, estimate: _Judged) -> bool:
    """Whether an estimate is of an offset whose interval reaches 0: the law without it is a law too, and no fault of the runs."""
    kinds = {p.name: p.kind for p in law.parameters}
    return kinds.get(estimate.name) == "offset" and estimate.reason.startswith(_REACHES_0)


def ties(law: Law) -> dict[str, list[str]]:
    """Amplitude -> exponents of its term: the amplitude at v = 1 has no meaning where an exponent has none."""
    return {term.amplitude: [f.exponent for f in term.factors] for term in law.terms}


def describe_axis(axis: Axis) -> str:
    """`N: 3 values, 1.2e5 to 9.8e5 (0.91 decades)`."""
    noun = "value" if axis.n_levels == 1 else "values"
    return f"{axis.name}: {axis.n_levels} {noun}, {axis.low:.3g} to {axis.high:.3g} ({axis.decades:.2f} decades)"
