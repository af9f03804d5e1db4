"""Segment arithmetic on packed sequences: pure functions, nothing learned.

Shape legend: T tokens and K concepts of all documents, packed flat; S documents; W, C widths of tokens and concepts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Padded concepts come in multiples of this, which suits matrix units.
_PADDING = 64


class Sequences(Protocol):
    """What a boundary detector needs to know of packed sequences, or of the next part of each."""

    @property
    def position_T(self) -> Tensor:
        """Position of each element in its sequence, from 0."""
        ...

    @property
    def is_first_T(self) -> Tensor:
        """Whether an element is the first of its sequence."""
        ...

    def previous(self, x_TS: Tensor) -> Tensor:
        """The row of x of the element before each element of its sequence; zero for the first."""
        ...


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a flat, packed tensor begin and end.

    Attributes:
        cu_seqlens_S1: int64 (S + 1), starts of the sequences and the total length; empty sequences are allowed.
    """

    cu_seqlens_S1: Tensor

    @classmethod
    def from_lengths(cls, lengths_S: Tensor) -> "Packing":
        """Packing of sequences with these lengths."""
        zero = lengths_S.new_zeros(1)
        return cls(torch.cat([zero, lengths_S.cumsum(0)]))

    @cached_property
    def lengths_S(self) -> Tensor:
        """Length of each sequence."""
        return self.cu_seqlens_S1.diff()

    @cached_property
    def n_total(self) -> int:
        """Total length T."""
        return int(self.cu_seqlens_S1[-1])

    @cached_property
    def sequence_T(self) -> Tensor:
        """Index of the sequence that each element belongs to."""
        n = self.lengths_S.numel()
        return torch.repeat_interleave(
            torch.arange(n, device=self.lengths_S.device), self.lengths_S, output_size=self.n_total
        )

    @cached_property
    def position_T(self) -> Tensor:
        """Position of each element in its sequence, from 0."""
        index_T = torch.arange(self.n_total, device=self.lengths_S.device)
        return index_T - self.cu_seqlens_S1[self.sequence_T]

    @cached_property
    def is_first_T(self) -> Tensor:
        """Whether an element is the first of its sequence."""
        return self.position_T == 0

    def previous(self, x_TS: Tensor) -> Tensor:
        """The row of x of the element before each element of its sequence; zero for the first."""
        return shift(x_TS, self.position_T, 1)

    @cached_property
    def buckets(self) -> tuple["Bucket", ...]:
        """The non-empty sequences in right-padded groups of similar length (within a factor of two)."""
        lengths = self.lengths_S.tolist()
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            if length:
                groups.setdefault((length - 1).bit_length(), []).append(i)
        device = self.lengths_S.device
        regular = len(set(lengths)) == 1
        return tuple(
            Bucket(torch.tensor(group, device=device), max(lengths[i] for i in group), regular)
            for _, group in sorted(groups.items())
        )

    def index_NL(self, bucket: "Bucket") -> tuple[Tensor, Tensor]:
        """Flat index of every padded place of a bucket, and which places are real; padding points at the first element."""
        column_L = torch.arange(bucket.length, device=self.lengths_S.device)
        real_NL = column_L < self.lengths_S[bucket.sequences_N, None]
        index_NL = (self.cu_seqlens_S1[bucket.sequences_N, None] + column_L) * real_NL
        return index_NL, real_NL


@dataclass(frozen=True)
class Bucket:
    """Sequences that are padded to one length together; `regular`: all sequences are here and none needs padding."""

    sequences_N: Tensor
    length: int
    regular: bool


@dataclass(frozen=True)
class Segments:
    """Concepts of packed tokens: concept k is the run of tokens from one boundary to before the next.

    Attributes:
        tokens: packing of the tokens into documents.
        concepts: packing of the concepts into the same documents.
        segment_T: index into the flat concepts, of the segment that each token belongs to.
        lengths_K: tokens in each segment; zero for padding.
        n_concepts: M. Where concepts are padded, K is larger: the rows behind are a sequence of their own that none sees.
    """

    tokens: Packing
    concepts: Packing
    segment_T: Tensor
    lengths_K: Tensor
    n_concepts: int

    @cached_property
    def starts_K(self) -> Tensor:
        """Flat token index of the first token of each segment; some valid index for padding."""
        return (self.lengths_K.cumsum(0) - self.lengths_K).clamp(max=max(self.segment_T.numel() - 1, 0))

    @cached_property
    def ordinal_T(self) -> Tensor:
        """j(t): index of the token's segment within its document, from 0."""
        return self.concepts.position_T[self.segment_T]

    def visible(self, own_segment: bool) -> tuple[Tensor, Tensor]:
        """The concepts that each token may see, as a range [lo, hi) of flat concepts: those of earlier segments of its document.

        Args:
            own_segment: with its own segment's concept.
        """
        lo_T = self.concepts.cu_seqlens_S1[self.tokens.sequence_T]
        return lo_T, self.segment_T + int(own_segment)

    @cached_property
    def offset_T(self) -> Tensor:
        """Position of the token within its segment, from 0."""
        index_T = torch.arange(self.segment_T.numel(), device=self.segment_T.device)
        return index_T - self.starts_K[self.segment_T]


