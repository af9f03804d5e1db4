"""The least value of smooth functions in the unit box, for many functions at once: a trust-region Newton method.

Derivatives are finite differences of fourth order whose points lie inside the box, to one side of a place on an end of it, so
that a function need not exist outside, and an optimum on an end is as exact as one within.
The quadratic model is minimised exactly in the box and the trust region together, by trying which coordinates lie on an end.
Where that does not help (a kink, or a place where the function is infinite) a pattern of points around the best one does.
"""

import itertools
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Function = Callable[[Array, Array], Array]
"""f(points, rows): points (n, m, k) in the unit box, of the functions `rows` (n,) -> values (n, m); infinite where undefined."""

_STEP = 2e-3
_LEAST_STEP = 1e-5
_ROUNDS = 60
_SMALL = 1e-9
_ROUNDING_STEP = 1e-4
"""Steps longer than this are not those of rounding."""
_NOISE = 1e-14
"""Relative rounding of values: a cost that is solved for the tokens left after serving loses some digits."""
_PATIENCE = 3
"""Rounds after which a function that was infinite wherever it was tried is given up."""


def minimise_in_box(function: Function, start: Array, radius: float) -> Array:
    """Where each function is least near its start.

    Args:
        function: values at points, see `Function`.
        start: (n, k), in the unit box; a start may be improved from anywhere the function is finite.
        radius: trust radius to begin with.

    Returns:
        (n, k).
    """
    x = start.copy()
    n, k = x.shape
    if not (n and k):
        return x
    value = function(x[:, None], np.arange(n))[:, 0]
    r = np.full(n, radius)
    last, active = np.full(n, np.inf), np.arange(n)
    for round_ in range(_ROUNDS):
        here, size = x[active], r[active]
        radius_of_step, before = size.copy(), value[active].copy()
        target, known = _newton_target(function, here, size, active)
        moves = np.stack([target, (here + target) / 2], axis=1)
        found = function(moves, active)
        pick = np.argmin(found, axis=1)
        # close to the least value, rounding decides between two values: the model knows better
        noise = _NOISE * np.abs(value[active])
        pick = np.where(
            found[:, 0] <= value[active] + noise, np.where(found[:, 0] <= found[:, 1] + noise, 0, pick), pick
        )
        best = np.take_along_axis(found, pick[:, None], axis=1)[:, 0]
        taken = np.logical_and(known, best <= value[active] + noise)
        failed = np.flatnonzero(~taken)
        following = np.where(taken[:, None], np.take_along_axis(moves, pick[:, None, None], axis=1)[:, 0], here)
        if failed.size:
            following[failed], best[failed], better = _pattern(
                function, here[failed], size[failed], active[failed], value
            )
            size[failed] = np.where(better, size[failed], size[failed] / 4)
        moved = np.max(np.abs(following - here), axis=1)
        size = np.where(taken & (moved >= 0.99 * size), np.minimum(2 * size, 0.5), size)
        x[active], value[active], r[active] = following, np.where(taken, best, np.minimum(best, value[active])), size
        # a step so short is the last, also where rounding hides whether it helps; unless the trust region made it short
        step = np.max(np.abs(target - here), axis=1)
        close = known & (step < _SMALL) & (step < 0.99 * radius_of_step)
        # steps that neither shrink nor help are those of rounding
        with np.errstate(invalid="ignore"):
            idle = taken & (step > last[active] / 2) & (best > before - noise) & (step < _ROUNDING_STEP)
        last[active] = step
        lost = np.isinf(value[active]) & (round_ >= _PATIENCE)
        ended = close | idle | (size < _SMALL) | lost
        active = active[~ended]
        if not active.size:
            break
    return x


def _pattern(function: Function, x: Array, r: Array, rows: Array, value: Array) -> tuple[Array, Array, Array]:
    """The best of the points around x at the distance r; whether it is better than x."""
    k = x.shape[1]
    offsets = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=k)))
    points = np.clip(x[:, None] + offsets * r[:, None, None], 0.0, 1.0)
    found = function(points, rows)
    pick = np.argmin(found, axis=1)
    best = np.take_along_axis(found, pick[:, None], axis=1)[:, 0]
    better = best < value[rows]
    point = np.take_along_axis(points, pick[:, None, None], axis=1)[:, 0]
    return np.where(better[:, None], point, x), np.where(better, best, value[rows]), better


def _newton_target(function: Function, x: Array, r: Array, rows: Array) -> tuple[Array, Array]:
    """Where the quadratic model is least in the box and within r of x; whether there is a model."""
    h = np.clip(r / 4, _LEAST_STEP, _STEP)
    gradient, hessian = _derivatives(function, x, h, rows)
    known = np.isfinite(np.concatenate([gradient, hessian.reshape(len(x), -1)], axis=1)).all(axis=-1)
    known = np.asarray(known)
    gradient[~known], hessian[~known] = 0.0, np.eye(x.shape[1])
    sizes, axes = np.linalg.eigh(hessian)
    sizes = np.abs(sizes)
    sizes = np.maximum(sizes, np.maximum(1e-9 * sizes.max(axis=1, keepdims=True), 1e-14))
    hessian = np.einsum("nij,nj,nkj->nik", axes, sizes, axes)
    low, high = np.maximum(x - r[:, None], 0.0), np.minimum(x + r[:, None], 1.0)
    target = _least_of_model(gradient, hessian, low - x, high - x) + x
    return np.where(known[:, None], np.clip(target, low, high), x), known


