"""Tokenizers: bytes, BPE trained on the corpus, a tokenizer.json, or one from the hub, behind one class.

Text is never normalised by what is made here, so bytes and the trained BPE are lossless. One id, `eot_id`, starts every
document; no text encodes to it, not even text that spells it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlcm.errors import UserError, nearest, user_path
from dlcm.words import WordEncoder, pattern_of

if TYPE_CHECKING:
    import tokenizers

EOT = "<|endoftext|>"
_EOT_NAMES = (EOT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>")
_BYTES_VOCAB = 257
_MIN_BPE = 300


class Tokenizer:
    """Text <-> token ids.

    Attributes:
        vocab_size: one more than the largest id.
        eot_id: the id that starts every document and ends the one before it.
        fingerprint: SHA-256 of everything that decides the encoding, hexadecimal.
        dtype: the smallest of uint16 and uint32 that holds every id.
    """

    def __init__(self, backend: "tokenizers.Tokenizer | None" = None) -> None:
        """Wrap a `tokenizers.Tokenizer`; None is the byte tokenizer (256 bytes and the end of text)."""
        self.backend = backend
        if backend is None:
            self.vocab_size, self.eot_id = _BYTES_VOCAB, _BYTES_VOCAB - 1
            self.fingerprint = hashlib.sha256(b"bytes").hexdigest()
        else:
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = True  # text that spells a special token is text
            self.vocab_size, self.eot_id = _sizes(backend.get_vocab(with_added_tokens=True))
            self.fingerprint = hashlib.sha256(_canonical(backend)).hexdigest()
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json.

        Raises:
            UserError: missing, or not a tokenizer.
        """
        import tokenizers

        if not path.is_file():
            raise UserError(f"{path}: no such tokenizer file")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the Rust side raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json ({error})") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of `vocab_size` entries, all 256 bytes and the end of text among them.

        Where a small corpus holds too few repeated pairs to fill the vocabulary, the result's `vocab_size` is smaller.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer=trainer)
        return cls(backend)

    @classmethod
    def from_hub(cls, name: str) -> "Tokenizer":
        """Fetch the tokenizer of a hub repository.

        Raises:
            UserError: it cannot be fetched.
        """
        import tokenizers

        try:
            return cls(tokenizers.Tokenizer.from_pretrained(name))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"data.tokenizer: hub:{name} cannot be fetched ({reason}); give a tokenizer.json") from None

    def save(self, path: Path) -> None:
        """Write the tokenizer.json; the byte tokenizer has none."""
        if self.backend is not None:
            path.write_bytes(_canonical(self.backend))

    def with_end_of_text(self) -> "tuple[tokenizers.Tokenizer, str]":
        """A `tokenizers.Tokenizer` that puts the end of text before every text, as training does, and the end of text's name.

        Raises:
            UserError: the vocabulary knows no end of text, and has no place for one where this class puts it.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, processors

        if self.backend is None:
            # Bytes are a byte-level BPE that has learned no pair.
            backend = Backend(models.BPE(dict(_byte_alphabet()), []))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.decoder = decoders.ByteLevel()
        else:
            backend = Backend.from_str(self.backend.to_str())
        name = backend.id_to_token(self.eot_id) or EOT
        backend.add_special_tokens([name])
        if backend.token_to_id(name) != self.eot_id:
            raise UserError(
                f"data.tokenizer: its ids have gaps, so that no end of text can be added as id {self.eot_id}; "
                "use a tokenizer that has one"
            )
        backend.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", special_tokens=[(name, self.eot_id)]
        )
        return backend, name

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, without an end of text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of every text, without an end of text."""
        ids, counts = self.encode_documents([text.encode() for text in texts])
        ends = np.cumsum(counts).tolist()
        return [ids[start + 1 : end] for start, end in zip([0, *ends], ends)]

    def encode_documents(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of UTF-8 documents, an end of text before each; a byte-level BPE encodes each distinct word once.

        Returns:
            the ids one after the other, and how many each document has, int64.
        """
        if self._words is not None:
            return self._words.encode(documents)
        if self.backend is None:
            found = [np.frombuffer(document, np.uint8) for document in documents]
        else:
            texts = [document.decode() for document in documents]
            found = [item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        counts = np.array([len(ids) + 1 for ids in found], np.int64)
        ids = np.empty(counts.sum(), self.dtype)
        for end, n, own in zip(np.cumsum(counts).tolist(), counts.tolist(), found):
            ids[end - n] = self.eot_id
            ids[end - n + 1 : end] = own
        return ids, counts

    @cached_property
    def _words(self) -> WordEncoder | None:
        pattern = self.backend and pattern_of(self.backend)
        return WordEncoder(self.backend, pattern, self.dtype, self.eot_id) if self.backend and pattern else None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; ends of text are left out, bytes that are no UTF-8 become U+FFFD."""
        kept = [int(i) for i in ids if int(i) != self.eot_id]
        if self.backend is None:
            return bytes(kept).decode(errors="replace")
        return self.backend.decode(kept, skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """Bytes that each id stands for; empty for the end of text and other special ids."""
        return self._token_bytes

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Number of bytes of each id, int32: bits per byte = bits / byte_lengths[targets].sum()."""
        return np.array([len(item) for item in self.token_bytes()], np.int32)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        if self.backend is None:
            return [*(bytes([i]) for i in range(256)), b""]
        decoder = json.loads(self.backend.to_str()).get("decoder") or {}
        byte_level = "ByteLevel" in {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        table = [b""] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i not in special and i != self.eot_id:
                table[i] = _byte_level_bytes(token) if byte_level else _piece_bytes(token)
        return table


def parse_tokenizer(spec: str) -> tuple[str, Any]:
    """Read the config's `tokenizer` string.

    Returns:
        ("bytes", None), ("bpe", vocabulary size), ("hub", name) or ("file", path).

    Raises:
        UserError: none of these, with the nearest; or a BPE vocabulary too small to hold the bytes.
    """
    if spec == "bytes":
        return "bytes", None
    if match := re.fullmatch(r"bpe-([0-9][0-9_]*)", spec):
        size = int(match[1])
        if size < _MIN_BPE:
            raise UserError(f"data.tokenizer: {spec}: at least bpe-{_MIN_BPE} (all bytes, some merges); or use bytes")
        return "bpe", size
    if spec.startswith("hub:") and len(spec) > 4:
        return "hub", spec[4:]
    path = user_path(spec, "data.tokenizer")
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise UserError(f"data.tokenizer: {spec}: no such file (looked in {Path.cwd()})")
        return "file", path
    raise UserError(
        f"data.tokenizer: unknown tokenizer {spec!r}{nearest(spec, ('bytes', 'bpe-4096', 'hub:NAME'))}; "
        "or the path of a tokenizer.json"
    )


def vocab_size_of(tokenizer: str) -> int | None:
    """Vocabulary size that the config's `tokenizer` string leads to, without a corpus; None where only the hub knows.

    Raises:
        UserError: as `parse_tokenizer`, or an unreadable file.
    """
    kind, value = parse_tokenizer(tokenizer)
    if kind == "file":
        try:
            data = json.loads(value.read_text(encoding="utf-8"))
            vocab = data["model"]["vocab"]
            ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
            ids |= {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{value}: not a tokenizer.json ({type(error).__name__}: {error})") from None
        return _sizes(ids)[0]
    return {"bytes": _BYTES_VOCAB, "bpe": value, "hub": None}[kind]


def _sizes(vocab: dict[str, int]) -> tuple[int, int]:
    """Vocabulary size and end-of-text id; an id is added where the vocabulary knows no end of text."""
    size = max(vocab.values(), default=-1) + 1
    known = [vocab[name] for name in _EOT_NAMES if name in vocab]
    return (size, known[0]) if known else (size + 1, size)


def _canonical(backend: "tokenizers.Tokenizer") -> bytes:
    return json.dumps(json.loads(backend.to_str()), sort_keys=True, ensure_ascii=False).encode()


def _byte_alphabet() -> Iterator[tuple[str, int]]:
    """The character for each byte in byte-level BPE files: printable Latin-1 as it is, the rest from U+0100 on."""
    shift = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            yield chr(byte), byte
        else:
            yield chr(256 + shift), byte
            shift += 1


_BYTE_OF = dict(_byte_alphabet())


def _byte_level_bytes(token: str) -> bytes:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()  # an added token that is not special stands for its own text


def _piece_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece or WordPiece token: a space mark, a byte escape, or a continuation mark."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").removeprefix("##").encode()
