"""The figures of the report as plotly figures: hover names the run, a click opens its config. plotly draws, nothing here does."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis.data import ResultsData
from analysis.design import SAME_BUDGET, find_levels, levels
from analysis.frontier import Frontier
from analysis.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION
from analysis.plots_shares import best_of_each_share, share_frame
from analysis.result import FitResult

Array = np.ndarray

_FAMILIES = {"dense": ("dense", VERMILION, "square"), "dlcm": ("DLCM", BLUE, "circle")}
# Okabe and Ito's colours but for black, which a dark page would swallow; markers keep series apart in greyscale.
_SERIES = ((BLUE, "circle"), (VERMILION, "triangle-up"), (GREEN, "diamond"), (PURPLE, "cross"), (ORANGE, "star"))
_AXES = {
    "C": "training compute (FLOPs)",
    "loss": "validation loss (nats/token)",
    "P": "backbone share P of the parameters",
    "N": "parameters N",
    "D": "training tokens D",
    "R": "tokens per concept R",
}


def hover(data: ResultsData) -> list[str]:
    """What a run says of itself, one text a row."""
    rows = zip(data.run_ids, data.N, data.D, data.R, data.P, data.C, data.loss)
    return [
        f"<b>{_escape(run)}</b><br>loss {loss:.4f} nats/token<br>N {N:.3g}, D {D:.3g} tokens<br>R {R:.3g}, P {P:.3g}"
        + (f"<br>C {C:.3g} FLOPs" if np.isfinite(C) else "")
        for run, N, D, R, P, C, loss in rows
    ]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def loss_vs_compute(data: ResultsData, frontiers: Mapping[str, Frontier]) -> go.Figure:
    """Loss of each run against its training FLOPs, with the fitted frontiers and their bands."""
    figure = go.Figure()
    for family, (label, color, marker) in _FAMILIES.items():
        rows = data.of_family(family)
        if len(rows):
            figure.add_trace(_runs(rows, rows.C, rows.loss, label, color, marker))
        if family in frontiers:
            _band(figure, frontiers[family], 4, f"{label}, fitted frontier", color)
    return _layout(figure, _AXES["C"], _AXES["loss"], x_log=True)


def loss_vs_share(data: ResultsData) -> go.Figure | None:
    """Loss against P, one series a target R, the best size at each share bold; a menu chooses the compute budget."""
    rows = data.dlcm
    budgets = levels(rows.C[rows.C > 0].tolist(), SAME_BUDGET) if len(rows) else []
    if not budgets or len(levels(rows.P)) < 2:
        return None
    figure, owners = go.Figure(), []
    target = np.asarray(rows.frame.get("compression_target", rows.R), dtype=float)
    at_level, nominal = find_levels(target)
    shown = budgets[-12:]
    of_budget = [np.abs(np.log(rows.C / budget)) < np.log(SAME_BUDGET) / 2 for budget in shown]
    first = max(range(len(shown)), key=lambda i: (of_budget[i].sum(), i))
    best_losses: list[list[float]] = [[] for _ in shown]
    for i, near in enumerate(of_budget):
        for k, ratio in enumerate(nominal):
            at = rows.take(near & (at_level == k))
            if len(at):
                best = best_of_each_share(at)
                at = at.take(np.argsort(~best, kind="stable"))  # the legend shows the first point of a series
                color, marker = _SERIES[k % len(_SERIES)]
                colors = np.where(np.sort(~best), _faint(color), color).tolist()
                trace = _runs(at, at.P, at.loss, f"R = {ratio:g}", colors, marker)
                best_losses[i] += at.loss[: best.sum()].tolist()
                trace.visible = i == first
                figure.add_trace(trace)
                owners.append(i)
    ranges = [share_frame(best, rows.loss[near]) for best, near in zip(best_losses, of_budget)]
    frames = [{"yaxis.range": ends, "yaxis.autorange": ends is None} for ends in ranges]
    buttons = [
        {"label": f"{budget:.2g} FLOPs", "method": "update", "args": [{"visible": [o == i for o in owners]}, frames[i]]}
        for i, budget in enumerate(shown)
    ]
    menu = {"buttons": buttons, "active": first, "x": 1, "xanchor": "right", "y": 1.13, "yanchor": "bottom"}
    _layout(figure, _AXES["P"], _AXES["loss"])
    figure.update_layout(yaxis_range=ranges[first])
    if len(shown) > 1:
        figure.update_layout(updatemenus=[menu], margin={"t": 84}, height=424)
    return figure


def _faint(color: str) -> str:
    """`#RRGGBB` as the same colour, mostly transparent."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.45)"


def allocation(frontiers: Mapping[str, Frontier], name: str) -> go.Figure | None:
    """One coordinate of the best allocation against the budget, with its 95% band."""
    figure, drawn = go.Figure(), False
    for family, frontier in frontiers.items():
        if name in frontier.moving:
            label, color, _ = _FAMILIES[family]
            _band(figure, frontier, "NDRP".index(name), label, color)
            drawn = True
    if not drawn:
        return None
    return _layout(figure, _AXES["C"], f"best {_AXES[name]}", x_log=True, y_log=name != "P")


