"""Cross-entropy over a large vocabulary without the logits of the whole batch.

At a vocabulary of 128,815 the fp32 logits of 8,192 tokens take 4.2 GB, and their softmax and its gradient as much each. Here a
few rows at a time go through unembedding, softmax and the gradient of both, which the forward pass can compute at once: the sum
of the losses reaches the objective by one factor, which the backward pass multiplies in. The cost is that of the usual way,
three products with the unembedding; nothing is computed twice.

Shape legend: T tokens, c tokens of a chunk, W token width, V vocabulary.
"""

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlcm.backends import has_triton
from dlcm.chunk import chunk_rows

_LOG2_E = math.log2(math.e)


def linear_cross_entropy(x_TW: Tensor, weight_VW: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(x W') against the targets, in nats, computed in at least fp32.

    Products are taken in the compute dtype (that of autocast where it is on), softmax and sums in fp32 or float64.

    Args:
        x_TW: states.
        weight_VW: unembedding.
        targets_T: int64, the right token of each.

    Returns:
        The sum over the tokens, differentiable once in x and W; and the loss of each token, (T,), which carries no gradient.
    """
    grad = torch.is_grad_enabled() and (x_TW.requires_grad or weight_VW.requires_grad)
    return _LinearCrossEntropy.apply(x_TW, weight_VW, targets_T, compute_dtype(x_TW), grad)


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which dtype products with `x` are taken: that of autocast where it is on."""
    device = x.device.type
    # Shapes are counted on `meta`, which has no autocast. (The function that tells is not one that every Dynamo can trace.)
    cast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TW: Tensor, weight_VW: Tensor, targets_T: Tensor, dtype: torch.dtype, grad: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_TW.device.type, enabled=False):
            narrow_TW, narrow_VW = x_TW.to(dtype), weight_VW.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            nats_T = torch.empty(x_TW.shape[0], dtype=wide, device=x_TW.device)
            grad_TW = torch.empty_like(narrow_TW) if grad else None
            grad_VW = torch.zeros_like(weight_VW, dtype=wide) if grad else None
            rows = chunk_rows(x_TW.shape[0], weight_VW.shape[0], x_TW.device.type)
            fused = _has_kernel(narrow_TW)
            room_cV = None if fused else nats_T.new_empty(min(rows, x_TW.shape[0]), weight_VW.shape[0])
            for start in range(0, x_TW.shape[0], rows):
                part = slice(start, start + rows)
                if room_cV is None:
                    delta_cV, sum_c1 = (
                        _fused_delta(narrow_TW[part], narrow_VW, targets_T[part], nats_T[part], grad),
                        None,
                    )
                else:
                    target_c1 = targets_T[part, None]
                    power_cV, sum_c1, nats_T[part] = _softmax(narrow_TW[part], narrow_VW, target_c1, room_cV)
                    # The gradient of the sum in the logits: softmax, less one at the target; here times the sum of the row.
                    delta_cV = power_cV.scatter_add_(1, target_c1, -sum_c1)
                if grad_TW is None or grad_VW is None:
                    continue
                if sum_c1 is not None and dtype == wide:
                    # Divided where it is narrow.
                    torch.mm(delta_cV, narrow_VW, out=grad_TW[part]).div_(sum_c1)
                    grad_VW.addmm_(delta_cV.T, narrow_TW[part] / sum_c1)
                    continue
                if sum_c1 is not None:
                    delta_cV = delta_cV.div_(sum_c1).to(dtype)
                torch.mm(delta_cV, narrow_VW, out=grad_TW[part])
                grad_VW += delta_cV.T @ narrow_TW[part]
        if grad:
            ctx.save_for_backward(grad_TW, grad_VW)
            ctx.dtypes = x_TW.dtype, weight_VW.dtype
        ctx.mark_non_differentiable(nats_T)
        return nats_T.sum(), nats_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyrefly: ignore[bad-override]  one gradient for each output
        grad_TW, grad_VW = ctx.saved_tensors
        of_x, of_weight = ctx.dtypes
        return (grad_TW * grad_sum).to(of_x), (grad_VW * grad_sum).to(of_weight), None, None, None


def _has_kernel(x: Tensor) -> bool:
    """Whether a chunk goes through the kernel for GPUs, which computes in fp32."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


def _fused_delta(x_cW: Tensor, weight_VW: Tensor, target_c: Tensor, nats_c: Tensor, grad: bool) -> Tensor:
    """Logits, in their place the gradient in them, and the losses in `nats_c`; the logits themselves without `grad`."""
    logits_cV = x_cW @ weight_VW.T
    import_module("dlcm.backends.cross_entropy_triton").softmax_delta_(logits_cV, target_c, nats_c, grad)
    return logits_cV


def _softmax(x_cW: Tensor, weight_VW: Tensor, target_c1: Tensor, room_cV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exponentials of the logits less their greatest, in `room_cV`, their sums, and the losses.

    As powers of two, which are computed twice as fast as those of e.
    """
    logits_cV = room_cV[: x_cW.shape[0]]
    if x_cW.dtype == logits_cV.dtype:
        torch.mm(x_cW, weight_VW.T, out=logits_cV)
    else:
        logits_cV.copy_(x_cW @ weight_VW.T)
    greatest_c1 = logits_cV.amax(1, keepdim=True)
    above_c = (greatest_c1 - logits_cV.gather(1, target_c1))[:, 0]
    power_cV = torch.add(greatest_c1 * -_LOG2_E, logits_cV, alpha=_LOG2_E, out=logits_cV).exp2_()
    sum_c1 = power_cV.sum(1, keepdim=True)
    return power_cV, sum_c1, above_c + sum_c1[:, 0].log()


def next_token_loss(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, in at least fp32, of logits (..., V) that are there as a whole."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction=reduction)
