"""Scaling laws as frozen values: equation, prediction, analytic gradient, bounds. A law knows no data and no optimiser.

Every law here is a sum  L = E + sum_k A_k * prod_f (v_f + t_f) ** (+-e_f)  over variables v such as N(1 - P), so one
gradient serves all, and a nested reduction (an offset held at 0, two exponents tied) is again such a law.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from dlcm.errors import UserError, nearest

Array = np.ndarray
Kind = Literal["floor", "amplitude", "exponent", "offset"]


@dataclasses.dataclass(frozen=True)
class Variable:
    """What is raised to a power: a function of the inputs that scales with them."""

    inputs: tuple[str, ...]
    compute: Callable[..., Array]
    text: str
    latex: str


VARIABLES: Mapping[str, Variable] = {
    "N": Variable(("N",), lambda N: N, "N", "N"),
    "D": Variable(("D",), lambda D: D, "D", "D"),
    "R": Variable(("R",), lambda R: R, "R", "R"),
    "N_token": Variable(("N", "P"), lambda N, P: N * (1 - P), "N(1-P)", "N(1-P)"),
    "N_concept": Variable(("N", "P"), lambda N, P: N * P, "N P", "N P"),
    "sqrt6_D": Variable(("D",), lambda D: math.sqrt(6) * D, "sqrt(6) D", r"\sqrt{6}\,D"),
    "stable_loss": Variable(("stable_loss",), lambda stable_loss: stable_loss, "L_stable", r"L_\mathrm{stable}"),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A constant of a law.

    Attributes:
        kind: `amplitude`s are fitted as logarithms of centred amplitudes, the others as they are, on scaled variables.
        bounds: of an exponent, in its own unit; the others' bounds follow from the data's scale.
    """

    name: str
    kind: Kind
    bounds: tuple[float, float] = (0.0, math.inf)


