"""Intervals by the Bayesian bootstrap (Rubin 1981): the fit is repeated under random weights of the runs.

A run is weighted whole, and runs that share a trunk together: checkpoints of one run, and branches of one trunk, err together.
The weights are gamma variates with a mean of 1. With a variance of 1 (exponential variates, Rubin's choice) intervals of least
squares would be too narrow where runs are few, for two reasons: residuals are smaller than errors, since p constants fitted to n
clusters take their variance down by (n - p) / n; and the scatter is itself estimated, so that Student's t stands where the normal
distribution does. Absolute deviations are another matter: of residuals beyond delta only the sign counts, which does not shrink,
and refits scatter too much: by how much the fit moves depends on how many residuals lie near 0, where the answer itself has
put some. In linear regressions with the designs of real sweeps exponential weights cover 98 to 99% there
(`benchmarks/bootstrap_weights.py`). So the variance of the weights follows from the share of residuals within delta
(`weight_variance`). Drawing runs with replacement would leave a third of them out of each resample, and with them whole levels of
an axis, so that it had to be stratified; here each run keeps some weight.

An offset (t in (N + t)^-d) cannot be below 0, and where it is about 0 the bootstrap fails (Andrews 2000): refits of the whole
law put it above 0 more often than not, which shifts the exponent that trades off with it, and intervals of exponents cover 80 to
90%. Refits with the offset held at 0 would cover where it is 0, and fail where it is small but real. To test first and then take
either is worst in between, where the test decides by chance. So where the runs do not reject that offsets are 0, a third of the
refits hold them there and the others do not: the interval holds most of what either law says. Half of each would cut the interval
of the whole law at its 95% quantile where the other's lies to one side of it, and miss a real offset's exponent too often. Refits
of either kind scatter less there than fits to new runs do, as far as they are of least squares; `_AT_ZERO` makes up for that. The
measured coverage of all of this is in docs/fitting.md (`benchmarks/coverage.py`).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special, stats

from analysis.ensemble import refit_many
from analysis.objective import Problem
from analysis.profile import penalty_moments
from analysis.starts import draw_starts

Array = np.ndarray

_FEW_CLUSTERS = 5
"""Below so many clusters a constant, descents from elsewhere join the one from the answer."""
_FRESH_STARTS = 3
_CANDIDATES = 60
_LEAST_SPARE = 5
"""Student's t of fewer degrees of freedom would leave nearly all weight with one run."""
_DEVIATIONS = 0.8
"""Linear regressions need 0.6 to 0.75. Laws are not linear, and offsets may be 0: what is beyond is for that."""
_EVERY = 3
"""Of so many refits one holds the offsets that may be 0 there."""
_AT_ZERO = 1.24
"""What sweeps of 192 simulated runs needed in place of 1.08 at 0.03% to 0.3% of noise. Few runs have more than that anyhow."""
_LEAST = 1e-9
"""Added to a variate, so that where shapes are small no draw weighs a single run alone."""


