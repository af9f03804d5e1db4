"""Causal self-attention of packed sequences on a GPU in half precision, by flash kernels that read where each begins.

flash-attn's function where that package is installed, else the one of torch. Arguments go by keyword where there are any:
the versions of flash-attn order them differently. In self-attention queries and keys are equally many, so it makes no
difference that these kernels align the causal mask with the last query and key.

Where all sequences are equally long, as with texts that fill windows, they are a batch, and PyTorch's scaled-dot-product
attention takes them: from Hopper on that is cuDNN, in 0.6 to 0.7 of the time of torch's own kernel, which has no form for
sequences of different length that would be kept from one call to the next.

Shape legend: T tokens, S sequences, H query heads, G key-value heads, A head width.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from dlcm.backends import sdpa
from dlcm.concepts import Packing
from dlcm.errors import UserError

# What the kernels take.
_DTYPES = (torch.bfloat16, torch.float16)
_WIDTH_MULTIPLE, _MAX_WIDTH = 8, 256
# (left, right) of the window of keys around the query: all before it, none behind it.
_CAUSAL = (-1, 0)


def self_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing, scale: float | None = None) -> Tensor:
    """Causal attention within each packed sequence, (T, H, A).

    Args:
        q_THA: queries.
        k_TGA: keys.
        v_TGA: values.
        packing: which tokens form a sequence.
        scale: of the scores; 1 / sqrt(A) by default.

    Raises:
        UserError: dtype or head width that the kernels do not take.
    """
    check(q_THA.dtype, q_THA.shape[-1])
    if not q_THA.shape[0]:
        return torch.zeros_like(q_THA)
    cu_S1, longest, uniform = _bounds(packing)
    if uniform:
        return sdpa.self_attention(q_THA, k_TGA, v_TGA, packing, scale)
    if find_spec("flash_attn") is not None:
        return import_module("flash_attn").flash_attn_varlen_func(
            q_THA,
            k_TGA,
            v_TGA,
            cu_seqlens_q=cu_S1,
            cu_seqlens_k=cu_S1,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
        )
    attend, options = _torch_varlen(), {}
    if _takes_groups():
        options["enable_gqa"] = q_THA.shape[1] != k_TGA.shape[1]
    else:
        k_TGA, v_TGA = (_expand(x, q_THA) for x in (k_TGA, v_TGA))
    return attend(q_THA, k_TGA, v_TGA, cu_S1, cu_S1, longest, longest, scale=scale, window_size=_CAUSAL, **options)


def forward(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, A) and log-sum-exps of the scores (T, H): what torch's function calls, for use without autograd.

    Raises:
        UserError: dtype or head width that the kernel does not take.
    """
    check(q_THA.dtype, q_THA.shape[-1])
    cu_S1, longest, uniform = _bounds(packing)
    if not q_THA.shape[0]:
        return torch.zeros_like(q_THA), q_THA.new_zeros(q_THA.shape[:2], dtype=torch.float32)
    if uniform and _takes_cudnn(batch := _batch(longest, q_THA, _expand(k_TGA, q_THA), _expand(v_TGA, q_THA))):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*batch, None, True, 0.0, True)
        return out.transpose(1, 2).flatten(0, 1), lse.view(lse.shape[:3]).transpose(1, 2).flatten(0, 1)
    out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        q_THA,
        _expand(k_TGA, q_THA),
        _expand(v_TGA, q_THA),
        cu_S1,
        cu_S1,
        longest,
        longest,
        0.0,
        True,
        return_debug_mask=False,
        window_size_left=_CAUSAL[0],
        window_size_right=_CAUSAL[1],
    )
    return out, lse_HT.t()


