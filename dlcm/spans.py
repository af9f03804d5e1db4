"""Which characters of a text each token stands for.

T tokens of the text.
"""

from dataclasses import dataclass

import numpy as np

from dlcm.errors import UserError
from dlcm.tokens import Tokenizer


@dataclass(frozen=True)
class Spans:
    """A text cut at its tokens: token t is `text[starts[t] : starts[t + 1]]`, and the pieces are the text, one after the other.

    A character whose bytes belong to several tokens stands with the token that has its first byte; the others are empty.

    Attributes:
        text: the text.
        ids_T: int64, its token ids.
        starts: int64 (T + 1), where each token begins, in characters, and the length of the text.
    """

    text: str
    ids_T: np.ndarray
    starts: np.ndarray

    def pieces(self) -> list[str]:
        """The characters of each token."""
        return [self.text[start:end] for start, end in zip(self.starts[:-1].tolist(), self.starts[1:].tolist())]


def token_spans(tokenizer: Tokenizer, text: str) -> Spans:
    """Encode a text and find the characters of each token.

    A tokenizer whose tokens are the bytes of the text (bytes, byte-level BPE) is aligned by bytes. Another, which normalises
    or drops white space, is aligned by the offsets that it reports; what it dropped goes with the token before.

    Raises:
        UserError: the text holds half a surrogate pair, which UTF-8 cannot hold.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text: character {error.start} is half a surrogate pair; give text that is valid UTF-8"
        ) from None
    ids_T = tokenizer.encode(text).astype(np.int64)
    table = tokenizer.token_bytes()
    if b"".join(table[i] for i in ids_T.tolist()) == data:
        ends = np.cumsum(tokenizer.byte_lengths[ids_T], dtype=np.int64)
        # A character begins at each byte that does not continue one.
        leads = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
        before = np.append(0, np.cumsum(leads))
        return Spans(text, ids_T, before[np.append(0, ends)])
    assert tokenizer.backend is not None  # the byte tokenizer is aligned by bytes
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    starts, reached = np.empty(len(encoding.ids) + 1, np.int64), 0
    for i, (start, end) in enumerate(encoding.offsets):
        starts[i] = max(start, reached)
        reached = max(end, reached)
    starts[0], starts[-1] = 0, len(text)
    return Spans(text, np.array(encoding.ids, np.int64), np.minimum(starts, len(text)))
