"""Plots of a sweep: each takes an Axes and returns it. Readable at column width, in greyscale, and without colour vision.

No global state: figures are made without pyplot, and sizes and colours are set on the artists, not in rcParams.
"""

import dataclasses
import json
import re
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
from analysis.design import SAME_BUDGET, find_levels
from analysis.frontier import Frontier, frontier
from analysis.result import FitResult
from analysis.search import Cost
from dlcm.errors import UserError

Array = np.ndarray

COLUMN_WIDTH = 3.4
"""Inches: one column of a two-column page."""
FONT = 8.0
SMALL = 7.0
_HANDLE, _LETTER, _COLUMN_GAP = 0.33, 0.053, 0.1
"""Inches of a legend's handle with its margins, of a letter of the small font, and between two columns."""

# Okabe and Ito's palette; every series also has its own marker and line style, so that greyscale print keeps them apart.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
_DENSE = {"color": BLACK, "marker": "s", "linestyle": "--"}
_DLCM = {"color": BLUE, "marker": "o", "linestyle": "-"}
RUN_STYLES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "linestyle": "-"},
    {"color": VERMILION, "marker": "^", "linestyle": "--"},
    {"color": GREEN, "marker": "D", "linestyle": "-."},
    {"color": PURPLE, "marker": "v", "linestyle": ":"},
    {"color": ORANGE, "marker": "P", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
)
SHARES_APART = 0.05
"""Shares P that differ by less are one."""
FORMATS = (".png", ".svg", ".pdf")
_GRID = "#E2E2E2"
_MANY = 40
"""Points of a series at one place, from which they are drawn small."""
BAND_REFITS = 200
"""Bootstrap refits behind a band that is looked at, not read off."""


