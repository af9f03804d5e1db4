r"""Text cut into words by the pattern of GPT-2, with array operations over the bytes of many documents at once.

The pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. It sees a character only as a letter,
a number, white space or something else. What a character beyond ASCII is, the tokenizer itself is asked, so no table of another
version of Unicode can disagree with it.

Shape legend: N bytes, K words, C characters beyond ASCII.
"""

import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tokenizers

SEPARATOR = 0xFF  # occurs in no UTF-8
_END, _LETTER, _DIGIT, _OTHER, _WHITE, _SPACE, _UNKNOWN = range(7)
_APOSTROPHE = ord("'")
_CONTRACTIONS = (b"'s", b"'t", b"'m", b"'d", b"'re", b"'ve", b"'ll")
_PAGE = 256  # characters that are asked about at once
_LIKES = {_LETTER: "a", _DIGIT: "1", _OTHER: "!", _WHITE: "\n"}  # a word goes on as long as its characters are alike


def _ascii_classes() -> bytes:
    table = bytearray([_OTHER] * 256)
    for byte in range(128):
        char = chr(byte)
        if char.isalpha():
            table[byte] = _LETTER
        elif char.isdigit():
            table[byte] = _DIGIT
    for byte in (9, 10, 11, 12, 13):
        table[byte] = _WHITE
    table[ord(" ")] = _SPACE
    table[SEPARATOR] = _END
    return bytes(table)


_CLASSES = _ascii_classes()


class Cutter:
    """Cuts text as a tokenizer's byte-level pre-tokenizer does.

    Args:
        backend: a tokenizer whose pre-tokenizer is `ByteLevel` with its pattern and without a leading blank.
    """

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        self._backend = backend
        self._class_of = np.full(0x110000, _UNKNOWN, np.uint8)

    def cut(self, bytes_N: np.ndarray) -> np.ndarray:
        """Where words start.

        Args:
            bytes_N: UTF-8, `SEPARATOR` before the first document, between documents, and behind the last; each is a word.

        Returns:
            int64, (K,), ascending.
        """
        class_N = np.frombuffer(bytes_N.tobytes().translate(_CLASSES), np.uint8)
        lead_C = np.flatnonzero((bytes_N >= 0xC0) & (bytes_N != SEPARATOR))
        wide: tuple[np.ndarray, np.ndarray] | None = None
        if len(lead_C):
            class_N = class_N.copy()
            wide = self._classify(bytes_N, class_N, lead_C)
        white_N = class_N >= _WHITE
        inked_N = (class_N - np.uint8(_LETTER)) < 3  # wraps: neither white nor the end
        # Of a run of white space the last character stands alone, or leads the word behind it if it is a blank.
        last_N = white_N.copy()
        last_N[:-1] &= inked_N[1:]
        last_N[-1] = False
        if wide is not None:
            first_W, final_W = wide
            moved_W = last_N[final_W]
            last_N[final_W] = False
            last_N[first_W] = moved_W
        start_N = class_N == _END
        changes = class_N[1:] != class_N[:-1]
        changes &= class_N[:-1] != _SPACE
        changes &= ~white_N[1:]
        start_N[1:] |= changes
        start_N[1:] |= white_N[1:] > white_N[:-1]
        start_N |= last_N
        _cut_contractions(bytes_N, class_N, start_N)
        return np.flatnonzero(start_N)

    def _classify(self, bytes_N: np.ndarray, class_N: np.ndarray, lead_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write the classes of characters beyond ASCII over all their bytes.

        Returns:
            First and last byte of those that are white space.
        """
        first_C = bytes_N[lead_C]
        n_C = 2 + (first_C >= 0xE0) + (first_C >= 0xF0).astype(np.int64)
        code_C = first_C & np.array([0, 0, 0x1F, 0x0F, 0x07])[n_C]
        for i in (1, 2, 3):
            more = n_C > i
            code_C[more] = code_C[more] << 6 | bytes_N[lead_C[more] + i] & 0x3F
        kind_C = self._class_of[code_C]
        if (kind_C == _UNKNOWN).any():
            for page in np.unique(code_C[kind_C == _UNKNOWN] // _PAGE).tolist():
                self._ask(page * _PAGE)
            kind_C = self._class_of[code_C]
        class_N[lead_C] = kind_C
        for i in (1, 2, 3):
            more = n_C > i
            class_N[lead_C[more] + i] = kind_C[more]
        white_C = kind_C == _WHITE
        return lead_C[white_C], lead_C[white_C] + n_C[white_C] - 1

    def _ask(self, first: int) -> None:
        """Learn the classes of a page of characters: a guess that the tokenizer confirms, or one by one."""
        codes = [code for code in range(first, first + _PAGE) if not 0xD800 <= code < 0xE000]
        kinds = [_guess(chr(code)) for code in codes]
        text, starts = "", []
        for kind, like in _LIKES.items():
            starts.append(len(text))
            text += like + "".join(chr(code) for code, guessed in zip(codes, kinds) if guessed == kind)
        self._class_of[codes] = kinds
        if self._starts(text) != starts:
            self._class_of[codes] = _WHITE
            for kind, like in list(_LIKES.items())[:-1]:
                found = set(self._starts("".join(f"{like}{chr(code)}\n" for code in codes)))
                self._class_of[[code for i, code in enumerate(codes) if 3 * i + 1 not in found]] = kind

    def _starts(self, text: str) -> list[int]:
        return [start for _, (start, _) in self._backend.pre_tokenizer.pre_tokenize_str(text)]


def _guess(char: str) -> int:
    if char.isspace():
        return _WHITE
    return {"L": _LETTER, "N": _DIGIT}.get(unicodedata.category(char)[0], _OTHER)


def _cut_contractions(bytes_N: np.ndarray, class_N: np.ndarray, start_N: np.ndarray) -> None:
    """A word may begin with an apostrophe and one of seven endings, which are then a word of their own."""
    at = np.flatnonzero((bytes_N == _APOSTROPHE) & start_N)
    for word in _CONTRACTIONS:
        here = at[at + len(word) < len(bytes_N)]
        for i, byte in enumerate(word[1:], 1):
            here = here[bytes_N[here + i] == byte]
        start_N[here + 1] = False
        start_N[here + len(word)] |= class_N[here + len(word)] == _LETTER
