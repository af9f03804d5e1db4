"""FLOPs against accuracy as a table: CSV for programs, Markdown for the web, LaTeX (booktabs) for papers."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.data import ResultsData, numeric_column, require_columns
from dlcm.errors import UserError, nearest

Format = Literal["csv", "md", "tex"]
AVERAGE = "average"
PERCENT_DIGITS = 2

_FACTS = ("run_id", "model", "tokens", "flops_train", "flops_per_token_forward", "bits_per_byte", "compression_target")


def task_columns(frame: pd.DataFrame) -> list[str]:
    """Tasks with an accuracy in a results table: those of columns `acc_<task>`, sorted."""
    names = [str(c) for c in frame.columns]
    tasks = [n.removeprefix("acc_") for n in names if n.startswith("acc_") and not n.startswith("acc_norm_")]
    return sorted(t for t in tasks if not t.endswith("_stderr") and not all(pd.isna(v) for v in frame[f"acc_{t}"]))


def flops_vs_accuracy(data: ResultsData) -> pd.DataFrame:
    """One row a run, cheapest first: size, share, realised ratio, FLOPs, loss, accuracy of each task with standard error.

    Accuracies are in percent, rounded as they are printed; the last column is the macro average of the printed ones. A
    run that lacks a task has no average: means over different tasks do not compare.

    Raises:
        UserError: the results lack a column.
    """
    require_columns(data.frame, _FACTS, data.source)
    frame = data.frame
    table = pd.DataFrame(
        {
            "run": frame["run_id"].astype(str),
            "model": frame["model"].astype(str),
            "params_non_embedding": (
                numeric_column(frame, "params_total", data.source)
                - numeric_column(frame, "params_embedding", data.source)
            ),
            "concept_share": data.P,
            "tokens_per_concept": data.R,
            "tokens": data.D,
            "flops_train": data.C,
            "flops_per_token_forward": numeric_column(frame, "flops_per_token_forward", data.source),
            "loss_nats": data.loss,
            "bits_per_byte": numeric_column(frame, "bits_per_byte", data.source),
        }
    )
    tasks = task_columns(frame)
    for task in tasks:
        table[f"acc_{task}"] = np.round(100 * numeric_column(frame, f"acc_{task}", data.source), PERCENT_DIGITS)
        if f"acc_{task}_stderr" in frame:
            error = 100 * numeric_column(frame, f"acc_{task}_stderr", data.source)
            table[f"acc_{task}_stderr"] = np.round(error, PERCENT_DIGITS)
    if tasks:
        table[AVERAGE] = macro_average(table, [f"acc_{t}" for t in tasks])
    for column in ("params_non_embedding", "tokens"):
        table[column] = table[column].round().astype("int64")
    return table.sort_values(["flops_train", "run"], kind="stable").reset_index(drop=True)


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
    "concept_share": ("P", lambda v: f"{v:.2f}"),
    "tokens_per_concept": ("R", lambda v: f"{v:.2f}"),
    "tokens": ("tokens", lambda v: _scaled(v)),
    "flops_train": ("train FLOPs", lambda v: f"{v:.2e}"),
    "flops_per_token_forward": ("FLOPs/token", lambda v: f"{v:.2e}"),
    "loss_nats": ("loss (nats)", lambda v: f"{v:.4f}"),
    "bits_per_byte": ("bits/byte", lambda v: f"{v:.4f}"),
}


def format_table(frame: pd.DataFrame, fmt: Format) -> str:
    """A table as text.

    Args:
        frame: from `flops_vs_accuracy`, or any other.
        fmt: `csv`, `md` or `tex`.

    Raises:
        UserError: unknown format.
    """
    if fmt == "csv":
        return frame.to_csv(index=False, lineterminator="\n")
    if fmt not in ("md", "tex"):
        raise UserError(f"unknown table format {fmt!r}{nearest(str(fmt), ('csv', 'md', 'tex'))}")
    heads, rows, is_number = _printed(frame, plus_minus=" ± " if fmt == "md" else r" $\pm$ ")
    return _markdown(heads, rows, is_number) if fmt == "md" else _latex(heads, rows, is_number)


def _printed(frame: pd.DataFrame, plus_minus: str) -> tuple[list[str], list[list[str]], list[bool]]:
    """Heads, cells, and which columns are numbers; a standard error joins the cell of its value."""
    heads, columns, is_number = [], [], []
    for name in map(str, frame.columns):
        if name.endswith("_stderr") and name.removesuffix("_stderr") in frame.columns:
            continue
        number = pd.api.types.is_numeric_dtype(frame[name])
        head, show = _PRINTED.get(name, (_head(name), _plain))
        cells = [show(float(v)) if number and pd.notna(v) else ("-" if pd.isna(v) else str(v)) for v in frame[name]]
        error = f"{name}_stderr"
        if error in frame.columns:
            cells = [
                c if pd.isna(e) or c == "-" else f"{c}{plus_minus}{_plain(e)}" for c, e in zip(cells, frame[error])
            ]
        heads.append(head)
        columns.append(cells)
        is_number.append(bool(number))
    return heads, [list(row) for row in zip(*columns)], is_number


def _head(name: str) -> str:
    return f"{name.removeprefix('acc_')} (%)" if name.startswith("acc_") else f"{name} (%)" if name == AVERAGE else name


def _plain(value: float) -> str:
    return f"{value:.{PERCENT_DIGITS}f}"


def _scaled(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _markdown(heads: list[str], rows: list[list[str]], is_number: list[bool]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |"

    rule = ["---:" if number else "---" for number in is_number]
    return "\n".join([line(heads), line(rule), *(line(row) for row in rows)]) + "\n"


def _latex(heads: list[str], rows: list[list[str]], is_number: list[bool]) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escape(c) for c in cells) + r" \\"

    columns = "".join("r" if number else "l" for number in is_number)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(heads), r"\midrule", *(line(row) for row in rows)]
    return "% needs \\usepackage{booktabs}\n" + "\n".join([*body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape(text: str) -> str:
    escaped = re.sub(r"([&%#_{}])", r"\\\1", text)
    return re.sub(r"^(\d\.\d+)e([+-])0*(\d+)$", lambda m: f"${m[1]}\\times 10^{{{m[2].strip('+')}{m[3]}}}$", escaped)
