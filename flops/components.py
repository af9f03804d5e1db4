"""FLOPs of the whole model from those of its operations: one arithmetic for one config, for many, and with caches."""

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import ops

COMPONENTS = (
    "embedding", "encoder", "boundary", "pooling", "backbone", "smoothing", "cross_attention", "decoder", "head",
)  # fmt: skip
Cross = Literal["exact", "replicated"]

_FIELDS = (
    "vocab_size", "d_token", "d_concept", "d_head", "n_heads_token", "n_kv_heads_token", "n_heads_concept",
    "n_kv_heads_concept", "d_ff_token", "d_ff_concept", "n_encoder_layers", "n_concept_layers", "n_decoder_layers",
)  # fmt: skip
_FIELDS_OF = operator.attrgetter(*_FIELDS)


class Sizes(NamedTuple):
    """What of a config costs FLOPs: its fields by their names, integers or arrays of them.

    A dense model has zeros on the concept side, where every operation then costs nothing. `n_cross_attentions` counts decoder
    layers that have one; `d_scan` is zero unless boundaries are learned, `smoothed` is one where concepts are smoothed.
    """

    vocab_size: Any
    d_token: Any
    d_concept: Any
    d_head: Any
    n_heads_token: Any
    n_kv_heads_token: Any
    n_heads_concept: Any
    n_kv_heads_concept: Any
    d_ff_token: Any
    d_ff_concept: Any
    n_encoder_layers: Any
    n_concept_layers: Any
    n_decoder_layers: Any
    n_cross_attentions: Any
    d_scan: Any
    smoothed: Any

    @classmethod
    def of(cls, config: ModelConfig) -> "Sizes":
        """The sizes of one config."""
        return cls(*_sizes(config))

    @classmethod
    def of_many(cls, configs: Sequence[ModelConfig]) -> "Sizes":
        """The sizes of many configs, an array each."""
        rows = [_sizes(config) for config in configs]
        return cls(*np.array(rows, dtype=np.int64).reshape(len(rows), len(cls._fields)).T)


def _sizes(config: ModelConfig) -> tuple[int, ...]:
    boundary = config.boundary
    learned = boundary is not None and boundary.detector == "learned"
    scan = boundary.d_scan if boundary is not None and learned else 0
    return (*_FIELDS_OF(config), config.n_cross_attentions, scan, int(config.smoothing == "causal"))


class Work(NamedTuple):
    """What passes through the model, in numbers or arrays.

    Attributes:
        n_tokens: tokens through embedding, encoder and decoder.
        n_concepts: concepts through pooling, backbone and smoother.
        n_logits: tokens whose logits are computed.
        token_pairs: query-key pairs of a self-attention over tokens.
        concept_pairs: query-key pairs of a self-attention over concepts.
        cross_pairs: query-key pairs of a cross-attention.
    """

    n_tokens: Any
    n_concepts: Any
    n_logits: Any
    token_pairs: Any
    concept_pairs: Any
    cross_pairs: Any

    def squared(self) -> "Work":
        """The same with every attention as a full square, twice its causal half."""
        pairs = (2 * self.token_pairs, 2 * self.concept_pairs, 2 * self.cross_pairs)
        return Work(self.n_tokens, self.n_concepts, self.n_logits, *pairs)


def forward_flops(sizes: Sizes, work: Work) -> dict[str, Any]:
    """Forward FLOPs by component: the sum of `flops.ops` over the layers of the model.

    Args:
        sizes: of one config, or of many.
        work: for all configs the same, or an array over them.

    Returns:
        A number, or an array, for each of `COMPONENTS`.
    """
    s, w = sizes, work
    heads = (s.n_heads_token, s.n_kv_heads_token, s.d_head)
    token_layer = ops.layer(w.n_tokens, w.token_pairs, s.d_token, *heads, s.d_ff_token)
    concept_heads = (s.n_heads_concept, s.n_kv_heads_concept, s.d_head)
    concept_layer = ops.layer(w.n_concepts, w.concept_pairs, s.d_concept, *concept_heads, s.d_ff_concept)
    cross = ops.cross_projections(w.n_tokens, w.n_concepts, s.d_token, s.d_concept, *heads)
    cross = cross + ops.attention_scores(w.cross_pairs, s.n_heads_token, s.d_head)
    return {
        "embedding": 0 * s.d_token,
        "encoder": s.n_encoder_layers * token_layer,
        "boundary": ops.boundary(w.n_tokens, s.d_token, s.d_scan),
        "pooling": ops.pooling(w.n_concepts, s.d_token, s.d_concept),
        "backbone": s.n_concept_layers * concept_layer,
        "smoothing": s.smoothed * ops.smoothing(w.n_concepts, s.d_concept),
        "cross_attention": s.n_cross_attentions * cross,
        "decoder": s.n_decoder_layers * token_layer,
        "head": ops.logits(w.n_logits, s.d_token, s.vocab_size),
    }


def checked_ratio(config: ModelConfig, tokens_per_concept: float | None) -> float:
    """R at which a config is counted: what is given, else its target; always 1 for a dense model.

    Raises:
        UserError: below 1.
    """
    asked = config.compression_target if tokens_per_concept is None else tokens_per_concept
    ratio = 1.0 if config.is_dense else float(asked)
    if not ratio >= 1.0:
        raise UserError(f"tokens_per_concept = {ratio:g} is below 1; a concept holds at least one token")
    return ratio
