"""Tokenized corpora on disk, and the packed batches drawn from them.

A split is one memory-mapped stream of ids: every document is `[eot] + tokens`, documents one after the other. The
target of position t is `stream[t + 1]`, so the end of a document predicts the end of text and every target is valid.

Layout of a cache folder, `$DLCM_CACHE/<key>` (default `~/.cache/dlcm`): `meta.json`, `tokenizer.json`, and for each
split `<split>-00000.bin` and so on (uint16 or uint32, a gigabyte or two each) and `<split>.offsets.bin` (int64,
n_documents + 1). `dlcm.build` makes it: it is whole or it is not there.

T tokens of a batch, W windows.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlcm.build import FORMAT_VERSION, SPLITS, Progress, build, lock, shard_path
from dlcm.config import DataConfig
from dlcm.corpus import Source, open_source
from dlcm.errors import UserError
from dlcm.order import permute
from dlcm.record import read_json
from dlcm.tokens import Tokenizer, parse_tokenizer

if TYPE_CHECKING:
    from dlcm.mixture import Mixture

_TOKENS_AT_ONCE = 2**22  # of a stream that is read whole


class Stream:
    """Token ids that stand in several files, as one array: `stream[a:b]`, `stream[indices]`.

    Args:
        shards: arrays of the same number of ids each, but for the last.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards, self._size = shards, len(shards[0])

    def __len__(self) -> int:
        return self._size * (len(self._shards) - 1) + len(self._shards[-1])

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        if isinstance(where, slice):
            start, stop, step = where.indices(len(self))
            if step != 1:
                raise ValueError("a stream is read in steps of one")
            pieces = [
                self._shards[i][max(start - i * self._size, 0) : stop - i * self._size]
                for i in range(start // self._size, -(-stop // self._size))
            ]
            return (
                np.concatenate(pieces) if len(pieces) > 1 else np.asarray(pieces[0] if pieces else self._shards[0][:0])
            )
        found = np.empty(where.shape, self._shards[0].dtype)
        number, inside = np.divmod(where, self._size)
        for i in np.unique(number):
            found[number == i] = self._shards[i][inside[number == i]]
        return found


@dataclass(frozen=True)
class Batch:
    """Packed windows.

    Attributes:
        tokens_T: int64, the windows one after the other.
        targets_T: int64, the next token of each position.
        cu_seqlens: int32, starts of every window and of every document inside it, and T at the end: attention crosses
            none of them (a document cut by a window is treated as two).
        windows: int64, (W,), index in the stream of each window's first token; of a mixture, in the streams of its sources
            one after the other, each as long as no stream is.
    """

    tokens_T: np.ndarray
    targets_T: np.ndarray
    cu_seqlens: np.ndarray
    windows: np.ndarray


@dataclass(frozen=True)
class Windows:
    """Windows cut from a stream, not yet packed.

    Attributes:
        tokens_WS: int64, (W, S + 1): each with the token behind it.
        inside: for each window, where documents begin in it behind its first token; int64.
        starts_W: int64, index of each window's first token.
    """

    tokens_WS: np.ndarray
    inside: Sequence[np.ndarray]
    starts_W: np.ndarray

    def pack(self) -> Batch:
        """The windows one after the other."""
        n_windows, seq_len = self.tokens_WS.shape[0], self.tokens_WS.shape[1] - 1
        pieces = []
        for i, documents in enumerate(self.inside):
            pieces += [[i * seq_len], documents + i * seq_len]
        cu_seqlens = np.concatenate([*pieces, [n_windows * seq_len]]).astype(np.int32)
        tokens_T, targets_T = self.tokens_WS[:, :-1].reshape(-1), self.tokens_WS[:, 1:].reshape(-1)
        return Batch(tokens_T, targets_T, cu_seqlens, np.asarray(self.starts_W, np.int64))


class Split:
    """The training or the validation documents as one stream of token ids.

    Attributes:
        tokens: the stream, (n_tokens,); memory-mapped.
        offsets: int64, (n_documents + 1,): where each document starts.
        n_bytes: bytes of the documents' text.
    """

    def __init__(self, name: str, tokens: np.ndarray | Stream, offsets: np.ndarray, n_bytes: int) -> None:
        """Wrap the arrays of one split."""
        self.name, self.tokens, self.offsets, self.n_bytes = name, tokens, offsets, n_bytes
        self.n_tokens, self.n_documents = len(tokens), len(offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, its leading end of text included."""
        return np.asarray(self.tokens[self.offsets[index] : self.offsets[index + 1]])

    def epochs(self, tokens: int) -> float:
        """How often a training budget of `tokens` goes through the split."""
        return tokens / self.n_tokens

    def epochs_by_source(self, tokens: int) -> None:
        """None: there is one source."""

    def batch(self, step: int, *, seed: int, batch_tokens: int, seq_len: int) -> Batch:
        """The batch of one step: `batch_tokens // seq_len` windows, drawn without replacement in each epoch.

        A function of (seed, step) alone: not of what was drawn before, of workers, or of the length of the run.

        Raises:
            UserError: the split is shorter than one window.
        """
        per_step = batch_tokens // seq_len
        drawn = np.arange(step * per_step, (step + 1) * per_step)
        return self.draw(drawn, seed=seed, seq_len=seq_len).pack()

    def draw(self, drawn: np.ndarray, *, seed: int, seq_len: int) -> Windows:
        """The windows of these numbers, from 0 on, of all that are ever drawn under a seed.

        Raises:
            UserError: the split is shorter than one window.
        """
        n_windows = self.n_windows(seq_len)
        epochs, places = np.divmod(drawn, n_windows)
        index = np.empty_like(drawn)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = permute(places[here], n_windows, seed, int(epoch))
        return self._cut(index * seq_len, seq_len)

    def windows(self, seq_len: int, max_tokens: int, batch_tokens: int = 2_048) -> Iterator[Batch]:
        """The fixed evaluation batches: windows at even distances over the whole split, `max_tokens` in all at most.

        Raises:
            UserError: the split is shorter than one window.
        """
        n_windows = self.n_windows(seq_len)
        n_chosen = min(n_windows, max(1, max_tokens // seq_len))
        chosen = np.arange(n_chosen) * n_windows // n_chosen
        per_batch = max(1, batch_tokens // seq_len)
        for start in range(0, n_chosen, per_batch):
            yield self._cut(chosen[start : start + per_batch] * seq_len, seq_len).pack()

    def n_windows(self, seq_len: int) -> int:
        """Windows of the split that do not overlap, the token behind each included.

        Raises:
            UserError: not one.
        """
        n_windows = (self.n_tokens - 1) // seq_len
        if n_windows < 1:
            raise UserError(
                f"data.corpus: the {self.name} split has {self.n_tokens} tokens, too few for one window of "
                f"data.seq_len = {seq_len}; give more text, a smaller seq_len"
                + (", or a larger data.validation_share" if self.name == "validation" else "")
            )
        return n_windows

    def _cut(self, starts_W: np.ndarray, seq_len: int) -> Windows:
        taken = [self.tokens[start : start + seq_len + 1] for start in starts_W]
        first = np.searchsorted(self.offsets, starts_W, side="right")
        last = np.searchsorted(self.offsets, starts_W + seq_len, side="left")
        inside = [self.offsets[lo:hi] - start for start, lo, hi in zip(starts_W, first, last)]
        return Windows(np.stack(taken).astype(np.int64), inside, starts_W)


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
        tokenizer: the one that the shards were made with.
        fingerprint: SHA-256 of the text, the split and the tokenizer; equal on every machine with the same text.
        train: training documents.
        validation: validation documents.
        folder: the cache folder.
    """

    tokenizer: Tokenizer
    fingerprint: str
    train: Split
    validation: Split
    folder: Path

    def target_bytes(self, batch: Batch) -> float:
        """Bytes of text that the targets of a batch stand for; an end of text counts 0.

        Exact where the tokenizer keeps every byte. Where it drops blanks or writes one id for what it does not know, what it
        dropped in all of the validation text is shared out over its tokens by their bytes.
        """
        return float(self.tokenizer.byte_lengths[batch.targets_T].sum()) * self._bytes_per_token_byte

    @cached_property
    def _bytes_per_token_byte(self) -> float:
        """Bytes of the validation text over those that its tokens spell."""
        tokens, lengths = self.validation.tokens, self.tokenizer.byte_lengths
        spelt = sum(int(lengths[tokens[i : i + _TOKENS_AT_ONCE]].sum()) for i in range(0, len(tokens), _TOKENS_AT_ONCE))
        return self.validation.n_bytes / spelt if spelt else 1.0


def cache_root() -> Path:
    """Where tokenized corpora are kept: `$DLCM_CACHE`, else `~/.cache/dlcm`."""
    return Path(os.environ.get("DLCM_CACHE") or Path.home() / ".cache" / "dlcm")


def open_corpus(config: DataConfig, progress: Progress | None = None) -> "Corpus | Mixture":
    """Open the tokenized corpus of a config, or its mixture; build it first where the cache does not hold it.

    Two processes may call this at once: one builds, the other waits.

    Args:
        config: which text, which tokenizer, which share for validation.
        progress: told about a build.

    Raises:
        UserError: no such corpus or tokenizer, unreadable or too little text, or a damaged cache folder.
    """
    if config.mixture is not None:
        from dlcm.mixture import open_mixture  # which is made of corpora

        return open_mixture(config, progress)
    return open_plain(config, progress)


def open_plain(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """Open the tokenized corpus of a config that has no mixture; as `open_corpus`."""
    source = open_source(config)

    def make(folder: Path) -> None:
        build(source, config, folder, progress or (lambda *_: None))

    return _open(cached(_cache_key(source, config), make, progress), config)


def cached(key: str, make: Callable[[Path], None], progress: Progress | None) -> Path:
    """A folder of the cache; made where it is not there, by one process while others wait.

    Args:
        key: name of the folder.
        make: makes it, whole or not at all.
        progress: told where another process is at it.

    Raises:
        UserError: the cache cannot be written.
    """
    folder = cache_root() / key
    if not folder.is_dir():
        try:
            with lock(folder, progress):
                if not folder.is_dir():
                    make(folder)
        except OSError as error:
            raise UserError(
                f"{cache_root()}: cannot hold the tokenized corpus ({error.strerror or error}); "
                "set DLCM_CACHE to a folder with room"
            ) from None
    return folder


def cached_tokens(config: DataConfig) -> int | None:
    """Training tokens of a corpus without a mixture, if the cache holds it; nothing is built.

    Raises:
        UserError: no such corpus or tokenizer.
    """
    folder = cache_root() / _cache_key(open_source(config), config)
    return int(read_json(folder / "meta.json")["splits"]["train"]["n_tokens"]) if folder.is_dir() else None


def _cache_key(source: Source, config: DataConfig) -> str:
    kind, value = parse_tokenizer(config.tokenizer)
    tokenizer = hashlib.sha256(value.read_bytes()).hexdigest() if kind == "file" else config.tokenizer
    tokenizer = f"bpe-{value}" if kind == "bpe" else tokenizer  # bpe-4_096 is bpe-4096
    parts = [FORMAT_VERSION, source.fingerprint(), tokenizer, config.validation_share]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _open(folder: Path, config: DataConfig) -> Corpus:
    way_out = f"delete the folder and run again: rm -r {folder}"
    meta = read_json(folder / "meta.json")
    if meta.get("schema") != FORMAT_VERSION:
        raise UserError(f"{folder}: format {meta.get('schema')!r}, this version reads {FORMAT_VERSION}; {way_out}")
    is_bytes = parse_tokenizer(config.tokenizer)[0] == "bytes"
    tokenizer = Tokenizer() if is_bytes else Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != meta.get("tokenizer_fingerprint"):
        raise UserError(f"{folder}: tokenizer.json does not match the shards, which another tokenizer made; {way_out}")
    splits = []
    for name in SPLITS:
        try:
            counts = meta["splits"][name]
            n_shards = max(1, -(-counts["n_tokens"] // meta["shard_tokens"]))
            paths = [shard_path(folder, name, i) for i in range(n_shards)]
            shards = [np.memmap(path, np.dtype(meta["dtype"]), mode="r") for path in paths]
            tokens = shards[0] if n_shards == 1 else Stream(shards)
            offsets = np.memmap(folder / f"{name}.offsets.bin", np.int64, mode="r")
            whole = len(tokens) == counts["n_tokens"] == offsets[-1] and len(offsets) == counts["n_documents"] + 1
            whole &= all(len(shard) == meta["shard_tokens"] for shard in shards[:-1])
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{folder}: damaged {name} shard ({error}); {way_out}") from None
        if not whole:
            raise UserError(f"{folder}: the {name} shard does not have the length that meta.json gives; {way_out}")
        splits.append(Split(name, tokens, offsets, counts["n_bytes"]))
    return Corpus(tokenizer, meta["fingerprint"], splits[0], splits[1], folder)