def new_figure(width: float = COLUMN_WIDTH, height: float = 2.6) -> tuple[Figure, Axes]:
    """A figure with one Axes, in inches, drawn by Agg."""
    figure = Figure(figsize=(width, height), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def new_panels(n: int, height: float = 2.3, *, share_x: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `n` Axes, each a column wide and `height` inches high: under each other, from five on in two columns."""
    n_columns = 1 if n < 5 else 2
    n_rows = -(-n // n_columns)
    figure = Figure(figsize=(COLUMN_WIDTH * n_columns, 0.3 + height * n_rows), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=share_x).ravel()
    for ax in axes[n:]:
        ax.set_axis_off()
    return figure, list(axes[:n])


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
    if path.suffix not in FORMATS:
        raise UserError(
            f"{path}: figures are saved as .png, .svg or .pdf, not {path.suffix or 'a file without suffix'}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    # text stays text in an SVG, and its ids do not change from one run to the next
    try:
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dlcm-scaling", "pdf.fonttype": 42}):
            figure.savefig(temporary, metadata=kinds[path.suffix])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def plot_loss_vs_compute(
    ax: Axes,
    data: ResultsData,
    *,
    dense: FitResult | None = None,
    dlcm: FitResult | None = None,
    cost: Cost | None = None,
    frontiers: Mapping[str, Frontier] | None = None,
) -> Axes:
    """Validation loss of every run against its training FLOPs, with the least loss that each fit predicts.

    The best run of each budget is filled, the others are hollow. The frontiers (least predicted loss at each budget, with
    their 95% band) are drawn over the span of the runs, where a fit and the cost function are given, or the frontiers themselves.
    """
    for family, label, style, fit in (("dense", "dense", _DENSE, dense), ("dlcm", "DLCM", _DLCM, dlcm)):
        rows = data.of_family(family)
        if not len(rows):
            continue
        best = _best_of_each_budget(rows)
        ax.scatter(rows.C[~best], rows.loss[~best], s=11, alpha=0.6, **points_style(style, hollow=True), zorder=2)
        ax.scatter(rows.C[best], rows.loss[best], s=20, label=f"{label}, best run", **points_style(style), zorder=3)
        best_at = (frontiers or {}).get(family)
        if best_at is None and fit is not None and cost is not None and rows.C.max() > 1.001 * rows.C.min():
            few = dataclasses.replace(fit, replicates=fit.replicates[:BAND_REFITS])
            best_at = frontier(few, cost, np.geomspace(rows.C.min(), rows.C.max(), 13), force=True)
        if best_at is not None:
            line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"]}
            ax.plot(best_at.budgets, best_at.points[:, 4], linewidth=1.2, label=f"{label}, fitted frontier", **line)
            if best_at.low is not None and best_at.high is not None:
                band = (best_at.low[:, 4], best_at.high[:, 4])
                ax.fill_between(best_at.budgets, *band, color=style["color"], alpha=0.15, linewidth=0, zorder=1)
    log_axis(ax, "x", data.C)
    return finish(ax, "training compute (FLOPs)", "validation loss (nats/token)", legend="top")


def plot_realised_ratio(ax: Axes, data: ResultsData, *, tolerance: float = 0.05) -> Axes:
    """Realised tokens per concept over the target, in training and at evaluation, with the band that counts as held."""
    rows = data.dlcm
    target = _target(rows)
    ratios = np.unique(target)
    many = np.unique(target, return_counts=True)[1].max() > _MANY
    size, alpha = (6, 0.5) if many else (14, 1.0)
    series = (
        ("training, last 10%", "tokens_per_concept_train", RUN_STYLES[0], -0.09),
        ("evaluation", "tokens_per_concept", RUN_STYLES[1], 0.09),
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
            place,
            100 * (realised / target - 1),
            s=size,
            alpha=alpha,
            label=label,
            **points_style(style, hollow=shift < 0),
            zorder=3,
        )
    ax.set_xticks(range(len(ratios)), [f"{r:g}" for r in ratios])
    ax.set_xlim(-0.5, len(ratios) - 0.5)
    worst = max(abs(v) for v in ax.dataLim.intervaly)
    ax.set_ylim(-1.15 * max(worst, 100 * tolerance), 1.15 * max(worst, 100 * tolerance))
    return finish(ax, "target tokens per concept R", "realised over target (%)", legend="top")


def plot_predicted_vs_measured(ax: Axes, data: ResultsData, fits: Sequence[FitResult]) -> Axes:
    """Predicted against measured loss (or what else the law is of) of the runs of each fit, with the line of equality."""
    everything: list[float] = []
    for fit in fits:
        fit.convention.require_same(data.convention, "predicted against measured")
        rows = data.of_family(fit.law.family)
        style = _DENSE if fit.law.family == "dense" else _DLCM
        predicted = fit.predict(
            **{name: rows.values(name) for name in dict.fromkeys(("N", "D", "R", "P", *fit.law.inputs))}
        )
        measured = rows.values(fit.law.target)
        everything += [*predicted.tolist(), *measured.tolist()]
        label = f"{'dense' if fit.law.family == 'dense' else 'DLCM'}, {100 * fit.rms:.2g}% rms"
        ax.scatter(measured, predicted, s=16, label=label, **points_style(style, hollow=True), zorder=3)
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
    targets = {fit.law.target for fit in fits}
    what = "loss (nats/token)" if targets == {"loss"} else ", ".join(sorted(targets)).replace("_", " ")
    return finish(ax, f"measured {what}", f"predicted {what}", legend="upper left")


# -- shared -----------------------------------------------------------------------------------------------------------


def _target(rows: ResultsData) -> Array:
    return numeric_column(rows.frame, "compression_target", rows.source)


def ratio_levels(rows: ResultsData) -> Array:
    """R of each run as the sweep asked for it, or the level of the realised R where that is not known."""
    if "compression_target" in rows.frame:
        return rows.values("compression_target")
    at, found = find_levels(rows.R)
    return np.array(found)[at].round(2)


def _best_of_each_budget(rows: ResultsData) -> Array:
    """Mask of the runs with the least loss among those of nearly the same training FLOPs."""
    return least_in_groups(rows.loss, find_levels(rows.C, SAME_BUDGET)[0])


def least_in_groups(values: Array, group: Array) -> Array:
    """Mask of the values that are the least of their group."""
    least = {g: values[group == g].min() for g in set(group.tolist())}
    return np.array([v == least[g] for v, g in zip(values, group.tolist())], dtype=bool)


def points_style(style: Mapping[str, Any], *, hollow: bool = False) -> dict[str, Any]:
    """Keywords of `scatter` for a series' style."""
    color = style["color"]
    return {
        "marker": style["marker"],
        "edgecolors": color,
        "facecolors": "none" if hollow else color,
        "linewidths": 0.9,
    }


def finish(ax: Axes, x: str, y: str, *, legend: str, title: str = "") -> Axes:
    """Labels, ticks, grid and legend as in all figures of this toolkit; `legend` is a place, `top`, or empty for none."""
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
    if not legend:
        ax.set_title(title, fontsize=SMALL, loc="left")
    elif legend == "top":
        # above the data: inside it might cover them, beside them it would take a third of a column's width
        handles, labels = ax.get_legend_handles_labels()
        n = _legend_columns(labels)
        # a legend is filled column by column, and read row by row
        order = [i for column in range(n) for i in range(column, len(labels), n)]
        place: dict[str, Any] = {
            "loc": "lower left",
            "bbox_to_anchor": (0.0, 1.0),
            "alignment": "left",
            "columnspacing": 1.0,
        }
        ax.legend([handles[i] for i in order], [labels[i] for i in order], ncols=n, **place, **style)
    else:
        style["loc"] = legend
        ax.legend(**style)
    return ax


def _legend_columns(labels: Sequence[str], room: float = COLUMN_WIDTH - 0.35) -> int:
    """The most columns, four at the most, whose entries fit into a width in inches."""
    widths = [_HANDLE + _LETTER * len(re.sub(r"\\\w+|[${}^_\\]", "", label)) for label in labels]
    for n in range(min(len(labels), 4), 1, -1):
        if sum(max(widths[column::n]) for column in range(n)) + _COLUMN_GAP * (n - 1) <= room:
            return n
    return 1


def log_axis(ax: Axes, which: str, values: Array) -> None:
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
    axis.set_major_formatter(FuncFormatter(lambda v, _: format_power(v)))


def ratio_ticks(low: float, high: float) -> list[float]:
    """Ticks of an axis of tokens per concept, few of them."""
    found = [t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256) if low * 0.99 <= t <= high * 1.01]
    return found if len(found) <= 6 else [t for t in found if np.log2(t) % 1 == 0]


def _round_ticks(low: float, high: float) -> list[float]:
    """Up to six ticks from 1, 2, 5 or finer, whichever set first gives three of them; four where their labels are long."""
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    ticks: list[float] = []
    mantissas: tuple[float, ...] = ()
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8), tuple(np.arange(10, 100) / 10)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    step = -(-len(ticks) // (6 if len(mantissas) < 4 else 4))
    return ticks[::step] if step else ticks


def format_power(value: float) -> str:
    """A number as mantissa and power of ten, for a label."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    digits = digits.removesuffix(".0")
    return f"$10^{{{int(exponent)}}}$" if digits == "1" else f"${digits}{{\\times}}10^{{{int(exponent)}}}$"
