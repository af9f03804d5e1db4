"""Which runs matter: a sweep with one value of an axis taken away or added, and how far its answers then scatter."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.data import ResultsData
from analysis.expect import Expected, design_of, expect, search_box
from analysis.laws import Change
from analysis.search import Cost
from dlcm.errors import UserError

if TYPE_CHECKING:
    from sweeps.plan import Plan, PlannedRun
    from sweeps.spec import Sweep

Progress = Callable[[int, int], None]

BUDGET = "budget"
_AXES = ("size", "compression_ratio", "concept_share", BUDGET, "seed")
_STEP = 2.0
"""Factor by which an axis with one value is extended; with several values, the ratio of the two at that end."""
_SHARES = (0.1, 0.9)
_PINNED = 0.5


@dataclasses.dataclass(frozen=True)
class Variation:
    """The sweep with one change.

    Attributes:
        op: `without` a value that it has, or `with` one more.
        axis: `size`, `compression_ratio`, `concept_share`, `budget` or `seed`. value: the value, as a number.
        label: the change in words.
        n_runs: runs of the changed sweep, all families.
        flops: its planned training FLOPs over those of the sweep.
        widths: quantity -> how far its simulated answers scatter (`Quantity.spread`) over that under the sweep. Left out: what
            is held, or lies at an edge of the search in more than half of the sweep's own simulations.
        refused: why there is no such sweep; empty where there is.
    """

    op: str
    axis: str
    value: float
    label: str
    n_runs: int = 0
    flops: float = 0.0
    widths: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: str = ""


def vary(
    plan: "Plan", expected: Expected, cost: Cost, *, n: int = 100, seed: int = 0, progress: Progress | None = None
) -> tuple[Variation, ...]:
    """Simulate every one-step change of a sweep.

    All are refitted with the law that the whole sweep supports, its offsets held at 0 (they are the finest detail, which a value
    less may leave untold), over the same ranges of R and P, and with the same noise in the runs that they share: what
    differs is the design alone.

    Args:
        plan: the sweep.
        expected: of the DLCM runs of `plan`.
        cost: training FLOPs, `cost(N, D, R, P)`.
        n: simulated sweeps of each.
        seed: seeds the noise.
        progress: called with (done, all).
    """
    design = design_of(plan, "dlcm")
    prior, target = expected.prior, expected.target
    offsets = [p.name for p in expected.law.free if p.kind == "offset"]
    law = expected.law.apply(*(Change("fix", name, value=0.0, reason="comparison of designs") for name in offsets))
    box = search_box(design, prior, cost, target)

    def spreads(data: ResultsData) -> dict[str, float]:
        answer = expect(data, prior, cost, target, law=law, box=box, n=n, seed=seed)
        return {q.name: q.spread for q in answer.quantities}

    free = [q.name for q in expected.quantities if not q.held and q.at_edge <= _PINNED]
    before, changes = spreads(design), list(_changes(plan))
    found = []
    for done, (variation, runs) in enumerate(changes):
        if not variation.refused:
            flops = sum(run.flops_train_planned for run in runs)
            data = design_of(dataclasses.replace(plan, runs=runs), "dlcm")
            variation = dataclasses.replace(variation, n_runs=len(runs), flops=flops / plan.flops)
            if len(data):
                after = spreads(data)
                ratios = {name: after[name] / before[name] for name in free if before[name] > 0}
                variation = dataclasses.replace(variation, widths=ratios)
            else:
                variation = dataclasses.replace(variation, refused="no DLCM run is left")
        found.append(variation)
        if progress:
            progress(done + 1, len(changes))
    return tuple(found)


def _changes(plan: "Plan") -> Iterator[tuple[Variation, tuple["PlannedRun", ...]]]:
    """Every change with the runs that it leaves, in the order of the axes: values taken away, then values added."""
    for axis in _AXES:
        values = sorted({v for run in plan.runs if (v := value_of(run, axis)) is not None and _is_dlcm(run)})
        if not values:
            continue
        # With one value left of an axis another law would be fitted, and with a second one to an axis of one value too: what
        # the scatter of the same constants is then compared to has no meaning. Seeds are in no law.
        if len(values) > (1 if axis == "seed" else 2):
            for value in values:
                runs = tuple(run for run in plan.runs if value_of(run, axis) != value)
                yield Variation("without", axis, value, _label("without", axis, value, plan)), runs
        if len(values) == 1 and axis in ("size", "compression_ratio", BUDGET):
            continue
        for value in _beyond(axis, values):
            variation = Variation("with", axis, value, _label("with", axis, value, plan))
            try:
                yield variation, _with_value(plan, axis, value)
            except UserError as error:
                yield dataclasses.replace(variation, refused=str(error)), ()


def value_of(run: "PlannedRun", axis: str) -> float | None:
    """The value of an axis that a run was planned for; None where the run has none."""
    if axis == BUDGET:
        return float(run.budget.split()[0]) if run.budget else float(run.tokens)
    if axis == "compression_ratio":
        return None if run.config.model.is_dense else run.compression_target
    value = run.config.seed if axis == "seed" else run.design.get(axis)
    return None if value is None else float(value)


def _is_dlcm(run: "PlannedRun") -> bool:
    return not run.config.model.is_dense


def _beyond(axis: str, values: list[float]) -> list[float]:
    """One value below the lowest and one above the highest, in steps like the ones next to them."""
    if axis == "seed":
        return [values[-1] + 1]
    if axis == "concept_share":
        below = values[1] - values[0] if len(values) > 1 else 0.2
        above = values[-1] - values[-2] if len(values) > 1 else 0.2
        ends = (values[0] - below, values[-1] + above)
        return [float(f"{v:.6g}") for v in ends if _SHARES[0] - 1e-9 <= v <= _SHARES[1] + 1e-9]
    # R lives above 1: its distance from 1 is what is scaled.
    floor = 1.0 if axis == "compression_ratio" else 0.0
    low, high = values[0] - floor, values[-1] - floor
    below = low / (values[1] - floor) if len(values) > 1 else 1 / _STEP
    above = values[-1] / values[-2] if len(values) > 1 else _STEP
    return [_rounded(floor + low * below), _rounded(floor + high * above if floor == 0 else values[-1] * above)]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _label(op: str, axis: str, value: float, plan: "Plan") -> str:
    from sweeps.plan_table import short_count

    if axis == BUDGET:
        unit = {"flops": "FLOPs", "tokens": "tokens", "tokens_per_parameter": "tokens/parameter"}
        name = unit[plan.sweep.budgets.unit] if plan.sweep.budgets else "tokens"
        shown = f"{value:.3g}" if name == "FLOPs" else short_count(value)
        return f"{op} {shown} {name}"
    name = {"size": "N", "compression_ratio": "R", "concept_share": "P", "seed": "seed"}[axis]
    shown = short_count(value) if axis == "size" else f"{value:g}"
    return f"{op} {name} = {shown}" if axis != "seed" else f"{op} seed {shown}"


def _with_value(plan: "Plan", axis: str, value: float) -> tuple["PlannedRun", ...]:
    """The runs of the plan and those that one more value of an axis brings, baseline runs included.

    Raises:
        UserError: there is no such model, or the axis is written in a block that has no products.
    """
    from sweeps.plan import plan as make_plan

    seen = {run.run_id for run in plan.runs}
    added = make_plan(_extended(plan.sweep, axis, value))
    return (*plan.runs, *(run for run in added.runs if run.run_id not in seen))


def _extended(sweep: "Sweep", axis: str, value: float) -> "Sweep":
    """The sweep with `value` as the only one of an axis."""
    from sweeps.axes import ALIASES

    if axis == BUDGET and sweep.budgets is not None:
        budgets = sweep.budgets.model_copy(update={sweep.budgets.unit: (value,)})
        return sweep.model_copy(update={"budgets": budgets})
    key = "train.tokens" if axis == BUDGET else ALIASES.get(axis, axis)
    if key in sweep.axes.zip or any(key in entry for entry in sweep.axes.list):
        raise UserError(f"{axis} stands in a zip or list block, where one more value has no partners")
    entry: Any = int(value) if axis in ("seed", BUDGET) else value
    grid = {k: v for k, v in sweep.axes.grid.items() if k != key} | {key: (entry,)}
    base = {k: v for k, v in sweep.base.items() if k != key}
    baseline = sweep.baseline
    if baseline is not None and baseline.sizes and axis == "size":
        baseline = None  # the baseline has sizes of its own, which stay
    return sweep.model_copy(
        update={"axes": sweep.axes.model_copy(update={"grid": grid}), "base": base, "baseline": baseline}
    )


def most_telling(variations: tuple[Variation, ...], name: str) -> Variation | None:
    """The value whose loss would widen the interval of `name` most; None where no removal touches it."""
    removed = [v for v in variations if v.op == "without" and np.isfinite(v.widths.get(name, np.nan))]
    return max(removed, key=lambda v: v.widths[name], default=None)
