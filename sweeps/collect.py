"""The run directories of a sweep -> results.parquet: one row a run, units in the names, dtypes fixed.

Facts only: which N (with or without embeddings) and which C a law is fitted on is decided in `analysis`. A run that has
not finished has its row as well, with nulls for what is not known yet, so that a missing cell is seen.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dlcm.errors import UserError
from dlcm.record import read_json, read_metrics, write_atomic
from flops import FlopCount, count, decode, parameters
from sweeps.states import RunState, sweep_states
from sweeps.store import StoredRun, StoredSweep, load_sweep, read_record


@dataclass(frozen=True)
class Column:
    """A column of results.parquet."""

    dtype: str
    unit: str
    description: str


COLUMNS: Mapping[str, Column] = {
    "run_id": Column("str", "", "readable prefix and hash of the run config; name of the run directory"),
    "sweep": Column("str", "", "name of the sweep"),
    "model": Column("str", "", "dlcm or dense"),
    "boundary": Column("str", "", "boundary detector; none for a dense model"),
    "seed": Column("int64", "", "seed of weights, data order and boundary draws"),
    "params_total": Column("int64", "parameters", "all parameters"),
    "params_embedding": Column("int64", "parameters", "embedding and unembedding"),
    "params_token": Column("int64", "parameters", "everything else but the concept backbone"),
    "params_concept": Column("int64", "parameters", "layers of the concept backbone; 0 for a dense model"),
    "concept_share": Column(
        "float64", "", "P, the backbone's share of the non-embedding parameters; 0 for a dense model"
    ),
    "compression_target": Column("float64", "tokens/concept", "R asked for; 1 for a dense model"),
    "tokens_per_concept": Column("float64", "tokens/concept", "R realised at evaluation; 1 for a dense model"),
    "tokens_per_concept_train": Column("float64", "tokens/concept", "R realised over the last 10% of training steps"),
    "tokens": Column("Int64", "tokens", "D, tokens that were trained on"),
    "epochs": Column(
        "float64", "", "tokens over the training tokens of the corpus; of a mixture, the largest of its sources"
    ),
    "seq_len": Column("int64", "tokens", "length of one packed window"),
    "budget": Column("str", "", "the budget that set its length, in words; empty where train.tokens did"),
    "flops_train": Column("float64", "FLOPs", "training, causal-halved, at R realised in training"),
    "flops_train_full": Column("float64", "FLOPs", "the same with every attention as a full square"),
    "trunk": Column("str", "", "run that its first steps are shared with; null where it was trained alone"),
    "tokens_shared": Column("Int64", "tokens", "tokens that the trunk was trained on for it; 0 where trained alone"),
    "flops_train_marginal": Column(
        "float64", "FLOPs", "flops_train without the shared tokens: what it cost beside the trunk"
    ),
    "flops_train_planned": Column("float64", "FLOPs", "the same at the R asked for and the planned tokens"),
    "flops_per_token_forward": Column(
        "float64", "FLOPs/token", "forward pass, causal-halved, at R realised at evaluation"
    ),
    "flops_per_token_decode": Column(
        "float64", "FLOPs/token", "a token that is decoded behind seq_len tokens, at R realised at evaluation"
    ),
    "loss_nats": Column("float64", "nats/token", "validation loss"),
    "loss_nats_stable": Column("float64", "nats/token", "the same where the decay of wsd begins (L_stable, eq 23)"),
    "bits_per_byte": Column("float64", "bits/byte", "validation loss per UTF-8 byte"),
    "lr_token": Column("float64", "", "peak learning rate of the token side at the base width"),
    "lr_concept": Column("float64", "", "the same of the concept side; lr_token for a dense model"),
    "lr_source": Column("str", "", "where both are from: a tuned file and its hash, the sweep file, or the defaults"),
    "d_token": Column("int64", "", "token width"),
    "d_concept": Column("int64", "", "concept width; 0 for a dense model"),
    "d_token_base": Column("int64", "", "token width that the rates hold at (muP)"),
    "d_concept_base": Column("int64", "", "concept width that they hold at; 0 for a dense model"),
    "status": Column("str", "", "planned, queued, running, finished, failed, diverged, cancelled or lost"),
    "wall_s": Column(
        "float64", "s", "time spent training it, without the final validation and without that of a trunk"
    ),
    "device": Column("str", "", "what it was trained on"),
    "commit": Column("str", "", "commit of the code that trained it, `+` and a hash where the checkout differed"),
}

# One group a source of a mixture; `<source>` is its name in the config.
SOURCE_COLUMNS: Mapping[str, Column] = {
    "weight_<source>": Column("float64", "", "share of the training tokens that were asked for"),
    "epochs_<source>": Column("float64", "", "tokens from the source over its training tokens"),
    "loss_nats_<source>": Column("float64", "nats/token", "validation loss on the source"),
    "bits_per_byte_<source>": Column("float64", "bits/byte", "the same per UTF-8 byte"),
    "tokens_per_concept_<source>": Column("float64", "tokens/concept", "R on the source; 1 for a dense model"),
}

# One group a task that was evaluated; `<task>` is the name of the file in eval/.
TASK_COLUMNS: Mapping[str, Column] = {
    "acc_<task>": Column("float64", "", "accuracy"),
    "acc_<task>_stderr": Column("float64", "", "its standard error"),
    "acc_norm_<task>": Column("float64", "", "accuracy by log-likelihood per byte"),
    "bpb_<task>": Column("float64", "bits/byte", "bits per byte of the right answer"),
    "bpb_<task>_stderr": Column("float64", "bits/byte", "its standard error"),
    "n_<task>": Column("float64", "", "items"),
    "chance_<task>": Column("float64", "", "expected accuracy of guessing"),
    "constant_<task>": Column("float64", "", "accuracy of giving the answer of one place always, the best one"),
}
_TASK_KEYS = {
    "acc_<task>": "acc",
    "acc_<task>_stderr": "acc_stderr",
    "acc_norm_<task>": "acc_norm",
    "bpb_<task>": "bits_per_byte",
    "bpb_<task>_stderr": "bits_per_byte_stderr",
    "n_<task>": "n",
    "chance_<task>": "chance",
    "constant_<task>": "constant",
}


def collect(sweep_dir: Path | str) -> pd.DataFrame:
    """Read every run of a sweep and write `results.parquet` in its directory.

    Args:
        sweep_dir: directory of the sweep.

    Returns:
        One row a run in plan order, the columns of `COLUMNS`, those of `SOURCE_COLUMNS` for each source of a mixture, and those
        of `TASK_COLUMNS` for each evaluated task.
        A run that is no longer in the sweep file is kept if it has a result.

    Raises:
        UserError: not a sweep; or a file of a run that is torn or contradicts another. Nothing is written then.
    """
    sweep = load_sweep(Path(sweep_dir))
    states = {state.run_id: state for state in sweep_states(sweep)}
    rows = [
        _row(sweep, run, states[run.run_id])
        for run in sweep.runs
        if run.in_plan or states[run.run_id].status in ("finished", "diverged")
    ]
    frame = as_results(rows)
    write_atomic(sweep.path / "results.parquet", frame.to_parquet(index=False))
    return frame


def as_results(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A results table from rows, with its columns in order and of their dtypes; absent values are null."""
    more = sorted({key for row in rows for key in row} - set(COLUMNS), key=_order)
    frame = pd.DataFrame(list(rows), columns=[*COLUMNS, *more])
    dtypes = {name: column.dtype for name, column in COLUMNS.items()} | dict.fromkeys(more, "float64")
    return frame.astype(dtypes)


