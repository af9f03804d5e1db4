"""Inputs of a law that a results table holds under another name, or that follow from it; and what is missing."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from analysis.data import Exclusion, ResultsData
from analysis.law import Law
from dlcm.errors import UserError, nearest

Array = np.ndarray
SYMBOLS = ("N", "D", "C", "R", "P", "loss")
_NO_STABLE = "no loss where its decay begins (loss_nats_stable); train with train.measure_stable: true"


@dataclasses.dataclass(frozen=True)
class Derivation:
    """How a column follows from others.

    Attributes:
        needs: columns of the results table.
        compute: the column, (n,); NaN where it is not known.
        reason: why a run is left out where it is not known.
        meaning: what it is.
    """

    needs: tuple[str, ...]
    compute: Callable[[ResultsData], Array]
    reason: str
    meaning: str


def _stable_loss(data: ResultsData) -> Array:
    return data.values("loss_nats_stable")


def _decay_gain(data: ResultsData) -> Array:
    stable = _stable_loss(data)
    gain = (stable - data.loss) / stable
    return np.where(gain > 0, gain, np.nan)


def _unique_tokens(data: ResultsData) -> Array:
    return data.D / np.maximum(data.values("epochs"), 1.0)


DERIVED: Mapping[str, Derivation] = {
    "stable_loss": Derivation(
        ("loss_nats_stable",), _stable_loss, _NO_STABLE, "validation loss where the decay begins, nats per token"
    ),
    "decay_gain": Derivation(
        ("loss_nats_stable",),
        _decay_gain,
        f"{_NO_STABLE}; or its decay did not lower the loss",
        "relative drop of the loss over the decay: (stable_loss - loss) / stable_loss",
    ),
    "U": Derivation(
        ("epochs",), _unique_tokens, "epochs is missing", "tokens that are not repeats: D / max(epochs, 1)"
    ),
}


def prepare(law: Law, data: ResultsData) -> ResultsData:
    """The data with every column that the law needs; runs for which one is not known are left out, with the reason.

    The decay gain (eq 23) compares the loss of a run with that at the step where its decay began: for a branch, the loss of the
    trunk that it left.

    Raises:
        UserError: a name of the law is neither a column nor follows from columns, or no run is left.
    """
    wanted = dict.fromkeys((*law.inputs, law.target))
    frame = data.frame
    known = np.ones(len(data), dtype=bool)
    reasons = [""] * len(data)
    for name in wanted:
        if name in SYMBOLS or name in frame:
            continue
        derivation = DERIVED.get(name)
        if derivation is None or not set(derivation.needs) <= set(frame):
            raise _missing(law, data, name, derivation)
        values = derivation.compute(data)
        frame = frame.assign(**{name: values})
        for row in np.flatnonzero(~np.isfinite(values) & known):
            reasons[row] = derivation.reason
        known &= np.isfinite(values)
    if not known.any():
        raise UserError(f"{data.source}: no run is left for law {law.name}; {data.run_ids[0]}: {reasons[0]}")
    if frame is data.frame:
        return data
    left_out = tuple(Exclusion(data.run_ids[row], reasons[row]) for row in np.flatnonzero(~known))
    complete = dataclasses.replace(data, frame=frame, exclusions=(*data.exclusions, *left_out))
    return complete.take(known)


def known_inputs(data: ResultsData) -> list[str]:
    """Names that an expression may use as inputs: symbols, numeric columns, and what follows from columns."""
    columns = [str(c) for c in data.frame.select_dtypes("number").columns]
    derived = [name for name, d in DERIVED.items() if set(d.needs) <= set(columns)]
    return list(dict.fromkeys((*SYMBOLS[:-1], *columns, *derived)))


def _missing(law: Law, data: ResultsData, name: str, derivation: Derivation | None) -> UserError:
    what = f"{data.source}: law {law.name} needs {name!r}"
    if derivation is not None:
        return UserError(
            f"{what} ({derivation.meaning}); there is neither such a column nor {', '.join(derivation.needs)}"
        )
    if law.terms:
        return UserError(f"{what}; there is no such column{nearest(name, known_inputs(data))}")
    return UserError(f"{what}, which is neither a parameter nor a column{nearest(name, known_inputs(data))}")
