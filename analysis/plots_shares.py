"""Figures over the share P and the ratio R: loss at a budget, at equal tokens, at equal FLOPs, and lines of equal loss."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FixedLocator, NullLocator

from analysis.allocation import allocate
from analysis.data import ResultsData
from analysis.design import count_runs, largest_level, levels
from analysis.optimum import Optimum
from analysis.plots import (
    BLACK,
    RUN_STYLES,
    SHARES_APART,
    VERMILION,
    finish,
    format_power,
    least_in_groups,
    points_style,
    ratio_levels,
    ratio_ticks,
)
from analysis.result import FitResult
from analysis.search import Cost, Search, tokens_for_budget
from dlcm.errors import UserError

Array = np.ndarray

_SAME_SIZE = 1.3
_SAME_TOKENS = 2.0
"""Runs of one size whose tokens differ by less are brought to one number of tokens along the law."""
_SAME_BUDGET = 1.15
_ROOM = 1.0
"""Loss that is shown above the best runs of each share, in spans of these."""
_LINES = 80
_RISES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Nats above the least at which lines of equal loss may be drawn."""
_MOST_LINES = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """Runs of one size on nearly equally many tokens, over P and R.

    Attributes:
        N: parameters. D: training tokens: geometric mean of the runs.
        rows: the runs.
        ratio: target or level of R of each run.
    """

    N: float
    D: float
    rows: ResultsData
    ratio: Array


def find_slice(data: ResultsData) -> Slice:
    """The size and number of tokens at which most pairs of R and P were run; the largest where several have as many.

    Raises:
        UserError: no size was run at two shares P.
    """
    rows = data.dlcm
    if not len(rows):
        raise UserError(f"{data.source}: no finished DLCM run")
    ratio = ratio_levels(rows)
    best, found = (-1, 0.0), None
    for size in levels(rows.N, _SAME_SIZE):
        near = np.abs(np.log(rows.N / size)) < np.log(_SAME_SIZE)
        for tokens in levels(rows.D[near]):
            own = near & (np.abs(np.log(rows.D / tokens)) <= np.log(_SAME_TOKENS) / 2)
            cells = len({(r, round(p / SHARES_APART)) for r, p in zip(ratio[own], rows.P[own])})
            if (cells, size * tokens) > best and np.ptp(rows.P[own]) > SHARES_APART:
                best, found = (cells, size * tokens), own
    if found is None:
        raise UserError(f"{data.source}: no model size was run at two shares P on nearly equally many tokens")
    kept = rows.take(found)
    N, D = (float(np.exp(np.mean(np.log(v)))) for v in (kept.N, kept.D))
    return Slice(N, D, kept, ratio[found])


def plot_share_at_size(ax: Axes, part: Slice, fit: FitResult, *, cost: Cost | None = None) -> Axes:
    """Loss against the share P at one size, one series a ratio R: on equally many tokens, or per FLOP.

    A ratio of loss to FLOPs would say nothing: half the FLOPs always look better than a hundredth less loss. Per FLOP means here
    that all models spend the same training FLOPs, where those that are cheaper a token are trained on more tokens. The
    FLOPs are the geometric mean of what the models of the slice cost on its number of tokens.

    Points are the runs, moved to exactly these tokens or FLOPs by the ratio of two predictions of the law; lines are the law.

    Args:
        ax: where to draw.
        part: runs of one size, as `find_slice` returns them.
        fit: law of the DLCM.
        cost: training FLOPs, `cost(N, D, R, P)`, for the loss per FLOP; on equally many tokens without.
    """
    rows, shares = part.rows, np.linspace(part.rows.P.min(), part.rows.P.max(), _LINES)
    budget = np.nan
    if cost is not None:
        budget = float(np.exp(np.mean(np.log(np.asarray(cost(part.N, part.D, rows.R, rows.P), dtype=float)))))

    def tokens(R: Array, P: Array) -> Array:
        N = np.full(P.shape, part.N)
        return np.full(P.shape, part.D) if cost is None else tokens_for_budget(cost, budget, N, R, P)

    moved = rows.loss * fit.predict(N=part.N, D=tokens(rows.R, rows.P), R=rows.R, P=rows.P)
    moved = moved / fit.predict(N=rows.N, D=rows.D, R=rows.R, P=rows.P)
    for ratio, style in zip(np.unique(part.ratio), itertools.cycle(RUN_STYLES)):
        own = part.ratio == ratio
        ax.scatter(rows.P[own], moved[own], s=16, **points_style(style, hollow=True), label=f"R = {ratio:g}", zorder=3)
        R = np.full(shares.shape, np.median(rows.R[own]))
        line = fit.predict(N=part.N, D=tokens(R, shares), R=R, P=shares)
        ax.plot(shares, line, color=style["color"], linestyle=style["linestyle"], linewidth=1.1, zorder=2)
    ax.margins(x=0.08, y=0.12)
    at = f"D = {format_power(part.D)} tokens" if cost is None else f"C = {format_power(budget)} FLOPs"
    label = "loss at equal D (nats/token)" if cost is None else "loss at equal FLOPs (nats/token)"
    title = f"N = {format_power(part.N)}, {at}; lines: fitted law"
    return finish(ax, "backbone share P of the parameters", label, legend="top", title=title)


