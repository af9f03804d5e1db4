"""What a check of the closed form found (`flops.measure`), and how it is shown. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flops.table import align


@dataclass(frozen=True)
class Difference:
    """One convention in which the counters differ from the closed form.

    Attributes:
        component: whose FLOPs differ.
        flops: what it adds to the closed form of one forward pass.
        reason: why, in words.
    """

    component: str
    flops: float
    reason: str


@dataclass(frozen=True)
class Checked:
    """One component (or `total`) under the closed form and under both counters, in FLOPs.

    Attributes:
        component: name, as in `count`.
        closed_form: as the project counts, causal halved.
        listed: sum of the listed differences.
        torch: what FlopCounterMode counted.
        fvcore: twice what fvcore counted in multiply-adds; None where fvcore has nothing to say (a backward pass).
    """

    component: str
    closed_form: float
    listed: float
    torch: float
    fvcore: float | None

    @property
    def expected(self) -> float:
        """The closed form under the counters' conventions."""
        return self.closed_form + self.listed

    @property
    def difference(self) -> float:
        """The counter's figure that is farthest from what is expected, less that; must be zero."""
        found = [self.torch] if self.fvcore is None else [self.torch, self.fvcore]
        return max((x - self.expected for x in found), key=abs)

    @property
    def agrees(self) -> bool:
        """Whether the counters give the expected figure exactly."""
        return self.difference == 0


@dataclass(frozen=True)
class CheckedParameters:
    """All parameters: closed form against the built model."""

    closed_form: int
    built: int

    @property
    def agrees(self) -> bool:
        """Whether they are equal."""
        return self.closed_form == self.built


@dataclass(frozen=True)
class Check:
    """A whole check of one model at one length.

    Attributes:
        rows: forward FLOPs, one row a component.
        training: forward and backward FLOPs in total.
        parameters: in total.
        differences: the listed differences of the forward pass; training has three times as much of each.
    """

    rows: tuple[Checked, ...]
    training: Checked
    parameters: CheckedParameters
    differences: tuple[Difference, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not agree; empty where everything does."""
        rows = [f"forward {row.component}" for row in self.rows if not row.agrees]
        rows += [] if self.training.agrees else ["training"]
        return (*rows, *([] if self.parameters.agrees else ["parameters"]))

    @property
    def agrees(self) -> bool:
        """Whether everything agrees."""
        return not self.failures


def format_check(name: str, seq_len: int, check: Check) -> str:
    """The columns for a person, and under them every listed difference with its amount."""
    cells = [["FLOPs", "closed form", "listed", "torch", "fvcore", "difference"]]
    for row in (*check.rows, check.training):
        if row.closed_form or row.torch:
            label = "forward and backward" if row is check.training else row.component
            fvcore = "-" if row.fvcore is None else f"{row.fvcore:,.0f}"
            figures = f"{row.closed_form:,.0f}", f"{row.listed:+,.0f}", f"{row.torch:,.0f}", fvcore
            cells.append([label, *figures, f"{row.difference:+,.0f}" if row.difference else "0"])
    built = check.parameters
    lines = [
        f"{name}, {seq_len} tokens",
        align(cells, left=1),
        f"parameters: {built.closed_form:,} in closed form, {built.built:,} built",
        "differences in convention (in `listed`; three times as much in the last row; fvcore has no backward pass):",
        *(f"  {flops:+,.0f}  {names}: {reason}" for reason, names, flops in _by_reason(check.differences)),
        "  fvcore counts multiply-adds: doubled. Boundaries are injected; the detector runs on states of the same shape.",
    ]
    return "\n".join(lines)


def _by_reason(differences: Sequence[Difference]) -> list[tuple[str, str, float]]:
    reasons = dict.fromkeys(d.reason for d in differences)
    groups = {reason: [d for d in differences if d.reason == reason] for reason in reasons}
    return [
        (reason, ", ".join(d.component for d in group), sum(d.flops for d in group)) for reason, group in groups.items()
    ]


def check_json(check: Check) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "components": [_row_json(row) for row in check.rows],
        "training": _row_json(check.training),
        "parameters": {**asdict(check.parameters), "agrees": check.parameters.agrees},
        "differences": [asdict(difference) for difference in check.differences],
        "agrees": check.agrees,
    }


def _row_json(row: Checked) -> dict[str, Any]:
    return {**asdict(row), "expected": row.expected, "difference": row.difference, "agrees": row.agrees}
