"""Starting points by variable projection: exponents are drawn, the amplitudes then follow from a linear problem."""

import numpy as np
from scipy import optimize

from analysis.objective import Problem

Array = np.ndarray

_FAINT = 1e-2
"""Amplitude given to a term that the linear problem switched off: from zero its logarithm could never come back."""


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
    """Draw the nonlinear constants, solve for floor and amplitudes by non-negative least squares on relative errors."""
    law = problem.law
    lower, upper = problem.bounds()
    theta = np.empty(len(law.free))
    for i, p in enumerate(law.free):
        if p.kind == "offset":
            theta[i] = 0.0 if rng.random() < 0.5 else 10 ** rng.uniform(-3, 0.5)
        elif p.kind == "exponent":
            theta[i] = rng.uniform(max(lower[i], -1.0), min(upper[i], 1.5))
        else:
            theta[i] = 0.0
    linear = [i for i, p in enumerate(law.free) if p.kind in ("floor", "amplitude")]
    _, partials = law.evaluate(problem.scaled_values(theta), problem.variables, gradient=True)
    columns = np.empty((len(problem), len(linear)))
    for j, i in enumerate(linear):
        columns[:, j] = partials[law.free[i].name]
    held = dict(law.fixed)
    known = held[law.floor] / problem.target_scale if law.floor in held else 0.0
    try:
        solution, norm = optimize.nnls(columns / problem.target[:, None], 1.0 - known / problem.target)
    except RuntimeError:  # the iteration limit: this draw is a poor start, not a failure
        solution, norm = np.full(len(linear), 1.0 / max(len(linear), 1)), np.inf
    for value, i in zip(solution, linear):
        theta[i] = value if law.free[i].kind == "floor" else np.log(max(value, _FAINT))
    return float(norm), np.clip(theta, lower, upper)
