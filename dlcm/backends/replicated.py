"""Concept replication (eq 17): keys and values stand at tokens, so that one causal flash kernel computes cross-attention.

Where a token sees its own segment and the log-length bias is on, this is the paper's form and nothing else: every token
carries a copy of its concept, and a causal mask makes a concept count as often as it has tokens so far.

In the other cases a concept stands at one token alone, the one from which on it is seen: the first of its own segment, or
the first of the next. The rows between are masked and the concepts weighted by a bias that rides in extra columns of the
heads, where queries are one and keys hold bias x sqrt(A): flash kernels take no bias else.

Shape legend: T tokens, K concepts, H query heads, G key-value heads, A head width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dlcm.concepts import Segments

# Kernels take heads in multiples of eight columns. Two of them are used: a bias in bf16 is the sum of a rough and a fine part.
_COLUMNS = 8
# Times 1 / sqrt(A) this is far below any score, and it is a number in fp16 too: a row without concepts stays finite.
_MASKED = -30_000.0


def cross_attention(
    q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> Tensor:
    """Attention of tokens to concepts, (T, H, A)."""
    from dlcm.attention import causal  # the layer above chooses the kernel for the device

    if own_segment and log_length:
        k_TGA, v_TGA = (x.index_select(0, segments.segment_T) for x in (k_KGA, v_KGA))
        return causal(q_THA, k_TGA, v_TGA, segments.tokens)
    d_head = q_THA.shape[-1]
    concept_T, bias_T2 = _placement(segments, own_segment, log_length, d_head, q_THA.dtype)
    k_TGA, v_TGA = (x.index_select(0, concept_T) for x in (k_KGA, v_KGA))
    columns = (0, _COLUMNS - 2)
    q_THA = torch.cat([q_THA, F.pad(q_THA.new_ones(2), columns).expand(*q_THA.shape[:2], -1)], dim=-1)
    k_TGA = torch.cat([k_TGA, F.pad(bias_T2, columns)[:, None].expand(-1, k_TGA.shape[1], -1)], dim=-1)
    return causal(q_THA, k_TGA, F.pad(v_TGA, (0, _COLUMNS)), segments.tokens, d_head**-0.5)[..., :d_head]


def _placement(
    segments: Segments, own_segment: bool, log_length: bool, d_head: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The concept at each token, and its bias x sqrt(A) as a sum of two numbers; shared by all layers."""
    kept = segments.__dict__.setdefault("_replicated", {})
    key = own_segment, log_length, d_head, dtype
    if key not in kept:
        lo_T, hi_T = segments.visible(own_segment)
        concept_T = hi_T - 1
        # The first token of a segment is where the last concept that it sees comes into sight.
        placed_T = (segments.offset_T == 0) & (concept_T >= lo_T)
        concept_T = torch.where(placed_T, concept_T, segments.segment_T)
        wide = torch.promote_types(dtype, torch.float32)
        bias_T = torch.zeros_like(concept_T, dtype=wide)
        if log_length:
            bias_T = segments.lengths_K[concept_T].to(wide).log() * math.sqrt(d_head)
        bias_T = torch.where(placed_T, bias_T, _MASKED)
        rough_T = bias_T.to(dtype)
        kept[key] = concept_T, torch.stack([rough_T, (bias_T - rough_T.to(wide)).to(dtype)], dim=1)
    return kept[key]
