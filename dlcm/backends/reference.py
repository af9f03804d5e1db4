"""The plainest computation: one dense mask over everything that is packed. What all other backends are tested against.

Shape legend: T tokens, K concepts, U keys of either kind, H query heads, G key-value heads, A head width.
"""

import math

import torch
from torch import Tensor

from dlcm.concepts import Packing, Segments


def self_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing) -> Tensor:
    """Causal attention within each packed sequence, (T, H, A)."""
    sequence_T, index_T = packing.sequence_T, torch.arange(packing.n_total, device=q_THA.device)
    visible_TT = (sequence_T[:, None] == sequence_T) & (index_T[:, None] >= index_T)
    return dense_attention(q_THA, k_TGA, v_TGA, visible_TT, torch.zeros_like(visible_TT, dtype=q_THA.dtype))


def cross_attention(
    q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> Tensor:
    """Attention of tokens to concepts, (T, H, A)."""
    lo_T, hi_T = segments.visible(own_segment)
    index_K = torch.arange(k_KGA.shape[0], device=q_THA.device)
    visible_TK = (index_K >= lo_T[:, None]) & (index_K < hi_T[:, None])
    bias_TK = torch.zeros_like(visible_TK, dtype=q_THA.dtype)
    if log_length:
        # Where the own segment is seen it is not complete: replication has put down offset + 1 copies of it so far.
        own_TK = index_K == segments.segment_T[:, None]
        copies_TK = torch.where(own_TK, segments.offset_T[:, None] + 1, segments.lengths_K.clamp(min=1))
        bias_TK = copies_TK.to(q_THA.dtype).log()
    return dense_attention(q_THA, k_KGA, v_KGA, visible_TK, bias_TK)


def dense_attention(q_THA: Tensor, k_UGA: Tensor, v_UGA: Tensor, visible_TU: Tensor, bias_TU: Tensor) -> Tensor:
    """softmax(q k' / sqrt(A) + bias) v over the visible keys; zero where there are none."""
    n_heads, d_head = q_THA.shape[1:]
    group = n_heads // k_UGA.shape[1]
    k_UHA, v_UHA = k_UGA.repeat_interleave(group, dim=1), v_UGA.repeat_interleave(group, dim=1)
    scores_HTU = torch.einsum("tha,uha->htu", q_THA, k_UHA) / math.sqrt(d_head) + bias_TU
    # A finite mask keeps the softmax of a row without keys finite, forward and backward.
    scores_HTU = scores_HTU.masked_fill(~visible_TU, torch.finfo(scores_HTU.dtype).min)
    weights_HTU = scores_HTU.softmax(-1).masked_fill(~visible_TU, 0.0)
    return torch.einsum("htu,uha->tha", weights_HTU, v_UHA)
