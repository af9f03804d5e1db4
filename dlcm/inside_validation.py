"""The validation set seen from inside the concepts: written to `inside.json` of a run, read by figures without torch.

Three questions, each with standard errors over documents (`dlcm.concept_statistics`):

- Where in a concept is the loss? By the place of the token that is predicted, beside the loss of a dense model on the very same
  tokens: which tokens stand first or last is the model's own choice, so only the difference says what concepts do to a place.
- Does the content decide how long concepts are? R of code and of prose, and of each source of a mixture.
- What do boundaries in other places cost? The loss under a fixed stride with as many concepts.

T tokens of the validation set: each window's in turn, as in validation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dlcm.concept_statistics import (
    RELATIVE_BINS,
    Places,
    grouped_ratio,
    loss_by_place,
    places_in_concepts,
    tokens_per_concept_by,
)
from dlcm.domains import DOMAINS, StreamLabels
from dlcm.errors import UserError
from dlcm.inside import fixed_stride
from dlcm.mixture import parts_of
from dlcm.opened import OpenRun
from dlcm.provenance import source_commit
from dlcm.record import write_json
from dlcm.validation import fixed_batches, n_validation_windows

Array = np.ndarray

INSIDE_SCHEMA = 1
INSIDE_FILE = "inside.json"
# Places from the start, and from the end, that are told apart: three concepts' worth of tokens, within these bounds.
_FEWEST_PLACES, _MOST_PLACES = 8, 32

OnProgress = Callable[[str, int, int], None]
"""Called with what is measured, the windows done and the windows in all."""


@dataclass(frozen=True)
class ValidationTokens:
    """Every token of the validation set.

    Attributes:
        document_T: int64, its document; those of all sources are told apart.
        source_T: int64, its source.
        label_T: uint8, its content, as an index of `DOMAINS`.
        position_T: int64, from the start of its sequence: a document, or the part of one that is in the window.
        cu_seqlens: int64, starts of the sequences and the number of tokens.
        opens_T: bool, whether it is the end of text that opens a document.
        closes_S: bool, whether a document ends with the sequence.
    """

    document_T: Array
    source_T: Array
    label_T: Array
    position_T: Array
    cu_seqlens: Array
    opens_T: Array
    closes_S: Array


@dataclass(frozen=True)
class ValidationReading:
    """What a model makes of them.

    Attributes:
        nats_T: loss of each token given those before it; NaN at the start of a sequence.
        begins_T: bool, whether a concept begins.
    """

    nats_T: Array
    begins_T: Array


def measure_inside(run: OpenRun, dense: OpenRun | None = None, progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure the validation set from inside the concepts of a run, and write `inside.json` in its directory.

    Args:
        run: a DLCM.
        dense: a dense model on the same text, to compare with.
        progress: told how far it is.

    Returns:
        The content of the file; `docs/inside.md` describes it.

    Raises:
        UserError: a run without concepts; or one to compare with that has them, or has other validation tokens.
    """
    boundary = run.config.model.boundary
    if boundary is None:
        raise UserError(f"{run.run_dir}: a dense model has no concepts; give a DLCM run, and this one as --against")
    if dense is not None:
        _check_comparable(run, dense)
    tokens = validation_tokens(run)
    own = read_validation(run, "own boundaries", progress)
    n_tokens, n_concepts = len(own.nats_T), int(own.begins_T.sum())
    stride = stride_for(np.diff(tokens.cu_seqlens), n_concepts)
    control_T = fixed_stride(tokens.position_T, stride)
    control = None
    if boundary.detector != "fixed":
        control = read_validation(run, "boundaries of the control", progress, control_T)
    nats_T = None if dense is None else read_validation(dense, "dense model", progress).nats_T
    label_T, document_T = tokens.label_T.astype(np.int64), tokens.document_T
    record: dict[str, Any] = {
        "schema": INSIDE_SCHEMA,
        "run_id": run.config.run_id,
        "checkpoint": run.checkpoint,
        "commit": source_commit()[0],
        "detector": boundary.detector,
        "compression_target": boundary.compression_ratio,
        "n_tokens": n_tokens,
        "n_concepts": n_concepts,
        "n_documents": len(np.unique(document_T)),
        "tokens_per_concept": _overall(np.ones(n_tokens), own.begins_T, document_T),
        "loss_nats": _mean_loss(own.nats_T, document_T),
        "places": _by_place(tokens, own, nats_T, boundary.compression_ratio),
        "content": _by(label_T, DOMAINS, own, document_T),
        "sources": _by(tokens.source_T, [part.name for part in parts_of(run.corpus)], own, document_T)
        if run.config.data.mixture is not None
        else None,
        "control": None,
        "dense": None,
    }
    if control is not None:
        record["control"] = {
            "stride": stride,
            "n_concepts": int(control_T.sum()),
            "loss_nats": _mean_loss(control.nats_T, document_T),
            "difference_nats": _mean_loss(control.nats_T - own.nats_T, document_T),
            "places": _by_place(tokens, control, nats_T, boundary.compression_ratio),
        }
    if dense is not None and nats_T is not None:
        record["dense"] = {
            "run_id": dense.config.run_id,
            "checkpoint": dense.checkpoint,
            "loss_nats": _mean_loss(nats_T, document_T),
            "difference_nats": _mean_loss(own.nats_T - nats_T, document_T),
        }
    write_json(run.run_dir / INSIDE_FILE, record)
    return record


