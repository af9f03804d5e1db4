"""Byte-level BPE at the speed of memory: every distinct word goes through the tokenizer once.

A byte-level BPE cuts text into words (`dlcm.cut`) and encodes each by itself, so the ids of a text are those of its words, one
after the other. Text has few distinct words: here they are looked up in tables, a hundred thousand at a time, and only those
that are new go to the tokenizer. The ids are its own.

Shape legend: N bytes of all documents, K words, M of them that are looked for, T ids, D documents.
"""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dlcm.cut import LLAMA3, SEPARATOR, Cutter

if TYPE_CHECKING:
    import tokenizers

# Words of up to 8 * lanes - 1 bytes have a table of so many rows of 8 * (lanes + 1) bytes; longer ones are not remembered.
_TABLES = {2: 1 << 19, 4: 1 << 16, 8: 1 << 14}
_LONGEST = 8 * max(_TABLES) - 1
_BLOCK = 1 << 18  # words that are looked up at once: half a megabyte of text has fewer
_SPARE_IDS = 1 << 20  # of words no longer known, before they are cleared away
_COUNT_BITS = np.uint64(32)
_COUNT = np.uint64((1 << 32) - 1)
# By the number of bytes that a word has left: those of the next eight that are its own; and its length, above the last seven.
_MASKS = np.array([(1 << 8 * min(n, 8)) - 1 for n in range(256)], np.uint64)
_LENGTHS = np.array([n << 56 for n in range(256)], np.uint64)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F] * 2, np.uint64)
_FACTOR = np.uint64(0xBF58476D1CE4E5B9)


def pattern_of(backend: "tokenizers.Tokenizer") -> str | None:
    """The pattern by which a byte-level BPE cuts text; None for other tokenizers, patterns, and changes of the text before."""
    spec = json.loads(backend.to_str())
    cutter, model = spec.get("pre_tokenizer") or {}, spec["model"]
    if (
        spec.get("normalizer") is not None
        or model["type"] != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or not all(char in model["vocab"] for char in _alphabet())
        or not all(token["special"] for token in spec.get("added_tokens") or ())
    ):
        return None
    parts = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    if [part.get("type") for part in parts] not in (["ByteLevel"], ["Split", "ByteLevel"]):
        return None
    *split, bytes_of = parts
    if bytes_of.get("add_prefix_space") or bytes_of.get("use_regex", True) == bool(split):
        return None
    as_llama3 = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    return "gpt2" if not split else "llama3" if split == [as_llama3] else None


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


class WordEncoder:
    """Ids of documents under a byte-level BPE.

    Args:
        backend: a tokenizer that has a `pattern_of`.
        pattern: that one.
        dtype: of the ids.
        eot_id: the id that goes before each document.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", pattern: str, dtype: np.dtype, eot_id: int) -> None:
        self._backend, self._cutter = backend, Cutter(pattern)
        self._tables = {lanes: _Table(lanes, n_rows) for lanes, n_rows in _TABLES.items()}
        self._pool = np.full(1 << 16, eot_id, dtype)  # the ids of all words that are known, behind that of a separator
        self._used, self._limit = 1, _SPARE_IDS
        vocab = backend.get_vocab()
        self._n_bytes = np.zeros(max(vocab.values()) + 1, np.int64)
        for token, i in vocab.items():
            self._n_bytes[i] = len(token)  # a character of a byte-level vocabulary is a byte

    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of UTF-8 documents, the end of text before each.

        Returns:
            the ids one after the other, (T,), and how many each document has, int64, (D,).
        """
        data = bytes([SEPARATOR]).join([b"", *documents, bytes(_LONGEST + 1)])
        bytes_N = np.frombuffer(data, np.uint8)[: -_LONGEST - 1]
        start_K = self._cutter.cut(bytes_N)
        length_K = np.diff(start_K, append=len(bytes_N))
        separator_K = bytes_N[start_K] == SEPARATOR
        ids, counts = [], []
        for first in range(0, len(start_K), _BLOCK):  # a document may be large
            if self._used > self._limit:
                self._clear_away()
            block = slice(first, first + _BLOCK)
            value_K = self._look_up(data, start_K[block], length_K[block], separator_K[block])
            where_T, _ = _spread(value_K)
            ids.append(self._pool[where_T])
            counts.append((value_K & _COUNT).view(np.int64))
        count_D = np.add.reduceat(np.concatenate(counts), np.flatnonzero(separator_K))
        return np.concatenate(ids)[:-1], count_D[:-1]

    def _look_up(self, data: bytes, start_K: np.ndarray, length_K: np.ndarray, separator_K: np.ndarray) -> np.ndarray:
        """Where the ids of each word are in the pool, and how many: offset << 32 | count."""
        every = np.ndarray((len(data) - 7,), "<u8", data, strides=(1,))  # the eight bytes from each place on
        short = min(self._tables)
        value_K = self._tables[short].find(_keys(every, start_K, length_K, short))
        value_K[separator_K] = 1
        for table, keys, at in self._by_length(every, start_K, length_K, np.flatnonzero(length_K >= 8 * short)):
            value_K[at] = table.find(keys)
        new_M = np.flatnonzero(value_K == 0)
        if len(new_M):
            value_K[new_M] = self._learn(
                [data[a : a + n] for a, n in zip(start_K[new_M].tolist(), length_K[new_M].tolist())]
            )
            for table, keys, at in self._by_length(every, start_K, length_K, new_M):
                table.put(keys, value_K[at])
        return value_K

    def _by_length(
        self, every: np.ndarray, start_K: np.ndarray, length_K: np.ndarray, at_M: np.ndarray
    ) -> Iterator[tuple["_Table", list[np.ndarray], np.ndarray]]:
        """For some of the words: the table of those of its length, their keys, and which they are."""
        shorter = 0
        for lanes, table in self._tables.items():
            at = at_M[(length_K[at_M] >= shorter) & (length_K[at_M] < 8 * lanes)]
            if len(at):
                yield table, _keys(every, start_K[at], length_K[at], lanes), at
            shorter = 8 * lanes

    def _learn(self, words: list[bytes]) -> np.ndarray:
        """Put the ids of words that are not known, some of them the same, into the pool; offset << 32 | count of each."""
        number = {word: i for i, word in enumerate(dict.fromkeys(words))}
        (encoded,) = self._backend.encode_batch_fast(
            [[word.decode() for word in number]], is_pretokenized=True, add_special_tokens=False
        )
        ids_T = np.array(encoded.ids, self._pool.dtype)
        end_T, end_W = np.cumsum(self._n_bytes[ids_T]), np.cumsum([len(word) for word in number])
        stop_W = np.searchsorted(end_T, end_W) + 1
        if not np.array_equal(end_T[stop_W - 1], end_W):
            raise RuntimeError("a byte-level tokenizer whose ids do not stand for the bytes of their words")
        count_W = np.diff(stop_W, prepend=0)
        value_W = (self._used + stop_W - count_W).astype(np.uint64) << _COUNT_BITS | count_W.astype(np.uint64)
        self._append(ids_T)
        return value_W[[number[word] for word in words]]

    def _append(self, ids: np.ndarray) -> None:
        if self._used + len(ids) > len(self._pool):
            larger = np.zeros(2 * (self._used + len(ids)), self._pool.dtype)
            larger[: self._used] = self._pool[: self._used]
            self._pool = larger
        self._pool[self._used : self._used + len(ids)] = ids
        self._used += len(ids)

    def _clear_away(self) -> None:
        """Leave only ids in the pool that a table refers to."""
        old, self._pool, self._used = self._pool, self._pool[:1].copy(), 1
        for table in self._tables.values():
            value_K = table.values[table.values != 0]
            where_T, end_K = _spread(value_K)
            count_K = value_K & _COUNT
            table.values[table.values != 0] = (self._used + end_K.astype(np.uint64) - count_K) << _COUNT_BITS | count_K
            self._append(old[where_T])
        self._limit = self._used + _SPARE_IDS


