"""The search for a fit's minimum, and the checks that it must pass before its numbers are called certified.

An optimiser's own `success` is not among them: L-BFGS on a mean log-Huber objective stops after two steps and reports it.
"""

import dataclasses

import numpy as np

from analysis import identify
from analysis.descent import minimise
from analysis.ensemble import refit_many
from analysis.objective import Problem
from analysis.result import Check, Status
from analysis.starts import draw_starts

Array = np.ndarray

N_STARTS = 24
N_CANDIDATES = 300
_N_LEADERS = 3
_MAX_STEPS = 300

SAME = 1e-6
"""Relative difference of objectives below which two answers are one, and below which a further drop does not matter."""
MIN_AGREEING = 3
MAX_CONDITION = 1e7
"""Of the centred and scaled Jacobian. Beyond it the curvature, which squares it, keeps no more than two digits in float64."""
_NOISE_FREE = 1e-18
"""Mean squared relative error below which a fit is exact, and ratios of objectives are ratios of rounding errors."""
_UNMOVED = 1e-9


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """The lowest minimum that was found.

    Attributes:
        theta: constants in the problem's coordinates, (p,).
        n_starts: how many starts were descended from.
        share_best: share of them that reached it.
        geometry: condition number and correlations there.
        hits: constant -> the bound that it lies on.
        checks: what it was examined for.
    """

    theta: Array
    n_starts: int
    share_best: float
    geometry: identify.Conditioning
    hits: dict[str, str]
    checks: tuple[Check, ...]


def solve(problem: Problem, rng: np.random.Generator) -> Solution:
    """Descend from many starts, polish the leaders by other methods, and examine the best."""
    starts = np.stack(draw_starts(problem, rng, n_starts=N_STARTS, n_candidates=N_CANDIDATES))
    rough, values = refit_many(problem, starts, max_steps=_MAX_STEPS)
    values = values / problem.delta**2
    leaders = {int(i): minimise(problem, rough[i]) for i in np.argsort(values)[:_N_LEADERS]}
    theta, value = min(leaders.values(), key=lambda answer: answer[1])
    again, repolished = minimise(problem, theta)
    exact = value * problem.delta**2 <= _NOISE_FREE * len(problem)
    drop = 0.0 if exact else (value - repolished) / value
    if repolished < value:
        theta, value = again, repolished
    tolerance = max(SAME * value, _NOISE_FREE * len(problem) / problem.delta**2)
    for i, (_, polished) in leaders.items():
        values[i] = min(values[i], polished)
    n_agreeing = int(np.sum(values - value <= tolerance))
    geometry, hits = identify.conditioning(problem, theta), identify.bound_hits(problem, theta)
    left = 0.0 if exact else drop_ahead(problem, theta) / value
    checks = (
        _check_drop("gradient", left, "by its gradient the objective could still fall by"),
        _check_drop("polish", drop, "polishing once more lowered the objective by"),
        _check_agreement(n_agreeing, len(starts)),
        _check_bounds(hits),
        _check_moved(problem, theta, starts),
        _check_condition(geometry),
    )
    return Solution(theta, len(starts), n_agreeing / len(starts), geometry, hits, checks)


def drop_ahead(problem: Problem, theta: Array) -> float:
    """By how much the gradient promises that the scaled objective can still fall.

    Huber's penalty lies below the parabola of weight min(1, delta / |r|) that touches it, so a step to the least of these
    parabolas, over the constants that may move, lowers it by g' H^-1 g / 2 at least.
    """
    lower, upper = problem.bounds()
    residuals, jacobian = problem.residuals_and_jacobian(theta)
    weights, slopes = np.ones_like(residuals), residuals
    if problem.loss == "log_huber":
        weights = np.minimum(1.0, problem.delta / np.maximum(np.abs(residuals), 1e-300))
        slopes = np.clip(residuals, -problem.delta, problem.delta)
    gradient = jacobian.T @ slopes
    margin = identify.AT_BOUND * (upper - lower)
    stuck = ((theta <= lower + margin) & (gradient > 0)) | ((theta >= upper - margin) & (gradient < 0))
    if stuck.all():
        return 0.0
    jacobian, gradient = jacobian[:, ~stuck], gradient[~stuck]
    step = np.linalg.lstsq((jacobian * weights[:, None]).T @ jacobian, gradient, rcond=None)[0]
    factor = 0.5 if problem.loss == "log_huber" else 1.0  # the penalty is r^2 / 2, or r^2
    return float(factor * gradient @ step) / problem.delta**2


def _check_drop(name: str, drop: float, what: str) -> Check:
    return Check(name, drop <= SAME, Status.NOT_CONVERGED, f"{what} {max(drop, 0.0):.1g} of itself (limit {SAME:g})")


def _check_agreement(n_agreeing: int, n_starts: int) -> Check:
    text = f"{n_agreeing} of {n_starts} starts reach the best objective within {SAME:g} ({MIN_AGREEING} are needed)"
    return Check("starts", n_agreeing >= MIN_AGREEING, Status.STARTS_DISAGREE, text)


def _check_bounds(hits: dict[str, str]) -> Check:
    text = ", ".join(f"{name} {reason}" for name, reason in hits.items())
    return Check("bounds", not hits, Status.BOUND_HIT, f"on a bound: {text}" if hits else "no constant on a bound")


def _check_moved(problem: Problem, theta: Array, starts: Array) -> Check:
    """A linear problem's start is its solution: there it says nothing."""
    linear = all(p.kind in ("floor", "amplitude") for p in problem.law.free)
    moved = linear or bool(np.all(np.max(np.abs(starts - theta), axis=1, initial=0.0) > _UNMOVED))
    text = "the answer differs from every start" if moved else "the answer equals a start: the descent did not work"
    return Check("moved", moved, Status.NEVER_MOVED, text)


def _check_condition(geometry: identify.Conditioning) -> Check:
    text = f"condition number {geometry.number:.2g}, centred and scaled (limit {MAX_CONDITION:g})"
    return Check("condition", geometry.number <= MAX_CONDITION, Status.ILL_CONDITIONED, text)
