"""The verbs `dlcm analyze ...`. Only typer is imported here, so that `dlcm --help` answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from analysis.data_commands import register as register_data
from analysis.figure_commands import register as register_figures
from analysis.judge_commands import register as register_judges
from analysis.law_commands import BoundsOption, FamilyOption, LawName, TargetOption, chosen_law, laws_verb
from analysis.optimum_commands import register as register_optimum
from analysis.options import (
    AsJson,
    ColumnsOption,
    DropOption,
    ExcludeOption,
    NMeaning,
    OwnCost,
    Refits,
    Results,
    ResultsOrFit,
    Seed,
    Vocabulary,
    WhereOption,
    Window,
)
from analysis.verbs import check_figure, load, progress, show

if TYPE_CHECKING:
    from analysis.data import ResultsData
    from analysis.objective import LossKind
    from analysis.result import FitResult

app = typer.Typer(help="What the runs say: laws, optimum, plots, tables.", no_args_is_help=True, rich_markup_mode=None)
app.command("laws")(laws_verb)


class NChoice(StrEnum):
    """Which parameters count as N."""

    non_embedding = "non_embedding"
    total = "total"
    both = "both"


class TableFormat(StrEnum):
    """How a table is written."""

    csv = "csv"
    md = "md"
    tex = "tex"
    parquet = "parquet"


LossName = Annotated[str, typer.Option("--loss", help="log_huber, log_mse or mse")]
Budget = Annotated[float | None, typer.Option("--budget", help="training FLOPs; the largest that was run by default")]


@app.command("fit")
def fit_verb(
    results: Results,
    law: LawName = "compression_aware",
    n: Annotated[
        NChoice | None,
        typer.Option("--n", help="which parameters count as N, non_embedding by default; or the two beside each other"),
    ] = None,
    loss: LossName = "log_huber",
    seed: Seed = 0,
    bootstrap: Refits = 1000,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="also write the fit to this .json")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="law and runs, residuals, correlations, profiles: .png, .svg or .pdf")
    ] = None,
    bounds: BoundsOption = None,
    family: FamilyOption = None,
    target: TargetOption = "loss",
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a law: constants with intervals and status."""
    check_figure("--plot", plot)
    data = load(results, columns, where, exclude, drop, n=n.value if n and n is not NChoice.both else None)
    chosen = chosen_law(law, bounds, family, target, data)
    if n is NChoice.both:
        from analysis.sensitivity import both_conventions

        with progress() as tell:
            tell(f"fitting {chosen.name} under both meanings of N, {bootstrap} bootstrap refits each")
            both = both_conventions(chosen, data, loss=loss, seed=seed, n_bootstrap=bootstrap)
        if out is not None:
            for name, fitted in both.fits.items():
                fitted.save(_named(out, name))
        files = [] if plot is None else [_draw_fit(_named(plot, n), data.under(n), f) for n, f in both.fits.items()]
        _show_with_files(both.to_dict() if as_json else both.report(), files)
        return
    result = _fit(chosen, data, loss=loss, seed=seed, n_bootstrap=bootstrap)
    if out is not None:
        result.save(out)
    files = [_draw_fit(plot, data, result)] if plot is not None else []
    _show_with_files(result.to_dict() if as_json else result.report(), files)


@app.command("export")
def export_verb(
    results: ResultsOrFit,
    fmt: Annotated[
        TableFormat | None,
        typer.Option("--format", "-f", help="csv, md, tex (booktabs) or parquet; md, or --out's suffix"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write to this file instead of printing")] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="AXIS,...", help="group the rows: R,P, or columns such as seed,boundary"),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=0, help="tokens behind which a token is decoded; seq_len by default")
    ] = None,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    as_json: AsJson = False,
) -> None:
    """Table of FLOPs against accuracy, or of the constants of a fit: CSV, Markdown, LaTeX, parquet."""
    kind: Any = _table_format(fmt, out)
    if results.suffix.lower() == ".json":
        _export_fit(results, kind, out, as_json=as_json)
        return
    from analysis.accuracy import flops_vs_accuracy
    from analysis.data import records
    from analysis.outcomes import load_outcomes

    data = load(results, columns, where, exclude, drop)
    names = [name.strip() for name in by.split(",")] if by else []
    table = flops_vs_accuracy(data, by=names, outcomes=load_outcomes(data), context=context)
    text = "" if kind == "parquet" else table.format(kind)
    _write_table(table.frame, text, out)
    if as_json:
        show({"rows": records(table.frame), "notes": list(table.notes), "file": str(out) if out else None})
    else:
        show(str(out) if out is not None else text.rstrip("\n"))


@app.command("lr")
def lr_verb(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="results of one sweep or of several, taken together")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder; `lr` beside the results")] = None,
    columns: ColumnsOption = None,
    as_json: AsJson = False,
) -> None:
    """Whether learning rates transfer over widths: a verdict, a figure, and lr.yaml, which sweeps name as `tuned`."""
    import pandas as pd

    from analysis.columns import Mapped, parse_columns
    from analysis.frames import find_results, read_table
    from analysis.lr import analyse_transfer, format_transfer, save_transfer, transfer_json

    files = [find_results(path) for path in results]
    mapping = parse_columns(columns) if columns else {}
    tables = [Mapped(read_table(file), mapping, str(file)).with_columns() for file in files]
    source = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    transfer = analyse_transfer(pd.concat(tables, ignore_index=True), str(source))
    paths = save_transfer(transfer, out or files[0].parent / "lr")
    if as_json:
        show({**transfer_json(transfer), "files": [str(path) for path in paths]})
    else:
        show("\n".join([format_transfer(transfer), *(f"-> {path}" for path in paths)]))


