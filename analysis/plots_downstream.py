"""The figure of an accuracy curve: runs, curve with its band, chance, and what was predicted. It takes an Axes and returns it."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.data import ResultsData, numeric_column
from analysis.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, finish
from dlcm.errors import UserError

if TYPE_CHECKING:
    from analysis.chain import Accuracy
    from analysis.downstream import DownstreamFit

Array = np.ndarray
_FAMILIES: tuple[dict[str, Any], ...] = (
    {"marker": "o", "edgecolors": BLUE, "facecolors": "none"},
    {"marker": "s", "edgecolors": BLACK, "facecolors": "none"},
)
_PREDICTED = (("D", VERMILION), ("v", PURPLE), ("P", GREEN), ("X", ORANGE), ("^", SKY), ("<", BLACK))
_MARGIN = 0.08


def plot_downstream(ax: Axes, data: ResultsData, curve: "DownstreamFit", predicted: Sequence["Accuracy"] = ()) -> Axes:
    """Accuracy against the loss (or against bits per byte), the better losses on the right.

    Args:
        ax: where to draw.
        data: the runs, as `task_data` returns them for the curve's source.
        curve: fitted to them.
        predicted: accuracies by the chain, drawn with both their intervals; the thin bar is that of either form.

    Raises:
        UserError: the runs hold no accuracy on the task, or are of another loss.
    """
    if data.convention.loss != curve.fit.convention.loss:
        raise UserError(f"task {curve.task}: these rows hold another loss; draw task_data(data, task, source)")
    accuracy = 100 * numeric_column(data.frame, f"acc_{curve.task}", data.source)
    models: Array = data.frame["model"].astype(str).to_numpy() if "model" in data.frame else np.full(len(data), "runs")
    for name, style in zip(sorted(set(models), reverse=True), _FAMILIES):
        own = models == name
        label = {"dlcm": "DLCM"}.get(name, name)
        ax.scatter(data.loss[own], accuracy[own], s=13, linewidths=0.8, label=label, zorder=3, **style)
    low, high = _reach([*data.loss, *(a.loss for a in predicted)])
    x = np.linspace(low, high, 200)
    inside = (x >= curve.law.span[0]) & (x <= curve.law.span[1])
    y = 100 * curve.predict(x)
    ax.plot(x, y, color=GREEN, linewidth=0.9, alpha=0.4, zorder=2)
    ax.plot(x[inside], y[inside], color=GREEN, linewidth=1.3, zorder=2, label=curve.law.link)
    ax.plot(
        x,
        100 * curve.predict_other(x),
        color=GREEN,
        linewidth=0.9,
        linestyle="--",
        zorder=2,
        label=curve.other_law.link,
    )
    if len(curve.fit.replicates):
        below, above = curve.predict_interval(x)
        ax.fill_between(x, 100 * below, 100 * above, color=GREEN, alpha=0.18, linewidth=0, zorder=1)
    ax.axhline(100 * curve.chance, color="#707070", linestyle=":", linewidth=0.9, zorder=1, label="chance")
    for found, (marker, color) in zip(predicted, itertools.cycle(_PREDICTED)):
        _draw_predicted(ax, found, marker, color)
    ax.set_xlim(high, low)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    x_label = "validation loss (nats/token)" if curve.source == "loss" else "bits per byte of the right answer"
    return finish(ax, x_label, f"accuracy on {curve.task} (%)", legend="top")


def _draw_predicted(ax: Axes, found: "Accuracy", marker: str, color: str) -> None:
    if found.value is None:
        return
    errors: dict[str, Any] = {}
    if found.interval is not None:
        errors["yerr"] = _bars(found.accuracy, found.interval)
    if found.either is not None:
        thin: dict[str, Any] = {"color": color, "linestyle": "none", "elinewidth": 0.5}
        ax.errorbar(found.loss, 100 * found.accuracy, yerr=_bars(found.accuracy, found.either), zorder=3, **thin)
    if found.loss_interval is not None:
        errors["xerr"] = [[max(found.loss - found.loss_interval[0], 0)], [max(found.loss_interval[1] - found.loss, 0)]]
    style: dict[str, Any] = {"marker": marker, "color": color, "markersize": 5, "linestyle": "none", "elinewidth": 1.0}
    ax.errorbar(found.loss, 100 * found.accuracy, capsize=1.5, label=found.short, zorder=4, **errors, **style)


def _bars(value: float, ends: tuple[float, float]) -> list[list[float]]:
    """Lengths in percent of a bar from a value down and up to the ends of an interval."""
    return [[100 * max(value - ends[0], 0)], [100 * max(ends[1] - value, 0)]]


def _reach(values: Sequence[float]) -> tuple[float, float]:
    low, high = float(min(values)), float(max(values))
    return low - _MARGIN * (high - low), high + _MARGIN * (high - low)
