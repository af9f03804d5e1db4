"""The report of a sweep as one HTML file that opens offline: answer, figures, explorer, runs, exclusions, fit cards, provenance.

plotly draws the figures; its code is part of the file, and the file asks no network for anything.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.cost import Shapes
from analysis.data import ResultsData
from analysis.design import count_runs, levels
from analysis.explorer import Explorer, explore
from analysis.families import Tell
from analysis.fit_tables import card
from analysis.frontier import Frontier, frontier
from analysis.html_figures import (
    allocation,
    as_json,
    loss_vs_compute,
    loss_vs_share,
    predicted_vs_measured,
    realised_ratio,
    residuals,
)
from analysis.result import FitResult
from analysis.result_text import format_parameters
from analysis.search import Cost
from dlcm.errors import UserError
from dlcm.record import read_json, write_atomic

if TYPE_CHECKING:
    from analysis.report import Analysis

Array = np.ndarray

_BUDGETS, _SERVING_BUDGETS = 21, 11
_BEYOND = 10**0.5
"""The explorer goes half a decade beyond the budgets that were run, and says so there."""
_VERDICTS = {"dlcm": "DLCM", "dense": "Dense baseline"}
_TITLES = {
    "loss_vs_compute": "Loss against compute",
    "loss_vs_share": "Loss against the backbone share",
    "allocation_N": "Best size",
    "allocation_D": "Best number of tokens",
    "allocation_R": "Best compression ratio",
    "allocation_P": "Best backbone share",
    "predicted_vs_measured": "Predicted against measured",
    "residuals": "Residuals",
    "realised_ratio": "Realised tokens per concept",
}
_NOTES = {
    "loss_vs_compute": "Each point is a run; hover names it, a click opens its config. Lines are the least loss that the fits "
    "predict at each budget, with 95% bands.",
    "loss_vs_share": "Runs of one compute budget, chosen in the menu; faint: sizes that are not the best at their share.",
    "allocation": "Where the fit puts the optimum of each budget, with 95% bands; dotted where it lies outside the data or "
    "is not identified.",
    "predicted_vs_measured": "A law that describes the runs puts them on the dotted line.",
    "residuals": "A pattern here says that the law misses something.",
    "realised_ratio": "At evaluation; the band is 5% to either side.",
}


def write_html(analysis: "Analysis", path: Path, cost: Cost | None, tell: Tell | None = None) -> Path:
    """Write the page.

    Args:
        analysis: what `analyze` found.
        path: the file to write.
        cost: training FLOPs, `cost(N, D, R, P)`; None where unknown: then there is no frontier and no explorer.
        tell: called with a line before each step that takes time.
    """
    write_atomic(path, render(analysis, cost, tell or (lambda _: None)))
    return path


def render(analysis: "Analysis", cost: Cost | None, tell: Tell) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    explorers = _explorers(analysis, cost, tell)
    frontiers = _frontiers(analysis, cost, tell)
    if explorers:
        frontiers["dlcm"] = explorers[0].best
    tell("drawing the interactive figures")
    drawn = as_json(_figures(analysis, frontiers))
    figures = [
        {"name": name, "title": _TITLES[name], "note": _NOTES.get(name) or _NOTES[name.split("_")[0]]} for name in drawn
    ]
    columns, rows = run_table(analysis)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = files("analysis") / "html"
    page = environment.from_string((folder / "page.html.j2").read_text())
    shown = [explorer.to_dict() for explorer in explorers]
    data = {"explorers": shown, "columns": columns, "runs": rows, "configs": configs(analysis.data)}
    return page.render(
        title=_name(analysis.data),
        summary=summary(analysis),
        figures=figures,
        figure_data={name: _inert(text) for name, text in drawn.items()},
        data=_inert(json.dumps(data, allow_nan=False, separators=(",", ":"))),
        columns=columns,
        cards=_cards(analysis.fits),
        exclusions=[dataclasses.asdict(e) for e in analysis.data.exclusions],
        missing=analysis.missing,
        provenance=_provenance(analysis),
        explorer=bool(explorers),
        css=(folder / "report.css").read_text(),
        js=(folder / "report.js").read_text(),
        plotly=get_plotlyjs(),
    )


def _inert(text: str) -> str:
    """JSON that can stand in a script element: nothing in it ends the element."""
    return text.replace("<", "\\u003c")


def _name(data: ResultsData) -> str:
    names = sorted({str(name) for name in data.frame["sweep"]}) if "sweep" in data.frame else []
    return names[0] if len(names) == 1 else Path(data.source).stem


def _frontiers(analysis: "Analysis", cost: Cost | None, tell: Tell) -> dict[str, Frontier]:
    """That of the dense baseline; that of the DLCMs is the explorer's."""
    fit = analysis.fits.get("dense")
    if fit is None or cost is None:
        return {}
    tell("searching the dense frontier")
    few = dataclasses.replace(fit, replicates=fit.replicates[:200])
    try:
        return {"dense": frontier(few, cost, _budgets(analysis.data.of_family("dense"), 13), force=True)}
    except UserError:
        return {}  # why not is among what is missing: the optimum failed alike