@app.command("report")
def report_verb(
    results: Results,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder of the report; `report` beside the results")
    ] = None,
    budget: Budget = None,
    seed: Seed = 0,
    bootstrap: Refits = 1000,
    vocab_size: Vocabulary = None,
    seq_len: Window = None,
    cost: OwnCost = None,
    n: NMeaning = None,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    as_json: AsJson = False,
) -> None:
    """Write laws, optimum, plots and tables to one folder.

    With a comparison against the dense baseline and a summary in plain language, which is printed.
    """
    from analysis.data import find_results
    from analysis.report import analyze
    from analysis.spend import find_prices

    folder = out or find_results(results).parent / "report"
    given = {"cost": cost, "vocab_size": vocab_size, "seq_len": seq_len}
    priced = find_prices(results, [], **given).training() if any(given.values()) else None
    with progress() as tell:
        data = load(results, columns, where, exclude, drop, n=n)
        found = analyze(
            results, folder, data=data, cost=priced, budget=budget, seed=seed, n_bootstrap=bootstrap, tell=tell
        )
    show(found.to_dict() if as_json else found.summary())


def _fit(law: Any, data: "ResultsData", *, loss: str, seed: int, n_bootstrap: int) -> "FitResult":
    from analysis.design import count_runs
    from analysis.fit import fit

    with progress() as tell:
        tell(f"fitting {law.name} to {count_runs(len(data.of_family(law.family)))}, {n_bootstrap} bootstrap refits")
        return fit(law, data, loss=cast("LossKind", loss), seed=seed, n_bootstrap=n_bootstrap)


def _table_format(fmt: TableFormat | None, out: Path | None) -> Any:
    """What was asked for, or what the file's suffix says."""
    from dlcm.errors import UserError

    kinds = {kind.value for kind in TableFormat}
    suffix = out.suffix.removeprefix(".").lower() if out else ""
    if out is not None and fmt is None and suffix not in kinds:
        raise UserError(
            f"{out}: the name of a table ends in {', '.join(f'.{kind}' for kind in sorted(kinds))}; or give --format"
        )
    kind: str = fmt.value if fmt else suffix if suffix in kinds else "md"
    if kind == "parquet" and out is None:
        raise UserError("--format parquet is not for a terminal; name a file: --out table.parquet")
    return kind


def _write_table(frame: Any, text: str, out: Path | None) -> None:
    from dlcm.record import write_atomic

    if out is not None:
        write_atomic(out, text or frame.to_parquet(index=False))


def _show_with_files(what: str | dict[str, Any], files: list[str]) -> None:
    """Print a fit, and behind it the figures that were written; without any, its JSON is that of `--out`."""
    if isinstance(what, str):
        show("\n".join([what, *(f"-> {file}" for file in files)]))
    else:
        show({**what, "plots": files} if files else what)


def _named(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def _draw_fit(path: Path, data: "ResultsData", result: "FitResult") -> str:
    from analysis.plots import save_figure
    from analysis.plots_fit import draw_fit

    return str(save_figure(draw_fit(data, result), path, data=data))


def _export_fit(path: Path, fmt: Any, out: Path | None, *, as_json: bool) -> None:
    from analysis.data import records
    from analysis.fit_tables import format_fit, parameter_table
    from analysis.result import FitResult

    result = FitResult.load(path)
    table = parameter_table(result)
    text = "" if fmt == "parquet" else format_fit(result, fmt)
    _write_table(table, text, out)
    if as_json:
        show({"rows": records(table), "file": str(out) if out else None})
    else:
        show(str(out) if out is not None else text.rstrip("\n"))


register_data(app)
register_figures(app)
register_judges(app)
register_optimum(app)
