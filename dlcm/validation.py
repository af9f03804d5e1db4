"""What a run is judged by: its loss on the fixed validation set, at the R that was asked for.

The set of a mixture is a fixed one of each source, their sizes in proportion to the weights.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dlcm.config import RunConfig
from dlcm.domains import DOMAINS, StreamLabels
from dlcm.mixture import Mixture, Part, fixed_windows, parts_of
from dlcm.model import Model, Output
from dlcm.shards import Batch, Corpus, Split

# Tokens of one validation forward pass.
_VALIDATION_BATCH_TOKENS = 8_192


Domains = dict[str, dict[str, float | int | None]]
Sources = dict[str, dict[str, float | int]]


@torch.no_grad()
def calibrate_threshold(
    model: Model, corpus: Corpus | Mixture, config: RunConfig, autocast: torch.autocast | None = None
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
    parts = parts_of(corpus)
    scores_T, _ = _detect(model, parts, [part.corpus.train for part in parts], config, autocast)
    model.boundary.calibrate(scores_T)
    scores_T, n_concepts = _detect(model, parts, [part.corpus.validation for part in parts], config, autocast)
    model.boundary.calibrate(scores_T)
    return scores_T.numel() / n_concepts


def stable_loss(model: Model, corpus: Corpus | Mixture, config: RunConfig, autocast: torch.autocast) -> float:
    """Validation loss in the middle of training, in nats per token, at the R asked for; the model is left as it was."""
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    calibrate_threshold(model, corpus, config, autocast)
    found = evaluate_loss(model, corpus, config, autocast).loss_nats
    for name, x in model.named_buffers():
        x.copy_(buffers[name])
    return found


def _detect(
    model: Model, parts: Sequence[Part], splits: Sequence[Split], config: RunConfig, autocast: torch.autocast | None
) -> tuple[Tensor, int]:
    """Boundary scores of the fixed windows of all sources, and the number of boundaries under the present threshold."""
    scores, n_concepts = [], 0
    for split, n_windows in zip(splits, n_validation_windows(parts, config)):
        for _, tokens_T, _, cu_seqlens in fixed_batches(model, split, n_windows, config):
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
        loss_nats: nats per token; of a mixture, the mean of its sources' by their weights. That is the mean over the union of
            their windows where those can be shared out exactly.
        bits_per_byte: bits per UTF-8 byte of text; of a mixture, of text whose tokens are shared out by the weights.
        tokens_per_concept: realised R, over the windows of all sources: what the threshold was calibrated to.
        domains: for `code` and for `prose`: `tokens` read, `concepts` that begin with one of them, `tokens_per_concept`,
            `targets` (tokens of the domain that were predicted) and `loss_nats`, their mean loss. The tokens add up to
            those of the validation set, the concepts to its concepts, and so do the targets and targets x loss. A concept
            that spans two domains counts where it begins. Ratios are None for a domain that the text does not have.
        sources: for each source of a mixture: `weight`, `epochs` of its training text by the end of the run, and of its
            validation windows `tokens`, `loss_nats`, `bits_per_byte`, `tokens_per_concept`. None without a mixture.
    """

    loss_nats: float
    bits_per_byte: float
    tokens_per_concept: float
    domains: Domains
    sources: Sources | None = None