@dataclasses.dataclass(frozen=True, eq=False)
class Surface:
    """Least predicted loss over N and D at one budget, for each R and P.

    Attributes:
        ratios: R, (r,). shares: P, (p,).
        loss: nats per token, (p, r); infinite where the budget pays for no model.
    """

    budget: float
    ratios: Array
    shares: Array
    loss: Array


def loss_surface(fit: FitResult, cost: Cost, budget: float, *, n: int = 33) -> Surface:
    """Least predicted loss at a budget over R and P, with the best N and D for each.

    Args:
        fit: law of the DLCM.
        cost: training FLOPs, `cost(N, D, R, P)`.
        budget: training FLOPs.
        n: values of R and of P, over what the data have.

    Raises:
        UserError: the data hold one R or one P, or what `optimum` raises.
    """
    problem = allocate(fit, cost, budget)
    for name, words in (("R", "tokens per concept R"), ("P", "backbone shares P")):
        if not problem.is_open(name):
            raise UserError(f"{fit.source}: needs runs at two or more {words}; the data hold one")
    ratios, shares = np.geomspace(*problem.box["R"], n), np.linspace(*problem.box["P"], n)
    P, R = (v.ravel() for v in np.meshgrid(shares, ratios, indexing="ij"))
    search = Search(problem.law, cost, budget, {"N": problem.box["N"], "R": (R, R), "P": (P, P)})
    found = search.minimise_many({name: np.array([v]) for name, v in fit.values.items()}, allow_none=True)
    return Surface(budget, ratios, shares, found[:, 4].reshape(n, n))


def plot_iso_loss(ax: Axes, surface: Surface, best: Optimum, data: ResultsData | None = None) -> Axes:
    """Lines of equal loss over R and P at one budget, with the optimum and its 95% intervals, and where runs are.

    Args:
        ax: where to draw.
        surface: as `loss_surface` returns it.
        best: optimum of the same budget.
        data: draws its DLCM runs, those of the budget filled.
    """
    rise = surface.loss - best.loss
    most = float(np.max(rise[np.isfinite(rise)]))
    heights = [h for h in _RISES if h < most]
    heights = heights[-_MOST_LINES:] or [most / 2]
    shades = ListedColormap(mpl.colormaps["Blues"](np.linspace(0.03, 0.62, 256)))
    masked = np.ma.masked_invalid(rise)
    ax.contourf(
        surface.ratios, surface.shares, masked, levels=[min(0.0, float(masked.min())), *heights, most * 1.001],
        cmap=shades, zorder=0,
    )  # fmt: skip
    lines = ax.contour(surface.ratios, surface.shares, masked, levels=heights, colors=BLACK, linewidths=0.6, zorder=1)
    for text in ax.clabel(lines, fontsize=6.0, fmt=lambda v: f"+{v:g}", inline=True):
        text.set_path_effects([patheffects.withStroke(linewidth=1.6, foreground="white")])
        text.set_zorder(5)
    if data is not None:
        rows = data.dlcm
        at = np.abs(np.log(rows.C / surface.budget)) < np.log(_SAME_BUDGET)
        for own, fill, label in ((~at, "white", "other runs"), (at, BLACK, "runs at budget")):
            if own.any():
                style: dict[str, Any] = {"facecolors": fill, "edgecolors": BLACK, "linewidths": 0.6, "zorder": 3}
                ax.scatter(rows.R[own], rows.P[own], s=9, label=label, **style)
    unknown = _draw_optimum(ax, best)
    ax.set_xscale("log")
    pad = (surface.ratios[-1] / surface.ratios[0]) ** 0.03
    ax.set_xlim(surface.ratios[0] / pad, surface.ratios[-1] * pad)
    pad = 0.03 * (surface.shares[-1] - surface.shares[0])
    ax.set_ylim(surface.shares[0] - pad, surface.shares[-1] + pad)
    ax.xaxis.set_major_locator(FixedLocator(ratio_ticks(surface.ratios[0], surface.ratios[-1])))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    title = f"nats/token above the least at {format_power(surface.budget)} training FLOPs"
    title += f"\nhollow star: {' and '.join(unknown)} not identified" if unknown else ""
    finish(ax, "tokens per concept R", "backbone share P of the parameters", legend="top", title=title)
    ax.grid(visible=False)
    return ax


