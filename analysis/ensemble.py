"""Many descents of one law at once, all in step as one array computation: starts, bootstrap, profiles, simulated sweeps.

Each descent has its own start and may have its own observations or its own weights of the runs. One after the other they
take ten times as long. Neighbouring descents share nothing but the law and its variables, so chunks of them run in threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from analysis.objective import Problem

Array = np.ndarray

MAX_STEPS = 100
_SETTLED = 1e-10
_CELLS = 200_000
"""Entries of the Jacobians of a chunk, 1.6 MB: two of them stay in a processor's cache."""
_LEFT_OUT = 1e-3
"""Curvature of Newton's step for residuals beyond delta, where the penalty has none; as a share of the reweighted one."""


def refit_many(
    problem: Problem,
    start: Array,
    *,
    targets: Array | None = None,
    weights: Array | None = None,
    frozen: Array | None = None,
    max_steps: int = MAX_STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, Array]:
    """Descend from each start to its minimum.

    At every step two candidates are tried and the better one is taken: damped least squares with the weights min(1, delta / |r|)
    of the Huber penalty, which lowers it from anywhere, and Newton's step, whose curvature is that of the runs within delta,
    which ends the descent. Constants whose gradient points out of the box stay where they are.

    Args:
        problem: law, variables and loss.
        start: where the descents start, (S, p), or (p,) for all alike.
        targets: observations over the problem's scale, one set a row, (S, n); those of the problem by default.
        weights: of the runs, one set a row, (S, n), not negative; 1 by default.
        frozen: true where a constant stays as it starts, (p,), or (S, p).
        max_steps: at most so many steps each.
        progress: called with (descents done, descents).

    Returns:
        The constants of each in the problem's coordinates, (S, p), and their sums of penalties, (S,).
    """
    n = len(problem)
    n_sets = max(len(a) for a in (np.atleast_2d(start), targets, weights) if a is not None)
    starts = np.broadcast_to(np.atleast_2d(start), (n_sets, np.shape(start)[-1]))
    held = np.broadcast_to(np.zeros((), dtype=bool) if frozen is None else np.asarray(frozen, dtype=bool), starts.shape)
    chunk = max(1, _CELLS // max(1, n * starts.shape[1]))

    def part(begin: int) -> tuple[Array, Array]:
        rows = slice(begin, begin + chunk)
        descent = _Descent(
            problem,
            starts[rows],
            problem.target[None] if targets is None else targets[rows],
            np.ones((1, n)) if weights is None else weights[rows],
            held[rows],
        )
        return descent.run(max_steps)

    begins = range(0, n_sets, chunk)
    found: dict[int, tuple[Array, Array]] = {}
    with ThreadPoolExecutor(max(1, min(len(begins), n_processors()))) as pool:
        for future in as_completed(futures := {pool.submit(part, begin): begin for begin in begins}):
            found[futures[future]] = future.result()
            if progress:
                progress(sum(len(values) for _, values in found.values()), n_sets)
    if not found:
        return np.empty((0, starts.shape[1])), np.empty(0)
    parts = [found[begin] for begin in begins]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def n_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def natural_values(problem: Problem, thetas: Array) -> dict[str, Array]:
    """Constants in natural units from thetas (S, p): name -> (S,)."""
    rows = [problem.values(theta) for theta in thetas]
    return {p.name: np.array([row[p.name] for row in rows]) for p in problem.law.parameters}


class _Descent:
    """Descents in step. S of them, n runs, p constants; `active` are those that still move."""

    def __init__(self, problem: Problem, starts: Array, targets: Array, weights: Array, frozen: Array) -> None:
        self.problem, self.frozen = problem, frozen
        self.lower, self.upper = problem.bounds()
        self.thetas = np.clip(starts, self.lower, self.upper) if frozen.size else starts.copy()
        self.targets, self.weights = (np.broadcast_to(a, (len(starts), len(problem))) for a in (targets, weights))
        self.active = np.arange(len(starts))
        self.residuals, self.jacobian = self._linearise(self.thetas, self.targets)
        self.values = self._value(self.residuals, self.weights)
        # of the reweighted and of Newton's step
        self.damping = np.full((len(starts), 2), 1e-3)

    def run(self, max_steps: int) -> tuple[Array, Array]:
        """Step until nothing moves: thetas (S, p) and values (S,)."""
        for _ in range(max_steps if self.frozen.size else 0):
            self._step()
            if not len(self.active):
                break
        return self.thetas, self.values

    def _step(self) -> None:
        active = self.active
        targets, weights, before = self.targets[active], self.weights[active], self.values[active]
        trials = self._trials(active)
        values = np.stack([self._value(self._residuals(t, targets), weights) for t in trials], axis=1)
        values = np.where(np.isfinite(values), values, np.inf)
        lower = values < before[:, None]
        damping = self.damping[active]
        self.damping[active] = np.where(lower, np.maximum(damping / 6, 1e-12), damping * 8)
        best = np.argmin(values, axis=1)
        improved = lower[np.arange(len(active)), best]
        won = active[improved]
        self.thetas[won] = np.stack(trials, axis=1)[np.arange(len(active)), best][improved]
        self.residuals[won], self.jacobian[won] = self._linearise(self.thetas[won], self.targets[won])
        self.values[won] = values[np.arange(len(active)), best][improved]
        settled = improved & (before - self.values[active] <= _SETTLED * before)
        self.active = active[~settled & (self.damping[active].min(axis=1) < 1e12)]

    def _trials(self, active: Array) -> list[Array]:
        """Constants after each kind of step, (A, p)."""
        residuals, jacobian, thetas = self.residuals[active], self.jacobian[active], self.thetas[active]
        weights, delta = self.weights[active], self.problem.delta
        if self.problem.loss == "log_huber":
            reweighted = weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
            inner = np.where(np.abs(residuals) <= delta, weights, _LEFT_OUT * reweighted)
            curvatures, slopes = [reweighted, inner], weights * np.clip(residuals, -delta, delta)
        else:
            curvatures, slopes = [weights], weights * residuals
        gradient = (jacobian @ slopes[..., None])[..., 0]
        stuck = ((thetas <= self.lower) & (gradient > 0)) | ((thetas >= self.upper) & (gradient < 0))
        stuck |= self.frozen[active]
        return [
            np.clip(thetas - _solve(jacobian, w, gradient, stuck, self.damping[active, kind]), self.lower, self.upper)
            for kind, w in enumerate(curvatures)
        ]

    def _value(self, residuals: Array, weights: Array) -> Array:
        return (self.problem.penalties(residuals) * weights).sum(axis=1)

    def _residuals(self, thetas: Array, targets: Array) -> Array:
        prediction = self.problem.evaluate(thetas, gradient=False)[0]
        if self.problem.loss == "mse":
            return prediction - targets
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(prediction / targets)

    def _linearise(self, thetas: Array, targets: Array) -> tuple[Array, Array]:
        """Residuals (S, n) and their derivatives (S, p, n) at thetas (S, p)."""
        prediction, partials = self.problem.evaluate(thetas, gradient=True)
        prediction = np.broadcast_to(prediction, targets.shape)
        jacobian = np.empty((len(targets), len(partials), targets.shape[1]))
        over: Any = 1.0 if self.problem.loss == "mse" else prediction
        for row, partial in enumerate(partials):
            jacobian[:, row] = partial / over
        return (prediction - targets if self.problem.loss == "mse" else np.log(prediction / targets)), jacobian


def _solve(jacobian: Array, weights: Array, gradient: Array, stuck: Array, damping: Array) -> Array:
    """Damped steps (S, p): (J W J' + damping diag) step = gradient; 0 for what is stuck."""
    curvature = (jacobian * weights[:, None]) @ jacobian.transpose(0, 2, 1)
    diagonal = np.einsum("spp->sp", curvature)
    floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
    identity = np.eye(gradient.shape[1])
    curvature = curvature + identity * (damping[:, None] * np.maximum(diagonal, floor) + floor)[:, None, :]
    # A stuck constant gets a row and a column of the identity and no gradient: its step is 0.
    free = ~stuck
    curvature = curvature * (free[:, :, None] & free[:, None, :]) + identity * stuck[:, None, :]
    return np.linalg.solve(curvature, (gradient * free)[..., None])[..., 0]
