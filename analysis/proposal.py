"""From a template sweep and a budget to the sweep that narrows the optimum most, beside the full grid of equal cost."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.cost import cost_of_plan
from analysis.data import ResultsData
from analysis.design import levels, reduce_law
from analysis.expect import N_SIMULATED, Expected, design_of, expect, search_box
from analysis.prior import Prior
from analysis.propose import Progress, choose_runs
from analysis.variations import BUDGET, value_of
from dlcm.errors import UserError

if TYPE_CHECKING:
    from sweeps.plan import Plan
    from sweeps.spec import Sweep

_SIZES, _RATIOS, _SHARES, _LENGTHS = 10, 5, 5, 5
"""Candidate values of each axis, evenly spaced over the range of the template (in logarithms, but for P)."""
_LARGEST_RUN = 0.125
"""A single run may cost this part of the budget at most: the largest size is known from several runs, not from one."""
_BEYOND_GRID = 4.0
"""The largest candidate size over that of the grid of equal cost: the law is trusted over a few octaves, not over decades."""


@dataclasses.dataclass(frozen=True, eq=False)
class Proposal:
    """A proposed sweep and the grid that costs as much.

    Attributes:
        plan: the proposed runs; `plan.sweep.to_yaml()` is its file.
        grid: every combination of the template's values, its sizes scaled by `grid_scale` until it costs the budget.
        expected: what the proposal will tell. expected_grid: what the grid would, under the same law and noise.
        budget: training FLOPs that were allowed.
        n_candidates: runs that were chosen from.
    """

    plan: "Plan"
    grid: "Plan"
    grid_scale: float
    expected: Expected
    expected_grid: Expected
    budget: float
    n_candidates: int

    @property
    def narrowing(self) -> dict[str, float]:
        """Quantity -> scatter under the proposal over scatter under the grid; without what is held or at an edge."""
        pairs = ((q, self.expected_grid[q.name]) for q in self.expected.quantities)
        return {
            a.name: a.spread / b.spread
            for a, b in pairs
            if not (a.held or b.held) and b.at_edge <= 0.5 and b.spread > 0
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "budget_flops": self.budget,
            "flops_train_planned": self.plan.flops,
            "n_runs": len(self.plan),
            "n_candidates": self.n_candidates,
            "expected": self.expected.to_dict(),
            "grid": {
                "n_runs": len(self.grid),
                "flops_train_planned": self.grid.flops,
                "scale_of_sizes": self.grid_scale,
                "expected": self.expected_grid.to_dict(),
            },
            "scatter_over_grid": self.narrowing,
            "sweep": self.plan.sweep.model_dump(mode="json", exclude_defaults=True),
        }


def propose(
    template: "Sweep",
    prior: Prior,
    *,
    budget: float,
    target: float,
    max_runs: int | None = None,
    max_seeds: int = 2,
    n: int = N_SIMULATED,
    seed: int = 0,
    progress: Progress | None = None,
) -> Proposal:
    """The runs under `budget` that narrow the optimum at `target` most.

    Everything but sizes, R, P, lengths and seeds is taken from the template; so are the ranges of R, P and length. The dense
    baseline is left out: this chooses the runs of the DLCM law.

    Args:
        template: a sweep with sizes; its values span the candidates.
        prior: law, constants and noise of the DLCM.
        budget: training FLOPs of all runs.
        target: training FLOPs of the optimum.
        max_runs: runs at most; as many as the grid has by default.
        max_seeds: how often one design may be run.
        n: simulated sweeps of each.
        seed: seeds draws and noise.
        progress: called with (runs chosen, max_runs).

    Raises:
        UserError: the template has no DLCM sizes, or the budget pays for no run.
    """
    for name, value in (("budget", budget), ("target", target)):
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} = {value:g} FLOPs; give a number above 0")
    axes = _axes_of(template)
    grid, scale = _grid_at_cost(template, axes, budget)
    cost = cost_of_plan(grid)
    pool = _candidates(template, axes, grid, budget)
    design, candidates = design_of(grid, "dlcm"), design_of(pool, "dlcm")
    law = reduce_law(prior.law, design)
    box = search_box(design, prior, cost, target, _ranges(candidates))
    choice = choose_runs(
        candidates,
        prior,
        cost,
        target,
        budget=budget,
        law=law,
        box=box,
        max_runs=max_runs or len(grid),
        max_seeds=max_seeds,
        seed=seed,
        progress=progress,
    )
    proposed = _sweep_of(template, pool, choice.counts)
    expected, expected_grid = (
        expect(data, prior, cost, target, law=law, box=box, n=n, seed=seed)
        for data in (design_of(proposed, "dlcm"), design)
    )
    return Proposal(proposed, grid, scale, expected, expected_grid, budget, len(candidates))


def _axes_of(template: "Sweep") -> dict[str, list[float]]:
    """Values of size, R, P and length among the DLCM runs of the template, ascending."""
    from sweeps.plan import plan

    runs = [run for run in plan(template.model_copy(update={"baseline": None})).runs if not run.config.model.is_dense]
    names = ("size", "compression_ratio", "concept_share", BUDGET)
    found = {axis: sorted({v for run in runs if (v := value_of(run, axis)) is not None}) for axis in names}
    if not all(found.values()):
        missing = next(axis for axis, values in found.items() if not values)
        raise UserError(
            f"{template.where}: its DLCM runs have no {missing}; a design starts from a sweep over size, compression_ratio and "
            "concept_share, such as the recipe allocation.yaml"
        )
    return found


def _bare(template: "Sweep", **update: Any) -> "Sweep":
    """The template without its axes, baseline and lengths."""
    base = {k: v for k, v in template.base.items() if k not in _DESIGNED}
    fresh = template.model_copy(update={"base": base, "baseline": None, "budgets": None, **update})
    fresh._source = template.source
    return fresh


_RATIO = "model.boundary.compression_ratio"
_DESIGNED = ("size", "concept_share", _RATIO, "train.tokens", "seed")


def _gridded(template: "Sweep", axes: dict[str, list[float]], scale: float) -> "Plan":
    """Every combination of the axes, sizes times `scale`; lengths in tokens grow alike, those in FLOPs by its square."""
    from sweeps.plan import plan
    from sweeps.spec import Axes, Budgets

    unit = template.budgets.unit if template.budgets else "tokens"
    power = {"tokens_per_parameter": 0, "tokens": 1, "flops": 2}[unit]
    budgets = Budgets(**{unit: tuple(v * scale**power for v in axes[BUDGET])})
    grid = {
        "size": tuple(float(f"{v * scale:.4g}") for v in axes["size"]),
        _RATIO: tuple(axes["compression_ratio"]),
        "concept_share": tuple(axes["concept_share"]),
    }
    return plan(_bare(template, axes=Axes(grid=grid), budgets=budgets))


def _grid_at_cost(template: "Sweep", axes: dict[str, list[float]], budget: float) -> tuple["Plan", float]:
    """The full grid that costs as much as the budget, within a percent and never more, and the scale of its sizes.

    Raises:
        UserError: at that cost some of its models do not exist, or are trained for less than is allowed.
    """
    scale = 1.0
    grid = _gridded(template, axes, scale)
    for _ in range(20):
        if 0.99 * budget <= grid.flops <= budget:
            break
        # The cost grows with the square of the scale, or a little less.
        scale *= (0.996 * budget / grid.flops) ** 0.5
        try:
            grid = _gridded(template, axes, scale)
        except UserError as error:
            raise UserError(
                f"a full grid of {budget:.3g} FLOPs does not exist: {error}; raise the budget, or give a smaller template"
            ) from None
    return grid, scale


def _candidates(template: "Sweep", axes: dict[str, list[float]], grid: "Plan", budget: float) -> "Plan":
    """All runs that may be chosen: sizes from the grid's least to what the budget allows, R, P and length over its ranges."""
    from sweeps.plan import plan
    from sweeps.spec import Axes, Budgets

    sizes = sorted({value_of(run, "size") or 0.0 for run in grid.runs})
    unit = template.budgets.unit if template.budgets else "tokens"
    lengths = grid.sweep.budgets.values if grid.sweep.budgets else ()
    cheapest = min(run.flops_train_planned for run in grid.runs if value_of(run, "size") == sizes[-1])
    beyond = min(_BEYOND_GRID, max(1.0, (_LARGEST_RUN * budget / cheapest) ** 0.5))
    if unit == "flops":
        beyond = 1.0  # the length of a run does not follow its size
    wanted = _spaced(sizes[0], sizes[-1] * beyond, _SIZES)
    shares = _spaced(*_ends(axes["concept_share"]), _SHARES, log=False)
    pairs = tuple(
        {"size": size, "concept_share": share}
        for size, share in itertools.product(wanted, shares)
        if _has_shape(template, size, share)
    )
    sweep = _bare(
        template,
        axes=Axes(grid={_RATIO: tuple(_spaced(*_ends(axes["compression_ratio"]), _RATIOS))}, list=pairs),
        budgets=Budgets(**{unit: tuple(_spaced(*_ends(lengths), _LENGTHS))}),
    )
    pool = plan(sweep)
    affordable = tuple(run for run in pool.runs if run.flops_train_planned <= _LARGEST_RUN * budget)
    if not affordable:
        least = min((run.flops_train_planned for run in pool.runs), default=float("nan"))
        raise UserError(
            f"{template.where}: no candidate costs at most {_LARGEST_RUN:g} of the budget of {budget:.3g} FLOPs, the cheapest "
            f"{least:.3g}; give a larger budget, or a template with smaller sizes or shorter runs"
        )
    return dataclasses.replace(pool, runs=affordable)