def _draw_optimum(ax: Axes, best: Optimum) -> list[str]:
    """A star, filled where R and P are both identified, with bars; returns which of them are not."""
    R, P = best["R"], best["P"]
    unknown = [c.name for c in (R, P) if c.status == "not identified"]
    label = "optimum, 95%" if best["R"].low is not None else "optimum"
    bars: dict[str, Any] = {
        f"{axis}err": [[max(c.value - c.low, 0.0)], [max(c.high - c.value, 0.0)]]
        for axis, c in (("x", R), ("y", P))
        if c.low is not None and c.high is not None
    }
    face = "white" if unknown else VERMILION
    style: dict[str, Any] = {"markersize": 9, "markerfacecolor": face, "markeredgecolor": BLACK, "markeredgewidth": 0.6}
    line: dict[str, Any] = {"color": VERMILION, "elinewidth": 1.4, "capsize": 2.0, "linestyle": "none", "zorder": 4}
    drawn = ax.errorbar(R.value, P.value, marker="*", label=label, clip_on=False, **bars, **style, **line)
    for bar in drawn[2]:
        bar.set_path_effects([patheffects.withStroke(linewidth=2.6, foreground="white")])
    return unknown


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
    budget = budget or (largest_level(rows.C) if len(rows) else float("nan"))
    rows = rows.take(np.abs(np.log(rows.C / budget)) < np.log(1.15))
    if not len(rows):
        raise UserError(f"{data.source}: no DLCM run within 15% of {budget:.3g} training FLOPs")
    target = ratio_levels(rows)
    sizes = np.geomspace(rows.N.min(), rows.N.max(), 41 if len(levels(rows.N)) > 1 else 1)
    best_losses = []
    for ratio, style in zip(np.unique(target), itertools.cycle(RUN_STYLES)):
        at = rows.take(target == ratio)
        best = best_of_each_share(at)
        best_losses += at.loss[best].tolist()
        ax.scatter(at.P[~best], at.loss[~best], s=11, alpha=0.6, **points_style(style, hollow=True), zorder=2)
        ax.scatter(at.P[best], at.loss[best], s=20, **points_style(style), label=f"R = {ratio:g}", zorder=3)
        if fit is not None and cost is not None:
            shares, N = np.meshgrid(np.linspace(rows.P.min(), rows.P.max(), 60), sizes)
            R = np.full_like(shares, np.median(at.R))
            D = tokens_for_budget(cost, budget, N, R, shares)
            line: dict[str, Any] = {"color": style["color"], "linestyle": style["linestyle"]}
            ax.plot(shares[0], fit.predict(N=N, D=D, R=R, P=shares).min(axis=0), linewidth=1.1, **line)
    ax.margins(x=0.08, y=0.12)
    title = f"at {format_power(budget)} training FLOPs" + (
        ", lines: fitted law" if fit is not None and cost is not None else ""
    )
    title += ", best size" if len(sizes) > 1 else ""
    frame = share_frame(best_losses, rows.loss)
    if frame is not None:
        ax.set_ylim(*frame)
        title += f"\n{count_runs(int(np.sum(rows.loss > frame[1])))} of other sizes lie above the frame"
    return finish(ax, "backbone share P of the parameters", "validation loss (nats/token)", legend="top", title=title)


def share_frame(best: Sequence[float], losses: Array) -> list[float] | None:
    """Ends of the loss axis that show the best runs of each share; None where all runs lie close enough to them.

    Wrong sizes can be far worse than any choice of P: beside them, what the figure is for would be a line.
    """
    least, most = min(best), max(best)
    edge = most + _ROOM * (most - least)
    if most == least or not np.any(losses > edge):
        return None
    return [least - 0.15 * (edge - least), edge]


def best_of_each_share(rows: ResultsData, width: float = SHARES_APART) -> Array:
    """Mask of the runs with the least loss among those of nearly the same share P."""
    order = np.argsort(rows.P)
    group = np.empty(len(rows), dtype=int)
    group[order] = np.cumsum(np.diff(rows.P[order], prepend=rows.P[order][:1]) > width)
    return least_in_groups(rows.loss, group)
