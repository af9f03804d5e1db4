"""Figures of the profile route: isoFLOP curves with their vertices, and the vertices over budgets beside a fitted law."""

import itertools
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.budget_groups import place_of, value_at
from analysis.isoflop_result import Growth, IsoFlop, Profile
from analysis.isoflop_text import describe_held
from analysis.plots import BLACK, COLUMN_WIDTH, RUN_STYLES, SMALL, VERMILION, finish, log_axis, points_style
from analysis.vertex import REACH
from dlcm.errors import UserError

Array = np.ndarray
_GREY = "#A8A8A8"
_AXIS = {"N": "parameters N", "R": "tokens per concept R", "P": "backbone share P"}
_MARKERS = "oD^vsPXhp*"


def plot_isoflop(ax: Axes, found: IsoFlop, *, held: Mapping[str, float | str] | None = None) -> Axes:
    """Loss against N (or R, P), one curve a budget: runs, the parabola around each vertex, and the vertex with its interval.

    Grey runs are of profiles that were refused. Losses are brought to the budget.

    Args:
        ax: where to draw.
        found: profiles.
        held: the set of held values that is drawn; by default the one with most vertices.

    Raises:
        UserError: no profile holds these values.
    """
    held = _fullest(found) if held is None else held
    own = [p for p in found.profiles if dict(p.held) == dict(held)]
    if not own:
        raise UserError(f"no isoFLOP profile at {describe_held(held)}; there is nothing to draw")
    colours = mpl.colormaps["cividis"](np.linspace(0.0, 0.85, max(sum(p.is_ok for p in own), 1)))
    shades = iter(zip(colours, itertools.cycle(_MARKERS)))
    for profile in own:
        places = value_at(found.over, profile.curve.x)
        if not profile.is_ok:
            ax.scatter(places, profile.losses, s=7, marker="x", color=_GREY, linewidths=0.7, zorder=1)
            continue
        colour, marker = next(shades)
        style = points_style({"color": colour, "marker": marker}, hollow=True)
        ax.scatter(places, profile.losses, s=10, **style, zorder=2)
        _draw_vertex(ax, found.over, profile, colour)
    best = [p for p in own if p.is_ok]
    path = np.array([(p.value, p.loss) for p in best], dtype=float).reshape(-1, 2)
    ax.plot(*path.T, color=VERMILION, linewidth=0.8, linestyle=":", zorder=3)
    if found.over != "P":
        log_axis(ax, "x", np.concatenate([value_at(found.over, p.curve.x) for p in own]))
        ax.set_xlim(ax.get_xlim()[0], ax.get_xlim()[1] * 1.25)  # room for the budgets
    if found.over == "R":
        ax.xaxis.set_major_formatter("{x:.3g}")
    losses = np.concatenate([p.losses for p in own])
    margin = 0.06 * float(np.ptp(losses))
    ax.set_ylim(losses.min() - margin, losses.max() + margin)
    refused = len(own) - len(best)
    title = describe_held(held) + (f"{'; ' if held else ''}grey: {refused} refused" if refused else "")
    return finish(ax, _AXIS[found.over], "validation loss (nats/token)", legend="", title=title)