def predicted_vs_measured(data: ResultsData, fits: Mapping[str, FitResult]) -> go.Figure:
    """Predicted against measured loss of each run; the line is where they are equal."""
    figure = go.Figure()
    ends = [float(data.loss.min()), float(data.loss.max())]
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", name="equal", line={"color": "#888", "dash": "dot"}))
    for family, fit in fits.items():
        rows, predicted = _predicted(data, family, fit)
        label, color, marker = _FAMILIES[family]
        figure.add_trace(_runs(rows, rows.loss, predicted, label, color, marker))
    return _layout(figure, f"measured {_AXES['loss']}", f"predicted {_AXES['loss']}")


def residuals(data: ResultsData, fits: Mapping[str, FitResult]) -> go.Figure:
    """Measured over predicted loss less one, against the training FLOPs."""
    figure = go.Figure()
    for family, fit in fits.items():
        rows, predicted = _predicted(data, family, fit)
        label, color, marker = _FAMILIES[family]
        figure.add_trace(_runs(rows, rows.C, 100 * (rows.loss / predicted - 1), label, color, marker))
    figure.add_hline(y=0, line={"color": "#888", "dash": "dot"})
    return _layout(figure, _AXES["C"], "measured over predicted loss (% above)", x_log=True)


def realised_ratio(data: ResultsData) -> go.Figure | None:
    """Realised tokens per concept at evaluation over the target."""
    rows = data.dlcm
    if not len(rows) or "compression_target" not in rows.frame:
        return None
    target = np.asarray(rows.frame["compression_target"], dtype=float)
    figure = go.Figure(_runs(rows, target, 100 * (rows.R / target - 1), "DLCM", BLUE, "circle"))
    figure.add_hrect(y0=-5, y1=5, line_width=0, fillcolor="#888", opacity=0.15)
    return _layout(figure, "target tokens per concept", "realised over target (% above)", x_log=True)


def _predicted(data: ResultsData, family: str, fit: FitResult) -> tuple[ResultsData, Array]:
    rows = data.of_family(family)
    names = dict.fromkeys(("N", "D", "R", "P", *fit.law.inputs))  # a reduction may have lost all of its inputs
    return rows, np.asarray(fit.predict(**{name: rows.values(name) for name in names}), dtype=float)


def _runs(rows: ResultsData, x: Array, y: Array, label: str, color: str | list[str], marker: str) -> go.Scatter:
    return go.Scatter(
        x=np.asarray(x).tolist(),
        y=np.asarray(y).tolist(),
        mode="markers",
        name=label,
        text=hover(rows),
        customdata=rows.run_ids,
        hovertemplate="%{text}<extra></extra>",
        marker={"color": color, "symbol": marker, "size": 8, "line": {"width": 0.5, "color": BLACK}},
    )


def _band(figure: go.Figure, frontier: Frontier, column: int, label: str, color: str) -> None:
    """A line over the budgets and its band; faint where the optimum lies outside the data or is not identified."""
    x, y = frontier.budgets, frontier.points[:, column].copy()
    sure = frontier.inside.copy()
    if column < 4:
        sure &= np.array([status != "not identified" for status in frontier.statuses["NDRP"[column]]])
    if frontier.low is not None and frontier.high is not None and sure.any():
        ends = [np.where(sure, v[:, column], np.nan) for v in (frontier.low, frontier.high)]
        keep = np.isfinite(ends[0])
        figure.add_trace(
            go.Scatter(
                x=[*x[keep].tolist(), *x[keep][::-1].tolist()],
                y=[*ends[1][keep].tolist(), *ends[0][keep][::-1].tolist()],
                fill="toself",
                fillcolor=color,
                opacity=0.2,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                name=f"{label}, 95%",
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=x.tolist(), y=y.tolist(), mode="lines", line={"color": color, "dash": "dot", "width": 1}, showlegend=False,
            name=f"{label}, outside the data or not identified", hovertemplate="%{x:.3g}: %{y:.4g}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=x.tolist(), y=[v if s else None for v, s in zip(y.tolist(), sure)], mode="lines", name=label,
            line={"color": color, "width": 2}, hovertemplate="%{x:.3g}: %{y:.4g}<extra></extra>",
        )
    )  # fmt: skip


def _layout(figure: go.Figure, x: str, y: str, *, x_log: bool = False, y_log: bool = False) -> go.Figure:
    axis: dict[str, Any] = {"zeroline": False, "exponentformat": "power", "ticks": "outside"}
    figure.update_layout(
        xaxis=axis | {"title": {"text": x}, "type": "log" if x_log else "linear"},
        yaxis=axis | {"title": {"text": y}, "type": "log" if y_log else "linear"},
        template="none",
        margin={"l": 64, "r": 16, "t": 40, "b": 52},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "orientation": "v"},
        height=380,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure


def as_json(figures: Mapping[str, go.Figure | None]) -> dict[str, str]:
    """Figure name -> what plotly.js draws, those that the data have no runs for left out."""
    return {name: str(figure.to_json()) for name, figure in figures.items() if figure is not None}
