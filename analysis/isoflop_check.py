"""Vertices of isoFLOP profiles against the optimum of a fitted law, on the same runs and under the same bootstrap.

Along the runs' own line of equal FLOPs, D as a function of N, the fitted law has a minimum; it is compared with the vertex. No
cost function and no closed form come in. Both answers depend on the same runs, so their difference is far better known than
either of them: each draw of random numbers, one a cluster, perturbs the residuals of the profiles and weights the runs of the
fit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from analysis.bootstrap import bootstrap, weight_variance, weights_of, without_offsets
from analysis.budget_groups import Curve, place_of, value_at
from analysis.data import ResultsData
from analysis.growth import weighted_slope
from analysis.inputs import prepare
from analysis.intervals import LEVEL, ends, interval
from analysis.isoflop_result import IsoFlop
from analysis.law import Law
from analysis.objective import Problem
from analysis.result import FitResult
from analysis.vertex import find_vertices, whole_parabola_vertex
from dlcm.errors import UserError

Array = np.ndarray
_BEYOND = float(np.log(4.0))
"""How far outside the sizes of a profile the law's minimum is looked for."""
_GRID = 513


@dataclasses.dataclass(frozen=True)
class Apart:
    """How far two routes are from each other.

    Attributes:
        value: vertex over the law's optimum (1 where they agree), or the first minus the second (0) of shares and of growths.
        low: lower end of the paired 95% interval. high: upper end.
        is_told: whether they differ beyond sampling, all comparisons taken together: 95% for all by Bonferroni's rule.
    """

    value: float
    low: float
    high: float
    is_told: bool


@dataclasses.dataclass(frozen=True)
class AtBudget:
    """One vertex beside the law's optimum on the same line.

    Attributes:
        held: of the profile. budget: training FLOPs.
        vertex: N* (or R*, P*) by the profile. surface: by the law. low, high: 95% interval of the latter.
        apart: how far they are from each other.
        bias: what its value would be without noise if the law were true. parabola_bias: of a parabola through all points.
    """

    held: Mapping[str, float | str]
    budget: float
    vertex: float
    surface: float
    low: float
    high: float
    apart: Apart
    bias: float
    parabola_bias: float


@dataclasses.dataclass(frozen=True)
class InGrowth:
    """How fast vertices move beside how fast the law's optima move, over the same budgets.

    Attributes:
        held: of the profiles, empty for all of them.
        vertices: exponent of N* (of P* the change over a decade). surface: that of the law. low, high: its 95% interval.
        apart: their difference. bias, parabola_bias: as in `AtBudget`.
    """

    held: Mapping[str, float | str]
    vertices: float
    surface: float
    low: float
    high: float
    apart: Apart
    bias: float
    parabola_bias: float


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """What two routes to one optimum say of each other.

    Attributes:
        law: name of the law. status: of its fit. over: the coordinate.
        budgets: one entry a profile that has a vertex and on whose line the law has a minimum.
        growth: one entry a set of profiles that gives a slope.
        level: geometric mean of vertex over optimum over the budgets (of P the mean difference).
        n_lost: profiles with a vertex on whose line the law has no minimum.
    """

    law: str
    status: str
    over: str
    budgets: tuple[AtBudget, ...]
    growth: tuple[InGrowth, ...]
    level: Apart | None
    n_lost: int

    @property
    def none(self) -> float:
        """What `apart` is at a budget where the two agree."""
        return 0.0 if self.over == "P" else 1.0

    @property
    def verdict(self) -> str:
        """`agree`, `disagree`, or `not compared` where nothing could be."""
        if self.level is None:
            return "not compared"
        compared = [self.level, *(g.apart for g in self.growth[-1:]), *(b.apart for b in self.budgets)]
        return "disagree" if any(c.is_told for c in compared) else "agree"

    @property
    def text(self) -> str:
        """The verdict with its figures, in words."""
        from analysis.isoflop_text import describe_check

        return describe_check(self)