def _has_shape(template: "Sweep", size: float, share: float) -> bool:
    from sweeps.axes import unflatten
    from sweeps.shapes import Parts, dlcm_shape

    model = unflatten({k.removeprefix("model."): v for k, v in template.base.items() if k.startswith("model.")})
    try:
        dlcm_shape(size, share, template.shape, Parts.of(model))
    except UserError:
        return False
    return True


def _sweep_of(template: "Sweep", pool: "Plan", counts: np.ndarray) -> "Plan":
    """The chosen candidates as a sweep of its own, each run written out, seeds 0, 1, ... for those that are repeated."""
    from sweeps.plan import plan
    from sweeps.spec import Axes

    entries = []
    for run, count in zip(pool.runs, counts.tolist()):
        point = {
            "size": run.design["size"],
            "concept_share": run.design["concept_share"],
            _RATIO: run.compression_target,
            "train.tokens": run.tokens,
        }
        entries += [{**point, "seed": seed} for seed in range(count)]
    sweep = _bare(template, name=f"{template.name}-design", axes=Axes(list=tuple(entries)))
    return plan(sweep)


def _ranges(candidates: ResultsData) -> dict[str, tuple[float, float]]:
    """Ranges of R and P, a single one where realised values only scatter around it."""
    spans: dict[str, tuple[float, float]] = {}
    for name in "RP":
        values = candidates.values(name)
        single = float(np.median(values))
        spans[name] = (single, single) if len(levels(values)) == 1 else (float(values.min()), float(values.max()))
    return spans


def _ends(values: Any) -> tuple[float, float]:
    return float(min(values)), float(max(values))


def _spaced(low: float, high: float, n: int, *, log: bool = True) -> list[float]:
    """`n` values from `low` to `high` to four digits; one where they coincide."""
    if low == high:
        return [low]
    values = np.geomspace(low, high, n) if log else np.linspace(low, high, n)
    return [float(f"{v:.4g}") for v in values]
