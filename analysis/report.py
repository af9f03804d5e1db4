"""analyze(results, out_dir): everything that a set of runs says, as files and as one plain-language summary."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.accuracy import AccuracyTable, flops_vs_accuracy
from analysis.compare import Comparison, compare_at_matched_compute, ratio_table
from analysis.cost import cost_of_results, require_priced
from analysis.data import ResultsData, load_results, records
from analysis.design import Support, describe_support
from analysis.families import Tell, fit_families, largest_budget, require_budget
from analysis.figure_context import FigureContext
from analysis.figures import save_figures
from analysis.html_report import write_html
from analysis.law import FAMILIES
from analysis.optimum import Optimum, optimum
from analysis.plots import BAND_REFITS
from analysis.report_text import format_summary
from analysis.result import FitResult
from analysis.savings import Savings, savings
from analysis.search import Cost
from dlcm.errors import UserError
from dlcm.record import write_atomic

PLOTS = ("loss_vs_compute", "loss_vs_share", "realised_ratio", "predicted_vs_measured")


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What `analyze` found.

    Attributes:
        fits: family (`dense`, `dlcm`) -> fit, for the families that have runs.
        optima: family -> best allocation of `budget`; empty without a cost function.
        savings: the DLCM against the dense baseline at equal predicted loss, where both were fitted.
        comparisons: best measured design of either family at each matched budget.
        support: family -> what its runs can and cannot support.
        ratios: target and realised tokens per concept, one row a DLCM run.
        table: FLOPs against accuracy.
        missing: what could not be made, and why.
        files: what was written.
    """

    data: ResultsData
    budget: float
    fits: dict[str, FitResult]
    optima: dict[str, Optimum]
    savings: Savings | None
    comparisons: tuple[Comparison, ...]
    support: dict[str, Support]
    ratios: pd.DataFrame
    table: AccuracyTable
    missing: tuple[str, ...]
    files: tuple[Path, ...]
    out_dir: Path

    def summary(self) -> str:
        """The findings in plain language, as Markdown that reads well on a terminal."""
        return format_summary(self)

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "source": self.data.source,
            "data_hash": self.data.hash,
            "definitions": self.data.convention.definitions(),
            "n_runs": len(self.data),
            "exclusions": [dataclasses.asdict(e) for e in self.data.exclusions],
            "budget_flops": self.budget,
            "fits": {family: _without_replicates(result) for family, result in self.fits.items()},
            "optima": {family: best.to_dict() for family, best in self.optima.items()},
            "savings": self.savings.to_dict() if self.savings else None,
            "comparisons": [{**dataclasses.asdict(c), "text": c.describe()} for c in self.comparisons],
            "support": {family: dataclasses.asdict(s) for family, s in self.support.items()},
            "ratios": records(self.ratios),
            "missing": list(self.missing),
            "files": [str(path) for path in self.files],
        }


def _without_replicates(result: FitResult) -> dict[str, Any]:
    return {key: value for key, value in result.to_dict().items() if key != "replicates"}


