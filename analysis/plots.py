"""Plots of a sweep: each takes an Axes and returns it. Readable at column width, in greyscale, and without colour vision.

No global state: figures are made without pyplot, and sizes and colours are set on the artists, not in rcParams.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.data import ResultsData, numeric_column
from analysis.design import levels
from analysis.optimum import optimum
from analysis.result import FitResult
from analysis.search import Cost, tokens_for_budget
from dlcm.errors import UserError

Array = np.ndarray

COLUMN_WIDTH = 3.4
"""Inches: one column of a two-column page."""
FONT = 8.0
SMALL = 7.0

# Okabe and Ito's palette; every series also has its own marker and line style, so that greyscale print keeps them apart.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
_DENSE = {"color": BLACK, "marker": "s", "linestyle": "--"}
_DLCM = {"color": BLUE, "marker": "o", "linestyle": "-"}
_RATIOS = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "^", "linestyle": "--"},
    {"color": GREEN, "marker": "D", "linestyle": "-."},
    {"color": PURPLE, "marker": "v", "linestyle": ":"},
    {"color": ORANGE, "marker": "P", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
)
_GRID = "#E2E2E2"


def new_figure(width: float = COLUMN_WIDTH, height: float = 2.6) -> tuple[Figure, Axes]:
    """A figure with one Axes, in inches, drawn by Agg."""
    figure = Figure(figsize=(width, height), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def save_figure(figure: Figure, path: str | Path, *, data: ResultsData | None = None, **provenance: str) -> Path:
    """Save as .png, .svg or .pdf with the hash of the results and the code version in the file's metadata.

    Args:
        figure: what to save.
        path: where; the suffix sets the format.
        data: the results that it shows.
        **provenance: further facts for the metadata.

    Raises:
        UserError: another suffix.
    """
    from dlcm.provenance import source_commit

    path = Path(path)
    commit, dirty = source_commit()
    facts = {"source": data.source, "results_hash": data.hash} if data is not None else {}
    facts |= {"commit": (commit or "unknown") + ("+changes" if dirty else ""), **provenance}
    text = json.dumps(facts)
    kinds: Mapping[str, dict[str, Any]] = {
        ".png": {"Software": "dlcm-scaling", "Description": text},
        ".svg": {"Creator": "dlcm-scaling", "Description": text, "Date": None},
        ".pdf": {"Creator": "dlcm-scaling", "Subject": text, "CreationDate": None},
    }
    if path.suffix not in kinds:
        raise UserError(
            f"{path}: figures are saved as .png, .svg or .pdf, not {path.suffix or 'a file without suffix'}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    # text stays text in an SVG, and its ids do not change from one run to the next
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dlcm-scaling", "pdf.fonttype": 42}):
        figure.savefig(temporary, metadata=kinds[path.suffix])
    temporary.replace(path)
    return path


def plot_loss_vs_compute(
    ax: Axes,
    data: ResultsData,
    *,
    dense: FitResult | None = None,
    dlcm: FitResult | None = None,
    cost: Cost | None = None,
) -> Axes:
    """Validation loss of every run against its training FLOPs, with the least loss that each fit predicts.

    The best run of each budget is filled, the others are hollow. The frontiers (least predicted loss at each budget) are
    drawn over the span of the runs, where a fit and the cost function are given.
    """
    for family, label, style, fit in (("dense", "dense", _DENSE, dense), ("dlcm", "DLCM", _DLCM, dlcm)):
        rows = data.of_family(family)
        if not len(rows):
            continue
        best = _best_of_each_budget(rows)
        ax.scatter(rows.C[~best], rows.loss[~best], s=11, alpha=0.6, **_points(style, hollow=True), zorder=2)
        ax.scatter(rows.C[best], rows.loss[best], s=20, label=f"{label}, best run", **_points(style), zorder=3)
        if fit is not None and cost is not None:
            budgets = np.geomspace(rows.C.min(), rows.C.max(), 25)
            frontier = [
                optimum(dataclasses.replace(fit, replicates=fit.replicates[:0]), cost, c, extrapolate=True).loss
                for c in budgets
            ]
            line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"]}
            ax.plot(budgets, frontier, linewidth=1.2, label=f"{label}, fitted frontier", **line)
    _log_axis(ax, "x", data.C)
    return _finish(ax, "training compute (FLOPs)", "validation loss (nats/token)", legend="top")


def plot_loss_vs_share(
    ax: Axes, data: ResultsData, *, budget: float | None = None, fit: FitResult | None = None, cost: Cost | None = None
) -> Axes:
    """Loss against the backbone share P, one series a target R, at one compute budget.

    Where the budget was spent on several model sizes, the best size at each share is filled, and the line is the law's
    least over the sizes in the data.

    Args:
        ax: where to draw.
        data: results; the DLCM runs within 15% of the budget are shown.
        budget: training FLOPs; the largest at which runs lie by default.
        fit: draws the law at the budget, with D as the cost function and the budget leave it.
        cost: training FLOPs, `cost(N, D, R, P)`.

    Raises:
        UserError: no DLCM run lies at the budget.
    """
    rows = data.dlcm
    budget = budget or (levels(rows.C, 1.3)[-1] if len(rows) else float("nan"))
    rows = rows.take(np.abs(np.log(rows.C / budget)) < np.log(1.15))
    if not len(rows):
        raise UserError(f"{data.source}: no DLCM run within 15% of {budget:.3g} training FLOPs")
    target = _target(rows)
    sizes = np.geomspace(rows.N.min(), rows.N.max(), 41 if len(levels(rows.N)) > 1 else 1)
    for ratio, style in zip(np.unique(target), itertools.cycle(_RATIOS)):
        at = rows.take(target == ratio)
        best = _best_of_each_share(at)
        ax.scatter(at.P[~best], at.loss[~best], s=11, alpha=0.6, **_points(style, hollow=True), zorder=2)
        ax.scatter(at.P[best], at.loss[best], s=20, **_points(style), label=f"R = {ratio:g}", zorder=3)
        if fit is not None and cost is not None:
            shares, N = np.meshgrid(np.linspace(rows.P.min(), rows.P.max(), 60), sizes)
            R = np.full_like(shares, np.median(at.R))
            D = tokens_for_budget(cost, budget, N, R, shares)
            line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"]}
            ax.plot(shares[0], fit.predict(N=N, D=D, R=R, P=shares).min(axis=0), linewidth=1.1, **line)
    ax.margins(x=0.08, y=0.12)
    title = f"at {_power(budget)} training FLOPs" + (
        ", lines: fitted law" if fit is not None and cost is not None else ""
    )
    title += ", best size" if len(sizes) > 1 else ""
    return _finish(ax, "backbone share P of the parameters", "validation loss (nats/token)", legend="top", title=title)


def plot_realised_ratio(ax: Axes, data: ResultsData, *, tolerance: float = 0.05) -> Axes:
    """Realised tokens per concept over the target, in training and at evaluation, with the band that counts as held."""
    rows = data.dlcm
    target = _target(rows)
    ratios = np.unique(target)
    series = (
        ("training, last 10%", "tokens_per_concept_train", _RATIOS[0], -0.09),
        ("evaluation", "tokens_per_concept", _RATIOS[1], 0.09),
    )
    ax.axhspan(-100 * tolerance, 100 * tolerance, color=_GRID, zorder=0, label=f"within {100 * tolerance:g}%")
    ax.axhline(0, color="#707070", linewidth=0.8, zorder=1)
    for label, column, style, shift in series:
        realised = numeric_column(rows.frame, column, rows.source)
        place = np.searchsorted(ratios, target) + shift
        # neighbours of one column are fanned out in their order, so that none hides another
        fan = np.concatenate([np.linspace(-0.06, 0.06, n) for n in np.unique(target, return_counts=True)[1]])
        order = np.argsort(target, kind="stable")
        place[order] = place[order] + fan
        ax.scatter(
            place, 100 * (realised / target - 1), s=14, label=label, **_points(style, hollow=shift < 0), zorder=3
        )
    ax.set_xticks(range(len(ratios)), [f"{r:g}" for r in ratios])
    ax.set_xlim(-0.5, len(ratios) - 0.5)
    worst = max(abs(v) for v in ax.dataLim.intervaly)
    ax.set_ylim(-1.15 * max(worst, 100 * tolerance), 1.15 * max(worst, 100 * tolerance))
    return _finish(ax, "target tokens per concept R", "realised over target (%)", legend="top")


def plot_predicted_vs_measured(ax: Axes, data: ResultsData, fits: Sequence[FitResult]) -> Axes:
    """Predicted against measured loss of the runs that each fit was made on, with the line of equality."""
    everything: list[float] = []
    for fit in fits:
        fit.convention.require_same(data.convention, "predicted against measured")
        rows = data.of_family(fit.law.family)
        style = _DENSE if fit.law.family == "dense" else _DLCM
        predicted = fit.predict(
            **{name: rows.values(name) for name in dict.fromkeys(("N", "D", "R", "P", *fit.law.inputs))}
        )
        everything += [*predicted.tolist(), *rows.loss.tolist()]
        label = f"{'dense' if fit.law.family == 'dense' else 'DLCM'}, {100 * fit.rms:.2g}% rms"
        ax.scatter(rows.loss, predicted, s=16, label=label, **_points(style, hollow=True), zorder=3)
    if not everything:
        raise UserError(f"{data.source}: no fit to compare with the runs")
    margin = 0.06 * (max(everything) - min(everything) or 1.0)
    ends = (min(everything) - margin, max(everything) + margin)
    ax.plot(ends, ends, color="#707070", linewidth=0.8, zorder=1, label="equal")
    ax.set_xlim(ends)
    ax.set_ylim(ends)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    return _finish(ax, "measured loss (nats/token)", "predicted loss (nats/token)", legend="upper left")


# -- shared -----------------------------------------------------------------------------------------------------------


def _target(rows: ResultsData) -> Array:
    return numeric_column(rows.frame, "compression_target", rows.source)


def _best_of_each_budget(rows: ResultsData) -> Array:
    """Mask of the runs with the least loss among those of nearly the same training FLOPs."""
    starts = np.array(levels(rows.C, 1.3))
    group = np.argmin(np.abs(np.log(rows.C[:, None] / starts)), axis=1)
    return _least_in_groups(rows.loss, group)


def _best_of_each_share(rows: ResultsData, width: float = 0.04) -> Array:
    """Mask of the runs with the least loss among those of nearly the same share P."""
    order = np.argsort(rows.P)
    group = np.empty(len(rows), dtype=int)
    group[order] = np.cumsum(np.diff(rows.P[order], prepend=rows.P[order][:1]) > width)
    return _least_in_groups(rows.loss, group)


def _least_in_groups(values: Array, group: Array) -> Array:
    least = {g: values[group == g].min() for g in set(group.tolist())}
    return np.array([v == least[g] for v, g in zip(values, group.tolist())], dtype=bool)


def _points(style: Mapping[str, Any], *, hollow: bool = False) -> dict[str, Any]:
    color = style["color"]
    return {
        "marker": style["marker"],
        "edgecolors": color,
        "facecolors": "none" if hollow else color,
        "linewidths": 0.9,
    }


def _finish(ax: Axes, x: str, y: str, *, legend: str, title: str = "") -> Axes:
    ax.set_xlabel(x, fontsize=FONT)
    ax.set_ylabel(y, fontsize=FONT)
    ax.tick_params(labelsize=SMALL, length=2.5, width=0.6)
    ax.grid(True, color=_GRID, linewidth=0.5)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_linewidth(0.6)
    style: dict[str, Any] = {
        "fontsize": SMALL,
        "frameon": False,
        "handlelength": 1.8,
        "handletextpad": 0.5,
        "borderpad": 0.2,
        "labelspacing": 0.3,
    }
    style |= {"title": title or None, "title_fontsize": SMALL}
    if legend == "top":
        # above the data: inside it might cover them, beside them it would take a third of a column's width
        labels = ax.get_legend_handles_labels()[1]
        columns = 2 if max(map(len, labels), default=0) > 18 else 4 if title else 3
        place: dict[str, Any] = {
            "loc": "lower left",
            "bbox_to_anchor": (0.0, 1.0),
            "alignment": "left",
            "columnspacing": 1.0,
        }
        ax.legend(ncols=max(min(len(labels), columns), 1), **place, **style)
    else:
        style["loc"] = legend
        ax.legend(**style)
    return ax


def _log_axis(ax: Axes, which: str, values: Array) -> None:
    """A logarithmic axis with few, round ticks even where the data span less than a decade."""
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    pad = max((high / low) ** 0.06, 1.05)
    low, high = low / pad, high * pad
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    (ax.set_xlim if which == "x" else ax.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(_round_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: _power(v)))


def _round_ticks(low: float, high: float) -> list[float]:
    """Up to six ticks from 1, 2, 5 or finer, whichever set first gives three of them."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    ticks: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), tuple(np.arange(10, 100) / 10)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    step = -(-len(ticks) // 6)
    return ticks[::step] if step else ticks


def _power(value: float) -> str:
    exponent = int(np.floor(np.log10(value) + 1e-9))
    mantissa = value / 10.0**exponent
    return f"$10^{{{exponent}}}$" if abs(mantissa - 1) < 0.005 else f"${mantissa:.2g}{{\\times}}10^{{{exponent}}}$"
