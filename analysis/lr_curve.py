"""Loss over the learning rate at one size: the best rate, and the rates that the scatter of the runs allows."""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
WINDOW_STEPS = 3.0
"""Within so many steps of x1.5 of the lowest rate the loss is taken for a parabola in the log of the rate."""


class RatedRun(NamedTuple):
    """A run at a base learning rate: validation loss in nats, infinite where it diverged."""

    rate: float
    loss: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss over the base learning rate at one size, both rates equal.

    A seed shifts the losses of all rates together, by more than the rates differ, so each seed has a level of its own:
    loss = level of the seed + parabola in the log of the rate. The best rate is the vertex of that parabola, fitted to all runs
    within `WINDOW_STEPS` of the rate of lowest mean loss: that rate itself moves by whole steps with the noise of a run.

    Attributes:
        parametrization: `mup`: one base width for all sizes; `standard`: each size is its own.
        n: non-embedding parameters.
        d_token: token width.
        step: ratio of neighbouring rates of the grid.
        runs: what was run.
    """

    parametrization: str
    n: int
    d_token: int
    step: float
    runs: tuple[RatedRun, ...]

    @functools.cached_property
    def levels(self) -> dict[int, float]:
        """Loss of each seed above the mean seed, by least squares over seeds and rates; nats."""
        finite = [run for run in self.runs if np.isfinite(run.loss)]
        seeds, rates = sorted({run.seed for run in finite}), sorted({run.rate for run in finite})
        design = np.zeros((len(finite), len(rates) + len(seeds)))
        for row, run in enumerate(finite):
            design[row, [rates.index(run.rate), len(rates) + seeds.index(run.seed)]] = 1.0
        found = np.linalg.lstsq(design, np.array([run.loss for run in finite]), rcond=None)[0][len(rates) :]
        return {seed: float(level) for seed, level in zip(seeds, found - found.mean())} if seeds else {}

    @functools.cached_property
    def means(self) -> dict[float, float]:
        """Mean loss by rate, ascending, the levels of the seeds taken off; infinite where a run diverged."""
        by_rate: dict[float, list[float]] = {}
        for run in sorted(self.runs):
            by_rate.setdefault(run.rate, []).append(run.loss - self.levels.get(run.seed, 0.0))
        return {rate: float(np.mean(losses)) for rate, losses in by_rate.items()}

    @property
    def lowest(self) -> float:
        """The grid's rate of least mean loss."""
        return min(self.means, key=lambda rate: self.means[rate])

    def steps_of(self, rate: Any) -> Any:
        """Steps of the grid from the lowest rate."""
        return np.log(np.asarray(rate) / self.lowest) / np.log(self.step)

    @functools.cached_property
    def window(self) -> tuple[Array, Array, Array]:
        """Steps from the lowest rate, losses and seeds of the runs that the parabola is fitted to."""
        rates, losses, seeds = (np.array(column, dtype=float) for column in zip(*self.runs))
        near = (np.abs(self.steps_of(rates)) <= WINDOW_STEPS + 1e-9) & np.isfinite(losses)
        return self.steps_of(rates)[near], losses[near], seeds[near]

    @functools.cached_property
    def _design(self) -> Array:
        """Columns: steps squared, steps, and one a seed, (runs, 2 + seeds)."""
        steps, _, seeds = self.window
        return np.column_stack([steps**2, steps, *(seeds == seed for seed in np.unique(seeds))])

    @functools.cached_property
    def _coefficients(self) -> Array | None:
        if len(np.unique(self.window[0])) < 3 or np.linalg.matrix_rank(self._design) < self._design.shape[1]:
            return None
        found = np.linalg.lstsq(self._design, self.window[1], rcond=None)[0]
        return found if found[0] > 0 else None

    @functools.cached_property
    def parabola(self) -> Array | None:
        """Coefficients in steps from the lowest rate, highest power first, at the mean seed; None without an upward bend."""
        found = self._coefficients
        return None if found is None else np.array([found[0], found[1], found[2:].mean()])

    @property
    def is_inside(self) -> bool:
        """Whether the best rate lies between rates that were tried."""
        return self.parabola is not None and min(self.means) < self.best < max(self.means)

    @property
    def best(self) -> float:
        """Vertex of the parabola, at most half a step outside of what was tried; the lowest rate where there is none."""
        if self.parabola is None:
            return self.lowest
        return float(self._rate(_vertex(self.parabola)))

    def _rate(self, steps: Any) -> Any:
        tried = self.steps_of([min(self.means), max(self.means)])
        return self.lowest * self.step ** np.clip(steps, tried[0] - 0.5, tried[1] + 0.5)

    @property
    def residual(self) -> tuple[float, int]:
        """Sum of squared residuals of the parabola with its levels, and the degrees of freedom that they have."""
        if self._coefficients is None:
            return 0.0, 0
        residuals = self.window[1] - self._design @ self._coefficients
        return float(residuals @ residuals), len(residuals) - len(self._coefficients)

    def draws(self, rng: np.random.Generator, sigmas: Array) -> Array:
        """Best rates of parabolas that the runs allow, one for each standard deviation of a run's loss in `sigmas`."""
        if self._coefficients is None:
            return np.full(len(sigmas), self.lowest)
        root = np.linalg.cholesky(np.linalg.inv(self._design.T @ self._design)[:2, :2])
        a, b = (self._coefficients[:2] + sigmas[:, None] * (rng.normal(size=(len(sigmas), 2)) @ root.T)).T
        vertices = np.where(a > 0, -b / (2 * np.where(a > 0, a, 1.0)), np.where(b > 0, -np.inf, np.inf))
        return self._rate(vertices)

    def excess(self, rate: float) -> float:
        """Loss of a rate above that of the best one, by the parabola in its window, by the means outside of it; nats."""
        steps = self.steps_of(rate)
        if self.parabola is not None and abs(steps) <= WINDOW_STEPS + 1e-9:
            return float(np.polyval(self.parabola, steps) - np.polyval(self.parabola, _vertex(self.parabola)))
        return self.means[rate] - self.means[self.lowest]


def _vertex(parabola: Array) -> float:
    return -parabola[1] / (2 * parabola[0])
