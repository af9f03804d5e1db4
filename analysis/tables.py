"""Tables as text: CSV for programs, Markdown for the web, LaTeX (booktabs) for papers; and averages of what is printed."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.frames import require_columns
from dlcm.errors import UserError, nearest

Format = Literal["csv", "md", "tex"]
AVERAGE = "average"
PERCENT_DIGITS = 2


def macro_average(table: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Mean over `columns` of each row, from the values as printed; empty where one of them is.

    Raises:
        UserError: no column, or one that the table lacks.
    """
    if not columns:
        raise UserError("a macro average needs at least one column of accuracies")
    require_columns(table, columns, "table")
    return table[list(columns)].mean(axis=1, skipna=False).round(PERCENT_DIGITS)


def with_average_row(table: pd.DataFrame, columns: Sequence[str], *, label: str = AVERAGE) -> pd.DataFrame:
    """The table (one row a task, one column a model) with a last row of the means of its own rows.

    Args:
        table: first column names the task.
        columns: the models.
        label: name of the new row.
    """
    require_columns(table, columns, "table")
    row: dict[str, Any] = {str(table.columns[0]): label}
    row |= {c: round(float(np.mean(np.asarray(table[c], dtype=float))), PERCENT_DIGITS) for c in columns}
    return pd.concat([table, pd.DataFrame([row])], ignore_index=True)


# How a column is headed and printed in a table for people. CSV keeps the plain names and full numbers.
_PRINTED: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "params_non_embedding": ("N", lambda v: _scaled(v)),
    "params_token": ("token", lambda v: _scaled(v)),
    "params_concept": ("concept", lambda v: _scaled(v)),
    "params_embedding": ("embedding", lambda v: _scaled(v)),
    "compression_target": ("target R", lambda v: f"{v:g}"),
    "seed": ("seed", lambda v: f"{v:g}"),
    "params": ("N", lambda v: _scaled(v)),
    "concept_share": ("P", lambda v: f"{v:.2f}"),
    "tokens_per_concept": ("R", lambda v: f"{v:.2f}"),
    "tokens": ("tokens", lambda v: _scaled(v)),
    "flops_train": ("train FLOPs", lambda v: f"{v:.2e}"),
    "flops_per_token_forward": ("prefill FLOPs/token", lambda v: f"{v:.2e}"),
    "flops_per_token_decode": ("decode FLOPs/token", lambda v: f"{v:.2e}"),
    "loss_nats": ("loss (nats)", lambda v: f"{v:.4f}"),
    "bits_per_byte": ("bits/byte", lambda v: f"{v:.4f}"),
    "gain": ("gain (points)", lambda v: f"{v:+.2f}"),
    "saved": ("saved (%)", lambda v: f"{v:+.1f}"),
    # of best allocations
    "budget": ("budget", lambda v: f"{v:.2e}"),
    "N": ("N", lambda v: _scaled(v)),
    "D": ("D", lambda v: _scaled(v)),
    "R": ("R", lambda v: f"{v:.3g}"),
    "P": ("P", lambda v: f"{v:.3f}"),
    "loss": ("loss (nats)", lambda v: f"{v:.4f}"),
    "decades_outside": ("decades outside", lambda v: f"{v:.2f}"),
}


def format_table(
    frame: pd.DataFrame,
    fmt: Format,
    *,
    bold: Collection[tuple[int, str]] = frozenset(),
    breaks: Collection[int] = (),
) -> str:
    """A table as text.

    In tables for people `x_stderr` joins the cell of `x` as x ± error, and `x_low`, `x_high` as x [low, high].

    Args:
        frame: any table.
        fmt: `csv`, `md` or `tex`.
        bold: (row, column) of cells to be set in bold.
        breaks: rows before which a rule is drawn (LaTeX) or an empty row set (Markdown).

    Raises:
        UserError: unknown format.
    """
    if fmt == "csv":
        return frame.to_csv(index=False, lineterminator="\n")
    if fmt not in ("md", "tex"):
        raise UserError(f"unknown table format {fmt!r}{nearest(str(fmt), ('csv', 'md', 'tex'))}")
    heads, rows, is_number, names = _printed(frame)
    strong = {(row, names.index(column)) for row, column in bold if column in names}
    return (_markdown if fmt == "md" else _latex)(heads, rows, is_number, strong, set(breaks))


