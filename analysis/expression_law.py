"""A law from an expression: any form, written down by a user or shipped; gradient by sympy, fitted as the others are."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import expression as text_of
from analysis.law import Change, Kind, Law, Parameter, sort_inputs
from analysis.law_text import left_side, symbol
from dlcm.errors import UserError, nearest

if TYPE_CHECKING:
    from analysis.coordinates import Coordinates
    from analysis.data import ResultsData

Array = np.ndarray
KINDS: tuple[Kind, ...] = ("floor", "amplitude", "exponent", "offset", "other")
WIDE = 100.0
"""Positive bounds further apart than this factor are searched on a logarithmic scale."""
KEYS = ("expression", "parameters", "name", "family", "target", "source")


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant of an expression.

    Attributes:
        kind: what it does; see `from_expression`.
        bounds: in its own unit; an infinite end is open.
        start: where a search starts that has no bounded range to draw from.
        centre: of an amplitude that is fitted by its contribution at the data's centre: what it is multiplied with there.
        is_linear: whether a linear problem gives it once the others are drawn; so do floors and amplitudes.
    """

    name: str
    kind: Kind
    bounds: tuple[float, float]
    start: float | None = None
    centre: str | None = None
    is_linear: bool = False


@dataclasses.dataclass(frozen=True)
class ExpressionLaw(Law):
    """A law whose form is an expression of constants and inputs; it has no `terms`.

    Attributes:
        expression: right side of the equation.
        constants: the constants in it, in the order of the equation.
        explanation: of what the expression alone does not say; plain text.
        origin: the law before its changes; None for itself.
    """

    expression: str = ""
    constants: tuple[Constant, ...] = ()
    explanation: str = ""
    origin: "ExpressionLaw | None" = dataclasses.field(default=None, compare=False, repr=False)

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All constants in the order of the equation, held ones included."""
        return tuple(Parameter(c.name, c.kind, c.bounds) for c in self.constants)

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs of `predict`: what is no constant."""
        tree = text_of.parse(self.expression, f"law {self.name}", text_of.INTERNAL)
        own = {c.name for c in self.constants}
        return sort_inputs([name for name in text_of.names(tree) if name not in own])

    @property
    def variables(self) -> tuple[str, ...]:
        """The inputs."""
        return self.inputs

    @property
    def positive(self) -> tuple[str, ...]:
        """None: whether an input may be 0 depends on the expression, and the prediction is looked at instead."""
        return ()

    @property
    def equation(self) -> str:
        """The law as plain text, with held parameters as numbers."""
        held = {name: float(f"{value:.4g}") for name, value in self.fixed}
        shown = text_of.replace_names(self.expression, held) if held else " ".join(self.expression.split())
        return left_side(self, latex=False) + shown + (f", {self.explanation}" if self.explanation else "")

    @property
    def latex(self) -> str:
        """The law as LaTeX, without dollar signs."""
        held = {name: float(f"{value:.4g}") for name, value in self.fixed}
        names = [c.name for c in self.constants] + list(self.inputs)
        shown = text_of.replace_names(self.expression, held)
        return left_side(self, latex=True) + text_of.to_latex(shown, {name: symbol(name, True) for name in names})

    def centre(self, variables: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, Array]]:
        """Where the centre of the inputs lies (geometric means, means of inputs that reach 0), and the inputs as they are."""
        centre = {}
        for name, values in variables.items():
            centre[name] = float(np.exp(np.mean(np.log(values))) if np.all(values > 0) else np.mean(values))
        return centre, dict(variables)

    def coordinates(self, scales: Mapping[str, float], target_scale: float, target_max: float) -> "Coordinates":
        """The coordinates that this law is fitted in."""
        from analysis.expression_coordinates import ExpressionCoordinates

        return ExpressionCoordinates(self, scales, target_scale, target_max)

    def compute_variables(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The inputs as arrays.

        Raises:
            UserError: an input is missing.
        """
        return self.require_inputs(inputs)

    def evaluate(
        self, values: Mapping[str, Any], variables: Mapping[str, Array], *, gradient: bool
    ) -> tuple[Array, dict[str, Array]]:
        """Value and partial derivatives by each constant, natural units; arrays of constants broadcast against the inputs."""
        values = {**values, **dict(self.fixed)}
        names = tuple(c.name for c in self.constants)
        compiled = text_of.compile_expression(self.expression, names, self.inputs)
        given = [np.asarray(values[n], dtype=float) for n in names] + [variables[n] for n in self.inputs]
        with np.errstate(all="ignore"):
            if not gradient:
                return np.asarray(compiled.value(*given)), {}
            value, *partials = compiled.partials(*given)
        return np.asarray(value), {name: np.asarray(partial) for name, partial in zip(names, partials)}

    def check_on(self, variables: Mapping[str, Array], data: "ResultsData") -> None:
        """Refuse data on which the law is not finite wherever its constants are drawn from.

        Raises:
            UserError: the run, its inputs, and what may be wrong.
        """
        from analysis.expression_coordinates import draw_values

        rng = np.random.default_rng(0)
        never = np.ones(len(data), dtype=bool)
        for _ in range(50):
            value = self.evaluate(draw_values(self, rng), variables, gradient=False)[0]
            never &= ~np.isfinite(np.broadcast_to(value, never.shape))
        if never.any():
            row = int(np.flatnonzero(never)[0])
            at = ", ".join(f"{name} = {values[row]:.4g}" for name, values in variables.items())
            raise UserError(
                f"{data.source}: run {data.run_ids[row]}: law {self.name} is not finite at {at}, whatever its constants within "
                "their bounds; change the expression, the bounds, or leave the run out"
            )

    def apply(self, *changes: Change) -> "ExpressionLaw":
        """The law with constants held or set equal; each change is recorded.

        Raises:
            UserError: a change names a constant that the law does not have, or drops a term.
        """
        law = self
        for change in changes:
            names = [c.name for c in law.constants]
            for name in (change.parameter, change.other):
                if name is not None and name not in names:
                    raise UserError(f"law {law.name}: no parameter {name!r}{nearest(name, names)}")
            law = dataclasses.replace(law._after(change), changes=(*law.changes, change), origin=self.base)
        return law

    def _after(self, change: Change) -> "ExpressionLaw":
        if change.op == "fix":
            others = tuple(f for f in self.fixed if f[0] != change.parameter)
            return dataclasses.replace(self, fixed=(*others, (change.parameter, float(change.value or 0.0))))
        if change.op == "tie":
            name, other = change.parameter, str(change.other)
            renamed = {name: other}
            constants = tuple(
                dataclasses.replace(c, centre=c.centre and text_of.replace_names(c.centre, renamed))
                for c in self.constants
                if c.name != name
            )
            return dataclasses.replace(
                self,
                expression=text_of.replace_names(self.expression, renamed),
                constants=constants,
                fixed=tuple(f for f in self.fixed if f[0] != name),
            )
        raise UserError(f"law {self.name}: no term can be dropped from an expression; write it without the term")

    def to_dict(self) -> dict[str, Any]:
        """The law before its changes as JSON types; `from_dict` reads it."""
        base = self.base
        constants = {
            c.name: {**dataclasses.asdict(c), "bounds": [b if math.isfinite(b) else None for b in c.bounds]}
            for c in base.constants
        }
        return {**{key: getattr(base, key) for key in KEYS if key != "parameters"}, "parameters": constants}

    @property
    def base(self) -> "ExpressionLaw":
        """The law before its changes."""
        return self.origin or self


def is_wide(bounds: tuple[float, float]) -> bool:
    """Whether bounds are positive and over two decades apart, so that the range is searched on a logarithmic scale."""
    return bounds[0] > 0 and math.isfinite(bounds[1]) and bounds[1] / bounds[0] >= WIDE
