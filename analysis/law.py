"""A scaling law as a frozen value: equation, prediction, analytic gradient, bounds. A law knows no data and no optimiser.

A `Law` is a sum  L = E + sum_k A_k * prod_f (v_f + t_f) ** (+-e_f)  over variables v such as N(1 - P), so one gradient
serves all, and a nested reduction (an offset held at 0, two exponents tied) is again such a law. A law of another form is an
`ExpressionLaw` (`analysis.expression_law`), which has the same methods.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dlcm.errors import UserError, nearest

if TYPE_CHECKING:
    from analysis.coordinates import Coordinates
    from analysis.data import ResultsData

Array = np.ndarray
Kind = Literal["floor", "amplitude", "exponent", "offset", "ceiling", "other"]
Family = Literal["dense", "dlcm"]
FAMILIES: tuple[Family, ...] = ("dense", "dlcm")
IS_DENSE = "is_dense"
"""Beside the variables of a law for both families: which rows are dense models (P = 0)."""


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
    """amplitude * product of factors.

    Attributes:
        family: the only models that the term counts for, in a law of both; None where it counts for all.
    """

    amplitude: str
    factors: tuple[Factor, ...]
    family: Family | None = None


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
        if self.is_joint:
            found["P"] = None
        return sort_inputs(found)

    @functools.cached_property
    def is_joint(self) -> bool:
        """Whether some terms count for one family alone, so that the law describes both."""
        return any(term.family for term in self.terms)

    @property
    def equation(self) -> str:
        """The law as plain text, with held parameters as numbers."""
        from analysis.law_text import render

        return render(self, latex=False)

    @property
    def latex(self) -> str:
        """The law as LaTeX, without dollar signs."""
        from analysis.law_text import render

        return render(self, latex=True)

    @property
    def positive(self) -> tuple[str, ...]:
        """Variables that must be above 0."""
        return self.variables

    def centre(self, variables: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, Array]]:
        """Geometric means of the variables, and the variables over them.

        Raises:
            UserError: there is no row of a family that the law has terms for.
        """
        used = self.used_rows(variables)
        for name, rows in used.items():
            if not rows.any():
                raise UserError(
                    f"law {self.name}: no run that {name} counts for; the law describes dense and dlcm models, and one is missing"
                )
        own = {name: variables[name] for name in self.variables}
        scales = {n: float(np.exp(np.mean(np.log(v[used[n]] if n in used else v)))) for n, v in own.items()}
        return scales, {**variables, **{name: values / scales[name] for name, values in own.items()}}

    def check_on(self, variables: Mapping[str, Array], data: "ResultsData") -> None:
        """Refuse data on which the law is not finite; a sum of powers is, where its variables are above 0."""

    def coordinates(self, scales: Mapping[str, float], target_scale: float, target_max: float) -> "Coordinates":
        """The coordinates that this law is fitted in; see `analysis.coordinates`."""
        from analysis.coordinates import PowerCoordinates

        return PowerCoordinates(self, scales, target_scale, target_max)

    def for_family(self, family: Family) -> "Law":
        """Of a law for both families, what it says of one: its own terms and the shared ones. Other laws are let pass.

        Raises:
            UserError: the law describes the other family alone.
        """
        if not self.is_joint:
            if self.family not in (None, family):
                raise UserError(f"law {self.name}: it describes {self.family} models, not {family} ones")
            return self
        terms = tuple(dataclasses.replace(t, family=None) for t in self.terms if t.family in (None, family))
        return _forget_absent(dataclasses.replace(self, terms=terms, family=family))

    def compute_variables(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Variables from inputs, broadcast; 1 where a variable is of no consequence because its terms are of the other family.

        Raises:
            UserError: an input is missing.
        """
        arrays = self.require_inputs(inputs)
        found = {v: VARIABLES[v].compute(*(arrays[i] for i in VARIABLES[v].inputs)) for v in self.variables}
        if self.is_joint:
            found[IS_DENSE] = arrays["P"] == 0
            found |= {v: np.where(used, found[v], 1.0) for v, used in self.used_rows(found).items()}
        return found

    def require_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The law's inputs as arrays of floats.

        Raises:
            UserError: an input is missing.
        """
        for name in self.inputs:
            if name not in inputs:
                raise UserError(f"law {self.name}: needs {', '.join(self.inputs)}; {name} is missing")
        return {name: np.asarray(inputs[name], dtype=float) for name in self.inputs}

    def used_rows(self, variables: Mapping[str, Array]) -> dict[str, Array]:
        """Of the variables that count for one family alone: the rows of that family."""
        used: dict[str, Array] = {}
        for name in self.variables if self.is_joint else ():
            families: set[Family | None] = {t.family for t in self.terms for f in t.factors if f.variable == name}
            if len(families) == 1 and (family := families.pop()) is not None:
                used[name] = _of_family(variables, family)
        return used

    def predict(self, values: Mapping[str, float], **inputs: Any) -> Array:
        """The law at given constants.

        Args:
            values: parameter -> value; held parameters may be left out.
            **inputs: arrays of the law's inputs, broadcast against each other. Others are let pass and only give their
                shape: a reduction predicts what its law predicts, also where it no longer depends on all of its inputs.
        """
        shape = np.broadcast_shapes(*(np.shape(value) for value in inputs.values()))
        values = {**values, **dict(self.fixed)}
        return np.broadcast_to(self.evaluate(values, self.compute_variables(inputs), gradient=False)[0], shape)

    def gradient(self, values: Mapping[str, float], **inputs: Any) -> Array:
        """Partial derivatives by each of `parameters`, shape (..., n_parameters)."""
        shape = np.broadcast_shapes(*(np.shape(value) for value in inputs.values()))
        values = {**values, **dict(self.fixed)}
        partials = self.evaluate(values, self.compute_variables(inputs), gradient=True)[1]
        return np.stack([np.broadcast_to(partials[p.name], shape) for p in self.parameters], axis=-1)

    def evaluate(
        self, values: Mapping[str, Any], variables: Mapping[str, Array], *, gradient: bool
    ) -> tuple[Array, dict[str, Array]]:
        """Value and partial derivatives on variables that are already computed (and may be scaled).

        For a term T = A prod (v + t)^(s e):  dT/dA = T/A,  dT/de = s T log(v + t),  dT/dt = s e T / (v + t). Held constants
        that are given are taken as given: on scaled variables a held floor or offset is another number.
        """
        values = {**dict(self.fixed), **values}
        total: Any = values[self.floor] if self.floor else 0.0
        partials: dict[str, Any] = {self.floor: np.asarray(1.0)} if gradient and self.floor else {}
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            for term in self.terms:
                shifted = [variables[f.variable] + (values[f.offset] if f.offset else 0.0) for f in term.factors]
                shape: Any = 1.0
                for factor, base in zip(term.factors, shifted):
                    shape = shape * base ** (factor.sign * values[factor.exponent])
                if term.family:
                    shape = np.where(_of_family(variables, term.family), shape, 0.0)
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


def _of_family(variables: Mapping[str, Array], family: Family) -> Array:
    return variables[IS_DENSE] if family == "dense" else ~variables[IS_DENSE]


def sort_inputs(names: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Inputs in the order N, D, R, P, others behind as they come."""
    order = ("N", "D", "R", "P")
    return tuple(sorted(names, key=lambda i: order.index(i) if i in order else len(order)))


def _forget_absent(law: Law) -> Law:
    names = {p.name for p in law.parameters}
    return dataclasses.replace(law, fixed=tuple(f for f in law.fixed if f[0] in names))


_CHANGE: Mapping[str, Callable[[Law, Change], Law]] = {"fix": _fix, "tie": _tie, "drop": _drop}
