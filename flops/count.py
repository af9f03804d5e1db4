"""What a configuration costs: parameters and FLOPs by component, in closed form from `flops.ops`."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import ops
from flops.components import COMPONENTS, Cross, Sizes, Work, checked_ratio, forward_flops


@dataclass(frozen=True)
class ParamCount:
    """Parameters of a model. P is defined over the non-embedding parameters.

    Attributes:
        embedding: embedding and unembedding.
        token: everything on the token side: encoder, decoder, cross-attention, boundary, pooling, smoother, final norm.
        concept: the layers of the concept backbone, and nothing else.
        components: the same by component; the components sum to the total.
    """

    embedding: int
    token: int
    concept: int
    components: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.token + self.concept

    @property
    def non_embedding(self) -> int:
        """N without embedding and unembedding."""
        return self.token + self.concept

    @property
    def concept_share(self) -> float:
        """P, the backbone's share of the non-embedding parameters; 0 for a dense model."""
        return self.concept / self.non_embedding

    @property
    def concept_share_of_total(self) -> float:
        """The backbone's share of all parameters, embeddings included; not what P means here."""
        return self.concept / self.total


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one sequence (a packed window) by component, and its twin with attention scores as full squares.

    Attributes:
        n_tokens: length of the sequence, L.
        tokens_per_concept: R at which it was counted; 1 for a dense model.
        components: forward FLOPs of the sequence by component.
        full_square: the same count with every attention as a full square; None on that twin itself.
    """

    n_tokens: int
    tokens_per_concept: float
    components: Mapping[str, float]
    full_square: "FlopCount | None" = None

    @property
    def forward(self) -> float:
        """Forward FLOPs of the sequence."""
        return math.fsum(self.components.values())

    @property
    def training(self) -> float:
        """Forward and backward FLOPs of the sequence, without recomputation."""
        return ops.TRAINING_FACTOR * self.forward

    @property
    def forward_per_token(self) -> float:
        """Forward FLOPs over tokens."""
        return self.forward / self.n_tokens

    @property
    def training_per_token(self) -> float:
        """Training FLOPs over tokens."""
        return self.training / self.n_tokens

    def share(self, component: str) -> float:
        """The component's share of the forward FLOPs."""
        return self.components[component] / self.forward


@dataclass(frozen=True, eq=False)
class FlopCounts:
    """`FlopCount` of many configs: the same attributes, an array over the configs each.

    Attributes:
        n_tokens: length of the sequence.
        tokens_per_concept: R at which it was counted; 1 for a dense model.
        components: forward FLOPs of the sequence by component.
        full_square: the same count with every attention as a full square; None on that twin itself.
    """

    n_tokens: np.ndarray
    tokens_per_concept: np.ndarray
    components: Mapping[str, np.ndarray]
    full_square: "FlopCounts | None" = None

    @functools.cached_property
    def forward(self) -> np.ndarray:
        """Forward FLOPs of the sequence."""
        # fsum, as in `FlopCount`: one plan must not know two costs of a run that differ in the last bit.
        rows = zip(*(part.tolist() for part in self.components.values()))
        return np.fromiter(map(math.fsum, rows), np.float64, self.n_tokens.size)

    @property
    def training(self) -> np.ndarray:
        """Forward and backward FLOPs of the sequence, without recomputation."""
        return ops.TRAINING_FACTOR * self.forward

    @property
    def forward_per_token(self) -> np.ndarray:
        """Forward FLOPs over tokens."""
        return self.forward / self.n_tokens

    @property
    def training_per_token(self) -> np.ndarray:
        """Training FLOPs over tokens."""
        return self.training / self.n_tokens

    def share(self, component: str) -> np.ndarray:
        """The component's share of the forward FLOPs."""
        return self.components[component] / self.forward

    def __len__(self) -> int:
        return self.n_tokens.size

    def __getitem__(self, i: int) -> FlopCount:
        """The count of one config, equal to that of `count`."""
        parts = {name: part[i].item() for name, part in self.components.items()}
        square = None if self.full_square is None else self.full_square[i]
        return FlopCount(int(self.n_tokens[i]), float(self.tokens_per_concept[i]), parts, square)


def parameters(config: ModelConfig) -> ParamCount:
    """Parameters of `config` by group and component (closed form, equal to the built model's).

    Args:
        config: DLCM or dense.

    Returns:
        Exact integers.
    """
    c = config
    token_layer = ops.layer_parameters(c.d_token, c.n_heads_token, c.n_kv_heads_token, c.d_head, c.d_ff_token)
    embedding = ops.embedding_parameters(c.vocab_size, c.d_token, tied=True)
    head = 0 if c.tie_embeddings else embedding
    parts: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    parts |= {"embedding": embedding, "encoder": c.n_encoder_layers * token_layer, "head": head + c.d_token}
    if not c.is_dense:
        assert c.boundary is not None  # the config's own check; narrows the type
        smoothed = c.smoothing == "causal"
        between = ops.concept_side_parameters(c.d_token, c.d_concept, smoothed=False, with_null=c.pooling == "mean")
        cross = ops.cross_parameters(c.d_token, c.d_concept, c.n_heads_token, c.n_kv_heads_token, c.d_head)
        backbone = ops.layer_parameters(c.d_concept, c.n_heads_concept, c.n_kv_heads_concept, c.d_head, c.d_ff_concept)
        learned = c.boundary.detector == "learned"
        parts |= {
            "boundary": ops.boundary_parameters(c.d_token, c.boundary.d_scan) if learned else 0,
            "pooling": between,
            "backbone": c.n_concept_layers * backbone,
            "smoothing": ops.SMOOTHER_WIDTH * c.d_concept if smoothed else 0,
            "cross_attention": c.n_cross_attentions * cross,
            "decoder": c.n_decoder_layers * token_layer,
        }
    concept = parts["backbone"]
    return ParamCount(embedding + head, sum(parts.values()) - embedding - head - concept, concept, parts)