def validation_tokens(run: OpenRun) -> ValidationTokens:
    """What is known of the validation tokens of a run without a model."""
    found: dict[str, list[Array]] = {name: [] for name in ValidationTokens.__dataclass_fields__}
    n_before = n_documents = 0
    parts = parts_of(run.corpus)
    for number, (part, n_windows) in enumerate(zip(parts, n_validation_windows(parts, run.config))):
        split, eot_id = part.corpus.validation, run.tokenizer.eot_id
        labels = StreamLabels(split, run.tokenizer)
        for batch, *_ in fixed_batches(run.model, split, n_windows, run.config):
            n_tokens = len(batch.tokens_T)
            starts, ends = batch.cu_seqlens[:-1].astype(np.int64), batch.cu_seqlens[1:].astype(np.int64)
            place = batch.windows[:, None] + np.arange(n_tokens // len(batch.windows))
            place_T = place.reshape(-1)
            found["document_T"].append(n_documents + np.searchsorted(split.offsets, place_T, side="right") - 1)
            found["source_T"].append(np.full(n_tokens, number))
            found["label_T"].append(labels[place].reshape(-1))
            found["position_T"].append(np.arange(n_tokens) - np.repeat(starts, ends - starts))
            found["cu_seqlens"].append(n_before + starts)
            found["opens_T"].append(batch.tokens_T == eot_id)
            found["closes_S"].append(batch.targets_T[ends - 1] == eot_id)
            n_before += n_tokens
        n_documents += split.n_documents
    found["cu_seqlens"].append(np.array([n_before]))
    return ValidationTokens(**{name: np.concatenate(pieces) for name, pieces in found.items()})


@torch.no_grad()
def read_validation(
    run: OpenRun, what: str, progress: OnProgress | None = None, boundaries_T: Array | None = None
) -> ValidationReading:
    """Read the validation set with a model, with its own boundaries or with injected ones.

    Args:
        run: the run, which also says which tokens these are.
        what: said to `progress`.
        progress: told how far it is.
        boundaries_T: bool, injected; true at the start of every sequence.
    """
    nats, begins, done = [], [], 0
    parts = parts_of(run.corpus)
    windows = n_validation_windows(parts, run.config)
    for part, n_windows in zip(parts, windows):
        batches = fixed_batches(run.model, part.corpus.validation, n_windows, run.config)
        for batch, tokens_T, targets_T, cu_seqlens in batches:
            injected_T = None
            if boundaries_T is not None:
                start = sum(map(len, nats))
                injected_T = torch.from_numpy(boundaries_T[start : start + len(batch.tokens_T)]).to(run.device)
            with run.autocast:
                out = run.model(tokens_T, cu_seqlens=cu_seqlens, boundaries=injected_T, targets=targets_T)
            assert out.nats is not None
            # The loss of a token stands where the one before it is read.
            nats_T = np.roll(out.nats.double().cpu().numpy(), 1)
            nats_T[batch.cu_seqlens[:-1]] = np.nan
            nats.append(nats_T)
            begins.append(out.boundaries.cpu().numpy())
            done += len(batch.windows)
            if progress is not None:
                progress(what, done, sum(windows))
    return ValidationReading(np.concatenate(nats), np.concatenate(begins))


def stride_for(lengths_S: Array, n_concepts: int) -> float:
    """The stride at which sequences of these lengths have this many concepts, or as near to it as a stride comes.

    A sequence of n tokens has ceil(n / R) of them, which falls with R.

    Args:
        lengths_S: tokens of each sequence, 1 or more.
        n_concepts: concepts of all together; at least one a sequence, at most one a token.
    """
    low, high = 1.0, float(lengths_S.max())

    def count(stride: float) -> int:
        return int(np.ceil(lengths_S / stride).sum())

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) >= n_concepts else (low, middle)
    return min(low, high, key=lambda stride: abs(count(stride) - n_concepts))


