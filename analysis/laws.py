"""The laws that ship, by name, and those that a user writes down."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.accuracy_law import AccuracyLaw, accuracy_law
from analysis.expression_law import Constant, ExpressionLaw
from analysis.expression_read import from_dict as expression_from_dict
from analysis.expression_read import from_expression as from_expression
from analysis.expression_read import load_law as load_law
from analysis.law import VARIABLES as VARIABLES
from analysis.law import Change as Change
from analysis.law import Factor as Factor
from analysis.law import Law as Law
from analysis.law import Parameter as Parameter
from analysis.law import Term as Term
from analysis.law import Variable as Variable
from dlcm.errors import UserError, nearest

_FEW = "too few runs for all parameters"
HELD_EXPONENT = 1 / 3
"""Where an exponent is held that the data cannot tell: two levels of a variable are joined by any exponent equally well."""

CHINCHILLA = Law(
    name="chinchilla",
    floor="E",
    terms=(Term("A", (Factor("N", "alpha"),)), Term("B", (Factor("D", "beta"),))),
    family="dense",
    source="Hoffmann et al. 2022, eq 10",
    ladder=(
        (Change("tie", "beta", other="alpha", reason=_FEW),),
        (Change("fix", "alpha", value=HELD_EXPONENT, reason=_FEW),),
    ),
)

COMPRESSION_AWARE = Law(
    name="compression_aware",
    floor="E0",
    terms=(
        Term("A_t", (Factor("N_token", "d1", offset="t_t"),)),
        # The paper expects g > 0; a negative g is let through, so that data may contradict it.
        Term("A_c", (Factor("R", "g", sign=1, bounds=(-4.0, 4.0)), Factor("N_concept", "d2", offset="t_c"))),
        Term("A_d", (Factor("D", "a", offset="t_d"),)),
    ),
    family="dlcm",
    source="arXiv 2512.24617v2, eq 22",
    ladder=(
        tuple(Change("fix", t, value=0.0, reason=_FEW) for t in ("t_t", "t_c", "t_d")),
        (Change("tie", "d2", other="d1", reason=_FEW),),
        (Change("tie", "a", other="d1", reason=_FEW),),
        (Change("fix", "d1", value=HELD_EXPONENT, reason=_FEW),),
        (Change("fix", "g", value=0.0, reason=_FEW),),
    ),
)

OVERTRAINED = Law(
    name="overtrained",
    floor="E",
    terms=(Term("a", (Factor("N", "c"),)), Term("b", (Factor("sqrt6_D", "c"),))),
    family="dense",
    source="Gadre et al. 2024, eq 4, with M = D/N: a N^-c + b 6^(-c/2) (M N)^-c + E",
)

DECAY_GAIN = Law(
    name="decay_gain",
    floor=None,
    terms=(
        Term(
            "k",
            (
                Factor("stable_loss", "a", sign=1, bounds=(-10.0, 10.0)),
                Factor("R", "b", sign=1, bounds=(-4.0, 4.0)),
                Factor("N", "c", sign=1, bounds=(-3.0, 3.0)),
            ),
        ),
    ),
    family="dlcm",
    target="decay_gain",
    source="arXiv 2512.24617v2, eq 23: relative loss drop of the final anneal",
)

REPEATED_DATA = ExpressionLaw(
    name="repeated_data",
    floor="E",
    terms=(),
    family="dense",
    source="Muennighoff et al. 2023, section 3 (arXiv 2305.16264)",
    expression="E + A*repeated(N, (alpha*A/(beta*B))**(1/alpha) * U**(beta/alpha), R_N)**-alpha + B*repeated(D, U, R_D)**-beta",
    constants=(
        Constant("E", "floor", (0.0, math.inf), is_linear=True),
        Constant("A", "amplitude", (0.0, math.inf), centre="N**-alpha", is_linear=True),
        Constant("alpha", "exponent", (0.02, 3.0)),
        Constant("B", "amplitude", (0.0, math.inf), centre="D**-beta", is_linear=True),
        Constant("beta", "exponent", (0.02, 3.0)),
        Constant("R_N", "other", (0.1, 1e3)),
        Constant("R_D", "other", (0.1, 1e3)),
    ),
    explanation="repeated(x, u, r) = min(x, u) + u r (1 - exp(-max(x/u - 1, 0) / r))",
    ladder=((Change("tie", "beta", other="alpha", reason=_FEW),),),
)
"""With U unique tokens, D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)): a repeat is worth less and less, R_D repeats at the most.

