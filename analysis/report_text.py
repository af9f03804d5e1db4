"""The summary of an analysis in plain language: Markdown that reads well on a terminal."""

import os
import textwrap
from collections import Counter
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.compare import RATIO_TOLERANCE
from analysis.data import numeric_column
from analysis.design import count_runs
from analysis.identify import describe_axis
from analysis.result_text import format_parameters
from analysis.tables import format_table
from sweeps.epochs import describe_repeats

if TYPE_CHECKING:
    from analysis.report import Analysis

_NAMES = {"dense": "Dense baseline", "dlcm": "DLCM"}
_WIDTH = 116
_MANY_RUNS = 40
"""Runs from which a table has a row for each target, not for each run."""


def format_summary(analysis: "Analysis") -> str:
    """All sections, in the order in which a reader asks."""
    sections = (_runs, _laws, _optimum, _against_dense, _ratios, _support, _files)
    return "\n\n".join("\n".join(section(analysis)) for section in sections)


def _runs(analysis: "Analysis") -> list[str]:
    data = analysis.data
    counts = Counter(data.frame["model"].astype(str))
    families = ", ".join(f"{n} {family}" for family, n in sorted(counts.items()))
    lines = [
        "# What the runs say",
        "",
        f"{len(data)} finished run{'s' * (len(data) != 1)} ({families}) of {data.source}, data hash {data.hash}.",
        "",
    ]
    if data.exclusions:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(e.reason for e in data.exclusions).items())
        lines += _items([f"left out, so what follows is provisional: {reasons}"])
    if "epochs" in data.frame and (repeats := describe_repeats(numeric_column(data.frame, "epochs", data.source))):
        lines += _items([repeats])
    lines += _items([f"{symbol}: {meaning}" for symbol, meaning in data.convention.definitions().items()])
    return lines


def _laws(analysis: "Analysis") -> list[str]:
    lines = ["## Fitted laws"]
    for family, result in analysis.fits.items():
        error = f"root mean square relative error {100 * result.rms:.2g}%"
        fit_line = f"{count_runs(result.n_runs)}, {result.n_free} free constants, {error}"
        lines += ["", f"{_NAMES[family]}: {result.status}, {fit_line}", "", f"    {result.law.equation}"]
        lines += [f"  {line}" for line in format_parameters(result)]
        lines += _block(_items(list(result.notes)))
    return lines


def _optimum(analysis: "Analysis") -> list[str]:
    lines = [f"## Best allocation of {analysis.budget:.3g} training FLOPs"]
    for family, best in analysis.optima.items():
        lines += ["", f"{_NAMES[family]}: {best.verdict}. {best.headline}", ""]
        lines += [f"    {choice.describe()}" for choice in best.choices]
        lines += _block(_items(list(best.notes)))
    if not analysis.optima:
        lines += ["", "None: see what is missing, below."]
    return lines


def _against_dense(analysis: "Analysis") -> list[str]:
    lines = ["## DLCM against the dense baseline"]
    measured = [f"measured, {c.describe()}" for c in analysis.comparisons]
    if not measured:
        measured = ["measured: no budget at which both families were run"]
    if analysis.savings is not None:
        measured.append(f"predicted at equal loss: {analysis.savings.text}")
    return [*lines, "", *_items(measured)]


def _ratios(analysis: "Analysis") -> list[str]:
    lines = [
        f"## Realised tokens per concept (held: training and evaluation both within {100 * RATIO_TOLERANCE:g}% of the target)",
        "",
    ]
    if not len(analysis.ratios):
        return [*lines, "The ratios that were asked for are not known." if len(analysis.data.dlcm) else "No DLCM run."]
    n_held = list(analysis.ratios["held"]).count("yes")
    few = len(analysis.ratios) <= _MANY_RUNS
    return [
        *lines,
        format_table(analysis.ratios if few else _by_target(analysis.ratios), "md").rstrip(),
        "",
        f"{n_held} of {len(analysis.ratios)} runs are held."
        + ("" if few else " tables/realised_ratios.csv has each of them."),
    ]


def _by_target(ratios: pd.DataFrame) -> pd.DataFrame:
    """One row a target: the ends of what its runs realised."""
    rows = []
    for target in sorted(set(ratios["target R"])):
        runs = ratios[ratios["target R"] == target]
        row: dict[str, Any] = {"target R": target, "runs": len(runs)}
        for kind in ("training R", "evaluation R"):
            row |= {f"least {kind}": runs[kind].min(), f"largest {kind}": runs[kind].max()}
        rows.append(row | {"held": list(runs["held"]).count("yes")})
    return pd.DataFrame(rows)


def _support(analysis: "Analysis") -> list[str]:
    lines = ["## What these data can and cannot support"]
    for family, support in analysis.support.items():
        seeds = f"{support.n_seeds} seed{'s' if support.n_seeds != 1 else ''}"
        lines += ["", f"{_NAMES[family]}: {count_runs(support.n_runs)}, {seeds}, {support.n_repeated} designs repeated"]
        lines += ["", *(f"    {describe_axis(axis)}" for axis in support.axes)]
        cannot = [*support.warnings]
        result = analysis.fits.get(family)
        if result is not None:
            known = [p.name for p in result.parameters if p.identified]
            cannot.append(
                f"constants identified: {', '.join(known) or 'none'}; the law may be read inside the ranges above only"
            )
        lines += _block(_items(cannot))
    if analysis.missing:
        lines += ["", "Missing:", *_items(list(analysis.missing))]
    return lines


def _files(analysis: "Analysis") -> list[str]:
    folders = Counter(str(path.parent) for path in analysis.files)
    names = {folder: [p.name for p in analysis.files if str(p.parent) == folder] for folder in folders}
    return ["## Files", "", *_items([f"{folder}{os.sep}: {', '.join(entries)}" for folder, entries in names.items()])]


def _block(lines: list[str]) -> list[str]:
    return ["", *lines] if lines else []


def _items(lines: list[str]) -> list[str]:
    wrapped = []
    for line in lines:
        wrapped += textwrap.wrap(line, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
    return wrapped
