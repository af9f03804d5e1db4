r"""Text cut into words by a pattern, with array operations over the bytes of many documents at once.

`gpt2`: `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`, and `llama3`: `LLAMA3`.
They see a character only as a letter, a number, white space or something else. What a character beyond ASCII is, the library is
asked, so no table of another version of Unicode can disagree with it.

Shape legend: N bytes, K words, C characters beyond ASCII.
"""

import unicodedata

import numpy as np

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEPARATOR = 0xFF  # occurs in no UTF-8
_END, _LETTER, _DIGIT, _OTHER, _WHITE, _SPACE, _UNKNOWN = range(7)
_APOSTROPHE = ord("'")
_LONG_S = "'ſ".encode()  # the small letter that is the same as an s where case is ignored
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
    """Cuts text as a byte-level pre-tokenizer of the library does.

    Args:
        pattern: `gpt2` or `llama3`.
    """

    def __init__(self, pattern: str) -> None:
        from tokenizers import pre_tokenizers

        self._starts = {"gpt2": _starts_gpt2, "llama3": _starts_llama3}[pattern]
        self._library = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
        wide = lead_C, lead_C
        if len(lead_C):
            class_N = class_N.copy()
            wide = self._classify(bytes_N, class_N, lead_C)
        return np.flatnonzero(self._starts(bytes_N, class_N, _last_white(class_N, *wide)))

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
        if self._asked(text) != starts:
            self._class_of[codes] = _WHITE
            for kind, like in list(_LIKES.items())[:-1]:
                found = set(self._asked("".join(f"{like}{chr(code)}\n" for code in codes)))
                self._class_of[[code for i, code in enumerate(codes) if 3 * i + 1 not in found]] = kind

    def _asked(self, text: str) -> list[int]:
        return [start for _, (start, _) in self._library.pre_tokenize_str(text)]


def _guess(char: str) -> int:
    if char.isspace():
        return _WHITE
    return {"L": _LETTER, "N": _DIGIT}.get(unicodedata.category(char)[0], _OTHER)


def _last_white(class_N: np.ndarray, first_W: np.ndarray, final_W: np.ndarray) -> np.ndarray:
    """Where the last character of a run of white space begins that something follows; first and final byte of wide ones."""
    last_N = class_N >= _WHITE
    last_N[:-1] &= (class_N[1:] - np.uint8(_LETTER)) < 3  # wraps: neither white nor the end
    last_N[-1] = False
    moved_W = last_N[final_W]
    last_N[final_W] = False
    last_N[first_W] = moved_W
    return last_N


def _starts_gpt2(bytes_N: np.ndarray, class_N: np.ndarray, last_N: np.ndarray) -> np.ndarray:
    """Of a run of white space the last character stands alone, or leads the word behind it if it is a blank."""
    white_N = class_N >= _WHITE
    changes = class_N[1:] != class_N[:-1]
    changes &= class_N[:-1] != _SPACE
    changes &= ~white_N[1:]
    start_N = class_N == _END
    start_N[1:] |= changes
    start_N[1:] |= white_N[1:] > white_N[:-1]
    start_N |= last_N
    _cut_contractions(bytes_N, class_N, start_N)
    return start_N


def _starts_llama3(bytes_N: np.ndarray, class_N: np.ndarray, last_N: np.ndarray) -> np.ndarray:
    """A letter run is led by one character of any kind but a digit or a line end; signs take the line ends behind them."""
    newline_N = (bytes_N == 10) | (bytes_N == 13)
    start_N = class_N == _END
    changes_N = np.concatenate([[True], class_N[1:] != class_N[:-1]])
    signs = np.flatnonzero(changes_N & (class_N == _OTHER))
    start_N[signs[class_N[signs - 1] != _SPACE]] = True
    letters = np.flatnonzero(changes_N & (class_N == _LETTER))
    start_N[letters[~_led(bytes_N, class_N, newline_N, letters)]] = True
    digits = np.flatnonzero((class_N == _DIGIT) & ((bytes_N & 0xC0) != 0x80))  # each once, whatever its bytes
    order = np.arange(len(digits))
    first = np.maximum.accumulate(np.where(class_N[digits - 1] != _DIGIT, order, 0))
    start_N[digits[(order - first) % 3 == 0]] = True
    start_N |= last_N & ~newline_N
    start_N[_white_starts(class_N, newline_N)] = True
    _cut_contractions(bytes_N | 0x20, class_N, start_N, bytes_N)
    return start_N


def _led(bytes_N: np.ndarray, class_N: np.ndarray, newline_N: np.ndarray, letters: np.ndarray) -> np.ndarray:
    """Which runs of letters have the character before them in their word: white space, or a sign that stands alone."""
    before = class_N[letters - 1]
    led = (before >= _WHITE) & ~newline_N[letters - 1]
    sign = letters - 1
    for _ in range(3):
        sign = sign - ((bytes_N[sign] & 0xC0) == 0x80)
    ahead = class_N[sign - 1]
    return led | ((before == _OTHER) & (ahead != _OTHER) & (ahead != _SPACE))


def _white_starts(class_N: np.ndarray, newline_N: np.ndarray) -> np.ndarray:
    """Starts of white space: behind the line ends that follow a sign, and behind the last line end of a run."""
    white_N = class_N >= _WHITE
    first = np.flatnonzero(white_N[1:] & ~white_N[:-1]) + 1
    behind = np.flatnonzero(white_N[:-1] & ~white_N[1:]) + 1  # of each of these runs
    lines = np.flatnonzero(newline_N[1:] & ~newline_N[:-1]) + 1
    behind_lines = np.flatnonzero(newline_N[:-1] & ~newline_N[1:]) + 1
    taken = newline_N[first] & (class_N[first - 1] == _OTHER)
    shifted = behind_lines[np.searchsorted(behind_lines, first[taken], side="right")]
    following = np.append(lines, len(class_N))[np.searchsorted(lines, behind_lines)]
    inside = behind_lines[white_N[behind_lines]]
    final = following[white_N[behind_lines]] >= behind[np.searchsorted(behind, inside, side="right")]
    return np.concatenate([first[~taken], shifted[white_N[shifted]], inside[final]])


def _cut_contractions(
    bytes_N: np.ndarray, class_N: np.ndarray, start_N: np.ndarray, cased_N: np.ndarray | None = None
) -> None:
    """A word may begin with an apostrophe and one of seven endings, which are then a word of their own.

    Args:
        bytes_N: in lower case where case is ignored.
        class_N: of the bytes.
        start_N: where words start; changed.
        cased_N: the bytes as they are, where case is ignored.
    """
    real_N = bytes_N if cased_N is None else cased_N
    at = np.flatnonzero((real_N == _APOSTROPHE) & start_N)
    for word in _CONTRACTIONS if cased_N is None else (*_CONTRACTIONS, _LONG_S):
        here = at[at + len(word) < len(bytes_N)]
        for i, byte in enumerate(word[1:], 1):
            here = here[(real_N if byte >= 0x80 else bytes_N)[here + i] == byte]
        start_N[here + 1] = False
        start_N[here + len(word)] |= class_N[here + len(word)] == _LETTER
