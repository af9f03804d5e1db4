"""Building blocks of every stack: linear maps that know their fan-in, rotary positions, attention, SwiGLU, the block.

Shape legend: T packed positions (tokens or concepts), W width, H query heads, G key-value heads, A head width.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Side = Literal["token", "concept"]
# Queries, keys and values (T, H, A), (T, G, A), (T, G, A) to outputs (T, H, A): who sees whom is the caller's to say.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """A bias-free linear map that records which width its fan-in grows with: muP scales per matrix by that."""

    def __init__(self, d_in: int, d_out: int, side: Side) -> None:
        self.side: Side = side
        super().__init__(d_in, d_out, bias=False)


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain learns at the rate of `side`."""

    def __init__(self, width: int, side: Side) -> None:
        self.side: Side = side
        super().__init__(width, eps=1e-6)


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
        q_THA, k_TGA, v_TGA = (split_heads(w(x_TW), self.d_head) for w in (self.w_q, self.w_k, self.w_v))
        q_THA, k_TGA = rotary(self.q_norm(q_THA)), rotary(self.k_norm(k_TGA))
        return self.w_o(attend(q_THA.to(v_TGA.dtype), k_TGA.to(v_TGA.dtype), v_TGA).flatten(1))


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x) (Shazeer 2020)."""

    def __init__(self, width: int, d_ff: int, side: Side) -> None:
        super().__init__()
        self.w_gate, self.w_up = Linear(width, d_ff, side), Linear(width, d_ff, side)
        self.w_down = Linear(d_ff, width, side)

    def forward(self, x_TW: Tensor) -> Tensor:
        """Return the feed-forward branch, (T, W)."""
        return self.w_down(F.silu(self.w_gate(x_TW)) * self.w_up(x_TW))


class Block(nn.Module):
    """Pre-norm transformer block: x += attention(norm x); x += SwiGLU(norm x)."""

    def __init__(self, width: int, n_heads: int, n_kv_heads: int, d_head: int, d_ff: int, side: Side) -> None:
        super().__init__()
        self.attention_norm, self.ff_norm = RMSNorm(width, side), RMSNorm(width, side)
        self.attention = Attention(width, n_heads, n_kv_heads, d_head, side)
        self.ff = SwiGLU(width, d_ff, side)

    def mix(self, x_TW: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """The first half: x + attention(norm x)."""
        return x_TW + self.attention(self.attention_norm(x_TW), rotary, attend)

    def feed_forward(self, x_TW: Tensor) -> Tensor:
        """The second half: x + SwiGLU(norm x)."""
        return x_TW + self.ff(self.ff_norm(x_TW))

    def forward(self, x_TW: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """Return the block's output, (T, W)."""
        return self.feed_forward(self.mix(x_TW, rotary, attend))


def split_heads(x_TW: Tensor, d_head: int) -> Tensor:
    """(T, H * A) -> (T, H, A)."""
    return x_TW.unflatten(1, (-1, d_head))
