"""Which text is source code and which is prose, token by token: for statistics of boundaries by content.

A document says by its content what it is; nothing else of it is kept.

- Python source: comments and docstrings (string literals that are statements of their own) are prose, all else is code.
  A lexical scan finds them, so a source that is broken, or cut anywhere, even inside a docstring, is labelled too.
- Other text: by paragraph. A paragraph (lines between blank lines) is code where more of its text looks like code than
  like running text, prose where less does; where neither, it is what most of the document is. What stands between
  Markdown fences is code.

A line looks like code by its end (`;`, `{`, `}`), a call, a prompt, markup, or by its share of symbols or of digits; else like
running text where it begins with three words in a row, or has Chinese or Japanese characters in a row; else like code by an
operator or an assignment.

Everything works on bytes, which are what tokens are made of. A token belongs to the domain of its first byte that is no
white space. An end of text stands before its document and belongs to the domain of the token behind it.
"""

import re

import numpy as np

from dlcm.shards import Split
from dlcm.tokens import Tokenizer

DOMAINS = ("code", "prose")
CODE, PROSE = 0, 1
# While a Python source is scanned: a string that is not a statement. It is code in the end.
_STRING = 2

# Share of running text among the lines outside strings and comments, up to which a source is taken for Python.
_MOST_RUNNING = 0.2
# Lines that contradict their label, as a share, from which on a scan from inside a docstring is tried.
_MOST_MISFITS = 0.05
_DENSE_SYMBOLS, _FEW_LETTERS = 0.15, 0.35

# A comment, or a string literal with its prefix. Strings that do not end, end with their line or with the text.
_LITERAL = re.compile(
    rb"""
      (?P<comment> \#[^\n]*)
    | (?P<prefix> (?<!\w)[rRbBuUfFtT]{1,2}(?=["']))?
      (?: \"\"\" [^"\\]*+ (?: (?: \\. | "(?!"") ) [^"\\]*+ )*+ (?: \"\"\" | \\?\Z )
        | \'\'\' [^'\\]*+ (?: (?: \\. | '(?!'') ) [^'\\]*+ )*+ (?: \'\'\' | \\?\Z )
        | " (?: [^"\\\n] | \\. )*+ "?
        | ' (?: [^'\\\n] | \\. )*+ '? )
    """,
    re.VERBOSE | re.DOTALL,
)
# What may stand before a string that is a statement, and behind it.
_BEFORE_STATEMENT = re.compile(rb"[ \t\f]*(?:(?:class|(?:async[ ]+)?def)[ ][^\n]*:[ \t]*)?")
_BEHIND_STATEMENT = re.compile(rb"[ \t\r\f]*(?:[#;\n]|\Z)")
# Statements that no bracket can enclose: they end one that a broken source has left open.
_NEVER_ENCLOSED = re.compile(rb"^[ \t]*(?:def|class|import|return|raise|while|try|pass)\b", re.MULTILINE)

