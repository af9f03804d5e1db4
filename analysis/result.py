"""A fit, frozen: constants with intervals and status, how far the descent can be trusted, and the card to repeat it."""

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import laws
from analysis.data import Convention, Exclusion
from analysis.finding import Finding, Severity
from analysis.intervals import interval
from analysis.law import Family, Law
from analysis.objective import LossKind
from dlcm.errors import UserError, nearest
from dlcm.record import read_json, write_json

Array = np.ndarray
SCHEMA_VERSION = 2
INSIDE = 0.02
"""Decades beyond the data that still count as inside: 5%, what a realised R moves a cost by."""


class Status(enum.StrEnum):
    """How a fit ended; the gravest that applies.

    `certified`: every check passed, and every constant is identified but for offsets that may be 0.
    """

    CERTIFIED = "certified"
    NOT_IDENTIFIED = "not_identified"
    ILL_CONDITIONED = "ill_conditioned"
    BOUND_HIT = "bound_hit"
    TOO_FEW_POINTS = "too_few_points"
    STARTS_DISAGREE = "starts_disagree"
    NEVER_MOVED = "never_moved"
    NOT_CONVERGED = "not_converged"


class ParameterStatus(enum.StrEnum):
    """What may be said about one constant."""

    OK = "ok"
    HELD = "held"
    AT_BOUND = "at_bound"
    NOT_IDENTIFIED = "not_identified"


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that a minimum was examined for.

    Attributes:
        status: that of the fit where the check fails.
        text: what was found, with the limit.
    """

    name: str
    passed: bool
    status: Status
    text: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One constant of a law.

    Attributes:
        working_value: what predictions use, whether or not the data pin it down.
        low: lower end of the 95% bootstrap interval; None without a bootstrap.
        high: upper end.
        status: whether the value means something; `reason` says why not.
        other_loss: the value under the other loss, to show what the choice of loss moves.
        spread: lowest and highest value under several losses and deltas, to be read beside the interval; None where it is held.
        profile: 95% interval by profile likelihood, a second opinion; None where there is none (amplitudes, no spare run).
    """

    name: str
    working_value: float
    low: float | None
    high: float | None
    status: ParameterStatus
    reason: str = ""
    other_loss: float | None = None
    profile: tuple[float, float] | None = None
    spread: tuple[float, float] | None = None

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
        checks: what the minimum was examined for; `certified` needs all of them.
        share_best: share of starts whose objective comes within 1e-6 of the best.
        condition: condition number, centred and scaled; correlations: pairs beyond 0.9.
        replicates: bootstrap constants, (n_bootstrap, n_parameters), natural units.
        ranges: input -> (lowest, highest) in the data.
        findings: what is worth knowing of the data and the fit (`analysis.hygiene`), the gravest first.
    """

    law: Law
    status: Status
    notes: tuple[str, ...]
    parameters: tuple[Estimate, ...]
    objective: float
    rms: float
    r2: float | None
    checks: tuple[Check, ...]
    n_runs: int
    n_clusters: int
    loss: LossKind
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
    findings: tuple[Finding, ...] = ()

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

    @functools.cached_property
    def not_identified(self) -> dict[str, str]:
        """Constants of the whole law that the runs do not give -> why; those that a reduction took away included."""
        from analysis.unknown import not_identified

        return not_identified(self)

    @property
    def sound(self) -> bool:
        """Whether the descent itself can be trusted (it reached a minimum, off the bounds, with enough runs)."""
        return self.status in (Status.CERTIFIED, Status.NOT_IDENTIFIED)

    def predict(self, **inputs: Any) -> Array:
        """Predicted loss, nats per token.

        Raises:
            UserError: an input leaves the one value that the runs have of it: the fitted law does not depend on it then.
        """
        self._require_known(inputs)
        return self.law.predict(self.values, **inputs)

    def predict_interval(self, **inputs: Any) -> tuple[Array, Array]:
        """95% bootstrap interval of the predicted loss (of the law, not of a new run).

        Raises:
            UserError: the fit was made without a bootstrap, or an input leaves the one value that the runs have of it.
        """
        if not len(self.replicates):
            raise UserError("this fit has no bootstrap; fit again with n_bootstrap > 0 for intervals")
        self._require_known(inputs)
        draws = np.stack([self.law.predict(v, **inputs) for v in self.replicate_values()])
        return interval(draws)

    def _require_known(self, inputs: Mapping[str, Any]) -> None:
        """Refuse inputs that the runs never varied at values that they do not have."""
        from analysis.unknown import unknown_inputs

        for name in unknown_inputs(self.law):
            values = np.unique(np.asarray(inputs.get(name, []), dtype=float))
            if any(self.outside(**{name: value}) for value in values.tolist()):
                raise UserError(
                    f"law {self.law.name}: the runs hold one {name} ({self.describe_range(name)}), so what it does to the "
                    f"loss is not known; predict at that {name}, or add runs with others"
                )

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

    def describe_range(self, name: str) -> str:
        """`2e+11`, or `1e+08 to 3e+09`: the values of an input in the data."""
        low, high = self.ranges[name]
        return f"{low:.3g}" if high <= low * 10**INSIDE else f"{low:.3g} to {high:.3g}"

    def for_family(self, family: Family) -> "FitResult":
        """Of a fit of both families, what it says of one: its law, its constants, the ranges of its runs.

        Objective, checks and notes remain those of the whole fit.

        Raises:
            UserError: the fit is of the other family alone.
        """
        law = self.law.for_family(family)
        if law == self.law:
            return self
        names = [p.name for p in law.parameters]
        columns = [i for i, p in enumerate(self.parameters) if p.name in names]
        return dataclasses.replace(
            self,
            law=law,
            parameters=tuple(p for p in self.parameters if p.name in names),
            replicates=self.replicates[:, columns],
            correlations=tuple(c for c in self.correlations if c[0] in names and c[1] in names),
            ranges={
                key: self.ranges.get(f"{family} {key}", span) for key, span in self.ranges.items() if " " not in key
            },
            notes=(*self.notes, f"constants of the {family} models, fitted together with the others"),
        )

    def report(self) -> str:
        """The fit as text: constants, how the descent went, what was left out, and the card."""
        from analysis.result_text import format_report

        return format_report(self)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types. A constant that is not identified has `value` null and its `working_value` beside it."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["law"] = laws.to_dict(self.law)
        data["equation"] = self.law.equation
        data["parameters"] = [_estimate_json(p) for p in self.parameters]
        data["checks"] = [dataclasses.asdict(check) for check in self.checks]
        data["not_identified"] = self.not_identified
        data["condition"] = _finite(self.condition)
        data["replicates"] = self.replicates.tolist()
        data["exclusions"] = [dataclasses.asdict(e) for e in self.exclusions]
        data["findings"] = [dataclasses.asdict(f) for f in self.findings]
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
            data = {"findings": [], **data}
            fields: dict[str, Any] = {f.name: data[f.name] for f in dataclasses.fields(cls)}
            law = laws.from_dict(data["law"])
            parameters = []
            for entry in data["parameters"]:
                entry = {k: v for k, v in entry.items() if k != "value"}
                pairs: dict[str, Any] = {key: entry.get(key) and _ends(entry[key]) for key in ("profile", "spread")}
                parameters.append(Estimate(**(entry | {"status": ParameterStatus(entry["status"])} | pairs)))
            fields |= {
                "law": law,
                "status": Status(data["status"]),
                "notes": tuple(data["notes"]),
                "parameters": tuple(parameters),
                "checks": tuple(Check(**(c | {"status": Status(c["status"])})) for c in data["checks"]),
                "condition": float("inf") if data["condition"] is None else data["condition"],
                "correlations": tuple((a, b, c) for a, b, c in data["correlations"]),
                "replicates": np.array(data["replicates"], dtype=float).reshape(-1, len(parameters)),
                "ranges": {k: (v[0], v[1]) for k, v in data["ranges"].items()},
                "exclusions": tuple(Exclusion(**e) for e in data["exclusions"]),
                "findings": tuple(Finding(**{**f, "severity": Severity(f["severity"])}) for f in data["findings"]),
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


def _estimate_json(p: Estimate) -> dict[str, Any]:
    profile = None if p.profile is None else [_finite(end) for end in p.profile]
    return {"value": _finite(p.value), **dataclasses.asdict(p), "profile": profile}


def _ends(ends: Sequence[float | None]) -> tuple[float, float]:
    """JSON has no infinity: an end that is not there is open."""
    return (-np.inf if ends[0] is None else ends[0], np.inf if ends[1] is None else ends[1])


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
