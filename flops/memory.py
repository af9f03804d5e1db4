"""Bytes that training one model takes on one device, in closed form.

What `dlcm.train` holds is fp32 weights, fp32 gradients and two fp32 moments of AdamW (`dlcm.optim`): 16 bytes a parameter,
whatever the precision, because bf16 here is autocast. Autocast adds a bf16 copy of each matrix (`casts`), which lives as
long as the backward pass needs it. Activations are what autograd keeps between forward and backward, counted operation by
operation as the model runs them. Cross-entropy (`dlcm.loss`) holds the logits of some rows at a time, and the gradient of the
unembedding from the forward pass on (`head`).

With activation checkpointing a block keeps its input; what the largest one computes again, with its casts, takes the place of
what cross-entropy held while it worked (`recomputation` is what it takes beyond that). Ranks that replicate a model (DDP) take
what one device alone does. Those that share it (FSDP) have a share of weights, gradients and moments, and beside it, whole, what
is at work (`gathered`): weights and gradients outside of blocks, and twice those of the largest block, with the buffers that they
travel in. Casts are not shared: autograd keeps them.

Checked on a CPU (`tests/flops/test_memory.py`): activations and casts are what autograd saves, to the byte, at 14 shapes in fp32
and in bf16; the total is 0.94 to 1.11 of the allocator's peak of a real step at 16. With one micro-batch it errs on the high
side, by 4 bytes a parameter at most: gradients come as activations go. The rest is the mask of token-to-concept attention.

A GPU goes through `dlcm.fused_gpu`: norms keep their input and one number a row, where a CPU under autocast keeps the normalised
rows too; matrices that read one row share it, and what they give is kept before and behind QK-norms and rotation; in fp32
matrices beside each other are copies; cross-entropy has its gradient in the place of its logits. The same test holds these rules,
with plain operations for kernels, and `make gpu` holds the total against the peak of a GPU's allocator.

Not counted: the batch itself, buffers, kernels' workspace, fragmentation, what the attention backends `reference`, `sdpa` and
`flex` keep of masks and scores (the fused kernels that `auto` takes keep q, k, v, output and one number a query), and what
`train.compile` saves by recomputation. Peaks of the optimizer step lie below those of the backward pass.

Symbols: T tokens of a micro-batch, M = T / R concepts, W and C widths, h query and g key-value heads of size a, f hidden width of
the SwiGLU, V vocabulary, S scan width; b bytes of a number under autocast: 2 in bf16, 4 in fp32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dlcm.chunk import chunk_rows
from dlcm.config import ModelConfig
from flops import ops
from flops.count import COMPONENTS, parameters

WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 4, 8
# Tokens of one forward pass of validation (dlcm.validation), which may exceed a micro-batch.
VALIDATION_BATCH_TOKENS = 8_192


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: fp32 parameters.
        gradients: fp32.
        optimizer: both moments of AdamW, fp32.
        casts: bf16 copies of the matrices; in fp32, on a GPU, of those that are taken beside each other, else 0.
        activations: kept for the backward pass of one micro-batch, by component of the model.
        head: the gradient of the unembedding, and what cross-entropy or, if more, the gradient of the last SwiGLU has at work.
        evaluation: the largest forward pass of validation, which keeps no activations but may have more tokens.
        recomputation: what the largest block computes again, beyond what cross-entropy has given back; 0 where none does.
        gathered: weights and gradients that are whole for a while, where ranks share them; 0 elsewhere.
    """

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: Mapping[str, float]
    head: float
    evaluation: float
    recomputation: float = 0.0
    gathered: float = 0.0

    @property
    def states(self) -> int:
        """What does not depend on the batch: weights, gradients, optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def activations_total(self) -> float:
        """All activations of one micro-batch."""
        return sum(self.activations.values())

    @property
    def total(self) -> float:
        """The larger of training and validation."""
        at_work = self.activations_total + self.head + self.recomputation
        return self.states + self.gathered + self.casts + max(at_work, self.evaluation)


@dataclass(frozen=True)
class _Rules:
    """What differs between precisions and devices."""

    bf16: bool
    gpu: bool

    @property
    def b(self) -> int:
        """Bytes of a number that autocast casts."""
        return 2 if self.bf16 else 4

    def stream(self, narrow: bool) -> int:
        """Bytes of a number of a residual stream: that of tokens is in fp32, that of concepts as narrow as W_up gives it."""
        return self.b if narrow and self.gpu else 4

    def norm(self, width: float, n: float = 1, narrow: bool = False) -> float:
        """An RMSNorm over `n` rows: its input, one number a row, and, unfused, the normalised rows, in fp32."""
        return n * (self.stream(narrow) * width * (1 if self.gpu or not self.bf16 else 2) + 4)

    @property
    def fused(self) -> bool:
        """Whether the functions of `dlcm.fused` or `dlcm.fused_gpu` are at work, which compute silu(gate) again."""
        return self.gpu or not self.bf16

    def copies(self, matrices: int, beside: int) -> int:
        """Bytes of the copies of matrices: of all under autocast; in fp32 on a GPU of those that are taken beside each other."""
        return 2 * matrices if self.bf16 else 4 * beside if self.gpu else 0

    def inputs(self, width: float, n_matrices: int, narrow_stream: bool = False) -> float:
        """Inputs of matrices that read one normed row.

        In fp32, and on a GPU, they share it; under autocast on a CPU each keeps a bf16 copy of an fp32 row.
        """
        shared = self.gpu or not self.bf16 or narrow_stream
        return self.b * width * (1 if shared else n_matrices)


def memory(
    config: ModelConfig,
    micro_batch_tokens: int,
    *,
    bf16: bool,
    gpu: bool,
    n_concepts: float | None = None,
    evaluation_tokens: int = VALIDATION_BATCH_TOKENS,
    checkpointing: bool = False,
    n_sharing: int = 1,
) -> Memory:
    """Bytes that training `config` takes on one device.

    Args:
        config: the architecture.
        micro_batch_tokens: T, tokens of one forward pass.
        bf16: whether forward passes run under bf16 autocast.
        gpu: whether the device is a GPU.
        n_concepts: M; T over the target R by default.
        evaluation_tokens: tokens of one forward pass of validation.
        checkpointing: whether blocks recompute their activations.
        n_sharing: ranks that share weights, gradients and moments; 1 where each has them all.
    """
    n = math.ceil(parameters(config).total / n_sharing)
    rules = _Rules(bf16, gpu)
    n_concepts = micro_batch_tokens / config.compression_target if n_concepts is None else n_concepts
    activations = _activations(config, rules, micro_batch_tokens, n_concepts)
    casts, recomputation = rules.copies(_matrix_parameters(config, gpu), _parameters_beside(config)), 0.0
    if checkpointing:
        activations = _without_blocks(config, rules, micro_batch_tokens, n_concepts, activations)
        casts = rules.copies(_bridge_parameters(config, gpu), 0)
        largest = _largest_block(config, rules, micro_batch_tokens, n_concepts)
        recomputation = max(largest - _head(config, rules, micro_batch_tokens), 0.0)
    return Memory(
        weights=WEIGHT_BYTES * n,
        gradients=GRADIENT_BYTES * n,
        optimizer=OPTIMIZER_BYTES * n,
        casts=casts,
        activations=activations,
        recomputation=recomputation,
        gathered=_gathered(config) if n_sharing > 1 else 0.0,
        head=_work(config, rules, micro_batch_tokens) + 4 * config.vocab_size * config.d_token,
        evaluation=evaluation_tokens * _token_block(config, rules) + _head(config, rules, evaluation_tokens),
    )


def _activations(config: ModelConfig, rules: _Rules, n_tokens: float, n_concepts: float) -> Mapping[str, float]:
    c = config
    parts: dict[str, float] = dict.fromkeys(COMPONENTS, 0.0)
    # Ids (int64); cosines and sines of the rotary embedding, once for all layers.
    parts["embedding"] = n_tokens * (8 + 4 * c.d_head)
    parts["encoder"] = n_tokens * c.n_encoder_layers * _token_block(c, rules)
    # The last norm; the gradient of its output, which cross-entropy makes on the way forward.
    parts["head"] = n_tokens * (rules.norm(c.d_token) + rules.b * c.d_token)
    if c.is_dense:
        return parts
    backbone = _block(c.d_concept, c.n_heads_concept, c.n_kv_heads_concept, c.d_head, c.d_ff_concept, rules, True)
    parts |= {
        "boundary": n_tokens * _boundary(c),
        "pooling": _pooling(c, rules, n_tokens, n_concepts),
        "backbone": n_concepts * (c.n_concept_layers * backbone + 4 * c.d_head + rules.norm(c.d_concept, narrow=True)),
        "smoothing": n_concepts * _smoothing(c, rules),
        "cross_attention": _cross(c, rules, n_tokens, n_concepts),
        "decoder": n_tokens * c.n_decoder_layers * _token_block(c, rules),
    }
    return parts


def _without_blocks(
    c: ModelConfig, rules: _Rules, n_tokens: float, n_concepts: float, whole: Mapping[str, float]
) -> Mapping[str, float]:
    """Activations where a block keeps its input alone: an fp32 row of a token, a row of a concept in the dtype of W_up."""
    parts = {**whole, "encoder": 4.0 * n_tokens * c.n_encoder_layers * c.d_token}
    if c.is_dense:
        return parts
    backbone = c.n_concept_layers * _block(
        c.d_concept, c.n_heads_concept, c.n_kv_heads_concept, c.d_head, c.d_ff_concept, rules, True
    )
    parts["backbone"] += n_concepts * (c.n_concept_layers * rules.b * c.d_concept - backbone)
    # All cross-attentions read the same concepts, smoothed in fp32, and know the tokens of first segments.
    parts["cross_attention"] = n_concepts * (rules.b if c.smoothing == "none" else 4) * c.d_concept + n_tokens
    parts["decoder"] = 4.0 * n_tokens * c.n_decoder_layers * c.d_token
    return parts


def _largest_block(c: ModelConfig, rules: _Rules, n_tokens: float, n_concepts: float) -> float:
    """Activations and casts of the block that has most of them."""
    token = n_tokens * _token_block(c, rules) + rules.copies(_token_matrices(c), _token_beside(c))
    if c.is_dense:
        return token
    heads = c.n_heads_concept, c.n_kv_heads_concept, c.d_head, c.d_ff_concept
    concept = n_concepts * _block(c.d_concept, *heads, rules, True)
    concept += rules.copies(_concept_matrices(c), _concept_beside(c))
    cross = _cross(c, rules, n_tokens, n_concepts) / c.n_cross_attentions + rules.copies(_cross_matrices(c), 0)
    return max(token + cross, concept)


def _gathered(c: ModelConfig) -> float:
    """Whole weights and gradients where they are shared: of what is in no block, and of two blocks, or one and its buffers."""
    found, n_token = parameters(c).components, c.n_encoder_layers + c.n_decoder_layers
    token, blocks = (found["encoder"] + found["decoder"]) // n_token, found["encoder"] + found["decoder"]
    largest = token
    if not c.is_dense:
        largest = max(token + found["cross_attention"] // c.n_cross_attentions, found["backbone"] // c.n_concept_layers)
        blocks += found["cross_attention"] + found["backbone"]
    outside = parameters(c).total - blocks
    return (WEIGHT_BYTES + GRADIENT_BYTES) * (outside + 2 * largest)


def _token_block(c: ModelConfig, rules: _Rules) -> float:
    return _block(c.d_token, c.n_heads_token, c.n_kv_heads_token, c.d_head, c.d_ff_token, rules, False)


def _block(width: int, h: int, g: int, a: int, f: int, rules: _Rules, narrow_stream: bool) -> float:
    """Bytes a row of one block keeps.

    Two norms with the inputs of Q, K, V and of gate and up; the QK-norms; q, k, v and output of the attention with one
    log-sum-exp a head; gate, up, their product, and, unfused, silu(gate).
    """
    norms = 2 * rules.norm(width, narrow=narrow_stream)
    inputs = rules.inputs(width, 3, narrow_stream) + rules.inputs(width, 2, narrow_stream)
    if rules.gpu:  # q, k and v before the QK-norms, and a number for each head
        norms += rules.b * a * (h + 2 * g) + 4 * (h + g)
    else:
        norms += rules.norm(a, h + g)
    return norms + inputs + rules.b * a * (2 * h + 2 * g) + 4 * h + (3 if rules.fused else 4) * rules.b * f


def _boundary(c: ModelConfig) -> float:
    """Bytes a token keeps of the score, in fp32 always: the cosine's two factors twice each, nine scalars, two masks.

    The encoder state that it reads is kept by the decoder's first norm. Detectors without a gradient keep nothing.
    """
    assert c.boundary is not None  # the config's own check; narrows the type
    if c.boundary.detector == "learned":
        return 4 * (4 * c.boundary.d_scan + 9) + 2
    return 4 * (3 * c.d_token + 9) + 2 if c.boundary.detector == "cosine" else 0.0


def _pooling(c: ModelConfig, rules: _Rules, n_tokens: float, n_concepts: float) -> float:
    """The segment of each token and the length of each segment (int64), or its first token; the input of W_up."""
    assert c.boundary is not None
    index = 8 * n_tokens + 8 * n_concepts if c.pooling == "mean" else 8 * n_concepts
    scored = c.boundary.detector in ("learned", "cosine", "random")
    # The gate of the straight-through path multiplies the concepts, and keeps them and itself.
    gate = n_concepts * (rules.b * (c.d_concept + 1) + 8) if c.boundary.straight_through and scored else 0.0
    return index + n_concepts * rules.b * c.d_token + gate


def _smoothing(c: ModelConfig, rules: _Rules) -> float:
    """The taps, each times its weights, and the mask of each but the first."""
    if c.smoothing == "none":
        return 0.0
    tap_bytes = 2 if rules.bf16 else 4
    return ops.SMOOTHER_WIDTH * tap_bytes * c.d_concept + ops.SMOOTHER_WIDTH - 1


def _cross(c: ModelConfig, rules: _Rules, n_tokens: float, n_concepts: float) -> float:
    """All cross-attentions: norm and Q of tokens, K and V of concepts, the attention, and the choice of the null concept."""
    h, g, a, n = c.n_heads_token, c.n_kv_heads_token, c.d_head, c.n_cross_attentions
    with_null = c.pooling == "mean"
    token = rules.norm(c.d_token) + rules.inputs(c.d_token, 1) + rules.norm(a, h, narrow=True)
    token += rules.b * a * h * (3 if with_null else 2) + 4 * h
    concept = rules.norm(a, g, narrow=True) + 2 * rules.b * a * g
    # K and V of all layers read the same concepts: shared where no cast is between, else a copy for each matrix.
    copies = 1 if not rules.bf16 or c.smoothing == "none" else 2 * n
    return (
        n * (n_tokens * token + n_concepts * concept)
        + n_concepts * rules.b * c.d_concept * copies
        + n_tokens * with_null
    )


def _head(c: ModelConfig, rules: _Rules, n_tokens: float) -> float:
    """Bytes of cross-entropy at work on a chunk: its logits in fp32, which become their exponentials.

    Under autocast also a bf16 copy of them, a bf16 copy of the unembedding, and its gradient by the chunk; and its input, which
    nothing keeps, in fp32 and in bf16. On a GPU there is the bf16 copy of the logits alone, which becomes their gradient.
    """
    logits = chunk_rows(int(n_tokens), c.vocab_size, "cuda" if rules.gpu else "cpu") * c.vocab_size
    if not rules.bf16:
        return 4 * logits
    return (2 if rules.gpu else 6) * logits + 6 * n_tokens * c.d_token + 4 * c.vocab_size * c.d_token


def _work(c: ModelConfig, rules: _Rules, n_tokens: float) -> float:
    """Bytes at work when all activations are there: by cross-entropy, or then by the gradient of the last SwiGLU.

    That holds three rows of the hidden width: the gradient of the product, and those of its factors as they come.
    """
    return max(_head(c, rules, n_tokens), n_tokens * 3 * rules.b * c.d_ff_token)


def _matrix_parameters(c: ModelConfig, gpu: bool) -> int:
    """Parameters that autocast casts: every matrix of the layers, and, but on a GPU, the null concept.

    The boundary's are computed in fp32, and that of the unembedding lives inside of cross-entropy.
    """
    n = (c.n_encoder_layers + c.n_decoder_layers) * _token_matrices(c)
    if c.is_dense:
        return n
    n += c.n_concept_layers * _concept_matrices(c) + c.n_cross_attentions * _cross_matrices(c)
    return n + _bridge_parameters(c, gpu)


def _bridge_parameters(c: ModelConfig, gpu: bool) -> int:
    """W_up and, but on a GPU, the null concept, which lie in no block."""
    with_null = not c.is_dense and c.pooling == "mean" and not gpu
    return c.d_token * c.d_concept + (c.d_concept if with_null else 0)


def _layer_matrices(d: int, h: int, g: int, a: int, f: int) -> int:
    return d * a * (2 * h + 2 * g) + 3 * d * f


def _token_beside(c: ModelConfig) -> int:
    """Of a block: Q, K and V, and gate and up."""
    return c.d_token * (c.d_head * (c.n_heads_token + 2 * c.n_kv_heads_token) + 2 * c.d_ff_token)


def _concept_beside(c: ModelConfig) -> int:
    return c.d_concept * (c.d_head * (c.n_heads_concept + 2 * c.n_kv_heads_concept) + 2 * c.d_ff_concept)


def _parameters_beside(c: ModelConfig) -> int:
    n = (c.n_encoder_layers + c.n_decoder_layers) * _token_beside(c)
    return n if c.is_dense else n + c.n_concept_layers * _concept_beside(c)


def _token_matrices(c: ModelConfig) -> int:
    return _layer_matrices(c.d_token, c.n_heads_token, c.n_kv_heads_token, c.d_head, c.d_ff_token)


def _concept_matrices(c: ModelConfig) -> int:
    return _layer_matrices(c.d_concept, c.n_heads_concept, c.n_kv_heads_concept, c.d_head, c.d_ff_concept)


def _cross_matrices(c: ModelConfig) -> int:
    return 2 * c.d_head * (c.n_heads_token * c.d_token + c.n_kv_heads_token * c.d_concept)


def largest_micro_batch(
    config: ModelConfig,
    batch_tokens: int,
    seq_len: int,
    room_bytes: float,
    *,
    bf16: bool,
    gpu: bool,
    checkpointing: bool = False,
    n_sharing: int = 1,
    most_tokens: float = math.inf,
) -> int | None:
    """The most tokens of one forward pass, whole windows that divide the batch, that fit `room_bytes`; None if no window does.

    Args:
        config: the architecture.
        batch_tokens: tokens of a step, over all ranks.
        seq_len: of one window.
        room_bytes: of a device.
        bf16: as for `memory`, and so are `gpu`, `checkpointing` and `n_sharing`.
        gpu: whether the device is one.
        checkpointing: whether blocks recompute.
        n_sharing: ranks that share the states.
        most_tokens: the share of a rank, which no forward pass of it exceeds.
    """
    n_windows = batch_tokens // seq_len

    def total(n: int) -> float:
        tokens = int(min(n * seq_len, most_tokens))
        return memory(config, tokens, bf16=bf16, gpu=gpu, checkpointing=checkpointing, n_sharing=n_sharing).total

    divisors = (n for n in range(n_windows, 0, -1) if n_windows % n == 0)
    return next((n * seq_len for n in divisors if total(n) <= room_bytes), None)
