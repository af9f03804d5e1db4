"""Intervals by the parametric bootstrap, where the distribution of errors is known up to its width: accuracies on a test.

The fit is repeated on observations that it makes up: its predictions with errors of the width that the residuals show. The width
is itself uncertain, and drawn anew each time (residual sum of squares over chi square with runs - constants degrees of freedom),
which gives the tails of Student's t where runs are few. The Bayesian bootstrap of `analysis.bootstrap`, which assumes less, gives
intervals that are a tenth too narrow or more for two or three constants and two dozen runs.

Runs that err together (branches of a trunk, checkpoints of a run) get errors that are correlated as their residuals are.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from analysis.ensemble import refit_many
from analysis.objective import Problem
from analysis.starts import draw_starts

Array = np.ndarray

_FRESH_STARTS = 3
_CANDIDATES = 60
_LEAST = 1e-9


def simulate_refits(
    problem: Problem,
    theta: Array,
    clusters: Sequence[str],
    *,
    n: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Refit to `n` sets of simulated observations.

    A ceiling that the runs do not tell from its bound is treated much as an offset is that may be 0 (`analysis.bootstrap`): half
    of the refits hold it there, and their observations are made up with it there.

    Args:
        problem: the fitted problem, with errors of equal width in its units (`mse`).
        theta: its answer, (p,).
        clusters: what errs together, one name a row of the data.
        n: number of refits.
        rng: source of the draws.
        progress: called with (done, n).

    Returns:
        Constants in the problem's coordinates, (n, p).
    """
    spare = len(problem) - len(theta)
    if not n or not len(theta) or spare < 1:
        return np.tile(theta, (n, 1))
    fresh = draw_starts(problem, rng, n_starts=_FRESH_STARTS, n_candidates=_CANDIDATES)
    found = _refits(problem, theta, clusters, n, rng, fresh, None)
    at_bound = _at_ceiling(problem, theta)
    if at_bound is not None:
        held, there = at_bound
        upper = problem.bounds()[1]
        starts = [np.where(held, upper, start) for start in fresh]
        found[::2] = _refits(problem, there, clusters, (n + 1) // 2, rng, starts, held)
    if progress:
        progress(n, n)
    return found


def _refits(
    problem: Problem,
    theta: Array,
    clusters: Sequence[str],
    n: int,
    rng: np.random.Generator,
    fresh: Sequence[Array],
    held: Array | None,
) -> Array:
    """The best of the descents from the answer and from elsewhere, for each set of observations, (n, p)."""
    residuals = problem.residuals(theta)
    n_free = len(theta) - (0 if held is None else int(held.sum()))
    targets = np.maximum(problem.target + residuals + draw_errors(residuals, clusters, n, rng, n_free), _LEAST)
    best, least = refit_many(problem, theta, targets=targets, frozen=held)
    for start in fresh:
        other, values = refit_many(problem, start, targets=targets, frozen=held)
        better = values < least
        best[better], least[better] = other[better], values[better]
    return best


def draw_errors(residuals: Array, clusters: Sequence[str], n: int, rng: np.random.Generator, n_constants: int) -> Array:
    """Errors of the rows, (n, rows): normal, as wide and as alike within clusters as the residuals are.

    The correlation within clusters is the mean product of two residuals of one cluster over the mean square, 0 at the least.
    Rows that are correlated count as fewer: m rows with correlation c as m / (1 + (m - 1) c).
    """
    _, of_row = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sizes = np.bincount(of_row)
    alike = _correlation(residuals, of_row, sizes)
    counted = float(np.sum(sizes / (1 + (sizes - 1) * alike)))
    spare = max(counted - n_constants, 1.0)
    variance = float(np.sum(residuals**2)) / max(len(residuals) - n_constants, 1)
    width = np.sqrt(variance * spare / rng.chisquare(spare, size=(n, 1)))
    shared, own = rng.normal(size=(n, len(sizes))), rng.normal(size=(n, len(residuals)))
    return width * (np.sqrt(alike) * shared[:, of_row] + np.sqrt(1 - alike) * own)


def _correlation(residuals: Array, of_row: Array, sizes: Array) -> float:
    n_pairs = float(np.sum(sizes * (sizes - 1)))
    square = float(np.mean(residuals**2))
    if not n_pairs or square <= 0:
        return 0.0
    products = np.bincount(of_row, residuals) ** 2 - np.bincount(of_row, residuals**2)
    return float(np.clip(np.sum(products) / n_pairs / square, 0.0, 1.0))


def _at_ceiling(problem: Problem, theta: Array, level: float = 0.95) -> tuple[Array, Array] | None:
    """(p,) true for the ceiling, and the answer with it at its bound; None without one, or where the F test rejects that."""
    held = np.array([p.kind == "ceiling" for p in problem.law.free])
    spare = len(problem) - len(theta)
    if not held.any():
        return None
    there, value = refit_many(problem, np.where(held, problem.bounds()[1], theta), frozen=held)
    least = float(problem.penalties(problem.residuals(theta)).sum())
    if float(value[0]) - least > least / spare * float(stats.f.ppf(level, 1, spare)):
        return None
    return held, there[0]
