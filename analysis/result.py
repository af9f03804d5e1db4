"""A fit, frozen: constants with intervals and status, how far the descent can be trusted, and the card to repeat it."""

import dataclasses
import enum
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis import laws
from analysis.data import Convention, Exclusion
from analysis.laws import Change, Law
from dlcm.errors import UserError, nearest
from dlcm.record import read_json, write_json

Array = np.ndarray
SCHEMA_VERSION = 1
INSIDE = 0.02
"""Decades beyond the data that still count as inside: 5%, what a realised R moves a cost by."""


class Status(enum.StrEnum):
    """How a fit ended; the gravest that applies."""

    CONVERGED = "converged"
    NOT_IDENTIFIED = "not_identified"
    BOUND_HIT = "bound_hit"
    TOO_FEW_POINTS = "too_few_points"
    NEVER_MOVED = "never_moved"
    NOT_CONVERGED = "not_converged"


class ParameterStatus(enum.StrEnum):
    """What may be said about one constant."""

    OK = "ok"
    HELD = "held"
    AT_BOUND = "at_bound"
    NOT_IDENTIFIED = "not_identified"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One constant of a law.

    Attributes:
        working_value: what predictions use, whether or not the data pin it down.
        low: lower end of the 95% bootstrap interval; None without a bootstrap.
        high: upper end.
        status: whether the value means something; `reason` says why not.
        other_loss: the value under the other loss, to show what the choice of loss moves.
    """

    name: str
    working_value: float
    low: float | None
    high: float | None
    status: ParameterStatus
    reason: str = ""
    other_loss: float | None = None

    @property
    def value(self) -> float | None:
        """The estimate, None where it is not identified: then it is no property of the models, only of this fit."""
        return None if self.status is ParameterStatus.NOT_IDENTIFIED else self.working_value

    @property
    def identified(self) -> bool:
        """Whether the data pin it down."""
        return self.status is ParameterStatus.OK


@dataclasses.dataclass(frozen=True, eq=False)
class FitResult:
    """The outcome of `fit`.

    Attributes:
        law: the law that was fitted, a nested reduction of the one asked for where `law.changes` is not empty.
        status: gravest finding; `notes` has all of them.
        parameters: every constant, held ones included.
        objective: sum of penalties over the runs, natural units. r2: of the logarithm of the loss.
        rms: root mean square of log(prediction / observation).
        share_best: share of starts whose objective comes within 1e-6 of the best.
        condition: condition number, centred and scaled; correlations: pairs beyond 0.9.
        replicates: bootstrap constants, (n_bootstrap, n_parameters), natural units.
        ranges: input -> (lowest, highest) in the data.
    """

    law: Law
    status: Status
    notes: tuple[str, ...]
    parameters: tuple[Estimate, ...]
    objective: float
    rms: float
    r2: float | None
    n_runs: int
    loss: str
    delta: float
    other_loss: str
    seed: int
    n_starts: int
    share_best: float
    condition: float
    correlations: tuple[tuple[str, str, float], ...]
    replicates: Array
    ranges: Mapping[str, tuple[float, float]]
    exclusions: tuple[Exclusion, ...]
    convention: Convention
    source: str
    data_hash: str

    @functools.cached_property
    def values(self) -> dict[str, float]:
        """Working values by name, for `law.predict`. For what is known about each, read `parameters`."""
        return {p.name: p.working_value for p in self.parameters}

    def __getitem__(self, name: str) -> Estimate:
        """The estimate of one constant: `result["alpha"].value`."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise UserError(f"law {self.law.name}: no parameter {name!r}{nearest(name, [p.name for p in self.parameters])}")

    @property
    def n_free(self) -> int:
        """Number of estimated constants."""
        return len(self.law.free)

    @property
    def sound(self) -> bool:
        """Whether the descent itself can be trusted (it reached a minimum, off the bounds, with enough runs)."""
        return self.status in (Status.CONVERGED, Status.NOT_IDENTIFIED)

    def predict(self, **inputs: Any) -> Array:
        """Predicted loss, nats per token."""
        return self.law.predict(self.values, **inputs)

    def predict_interval(self, **inputs: Any) -> tuple[Array, Array]:
        """95% bootstrap interval of the predicted loss (of the law, not of a new run).

        Raises:
            UserError: the fit was made without a bootstrap.
        """
        if not len(self.replicates):
            raise UserError("this fit has no bootstrap; fit again with n_bootstrap > 0 for intervals")
        draws = np.stack([self.law.predict(v, **inputs) for v in self.replicate_values()])
        low, high = np.percentile(draws, [2.5, 97.5], axis=0)
        return low, high

    def replicate_values(self) -> list[dict[str, float]]:
        """Constants of each bootstrap refit."""
        names = [p.name for p in self.parameters]
        return [dict(zip(names, row.tolist())) for row in self.replicates]

    def outside(self, **inputs: float) -> dict[str, float]:
        """How far inputs lie outside the data, in decades, by input; empty inside."""
        distances = {}
        for name, value in inputs.items():
            if name not in self.ranges or value <= 0:
                continue
            low, high = self.ranges[name]
            distance = max(np.log10(value / high), np.log10(low / value))
            if distance > INSIDE:
                distances[name] = float(distance)
        return distances

    def report(self) -> str:
        """The fit as text: constants, how the descent went, what was left out, and the card."""
        from analysis.result_text import format_report

        return format_report(self)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types. A constant that is not identified has `value` null and its `working_value` beside it."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["law"] = {"name": self.law.name, "changes": [dataclasses.asdict(c) for c in self.law.changes]}
        data["equation"] = self.law.equation
        data["parameters"] = [{"value": _finite(p.value), **dataclasses.asdict(p)} for p in self.parameters]
        data["condition"] = _finite(self.condition)
        data["replicates"] = self.replicates.tolist()
        data["exclusions"] = [dataclasses.asdict(e) for e in self.exclusions]
        data["convention"] = dataclasses.asdict(self.convention)
        data["definitions"] = self.convention.definitions()
        return {
            "schema": SCHEMA_VERSION,
            **data,
            "notes": list(self.notes),
            "ranges": {k: list(v) for k, v in self.ranges.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "fit") -> "FitResult":
        """The inverse of `to_dict`.

        Raises:
            UserError: another schema, or a missing key.
        """
        if data.get("schema") != SCHEMA_VERSION:
            raise UserError(f"{where}: schema {data.get('schema')!r}, expected {SCHEMA_VERSION}; fit again")
        try:
            fields: dict[str, Any] = {f.name: data[f.name] for f in dataclasses.fields(cls)}
            law = laws.get(data["law"]["name"]).apply(*(Change(**c) for c in data["law"]["changes"]))
            parameters = []
            for entry in data["parameters"]:
                entry = {k: v for k, v in entry.items() if k != "value"}
                parameters.append(Estimate(**{**entry, "status": ParameterStatus(entry["status"])}))
            fields |= {
                "law": law,
                "status": Status(data["status"]),
                "notes": tuple(data["notes"]),
                "parameters": tuple(parameters),
                "condition": float("inf") if data["condition"] is None else data["condition"],
                "correlations": tuple((a, b, c) for a, b, c in data["correlations"]),
                "replicates": np.array(data["replicates"], dtype=float).reshape(-1, len(parameters)),
                "ranges": {k: (v[0], v[1]) for k, v in data["ranges"].items()},
                "exclusions": tuple(Exclusion(**e) for e in data["exclusions"]),
                "convention": Convention(**data["convention"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not a fit written by this version ({error}); fit again") from None
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "FitResult":
        """Read what `save` wrote."""
        return cls.from_dict(read_json(Path(path)), str(path))


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
