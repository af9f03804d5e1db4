"""What a chain of two fits says of one place: an accuracy with an interval that holds the uncertainty of both."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Accuracy:
    """Accuracy to be expected somewhere, by the chain law -> loss -> accuracy.

    Attributes:
        where: what was asked, in words; short: the same for a legend.
        unit: what the law predicts.
        loss: its prediction. loss_interval: 95%, None without refits of the law.
        accuracy: at that loss. interval: 95%, with the uncertainty of both stages; None where one has no refits.
        other: the other form of the curve, and the accuracy by it.
        either: from the lowest to the highest end of the 95% intervals by the two forms.
        beyond: how far the loss lies outside the losses behind the curve, 0 inside, negative below them. span: those losses.
        decades_outside: how far the inputs lie outside the data of the law, by name.
        reason: why the accuracy is not identified; empty where it is.
        notes: what is to be said of the two fits that it rests on.
        replicates: paired refits.
    """

    task: str
    where: str
    short: str
    unit: str
    loss: float
    loss_interval: tuple[float, float] | None
    accuracy: float
    interval: tuple[float, float] | None
    other: tuple[str, float]
    either: tuple[float, float] | None
    beyond: float
    span: tuple[float, float]
    decades_outside: Mapping[str, float]
    reason: str
    notes: tuple[str, ...]
    replicates: Array

    @property
    def value(self) -> float | None:
        """The accuracy, None where it is not identified."""
        return None if self.reason else self.accuracy

    def report(self) -> str:
        """One line: accuracy, interval, loss, and how far outside the data."""
        from analysis.downstream_text import format_accuracy

        return format_accuracy(self)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "task": self.task,
            "where": self.where,
            "accuracy": self.value,
            "interval": None if self.reason or self.interval is None else list(self.interval),
            "interval_of_either_link": None if self.reason or self.either is None else list(self.either),
            "by_link": {self.other[0]: None if self.reason else self.other[1]},
            "predictor": self.unit,
            "predicted": self.loss,
            "predicted_interval": None if self.loss_interval is None else list(self.loss_interval),
            "outside_of_curve": self.beyond,
            "decades_outside": dict(self.decades_outside),
            "reason": self.reason,
            "notes": list(self.notes),
        }


def beyond(loss: float, span: tuple[float, float]) -> float:
    """How far a loss lies outside a span: 0 inside, negative below it."""
    return min(loss - span[0], 0.0) or max(loss - span[1], 0.0)
