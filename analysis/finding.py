"""One thing that is worth knowing before a fit is believed."""

import dataclasses
import enum
from collections.abc import Iterable


class Severity(enum.StrEnum):
    """How much a finding matters."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that was found in data or in a fit.

    Attributes:
        name: of the check, for programs: `narrow_span`.
        severity: `error` where the fit's numbers are not to be used as they are.
        text: what was found, with its figures, and what it makes unreliable.
    """

    name: str
    severity: Severity
    text: str

    def describe(self) -> str:
        """`warning: N spans ...`."""
        return f"{self.severity}: {self.text}"


def gravest_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors, then warnings, then notes; otherwise in the order in which they were found."""
    gravity = list(Severity)
    return tuple(sorted(findings, key=lambda f: -gravity.index(f.severity)))