def _budgets(data: ResultsData, n: int, beyond: float = 1.0) -> Array:
    known = data.C[np.isfinite(data.C) & (data.C > 0)]
    if not known.size:
        raise UserError(f"{data.source}: no training FLOPs, so no budgets")
    low, high = float(known.min()) / beyond, float(known.max()) * beyond
    return np.geomspace(low, max(high, 1.01 * low), n)


def _explorers(analysis: "Analysis", cost: Cost | None, tell: Tell) -> list[Explorer]:
    """For training budgets, and for inference FLOPs at the largest number of tokens that were trained on."""
    fit = analysis.fits.get("dlcm")
    if fit is None or cost is None:
        return []
    data = analysis.data.dlcm
    found = []
    try:
        tell("preparing the explorer of training budgets")
        found.append(explore(fit, cost, _budgets(data, _BUDGETS, _BEYOND)))
    except UserError:
        return []
    shapes = getattr(cost, "shapes", None)
    if isinstance(shapes, Shapes):
        tell("preparing the explorer of inference budgets")
        serving, tokens = shapes.inference(), float(data.D.max())
        per_token = np.asarray(serving(data.N, data.D, data.R, data.P), dtype=float)
        budgets = np.geomspace(per_token.min(), per_token.max() * 1.001, _SERVING_BUDGETS)
        with contextlib.suppress(UserError):
            found.append(explore(fit, serving, budgets, tokens=tokens, n_ratios=9, n_shares=9))
    return found


def _figures(analysis: "Analysis", frontiers: Mapping[str, Frontier]) -> dict[str, Any]:
    data, fits = analysis.data, analysis.fits
    return {
        "loss_vs_compute": loss_vs_compute(data, frontiers) if np.isfinite(data.C).any() else None,
        "loss_vs_share": loss_vs_share(data),
        **{f"allocation_{name}": allocation(frontiers, name) for name in "NDRP"},
        "predicted_vs_measured": predicted_vs_measured(data, fits) if fits else None,
        "residuals": residuals(data, fits) if fits else None,
        "realised_ratio": realised_ratio(data),
    }


def summary(analysis: "Analysis") -> list[dict[str, Any]]:
    """What was asked, what was spent, what the answer is, how sure: headings with sentences."""
    data = analysis.data
    asked = []
    for family in ("dlcm", "dense"):
        rows = data.of_family(family)
        if len(rows):
            axes = [("size", "sizes", rows.N), ("number of tokens", "numbers of tokens", rows.D)]
            if family == "dlcm":
                axes += [
                    ("compression ratio", "compression ratios", rows.R),
                    ("backbone share", "backbone shares", rows.P),
                ]
            counts = [(len(levels(v[v > 0].tolist())), one, many) for one, many, v in axes]
            values = ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts)
            asked.append(f"{count_runs(len(rows))} of {'DLCMs' if family == 'dlcm' else 'dense models'}: {values}.")
    answer = [
        f"{_VERDICTS[f]}, {analysis.optima[f].verdict}. {analysis.optima[f].report()}"
        for f in ("dlcm", "dense")
        if f in analysis.optima
    ]
    if analysis.savings is not None:
        answer.append(analysis.savings.text[0].upper() + analysis.savings.text[1:] + ".")
    return [
        {"heading": "What was asked", "lines": asked},
        {"heading": "What was spent", "lines": _spent(data)},
        {"heading": "How sure", "lines": _sure(analysis)},
        {"heading": "The answer", "lines": answer or ["None: see what is missing, below."]},
    ]


