"""Least loss of a law over N, R, P and D at a budget, for one set of constants or for many at once.

The cost is a function that is passed in, vectorised. One of the four coordinates follows from the others and the budget
(`solve`), so that the search runs over a box of what is left of (log N, log R, P): a grid, then Newton steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from analysis.box import minimise_in_box
from analysis.budget import Cost, ratios_for_budget, sizes_for_budget, tokens_for_budget
from analysis.laws import Law
from dlcm.errors import UserError

__all__ = ["Cost", "Search", "Solve", "tokens_for_budget"]
Array = np.ndarray
Solve = Literal["D", "N", "R"]
Models = tuple[Array, Array, Array, Array]
"""N, D, R and P."""
Penalty = Callable[[Models, Array], Array]
"""penalty(models, rows): of models (n, m) that belong to the sets of constants `rows`, (n,)."""

_GRID = {0: 1, 1: 65, 2: 33, 3: 17}
_COARSE = {0: 1, 1: 17, 2: 9, 3: 9}
_MANY = 32
"""Sets of constants from which the coarse grid is used: each ends where Newton's steps end, wherever it began."""
_CELLS = 2_000_000
"""Points that are evaluated at once."""
_ROUNDING = 1e-9
_COORDINATES = "NRP"


class Search:
    """A grid of (log N, log R, P) with what the budget leaves for the fourth coordinate, shared by all sets of constants.

    Args:
        law: what is minimised.
        cost: `cost(N, D, R, P)`, in the unit of the budget.
        budget: what may be spent; one number, or one for each set of constants, (S,).
        box: ranges of N, R and P; equal ends hold a coordinate, and arrays (S,) hold it at a value of its own for each set.
        solve: the coordinate that follows from the budget: D; or N, R where the tokens are given. It stays in its range of the
            box as well; of R the least that the budget allows is taken.
        tokens: D where it is not solved for; one number, or (S,).

    Raises:
        UserError: the budget pays for no model in the box, or the cost is not usable.
    """

    def __init__(
        self,
        law: Law,
        cost: Cost,
        budget: float | Array,
        box: Mapping[str, tuple[Any, Any]],
        *,
        solve: Solve = "D",
        tokens: float | Array | None = None,
    ):
        if (tokens is None) != (solve == "D"):
            raise UserError(f"a search for {solve}: the tokens D are {'given' if solve == 'D' else 'not given'}")
        self.law, self.cost, self.solve, self.box = law, cost, solve, box
        self.budget = np.asarray(budget, dtype=float)
        self.tokens_given = None if tokens is None else np.asarray(tokens, dtype=float)
        ends = [tuple(np.asarray(end, dtype=float) for end in box[name]) for name in _COORDINATES]
        if solve in _COORDINATES:
            ends[_COORDINATES.index(solve)] = (np.ones(()), np.ones(()))  # it is no coordinate of the search
        scale = (np.log, np.log, np.asarray)
        self.lower = np.stack(np.broadcast_arrays(*(f(e[0]) for f, e in zip(scale, ends))), axis=-1)
        self.upper = np.stack(np.broadcast_arrays(*(f(e[1]) for f, e in zip(scale, ends))), axis=-1)
        self.open = np.any(np.atleast_2d(self.upper > self.lower), axis=0)
        self.n_open = int(self.open.sum())
        self.steps = (self.upper - self.lower) / max(_GRID[self.n_open] - 1, 1)
        self._tables: dict[int, tuple[Array, tuple[Array, ...]]] = {}

    @property
    def points(self) -> Array:
        """The fine grid, (G, 3), or (S, G, 3) where each set has a box of its own."""
        return self._table(_GRID[self.n_open])[0]

    @property
    def tokens(self) -> Array:
        """D on the fine grid."""
        return self._table(_GRID[self.n_open])[1][1]

    def complete(self, points: Array, rows: Any = None) -> tuple[Array, Array, Array, Array]:
        """N, D, R and P at points (..., 3), one of them from the budget; NaN where the budget pays for no such model.

        Args:
            points: log N, log R, P.
            rows: which sets of constants the first axis of the points belongs to, where budgets or tokens differ between sets.
        """
        N, R, P = np.exp(points[..., 0]), np.exp(points[..., 1]), points[..., 2]
        budget, given = (self._of_rows(v, rows, points.ndim - 1) for v in (self.budget, self.tokens_given))
        if self.solve == "D":
            return N, tokens_for_budget(self.cost, budget, N, R, P), R, P
        D = np.broadcast_to(np.asarray(given, dtype=float), N.shape)
        if self.solve == "N":
            N = sizes_for_budget(self.cost, budget, D, R, P)
            low, high = self.box["N"]
            beyond = (low - N > _ROUNDING * N) | (N - high > _ROUNDING * N)
            return np.where(beyond, np.nan, N), D, R, P
        return N, D, ratios_for_budget(self.cost, budget, N, D, P, self.box["R"]), P

    def tokens_at(self, points: Array) -> Array:
        """D at points (..., 3)."""
        return self.complete(points)[1]

    def losses(self, values: Mapping[str, Any], points: Array, tokens: Array) -> Array:
        """Predicted loss at points (..., 3) and tokens; constants may be arrays that broadcast against the points."""
        return self._losses(values, np.exp(points[..., 0]), tokens, np.exp(points[..., 1]), points[..., 2])

    def minimise(self, values: Mapping[str, float]) -> Array:
        """N, D, R, P and loss where the law at `values` is least."""
        return self.minimise_many({name: np.atleast_1d(v) for name, v in values.items()})[0]

    def minimise_many(
        self,
        values: Mapping[str, Array],
        *,
        coarse: bool | None = None,
        allow_none: bool = False,
        start: Array | None = None,
        penalty: Penalty | None = None,
    ) -> Array:
        """`minimise` for many sets of constants at once, each to about 1e-8 of the ranges.

        Args:
            values: constant -> (S,), or (1,) where budgets, tokens or the box have S rows.
            coarse: begin from the coarse grid; by default where the sets are many.
            allow_none: give an infinite loss where a budget pays for no model, instead of an error.
            start: log N, log R and P to begin from instead of the grid, (S, 3), where they are known nearly.
            penalty: what is added to the loss that is minimised (not to the one that is given), see `Penalty`.

        Returns:
            N, D, R, P and loss, one set a row, (S, 5).

        Raises:
            UserError: the budget pays for no model in the box of one set.
        """
        columns = {name: np.atleast_1d(np.asarray(v, dtype=float)) for name, v in values.items()}
        n = self._n_rows(columns)
        columns = {name: np.broadcast_to(v, (n,)) for name, v in columns.items()}
        coarse = n >= _MANY if coarse is None else coarse
        free = np.flatnonzero(self.open)
        lower, upper = (np.broadcast_to(e, (n, 3)) for e in (self.lower, self.upper))
        if start is None:
            unit = self._start(columns, n, (_COARSE if coarse else _GRID)[self.n_open], allow_none, penalty)
        else:
            unit = np.clip((start - lower)[:, free] / (upper - lower)[:, free], 0.0, 1.0)

        def place(x: Array, rows: Array) -> Array:
            points = np.repeat(lower[rows, None], x.shape[1], axis=1)
            points[..., free] += x * (upper - lower)[rows, None][..., free]
            return points

        def evaluate(x: Array, rows: Array) -> Array:
            at = {name: v[rows, None] for name, v in columns.items()}
            models = self.complete(place(x, rows), rows)
            return _add(self._losses(at, *models), models, rows, penalty)

        rows = np.arange(n)
        x = minimise_in_box(evaluate, unit, 1.0 / max(_COARSE[self.n_open] - 1, 1))
        N, D, R, P = (v[:, 0] for v in self.complete(place(x[:, None], rows), rows))
        return np.column_stack([N, D, R, P, self._losses(columns, N, D, R, P)])

    def _n_rows(self, columns: Mapping[str, Array]) -> int:
        shapes = [v.shape for v in columns.values()]
        return int(np.broadcast_shapes(*shapes, self._own_rows())[0])

    def _own_rows(self) -> tuple[int, ...]:
        """(S,) where budget, tokens or box differ between sets, else ()."""
        given = () if self.tokens_given is None else self.tokens_given.shape
        return np.broadcast_shapes(self.budget.shape, self.lower.shape[:-1], given)

    def _start(
        self, columns: Mapping[str, Array], n: int, size: int, allow_none: bool, penalty: Penalty | None
    ) -> Array:
        """The best point of the grid for each set, in units of the box's open coordinates, (n, n_open)."""
        unit = _unit_grid(self.open, size)
        _, inputs = self._table(size)
        shared = inputs[0].ndim == 1
        best = np.empty(n, dtype=int)
        chunk = max(_CELLS // len(unit), 1)
        for first in range(0, n, chunk):
            rows = np.arange(first, min(first + chunk, n))
            at = {name: v[rows, None] for name, v in columns.items()}
            N, D, R, P = (v if shared else v[rows] for v in inputs)
            models = N, D, R, P
            losses = _add(self._losses(at, *models), models, rows, penalty)
            best[rows] = np.argmin(losses, axis=-1)
            if not (allow_none or np.all(np.isfinite(losses.min(axis=-1)))):
                raise UserError(self._nothing())
        return unit[best][:, self.open]

    def _table(self, size: int) -> tuple[Array, tuple[Array, ...]]:
        """The grid of `size` values a coordinate, and N, D, R, P on it; with a first axis where the sets differ."""
        if size not in self._tables:
            unit = _unit_grid(self.open, size)
            lower, upper = (np.broadcast_to(e, (*self._own_rows(), 3))[..., None, :] for e in (self.lower, self.upper))
            points = lower + unit * (upper - lower)
            self._tables[size] = points, self.complete(points, slice(None))
        return self._tables[size]

    def _nothing(self) -> str:
        least = float(np.min(self.budget))
        ranges = ", ".join(
            f"{name} {np.min(low):.3g} to {np.max(high):.3g}"
            for name, (low, high) in self.box.items()
            if name != self.solve
        )
        given = "" if self.tokens_given is None else f" with D = {np.min(self.tokens_given):.3g}"
        return f"budget = {least:.3g} pays for no model{given} ({ranges}); give a larger budget or wider bounds"

    def _losses(self, values: Mapping[str, Any], N: Array, D: Array, R: Array, P: Array) -> Array:
        """Predicted loss; infinite where the budget pays for no model."""
        variables = self.law.compute_variables({"N": N, "D": D, "R": R, "P": P})
        found = self.law.evaluate(values, variables, gradient=False)[0]
        possible = np.isfinite(N) & np.isfinite(D) & np.isfinite(R)
        shape = np.broadcast_shapes(found.shape, N.shape)
        return np.where(np.broadcast_to(possible, shape) & np.isfinite(found), found, np.inf)

    @staticmethod
    def _of_rows(value: Array | None, rows: Any, n_axes: int) -> Any:
        """A number, or the entries of `rows` with axes for the points behind them."""
        if value is None or value.ndim == 0:
            return value
        found = value if rows is None else value[rows]
        return found.reshape(found.shape + (1,) * (n_axes - found.ndim))


def _add(losses: Array, models: Models, rows: Array, penalty: Penalty | None) -> Array:
    if penalty is None:
        return losses
    N, D, R, P = (np.broadcast_to(v, losses.shape) for v in models)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isfinite(losses), losses + penalty((N, D, R, P), rows), np.inf)


def _unit_grid(is_open: Array, size: int) -> Array:
    axes = [np.linspace(0.0, 1.0, size) if o else np.zeros(1) for o in is_open]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
