"""Loss over the learning rate at one size: the best rate, and the rates that the scatter of the runs allows."""

import dataclasses
import functools
from typing import Any

import numpy as np

Array = np.ndarray
# Within two steps of x1.5 the loss is a parabola in the log of the rate; farther off its sides are unequally steep.
WINDOW_STEPS = 2.0


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss over the base learning rate at one size, both rates equal.

    The best rate is the vertex of a parabola in the log of the rate, fitted to all runs within `WINDOW_STEPS` of the rate of
    lowest mean loss: that rate itself moves by whole steps of the grid with the noise of a seed.

    Attributes:
        parametrization: `mup`: one base width for all sizes; `standard`: each size is its own.
        n: non-embedding parameters.
        d_token: token width.
        step: ratio of neighbouring rates of the grid.
        runs: base learning rate and validation loss in nats of each run; infinite where it diverged.
    """

    parametrization: str
    n: int
    d_token: int
    step: float
    runs: tuple[tuple[float, float], ...]

    @functools.cached_property
    def means(self) -> dict[float, float]:
        """Mean loss over seeds by rate, ascending; infinite where a run diverged."""
        by_rate: dict[float, list[float]] = {}
        for rate, loss in sorted(self.runs):
            by_rate.setdefault(rate, []).append(loss)
        return {rate: float(np.mean(losses)) for rate, losses in by_rate.items()}

    @property
    def lowest(self) -> float:
        """The grid's rate of least mean loss."""
        return min(self.means, key=lambda rate: self.means[rate])

    @functools.cached_property
    def window(self) -> tuple[Array, Array]:
        """Steps from the lowest rate, and losses, of the runs that the parabola is fitted to."""
        steps = np.array([np.log(rate / self.lowest) / np.log(self.step) for rate, _ in self.runs])
        losses = np.array([loss for _, loss in self.runs])
        near = (np.abs(steps) <= WINDOW_STEPS + 1e-9) & np.isfinite(losses)
        return steps[near], losses[near]

    @functools.cached_property
    def parabola(self) -> Array | None:
        """Coefficients in steps from the lowest rate, highest power first; None where the runs do not bend upwards."""
        steps, losses = self.window
        if len(np.unique(steps)) < 3:
            return None
        found = np.polyfit(steps, losses, 2)
        return found if found[0] > 0 else None

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
        tried = np.log(np.array([min(self.means), max(self.means)]) / self.lowest) / np.log(self.step)
        return self.lowest * self.step ** np.clip(steps, tried[0] - 0.5, tried[1] + 0.5)

    @property
    def residual(self) -> tuple[float, int]:
        """Sum of squared residuals of the parabola, and the degrees of freedom that they have."""
        steps, losses = self.window
        if self.parabola is None:
            return 0.0, 0
        return float(np.sum((losses - np.polyval(self.parabola, steps)) ** 2)), len(steps) - 3

    def draws(self, rng: np.random.Generator, sigmas: Array) -> Array:
        """Best rates of parabolas that the runs allow, one for each standard deviation of a run's loss in `sigmas`."""
        if self.parabola is None:
            return np.full(len(sigmas), self.lowest)
        design = np.vander(self.window[0], 3)
        root = np.linalg.cholesky(np.linalg.inv(design.T @ design))
        a, b, _ = (self.parabola + sigmas[:, None] * (rng.normal(size=(len(sigmas), 3)) @ root.T)).T
        vertices = np.where(a > 0, -b / (2 * np.where(a > 0, a, 1.0)), np.where(b > 0, -np.inf, np.inf))
        return self._rate(vertices)

    def excess(self, rate: float) -> float:
        """Loss of a rate above that of the best one, by the parabola in its window, by the means outside of it; nats."""
        steps = np.log(rate / self.lowest) / np.log(self.step)
        if self.parabola is not None and abs(steps) <= WINDOW_STEPS + 1e-9:
            return float(np.polyval(self.parabola, steps) - np.polyval(self.parabola, _vertex(self.parabola)))
        return self.means[rate] - self.means[self.lowest]


def _vertex(parabola: Array) -> float:
    return -parabola[1] / (2 * parabola[0])