def check_against(found: IsoFlop, data: ResultsData, result: FitResult) -> IsoFlop:
    """The same profiles with their comparison with a fitted law in `check`.

    Args:
        found: profiles, with a bootstrap.
        data: what they were made of.
        result: a fit of a law of N and D to the same runs.

    Raises:
        UserError: the fit is of other runs, of another convention, of both families together, or of something that has no
            optimum; or the profiles have no bootstrap.
    """
    rows = data.of_family(found.family or None)
    _require_comparable(found, rows, result)
    problem = Problem.build(result.law, prepare(result.law, rows), result.loss, result.delta)
    names, of_row = np.unique(np.asarray(rows.clusters, dtype=str), return_inverse=True)
    draws = np.random.default_rng(found.seed).normal(size=(found.n_bootstrap, len(names)))
    theta = problem.theta(result.values)
    at_zero = without_offsets(problem, theta) is not None
    weights = weights_of(special.ndtr(draws), weight_variance(problem, theta, len(names), at_zero=at_zero))[:, of_row]
    thetas = bootstrap(
        problem, theta, rows.clusters, n=len(draws), rng=np.random.default_rng([found.seed, 1]), weights=weights
    )
    drawn = [problem.values(t) for t in thetas]
    constants = {name: np.array([result.values[name], *(d[name] for d in drawn)]) for name in result.values}
    surface = np.full((len(draws) + 1, len(found.profiles)), np.nan)
    bias = np.full((2, len(found.profiles)), np.nan)
    chosen = [i for i, profile in enumerate(found.profiles) if profile.is_ok]
    curves = [found.profiles[i].curve for i in chosen]
    for i, curve in zip(chosen, curves):
        surface[:, i] = _minima(result.law, constants, curve, found.over)
    bias[:, chosen] = _vertices_of_law(result, rows, curves) - surface[0, chosen]
    return dataclasses.replace(found, check=_compare(found, result, surface, bias))


def _require_comparable(found: IsoFlop, rows: ResultsData, result: FitResult) -> None:
    if result.law.is_joint:
        raise UserError(
            f"law {result.law.name}: describes both families; isoFLOP profiles are held against a law of one"
        )
    if result.law.target != "loss" or not {"N", "D"} <= set(result.law.inputs) <= set("NDRP"):
        raise UserError(
            f"law {result.law.name}: no loss of N and D, with an optimum at a budget, to hold profiles against"
        )
    found.convention.require_same(result.convention, "isoFLOP profiles and a fit")
    if rows.hash != found.data_hash or rows.hash != result.data_hash:
        raise UserError(
            f"the fit of {result.law.name} (hash {result.data_hash}) and the profiles (hash {found.data_hash}) are of different "
            "runs; make both of the same data"
        )
    if not found.n_bootstrap:
        raise UserError("profiles without a bootstrap cannot be held against a fit; give n_bootstrap (--bootstrap)")


def _minima(law: Law, constants: Mapping[str, Array], curve: Curve, over: str) -> Array:
    """Places of the law's minimum along the line of a curve for each set of constants, (S,); NaN where it has none near."""
    x = np.linspace(curve.x.min() - _BEYOND, curve.x.max() + _BEYOND, _GRID)
    inputs: dict[str, Any] = {**curve.middle, over: value_at(over, x), "D": np.exp(_line(curve, x))}
    columns: dict[str, Any] = {name: np.asarray(v)[:, None] for name, v in constants.items()}
    values = law.evaluate(columns, law.compute_variables({n: inputs[n] for n in law.inputs}), gradient=False)[0]
    values = np.log(np.broadcast_to(values, (len(columns[next(iter(columns))]), _GRID)))
    at = np.argmin(values, axis=1)
    inside = (at > 0) & (at < _GRID - 1)
    near = np.clip(at, 1, _GRID - 2)
    rows = np.arange(len(at))
    low, middle, high = (values[rows, near + k] for k in (-1, 0, 1))
    with np.errstate(all="ignore"):
        shift = 0.5 * (low - high) / (low - 2 * middle + high)
    return np.where(inside, x[near] + shift * (x[1] - x[0]), np.nan)


def _line(curve: Curve, x: Array) -> Array:
    """Log D at places x of a curve's line: a polynomial through its runs, and tangents beyond them."""
    degree = min(5, len(curve.levels) - 2)
    smooth = np.polynomial.Polynomial.fit(curve.x, curve.log_tokens, degree)
    inside = np.clip(x, curve.x.min(), curve.x.max())
    return smooth(inside) + smooth.deriv()(inside) * (x - inside)


def _vertices_of_law(result: FitResult, rows: ResultsData, curves: Sequence[Curve]) -> Array:
    """Vertices of noise-free curves of the law: by the rule of the profiles, and by parabolas through all points, (2, curves)."""
    ys = []
    for curve in curves:
        inputs = {name: rows.values(name)[curve.rows] for name in "NRP"} | {"D": np.exp(curve.log_tokens)}
        ys.append(np.log(result.predict(**{name: inputs[name] for name in result.law.inputs})))
    places = [v.place[0] for v in find_vertices([c.x for c in curves], [y[None] for y in ys])]
    return np.array([places, [whole_parabola_vertex(c.x, y) for c, y in zip(curves, ys)]])