def analyze(
    results_path: str | Path,
    out_dir: str | Path,
    *,
    data: ResultsData | None = None,
    cost: Cost | None = None,
    budget: float | None = None,
    seed: int = 0,
    n_bootstrap: int = 1000,
    tell: Tell | None = None,
) -> Analysis:
    """Fit both families, find the optimum, compare, plot, tabulate, and write it all down.

    Args:
        results_path: results file or sweep folder.
        out_dir: gets report.html, plots/, tables/, fits/ and summary.md.
        data: the rows to analyse, where they were loaded with a mapping or with exclusions; all of the results by default.
        cost: training FLOPs, `cost(N, D, R, P)`; that of the sweep beside the results by default.
        budget: training FLOPs to allocate; the largest that was run by default.
        seed: seeds starts and bootstrap.
        n_bootstrap: refits for the intervals.
        tell: called with a line before each step that takes time.

    Raises:
        UserError: the results are not usable. What merely cannot be said (no dense runs, no cost function) is in `missing`.
    """
    tell = tell or (lambda _: None)
    out = Path(out_dir)
    data = load_results(results_path) if data is None else data
    table = flops_vs_accuracy(data)
    ratios = ratio_table(data)
    missing: list[str] = []
    if cost is None:
        try:
            cost = cost_of_results(results_path)
        except UserError as error:
            missing.append(f"optimum, frontiers and savings: {error}")
    if cost is not None:
        require_priced(data.convention, cost)
    fits = fit_families(data, tell, seed=seed, n_bootstrap=n_bootstrap)
    absent = [family for family in FAMILIES if family not in fits]
    missing += [f"law of the {family} models: the results hold no finished {family} run" for family in absent]
    budget = largest_budget(data) if budget is None else require_budget(budget)
    optima, saved = _allocate(fits, cost, budget, missing, tell)
    tell("drawing plots and writing tables")
    files = [*_write_fits(fits, out / "fits"), *_write_tables(table, ratios, out / "tables")]
    files += _draw_plots(data, fits, cost, budget, out / "plots", missing)
    analysis = Analysis(
        data=data,
        budget=budget,
        fits=fits,
        optima=optima,
        savings=saved,
        comparisons=tuple(compare_at_matched_compute(data)),
        support={f: describe_support(data.of_family(f), f) for f in ("dense", "dlcm") if len(data.of_family(f))},
        ratios=ratios,
        table=table,
        missing=tuple(missing),
        files=(*files, out / "summary.md", out / "report.html"),
        out_dir=out,
    )
    write_html(analysis, out / "report.html", cost, tell)
    write_atomic(out / "summary.md", analysis.summary() + "\n")
    return analysis


def _allocate(
    fits: dict[str, FitResult], cost: Cost | None, budget: float, missing: list[str], tell: Tell
) -> tuple[dict[str, Optimum], Savings | None]:
    optima: dict[str, Optimum] = {}
    if cost is None:
        return optima, None
    for family, result in fits.items():
        tell(f"searching the {family} optimum at {budget:.3g} FLOPs")
        try:
            optima[family] = optimum(result, cost, budget)
        except UserError as error:
            missing.append(f"optimum of the {family} models: {error}")
    if "dlcm" in optima and "dense" in fits:
        tell("comparing with the dense frontier")
        try:
            return optima, savings(optima["dlcm"], fits["dense"], cost)
        except UserError as error:
            missing.append(f"savings: {error}")
    return optima, None


def _write_fits(fits: dict[str, FitResult], folder: Path) -> list[Path]:
    paths = []
    for family, result in fits.items():
        result.save(folder / f"{family}.json")
        paths.append(folder / f"{family}.json")
    return paths


def _write_tables(table: AccuracyTable, ratios: pd.DataFrame, folder: Path) -> list[Path]:
    paths = []
    if len(ratios):
        paths.append(folder / "realised_ratios.csv")
        write_atomic(paths[-1], ratios.to_csv(index=False))
    for fmt in ("csv", "md", "tex"):
        path = folder / f"flops_vs_accuracy.{fmt}"
        write_atomic(path, table.format(fmt))
        paths.append(path)
    return paths


def _draw_plots(
    data: ResultsData, fits: dict[str, FitResult], cost: Cost | None, budget: float, folder: Path, missing: list[str]
) -> list[Path]:
    """Write `PLOTS` as PNG and SVG; what cannot be drawn is added to `missing`."""

    def find_cost() -> Cost:
        if cost is None:
            raise UserError("the models cannot be priced")  # why not stands among what is missing already
        return cost

    few = {family: dataclasses.replace(f, replicates=f.replicates[:BAND_REFITS]) for family, f in fits.items()}
    drawn = save_figures(FigureContext(data, find_cost, saved=few, asked=budget), PLOTS, folder)
    missing += [f"plot {name}: {reason}" for name, reason in drawn.missing.items()]
    return list(drawn.files)
