"""What a run is judged by: its loss on the fixed validation set, at the R that was asked for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dlcm.config import RunConfig
from dlcm.domains import DOMAINS, StreamLabels
from dlcm.model import Model, Output
from dlcm.shards import Batch, Corpus, Split

# Tokens of one validation forward pass.
_VALIDATION_BATCH_TOKENS = 8_192


Domains = dict[str, dict[str, float | int | None]]


@torch.no_grad()
def calibrate_threshold(
    model: Model, corpus: Corpus, config: RunConfig, autocast: torch.autocast | None = None
) -> float | None:
    """Set the inference threshold so that R on the validation text is the requested one.

    R is the independent variable of a sweep: a loss must be measured at the R that it is filed under. The boundary rate
    of single documents varies by a third around its mean, so a threshold that holds R on training text misses it by
    several per cent on a validation set of a few hundred windows. The threshold is one number, chosen from boundary scores
    alone: it sees neither targets nor losses.

    Returns:
        Tokens per concept on the validation text under a threshold that was set on as much training text instead: how far
        off the requested R other text is to be expected. None where no threshold is controlled.
    """
    if config.model.boundary is None or not model.boundary.is_controlled:
        return None
    model.eval()
    scores_T, _ = _detect(model, corpus.train, config, autocast)
    model.boundary.calibrate(scores_T)
    scores_T, n_concepts = _detect(model, corpus.validation, config, autocast)
    model.boundary.calibrate(scores_T)
    return scores_T.numel() / n_concepts


def stable_loss(model: Model, corpus: Corpus, config: RunConfig, autocast: torch.autocast) -> float:
    """Validation loss in the middle of training, in nats per token, at the R asked for; the model is left as it was."""
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    calibrate_threshold(model, corpus, config, autocast)
    found = evaluate_loss(model, corpus, config, autocast).loss_nats
    for name, x in model.named_buffers():
        x.copy_(buffers[name])
    return found


def _detect(model: Model, split: Split, config: RunConfig, autocast: torch.autocast | None) -> tuple[Tensor, int]:
    """Boundary scores of the fixed windows of a split, and the number of boundaries under the present threshold."""
    scores, n_concepts = [], 0
    for _, tokens_T, _, cu_seqlens in _fixed_batches(model, split, config):
        with autocast or torch.autocast(tokens_T.device.type, enabled=False):
            detected = model.detect(tokens_T, cu_seqlens)
        assert detected.score_T is not None
        scores.append(detected.score_T)
        n_concepts += int(detected.decision_T.sum())
    return torch.cat(scores), n_concepts


@dataclass(frozen=True)
class Validation:
    """Loss on the fixed validation set.

    Attributes:
        loss_nats: nats per token.
        bits_per_byte: bits per UTF-8 byte of text.
        tokens_per_concept: realised R.
        domains: for `code` and for `prose`: `tokens` read, `concepts` that begin with one of them, `tokens_per_concept`,
            `targets` (tokens of the domain that were predicted) and `loss_nats`, their mean loss. The tokens add up to
            those of the validation set, the concepts to its concepts, and so do the targets and targets x loss. A concept
            that spans two domains counts where it begins. Ratios are None for a domain that the text does not have.
    """

    loss_nats: float
    bits_per_byte: float
    tokens_per_concept: float
    domains: Domains


@torch.no_grad()
def evaluate_loss(
    model: Model, corpus: Corpus, config: RunConfig, autocast: torch.autocast | None = None
) -> Validation:
    """Mean loss over the fixed validation windows, with thresholded boundaries as at inference.

    bits per byte = total nats / ln 2 / UTF-8 bytes of the predicted tokens; the end of a document is predicted but has none.
    """
    model.eval()
    sums, labels, n_bytes = _DomainSums(), StreamLabels(corpus.validation, corpus.tokenizer), 0
    for batch, tokens_T, targets_T, cu_seqlens in _fixed_batches(model, corpus.validation, config):
        with autocast or torch.autocast(tokens_T.device.type, enabled=False):
            out = model(tokens_T, cu_seqlens=cu_seqlens, targets=targets_T)
        sums.add(batch, out, labels, corpus.tokenizer.eot_id)
        n_bytes += corpus.target_bytes(batch)
    n_tokens, n_concepts, nats = int(sums.tokens.sum()), int(sums.concepts.sum()), float(sums.nats.sum())
    return Validation(
        nats / n_tokens, nats / math.log(2) / max(n_bytes, 1), n_tokens / max(n_concepts, 1), sums.figures()
    )


@dataclass
class _DomainSums:
    """Sums by domain over the validation batches, in the order of `DOMAINS`."""

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS), np.int64))
    concepts: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS), np.int64))
    targets: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS), np.int64))
    nats: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS)))

    def add(self, batch: Batch, out: Output, labels: StreamLabels, eot_id: int) -> None:
        """Add one batch. What is read and what is predicted are one token apart, so they have labels of their own."""
        seq_len = len(batch.tokens_T) // len(batch.windows)
        labels_WS = labels[batch.windows[:, None] + np.arange(seq_len + 1)]
        read_T, predicted_T = labels_WS[:, :-1].reshape(-1), labels_WS[:, 1:].reshape(-1)
        # An end of text opens the next document where it is read; where it is predicted it closes the one before.
        predicted_T = np.where(batch.targets_T == eot_id, read_T, predicted_T)
        assert out.nats is not None
        nats_T = out.nats.double().cpu().numpy()
        n = len(DOMAINS)
        self.tokens += np.bincount(read_T, minlength=n)
        self.concepts += np.bincount(read_T[out.boundaries.cpu().numpy()], minlength=n)
        self.targets += np.bincount(predicted_T, minlength=n)
        self.nats += np.bincount(predicted_T, nats_T, minlength=n)

    def figures(self) -> Domains:
        """The figures of `Validation.domains`."""
        return {
            name: {
                "tokens": int(self.tokens[i]),
                "concepts": int(self.concepts[i]),
                "tokens_per_concept": float(self.tokens[i] / self.concepts[i]) if self.concepts[i] else None,
                "targets": int(self.targets[i]),
                "loss_nats": float(self.nats[i] / self.targets[i]) if self.targets[i] else None,
            }
            for i, name in enumerate(DOMAINS)
        }


def _fixed_batches(model: Model, split: Split, config: RunConfig) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
    """The fixed windows of a split, and their tokens, targets and cu_seqlens on the device of the model."""
    device = next(model.parameters()).device
    for batch in split.windows(config.data.seq_len, config.data.validation_tokens, _VALIDATION_BATCH_TOKENS):
        arrays = (batch.tokens_T, batch.targets_T, batch.cu_seqlens)
        tokens_T, targets_T, cu_seqlens = (torch.from_numpy(x).to(device) for x in arrays)
        yield batch, tokens_T, targets_T, cu_seqlens
