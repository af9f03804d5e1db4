"""The verbs `dlcm analyze hygiene` and `dlcm analyze downstream`. Only typer is imported at the top."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from analysis.optimum_commands import parse_choice
from analysis.options import (
    AsJson,
    ColumnsOption,
    DropOption,
    ExcludeOption,
    FitFiles,
    Force,
    Limit,
    NMeaning,
    OwnCost,
    Results,
    Seed,
    Vocabulary,
    WhereOption,
    Window,
)
from analysis.verbs import check_figure, load, progress, show

if TYPE_CHECKING:
    from collections.abc import Callable

    from analysis.accuracy_law import Link
    from analysis.chain import Accuracy
    from analysis.data import ResultsData
    from analysis.downstream import DownstreamFit
    from analysis.result import FitResult
    from analysis.spend import Prices


def register(app: typer.Typer) -> None:
    """Add the verbs to `dlcm analyze`."""
    app.command("hygiene")(hygiene_verb)
    app.command("downstream")(downstream_verb)


def hygiene_verb(
    results: Results,
    law: Annotated[str, typer.Option("--law", help="the law whose exponents are watched")] = "chinchilla",
    ks: Annotated[
        str, typer.Option("--drop", metavar="K,K,...", help="numbers of largest losses to leave out")
    ] = "0,1,3,5,12",
    plot: Annotated[Path | None, typer.Option("--plot", help="draw the drop curve to this .png, .svg or .pdf")] = None,
    seed: Seed = 0,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, help="refits for the 95% intervals; 0 for none")
    ] = 200,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    as_json: AsJson = False,
) -> None:
    """What to know before a fit is believed: missing cells, spans, seeds, tuning, and what a few large losses move."""
    from dataclasses import asdict

    from analysis import laws
    from analysis.cells import find_gaps
    from analysis.data import records
    from analysis.fit import fit
    from analysis.hygiene import examine
    from analysis.sensitivity import drop_curve, has_exponent
    from analysis.tables import format_table

    check_figure("--plot", plot)
    chosen, data = laws.get(law), load(results, columns, where, exclude, drop)
    with progress() as tell:
        tell(f"fitting {law}, {bootstrap} bootstrap refits")
        result = fit(chosen, data, seed=seed, n_bootstrap=bootstrap)
        rows = data.of_family(chosen.family)
        wanted = [k for k in _numbers(ks) if len(rows) - k > result.n_free]
        curve = None
        if wanted and has_exponent(result.law):
            tell(f"fitting without the {', '.join(map(str, wanted))} largest losses")
            curve = drop_curve(result.law, rows, wanted, seed=seed, n_bootstrap=bootstrap)
    findings, gaps = examine(data, result), find_gaps(data)
    files = []
    if plot is not None and curve is not None:
        from analysis.plots import new_figure, save_figure
        from analysis.plots_hygiene import plot_drop_curve

        figure, ax = new_figure()
        plot_drop_curve(ax, curve)
        files.append(str(save_figure(figure, plot, data=data, law=law)))
    if as_json:
        show(
            {
                "findings": [asdict(f) for f in findings],
                "missing_cells": [asdict(c) for c in gaps.cells],
                "drop_curve": records(curve.table()) if curve else None,
                "files": files,
            }
        )
        return
    lines = [f"{len(data)} usable rows of {data.source}, {len(data.exclusions)} left out", ""]
    lines += [f"- {finding.describe()}" for finding in findings] or ["- nothing to warn about"]
    if curve is not None:
        lines += ["", f"{law}: {curve.describe()}", "", format_table(curve.rounded(), "md").rstrip()]
    else:
        lines += [
            "",
            f"{law}: no fits without the largest losses: {len(rows)} runs are too few, or no exponent is free",
        ]
    show("\n".join([*lines, *(f"-> {file}" for file in files)]))


class SourceChoice(StrEnum):
    """What an accuracy is predicted from."""

    loss = "loss"
    bpb = "bpb"


class LinkChoice(StrEnum):
    """Form of the curve."""

    sigmoid = "sigmoid"
    exponential = "exponential"


def downstream_verb(
    results: Results,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="the task of columns acc_NAME and bpb_NAME")],
    source: Annotated[
        SourceChoice, typer.Option("--from", help="validation loss, or bits per byte of the right answer")
    ] = SourceChoice.loss,
    budget: Annotated[
        list[float] | None, typer.Option("--budget", metavar="FLOPS", help="training FLOPs to spend best; repeatable")
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option("--at", metavar="N=,D=,R=,P=", help='accuracy of a given model: "N=1e9,D=2e10"; repeatable'),
    ] = None,
    chance: Annotated[
        float | None, typer.Option("--chance", help="accuracy of guessing, where the results do not hold it")
    ] = None,
    ceiling: Annotated[
        float | None, typer.Option("--ceiling", help="highest accuracy, held; estimated otherwise")
    ] = None,
    link: Annotated[LinkChoice, typer.Option("--link", help="form of the curve")] = LinkChoice.sigmoid,
    fit: FitFiles = None,
    cost: OwnCost = None,
    vocab_size: Vocabulary = None,
    seq_len: Window = None,
    n: NMeaning = None,
    limit: Limit = None,
    force: Force = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="draw the curve to this .png, .svg or .pdf")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="also write the curve to this .json")] = None,
    seed: Seed = 0,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, help="refits of each stage for the 95% intervals; 0 for none")
    ] = 1000,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    as_json: AsJson = False,
) -> None:
    """Accuracy on a task as a function of the loss, and accuracy at a budget, with an interval that holds both fits."""
    from analysis.downstream import fit_downstream
    from analysis.families import fit_families
    from analysis.result import FitResult
    from analysis.spend import find_prices, fits_by_family
    from analysis.task_data import task_data

    check_figure("--plot", plot)
    choices = [parse_choice(text) for text in at or []]
    data = load(results, columns, where, exclude, drop, n=n)
    rows = task_data(data, task, source.value)
    with progress() as tell:
        tell(f"fitting accuracy on {task} over the {source}, {bootstrap} refits")
        form = {"chance": chance, "ceiling": ceiling, "link": cast("Link", link.value)}
        curve = fit_downstream(data, task, source=source.value, **form, seed=seed, n_bootstrap=bootstrap)
        found = []
        if budget or choices:
            # the law of the loss has all runs, that of the bits per byte those that were evaluated
            stage = data if source is SourceChoice.loss else rows
            saved = [FitResult.load(file) for file in fit or []]
            new = {} if saved else fit_families(stage, tell, seed=seed, n_bootstrap=bootstrap)
            fits = fits_by_family(saved or list(new.values()))
            priced = {"cost": cost, "vocab_size": vocab_size, "seq_len": seq_len}
            prices = find_prices(results, saved, **priced) if budget else None
            search = {"limit": limit, "force": force}
            found = _accuracies(curve, fits, prices, budget or [], choices, search, tell)
    files = _write_curve(curve, rows, found, out, plot)
    if as_json:
        show({"curve": curve.to_dict(), "accuracies": [a.to_dict() for a in found], "files": files})
        return
    lines = ["", *(a.report() for a in found)] if found else []
    show("\n".join([curve.report(), *lines, *(f"-> {file}" for file in files)]))


def _accuracies(
    curve: "DownstreamFit",
    fits: "dict[str, FitResult]",
    prices: "Prices | None",
    budgets: list[float],
    choices: list[dict[str, float]],
    search: dict[str, Any],
    tell: "Callable[[str], None]",
) -> "list[Accuracy]":
    """At the best allocation of each budget and at each choice, under the law of each family."""
    from analysis.allocation import refuse_outside
    from analysis.cost import require_priced
    from analysis.optimum import optimum
    from dlcm.errors import UserError

    found = []
    for fitted in fits.values():
        if prices is None:  # only choices were asked for
            break
        require_priced(fitted.convention, prices)
        for budget in budgets:
            tell(f"spending {budget:.3g} training FLOPs ({fitted.law.name})")
            best = optimum(fitted, prices.training(), budget, flat=None, **search)
            found.append(curve.at_optimum(best))
    for choice in choices:
        able = [f for f in fits.values() if set(f.law.inputs) == set(choice)]
        if not able:
            needs = " or ".join(", ".join(f.law.inputs) for f in fits.values())
            raise UserError(f"--at {','.join(choice)}: a law of the loss needs {needs}; give these and no other")
        for fitted in able:
            place = ", ".join(f"{name} = {value:.3g}" for name, value in choice.items())
            refuse_outside(fitted, fitted.outside(**choice), f"{place} lies", "one", **search)
            found.append(curve.at(fitted, **choice))
    return found


def _write_curve(
    curve: "DownstreamFit", rows: "ResultsData", found: "list[Accuracy]", out: Path | None, plot: Path | None
) -> list[str]:
    files = []
    if out is not None:
        curve.save(out)
        files.append(str(out))
    if plot is not None:
        from analysis.plots import new_figure, save_figure
        from analysis.plots_downstream import plot_downstream

        figure, ax = new_figure()
        plot_downstream(ax, rows, curve, found)
        files.append(str(save_figure(figure, plot, data=rows, task=curve.task)))
    return files


def _numbers(text: str) -> list[int]:
    from dlcm.errors import UserError

    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [-1]
    if numbers[0] < 0:
        raise UserError(f"--drop {text!r}: give whole numbers with commas between them, such as 0,1,3,5")
    return numbers
