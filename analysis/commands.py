"""The verbs `dlcm analyze ...`. Only typer is imported here, so that `dlcm --help` answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from analysis.data import ResultsData
    from analysis.result import FitResult
    from analysis.search import Cost

app = typer.Typer(help="What the runs say: laws, optimum, plots, tables.", no_args_is_help=True, rich_markup_mode=None)


class NChoice(StrEnum):
    """Which parameters count as N."""

    non_embedding = "non_embedding"
    total = "total"


class TableFormat(StrEnum):
    """How a table is written."""

    csv = "csv"
    md = "md"
    tex = "tex"


Results = Annotated[Path, typer.Argument(metavar="RESULTS", help="results.parquet or .csv, or a sweep folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
LawName = Annotated[str, typer.Option("--law", help="chinchilla, compression_aware, overtrained or decay_gain")]
LossName = Annotated[str, typer.Option("--loss", help="log_huber, log_mse or mse")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="seeds starts and bootstrap")]
Refits = Annotated[int, typer.Option("--bootstrap", min=0, help="refits for the 95% intervals; 0 for none")]
Budget = Annotated[float | None, typer.Option("--budget", help="training FLOPs; the largest that was run by default")]
Vocabulary = Annotated[
    int | None, typer.Option("--vocab-size", min=1, help="prices shapes where the results stand apart from their sweep")
]


@app.command("fit")
def fit_verb(
    results: Results,
    law: LawName = "compression_aware",
    n: Annotated[NChoice, typer.Option("--n", help="which parameters count as N")] = NChoice.non_embedding,
    loss: LossName = "log_huber",
    seed: Seed = 0,
    bootstrap: Refits = 200,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="also write the fit to this .json")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit a law: constants with intervals and status."""
    from analysis import laws
    from analysis.data import load_results

    chosen = laws.get(law)
    result = _fit(chosen, load_results(results, n=n.value), loss=loss, seed=seed, n_bootstrap=bootstrap)
    if out is not None:
        result.save(out)
    _print(result.to_dict() if as_json else result.report())


@app.command("optimum")
def optimum_verb(
    results: Results,
    budget: Budget = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="leave the data although the fit is unsound")
    ] = False,
    seed: Seed = 0,
    bootstrap: Refits = 200,
    vocab_size: Vocabulary = None,
    as_json: AsJson = False,
) -> None:
    """Spend a budget best, and compare with the dense model.

    Least predicted loss over R, P, N and D at the budget, and the FLOPs that it saves against the dense baseline.
    """
    from analysis import laws
    from analysis.cost import cost_of_results
    from analysis.data import load_results
    from analysis.design import levels
    from analysis.optimum import optimum
    from analysis.savings import savings

    data = load_results(results)
    cost = cost_of_results(results, vocab_size=vocab_size)
    spent = budget or levels(data.C, 1.3)[-1]
    found, fits = {}, {}
    for family, law in (("dlcm", laws.COMPRESSION_AWARE), ("dense", laws.CHINCHILLA)):
        if len(data.of_family(family)):
            fits[family] = _fit(law, data, loss="log_huber", seed=seed, n_bootstrap=bootstrap)
            found[family] = optimum(fits[family], cost, spent, extrapolate=extrapolate)
    saved = savings(found["dlcm"], fits["dense"], cost) if {"dlcm", "dense"} <= fits.keys() else None
    if as_json:
        _print({"optima": {k: v.to_dict() for k, v in found.items()}, "savings": saved.to_dict() if saved else None})
        return
    _print("\n\n".join([*(best.report() for best in found.values()), *([saved.text] if saved else [])]))


@app.command("plot")
def plot_verb(
    results: Results,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the .png and .svg files")] = Path("plots"),
    budget: Budget = None,
    vocab_size: Vocabulary = None,
    as_json: AsJson = False,
) -> None:
    """Draw the four plots of a sweep."""
    from analysis import laws
    from analysis.data import load_results
    from analysis.design import levels
    from analysis.report import draw_plots

    data = load_results(results)
    cost, missing = _cost_or_reason(results, vocab_size)
    fits = {}
    for family, law in (("dense", laws.CHINCHILLA), ("dlcm", laws.COMPRESSION_AWARE)):
        if len(data.of_family(family)):
            fits[family] = _fit(law, data, loss="log_huber", seed=0, n_bootstrap=0)
    paths = draw_plots(data, fits, cost, budget or levels(data.C, 1.3)[-1], out, missing)
    if as_json:
        _print({"files": [str(p) for p in paths], "missing": missing})
        return
    _print("\n".join([*map(str, paths), *(f"missing: {reason}" for reason in missing)]))


