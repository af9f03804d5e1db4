"""Causal self-attention, and attention of tokens to the concepts that they may see: what is computed, and by which backend.

Shape legend: T tokens, K concepts, H query heads, G key-value heads (H a multiple of G), A head width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dlcm.backends import causal_cpu, has_triton, ops, reference, sdpa
from dlcm.concepts import Packing, Segments
from dlcm.errors import UserError


def self_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing, backend: str) -> Tensor:
    """softmax(q k' / sqrt(A)) v over the earlier and the own position of the same sequence.

    Args:
        q_THA: queries.
        k_TGA: keys, grouped: query head i reads key head i // (H / G).
        v_TGA: values.
        packing: which positions form a sequence.
        backend: that of the model; `reference` and `sdpa` mean the same here, all others the fastest kernel there is.

    Returns:
        (T, H, A).
    """
    if torch.compiler.is_compiling():
        return ops.self_attention(q_THA, k_TGA, v_TGA, packing.cu_seqlens_S1)[0]
    if backend == "reference":
        return reference.self_attention(q_THA, k_TGA, v_TGA, packing)
    if backend == "sdpa":
        return sdpa.self_attention(q_THA, k_TGA, v_TGA, packing)
    return causal(q_THA, k_TGA, v_TGA, packing)


def causal(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing, scale: float | None = None) -> Tensor:
    """Causal self-attention by the fastest kernel for the device and dtype.

    Args:
        q_THA: queries.
        k_TGA: keys.
        v_TGA: values.
        packing: which positions form a sequence.
        scale: of the scores; 1 / sqrt(A) by default.
    """
    if q_THA.device.type == "cpu":
        return ops.Pair.apply(q_THA, k_TGA, v_TGA, causal_cpu, packing, scale)
    if _has_flash(q_THA):
        return import_module("dlcm.backends.varlen").self_attention(q_THA, k_TGA, v_TGA, packing, scale)
    return sdpa.self_attention(q_THA, k_TGA, v_TGA, packing, scale)


def cross_attention(
    q_THA: Tensor,
    k_KGA: Tensor,
    v_KGA: Tensor,
    null_GA: Tensor | None,
    segments: Segments,
    *,
    own_segment: bool,
    log_length: bool,
    backend: str,
) -> Tensor:
    """Attention of tokens to concepts (eqs 12-14) under the visibility rule.

    A token of segment j of its document sees the concepts k < j; a token of the first segment sees only the null concept.
    With `own_segment` (pooling of the boundary token's own state) it sees k <= j and no null.

    With `log_length` the scores carry a bias log(number of tokens of concept k that lie at or before the query), which is
    what attention over concepts replicated to every token (eq 17) computes, exactly; without it this is eq 14 as printed.

    Args:
        q_THA: queries of the tokens.
        k_KGA: keys of the concepts.
        v_KGA: values of the concepts.
        null_GA: value of the null concept; None with `own_segment`. It needs no key: a softmax over one key is one.
        segments: the concepts of the tokens.
        own_segment: whether a token sees the concept of its own segment.
        log_length: whether scores carry the bias.
        backend: see `ModelConfig.attention_backend`.

    Returns:
        (T, H, A).
    """
    return CrossAttend(segments, own_segment, log_length, backend)(q_THA, k_KGA, v_KGA, null_GA)


@dataclass(frozen=True)
class SelfAttend:
    """`self_attention` among packed sequences, as the function of queries, keys and values that a layer calls."""

    packing: Packing
    backend: str

    def __call__(self, q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor) -> Tensor:
        """Outputs (T, H, A)."""
        return self_attention(q_THA, k_TGA, v_TGA, self.packing, self.backend)


class CrossAttend:
    """`cross_attention` with everything but its tensors chosen."""

    def __init__(self, segments: Segments, own_segment: bool, log_length: bool, backend: str) -> None:
        self.segments, self.own_segment, self.log_length, self.backend = segments, own_segment, log_length, backend
        # Computed here, outside of what is compiled: its making has shapes that depend on the data.
        lo_T, hi_T = segments.visible(False)
        self.in_first_T11 = (lo_T == hi_T)[:, None, None]

    def __call__(self, q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, null_GA: Tensor | None) -> Tensor:
        """Outputs (T, H, A)."""
        if torch.compiler.is_compiling():
            tokens, concepts = self.segments.tokens.cu_seqlens_S1, self.segments.concepts.cu_seqlens_S1
            where = tokens, concepts, self.segments.segment_T, self.segments.lengths_K
            out_THA = ops.cross_attention(q_THA, k_KGA, v_KGA, *where, self.own_segment, self.log_length)[0]
        else:
            out_THA = self._concepts(q_THA, k_KGA, v_KGA)
        if null_GA is None:
            return out_THA
        null_HA = null_GA.repeat_interleave(q_THA.shape[1] // null_GA.shape[0], dim=0)
        return torch.where(self.in_first_T11, null_HA, out_THA)

    def _concepts(self, q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor) -> Tensor:
        if not k_KGA.shape[0]:
            return q_THA * 0.0  # no concepts, so no tokens either: empty, with a gradient
        where = self.segments, self.own_segment, self.log_length
        name = resolve(self.backend, q_THA)
        if name == "staircase" and not q_THA.is_cuda:
            return ops.Pair.apply(q_THA, k_KGA, v_KGA, ops.cross_pair(q_THA.device), *where)
        module = "staircase_triton" if name == "staircase" else name
        return import_module(f"dlcm.backends.{module}").cross_attention(q_THA, k_KGA, v_KGA, *where)


def resolve(backend: str, like: Tensor) -> str:
    """The backend that `auto` stands for, by device and dtype of the queries; any other name stands for itself.

    On a CPU this is `staircase`, the fastest there from single short documents to long ones; on a GPU it is `staircase` in
    half precision and `sdpa` in fp32, for which its kernels are not made.

    Raises:
        UserError: `staircase` on a GPU without Triton.
    """
    if backend == "auto":
        return "staircase" if like.device.type == "cpu" or (_is_half(like) and has_triton()) else "sdpa"
    if backend == "staircase" and like.device.type != "cpu" and not has_triton():
        raise UserError(
            "attention_backend: staircase needs Triton on a GPU, which is not installed; "
            "install it (pip install triton) or set attention_backend: sdpa"
        )
    return backend


def check_compilable(backend: str) -> None:
    """Refuse to compile a model with a backend that the compiler cannot take.

    Raises:
        UserError: the backend is not one operator with a gradient of its own.
    """
    if backend not in ("auto", "staircase"):
        raise UserError(
            f"torch.compile does not work with attention_backend: {backend}; "
            "set attention_backend: auto or staircase, or train without compiling"
        )


def compiled(
    function: Callable[..., Any], wanted: Callable[[], bool] = lambda: True, **options: Any
) -> Callable[..., Any]:
    """A function of layers as one graph, compiled for any number of packed sequences.

    Args:
        function: what to compile.
        wanted: asked at each call; where it says no, the function itself is called.
        options: passed to `torch.compile`.
    """
    graph = torch.compile(function, fullgraph=True, **options)

    def call(*inputs: Any) -> Any:
        if not wanted():
            return function(*inputs)
        mark_dynamic(inputs)
        return graph(*inputs)

    return call


def mark_dynamic(inputs: Iterable[Any]) -> None:
    """Tell the compiler that the number of packed sequences differs between batches.

    Args:
        inputs: of a function to compile; those that attend, or are sequences of what attends, count.
    """
    for item in inputs:
        if isinstance(item, list | tuple):
            mark_dynamic(item)
        elif isinstance(item, SelfAttend):
            torch._dynamo.mark_dynamic(item.packing.cu_seqlens_S1, 0)
        elif isinstance(item, CrossAttend):
            torch._dynamo.mark_dynamic(item.segments.tokens.cu_seqlens_S1, 0)
            torch._dynamo.mark_dynamic(item.segments.concepts.cu_seqlens_S1, 0)


def _is_half(like: Tensor) -> bool:
    return like.dtype in (torch.bfloat16, torch.float16)


def _has_flash(like: Tensor) -> bool:
    """Whether flash kernels take these queries: half precision, and a GPU of Ampere or newer."""
    return like.is_cuda and _is_half(like) and torch.cuda.get_device_capability(like.device)[0] >= 8
