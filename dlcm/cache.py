"""What incremental decoding remembers: one state a level, for a batch whose rows have boundaries of their own.

A call adds a chunk of any length to every row. Tokens of a chunk are kept flat, like packed documents, each with its row and
its position in that row, so that the layers are those of training; only who sees whom is answered here, from the caches.

    encoder, decoder  keys and values of every token          detector  the last token's query (or delimiter)
    open segment      sum of its states and their number      backbone  keys and values of every concept
    smoother          the last concepts before smoothing      cross     keys and values of every concept, their lengths

Shape legend: B rows, T flat tokens of a chunk, L its longest row, K new concepts, U cached keys, W, C widths of tokens and
concepts, H query heads, G key-value heads, A head width.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from dlcm.config import ModelConfig


@dataclass(frozen=True)
class Places:
    """Where flat elements stand: `row_N`, and `position_N` within everything that the row has had so far, from 0."""

    row_N: Tensor
    position_N: Tensor
    n_rows: int

    @cached_property
    def column_N(self) -> Tensor:
        """Position of each element among those of its row in this chunk; elements of a row follow each other."""
        index_N = torch.arange(self.row_N.numel(), device=self.row_N.device)
        counts_B = torch.bincount(self.row_N, minlength=self.n_rows)
        return index_N - (counts_B.cumsum(0) - counts_B)[self.row_N]

    @cached_property
    def longest(self) -> int:
        """Elements of the longest row of this chunk."""
        return int(self.column_N.max()) + 1 if self.row_N.numel() else 0

    @cached_property
    def n_keys(self) -> int:
        """Keys of the row that has had most, this chunk included; not less than before only if that row is here."""
        return int(self.position_N.max()) + 1 if self.row_N.numel() else 0

    def pad(self, x_N: Tensor, fill: float = 0) -> Tensor:
        """Flat elements (N, ...) as (B, L, ...)."""
        padded_BL = x_N.new_full((self.n_rows, self.longest, *x_N.shape[1:]), fill)
        padded_BL[self.row_N, self.column_N] = x_N
        return padded_BL

    def flat(self, x_BL: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x_BL[self.row_N, self.column_N]


class KeyValues:
    """Keys and values of one layer. Capacity doubles, so that appending costs constant time a key."""

    def __init__(self) -> None:
        self._k_BGUA: Tensor | None = None
        self._v_BGUA: Tensor | None = None

    def append(self, places: Places, k_NGA: Tensor, v_NGA: Tensor) -> None:
        """Put keys and values at their places."""
        self._k_BGUA = _grown(self._k_BGUA, places, k_NGA)
        self._v_BGUA = _grown(self._v_BGUA, places, v_NGA)
        self._k_BGUA[places.row_N, :, places.position_N] = k_NGA
        self._v_BGUA[places.row_N, :, places.position_N] = v_NGA

    def attend(self, q_NHA: Tensor, places: Places, bias_BLU: Tensor) -> Tensor:
        """Outputs (N, H, A) of flat queries against the first U keys of their rows, under a bias on the scores."""
        assert self._k_BGUA is not None, "keys are appended before they are read"
        assert self._v_BGUA is not None
        n_keys = bias_BLU.shape[-1]
        q_BHLA = places.pad(q_NHA).transpose(1, 2)
        k_BGUA, v_BGUA = self._k_BGUA[:, :, :n_keys], self._v_BGUA[:, :, :n_keys]
        out_BHLA = F.scaled_dot_product_attention(
            q_BHLA,
            k_BGUA,
            v_BGUA,
            attn_mask=bias_BLU[:, None].to(q_NHA.dtype),
            enable_gqa=q_BHLA.shape[1] != k_BGUA.shape[1],
        )
        return places.flat(out_BHLA.transpose(1, 2))

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order."""
        if self._k_BGUA is not None and self._v_BGUA is not None:
            self._k_BGUA, self._v_BGUA = self._k_BGUA[rows_B], self._v_BGUA[rows_B]


