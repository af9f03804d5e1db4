"""The coordinates that an expression is fitted in; see `analysis.coordinates` for why."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from analysis.coordinates import SHARE, draw_exponent
from analysis.expression import INTERNAL, compile_log, names, parse
from analysis.expression_law import Constant, ExpressionLaw, is_wide

Array = np.ndarray
_OPEN = 1e3
"""How far an open bound reaches beyond the start, in sizes of the start."""
_ABOVE = 10.0
"""How far above the largest target a floor without bounds may lie."""
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Axis:
    """How one constant v is fitted: t = v / unit, or t = log(v / unit), or the logarithm of a contribution at the centre."""

    scale: Literal["linear", "log", "centred"]
    unit: float
    low: float
    high: float

    def inward(self, value: float) -> float:
        """T of v; of a centred amplitude, of v times what it multiplies at the centre."""
        return value / self.unit if self.scale == "linear" else math.log(max(value, 1e-300) / self.unit)


def axis_of(constant: Constant, target_scale: float, target_max: float) -> Axis:
    """The coordinate of a constant, with finite bounds."""
    low, high = constant.bounds
    if constant.kind == "floor":
        # a law may rise towards its floor, so that it lies above all that was seen
        return Axis(
            "linear",
            target_scale,
            low / target_scale,
            min(high / target_scale, _ABOVE * target_max + low / target_scale),
        )
    if constant.centre is not None:
        return Axis("centred", target_scale, *SHARE)
    start = constant.start
    if math.isinf(high) and low >= 0 and constant.kind == "amplitude":
        high = max(low, start or 0.0) * 1e6
    if constant.kind == "amplitude" or is_wide(constant.bounds):
        return Axis("log", 1.0, math.log(max(low, high * _TINY)), math.log(high))
    if math.isinf(low) or math.isinf(high):
        assert start is not None
        unit = abs(start) or 1.0
        low, high = max(low, start - _OPEN * unit), min(high, start + _OPEN * unit)
    else:
        unit = 1.0 if constant.kind == "exponent" else max(high - low, _TINY)
    return Axis("linear", unit, low / unit, high / unit)


@dataclasses.dataclass(frozen=True, eq=False)
class ExpressionCoordinates:
    """Of an expression: amplitudes as logarithms of their summand at the centre, others over their range.

    With A = e^t s / g(x0; b), where g is what A multiplies, x0 the centre and s the target's scale,
    dL/dt = A dL/dA  and  dL/db at fixed t = dL/db - A dL/dA d log g / db.

    Attributes:
        centre: input -> its value at the centre.
        target_scale: geometric mean of the target. target_max: its largest value over that.
    """

    law: ExpressionLaw
    centre: Mapping[str, float]
    target_scale: float
    target_max: float

    @functools.cached_property
    def _free(self) -> tuple[Constant, ...]:
        held = dict(self.law.fixed)
        return tuple(c for c in self.law.constants if c.name not in held)

    @functools.cached_property
    def _axes(self) -> dict[str, Axis]:
        return {c.name: axis_of(c, self.target_scale, self.target_max) for c in self._free}

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, each (p,)."""
        axes = self._axes.values()
        return np.array([a.low for a in axes], dtype=float), np.array([a.high for a in axes], dtype=float)

    @property
    def linear(self) -> tuple[int, ...]:
        """Floor, amplitudes, and others that the expression is linear in."""
        return tuple(i for i, c in enumerate(self._free) if c.is_linear)

    @property
    def logarithms(self) -> tuple[int, ...]:
        """Amplitudes."""
        return tuple(i for i, c in enumerate(self._free) if c.is_linear and self._axes[c.name].scale != "linear")

    @functools.cached_property
    def _factors(self) -> dict[str, tuple[tuple[str, ...], Any, list[float]]]:
        """Centred amplitude -> the constants that its factor holds, log g compiled, and the centre's inputs."""
        own, found = {c.name for c in self.law.constants}, {}
        for c in self._free:
            if c.centre is not None:
                inside = names(parse(c.centre, c.name, INTERNAL))
                constants = tuple(n for n in inside if n in own)
                inputs = tuple(n for n in inside if n not in own)
                at = [self.centre[n] for n in inputs]
                found[c.name] = constants, compile_log(c.centre, constants, inputs), at
        return found

    def _natural(self, columns: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Constants in natural units, and their derivatives by their own coordinate."""
        values: dict[str, Any] = dict(self.law.fixed)
        slopes: dict[str, Any] = {}
        for (name, axis), t in zip(self._axes.items(), columns):
            if axis.scale == "linear":
                values[name], slopes[name] = t * axis.unit, axis.unit
            else:
                values[name] = slopes[name] = np.exp(t) * axis.unit
        for name, (constants, compiled, at) in self._factors.items():
            with np.errstate(all="ignore"):
                values[name] = slopes[name] = values[name] / np.exp(
                    compiled.value(*(values[c] for c in constants), *at)
                )
        return values, slopes

    def evaluate(self, thetas: Array, variables: Mapping[str, Array], *, gradient: bool) -> tuple[Array, list[Array]]:
        """See `Coordinates.evaluate`."""
        columns = thetas if thetas.ndim == 1 else thetas.T[..., None]
        values, slopes = self._natural(columns)
        prediction, partials = self.law.evaluate(values, variables, gradient=gradient)
        prediction = prediction / self.target_scale
        if not gradient:
            return prediction, []
        for name, (constants, compiled, at) in self._factors.items():
            _, *by = compiled.partials(*(values[c] for c in constants), *at)
            for other, slope in zip(constants, by):
                if other in slopes:
                    partials[other] = partials[other] - partials[name] * values[name] * slope
        return prediction, [partials[name] * slopes[name] / self.target_scale for name in self._axes]

    def values(self, theta: Array) -> dict[str, float]:
        """All constants in natural units, held ones included."""
        found = self._natural(np.asarray(theta, dtype=float))[0]
        return {c.name: float(found[c.name]) for c in self.law.constants}

    def theta(self, values: Mapping[str, float]) -> Array:
        """Theta from constants in natural units; not clipped."""
        values = {**values, **dict(self.law.fixed)}
        found = []
        for name, axis in self._axes.items():
            value = values[name]
            if name in self._factors:
                constants, compiled, at = self._factors[name]
                value = value * float(np.exp(compiled.value(*(values[c] for c in constants), *at)))
            found.append(axis.inward(value))
        return np.array(found, dtype=float)

    def draw(self, rng: np.random.Generator) -> Array:
        """See `Coordinates.draw`: over the bounds, an exponent where exponents are, or around a start with open bounds."""
        return np.array([_draw(c, axis, rng) for c, axis in zip(self._free, self._axes.values())])


def _draw(constant: Constant, axis: Axis, rng: np.random.Generator) -> float:
    if constant.is_linear:
        return 0.0
    if constant.start is not None:
        start = axis.inward(constant.start)
        if not all(map(math.isfinite, constant.bounds)):
            return float(np.clip(start + rng.normal() * (rng.random() < 0.75), axis.low, axis.high))
        if rng.random() < 0.25:
            return start
    if constant.kind == "exponent" and axis.scale == "linear":
        return draw_exponent(rng, axis.low, axis.high)
    return rng.uniform(axis.low, axis.high)


def draw_values(law: ExpressionLaw, rng: np.random.Generator) -> dict[str, float]:
    """Constants in natural units from anywhere in their bounds, amplitudes and floors about 1."""
    found: dict[str, float] = {}
    for c in law.constants:
        axis = axis_of(c, 1.0, 1.0)
        t = _draw(c, axis, rng)
        found[c.name] = t * axis.unit if axis.scale == "linear" else math.exp(t) * axis.unit
    return found
