"""Causal self-attention on a CPU by PyTorch's flash kernels, forward and backward each called by name.

Calling them by name does without the gathers that autograd would turn into slow scatters, and gives the compiler a pair of
functions that it can take as they are. The gradients of sequences of middle length come from `causal_blocks` where that is
faster.

Shape legend: T tokens, H query heads, G key-value heads, A head width.
"""

import math

import torch
from torch import Tensor

from dlcm.backends.causal_blocks import causal_backward
from dlcm.backends.rows import Rows, sequences
from dlcm.concepts import Packing
from dlcm.provenance import processor_name

# Both accept grouped key-value heads, and the backward sums their gradients over the query heads of a group.
flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Lengths at which blocks of several heads take 0.7 to 0.9 of the time of the flash kernel's backward pass on an AMD EPYC: below
# there is too little to multiply, above the kernel's own blocks are as good. Measured at heads of 16 to 128. On Intel's own
# processors the library that the kernel calls multiplies small matrices so well that blocks take 1.3 to 1.5 times as long.
_BLOCKS = range(0) if "Intel" in processor_name() else range(256, 2049)


def forward(
    q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, A) and log-sum-exps of the scores (T, H), in fp32 at least.

    Args:
        q_THA: queries.
        k_TGA: keys.
        v_TGA: values.
        packing: which tokens form a sequence.
        scale: of the scores; 1 / sqrt(A) by default.
    """
    q_THA, k_TGA, v_TGA = (dense_rows(x) for x in (q_THA, k_TGA, v_TGA))
    out_THA, lse_TH1 = empty_results(q_THA)
    for part in sequences(packing):
        q, k, v = (part.take(x) for x in (q_THA, k_TGA, v_TGA))
        out, lse = flash_forward(q, k, v, 0.0, True, scale=scale)
        part.put(out, out_THA)
        part.put(lse[..., None], lse_TH1)
    return out_THA, lse_TH1.squeeze(-1)


def backward(
    d_out_THA: Tensor,
    q_THA: Tensor,
    k_TGA: Tensor,
    v_TGA: Tensor,
    out_THA: Tensor,
    lse_TH: Tensor,
    packing: Packing,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given that of the outputs and what `forward` took and gave."""
    d_out_THA, q_THA, k_TGA, v_TGA = (dense_rows(x) for x in (d_out_THA, q_THA, k_TGA, v_TGA))
    d_q_THA, d_k_TGA, d_v_TGA = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THA, k_TGA, v_TGA)
    )
    for part in sequences(packing):
        q, k, v, out = (part.take(x) for x in (q_THA, k_TGA, v_TGA, out_THA))
        d_out, lse = padding_sees_nothing(part, d_out_THA, lse_TH)
        if q.shape[2] in _BLOCKS and q.dtype == wide_dtype(q.dtype):
            d_q, d_k, d_v = causal_backward(d_out, q, k, v, out, lse, q.shape[3] ** -0.5 if scale is None else scale)
        else:
            d_q, d_k, d_v = flash_backward(d_out, q, k, v, out, lse, 0.0, True, scale=scale)
        part.put(d_q, d_q_THA)
        part.put(d_k, d_k_TGA)
        part.put(d_v, d_v_TGA)
    return d_q_THA, d_k_TGA, d_v_TGA


def padding_sees_nothing(part: Rows, d_out_THA: Tensor, lse_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the outputs and log-sum-exps of a part of the queries, such that padding has no weights exp(score - lse).

    A gradient of zero alone would not do: the weights of a padded query sum to anything, and infinity times zero is no number.
    """
    return part.take_filled(d_out_THA, 0.0), part.take_filled(lse_TH[..., None], math.inf).squeeze(-1)


def dense_rows(x_TXA: Tensor) -> Tensor:
    """The same numbers with the last dimension contiguous, as the kernels want it."""
    return x_TXA if x_TXA.stride(-1) == 1 else x_TXA.contiguous()


def empty_results(q_THA: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for the outputs (T, H, A) and the log-sum-exps (T, H, 1): rows that no kernel writes stay finite."""
    return q_THA.new_zeros(q_THA.shape), q_THA.new_zeros(*q_THA.shape[:2], 1, dtype=wide_dtype(q_THA.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
