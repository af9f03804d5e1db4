"""Profile likelihood: a second opinion on the intervals of the bootstrap, by another way and with other weaknesses."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from analysis.ensemble import refit_many
from analysis.objective import Problem
from dlcm.errors import UserError, nearest

Array = np.ndarray

_REACH = np.arange(1.0, 9.0)
"""Where the profile is computed first, to either side of the answer, in standard errors; its end is then sought between two."""
_BETWEEN = np.array([0.25, 0.5, 0.75])
_CURVE = np.linspace(0.25, 8.0, 32)
"""Where a profile is computed that is drawn."""
_KINDS = ("exponent", "floor", "offset", "ceiling", "other")


def profile_intervals(problem: Problem, theta: Array, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Interval of each exponent, floor and offset: values at which the others, refitted, fit hardly worse.

    The statistic is the rise of the objective Q, scaled so that it is chi square with one degree of freedom for any penalty with
    derivative psi:  2 (Q(v) - Q) E[psi'] / E[psi^2]  (Ronchetti's test of nested robust fits). It holds for independent
    errors alone: it knows nothing of runs that share a trunk.

    Args:
        problem: the fitted problem.
        theta: its answer, (p,).
        level: coverage asked for.

    Returns:
        Constant -> (low, high), natural units; an end is infinite where the profile does not rise so far within 8 errors, and
        the bound where it does not rise so far before that.
    """
    scale = _scale(problem, theta, level)
    if scale is None:
        return {}
    allowed, covariance, least = scale
    chosen = [i for i, p in enumerate(problem.law.free) if p.kind in _KINDS and covariance[i, i] > 0]
    if not chosen:
        return {}
    ends = [(i, sign) for i in chosen for sign in (-1.0, 1.0)]
    # All ends together: alone, each would be a handful of descents, which takes as long as hundreds.
    first = [_along(problem, theta, i, covariance[i], sign * _REACH) for i, sign in ends]
    thetas, rises = _profile(problem, first, [i for i, _ in ends], least)
    over = rises > allowed
    beyond = np.where(over.any(axis=1), over.argmax(axis=1), -1)
    crossed = np.flatnonzero(beyond >= 0).tolist()
    upper = [thetas[e, beyond[e]] for e in crossed]
    lower = [thetas[e, beyond[e] - 1] if beyond[e] else theta for e in crossed]
    second = [low + _BETWEEN[:, None] * (high - low) for low, high in zip(lower, upper)]
    between, inner = _profile(problem, second, [ends[e][0] for e in crossed], least)
    found = {}
    for k, e in enumerate(crossed):
        before = rises[e, beyond[e] - 1] if beyond[e] else 0.0
        path = np.concatenate([lower[k][None], between[k], upper[k][None]])
        found[e] = _crossing(path, np.array([before, *inner[k], rises[e, beyond[e]]]), ends[e][0], allowed)
    values = [_end(problem, found.get(e), thetas[e, -1], *ends[e]) for e in range(len(ends))]
    names = [problem.law.free[i].name for i in chosen]
    return {name: (values[2 * k], values[2 * k + 1]) for k, name in enumerate(names)}


@dataclasses.dataclass(frozen=True, eq=False)
class ProfileCurve:
    """The objective over one constant, the others refitted at each of its values.

    Attributes:
        values: of the constant, natural units, ascending, (n,).
        rises: of the objective, over the rise at which the 95% interval ends, (n,).
    """

    name: str
    values: Array
    rises: Array


def profile_curve(problem: Problem, theta: Array, name: str, level: float = 0.95) -> ProfileCurve:
    """The profile of one constant, as far as 8 standard errors or its bounds; see `profile_intervals`.

    Args:
        problem: the fitted problem.
        theta: its answer, (p,).
        name: a free exponent, floor, offset or other constant that is no amplitude.
        level: coverage of the interval that ends where `rises` is 1.

    Raises:
        UserError: there is no such constant, or its profile cannot be scaled: as many constants as runs, or an exact fit.
    """
    known = {p.name: i for i, p in enumerate(problem.law.free) if p.kind in _KINDS}
    if name not in known:
        raise UserError(f"law {problem.law.name}: no profile of {name!r}{nearest(name, known)}")
    scale = _scale(problem, theta, level)
    i = known[name]
    if scale is None or not scale[1][i, i] > 0:
        raise UserError(f"law {problem.law.name}: {len(problem)} runs leave nothing to scale a profile of {name} by")
    allowed, covariance, least = scale
    starts = [_along(problem, theta, i, covariance[i], sign * _CURVE) for sign in (-1.0, 1.0)]
    thetas, rises = _profile(problem, starts, [i, i], least)
    places = np.array([problem.values(t)[name] for t in (theta, *thetas.reshape(-1, len(theta)))])
    order = np.argsort(places)
    return ProfileCurve(name, places[order], np.maximum(np.array([0.0, *rises.ravel()])[order] / allowed, 0.0))


