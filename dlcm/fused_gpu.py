"""A block on a GPU as few functions: products of matrices beside each other, and one kernel for what lies between products.

The same rules as on a CPU (`dlcm.fused`): autocast says in which dtype products are taken, norms and gate are computed in fp32,
and the stream of the residuals stays as wide as it is. `dlcm.backends.fused_triton` has the kernels. A compiler fuses such
chains itself, so under `torch.compile` the layers are taken apart.

Shape legend: T tokens, W width, X widths of several matrices beside each other; H query heads, G key-value heads, A head width.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dlcm.backends import has_triton
from dlcm.loss import compute_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def applies(x: Tensor) -> bool:
    """Whether these functions are for x: on a GPU with Triton, in at most fp32, not compiled."""
    return x.is_cuda and x.dtype in _DTYPES and not torch.compiler.is_compiling() and has_triton()


def rms_norm(x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """The norm of the rows of x times the gain, in the dtype of x."""
    return _AddNorm.apply(x, None, weight_W, eps, x.dtype)[1]


def add_rms_norm(x: Tensor, branch: Tensor | None, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + branch, and its norm times the gain in the dtype of products; x itself where there is no branch.

    Whoever reads on from the sum takes it from here: then its gradient and that of the norm are added up in one pass.
    """
    return _AddNorm.apply(x, branch, weight_W, eps, compute_dtype(x))


def products(x_TW: Tensor, *weights_XW: Tensor) -> Tensor:
    """Products of x and several matrices, (T, X), in the dtype of autocast: one large one in place of several smaller ones.

    Without gradients, as in decoding, the matrices would be copied beside each other for few rows, again and again: autocast
    keeps its copies there.
    """
    if torch.is_grad_enabled():
        return _Products.apply(x_TW, compute_dtype(x_TW), *weights_XW)
    parts = [F.linear(x_TW, weight) for weight in weights_XW]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def heads(
    x_TX: Tensor, gain_q_A: Tensor, gain_k_A: Tensor, eps: float, cos_T1A: Tensor, sin_T1A: Tensor, n_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, H, A) and keys (T, G, A), normed and rotated, and values (T, G, A), of all of them beside each other."""
    return _Heads.apply(x_TX, gain_q_A, gain_k_A, eps, cos_T1A, sin_T1A, n_kv)


def swiglu(x_TX: Tensor) -> Tensor:
    """silu(gate) * up of both beside each other."""
    return _SwiGLU.apply(x_TX)


@cache
def _kernels() -> ModuleType:
    return import_module("dlcm.backends.fused_triton")


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight_W: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        total, normed, scale_N = _kernels().add_rms_norm(
            x, None if branch is None else branch.contiguous(), weight_W, eps, dtype
        )
        ctx.save_for_backward(total, weight_W, scale_N)
        ctx.branch = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]  one gradient for each output
        total, weight_W, scale_N = ctx.saved_tensors
        if d_normed is None:  # nobody reads the norm
            return d_total, None if ctx.branch is None or d_total is None else d_total.to(ctx.branch), None, None, None
        d_x, d_branch, d_weight_W = _kernels().add_rms_norm_backward(
            None if d_total is None else d_total.contiguous(),
            d_normed.contiguous(),
            total,
            weight_W,
            scale_N,
            ctx.branch,
        )
        return d_x, d_branch, d_weight_W, None, None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TW: Tensor, dtype: torch.dtype, *weights_XW: Tensor) -> Tensor:
        x_TW = x_TW.to(dtype)
        ctx.sizes, ctx.dtypes = [weight.shape[0] for weight in weights_XW], [weight.dtype for weight in weights_XW]
        if len(weights_XW) == 1:
            beside_XW = weights_XW[0].to(dtype)
        else:
            beside_XW = x_TW.new_empty(sum(ctx.sizes), x_TW.shape[1])
            torch._foreach_copy_(beside_XW.split(ctx.sizes), weights_XW)
        ctx.save_for_backward(x_TW, beside_XW)
        return torch.mm(x_TW, beside_XW.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_TX: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]  one gradient for each output
        x_TW, beside_XW = ctx.saved_tensors
        d_x_TW = torch.mm(d_y_TX, beside_XW) if ctx.needs_input_grad[0] else None
        d_beside_XW = _accumulated(d_y_TX.T, x_TW, ctx.dtypes[0])
        parts = d_beside_XW.split(ctx.sizes) if len(ctx.sizes) > 1 else (d_beside_XW,)
        return d_x_TW, None, *(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes))


def _accumulated(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product whose sums, fp32 inside, are written as such where that is wanted: not rounded, then widened."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TX: Tensor,
        gain_q_A: Tensor,
        gain_k_A: Tensor,
        eps: float,
        cos_T1A: Tensor,
        sin_T1A: Tensor,
        n_kv: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_TX = x_TX.contiguous()
        n_heads = x_TX.shape[1] // gain_q_A.shape[0] - 2 * n_kv
        q, k, v, scale = _kernels().heads(x_TX, (gain_q_A, gain_k_A), eps, cos_T1A, sin_T1A, n_heads, n_kv)
        ctx.save_for_backward(x_TX, gain_q_A, gain_k_A, cos_T1A, sin_T1A, scale)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]  one gradient for each output
        x_TX, gain_q_A, gain_k_A, cos_T1A, sin_T1A, scale = ctx.saved_tensors
        grads = (d.contiguous() for d in (d_q, d_k, d_v))
        found = _kernels().heads_backward(*grads, x_TX, (gain_q_A, gain_k_A), cos_T1A, sin_T1A, scale)
        return *found, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TX: Tensor) -> Tensor:
        x_TX = x_TX.contiguous()
        ctx.save_for_backward(x_TX)
        return _kernels().swiglu(x_TX)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]  one gradient for each output
        return _kernels().swiglu_backward(d_out.contiguous(), *ctx.saved_tensors)
