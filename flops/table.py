"""Counts as tables for people and programs, and the reading of what is to be counted."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlcm.config import DataConfig, ModelConfig, RunConfig
from dlcm.errors import UserError, parse
from flops.count import COMPONENTS, FlopCount, ParamCount

_ROW = ("name", "params_total", "params_non_embedding", "concept_share", "tokens_per_concept")


@dataclass(frozen=True)
class Subject:
    """What is counted: a model, the length of its sequences, and of a run also its tokens and its realised R.

    Attributes:
        name: run id or file.
        model: the architecture.
        seq_len: tokens of one sequence.
        tokens: training tokens of a run; None for a model alone.
        tokens_per_concept: realised R at evaluation of a finished run; None before that.
        tokens_per_concept_train: realised R at the end of training; None before that.
    """

    name: str
    model: ModelConfig
    seq_len: int
    tokens: int | None = None
    tokens_per_concept: float | None = None
    tokens_per_concept_train: float | None = None


def load_subject(path: Path) -> Subject:
    """Read a run folder, a run.json, or a YAML or JSON file with a run config or a model config.

    Raises:
        UserError: nothing there that can be counted, or a key that no config has.
    """
    from dlcm.record import read_json

    if path.is_dir():
        if not (path / "run.json").exists():
            raise UserError(f"{path}: no run here (run.json is absent); give a run folder, or a config file")
        subject = _from_mapping(read_json(path / "run.json"), str(path / "run.json"), path.name)
        result = read_json(path / "result.json") if (path / "result.json").exists() else {}
        realised = (result.get("tokens_per_concept"), result.get("tokens_per_concept_train"))
        return Subject(subject.name, subject.model, subject.seq_len, subject.tokens, *realised)
    if path.suffix == ".json":
        return _from_mapping(read_json(path), str(path), path.stem)
    from dlcm.yaml_io import load_yaml

    return _from_mapping(load_yaml(path), str(path), path.stem)


def _from_mapping(data: Mapping[str, Any], where: str, name: str) -> Subject:
    if "config" in data:
        data = data["config"]
    if "axes" in data or "base" in data:
        raise UserError(f"{where}: this is a sweep; `dlcm flops table` shows the cost of its runs")
    if "model" not in data:
        return Subject(name, parse(ModelConfig, data, where), DataConfig().seq_len)
    config = parse(RunConfig, data, where)
    return Subject(config.run_id, config.model, config.data.seq_len, config.tokens)


def table_rows(counted: Iterable[tuple[str, ParamCount, FlopCount]]) -> list[dict[str, Any]]:
    """One row a model: parameters, forward FLOPs per token by component, their sum, its full-square twin, training."""
    rows = []
    for name, params, flops in counted:
        square = flops.full_square or flops
        rows.append(
            {
                "name": name,
                "params_total": params.total,
                "params_non_embedding": params.non_embedding,
                "concept_share": params.concept_share,
                "tokens_per_concept": flops.tokens_per_concept,
                **{part: flops.components[part] / flops.n_tokens for part in COMPONENTS},
                "forward_per_token": flops.forward_per_token,
                "forward_per_token_full_square": square.forward_per_token,
                "training_per_token": flops.training_per_token,
            }
        )
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `table_rows` as aligned text: FLOPs per token, the components as shares of the forward pass."""
    shown = [part for part in COMPONENTS if part != "embedding" and any(row[part] for row in rows)]
    head = ["run", "N", "P", "R", "forward/token", "full square", "training/token", *shown]
    cells = [head]
    for row in rows:
        share = row["concept_share"]
        cells.append(
            [
                str(row["name"]),
                f"{row['params_non_embedding']:,}",
                f"{share:.3f}" if share else "-",
                f"{row['tokens_per_concept']:.3g}" if share else "-",
                *(
                    f"{row[key]:.4g}"
                    for key in ("forward_per_token", "forward_per_token_full_square", "training_per_token")
                ),
                *(f"{100 * row[part] / row['forward_per_token']:.1f}%" for part in shown),
            ]
        )
    return align(cells, left=1)


def format_subject(subject: Subject, params: ParamCount, flops: FlopCount) -> str:
    """One model by component: parameters, forward FLOPs per token causal and full-square, and the totals under them."""
    square = flops.full_square or flops
    cells = [["component", "parameters", "forward FLOPs/token", "share", "full square"]]
    for part in COMPONENTS:
        if params.components[part] or flops.components[part]:
            cells.append(
                [
                    part,
                    f"{params.components[part]:,}",
                    f"{flops.components[part] / flops.n_tokens:,.0f}",
                    f"{100 * flops.share(part):.1f}%",
                    f"{square.components[part] / flops.n_tokens:,.0f}",
                ]
            )
    cells.append(
        ["total", f"{params.total:,}", f"{flops.forward_per_token:,.0f}", "", f"{square.forward_per_token:,.0f}"]
    )
    ratio = "" if subject.model.is_dense else f", {flops.tokens_per_concept:.3g} tokens per concept"
    lines = [
        f"{subject.name}: sequences of {flops.n_tokens} tokens{ratio}",
        align(cells, left=1),
        f"non-embedding parameters {params.non_embedding:,}; concept share P {params.concept_share:.3f}",
        f"training {flops.training_per_token:,.0f} FLOPs/token (3 x forward, causal halved)",
    ]
    if subject.tokens is not None:
        lines.append(
            f"run of {subject.tokens:,} tokens: {flops.training_per_token * subject.tokens:.4g} training FLOPs"
        )
    return "\n".join(lines)


def subject_json(subject: Subject, params: ParamCount, flops: FlopCount) -> dict[str, Any]:
    """The same as JSON."""
    square = flops.full_square or flops
    total = None if subject.tokens is None else flops.training_per_token * subject.tokens
    return {
        "name": subject.name,
        "seq_len": flops.n_tokens,
        "tokens_per_concept": flops.tokens_per_concept,
        "params": {
            "total": params.total,
            "embedding": params.embedding,
            "token": params.token,
            "concept": params.concept,
            "non_embedding": params.non_embedding,
            "concept_share": params.concept_share,
            "components": dict(params.components),
        },
        "forward_per_token": flops.forward_per_token,
        "forward_per_token_full_square": square.forward_per_token,
        "training_per_token": flops.training_per_token,
        "components_per_token": {part: n / flops.n_tokens for part, n in flops.components.items()},
        "components_per_token_full_square": {part: n / flops.n_tokens for part, n in square.components.items()},
        "tokens": subject.tokens,
        "flops_train": total,
    }


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `table_rows` as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else list(_ROW), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def align(cells: Sequence[Sequence[str]], left: int) -> str:
    """Cells in columns: the first `left` columns flush left, the others flush right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    )
