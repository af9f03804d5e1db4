"""What a set of runs can tell: how many values each axis takes, over what span, and which constants that supports.

The rules look at the design alone, before any fit. What they cannot see (noise, near-collinearity) is judged after the
fit, by the profile, the condition number and the bootstrap.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from analysis.data import ResultsData
from analysis.laws import HELD_EXPONENT, VARIABLES, Change, Law, Term

Array = np.ndarray

LEVEL_WIDTH = 1.12
"""Values within this ratio are one level: the realised R of one target may scatter by 5% to either side."""
SAME_BUDGET = 1.3
"""Runs whose training FLOPs lie within this ratio spent one budget: shapes are whole numbers, and miss a budget a little."""
MIN_DECADES_OF_N = 1.5
RUNS_PER_CONSTANT_FOR_OFFSETS = 3
"""Offsets are the finest detail of a law; with fewer runs they fit noise and blur every other constant."""
COLLINEAR = 0.95


def count_runs(n: int) -> str:
    """`1 run`, `2 runs`."""
    return f"{n} run" if n == 1 else f"{n} runs"


def find_levels(values: Iterable[float], width: float = LEVEL_WIDTH) -> tuple[Array, list[float]]:
    """Level of each value, counted from the lowest, and the levels: values within a ratio of `width`, as their median."""
    numbers = np.array([float(v) for v in values])
    at = np.zeros(len(numbers), dtype=int)
    n, low = -1, float("nan")
    for i in np.argsort(numbers, kind="stable"):
        if not numbers[i] <= low * width:
            n, low = n + 1, numbers[i]
        at[i] = n
    return at, [float(np.median(numbers[at == k])) for k in range(n + 1)]


def levels(values: Iterable[float], width: float = LEVEL_WIDTH) -> list[float]:
    """Distinct values, those within a ratio of `width` counted as one; each level is the median of its members."""
    return find_levels(values, width)[1]


def largest_level(budgets: Iterable[float]) -> float:
    """The largest budget among these training FLOPs."""
    return levels(budgets, SAME_BUDGET)[-1]


def spare_runs(n_free: int) -> int:
    """Runs wanted beyond the free constants, so that the residuals speak of noise: half as many, 2 at least."""
    return max(2, n_free // 2)


def reduce_law(law: Law, data: ResultsData) -> Law:
    """The richest nested reduction of `law` that the design supports; `law` itself where it supports all of it.

    First by axes: a power law over an axis with one value cannot be told from the floor, one with two values is joined by
    any exponent, an offset needs four. Then by number: the law's own ladder is climbed down until `spare_runs` more runs
    than free constants remain, or the ladder ends.
    """
    law = reduce_by_axes(law, data)
    n_runs = len(set(data.run_ids))
    offsets = [p.name for p in law.free if p.kind == "offset"]
    if n_runs < RUNS_PER_CONSTANT_FOR_OFFSETS * len(law.free):
        reason = f"offsets need {RUNS_PER_CONSTANT_FOR_OFFSETS} runs a constant"
        law = law.apply(*(Change("fix", name, value=0.0, reason=reason) for name in offsets))
    for step in law.ladder:
        if n_runs >= len(law.free) + spare_runs(len(law.free)):
            break
        law = law.apply(*(c for c in step if _applies(law, c)))
    # Fewer runs than constants even at the end of the ladder: keep what a mean and at most one trend need.
    while len(law.free) > n_runs and law.terms and law.floor:
        law = law.apply(Change("drop", law.terms[-1].amplitude, reason="fewer runs than constants"))
    return law


def reduce_by_axes(law: Law, data: ResultsData) -> Law:
    """The richest reduction whose constants act on axes with enough values, however many runs there are."""
    variables = law.compute_variables({name: data.values(name) for name in law.inputs})
    used = law.used_rows(variables)
    n_levels = {v: len(levels(variables[v][used[v]] if v in used else variables[v])) for v in law.variables}
    for term in law.terms:
        for change in _changes_by_axes(law, term, n_levels, has_floor=law.floor is not None):
            law = law.apply(change)
    if "N" in law.inputs and len(levels(data.N)) == 1:
        law = _tie_size_exponents(law)
    return law


def _changes_by_axes(law: Law, term: Term, n_levels: Mapping[str, int], *, has_floor: bool) -> list[Change]:
    held = dict(law.fixed)
    changes = []
    varying = [f for f in term.factors if n_levels[f.variable] > 1]
    if any(n_levels[f.variable] == 0 for f in term.factors):
        return [Change("drop", term.amplitude, reason=f"there is no {term.family} run")]
    if not varying and has_floor and term.family is None:
        axes = ", ".join(f.variable for f in term.factors)
        return [Change("drop", term.amplitude, reason=f"{axes} takes one value; the term is part of {law.floor}")]
    for factor in term.factors:
        n = n_levels[factor.variable]
        if factor.offset and factor.offset not in held and n < 4:
            changes.append(
                Change("fix", factor.offset, value=0.0, reason=f"{factor.variable} takes {_times(n)}; 4 are needed")
            )
        if factor.exponent in held or _shared(law, factor.exponent):
            continue
        if n == 1:
            changes.append(Change("fix", factor.exponent, value=0.0, reason=f"{factor.variable} takes one value"))
        elif n == 2 and factor.sign < 0:
            reason = f"{factor.variable} takes two values, which any exponent joins; 3 are needed"
            changes.append(Change("fix", factor.exponent, value=HELD_EXPONENT, reason=reason))
    return changes


def _tie_size_exponents(law: Law) -> Law:
    """One model size: the share P moves N(1-P) and N P together, too little for an exponent each."""
    held = dict(law.fixed)
    names = [
        f.exponent
        for t in law.terms
        for f in t.factors
        if "N" in VARIABLES[f.variable].inputs and f.exponent not in held
    ]
    first, *others = dict.fromkeys(names) or [""]
    return law.apply(*(Change("tie", name, other=first, reason="only one model size") for name in others))


def _shared(law: Law, exponent: str) -> bool:
    return sum(f.exponent == exponent for t in law.terms for f in t.factors) > 1


def _times(n: int) -> str:
    return "one value" if n == 1 else f"{n} values"


def _applies(law: Law, change: Change) -> bool:
    names = {p.name for p in law.parameters}
    held = dict(law.fixed)
    if change.parameter not in names or change.parameter in held:
        return False
    return change.op != "tie" or (change.other in names and change.other not in held)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a design: how many values, from where to where."""

    name: str
    n_levels: int
    low: float
    high: float

    @property
    def decades(self) -> float:
        """Span in powers of ten."""
        return float(np.log10(self.high / self.low)) if self.low > 0 else float("inf")