_JOINED = ("_stderr", "_low", "_high")


def _printed(frame: pd.DataFrame) -> tuple[list[str], list[list[str]], list[bool], list[str]]:
    """Heads, cells, which columns are numbers, and their names; errors and intervals join the cells of their values."""
    heads, columns, is_number, names = [], [], [], []
    for name in map(str, frame.columns):
        if any(name.endswith(end) and name.removesuffix(end) in frame.columns for end in _JOINED):
            continue
        number = pd.api.types.is_numeric_dtype(frame[name])
        whole = pd.api.types.is_integer_dtype(frame[name])
        head, show = _PRINTED.get(name, (_head(name), "{:.0f}".format if whole else _plain))
        cells = [show(float(v)) if number and pd.notna(v) else ("-" if pd.isna(v) else str(v)) for v in frame[name]]
        error, low, high = (f"{name}{end}" for end in _JOINED)
        if error in frame.columns:
            cells = [c if pd.isna(e) or c == "-" else f"{c} ± {_plain(e)}" for c, e in zip(cells, frame[error])]
        if low in frame.columns and high in frame.columns:
            ends = [["?" if pd.isna(v) else show(float(v)) for v in frame[end]] for end in (low, high)]
            cells = [c if c == "-" or a == b == "?" else f"{c} [{a}, {b}]" for c, a, b in zip(cells, *ends)]
        heads.append(head)
        columns.append(cells)
        is_number.append(bool(number))
        names.append(name)
    return heads, [list(row) for row in zip(*columns)], is_number, names


def _head(name: str) -> str:
    return f"{name.removeprefix('acc_')} (%)" if name.startswith("acc_") else f"{name} (%)" if name == AVERAGE else name


def _plain(value: float) -> str:
    return f"{value:.{PERCENT_DIGITS}f}"


def _scaled(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


_Cells = set[tuple[int, int]]


def _markdown(
    heads: list[str], rows: list[list[str]], is_number: list[bool], bold: _Cells, breaks: Collection[int]
) -> str:
    def line(cells: Sequence[str], row: int = -1) -> str:
        shown = [c.replace("|", r"\|") for c in cells]
        return "| " + " | ".join(f"**{c}**" if (row, i) in bold else c for i, c in enumerate(shown)) + " |"

    rule = ["---:" if number else "---" for number in is_number]
    lines = [line(heads), line(rule)]
    for i, row in enumerate(rows):
        lines += [line([""] * len(heads))] if i in breaks else []
        lines.append(line(row, i))
    return "\n".join(lines) + "\n"


def _latex(
    heads: list[str], rows: list[list[str]], is_number: list[bool], bold: _Cells, breaks: Collection[int]
) -> str:
    def line(cells: Sequence[str], row: int = -1) -> str:
        shown = [escape_latex(c) for c in cells]
        return " & ".join(rf"\textbf{{{c}}}" if (row, i) in bold else c for i, c in enumerate(shown)) + r" \\"

    columns = "".join("r" if number else "l" for number in is_number)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(heads), r"\midrule"]
    for i, row in enumerate(rows):
        body += [r"\midrule"] if i in breaks else []
        body.append(line(row, i))
    return "% needs \\usepackage{booktabs}\n" + "\n".join([*body, r"\bottomrule", r"\end{tabular}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
}


def escape_latex(text: str) -> str:
    """Text as LaTeX that prints the same; a number such as 1.20e+05 becomes a power of ten."""
    escaped = "".join(_LATEX.get(c, "\\" + c if c in "&%#_{}$" else c) for c in text)
    return re.sub(r"^(\d\.\d+)e([+-])0*(\d+)$", lambda m: f"${m[1]}\\times 10^{{{m[2].strip('+')}{m[3]}}}$", escaped)