Likewise for parameters in excess of U_N, the N at which U tokens are best spent: alpha A / U_N^alpha = beta B / U^beta.
"""

JOINT = Law(
    name="joint",
    floor="E0",
    terms=(
        Term("A", (Factor("N", "alpha"),), family="dense"),
        *(dataclasses.replace(term, family="dlcm") for term in COMPRESSION_AWARE.terms[:2]),
        COMPRESSION_AWARE.terms[2],
    ),
    source="chinchilla and arXiv 2512.24617v2, eq 22, with one floor and one data term; ours",
    ladder=(
        tuple(Change("fix", t, value=0.0, reason=_FEW) for t in ("t_t", "t_c", "t_d")),
        (Change("tie", "d2", other="d1", reason=_FEW),),
        (Change("tie", "alpha", other="d1", reason=_FEW),),
        (Change("fix", "g", value=0.0, reason=_FEW),),
    ),
)
"""Dense (P = 0, R = 1) and DLCM runs together: what text has left to say, and what tokens teach, is the same for both."""

ALL: Mapping[str, Law] = {
    law.name: law for law in (CHINCHILLA, COMPRESSION_AWARE, OVERTRAINED, REPEATED_DATA, DECAY_GAIN, JOINT)
}

_NO_OFFSETS = tuple(Change("fix", t, value=0.0) for t in ("t_t", "t_c", "t_d"))
_OF_EQ_22 = {
    "no_offsets": _NO_OFFSETS,
    "shared_exponents": (Change("tie", "d2", other="d1"),),
    "no_ratio": (Change("fix", "g", value=0.0),),
}
REDUCTIONS: Mapping[str, Mapping[str, tuple[Change, ...]]] = {
    "chinchilla": {"shared_exponents": (Change("tie", "beta", other="alpha"),)},
    "compression_aware": _OF_EQ_22,
    "joint": _OF_EQ_22,
    "repeated_data": {"tokens_only": (Change("fix", "R_N", value=1e9),)},
}
"""Nested reductions by name: `compression_aware.no_offsets.shared_exponents`. Others by `fix` and `tie`."""


def get(name: str) -> Law:
    """A law by name, with reductions behind dots: `chinchilla`, `compression_aware.no_offsets.no_ratio`.

    Raises:
        UserError: there is none; lists those that there are.
    """
    base, *steps = name.split(".")
    if base not in ALL:
        known = f"; there are {', '.join(ALL)}, or give an expression or a .yaml file"
        raise UserError(f"unknown law {name!r}{_close(base)}{known}")
    law, reductions = ALL[base], REDUCTIONS.get(base, {})
    for step in steps:
        if step not in reductions:
            raise UserError(f"law {base}: no reduction {step!r}{nearest(step, reductions)}")
        law = law.apply(*reductions[step])
    return law


def _close(name: str) -> str:
    found = difflib.get_close_matches(name, ALL, n=1)
    return f"; did you mean {found[0]!r}" if found else ""


def find(
    text: str,
    *,
    bounds: Mapping[str, Any] | None = None,
    family: str | None = None,
    target: str = "loss",
    inputs: Sequence[str] | None = None,
) -> Law:
    """A law from what a user typed: a name, the path of a .yaml file, or an expression.

    Args:
        text: what was typed.
        bounds: of an expression's parameters, (low, high) each; a `floor` and an `amplitude` need none.
        family: of an expression.
        target: of an expression.
        inputs: names in an expression that are columns of the data; every other is a parameter.

    Raises:
        UserError: no such law or file, an expression that is none, or options that only an expression has.
    """
    text = text.strip()
    if not text.endswith((".yaml", ".yml")) and any(c in text for c in "+-*/()^ "):
        return from_expression(
            text, bounds, family=family, target=target, inputs=inputs, name="expression", where="--law"
        )
    law = load_law(text) if text.endswith((".yaml", ".yml")) else get(text)
    if bounds or family is not None or target != "loss":
        raise UserError(f"--law {text}: bounds, family and target are given with an expression alone")
    return law


def to_dict(law: Law) -> dict[str, Any]:
    """A law as JSON types: its name, what was done to it, and its expression where it does not ship."""
    data: dict[str, Any] = {"name": law.name, "changes": [dataclasses.asdict(c) for c in law.changes]}
    if isinstance(law, AccuracyLaw):
        data["accuracy"] = law.to_dict()
    elif isinstance(law, ExpressionLaw) and law.base != ALL.get(law.name):
        data |= law.to_dict()
    elif law.family != ALL[law.name].family:
        data["family"] = law.family
    return data


def from_dict(data: Mapping[str, Any]) -> Law:
    """The inverse of `to_dict`."""
    changes = [Change(**c) for c in data["changes"]]
    if "accuracy" in data:
        return accuracy_law(**data["accuracy"]).apply(*changes)
    if "expression" in data:
        return expression_from_dict(data).apply(*changes)
    law = get(data["name"]).apply(*changes)
    return law.for_family(data["family"]) if "family" in data else law