def count(
    config: ModelConfig,
    seq_len: int = 2048,
    tokens_per_concept: float | None = None,
    *,
    cross: Cross = "exact",
    documents: Sequence[int] | None = None,
    concepts: Sequence[float] | None = None,
) -> FlopCount:
    """FLOPs of one sequence through `config`.

    Attention never crosses a document, so a packed window of several documents costs less than one document of its
    length: S = sum of L_i²/2. Everything else depends on the total only.

    Args:
        config: DLCM or dense.
        seq_len: tokens of the sequence, one document unless `documents` is given.
        tokens_per_concept: realised R; the config's target by default. Ignored for a dense model.
        cross: `exact` counts token-to-concept scores once per visible concept (L·M/2), `replicated` once per
            visible token (L²/2), as concept replication computes them.
        documents: lengths in tokens of the documents packed in the sequence; they replace `seq_len`.
        concepts: concepts of each document where they are known; length over R by default.

    Returns:
        The causal count, with its full-square twin at `.full_square`.

    Raises:
        UserError: lengths or R that no sequence can have.
    """
    lengths = [seq_len] if documents is None else [int(n) for n in documents]
    if not lengths or min(lengths) < 0 or sum(lengths) < 1:
        raise UserError(f"a FLOP count needs a sequence of at least one token, got lengths {lengths[:8]}")
    ratio = checked_ratio(config, tokens_per_concept)
    counts = [n / ratio for n in lengths] if concepts is None else list(concepts)
    if len(counts) != len(lengths):
        raise UserError(f"{len(counts)} concept counts for {len(lengths)} documents; give one for each")
    n_tokens, n_concepts = sum(lengths), sum(counts)
    if n_concepts and concepts is not None:
        ratio = n_tokens / n_concepts
    work = Work(
        n_tokens,
        n_concepts,
        n_tokens,
        math.fsum(ops.causal_pairs(n) for n in lengths),
        math.fsum(ops.causal_pairs(m) for m in counts),
        math.fsum(ops.cross_pairs(n, m, cross == "replicated") for n, m in zip(lengths, counts)),
    )
    sizes = Sizes.of(config)
    square = FlopCount(n_tokens, ratio, forward_flops(sizes, work.squared()))
    return FlopCount(n_tokens, ratio, forward_flops(sizes, work), square)


def count_many(
    configs: Sequence[ModelConfig],
    seq_len: int | Sequence[int] = 2048,
    tokens_per_concept: float | Sequence[float] | None = None,
    *,
    cross: Cross = "exact",
) -> FlopCounts:
    """`count` of many configs at once, about ten times as fast: the same arithmetic on arrays, the same figures to the last bit.

    Args:
        configs: DLCM and dense, in any order.
        seq_len: tokens of the sequence, one document; one for all, or one for each config.
        tokens_per_concept: realised R, likewise; the target of each config by default. Ignored for dense models.
        cross: as in `count`.

    Returns:
        Arrays, in the order of the configs.

    Raises:
        UserError: lengths or R that no sequence can have, or not one for each config.
    """
    lengths = _one_each("seq_len", seq_len, len(configs), np.int64)
    if lengths.size and lengths.min() < 1:
        raise UserError(f"a FLOP count needs a sequence of at least one token, got seq_len = {lengths.min()}")
    if tokens_per_concept is None:
        ratios = np.array([config.compression_target for config in configs], dtype=np.float64)
    else:
        ratios = _one_each("tokens_per_concept", tokens_per_concept, len(configs), np.float64)
        ratios = np.where([config.is_dense for config in configs], 1.0, ratios)
    if not (ratios >= 1.0).all():
        raise UserError(f"tokens_per_concept = {ratios.min():g} is below 1; a concept holds at least one token")
    n_concepts = lengths / ratios
    pairs = (ops.causal_pairs(lengths), ops.causal_pairs(n_concepts))
    work = Work(lengths, n_concepts, lengths, *pairs, ops.cross_pairs(lengths, n_concepts, cross == "replicated"))
    sizes = Sizes.of_many(configs)
    square = FlopCounts(lengths, ratios, forward_flops(sizes, work.squared()))
    return FlopCounts(lengths, ratios, forward_flops(sizes, work), square)


def _one_each(name: str, given: float | Sequence[float], n: int, kind: type[np.number]) -> np.ndarray:
    values = np.asarray(given, dtype=kind)
    if values.ndim and values.shape != (n,):
        raise UserError(f"{values.size} values of {name} for {n} configs; give one for each, or one for all")
    return np.broadcast_to(values, (n,))
