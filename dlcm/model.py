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

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlcm.attention import cross_attention
from dlcm.boundary import Boundaries, BoundaryDetector
from dlcm.concepts import Packing, Segments, pool_first, pool_mean, segment, shift
from dlcm.config import ModelConfig
from dlcm.layers import Block, Linear, RMSNorm, Rotary, split_heads

# Taps of the causal smoother over concepts, the own one included.
SMOOTHER_WIDTH = 4


@dataclass(frozen=True)
class Output:
    """What a forward pass returns; the leading shape is that of the tokens.

    Attributes:
        logits: (..., V), in the compute dtype.
        boundaries: bool; every token for a dense model.
        boundary_prob: p_t; ones for a dense model.
        segments: the concepts, packed; None for a dense model.
        detection: scores and statistics of the detector; None for a dense model or injected boundaries.
    """

    logits: Tensor
    boundaries: Tensor
    boundary_prob: Tensor
    segments: Segments | None
    detection: Boundaries | None

    @property
    def n_concepts(self) -> int:
        """M, the number of concepts; the number of tokens for a dense model."""
        return self.boundaries.numel() if self.segments is None else self.segments.lengths_K.numel()

    @property
    def tokens_per_concept(self) -> float:
        """Realised R of this pass: L / M."""
        return self.boundaries.numel() / max(self.n_concepts, 1)


class CrossAttention(nn.Module):
    """Tokens attend to the concepts they may see (eqs 12-16). No rotary: eqs 12-14 have none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_head, d_q = config.d_head, config.n_heads_token * config.d_head
        d_kv = config.n_kv_heads_token * d_head
        self.config = config
        self.norm = RMSNorm(config.d_token, "token")
        self.w_q = Linear(config.d_token, d_q, "token")
        # K and V read the concept width: by fan-in they belong to the concept side, though the module is the decoder's.
        self.w_k, self.w_v = Linear(config.d_concept, d_kv, "concept"), Linear(config.d_concept, d_kv, "concept")
        self.w_o = Linear(d_q, config.d_token, "token")
        self.q_norm, self.k_norm = RMSNorm(d_head, "token"), RMSNorm(d_head, "token")

    def forward(self, x_TW: Tensor, z_1KC: Tensor, segments: Segments) -> Tensor:
        """Return the cross-attention branch, (T, W). Row 0 of `z_1KC` is the null concept."""
        d_head = self.config.d_head
        q_THA = self.q_norm(split_heads(self.w_q(self.norm(x_TW)), d_head))
        k_1KGA, v_1KGA = self.k_norm(split_heads(self.w_k(z_1KC), d_head)), split_heads(self.w_v(z_1KC), d_head)
        out_THA = cross_attention(
            q_THA.to(v_1KGA.dtype),
            k_1KGA.to(v_1KGA.dtype),
            v_1KGA,
            segments,
            own_segment=self.config.pooling == "first",
            log_length=self.config.concept_bias == "log_length",
            backend=self.config.attention_backend,
        )
        return self.w_o(out_THA.flatten(1))


class DecoderBlock(nn.Module):
    """A block with cross-attention between self-attention and feed-forward; `cross` is None where a layer has none."""

    def __init__(self, config: ModelConfig, with_cross: bool) -> None:
        super().__init__()
        self.block = Block(*_token_shape(config))
        self.cross = CrossAttention(config) if with_cross else None

    def forward(self, x_TW: Tensor, packing: Packing, rotary: Rotary, z_1KC: Tensor, segments: Segments) -> Tensor:
        """Return the block's output, (T, W)."""
        x_TW = self.block.attend(x_TW, packing, rotary)
        if self.cross is not None:
            x_TW = x_TW + self.cross(x_TW, z_1KC, segments)
        return self.block.feed_forward(x_TW)


class ConceptStack(nn.Module):
    """Pooling, backbone and smoother: token states and boundaries in, concepts that tokens can attend to out."""

    null_1C: nn.Parameter | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.w_up = Linear(config.d_token, config.d_concept, "token")
        self.blocks = nn.ModuleList(Block(*_concept_shape(config)) for _ in range(config.n_concept_layers))
        self.norm = RMSNorm(config.d_concept, "concept")
        if config.smoothing == "causal":
            self.smoother_4C = nn.Parameter(torch.empty(SMOOTHER_WIDTH, config.d_concept))
        if config.pooling == "mean":
            self.null_1C = nn.Parameter(torch.empty(1, config.d_concept))
        else:
            self.null_1C = None

    def forward(self, h_TW: Tensor, segments: Segments, confidence_T: Tensor | None) -> Tensor:
        """Return the null concept and the K concepts, (1 + K, C)."""
        pooled_KW = pool_first(h_TW, segments) if self.config.pooling == "first" else pool_mean(h_TW, segments)
        z_KC = self.w_up(pooled_KW)
        if confidence_T is not None:
            # Straight-through: one in value, the gradient of the boundary's probability in the backward pass.
            p_K = confidence_T[segments.starts_K].to(z_KC.dtype)
            z_KC = z_KC * (1.0 + p_K - p_K.detach())[:, None]
        rotary = Rotary(segments.concepts.position_T, self.config.d_head, self.config.rope_theta, z_KC.dtype)
        for block in self.blocks:
            z_KC = block(z_KC, segments.concepts, rotary)
        z_KC = self.norm(z_KC)
        if self.config.smoothing == "causal":
            z_KC = z_KC + sum(w_C * shift(z_KC, segments.concepts, n) for n, w_C in enumerate(self.smoother_4C))
        null_1C = z_KC.new_zeros(1, z_KC.shape[1]) if self.null_1C is None else self.null_1C.to(z_KC.dtype)
        return torch.cat([null_1C, z_KC])