@torch.no_grad()
def evaluate_loss(
    model: Model, corpus: Corpus | Mixture, config: RunConfig, autocast: torch.autocast | None = None
) -> Validation:
    """Mean loss over the fixed validation windows, with thresholded boundaries as at inference.

    bits per byte = total nats / ln 2 / UTF-8 bytes of the predicted tokens; the end of a document is predicted but has none.
    """
    model.eval()
    parts = parts_of(corpus)
    found = [
        _part_sums(model, part, n, config, autocast) for part, n in zip(parts, n_validation_windows(parts, config))
    ]
    total = _DomainSums()
    for sums in found:
        total.join(sums)
    weights = [part.weight for part in parts]
    # Of a plain corpus, whose weight is 1, this is its own mean.
    loss_nats = sum(weight * sums.loss_nats for weight, sums in zip(weights, found))
    bytes_per_token = sum(weight * sums.n_bytes / sums.n_tokens for weight, sums in zip(weights, found))
    sources = None
    if isinstance(corpus, Mixture):
        epochs = corpus.train.epochs_by_source(config.tokens)
        sources = {
            part.name: {"weight": part.weight, "epochs": epochs[part.name], **sums.measures()}
            for part, sums in zip(parts, found)
        }
    bits_per_byte = loss_nats / math.log(2) / max(bytes_per_token, 1 / total.n_tokens)
    return Validation(loss_nats, bits_per_byte, total.tokens_per_concept, total.figures(), sources)


def _part_sums(
    model: Model, part: Part, n_windows: int, config: RunConfig, autocast: torch.autocast | None
) -> "_DomainSums":
    """The sums over the fixed validation windows of one source."""
    corpus, sums = part.corpus, _DomainSums()
    labels = StreamLabels(corpus.validation, corpus.tokenizer)
    for batch, tokens_T, targets_T, cu_seqlens in fixed_batches(model, corpus.validation, n_windows, config):
        with autocast or torch.autocast(tokens_T.device.type, enabled=False):
            out = model(tokens_T, cu_seqlens=cu_seqlens, targets=targets_T)
        sums.add(batch, out, labels, corpus.tokenizer.eot_id)
        sums.n_bytes += corpus.target_bytes(batch)
    return sums


@dataclass
class _DomainSums:
    """Sums by domain over the validation batches, in the order of `DOMAINS`."""

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS), np.int64))
    concepts: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS), np.int64))
    targets: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS), np.int64))
    nats: np.ndarray = field(default_factory=lambda: np.zeros(len(DOMAINS)))
    n_bytes: float = 0.0

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

    def join(self, other: "_DomainSums") -> None:
        """Add the sums over other windows."""
        self.tokens += other.tokens
        self.concepts += other.concepts
        self.targets += other.targets
        self.nats += other.nats
        self.n_bytes += other.n_bytes

    @property
    def n_tokens(self) -> int:
        """Tokens read; as many are predicted."""
        return int(self.tokens.sum())

    @property
    def loss_nats(self) -> float:
        """Nats per token."""
        return float(self.nats.sum()) / self.n_tokens

    @property
    def tokens_per_concept(self) -> float:
        """Realised R."""
        return self.n_tokens / max(int(self.concepts.sum()), 1)

    def measures(self) -> dict[str, float | int]:
        """What is said of one source."""
        return {
            "tokens": self.n_tokens,
            "loss_nats": self.loss_nats,
            "bits_per_byte": float(self.nats.sum()) / math.log(2) / max(self.n_bytes, 1),
            "tokens_per_concept": self.tokens_per_concept,
        }

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


def n_validation_windows(parts: Sequence[Part], config: RunConfig) -> list[int]:
    """Windows of the fixed validation set, of each source."""
    return fixed_windows(parts, config.data.validation_tokens, config.data.seq_len)


def fixed_batches(
    model: Model, split: Split, n_windows: int, config: RunConfig
) -> Iterator[tuple[Batch, Tensor, Tensor, Tensor]]:
    """At most `n_windows` fixed windows of a split, and their tokens, targets and cu_seqlens on the device of the model."""
    device, seq_len = next(model.parameters()).device, config.data.seq_len
    for batch in split.windows(seq_len, n_windows * seq_len, _VALIDATION_BATCH_TOKENS):
        arrays = (batch.tokens_T, batch.targets_T, batch.cu_seqlens)
        tokens_T, targets_T, cu_seqlens = (torch.from_numpy(x).to(device) for x in arrays)
        yield batch, tokens_T, targets_T, cu_seqlens
