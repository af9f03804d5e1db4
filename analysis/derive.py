"""From a table to the arrays that laws are fitted to, with a reason for every row that is left out.

The functions return what makes up a `ResultsData`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import SYMBOLS, Mapped
from analysis.convention import C_COLUMN, R_COLUMN, Convention, Exclusion
from analysis.frames import numeric_column, require_columns
from dlcm.errors import UserError

Array = np.ndarray


def from_frame(frame: pd.DataFrame, convention: Convention, source: str) -> dict[str, Any]:
    """Derive N, D, C, R, P and the loss from a results table; see `load_results`."""
    require_columns(frame, ("run_id", "model", "status"), source)
    if convention.c == "full" and "flops_train_full" not in frame:
        raise UserError(
            f"{source}: no column 'flops_train_full', so C cannot be counted with full squares; use c='causal'"
        )
    columns = {"D": "tokens", "C": C_COLUMN[convention.c], "R": R_COLUMN[convention.r], "loss": "loss_nats"}
    arrays = {"N": count_parameters(frame, convention.n, source), "P": _share(frame, source)}
    arrays |= {key: numeric_column(frame, column, source) for key, column in columns.items()}
    return _usable(frame, arrays, columns, convention, source)


def from_mapped(
    frame: pd.DataFrame, mapping: Mapping[str, str], n: str | None, convention: Convention, source: str
) -> dict[str, Any]:
    """Symbols from a table of other names; see `load_results`.

    Args:
        frame: the table.
        mapping: symbol or column of this toolkit -> column or expression.
        n: what the user says that N is; None where nothing is said.
        convention: meaning of what is read from this toolkit's columns.
        source: opens the error messages.
    """
    mapped = Mapped(frame, mapping, source)
    frame = mapped.with_columns()
    own = {"D": "tokens", "C": C_COLUMN[convention.c], "R": R_COLUMN[convention.r], "loss": "loss_nats"}
    arrays, names, meaning = {}, {}, {}
    for key in SYMBOLS:
        if key in mapping:
            arrays[key], names[key] = mapped.numbers(key), mapping[key]
            meaning[key.lower()] = n if key == "N" and n else f"as given ({key} = {mapping[key]})"
        elif key == "N" and "params_total" in frame:
            arrays[key] = count_parameters(frame, convention.n, source)
        elif key == "P" and "params_concept" in frame:
            arrays[key] = _share(frame, source)
        elif own.get(key) in frame:
            arrays[key], names[key] = numeric_column(frame, own[key], source), own[key]
        elif key in ("N", "D", "loss"):
            raise UserError(
                f"{source}: nothing says what {key} is; give it with --columns {key}=..., from: "
                f"{', '.join(map(str, frame.columns))}"
            )
        else:
            arrays[key] = np.full(len(frame), {"C": np.nan, "R": 1.0, "P": 0.0}[key])
            meaning[key.lower()] = {"C": "not given", "R": "not given: 1", "P": "not given: 0"}[key]
    defaults: dict[str, Any] = {}
    if "run_id" not in frame:
        defaults["run_id"] = [f"row{i + 1}" for i in range(len(frame))]
    if "status" not in frame:
        defaults["status"] = "finished"
    if "model" not in frame:
        defaults["model"] = np.where((arrays["R"] > 1) | (arrays["P"] > 0), "dlcm", "dense")
    frame = frame.assign(**defaults)
    dense = frame["model"].eq("dense").to_numpy()
    for key, value in (("R", 1.0), ("P", 0.0)):
        arrays[key] = np.where(dense & np.isnan(arrays[key]), value, arrays[key])
    convention = dataclasses.replace(convention, **meaning)
    rows = [
        f"{run} at {tokens}" for run, tokens in zip(frame["run_id"], arrays["D"])
    ]  # rows of a run may be checkpoints
    needed = [key for key in ("N", "D", "C", "R", "P") if not (key == "C" and np.isnan(arrays["C"]).all())]
    return _usable(frame, arrays, names, convention, source, rows=rows, needed=needed)


def count_parameters(frame: pd.DataFrame, n: str, source: str) -> Array:
    """N of each row under a convention, from the columns that hold both.

    Raises:
        UserError: a column is missing or not numeric.
    """
    total = numeric_column(frame, "params_total", source)
    return total - numeric_column(frame, "params_embedding", source) if n == "non_embedding" else total


def _share(frame: pd.DataFrame, source: str) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return numeric_column(frame, "params_concept", source) / count_parameters(frame, "non_embedding", source)


def _usable(
    frame: pd.DataFrame,
    arrays: Mapping[str, Array],
    columns: Mapping[str, str],
    convention: Convention,
    source: str,
    rows: Sequence[str] | None = None,
    needed: Sequence[str] = ("N", "D", "C", "R", "P"),
) -> dict[str, Any]:
    """The rows that a law can be fitted to: finished, with a loss and all that is `needed`, no name in `rows` twice."""
    reasons = _reasons(frame, arrays, columns, rows or frame["run_id"].astype(str).tolist(), needed)
    keep = np.array([reason is None for reason in reasons])
    families = frame["model"].astype(str)
    exclusions = tuple(
        Exclusion(str(i), r, family) for i, r, family in zip(frame["run_id"], reasons, families) if r is not None
    )
    if not keep.any():
        first = exclusions[0]
        raise UserError(f"{source}: none of {len(frame)} runs is usable; the first, {first.run_id}: {first.reason}")
    kept = {key: value[keep] for key, value in arrays.items()}
    facts = {
        "frame": frame.loc[keep].reset_index(drop=True),
        "exclusions": exclusions,
        "convention": convention,
        "source": source,
    }
    return {**kept, **facts}


def _reasons(
    frame: pd.DataFrame,
    arrays: Mapping[str, Array],
    columns: Mapping[str, str],
    rows: Sequence[str],
    needed: Sequence[str],
) -> list[str | None]:
    """Why each row is left out; None where it is used."""
    first_seen: dict[str, int] = {}
    reasons: list[str | None] = []
    for i, (run_id, status) in enumerate(zip(rows, frame["status"].astype(str))):
        reason = None
        if run_id in first_seen:
            twin = first_seen[run_id]
            same = arrays["loss"][i] == arrays["loss"][twin]
            reason = f"duplicate of row {twin + 1}" + ("" if same else ", with another loss")
        elif status != "finished":
            reason = status
        elif not np.isfinite(arrays["loss"][i]):
            reason = "missing loss"
        elif arrays["loss"][i] <= 0:
            reason = f"loss {arrays['loss'][i]:g} is not positive"
        else:
            for key in needed:
                value = arrays[key][i]
                if not np.isfinite(value) or value < 0 or (value == 0 and key != "P"):
                    reason = f"{key} ({columns.get(key, 'params_*')}) is missing or not positive"
                    break
        if reason is None:
            first_seen[run_id] = i
        reasons.append(reason)
    return reasons
