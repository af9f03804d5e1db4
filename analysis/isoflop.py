"""The profile route to the optimum: at each budget the size with the least loss, and how it grows. A check on the fitted surface.

No law of the loss is assumed: runs of (nearly) equal training FLOPs are a curve over N, and its minimum is N*(C). The same over R
or over P, the others held. What can be wrong with it is refused, with a reason: too few sizes, a curve that bends down, a minimum
outside the sizes or held by one size alone, a minimum that resampled runs do not have. The raw lowest run is never taken.

Intervals are those of a wild bootstrap by cluster (Liu 1988; Cameron, Gelbach and Miller 2008): residuals of each curve, scaled
up for the constants that were fitted to it, are multiplied by one random number a cluster. Resampling the few runs of a curve
would lose its sides.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.budget_groups import MIN_RUNS, Curve, curves_of, slopes_of_best, value_at
from analysis.data import ResultsData
from analysis.growth import weighted_slope
from analysis.intervals import ends, interval
from analysis.isoflop_result import RULES, Growth, IsoFlop, Profile
from analysis.vertex import (
    Vertex,
    find_vertex,
    find_vertices,
    local_line,
    residuals,
    unit_error,
    whole_parabola_vertex,
)
from dlcm.errors import UserError, nearest

Array = np.ndarray
OVER = ("N", "R", "P")
SIDES = 2
TOLERANCE = 0.06
MIN_LEVELS = MIN_RUNS
MIN_VERTICES = 3
MOST_LOST = 0.05
"""Share of the bootstrap in which a curve may have no vertex before the curve is said to have none."""
_NOUNS = {"N": "size", "R": "ratio", "P": "share"}


def isoflop(
    data: ResultsData,
    *,
    family: str | None = None,
    over: str = "N",
    budgets: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
    sides: int = SIDES,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> IsoFlop:
    """Vertices of the isoFLOP profiles of one family.

    Args:
        data: results with training FLOPs C.
        family: `dense` or `dlcm`, where the data hold both.
        over: the coordinate that moves along a profile; N, or R or P with N and the other held.
        budgets: training FLOPs; found in the data by default, as the C near which most runs lie.
        tolerance: relative distance of C from the budget up to which a run belongs to it. Losses are brought to the budget along
            the slope of the best loss over budgets.
        sides: distinct sizes that are needed on either side of a vertex.
        n_bootstrap: draws for the intervals; 0 for none.
        seed: seeds them.

    Raises:
        UserError: C is not known, the options make no sense, both families are in the data and none was named, or no budget has
            runs that make a profile.
    """
    if over not in OVER:
        raise UserError(f"isoFLOP profiles run over N, R or P, not {over!r}{nearest(over, OVER)}")
    if not 0 < tolerance < 0.5:
        raise UserError(f"tolerance = {tolerance:g}; give a relative distance of C from its budget, such as 0.05")
    rows = _rows(data, family)
    curves, n_outside = curves_of(rows, over, budgets, tolerance)
    if not curves:
        raise UserError(
            f"{rows.source}: no {MIN_LEVELS} runs lie within {100 * tolerance:g}% of one budget; "
            "give the budgets (--budget), a wider tolerance (--tolerance), or results of an isoFLOP design"
        )
    clusters, of_row = np.unique(np.asarray(rows.clusters, dtype=str), return_inverse=True)
    draws = np.random.default_rng(seed).normal(size=(n_bootstrap, len(clusters)))
    losses = [np.log(rows.loss[c.rows]) for c in curves]
    first = [find_vertex(c.x, y[None]) for c, y in zip(curves, losses)]
    # where the runs of a budget differ in C, each is brought to it: at the vertex the loss goes with C as the best loss does
    slopes = slopes_of_best(curves, [v.height[0] if np.isfinite(v.place[0]) else np.nan for v in first])
    losses = [y - slope * c.excess for c, y, slope in zip(curves, losses, slopes)]
    found = find_vertices([c.x for c in curves], [y[None] for y in losses])
    drawn = _draw(curves, losses, found, [draws[:, of_row[c.rows]] for c in curves])
    profiles = [_judge(*each, over, sides) for each in zip(curves, losses, found, drawn)]
    replicates = [d.place for d in drawn]
    tokens = [local_line(c.x, c.log_tokens, d) for c, d in zip(curves, drawn)]
    places, log_tokens = (np.stack(columns, axis=1) for columns in (replicates, tokens))
    return IsoFlop(
        over=over,
        family=str(rows.frame["model"].iloc[0]) if "model" in rows.frame else (family or ""),
        profiles=tuple(profiles),
        growth=_growth(profiles, over, places, log_tokens),
        replicates=places,
        n_runs=len(set(rows.run_ids)),
        n_outside=n_outside,
        tolerance=tolerance,
        n_bootstrap=n_bootstrap,
        seed=seed,
        source=rows.source,
        data_hash=rows.hash,
        convention=rows.convention,
    )


def _rows(data: ResultsData, family: str | None) -> ResultsData:
    if family is None and "model" in data.frame and len(set(data.frame["model"].astype(str))) > 1:
        raise UserError(f"{data.source}: holds dense and dlcm runs; say whose profiles with family= (--family)")
    rows = data.of_family(family)
    if not len(rows):
        raise UserError(f"{data.source}: no {family} run; isoFLOP profiles need some")
    if not np.all(np.isfinite(rows.C) & (rows.C > 0)):
        raise UserError(f"{data.source}: the training FLOPs C of the runs are not known; map them with --columns C=...")
    return rows


def _draw(
    curves: Sequence[Curve], losses: Sequence[Array], found: Sequence[Vertex], multipliers: Sequence[Array]
) -> list[Vertex]:
    """The vertices in each draw of the wild bootstrap, (S,) each; of curves without one there is none in any draw."""
    chosen = [i for i, vertex in enumerate(found) if np.isfinite(vertex.place[0])]
    ys = []
    for i in chosen:
        plain, scaled = residuals(curves[i].x, losses[i][None], found[i])
        ys.append(losses[i] - plain + scaled * multipliers[i])
    nothing = np.full(len(multipliers[0]), np.nan)
    drawn = [Vertex(nothing, nothing, nothing, np.ones_like(m), nothing) for m in multipliers]
    if len(nothing):
        for i, vertex in zip(chosen, find_vertices([curves[i].x for i in chosen], ys)):
            drawn[i] = vertex
    return drawn


def _judge(curve: Curve, y: Array, vertex: Vertex, drawn: Vertex, over: str, sides: int) -> Profile:
    """Whether the curve has a vertex, and where."""
    place = float(vertex.place[0])
    reason = _why_not(curve, y, place, float(vertex.curvature[0]), drawn.place, over, sides)
    if reason:
        return Profile(curve.held, curve.budget, curve, np.exp(y), "refused", reason)
    tokens = float(np.exp(local_line(curve.x, curve.log_tokens, vertex)[0]))
    place_ends = token_ends = (None, None)
    if len(drawn.place):
        place_ends = tuple(float(value_at(over, v)) for v in interval(drawn.place, ignore_nan=True))
        log_tokens = local_line(curve.x, curve.log_tokens, drawn)
        token_ends = tuple(float(np.exp(v)) for v in interval(log_tokens, ignore_nan=True))
    rules = {
        "local parabola": float(find_vertex(curve.x, y[None]).place[0]),
        "parabola": whole_parabola_vertex(curve.x, y),
    }
    return Profile(
        held=curve.held,
        budget=curve.budget,
        curve=curve,
        losses=np.exp(y),
        status="ok",
        value=float(value_at(over, place)),
        low=place_ends[0],
        high=place_ends[1],
        tokens=tokens,
        tokens_low=token_ends[0],
        tokens_high=token_ends[1],
        loss=float(np.exp(vertex.height[0])),
        unit_error=unit_error(curve.x, vertex),
        curvature=float(vertex.curvature[0]),
        skew=float(vertex.skew[0]),
        others={rule: float(value_at(over, v)) for rule, v in rules.items() if np.isfinite(v)},
    )


def _why_not(curve: Curve, y: Array, place: float, curvature: float, drawn: Array, over: str, sides: int) -> str:
    """Why a curve has no vertex to be believed; empty where it has."""
    levels, noun = curve.levels, _NOUNS[over]
    if len(levels) < MIN_LEVELS:
        return f"{len(levels)} {noun}s; {MIN_LEVELS} are needed"
    means = np.array([y[np.abs(curve.x - level) < 0.5 * np.log(1.02)].mean() for level in levels])
    lowest = int(np.argmin(means))
    outside = place < levels[0] or place > levels[-1] if np.isfinite(place) else lowest in (0, len(levels) - 1)
    if outside:
        is_low = place < levels[0] if np.isfinite(place) else lowest == 0
        end = f"the {'least' if is_low else 'largest'} {over} ({value_at(over, levels[0 if is_low else -1]):.3g})"
        return f"the loss still falls at {end}; its minimum lies beyond"
    if not np.isfinite(place):
        return "the curve bends down; it has no minimum" if curvature <= 0 else "no window around a minimum holds still"
    for count, side in ((int(np.sum(levels < place)), "below"), (int(np.sum(levels > place)), "above")):
        if count < sides:
            at = f"{over} = {value_at(over, place):.3g}"
            return f"{count} {noun}{'s' * (count != 1)} {side} its vertex at {at}; {sides} are needed"
    inside = (drawn >= levels[0]) & (drawn <= levels[-1])
    lost = 1 - float(inside.mean()) if len(drawn) else 0.0
    if lost > MOST_LOST:
        return f"{100 * lost:.0f}% of resampled curves have no minimum between the {noun}s: it is not told from noise"
    return ""


def _growth(profiles: Sequence[Profile], over: str, places: Array, log_tokens: Array) -> tuple[Growth, ...]:
    """Lines through the vertices: of each set of held values, then with one slope for all."""
    keys = [tuple(p.held.items()) for p in profiles]
    distinct = list(dict.fromkeys(keys))
    found = []
    for key in [*distinct, None] if len(distinct) > 1 else distinct:
        own = [i for i, k in enumerate(keys) if (key is None or k == key) and profiles[i].is_ok]
        for name in ("N", "D") if over == "N" else (over,):
            drawn = (log_tokens if name == "D" else places)[:, own]
            groups = np.array([distinct.index(keys[i]) for i in own], dtype=int)
            found.append(_line(name, dict(key or ()), [profiles[i] for i in own], groups, drawn))
    return tuple(found)


def _line(
    name: str, held: Mapping[str, float | str], vertices: Sequence[Profile], groups: Array, drawn: Array
) -> Growth:
    """A line through vertices, one intercept a group, weighted by how well equal errors would leave them.

    Args:
        name: N, D, R or P.
        held: what the vertices share.
        vertices: profiles that have one.
        groups: which intercept each has, (k,).
        drawn: places in each draw of the bootstrap, (S, k), logarithms; of P log odds.
    """
    sets = np.unique(groups)
    if len(vertices) < MIN_VERTICES + len(sets) - 1:
        n = len(vertices)
        reason = f"{n} profile{'s' * (n != 1)} with a vertex; {MIN_VERTICES + max(len(sets), 1) - 1} are needed"
        return Growth(name, held, None, n_vertices=n, reason=reason)
    values = np.array([p.tokens if name == "D" else p.value for p in vertices], dtype=float)
    into, log_c = (np.asarray, np.log10) if name == "P" else (np.log, np.log)
    x, y = log_c([p.budget for p in vertices]), into(values)
    draws = value_at("P", drawn) if name == "P" else drawn
    weights = np.array([p.unit_error for p in vertices]) ** -2.0
    slope, left = weighted_slope(x, y[None], weights, groups)
    low = high = None
    if len(draws):
        low, high = ends(weighted_slope(x, draws, weights, groups)[0])
    rules = [float(slope[0])]
    for rule in RULES if name != "D" else ():
        if all(rule in p.others for p in vertices):
            other = into(np.array([p.others[rule] for p in vertices]))
            rules.append(float(weighted_slope(x, other[None], weights, groups)[0][0]))
    coefficient = None
    if name != "P" and len(sets) == 1:
        coefficient = float(np.exp(np.average(y - slope[0] * x, weights=weights)))
    return Growth(
        name=name,
        held=held,
        value=float(slope[0]),
        low=low,
        high=high,
        coefficient=coefficient,
        spread=(min(rules), max(rules)) if len(rules) > 1 else None,
        scatter=float(np.sqrt(np.mean(left[0] ** 2))),
        n_vertices=len(vertices),
    )
