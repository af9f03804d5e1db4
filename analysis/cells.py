"""Which cells of a sweep have no usable run: those of its plan, or else of the cross of the levels that were found."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.data import ResultsData
from analysis.design import LEVEL_WIDTH, SAME_BUDGET, find_levels
from analysis.frames import read_table
from dlcm.errors import UserError

Array = np.ndarray
_MOSTLY = 0.5
"""Share of a cross that must be there before what is absent counts as missing: other designs are no crosses."""
_LEVELS = 12
"""More values of an axis than this are no grid."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A place in a design without a usable run.

    Attributes:
        design: what should have been run there, in words. budget: the part of the sweep that lacks it.
        reason: `diverged`, `lost`, ..., or `not in the results`.
        run_id: of the planned run; empty where only the design says that there should be one.
    """

    design: str
    budget: str
    reason: str
    run_id: str = ""


@dataclasses.dataclass(frozen=True)
class Gaps:
    """The cells that a fit is made without.

    Attributes:
        cells: without a usable run. n_cells: how many there should be, by budget.
        origin: `plan` or `cross of the levels found`.
    """

    cells: tuple[Cell, ...]
    n_cells: dict[str, int]
    origin: str

    @property
    def provisional(self) -> dict[str, tuple[Cell, ...]]:
        """Budget -> what it lacks; what is said of it is provisional."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.budget, []).append(cell)
        return {budget: tuple(cells) for budget, cells in found.items()}

    def describe(self) -> list[str]:
        """A sentence for each budget."""
        lines = []
        for budget, cells in self.provisional.items():
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(c.reason for c in cells).items())
            of = f"{len(cells)} of {self.n_cells[budget]} {'runs' if self.origin == 'plan' else 'cells'}"
            where = "; ".join(c.run_id or c.design for c in cells[:4]) + ("; ..." if len(cells) > 4 else "")
            lines.append(f"{budget or 'the sweep'} is provisional: {of} missing ({reasons}): {where}")
        return lines


def find_gaps(data: ResultsData) -> Gaps:
    """What the design has and the usable runs have not.

    The plan beside the results says what should be there. Without one, the full cross of the levels of N, R, P and of the budget
    (or of D) that were found says it, where at least half of it is there.
    """
    plan = _plan_beside(data)
    return _of_cross(data) if plan is None else _of_plan(data, plan)


def _plan_beside(data: ResultsData) -> pd.DataFrame | None:
    file = Path(data.source).parent / "plan.parquet"
    if not Path(data.source).is_file() or not file.is_file():
        return None
    try:
        plan = read_table(file)
    except UserError:
        return None
    return plan if {"run_id", "model", "flops_train_planned"} <= set(plan.columns) else None


def _of_plan(data: ResultsData, plan: pd.DataFrame) -> Gaps:
    here = set(data.frame["model"].astype(str)) if "model" in data.frame else set(plan["model"])
    plan = plan.loc[plan["model"].isin(list(here))]
    budgets = plan["budget"].fillna("").astype(str) if "budget" in plan else pd.Series("", index=plan.index)
    spent: Any = [f"{c:.3g} training FLOPs" for c in plan["flops_train_planned"]]  # the stubs know no lists there
    budgets = budgets.where(budgets != "", spent)
    reasons = {e.run_id: e.reason for e in data.exclusions}
    usable = set(data.run_ids)
    cells = [
        Cell(str(run), budget, reasons.get(str(run), "not in the results"), str(run))
        for run, budget in zip(plan["run_id"], budgets)
        if str(run) not in usable
    ]
    return Gaps(tuple(cells), dict(Counter(budgets)), "plan")


def _of_cross(data: ResultsData) -> Gaps:
    cells: list[Cell] = []
    n_cells: Counter[str] = Counter()
    families = sorted(set(data.frame["model"].astype(str))) if "model" in data.frame else [""]
    for family in families:
        rows = data.of_family(family or None)
        axes = _axes(rows)
        if axes is None or math.prod(len(values) for _, values in axes.values()) < 4:
            continue
        there = set(zip(*(index.tolist() for index, _ in axes.values())))
        names, sizes = list(axes), [len(values) for _, values in axes.values()]
        if len(there) < _MOSTLY * math.prod(sizes):
            continue
        for position in np.ndindex(*sizes):
            said = {name: axes[name][1][i] for name, i in zip(names, position)}
            budget = f"{names[-1]} = {said[names[-1]]}"
            n_cells[budget] += 1
            if tuple(int(i) for i in position) not in there:
                design = " ".join([family, *(f"{name} = {value}" for name, value in said.items())]).strip()
                cells.append(Cell(design, budget, "not in the results"))
    return Gaps(tuple(cells), dict(n_cells), "cross of the levels found")


def _axes(rows: ResultsData) -> dict[str, tuple[Array, list[str]]] | None:
    """Axis -> level of each row and names of the levels; the budget comes last. None for a design without a grid."""
    target = rows.frame.get("compression_target", rows.R)
    axes = {"N": _level(rows.N), "R": _level(np.asarray(target, dtype=float)), "P": _level(np.round(rows.P, 1) + 1e-9)}
    axes = {name: axis for name, axis in axes.items() if len(axis[1]) > 1 or name == "N"}
    by_tokens = ("D", _level(rows.D))
    by_cost = ("C", _level(rows.C, SAME_BUDGET)) if np.isfinite(rows.C).all() else by_tokens
    name, last = min((by_tokens, by_cost), key=lambda a: len(a[1][1]))
    axes[name] = last
    return None if any(len(values) > _LEVELS for _, values in axes.values()) else axes


def _level(values: Array, width: float = LEVEL_WIDTH) -> tuple[Array, list[str]]:
    at, found = find_levels(values, width)
    return at, [f"{v:.3g}" for v in found]
