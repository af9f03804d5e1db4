"""The verb `dlcm analyze optimum`: from fits and a cost to an allocation. Only typer is imported at the top."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from analysis.options import (
    AsJson,
    Choices,
    ColumnsOption,
    DropOption,
    ExcludeOption,
    FitFiles,
    Force,
    Limit,
    NMeaning,
    OwnCost,
    Refits,
    ResultsOrFit,
    Seed,
    Vocabulary,
    WhereOption,
    Window,
)
from analysis.verbs import load, progress, show

if TYPE_CHECKING:
    from collections.abc import Callable

    from analysis.budget import Cost
    from analysis.cost import Serving
    from analysis.data import ResultsData
    from analysis.frontier import Frontier
    from analysis.result import FitResult
    from analysis.spend import Ask, Prices
    from analysis.tables import Format

Budgets = Annotated[
    list[float] | None,
    typer.Option("--budget", metavar="FLOPS", help="training FLOPs; repeatable; the largest that was run by default"),
]
InferenceBudgets = Annotated[
    list[float] | None,
    typer.Option("--inference-budget", metavar="FLOPS", help="FLOPs of serving a token, at --tokens; repeatable"),
]
Tokens = Annotated[
    float | None, typer.Option("--tokens", metavar="D", help="training tokens, where they are given and not chosen")
]
Served = Annotated[
    float | None,
    typer.Option(
        "--served", metavar="TOKENS", help="tokens served over the lifetime, which --budget then pays for too"
    ),
]
ServingOption = Annotated[
    str | None,
    typer.Option("--serving", metavar="READ:WRITTEN", help="tokens of a request; by default a window of the training"),
]
Ranges = Annotated[
    list[str] | None,
    typer.Option(
        "--bounds", metavar="NAME=LOW:HIGH", help="search N, R or P here and not where the data are; repeatable"
    ),
]
OwnInferenceCost = Annotated[
    str | None,
    typer.Option("--inference-cost", metavar="EXPRESSION", help='FLOPs of your own models per served token: "2*N"'),
]
FrontierRange = Annotated[
    str | None,
    typer.Option(
        "--frontier", metavar="LOW:HIGH[:POINTS]", help="the best allocation over a range of --budget, with exponents"
    ),
]
InferenceFrontierRange = Annotated[
    str | None,
    typer.Option("--inference-frontier", metavar="LOW:HIGH[:POINTS]", help="the same over --inference-budget"),
]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="draw the frontier to this .png, .svg or .pdf")]
TableFile = Annotated[Path | None, typer.Option("--table", help="write the frontier to this .csv, .md or .tex")]


_POINTS, _MOST_POINTS = 13, 200


def register(app: typer.Typer) -> None:
    """Add the verb to `dlcm analyze`."""
    app.command("optimum")(optimum_verb)


def optimum_verb(
    results: ResultsOrFit,
    budget: Budgets = None,
    inference_budget: InferenceBudgets = None,
    tokens: Tokens = None,
    served: Served = None,
    serving: ServingOption = None,
    at: Choices = None,
    bounds: Ranges = None,
    frontier: FrontierRange = None,
    inference_frontier: InferenceFrontierRange = None,
    plot: PlotFile = None,
    table: TableFile = None,
    limit: Limit = None,
    force: Force = False,
    fit: FitFiles = None,
    cost: OwnCost = None,
    inference_cost: OwnInferenceCost = None,
    vocab_size: Vocabulary = None,
    seq_len: Window = None,
    n: NMeaning = None,
    seed: Seed = 0,
    bootstrap: Refits = 1000,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    as_json: AsJson = False,
) -> None:
    """Spend a budget best, and compare with the dense model.

    Least predicted loss over R, P, N and D at each budget: to train, to serve a token, or over a lifetime. With what a choice
    of yours loses against it, and the FLOPs that it saves against the dense baseline.
    """
    from analysis.cost import require_priced
    from analysis.families import fit_families
    from analysis.law_commands import parse_range
    from analysis.spend import answer, find_prices, fits_by_family

    choices, request = [parse_choice(text) for text in at or []], _serving(serving)
    search = {"bounds": dict(parse_range(text) for text in bounds or []) or None, "limit": limit, "force": force}
    spans = (_span("--frontier", frontier), _span("--inference-frontier", inference_frontier))
    _check_files(spans, plot, table)
    is_fit = results.suffix.lower() == ".json"
    rows = {"--columns": columns, "--where": where, "--exclude": exclude, "--n": n, "--drop-largest-losses": drop}
    saved = _load_fits([*([results] if is_fit else []), *(fit or [])], rows)
    prices = {"cost": cost, "inference_cost": inference_cost, "vocab_size": vocab_size, "seq_len": seq_len}
    with progress() as tell:
        data = None if saved else load(results, columns, where, exclude, drop, n=n)
        priced = find_prices(None if is_fit else results, saved, **prices)
        require_priced((saved[0] if data is None else data).convention, priced)
        asks = _asks(priced, request, (budget or [], inference_budget or []), spans, tokens, served)
        new = {} if data is None else fit_families(data, tell, seed=seed, n_bootstrap=bootstrap)
        fits = fits_by_family(saved or list(new.values()))
        if not asks and not any(spans):
            asks = [_largest(priced, data, fits, tokens)]
        answers = []
        for ask in asks:
            tell(f"spending {ask.budget:.3g} {ask.unit}")
            answers.append(answer(fits, ask, choices, **search))
        costs = _costs(priced, request, served)
        frontiers = [_frontiers(fits, costs[i](), span, tokens, search, tell) for i, span in enumerate(spans) if span]
    files = _write_frontiers(frontiers, plot, table)
    if as_json:
        found = [{family: f.to_dict() for family, f in each.items()} for each in frontiers]
        show({"answers": [a.to_dict() for a in answers], "frontiers": found, "files": files})
        return
    texts = [a.report() for a in answers] + ["\n\n".join(f.report() for f in each.values()) for each in frontiers]
    show("\n".join(["\n\n\n".join(texts), *(f"-> {file}" for file in files)]))


def _load_fits(files: list[Path], rows: dict[str, Any]) -> "list[FitResult]":
    """Saved fits; they have their runs, which options can no longer choose."""
    from analysis.result import FitResult
    from dlcm.errors import UserError

    for option in [name for name, value in rows.items() if value] if files else []:
        raise UserError(
            f"{option}: chooses the rows of a new fit, but {files[0]} is one already; leave it out, or fit again"
        )
    return [FitResult.load(file) for file in files]


def _costs(prices: "Prices", serving: "Serving | None", served: float | None) -> "tuple[Callable[[], Cost], ...]":
    """What --budget and what --inference-budget count, each made when it is asked for: the second may not be known."""
    return (
        lambda: prices.lifetime(served, serving) if served is not None else prices.training(),
        lambda: prices.inference(serving),
    )


def _asks(
    prices: "Prices",
    serving: "Serving | None",
    budgets: tuple[list[float], list[float]],
    spans: "tuple[list[float], list[float]]",
    tokens: float | None,
    served: float | None,
) -> "list[Ask]":
    """The budgets that were asked for: of training or a lifetime, and of serving."""
    from analysis.spend import Ask
    from dlcm.errors import UserError

    if served is not None and not (budgets[0] or spans[0]):
        raise UserError("--served: the FLOPs of training and serving together are spent; say how many with --budget")
    if serving is not None and served is None and not (budgets[1] or spans[1]):
        raise UserError("--serving: says what serving costs; it goes with --served or --inference-budget")
    costs = _costs(prices, serving, served)
    return [Ask(cost(), budget, tokens) for cost, own in zip(costs, budgets) for budget in own]


def _frontiers(
    fits: "dict[str, FitResult]", cost: "Cost", budgets: list[float], tokens: float | None, search: Any, tell: Any
) -> "dict[str, Frontier]":
    from analysis.frontier import frontier

    return {name: frontier(fit, cost, budgets, tokens=tokens, tell=tell, **search) for name, fit in fits.items()}


def _check_files(spans: tuple[list[float], list[float]], plot: Path | None, table: Path | None) -> None:
    from dlcm.errors import UserError

    for option, file, kinds in (
        ("--plot", plot, (".png", ".svg", ".pdf")),
        ("--table", table, (".csv", ".md", ".tex")),
    ):
        if file is None:
            continue
        if sum(map(bool, spans)) != 1:
            raise UserError(f"{option}: shows one frontier; give --frontier LOW:HIGH or --inference-frontier LOW:HIGH")
        if file.suffix not in kinds:
            raise UserError(f"{option} {file}: written as {', '.join(kinds)}; give the file one of these endings")


def _write_frontiers(frontiers: "list[dict[str, Frontier]]", plot: Path | None, table: Path | None) -> list[str]:
    """The figure and the table of the one frontier of each family."""
    files = []
    if plot is not None:
        from analysis.plots import save_figure
        from analysis.plots_optimum import draw_allocation

        hashes = {family: f.data_hash for family, f in frontiers[0].items()}
        files.append(str(save_figure(draw_allocation(frontiers[0]), plot, results_hash=str(hashes))))
    if table is not None:
        from analysis.frontier import join_tables
        from analysis.tables import format_table
        from dlcm.record import write_atomic

        write_atomic(table, format_table(join_tables(frontiers[0]), cast("Format", table.suffix[1:])))
        files.append(str(table))
    return files


def _largest(prices: "Prices", data: "ResultsData | None", fits: "dict[str, FitResult]", tokens: float | None) -> "Ask":
    from analysis.spend import Ask, budget_of_runs

    return Ask(prices.training(), budget_of_runs(prices, data, fits), tokens)


def parse_choice(text: str) -> dict[str, float]:
    """`P=0.5,R=4` as a mapping."""
    from dlcm.errors import UserError, nearest

    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("N", "D", "R", "P"):
            raise UserError(
                f"--at {text}: {name!r} is no coordinate{nearest(name, 'NDRP')}; write for example P=0.5,R=4"
            )
        if name in found:
            raise UserError(f"--at {text}: {name} is given twice; keep one")
        try:
            found[name] = float(value)
        except ValueError:
            raise UserError(f"--at {text}: {name}={value} is no number; write for example P=0.5,R=4") from None
    return found


def _serving(text: str | None) -> "Serving | None":
    """`700:100` as lengths of a request."""
    from analysis.cost import Serving
    from dlcm.errors import UserError

    if text is None:
        return None
    read, _, written = text.partition(":")
    try:
        return Serving(int(read), int(written))
    except ValueError:
        raise UserError(f"--serving {text}: write READ:WRITTEN in tokens, for example 700:100") from None


def _span(option: str, text: str | None) -> list[float]:
    """`LOW:HIGH` or `LOW:HIGH:POINTS` as budgets at equal ratios; none where there is no text."""
    from dlcm.errors import UserError

    if text is None:
        return []
    try:
        low, high, *rest = text.split(":")
        ends, n = (float(low), float(high)), int(*rest) if rest else _POINTS
        if 0 < ends[0] < ends[1] < float("inf") and 2 <= n <= _MOST_POINTS:
            # the ends as they were given, not as exp(log(...)) has them
            between = [ends[0] * (ends[1] / ends[0]) ** (i / (n - 1)) for i in range(1, n - 1)]
            return [ends[0], *between, ends[1]]
    except (ValueError, TypeError):
        pass
    raise UserError(
        f"{option} {text}: write LOW:HIGH or LOW:HIGH:POINTS, for example 1e19:1e22:13 (2 to {_MOST_POINTS} points)"
    )
