"""Building blocks of every stack: linear maps that know their fan-in, rotary positions, attention, SwiGLU, the blocks.

Shape legend: T packed positions (tokens, in a block of the backbone concepts), K concepts, W width of a block, C width of
concepts, F hidden width of the SwiGLU, H query heads, G key-value heads, A head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlcm import fused_gpu
from dlcm.config import ModelConfig
from dlcm.fused import applies, rms_norm, rms_norm_rotated, swiglu

Side = Literal["token", "concept"]
# Queries, keys and values (T, H, A), (T, G, A), (T, G, A) to outputs (T, H, A): who sees whom is the caller's to say.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """A bias-free linear map that records which width its fan-in grows with: muP scales per matrix by that."""

    def __init__(self, d_in: int, d_out: int, side: Side) -> None:
        self.side: Side = side
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]  the parent's `input` is a builtin
        """Return the product with the matrix."""
        if x.dim() == 2 and fused_gpu.applies(x):
            return fused_gpu.products(x, self.weight)
        return super().forward(x)

    def of_row(self, x_1W: Tensor) -> Tensor:
        """The product with a single row; on a GPU in the dtype of the weights, which are not copied for so little."""
        if not fused_gpu.applies(x_1W):
            return self(x_1W)
        with torch.autocast(x_1W.device.type, enabled=False):
            return F.linear(x_1W.to(self.weight.dtype), self.weight)


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain learns at the rate of `side`."""

    def __init__(self, width: int, side: Side) -> None:
        self.side: Side = side
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return x over the root of its mean square, times the gain."""
        assert self.eps is not None
        if fused_gpu.applies(x):
            return fused_gpu.rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps) if applies(x) else super().forward(x)

    def added(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum x + branch (x where there is none), and its norm, as a product is to take it.

        Go on from the sum that comes back, not from `x`: a GPU adds the gradients of both in one pass.
        """
        assert self.eps is not None
        if fused_gpu.applies(x):
            return fused_gpu.add_rms_norm(x, branch, self.weight, self.eps)
        total = x if branch is None else x + branch
        return total, self(total)

    def rotated(self, x_THA: Tensor, rotary: "Rotary") -> Tensor:
        """The normed heads at their positions."""
        assert self.eps is not None
        if applies(x_THA):
            return rms_norm_rotated(x_THA, self.weight, self.eps, rotary.cos_T1A, rotary.sin_T1A)
        return rotary(self(x_THA))


class Rotary:
    """Rotary position embedding (Su et al. 2021) at given positions, computed once for all layers of a stack."""

    def __init__(self, position_T: Tensor, d_head: int, theta: float, dtype: torch.dtype) -> None:
        half = torch.arange(0, d_head, 2, device=position_T.device, dtype=torch.float64)
        angle_TA = position_T.double()[:, None] * theta ** (-half / d_head)
        self.cos_T1A, self.sin_T1A = angle_TA.cos().to(dtype)[:, None], angle_TA.sin().to(dtype)[:, None]

    def __call__(self, x_THA: Tensor) -> Tensor:
        """Rotate the two halves of every head as pairs."""
        a, b = x_THA.chunk(2, dim=-1)
        cos, sin = self.cos_T1A, self.sin_T1A
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_THA.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with QK-norm; `attend` knows the sequences, packed or cached."""

    def __init__(self, width: int, n_heads: int, n_kv_heads: int, d_head: int, side: Side) -> None:
        super().__init__()
        self.d_head = d_head
        self.w_q = Linear(width, n_heads * d_head, side)
        self.w_k = Linear(width, n_kv_heads * d_head, side)
        self.w_v = Linear(width, n_kv_heads * d_head, side)
        self.w_o = Linear(n_heads * d_head, width, side)
        self.q_norm, self.k_norm = RMSNorm(d_head, side), RMSNorm(d_head, side)

    def forward(self, x_TW: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Return the attention branch, (T, W)."""
        if fused_gpu.applies(x_TW):
            assert self.q_norm.eps is not None
            x_TX = fused_gpu.products(x_TW, self.w_q.weight, self.w_k.weight, self.w_v.weight)
            gains, n_kv = (self.q_norm.weight, self.k_norm.weight), self.w_k.out_features // self.d_head
            qkv = fused_gpu.heads(x_TX, *gains, self.q_norm.eps, rotary.cos_T1A, rotary.sin_T1A, n_kv)
            return self.w_o(attend(*qkv).flatten(1))
        q_THA, k_TGA, v_TGA = (split_heads(w(x_TW), self.d_head) for w in (self.w_q, self.w_k, self.w_v))
        q_THA, k_TGA = self.q_norm.rotated(q_THA, rotary), self.k_norm.rotated(k_TGA, rotary)
        return self.w_o(attend(q_THA.to(v_TGA.dtype), k_TGA.to(v_TGA.dtype), v_TGA).flatten(1))


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x) (Shazeer 2020)."""

    def __init__(self, width: int, d_ff: int, side: Side) -> None:
        super().__init__()
        self.w_gate, self.w_up = Linear(width, d_ff, side), Linear(width, d_ff, side)
        self.w_down = Linear(d_ff, width, side)

    def forward(self, x_TW: Tensor) -> Tensor:
        """Return the feed-forward branch, (T, W)."""
        if fused_gpu.applies(x_TW):
            return self.w_down(fused_gpu.swiglu(fused_gpu.products(x_TW, self.w_gate.weight, self.w_up.weight)))
        gate_TF, up_TF = self.w_gate(x_TW), self.w_up(x_TW)
        return self.w_down(swiglu(gate_TF, up_TF) if applies(gate_TF) else F.silu(gate_TF) * up_TF)


class Block(nn.Module):
    """Pre-norm transformer block: x += attention(norm x); x += SwiGLU(norm x)."""

    def __init__(self, width: int, n_heads: int, n_kv_heads: int, d_head: int, d_ff: int, side: Side) -> None:
        super().__init__()
        self.attention_norm, self.ff_norm = RMSNorm(width, side), RMSNorm(width, side)
        self.attention = Attention(width, n_heads, n_kv_heads, d_head, side)
        self.ff = SwiGLU(width, d_ff, side)

    def mix(self, x_TW: Tensor, rotary: Rotary, attend: Attend) -> tuple[Tensor, Tensor]:
        """The first half, not yet added up: x, and attention(norm x)."""
        x_TW, normed_TW = self.attention_norm.added(x_TW, None)
        return x_TW, self.attention(normed_TW, rotary, attend)

    def feed_forward(self, x_TW: Tensor, branch_TW: Tensor) -> Tensor:
        """The second half: y + SwiGLU(norm y) of y = x + branch."""
        x_TW, normed_TW = self.ff_norm.added(x_TW, branch_TW)
        return x_TW + self.ff(normed_TW)

    def forward(self, x_TW: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Return the block's output, (T, W)."""
        return self.feed_forward(*self.mix(x_TW, rotary, attend))


