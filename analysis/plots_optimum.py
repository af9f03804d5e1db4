"""Figures of allocations: the best N, D, R and P over budgets, with bands, and what the data cover."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from analysis.cost import TrainingCost
from analysis.frontier import COORDINATES, Frontier
from analysis.plots import BLACK, BLUE, COLUMN_WIDTH, FONT, GREEN, SMALL, VERMILION, finish, log_axis, ratio_ticks
from dlcm.errors import UserError

Array = np.ndarray
_STYLES: Mapping[str, dict[str, Any]] = {
    "dense": {"color": BLACK, "linestyle": "--"},
    "dlcm": {"color": BLUE, "linestyle": "-"},
}
_OTHER = ({"color": VERMILION, "linestyle": "-."}, {"color": GREEN, "linestyle": ":"})
_LABELS = {
    "N": "parameters N*",
    "D": "training tokens D*",
    "R": "tokens per concept R*",
    "P": "backbone share P*",
}
_NAMES = {"dense": "dense", "dlcm": "DLCM"}
_COVERED = "#ECECEC"
_SHORT_UNITS = {"training FLOPs": "training compute (FLOPs)", "inference FLOPs per token": "FLOPs per served token"}


def plot_allocation(ax: Axes, frontiers: Mapping[str, Frontier], name: str) -> Axes:
    """One coordinate of the best allocation over budgets: 95% bands, on grey where the data have such budgets and values.

    A line is full where the optimum lies inside the data and the coordinate is identified, and faint elsewhere, without a band
    where it is not identified.

    Args:
        ax: where to draw.
        frontiers: family -> frontier, all in one unit.
        name: N, D, R or P.

    Raises:
        UserError: no such coordinate, it is held in all of them, or the budgets are in different units.
    """
    if name not in COORDINATES:
        raise UserError(f"{name!r} is no coordinate of an allocation; valid: {', '.join(COORDINATES)}")
    drawn = {family: f for family, f in frontiers.items() if name in f.moving}
    if not drawn:
        raise UserError(f"{name} is held in every frontier; there is nothing to draw")
    if len({f.unit for f in drawn.values()}) > 1:
        raise UserError("frontiers of different units cannot share an axis; draw them one by one")
    column, others = COORDINATES.index(name), itertools.cycle(_OTHER)
    low, high = _covered(drawn, name)
    seen = [low, high] if name == "P" else []
    for family, f in drawn.items():
        style: dict[str, Any] = _STYLES.get(family) or next(others)
        known = np.array([s == "ok" for s in f.statuses[name]])
        values = f.points[:, column]
        seen += values.tolist()
        if f.low is not None and f.high is not None:
            ends = (np.where(known, end[:, column], np.nan) for end in (f.low, f.high))
            below, above = ends
            ax.fill_between(f.budgets, below, above, color=style["color"], alpha=0.22, linewidth=0, zorder=2)
            seen += [*below[known], *above[known]]
        ax.plot(f.budgets, values, linewidth=1.0, alpha=0.35, **style, zorder=3)
        full = np.where(known & f.inside, values, np.nan)
        ax.plot(f.budgets, full, linewidth=1.5, label=_NAMES.get(family, family), **style, zorder=4)
    budgets = np.concatenate([f.budgets for f in drawn.values()])
    log_axis(ax, "x", budgets)
    if name != "P":
        log_axis(ax, "y", np.array(seen))
    else:
        margin = 0.08 * (max(seen) - min(seen) or 1.0)
        ax.set_ylim(min(seen) - margin, max(seen) + margin)
    if name == "R":
        ax.yaxis.set_major_formatter("{x:.3g}")
        if len(ticks := ratio_ticks(*ax.get_ylim())) > 1:
            ax.yaxis.set_major_locator(FixedLocator(ticks))
    unit = next(iter(drawn.values())).unit
    spent = _covered(drawn, "C") if unit == TrainingCost.unit else (0.0, 0.0)
    # where the runs' own budgets are not known, or are of another kind, every budget counts as covered
    left, right = spent if spent[1] > 0 else ax.get_xlim()
    ax.fill_between([left, right], low, high, color=_COVERED, linewidth=0, zorder=0)
    return finish(ax, _SHORT_UNITS.get(unit, unit), _LABELS[name], legend="")


def draw_allocation(frontiers: Mapping[str, Frontier]) -> Figure:
    """A figure with a panel for each of N, D, R and P that is not held, and one legend.

    Raises:
        UserError: everything is held.
    """
    names = [name for name in COORDINATES if any(name in f.moving for f in frontiers.values())]
    if not names:
        raise UserError("all coordinates are held; there is nothing to draw")
    n_rows, n_columns = (len(names) + 1) // 2, min(len(names), 2)
    figure = Figure(
        figsize=(COLUMN_WIDTH * (1.9 if n_columns > 1 else 1), 2.3 * n_rows + 0.3), dpi=300, layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for ax, name in zip(axes, names):
        plot_allocation(ax, frontiers, name)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    found: dict[str, Any] = {}
    for ax in axes[: len(names)]:
        found |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=4, fontsize=FONT, frameon=False)
    figure.supxlabel("grey: budgets and values in the data; faint: outside the data, or not identified", fontsize=SMALL)
    return figure


def _covered(frontiers: Mapping[str, Frontier], name: str) -> tuple[float, float]:
    """The values of a coordinate in the data of all frontiers."""
    ranges = [f.data[name] for f in frontiers.values()]
    return min(r[0] for r in ranges), max(r[1] for r in ranges)