class _Table:
    """Words of less than `8 * lanes` bytes with a value each, that is not zero.

    A word has two places, a pair of rows. A new one takes the first, what was there goes to the second, and a word found there
    comes back to the first: what is met again and again stays.

    Shape legend: K words; a key is `lanes` arrays of eight bytes each, (K,), the length in the last byte.
    """

    def __init__(self, lanes: int, n_rows: int) -> None:
        self._rows = np.zeros((n_rows, lanes + 1), np.uint64)
        self._shift = np.uint64(64 - (n_rows.bit_length() - 2))  # of a hash, to the number of a pair of rows
        self.values = self._rows[:, -1]

    def find(self, keys: list[np.ndarray]) -> np.ndarray:
        """Values of words, (K,); zero where one is not known."""
        slot_K = self._slots(keys)
        row_K = np.take(self._rows, slot_K, axis=0, mode="clip")
        value_K = row_K[:, -1] * _same(row_K, keys)
        missed_M = np.flatnonzero(value_K == 0)
        if len(missed_M):
            first_M = slot_K[missed_M]
            row_M = self._rows[first_M ^ 1]
            same_M = _same(row_M, [key[missed_M] for key in keys])
            value_K[missed_M] = row_M[:, -1] * same_M
            first = first_M[same_M]
            self._rows[first], self._rows[first ^ 1] = self._rows[first ^ 1], self._rows[first]
        return value_K

    def put(self, keys: list[np.ndarray], value_K: np.ndarray) -> None:
        """Remember words that were not found; of several with the same pair, the last."""
        slot_K = self._slots(keys)
        self._rows[slot_K ^ 1] = self._rows[slot_K]
        self._rows[slot_K] = np.stack([*keys, value_K], axis=1)

    def _slots(self, keys: list[np.ndarray]) -> np.ndarray:
        mixed_K = keys[0] * _FACTORS[0]
        for key, factor in zip(keys[1:], _FACTORS[1:]):
            mixed_K ^= key * factor
        mixed_K ^= mixed_K >> np.uint64(29)
        mixed_K *= _FACTOR
        mixed_K >>= self._shift
        mixed_K <<= np.uint64(1)
        return mixed_K.view(np.int64)


def _same(row_K: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    same_K = row_K[:, 0] == keys[0]
    for i, key in enumerate(keys[1:], 1):
        same_K &= row_K[:, i] == key
    return same_K


def _keys(every: np.ndarray, start_K: np.ndarray, length_K: np.ndarray, lanes: int) -> list[np.ndarray]:
    """The bytes of words, eight to an array, and their length in the last byte: equal keys are equal words below `8 * lanes`."""
    keys = [every[start_K + 8 * i] & np.take(_MASKS, length_K - 8 * i, mode="clip") for i in range(lanes)]
    keys[-1] &= ~_LENGTHS[-1]
    keys[-1] |= np.take(_LENGTHS, length_K, mode="clip")
    return keys


def _spread(value_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the pool of all ids of words, (T,), and how many ids there are up to the end of each word, (K,)."""
    count_K = (value_K & _COUNT).view(np.int64)
    end_K = np.cumsum(count_K)
    first_K = (value_K >> _COUNT_BITS).view(np.int64)
    where_T = np.repeat(first_K - end_K + count_K, count_K)
    where_T += np.arange(len(where_T))
    return where_T, end_K
