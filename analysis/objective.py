"""What a fit minimises: a law on centred variables against the data, and its gradient.

Centred means: every variable is divided by its geometric mean and the loss by its own, and amplitudes are fitted as
logarithms of what their term contributes at the centre. That takes the condition number of a Chinchilla fit from 4e6 to
about 1e3.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np

from analysis.data import ResultsData
from analysis.laws import Change, Law
from dlcm.errors import UserError

Array = np.ndarray
LossKind = Literal["log_huber", "log_mse", "mse"]
LOSSES: tuple[LossKind, ...] = ("log_huber", "log_mse", "mse")

_AMPLITUDE = (math.log(1e-7), math.log(1e4))  # of a term's share of the typical loss, at the centre
_OFFSET = (0.0, 100.0)  # in units of the variable's geometric mean


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One law against one data set under one loss.

    Attributes:
        variables: centred variables, each (n,).
        target: what is predicted over its own scale, (n,).
        scales: geometric means that were divided out; `target_scale` is that of the target.
    """

    law: Law
    variables: Mapping[str, Array]
    target: Array
    scales: Mapping[str, float]
    target_scale: float
    loss: LossKind = "log_huber"
    delta: float = 1e-3

    @classmethod
    def build(cls, law: Law, data: ResultsData, loss: LossKind = "log_huber", delta: float = 1e-3) -> "Problem":
        """Centre the data for `law`.

        Raises:
            UserError: the data lack an input of the law, or hold values that a power law cannot take.
        """
        target = data.values(law.target)
        raw = law.compute_variables({name: data.values(name) for name in law.inputs})
        for name, values in {**raw, law.target: target}.items():
            bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if bad.size:
                raise UserError(
                    f"{data.source}: run {data.run_ids[bad[0]]}: {name} = {values[bad[0]]:g}, and law {law.name} needs it above 0"
                )
        scales = {name: float(np.exp(np.mean(np.log(values)))) for name, values in raw.items()}
        scale = float(np.exp(np.mean(np.log(target))))
        centred = {name: values / scales[name] for name, values in raw.items()}
        return cls(law, centred, target / scale, scales, scale, loss, delta)

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: Array) -> "Problem":
        """The same problem on a resample of its rows; scales stay, so parameters stay comparable."""
        variables = {name: values[rows] for name, values in self.variables.items()}
        return dataclasses.replace(self, variables=variables, target=self.target[rows])

    def with_loss(self, loss: LossKind) -> "Problem":
        """The same problem under another loss."""
        return dataclasses.replace(self, loss=loss)

    def with_law(self, *changes: Change) -> "Problem":
        """The same data against a reduction of the law."""
        return dataclasses.replace(self, law=self.law.apply(*changes))

    # -- coordinates -----------------------------------------------------------------------------------------------

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, each (p,)."""
        pairs = []
        for parameter in self.law.free:
            if parameter.kind == "floor":
                pairs.append((0.0, float(self.target.max())))
            else:
                pairs.append({"amplitude": _AMPLITUDE, "offset": _OFFSET}.get(parameter.kind, parameter.bounds))
        lower, upper = zip(*pairs) if pairs else ((), ())
        return np.array(lower, dtype=float), np.array(upper, dtype=float)

    def _offset_scale(self, name: str) -> float:
        return next(self.scales[f.variable] for t in self.law.terms for f in t.factors if f.offset == name)

    @functools.cached_property
    def held_values(self) -> dict[str, float]:
        """Held parameters in scaled units."""
        kinds = {p.name: p.kind for p in self.law.parameters}
        divisor = {"floor": lambda _: self.target_scale, "offset": self._offset_scale, "exponent": lambda _: 1.0}
        return {name: value / divisor[kinds[name]](name) for name, value in self.law.fixed}

    def scaled_values(self, theta: Array) -> dict[str, float]:
        """Centred constants from theta: logarithms of amplitudes undone, held parameters put in."""
        free = self.law.free
        return self.held_values | {
            p.name: math.exp(t) if p.kind == "amplitude" else float(t) for p, t in zip(free, theta)
        }

    def values(self, theta: Array) -> dict[str, float]:
        """Constants in natural units (parameters, tokens, nats) from theta."""
        scaled = self.scaled_values(theta)
        result = dict(scaled)
        if self.law.floor:
            result[self.law.floor] = scaled[self.law.floor] * self.target_scale
        for term in self.law.terms:
            log_amplitude = math.log(max(scaled[term.amplitude], 1e-300)) + math.log(self.target_scale)
            for factor in term.factors:
                log_amplitude -= factor.sign * scaled[factor.exponent] * math.log(self.scales[factor.variable])
                if factor.offset:
                    result[factor.offset] = scaled[factor.offset] * self.scales[factor.variable]
            result[term.amplitude] = math.exp(log_amplitude)
        return {p.name: result[p.name] for p in self.law.parameters}

    def theta(self, values: Mapping[str, float]) -> Array:
        """Theta from constants in natural units, clipped into the bounds."""
        values = {**values, **dict(self.law.fixed)}
        theta = []
        amplitudes = {t.amplitude: t for t in self.law.terms}
        for p in self.law.free:
            if p.kind == "amplitude":
                log_a = math.log(max(values[p.name], 1e-300)) - math.log(self.target_scale)
                for f in amplitudes[p.name].factors:
                    log_a += f.sign * values[f.exponent] * math.log(self.scales[f.variable])
                theta.append(log_a)
            elif p.kind == "exponent":
                theta.append(values[p.name])
            else:
                theta.append(values[p.name] / (self.target_scale if p.kind == "floor" else self._offset_scale(p.name)))
        return np.clip(np.array(theta, dtype=float), *self.bounds())

    # -- objective -------------------------------------------------------------------------------------------------

    def residuals(self, theta: Array) -> Array:
        """log(prediction / observation), or the difference over the target's scale under `mse`; (n,)."""
        prediction = self.law.evaluate(self.scaled_values(theta), self.variables, gradient=False)[0]
        return np.log(prediction / self.target) if self.loss != "mse" else prediction - self.target

    def residuals_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Residuals (n,) and their derivatives by theta (n, p), analytic."""
        scaled = self.scaled_values(theta)
        prediction, partials = self.law.evaluate(scaled, self.variables, gradient=True)
        jacobian = np.empty((len(self), len(theta)))
        for column, p in enumerate(self.law.free):
            jacobian[:, column] = partials[p.name] * (scaled[p.name] if p.kind == "amplitude" else 1.0)
        if self.loss == "mse":
            return np.broadcast_to(prediction, self.target.shape) - self.target, jacobian
        return np.log(prediction / self.target), jacobian / (prediction[:, None] if prediction.ndim else prediction)

    def penalties(self, residuals: Array) -> Array:
        """Penalty of each row: Huber(delta) (r²/2 within delta, delta (|r| - delta/2) outside), or r²."""
        if self.loss != "log_huber":
            return residuals**2
        size = np.abs(residuals)
        return np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))

    def objective(self, theta: Array) -> float:
        """Sum of penalties, in natural units: squared nats under `mse`."""
        unit = self.target_scale**2 if self.loss == "mse" else 1.0
        return float(np.sum(self.penalties(self.residuals(theta)))) * unit

    def scaled_objective(self, theta: Array) -> tuple[float, Array]:
        """Sum of penalties over delta² and its gradient.

        Without the division the gradient of a mean log-Huber is so small that L-BFGS stops at its first steps and
        reports success.
        """
        residuals, jacobian = self.residuals_and_jacobian(theta)
        slope = np.clip(residuals, -self.delta, self.delta) if self.loss == "log_huber" else 2.0 * residuals
        value = float(np.sum(self.penalties(residuals))) / self.delta**2
        return value, jacobian.T @ slope / self.delta**2
