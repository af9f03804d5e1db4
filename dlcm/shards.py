"""Tokenized corpora on disk, and the packed batches drawn from them.

A split is one memory-mapped stream of ids: every document is `[eot] + tokens`, documents one after the other. The
target of position t is `stream[t + 1]`, so the end of a document predicts the end of text and every target is valid.

Layout of a cache folder, `$DLCM_CACHE/<key>` (default `~/.cache/dlcm`): `meta.json`, `tokenizer.json`, and for each
split `<split>.bin` (uint16 or uint32) and `<split>.offsets.npy` (int64, n_documents + 1). A folder is built under
another name and renamed while a lock is held: it is whole or it is not there.

T tokens of a batch, W windows.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dlcm.config import DataConfig
from dlcm.corpus import Source, open_source
from dlcm.errors import UserError
from dlcm.order import permute
from dlcm.record import read_json, write_json
from dlcm.tokens import Tokenizer, parse_tokenizer

FORMAT_VERSION = 2
BPE_SAMPLE_BYTES = 8 * 2**20
_GROUP_CHARS = 2 * 2**20
_FEW_DOCUMENTS = 256
_ENOUGH_FOR_TWO = 8
_SPLITS = ("train", "validation")

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, bytes done, and bytes in all where that is known."""


@dataclass(frozen=True)
class Batch:
    """Packed windows.

    Attributes:
        tokens_T: int64, the windows one after the other.
        targets_T: int64, the next token of each position.
        cu_seqlens: int32, starts of every window and of every document inside it, and T at the end: attention crosses
            none of them (a document cut by a window is treated as two).
        windows: int64, (W,), index in the stream of each window's first token.
    """

    tokens_T: np.ndarray
    targets_T: np.ndarray
    cu_seqlens: np.ndarray
    windows: np.ndarray


