"""The coordinates that a law is fitted in: centred and scaled, so that constants can be told apart.

A power law's amplitude, in its own unit, is its term's value at a variable of 1 (one parameter, one token), far outside the
data: it and the exponent move together (correlation .999). At the data's centre they hardly do. That takes the condition number
of a Chinchilla fit from 4e6 to about 1e3.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from analysis.law import Law

Array = np.ndarray
SHARE = (math.log(1e-7), math.log(1e4))
"""Bounds of the logarithm of an amplitude: its term's share of the typical target, at the centre."""
_OFFSET = (0.0, 100.0)
"""Bounds of an offset, in units of the variable's geometric mean."""


def draw_exponent(rng: np.random.Generator, low: float, high: float) -> float:
    """Within the bounds, and within -1 to 1.5 where that leaves something."""
    likely = max(low, -1.0), min(high, 1.5)
    return rng.uniform(*(likely if likely[0] < likely[1] else (low, high)))


class Coordinates(Protocol):
    """Theta of one law on one data set. Predictions are in units of the target's scale."""

    @property
    def linear(self) -> tuple[int, ...]:
        """Entries of theta that the prediction is linear in, or in whose exponential it is (`logarithms`)."""
        ...

    @property
    def logarithms(self) -> tuple[int, ...]:
        """Those of them that are logarithms."""
        ...

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, each (p,); all finite."""
        ...

    def evaluate(self, thetas: Array, variables: Mapping[str, Array], *, gradient: bool) -> tuple[Array, list[Array]]:
        """Predictions, and their derivatives by each entry of theta.

        Args:
            thetas: (p,), or (S, p) for many at once.
            variables: as the problem holds them, (n,).
            gradient: whether derivatives are wanted.

        Returns:
            Prediction and a list of p derivatives, each of a shape that broadcasts to (n,) or (S, n).
        """
        ...

    def values(self, theta: Array) -> dict[str, float]:
        """All constants in natural units, held ones included."""
        ...

    def draw(self, rng: np.random.Generator) -> Array:
        """Theta with what the prediction is not linear in drawn at random; the entries of `linear` are 0."""
        ...

    def theta(self, values: Mapping[str, float]) -> Array:
        """Theta from constants in natural units; not clipped."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class PowerCoordinates:
    """Of a sum of powers: variables over their geometric means, amplitudes as logarithms of their term at that centre.

    Attributes:
        scales: variable -> its geometric mean.
        target_scale: geometric mean of the target. target_max: its largest value over that.
    """

    law: Law
    scales: Mapping[str, float]
    target_scale: float
    target_max: float

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, each (p,)."""
        box = {"amplitude": SHARE, "offset": _OFFSET, "floor": (0.0, self.target_max)}
        pairs = [box.get(p.kind, p.bounds) for p in self.law.free]
        lower, upper = zip(*pairs) if pairs else ((), ())
        return np.array(lower, dtype=float), np.array(upper, dtype=float)

    @property
    def linear(self) -> tuple[int, ...]:
        """Floor and amplitudes."""
        return tuple(i for i, p in enumerate(self.law.free) if p.kind in ("floor", "amplitude"))

    @property
    def logarithms(self) -> tuple[int, ...]:
        """Amplitudes."""
        return tuple(i for i, p in enumerate(self.law.free) if p.kind == "amplitude")

    @functools.cached_property
    def _units(self) -> dict[str, float]:
        """Constant -> its unit, amplitudes aside."""
        of = {f.offset: self.scales[f.variable] for t in self.law.terms for f in t.factors if f.offset}
        units = {"floor": lambda _: self.target_scale, "offset": lambda name: of[name], "exponent": lambda _: 1.0}
        return {p.name: units[p.kind](p.name) for p in self.law.parameters if p.kind != "amplitude"}

    @functools.cached_property
    def _held(self) -> dict[str, float]:
        return {name: value / self._units[name] for name, value in self.law.fixed}

    def scaled(self, thetas: Array) -> dict[str, Any]:
        """Centred constants by name, logarithms undone: numbers, or columns (S, 1) that broadcast against the runs."""
        columns = thetas if thetas.ndim == 1 else thetas.T[..., None]
        free = {p.name: np.exp(t) if p.kind == "amplitude" else t for p, t in zip(self.law.free, columns)}
        return {**self._held, **free}

    def evaluate(self, thetas: Array, variables: Mapping[str, Array], *, gradient: bool) -> tuple[Array, list[Array]]:
        """See `Coordinates.evaluate`."""
        scaled = self.scaled(thetas)
        prediction, partials = self.law.evaluate(scaled, variables, gradient=gradient)
        if not gradient:
            return prediction, []
        return prediction, [
            partials[p.name] * scaled[p.name] if p.kind == "amplitude" else partials[p.name] for p in self.law.free
        ]

    def values(self, theta: Array) -> dict[str, float]:
        """Constants in natural units (parameters, tokens, nats)."""
        scaled = {name: float(value) for name, value in self.scaled(np.asarray(theta, dtype=float)).items()}
        result = {name: value * self._units.get(name, 1.0) for name, value in scaled.items()}
        for term in self.law.terms:
            log_amplitude = math.log(max(scaled[term.amplitude], 1e-300)) + math.log(self.target_scale)
            for factor in term.factors:
                log_amplitude -= factor.sign * scaled[factor.exponent] * math.log(self.scales[factor.variable])
            result[term.amplitude] = math.exp(log_amplitude)
        return {p.name: result[p.name] for p in self.law.parameters}

    def draw(self, rng: np.random.Generator) -> Array:
        """See `Coordinates.draw`; half the offsets are 0."""
        lower, upper = self.bounds()
        theta = np.zeros(len(self.law.free))
        for i, p in enumerate(self.law.free):
            if p.kind == "offset":
                theta[i] = 0.0 if rng.random() < 0.5 else 10 ** rng.uniform(-3, 0.5)
            elif p.kind == "exponent":
                theta[i] = draw_exponent(rng, float(lower[i]), float(upper[i]))
        return theta

    def theta(self, values: Mapping[str, float]) -> Array:
        """Theta from constants in natural units; not clipped."""
        values = {**values, **dict(self.law.fixed)}
        terms = {t.amplitude: t for t in self.law.terms}
        theta = []
        for p in self.law.free:
            if p.kind != "amplitude":
                theta.append(values[p.name] / self._units[p.name])
                continue
            log_amplitude = math.log(max(values[p.name], 1e-300)) - math.log(self.target_scale)
            for f in terms[p.name].factors:
                log_amplitude += f.sign * values[f.exponent] * math.log(self.scales[f.variable])
            theta.append(log_amplitude)
        return np.array(theta, dtype=float)
