"""Accuracy on a task as a function of a loss: a law with a floor, where a model guesses, that is not estimated but known.

Two forms. The sigmoid between chance and a ceiling, and the exponential of Gadre et al. 2024 (arXiv 2403.08540, eq 5), error =
1 - chance - k exp(-gamma L), which has no ceiling and so says less where accuracies are high.

Share y of n items has the variance p (1 - p) / n, but asin(sqrt(y)) has 1 / (4 n) whatever p is. So with `binomial` errors the
law predicts  weight * asin(sqrt(accuracy)),  weight being sqrt(items over the mean of items), and least squares are those of
the binomial distribution up to its width, which is estimated: all runs answer the same items, so they scatter less than
independent draws of items would, and different seeds make them scatter more.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from analysis.law import Change, Law, Parameter
from dlcm.errors import UserError, nearest

Array = np.ndarray
Link = Literal["sigmoid", "exponential"]
Errors = Literal["binomial", "equal"]
LINKS: tuple[Link, ...] = ("sigmoid", "exponential")
ERRORS: tuple[Errors, ...] = ("binomial", "equal")
SCORE, WEIGHT = "score", "weight"
"""Columns: what the law predicts, and the weight of a run in it."""

_REACH = 5.0
"""How far outside the losses a midpoint is searched, in their range."""
_STEEP = (0.02, 200.0)
"""Bounds of the slope, over the range of the losses."""
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class AccuracyLaw(Law):
    """Accuracy of a loss.

    Attributes:
        link: `sigmoid`, chance + (ceiling - chance) / (1 + exp(slope (loss - midpoint))), or `exponential`,
            chance + k exp(-gamma loss).
        chance: accuracy of guessing.
        errors: `binomial`, or `equal`: least squares of accuracies as they are.
        span: lowest and highest loss that was seen; sets the scale of the search.
    """

    link: Link = "sigmoid"
    chance: float = 0.0
    errors: Errors = "binomial"
    span: tuple[float, float] = (0.0, 1.0)

    @property
    def width(self) -> float:
        """Range of the losses."""
        return self.span[1] - self.span[0]

    @property
    def middle(self) -> float:
        """Centre of the losses."""
        return (self.span[0] + self.span[1]) / 2

    @property
    def steepest(self) -> float:
        """Highest slope over the range of the losses; of the exponential, k = e^(gamma middle) must be a float."""
        return _STEEP[1] if self.link == "sigmoid" else min(_STEEP[1], 500 * self.width / max(abs(self.middle), _TINY))

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All constants in the order of the equation, held ones included."""
        steep = (_STEEP[0] / self.width, self.steepest / self.width)
        if self.link == "exponential":
            return Parameter("k", "amplitude"), Parameter("gamma", "other", steep)
        reach = (self.span[0] - _REACH * self.width, self.span[1] + _REACH * self.width)
        ceiling = Parameter("ceiling", "ceiling", (self.chance, 1.0))
        return Parameter("midpoint", "other", reach), Parameter("slope", "other", steep), ceiling

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """The loss, and the weight where errors are binomial."""
        return ("loss", WEIGHT) if self.errors == "binomial" else ("loss",)

    @property
    def variables(self) -> tuple[str, ...]:
        """The inputs."""
        return self.inputs

    @property
    def positive(self) -> tuple[str, ...]:
        """None: a loss may be any number here."""
        return ()

    @property
    def equation(self) -> str:
        """The accuracy as plain text, with held constants as numbers."""
        if self.link == "exponential":
            return f"accuracy(loss) = {self.chance:.4g} + k exp(-gamma loss), 1 at the most"
        held = dict(self.fixed)
        slope, midpoint, ceiling = (
            f"{held[name]:.4g}" if name in held else name for name in ("slope", "midpoint", "ceiling")
        )
        return f"accuracy(loss) = {self.chance:.4g} + ({ceiling} - {self.chance:.4g}) / (1 + exp({slope} (loss - {midpoint})))"

    @property
    def latex(self) -> str:
        """The same as LaTeX, without dollar signs."""
        left = r"\mathrm{accuracy}(L) = "
        if self.link == "exponential":
            return left + rf"{self.chance:.4g} + k\,e^{{-\gamma L}}"
        ceiling = f"{dict(self.fixed)['ceiling']:.4g}" if "ceiling" in dict(self.fixed) else r"\mathrm{ceiling}"
        return left + rf"{self.chance:.4g} + \frac{{{ceiling} - {self.chance:.4g}}}{{1 + e^{{s (L - m)}}}}"

    def accuracy(self, values: Mapping[str, Any], loss: Any) -> Array:
        """Accuracy at a loss; arrays of constants broadcast against it."""
        return self._accuracy({**values, **dict(self.fixed)}, np.asarray(loss, dtype=float), gradient=False)[0]

    def _accuracy(self, values: Mapping[str, Any], loss: Array, *, gradient: bool) -> tuple[Array, dict[str, Array]]:
        if self.link == "exponential":
            with np.errstate(over="ignore"):
                rise = np.exp(np.log(values["k"]) - values["gamma"] * loss)
            inside = np.where(self.chance + rise < 1, rise, 0.0)
            partials = {"k": inside / values["k"], "gamma": -inside * loss} if gradient else {}
            return np.minimum(self.chance + rise, 1.0), partials
        slope, height = values["slope"], values["ceiling"] - self.chance
        share = 0.5 * (1 - np.tanh(slope * (loss - values["midpoint"]) / 2))
        if not gradient:
            return self.chance + height * share, {}
        change = height * share * (1 - share)
        partials = {"midpoint": change * slope, "slope": -change * (loss - values["midpoint"]), "ceiling": share}
        return self.chance + height * share, partials

    def evaluate(
        self, values: Mapping[str, Any], variables: Mapping[str, Array], *, gradient: bool
    ) -> tuple[Array, dict[str, Array]]:
        """Score and its derivatives by each constant, natural units."""
        accuracy, partials = self._accuracy({**values, **dict(self.fixed)}, variables["loss"], gradient=gradient)
        if self.errors == "equal":
            return accuracy, partials
        weight = variables[WEIGHT]
        # d asin(sqrt(p)) / dp; where p is 0 or 1 the law is flat, and its own derivative vanishes faster
        by = weight / (2 * np.sqrt(np.clip(accuracy * (1 - accuracy), _TINY, None)))
        return score(accuracy, weight), {name: by * partial for name, partial in partials.items()}

    def compute_variables(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """The inputs as arrays.

        Raises:
            UserError: an input is missing.
        """
        return self.require_inputs(inputs)

    def centre(self, variables: Mapping[str, Array]) -> tuple[dict[str, float], dict[str, Array]]:
        """Means of the inputs, and the inputs as they are: the span sets the scale."""
        return {name: float(np.mean(values)) for name, values in variables.items()}, dict(variables)

    def coordinates(self, scales: Mapping[str, float], target_scale: float, target_max: float) -> "AccuracyCoordinates":
        """The coordinates that this law is fitted in; the span and chance set their scales."""
        del scales, target_max
        return AccuracyCoordinates(self, target_scale)

    def apply(self, *changes: Change) -> "AccuracyLaw":
        """The law with constants held; each change is recorded.

        Raises:
            UserError: no such constant, or a change of another kind.
        """
        law = self
        for change in changes:
            names = [p.name for p in law.parameters]
            if change.parameter not in names:
                raise UserError(f"law {law.name}: no parameter {change.parameter!r}{nearest(change.parameter, names)}")
            if change.op != "fix" or change.value is None:
                raise UserError(f"law {law.name}: constants can be held, not tied or dropped")
            others = tuple(f for f in law.fixed if f[0] != change.parameter)
            fixed = (*others, (change.parameter, change.value))
            law = dataclasses.replace(law, fixed=fixed, changes=(*law.changes, change))
        return law

    def to_dict(self) -> dict[str, Any]:
        """The law before its changes as JSON types; `accuracy_law` makes it again."""
        return {"link": self.link, "chance": self.chance, "errors": self.errors, "span": list(self.span)}


def accuracy_law(link: Link, chance: float, errors: Errors, span: tuple[float, float]) -> AccuracyLaw:
    """Accuracy between chance and a ceiling of 1 at the most; see `AccuracyLaw`."""
    few = "too few runs for all constants"
    ladder = ((Change("fix", "ceiling", value=1.0, reason=few),),) if link == "sigmoid" else ()
    source = "logistic between chance and a ceiling" if link == "sigmoid" else "Gadre et al. 2024, eq 5"
    return AccuracyLaw(
        name="accuracy", floor=None, terms=(), target=SCORE, source=source, link=link, chance=float(chance),
        errors=errors, span=(float(span[0]), float(span[1])), ladder=ladder,
    )  # fmt: skip


def score(accuracy: Any, weight: Any) -> Array:
    """Accuracy on the scale that errors are equally wide on: weight * asin(sqrt(accuracy))."""
    return np.asarray(weight) * np.arcsin(np.sqrt(np.clip(accuracy, 0.0, 1.0)))


@dataclasses.dataclass(frozen=True, eq=False)
class AccuracyCoordinates:
    """The midpoint in ranges of the loss from their centre; logarithms of the slope over the range and of k at the centre."""

    law: AccuracyLaw
    target_scale: float
    linear: tuple[int, ...] = ()
    logarithms: tuple[int, ...] = ()

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds of theta, each (p,)."""
        chance = self.law.chance
        box = {
            "midpoint": (-_REACH - 0.5, _REACH + 0.5),
            "slope": (math.log(_STEEP[0]), math.log(self.law.steepest)),
            "gamma": (math.log(_STEEP[0]), math.log(self.law.steepest)),
            "ceiling": (chance, 1.0),
            "k": (math.log(1e-6), math.log(max(1 - chance, 1e-6) * 10)),
        }
        lower, upper = zip(*(box[p.name] for p in self.law.free)) if self.law.free else ((), ())
        return np.array(lower, dtype=float), np.array(upper, dtype=float)

    def _natural(self, thetas: Array) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Constants in natural units, and their derivatives by the coordinates: coordinate -> constant -> derivative."""
        law = self.law
        columns = dict(zip((p.name for p in law.free), thetas if thetas.ndim == 1 else thetas.T[..., None]))
        values: dict[str, Any] = dict(law.fixed)
        slopes: dict[str, dict[str, Any]] = {}
        for name, t in columns.items():
            if name == "midpoint":
                values[name], slopes[name] = law.middle + law.width * t, {name: law.width}
            elif name in ("slope", "gamma"):
                values[name] = np.exp(t) / law.width
                slopes[name] = {name: values[name]}
            elif name == "ceiling":
                values[name], slopes[name] = t, {name: 1.0}
        if "k" in columns:
            # k is the rise at a loss of 0, far from the data: with k e^(-gamma middle) fitted instead, k moves with gamma
            values["k"] = np.exp(columns["k"] + values["gamma"] * law.middle)
            slopes["k"] = {"k": values["k"]}
            if "gamma" in slopes:
                slopes["gamma"]["k"] = values["k"] * law.middle * values["gamma"]
        return values, slopes

    def evaluate(self, thetas: Array, variables: Mapping[str, Array], *, gradient: bool) -> tuple[Array, list[Array]]:
        """See `Coordinates.evaluate`."""
        values, slopes = self._natural(thetas)
        prediction, partials = self.law.evaluate(values, variables, gradient=gradient)
        if not gradient:
            return prediction / self.target_scale, []
        by = [sum(partials[name] * d for name, d in slopes[p.name].items()) for p in self.law.free]
        return prediction / self.target_scale, [np.asarray(b) / self.target_scale for b in by]

    def values(self, theta: Array) -> dict[str, float]:
        """All constants in natural units, held ones included."""
        found = self._natural(np.asarray(theta, dtype=float))[0]
        return {p.name: float(found[p.name]) for p in self.law.parameters}

    def theta(self, values: Mapping[str, float]) -> Array:
        """Theta from constants in natural units; not clipped."""
        law = self.law
        values = {**values, **dict(law.fixed)}
        inward = {
            "midpoint": lambda v: (v - law.middle) / law.width,
            "slope": lambda v: math.log(max(v * law.width, _TINY)),
            "gamma": lambda v: math.log(max(v * law.width, _TINY)),
            "ceiling": lambda v: v,
            "k": lambda v: math.log(max(v, 1e-300)) - values["gamma"] * law.middle,
        }
        return np.array([inward[p.name](values[p.name]) for p in law.free], dtype=float)

    def draw(self, rng: np.random.Generator) -> Array:
        """See `Coordinates.draw`: midpoints in and about the losses, slopes from gentle to steep, any ceiling."""
        likely = {
            "midpoint": (-1.5, 1.5),
            "slope": (math.log(0.5), math.log(30.0)),
            "gamma": (math.log(0.2), math.log(20.0)),
            "ceiling": (self.law.chance, 1.0),
            "k": (math.log(1e-3), math.log(max(1 - self.law.chance, 2e-3))),
        }
        return np.array([rng.uniform(*likely[p.name]) for p in self.law.free])
