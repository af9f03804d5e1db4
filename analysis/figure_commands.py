"""The verb `dlcm analyze plot`: figures by name. Only typer is imported at the top."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from analysis.options import (
    AsJson,
    ColumnsOption,
    DropOption,
    ExcludeOption,
    FitFiles,
    NMeaning,
    OwnCost,
    Seed,
    Vocabulary,
    WhereOption,
    Window,
)
from analysis.verbs import load, progress, show

if TYPE_CHECKING:
    from collections.abc import Callable

    from analysis.budget import Cost
    from analysis.data import ResultsData
    from analysis.figure_context import FigureContext

ResultsIfDrawn = Annotated[
    Path | None,
    typer.Argument(metavar="RESULTS", help="results.parquet or .csv, or a sweep folder", show_default=False),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--figure", metavar="NAME", help="repeatable; all that the data allow by default; --list shows the names"
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="one figure: a .png, .svg or .pdf; otherwise a folder for a .png and a .svg of each"
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verb to `dlcm analyze`."""
    app.command("plot")(plot_verb)


def plot_verb(
    results: ResultsIfDrawn = None,
    figure: Names = None,
    out: Out = Path("plots"),
    list_: Annotated[
        bool, typer.Option("--list", help="names of the figures, what they show and what they need")
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="training FLOPs of the figures at one budget; the largest that was run"),
    ] = None,
    fit: FitFiles = None,
    cost: OwnCost = None,
    vocab_size: Vocabulary = None,
    seq_len: Window = None,
    n: NMeaning = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="of the figure downstream; repeatable; all by default"),
    ] = None,
    chance: Annotated[
        float | None, typer.Option("--chance", help="accuracy of guessing, where the results do not hold it")
    ] = None,
    seed: Seed = 0,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, help="refits for intervals and bands; 0 for none")
    ] = 200,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    as_json: AsJson = False,
) -> None:
    """Draw figures by name, each with the hash of the results and the commit in its metadata.

    Without a name, all that the data allow; the others are listed with the reason.
    """
    from analysis.families import require_budget
    from analysis.figures import FIGURES, find_figure, save_figures
    from dlcm.errors import UserError

    if list_:
        rows = [{"name": f.name, "shows": f.title, "needs": f.needs} for f in FIGURES.values()]
        lines = [f"{row['name']:22} {row['shows']}; needs {row['needs']}" for row in rows]
        show({"figures": rows} if as_json else "\n".join(lines))
        return
    if results is None:
        raise UserError("plot: give results.parquet or .csv, or a sweep folder; --list shows the names of the figures")
    every = not figure or "all" in figure
    chosen = list(FIGURES) if every else [find_figure(name).name for name in dict.fromkeys(figure or [])]
    _check_out(out, None if every else chosen)
    prices = {"cost": cost, "vocab_size": vocab_size, "seq_len": seq_len}
    with progress() as tell:
        data = load(results, columns, where, exclude, drop, n=n)
        settings = {
            "asked": None if budget is None else require_budget(budget),
            "seed": seed,
            "n_bootstrap": bootstrap,
            "tell": tell,
            "tasks": task or [],
            "chance": chance,
        }
        context = _context(results, data, fit, prices, columns, settings)
        if every:
            drawn = save_figures(context, chosen, out)
            files, missing = list(drawn.files), dict(drawn.missing)
        else:
            files, missing = _save_named(context, chosen, out), {}
    notes = list(dict.fromkeys(context.notes))
    if as_json:
        show({"files": [str(file) for file in files], "missing": missing, "notes": notes})
        return
    lines = [*map(str, files), *(f"note: {note}" for note in notes)]
    show("\n".join([*lines, *(f"not drawn: {name}: {reason}" for name, reason in missing.items())]))


def _check_out(out: Path, names: list[str] | None) -> None:
    """A file holds one figure that was asked for by name."""
    from analysis.plots import FORMATS
    from dlcm.errors import UserError

    if out.suffix in FORMATS and not out.is_dir() and (names is None or len(names) > 1):
        few = "all figures" if names is None else f"{len(names)} figures"
        raise UserError(f"--out {out}: holds one figure, and {few} are asked for; give a folder, or one --figure NAME")


def _save_named(context: "FigureContext", names: list[str], out: Path) -> list[Path]:
    """Figures that were asked for: all of them, or none and an error."""
    from analysis.figures import SUFFIXES, draw_figure
    from analysis.plots import save_figure

    drawn = {name: draw_figure(context, name) for name in names}
    is_file = len(names) == 1 and bool(out.suffix) and not out.is_dir()
    files = []
    for name, figure in drawn.items():
        paths = [out] if is_file else [out / f"{name}{suffix}" for suffix in SUFFIXES]
        files += [save_figure(figure, path, data=context.data, shows=name) for path in paths]
    return files


def _context(
    results: Path,
    data: "ResultsData",
    fits: list[Path] | None,
    prices: dict[str, Any],
    columns: str | None,
    settings: dict[str, Any],
) -> "FigureContext":
    from analysis.columns import Mapped, parse_columns
    from analysis.figure_context import FigureContext
    from analysis.frames import find_results, read_table
    from analysis.result import FitResult
    from analysis.spend import fits_by_family

    saved = fits_by_family([FitResult.load(file) for file in fits or []])
    for fitted in saved.values():
        fitted.convention.require_same(data.convention, "figures of a saved fit")
    find_cost = _cost(results, data, prices)
    if any(prices.values()):
        find_cost()  # what was asked for is not left out without a word
    file = find_results(results)
    table = Mapped(read_table(file), parse_columns(columns) if columns else {}, str(file)).with_columns()
    return FigureContext(data, find_cost, saved=saved, folder=file.parent, table=table, **settings)


def _cost(results: Path, data: "ResultsData", prices: dict[str, Any]) -> "Callable[[], Cost]":
    def find() -> "Cost":
        from analysis.cost import require_priced
        from analysis.spend import find_prices

        found = find_prices(results, [], **prices)
        require_priced(data.convention, found)
        return found.training()

    return find