class Model(nn.Module):
    """The DLCM, or the dense baseline: encoder alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_token)
        self.encoder = nn.ModuleList(Block(*_token_shape(config)) for _ in range(config.n_encoder_layers))
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
    ) -> Output:
        """Predict the next token everywhere.

        Args:
            tokens: int64, (B, T): each row one document; or (T,): documents packed flat.
            cu_seqlens: (S + 1), starts of the packed documents and the total length; only with flat tokens. None is one document.
            boundaries: bool like `tokens`, injected instead of detected.
            draws: uniform numbers like `tokens`, for the sampled boundary decision of training. None decides by threshold.

        Returns:
            Output; its tensors lead with the shape of `tokens`.
        """
        if tokens.dim() == 2 and cu_seqlens is not None:
            raise ValueError("cu_seqlens describes flat tokens; pass tokens of shape (T,)")
        shape, tokens_T = tokens.shape, tokens.flatten()
        packing = Packing(_bounds(tokens, cu_seqlens))
        rotary = self._rotary(packing)
        x_TW = self._encode(tokens_T, packing, rotary)
        segments = detection = None
        if self.config.is_dense:
            decision_T, prob_T = torch.ones_like(tokens_T, dtype=torch.bool), torch.ones_like(x_TW[:, 0])
        else:
            if boundaries is None:
                draws_T = None if draws is None else draws.flatten()
                detection = self.boundary(x_TW, tokens_T, packing, draws_T)
                decision_T, prob_T = detection.decision_T, detection.prob_T
            else:
                decision_T = boundaries.flatten()
                prob_T = decision_T.float()
            segments = segment(decision_T, packing)
            x_TW = self._decode(x_TW, packing, rotary, segments, detection)
        logits_TV = self.unembedding(self.norm(x_TW)) / self.config.mup_scale_token
        return Output(
            logits_TV.unflatten(0, shape) if len(shape) > 1 else logits_TV,
            decision_T.view(shape),
            prob_T.view(shape),
            segments,
            detection,
        )

    def _rotary(self, packing: Packing) -> Rotary:
        return Rotary(packing.position_T, self.config.d_head, self.config.rope_theta, self.embedding.weight.dtype)

    def _encode(self, tokens_T: Tensor, packing: Packing, rotary: Rotary) -> Tensor:
        h_TW = self.embedding(tokens_T)
        for block in self.encoder:
            h_TW = block(h_TW, packing, rotary)
        return h_TW

    def _decode(
        self, h_TW: Tensor, packing: Packing, rotary: Rotary, segments: Segments, detection: Boundaries | None
    ) -> Tensor:
        straight_through = self.config.boundary is not None and self.config.boundary.straight_through
        confidence_T = detection.sharp_prob_T if detection is not None and straight_through else None
        z_1KC = self.concepts(h_TW, segments, confidence_T)
        x_TW = h_TW
        for block in self.decoder:
            x_TW = block(x_TW, packing, rotary, z_1KC, segments)
        return x_TW

    @torch.no_grad()
    def detect(self, tokens_T: Tensor, cu_seqlens: Tensor, draws_T: Tensor | None = None) -> Boundaries:
        """What `forward` would decide about the boundaries of packed tokens, at the cost of the encoder alone."""
        packing = Packing(cu_seqlens.long())
        return self.boundary(self._encode(tokens_T, packing, self._rotary(packing)), tokens_T, packing, draws_T)


def build_model(config: ModelConfig, *, seed: int = 0) -> Model:
    """Build and initialise a model on the CPU in fp32.

    Args:
        config: the architecture.
        seed: of the initial weights.
    """
    model = Model(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def next_token_loss(output: Output, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, in at least fp32."""
    logits = output.logits.flatten(0, -2)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), targets.flatten(), reduction=reduction
    )


def _bounds(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        return cu_seqlens.long()
    n, length = tokens.shape if tokens.dim() == 2 else (1, tokens.shape[0])
    return torch.arange(n + 1, device=tokens.device) * length


def _token_shape(config: ModelConfig):
    heads = config.n_heads_token, config.n_kv_heads_token, config.d_head
    return config.d_token, *heads, config.d_ff_token, "token", config.attention_backend


def _concept_shape(config: ModelConfig):
    heads = config.n_heads_concept, config.n_kv_heads_concept, config.d_head
    return config.d_concept, *heads, config.d_ff_concept, "concept", config.attention_backend