def _check_comparable(run: OpenRun, dense: OpenRun) -> None:
    if not dense.config.model.is_dense:
        raise UserError(f"{dense.run_dir}: --against takes a dense run; this one has concepts")
    for name, of in (
        ("text", lambda r: r.corpus.fingerprint),
        ("tokenizer", lambda r: r.tokenizer.fingerprint),
        ("data.seq_len", lambda r: r.config.data.seq_len),
        ("data.validation_tokens", lambda r: r.config.data.validation_tokens),
        ("weights of the mixture", lambda r: [part.weight for part in parts_of(r.corpus)]),
    ):
        if of(run) != of(dense):
            raise UserError(
                f"{dense.run_dir}: its {name} is not that of {run.run_dir}, so their losses are of other tokens; "
                "compare runs of one sweep"
            )


def _by_place(
    tokens: ValidationTokens, reading: ValidationReading, dense_T: Array | None, ratio: float
) -> dict[str, Any]:
    """Loss by place, of the model, of the dense model on the same tokens, and of the difference, model less dense."""
    places = places_in_concepts(reading.begins_T, tokens.cu_seqlens, tokens.opens_T, tokens.closes_S)
    n_places = min(max(round(3 * ratio), _FEWEST_PLACES), _MOST_PLACES)
    groups = {
        "offset": (places.offset_T, n_places),
        "from_end": (_from_end(places), n_places),
        "relative": (places.relative_T, RELATIVE_BINS),
    }
    losses = {"model": reading.nats_T}
    if dense_T is not None:
        losses |= {"dense": dense_T, "difference": reading.nats_T - dense_T}
    return {
        name: {key: loss_by_place(nats_T, group_T, tokens.document_T, n).rows() for key, nats_T in losses.items()}
        for name, (group_T, n) in groups.items()
    }


def _from_end(places: Places) -> Array:
    known = (places.offset_T >= 0) & (places.length_T > 0)
    return np.where(known, places.length_T - 1 - places.offset_T, -1)


def _by(group_T: Array, names: Any, reading: ValidationReading, document_T: Array) -> dict[str, Any]:
    ratios = tokens_per_concept_by(group_T, reading.begins_T, document_T, len(names)).rows()
    losses = loss_by_place(reading.nats_T, group_T, document_T, len(names)).rows()
    return {name: {"tokens_per_concept": r, "loss_nats": loss} for name, r, loss in zip(names, ratios, losses)}


def _overall(y_T: Array, x_T: Array, document_T: Array) -> dict[str, Any]:
    return grouped_ratio(y_T, x_T, np.zeros(len(y_T), np.int64), document_T, 1).rows()[0]


def _mean_loss(nats_T: Array, document_T: Array) -> dict[str, Any]:
    return loss_by_place(nats_T, np.zeros(len(nats_T), np.int64), document_T, 1).rows()[0]