def plot_vertices(ax: Axes, found: IsoFlop) -> Axes:
    """Vertices against the budget with their 95% intervals, the line through them, and the optimum of the law beside them.

    Raises:
        UserError: no profile has a vertex.
    """
    best = [p for p in found.profiles if p.is_ok]
    if not best:
        raise UserError("no isoFLOP profile has a vertex; there is nothing to draw over budgets")
    sets = list(dict.fromkeys(tuple(p.held.items()) for p in best))
    seen: list[float] = []
    for key, style in zip(sets, itertools.cycle(RUN_STYLES)):
        own = [p for p in best if tuple(p.held.items()) == key]
        budgets, values = np.array([p.budget for p in own]), np.array([p.value for p in own], dtype=float)
        seen += values.tolist()
        if own[0].low is not None:
            ends = np.array([(p.low, p.high) for p in own], dtype=float).T
            ax.vlines(budgets, *ends, color=style["color"], linewidth=0.9, zorder=2)
            seen += ends.ravel().tolist()
        label = describe_held(dict(key)) or "vertices"
        ax.scatter(budgets, values, s=14, label=label, **points_style(style, hollow=True), zorder=4)
        growth = next((g for g in found.growth if g.name == found.over and tuple(g.held.items()) == key), None)
        if growth is not None and growth.value is not None and growth.coefficient is not None:
            line = growth.coefficient * budgets**growth.value
            ax.plot(budgets, line, color=style["color"], linewidth=1.0, label=_label(growth), zorder=3)
    if found.check is not None:
        _draw_surface(ax, found, seen)
    log_axis(ax, "x", np.array([p.budget for p in best]))
    if found.over != "P":
        log_axis(ax, "y", np.array(seen))
    if found.over == "R":
        ax.yaxis.set_major_formatter("{x:.3g}")
    return finish(ax, "training compute (FLOPs)", f"{_AXIS[found.over]}*", legend="top")


def draw_isoflop(found: IsoFlop) -> Figure:
    """Both figures beside each other."""
    figure = Figure(figsize=(2 * COLUMN_WIDTH, 2.9), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plot_isoflop(left, found)
    if any(p.is_ok for p in found.profiles):
        plot_vertices(right, found)
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no profile has a vertex", ha="center", fontsize=SMALL, transform=right.transAxes)
    return figure


def _draw_vertex(ax: Axes, over: str, profile: Profile, colour: Any) -> None:
    """The parabola in its window, the vertex, its interval, and the budget beside the curve."""
    place = float(place_of(over, profile.value))
    x, loss = profile.curve.x, float(profile.loss or np.nan)
    reach = np.linspace(max(x.min(), place - REACH), min(x.max(), place + REACH), 60)
    height = loss * np.exp(0.5 * profile.curvature * ((reach - place) ** 2 + profile.skew * (reach - place) ** 3 / 3))
    ax.plot(value_at(over, reach), height, color=colour, linewidth=1.0, zorder=2)
    if profile.low is not None and profile.high is not None:
        ax.plot([profile.low, profile.high], [loss, loss], color=VERMILION, linewidth=1.2, zorder=4)
    ax.scatter(value_at(over, place), loss, s=18, marker="*", color=VERMILION, zorder=5)
    ax.annotate(
        f"{profile.budget:.1e}".replace("e+", "e"),
        (value_at(over, reach[-1]), height[-1]),
        xytext=(2, 0),
        textcoords="offset points",
        fontsize=5.5,
        color=BLACK,
        va="center",
    )


def _draw_surface(ax: Axes, found: IsoFlop, seen: list[float]) -> None:
    check = found.check
    assert check is not None
    label = f"{check.law}, 95%"
    for key in dict.fromkeys(tuple(b.held.items()) for b in check.budgets):
        own = [b for b in check.budgets if tuple(b.held.items()) == key]
        budgets = [b.budget for b in own]
        ax.fill_between(budgets, [b.low for b in own], [b.high for b in own], color=BLACK, alpha=0.13, linewidth=0)
        ax.plot(budgets, [b.surface for b in own], color=BLACK, linestyle="--", linewidth=1.0, label=label, zorder=3)
        seen += [end for b in own for end in (b.low, b.high)]
        label = None


def _label(growth: Growth) -> str:
    return f"{growth.name}* ~ C^{growth.value:.3f}"


def _fullest(found: IsoFlop) -> Mapping[str, float | str]:
    counts: dict[tuple, int] = {}
    for p in found.profiles:
        counts[tuple(p.held.items())] = counts.get(tuple(p.held.items()), 0) + p.is_ok
    return dict(max(counts, key=lambda key: counts[key]))
