"""A fit as tables: its constants and its card, as CSV for programs, Markdown for the web, LaTeX (booktabs) for papers."""

import math

import numpy as np
import pandas as pd

from analysis.law_text import symbol
from analysis.result import Estimate, FitResult, ParameterStatus
from analysis.tables import escape_latex
from dlcm.errors import UserError, nearest

_FORMATS = ("csv", "md", "tex")
Cells = list[list[str]]


def parameter_table(result: FitResult) -> pd.DataFrame:
    """One row a constant, full numbers; a value that is not identified is empty, its status and reason are not."""
    rows = []
    for p in result.parameters:
        profile, spread = p.profile or (None, None), p.spread or (None, None)
        rows.append(
            {
                "law": result.law.name,
                "parameter": p.name,
                "value": p.value,
                "low": p.low if p.value is not None else None,
                "high": p.high if p.value is not None else None,
                "profile_low": profile[0] if p.value is not None else None,
                "profile_high": profile[1] if p.value is not None else None,
                "losses_low": spread[0] if p.value is not None else None,
                "losses_high": spread[1] if p.value is not None else None,
                "status": str(p.status),
                "reason": p.reason,
            }
        )
    frame = pd.DataFrame(rows)
    numbers = ["value", "low", "high", "profile_low", "profile_high", "losses_low", "losses_high"]
    return frame.astype(dict.fromkeys(numbers, "float64")).replace([np.inf, -np.inf], np.nan)


def card(result: FitResult) -> dict[str, str]:
    """What a reader needs to repeat the fit: law, loss, optimiser, starts, exclusions, definitions, data."""
    delta = f", delta {result.delta:g}" if result.loss == "log_huber" else ""
    left_out: dict[str, int] = {}
    for exclusion in result.exclusions:
        left_out[exclusion.reason] = left_out.get(exclusion.reason, 0) + 1
    reduced = "; ".join(change.describe() for change in result.law.changes)
    return {
        "law": f"{result.law.name} ({result.law.source})" if result.law.source else result.law.name,
        "status": str(result.status),
        "reduced": reduced or "no",
        "runs": f"{result.n_runs} ({result.n_clusters} independent)",
        "left out": ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "no run",
        "objective": f"{result.objective:.6g}, sum of {result.loss}{delta}",
        "fit error": f"{100 * result.rms:.3g}% rms",
        "optimiser": "damped Gauss-Newton and Newton from variable-projection starts, L-BFGS-B polish, analytic gradient",
        "starts": f"{result.n_starts}, {100 * result.share_best:.0f}% reach the best objective; seed {result.seed}",
        "condition number": f"{result.condition:.2g}, centred and scaled",
        "intervals": f"95%, bootstrap by cluster, {len(result.replicates)} refits"
        if len(result.replicates)
        else "none",
        **result.convention.definitions(),
        "data": f"{result.source}, hash {result.data_hash}",
    }


def format_fit(result: FitResult, fmt: str) -> str:
    """Constants and card as text.

    Args:
        result: the fit.
        fmt: `csv` (constants alone, full numbers), `md` or `tex`.

    Raises:
        UserError: unknown format.
    """
    if fmt not in _FORMATS:
        raise UserError(f"unknown table format {fmt!r}{nearest(str(fmt), _FORMATS)}")
    if fmt == "csv":
        return parameter_table(result).to_csv(index=False, lineterminator="\n")
    heads = ["parameter", "value", "95% interval", "profile", "over losses", "status"]
    rows = [_row(p, latex=fmt == "tex") for p in result.parameters]
    facts = [[key, value] for key, value in card(result).items()]
    if fmt == "md":
        blocks = [f"`{result.law.equation}`", _markdown(heads, rows)]
        if result.findings:
            blocks.append("\n".join(f"- {finding.describe()}" for finding in result.findings))
        return "\n\n".join([*blocks, _markdown(["fit card", ""], facts)]) + "\n"
    equation = rf"\[ {result.law.latex} \]"
    cells = [[*row[:1], *map(_escaped, row[1:])] for row in rows]
    facts = [[escape_latex(cell) for cell in row] for row in facts]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            equation,
            "",
            _latex([escape_latex(h) for h in heads], cells, "lrlllp{0.3\\linewidth}"),
            "",
            _latex(["fit card", ""], facts, "lp{0.75\\linewidth}"),
            "",
        ]
    )


def _row(p: Estimate, *, latex: bool) -> list[str]:
    name = f"${symbol(p.name, latex=True)}$" if latex else p.name
    dash = "--" if latex else "-"
    if p.status is ParameterStatus.NOT_IDENTIFIED:
        return [name, dash, dash, dash, dash, f"not identified: {p.reason}"]
    status = {"held": "held", "at_bound": "at bound"}.get(str(p.status), str(p.status))
    pairs = [_pair((p.low, p.high), dash), _pair(p.profile, dash), _pair(p.spread, dash)]
    return [name, f"{p.working_value:.4g}", *pairs, status + (f": {p.reason}" if p.reason else "")]


def _pair(ends: tuple[float | None, float | None] | None, dash: str) -> str:
    low, high = ends or (None, None)
    if low is None or high is None:
        return dash
    return " to ".join(f"{end:.4g}" if math.isfinite(end) else "open" for end in (low, high))


def _escaped(cell: str) -> str:
    return escape_latex(cell) if cell != "--" else cell


def _markdown(heads: list[str], rows: Cells) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _latex(heads: list[str], rows: Cells, columns: str) -> str:
    body = [" & ".join(row) + r" \\" for row in rows]
    head = " & ".join(heads) + r" \\"
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    )
