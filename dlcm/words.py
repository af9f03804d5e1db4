"""Byte-level BPE at the speed of memory: every distinct word goes through the tokenizer once.

A byte-level BPE cuts text into words by a fixed pattern (that of GPT-2) and encodes each by itself, so the ids of a text are
those of its words, one after the other. Text has few distinct words: here they are found with array operations over the bytes
of many documents at once, looked up in a table, and only those that are new go to the tokenizer. The ids are its own.

The pattern is applied by byte classes where text is ASCII. A stretch with other characters, between two places where the pattern
always cuts, goes to the tokenizer as it is.

Shape legend: N bytes of all documents, K words, D documents.
"""

import json
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tokenizers

_LETTER, _DIGIT, _OTHER, _WHITE, _SPACE, _END = range(6)
_SEPARATOR = 0xFF  # occurs in no UTF-8
_APOSTROPHE = ord("'")
_CONTRACTIONS = (b"'s", b"'t", b"'m", b"'d", b"'re", b"'ve", b"'ll")
_TABLE_BITS = 19
_MAX_WORD = 16  # bytes of a word that the table holds; longer ones are looked up one by one
_MAX_KEPT_BYTES, _MAX_KEPT = 64, 1 << 20  # of words that are remembered: memory stays bounded


def _classes() -> np.ndarray:
    table = np.full(256, _OTHER, np.uint8)
    for byte in range(128):
        char = chr(byte)
        if char.isalpha():
            table[byte] = _LETTER
        elif char.isdigit():
            table[byte] = _DIGIT
    table[[9, 10, 11, 12, 13]] = _WHITE
    table[ord(" ")] = _SPACE
    table[_SEPARATOR] = _END
    return table


_CLASS = _classes()
_MASK = np.array([(1 << (8 * n)) - 1 for n in range(9)], np.uint64)


def fits(backend: "tokenizers.Tokenizer") -> bool:
    """Whether a tokenizer is a byte-level BPE that cuts text by the pattern of GPT-2 and changes nothing before that."""
    spec = json.loads(backend.to_str())
    cutter, model = spec.get("pre_tokenizer") or {}, spec["model"]
    return (
        spec.get("normalizer") is None
        and model["type"] == "BPE"
        and not model.get("dropout")
        and cutter.get("type") == "ByteLevel"
        and cutter.get("use_regex", True)
        and not cutter.get("add_prefix_space")
        and all(token["special"] for token in spec.get("added_tokens") or ())
    )


