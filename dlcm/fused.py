"""Chains of elementwise operations on a CPU as single functions with a gradient in closed form.

Taken apart, as autograd takes them, the gradient of a norm runs over its rows a dozen times and keeps the normalised rows; here
it is half as many passes, and a norm keeps its input and one number a row. Compilers and GPUs fuse such chains themselves, and
narrow types have their own rules of what is rounded where: those are left to PyTorch's own operations.

Shape legend: N rows of any kind, W their width; T tokens, H heads, A head width; F hidden width of the SwiGLU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def applies(x: Tensor) -> bool:
    """Whether these functions are for x: on a CPU, in fp32 or fp64, neither autocast nor compiled."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


def rms_norm(x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean square + eps) * weight over the last dimension."""
    return _RMSNorm.apply(x, weight_W, eps, None, None)


def rms_norm_rotated(x_THA: Tensor, weight_A: Tensor, eps: float, cos_T1A: Tensor, sin_T1A: Tensor) -> Tensor:
    """`rms_norm` of every head, whose halves are then rotated as pairs; cosines and sines are of half the width."""
    return _RMSNorm.apply(x_THA, weight_A, eps, cos_T1A, sin_T1A)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) * up; keeps the two alone."""
    return _SwiGLU.apply(gate_TF, up_TF)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_W: Tensor, eps: float, cos_T1A: Tensor | None, sin_T1A: Tensor | None
    ) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1.0 / x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_W, scale, cos_T1A, sin_T1A)
        normed = torch.mul(x, scale).mul_(weight_W)
        return normed if cos_T1A is None or sin_T1A is None else _rotate(normed, cos_T1A, sin_T1A, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyrefly: ignore[bad-override]  one gradient for each output
        x, weight_W, scale, cos_T1A, sin_T1A = ctx.saved_tensors
        if cos_T1A is not None:
            grad = _rotate(grad, cos_T1A, sin_T1A, -1.0)
        # With y = x s w and s = (mean x^2 + eps)^(-1/2): dx = s (g w - x s^2 mean(g w x)), dw = sum over rows of g x s.
        product = (grad * x).contiguous()
        product_NW, scale_N = product.view(-1, x.shape[-1]), scale.flatten()
        d_weight_W = scale_N @ product_NW
        mean = (product_NW @ weight_W).mul_(scale_N.square()).mul_(-1.0 / x.shape[-1]).view_as(scale)
        d_x = torch.mul(grad, weight_W, out=product).addcmul_(x, mean).mul_(scale)
        return d_x, d_weight_W, None, None, None


def _rotate(x_THA: Tensor, cos_T1A: Tensor, sin_T1A: Tensor, sign: float) -> Tensor:
    """Rotate the halves of every head as pairs, by the angles or against them."""
    out_THA = torch.empty_like(x_THA, memory_format=torch.contiguous_format)
    (a, b), (of_a, of_b) = x_THA.chunk(2, dim=-1), out_THA.chunk(2, dim=-1)
    torch.mul(a, cos_T1A, out=of_a).addcmul_(b, sin_T1A, value=-sign)
    torch.mul(b, cos_T1A, out=of_b).addcmul_(a, sin_T1A, value=sign)
    return out_THA


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return F.silu(gate_TF).mul_(up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]  one gradient for each output
        gate_TF, up_TF = ctx.saved_tensors
        d_gate_TF = torch.ops.aten.silu_backward(grad_TF * up_TF, gate_TF)
        return d_gate_TF, F.silu(gate_TF).mul_(grad_TF)
