"""What a run is judged by: its loss on the fixed validation set, at the R that was asked for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm.config import RunConfig
from dlcm.model import Model, next_token_loss
from dlcm.shards import Corpus

# Tokens of one validation forward pass.
_VALIDATION_BATCH_TOKENS = 8_192


@torch.no_grad()
def calibrate_threshold(
    model: Model, corpus: Corpus, config: RunConfig, autocast: torch.autocast | None = None
) -> float | None:
    """Set the inference threshold so that R on the validation text is the requested one, and return what it was before.

    R is the independent variable of a sweep: a loss must be measured at the R that it is filed under. The boundary rate
    of single documents varies by a third around its mean, so a threshold that holds R on training text misses it by
    several per cent on a validation set of a few hundred windows. The threshold is one number, chosen from boundary scores
    alone: it sees neither targets nor losses.

    Returns:
        Tokens per concept under the threshold followed in training; None where no threshold is controlled.
    """
    if config.model.boundary is None or not model.boundary.is_controlled:
        return None
    model.eval()
    scores, n_concepts = [], 0
    for tokens_T, _, cu_seqlens, _ in _validation_batches(model, corpus, config):
        with autocast or torch.autocast(tokens_T.device.type, enabled=False):
            detected = model.detect(tokens_T, cu_seqlens)
        scores.append(detected.score_T)
        n_concepts += int(detected.decision_T.sum())
    scores_T = torch.cat(scores)
    model.boundary.calibrate(scores_T)
    return scores_T.numel() / n_concepts


@dataclass(frozen=True)
class Validation:
    """Loss on the fixed validation set."""

    loss_nats: float
    bits_per_byte: float
    tokens_per_concept: float


@torch.no_grad()
def evaluate_loss(
    model: Model, corpus: Corpus, config: RunConfig, autocast: torch.autocast | None = None
) -> Validation:
    """Mean loss over the fixed validation windows, with thresholded boundaries as at inference.

    bits per byte = total nats / ln 2 / UTF-8 bytes of the predicted tokens; the end of a document is predicted but has none.
    """
    model.eval()
    nats, n_tokens, n_concepts, n_bytes = 0.0, 0, 0, 0
    for tokens_T, targets_T, cu_seqlens, batch_bytes in _validation_batches(model, corpus, config):
        with autocast or torch.autocast(tokens_T.device.type, enabled=False):
            out = model(tokens_T, cu_seqlens=cu_seqlens)
        nats += float(next_token_loss(out, targets_T, reduction="sum"))
        n_tokens += tokens_T.numel()
        n_concepts += out.n_concepts
        n_bytes += batch_bytes
    return Validation(nats / n_tokens, nats / math.log(2) / max(n_bytes, 1), n_tokens / max(n_concepts, 1))


def _validation_batches(
    model: Model, corpus: Corpus, config: RunConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Tokens, targets, cu_seqlens and bytes of the fixed validation windows, on the device of the model."""
    device = next(model.parameters()).device
    for batch in corpus.validation.windows(
        config.data.seq_len, config.data.validation_tokens, _VALIDATION_BATCH_TOKENS
    ):
        arrays = (batch.tokens_T, batch.targets_T, batch.cu_seqlens)
        tokens_T, targets_T, cu_seqlens = (torch.from_numpy(x).to(device) for x in arrays)
        yield tokens_T, targets_T, cu_seqlens, corpus.target_bytes(batch)
