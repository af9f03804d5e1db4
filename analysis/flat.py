"""Flat directions of an optimum: how far one coordinate may be moved, the others chosen again, before the loss rises."""

import dataclasses
from collections.abc import Callable

import numpy as np

from analysis.allocation import Allocation
from analysis.budget import find_root
from analysis.search import Models

Array = np.ndarray

THRESHOLD = 1e-3
"""Relative rise of the predicted loss that counts as none."""
_EXACT = 1e-8  # of the threshold
_JUMP = 1e-6
_STIFF, _PUSH = 5.0, 100.0  # in units of the loss
_NEAREST, _FARTHEST = 1e-7, 10.0
"""Of the distance to what is searched last: where the centre of the spring may be."""
_BEFORE = np.array([0.25, 0.5, 0.75])
_TRIES = 4
_SHARE = "NDRP".index("P")


@dataclasses.dataclass(frozen=True)
class FlatRange:
    """The values of one coordinate that cost less than `threshold` of the loss, the others re-optimised at the budget.

    Attributes:
        low: least value. high: largest.
        low_open: whether the range was cut at the edge of what was searched, and may reach on. high_open: likewise.
        threshold: relative rise of the predicted loss at the ends.
    """

    name: str
    low: float
    high: float
    low_open: bool
    high_open: bool
    threshold: float

    def describe(self) -> str:
        """`any P in 0.48 to 0.66 costs < 0.1% loss`."""
        edge = describe_cut((self.low_open, self.high_open))
        return f"any {self.name} in {self.low:.3g} to {self.high:.3g} costs < {100 * self.threshold:g}% loss{edge}"


def describe_cut(ends: tuple[bool, bool]) -> str:
    """Which ends of a range, lower and upper, are the edge of what was searched; empty where none is."""
    cut = [name for name, is_cut in zip(("lower", "upper"), ends) if is_cut]
    return f" ({' and '.join(cut)} end: edge of what was searched)" if cut else ""


def flat_ranges(problem: Allocation, best: Array, threshold: float = THRESHOLD) -> tuple[FlatRange, ...]:
    """The flat range of each coordinate that is free to move, at the fit's constants.

    Args:
        problem: what was optimised.
        best: its N, D, R, P and loss.
        threshold: relative rise of the loss that is allowed.
    """
    names: list[str] = [name for name in "NDRP" if name == problem.solve or problem.is_open(name)]
    if len(names) < 2:
        return ()
    ends = _Ends(problem, best, names, threshold)
    values, cut = ends.find()
    pairs = zip(names, values.reshape(-1, 2).tolist(), cut.reshape(-1, 2).tolist())
    return tuple(FlatRange(name, low, high, is_cut[0], is_cut[1], threshold) for name, (low, high), is_cut in pairs)


