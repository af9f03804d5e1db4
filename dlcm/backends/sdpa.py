"""PyTorch's scaled-dot-product attention on documents of similar length, padded together.

Shape legend: T tokens, K concepts, N documents of a bucket, L padded tokens of each, U padded concepts of each,
H query heads, G key-value heads, A head width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dlcm.concepts import Bucket, Packing, Segments


def self_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing, scale: float | None = None) -> Tensor:
    """Causal attention within each packed sequence, (T, H, A)."""
    outputs, places = [], []
    for bucket in packing.buckets:
        if bucket.regular:
            shape = (-1, bucket.length)
            padded = [x.unflatten(0, shape).transpose(1, 2) for x in (q_THA, k_TGA, v_TGA)]
            return _causal(padded[0], padded[1], padded[2], scale).transpose(1, 2).flatten(0, 1)
        index_NL, real_NL = packing.index_NL(bucket)
        padded = [x[index_NL].transpose(1, 2) for x in (q_THA, k_TGA, v_TGA)]
        outputs.append(_causal(padded[0], padded[1], padded[2], scale).transpose(1, 2)[real_NL])
        places.append(index_NL[real_NL])
    return gather_back(outputs, places, q_THA)


def _causal(q_NHLA: Tensor, k_NGLA: Tensor, v_NGLA: Tensor, scale: float | None) -> Tensor:
    # Padding stands to the right of a sequence, so the causal mask alone keeps it from every real query.
    return F.scaled_dot_product_attention(
        q_NHLA, k_NGLA, v_NGLA, is_causal=True, enable_gqa=q_NHLA.shape[1] != k_NGLA.shape[1], scale=scale
    )


def cross_attention(
    q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> Tensor:
    """Attention of tokens to concepts, (T, H, A)."""
    if not k_KGA.shape[0]:
        return torch.zeros_like(q_THA)
    outputs, places = [], []
    for index_NL, real_NL, index_NU, bias_NLU in _layout(segments, own_segment, log_length, q_THA.dtype):
        q_NHLA, k_NGUA, v_NGUA = (
            x[index].transpose(1, 2) for x, index in ((q_THA, index_NL), (k_KGA, index_NU), (v_KGA, index_NU))
        )
        out_NHLA = F.scaled_dot_product_attention(
            q_NHLA, k_NGUA, v_NGUA, attn_mask=bias_NLU[:, None], enable_gqa=q_NHLA.shape[1] != k_NGUA.shape[1]
        )
        outputs.append(out_NHLA.transpose(1, 2)[real_NL])
        places.append(index_NL[real_NL])
    return gather_back(outputs, places, q_THA)


def gather_back(outputs: list[Tensor], places: list[Tensor], like_THA: Tensor) -> Tensor:
    """Outputs of the buckets in the order of the packed tokens."""
    if not outputs:
        return torch.zeros_like(like_THA)
    return torch.cat(outputs)[torch.cat(places).argsort()]


def _layout(
    segments: Segments, own_segment: bool, log_length: bool, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]:
    """Padded query index, which queries are real, padded key index and bias of each bucket of documents.

    All decoder layers share one layout, so it is kept on the segments.
    """
    cache = segments.__dict__.setdefault("_sdpa_layouts", {})
    key = (own_segment, log_length, dtype)
    if key not in cache:
        cache[key] = tuple(
            _bucket_layout(segments, bucket, own_segment, log_length, dtype) for bucket in segments.tokens.buckets
        )
    return cache[key]


def _bucket_layout(segments: Segments, bucket: Bucket, own_segment: bool, log_length: bool, dtype: torch.dtype):
    index_NL, real_NL = segments.tokens.index_NL(bucket)
    n_concepts_N = segments.concepts.lengths_S[bucket.sequences_N]
    column_U = torch.arange(int(n_concepts_N.max()), device=index_NL.device)
    real_NU = column_U < n_concepts_N[:, None]
    index_NU = (segments.concepts.cu_seqlens_S1[bucket.sequences_N, None] + column_U) * real_NU
    length_N1U = torch.where(real_NU, segments.lengths_K[index_NU], 1)[:, None]
    ordinal_NL1 = (segments.ordinal_T[index_NL] * real_NL)[..., None]
    # A first segment sees no concept: column 0 is left open, so that no row of the softmax is empty.
    visible_NLU = column_U <= (ordinal_NL1 if own_segment else (ordinal_NL1 - 1).clamp(min=0))
    bias_NLU = torch.zeros(visible_NLU.shape, dtype=dtype, device=visible_NLU.device)
    if log_length:
        # The own segment is not complete at the query: replication has put down offset + 1 copies of it so far.
        copies_NLU = torch.where(column_U == ordinal_NL1, segments.offset_T[index_NL][..., None] + 1, length_N1U)
        bias_NLU = copies_NLU.to(dtype).log()
    return index_NL, real_NL, index_NU, bias_NLU.masked_fill(~visible_NLU, -math.inf)
