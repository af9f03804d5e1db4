"""Results of runs as arrays, under stated conventions, with every excluded run listed beside its reason."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from dlcm.errors import UserError, nearest

NConvention = Literal["non_embedding", "total"]
CConvention = Literal["causal", "full"]
RConvention = Literal["evaluation", "training", "target"]
Array = np.ndarray

_N_TEXT = {
    "non_embedding": "parameters without embedding and unembedding (params_total - params_embedding)",
    "total": "all parameters (params_total)",
}
_C_COLUMN = {"causal": "flops_train", "full": "flops_train_full"}
_C_TEXT = {
    "causal": "training FLOPs at the realised R, causal attention halved (flops_train)",
    "full": "training FLOPs at the realised R, attention as full squares (flops_train_full)",
}
_R_COLUMN = {"evaluation": "tokens_per_concept", "training": "tokens_per_concept_train", "target": "compression_target"}
_R_TEXT = {
    "evaluation": "realised tokens per concept at evaluation",
    "training": "realised tokens per concept in training, last 10% of steps",
    "target": "requested tokens per concept",
}


@dataclasses.dataclass(frozen=True)
class Convention:
    """What N, C and R mean in a data set. Fits under different conventions are never compared."""

    n: str = "non_embedding"
    c: str = "causal"
    r: str = "evaluation"

    def definitions(self) -> dict[str, str]:
        """Symbol -> definition, for the fit card."""
        return {
            "N": _N_TEXT.get(self.n, self.n),
            "D": "training tokens",
            "C": _C_TEXT.get(self.c, self.c),
            "R": _R_TEXT.get(self.r, self.r),
            "P": "backbone parameters over parameters without embeddings (params_concept / N_non_embedding)",
            "loss": "validation loss, nats per token",
        }

    def require_same(self, other: "Convention", what: str) -> None:
        """Refuse to mix conventions.

        Raises:
            UserError: N, C or R mean different things in the two.
        """
        if self != other:
            mine, theirs = (f"N {v.n}, C {v.c}, R {v.r}" for v in (self, other))
            raise UserError(
                f"{what}: conventions differ ({mine}; {theirs}); load both results with the same n, c and r"
            )


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """A run that is left out of a fit, and why."""

    run_id: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class ResultsData:
    """Usable runs as arrays of equal length.

    Attributes:
        N: parameters. D: training tokens. C: training FLOPs. R: tokens per concept. P: backbone share of N.
        loss: nats per token.
        frame: the rows of the results table behind the arrays, same order.
        exclusions: runs that were left out.
        convention: what N, C and R mean.
        source: where the results came from.
    """

    N: Array
    D: Array
    C: Array
    R: Array
    P: Array
    loss: Array
    frame: pd.DataFrame
    exclusions: tuple[Exclusion, ...] = ()
    convention: Convention = Convention()
    source: str = "arrays"

    @classmethod
    def from_arrays(
        cls,
        *,
        N: Any,
        D: Any,
        loss: Any,
        C: Any = np.nan,
        R: Any = 1.0,
        P: Any = 0.0,
        convention: Convention = Convention(),
        source: str = "arrays",
        **columns: Any,
    ) -> "ResultsData":
        """Data from plain arrays, for results that were not made by this toolkit.

        Args:
            N: parameters.
            D: training tokens.
            loss: nats per token.
            C: training FLOPs, where known.
            R: tokens per concept; 1 for dense models.
            P: backbone share of N; 0 for dense models.
            convention: what N, C and R mean.
            source: name for reports.
            **columns: further columns of `frame`, e.g. `run_id` (the cluster of the bootstrap) or inputs of another law.
        """
        given = (N, D, C, R, P, loss)
        arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=float)) for v in given))
        arrays = [np.array(v) for v in arrays]
        frame = pd.DataFrame({"run_id": [f"run{i}" for i in range(len(arrays[0]))], **columns})
        return cls(*arrays, frame=frame, convention=convention, source=source)

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def run_ids(self) -> list[str]:
        """The run behind each row: the unit that the bootstrap draws."""
        return [str(v) for v in self.frame["run_id"]]

    @property
    def hash(self) -> str:
        """SHA-256 over runs and arrays, first 12 hexadecimal digits: two fits with one hash saw the same numbers."""
        digest = hashlib.sha256("\n".join(self.run_ids).encode())
        for name in ("N", "D", "C", "R", "P", "loss"):
            digest.update(np.ascontiguousarray(getattr(self, name), dtype="<f8").tobytes())
        return digest.hexdigest()[:12]

    def values(self, name: str) -> Array:
        """An array by law symbol (N, D, C, R, P, loss), or else a column of `frame`.

        Raises:
            UserError: neither exists.
        """
        if name in ("N", "D", "C", "R", "P", "loss"):
            return getattr(self, name)
        return numeric_column(self.frame, name, self.source)

    def take(self, rows: Any) -> "ResultsData":
        """The same data at `rows`: a boolean mask or positions."""
        rows = np.asarray(rows)
        positions = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(int)
        arrays = {name: getattr(self, name)[positions] for name in ("N", "D", "C", "R", "P", "loss")}
        frame = self.frame.iloc[positions].reset_index(drop=True)
        return dataclasses.replace(self, **arrays, frame=frame)

    def where(self, **conditions: Any) -> "ResultsData":
        """Rows whose columns equal the given values: `data.where(boundary="learned", seed=0)`."""
        mask = np.ones(len(self), dtype=bool)
        for column, value in conditions.items():
            require_columns(self.frame, [column], self.source)
            allowed = value if isinstance(value, list | tuple | set) else [value]
            mask &= self.frame[column].isin(list(allowed)).to_numpy()
        return self.take(mask)

    def of_family(self, family: str | None) -> "ResultsData":
        """Rows of one model family (`dense` or `dlcm`); all rows where `family` is None or no family is recorded."""
        if family is None or "model" not in self.frame:
            return self
        return self.where(model=family)

    @property
    def dense(self) -> "ResultsData":
        """Rows of the dense baseline."""
        return self.of_family("dense")

    @property
    def dlcm(self) -> "ResultsData":
        """Rows of the DLCM."""
        return self.of_family("dlcm")


def load_results(
    path: str | Path, *, n: NConvention = "non_embedding", c: CConvention = "causal", r: RConvention = "evaluation"
) -> ResultsData:
    """Load the results of a sweep under one convention.

    Args:
        path: `results.parquet` or `.csv`, or a folder that holds one of these.
        n: which parameters count as N.
        c: which training FLOPs count as C.
        r: which tokens per concept count as R; realised at evaluation by default.

    Raises:
        UserError: no such file, unreadable, a column is missing or not numeric, or no run is usable.
    """
    for name, value, valid in (("n", n, _N_TEXT), ("c", c, _C_TEXT), ("r", r, _R_TEXT)):
        if value not in valid:
            raise UserError(f"{name} = {value!r} is no convention{nearest(str(value), valid)}")
    file = find_results(path)
    frame = read_table(file)
    return from_frame(frame, Convention(n, c, r), str(file))


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
    except (OSError, ValueError, UnicodeDecodeError) as error:
        # pyarrow's and pandas' parser errors are all ValueErrors or OSErrors; their first line says what is broken
        detail = (str(error).splitlines() or ["empty"])[0]
        raise UserError(f"{file}: not readable as {suffix[1:]} ({detail}); collect the sweep again") from None
    if frame.empty:
        raise UserError(f"{file}: no rows; collect the sweep after at least one run has ended")
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


def from_frame(frame: pd.DataFrame, convention: Convention, source: str) -> ResultsData:
    """Derive N, D, C, R, P and the loss from a results table; see `load_results`."""
    require_columns(frame, ("run_id", "model", "status"), source)
    if convention.c == "full" and "flops_train_full" not in frame:
        raise UserError(
            f"{source}: no column 'flops_train_full', so C cannot be counted with full squares; use c='causal'"
        )
    columns = {"total": "params_total", "embedding": "params_embedding", "concept": "params_concept", "D": "tokens"}
    columns |= {"C": _C_COLUMN[convention.c], "R": _R_COLUMN[convention.r], "loss": "loss_nats"}
    facts = {key: numeric_column(frame, column, source) for key, column in columns.items()}
    without = facts["total"] - facts["embedding"]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = facts["concept"] / without
    arrays = {
        "N": without if convention.n == "non_embedding" else facts["total"],
        **{key: facts[key] for key in ("D", "C", "R", "loss")},
        "P": share,
    }
    reasons = _reasons(frame, arrays, columns)
    keep = np.array([reason is None for reason in reasons])
    exclusions = tuple(Exclusion(str(i), r) for i, r in zip(frame["run_id"], reasons) if r is not None)
    if not keep.any():
        first = exclusions[0]
        raise UserError(f"{source}: none of {len(frame)} runs is usable; the first, {first.run_id}: {first.reason}")
    kept = {key: value[keep] for key, value in arrays.items()}
    rows = frame.loc[keep].reset_index(drop=True)
    return ResultsData(**kept, frame=rows, exclusions=exclusions, convention=convention, source=source)


def _reasons(frame: pd.DataFrame, arrays: Mapping[str, Array], columns: Mapping[str, str]) -> list[str | None]:
    """Why each row is left out; None where it is used."""
    first_seen: dict[str, int] = {}
    reasons: list[str | None] = []
    for i, (run_id, status) in enumerate(zip(frame["run_id"].astype(str), frame["status"].astype(str))):
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
            for key in ("N", "D", "C", "R", "P"):
                value = arrays[key][i]
                if not np.isfinite(value) or value < 0 or (value == 0 and key != "P"):
                    reason = f"{key} ({columns.get(key, 'params_*')}) is missing or not positive"
                    break
        if reason is None:
            first_seen[run_id] = i
        reasons.append(reason)
    return reasons