class _Ends:
    """Both ends of the flat range of every coordinate, one a row, all sought at once.

    With x = log N, log D, log R or P, the place where L + k (x - c)**2 / 2 is least has the least L of all places with its x:
    nothing needs to be held or solved for x. As c moves away from the optimum x and L follow smoothly; k is so stiff that they
    do where L is concave in x, too. The end is at the c whose place has L = (1 + threshold) L*.
    """

    def __init__(self, problem: Allocation, best: Array, names: list[str], threshold: float):
        self.problem, self.best, self.scale = problem, best, np.log1p(threshold)
        self.column = np.repeat(["NDRP".index(name) for name in names], 2)
        self.sign = np.tile([-1.0, 1.0], len(names))

    def find(self) -> tuple[Array, Array]:
        """Values at the ends, and which of them are the end of what is searched."""
        everyone = np.arange(len(self.sign))
        places = self._least(everyone, lambda x, _: -_PUSH * self.best[4] * x, None)
        cut = self._rises(places) <= 1
        rows = np.flatnonzero(~cut)
        beyond = places.copy()
        for _ in range(_TRIES):
            if not rows.size:
                break
            places[rows] = self._at_the_threshold(rows, beyond[rows])
            on_the_way, above = self._on_the_way(rows, places[rows])
            # the loss was above the threshold before: there is an end nearer to the optimum
            rows, beyond[rows] = rows[above], on_the_way
        return places[everyone, self.column], cut

    def _at_the_threshold(self, rows: Array, beyond: Array) -> Array:
        """Where the loss has risen by the threshold, between the optimum and places at which it has risen by more."""
        distance = self._along(beyond, rows)[:, 0]
        share = np.minimum(self._rises(beyond) ** -0.5, 1.0)  # as if it rose with the square of the distance
        points = self._points(np.tile(self.best, (len(rows), 1)), beyond)
        start, places = points[0] + share[:, None] * (points[1] - points[0]), beyond

        def half_log_rise(log_distance: Array) -> Array:
            nonlocal start, places
            places = self._least(rows, self._spring(np.exp(log_distance)), start)
            start = self._points(places)[0]
            with np.errstate(divide="ignore"):
                return np.log(np.maximum(self._rises(places), 0.0)) / 2

        low, guess, high = (np.log(distance * v) for v in (_NEAREST, share, _FARTHEST))
        find_root(half_log_rise, low, high, guess, _EXACT / 2, _JUMP)
        return places

    def _on_the_way(self, rows: Array, ends: Array) -> tuple[Array, Array]:
        """The least loss at places before some ends: the first where it is above the threshold, and whether there is one."""
        distance = self._along(ends, rows)[:, 0]
        many, share = np.repeat(rows, len(_BEFORE)), np.tile(_BEFORE, len(rows))
        points = np.repeat(self._points(np.tile(self.best, (len(rows), 1)), ends), len(_BEFORE), axis=1)
        start = points[0] + share[:, None] * (points[1] - points[0])
        found = self._least(many, self._spring(share * np.repeat(distance, len(_BEFORE))), start)
        above = np.asarray(self._rises(found) > 1 + 1e3 * _EXACT).reshape(len(rows), -1)
        first = found.reshape(len(rows), -1, 5)[np.arange(len(rows)), np.argmax(above, axis=1)]
        some = np.asarray(above.any(axis=1))
        return first[some], some

    def _spring(self, centre: Array) -> Callable[[Array, Array], Array]:
        return lambda x, own: _STIFF * self.best[4] / 2 * (x - centre[own, None]) ** 2

    def _least(self, rows: Array, penalty: Callable[[Array, Array], Array], start: Array | None) -> Array:
        """Where the loss and a penalty of x are least, (n, 5); x counts from the optimum outwards."""

        def of_models(models: Models, own: Array) -> Array:
            return penalty(self._along(np.stack(models, axis=-1), rows[own]), own)

        values = {k: np.full(len(rows), v) for k, v in self.problem.result.values.items()}
        return self.problem.search.minimise_many(values, coarse=True, allow_none=True, start=start, penalty=of_models)

    def _along(self, models: Array, rows: Array) -> Array:
        """How far out x is, (n, m), of models (n, m, 4) or places (n, 5) of some rows."""
        models = models.reshape(len(rows), -1, models.shape[-1])
        column, sign = self.column[rows], self.sign[rows, None]
        found = np.take_along_axis(models, column[:, None, None], axis=2)[..., 0]
        start = self.best[column, None]
        return sign * np.where(
            column[:, None] == _SHARE, found - start, np.log(found / np.where(start > 0, start, 1.0))
        )

    def _rises(self, places: Array) -> Array:
        """log(L / L*) over its limit."""
        return np.log(places[:, 4] / self.best[4]) / self.scale

    @staticmethod
    def _points(*places: Array) -> Array:
        """Coordinates of the search of places (n, 5) each, (., n, 3)."""
        return np.stack([np.stack([np.log(p[:, 0]), np.log(p[:, 2]), p[:, 3]], axis=-1) for p in places])
