"""Tests of a law against its own reductions: does what the larger law adds describe the runs, or their noise?"""

import dataclasses

import numpy as np
from scipy import stats

from analysis.ensemble import refit_many
from analysis.laws import Law
from analysis.objective import Problem

Array = np.ndarray

MIN_CLUSTERS = 6
"""Fewer give at most 32 patterns of signs, too few for a probability."""
_TINY = 1e-3
"""Share of the loss that a term has at the centre where a descent starts from a law that lacks it."""


@dataclasses.dataclass(frozen=True)
class NestedTest:
    """Smaller against larger law, by the sums of squared log residuals.

    Attributes:
        f: F statistic with (n_extra, n_spare) degrees of freedom.
        p: its probability if the smaller law holds and errors are normal and independent.
        p_resampled: the same by the wild bootstrap, which needs neither; None where clusters are few.
    """

    small: str
    large: str
    f: float
    n_extra: int
    n_spare: int
    p: float
    p_resampled: float | None

    @property
    def probability(self) -> float:
        """The resampled one where there is one: an offset of 0 lies on a bound, and there F's own is not right."""
        return self.p if self.p_resampled is None else self.p_resampled

    def describe(self) -> str:
        """`A within B: F(1, 19) = 12.3, p = 0.002`."""
        p = self.probability
        how = "resampled" if self.p_resampled is not None else "by F"
        return (
            f"{self.small} within {self.large}: F({self.n_extra}, {self.n_spare}) = {self.f:.3g}, p = {p:.2g} {how}: "
            + ("the larger law is needed" if p < 0.05 else "the smaller law is not rejected")
        )


def is_nested(small: Law, large: Law) -> bool:
    """Whether `small` was made from `large` by further changes."""
    return small.name == large.name and len(small.free) < len(large.free) and set(large.changes) < set(small.changes)


def nested_test(
    small: Problem,
    large: Problem,
    thetas: tuple[Array, Array],
    clusters: list[str],
    rng: np.random.Generator,
    *,
    labels: tuple[str, str],
    n_draws: int = 199,
) -> NestedTest:
    """Test a reduction against its law.

    The wild bootstrap draws observations from the smaller law: its residuals, with the sign of each cluster drawn anew
    (Cameron, Gelbach and Miller 2008), and fits both. It holds for errors that grow or that a trunk shares, and where a
    constant of the larger law lies on a bound.

    Args:
        small: the reduction's problem under `log_mse`.
        large: the law's, on the same runs.
        thetas: their answers.
        clusters: what errs together, one name a row.
        rng: source of the signs.
        labels: what to call the two.
        n_draws: sets of observations; 0 for the F distribution alone.
    """
    n_extra, n_spare = len(thetas[1]) - len(thetas[0]), len(large) - len(thetas[1])
    rss = [float(np.sum(p.residuals(t) ** 2)) for p, t in zip((small, large), thetas)]
    f = _statistic(np.array(rss[0]), np.array(rss[1]), n_extra, n_spare)
    p = float(stats.f.sf(f, n_extra, n_spare)) if n_spare > 0 else float("nan")
    resampled = None
    names, of_row = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    if n_draws and n_spare > 0 and len(names) >= MIN_CLUSTERS:
        signs = rng.choice([-1.0, 1.0], size=(n_draws, len(names)))[:, of_row]
        residuals = small.residuals(thetas[0])
        targets = small.target * np.exp(residuals) * np.exp(-signs * residuals)
        null = refit_many(small, thetas[0], targets=targets)[1]
        starts = (embed(small, thetas[0], large), thetas[1])
        full = np.min([refit_many(large, start, targets=targets)[1] for start in starts], axis=0)
        drawn = _statistic(null, np.minimum(full, null), n_extra, n_spare)
        resampled = float((1 + np.sum(drawn >= f)) / (1 + n_draws))
    return NestedTest(*labels, float(f), n_extra, n_spare, p, resampled)


def _statistic(small: Array, large: Array, n_extra: int, n_spare: int) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(small - large, 0.0) / n_extra / (large / max(n_spare, 1))


def embed(small: Problem, theta: Array, large: Problem) -> Array:
    """The smaller law's answer in the larger law's coordinates, terms that it lacks almost off; (p of the larger,)."""
    values = dict(small.values(theta))
    start = dict.fromkeys((p.name for p in large.law.parameters), 0.0)
    for p in large.law.parameters:
        if p.kind == "exponent":
            start[p.name] = 1 / 3
    start |= values
    for change in reversed([c for c in small.law.changes if c not in large.law.changes]):
        if change.op == "tie":
            start[change.parameter] = start[str(change.other)]
    there = large.theta(start)
    for i, p in enumerate(large.law.free):
        if p.kind == "amplitude" and p.name not in values:
            there[i] = np.log(_TINY)
    return there
