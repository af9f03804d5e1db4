"""How each figure by name is drawn from a `FigureContext`: one function a figure, all or an error of one line.

The `plot_*` functions that draw on an Axes are imported when their figure is asked for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.data import ResultsData
from analysis.design import SAME_BUDGET, levels
from analysis.families import NO_FLOPS
from analysis.figure_context import FigureContext
from analysis.law import FAMILIES
from analysis.plots import FONT, SHARES_APART, SMALL, new_figure, new_panels
from dlcm.errors import UserError


def _on_axis(plot: Callable[..., Any], *what: Any, **options: Any) -> Figure:
    figure, ax = new_figure()
    plot(ax, *what, **options)
    return figure


def _with_flops(data: ResultsData) -> ResultsData:
    if np.isnan(data.C).any():
        raise UserError(NO_FLOPS)
    return data


def draw_loss_vs_compute(context: FigureContext) -> Figure:
    """`loss_vs_compute`, see `analysis.figures`."""
    from analysis.plots import plot_loss_vs_compute

    data = _with_flops(context.data)
    frontiers = context.optional("loss_vs_compute: no fitted frontiers", lambda: context.frontiers)
    return _on_axis(plot_loss_vs_compute, data, frontiers=frontiers)


def draw_loss_vs_share(context: FigureContext) -> Figure:
    """`loss_vs_share`, see `analysis.figures`."""
    from analysis.plots_shares import plot_loss_vs_share

    rows = _with_flops(context.rows("dlcm"))
    if np.ptp(rows.P) < SHARES_APART:
        raise UserError(f"the DLCM runs hold one backbone share P, {np.median(rows.P):.2g}")
    budget = min(levels(rows.C, SAME_BUDGET), key=lambda c: abs(c / context.budget - 1))
    cost = context.optional("loss_vs_share: no fitted law", lambda: context.cost)
    return _on_axis(plot_loss_vs_share, rows, budget=budget, fit=context.fit("dlcm"), cost=cost)


def draw_loss_per_flop(context: FigureContext) -> Figure:
    """`loss_per_flop`, see `analysis.figures`."""
    from analysis.plots_shares import find_slice, plot_share_at_size

    part, fitted, cost = find_slice(context.rows("dlcm")), context.fit("dlcm"), context.cost
    figure, (above, below) = new_panels(2, share_x=True)
    plot_share_at_size(above, part, fitted)
    plot_share_at_size(below, part, fitted, cost=cost)
    above.set_xlabel("")
    return figure


def draw_iso_loss(context: FigureContext) -> Figure:
    """`iso_loss`, see `analysis.figures`."""
    from analysis.plots_shares import loss_surface, plot_iso_loss

    surface = loss_surface(context.fit("dlcm"), context.cost, context.budget)
    return _on_axis(plot_iso_loss, surface, context.optimum, context.rows("dlcm"))


def draw_allocation(context: FigureContext) -> Figure:
    """`allocation`, see `analysis.figures`."""
    from analysis.plots_optimum import draw_allocation

    return draw_allocation(context.frontiers)


def draw_savings(context: FigureContext) -> Figure:
    """`savings`, see `analysis.figures`."""
    from analysis.plots_savings import plot_savings, savings_by_size

    dlcm, dense, cost = context.fit("dlcm"), context.fit("dense"), context.cost
    budgets = _spanned(context, dlcm.ranges["C"])
    return _on_axis(plot_savings, savings_by_size(dlcm, dense, cost, budgets, tell=context.tell))


def _spanned(context: FigureContext, ends: tuple[float, float], n: int = 9) -> Any:
    """Budgets over those of the runs; the one of the context where they know of none."""
    low, high = ends if ends[0] > 0 else (context.budget, context.budget)
    return np.geomspace(low, high, n) if high > SAME_BUDGET * low else np.array([high])


def draw_isoflop(context: FigureContext) -> Figure:
    """`isoflop`, see `analysis.figures`."""
    from analysis.isoflop import isoflop
    from analysis.plots_isoflop import plot_isoflop

    found, reason = [], ""
    for family in FAMILIES:
        if not len(context.data.of_family(family)):
            continue
        context.tell(f"isoFLOP profiles of the {family} models")
        try:
            one = isoflop(context.data, family=family, seed=context.seed, n_bootstrap=context.n_bootstrap)
        except UserError as error:
            reason = str(error)
            continue
        if any(profile.is_ok for profile in one.profiles):
            found.append((family, one))
        else:
            reason = f"no isoFLOP profile of the {family} models has a vertex: {one.profiles[0].reason}"
    if not found:
        raise UserError(reason)
    figure, axes = new_panels(len(found), height=2.7)
    for ax, (family, one) in zip(axes, found):
        plot_isoflop(ax, one)
        parts = [_NAMES.get(family, family), ax.get_title(loc="left"), "numbers: FLOPs"]
        ax.set_title("; ".join(filter(None, parts)), fontsize=SMALL, loc="left")
    return figure


_NAMES = {"dlcm": "DLCM"}


def draw_predicted_vs_measured(context: FigureContext) -> Figure:
    """`predicted_vs_measured`, see `analysis.figures`."""
    from analysis.plots import plot_predicted_vs_measured

    return _on_axis(plot_predicted_vs_measured, context.data, list(context.fits.values()))


def draw_hold_outs(context: FigureContext) -> Figure:
    """`hold_outs`, see `analysis.figures`."""
    from analysis.holdout import hold_out
    from analysis.inputs import prepare
    from analysis.objective import Problem
    from analysis.plots_fit import plot_hold_outs

    found: list[tuple[str, ResultsData, Any]] = []
    reason = "the results hold no run of the families that were fitted"
    for family, fitted in context.fits.items():
        rows = context.data.of_family(family)
        if not len(rows):
            continue
        rows = prepare(fitted.law, rows)
        context.tell(f"holding out the largest budgets of the {family} runs")
        problem = Problem.build(fitted.law, rows, fitted.loss, fitted.delta)
        rng = np.random.default_rng(context.seed)
        holdouts, _ = hold_out(problem, problem.theta(fitted.values), rows, rng)
        if holdouts:
            found.append((family, rows, holdouts))
        else:
            reason = f"no cut of the budgets leaves enough of {len(rows)} {family} runs on both sides"
    if not found:
        raise UserError(reason)
    figure, axes = new_panels(len(found), height=3.0)
    for ax, (family, rows, holdouts) in zip(axes, found):
        plot_hold_outs(ax, rows, context.fits[family], holdouts)
        ax.set_title(_NAMES.get(family, family), fontsize=FONT, loc="left")
    return figure


def draw_residuals(context: FigureContext) -> Figure:
    """`residuals`, see `analysis.figures`."""
    from analysis.plots_fit import plot_residuals

    return _panels(context, plot_residuals)


def draw_loss_vs_size(context: FigureContext) -> Figure:
    """`loss_vs_size`, see `analysis.figures`."""
    from analysis.plots_fit import plot_fit

    return _panels(context, plot_fit, least_sizes=2)


def _panels(context: FigureContext, plot: Callable[..., Any], least_sizes: int = 1) -> Figure:
    """A panel for each family that has a fit, and runs of so many sizes."""
    sizes = {family: len(levels(context.data.of_family(family).N)) for family in context.fits}
    fits = {family: f for family, f in context.fits.items() if sizes[family] >= least_sizes}
    if not fits:
        one = "the runs of each family are of one size" if any(sizes.values()) else ""
        raise UserError(one or "the results hold no run of the families that were fitted")
    figure, axes = new_panels(len(fits))
    for ax, fitted in zip(axes, fits.values()):
        plot(ax, context.data, fitted)
    return figure


def draw_drop_curve(context: FigureContext) -> Figure:
    """`drop_curve`, see `analysis.figures`."""
    from analysis.plots_hygiene import plot_drop_curve
    from analysis.sensitivity import DROPS, drop_curve

    curves = []
    for family, fitted in context.fits.items():
        rows = context.data.of_family(family)
        ks = [k for k in DROPS if len(rows) - k > fitted.n_free]
        if len(ks) > 1 and any(p.kind in ("exponent", "other") for p in fitted.law.free):
            context.tell(f"fitting {fitted.law.name} without the largest losses")
            n = min(context.n_bootstrap, _DROP_REFITS)
            curves.append(drop_curve(fitted.law, rows, ks, n_bootstrap=n, seed=context.seed))
    if not curves:
        raise UserError("too few runs for a law with a free exponent and one loss left out")
    figure, axes = new_panels(len(curves))
    for ax, curve in zip(axes, curves):
        plot_drop_curve(ax, curve)
    return figure


_DROP_REFITS = 100


def draw_lr_transfer(context: FigureContext) -> Figure:
    """`lr_transfer`, see `analysis.figures`."""
    from analysis.lr import analyse_transfer, draw_transfer

    return draw_transfer(analyse_transfer(context.all_rows()))


def draw_realised_ratio(context: FigureContext) -> Figure:
    """`realised_ratio`, see `analysis.figures`."""
    from analysis.compare import RATIO_TOLERANCE
    from analysis.plots import plot_realised_ratio

    rows = context.rows("dlcm")
    _require(rows, *_RATIO_COLUMNS)
    return _on_axis(plot_realised_ratio, rows, tolerance=RATIO_TOLERANCE)


_RATIO_COLUMNS = {
    "compression_target": "the R asked for",
    "tokens_per_concept": "the realised R at evaluation",
    "tokens_per_concept_train": "the realised R in training",
}


def _require(rows: ResultsData, *columns: str) -> None:
    for column in columns:
        if column not in rows.frame:
            raise UserError(f"{_RATIO_COLUMNS[column]} is not known; map it with --columns {column}=...")


def draw_ratio_over_training(context: FigureContext) -> Figure:
    """`ratio_over_training`, see `analysis.figures`."""
    from analysis.plots_training import load_ratio_curves, plot_ratio_over_training

    rows = context.rows("dlcm")
    _require(rows, "compression_target", "tokens_per_concept")
    return _on_axis(plot_ratio_over_training, load_ratio_curves(context.sweep_folder(), rows))


def draw_tokens_per_concept(context: FigureContext) -> Figure:
    """`tokens_per_concept`, see `analysis.figures`."""
    from analysis.plots_inside import load_inside, plot_tokens_per_concept

    return _on_axis(plot_tokens_per_concept, load_inside(context.sweep_folder()))


def draw_loss_by_position(context: FigureContext) -> Figure:
    """`loss_by_position`, see `analysis.figures`."""
    from analysis.plots_inside import load_inside, plot_loss_by_position

    return _on_axis(plot_loss_by_position, load_inside(context.sweep_folder()))


def draw_decay_gain(context: FigureContext) -> Figure:
    """`decay_gain`, see `analysis.figures`."""
    from analysis.plots_training import plot_decay_gain

    return _on_axis(plot_decay_gain, context.rows("dlcm"), context.decay)


def draw_downstream(context: FigureContext) -> Figure:
    """`downstream`, see `analysis.figures`."""
    from analysis.downstream import fit_downstream
    from analysis.plots_downstream import plot_downstream
    from analysis.task_data import task_data

    drawn, reasons = [], []
    for task in context.tasks or _tasks(context.data):
        context.tell(f"fitting accuracy on {task}")
        try:
            rows = task_data(context.data, task)
            n = context.n_bootstrap
            curve = fit_downstream(context.data, task, chance=context.chance, seed=context.seed, n_bootstrap=n)
            drawn.append((rows, curve))
        except UserError as error:
            reasons.append(str(error))
    if not drawn:
        raise UserError(reasons[0])
    best = context.optional("downstream: no accuracy at the best allocation", lambda: context.optimum)
    figure, axes = new_panels(len(drawn))
    for ax, (rows, curve) in zip(axes, drawn):
        plot_downstream(ax, rows, curve, [curve.at_optimum(best)] if best is not None else [])
    context.notes.extend(f"downstream: {reason}" for reason in reasons)
    return figure


def _tasks(data: ResultsData) -> list[str]:
    names = [str(column) for column in data.frame if str(column).startswith("acc_")]
    names = [n.removeprefix("acc_") for n in names if not n.endswith("_stderr") and not n.startswith("acc_norm_")]
    if not names:
        raise UserError("no run was evaluated on a task (dlcm eval --sweep), and no column acc_TASK is mapped")
    return names