def _grown(x_BGUA: Tensor | None, places: Places, new_NGA: Tensor) -> Tensor:
    n_keys = places.n_keys
    if x_BGUA is None:
        return new_NGA.new_zeros(places.n_rows, new_NGA.shape[1], max(n_keys, 16), new_NGA.shape[2])
    if n_keys <= x_BGUA.shape[2]:
        return x_BGUA
    return F.pad(x_BGUA, (0, 0, 0, max(n_keys - x_BGUA.shape[2], x_BGUA.shape[2])))


@dataclass
class _CachedAttend:
    """Causal self-attention of one layer over what its cache holds and what this chunk adds."""

    keys: KeyValues
    places: Places
    bias_BLU: Tensor

    def __call__(self, q_NHA: Tensor, k_NGA: Tensor, v_NGA: Tensor) -> Tensor:
        self.keys.append(self.places, k_NGA, v_NGA)
        return self.keys.attend(q_NHA, self.places, self.bias_BLU)


@dataclass
class _CachedRead:
    """Cross-attention of one decoder layer: adds the new concepts to its cache, then reads those that each token may see."""

    keys: KeyValues
    tokens: Places
    concepts: Places
    bias_BLU: Tensor
    first_T: Tensor

    def __call__(self, q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, null_GA: Tensor | None) -> Tensor:
        if k_KGA.shape[0]:
            self.keys.append(self.concepts, k_KGA, v_KGA)
        out_THA = self.keys.attend(q_THA, self.tokens, self.bias_BLU) if self.bias_BLU.shape[-1] else q_THA
        if null_GA is None:
            return out_THA
        null_HA = null_GA.repeat_interleave(q_THA.shape[1] // null_GA.shape[0], dim=0)
        return torch.where(self.first_T[:, None, None], null_HA, out_THA)


class Cache:
    """The state of B rows. Made by `Model.new_cache`, advanced by `model(tokens_Bt, cache=cache)`.

    Attributes:
        n_tokens_B: tokens that each row has had.
        n_segments_B: segments that have begun in each row.
    """

    def __init__(self, config: ModelConfig, n_rows: int, device: torch.device) -> None:
        self.config, self.n_rows = config, n_rows
        self.n_tokens_B = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self.n_segments_B = torch.zeros_like(self.n_tokens_B)
        self.encoder = [KeyValues() for _ in range(config.n_encoder_layers)]
        self.backbone = [KeyValues() for _ in range(config.n_concept_layers)]
        self.decoder = [KeyValues() for _ in range(config.n_decoder_layers)]
        self.cross = [KeyValues() for _ in range(config.n_cross_attentions)]
        # Tokens of each segment so far, of the open one too.
        self._lengths_BU = self.n_tokens_B.new_zeros(n_rows, 0)
        self._open_sum_BW: Tensor | None = None
        self._last_B: Tensor | None = None
        self._tail_BNC: Tensor | None = None

    def select(self, rows_B: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken twice. For beams, and to drop rows that are done."""
        for keys in (*self.encoder, *self.backbone, *self.decoder, *self.cross):
            keys.select(rows_B)
        self.n_rows = rows_B.numel()
        self.n_tokens_B, self.n_segments_B = self.n_tokens_B[rows_B], self.n_segments_B[rows_B]
        self._lengths_BU = self._lengths_BU[rows_B]
        for name in ("_open_sum_BW", "_last_B", "_tail_BNC"):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, state[rows_B])

    def chunk(self, lengths_B: Tensor) -> "Chunk":
        """Begin a chunk with this many new tokens in each row."""
        row_T = torch.repeat_interleave(torch.arange(self.n_rows, device=lengths_B.device), lengths_B)
        first_B = lengths_B.cumsum(0) - lengths_B
        index_T = torch.arange(row_T.numel(), device=lengths_B.device)
        position_T = index_T - first_B[row_T] + self.n_tokens_B[row_T]
        self.n_tokens_B = self.n_tokens_B + lengths_B
        return Chunk(self, Places(row_T, position_T, self.n_rows))


class Chunk:
    """New tokens of every row, and, once `cut`, their segments and the concepts that these complete.

    To a boundary detector it is what `Packing` is: it knows positions, first tokens, and what came before each token.
    """

    def __init__(self, cache: Cache, tokens: Places) -> None:
        self.cache, self.tokens = cache, tokens
        self.position_T = tokens.position_N
        self.is_first_T = tokens.position_N == 0

    def previous(self, x_TS: Tensor) -> Tensor:
        """The row of x of the token before each token, from the cache where that came in an earlier chunk."""
        cache, tokens = self.cache, self.tokens
        if cache._last_B is None:
            cache._last_B = x_TS.new_zeros(cache.n_rows, x_TS.shape[1])
        moved_TS = torch.cat([x_TS.new_zeros(1, x_TS.shape[1]), x_TS[:-1]])
        moved_TS = torch.where((tokens.column_N == 0)[:, None], cache._last_B[tokens.row_N], moved_TS)
        cache._last_B = _last_of_rows(cache._last_B, tokens, x_TS)
        return moved_TS

    def self_attends(self, layers: list[KeyValues]) -> list[_CachedAttend]:
        """Causal self-attention over tokens, one function a layer."""
        return _causal(layers, self.tokens)

    def cut(self, decision_T: Tensor, h_TW: Tensor) -> "Cut":
        """Cut the chunk at its boundaries; sums and lengths of the open segments move on."""
        return Cut(self, decision_T, h_TW)


class Cut:
    """The concepts that a chunk completes, and what its tokens may see.

    Attributes:
        pooled_KW: the new concepts in token width, rows one after the other.
        concepts: their places: row and index of the segment in the row.
    """

    def __init__(self, chunk: Chunk, decision_T: Tensor, h_TW: Tensor) -> None:
        self.cache, self.tokens = chunk.cache, chunk.tokens
        cache, tokens = self.cache, self.tokens
        begun_BL = tokens.pad(decision_T.long()).cumsum(1)
        before_B = cache.n_segments_B
        self.ordinal_T = before_B[tokens.row_N] + tokens.flat(begun_BL) - 1
        cache.n_segments_B = before_B + (begun_BL[:, -1] if tokens.longest else 0)
        self._count(decision_T)
        if cache.config.pooling == "first":
            self.pooled_KW = h_TW[decision_T]
            self.concepts = Places(tokens.row_N[decision_T], self.ordinal_T[decision_T], cache.n_rows)
        else:
            self.pooled_KW, self.concepts = self._close(h_TW, before_B)

    def _count(self, decision_T: Tensor) -> None:
        """Add the tokens to the lengths of their segments; `offset_T` is each token's place in its own."""
        cache, tokens = self.cache, self.tokens
        n_segments = int(cache.n_segments_B.max()) if cache.n_rows else 0
        before_BU = F.pad(cache._lengths_BU, (0, max(n_segments - cache._lengths_BU.shape[1], 0)))
        ones_T = torch.ones_like(self.ordinal_T)
        cache._lengths_BU = before_BU.index_put((tokens.row_N, self.ordinal_T), ones_T, accumulate=True)
        # Tokens of a segment follow each other, so its offset counts on from the segment's first token in this chunk.
        index_T = torch.arange(ones_T.numel(), device=ones_T.device)
        starts_T = decision_T | (tokens.column_N == 0)
        first_T = torch.where(starts_T, index_T, 0).cummax(0).values
        self.offset_T = index_T - first_T + before_BU[tokens.row_N, self.ordinal_T]

    def _close(self, h_TW: Tensor, before_B: Tensor) -> tuple[Tensor, Places]:
        """Means of the segments that end in this chunk; a segment ends where the next begins."""
        cache, tokens = self.cache, self.tokens
        wide_TW = h_TW if h_TW.dtype == torch.float64 else h_TW.float()
        if cache._open_sum_BW is None:
            cache._open_sum_BW = wide_TW.new_zeros(cache.n_rows, wide_TW.shape[1])
        # Column 0 of a row is its open segment, the others begin here.
        first_B = (before_B - 1).clamp(min=0)
        last_B = (cache.n_segments_B - 1).clamp(min=0)
        n_columns = int((last_B - first_B).max()) + 1 if cache.n_rows else 1
        sums_BUW = wide_TW.new_zeros(cache.n_rows, n_columns, wide_TW.shape[1])
        sums_BUW[:, 0] = cache._open_sum_BW
        sums_BUW.index_put_((tokens.row_N, self.ordinal_T - first_B[tokens.row_N]), wide_TW, accumulate=True)
        row_B = torch.arange(cache.n_rows, device=h_TW.device)
        cache._open_sum_BW = sums_BUW[row_B, last_B - first_B]
        ended_BU = torch.arange(n_columns, device=h_TW.device) < (last_B - first_B)[:, None]
        row_K, column_K = ended_BU.nonzero(as_tuple=True)
        ordinal_K = first_B[row_K] + column_K
        mean_KW = sums_BUW[row_K, column_K] / cache._lengths_BU[row_K, ordinal_K][:, None]
        return mean_KW.to(h_TW.dtype), Places(row_K, ordinal_K, cache.n_rows)

    def self_attends(self) -> list[_CachedAttend]:
        """Causal self-attention over concepts, one function a layer."""
        return _causal(self.cache.backbone, self.concepts)

    def earlier(self, z_KC: Tensor, n_taps: int) -> list[Tensor]:
        """z_{k-n} for n = 0 .. n_taps - 1, from the cache where concept k - n came in an earlier chunk."""
        cache, places = self.cache, self.concepts
        if cache._tail_BNC is None:
            cache._tail_BNC = z_KC.new_zeros(cache.n_rows, n_taps - 1, z_KC.shape[1])
        known_BUC = torch.cat([cache._tail_BNC, places.pad(z_KC)], dim=1)
        counts_B = torch.bincount(places.row_N, minlength=cache.n_rows)
        tail_BN = counts_B[:, None] + torch.arange(n_taps - 1, device=z_KC.device)
        cache._tail_BNC = known_BUC[torch.arange(cache.n_rows, device=z_KC.device)[:, None], tail_BN]
        return [known_BUC[places.row_N, places.column_N + n_taps - 1 - n] for n in range(n_taps)]

    def reads(self) -> list[_CachedRead]:
        """Cross-attention, one function a decoder layer that has it."""
        cache, tokens = self.cache, self.tokens
        own = cache.config.pooling == "first"
        n_visible_T = self.ordinal_T + int(own)
        n_keys = int(n_visible_T.max()) if n_visible_T.numel() else 0
        column_U = torch.arange(n_keys, device=n_visible_T.device)
        visible_BLU = column_U < tokens.pad(n_visible_T)[..., None]
        # Where nothing is visible one key is left open: the null concept takes the place of what comes out.
        bias_BLU = torch.zeros(visible_BLU.shape, device=n_visible_T.device, dtype=torch.float64)
        if cache.config.concept_bias == "log_length":
            lengths_B1U = cache._lengths_BU[:, None, :n_keys].clamp(min=1).expand_as(visible_BLU)
            own_BLU = column_U == tokens.pad(self.ordinal_T)[..., None]
            copies_BLU = torch.where(own_BLU, tokens.pad(self.offset_T)[..., None] + 1, lengths_B1U)
            bias_BLU = copies_BLU.double().log()
        bias_BLU = bias_BLU.masked_fill(~visible_BLU & ((column_U > 0) | visible_BLU[..., :1]), -math.inf)
        first_T = self.ordinal_T == 0
        return [_CachedRead(keys, tokens, self.concepts, bias_BLU, first_T) for keys in cache.cross]


def _causal(layers: list[KeyValues], places: Places) -> list[_CachedAttend]:
    column_U = torch.arange(places.n_keys, device=places.row_N.device)
    hidden_BLU = column_U > places.pad(places.position_N)[..., None]
    bias_BLU = torch.zeros(hidden_BLU.shape, device=hidden_BLU.device).masked_fill_(hidden_BLU, -math.inf)
    return [_CachedAttend(keys, places, bias_BLU) for keys in layers]


def _last_of_rows(before_BS: Tensor, places: Places, x_NS: Tensor) -> Tensor:
    """The x of the last element of each row, or what was there before where a row has none."""
    last_N = places.column_N + 1 == torch.bincount(places.row_N, minlength=places.n_rows)[places.row_N]
    return before_BS.to(x_NS.dtype).index_put((places.row_N[last_N],), x_NS[last_N])
