"""Least loss of a law over (N, R, P) at a budget, for one set of constants or for many at once.

The cost is a function that is passed in (training FLOPs of a shape, vectorised); D follows from the other three and the
budget, so the search runs over a box of (log N, log R, P).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import optimize

from analysis.laws import Law
from dlcm.errors import UserError

Array = np.ndarray
Cost = Callable[..., Any]
"""cost(N, D, R, P) -> training FLOPs, vectorised, rising in D; P = 0 and R = 1 mean a dense model."""

_GRID = 17
_GRID_1D = 65
_ZOOM_ROUNDS = 8
_ZOOM = np.linspace(-1.0, 1.0, 5)


class Search:
    """A grid of (log N, log R, P) with the D that the budget buys, shared by every set of constants that is searched for.

    Args:
        law: what is minimised.
        cost: training FLOPs, `cost(N, D, R, P)`.
        budget: training FLOPs to spend.
        box: ranges of N, R and P; equal ends hold a coordinate.
    """

    def __init__(self, law: Law, cost: Cost, budget: float, box: Mapping[str, tuple[float, float]]):
        self.law, self.cost, self.budget = law, cost, budget
        self.lower = np.array([np.log(box["N"][0]), np.log(box["R"][0]), box["P"][0]])
        self.upper = np.array([np.log(box["N"][1]), np.log(box["R"][1]), box["P"][1]])
        self.open = self.upper > self.lower
        n = _GRID_1D if self.open.sum() == 1 else _GRID
        axes = [np.linspace(lo, hi, n if o else 1) for lo, hi, o in zip(self.lower, self.upper, self.open)]
        self.points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        self.steps = (self.upper - self.lower) / max(n - 1, 1)
        self.tokens = self.tokens_at(self.points)

    def tokens_at(self, points: Array) -> Array:
        """D that the budget buys at points (..., 3)."""
        flat = points.reshape(-1, 3)
        found = tokens_for_budget(self.cost, self.budget, np.exp(flat[:, 0]), np.exp(flat[:, 1]), flat[:, 2])
        return found.reshape(points.shape[:-1])

    def losses(self, values: Mapping[str, Any], points: Array, tokens: Array) -> Array:
        """Predicted loss at points (..., 3); constants may be arrays that broadcast against the points."""
        N, R, P = np.exp(points[..., 0]), np.exp(points[..., 1]), points[..., 2]
        variables = self.law.compute_variables({"N": N, "D": tokens, "R": R, "P": P})
        found = self.law.evaluate(values, variables, gradient=False)[0]
        return np.broadcast_to(found, np.broadcast_shapes(found.shape, N.shape))

    def minimise(self, values: Mapping[str, float]) -> Array:
        """N, D, R, P and loss where the law at `values` is least: grid, then a descent inside the neighbouring cells."""
        point = self.points[int(np.argmin(self.losses(values, self.points, self.tokens)))].copy()
        if self.open.any():
            point = self._polish(values, point)
        tokens = self.tokens_at(point[None])
        loss = float(self.losses(values, point[None], tokens)[0])
        return np.array([np.exp(point[0]), tokens[0], np.exp(point[1]), point[2], loss])

    def minimise_many(self, values: Mapping[str, Array]) -> Array:
        """`minimise` for many sets of constants at once, to 1/4096 of each range.

        Args:
            values: constant -> (S,).

        Returns:
            N, D, R, P and loss, one set a row, (S, 5).
        """
        columns = {name: np.asarray(v, dtype=float)[:, None] for name, v in values.items()}
        best = self.points[np.argmin(self.losses(columns, self.points, self.tokens), axis=-1)]
        axes = [_ZOOM if is_open else np.zeros(1) for is_open in self.open]
        offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        steps = self.steps
        for _ in range(_ZOOM_ROUNDS if self.open.any() else 1):
            points = np.clip(best[:, None] + offsets * steps, self.lower, self.upper)
            losses = self.losses(columns, points, self.tokens_at(points))
            best = np.take_along_axis(points, np.argmin(losses, axis=1)[:, None, None], axis=1)[:, 0]
            steps = steps / 2
        tokens = self.tokens_at(best)
        loss = self.losses(columns, best[:, None], tokens[:, None])[:, 0]
        return np.column_stack([np.exp(best[:, 0]), tokens, np.exp(best[:, 1]), best[:, 2], loss])

    def _polish(self, values: Mapping[str, float], start: Array) -> Array:
        free = np.flatnonzero(self.open)
        width = (self.upper - self.lower)[free]

        def place(x: Array) -> Array:
            points = np.broadcast_to(start, (*x.shape[:-1], 3)).copy()
            points[..., free] = self.lower[free] + x * width
            return points

        def value_and_slope(x: Array) -> tuple[float, Array]:
            # central differences, all in one vectorised call; 1e-5 of the range keeps their error below 1e-9
            h = 1e-5
            moves = np.vstack([np.zeros(len(free)), h * np.eye(len(free)), -h * np.eye(len(free))])
            points = place(x + moves)
            losses = self.losses(values, points, self.tokens_at(points))
            n = len(free)
            return float(losses[0]), (losses[1 : n + 1] - losses[n + 1 :]) / (2 * h)

        x0 = (start[free] - self.lower[free]) / width
        low = np.clip(x0 - 2 * self.steps[free] / width, 0, 1)
        high = np.clip(x0 + 2 * self.steps[free] / width, 0, 1)
        scale = 1e-3 * abs(value_and_slope(x0)[0])
        answer = optimize.minimize(
            lambda x: tuple(v / scale for v in value_and_slope(x)),
            x0,
            jac=True,
            method="L-BFGS-B",
            bounds=np.column_stack([low, high]),
            options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 200},
        )
        better = value_and_slope(np.clip(answer.x, 0, 1))[0] <= value_and_slope(x0)[0]
        return place(np.clip(answer.x, 0, 1)) if better else start


def tokens_for_budget(cost: Cost, budget: float, N: Array, R: Array, P: Array) -> Array:
    """D with cost(N, D, R, P) = budget, elementwise.

    One step where the cost is proportional to D, as it is for packed windows of fixed length; a secant in log D otherwise.

    Raises:
        UserError: the cost is not positive and rising in D.
    """
    log_d = np.full(np.shape(N), np.log(1e6))
    goal = np.log(budget)
    slope = np.ones_like(log_d)
    for _ in range(60):
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            value = np.log(np.asarray(cost(N, np.exp(log_d), R, P), dtype=float))
        if not np.all(np.isfinite(value)):
            raise UserError(
                "cost(N, D, R, P) is not a positive number everywhere in the search range; check the cost function"
            )
        gap = goal - value
        if np.max(np.abs(gap)) < 1e-12:
            return np.exp(log_d)
        step = gap / slope
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            moved = np.log(np.asarray(cost(N, np.exp(log_d + step), R, P), dtype=float)) - value
            slope = np.where(np.abs(step) > 1e-9, moved / step, slope)
        if not np.all(slope > 1e-3):
            raise UserError("cost(N, D, R, P) does not rise with D; check the cost function")
        log_d = log_d + gap / slope
    if np.max(np.abs(gap)) > 1e-9:
        raise UserError("cost(N, D, R, P) = budget could not be solved for D; check the cost function")
    return np.exp(log_d)
