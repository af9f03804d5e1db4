"""Staircase attention on a GPU: every block of queries stops at the last concept that it sees (work S = L·M/2).

Deterministic by construction: no atomics, every sum in one fixed order (see `staircase_tiles` for the choice of that order).
Nothing waits for the GPU: which tiles are visible is read there, from the layout.

Shape legend: T tokens, K concepts, H query heads, G key-value heads, A head width.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dlcm.backends.ops import Pair
from dlcm.backends.staircase_kernels import forward_kernel
from dlcm.backends.staircase_kernels_backward import key_grad_kernel, query_grad_kernel, row_kernel
from dlcm.backends.staircase_tiles import Kernel, Tiles, choose, choose_splits, padded_width
from dlcm.concepts import Segments
from dlcm.errors import UserError

_MAX_WIDTH = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Float32 products as exact as `torch.set_float32_matmul_precision` asks elsewhere; tf32x3 errs by about 1e-6.
_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
_ROW_BLOCK = 64


class Layout(NamedTuple):
    """Who sees whom, from either side; all layers of a stack share it.

    Attributes:
        lo_T: int32, first concept that a token sees.
        hi_T: int32, one behind the last.
        first_K: int32, first token that sees a concept.
        end_K: int32, one behind the last.
        bias_K: float32, log2 of the length of each segment; None without bias.
        own_bias: whether a token sees its own segment, with the bias of the part up to the token.
    """

    lo_T: Tensor
    hi_T: Tensor
    first_K: Tensor
    end_K: Tensor
    bias_K: Tensor | None
    own_bias: bool


def make_layout(segments: Segments, own_segment: bool, log_length: bool) -> Layout:
    """The layout of these segments, made once and kept on them."""
    cache = segments.__dict__.setdefault("_staircase_layouts", {})
    key = (own_segment, log_length)
    if key not in cache:
        lo_T, hi_T = segments.visible(own_segment)
        index_K = torch.arange(segments.lengths_K.numel(), device=lo_T.device)
        # Both ends of the range never decrease, so a search inverts them: the first token whose hi (lo) lies above k.
        first_K, end_K = (
            torch.searchsorted(x_T.contiguous(), index_K, right=True, out_int32=True) for x_T in (hi_T, lo_T)
        )
        bias_K = segments.lengths_K.clamp(min=1).float().log2() if log_length else None
        cache[key] = Layout(lo_T.int(), hi_T.int(), first_K, end_K, bias_K, own_segment and log_length)
    return cache[key]


def cross_attention(
    q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> Tensor:
    """Attention of tokens to concepts, (T, H, A)."""
    return Pair.apply(q_THA, k_KGA, v_KGA, sys.modules[__name__], segments, own_segment, log_length)


def forward(
    q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, A), and log-sum-exp of the scores of each row (T, H) in float32; both zero for rows that see nothing.

    Raises:
        UserError: dtype, head width or device that the kernels do not take.
    """
    _check(q_THA, k_KGA, v_KGA)
    n_tokens, n_heads, d_head = q_THA.shape
    q, k, v = q_THA.contiguous(), k_KGA.contiguous(), v_KGA.contiguous()
    lse_TH = q.new_empty(n_tokens, n_heads, dtype=torch.float32)
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), lse_TH.zero_()
    layout = make_layout(segments, own_segment, log_length)
    out_THA = torch.empty_like(q)

    def launch(tiles: Tiles) -> None:
        forward_kernel[triton.cdiv(n_tokens, tiles.block_m), n_heads](
            q, k, v, out_THA, lse_TH, layout.lo_T, layout.hi_T, *_key_side(layout), n_tokens, d_head**-0.5,
            H=n_heads, G=k.shape[1], D_HEAD=d_head, **_constants(tiles, q, layout),
        )  # fmt: skip

    _run("forward", q, k, launch)
    return out_THA, lse_TH


