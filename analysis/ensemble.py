"""Many refits of one law at once: the same runs with other losses, all descents in step as one array computation.

Simulated sweeps differ in their noise alone, so their refits share every variable. One damped Gauss-Newton loop over all of them
takes some tenths of a second where one after the other they take ten times that.
"""

from typing import Any

import numpy as np

from analysis.objective import Problem

Array = np.ndarray

_MAX_STEPS = 60
_SETTLED = 1e-7
_CELLS = 4_000_000
"""Entries of the Jacobians held at once: 32 MB."""


def refit_many(problem: Problem, theta: Array, targets: Array) -> Array:
    """Refit `problem` under other observations, each refit descending from `theta`.

    Reweighted least squares with the weights min(1, delta / |r|) of the Huber loss, or none, damped for each refit on its own;
    constants whose gradient points out of the box stay where they are. The steps are those of `descent.reweighted`.

    Args:
        problem: law, variables and loss (`log_huber` or `log_mse`).
        theta: where every descent starts, (p,).
        targets: observations over the problem's scale, one simulated sweep a row, (S, n).

    Returns:
        The constants of each, (S, p), in the problem's coordinates.
    """
    step = max(1, _CELLS // max(1, targets.shape[1] * max(len(theta), 1)))
    parts = [_descend(problem, theta, targets[i : i + step]) for i in range(0, len(targets), step)]
    return np.concatenate(parts) if parts else np.empty((0, len(theta)))


def objectives(problem: Problem, thetas: Array, targets: Array) -> Array:
    """Sum of penalties of each refit, (S,)."""
    return problem.penalties(_residuals(problem, thetas, targets)).sum(axis=1)


def natural_values(problem: Problem, thetas: Array) -> dict[str, Array]:
    """Constants in natural units from thetas (S, p): name -> (S,)."""
    rows = [problem.values(theta) for theta in thetas]
    return {p.name: np.array([row[p.name] for row in rows]) for p in problem.law.parameters}


def _descend(problem: Problem, theta: Array, targets: Array) -> Array:
    lower, upper = problem.bounds()
    thetas = np.tile(np.clip(theta, lower, upper), (len(targets), 1))
    if not len(theta):
        return thetas
    damping = np.full(len(targets), 1e-3)
    residuals, jacobian = _linearise(problem, thetas, targets)
    values = problem.penalties(residuals).sum(axis=1)
    active = np.arange(len(targets))
    for _ in range(_MAX_STEPS):
        r, jac, at = residuals[active], jacobian[active], thetas[active]
        trial = np.clip(at - _steps(problem, r, jac, at, damping[active]), lower, upper)
        new_r, new_jac = _linearise(problem, trial, targets[active])
        new_values = problem.penalties(new_r).sum(axis=1)
        better = new_values < values[active]
        won = active[better]
        gain = values[won] - new_values[better]
        thetas[won], residuals[won], jacobian[won] = trial[better], new_r[better], new_jac[better]
        settled = np.zeros(len(active), dtype=bool)
        settled[better] = gain <= _SETTLED * values[won]
        values[won] = new_values[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 6, 1e-12), damping[active] * 8)
        active = active[~settled & (damping[active] < 1e12)]
        if not len(active):
            break
    return thetas


def _steps(problem: Problem, residuals: Array, jacobian: Array, thetas: Array, damping: Array) -> Array:
    """The damped step of each refit, (S, p)."""
    lower, upper = problem.bounds()
    weighted = jacobian
    if problem.loss == "log_huber":
        weights = np.minimum(1.0, problem.delta / np.maximum(np.abs(residuals), 1e-300))
        weighted = jacobian * weights[..., None]
    gradient = np.einsum("snp,sn->sp", weighted, residuals)
    stuck = ((thetas <= lower) & (gradient > 0)) | ((thetas >= upper) & (gradient < 0))
    curvature = np.einsum("snp,snq->spq", weighted, jacobian)
    diagonal = np.einsum("spp->sp", curvature)
    floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    p = thetas.shape[1]
    curvature = curvature + np.eye(p) * (damping[:, None] * np.maximum(diagonal, floor) + floor)[:, None, :]
    # A stuck constant gets a row and a column of the identity and no gradient: its step is 0.
    free = ~stuck
    curvature = curvature * (free[:, :, None] & free[:, None, :]) + np.eye(p) * stuck[:, None, :]
    return np.linalg.solve(curvature, (gradient * free)[..., None])[..., 0]


def _linearise(problem: Problem, thetas: Array, targets: Array) -> tuple[Array, Array]:
    """Log residuals (S, n) and their derivatives (S, n, p) at thetas (S, p)."""
    law, scaled = problem.law, _scaled(problem, thetas)
    prediction, partials = law.evaluate(scaled, problem.variables, gradient=True)
    prediction = np.broadcast_to(prediction, targets.shape)
    jacobian = np.empty((*targets.shape, len(law.free)))
    for column, p in enumerate(law.free):
        jacobian[..., column] = partials[p.name] * (scaled[p.name] if p.kind == "amplitude" else 1.0) / prediction
    return np.log(prediction / targets), jacobian


def _residuals(problem: Problem, thetas: Array, targets: Array) -> Array:
    prediction = problem.law.evaluate(_scaled(problem, thetas), problem.variables, gradient=False)[0]
    return np.log(prediction / targets)


def _scaled(problem: Problem, thetas: Array) -> dict[str, Any]:
    """Centred constants as columns (S, 1) that broadcast against the runs."""
    free = {p.name: (np.exp(t) if p.kind == "amplitude" else t)[:, None] for p, t in zip(problem.law.free, thetas.T)}
    return {**problem.held_values, **free}