def backward(
    d_out_THA: Tensor,
    q_THA: Tensor,
    k_TGA: Tensor,
    v_TGA: Tensor,
    out_THA: Tensor,
    lse_TH: Tensor,
    packing: Packing,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given that of the outputs and what `forward` took and gave."""
    if not q_THA.shape[0]:
        return torch.zeros_like(q_THA), torch.zeros_like(k_TGA), torch.zeros_like(v_TGA)
    cu_S1, longest, uniform = _bounds(packing)
    # Without dropout the state of the random numbers is not read.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q_THA.device), torch.empty(0, device=q_THA.device)
    if uniform and _takes_cudnn(batch := _batch(longest, q_THA, _expand(k_TGA, q_THA), _expand(v_TGA, q_THA))):
        d_out, out = _batch(longest, d_out_THA.contiguous(), out_THA)
        lse = lse_TH.unflatten(0, (-1, longest)).transpose(1, 2).contiguous()[..., None]
        none, seed = None, torch.zeros((), dtype=torch.int64, device=q_THA.device)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            d_out, *batch, out, lse, seed, seed, none, none, none, longest, longest, 0.0, True
        )
        d_q, d_k, d_v = (x.transpose(1, 2).flatten(0, 1) for x in grads)
        return d_q, _contract(d_k, k_TGA), _contract(d_v, v_TGA)
    d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
        d_out_THA.contiguous(),
        q_THA,
        _expand(k_TGA, q_THA),
        _expand(v_TGA, q_THA),
        out_THA,
        lse_TH.t().contiguous(),
        cu_S1,
        cu_S1,
        longest,
        longest,
        0.0,
        True,
        state,
        unused,
        window_size_left=_CAUSAL[0],
        window_size_right=_CAUSAL[1],
    )
    return d_q, _contract(d_k, k_TGA), _contract(d_v, v_TGA)


def _bounds(packing: Packing) -> tuple[Tensor, int, bool]:
    """Starts of the sequences in int32, the length of the longest, and whether all are as long; kept for all layers."""
    kept = packing.__dict__.get("_varlen")
    if kept is None:
        lengths = packing.lengths_S.tolist()
        longest = max(lengths, default=0)
        kept = packing.__dict__["_varlen"] = packing.cu_seqlens_S1.int(), longest, set(lengths) == {longest}
    return kept


def _batch(length: int, *x_THA: Tensor) -> tuple[Tensor, ...]:
    """Sequences of one length as a batch, (S, H, L, A)."""
    return tuple(x.unflatten(0, (-1, length)).transpose(1, 2) for x in x_THA)


def _takes_cudnn(batch: tuple[Tensor, ...]) -> bool:
    """Whether PyTorch would choose cuDNN's kernels for this batch."""
    if not batch[0].is_cuda:
        return False
    q, k, v = batch
    return torch._fused_sdp_choice(q, k, v, None, 0.0, True) == int(SDPBackend.CUDNN_ATTENTION.value)


def check(dtype: torch.dtype, width: int) -> None:
    """Refuse queries that the kernels do not take.

    Raises:
        UserError: another dtype than bf16 or fp16, or heads of another width than a multiple of 8 up to 256.
    """
    if dtype not in _DTYPES:
        raise UserError(
            f"flash attention takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}; "
            "set train.precision: bf16, or attention_backend: sdpa without compiling"
        )
    if width % _WIDTH_MULTIPLE or width > _MAX_WIDTH:
        raise UserError(
            f"flash attention takes heads of a multiple of {_WIDTH_MULTIPLE} up to {_MAX_WIDTH} wide, not {width}; "
            "change d_head or set attention_backend: sdpa"
        )


@cache
def _torch_varlen() -> Callable[..., Tensor]:
    return import_module("torch.nn.attention.varlen").varlen_attn


@cache
def _takes_groups() -> bool:
    return "enable_gqa" in inspect.signature(_torch_varlen()).parameters


def _expand(x_TGA: Tensor, q_THA: Tensor) -> Tensor:
    """Each key-value head as often as query heads read it."""
    group = q_THA.shape[1] // x_TGA.shape[1]
    return x_TGA if group == 1 else x_TGA.repeat_interleave(group, dim=1)


def _contract(d_x_THA: Tensor, x_TGA: Tensor) -> Tensor:
    """Gradient of `_expand`."""
    if d_x_THA.shape == x_TGA.shape:
        return d_x_THA
    return d_x_THA.unflatten(1, (x_TGA.shape[1], -1)).sum(2, dtype=torch.float32).to(x_TGA.dtype)
