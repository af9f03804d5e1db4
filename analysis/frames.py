"""Tables on disk: found, read, and their columns checked, with errors that name the file, the column and the row."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dlcm.errors import UserError, nearest

Array = np.ndarray


def find_results(path: str | Path) -> Path:
    """The results file at `path`: the file itself, or `results.parquet` / `results.csv` inside a folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("results.parquet", "results.csv"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path}: no results.parquet in this folder; run `dlcm sweep collect {path}` first")
    if not path.exists():
        raise UserError(f"{path}: no such file; give a results.parquet or .csv, or a sweep folder")
    return path


def read_table(file: Path) -> pd.DataFrame:
    """Read a parquet or CSV table.

    Raises:
        UserError: other suffix, unreadable, or no rows.
    """
    suffix = file.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise UserError(f"{file}: results are read from .parquet or .csv, not {suffix or 'a file without suffix'}")
    try:
        frame = pd.read_parquet(file) if suffix == ".parquet" else pd.read_csv(file)
    except (OSError, ValueError) as error:
        # pyarrow's and pandas' parser errors are all ValueErrors or OSErrors; their first line says what is broken
        detail = (str(error).splitlines() or ["empty"])[0]
        way_out = "collect the sweep again, or mend the file"
        raise UserError(f"{file}: not readable as {suffix[1:]} ({detail}); {way_out}") from None
    if frame.empty:
        raise UserError(
            f"{file}: no rows; collect the sweep after at least one run has ended, or give a table with rows"
        )
    return frame


def require_columns(frame: pd.DataFrame, columns: Iterable[str], source: str) -> None:
    """Check that columns exist.

    Raises:
        UserError: the file, the missing column, and the nearest that exists.
    """
    for column in columns:
        if column not in frame.columns:
            raise UserError(f"{source}: no column {column!r}{nearest(column, map(str, frame.columns))}")


def numeric_column(frame: pd.DataFrame, column: str, source: str) -> Array:
    """A column as float64, NaN where empty.

    Raises:
        UserError: the column is missing or holds something that is no number.
    """
    require_columns(frame, [column], source)
    series = pd.Series(frame[column])
    numbers = pd.Series(pd.to_numeric(series, errors="coerce")).to_numpy(dtype=float, na_value=np.nan)
    bad = np.flatnonzero(np.isnan(numbers) & series.notna().to_numpy())
    if bad.size:
        row = int(bad[0])
        raise UserError(f"{source}: column {column!r} holds {series.iloc[row]!r} in row {row + 1}; expected a number")
    return numbers


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON types: NaN and missing become null."""
    return json.loads(str(frame.to_json(orient="records")))