def _stencils() -> tuple[Array, Array, Array]:
    """Four points beside 0 for each shift -2 .. 2, and the weights of 0 and these in both derivatives at 0, steps of 1.

    The five points from shift - 2 to shift + 2 hold 0; a quartic through them gives the derivatives.
    """
    nodes = np.array([[k for k in range(shift - 2, shift + 3) if k] for shift in range(-2, 3)], dtype=float)
    powers = np.concatenate([np.zeros((5, 1)), nodes], axis=1)[:, None, :] ** np.arange(5)[None, :, None]
    weights = np.linalg.inv(powers)  # column m: weights of the coefficient of x^m
    return nodes, weights[:, :, 1], 2 * weights[:, :, 2]


_NODES, _FIRST, _SECOND = _stencils()


def _derivatives(function: Function, x: Array, h: Array, rows: Array) -> tuple[Array, Array]:
    """Gradient and curvatures to fourth order (curvatures on an end to third), mixed derivatives to second: (n, k), (n, k, k).

    A mixed derivative is 2 m(h) - m(2h), where m(h) = (f(h, h) - f(h, 0) - f(0, h) + f(0, 0)) / h**2, steps towards the inside.
    """
    n, k = x.shape
    pairs = list(itertools.combinations(range(k), 2))
    below, above = np.ceil(2 - x / h[:, None]), np.ceil(2 - (1 - x) / h[:, None])
    shift = (np.clip(below, 0, 2) - np.clip(above, 0, 2)).astype(int) + 2
    nodes = _NODES[shift]  # (n, k, 4)
    inwards = np.where(shift < 2, -1.0, 1.0)
    offsets = np.zeros((n, 1 + 4 * k + 2 * len(pairs), k))
    for i in range(k):
        offsets[:, 1 + 4 * i : 5 + 4 * i, i] = nodes[:, i]
    for m, pair in enumerate(pairs):
        for far in (1, 2):
            offsets[:, 4 * k + 2 * m + far, pair] = far * inwards[:, pair]
    values = function(np.clip(x[:, None] + offsets * h[:, None, None], 0.0, 1.0), rows)
    gradient, hessian = np.empty((n, k)), np.empty((n, k, k))
    beside = np.empty((2, n, k))  # one and two steps inwards
    with np.errstate(invalid="ignore"):
        for i in range(k):
            own = values[:, [0, *range(1 + 4 * i, 5 + 4 * i)]]
            gradient[:, i] = np.einsum("np,np->n", _FIRST[shift[:, i]], own) / h
            hessian[:, i, i] = np.einsum("np,np->n", _SECOND[shift[:, i]], own) / h**2
            for far in (1, 2):
                at = nodes[:, i] == far * inwards[:, i, None]
                beside[far - 1, :, i] = own[:, 1:][at]
        for m, (i, j) in enumerate(pairs):
            once, twice = (
                values[:, 4 * k + 2 * m + far] - beside[far - 1, :, i] - beside[far - 1, :, j] + values[:, 0]
                for far in (1, 2)
            )
            mixed = (2 * once - twice / 4) * inwards[:, i] * inwards[:, j] / h**2
            hessian[:, i, j] = hessian[:, j, i] = mixed
    return gradient, hessian


def _least_of_model(gradient: Array, hessian: Array, low: Array, high: Array) -> Array:
    """The least of g'd + d'Hd/2 with low <= d <= high, H positive definite: each coordinate is free or on an end."""
    n, k = gradient.shape
    patterns = np.array(list(itertools.product((0, 1, 2), repeat=k)))  # free, low, high
    is_free = patterns == 0
    ends = np.where(patterns == 1, low[:, None], np.where(patterns == 2, high[:, None], 0.0))  # (n, patterns, k)
    both = is_free[:, :, None] & is_free[:, None, :]
    system = np.where(both, hessian[:, None], 0.0) + np.where(is_free[:, :, None], 0.0, np.eye(k))
    pushed = gradient[:, None] + np.einsum("nij,npj->npi", hessian, ends)
    right = np.where(is_free, -pushed, ends)
    d = np.linalg.solve(system, right[..., None])[..., 0]
    slack = 1e-12
    fits = ((d >= low[:, None] - slack) & (d <= high[:, None] + slack)).all(axis=-1)
    model = np.einsum("ni,npi->np", gradient, d) + np.einsum("npi,nij,npj->np", d, hessian, d) / 2
    pick = np.argmin(np.where(fits, model, np.inf), axis=1)
    return d[np.arange(n), pick]