_PYTHON_LINE = re.compile(
    rb"""^[ \t]*(?:
      (?:async[ ]+)?def[ ]+\w+[ ]*[\[(] | class[ ]+\w+[ ]*[\[(:] | @[A-Za-z_][\w.]*(?:\(|[ \t\r]*$)
    | import[ ]+[\w.]+(?:[ ]+as[ ]+\w+)?(?:,[ \w.,]*)?[ \t\r]*(?:\#|$) | from[ ]+[\w.]+[ ]+import\b
    | (?:if|elif|for|while|with|except)\b[^\n]*[\w)\]"'][ \t]*:[ \t\r]*(?:\#|$) | (?:try|else|finally):
    | self\.\w+ )""",
    re.VERBOSE | re.MULTILINE,
)
_FOREIGN_LINE = re.compile(
    rb"(?:;|\)[ ]?\{)[ \t\r]*$|^(?:[ \t]*end[ \t\r]*$|#(?:include|define|ifn?def)\b)", re.MULTILINE
)
# Certainly code; and code unless it reads like running text.
_CODE_LINE = re.compile(
    rb"""^(?:
      [^\n]*[;{}\\][ \t\r]*$
    | [ \t]*[\w.$:>-]+\([^\n]*\)[;,:]?[ \t\r]*$
    | [ \t]*(?: >>> | \.\.\. | \$ | \%)[ ]
    | [ \t]*</?\w[^\n]*>[ \t\r]*$
    | [ \t]*(?: \#(?:include|define|ifn?def|endif)\b | ["'][^"'\n]+["'][ \t]*: ) )""",
    re.VERBOSE | re.MULTILINE,
)
_OPERATOR_LINE = re.compile(
    rb"""^(?:
      [^\n]*(?: == | != | <= | >= | -> | => | :: | && | \|\| | [+*/|&^-]= | := )
    | [^\n]{0,60}?[\w\])"'] [ ] = [ ]
    | [ \t]*[\w.$*&\[\]"']+=[^=\n] )""",
    re.VERBOSE | re.MULTILINE,
)
_WORD = rb"[A-Za-z\x80-\xff](?:['-]?[A-Za-z0-9\x80-\xff])*+"
_RUNNING_LINE = re.compile(
    rb"^(?:[ \t]*(?:[-*>#/|]+[ \t]+|\d+[.)][ \t]+)?(?:['\"(`*_]*+(?:" + _WORD + rb"|\d++)[,;:.!?()'\"`*_]*+[ ]+){3}"
    rb"|[ \t]*#{1,6}[ ]+[A-Za-z\x80-\xff]|[^\n]*?(?:[\xe3-\xed][\x80-\xbf]{2}){4})",
    re.MULTILINE,
)
_FENCED = re.compile(rb"^[ \t]*(```|~~~)[^\n]*\n.*?(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)

_BYTES = np.arange(256)
_IS_SPACE = np.isin(_BYTES, list(b" \t\n\r\f\v"))
_IS_SYMBOL = np.isin(_BYTES, list(b'{}()[]<>=;_/\\|&*$@^~+#%"'))
_IS_LETTER = np.isin(_BYTES, list(range(65, 91)) + list(range(97, 123))) | (_BYTES >= 128)
_IS_DIGIT = np.isin(_BYTES, list(b"0123456789"))


def label_bytes(text: bytes) -> np.ndarray:
    """The domain of every byte of one document.

    Args:
        text: the document as UTF-8, or any piece of it.

    Returns:
        uint8 (number of bytes,), `CODE` or `PROSE`.
    """
    if not text:
        return np.zeros(0, np.uint8)
    labels = _label_python(text)
    return _label_paragraphs(text) if labels is None else labels


def label_tokens(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The domain of every token of one document, its leading end of text included; uint8 (number of tokens,)."""
    table = tokenizer.token_bytes()
    lengths = tokenizer.byte_lengths[ids].astype(np.int64)
    data = np.frombuffer(b"".join([table[i] for i in ids.tolist()]), np.uint8)
    if not data.size:
        return np.full(len(ids), PROSE, np.uint8)
    labels = label_bytes(data.tobytes())
    ends = lengths.cumsum()
    starts = ends - lengths
    # Where white space is all of the token, its first byte decides.
    visible = np.append(_next_visible(data), data.size)[starts]
    # A token without bytes has its start where the next one begins.
    return labels[np.minimum(np.where(visible < ends, visible, starts), data.size - 1)]


class StreamLabels:
    """Domains of the tokens of a split, by their place in its stream; documents are labelled whole, once, when asked for."""

    def __init__(self, split: Split, tokenizer: Tokenizer) -> None:
        """Label nothing yet."""
        self._split, self._tokenizer = split, tokenizer
        self._documents: dict[int, np.ndarray] = {}

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Domains at these places of the stream, uint8 of the shape of `index`."""
        offsets = self._split.offsets
        document = np.searchsorted(offsets, index, side="right") - 1
        labels = np.empty(index.shape, np.uint8)
        for i in np.unique(document):
            if i not in self._documents:
                self._documents[i] = label_tokens(self._split.document(i), self._tokenizer)
            here = document == i
            labels[here] = self._documents[i][index[here] - offsets[i]]
        return labels


def _label_python(text: bytes) -> np.ndarray | None:
    """Labels of a Python source; None where the text is something else."""
    python = _line_starts(_PYTHON_LINE, text)
    if not len(python) or len(python) <= len(_FOREIGN_LINE.findall(text)):
        return None
    code = (_CODE_LINE, _OPERATOR_LINE, _PYTHON_LINE)
    running = _line_starts(_RUNNING_LINE, text).tolist()
    running = [at for at in running if not any(pattern.match(text, at) for pattern in code)]
    data = np.frombuffer(text, np.uint8)
    visible = _next_visible(data)
    lines = visible[np.append(0, np.flatnonzero(data[:-1] == ord("\n")) + 1)]
    lines = np.unique(lines[lines < data.size])
    python, running = visible[python], visible[np.array(running, np.int64)]
    best, fewest = None, 0
    # A piece that was cut inside a docstring reads as its own negative; then the scan that starts inside one fits.
    for opening in (b"", b'"""', b"'''"):
        if opening and opening not in text:
            continue
        labels = _scan(opening + text)[len(opening) :]
        misfits = int((labels[running] == CODE).sum() + (labels[python] != CODE).sum())
        if best is None or misfits < fewest:
            best, fewest = labels, misfits
        if fewest <= _MOST_MISFITS * len(lines):
            break
    assert best is not None
    n_outside = int((best[lines] == CODE).sum())
    n_running = int((best[running] == CODE).sum())
    n_python = int((best[python] == CODE).sum())
    if not n_python or n_running > _MOST_RUNNING * n_outside:
        return None
    best[best == _STRING] = CODE
    return best


def _scan(text: bytes) -> np.ndarray:
    """Comments and strings that are statements are prose, other strings are told apart, everything else is code."""
    labels = np.full(len(text), CODE, np.uint8)
    depth, behind = 0, 0
    for match in _LITERAL.finditer(text):
        start, end = match.span()
        depth = _depth(depth, text[behind:start])
        behind = end
        is_prose = match["comment"] is not None or (depth == 0 and _is_statement(text, match))
        labels[start:end] = PROSE if is_prose else _STRING
    return labels


def _is_statement(text: bytes, match: re.Match[bytes]) -> bool:
    start, end = match.span()
    line = text.rfind(b"\n", 0, start) + 1
    return (
        (match["prefix"] or b"").lower() in (b"", b"r", b"u")
        and text[max(line - 2, 0) : line] != b"\\\n"
        and _BEFORE_STATEMENT.fullmatch(text, line, start) is not None
        and _BEHIND_STATEMENT.match(text, end) is not None
    )


def _depth(depth: int, between: bytes) -> int:
    """Open brackets behind a stretch of code without strings and comments."""
    change = _balance(between)
    if depth and (statements := list(_NEVER_ENCLOSED.finditer(between))):
        return max(_balance(between[statements[-1].start() :]), 0)
    return max(depth + change, 0)


def _balance(code: bytes) -> int:
    count = code.count
    return count(b"(") + count(b"[") + count(b"{") - count(b")") - count(b"]") - count(b"}")


def _line_starts(pattern: re.Pattern[bytes], text: bytes) -> np.ndarray:
    """Where each matching line starts; patterns begin with `^`."""
    return np.fromiter((match.start() for match in pattern.finditer(text)), np.int64)


def _next_visible(data: np.ndarray) -> np.ndarray:
    """For each byte, the place of the first at or behind it that is no white space; the number of bytes where none is."""
    places = np.where(_IS_SPACE[data], data.size, np.arange(data.size))
    return np.minimum.accumulate(places[::-1])[::-1]


def _label_paragraphs(text: bytes) -> np.ndarray:
    """Labels of text that is not Python, by paragraph."""
    data = np.frombuffer(text, np.uint8)
    starts = np.append(0, np.flatnonzero(data[:-1] == 10) + 1)
    lengths = np.diff(np.append(starts, data.size))
    votes, blank = _line_votes(text, data, starts)
    paragraph = np.cumsum(np.diff(blank.astype(np.int8), prepend=0) == 1)
    sums = np.bincount(paragraph, votes)
    sums[sums == 0] = votes.sum()
    labels = np.repeat(np.where(sums[paragraph] > 0, CODE, PROSE).astype(np.uint8), lengths)
    for match in _FENCED.finditer(text):
        labels[match.start() : match.end()] = CODE
    return labels


def _line_votes(text: bytes, data: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The visible bytes of each line, above 0 where it looks like code, below where like running text; what is blank."""
    counts = {
        name: np.add.reduceat(table[data].astype(np.int64), starts)
        for name, table in (("space", _IS_SPACE), ("symbol", _IS_SYMBOL), ("letter", _IS_LETTER), ("digit", _IS_DIGIT))
    }
    visible = np.diff(np.append(starts, data.size)) - counts["space"]
    # A ruler, as under a heading, is made of symbols but says nothing.
    worded = counts["letter"] + counts["digit"] > 0
    code = worded & ((counts["symbol"] >= _DENSE_SYMBOLS * visible) | (counts["letter"] < _FEW_LETTERS * visible))
    for pattern in (_CODE_LINE, _PYTHON_LINE):
        code |= np.isin(starts, _line_starts(pattern, text))
    running = ~code & np.isin(starts, _line_starts(_RUNNING_LINE, text))
    code |= ~running & np.isin(starts, _line_starts(_OPERATOR_LINE, text))
    return visible * np.where(code, 1, np.where(running, -1, 0)), visible == 0