class WordEncoder:
    """Ids of texts under a byte-level BPE.

    Args:
        backend: a tokenizer that `fits`.
        dtype: of the ids.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", dtype: np.dtype) -> None:
        self._backend, self._dtype = backend, dtype
        self._forget()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of every text, as the tokenizer gives them."""
        data = bytes([_SEPARATOR]).join([b"", *(text.encode() for text in texts), b""])
        bytes_N = np.frombuffer(data, np.uint8)
        start_K, opaque_K = _cut(bytes_N)
        length_K = np.diff(start_K, append=len(bytes_N))
        offset_K, count_K = self._look_up(data, start_K, length_K, opaque_K)
        total_K = np.cumsum(count_K)
        ids = self._pool[np.repeat(offset_K - total_K + count_K, count_K) + np.arange(total_K[-1])]
        end_D = total_K[np.flatnonzero(bytes_N[start_K] == _SEPARATOR)]
        return [ids[a:b] for a, b in zip(end_D[:-1], end_D[1:])]

    def _forget(self) -> None:
        n = 1 << _TABLE_BITS
        self._words: dict[bytes, tuple[int, int]] = {}
        self._low, self._high, self._lengths = np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.uint8)
        self._offsets, self._counts = np.zeros(n, np.int64), np.zeros(n, np.int64)  # in the pool
        self._pool = np.zeros(1 << 12, self._dtype)
        self._used = 0

    def _look_up(
        self, data: bytes, start_K: np.ndarray, length_K: np.ndarray, opaque_K: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Offset and number of the ids of each word."""
        if len(self._words) > _MAX_KEPT:
            self._forget()
        padded = data + bytes(_MAX_WORD)
        every = np.ndarray((len(data) + 8,), "<u8", padded, strides=(1,))  # the eight bytes from each place on
        low_K = every[start_K] & _MASK[np.minimum(length_K, 8)]
        high_K = every[start_K + 8] & _MASK[np.clip(length_K - 8, 0, 8)] if len(start_K) else low_K
        slot_K = _hash(low_K, high_K, length_K)
        hit_K = (self._low[slot_K] == low_K) & (self._high[slot_K] == high_K)
        hit_K &= (self._lengths[slot_K] == length_K) & (length_K <= _MAX_WORD) & ~opaque_K
        offset_K, count_K = self._offsets[slot_K], self._counts[slot_K]
        end_K = np.frombuffer(data, np.uint8)[start_K] == _SEPARATOR
        count_K[end_K] = 0
        missed = np.flatnonzero(~hit_K & ~end_K)
        if len(missed):
            words = [data[a : a + n] for a, n in zip(start_K[missed].tolist(), length_K[missed].tolist())]
            offset_K[missed], count_K[missed] = zip(*self._learn(words))
            keep = missed[(length_K[missed] <= _MAX_WORD) & ~opaque_K[missed]]
            slots = slot_K[keep]
            self._low[slots], self._high[slots], self._lengths[slots] = low_K[keep], high_K[keep], length_K[keep]
            self._offsets[slots], self._counts[slots] = offset_K[keep], count_K[keep]
        return offset_K, count_K

    def _learn(self, words: list[bytes]) -> list[tuple[int, int]]:
        """Where the ids of these words are in the pool; new words go through the tokenizer."""
        new = list(dict.fromkeys(word for word in words if word not in self._words))
        passing: dict[bytes, tuple[int, int]] = {}  # too long to be remembered
        if new:
            encoded = self._backend.encode_batch_fast([word.decode() for word in new], add_special_tokens=False)
            found = [item.ids for item in encoded]
            counts = [len(ids) for ids in found]
            for word, start, n in zip(new, accumulate(counts, initial=self._used), counts):
                kept = self._words if len(word) <= _MAX_KEPT_BYTES else passing
                kept[word] = (start, n)
            self._append(np.array(list(chain.from_iterable(found)), self._dtype))
        return [self._words.get(word) or passing[word] for word in words]

    def _append(self, ids: np.ndarray) -> None:
        if self._used + len(ids) > len(self._pool):
            larger = np.zeros(2 * (self._used + len(ids)), self._dtype)
            larger[: self._used] = self._pool[: self._used]
            self._pool = larger
        self._pool[self._used : self._used + len(ids)] = ids
        self._used += len(ids)


def _hash(low_K: np.ndarray, high_K: np.ndarray, length_K: np.ndarray) -> np.ndarray:
    mixed = low_K * np.uint64(0x9E3779B97F4A7C15) ^ high_K * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed = (mixed ^ (mixed >> np.uint64(29)) ^ length_K.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)


def _cut(bytes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Where words start, and which of them are stretches that the tokenizer has to cut; a separator is a word.

    The pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`: of a run of white space
    the last character stands alone, or leads the word behind it if it is a blank.
    """
    class_N = _CLASS[bytes_N]
    before_N = np.concatenate([[_END], class_N[:-1]]).astype(np.uint8)
    behind_N = np.concatenate([class_N[1:], [_END]]).astype(np.uint8)
    white_N = (class_N == _WHITE) | (class_N == _SPACE)
    white_before_N = (before_N == _WHITE) | (before_N == _SPACE)
    first_white_N = white_N & ~white_before_N
    last_white_N = white_N & (behind_N <= _OTHER)
    start_N = first_white_N | last_white_N | (~white_N & (before_N != class_N) & (before_N != _SPACE))
    start_N |= class_N == _END
    _cut_contractions(bytes_N, class_N, start_N)
    opaque_N = np.zeros(len(bytes_N), bool)
    foreign_N = (bytes_N >= 0x80) & (class_N != _END)
    if foreign_N.any():
        # The pattern always cuts before a blank that follows a printable ASCII character, and before the last white space
        # that such a one follows; and what stands before the cut is cut as if the text ended there.
        graphic_N = (bytes_N > 0x20) & (bytes_N < 0x7F)
        graphic_before_N = np.concatenate([[False], graphic_N[:-1]])
        graphic_behind_N = np.concatenate([graphic_N[1:], [False]])
        safe_N = (white_N & graphic_behind_N) | ((class_N == _SPACE) & graphic_before_N)
        safe_N |= (class_N == _END) | (before_N == _END)
        place_S = np.flatnonzero(safe_N)
        foreign_S = np.logical_or.reduceat(foreign_N, place_S)
        inside_N = np.repeat(foreign_S, np.diff(place_S, append=len(bytes_N)))
        start_N = np.where(inside_N, safe_N, start_N)
        opaque_N = inside_N
    start_K = np.flatnonzero(start_N)
    return start_K, opaque_N[start_K]


def _cut_contractions(bytes_N: np.ndarray, class_N: np.ndarray, start_N: np.ndarray) -> None:
    """A word may begin with an apostrophe and one of seven endings, which are then a word of their own."""
    at = np.flatnonzero((bytes_N == _APOSTROPHE) & start_N)
    for word in _CONTRACTIONS:
        here = at[at + len(word) < len(bytes_N)]
        for i, byte in enumerate(word[1:], 1):
            here = here[bytes_N[here + i] == byte]
        start_N[here + 1] = False
        start_N[here + len(word)] |= class_N[here + len(word)] == _LETTER