class Split:
    """The training or the validation documents as one stream of token ids.

    Attributes:
        tokens: memory map of the stream, (n_tokens,).
        offsets: int64, (n_documents + 1,): where each document starts.
        n_bytes: bytes of the documents' text.
    """

    def __init__(self, name: str, tokens: np.ndarray, offsets: np.ndarray, n_bytes: int) -> None:
        """Wrap the arrays of one split."""
        self.name, self.tokens, self.offsets, self.n_bytes = name, tokens, offsets, n_bytes
        self.n_tokens, self.n_documents = len(tokens), len(offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, its leading end of text included."""
        return np.asarray(self.tokens[self.offsets[index] : self.offsets[index + 1]])

    def epochs(self, tokens: int) -> float:
        """How often a training budget of `tokens` goes through the split."""
        return tokens / self.n_tokens

    def batch(self, step: int, *, seed: int, batch_tokens: int, seq_len: int) -> Batch:
        """The batch of one step: `batch_tokens // seq_len` windows, drawn without replacement in each epoch.

        A function of (seed, step) alone: not of what was drawn before, of workers, or of the length of the run.

        Raises:
            UserError: the split is shorter than one window.
        """
        n_windows = self._n_windows(seq_len)
        per_step = batch_tokens // seq_len
        drawn = np.arange(step * per_step, (step + 1) * per_step)
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
        n_windows = self._n_windows(seq_len)
        n_chosen = min(n_windows, max(1, max_tokens // seq_len))
        chosen = np.arange(n_chosen) * n_windows // n_chosen
        per_batch = max(1, batch_tokens // seq_len)
        for start in range(0, n_chosen, per_batch):
            yield self._cut(chosen[start : start + per_batch] * seq_len, seq_len)

    def _n_windows(self, seq_len: int) -> int:
        n_windows = (self.n_tokens - 1) // seq_len
        if n_windows < 1:
            raise UserError(
                f"data.corpus: the {self.name} split has {self.n_tokens} tokens, too few for one window of "
                f"data.seq_len = {seq_len}; give more text, a smaller seq_len"
                + (", or a larger data.validation_share" if self.name == "validation" else "")
            )
        return n_windows

    def _cut(self, starts_W: np.ndarray, seq_len: int) -> Batch:
        taken = np.stack([self.tokens[start : start + seq_len + 1] for start in starts_W]).astype(np.int64)
        first = np.searchsorted(self.offsets, starts_W, side="right")
        last = np.searchsorted(self.offsets, starts_W + seq_len, side="left")
        pieces = []
        for i, (start, lo, hi) in enumerate(zip(starts_W, first, last)):
            pieces += [[i * seq_len], self.offsets[lo:hi] - start + i * seq_len]
        cu_seqlens = np.concatenate([*pieces, [len(starts_W) * seq_len]]).astype(np.int32)
        return Batch(taken[:, :-1].reshape(-1), taken[:, 1:].reshape(-1), cu_seqlens, np.asarray(starts_W, np.int64))


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

    def target_bytes(self, batch: Batch) -> int:
        """Bytes of text that the targets of a batch stand for; an end of text counts 0."""
        return int(self.tokenizer.byte_lengths[batch.targets_T].sum())


def cache_root() -> Path:
    """Where tokenized corpora are kept: `$DLCM_CACHE`, else `~/.cache/dlcm`."""
    return Path(os.environ.get("DLCM_CACHE") or Path.home() / ".cache" / "dlcm")


def open_corpus(config: DataConfig, progress: Progress | None = None) -> Corpus:
    """Open the tokenized corpus of a config; build it first where the cache does not hold it.

    Two processes may call this at once: one builds, the other waits.

    Args:
        config: which text, which tokenizer, which share for validation.
        progress: told about a build.

    Raises:
        UserError: no such corpus or tokenizer, unreadable or too little text, or a damaged cache folder.
    """
    source = open_source(config)
    key = _cache_key(source, config)
    folder = cache_root() / key
    if not folder.is_dir():
        try:
            with _lock(folder, progress):
                if not folder.is_dir():
                    _build(source, config, folder, progress or (lambda *_: None))
        except OSError as error:
            raise UserError(
                f"{cache_root()}: cannot hold the tokenized corpus ({error.strerror or error}); "
                "set DLCM_CACHE to a folder with room"
            ) from None
    return _open(folder, config)


def _cache_key(source: Source, config: DataConfig) -> str:
    kind, value = parse_tokenizer(config.tokenizer)
    tokenizer = hashlib.sha256(value.read_bytes()).hexdigest() if kind == "file" else config.tokenizer.replace("_", "")
    parts = [FORMAT_VERSION, source.fingerprint(), tokenizer, config.validation_share]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


@contextlib.contextmanager
def _lock(folder: Path, progress: Progress | None) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress("waiting for another process that tokenizes this corpus", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(source: Source, config: DataConfig, folder: Path, progress: Progress) -> None:
    """Write the folder; the caller holds the lock, so any temporary folder of this key is a dead build's."""
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(stale)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        threshold = _threshold(source, config.validation_share)
        tokenizer = _make_tokenizer(source, config, threshold, progress)
        tokenizer.save(temporary / "tokenizer.json")
        meta = {
            "schema": FORMAT_VERSION,
            "corpus": config.corpus,
            "tokenizer": config.tokenizer,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "dtype": tokenizer.dtype.name,
            **_write_splits(source, tokenizer, threshold, temporary, progress),
        }
        write_json(temporary / "meta.json", meta)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _hashes(text: str) -> tuple[int, int, bytes]:
    """Two independent 64-bit numbers from the content (for the split, for the BPE sample), and all 16 bytes."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big"), digest


def _threshold(source: Source, share: float) -> int:
    """Documents whose first hash is below this are validation.

    `share` of 2^64. Of a corpus of fewer than `_FEW_DOCUMENTS`, where that would leave the number of validation documents
    to luck, it is the place that puts a share of them there: two at least (one of very few), and one in training.

    Raises:
        UserError: fewer than two different documents.
    """
    hashes = [_hashes(text)[0] for text in islice(source.documents(), _FEW_DOCUMENTS)]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        raise UserError(
            f"data.corpus: {source.spec}: {'only one document' if distinct else 'no text'}; "
            "training and validation need at least two different documents"
        )
    if len(hashes) == _FEW_DOCUMENTS:
        return int(share * 2**64)
    fewest = 2 if len(distinct) >= _ENOUGH_FOR_TWO else 1
    n_validation = min(max(round(share * len(distinct)), fewest), len(distinct) - 1)
    return distinct[n_validation]


def _make_tokenizer(source: Source, config: DataConfig, threshold: int, progress: Progress) -> Tokenizer:
    kind, value = parse_tokenizer(config.tokenizer)
    if kind == "bytes":
        return Tokenizer()
    if kind == "file":
        return Tokenizer.load(value)
    if kind == "hub":
        return Tokenizer.from_hub(value)
    return Tokenizer.train(_bpe_sample(source, threshold, progress), value)


def _bpe_sample(source: Source, threshold: int, progress: Progress) -> Iterator[str]:
    """Training documents of some `BPE_SAMPLE_BYTES`, chosen by content hash, never validation text."""
    n_bytes = source.n_bytes
    rate = int(min(1.0, BPE_SAMPLE_BYTES / n_bytes) * 2**64) if n_bytes else 2**64
    read = taken = 0
    for text in source.documents():
        read += len(text)
        split_hash, sample_hash, _ = _hashes(text)
        if split_hash < threshold or sample_hash >= rate:
            continue
        taken += len(text)
        yield text
        progress("training the tokenizer", read, n_bytes)
        if taken >= (
            2 * BPE_SAMPLE_BYTES if n_bytes else BPE_SAMPLE_BYTES
        ):  # compressed files hold more than their size
            return


def _write_splits(
    source: Source, tokenizer: Tokenizer, threshold: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    content = hashlib.sha256(json.dumps([threshold, tokenizer.fingerprint]).encode())
    read = 0
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_SplitWriter(folder, name, tokenizer)) for name in _SPLITS]
        for texts in _groups(source.documents()):
            for text, ids in zip(texts, tokenizer.encode_batch(texts)):
                split_hash, _, digest = _hashes(text)
                content.update(digest)
                n_bytes = len(text.encode())
                writers[split_hash < threshold].append(ids, n_bytes)
                read += n_bytes
            progress("tokenizing", read, source.n_bytes)
        return {"fingerprint": content.hexdigest(), "splits": {writer.name: writer.finish() for writer in writers}}


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of some `_GROUP_CHARS` characters, enough to keep every core of the tokenizer busy."""
    group, size = [], 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= _GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


class _SplitWriter:
    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._eot = np.array([tokenizer.eot_id], tokenizer.dtype).tobytes()
        self._offsets = array("q", [0])
        self._n_bytes = 0
        self._folder = folder
        self._file = (folder / f"{name}.bin").open("wb")

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, ids: np.ndarray, n_bytes: int) -> None:
        self._file.write(self._eot)
        self._file.write(ids.tobytes())
        self._offsets.append(self._offsets[-1] + 1 + len(ids))
        self._n_bytes += n_bytes

    def finish(self) -> dict[str, int]:
        """Flush to the disk, so that the rename that follows cannot publish a file without its content."""
        self._file.flush()
        os.fsync(self._file.fileno())
        np.save(self._folder / f"{self.name}.offsets.npy", np.array(self._offsets, np.int64))
        return {"n_documents": len(self._offsets) - 1, "n_tokens": self._offsets[-1], "n_bytes": self._n_bytes}


def _open(folder: Path, config: DataConfig) -> Corpus:
    way_out = f"delete the folder and run again: rm -r {folder}"
    meta = read_json(folder / "meta.json")
    is_bytes = parse_tokenizer(config.tokenizer)[0] == "bytes"
    tokenizer = Tokenizer() if is_bytes else Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != meta.get("tokenizer_fingerprint"):
        raise UserError(f"{folder}: tokenizer.json does not match the shards, which another tokenizer made; {way_out}")
    splits = []
    for name in _SPLITS:
        try:
            counts = meta["splits"][name]
            tokens = np.memmap(folder / f"{name}.bin", np.dtype(meta["dtype"]), mode="r")
            offsets = np.load(folder / f"{name}.offsets.npy")
            whole = len(tokens) == counts["n_tokens"] == offsets[-1] and len(offsets) == counts["n_documents"] + 1
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{folder}: damaged {name} shard ({error}); {way_out}") from None
        if not whole:
            raise UserError(f"{folder}: the {name} shard does not have the length that meta.json gives; {way_out}")
        splits.append(Split(name, tokens, offsets, counts["n_bytes"]))
    return Corpus(tokenizer, meta["fingerprint"], splits[0], splits[1], folder)
