"""Plots that judge a fit: law and runs, hold-outs, residuals, profiles, correlations. Each takes an Axes and returns it."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.data import ResultsData
from analysis.design import find_levels, levels
from analysis.identify import correlation_matrix
from analysis.inputs import prepare
from analysis.objective import Problem
from analysis.plots import (
    BLACK,
    BLUE,
    RUN_STYLES,
    VERMILION,
    finish,
    log_axis,
    plot_predicted_vs_measured,
    points_style,
)
from analysis.profile import ProfileCurve, profile_curve
from analysis.result import FitResult
from dlcm.errors import UserError

if TYPE_CHECKING:
    from analysis.holdout import HoldOut

Array = np.ndarray
_MOST_SLICES, _BINS, _HIGHEST = 5, 6, 3.0
_AXES = {
    "N": "parameters N",
    "D": "training tokens D",
    "C": "training compute (FLOPs)",
    "R": "tokens per concept R",
    "P": "backbone share P",
}
_LABELS = {"loss": "validation loss (nats/token)", "decay_gain": "relative gain of the decay"}


def plot_hold_outs(ax: Axes, data: ResultsData, fit: FitResult, holdouts: "Sequence[HoldOut]") -> Axes:
    """Predicted against measured loss: runs that the law was fitted to, and those that each cut held out.

    Args:
        ax: where to draw.
        data: the runs of the fit.
        fit: of all of them.
        holdouts: as `analysis.holdout.hold_out` returns them, or the `holdouts` of a law of a model choice.
    """
    rows = data.of_family(fit.law.family)
    predicted = _predict(fit, rows)
    measured = rows.values(fit.law.target)
    label = f"fitted, {100 * fit.rms:.2g}%"
    ax.scatter(
        measured, predicted, s=12, alpha=0.7, label=label, **points_style({"color": BLACK, "marker": "s"}, hollow=True)
    )
    everything = [*measured, *predicted]
    for hold_out, style in zip(holdouts, itertools.cycle(RUN_STYLES)):
        label = f"held out, {hold_out.axis} > {hold_out.cut:.2g}: {100 * hold_out.error:.2g}%"
        ax.scatter(
            hold_out.measured, hold_out.predicted, s=16, label=label, **points_style(style, hollow=True), zorder=3
        )
        everything += [*hold_out.measured, *hold_out.predicted]
    margin = 0.06 * (max(everything) - min(everything) or 1.0)
    ends = (min(everything) - margin, max(everything) + margin)
    ax.plot(ends, ends, color="#707070", linewidth=0.8, zorder=1)
    ax.set_xlim(ends)
    ax.set_ylim(ends)
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    return finish(ax, "measured loss (nats/token)", "predicted loss (nats/token)", legend="upper left")


def plot_residuals(ax: Axes, data: ResultsData, fit: FitResult, *, by: str = "C") -> Axes:
    """What the law leaves of each run, log(measured / predicted), against an input: a pattern means that the law does not hold.

    Behind the runs are the band of two root mean squares and, from six runs up, the mean of each sixth of them with its 95%
    interval (of each level, where there are no more than six).

    Args:
        ax: where to draw.
        data: the runs of the fit, under its convention.
        fit: whose residuals.
        by: symbol or column on the axis; N where C is not known.

    Raises:
        UserError: the data are under another convention, hold no run of the family, or lack the column.
    """
    fit.convention.require_same(data.convention, "residuals")
    rows = data.of_family(fit.law.family)
    x = rows.values(by)
    if not np.isfinite(x).all():
        by, x = "N", rows.N
    left = 100 * np.log(rows.values(fit.law.target) / _predict(fit, rows))
    spread = 100 * fit.rms
    ax.axhspan(-2 * spread, 2 * spread, color="#EFEFEF", zorder=0, label=f"2 x {spread:.2g}% rms")
    ax.axhline(0, color="#707070", linewidth=0.8, zorder=1)
    ax.scatter(x, left, s=11, alpha=0.8, **points_style(RUN_STYLES[0], hollow=True), zorder=2)
    middles, means, errors = _binned_means(x, left)
    if len(middles) > 1:
        style = {"color": VERMILION, "fmt": "D", "markersize": 3, "linewidth": 1.0}
        ax.errorbar(middles, means, yerr=1.96 * errors, label="means, 95%", **style, zorder=3)
    if by != "P" and (x > 0).all():
        log_axis(ax, "x", x)
    ax.margins(y=0.12)
    return finish(ax, _AXES.get(by, by), "measured over predicted (%)", legend="top", title=fit.law.name)


def plot_fit(ax: Axes, data: ResultsData, fit: FitResult) -> Axes:
    """Loss against N, one series a level of D: runs as points, the law as lines, and its floor where it is identified.

    D is cut into at most five levels, each drawn at the geometric mean of its runs; R and P are at the medians of the runs.
    Points are moved to these along the law, by the ratio of its two predictions: each keeps its relative distance from the line.
    """
    fit.convention.require_same(data.convention, "a fit and its data")
    rows = data.of_family(fit.law.family)
    group, centres = _slices(rows.D)
    sizes = np.geomspace(rows.N.min() / 1.15, rows.N.max() * 1.15, 80)
    middle = {name: float(np.median(rows.values(name))) for name in dict.fromkeys(("R", "P", *fit.law.inputs))}
    apart = rows.values(fit.law.target) / _predict(fit, rows)
    for i, (style, centre) in enumerate(zip(RUN_STYLES, centres)):
        own = group == i
        moved = apart[own] * fit.predict(**{**middle, "N": rows.N[own], "D": centre})
        ax.scatter(rows.N[own], moved, s=12, **points_style(style, hollow=True), zorder=3)
        line = fit.predict(**{**middle, "N": sizes, "D": centre})
        drawn = {"color": style["color"], "linestyle": style["linestyle"], "label": f"D = {centre:.2g}"}
        ax.plot(sizes, line, linewidth=1.1, **drawn, zorder=2)
    floor = getattr(fit.law, "floor", None)
    if floor and fit[floor].identified:
        ax.axhline(
            fit.values[floor], color="#707070", linewidth=0.8, linestyle=":", label=f"{floor} = {fit.values[floor]:.3g}"
        )
    log_axis(ax, "x", rows.N)
    return finish(
        ax,
        "parameters N",
        _LABELS.get(fit.law.target, fit.law.target),
        legend="top",
        title=f"{fit.law.name}: {fit.status.replace('_', ' ')}; points moved along it",
    )


def _slices(D: Array) -> tuple[Array, list[float]]:
    group, found = find_levels(D)
    if len(found) > _MOST_SLICES:
        edges = np.quantile(np.log(D), np.linspace(0, 1, _MOST_SLICES + 1)[1:-1])
        group = np.searchsorted(edges, np.log(D))
    return group, [float(np.exp(np.log(D[group == i]).mean())) for i in range(group.max() + 1)]


def plot_profile(ax: Axes, result: FitResult, curve: ProfileCurve) -> Axes:
    """The rise of the objective over one constant, the others refitted: the 95% interval ends where it is 1.

    The bar below is the bootstrap's interval, where there is one. A profile that stays low means that the runs do not give the
    constant; one with a second valley, that another fit is about as good.

    Args:
        ax: where to draw.
        result: the fit.
        curve: of one of its constants.
    """
    estimate = result[curve.name]
    shown = curve.rises <= _HIGHEST
    ax.plot(curve.values[shown], curve.rises[shown], color=BLUE, linewidth=1.2, marker=".", markersize=3)
    ax.axhline(1.0, color="#707070", linewidth=0.8, linestyle="--")
    ax.axvline(estimate.working_value, color=BLACK, linewidth=0.8, linestyle=":")
    for end in estimate.profile or ():
        if np.isfinite(end):
            ax.plot([end, end], [0, 1], color=BLUE, linewidth=0.8, alpha=0.6)
    if estimate.low is not None and estimate.high is not None:
        ax.plot([estimate.low, estimate.high], [-0.18, -0.18], color=VERMILION, linewidth=2.0, solid_capstyle="butt")
    ax.set_ylim(-0.35, min(_HIGHEST, max(1.3, float(curve.rises.max()))) + 0.1)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ends = [] if estimate.profile is None else ["profile {:.3g} to {:.3g}".format(*estimate.profile)]
    ends += [] if estimate.low is None else [f"bootstrap {estimate.low:.3g} to {estimate.high:.3g}"]
    title = f"95%: {', '.join(ends)}" if estimate.identified else f"{estimate.status.replace('_', ' ')}"
    return finish(ax, curve.name, "rise over the 95% limit", legend="", title=title)


def plot_correlations(ax: Axes, names: Sequence[str], matrix: Array) -> Axes:
    """Correlations of the estimates, on centred and scaled constants; white is none.

    Args:
        ax: where to draw.
        names: of the constants, p.
        matrix: (p, p).
    """
    ax.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, aspect="equal")
    for (i, j), value in np.ndenumerate(matrix):
        if i != j:
            ink = "white" if abs(value) > 0.6 else BLACK
            text = f"{value:+.2f}".replace("0.", ".") if abs(value) < 0.995 else f"{value:+.0f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=min(6.0, 40 / len(names)), color=ink)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    finish(ax, "", "", legend="", title="correlations of estimates")
    ax.grid(visible=False)
    return ax


def draw_fit(data: ResultsData, result: FitResult) -> Figure:
    """What to look at before a fit is believed: law and runs, predicted against measured, residuals, correlations, profiles.

    Args:
        data: the runs of the fit.
        result: the fit.

    Raises:
        UserError: the data are not those of the fit.
    """
    rows = prepare(result.law, data.of_family(result.law.family))
    if rows.hash != result.data_hash:
        raise UserError(f"{data.source} (hash {rows.hash}) are not the runs of the fit (hash {result.data_hash})")
    problem = Problem.build(result.law, rows, result.loss, result.delta)
    theta = problem.theta(result.values)
    panels: list[Callable[[Axes], Axes]] = [
        lambda ax: plot_predicted_vs_measured(ax, rows, [result]),
        lambda ax: plot_residuals(ax, rows, result),
    ]
    if {"N", "D"} <= set(result.law.inputs):
        panels.insert(0, lambda ax: plot_fit(ax, rows, result))
    names = [p.name for p in result.law.free]
    if len(names) > 1:
        matrix = correlation_matrix(problem.residuals_and_jacobian(theta)[1])
        panels.append(lambda ax: plot_correlations(ax, names, matrix))
    for p in result.law.free:
        if p.kind in ("exponent", "other") and result[p.name].profile is not None:
            curve = profile_curve(problem, theta, p.name)
            panels.append(lambda ax, curve=curve: plot_profile(ax, result, curve))
    n_columns = min(3, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(3.2 * n_columns, 2.6 * n_rows), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for ax, draw in zip(axes, panels):
        draw(ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    return figure


def _binned_means(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Middle, mean and standard error of y over each level of x, or over each sixth of the runs where the levels are more."""
    found = levels(x) if (x > 0).all() else sorted(set(x.tolist()))
    if len(found) > _BINS:
        edges = np.quantile(x, np.linspace(0, 1, _BINS + 1)[1:-1])
        group = np.searchsorted(edges, x)
    else:
        group = np.argmin(np.abs(x[:, None] - np.array(found)), axis=1)
    kept = [g for g in range(_BINS) if np.sum(group == g) > 2]
    parts = [group == g for g in kept]
    middles = np.array([np.median(x[own]) for own in parts])
    errors = np.array([y[own].std(ddof=1) / np.sqrt(own.sum()) for own in parts])
    return middles, np.array([y[own].mean() for own in parts]), errors


def _predict(fit: FitResult, rows: ResultsData) -> Array:
    if not len(rows):
        raise UserError(f"{rows.source}: no {fit.law.family} run to draw")
    return fit.predict(**{name: rows.values(name) for name in dict.fromkeys(("N", "D", "R", "P", *fit.law.inputs))})
