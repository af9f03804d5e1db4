"""The verbs `dlcm analyze choose` and `isoflop`: is this the right law, and does another route say the same?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from analysis.options import AsJson, ColumnsOption, DropOption, ExcludeOption, Results, Seed, WhereOption
from analysis.verbs import check_figure, load, progress, show

if TYPE_CHECKING:
    from analysis.data import ResultsData
    from analysis.isoflop_result import IsoFlop


def register(app: typer.Typer) -> None:
    """Add the verbs to `dlcm analyze`."""
    app.command("choose")(choose_verb)
    app.command("isoflop")(isoflop_verb)


def choose_verb(
    results: Results,
    law: Annotated[
        list[str] | None,
        typer.Option(
            "--law", help="repeat; name, or name:t_t=0,d2=d1,-A_d to hold, tie, drop; a family's usual laws by default"
        ),
    ] = None,
    family: Annotated[str | None, typer.Option("--family", help="dense or dlcm, where no law is named")] = None,
    cut: Annotated[
        list[float] | None, typer.Option("--cut", help="repeat; training FLOPs up to which a hold-out fits")
    ] = None,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    seed: Seed = 0,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, help="refits for intervals and drifts; 0 for none")
    ] = 200,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="predicted against measured with hold-outs, to this file")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare laws: AICc, hold-outs of the largest budgets, levels left out, nested tests.

    Says which law the runs support, and which of its constants they do not give.
    """
    from analysis.validate import candidates, choose

    check_figure("--plot", plot)
    data = load(results, columns, where, exclude, drop)
    laws = law or (candidates(family) if family else None)
    with progress() as tell:
        choice = choose(laws, data, cuts=cut, seed=seed, n_bootstrap=bootstrap, tell=tell)
    if plot is not None:
        from analysis.plots import new_figure, save_figure
        from analysis.plots_fit import plot_hold_outs

        figure, ax = new_figure()
        plot_hold_outs(ax, data, choice.chosen.fit, choice.chosen.holdouts)
        save_figure(figure, plot, data=data)
    show({**choice.to_dict(), "plot": str(plot) if plot else None} if as_json else choice.report())


def isoflop_verb(
    results: Results,
    over: Annotated[str, typer.Option("--over", metavar="N|R|P", help="what moves along a profile")] = "N",
    family: Annotated[str | None, typer.Option("--family", help="dense or dlcm; those in the data by default")] = None,
    law: Annotated[
        str | None,
        typer.Option("--law", help="held against the vertices, written as for `choose`; a family's own, or `none`"),
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option("--budget", help="repeat; training FLOPs; found in the data by default")
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="relative distance of C from a budget within which a run belongs to it")
    ] = 0.06,
    sides: Annotated[int, typer.Option("--sides", min=1, help="sizes that are needed on either side of a vertex")] = 2,
    columns: ColumnsOption = None,
    where: WhereOption = None,
    exclude: ExcludeOption = None,
    drop: DropOption = 0,
    seed: Seed = 0,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, help="draws for the 95% intervals; 0 for none")
    ] = 1000,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="profiles and vertices to this .png, .svg or .pdf")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Best size at each budget from isoFLOP profiles.

    Each with an interval, or refused with a reason. How it grows with the budget, and whether a fitted law says the same.
    """
    from analysis.isoflop import isoflop

    check_figure("--plot", plot)
    data = load(results, columns, where, exclude, drop)
    families = [family] if family else _families(data, over)
    options = {"budgets": budget, "tolerance": tolerance, "sides": sides, "n_bootstrap": bootstrap, "seed": seed}
    found = []
    with progress() as tell:
        for name in families:
            tell(f"isoFLOP profiles{f' of the {name} models' if name else ''}, {bootstrap} draws")
            one = isoflop(data, family=name, over=over, **options)
            found.append(_against_law(one, data, law, seed) if bootstrap and law != "none" else one)
    files = _draw_profiles(plot, found, data)
    if as_json:
        show({"profiles": [one.to_dict() for one in found], "files": files})
    else:
        show("\n\n\n".join([*(one.report() for one in found)]) + "".join(f"\n-> {file}" for file in files))


def _families(data: "ResultsData", over: str) -> list[str | None]:
    """Those in the data; over R and P of the DLCM alone, since dense models have neither."""
    if "model" not in data.frame:
        return [None]
    present = sorted(set(data.frame["model"].astype(str)))
    return [name for name in present if over == "N" or name != "dense"] or [None]


def _against_law(found: "IsoFlop", data: "ResultsData", law: str | None, seed: int) -> "IsoFlop":
    """The profiles held against a law that is fitted to the same runs."""
    from analysis.fit import fit
    from analysis.isoflop_check import check_against
    from analysis.validate import parse_law

    is_dense = found.family == "dense" or (not found.family and bool((data.P == 0).all()))
    chosen = parse_law(law or ("chinchilla" if is_dense else "compression_aware"))
    return check_against(found, data, fit(chosen, data, seed=seed, n_bootstrap=0))


def _draw_profiles(path: Path | None, found: "list[IsoFlop]", data: "ResultsData") -> list[str]:
    """One figure a family; with several, the family is added to the name."""
    if path is None:
        return []
    from analysis.plots import save_figure
    from analysis.plots_isoflop import draw_isoflop

    files = [path if len(found) == 1 else path.with_name(f"{path.stem}_{one.family}{path.suffix}") for one in found]
    return [str(save_figure(draw_isoflop(one), file, data=data)) for one, file in zip(found, files)]
