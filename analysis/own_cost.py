"""What a user's own models cost, where the shape rule of a sweep does not price them: arithmetic that the user writes down.

`OwnPrices("6*N*D", "2*N")` stands where `analysis.cost.Shapes` does. No rule of thumb is built in: it has to be written.
"""

import dataclasses
from typing import Any

import numpy as np

from analysis.budget import Cost
from analysis.columns import evaluate
from analysis.cost import InferenceCost, LifetimeCost, Serving, TrainingCost
from dlcm.errors import UserError, nearest

Array = np.ndarray
_EXAMPLE = {"N": 1e8, "D": 1e9, "R": 2.0, "P": 0.5}


@dataclasses.dataclass(frozen=True)
class OwnPrices:
    """Costs as arithmetic over N, D, R and P with + - * / ** and numbers.

    Attributes:
        training_flops: training FLOPs, such as `6*N*D`, or `6*N*D*(1 - P + P/R)` for two levels.
        inference_flops: FLOPs of serving one token, such as `2*N`; None where nothing is served.

    Raises:
        UserError: no arithmetic, an unknown name, or not a positive number.
    """

    training_flops: str
    inference_flops: str | None = None

    def __post_init__(self) -> None:
        written_cost(self.training_flops, "--cost")
        if self.inference_flops is not None:
            written_cost(self.inference_flops, "--inference-cost")

    def training(self) -> TrainingCost:
        """Training FLOPs as a function of N, D, R and P."""
        return TrainingCost(written_cost(self.training_flops, "--cost"))

    def inference(self, serving: Serving | None = None) -> InferenceCost:
        """FLOPs per served token.

        Raises:
            UserError: none were written down, or the lengths of a request are given, which arithmetic cannot use.
        """
        if self.inference_flops is None:
            raise UserError(
                f"--cost {self.training_flops}: says what training costs, not what serving a token does; "
                'give it as well, for example --inference-cost "2*N"'
            )
        if serving is not None:
            raise UserError("--serving: a cost that is written down knows no lengths; put them into --inference-cost")
        return InferenceCost(written_cost(self.inference_flops, "--inference-cost"), self.training())

    def lifetime(self, served_tokens: float, serving: Serving | None = None) -> LifetimeCost:
        """Training FLOPs and those of `served_tokens` tokens."""
        return LifetimeCost(self.training(), self.inference(serving), float(served_tokens))


def written_cost(text: str, where: str) -> Cost:
    """cost(N, D, R, P) from its text.

    Args:
        text: arithmetic over N, D, R and P.
        where: opens the error messages.

    Raises:
        UserError: no arithmetic, an unknown name, or not a positive number for a model of usual size.
    """

    def cost(N: Any, D: Any, R: Any, P: Any) -> Array:
        inputs = {"N": N, "D": D, "R": R, "P": P}

        def lookup(name: str) -> Array:
            if name not in inputs:
                raise UserError(f"{where} {text}: {name!r} is neither of N, D, R, P{nearest(name, inputs)}")
            return np.asarray(inputs[name], dtype=float)

        found = evaluate(text, lookup, where)
        return np.broadcast_to(found, np.broadcast_shapes(found.shape, *(np.shape(v) for v in inputs.values())))

    value = float(cost(**_EXAMPLE))
    if not (np.isfinite(value) and value > 0):
        at = ", ".join(f"{name} = {v:g}" for name, v in _EXAMPLE.items())
        raise UserError(f"{where} {text}: is {value:g} at {at}; a cost is above 0 everywhere")
    return cost
