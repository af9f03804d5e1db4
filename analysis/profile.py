"""Profile likelihood: a second opinion on the intervals of the bootstrap, by another way and with other weaknesses."""

import dataclasses

import numpy as np
from scipy import stats

from analysis.ensemble import refit_many
from analysis.objective import Problem
from dlcm.errors import UserError, nearest

Array = np.ndarray

_REACH = np.linspace(0.25, 8.0, 32)
"""Where the profile is computed to either side of the answer, in standard errors."""
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
    names = [p.name for p in problem.law.free]
    found = {}
    for i, p in enumerate(problem.law.free):
        if p.kind in _KINDS and covariance[i, i] > 0:
            low, high = (_end(problem, theta, i, covariance[i], sign, least, allowed) for sign in (-1.0, 1.0))
            found[names[i]] = (low, high)
    return found


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
    thetas, rises = [theta[None]], [np.zeros(1)]
    for sign in (-1.0, 1.0):
        found, values = _along(problem, theta, i, covariance[i], sign)
        thetas.append(found)
        rises.append((values - least) / allowed)
    places = np.array([problem.values(t)[name] for t in np.concatenate(thetas)])
    order = np.argsort(places)
    return ProfileCurve(name, places[order], np.maximum(np.concatenate(rises)[order], 0.0))


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


def _along(problem: Problem, theta: Array, i: int, covariances: Array, sign: float) -> tuple[Array, Array]:
    """Refits with constant `i` held at steps to one side, (steps, p), and their objectives, (steps,)."""
    lower, upper = problem.bounds()
    at = np.clip(theta[i] + sign * np.sqrt(covariances[i]) * _REACH, lower[i], upper[i])
    # The others follow along the regression on constant i, which is where the refit would take them in a linear problem.
    starts = theta + np.outer(at - theta[i], covariances / covariances[i])
    starts[:, i] = at
    return refit_many(problem, starts, frozen=np.arange(len(theta)) == i)


def _end(
    problem: Problem, theta: Array, i: int, covariances: Array, sign: float, least: float, allowed: float
) -> float:
    """Where the profile of constant `i` first rises by `allowed` on one side, natural units."""
    lower, upper = problem.bounds()
    name = problem.law.free[i].name
    thetas, values = _along(problem, theta, i, covariances, sign)
    at = thetas[:, i]
    rises = values - least
    beyond = np.flatnonzero(rises > allowed)
    if not beyond.size:
        touches = at[-1] in (lower[i], upper[i])
        return problem.values(thetas[-1])[name] if touches else sign * np.inf
    k = int(beyond[0])
    before = (float(theta[i]), 0.0) if k == 0 else (float(at[k - 1]), float(rises[k - 1]))
    # a profile is nearly a parabola: its root is nearly linear
    root = [np.sqrt(max(v, 0.0)) for v in (before[1], float(rises[k]), allowed)]
    share = (root[2] - root[0]) / (root[1] - root[0])
    edge = thetas[k].copy()
    edge[i] = before[0] + share * (at[k] - before[0])
    return problem.values(edge)[name]
