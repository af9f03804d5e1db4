"""Counts as tables for people and programs, and the reading of what is to be counted."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlcm.config import DataConfig, ModelConfig, RunConfig
from dlcm.errors import UserError, parse
from flops.components import COMPONENTS, Cross
from flops.count import FlopCount, ParamCount, count, parameters
from flops.inference import decode, prefill


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


@dataclass(frozen=True)
class Counted:
    """A subject and everything that is counted of it.

    Attributes:
        subject: what was counted.
        params: parameters.
        flops: one window of training.
        prefill: a prompt as long as a window, with the logits of its last token alone.
        decode: one token behind a context as long as a window, with caches.
    """

    subject: Subject
    params: ParamCount
    flops: FlopCount
    prefill: FlopCount
    decode: FlopCount


def counted(
    subject: Subject, seq_len: int | None = None, tokens_per_concept: float | None = None, cross: Cross = "exact"
) -> Counted:
    """Count a subject, at the length of its sequences and at its realised R in training where that is known.

    Args:
        subject: what to count.
        seq_len: tokens of a sequence in place of the subject's.
        tokens_per_concept: R in place of the subject's.
        cross: as in `count`.

    Raises:
        UserError: a length or an R that no sequence can have.
    """
    n = subject.seq_len if seq_len is None else seq_len
    ratio = subject.tokens_per_concept_train if tokens_per_concept is None else tokens_per_concept
    model = subject.model
    return Counted(
        subject,
        parameters(model),
        count(model, n, ratio, cross=cross),
        prefill(model, n, ratio, cross=cross),
        decode(model, n, 1, ratio, cross=cross),
    )


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


def table_rows(found: Iterable[Counted]) -> list[dict[str, Any]]:
    """One row a model: parameters; FLOPs per token of forward pass, training, prompt and answer; the forward pass by component.

    `forward_over_dense` is there where exactly one of the models is dense: the forward pass over that of the dense one.
    """
    rows: list[dict[str, Any]] = []
    for item in found:
        flops, params = item.flops, item.params
        rows.append(
            {
                "name": item.subject.name,
                "model": item.subject.model.kind,
                "params_total": params.total,
                "params_non_embedding": params.non_embedding,
                "concept_share": params.concept_share,
                "concept_share_of_total": params.concept_share_of_total,
                "seq_len": flops.n_tokens,
                "tokens_per_concept": flops.tokens_per_concept,
                "forward_per_token": flops.forward_per_token,
                "forward_per_token_full_square": _square(flops).forward_per_token,
                "training_per_token": flops.training_per_token,
                "prefill_per_token": item.prefill.forward_per_token,
                "decode_per_token": item.decode.forward_per_token,
                **{part: flops.components[part] / flops.n_tokens for part in COMPONENTS},
            }
        )
    dense = [row["forward_per_token"] for row in rows if row["model"] == "dense"]
    if len(dense) == 1 and len(rows) > 1:
        for row in rows:
            row["forward_over_dense"] = row["forward_per_token"] / dense[0]
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `table_rows` as aligned text: FLOPs per token, the components as shares of the forward pass."""
    shown = [part for part in COMPONENTS if part != "embedding" and any(row[part] for row in rows)]
    figures = {
        "forward/token": "forward_per_token",
        "full square": "forward_per_token_full_square",
        "training/token": "training_per_token",
        "prefill/token": "prefill_per_token",
        "decode/token": "decode_per_token",
    }
    over_dense = bool(rows) and "forward_over_dense" in rows[0]
    cells = [["run", "N", "P", "R", "length", *figures, *(["of dense"] if over_dense else []), *shown]]
    for row in rows:
        dense = row["model"] == "dense"
        cells.append(
            [
                str(row["name"]),
                f"{row['params_non_embedding']:,}",
                "-" if dense else f"{row['concept_share']:.3f}",
                "-" if dense else f"{row['tokens_per_concept']:.3g}",
                str(row["seq_len"]),
                *(f"{row[key]:.4g}" for key in figures.values()),
                *([f"{row['forward_over_dense']:.3f}"] if over_dense else []),
                *(f"{100 * row[part] / row['forward_per_token']:.1f}%" for part in shown),
            ]
        )
    lines = [
        align(cells, left=1),
        "N: non-embedding parameters; P: the backbone's share of N; R: tokens per concept; FLOPs with the causal half of "
        "attention, unless full square.",
        "prefill: a prompt of that length, logits of its last token; decode: the token behind it, with caches; "
        "components: shares of forward.",
    ]
    return "\n".join(lines)


def format_subject(item: Counted) -> str:
    """One model by component: parameters, forward FLOPs per token causal and full-square, and the totals under them."""
    subject, params, flops = item.subject, item.params, item.flops
    square = _square(flops)
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
    dense = subject.model.is_dense
    ratio = "" if dense else f", {flops.tokens_per_concept:.3g} tokens per concept"
    share = f"; P {params.concept_share:.3f} of them, {params.concept_share_of_total:.3f} of all"
    lines = [
        f"{subject.name}: sequences of {flops.n_tokens} tokens{ratio}",
        align(cells, left=1),
        f"non-embedding parameters {params.non_embedding:,}{'' if dense else share}",
        f"training {flops.training_per_token:,.0f} FLOPs/token (3 x forward, causal halved)",
        f"answering {item.prefill.forward_per_token:,.0f} FLOPs per token of a prompt of {flops.n_tokens} tokens, "
        f"{item.decode.forward_per_token:,.0f} for a new token behind it (with caches)",
    ]
    if subject.tokens is not None:
        lines.append(
            f"run of {subject.tokens:,} tokens: {flops.training_per_token * subject.tokens:.4g} training FLOPs"
        )
    return "\n".join(lines)


def subject_json(item: Counted) -> dict[str, Any]:
    """The same as JSON."""
    subject, params, flops = item.subject, item.params, item.flops
    square = _square(flops)
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
            "concept_share_of_total": params.concept_share_of_total,
            "components": dict(params.components),
        },
        "forward_per_token": flops.forward_per_token,
        "forward_per_token_full_square": square.forward_per_token,
        "training_per_token": flops.training_per_token,
        "prefill_per_token": item.prefill.forward_per_token,
        "decode_per_token": item.decode.forward_per_token,
        "components_per_token": {part: n / flops.n_tokens for part, n in flops.components.items()},
        "components_per_token_full_square": {part: n / flops.n_tokens for part, n in square.components.items()},
        "tokens": subject.tokens,
        "flops_train": total,
    }


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `table_rows` as CSV.

    Args:
        rows: at least one.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _square(flops: FlopCount) -> FlopCount:
    return flops.full_square or flops


def align(cells: Sequence[Sequence[str]], left: int) -> str:
    """Cells in columns: the first `left` columns flush left, the others flush right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in cells
    )
