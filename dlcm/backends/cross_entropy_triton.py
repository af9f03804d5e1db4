"""Softmax, losses and the gradient in the logits of a chunk of rows, in one pass over them on a GPU, in place.

Taken apart, as PyTorch's operations take them, a chunk goes through memory ten times, in fp32; here it is read in its own
dtype, twice (the second time mostly from the cache), and written once. Every row is one program's: sums have a fixed order.

Shape legend: c rows of a chunk, V vocabulary and tokens of one step through it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcm.backends.kernel_types import constexpr
from dlcm.backends.staircase_kernels import LN_2, LOG2_E, LOWEST

_BLOCK, _WARPS = 4096, 8


def softmax_delta_(logits_cV: Tensor, targets_c: Tensor, nats_c: Tensor, gradient: bool) -> None:
    """Write the losses and, in place of the logits, the gradient of their sum: softmax, less one at the target.

    Args:
        logits_cV: contiguous, of any float dtype; computed with in fp32. Left as they are without `gradient`.
        targets_c: int64.
        nats_c: fp32, what receives the losses.
        gradient: whether the logits are overwritten.
    """
    n_rows, vocab_size = logits_cV.shape
    if not n_rows:
        return
    block = min(_BLOCK, triton.next_power_of_2(vocab_size))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(logits_cV):
        softmax_delta_kernel[n_rows,](
            logits_cV, targets_c, nats_c, vocab_size, BLOCK=block, GRAD=gradient, num_warps=_WARPS
        )


@triton.jit
def softmax_delta_kernel(logits, targets, nats, vocab_size, BLOCK: constexpr, GRAD: constexpr):
    """One row: its log-sum-exp, the loss, and the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    target = tl.load(targets + row)
    of_target = tl.load(logits + target).to(tl.float32)
    lane_V = tl.arange(0, BLOCK)
    # A maximum and a sum of each lane by itself: one reduction at the end in place of two for each step.
    max_V = tl.full([BLOCK], LOWEST, tl.float32)
    sum_V = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        at_V = start + lane_V
        x_V = tl.load(logits + at_V, mask=at_V < vocab_size, other=float("-inf")).to(tl.float32)
        new_max_V = tl.maximum(max_V, x_V)
        sum_V = sum_V * tl.exp2((max_V - new_max_V) * LOG2_E) + tl.exp2((x_V - new_max_V) * LOG2_E)
        max_V = new_max_V
    greatest = tl.max(max_V, 0)
    total = tl.sum(sum_V * tl.exp2((max_V - greatest) * LOG2_E), 0)
    tl.store(nats + row, greatest - of_target + tl.log2(total) * LN_2)
    if GRAD:
        for start in range(0, vocab_size, BLOCK):
            at_V = start + lane_V
            inside_V = at_V < vocab_size
            x_V = tl.load(logits + at_V, mask=inside_V, other=float("-inf")).to(tl.float32)
            delta_V = tl.exp2((x_V - greatest) * LOG2_E) / total - tl.where(at_V == target, 1.0, 0.0)
            tl.store(logits + at_V, delta_V.to(logits.dtype.element_ty), mask=inside_V)
