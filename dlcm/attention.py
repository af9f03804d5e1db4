"""Causal self-attention, and attention of tokens to the concepts that they may see: what is computed, and by which backend.

Shape legend: T tokens, K concepts, H query heads, G key-value heads (H a multiple of G), A head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from dlcm.backends import reference, sdpa
from dlcm.concepts import Packing, Segments


def self_attention(q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor, packing: Packing, backend: str) -> Tensor:
    """softmax(q k' / sqrt(A)) v over the earlier and the own position of the same sequence.

    Args:
        q_THA: queries.
        k_TGA: keys, grouped: query head i reads key head i // (H / G).
        v_TGA: values.
        packing: which positions form a sequence.
        backend: that of the model; only `reference` makes a difference here.

    Returns:
        (T, H, A).
    """
    if backend == "reference":
        return reference.self_attention(q_THA, k_TGA, v_TGA, packing)
    return sdpa.self_attention(q_THA, k_TGA, v_TGA, packing)


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
    out_THA = _cross_backend(backend, q_THA)(q_THA, k_KGA, v_KGA, segments, own_segment, log_length)
    if null_GA is None:
        return out_THA
    null_HA = null_GA.repeat_interleave(q_THA.shape[1] // null_GA.shape[0], dim=0)
    return torch.where((segments.ordinal_T == 0)[:, None, None], null_HA, out_THA)


@dataclass(frozen=True)
class SelfAttend:
    """`self_attention` among packed sequences, as the function of queries, keys and values that a layer calls."""

    packing: Packing
    backend: str

    def __call__(self, q_THA: Tensor, k_TGA: Tensor, v_TGA: Tensor) -> Tensor:
        """Outputs (T, H, A)."""
        return self_attention(q_THA, k_TGA, v_TGA, self.packing, self.backend)


@dataclass(frozen=True)
class CrossAttend:
    """`cross_attention` with everything but its tensors chosen."""

    segments: Segments
    own_segment: bool
    log_length: bool
    backend: str

    def __call__(self, q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, null_GA: Tensor | None) -> Tensor:
        """Outputs (T, H, A)."""
        return cross_attention(
            q_THA,
            k_KGA,
            v_KGA,
            null_GA,
            self.segments,
            own_segment=self.own_segment,
            log_length=self.log_length,
            backend=self.backend,
        )


def resolve(backend: str, like: Tensor) -> str:
    """The backend that `auto` stands for, by device and dtype of the queries; any other name stands for itself."""
    if backend != "auto":
        return backend
    return "sdpa"


def _cross_backend(backend: str, like: Tensor) -> Callable[..., Tensor]:
    name = resolve(backend, like)
    if name == "staircase":
        # Triton is imported where it is used: a CPU machine need not have it.
        name = "staircase_triton" if like.is_cuda else "staircase_cpu"
    return import_module(f"dlcm.backends.{name}").cross_attention