@dataclasses.dataclass(frozen=True)
class Support:
    """What a family's runs can and cannot support, in figures and in sentences."""

    n_runs: int
    axes: tuple[Axis, ...]
    n_seeds: int
    n_repeated: int
    correlation_of_n_and_d: float | None
    warnings: tuple[str, ...]


def describe_support(data: ResultsData, family: str) -> Support:
    """Count levels, spans, seeds and collinearity, and warn; each warning names what it makes unreliable."""
    names = ("N", "D", "C", "R", "P") if family == "dlcm" else ("N", "D", "C")
    axes = []
    for name in names:
        values = data.values(name)
        values = values[np.isfinite(values) & (values > 0)]
        if values.size:
            axes.append(Axis(name, len(levels(values)), float(values.min()), float(values.max())))
    seeds = len(set(data.frame["seed"])) if "seed" in data.frame else 1
    repeated = n_repeated_designs(data)
    correlation = _log_correlation(data.N, data.D)
    found = {axis.name: axis for axis in axes}
    warnings = []
    n_axis = found["N"]
    if n_axis.n_levels < 3:
        sizes = _times(n_axis.n_levels).replace("value", "model size")
        warnings.append(f"{sizes}: how the loss falls with N is not identified")
    if n_axis.decades < MIN_DECADES_OF_N:
        warnings.append(f"N spans {n_axis.decades:.2f} decades; below {MIN_DECADES_OF_N} exponents are unreliable")
    if correlation is not None and abs(correlation) > COLLINEAR:
        warnings.append(
            f"D is collinear with N (correlation of logarithms {correlation:+.2f}): their effects cannot be told apart"
        )
    for name, least in (("R", 2), ("P", 3)):
        if name in found and found[name].n_levels < least:
            warnings.append(f"{name} takes {_times(found[name].n_levels)}; {least} are needed for its effect")
    if repeated == 0:
        warnings.append("no design was run with two seeds: the noise between seeds is not measured")
    kinds = sorted({str(v) for v in data.frame["boundary"]}) if "boundary" in data.frame else []
    if len(kinds) > 1:
        warnings.append(f"boundary kinds are mixed ({', '.join(kinds)}); fit them apart with data.where(boundary=...)")
    return Support(len(data), tuple(axes), seeds, repeated, correlation, tuple(warnings))


def n_repeated_designs(data: ResultsData) -> int:
    """How many designs were run more than once."""
    return sum(len(group) > 1 for group in design_groups(data))


def design_groups(data: ResultsData) -> list[Array]:
    """Row positions of runs that differ by seed alone: same boundary kind, N, P, D and requested R."""
    boundary = data.frame["boundary"].astype(str).to_numpy() if "boundary" in data.frame else np.full(len(data), "")
    target = (
        data.frame["compression_target"].to_numpy(float) if "compression_target" in data.frame else np.round(data.R, 1)
    )
    keys: dict[tuple, list[int]] = {}
    for i in range(len(data)):
        key = (boundary[i], f"{data.N[i]:.4g}", f"{data.P[i]:.4f}", f"{data.D[i]:.4g}", f"{target[i]:.3g}")
        keys.setdefault(key, []).append(i)
    return [np.array(rows) for rows in keys.values()]


def _log_correlation(x: Array, y: Array) -> float | None:
    x, y = np.log(x), np.log(y)
    if np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9 or len(x) < 3:
        return None
    return float(np.corrcoef(x, y)[0, 1])
