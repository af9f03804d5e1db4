"""Where noisy curves have their minima: local fits to the points around each, for many sets of values at once.

A parabola through all points of an isoFLOP curve is biased, since the curve is steeper on one side, and the bias moves with the
sizes that happen to have been run. An interpolating curve (Akima, PCHIP) has no bias, but its minimum is that of the noise: at
0.2% noise its error is several times that of a fit. In between, points count less the farther they lie from the vertex
(Epanechnikov's kernel), the window follows the vertex until it stays, and the curve may be skew.

The skew, third over second derivative at the minimum, is shared by the curves of several budgets: a sum of powers
a x^-alpha + b x^beta has beta - alpha there, whatever a and b are. A cubic for each curve would cost far more certainty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray

REACH = float(np.log(8.0))
"""Half-width of the window in log N, log R or the log odds of P: values within a factor 8. Half the weight lies within 3."""
_NEAREST = 5
"""The window holds so many levels at least."""
_ROUNDS = 30
_STAYS = 1e-6
_MOST_LEVERAGE = 0.95
_MOST_SKEW = 0.8
"""So skew a cubic turns down at the end of the window."""


@dataclasses.dataclass(frozen=True, eq=False)
class Vertex:
    """Minima of S curves over the same points.

    Attributes:
        place: where, (S,). NaN where the curve has none: it does not bend upwards, or the window never came to rest.
        height: the fitted value there, (S,). curvature: second derivative, (S,), also where there is no minimum.
        weights: what each point counted, (S, n), 0 outside the window.
        skew: third over second derivative, (S,), as it was given.
    """

    place: Array
    height: Array
    curvature: Array
    weights: Array
    skew: Array


def find_vertex(x: Array, y: Array, skew: Any = 0.0) -> Vertex:
    """The minimum by a local fit of  h + c (t^2 + skew t^3 / 3) / 2,  t = x - place.

    Args:
        x: places of the points, (n,), of at least three distinct values.
        y: values, (S, n).
        skew: one number, or (S,); 0 for a parabola.

    Returns:
        Vertices; they may lie outside the points by up to half the points' range.
    """
    levels, span = np.unique(x), float(np.ptp(x))
    low, high = x.min() - span / 2, x.max() + span / 2
    skew = np.broadcast_to(np.asarray(skew, dtype=float), (len(y),))
    centre = np.full(len(y), x.mean())
    weights = np.ones_like(y)
    found = whole = _fit(x, y, weights, centre, np.zeros(len(y)))
    lowest = x[np.argmin(y, axis=1)]
    with np.errstate(all="ignore"):
        place = np.where(whole[:, 2] > 0, centre - whole[:, 1] / (2 * whole[:, 2]), lowest)
    place = np.clip(place, x.min(), x.max())
    moved = np.full(len(y), np.inf)
    for _ in range(_ROUNDS):
        weights = _window(x, levels, place)
        found = _fit(x, y, weights, place, skew)
        with np.errstate(all="ignore"):
            step = np.where(found[:, 2] > 0, -found[:, 1] / (2 * found[:, 2]), np.nan)
        following = np.clip(place + np.where(np.isfinite(step), step, 0.0), low, high)
        moved = np.where(np.isfinite(step), np.abs(following - place), np.inf)
        if np.all(~np.isfinite(moved) | (moved < _STAYS)):
            break
        place = following
    ends = (place <= low) | (place >= high)
    is_minimum = (moved < 1e3 * _STAYS) & ~ends
    return Vertex(np.where(is_minimum, place, np.nan), found[:, 0], 2 * found[:, 2], weights, skew)


def find_vertices(xs: Sequence[Array], ys: Sequence[Array]) -> list[Vertex]:
    """Minima of several curves with the skew that they share, S sets of values each.

    Args:
        xs: places of the points of each curve, (n_i,).
        ys: values, (S, n_i) each.
    """
    parabolas = [find_vertex(x, y) for x, y in zip(xs, ys)]
    skew = shared_skew(xs, ys, parabolas) if xs else 0.0
    return [find_vertex(x, y, skew) for x, y in zip(xs, ys)]


def shared_skew(xs: Sequence[Array], ys: Sequence[Array], vertices: Sequence[Vertex]) -> Array:
    """The skew that several curves have in common, (S,); 0 where fewer than two have a minimum.

    A cubic is fitted in the window of each; the third derivatives are regressed on the second, weighted by how well equal errors
    would leave them.

    Args:
        xs: places of the points of each curve, (n_i,).
        ys: values, (S, n_i) each.
        vertices: S of each curve.
    """
    above, below, counted = (np.zeros(len(ys[0])) for _ in range(3))
    for x, y, vertex in zip(xs, ys, vertices):
        known = np.isfinite(vertex.place) & (vertex.curvature > 0)
        if len(np.unique(x)) < _NEAREST or not known.any():
            continue
        place = np.where(known, vertex.place, x.mean())
        powers = (x - place[:, None])[..., None] ** np.arange(4)
        weighted = (powers * vertex.weights[..., None]).transpose(0, 2, 1)
        # as many levels as a cubic has constants, or more, are in each window; rounding may still leave it singular
        smoother = np.linalg.pinv(weighted @ powers, hermitian=True) @ weighted
        found = (smoother @ y[..., None])[..., 0]
        certainty = np.where(known, 1 / np.maximum(np.sum(smoother[:, 3] ** 2, axis=1), 1e-300), 0.0)
        above += certainty * 3 * found[:, 3] * found[:, 2]
        below += certainty * found[:, 2] ** 2
        counted += known
    with np.errstate(all="ignore"):
        skew = np.where((counted >= 2) & (below > 0), above / below, 0.0)
    return np.clip(skew, -_MOST_SKEW, _MOST_SKEW)


def whole_parabola_vertex(x: Array, y: Array) -> float:
    """The minimum of a parabola through all points of one curve, (n,): the usual way, and biased. NaN where it has none."""
    centre = float(x.mean())
    found = _fit(x, y[None], np.ones((1, len(x))), np.array([centre]), np.zeros(1))
    _, slope, curvature = found[0]
    return centre - slope / (2 * curvature) if curvature > 0 else float("nan")


def local_line(x: Array, values: Array, vertex: Vertex) -> Array:
    """Value at each vertex of another quantity that goes smoothly with x, (S,): a line fitted in the same window.

    Args:
        x: places of the points, (n,).
        values: the quantity, (n,).
        vertex: where, and with which weights.
    """
    place = np.where(np.isfinite(vertex.place), vertex.place, x.mean())
    columns = (x - place[:, None])[..., None] ** np.arange(2)
    spread = np.broadcast_to(values, vertex.weights.shape)
    return np.where(np.isfinite(vertex.place), _least_squares(columns, spread, vertex.weights)[:, 0], np.nan)


def residuals(x: Array, y: Array, vertex: Vertex) -> tuple[Array, Array]:
    """Residuals of the first curve's window, and the same over 1 - leverage, each (n,); 0 outside the window.

    So scaled (HC3) the bootstrap has the right width although three constants were fitted to a few points.
    """
    weights = vertex.weights[0]
    columns, smoother = _smoother(x, vertex)
    leverage = np.einsum("ni,in->n", columns, smoother)
    plain = np.where(weights > 0, y[0] - columns @ (smoother @ y[0]), 0.0)
    return plain, plain / (1 - np.minimum(leverage, _MOST_LEVERAGE))


def unit_error(x: Array, vertex: Vertex) -> float:
    """Standard error of the first curve's vertex under errors of standard deviation 1 that are alike everywhere.

    With place = -slope / curvature: the error of the slope over the curvature. What a curve's own residuals say of its error
    is too uncertain to weight vertices by, at so few points.
    """
    return float(np.linalg.norm(_smoother(x, vertex)[1][1]) / vertex.curvature[0])


def _smoother(x: Array, vertex: Vertex) -> tuple[Array, Array]:
    """Columns of the first curve's fit, (n, 3), and what takes values to its constants, (3, n)."""
    columns = _columns(x, vertex.place[:1], vertex.skew[:1])[0]
    weighted = (columns * vertex.weights[0][:, None]).T
    return columns, np.linalg.pinv(weighted @ columns, hermitian=True) @ weighted