def segment(boundaries_T: Tensor, tokens: Packing, pad_to: Callable[[int], int] | None = None) -> Segments:
    """Cut packed tokens at their boundaries; b_t = 1 starts a concept.

    Args:
        boundaries_T: bool; the first token of every document must be a boundary.
        tokens: packing of the tokens into documents.
        pad_to: K, the rows of every tensor of concepts, given the number of concepts; K = M by default.

    Raises:
        ValueError: a document that does not start with a boundary would share a concept with the one before it.
    """
    if boundaries_T.shape != (tokens.n_total,) or boundaries_T.dtype != torch.bool:
        raise ValueError(
            f"boundaries must be bool of shape ({tokens.n_total},), got {boundaries_T.dtype} {tuple(boundaries_T.shape)}"
        )
    if not bool(boundaries_T[tokens.is_first_T].all()):
        raise ValueError("the first token of every document must be a boundary")
    starts_K = boundaries_T.nonzero().squeeze(1)
    end = torch.tensor([tokens.n_total], device=starts_K.device)
    lengths_K = torch.cat([starts_K, end]).diff()
    per_document_S = torch.zeros_like(tokens.lengths_S).index_add_(
        0, tokens.sequence_T[starts_K], torch.ones_like(starts_K)
    )
    n_concepts = starts_K.numel()
    if pad_to is not None:
        n_padding = pad_to(n_concepts) - n_concepts
        lengths_K = F.pad(lengths_K, (0, n_padding))
        per_document_S = F.pad(per_document_S, (0, 1), value=n_padding)
    return Segments(tokens, Packing.from_lengths(per_document_S), boundaries_T.cumsum(0) - 1, lengths_K, n_concepts)


def concept_bound(n_tokens: int, ratio: float, n_concepts: int) -> int:
    """Rows that `n_concepts` concepts of `n_tokens` tokens are padded to: the same number for almost every batch.

    With the rate at 1/R the number of concepts varies by about sqrt(T/R) around T/R; the bound lies six of that above.
    A batch beyond it, as before the rate is under control, takes the next doubling, and T at most.
    """
    expected = n_tokens / ratio
    bound = expected + 6.0 * math.sqrt(expected)
    while bound < n_concepts:
        bound *= 2.0
    return min(-(-math.ceil(bound) // _PADDING) * _PADDING, max(n_tokens, n_concepts))


def pool_mean(x_TW: Tensor, segments: Segments) -> Tensor:
    """Mean of the token states of each segment (eq 7), accumulated in at least fp32. Returns (K, W) in the dtype of x."""
    wide = x_TW if x_TW.dtype == torch.float64 else x_TW.float()
    sums_KW = wide.new_zeros(segments.lengths_K.numel(), x_TW.shape[1]).index_add(0, segments.segment_T, wide)
    return (sums_KW / segments.lengths_K.clamp(min=1)[:, None]).to(x_TW.dtype)


def pool_first(x_TW: Tensor, segments: Segments) -> Tensor:
    """State of the boundary token of each segment. Returns (K, W)."""
    return x_TW[segments.starts_K]


def shift(x_KC: Tensor, position_K: Tensor, n: int) -> Tensor:
    """x_{k-n} for every k, zero where that would lie before the start of k's sequence. Causal by construction.

    Args:
        x_KC: packed rows.
        position_K: position of each row in its sequence.
        n: how many rows back.
    """
    if n == 0:
        return x_KC
    if n >= x_KC.shape[0]:
        return torch.zeros_like(x_KC)
    moved_KC = torch.cat([x_KC.new_zeros(n, x_KC.shape[1]), x_KC[:-n]])
    return moved_KC * (position_K >= n)[:, None]
