"""FLOPs against accuracy: what each run cost and can do, against the dense model of equal cost, and at equal accuracy.

Accuracies are percentages, rounded as they are printed, and every average is that of the printed cells of its row. Standard
errors and intervals are over the items of the tasks; they do not hold the scatter between seeds, which only seeds can show.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.convention import N_TEXT
from analysis.data import ResultsData, numeric_column, require_columns
from analysis.derive import count_parameters
from analysis.design import find_levels
from analysis.intervals import LEVEL, interval
from analysis.outcomes import Outcomes, difference_error
from analysis.tables import AVERAGE, PERCENT_DIGITS, Format, format_table, macro_average
from dlcm.errors import UserError, nearest

Array = np.ndarray

SAME_COST = 1.1
"""A dense run is matched to a run whose training FLOPs are within this factor of its own."""
_DRAWS = 2000
_FACTS = ("run_id", "model", "tokens", "flops_train", "flops_per_token_forward", "bits_per_byte", "compression_target")
_PARAMETERS = ("params_token", "params_concept", "params_embedding")
_SHOWN = ("concept_share", "tokens_per_concept", "tokens", "flops_train", *_PARAMETERS)
"""Columns of every table: grouped by, they are not shown twice."""
_SYMBOLS = {"R": "compression_target", "P": "concept_share", "D": "tokens", "C": "flops_train"}


@dataclasses.dataclass(frozen=True, eq=False)
class AccuracyTable:
    """One row a run.

    Attributes:
        frame: numbers at full precision but for percentages, which are as printed.
        group: number of the group that each row is in, ascending, (rows,).
        bold: (row, column) of the best accuracies of a group that are significantly better than every other one of it.
        notes: what the figures rest on, in sentences.
    """

    frame: pd.DataFrame
    group: Array
    bold: frozenset[tuple[int, str]]
    notes: tuple[str, ...]

    @property
    def breaks(self) -> tuple[int, ...]:
        """Rows that begin a group, the first left out."""
        return tuple(int(i) for i in np.flatnonzero(np.diff(self.group)) + 1)

    def format(self, fmt: Format) -> str:
        """As text; tables for people leave out the bits per byte of single tasks and say below what the figures rest on."""
        if fmt == "csv":
            return format_table(self.frame, "csv")
        shown = self.frame.drop(columns=[c for c in self.frame.columns if str(c).startswith("bpb_")])
        comment = "% " if fmt == "tex" else "\n"
        notes = "".join(f"{comment}{note}\n" for note in self.notes)
        return format_table(shown, fmt, bold=self.bold, breaks=self.breaks) + notes


def task_columns(frame: pd.DataFrame) -> list[str]:
    """Tasks with an accuracy in a results table: those of columns `acc_<task>`, sorted."""
    names = [str(c) for c in frame.columns]
    tasks = [n.removeprefix("acc_") for n in names if n.startswith("acc_") and not n.startswith("acc_norm_")]
    return sorted(t for t in tasks if not t.endswith("_stderr") and not all(pd.isna(v) for v in frame[f"acc_{t}"]))


def flops_vs_accuracy(
    data: ResultsData, *, by: Sequence[str] = (), outcomes: Outcomes | None = None, context: int | None = None
) -> AccuracyTable:
    """What each run cost and what it can do, cheapest first within each group.

    Columns: run, model, parameters by group, P, realised R, tokens, training FLOPs, inference FLOPs a token (prefill over the
    training window; decoding behind `context` tokens), loss, accuracy of each task with its standard error, macro average of
    the printed accuracies; for each run that has a dense one of equal training FLOPs the difference of their averages with
    a 95% interval, and the share of training FLOPs that the dense models need more for the same average.

    A run that lacks a task has no average: means over different tasks do not compare. What a user's own table (mapped columns)
    does not hold is left out.

    Args:
        data: the runs.
        by: columns to group by, or the symbols R, P, N, D, C; values that differ by rounding of shapes are one value.
        outcomes: what each run did on each item (`analysis.outcomes`): differences are paired by item where both have them.
        context: tokens behind which a token is decoded; needs the sweep's configs beside the results. The training window by
            default, which the results hold.

    Raises:
        UserError: the results lack a column; `by` names none.
    """
    frame = data.frame
    own = "params_total" in frame and data.convention.n in N_TEXT
    if own:
        require_columns(frame, _FACTS, data.source)
    table = pd.DataFrame({"run": frame["run_id"].astype(str), "model": _model(data)})
    keys = [_group(data, name) for name in by]
    for column, values in keys:
        if column in frame and column not in _SHOWN:
            table[column] = values
    _add_costs(table, data, own, context)
    tasks = _add_tasks(table, data)
    seeds = frame["seed"].astype(str) if "seed" in frame else pd.Series("", index=frame.index)
    order = pd.DataFrame(
        {f"key {i}": values for i, (_, values) in enumerate(keys)} | {"C": data.C, "run": table["run"]}
    )
    order = order.sort_values(list(order.columns), kind="stable")
    group = (
        order.iloc[:, : len(keys)].groupby(list(order)[: len(keys)], sort=False, dropna=False).ngroup() if keys else 0
    )
    group = np.broadcast_to(np.asarray(group), len(order))
    table = table.iloc[order.index].reset_index(drop=True)
    seeds = seeds.iloc[order.index].reset_index(drop=True)
    notes: list[str] = []
    compared = PairedRows(table, tasks, outcomes or {})
    if tasks:
        _add_differences(table, compared, seeds.tolist(), notes)
        _add_savings(table, notes)
    bold = frozenset(_significant(table, group, compared)) if tasks else frozenset()
    if bold:
        notes.append("bold: better than every other row of its group at the 5% level, Bonferroni's correction made.")
    return AccuracyTable(table, group, bold, tuple(notes))


def _model(data: ResultsData) -> Array:
    if "model" in data.frame:
        return np.asarray(data.frame["model"].astype(str))
    return np.where(data.P > 0, "dlcm", "dense")


def _group(data: ResultsData, name: str) -> tuple[str, Any]:
    """A column to group by: its values, those of shapes that were asked to be alike as one."""
    frame = data.frame
    column = _SYMBOLS.get(name, name)
    if name in ("N", "R", "P", "D", "C") and column not in frame:
        values = np.asarray(getattr(data, name))
        column = name
    elif column in frame:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            return column, frame[column].astype(str)
        values = frame[column].to_numpy(dtype=float)
    else:
        valid = ["N", *_SYMBOLS, *map(str, frame.columns)]
        raise UserError(f"--by {name}: {data.source} has no such column{nearest(name, valid)}")
    snapped = values.copy()
    at, nominal = find_levels(values[values > 0])
    snapped[values > 0] = np.array(nominal)[at] if nominal else []
    return column, snapped.tolist()


def _add_costs(table: pd.DataFrame, data: ResultsData, own: bool, context: int | None) -> None:
    frame, source = data.frame, data.source
    if own:
        table["params_non_embedding"] = count_parameters(frame, "non_embedding", source).round().astype("int64")
        for name in _PARAMETERS:
            table[name] = numeric_column(frame, name, source).round().astype("int64")
    else:
        table["params"] = data.N.round().astype("int64")
    table["concept_share"], table["tokens_per_concept"] = data.P, data.R
    table["tokens"] = data.D.round().astype("int64")
    table["flops_train"] = data.C
    if "flops_per_token_forward" in frame:
        table["flops_per_token_forward"] = numeric_column(frame, "flops_per_token_forward", source)
    if context is not None:
        table["flops_per_token_decode"] = decode_flops(data, context)
    elif "flops_per_token_decode" in frame:
        table["flops_per_token_decode"] = numeric_column(frame, "flops_per_token_decode", source)
    table["loss_nats"] = data.loss
    if "bits_per_byte" in frame:
        table["bits_per_byte"] = numeric_column(frame, "bits_per_byte", source)


def decode_flops(data: ResultsData, context: int) -> Array:
    """FLOPs of a token that is decoded behind `context` tokens, at the realised R of each run.

    Raises:
        UserError: the results stand apart from their sweep, whose configs say what a token costs.
    """
    from flops.inference import decode
    from sweeps.store import load_sweep

    folder = Path(data.source).parent
    if not (folder / "plan.parquet").exists():
        raise UserError(f"--context: {data.source} stands apart from its sweep, whose configs say what a token costs")
    if context < 0:
        raise UserError(f"--context {context}: give a number of tokens, 0 or more")
    configs = {run.run_id: run.config.model for run in load_sweep(folder).runs}
    pairs = zip(data.run_ids, data.R)
    return np.array([decode(configs[run], context, 1, float(R)).forward_per_token for run, R in pairs])


def _add_tasks(table: pd.DataFrame, data: ResultsData) -> list[str]:
    frame, source = data.frame, data.source
    tasks = task_columns(frame)
    columns = [f"acc_{t}" for t in tasks]
    for name in (name for column in columns for name in (column, f"{column}_stderr") if name in frame):
        table[name] = np.round(100 * numeric_column(frame, name, source), PERCENT_DIGITS)
    if tasks:
        table[AVERAGE] = macro_average(table, columns)
        errors = [f"{c}_stderr" for c in columns]
        if all(e in table for e in errors):
            squares = table[errors].pow(2).sum(axis=1, skipna=False)
            table[f"{AVERAGE}_stderr"] = (np.sqrt(squares) / len(tasks)).round(PERCENT_DIGITS)
    for name in (f"bpb_{task}{suffix}" for task in tasks for suffix in ("", "_stderr")):
        if name in frame:
            table[name] = numeric_column(frame, name, source)
    return tasks


class PairedRows:
    """Differences between two rows, with standard errors paired by item where the outcomes are known."""

    def __init__(self, table: pd.DataFrame, tasks: Sequence[str], outcomes: Outcomes):
        self.tasks, self.paired = list(tasks), False
        self._accuracy = {task: _numbers(table, f"acc_{task}") for task in tasks}
        with_error = [task for task in tasks if f"acc_{task}_stderr" in table]
        self._error = {task: _numbers(table, f"acc_{task}_stderr") for task in with_error}
        self._outcomes = [outcomes.get(str(run), {}) for run in table["run"]]

    def difference(self, one: int, other: int, tasks: Sequence[str] | None = None) -> tuple[float, float | None]:
        """Mean over `tasks` of one row's accuracies less another's, in percentage points, and its standard error."""
        tasks = self.tasks if tasks is None else tasks
        gains = [self._accuracy[task][one] - self._accuracy[task][other] for task in tasks]
        squares = [self._squared_error(one, other, task) for task in tasks]
        known = [s for s in squares if s is not None]
        error = float(np.sqrt(sum(known)) / len(tasks)) if len(known) == len(tasks) else None
        return float(np.mean(gains)), error

    def _squared_error(self, one: int, other: int, task: str) -> float | None:
        paired = difference_error(*(self._outcomes[row].get(task) for row in (one, other)))
        if paired is not None:
            self.paired = True
            return (100 * paired) ** 2
        if task not in self._error:
            return None
        error = float(np.hypot(self._error[task][one], self._error[task][other]))
        return error**2 if np.isfinite(error) else None


def match_baselines(table: pd.DataFrame, seeds: Sequence[str]) -> dict[int, int]:
    """Row of a DLCM -> row of its dense baseline: the best model of training FLOPs within 10%, of its seed if there is one.

    The best is that of least validation loss, which is known far better than an accuracy is: of several dense shapes at one
    budget, a DLCM must beat the one that one would train.
    """
    dense, others = _families(table)
    cost = _numbers(table, "flops_train")
    loss = _numbers(table, "loss_nats") if "loss_nats" in table else np.full(len(table), np.nan)
    loss = np.where(np.isfinite(loss), loss, np.inf)
    found = {}
    for row in others.tolist():
        away = np.abs(np.log(cost[dense] / cost[row])) if dense.size else np.empty(0)
        near = dense[away <= np.log(SAME_COST)]
        if near.size:
            order = sorted(
                near.tolist(), key=lambda d: (seeds[d] != seeds[row], loss[d], abs(np.log(cost[d] / cost[row])))
            )
            found[row] = order[0]
    return found


def _add_differences(table: pd.DataFrame, compared: PairedRows, seeds: Sequence[str], notes: list[str]) -> None:
    matched = match_baselines(table, seeds)
    if not matched:
        return
    z = stats.norm.ppf(0.5 + LEVEL / 2)
    columns: dict[str, list[Any]] = {k: [None] * len(table) for k in ("baseline", "gain", "gain_low", "gain_high")}
    for row, dense in matched.items():
        gain, error = compared.difference(row, dense)
        columns["baseline"][row] = table["run"][dense]
        columns["gain"][row] = round(gain, PERCENT_DIGITS)
        if error is not None:
            half = float(z) * error
            columns["gain_low"][row] = round(gain - half, PERCENT_DIGITS)
            columns["gain_high"][row] = round(gain + half, PERCENT_DIGITS)
    for name, values in columns.items():
        table[name] = values if name == "baseline" else np.array(values, dtype=float)
    how = "paired by item" if compared.paired else "not paired: no outcomes of single items"
    notes.append(
        f"gain: average less that of the dense run of least loss at equal training FLOPs (within {SAME_COST - 1:.0%}), "
        f"percentage points, 95% interval over items, {how}; the scatter between seeds is not in it."
    )


def _add_savings(table: pd.DataFrame, notes: list[str]) -> None:
    dense, others = _families(table)
    cost, average = _numbers(table, "flops_train"), _numbers(table, AVERAGE)
    if len(np.unique(cost[dense])) < 2 or not others.size:
        return
    error = f"{AVERAGE}_stderr"
    errors = _numbers(table, error) if error in table else np.full(len(table), np.nan)
    rng = np.random.default_rng(0)
    columns = {k: np.full(len(table), np.nan) for k in ("saved", "saved_low", "saved_high")}
    order = dense[np.argsort(cost[dense], kind="stable")]
    log_cost = np.log(cost[order])
    best = np.maximum.accumulate(average[order])
    drawn_best = np.maximum.accumulate(average[order] + errors[order] * rng.normal(size=(_DRAWS, len(order))), axis=1)
    for row in others.tolist():
        spent, reached = float(cost[row]), float(average[row])
        share = _saved(log_cost, best[None, :], spent, np.array([reached]))[0]
        columns["saved"][row] = share if np.isfinite(share) and reached <= best[-1] else np.nan
        if np.isfinite(errors[[row, *order]]).all():
            shares = _saved(log_cost, drawn_best, spent, rng.normal(reached, errors[row], _DRAWS))
            low, high = interval(shares, between=False)
            columns["saved_low"][row], columns["saved_high"][row] = (
                100 * v if np.isfinite(v) and abs(v) < 1 else np.nan for v in (low, high)
            )
    for name, values in columns.items():
        table[name] = (100 * values if name == "saved" else values).round(1)
    notes.append(
        "saved: share of training FLOPs that the best dense runs need more for the same average, between dense runs only "
        "(linear in log FLOPs); 95% interval over items; empty where no dense run of the table reaches the average."
    )


def _numbers(table: pd.DataFrame, column: str) -> Array:
    return np.asarray(table[column], dtype=float)


def _families(table: pd.DataFrame) -> tuple[Array, Array]:
    """Rows of the dense runs and of the others, those that have an average."""
    has_average, is_dense = np.isfinite(_numbers(table, AVERAGE)), np.asarray(table["model"]) == "dense"
    return np.flatnonzero(has_average & is_dense), np.flatnonzero(has_average & ~is_dense)


def _saved(log_cost: Array, best: Array, spent: float, reached: Array) -> Array:
    """1 - spent / least FLOPs at which the dense runs reach an average, linear in log FLOPs; one number a draw.

    Args:
        log_cost: of the dense runs, rising (m,).
        best: their running best averages (draws, m).
        spent: training FLOPs.
        reached: averages (draws,). Beyond all dense runs the answer is 1, below all of them minus infinity.
    """
    n_dense = len(log_cost)
    above = np.sum(best < reached[:, None], axis=1)  # the first dense run that reaches it
    k = np.clip(above, 1, n_dense - 1)
    rows = np.arange(len(best))
    low, high = best[rows, k - 1], best[rows, k]
    within = (above > 0) & (above < n_dense)
    share = np.divide(reached - low, high - low, out=np.zeros(len(best)), where=within)
    found = 1 - spent / np.exp(log_cost[k - 1] + share * (log_cost[k] - log_cost[k - 1]))
    found = np.where((above == 0) & (reached < best[:, 0]), -np.inf, found)
    return np.where(above == n_dense, 1.0, found)


def _significant(table: pd.DataFrame, group: Array, compared: PairedRows) -> list[tuple[int, str]]:
    columns: Mapping[str, list[str] | None] = {**{f"acc_{t}": [t] for t in compared.tasks}, AVERAGE: None}
    found = []
    for rows in (np.flatnonzero(group == g) for g in np.unique(group)):
        for column, tasks in columns.items():
            values = table.loc[rows, column].dropna()
            if len(values) < 2:
                continue
            best = int(values.idxmax())
            z = stats.norm.ppf(1 - (1 - LEVEL) / 2 / (len(values) - 1))
            apart = [compared.difference(best, int(other), tasks) for other in values.index if other != best]
            if all(error is not None and gain > z * error for gain, error in apart):
                found.append((best, column))
    return found
