"""Kernels that come as a forward and a backward function, made differentiable: eagerly, and under `torch.compile`.

The compiler sees each attention as one operator: what the kernels do with boundaries (cutting documents into blocks, padding,
loops) depends on the data and would break its graphs or compile them anew for every batch. So the operators take plain
tensors, of which only the contents differ between batches, and the number of packed sequences.

Shape legend: T tokens, K concepts, S sequences, H query heads, G key-value heads, A head width.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dlcm.concepts import Packing, Segments


class Pair(torch.autograd.Function):
    """`module.forward(q, k, v, *where) -> (out, lse)`, differentiated by `module.backward(d_out, q, k, v, out, lse, *where)`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, module: ModuleType, *where: Any) -> Tensor:
        """The outputs alone."""
        out, lse = module.forward(q, k, v, *where)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.module, ctx.where = module, where
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]  one gradient for each output
        """Gradients of q, k and v."""
        gradients = ctx.module.backward(d_out, *ctx.saved_tensors, *ctx.where)
        return *gradients, None, *(None for _ in ctx.where)


def self_pair(device: torch.device) -> ModuleType:
    """The kernels of causal self-attention on a device."""
    return import_module(f"dlcm.backends.{'causal_cpu' if device.type == 'cpu' else 'varlen'}")


def cross_pair(device: torch.device) -> ModuleType:
    """The kernels of the staircase on a device; Triton is imported where it is used, a CPU machine need not have it."""
    return import_module(f"dlcm.backends.{'staircase_cpu' if device.type == 'cpu' else 'staircase_triton'}")


@torch.library.custom_op("dlcm::self_attention", mutates_args=())
def self_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, cu_seqlens_S1: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention within packed sequences: outputs (T, H, A) and log-sum-exps (T, H)."""
    out, lse = self_pair(q_THA.device).forward(q_THA, k_TGA, v_TGA, _packing(cu_seqlens_S1))
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("dlcm::self_attention_backward", mutates_args=())
def self_attention_backward(
    d_out_THA: Tensor,
    q_THA: Tensor,
    k_TGA: Tensor,
    v_TGA: Tensor,
    out_THA: Tensor,
    lse_TH: Tensor,
    cu_seqlens_S1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    pair, packing = self_pair(q_THA.device), _packing(cu_seqlens_S1)
    d_q, d_k, d_v = pair.backward(d_out_THA, q_THA, k_TGA, v_TGA, out_THA, lse_TH, packing)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


@torch.library.custom_op("dlcm::cross_attention", mutates_args=())
def cross_attention(
    q_THA: Tensor,
    k_KGA: Tensor,
    v_KGA: Tensor,
    cu_tokens_S1: Tensor,
    cu_concepts_S1: Tensor,
    segment_T: Tensor,
    lengths_K: Tensor,
    own_segment: bool,
    log_length: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of tokens to the concepts they may see: outputs (T, H, A) and log-sum-exps (T, H)."""
    segments = _segments(cu_tokens_S1, cu_concepts_S1, segment_T, lengths_K)
    out, lse = cross_pair(q_THA.device).forward(q_THA, k_KGA, v_KGA, segments, own_segment, log_length)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("dlcm::cross_attention_backward", mutates_args=())
def cross_attention_backward(
    d_out_THA: Tensor,
    q_THA: Tensor,
    k_KGA: Tensor,
    v_KGA: Tensor,
    out_THA: Tensor,
    lse_TH: Tensor,
    cu_tokens_S1: Tensor,
    cu_concepts_S1: Tensor,
    segment_T: Tensor,
    lengths_K: Tensor,
    own_segment: bool,
    log_length: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    pair = cross_pair(q_THA.device)
    segments = _segments(cu_tokens_S1, cu_concepts_S1, segment_T, lengths_K)
    d_q, d_k, d_v = pair.backward(d_out_THA, q_THA, k_KGA, v_KGA, out_THA, lse_TH, segments, own_segment, log_length)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


def _fake(q_THA: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_THA.dtype, torch.float32)
    return q_THA.new_empty(q_THA.shape), q_THA.new_empty(q_THA.shape[:2], dtype=wide)


def _fake_backward(_: Tensor, q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, *__: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q_THA, k_KGA, v_KGA))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.flags = inputs[len(tensors) :]


def _differentiate_self(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *self_attention_backward(d_out, *ctx.saved_tensors), None


def _differentiate_cross(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *cross_attention_backward(d_out, *ctx.saved_tensors, *ctx.flags), *[None] * 6


for _operator, _gradient in ((self_attention, _differentiate_self), (cross_attention, _differentiate_cross)):
    _operator.register_fake(_fake)
    _operator.register_autograd(_gradient, setup_context=_save)
for _operator in (self_attention_backward, cross_attention_backward):
    _operator.register_fake(_fake_backward)

# What the layers of one pass share, by the tensor that says where sequences begin or which segment a token belongs to. The
# values hold aliases of the tensors, not the tensors: an entry goes with its batch.
_PACKINGS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_SEGMENTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _packing(cu_seqlens_S1: Tensor) -> Packing:
    version, packing = _PACKINGS.get(cu_seqlens_S1) or (None, None)
    if packing is None or version != cu_seqlens_S1._version:
        packing = Packing(cu_seqlens_S1.detach())
        _PACKINGS[cu_seqlens_S1] = cu_seqlens_S1._version, packing
    return packing


def _segments(cu_tokens_S1: Tensor, cu_concepts_S1: Tensor, segment_T: Tensor, lengths_K: Tensor) -> Segments:
    tensors = cu_tokens_S1, cu_concepts_S1, segment_T, lengths_K
    # The same segments are described by the same four tensors; a batch in their place has other versions or addresses.
    state = tuple((x.data_ptr(), x.numel(), x._version) for x in tensors)
    known, segments = _SEGMENTS.get(segment_T) or (None, None)
    if segments is None or known != state:
        n_concepts = int(cu_concepts_S1[cu_tokens_S1.numel() - 1])
        segments = Segments(
            _packing(cu_tokens_S1), _packing(cu_concepts_S1), segment_T.detach(), lengths_K.detach(), n_concepts
        )
        _SEGMENTS[segment_T] = state, segments
    return segments