def _window(x: Array, levels: Array, place: Array) -> Array:
    """Epanechnikov's kernel around each place, (S, n)."""
    distances = np.sort(np.abs(levels - place[:, None]), axis=1)
    nearest = distances[:, min(_NEAREST, len(levels)) - 1]
    reach = np.maximum(REACH, 1.25 * nearest)
    return np.clip(1 - ((x - place[:, None]) / reach[:, None]) ** 2, 0.0, None)


def _columns(x: Array, centre: Array, skew: Array) -> Array:
    """1, t and t^2 + skew t^3 / 3 with t = x - centre, (S, n, 3)."""
    t = x - centre[:, None]
    return np.stack([np.ones_like(t), t, t**2 + skew[:, None] * t**3 / 3], axis=-1)


def _fit(x: Array, y: Array, weights: Array, centre: Array, skew: Array) -> Array:
    """Constants of the local fit, one row a curve, (S, 3)."""
    return _least_squares(_columns(x, centre, skew), y, weights)


def _least_squares(columns: Array, y: Array, weights: Array) -> Array:
    """Weighted least squares of y (S, n) on columns (S, n, k): (S, k)."""
    weighted = (columns * weights[..., None]).transpose(0, 2, 1)
    left, right = weighted @ columns, weighted @ y[..., None]
    try:
        return np.linalg.solve(left, right)[..., 0]
    except np.linalg.LinAlgError:  # points of too few places leave a direction open: the least solution then
        return (np.linalg.pinv(left, hermitian=True) @ right)[..., 0]
