"""DLCM and its dense baseline, one file, one forward pass.

    H = E(x)                      encoder, causal over tokens
    b = boundaries(H)             where a new concept begins
    c_k = W_up mean_{t in k} h_t  pooling (eq 7)
    Z = S(norm(M(c)))             concept backbone, causal over concepts, then the smoother (eq 11)
    y = D(H, Z)                   decoder: each layer attends to itself, to the concepts it may see, and feeds forward
    logits = W_out norm(y) / s    with the muP multiplier 1/s_token (eq 21)

Token t in segment j sees the concepts k < j; the first segment sees a learned null concept. The paper prints k <= j, which
leaks: the mean of a segment holds its later tokens (`pooling: first` takes the first token's state and may see k <= j).

Shape legend: B batch, T tokens (packed), K concepts (packed), S documents, W token width d, C concept width D,
H query heads, G key-value heads, A head width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from dlcm import fused_gpu
from dlcm.attention import CrossAttend, SelfAttend, check_compilable, compiled
from dlcm.boundary import Boundaries, BoundaryDetector
from dlcm.cache import Cache, Chunk
from dlcm.concepts import Packing, Segments, concept_bound, pool_first, pool_mean, segment, shift
from dlcm.config import ModelConfig
from dlcm.layers import (
    Attend,
    Concepts,
    DecoderBlock,
    Linear,
    Read,
    RMSNorm,
    Rotary,
    concept_block,
    token_block,
)
from dlcm.loss import compute_dtype, linear_cross_entropy
from dlcm.output import Output as Output
from dlcm.output import mean_square

# Taps of the causal smoother over concepts, the own one included.
SMOOTHER_WIDTH = 4


class ConceptStack(nn.Module):
    """Pooling, backbone and smoother: token states and boundaries in, concepts that tokens can attend to out."""

    null_1C: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.w_up = Linear(config.d_token, config.d_concept, "token")
        self.blocks = nn.ModuleList(concept_block(config) for _ in range(config.n_concept_layers))
        self.norm = RMSNorm(config.d_concept, "concept")
        if config.smoothing == "causal":
            self.smoother_4C = nn.Parameter(torch.empty(SMOOTHER_WIDTH, config.d_concept))
        if config.pooling == "mean":
            self.null_1C = nn.Parameter(torch.empty(1, config.d_concept))
        else:
            self.null_1C = None

    def pool(self, h_TW: Tensor, segments: Segments) -> Tensor:
        """One token-width state a segment, (K, W) (eq 7 without W_up)."""
        return pool_first(h_TW, segments) if self.config.pooling == "first" else pool_mean(h_TW, segments)

    def backbone(self, pooled_KW: Tensor, gate_K1: Tensor | None, rotary: Rotary, attends: Sequence[Attend]) -> Tensor:
        """W_up, the blocks and the norm behind them, (K, C). `gate_K1` is one in value; it carries a gradient."""
        z_KC = self.w_up(pooled_KW)
        if gate_K1 is not None:
            z_KC = z_KC * gate_K1.to(z_KC.dtype)
        for block, attend in zip(self.blocks, attends):
            z_KC = block(z_KC, rotary, attend)
        return self.norm(z_KC)

    def smooth(self, z_KC: Tensor, earlier: Callable[[Tensor, int], list[Tensor]]) -> Concepts:
        """The smoother (eq 11): a causal depth-wise convolution over concepts, added to them.

        Args:
            z_KC: what the backbone gives.
            earlier: z_{k-n} of every concept for n = 0, 1, .. up to a number of taps, zero before the first of a document.
        """
        if self.config.smoothing == "causal":
            taps = zip(self.smoother_4C, earlier(z_KC, SMOOTHER_WIDTH))
            z_KC = z_KC + sum(w_C * tap_KC for w_C, tap_KC in taps)
        null_1C = self.null_1C
        if null_1C is not None and not fused_gpu.applies(z_KC):
            # Once for all layers, so that its gradients are added up alike whether or not blocks are computed again.
            null_1C = null_1C.to(compute_dtype(z_KC))
        return Concepts(z_KC, null_1C)

    def forward(
        self, pooled_KW: Tensor, gate_K1: Tensor | None, rotary: Rotary, attends: Sequence[Attend], position_K: Tensor
    ) -> Concepts:
        """The concepts of packed documents, and the null concept."""

        def earlier(z_KC: Tensor, n_taps: int) -> list[Tensor]:
            return [shift(z_KC, position_K, n) for n in range(n_taps)]

        return self.smooth(self.backbone(pooled_KW, gate_K1, rotary, attends), earlier)


class Model(nn.Module):
    """The DLCM, or the dense baseline: encoder alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_token)
        self.encoder = nn.ModuleList(token_block(config) for _ in range(config.n_encoder_layers))
        if config.boundary is not None:
            self.boundary = BoundaryDetector(config.boundary, config.d_token, config.vocab_size)
            self.concepts = ConceptStack(config)
            self.decoder = nn.ModuleList(
                DecoderBlock(config, with_cross=i < config.n_cross_attentions) for i in range(config.n_decoder_layers)
            )
        self.norm = RMSNorm(config.d_token, "token")
        self.unembedding = Linear(config.d_token, config.vocab_size, "token")
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight
        self._compiled: dict[str, Callable[..., Any]] = {}

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """All initialisation.

        Matrices: std = gain / sqrt(width of their fan-in), so that the variance falls as 1/s (muP). Embedding and null
        concept: the same at the base width, whatever the width. Norm gains one, smoother the identity, unembedding zero
        unless tied, so that the first loss is ln V.
        """
        config = self.config
        std = {"token": config.init_gain * config.d_token**-0.5}
        if not config.is_dense:
            std["concept"] = config.init_gain * config.d_concept**-0.5
        base_std = config.init_gain * config.d_token_base**-0.5
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight.normal_(0.0, std[module.side], generator=generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, ConceptStack):
                if config.smoothing == "causal":
                    module.smoother_4C.zero_()
                if module.null_1C is not None:
                    module.null_1C.normal_(0.0, base_std, generator=generator)
        self.embedding.weight.normal_(0.0, base_std, generator=generator)
        if not config.tie_embeddings:
            self.unembedding.weight.zero_()

    def forward(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        boundaries: Tensor | None = None,
        draws: Tensor | None = None,
        cache: Cache | None = None,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
        with_scales: bool = False,
    ) -> Output:
        """Predict the next token everywhere.

        Args:
            tokens: int64, (B, T): each row one document; or (T,): documents packed flat. With a cache (B, t): the next t
                tokens of each row.
            cu_seqlens: (S + 1), starts of the packed documents and the total length; only with flat tokens. None is one document.
            boundaries: bool like `tokens`, injected instead of detected.
            draws: uniform numbers like `tokens`, for the sampled boundary decision of training. None decides by threshold.
            cache: what the rows have had so far (`new_cache`); it moves on.
            lengths: (B,), how many of the t tokens of each row are real, the others are padding on the right, whose logits
                are zero; only with a cache. None is all.
            targets: int64 like `tokens`: losses in place of logits, which are then never there as a whole; not with a cache.
            with_scales: measure the activations behind embedding, encoder, concepts and decoder; not with a cache.

        Returns:
            Output; its tensors lead with the shape of `tokens`.
        """
        if cache is not None:
            if cu_seqlens is not None or tokens.dim() != 2 or tokens.shape[0] != cache.n_rows:
                raise ValueError(f"with a cache, tokens are ({cache.n_rows}, t) and without cu_seqlens")
            return self._advance(tokens, cache, boundaries, draws, lengths)
        if tokens.dim() == 2 and cu_seqlens is not None:
            raise ValueError("cu_seqlens describes flat tokens; pass tokens of shape (T,)")
        shape, tokens_T = tokens.shape, tokens.flatten()
        packing = Packing(_bounds(tokens, cu_seqlens))
        rotary, attend = self.rotary(packing.position_T), SelfAttend(packing, self.config.attention_backend)
        embedded_TW = self.embedding(tokens_T)
        x_TW = self._stack("encode")(embedded_TW, rotary, [attend] * len(self.encoder))
        parts = {"embedding": embedded_TW, "encoder": x_TW}
        decision_T, prob_T, detection = self._decide(x_TW, tokens_T, packing, _flat(boundaries), _flat(draws))
        segments = None
        if not self.config.is_dense:
            segments = segment(decision_T, packing, self._padding(packing))
            concepts = self._concepts(x_TW, segments, detection)
            attends, reads = [attend] * len(self.decoder), [self._read(segments)] * self.config.n_cross_attentions
            x_TW = self._stack("decode")(x_TW, concepts, rotary, attends, reads)
            parts |= {"concepts": concepts.z_KC[: segments.n_concepts], "decoder": x_TW}
        scales = {name: mean_square(x) for name, x in parts.items()} if with_scales else None
        found = (decision_T.view(shape), prob_T.view(shape), segments, detection)
        if targets is None:
            return Output(self.head(x_TW).unflatten(0, shape), *found, scales=scales)
        total, nats_T = linear_cross_entropy(self.last(x_TW), self.unembedding.weight, targets.flatten())
        return Output(x_TW[:, :0].unflatten(0, shape), *found, total, nats_T.view(shape), scales)

    def new_cache(self, batch_size: int) -> Cache:
        """The state of rows that have had no token yet; pass it to `model(tokens_Bt, cache=cache)` with their next tokens."""
        return Cache(self.config, batch_size, self.embedding.weight.device)

    def _advance(
        self, tokens_Bt: Tensor, cache: Cache, boundaries: Tensor | None, draws: Tensor | None, lengths_B: Tensor | None
    ) -> Output:
        """`forward` of the next tokens of each row. The concept stack runs only where segments end."""
        n_rows, width = tokens_Bt.shape
        real_Bt = torch.ones_like(tokens_Bt, dtype=torch.bool)
        if lengths_B is not None:
            real_Bt = torch.arange(width, device=tokens_Bt.device) < lengths_B[:, None]
        chunk, tokens_T = cache.chunk(real_Bt.sum(1)), tokens_Bt[real_Bt]
        rotary = self.rotary(chunk.position_T)
        x_TW = self.encode(self.embedding(tokens_T), rotary, chunk.self_attends(cache.encoder))
        injected_T, draws_T = (None if x is None else x[real_Bt] for x in (boundaries, draws))
        decision_T, prob_T, detection = self._decide(x_TW, tokens_T, chunk, injected_T, draws_T)
        if not self.config.is_dense:
            cut = chunk.cut(decision_T, x_TW)
            concepts = Concepts(x_TW.new_zeros(0, self.config.d_concept), self.concepts.null_1C)
            if cut.pooled_KW.shape[0]:
                z_KC = self.concepts.backbone(
                    cut.pooled_KW, None, self.rotary(cut.concepts.position_N), cut.self_attends()
                )
                concepts = self.concepts.smooth(z_KC, cut.earlier)
            x_TW = self.decode(x_TW, concepts, rotary, chunk.self_attends(cache.decoder), cut.reads())
        logits_TV = self.head(x_TW)

        def spread(x_T: Tensor) -> Tensor:
            return x_T.new_zeros(n_rows, width, *x_T.shape[1:]).index_put((real_Bt,), x_T)

        return Output(spread(logits_TV), spread(decision_T), spread(prob_T), None, detection)

    def _decide(
        self,
        h_TW: Tensor,
        tokens_T: Tensor,
        sequences: Packing | Chunk,
        injected_T: Tensor | None,
        draws_T: Tensor | None,
    ) -> tuple[Tensor, Tensor, Boundaries | None]:
        """Decisions, their probabilities, and what the detector said, if it was asked."""
        if self.config.is_dense:
            return torch.ones_like(tokens_T, dtype=torch.bool), torch.ones_like(h_TW[:, 0]), None
        if injected_T is not None:
            return injected_T, injected_T.float(), None
        found = self.boundary(h_TW, tokens_T, sequences, draws_T)
        return found.decision_T, found.prob_T, found

    def encode(self, x_TW: Tensor, rotary: Rotary, attends: Sequence[Attend]) -> Tensor:
        """Embedded tokens to encoder states, (T, W). `attends`: one function a layer, here and in the other stacks."""
        for block, attend in zip(self.encoder, attends):
            x_TW = block(x_TW, rotary, attend)
        return x_TW

    def think(
        self, pooled_KW: Tensor, gate_K1: Tensor | None, rotary: Rotary, attends: Sequence[Attend], position_K: Tensor
    ) -> Concepts:
        """Pooled segments to concepts."""
        return self.concepts(pooled_KW, gate_K1, rotary, attends, position_K)

    def decode(
        self, x_TW: Tensor, concepts: Concepts, rotary: Rotary, attends: Sequence[Attend], reads: Sequence[Read]
    ) -> Tensor:
        """Encoder states and concepts to decoder states, (T, W). `reads`: one function a layer with cross-attention."""
        for block, attend, read in zip_longest(self.decoder, attends, reads):
            x_TW = block(x_TW, concepts, rotary, attend, read)
        return x_TW

    def last(self, x_TW: Tensor) -> Tensor:
        """Decoder states as the unembedding reads them: normed, by the multiplier (eq 21), since V is the larger width."""
        return self.norm(x_TW) / self.config.mup_scale_token

    def head(self, x_TW: Tensor) -> Tensor:
        """Logits (T, V) of the last states."""
        return self.unembedding(self.last(x_TW))

    def rotary(self, position_T: Tensor) -> Rotary:
        """Rotary embedding at these positions; tokens and concepts have heads of one width."""
        return Rotary(position_T, self.config.d_head, self.config.rope_theta, self.embedding.weight.dtype)

    def _concepts(self, h_TW: Tensor, segments: Segments, detection: Boundaries | None) -> Concepts:
        gate_K1 = None
        if detection is not None and detection.sharp_prob_T is not None and self.boundary.config.straight_through:
            # Straight-through: one in value, the gradient of the boundary's probability in the backward pass.
            p_K = detection.sharp_prob_T[segments.starts_K]
            gate_K1 = (1.0 + p_K - p_K.detach())[:, None]
        packing = segments.concepts
        attends = [SelfAttend(packing, self.config.attention_backend)] * self.config.n_concept_layers
        pooled_KW = self.concepts.pool(h_TW, segments)
        return self._stack("think")(pooled_KW, gate_K1, self.rotary(packing.position_T), attends, packing.position_T)

    def _read(self, segments: Segments) -> Read:
        config = self.config
        return CrossAttend(
            segments, config.pooling == "first", config.concept_bias == "log_length", config.attention_backend
        )

    @torch.no_grad()
    def detect(self, tokens_T: Tensor, cu_seqlens: Tensor, draws_T: Tensor | None = None) -> Boundaries:
        """What `forward` would decide about the boundaries of packed tokens, at the cost of the encoder alone."""
        packing = Packing(cu_seqlens.long())
        attends = [SelfAttend(packing, self.config.attention_backend)] * len(self.encoder)
        h_TW = self._stack("encode")(self.embedding(tokens_T), self.rotary(packing.position_T), attends)
        return self.boundary(h_TW, tokens_T, packing, draws_T)

    def blocks(self) -> list[nn.Module]:
        """All layers, those of the encoder first."""
        stacks = [self.encoder] if self.config.is_dense else [self.encoder, self.concepts.blocks, self.decoder]
        return [block for stack in stacks for block in stack]

    def compile_stacks(self, *, by_block: bool = False, **options: Any) -> None:
        """Compile encoder, concept stack and decoder for training, each whole, without graph breaks.

        What depends on the data stays between them: where boundaries fall, and how many concepts there are. The concepts
        are padded to `concept_bound`, so that their number does not change the shapes, and nothing is compiled again when
        it changes. Evaluation, whose batches have other shapes, runs uncompiled.

        Args:
            by_block: each block in place of each stack: what has to be done between blocks, as under FSDP, stays there.
            options: passed to `torch.compile`, for example `backend`.

        Raises:
            UserError: the attention backend cannot be compiled.
        """
        check_compilable(self.config.attention_backend)
        stacks = {name: getattr(self, name) for name in ("encode", "think", "decode")}
        if by_block:
            for block in self.blocks():
                block.forward = compiled(block.forward, lambda: self.training, **options)
        self._compiled = stacks if by_block else {name: compiled(f, **options) for name, f in stacks.items()}

    def _stack(self, name: str) -> Callable[..., Any]:
        return self._compiled[name] if self.training and self._compiled else getattr(self, name)

    def _padding(self, packing: Packing) -> Callable[[int], int] | None:
        if not (self.training and self._compiled):
            return None
        return lambda n_concepts: concept_bound(packing.n_total, self.config.compression_target, n_concepts)


def build_model(config: ModelConfig, *, seed: int = 0) -> Model:
    """Build and initialise a model on the CPU in fp32.

    Args:
        config: the architecture.
        seed: of the initial weights.
    """
    model = Model(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten()


def _bounds(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        return cu_seqlens.long()
    n, length = tokens.shape if tokens.dim() == 2 else (1, tokens.shape[0])
    return torch.arange(n + 1, device=tokens.device) * length
