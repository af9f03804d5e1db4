"""Figures of how runs trained: realised R over training, and the gain of the decay. Each takes an Axes and returns it."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from analysis.compare import RATIO_TOLERANCE
from analysis.data import ResultsData, numeric_column
from analysis.inputs import prepare
from analysis.laws import DECAY_GAIN
from analysis.plots import RUN_STYLES, finish, points_style, ratio_levels, ratio_ticks
from analysis.result import FitResult
from dlcm.errors import UserError
from dlcm.record import read_metrics

Array = np.ndarray
_MOST_LINES = 8
"""Runs of one target that are drawn one by one; of more, the median and the middle 90%."""
_GRID = np.linspace(0.0, 100.0, 101)


@dataclasses.dataclass(frozen=True, eq=False)
class RatioCurve:
    """Realised tokens per concept of one run over its training.

    Attributes:
        target: tokens per concept that were asked for.
        done: share of the training tokens seen, percent, rising, (n,).
        ratio: tokens per concept over the steps since the entry before, (n,).
        evaluated: tokens per concept at evaluation.
    """

    run_id: str
    target: float
    done: Array
    ratio: Array
    evaluated: float


def load_ratio_curves(folder: str | Path, data: ResultsData) -> list[RatioCurve]:
    """R over training of the DLCM runs of results, from `metrics.jsonl` of each in the sweep folder, by target.

    Args:
        folder: of the sweep.
        data: the runs.

    Raises:
        UserError: no run has a metrics log there, or one is torn.
    """
    rows = data.dlcm
    if not len(rows):
        raise UserError(f"{data.source}: no finished DLCM run")
    target = numeric_column(rows.frame, "compression_target", rows.source)
    evaluated = numeric_column(rows.frame, "tokens_per_concept", rows.source)
    found = []
    for run_id, asked, at_end, tokens in zip(rows.run_ids, target, evaluated, rows.D):
        lines = read_metrics(Path(folder) / run_id / "metrics.jsonl", running=True)
        pairs = [(m["tokens"], m["tokens_per_concept"]) for m in lines if m.get("tokens_per_concept") is not None]
        if pairs:
            seen, ratio = np.array(pairs, dtype=float).T
            found.append(RatioCurve(run_id, float(asked), 100 * seen / tokens, ratio, float(at_end)))
    if not found:
        raise UserError(
            f"{folder}: no run of {data.source} has metrics.jsonl here; give the sweep folder with its runs, not a copy "
            "of results.parquet"
        )
    return sorted(found, key=lambda curve: (curve.target, curve.run_id))


def plot_ratio_over_training(ax: Axes, curves: Sequence[RatioCurve]) -> Axes:
    """Realised tokens per concept over training, one colour a target, and at evaluation behind the end.

    Each target has a grey band of 5%. Of more than eight runs of one target, the median and the middle 90% are drawn.

    Args:
        ax: where to draw.
        curves: as `load_ratio_curves` returns them.
    """
    seen: list[float] = []
    targets = sorted({curve.target for curve in curves})
    for target, style in zip(targets, itertools.cycle(RUN_STYLES)):
        own = [curve for curve in curves if curve.target == target]
        line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"], "zorder": 3}
        label = f"R = {target:g}"
        ax.fill_between(
            [0, 108],
            target * (1 - RATIO_TOLERANCE),
            target * (1 + RATIO_TOLERANCE),
            color="#E2E2E2",
            linewidth=0,
            zorder=0,
        )
        if len(own) <= _MOST_LINES:
            for curve in own:
                ax.plot(curve.done, curve.ratio, linewidth=0.9, alpha=0.85, label=label, **line)
                label = None
        else:
            with np.errstate(invalid="ignore"):
                on_grid = np.array([np.interp(_GRID, c.done, c.ratio, left=np.nan) for c in own])
            known = np.isfinite(on_grid).all(axis=0)
            low, middle, high = np.percentile(on_grid[:, known], [5, 50, 95], axis=0)
            ax.fill_between(_GRID[known], low, high, color=style["color"], alpha=0.25, linewidth=0, zorder=2)
            ax.plot(_GRID[known], middle, linewidth=1.2, label=f"{label} ({len(own)} runs)", **line)
            seen += [*low, *high]
        evaluated = np.array([curve.evaluated for curve in own])
        ax.scatter(
            np.full(len(own), 104.0), evaluated, s=10, **points_style(style, hollow=True), zorder=4, clip_on=False
        )
        seen += [*evaluated, target, *(v for curve in own if len(own) <= _MOST_LINES for v in curve.ratio)]
    ax.set_yscale("log")
    low, high = min(seen) / 1.1, max(seen) * 1.1
    ax.set_ylim(low, high)
    ax.set_xlim(0, 108)
    ax.xaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
    ax.yaxis.set_major_locator(FixedLocator(ratio_ticks(low, high)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    title = "points: at evaluation; grey: within 5% of the target"
    return finish(ax, "training done (% of the tokens)", "realised R (tokens per concept)", legend="top", title=title)


def plot_decay_gain(ax: Axes, data: ResultsData, fit: FitResult) -> Axes:
    """Relative drop of the loss over the final decay against the loss where it begins (eq 23), one series a ratio R.

    Lines are the fitted law at the median size of the runs of each R; runs of other sizes lie off them as far as the law's power
    of N says, and as far as they scatter.

    Args:
        ax: where to draw.
        data: results with `loss_nats_stable`.
        fit: of the law `decay_gain` to them.

    Raises:
        UserError: no run knows its loss where the decay begins.
    """
    rows = prepare(DECAY_GAIN, data.of_family(fit.law.family))
    stable, gain, ratio = rows.values("stable_loss"), 100 * rows.values("decay_gain"), ratio_levels(rows)
    reach = np.geomspace(stable.min(), stable.max(), 60)
    for level, style in zip(np.unique(ratio), itertools.cycle(RUN_STYLES)):
        own = ratio == level
        ax.scatter(stable[own], gain[own], s=14, label=f"R = {level:g}", **points_style(style, hollow=True), zorder=3)
        line = fit.predict(stable_loss=reach, R=np.median(rows.R[own]), N=np.median(rows.N[own]))
        ax.plot(reach, 100 * line, color=style["color"], linestyle=style["linestyle"], linewidth=1.1, zorder=2)
    ax.margins(y=0.12)
    title = f"lines: eq 23 at the median N, {100 * fit.rms:.2g}% rms"
    return finish(
        ax,
        "loss where the decay begins (nats/token)",
        "relative drop of the loss (%)",
        legend="top",
        title=title,
    )
