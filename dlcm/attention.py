"""The attention backends: causal self-attention, and attention of tokens to the concepts that they may see.

Every backend computes the same function with the same signature; `reference` materialises one dense mask over everything
that is packed and is what the others are tested against, `sdpa` pads documents of similar length together and calls
PyTorch's scaled-dot-product attention.

Shape legend: T tokens, K concepts, H query heads, G key-value heads (H a multiple of G), A head width, N padded documents.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dlcm.concepts import Packing, Segments


def self_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing, backend: str) -> Tensor:
    """softmax(q k' / sqrt(A)) v over the earlier and the own position of the same sequence.

    Args:
        q_THA: queries.
        k_TGA: keys, grouped: query head i reads key head i // (H / G).
        v_TGA: values.
        packing: which positions form a sequence.
        backend: `reference`, `sdpa` or `auto`.

    Returns:
        (T, H, A).
    """
    return _SELF[_resolve(backend)](q_THA, k_TGA, v_TGA, packing)


def cross_attention(
    q_THA: Tensor,
    k_1KGA: Tensor,
    v_1KGA: Tensor,
    segments: Segments,
    *,
    own_segment: bool,
    log_length: bool,
    backend: str,
) -> Tensor:
    """Attention of tokens to concepts (eqs 12-14) under the visibility rule.

    A token of segment j of its document sees the concepts k < j; a token of the first segment sees only the null concept,
    which is row 0 of the keys. With `own_segment` (pooling of the boundary token's own state) it sees k <= j and no null.

    With `log_length` the scores carry a bias log(number of tokens of concept k that lie at or before the query), which is
    what attention over concepts replicated to every token (eq 17) computes, exactly; without it this is eq 14 as printed.

    Args:
        q_THA: queries of the tokens.
        k_1KGA: keys, the null concept first, then the K concepts.
        v_1KGA: values in the same order.
        segments: the concepts of the tokens.
        own_segment: whether a token sees the concept of its own segment.
        log_length: whether scores carry the bias.
        backend: `reference`, `sdpa` or `auto`.

    Returns:
        (T, H, A).
    """
    return _CROSS[_resolve(backend)](q_THA, k_1KGA, v_1KGA, segments, own_segment, log_length)


def _resolve(backend: str) -> str:
    return "sdpa" if backend == "auto" else backend


def _expand_heads(x: Tensor, n_heads: int) -> Tensor:
    return x.repeat_interleave(n_heads // x.shape[-2], dim=-2)


def _dense_attention(q_THA: Tensor, k_UGA: Tensor, v_UGA: Tensor, bias_TU: Tensor) -> Tensor:
    n_heads, d_head = q_THA.shape[1:]
    k_UHA, v_UHA = _expand_heads(k_UGA, n_heads), _expand_heads(v_UGA, n_heads)
    scores_HTU = torch.einsum("tha,uha->htu", q_THA, k_UHA) / math.sqrt(d_head) + bias_TU
    return torch.einsum("htu,uha->tha", scores_HTU.softmax(-1), v_UHA)


def _self_reference(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing) -> Tensor:
    sequence_T, index_T = packing.sequence_T, torch.arange(packing.n_total, device=q_THA.device)
    visible_TT = (sequence_T[:, None] == sequence_T) & (index_T[:, None] >= index_T)
    return _dense_attention(q_THA, k_TGA, v_TGA, _mask_to_bias(visible_TT, q_THA.dtype))


def _self_sdpa(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing) -> Tensor:
    # Padding stands to the right of a sequence, so the causal mask alone keeps it from every real query.
    def attend(q_NHLA: Tensor, k_NGLA: Tensor, v_NGLA: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q_NHLA, k_NGLA, v_NGLA, is_causal=True, enable_gqa=q_NHLA.shape[1] != k_NGLA.shape[1]
        )

    outputs, places = [], []
    for bucket in packing.buckets:
        if bucket.regular:
            shape = (-1, bucket.length)
            padded = [x.unflatten(0, shape).transpose(1, 2) for x in (q_THA, k_TGA, v_TGA)]
            return attend(padded[0], padded[1], padded[2]).transpose(1, 2).flatten(0, 1)
        index_NL, real_NL = packing.index_NL(bucket)
        padded = [x[index_NL].transpose(1, 2) for x in (q_THA, k_TGA, v_TGA)]
        outputs.append(attend(padded[0], padded[1], padded[2]).transpose(1, 2)[real_NL])
        places.append(index_NL[real_NL])
    return _gather_back(outputs, places, q_THA)


def _gather_back(outputs: list[Tensor], places: list[Tensor], like_THA: Tensor) -> Tensor:
    """Outputs of the buckets in the order of the packed tokens."""
    if not outputs:
        return torch.zeros_like(like_THA)
    return torch.cat(outputs)[torch.cat(places).argsort()]


def _mask_to_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -math.inf)


def _visibility_bias(
    ordinal_Q: Tensor,
    offset_Q: Tensor,
    column: Tensor,
    length: Tensor,
    own_segment: bool,
    log_length: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Bias on the scores of queries against key columns of the same document; -inf where a key is hidden.

    Args:
        ordinal_Q: segment index j of each query, broadcast against the columns.
        offset_Q: position of each query in its segment.
        column: 0 for the null concept, k + 1 for concept k of the document.
        length: tokens of that concept; any positive number for the null concept.
        own_segment: see `cross_attention`.
        log_length: see `cross_attention`.
        dtype: of the result.
    """
    if own_segment:
        visible = (column >= 1) & (column <= ordinal_Q + 1)
    else:
        visible = torch.where(ordinal_Q == 0, column == 0, (column >= 1) & (column <= ordinal_Q))
    bias = _mask_to_bias(visible, dtype)
    if log_length:
        # The own segment is not complete at the query: replication has put down offset + 1 copies of it so far.
        seen = torch.where(column == ordinal_Q + 1, offset_Q + 1, length)
        bias = bias + torch.where(column >= 1, seen.to(dtype).log(), torch.zeros((), dtype=dtype, device=bias.device))
    return bias


def _cross_reference(
    q_THA: Tensor, k_1KGA: Tensor, v_1KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> Tensor:
    ones_1 = segments.lengths_K.new_ones(1)
    column_1K = torch.cat([ones_1 * 0, segments.concepts.position_T + 1])
    bias_T1K = _visibility_bias(
        segments.ordinal_T[:, None],
        segments.offset_T[:, None],
        column_1K,
        torch.cat([ones_1, segments.lengths_K]),
        own_segment,
        log_length,
        q_THA.dtype,
    )
    same_TK = segments.tokens.sequence_T[:, None] == segments.concepts.sequence_T
    same_T1K = torch.cat([torch.ones_like(same_TK[:, :1]), same_TK], dim=1)
    return _dense_attention(q_THA, k_1KGA, v_1KGA, bias_T1K.masked_fill(~same_T1K, -math.inf))


def _cross_sdpa(
    q_THA: Tensor, k_1KGA: Tensor, v_1KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> Tensor:
    outputs, places = [], []
    for index_NL, real_NL, index_NU, bias_NLU in _cross_layout(segments, own_segment, log_length, q_THA.dtype):
        q_NHLA, k_NGUA, v_NGUA = (
            x[index].transpose(1, 2) for x, index in ((q_THA, index_NL), (k_1KGA, index_NU), (v_1KGA, index_NU))
        )
        out_NHLA = F.scaled_dot_product_attention(
            q_NHLA, k_NGUA, v_NGUA, attn_mask=bias_NLU[:, None], enable_gqa=q_NHLA.shape[1] != k_NGUA.shape[1]
        )
        outputs.append(out_NHLA.transpose(1, 2)[real_NL])
        places.append(index_NL[real_NL])
    return _gather_back(outputs, places, q_THA)


def _cross_layout(
    segments: Segments, own_segment: bool, log_length: bool, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]:
    """Padded query index, which queries are real, padded key index and bias of each bucket of documents.

    All decoder layers share one layout, so it is kept on the segments.
    """
    cache = segments.__dict__.setdefault("_cross_layouts", {})
    key = (own_segment, log_length, dtype)
    if key not in cache:
        cache[key] = tuple(
            _bucket_layout(segments, bucket, own_segment, log_length, dtype) for bucket in segments.tokens.buckets
        )
    return cache[key]


def _bucket_layout(segments: Segments, bucket, own_segment: bool, log_length: bool, dtype: torch.dtype):
    index_NL, real_NL = segments.tokens.index_NL(bucket)
    n_concepts_N = segments.concepts.lengths_S[bucket.sequences_N]
    column_U = torch.arange(int(n_concepts_N.max()) + 1, device=index_NL.device)
    real_NU = (column_U >= 1) & (column_U <= n_concepts_N[:, None])
    index_NU = (segments.concepts.cu_seqlens_S1[bucket.sequences_N, None] + column_U) * real_NU
    length_NU = torch.where(real_NU, segments.lengths_K[(index_NU - 1).clamp(min=0)], 1)
    # Padded queries take the place of a first token, which sees one key, so that no row of the softmax is empty.
    bias_NLU = _visibility_bias(
        (segments.ordinal_T[index_NL] * real_NL)[..., None],
        (segments.offset_T[index_NL] * real_NL)[..., None],
        column_U,
        length_NU[:, None, :],
        own_segment,
        log_length,
        dtype,
    )
    return index_NL, real_NL, index_NU, bias_NLU


_SELF: dict[str, Callable[..., Tensor]] = {"reference": _self_reference, "sdpa": _self_sdpa}
_CROSS: dict[str, Callable[..., Tensor]] = {"reference": _cross_reference, "sdpa": _cross_sdpa}