def backward(
    d_out_THA: Tensor,
    q_THA: Tensor,
    k_KGA: Tensor,
    v_KGA: Tensor,
    out_THA: Tensor,
    lse_TH: Tensor,
    segments: Segments,
    own_segment: bool,
    log_length: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, given that of the outputs and what `forward` returned."""
    q, k, v, out, d_out = (x.contiguous() for x in (q_THA, k_KGA, v_KGA, out_THA, d_out_THA))
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    layout = make_layout(segments, own_segment, log_length)
    n_tokens, n_heads, d_head = q.shape
    row_terms_2HT = torch.empty(2, n_heads, n_tokens, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        row_kernel[triton.cdiv(n_tokens, _ROW_BLOCK), n_heads](
            out, d_out, lse_TH.contiguous(), row_terms_2HT, n_tokens,
            H=n_heads, D_HEAD=d_head, BLOCK_A=padded_width(d_head), BLOCK_M=_ROW_BLOCK,
        )  # fmt: skip
    d_q = torch.empty_like(q)

    def launch(tiles: Tiles) -> None:
        query_grad_kernel[triton.cdiv(n_tokens, tiles.block_m), n_heads](
            q, k, v, d_out, row_terms_2HT, d_q, layout.lo_T, layout.hi_T, *_key_side(layout), n_tokens, d_head**-0.5,
            H=n_heads, G=k.shape[1], D_HEAD=d_head, **_constants(tiles, q, layout),
        )  # fmt: skip

    _run("query_grad", q, k, launch)
    return d_q, *_key_grads(q, k, v, d_out, row_terms_2HT, layout)


def _key_grads(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, row_terms_2HT: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    (n_tokens, n_heads, d_head), (n_keys, n_groups) = q.shape, k.shape[:2]
    results: tuple[Tensor, Tensor] = (k, v)

    def launch(tiles: Tiles) -> None:
        nonlocal results
        n_splits = choose_splits(n_tokens, n_groups, tiles.block_n)
        results = (torch.empty_like(k), torch.empty_like(v))
        partial = results
        if n_splits > 1:
            d_k, d_v = (x.new_empty(n_splits, *x.shape, dtype=torch.float32) for x in results)
            partial = (d_k, d_v)
        key_grad_kernel[triton.cdiv(n_keys, tiles.block_n), n_groups, n_splits](
            q, k, v, d_out, row_terms_2HT, *partial, layout.lo_T, *_key_side(layout), n_tokens, n_keys, d_head**-0.5,
            H=n_heads, G=n_groups, SPLITS=n_splits, D_HEAD=d_head, **_constants(tiles, q, layout),
        )  # fmt: skip
        if n_splits > 1:
            for result, part in zip(results, partial):
                result.copy_(part.sum(0))

    _run("key_grad", q, k, launch)
    return results


def _run(kernel: Kernel, q: Tensor, k: Tensor, launch: Callable[[Tiles], None]) -> None:
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        launch(choose(kernel, q, k.shape[1], launch))


def _key_side(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    # Without a bias no kernel reads the third: any pointer will do.
    return layout.first_K, layout.end_K, layout.first_K if layout.bias_K is None else layout.bias_K


def _constants(tiles: Tiles, q: Tensor, layout: Layout) -> dict[str, Any]:
    """The arguments that a kernel is compiled for, by name."""
    return {
        "BLOCK_A": padded_width(q.shape[2]),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "HAS_BIAS": layout.bias_K is not None,
        "OWN_BIAS": layout.own_bias,
        "PRECISION": _PRECISIONS[torch.get_float32_matmul_precision()] if q.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what the kernels do not take, and name the way out."""
    way_out = "choose another attention_backend"
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        raise UserError(f"staircase attention takes one of bfloat16, float16, float32, got {q.dtype}; {way_out}")
    if q.shape[2] > _MAX_WIDTH:
        raise UserError(f"staircase attention takes heads of width up to {_MAX_WIDTH}, got {q.shape[2]}; {way_out}")
    if not q.is_cuda and isinstance(forward_kernel, triton.JITFunction):
        raise UserError(f"the staircase kernels need a GPU, the queries are on {q.device}; {way_out}")
    if q.shape[1] % max(k.shape[1], 1) or k.shape != v.shape or q.shape[2] != k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"queries, keys and values do not fit together: {shapes}")