def bootstrap(
    problem: Problem,
    theta: Array,
    clusters: Sequence[str],
    *,
    n: int,
    rng: np.random.Generator,
    weights: Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Refit under `n` draws of weights; see the module on offsets that may be 0.

    Each refit descends from the answer. Where clusters are few, it descends from other starts as well and keeps the best:
    a warm start alone stays in its valley there, and makes intervals too narrow.

    Args:
        problem: the fitted problem.
        theta: its answer, (p,).
        clusters: what errs together, one name a row of the data.
        n: number of refits.
        rng: source of the draws.
        weights: of the rows in each refit, (n, rows), where they are given and not drawn.
        progress: called with (done, n).

    Returns:
        Constants in the problem's coordinates, (n, p).
    """
    if not n or not len(theta):
        return np.tile(theta, (n, 1))
    reduced = without_offsets(problem, theta)
    if weights is None:
        variance = weight_variance(problem, theta, len(set(clusters)), at_zero=reduced is not None)
        weights = draw_weights(clusters, n, rng, variance)
    few = len(set(clusters)) < _FEW_CLUSTERS * len(theta)
    fresh = draw_starts(problem, rng, n_starts=_FRESH_STARTS, n_candidates=_CANDIDATES) if few else []
    if reduced is None:
        return _refit(problem, [theta, *fresh], weights, None, progress)
    held, there = reduced
    lower = problem.bounds()[0]
    # spread evenly, so that a part of the replicates is a fair sample of them
    at_zero = np.arange(n) % _EVERY == 0
    n_zero = int(at_zero.sum())
    found = np.empty((n, len(theta)))
    starts = [there, *(np.where(held, lower, start) for start in fresh)]
    found[at_zero] = _refit(problem, starts, weights[at_zero], held, progress and (lambda done, _: progress(done, n)))
    found[~at_zero] = _refit(
        problem, [theta, *fresh], weights[~at_zero], None, progress and (lambda done, _: progress(n_zero + done, n))
    )
    return found


def _refit(
    problem: Problem,
    starts: Sequence[Array],
    weights: Array,
    held: Array | None,
    progress: Callable[[int, int], None] | None,
) -> Array:
    """The best of the descents from each start, for each set of weights, (n, p)."""
    best, least = refit_many(problem, starts[0], weights=weights, frozen=held, progress=progress)
    for start in starts[1:]:
        other, values = refit_many(problem, start, weights=weights, frozen=held)
        better = values < least
        best[better], least[better] = other[better], values[better]
    return best


def without_offsets(problem: Problem, theta: Array, level: float = 0.95) -> tuple[Array, Array] | None:
    """The most offsets that may be 0 together for all that the runs say.

    The statistic is that of `analysis.profile`, the rise of the objective over its scatter, against F with (k, runs - p) degrees
    of freedom. It is meant for k constants inside their bounds; on a bound it rejects less often than it says, which errs
    towards the wider interval. Of several sets of equal size it is the one that the runs mind least.

    Args:
        problem: the fitted problem.
        theta: its answer, (p,).
        level: of the test.

    Returns:
        (p,) true for these offsets, and the answer with them at their lower bound, (p,), which stands for 0; None where the law
        has no free offset or none may be 0.
    """
    offsets = [i for i, p in enumerate(problem.law.free) if p.kind == "offset"]
    spare = len(problem) - len(theta)
    if not offsets or spare < 1:
        return None
    residuals = problem.residuals(theta)
    slope, variance = penalty_moments(problem, residuals)
    if variance <= 0 or slope <= 0:
        return None
    least, lower = float(problem.penalties(residuals).sum()), problem.bounds()[0]
    for k in range(len(offsets), 0, -1):
        found = []
        for chosen in itertools.combinations(offsets, k):
            held = np.isin(np.arange(len(theta)), chosen)
            there, value = refit_many(problem, np.where(held, lower, theta), frozen=held)
            found.append((float(value[0]) - least, held, there[0]))
        rise, held, there = min(found, key=lambda f: f[0])
        if 2 * rise * slope / variance <= k * float(stats.f.ppf(level, k, spare)):
            return held, there
    return None


def weight_variance(problem: Problem, theta: Array, n_clusters: int, *, at_zero: bool = False) -> float:
    """Variance of the weights with which refits scatter as fits to new runs would.

    For least squares n / (n - p - 1) times the square of Student's 97.5% quantile over the normal one, for absolute deviations
    0.8, between them in proportion to the residuals within delta. n / (n - 2) is exact for a mean: weights that are scaled to a
    fixed sum are Dirichlet variates, whose variance makes up for one degree of freedom more than the residuals lack.

    Args:
        problem: the fitted problem.
        theta: its answer, (p,).
        n_clusters: number of clusters, n.
        at_zero: whether offsets may be 0 (`without_offsets`), see the module.
    """
    spare = max(n_clusters - len(theta), 1)
    students = stats.t.ppf(0.975, max(spare, _LEAST_SPARE)) / stats.norm.ppf(0.975)
    least_squares = n_clusters / max(spare - 1, 1) * students**2
    within = 1.0
    if problem.loss == "log_huber" and len(problem) - len(theta) > 1:
        within = penalty_moments(problem, problem.residuals(theta))[0]
    least = _AT_ZERO if at_zero else 1.0
    return float(within * max(least_squares, least) + (1.0 - within) * _DEVIATIONS)


def draw_weights(clusters: Sequence[str], n: int, rng: np.random.Generator, variance: float = 1.0) -> Array:
    """Weights of the rows, (n, rows): a gamma variate for each cluster, scaled to a mean of 1 over the clusters."""
    names, of_row = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    drawn = rng.gamma(1.0 / variance, size=(n, len(names))) + _LEAST
    return (drawn * len(names) / drawn.sum(axis=1, keepdims=True))[:, of_row]


def weights_of(quantiles: Array, variance: float = 1.0) -> Array:
    """The weights of `draw_weights` at given quantiles, (n, clusters), so that another bootstrap may share them."""
    drawn = special.gammaincinv(1.0 / variance, quantiles) + _LEAST
    return drawn * quantiles.shape[1] / drawn.sum(axis=1, keepdims=True)