def _spent(data: ResultsData) -> list[str]:
    frame = data.frame
    column = "flops_train_marginal" if "flops_train_marginal" in frame else "flops_train"
    total = np.nansum(np.asarray(frame[column], dtype=float)) if column in frame else np.nansum(data.C)
    lines = [f"{total:.3g} training FLOPs" + (", shared trunks counted once" if "marginal" in column else "") + "."]
    if "wall_s" in frame:
        hours = float(np.nansum(np.asarray(frame["wall_s"], dtype=float))) / 3600
        devices = ", ".join(sorted({str(d) for d in frame["device"].dropna()})) if "device" in frame else ""
        lines.append(f"{hours:.3g} hours of training{f' on {devices}' if devices else ''}.")
    return lines


def _sure(analysis: "Analysis") -> list[str]:
    lines = []
    for family, fit in analysis.fits.items():
        unknown = [p.name for p in fit.parameters if p.status == "not_identified"]
        name = "DLCM" if family == "dlcm" else "dense"
        which = f"not identified: {', '.join(unknown)}" if unknown else "every constant that is not held is identified"
        missed = f"it misses its {count_runs(fit.n_runs)} by {100 * fit.rms:.2g}% (root mean square)"
        lines.append(f"The {name} law is {fit.status.replace('_', ' ')}: {missed}; {which}.")
    if analysis.data.exclusions:
        lines.append(f"{count_runs(len(analysis.data.exclusions))} left out, listed below: the answer is provisional.")
    lines.append("Intervals are 95%, over runs; they do not hold what a wrong law would add.")
    return lines


def run_table(analysis: "Analysis") -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Columns and rows of the table of runs: the accuracy table, which has costs, loss and tasks."""
    frame = analysis.table.frame
    shown = [
        c for c in frame.columns if not str(c).endswith(("_stderr", "_low", "_high")) and not str(c).startswith("bpb_")
    ]
    columns = [{"name": str(c).replace("_", " "), "number": frame[c].dtype.kind in "fiu"} for c in shown]
    rows = [[_cell(frame[c].iloc[i]) for c in shown] for i in range(len(frame))]
    return columns, rows


def _cell(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    number = float(value)
    return float(f"{number:.6g}") if np.isfinite(number) else None


def configs(data: ResultsData) -> dict[str, Any]:
    """The runs' configs as keys with dots: what all share once, and of each run the rest. Empty apart from a sweep."""
    folder = Path(data.source).parent
    flat = {}
    for run in data.run_ids:
        path = folder / run / "run.json"
        if path.exists():
            flat[run] = dict(_flatten(read_json(path)))
    if not flat:
        return {"shared": {}, "runs": {}}
    first = next(iter(flat.values()))
    shared = {k: v for k, v in first.items() if all(k in f and f[k] == v for f in flat.values())}
    return {"shared": shared, "runs": {run: {k: v for k, v in f.items() if k not in shared} for run, f in flat.items()}}


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for k, v in value.items() for pair in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, value)]


def _cards(fits: Mapping[str, FitResult]) -> list[dict[str, Any]]:
    found = []
    for family, fit in fits.items():
        found.append(
            {
                "title": f"{'DLCM' if family == 'dlcm' else 'Dense'}: {fit.law.name}",
                "status": str(fit.status).replace("_", " "),
                "equation": fit.law.equation,
                "parameters": "\n".join(line.strip() for line in format_parameters(fit)),
                "notes": list(fit.notes),
                "findings": [finding.describe() for finding in fit.findings],
                "rows": list(card(fit).items()),
            }
        )
    return found


def _provenance(analysis: "Analysis") -> list[tuple[str, str]]:
    from importlib.metadata import version

    from dlcm.provenance import source_commit

    data = analysis.data
    commit, dirty = source_commit()
    lines = [("results", data.source), ("results hash", data.hash)]
    lines += [(symbol, text) for symbol, text in data.convention.definitions().items()]
    if "commit" in data.frame:
        lines.append(
            ("commits of the runs", ", ".join(sorted({str(c) for c in data.frame["commit"].dropna()})) or "unknown")
        )
    lines.append(("commit of this report", (commit or "unknown") + (" with changes" if dirty else "")))
    return [*lines, ("dlcm-scaling", version("dlcm-scaling")), ("plotly", version("plotly"))]