@app.command("export")
def export_verb(
    results: Results,
    fmt: Annotated[TableFormat, typer.Option("--format", "-f", help="csv, md or tex (booktabs)")] = TableFormat.md,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write to this file instead of printing")] = None,
    as_json: AsJson = False,
) -> None:
    """Table of FLOPs against accuracy: CSV, Markdown, LaTeX."""
    from analysis.data import load_results, records
    from analysis.tables import flops_vs_accuracy, format_table
    from dlcm.record import write_atomic

    table = flops_vs_accuracy(load_results(results))
    text = format_table(table, fmt.value)
    if out is not None:
        write_atomic(out, text)
    if as_json:
        _print({"rows": records(table), "file": str(out) if out else None})
    else:
        _print(str(out) if out is not None else text.rstrip("\n"))


@app.command("lr")
def lr_verb(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="results of one sweep or of several, taken together")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder; `lr` beside the results")] = None,
    as_json: AsJson = False,
) -> None:
    """Whether learning rates transfer over widths: a verdict, a figure, and lr.yaml, which sweeps name as `tuned`."""
    import pandas as pd

    from analysis.data import find_results, read_table
    from analysis.lr import analyse_transfer, format_transfer, save_transfer, transfer_json

    files = [find_results(path) for path in results]
    transfer = analyse_transfer(pd.concat([read_table(file) for file in files], ignore_index=True))
    paths = save_transfer(transfer, out or files[0].parent / "lr")
    if as_json:
        _print({**transfer_json(transfer), "files": [str(path) for path in paths]})
    else:
        _print("\n".join([format_transfer(transfer), *(f"-> {path}" for path in paths)]))


@app.command("report")
def report_verb(
    results: Results,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder of the report; `report` beside the results")
    ] = None,
    budget: Budget = None,
    seed: Seed = 0,
    bootstrap: Refits = 200,
    vocab_size: Vocabulary = None,
    as_json: AsJson = False,
) -> None:
    """Write laws, optimum, plots and tables to one folder.

    With a comparison against the dense baseline and a summary in plain language, which is printed.
    """
    from analysis.cost import cost_of_results
    from analysis.data import find_results
    from analysis.report import analyze

    folder = out or find_results(results).parent / "report"
    cost = cost_of_results(results, vocab_size=vocab_size) if vocab_size else None
    with _progress() as tell:
        found = analyze(results, folder, cost=cost, budget=budget, seed=seed, n_bootstrap=bootstrap, tell=tell)
    _print(found.to_dict() if as_json else found.summary())


def _fit(law: Any, data: "ResultsData", *, loss: str, seed: int, n_bootstrap: int) -> "FitResult":
    from analysis.design import count_runs
    from analysis.fit import fit

    with _progress() as tell:
        tell(f"fitting {law.name} to {count_runs(len(data.of_family(law.family)))}, {n_bootstrap} bootstrap refits")
        return fit(law, data, loss=loss, seed=seed, n_bootstrap=n_bootstrap)  # pyright: ignore[reportArgumentType]


def _cost_or_reason(results: Path, vocab_size: int | None) -> "tuple[Cost | None, list[str]]":
    from analysis.cost import cost_of_results
    from dlcm.errors import UserError

    try:
        return cost_of_results(results, vocab_size=vocab_size), []
    except UserError as error:
        return None, [f"fitted frontiers: {error}"]


class _progress:
    """`with _progress() as tell`: a spinner with the current step on a terminal, a plain line a step otherwise; on stderr."""

    def __enter__(self) -> "Callable[[str], None]":
        import sys

        from rich.console import Console

        console = Console(stderr=True)
        self._status = console.status("") if console.is_terminal else None
        if self._status is None:
            return lambda line: print(line, file=sys.stderr, flush=True)
        self._status.start()
        return self._status.update

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()


def _print(what: str | dict[str, Any]) -> None:
    import json

    print(what if isinstance(what, str) else json.dumps(what, indent=2))