def token_block(config: ModelConfig) -> Block:
    """A block of encoder or decoder."""
    heads = config.n_heads_token, config.n_kv_heads_token, config.d_head
    return Block(config.d_token, *heads, config.d_ff_token, "token")


def concept_block(config: ModelConfig) -> Block:
    """A block of the backbone."""
    heads = config.n_heads_concept, config.n_kv_heads_concept, config.d_head
    return Block(config.d_concept, *heads, config.d_ff_concept, "concept")


@dataclass(frozen=True)
class Concepts:
    """What tokens attend to: the concepts, and the null concept (1, C) that first segments see (None with `pooling: first`)."""

    z_KC: Tensor
    null_1C: Tensor | None


# Queries (T, H, A), keys and values (K, G, A) of concepts and the null concept's value (G, A) or None to outputs (T, H, A).
Read = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class CrossAttention(nn.Module):
    """Tokens attend to the concepts they may see (eqs 12-16). No rotary: eqs 12-14 have none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_head, d_q = config.d_head, config.n_heads_token * config.d_head
        d_kv = config.n_kv_heads_token * d_head
        self.d_head = d_head
        self.norm = RMSNorm(config.d_token, "token")
        self.w_q = Linear(config.d_token, d_q, "token")
        # K and V read the concept width: by fan-in they belong to the concept side, though the module is the decoder's.
        self.w_k, self.w_v = Linear(config.d_concept, d_kv, "concept"), Linear(config.d_concept, d_kv, "concept")
        self.w_o = Linear(d_q, config.d_token, "token")
        self.q_norm, self.k_norm = RMSNorm(d_head, "token"), RMSNorm(d_head, "token")

    def forward(self, x_TW: Tensor, branch_TW: Tensor, concepts: Concepts, read: Read) -> tuple[Tensor, Tensor]:
        """The sum y = x + branch, and the cross-attention branch of norm y, not yet added to it."""
        x_TW, normed_TW = self.norm.added(x_TW, branch_TW)
        q_THA = self.q_norm(split_heads(self.w_q(normed_TW), self.d_head))
        k_KGA, v_KGA, null_GA = self.keys_values(concepts)
        return x_TW, self.w_o(read(q_THA.to(v_KGA.dtype), k_KGA, v_KGA, null_GA).flatten(1))

    def keys_values(self, concepts: Concepts) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (K, G, A) of the concepts and the value (G, A) of the null concept, if any."""
        v_KGA = split_heads(self.w_v(concepts.z_KC), self.d_head)
        k_KGA = self.k_norm(split_heads(self.w_k(concepts.z_KC), self.d_head)).to(v_KGA.dtype)
        if concepts.null_1C is None:
            return k_KGA, v_KGA, None
        null_GA = split_heads(self.w_v.of_row(concepts.null_1C), self.d_head)[0]
        return k_KGA, v_KGA, null_GA.to(v_KGA.dtype)


class DecoderBlock(nn.Module):
    """A block with cross-attention between self-attention and feed-forward; `cross` is None where a layer has none."""

    def __init__(self, config: ModelConfig, with_cross: bool) -> None:
        super().__init__()
        self.block = token_block(config)
        self.cross = CrossAttention(config) if with_cross else None

    def forward(self, x_TW: Tensor, concepts: Concepts, rotary: Rotary, attend: Attend, read: Read | None) -> Tensor:
        """Return the block's output, (T, W)."""
        x_TW, branch_TW = self.block.mix(x_TW, rotary, attend)
        if self.cross is not None:
            assert read is not None
            x_TW, branch_TW = self.cross(x_TW, branch_TW, concepts, read)
        return self.block.feed_forward(x_TW, branch_TW)


def split_heads(x_TW: Tensor, d_head: int) -> Tensor:
    """(T, H * A) -> (T, H, A)."""
    return x_TW.unflatten(1, (-1, d_head))