def told_accuracies(frame: pd.DataFrame) -> list[str]:
    """A line a task: how many runs were evaluated on it, and between which accuracies they are."""
    lines = []
    for name in (str(column).removeprefix("n_") for column in frame if str(column).startswith("n_")):
        acc = [100 * float(value) for value in frame[f"acc_{name}"] if not pd.isna(value)]
        if acc:
            runs = f"{len(acc)} run{'s' * (len(acc) > 1)}"
            floors = {word: [*map(float, frame[f"{word}_{name}"].dropna())] for word in ("chance", "constant")}
            told = ", ".join(f"{word} {100 * max(values):.1f} %" for word, values in floors.items() if values)
            lines.append(
                f"{name}: {runs}, accuracy {min(acc):.1f} to {max(acc):.1f} %" + (f" ({told})" if told else "")
            )
    return lines


def _order(name: str) -> tuple[int, str, int]:
    """Columns of sources before those of tasks, each source and task by its name, its columns as in the schema."""
    for group, patterns in enumerate((SOURCE_COLUMNS, TASK_COLUMNS)):
        for position, pattern in enumerate(reversed(list(patterns))):
            match = re.fullmatch(re.sub(r"<\w+>", "(.+)", pattern), name)
            if match:
                return group, match.group(1), -position
    return 2, name, 0


def _row(sweep: StoredSweep, run: StoredRun, state: RunState) -> dict[str, Any]:
    config, model = run.config, run.config.model
    params = parameters(model)
    row: dict[str, Any] = {
        "run_id": run.run_id,
        "sweep": sweep.name,
        "model": model.kind,
        "boundary": model.boundary.detector if model.boundary else "none",
        "seed": config.seed,
        "params_total": params.total,
        "params_embedding": params.embedding,
        "params_token": params.token,
        "params_concept": params.concept,
        "concept_share": params.concept_share,
        "compression_target": model.compression_target,
        "seq_len": config.data.seq_len,
        "budget": run.row["budget"],
        "flops_train_planned": run.flops_planned,
        "lr_token": config.optim.lr_token,
        "lr_concept": config.optim.lr_token if model.is_dense else config.optim.lr_concept,
        "lr_source": run.row.get("lr_source"),
        **{name: getattr(model, name) for name in ("d_token", "d_concept", "d_token_base", "d_concept_base")},
        "status": state.status,
        **{f"weight_{name}": source.weight for name, source in (config.data.mixture or {}).items()},
    }
    # Read as a file, not through `dlcm.train`: making a table needs no torch.
    result = read_record(run.path / "result.json")
    if result is not None:
        _check(run, result)
        row |= _measured(run, result) | {"commit": _code_version(run)}
        for path in sorted((run.path / "eval").glob("*.json")):
            row |= _task_columns(path)
    return row


