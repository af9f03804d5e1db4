"""Token-to-concept attention by FlexAttention: block-sparse, with a block mask that is read off the segments.

The concepts that a token sees are a range [lo, hi) of flat concepts whose ends never go back from one token to the next. So
the key blocks of a query block run from that of lo of its first token to that of hi of its last, and those between lo of the
last and hi of the first are seen whole. Nothing of size tokens x concepts is ever evaluated.

Shape legend: T tokens, K concepts, P query blocks, Q key blocks, H query heads, G key-value heads, A head width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dlcm.concepts import Segments
from dlcm.errors import UserError

# Tokens and concepts of one block: FlexAttention's own default.
BLOCK = 128
_MIN_WIDTH = 16


def cross_attention(
    q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> Tensor:
    """Attention of tokens to concepts, (T, H, A); compiled on a GPU.

    Raises:
        UserError: gradients on a CPU, which FlexAttention has not; heads too narrow for its GPU kernels.
    """
    if not k_KGA.shape[0] or not q_THA.shape[0]:
        return torch.zeros_like(q_THA)
    on_cpu = q_THA.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q_THA, k_KGA, v_KGA)):
        raise UserError(
            "attention_backend: flex cannot train on a CPU, where FlexAttention has no backward; "
            "set attention_backend: auto, or run without gradients"
        )
    if not on_cpu and q_THA.shape[-1] < _MIN_WIDTH:
        raise UserError(
            f"attention_backend: flex takes heads of at least {_MIN_WIDTH} on a GPU, not {q_THA.shape[-1]}; "
            "raise d_head or set attention_backend: auto"
        )
    mask, bias = _kept(segments, own_segment, log_length, torch.promote_types(q_THA.dtype, torch.float32))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THA, k_KGA, v_KGA))
    if on_cpu:
        # It looks at requires_grad alone, and refuses weights that need none just now.
        q, k, v = q.detach(), k.detach(), v.detach()
    attend = flex_attention if on_cpu else _compiled()
    out = attend(q, k, v, score_mod=bias, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def block_mask(segments: Segments, own_segment: bool) -> BlockMask:
    """The block mask of the visibility rule, in O(blocks).

    A block that a gap falls into (the last concept of a document is seen by none) may be computed though nothing in it is
    seen; its mask sees to that. No block with something seen is left out, and none is called full that is not.
    """
    lo_T, hi_T = segments.visible(own_segment)
    n_tokens, n_concepts = lo_T.numel(), segments.lengths_K.numel()
    n_key_blocks = -(-n_concepts // BLOCK)
    first_P = torch.arange(0, n_tokens, BLOCK, device=lo_T.device)
    last_P = (first_P + BLOCK).clamp(max=n_tokens) - 1
    start_P, stop_P = lo_T[first_P] // BLOCK, -(-hi_T[last_P] // BLOCK)
    full_start_P, full_stop_P = -(-lo_T[last_P] // BLOCK), hi_T[first_P] // BLOCK
    # A query block that ends beyond the last token has padding, which sees nothing.
    full_stop_P = torch.where(first_P + BLOCK <= n_tokens, torch.maximum(full_stop_P, full_start_P), full_start_P)
    column_Q = torch.arange(n_key_blocks, device=lo_T.device)
    touched_PQ = (column_Q >= start_P[:, None]) & (column_Q < stop_P[:, None])
    full_PQ = touched_PQ & (column_Q >= full_start_P[:, None]) & (column_Q < full_stop_P[:, None])
    return BlockMask.from_kv_blocks(
        *_ordered(touched_PQ & ~full_PQ),
        *_ordered(full_PQ),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod(segments, own_segment),
        seq_lengths=(n_tokens, n_concepts),
    )


def mask_mod(segments: Segments, own_segment: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a token sees a concept, as FlexAttention asks."""
    lo_T, hi_T = segments.visible(own_segment)

    def sees(_batch: Tensor, _head: Tensor, token: Tensor, concept: Tensor) -> Tensor:
        return (concept >= lo_T[token]) & (concept < hi_T[token])

    return sees


def score_mod(segments: Segments, own_segment: bool, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Score plus the log of the tokens of the concept that lie at or before the token, as FlexAttention asks."""
    log_length_K = segments.lengths_K.clamp(min=1).to(dtype).log()
    if not own_segment:

        def whole(score: Tensor, _batch: Tensor, _head: Tensor, _token: Tensor, concept: Tensor) -> Tensor:
            return score + log_length_K[concept]

        return whole
    segment_T, log_copies_T = segments.segment_T, (segments.offset_T + 1).to(dtype).log()

    def so_far(score: Tensor, _batch: Tensor, _head: Tensor, token: Tensor, concept: Tensor) -> Tensor:
        return score + torch.where(concept == segment_T[token], log_copies_T[token], log_length_K[concept])

    return so_far


def _kept(segments: Segments, own_segment: bool, log_length: bool, dtype: torch.dtype) -> tuple[BlockMask, Any]:
    """Block mask and score function; all decoder layers share them, so they are kept on the segments."""
    kept = segments.__dict__.setdefault("_flex", {})
    key = own_segment, log_length, dtype
    if key not in kept:
        bias = score_mod(segments, own_segment, dtype) if log_length else None
        kept[key] = block_mask(segments, own_segment), bias
    return kept[key]


def _ordered(blocks_PQ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, (1, 1, P), and their columns first in each row, (1, 1, P, Q)."""
    # A stable sort keeps the columns of a row in their order.
    index_PQ = (~blocks_PQ).to(torch.int8).argsort(dim=1, stable=True)
    return blocks_PQ.sum(1, dtype=torch.int32)[None, None], index_PQ.to(torch.int32)[None, None]


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
