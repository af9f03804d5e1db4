"""Every constant of the law that was asked for, and why the runs do not give it: those that a reduction took away included."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from analysis import laws
from analysis.laws import Law

if TYPE_CHECKING:
    from analysis.result import FitResult


def not_identified(result: "FitResult") -> dict[str, str]:
    """Constant -> why it is not identified, in the order of the equation.

    A fit has no line for a constant that its design took away: the term of an axis with one value is part of the floor, its
    exponent is gone. Asked which constants of the law the runs give, those count. What a user held or tied is not among them:
    only changes that carry a reason were made because of the data.
    """
    reasons = by_reduction(result.law)
    for p in result.parameters:
        if p.status == "not_identified":
            reasons[p.name] = p.reason
    return dict(sorted(reasons.items(), key=lambda item: _place(result.law, item[0])))


def by_reduction(law: Law) -> dict[str, str]:
    """Constants that reductions by the data held, tied or dropped -> why."""
    reasons: dict[str, str] = {}
    step = base = _base(law)
    for change in law.changes:
        after = step.apply(change) if base is not law else step
        if change.reason:
            gone = {p.name for p in step.parameters} - {p.name for p in after.parameters} | {change.parameter}
            how = {
                "fix": f"held at {change.value or 0:.4g}",
                "tie": f"tied to {change.other}",
                "drop": "its term is dropped",
            }
            reasons |= dict.fromkeys(gone, f"{how[change.op]}: {change.reason}")
        step = after
    return reasons


def constants_asked(law: Law) -> tuple[str, ...]:
    """Names of the constants of the law before the data reduced it; what the user held, tied or dropped stays so."""
    asked = _base(law)
    for change in law.changes:
        if not change.reason and asked is not law:
            asked = asked.apply(change)
    return tuple(p.name for p in asked.parameters)


def _base(law: Law) -> Law:
    """The law before its changes; the law itself where it is not one of `laws.ALL`."""
    return laws.ALL.get(law.name, law)


def _place(law: Law, name: str) -> int:
    names = [p.name for p in _base(law).parameters]
    return names.index(name) if name in names else len(names)


def unknown_inputs(law: Law) -> Mapping[str, str]:
    """Inputs of the law asked for on which the fitted law does not depend, because the data hold one value -> why."""
    base = _base(law)
    reasons = [change.reason for change in law.changes if change.reason]
    return {name: "; ".join(dict.fromkeys(reasons)) for name in base.inputs if name not in law.inputs and reasons}
