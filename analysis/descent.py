"""Descents from a start to a minimum. They are judged by the objective alone, never by what an optimiser says of itself."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize

from analysis.objective import Problem

Array = np.ndarray
Answer = tuple[Array, float]

_ROUNDS = 12
_SETTLED = 1e-10


def minimise(problem: Problem, theta: Array, rounds: int = _ROUNDS) -> Answer:
    """Descend until no method improves: theta and its scaled objective.

    Reweighting crosses the plain from afar, Gauss-Newton follows the ill-conditioned valley, L-BFGS-B ends at the kink of a
    small delta, where Gauss-Newton sees no curvature.
    """
    best = _enter(problem, theta)
    if not len(theta):
        return best
    for _ in range(rounds):
        before = best[1]
        for step in (reweighted, gauss_newton, quasi_newton):
            best = _better(problem, step, best)
        if before - best[1] <= _SETTLED * before:
            break
    return best


def approach(problem: Problem, theta: Array, max_steps: int = 40) -> Answer:
    """One reweighted descent: from a far start to near its minimum."""
    best = _enter(problem, theta)
    return _better(problem, lambda p, t: reweighted(p, t, max_steps), best) if len(theta) else best


def refit(problem: Problem, theta: Array) -> Answer:
    """One Gauss-Newton descent, enough near an answer: bootstrap and profiles."""
    best = _enter(problem, theta)
    return _better(problem, _loose, best) if len(theta) else best


def _enter(problem: Problem, theta: Array) -> Answer:
    theta = np.clip(theta, *problem.bounds()) if len(theta) else theta
    return theta, problem.scaled_objective(theta)[0]


def _better(problem: Problem, step: Callable[[Problem, Array], Array], best: Answer) -> Answer:
    candidate = np.clip(step(problem, best[0]), *problem.bounds())
    value = problem.scaled_objective(candidate)[0]
    return (candidate, value) if value < best[1] else best


def reweighted(problem: Problem, theta: Array, max_steps: int = 40) -> Array:
    """Damped least squares with Huber weights min(1, delta / |r|), which bound the penalty from above: every step lowers it.

    Constants whose gradient points out of the box are left where they are.
    """
    lower, upper = problem.bounds()
    damping = 1e-3
    residuals, jacobian = problem.residuals_and_jacobian(theta)
    value = problem.penalties(residuals).sum()
    for _ in range(max_steps):
        weights = np.ones_like(residuals)
        if problem.loss == "log_huber":
            weights = np.minimum(1.0, problem.delta / np.maximum(np.abs(residuals), 1e-300))
        gradient = jacobian.T @ (weights * residuals)
        free = ~(((theta <= lower) & (gradient > 0)) | ((theta >= upper) & (gradient < 0)))
        if not free.any():
            break
        curvature = (jacobian[:, free] * weights[:, None]).T @ jacobian[:, free]
        diagonal = np.maximum(np.diag(curvature), 1e-12 * curvature.max() + 1e-300)
        for _ in range(10):
            trial = theta.copy()
            trial[free] -= np.linalg.lstsq(curvature + damping * np.diag(diagonal), gradient[free], rcond=None)[0]
            trial = np.clip(trial, lower, upper)
            new_residuals, new_jacobian = problem.residuals_and_jacobian(trial)
            new_value = problem.penalties(new_residuals).sum()
            if new_value < value:
                break
            damping *= 8
        else:
            break
        settled = value - new_value <= 1e-8 * value
        theta, residuals, jacobian, value = trial, new_residuals, new_jacobian, new_value
        damping = max(damping / 6, 1e-12)
        if settled:
            break
    return theta


def _loose(problem: Problem, theta: Array) -> Array:
    return gauss_newton(problem, theta, tolerance=1e-8, max_nfev=40)


def gauss_newton(problem: Problem, theta: Array, tolerance: float = 1e-15, max_nfev: int = 60) -> Array:
    """Trust-region Gauss-Newton on the penalty itself (scipy's reflective algorithm)."""
    lower, upper = problem.bounds()
    inside = np.clip(theta, lower + 1e-10 * (upper - lower), upper - 1e-10 * (upper - lower))
    cached: dict[bytes, tuple[Array, Array]] = {}

    def both(t: Array) -> tuple[Array, Array]:
        key = t.tobytes()
        if key not in cached:
            cached.clear()
            cached[key] = problem.residuals_and_jacobian(t)
        return cached[key]

    huber: dict[str, Any] = {"loss": "huber", "f_scale": problem.delta} if problem.loss == "log_huber" else {}
    tolerances = {"xtol": tolerance, "ftol": tolerance, "gtol": tolerance, "max_nfev": max_nfev}
    answer = optimize.least_squares(
        lambda t: both(t)[0],
        inside,
        jac=lambda t: both(t)[1],
        bounds=(lower, upper),
        x_scale="jac",
        **tolerances,
        **huber,
    )
    return answer.x


def quasi_newton(problem: Problem, theta: Array) -> Array:
    """L-BFGS-B on the objective over delta squared."""
    answer = optimize.minimize(
        problem.scaled_objective,
        theta,
        jac=True,
        method="L-BFGS-B",
        bounds=np.column_stack(problem.bounds()),
        options={"maxiter": 1000, "maxfun": 2000, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-9},
    )
    return answer.x
