"""What a budget leaves open: the one coordinate of (N, D, R, P) that follows from the other three and cost = budget.

The cost is a function that is passed in and nothing is assumed of its form, only that it rises with D and N and falls with R.
Where it is infinite (no model is so narrow), or a budget is spent before the first token is trained, the answer is NaN.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dlcm.errors import UserError

Array = np.ndarray
Cost = Callable[..., Any]
"""cost(N, D, R, P) -> FLOPs, vectorised, rising in N and D; P = 0 and R = 1 mean a dense model. Infinite where no model is."""

_LOG_SIZES = (np.log(1.0), np.log(1e18))
_EXACT = 1e-12
_AT_END = 1e-6
_JUMP = 1e-3  # steps of the head's width move a cost by less than this


def tokens_for_budget(cost: Cost, budget: Any, N: Any, R: Any, P: Any) -> Array:
    """D with cost(N, D, R, P) = budget, elementwise.

    A secant in log D on what the cost has above its value at D = 0: one step where the cost is affine in D, as it is for packed
    windows of fixed length, with or without tokens that are served afterwards.

    Returns:
        D, NaN where there is no model or the budget does not reach the first token.

    Raises:
        UserError: the cost is not positive and rising in D.
    """
    N, R, P, goal = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (N, R, P, budget)))
    start = np.full(N.shape, 1e6)
    value = price(cost, N, start, R, P)
    with np.errstate(all="ignore"):
        idle = np.broadcast_to(np.asarray(cost(N, np.zeros(N.shape), R, P), dtype=float), N.shape)
    idle = np.where(np.isfinite(idle), idle, 0.0)
    possible = np.isfinite(value) & (idle < goal)
    if np.any(possible & ~(value > idle)):
        raise UserError("cost(N, D, R, P) does not rise with D; check the cost function")
    log_d, slope = np.log(start), np.ones(N.shape)
    for _ in range(60):
        with np.errstate(all="ignore"):
            gap = np.where(possible, np.log((goal - idle) / (value - idle)), 0.0)
            # what is left of a difference of two nearly equal costs is known to that many digits less
            exact = np.maximum(_EXACT, 1e-15 * goal / np.maximum(goal - idle, 1e-300))
        if np.all(np.abs(gap) <= exact):
            return np.where(possible, np.exp(log_d), np.nan)
        moved = price(cost, N, np.exp(log_d + gap / slope), R, P)
        with np.errstate(all="ignore"):
            step = gap / slope
            rise = np.log((moved - idle) / (value - idle)) / step
        slope = np.where(possible & (np.abs(step) > 1e-9) & np.isfinite(rise), rise, slope)
        if not np.all(slope > 1e-3):
            raise UserError("cost(N, D, R, P) does not rise with D; check the cost function")
        log_d, value = log_d + step, moved
    if np.max(np.abs(gap) / exact) > 1e3:
        raise UserError("cost(N, D, R, P) = budget could not be solved for D; check the cost function")
    return np.where(possible, np.exp(log_d), np.nan)


def sizes_for_budget(cost: Cost, budget: Any, D: Any, R: Any, P: Any) -> Array:
    """N with cost(N, D, R, P) = budget, elementwise; NaN where even the narrowest model costs more.

    Raises:
        UserError: the cost is not positive, or does not rise with N up to the budget.
    """
    D, R, P, goal = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (D, R, P, budget)))
    known = np.isfinite(D)

    def gap(log_n: Array) -> Array:
        with np.errstate(divide="ignore"):
            found = np.log(price(cost, np.exp(log_n), np.where(known, D, 1.0), R, P) / goal)
        return np.where(np.isposinf(found), -np.inf, found)  # too narrow a model: look above

    low, high = (np.full(D.shape, end) for end in _LOG_SIZES)
    log_n, left = find_root(gap, low, high, np.full(D.shape, np.log(1e8)))
    if np.any(known & (log_n > high - _AT_END) & (left < 0)):
        raise UserError(
            "cost(N, D, R, P) stays below the budget at any N; check the cost function, or give a smaller budget"
        )
    return np.where(known & (np.abs(left) < _JUMP), np.exp(log_n), np.nan)


def ratios_for_budget(cost: Cost, budget: Any, N: Any, D: Any, P: Any, span: tuple[float, float]) -> Array:
    """The least R of a span with cost(N, D, R, P) <= budget, elementwise; NaN where the largest R costs more.

    At equal N, D and P a smaller R is better: what a law says that has R in it, except where its exponent came out negative.
    """
    N, D, P, goal = np.broadcast_arrays(*(np.asarray(v, dtype=float) for v in (N, D, P, budget)))

    def gap(minus_log_r: Array) -> Array:  # rises with -log R
        with np.errstate(divide="ignore"):
            return np.log(price(cost, N, D, np.exp(-minus_log_r), P) / goal)

    low, high = (np.full(N.shape, -np.log(end)) for end in (span[1], span[0]))
    at_low, at_high = gap(low), gap(high)
    within = (at_low <= 0) & (at_high > 0)
    found, _ = find_root(gap, low, np.where(within, high, low), (low + high) / 2)
    R = np.where(at_high <= 0, span[0], np.exp(-found))
    return np.where(at_low <= 1e-12, R, np.nan)


def price(cost: Cost, N: Any, D: Any, R: Any, P: Any) -> Array:
    """The cost as an array.

    Raises:
        UserError: it is negative, zero or not a number somewhere.
    """
    with np.errstate(all="ignore"):
        value = np.asarray(cost(N, D, R, P), dtype=float)
    if not np.all(value > 0):
        raise UserError(
            "cost(N, D, R, P) is not a positive number everywhere in the search range; check the cost function"
        )
    return np.broadcast_to(value, np.broadcast_shapes(*(np.shape(v) for v in (N, D, R, P))))


def find_root(
    fun: Callable[[Array], Array],
    low: Array,
    high: Array,
    start: Array,
    tolerance: float | Array = 1e-13,
    resolution: float = 4e-16,
) -> tuple[Array, Array]:
    """Where a rising function crosses 0 between `low` and `high`, elementwise: secant steps, halving where they do not help.

    A jump across 0 is found as well, to within `resolution`. `-inf` counts as below. Ends where the function is within
    `tolerance` of 0.

    Returns:
        The place, and what the function has there.
    """
    low, high = low.copy(), high.copy()
    x = np.clip(start, low, high)
    y = fun(x)
    slope, stalled = np.ones_like(x), np.zeros(x.shape, dtype=bool)
    for _ in range(200):
        low, high = np.where(y <= 0, x, low), np.where(y > 0, x, high)
        with np.errstate(all="ignore"):
            guess = x - y / slope
        middle = (low + high) / 2
        following = np.where(~stalled & (guess > low) & (guess < high), guess, middle)
        done = (np.abs(y) < tolerance) | (high - low < resolution * np.maximum(np.abs(x), 1.0))
        if np.all(done):
            break
        following = np.where(done, x, following)
        value = fun(following)
        with np.errstate(all="ignore"):
            rise = (value - y) / (following - x)
        # outside this range a secant says more of a jump, or of rounding, than of a slope
        slope = np.where(np.isfinite(rise) & (rise > 0.05) & (rise < 20.0), rise, slope)
        stalled = ~(np.abs(value) < np.abs(y) / 2)
        x, y = following, value
    return x, y
