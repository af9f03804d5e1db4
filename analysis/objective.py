"""What a fit minimises: a law on centred variables against the data, and its gradient.

Centred means: every variable is divided by its geometric mean and the loss by its own, and amplitudes are fitted as
logarithms of what their term contributes at the centre. That takes the condition number of a Chinchilla fit from 4e6 to
about 1e3.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from analysis.coordinates import Coordinates
from analysis.data import ResultsData
from analysis.law import Change, Law
from dlcm.errors import UserError

Array = np.ndarray
LossKind = Literal["log_huber", "log_mse", "mse"]
LOSSES: tuple[LossKind, ...] = ("log_huber", "log_mse", "mse")
_LEAST = 1e-12
"""A law of accuracies may predict 0; its logarithm is that of this, over the target's scale."""


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
            bad = np.flatnonzero(~np.isfinite(values) | ((values <= 0) & (name in (*law.positive, law.target))))
            if bad.size:
                raise UserError(
                    f"{data.source}: run {data.run_ids[bad[0]]}: {name} = {values[bad[0]]:g}, and law {law.name} needs it above 0"
                )
        scale = float(np.exp(np.mean(np.log(target))))
        scales, centred = law.centre(raw)
        problem = cls(law, centred, target / scale, scales, scale, loss, delta)
        law.check_on(problem.variables, data)
        return problem

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

    @functools.cached_property
    def coordinates(self) -> Coordinates:
        """What theta stands for."""
        return self.law.coordinates(self.scales, self.target_scale, float(self.target.max()))

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, each (p,)."""
        return self.coordinates.bounds()

    def evaluate(self, thetas: Array, *, gradient: bool) -> tuple[Array, list[Array]]:
        """Predictions over the target's scale, and their derivatives by each entry of theta; see `Coordinates.evaluate`."""
        return self.coordinates.evaluate(thetas, self.variables, gradient=gradient)

    def values(self, theta: Array) -> dict[str, float]:
        """Constants in natural units (parameters, tokens, nats) from theta."""
        return self.coordinates.values(theta)

    def theta(self, values: Mapping[str, float]) -> Array:
        """Theta from constants in natural units, clipped into the bounds."""
        return np.clip(self.coordinates.theta(values), *self.bounds())

    # -- objective -------------------------------------------------------------------------------------------------

    def residuals(self, theta: Array) -> Array:
        """log(prediction / observation), or the difference over the target's scale under `mse`; (n,)."""
        prediction = self.evaluate(theta, gradient=False)[0]
        if self.loss == "mse":
            return prediction - self.target
        return np.log(np.maximum(prediction, _LEAST) / self.target)

    def residuals_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Residuals (n,) and their derivatives by theta (n, p), analytic."""
        prediction, partials = self.evaluate(theta, gradient=True)
        jacobian = np.empty((len(self), len(theta)))
        for column, partial in enumerate(partials):
            jacobian[:, column] = partial
        if self.loss == "mse":
            return np.broadcast_to(prediction, self.target.shape) - self.target, jacobian
        prediction = np.maximum(prediction, _LEAST)
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