@dataclasses.dataclass(frozen=True)
class Factor:
    """(variable + offset) ** (sign * exponent)."""

    variable: str
    exponent: str
    sign: int = -1
    offset: str | None = None
    bounds: tuple[float, float] = (0.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Term:
    """amplitude * product of factors."""

    amplitude: str
    factors: tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """One step from a law to a nested reduction of it.

    Attributes:
        op: `fix` holds `parameter` at `value`; `tie` sets it equal to the parameter `other`; `drop` removes its term.
    """

    op: Literal["fix", "tie", "drop"]
    parameter: str
    value: float | None = None
    other: str | None = None
    reason: str = ""

    def describe(self) -> str:
        """The step in words."""
        if self.op == "fix":
            what = f"{self.parameter} = {self.value:.4g} held"
        elif self.op == "tie":
            what = f"{self.parameter} = {self.other} tied"
        else:
            what = f"term of {self.parameter} dropped"
        return what + (f" ({self.reason})" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class Law:
    """A scaling law; see the module's head for the form.

    Attributes:
        name: as given on the command line.
        floor: name of the irreducible loss; None for a law without one.
        family: which models it describes (`dense`, `dlcm`), None for any.
        target: what it predicts; a column of the data.
        fixed: parameters that are held, with their values.
        changes: what was done to the law of this name to reach this one.
        ladder: reductions that may be tried in this order when runs are few.
        source: where the law is from.
    """

    name: str
    floor: str | None
    terms: tuple[Term, ...]
    family: str | None = None
    target: str = "loss"
    source: str = ""
    fixed: tuple[tuple[str, float], ...] = ()
    changes: tuple[Change, ...] = ()
    ladder: tuple[tuple[Change, ...], ...] = ()

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All constants in the order of the equation, held ones included."""
        found: dict[str, Parameter] = {}
        if self.floor:
            found[self.floor] = Parameter(self.floor, "floor")
        for term in self.terms:
            found.setdefault(term.amplitude, Parameter(term.amplitude, "amplitude"))
            for factor in term.factors:
                found.setdefault(factor.exponent, Parameter(factor.exponent, "exponent", factor.bounds))
                if factor.offset:
                    found.setdefault(factor.offset, Parameter(factor.offset, "offset"))
        return tuple(found.values())

    @functools.cached_property
    def free(self) -> tuple[Parameter, ...]:
        """The constants that are estimated."""
        held = dict(self.fixed)
        return tuple(p for p in self.parameters if p.name not in held)

    @functools.cached_property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables that are raised to powers."""
        return tuple(dict.fromkeys(f.variable for term in self.terms for f in term.factors))

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs of `predict`."""
        found = dict.fromkeys(i for name in self.variables for i in VARIABLES[name].inputs)
        order = ("N", "D", "R", "P")
        return tuple(sorted(found, key=lambda i: order.index(i) if i in order else len(order)))

    @property
    def equation(self) -> str:
        """The law as plain text, with held parameters as numbers."""
        return _render(self, latex=False)

    @property
    def latex(self) -> str:
        """The law as LaTeX, without dollar signs."""
        return _render(self, latex=True)

    def compute_variables(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Variables from inputs, broadcast.

        Raises:
            UserError: an input is missing.
        """
        for name in self.inputs:
            if name not in inputs:
                raise UserError(f"law {self.name}: needs {', '.join(self.inputs)}; {name} is missing")
        arrays = {name: np.asarray(inputs[name], dtype=float) for name in self.inputs}
        return {v: VARIABLES[v].compute(*(arrays[i] for i in VARIABLES[v].inputs)) for v in self.variables}

    def predict(self, values: Mapping[str, float], **inputs: Any) -> Array:
        """The law at given constants.

        Args:
            values: parameter -> value; held parameters may be left out.
            **inputs: arrays of the law's inputs, broadcast against each other. Others are let pass and only give their
                shape: a reduction predicts what its law predicts, also where it no longer depends on all of its inputs.
        """
        shape = np.broadcast_shapes(*(np.shape(value) for value in inputs.values()))
        return np.broadcast_to(self.evaluate(values, self.compute_variables(inputs), gradient=False)[0], shape)

    def gradient(self, values: Mapping[str, float], **inputs: Any) -> Array:
        """Partial derivatives by each of `parameters`, shape (..., n_parameters)."""
        shape = np.broadcast_shapes(*(np.shape(value) for value in inputs.values()))
        partials = self.evaluate(values, self.compute_variables(inputs), gradient=True)[1]
        return np.stack([np.broadcast_to(partials[p.name], shape) for p in self.parameters], axis=-1)

    def evaluate(
        self, values: Mapping[str, float], variables: Mapping[str, Array], *, gradient: bool
    ) -> tuple[Array, dict[str, Array]]:
        """Value and partial derivatives on variables that are already computed (and may be scaled).

        For a term T = A prod (v + t)^(s e):  dT/dA = T/A,  dT/de = s T log(v + t),  dT/dt = s e T / (v + t).
        """
        values = {**values, **dict(self.fixed)}
        total: Any = values[self.floor] if self.floor else 0.0
        partials: dict[str, Any] = {self.floor: np.asarray(1.0)} if gradient and self.floor else {}
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            for term in self.terms:
                shifted = [variables[f.variable] + (values[f.offset] if f.offset else 0.0) for f in term.factors]
                shape: Any = 1.0
                for factor, base in zip(term.factors, shifted):
                    shape = shape * base ** (factor.sign * values[factor.exponent])
                product = values[term.amplitude] * shape
                total = total + product
                if not gradient:
                    continue
                partials[term.amplitude] = partials.get(term.amplitude, 0.0) + shape
                for factor, base in zip(term.factors, shifted):
                    power = factor.sign * product
                    partials[factor.exponent] = partials.get(factor.exponent, 0.0) + power * np.log(base)
                    if factor.offset:
                        slope = power * values[factor.exponent] / base
                        partials[factor.offset] = partials.get(factor.offset, 0.0) + slope
        return np.asarray(total), partials

    def apply(self, *changes: Change) -> "Law":
        """The nested reduction after `changes`; each is recorded.

        Raises:
            UserError: a change names a parameter that the law does not have.
        """
        law = self
        for change in changes:
            names = [p.name for p in law.parameters]
            for name in (change.parameter, change.other):
                if name is not None and name not in names:
                    raise UserError(f"law {law.name}: no parameter {name!r}{nearest(name, names)}")
            law = _CHANGE[change.op](law, change)
            law = dataclasses.replace(law, changes=(*law.changes, change))
        return law

    def fix(self, reason: str = "", **values: float) -> "Law":
        """The law with parameters held: `COMPRESSION_AWARE.fix(t_t=0, t_c=0, t_d=0)`."""
        return self.apply(*(Change("fix", name, value=float(v), reason=reason) for name, v in values.items()))

    def tie(self, reason: str = "", **pairs: str) -> "Law":
        """The law with exponents set equal: `tie(d2="d1")`."""
        return self.apply(*(Change("tie", name, other=other, reason=reason) for name, other in pairs.items()))


def _fix(law: Law, change: Change) -> Law:
    kind = next(p.kind for p in law.parameters if p.name == change.parameter)
    if kind == "amplitude" or change.value is None:
        raise UserError(
            f"law {law.name}: {change.parameter} is an {kind}; hold an exponent, an offset or the floor, or drop the term"
        )
    return dataclasses.replace(
        law, fixed=(*(f for f in law.fixed if f[0] != change.parameter), (change.parameter, change.value))
    )


def _tie(law: Law, change: Change) -> Law:
    other = str(change.other)

    def rename(factor: Factor) -> Factor:
        return dataclasses.replace(factor, exponent=other) if factor.exponent == change.parameter else factor

    terms = tuple(dataclasses.replace(t, factors=tuple(map(rename, t.factors))) for t in law.terms)
    return _forget_absent(dataclasses.replace(law, terms=terms))


def _drop(law: Law, change: Change) -> Law:
    kept = tuple(t for t in law.terms if t.amplitude != change.parameter)
    return _forget_absent(dataclasses.replace(law, terms=kept))


def _forget_absent(law: Law) -> Law:
    names = {p.name for p in law.parameters}
    return dataclasses.replace(law, fixed=tuple(f for f in law.fixed if f[0] in names))


_CHANGE: Mapping[str, Callable[[Law, Change], Law]] = {"fix": _fix, "tie": _tie, "drop": _drop}


def _symbol(name: str, latex: bool) -> str:
    if not latex:
        return name
    greek = {"alpha": r"\alpha", "beta": r"\beta", "d1": r"\delta_1", "d2": r"\delta_2", "g": r"\gamma"}
    if name in greek:
        return greek[name]
    head, _, tail = name.partition("_")
    if not tail and head[-1:].isdigit():
        head, tail = head[:-1], head[-1]
    return f"{head}_{{{tail}}}" if tail else head


def _render(law: Law, *, latex: bool) -> str:
    held = dict(law.fixed)

    def constant(name: str) -> str:
        return f"{held[name]:.4g}" if name in held else _symbol(name, latex)

    parts = [constant(law.floor)] if law.floor else []
    for term in law.terms:
        above, below = [constant(term.amplitude)], []
        for factor in term.factors:
            if held.get(factor.exponent) == 0.0:
                continue
            variable = VARIABLES[factor.variable]
            base = variable.latex if latex else variable.text
            if factor.offset and held.get(factor.offset) != 0.0:
                base = f"({base} + {constant(factor.offset)})"
            elif len(base) > 1 and not base.startswith("L_"):
                base = f"({base})"
            exponent = constant(factor.exponent)
            power = f"{base}^{{{exponent}}}" if latex else f"{base}^{exponent}"
            (above if factor.sign > 0 else below).append(power)
        numerator = (r"\," if latex else " ").join(above)
        if not below:
            parts.append(numerator)
        elif latex:
            parts.append(rf"\frac{{{numerator}}}{{{' '.join(below)}}}")
        else:
            parts.append(f"{numerator} / {' '.join(below)}")
    left = "L" if law.target == "loss" else ("G" if latex else law.target)
    return f"{left}({', '.join(_symbol(i, False) for i in law.inputs)}) = " + (" + ".join(parts) or "0")


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

ALL: Mapping[str, Law] = {law.name: law for law in (CHINCHILLA, COMPRESSION_AWARE, OVERTRAINED, DECAY_GAIN)}


def get(name: str) -> Law:
    """A law by name; a UserError names the nearest one where there is none."""
    if name not in ALL:
        raise UserError(f"unknown law {name!r}{nearest(name, ALL)}")
    return ALL[name]
