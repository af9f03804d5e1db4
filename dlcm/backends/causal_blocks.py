"""The backward pass of causal attention on a CPU as batched matrix products, a block of keys of several heads at a time.

PyTorch's flash kernel multiplies within one head at a time, which leaves its matrix products too small where heads are narrow.
Here a block of scores of several heads fits the cache of a core, and what a score needs beside its product rides in it: a further
column holds minus the log-sum-exp beside queries, minus the sum of gradient times output beside gradients, and one beside keys
and values. So weights and their gradients take one product, and one pass over it, each.

Shape legend: N sequences, L rows of each, H query heads, G key-value heads, A head width, r query heads of a key-value head,
Z = N·G, R = L·r.
"""

import math

import torch
from torch import Tensor

# Keys of a block, and queries of a chunk, a multiple of that.
_BLOCK, _QUERIES = 64, 512
_LOG2_E = math.log2(math.e)
# Scores at work at once for each thread: one megabyte in fp32.
_SCORES = 1 << 18


def causal_backward(
    d_out_NHLA: Tensor,
    q_NHLA: Tensor,
    k_NGLA: Tensor,
    v_NGLA: Tensor,
    out_NHLA: Tensor,
    lse_NHL: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of causal attention within each sequence.

    Args:
        d_out_NHLA: gradient of the outputs.
        q_NHLA: queries.
        k_NGLA: keys; query head i reads head i // (H / G).
        v_NGLA: values.
        out_NHLA: outputs.
        lse_NHL: log-sum-exp of the scores of each row; a row of infinity weighs nothing.
        scale: of the scores.
    """
    (n, n_groups, length, width), r = k_NGLA.shape, q_NHLA.shape[1] // k_NGLA.shape[1]
    # Powers of two are computed twice as fast as those of e: scores and log-sum-exps are taken in that base.
    q_ZRA1 = _beside(q_NHLA, n_groups, lse_NHL * -_LOG2_E, scale * _LOG2_E)
    g_ZRA1 = _beside(d_out_NHLA, n_groups, (d_out_NHLA * out_NHLA).sum(-1).neg_())
    k_ZLA1, v_ZLA1 = (_beside(x, n_groups, x.new_ones(())) for x in (k_NGLA, v_NGLA))
    d_q_ZRA = q_ZRA1.new_zeros(n * n_groups, length * r, width)
    d_k_ZLA, d_v_ZLA = (d_q_ZRA.new_zeros(n * n_groups, length, width) for _ in range(2))
    n_heads = max(1, _SCORES * torch.get_num_threads() // (_BLOCK * r * min(length, _QUERIES)))
    for first_head in range(0, n * n_groups, n_heads):
        z = slice(first_head, first_head + n_heads)
        _accumulate(q_ZRA1[z], g_ZRA1[z], k_ZLA1[z], v_ZLA1[z], d_q_ZRA[z], d_k_ZLA[z], d_v_ZLA[z])
    d_k_ZLA.mul_(1.0 / _LOG2_E)  # its factor was the queries in that base
    d_q_NGLrA = d_q_ZRA.mul_(scale).view(n, n_groups, length, r, width)
    d_k_NGLA, d_v_NGLA = (x.view(n, n_groups, length, width) for x in (d_k_ZLA, d_v_ZLA))
    return d_q_NGLrA.transpose(2, 3).flatten(1, 2), d_k_NGLA, d_v_NGLA


def _accumulate(
    q_ZRA1: Tensor, g_ZRA1: Tensor, k_ZLA1: Tensor, v_ZLA1: Tensor, d_q_ZRA: Tensor, d_k_ZLA: Tensor, d_v_ZLA: Tensor
) -> None:
    """Add the gradients of some heads; that of queries lacks the scale."""
    length = k_ZLA1.shape[1]
    r = q_ZRA1.shape[1] // length
    hidden_uU = k_ZLA1.new_full((_BLOCK, _BLOCK), -math.inf).tril_(-1).repeat_interleave(r, dim=1)
    for first in range(0, length, _BLOCK):
        keys = slice(first, min(first + _BLOCK, length))
        n_keys = keys.stop - first
        for start in range(first, length, _QUERIES):
            rows = slice(start * r, min(start + _QUERIES, length) * r)
            # Products with few rows and long ones: the scores are those of keys by queries.
            weights_ZuR = torch.bmm(k_ZLA1[:, keys], q_ZRA1[:, rows].mT)
            if start == first:
                weights_ZuR[..., : n_keys * r] += hidden_uU[:n_keys, : n_keys * r]
            weights_ZuR.exp2_()
            d_scores_ZuR = torch.bmm(v_ZLA1[:, keys], g_ZRA1[:, rows].mT).mul_(weights_ZuR)
            # Added apart: products added to parts of tensors are taken one head at a time.
            d_v_ZLA[:, keys] += torch.bmm(weights_ZuR, g_ZRA1[:, rows, :-1])
            d_k_ZLA[:, keys] += torch.bmm(d_scores_ZuR, q_ZRA1[:, rows, :-1])
            d_q_ZRA[:, rows] += torch.bmm(d_scores_ZuR.mT, k_ZLA1[:, keys, :-1])


def _beside(x_NXLA: Tensor, n_groups: int, column_NXL: Tensor, scale: float = 1.0) -> Tensor:
    """Return x times the scale with a column beside it, (Z, R, A + 1): rows of all heads of a group, position by position."""
    n, _, length, width = x_NXLA.shape
    x_NGLrA = x_NXLA.unflatten(1, (n_groups, -1)).transpose(2, 3)
    wide = x_NXLA.new_empty(n, n_groups, length, x_NGLrA.shape[3], width + 1)
    torch.mul(x_NGLrA, scale, out=wide[..., :-1])
    wide[..., -1] = column_NXL.unflatten(1, (n_groups, -1)).transpose(2, 3) if column_NXL.dim() else column_NXL
    return wide.view(n * n_groups, -1, width + 1)
