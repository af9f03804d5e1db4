"""Token-to-concept attention on a CPU, each block of queries against the concepts that its last token sees: work L·M/2.

The concepts that a document's tokens see form stairs: token t sees all from the document's first to the last complete one.
A long document is cut into blocks of queries, and the kernel of a block is given only the keys below its highest step, with
a bias that masks the rest. Short documents are padded together, one block each.

Biases of blocks are built when needed, O(block x visible concepts); those of short documents are kept for all layers, which
is O(T x block) at most.

Shape legend: T tokens, K concepts, N documents of a part, L padded tokens of each, U padded concepts of each, H query heads,
G key-value heads, A head width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm.backends.causal_cpu import (
    dense_rows,
    empty_results,
    flash_backward,
    flash_forward,
    padding_sees_nothing,
    wide_dtype,
)
from dlcm.backends.rows import Padded, Rows, Run, padded
from dlcm.concepts import Segments

# Queries of one block. Smaller blocks waste less above the stairs, larger ones keep the matrix products efficient; measured
# at 8 heads of 64 for 512 to 8192 tokens, 256 is the best or within a few percent of it.
BLOCK = 256


@dataclass(frozen=True)
class _Tile:
    """Queries, and the keys that any of them sees.

    Attributes:
        queries: rows of the tokens.
        keys: rows of the concepts.
        n_visible_NL: how many of the keys each query sees, from the first on; 1 for a query that sees none, whose output is
            finite that way and used by nobody.
        log_copies_NL: log of the tokens of a query's own segment so far; None where the own segment is not seen.
        log_lengths_NU: log of the tokens of each key's segment; None without that bias.
        bias_N1LU: the bias, where it is kept.
    """

    queries: Rows
    keys: Rows
    n_visible_NL: Tensor
    log_copies_NL: Tensor | None
    log_lengths_NU: Tensor | None
    dtype: torch.dtype
    bias_N1LU: Tensor | None = None

    def bias(self) -> Tensor:
        """What is added to the scores, (N, 1, L, U): minus infinity where a query does not see a key."""
        if self.bias_N1LU is not None:
            return self.bias_N1LU
        if self.log_lengths_NU is None:
            n_keys = (
                self.keys.stop - self.keys.start
                if isinstance(self.keys, Run)
                else self.keys.index_P.numel() // self.keys.n
            )
            bias_NLU = self.n_visible_NL.new_zeros(1, 1, n_keys, dtype=self.dtype)
        else:
            bias_NLU = self.log_lengths_NU[:, None]
        column_U = torch.arange(bias_NLU.shape[-1], device=bias_NLU.device)
        bias_NLU = bias_NLU.where(column_U < self.n_visible_NL[..., None], -math.inf)
        if self.log_copies_NL is not None:
            bias_NLU.scatter_(2, self.n_visible_NL[..., None] - 1, self.log_copies_NL[..., None])
        return bias_NLU[:, None]


def forward(
    q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, segments: Segments, own_segment: bool, log_length: bool
) -> tuple[Tensor, Tensor]:
    """Outputs (T, H, A) and log-sum-exps of the scores (T, H), in fp32 at least; finite where a token sees no concept."""
    q_THA, k_KGA, v_KGA = (dense_rows(x) for x in (q_THA, k_KGA, v_KGA))
    out_THA, lse_TH1 = empty_results(q_THA)
    for tile in _tiles(segments, own_segment, log_length, wide_dtype(q_THA.dtype)):
        q, k, v = tile.queries.take(q_THA), tile.keys.take(k_KGA), tile.keys.take(v_KGA)
        out, lse = flash_forward(q, k, v, 0.0, False, attn_mask=tile.bias())
        tile.queries.put(out, out_THA)
        tile.queries.put(lse[..., None], lse_TH1)
    return out_THA, lse_TH1.squeeze(-1)


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
    """Gradients of queries, keys and values, given that of the outputs and what `forward` took and gave."""
    d_out_THA, q_THA, k_KGA, v_KGA = (dense_rows(x) for x in (d_out_THA, q_THA, k_KGA, v_KGA))
    wide = wide_dtype(q_THA.dtype)
    d_q_THA = q_THA.new_zeros(q_THA.shape)
    d_k_KGA, d_v_KGA = (x.new_zeros(x.shape, dtype=wide) for x in (k_KGA, v_KGA))
    for tile in _tiles(segments, own_segment, log_length, wide):
        q, k, v = tile.queries.take(q_THA), tile.keys.take(k_KGA), tile.keys.take(v_KGA)
        out, (d_out, lse) = tile.queries.take(out_THA), padding_sees_nothing(tile.queries, d_out_THA, lse_TH)
        d_q, d_k, d_v = flash_backward(d_out, q, k, v, out, lse, 0.0, False, attn_mask=tile.bias())
        tile.queries.put(d_q, d_q_THA)
        tile.keys.add(d_k, d_k_KGA)
        tile.keys.add(d_v, d_v_KGA)
    return d_q_THA, d_k_KGA.to(k_KGA.dtype), d_v_KGA.to(v_KGA.dtype)


def _tiles(segments: Segments, own_segment: bool, log_length: bool, dtype: torch.dtype) -> Sequence[_Tile]:
    """The work of all documents; all decoder layers share it, so it is kept on the segments."""
    cache = segments.__dict__.setdefault("_staircase_tiles", {})
    key = (own_segment, log_length, dtype, BLOCK)
    if key not in cache:
        cache[key] = tuple(_Cutter(segments, own_segment, log_length, dtype).tiles())
    return cache[key]


class _Cutter:
    """Cuts packed documents into tiles."""

    def __init__(self, segments: Segments, own_segment: bool, log_length: bool, dtype: torch.dtype) -> None:
        self.segments, self.dtype = segments, dtype
        lo_T, hi_T = segments.visible(own_segment)
        self.n_visible_T = hi_T - lo_T
        self.log_lengths_K = segments.lengths_K.clamp(min=1).to(dtype).log() if log_length else None
        self.log_copies_T = (segments.offset_T + 1).to(dtype).log() if log_length and own_segment else None

    def tiles(self) -> list[_Tile]:
        """Every token that sees a concept is in one tile."""
        tokens = self.segments.tokens
        last_S = (tokens.cu_seqlens_S1[1:] - 1).clamp(min=0)
        # A document whose last token sees nothing has no work at all; the others go longest first.
        seeing_S = (
            (tokens.lengths_S > 0) & (self.n_visible_T[last_S] > 0)
            if self.n_visible_T.numel()
            else tokens.lengths_S > 0
        )
        tiles = []
        for bucket in tokens.buckets:
            sequences_N = bucket.sequences_N[seeing_S[bucket.sequences_N]]
            long_N = tokens.lengths_S[sequences_N] > BLOCK
            for i in sequences_N[long_N].tolist():
                tiles += self._blocks(i)
            if not bool(long_N.all()):
                tiles.append(self._together(sequences_N[~long_N]))
        return tiles

    def _blocks(self, document: int) -> list[_Tile]:
        start, stop = self.segments.tokens.cu_seqlens_S1[document : document + 2].tolist()
        first = int(self.segments.concepts.cu_seqlens_S1[document])
        ends = [*range(start + BLOCK, stop, BLOCK), stop]
        n_keys = self.n_visible_T[torch.tensor(ends, device=self.n_visible_T.device) - 1].tolist()
        tiles = []
        for end, n in zip(ends, n_keys):
            if n:  # a first segment longer than a block leaves blocks that see nothing
                queries, keys = Run(start, end), Run(first, first + n)
                lengths_1U = None if self.log_lengths_K is None else self.log_lengths_K[None, first : first + n]
                copies_1L = None if self.log_copies_T is None else self.log_copies_T[None, start:end]
                visible_1L = self.n_visible_T[None, start:end].clamp(min=1)
                tiles.append(_Tile(queries, keys, visible_1L, copies_1L, lengths_1U, self.dtype))
            start = end
        return tiles

    def _together(self, sequences_N: Tensor) -> _Tile:
        segments = self.segments
        queries = padded(segments.tokens, sequences_N)
        index_NL = queries.index_P.unflatten(0, (queries.n, -1))
        n_visible_NL = self.n_visible_T[index_NL].clamp(min=1)
        n_keys_N = n_visible_NL.amax(1)
        column_U = torch.arange(int(n_keys_N.max()), device=n_keys_N.device)
        real_NU = column_U < n_keys_N[:, None]
        index_NU = segments.concepts.cu_seqlens_S1[sequences_N, None] + column_U * real_NU
        lengths_NU = None if self.log_lengths_K is None else self.log_lengths_K[index_NU]
        copies_NL = None if self.log_copies_T is None else self.log_copies_T[index_NL]
        keys = Padded.build(index_NU, real_NU)
        tile = _Tile(queries, keys, n_visible_NL, copies_NL, lengths_NU, self.dtype)
        return _Tile(queries, keys, n_visible_NL, copies_NL, lengths_NU, self.dtype, tile.bias())