def _compare(found: IsoFlop, result: FitResult, surface: Array, bias: Array) -> Disagreement:
    vertices = np.vstack([[_place(found, i) for i in range(len(found.profiles))], found.replicates])
    known = np.isfinite(vertices[0]) & np.isfinite(surface[0])
    n_compared = int(known.sum()) + 2
    scale = _Scale(found.over)
    apart = scale.apart(vertices, surface)  # (1 + S, profiles)
    budgets = []
    for i in np.flatnonzero(known):
        low, high = interval(value_at(found.over, surface[1:, i]), ignore_nan=True)
        biases = scale.shown(scale.apart(surface[0, i] + bias[:, i], surface[0, i]))
        budgets.append(
            AtBudget(
                held=found.profiles[i].held,
                budget=found.profiles[i].budget,
                vertex=float(value_at(found.over, vertices[0, i])),
                surface=float(value_at(found.over, surface[0, i])),
                low=float(low),
                high=float(high),
                apart=_apart(apart[:, i], n_compared, scale),
                bias=float(biases[0]),
                parabola_bias=float(biases[1]),
            )
        )
    return Disagreement(
        law=result.law.name,
        status=str(result.status),
        over=found.over,
        budgets=tuple(budgets),
        growth=tuple(_growths(found, vertices, surface, bias, known)),
        level=_apart(_means(apart[:, known]), n_compared, scale) if known.any() else None,
        n_lost=int(np.sum(np.isfinite(vertices[0]) & ~known)),
    )


def _growths(found: IsoFlop, vertices: Array, surface: Array, bias: Array, known: Array) -> list[InGrowth]:
    """Slopes over the budgets, for each growth of the coordinate that is known."""
    keys = [tuple(p.held.items()) for p in found.profiles]
    distinct = list(dict.fromkeys(keys))
    into = (lambda place: value_at("P", place)) if found.over == "P" else np.asarray
    log_c = (np.log10 if found.over == "P" else np.log)([p.budget for p in found.profiles])
    weights = np.array([p.unit_error if p.is_ok else np.inf for p in found.profiles]) ** -2.0
    entries = []
    for growth in found.growth:
        if growth.name != found.over or growth.value is None:
            continue
        own = known & np.array([not growth.held or dict(k) == dict(growth.held) for k in keys])
        groups = np.array([distinct.index(k) for k in keys])[own]
        if own.sum() < growth.n_vertices:
            continue

        def slope(places: Array, own: Array = own, groups: Array = groups) -> Array:
            return weighted_slope(log_c[own], into(places[..., own]), weights[own], groups)[0]

        by_vertices, by_surface = slope(vertices), slope(surface)
        low, high = ends(by_surface[1:])
        biases = slope(surface[:1] + bias) - by_surface[0]
        entries.append(
            InGrowth(
                held=growth.held,
                vertices=float(by_vertices[0]),
                surface=float(by_surface[0]),
                low=float(low),
                high=float(high),
                apart=_apart(by_vertices - by_surface, int(known.sum()) + 2, _Scale("P")),
                bias=float(biases[0]),
                parabola_bias=float(biases[1]),
            )
        )
    return entries


@dataclasses.dataclass(frozen=True)
class _Scale:
    """How far two places are apart: the logarithm of a ratio, shown as the ratio; of P the difference of the shares."""

    over: str

    def apart(self, first: Any, second: Any) -> Any:
        return value_at("P", first) - value_at("P", second) if self.over == "P" else np.asarray(first) - second

    def shown(self, apart: Any) -> Any:
        return apart if self.over == "P" else np.exp(apart)


def _apart(values: Array, n_compared: int, scale: _Scale) -> Apart:
    """What was found, first, and its draws, (1 + S,), as one comparison of several."""
    low, high = (float(scale.shown(v)) for v in interval(values[1:], ignore_nan=True))
    least, most = interval(values[1:], level=1 - (1 - LEVEL) / n_compared, ignore_nan=True)
    return Apart(float(scale.shown(values[0])), low, high, not least <= 0 <= most)


def _means(values: Array) -> Array:
    """Mean of each row over what is known in it; NaN where nothing is."""
    counts = np.sum(np.isfinite(values), axis=1)
    return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)


def _place(found: IsoFlop, i: int) -> float:
    value = found.profiles[i].value
    return float("nan") if value is None else float(place_of(found.over, value))
