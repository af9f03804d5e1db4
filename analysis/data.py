"""Results of runs as arrays, under stated conventions, with every excluded run listed beside its reason."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import SYMBOLS, holds
from analysis.convention import (
    C_TEXT,
    DEFAULT,
    N_TEXT,
    R_TEXT,
    CConvention,
    Convention,
    Exclusion,
    NConvention,
    RConvention,
)
from analysis.derive import count_parameters, from_frame, from_mapped
from analysis.frames import find_results, numeric_column, read_table, require_columns
from analysis.frames import records as records
from dlcm.errors import UserError, nearest

Array = np.ndarray


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
    convention: Convention = DEFAULT
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
        convention: Convention = DEFAULT,
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
        """The run behind each row."""
        return [str(v) for v in self.frame["run_id"]]

    @property
    def clusters(self) -> list[str]:
        """What errs together, a name for each row: the run, or the trunk that several runs share."""
        if "trunk" not in self.frame:
            return self.run_ids
        trunk = self.frame["trunk"]
        return [str(t) if known else run for t, known, run in zip(trunk, trunk.notna(), self.run_ids)]

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

    def holds(self, condition: str) -> Array:
        """Rows where a condition over symbols and columns holds, as a mask: `loss > 4 and seed == 1`.

        Raises:
            UserError: no condition, or an unknown name.
        """

        def lookup(name: str) -> Array:
            if name in self.frame and not pd.api.types.is_numeric_dtype(self.frame[name]):
                return self.frame[name].to_numpy(dtype=object)
            if name not in (*SYMBOLS, *self.frame.columns):
                raise UserError(
                    f"{self.source}: no column {name!r}{nearest(name, [*SYMBOLS, *map(str, self.frame.columns)])}"
                )
            return self.values(name)

        return np.broadcast_to(holds(condition, lookup, self.source), (len(self),))

    def select(self, condition: str) -> "ResultsData":
        """Rows where a condition holds, as a data set of its own; its source says so.

        Raises:
            UserError: it holds nowhere.
        """
        mask = self.holds(condition)
        if not mask.any():
            raise UserError(f"{self.source}: no usable run has {condition}; nothing is left")
        return dataclasses.replace(self.take(mask), source=f"{self.source} where {condition}")

    def exclude(self, where: str | Sequence[str] | Array, reason: str) -> "ResultsData":
        """The data without some runs, which are recorded with the reason.

        Args:
            where: a condition (`"loss > 4"`), names of runs, a mask or positions.
            reason: why; printed beside every fit.

        Raises:
            UserError: no reason, no such run, or no run would be left.
        """
        if not reason.strip():
            raise UserError(f"{self.source}: an exclusion needs a reason; say why the runs are left out")
        ids = np.asarray(self.run_ids)
        if isinstance(where, str):
            mask = ids == where if where in ids else self.holds(where)
        elif len(where) and isinstance(where[0], str):
            if absent := sorted(set(map(str, where)) - set(ids)):
                raise UserError(f"{self.source}: no usable run {absent[0]!r}{near_run(absent[0], ids.tolist())}")
            mask = np.isin(ids, np.asarray(where))
        else:
            mask = np.zeros(len(self), dtype=bool)
            mask[np.asarray(where)] = True
        if not mask.any():
            raise UserError(f"{self.source}: no usable run has {where}; there is nothing to leave out")
        if mask.all():
            raise UserError(f"{self.source}: {where} holds for every usable run; none would be left")
        family = self.frame["model"].astype(str).to_numpy() if "model" in self.frame else np.full(len(ids), "")
        left_out = tuple(Exclusion(name, reason, own) for name, own in zip(ids[mask].tolist(), family[mask].tolist()))
        return dataclasses.replace(self.take(~mask), exclusions=(*self.exclusions, *left_out))

    def drop_largest_losses(self, k: int) -> "ResultsData":
        """The data without the k largest losses of each model family, recorded as exclusions.

        Raises:
            UserError: a family has no more than k runs.
        """
        if not k:
            return self
        reason = f"among the {k} largest losses" if k > 1 else "the largest loss"
        rows: list[int] = []
        families: Array = (
            self.frame["model"].astype(str).to_numpy() if "model" in self.frame else np.full(len(self), "")
        )
        for family in sorted(set(families)):
            own = np.flatnonzero(families == family)
            if not 0 < k < len(own):
                raise UserError(f"{self.source}: cannot drop the {k} largest losses of {len(own)} runs; give fewer")
            rows += own[np.argsort(self.loss[own], kind="stable")[::-1][:k]].tolist()
        return self.exclude(np.array(rows), reason)

    def under(self, n: NConvention) -> "ResultsData":
        """The same runs with another meaning of N; R, P and the rest stay.

        Raises:
            UserError: the table does not hold both numbers of parameters.
        """
        counted = count_parameters(self.frame, n, self.source)
        return dataclasses.replace(self, N=counted, convention=dataclasses.replace(self.convention, n=n))

    def of_family(self, family: str | None) -> "ResultsData":
        """Rows of one model family (`dense` or `dlcm`), with what was left out of it.

        All rows where `family` is None or no family is recorded.
        """
        if family is None or "model" not in self.frame:
            return self
        own = tuple(e for e in self.exclusions if e.family in ("", family))
        return dataclasses.replace(self.where(model=family), exclusions=own)

    @property
    def dense(self) -> "ResultsData":
        """Rows of the dense baseline."""
        return self.of_family("dense")

    @property
    def dlcm(self) -> "ResultsData":
        """Rows of the DLCM."""
        return self.of_family("dlcm")


def near_run(name: str, ids: Sequence[str]) -> str:
    """`; did you mean ...`, or nothing where the list of all runs would be the answer."""
    hint = nearest(name, ids)
    return hint if hint.startswith("; did") or len(hint) < 200 else ""


def concat(parts: Sequence[ResultsData]) -> ResultsData:
    """Several results as one.

    Raises:
        UserError: N, C, R or another symbol mean different things in them.
    """
    first = parts[0]
    for other in parts[1:]:
        first.convention.require_same(other.convention, f"{first.source} and {other.source} together")
    symbols: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in SYMBOLS}
    return dataclasses.replace(
        first,
        **symbols,
        frame=pd.concat([part.frame for part in parts], ignore_index=True),
        exclusions=tuple(e for part in parts for e in part.exclusions),
        source=" + ".join(part.source for part in parts),
    )


def load_results(
    path: str | Path,
    *,
    n: NConvention | None = None,
    c: CConvention = "causal",
    r: RConvention = "evaluation",
    columns: Mapping[str, str] | None = None,
) -> ResultsData:
    """Load the results of a sweep, or a user's own table, under one convention.

    Args:
        path: `results.parquet` or `.csv`, or a folder that holds one of these.
        n: which parameters count as N; `non_embedding` by default. Of a table whose N is mapped, it states what N is.
        c: which training FLOPs count as C.
        r: which tokens per concept count as R; realised at evaluation by default.
        columns: for a table with other names: symbol (N, D, C, R, P, loss), `family` or any column of this toolkit's tables ->
            a column of the file or arithmetic over columns and other symbols, such as `{"N": "params", "D": "C/(6*N)"}`. What is
            not mapped is read from this toolkit's columns where the table has them. Without them R is 1, P is 0 and C unknown,
            every row is a finished run, `dense` unless its R or P say otherwise, and named by its number. A table with columns
            N, D and loss needs no mapping.

    Raises:
        UserError: no such file, unreadable, a column is missing or not numeric, or no run is usable.
    """
    for name, value, valid in (("n", n or "non_embedding", N_TEXT), ("c", c, C_TEXT), ("r", r, R_TEXT)):
        if value not in valid:
            raise UserError(f"{name} = {value!r} is no convention{nearest(str(value), valid)}")
    file = find_results(path)
    frame = read_table(file)
    if columns is None and {"N", "D", "loss"} <= set(frame.columns) and not _OWN & set(frame.columns):
        columns = {key: key for key in (*SYMBOLS, "family") if key in frame.columns}
    if columns:
        return ResultsData(**from_mapped(frame, columns, n, Convention(n or "non_embedding", c, r), str(file)))
    return ResultsData(**from_frame(frame, Convention(n or "non_embedding", c, r), str(file)))


_OWN = {"params_total", "tokens", "loss_nats"}
