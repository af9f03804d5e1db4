"""Starting points by variable projection: exponents are drawn, the amplitudes then follow from a linear problem."""

import numpy as np
from scipy import optimize

from analysis.objective import Problem

Array = np.ndarray

_FAINT = 1e-2
"""Share of the target given to a term that the linear problem switched off: from zero its logarithm could never come back."""


def draw_starts(problem: Problem, rng: np.random.Generator, *, n_starts: int, n_candidates: int) -> list[Array]:
    """Starting values of theta.

    Args:
        problem: what will be minimised.
        rng: source of the draws.
        n_starts: how many to return; half are the best candidates, half are drawn from the rest.
        n_candidates: how many sets of exponents and offsets are tried.
    """
    candidates = sorted((_project(problem, rng) for _ in range(n_candidates)), key=lambda c: c[0])
    n_best = min(len(candidates), (n_starts + 1) // 2)
    rest = candidates[n_best:]
    picked = rng.permutation(len(rest))[: n_starts - n_best]
    return [theta for _, theta in candidates[:n_best]] + [rest[i][1] for i in picked]


def _project(problem: Problem, rng: np.random.Generator) -> tuple[float, Array]:
    """Draw the nonlinear constants, solve for the others by bounded least squares on relative errors."""
    coordinates = problem.coordinates
    linear, logs = coordinates.linear, coordinates.logarithms
    theta = coordinates.draw(rng)
    prediction, partials = problem.evaluate(theta, gradient=True)
    columns = np.empty((len(problem), len(linear)))
    for j, i in enumerate(linear):
        columns[:, j] = partials[i]
    # what was drawn as 0 is 1 where it is a logarithm: without these terms, what is left depends on nothing linear
    known = prediction - sum(columns[:, j] for j, i in enumerate(linear) if i in logs)
    lower, upper = problem.bounds()
    ends = [(0.0, np.inf) if i in logs else (lower[i], upper[i]) for i in linear]
    norm, solution = _solve(columns / problem.target[:, None], 1.0 - known / problem.target, ends)
    for j, i in enumerate(linear):
        faint = _FAINT / max(float(np.median(np.abs(columns[:, j]))), 1e-300)
        theta[i] = np.log(max(solution[j], faint)) if i in logs else solution[j]
    return norm, np.clip(theta, lower, upper)


def _solve(columns: Array, wanted: Array, ends: list[tuple[float, float]]) -> tuple[float, Array]:
    """Least squares within bounds: the norm of what is left, infinite where it has no solution, and the solution."""
    if not np.all(np.isfinite(wanted)) or not np.all(np.isfinite(columns)):
        # a law that is not finite with these constants: a poor start, not a failure
        return np.inf, np.full(len(ends), 1.0 / max(len(ends), 1))
    if not ends:
        return float(np.linalg.norm(wanted)), np.empty(0)  # scipy's nnls ends the process on a matrix without columns
    try:
        if all(low >= 0 for low, _ in ends):
            solution, norm = optimize.nnls(columns, wanted)
            return float(norm), solution
        answer = optimize.lsq_linear(columns, wanted, bounds=np.array(ends).T)
        return float(np.sqrt(2 * answer.cost)), answer.x
    except RuntimeError:  # the iteration limit: this draw is a poor start
        return np.inf, np.full(len(ends), 1.0 / len(ends))