def _code_version(run: StoredRun) -> str | None:
    """The code of the last start of a run; it is the code of all of them unless somebody changed it in between."""
    environment = read_record(run.path / "env.json") or {}
    commit, difference = environment.get("git_commit"), environment.get("git_dirty_hash")
    return f"{commit}+{difference}" if commit and difference else commit


def _measured(run: StoredRun, result: Mapping[str, Any]) -> dict[str, Any]:
    config = run.config

    def flops(ratio: float | None) -> FlopCount | None:
        return None if ratio is None else count(config.model, config.data.seq_len, ratio)

    # One token is its own unit in a dense model, whatever its result says.
    dense = 1.0 if config.model.is_dense else None
    at_evaluation, in_training = dense or result["tokens_per_concept"], dense or result["tokens_per_concept_train"]
    # A run that diverged before its last tenth has no R of it; what it cost is known from the steps that it took.
    training, evaluation = flops(in_training or _ratio_of_log(run)), flops(at_evaluation)
    full = training.full_square if training else None
    copied = ("tokens", "epochs", "loss_nats", "bits_per_byte", "wall_s", "device")
    shared = int(result.get("trunk_tokens") or 0)
    return {
        "tokens_per_concept": at_evaluation,
        "tokens_per_concept_train": in_training,
        "flops_train": training.training_per_token * result["tokens"] if training else None,
        "flops_train_full": full.training_per_token * result["tokens"] if full else None,
        "flops_per_token_forward": evaluation.forward_per_token if evaluation else None,
        "flops_per_token_decode": (
            decode(config.model, config.data.seq_len, 1, at_evaluation).forward_per_token if at_evaluation else None
        ),
        "trunk": result.get("trunk"),
        "tokens_shared": shared,
        "flops_train_marginal": training.training_per_token * (result["tokens"] - shared) if training else None,
        "loss_nats_stable": result.get("loss_nats_stable"),
        **{key: result[key] for key in copied},
        **_source_columns(run, result),
    }


def _ratio_of_log(run: StoredRun) -> float | None:
    """Tokens per concept over all steps of a run."""
    step, boundaries = 0, 0.0  # in tokens of a step
    for row in read_metrics(run.path / "metrics.jsonl"):
        boundaries += (row["step"] - step) * row.get("boundary_rate", 0.0)
        step = row["step"]
    return step / boundaries if boundaries else None


def _source_columns(run: StoredRun, result: Mapping[str, Any]) -> dict[str, float | None]:
    """What a run of a mixture measured of each source; `weight_<source>` is known before."""
    epochs, measured = result.get("epochs_by_source") or {}, result.get("sources") or {}
    columns: dict[str, float | None] = {f"epochs_{name}": value for name, value in epochs.items()}
    for name, source in measured.items():
        if absent := {"loss_nats", "bits_per_byte", "tokens_per_concept"} - set(source):
            raise UserError(
                f"{run.path / 'result.json'}: sources.{name} has no {', '.join(sorted(absent))}; delete it and submit again"
            )
        columns[f"loss_nats_{name}"] = source["loss_nats"]
        columns[f"bits_per_byte_{name}"] = source["bits_per_byte"]
        columns[f"tokens_per_concept_{name}"] = 1.0 if run.config.model.is_dense else source["tokens_per_concept"]
    return columns


def _check(run: StoredRun, result: Mapping[str, Any]) -> None:
    """Refuse a run whose files do not belong together: a result without its metrics log, or of another model."""
    path = run.path / "metrics.jsonl"
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path}: missing or empty, but the run has a result; delete {run.path} and submit again")
    steps = [int(row.get("step") or 0) for row in rows]
    if steps != sorted(set(steps)) or steps[-1] != result["step"]:
        raise UserError(
            f"{path}: its steps do not lead to step {result['step']} of result.json; delete {run.path} and submit again"
        )
    params = parameters(run.config.model)
    for group in ("total", "embedding", "token", "concept"):
        if result["params"].get(group) != getattr(params, group):
            raise UserError(
                f"{run.path / 'result.json'}: params.{group} = {result['params'].get(group)}, its config makes "
                f"{getattr(params, group)}: made by another version; delete {run.path} and submit again"
            )


def _task_columns(path: Path) -> dict[str, float | None]:
    record = read_json(path)
    if absent := {"acc", "acc_stderr"} - set(record):
        raise UserError(f"{path}: no key {', '.join(sorted(absent))}; delete it and submit the sweep again")
    return {column.replace("<task>", path.stem): record.get(key) for column, key in _TASK_KEYS.items()}
