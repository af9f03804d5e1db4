"""How fast the best N grows with compute: by a law alone, what hold-outs are held against, and as a slope through optima."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.laws import Law

Array = np.ndarray

_STEP = 1e-3
"""Of the logarithms: the error of the second difference is 1e-7 of the exponent, rounding 1e-9."""


def allocation_exponent(law: Law, values: Mapping[str, Any], at: Mapping[str, float]) -> Array | None:
    """Growth of the best N, d log N* / d log C, where cost goes as N D at fixed R and P: b / (a + b) for a Chinchilla law.

    With s_N = -dL/dlog N and s_D likewise, s_N = s_D holds along the optimum; differentiated along C = N D that gives
    e_D / (e_N + e_D), e = -dlog s/dlog of its own variable. `at` is where the exponents are taken; they depend on it only
    where a law has offsets or two terms in N.

    Args:
        law: a law of N and D whose terms hold one of the two each.
        values: constants; arrays for many sets at once.
        at: the inputs.

    Returns:
        The exponent, one for each set of constants; None where the law lacks N or D. NaN where the loss does not fall.
    """
    if not {"N", "D"} <= set(law.inputs):
        return None
    own = [_local_exponent(law, values, at, name) for name in ("N", "D")]
    with np.errstate(divide="ignore", invalid="ignore"):
        return own[1] / (own[0] + own[1])


def _local_exponent(law: Law, values: Mapping[str, Any], at: Mapping[str, float], name: str) -> Array:
    low, middle, high = (
        law.evaluate(values, law.compute_variables({**at, name: at[name] * np.exp(step)}), gradient=False)[0]
        for step in (-_STEP, 0.0, _STEP)
    )
    slope, curvature = (low - high) / (2 * _STEP), (low - 2 * middle + high) / _STEP**2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(slope > 1e-9 * np.abs(middle), curvature / slope, np.nan)


def weighted_slope(x: Array, y: Array, weights: Array, groups: Array) -> tuple[Array, Array]:
    """Slope of several series on one x, each group of points with an intercept of its own.

    Args:
        x: (k,).
        y: one series a row, (S, k); a NaN is left out.
        weights: of the points, (k,).
        groups: which intercept each point has, (k,).

    Returns:
        The slope of each series, (S,), and what it leaves of y, (S, k).
    """
    known = np.isfinite(y)
    counted, filled = known * weights, np.where(known, y, 0.0)
    from_x, from_y = np.empty_like(filled), np.empty_like(filled)
    for group in np.unique(groups):
        own = groups == group
        total = np.maximum(counted[:, own].sum(axis=1, keepdims=True), 1e-300)
        from_x[:, own] = x[own] - (counted[:, own] * x[own]).sum(axis=1, keepdims=True) / total
        from_y[:, own] = filled[:, own] - (counted[:, own] * filled[:, own]).sum(axis=1, keepdims=True) / total
    slope = (counted * from_x * from_y).sum(axis=1) / np.maximum((counted * from_x**2).sum(axis=1), 1e-300)
    return slope, np.where(known, from_y - slope[:, None] * from_x, np.nan)