def penalty_moments(problem: Problem, residuals: Array) -> tuple[float, float]:
    """E[psi'], smoothed over the residuals, and E[psi^2] with the degrees of freedom of the constants taken off.

    With psi the derivative of the penalty, 2 (Q0 - Q) E[psi'] / E[psi^2] is chi square with k degrees of freedom where Q0 is the
    objective of a fit with k constants held at their true values, and Q that of the whole.
    """
    spare = len(residuals) - len(problem.law.free)
    if problem.loss != "log_huber":
        return 2.0, 4.0 * float(np.sum(residuals**2)) / spare
    psi = np.clip(residuals, -problem.delta, problem.delta)
    # psi' is 1 within delta and 0 outside. How many residuals fall there is a count that jumps; a kernel estimate does not.
    # As many residuals as constants are small because the law goes through them, not because errors are: they are left out.
    told = residuals[np.argsort(np.abs(residuals))[len(residuals) - spare :]]
    spread = min(told.std(), float(stats.iqr(told)) / 1.349) or told.std()
    width = 1.06 * spread * spare**-0.2 + 1e-300
    inside = stats.norm.cdf((problem.delta - told) / width) - stats.norm.cdf((-problem.delta - told) / width)
    return float(inside.mean()), float(np.sum(psi**2)) / spare


def _scale(problem: Problem, theta: Array, level: float) -> tuple[float, Array, float] | None:
    """The rise of the objective that is allowed, the constants' covariance, the objective; None where no run is spare."""
    spare = len(problem) - len(theta)
    if spare < 1 or not len(theta):
        return None
    residuals, jacobian = problem.residuals_and_jacobian(theta)
    slope, variance = penalty_moments(problem, residuals)
    if variance <= 0 or slope <= 0:
        return None
    allowed = float(stats.f.ppf(level, 1, spare)) * variance / slope / 2
    covariance = np.linalg.pinv(jacobian.T @ jacobian, hermitian=True) * variance / slope**2
    return allowed, covariance, float(problem.penalties(residuals).sum())


def _along(problem: Problem, theta: Array, i: int, covariances: Array, errors: Array) -> Array:
    """Starts with constant `i` moved by so many standard errors, (steps, p).

    The others follow along the regression on constant i, which is where the refit would take them in a linear problem.
    """
    lower, upper = problem.bounds()
    at = np.clip(theta[i] + errors * np.sqrt(covariances[i]), lower[i], upper[i])
    starts = theta + np.outer(at - theta[i], covariances / covariances[i])
    starts[:, i] = at
    return starts


def _profile(problem: Problem, starts: Sequence[Array], held: Sequence[int], least: float) -> tuple[Array, Array]:
    """Refits from E sets of starts, (steps, p) each, with one constant held in each set: (E, steps, p), and rises, (E, steps)."""
    if not len(starts):  # no end was crossed
        return np.empty((0, 0, len(problem.law.free))), np.empty((0, 0))
    rows = np.concatenate(starts)
    of_row = np.repeat(np.asarray(held), len(starts[0]))
    thetas, values = refit_many(problem, rows, frozen=np.arange(rows.shape[1]) == of_row[:, None])
    return thetas.reshape(len(starts), -1, rows.shape[1]), values.reshape(len(starts), -1) - least


def _crossing(path: Array, rises: Array, i: int, allowed: float) -> Array:
    """Where the objective along a path of refits (steps, p) first rises by `allowed`."""
    k = max(int(np.argmax(rises > allowed)), 1)
    # a profile is nearly a parabola: its root is nearly linear
    root = [np.sqrt(max(float(v), 0.0)) for v in (rises[k - 1], rises[k], allowed)]
    share = (root[2] - root[0]) / (root[1] - root[0])
    edge = path[k].copy()
    edge[i] = path[k - 1, i] + share * (path[k, i] - path[k - 1, i])
    return edge


def _end(problem: Problem, crossing: Array | None, last: Array, i: int, sign: float) -> float:
    """The end of the interval of constant `i` on one side, natural units; `last` is the farthest that was looked."""
    name = problem.law.free[i].name
    if crossing is not None:
        return problem.values(crossing)[name]
    lower, upper = problem.bounds()
    return problem.values(last)[name] if last[i] in (lower[i], upper[i]) else sign * np.inf
