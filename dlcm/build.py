"""Building a tokenized corpus: in constant memory, resumable, whole or not there.

The documents are tokenized in groups of half a megabyte (`dlcm.encoders`) and written in their order into `.<key>.partial`,
which becomes the cache folder by a rename when it is whole. Every `JOURNAL_BYTES` of text the files are flushed and
`journal.json` says how far they are right; a build that was killed goes on from there. A lock is held meanwhile, so of several
processes one builds and the others wait.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dlcm.config import DataConfig
from dlcm.corpus import Source
from dlcm.encoders import DIGEST_BYTES, Encoded, Encoders, content_digest
from dlcm.errors import UserError
from dlcm.record import read_json, write_json
from dlcm.tokens import Tokenizer, parse_tokenizer

FORMAT_VERSION = 3
BPE_SAMPLE_BYTES = 8 * 2**20
JOURNAL_BYTES = 64 * 2**20
SHARD_TOKENS = 2**29  # of one file: a gigabyte at two bytes a token
SPLITS = ("train", "validation")
_GROUP_BYTES = 512 * 2**10  # the tokenizer's working arrays of so much text fit the caches
_FEW_DOCUMENTS = 256
_ENOUGH_FOR_TWO = 8

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, bytes done, and bytes in all where that is known."""
_Place = tuple[int, int]  # number of a file, documents of it that are done


@contextlib.contextmanager
def lock(folder: Path, progress: Progress | None) -> Generator[None]:
    """Hold the right to build a cache folder; waits for a process that has it, and says so."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                progress("waiting for another process that tokenizes this corpus", 0, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(source: Source, config: DataConfig, folder: Path, progress: Progress) -> None:
    """Write the folder of a corpus, or go on with what a build that was killed has left; the caller holds the lock.

    Raises:
        UserError: the source cannot be read or split; nothing is left then.
    """
    partial = folder.parent / f".{folder.name}.partial"
    partial.mkdir(exist_ok=True)
    try:
        _Build(source, config, partial, progress).run()
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / "journal.json").unlink(missing_ok=True)
    partial.rename(folder)


@dataclass
class Written:
    """How much of a split is on the disk."""

    n_documents: int = 0
    n_tokens: int = 0
    n_bytes: int = 0


@dataclass
class Journal:
    """Up to where a build is right.

    Attributes:
        threshold: documents whose hash is below it are validation.
        tokenizer: fingerprint.
        file: number of the file that the last document came from.
        skip: documents of that file which are done.
        read: bytes of text done.
        content: chained SHA-256 of the documents, hexadecimal.
        splits: what is written of each.
    """

    threshold: int
    tokenizer: str
    content: str
    file: int = 0
    skip: int = 0
    read: int = 0
    splits: dict[str, Written] = field(default_factory=lambda: {name: Written() for name in SPLITS})


class _Build:
    def __init__(self, source: Source, config: DataConfig, folder: Path, progress: Progress) -> None:
        self.source, self.config, self.folder, self.progress = source, config, folder, progress

    def run(self) -> None:
        journal, tokenizer = self._begin()
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(_SplitWriter(self.folder, name, tokenizer, journal.splits[name]))
                for name in SPLITS
            }
            left = self.source.n_bytes and self.source.n_bytes - journal.read
            encoders: Encoders[_Place] = stack.enter_context(Encoders(tokenizer, left))
            kept = journal.read
            for place, documents, encoded in encoders.map(self._groups(journal)):
                self._write(journal, writers, documents, encoded)
                journal.file, journal.skip = place
                self.progress("tokenizing", journal.read, self.source.n_bytes)
                if journal.read - kept >= JOURNAL_BYTES:
                    self._note(journal, writers.values())
                    kept = journal.read
            for writer in writers.values():
                writer.flush()
        self._check_splits(journal)
        self._finish(journal, tokenizer)

    def _write(
        self, journal: Journal, writers: dict[str, "_SplitWriter"], documents: list[bytes], encoded: Encoded
    ) -> None:
        content = bytes.fromhex(journal.content)
        for i in range(0, len(encoded.digests), DIGEST_BYTES):
            content = hashlib.sha256(content + encoded.digests[i : i + DIGEST_BYTES]).digest()
        journal.content = content.hex()
        hash_D = np.frombuffer(encoded.digests, ">u8")[:: DIGEST_BYTES // 8]
        n_bytes_D = np.array([len(document) for document in documents], np.int64)
        validation_D = hash_D < np.uint64(journal.threshold)
        for name, chosen_D in zip(SPLITS, (~validation_D, validation_D)):
            if chosen_D.any():
                ids = encoded.ids_T[np.repeat(chosen_D, encoded.count_D)]
                writers[name].append(ids, encoded.count_D[chosen_D], int(n_bytes_D[chosen_D].sum()))
        journal.read += int(n_bytes_D.sum())

    def _begin(self) -> tuple[Journal, Tokenizer]:
        path = self.folder / "journal.json"
        if path.exists():
            facts: dict[str, Any] = read_json(path)
            facts["splits"] = {name: Written(**facts["splits"][name]) for name in SPLITS}
            journal = Journal(**facts)
            tokenizer = self._kept_tokenizer()
            if tokenizer.fingerprint == journal.tokenizer:
                return journal, tokenizer
        threshold = _threshold(self.source, self.config.validation_share)
        tokenizer = _make_tokenizer(self.source, self.config, threshold, self.progress)
        tokenizer.save(self.folder / "tokenizer.json")
        seed = hashlib.sha256(json.dumps([threshold, tokenizer.fingerprint]).encode()).hexdigest()
        return Journal(threshold, tokenizer.fingerprint, seed), tokenizer

    def _kept_tokenizer(self) -> Tokenizer:
        is_bytes = parse_tokenizer(self.config.tokenizer)[0] == "bytes"
        return Tokenizer() if is_bytes else Tokenizer.load(self.folder / "tokenizer.json")

    def _groups(self, journal: Journal) -> Iterator[tuple["_Place", list[bytes]]]:
        """Documents that are not done yet, in lists of some `_GROUP_BYTES`, each with the place behind it."""
        file, skip = journal.file, journal.skip
        group, size = [], 0
        for number, text in islice(self.source.numbered(file), skip, None):
            file, skip = number, skip + 1 if number == file else 1
            group.append(text.encode())
            size += len(group[-1])
            if size >= _GROUP_BYTES:
                yield (file, skip), group
                group, size = [], 0
        if group:
            yield (file, skip), group

    def _note(self, journal: Journal, writers: Any) -> None:
        for writer in writers:
            writer.flush()
        write_json(self.folder / "journal.json", asdict(journal))

    def _check_splits(self, journal: Journal) -> None:
        """Refuse a share that leaves a split empty: the documents that a hash chooses may be few, or copies of each other."""
        n_documents = sum(written.n_documents for written in journal.splits.values())
        for name, way_out in zip(SPLITS, ("smaller", "larger")):
            if not journal.splits[name].n_documents:
                raise UserError(
                    f"data.validation_share: {self.config.validation_share:g} leaves none of the {n_documents:,} documents of "
                    f"data.corpus: {self.source.spec} for {name}; give a {way_out} share, or more different documents"
                )

    def _finish(self, journal: Journal, tokenizer: Tokenizer) -> None:
        meta = {
            "schema": FORMAT_VERSION,
            "corpus": self.config.corpus,
            "tokenizer": self.config.tokenizer,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "dtype": tokenizer.dtype.name,
            "shard_tokens": SHARD_TOKENS,
            "fingerprint": journal.content,
            "splits": {name: asdict(written) for name, written in journal.splits.items()},
        }
        write_json(self.folder / "meta.json", meta)


def shard_path(folder: Path, split: str, number: int) -> Path:
    """One file of the token stream of a split."""
    return folder / f"{split}-{number:05d}.bin"


class _SplitWriter:
    """Appends documents to the files of a split, which are first cut back to what was written for certain."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, written: Written) -> None:
        self._folder, self._name, self._written = folder, name, written
        self._offsets = self._open(
            folder / f"{name}.offsets.bin", 8 * (written.n_documents + 1) * bool(written.n_tokens)
        )
        if not written.n_tokens:
            self._offsets.write(np.zeros(1, np.int64).tobytes())
        number, inside = divmod(written.n_tokens, SHARD_TOKENS)
        self._file = self._open(shard_path(folder, name, number), inside * tokenizer.dtype.itemsize)

    @staticmethod
    def _open(path: Path, n_bytes: int) -> Any:
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(n_bytes)
        file.seek(n_bytes)
        return file

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._offsets.close()

    def append(self, ids: np.ndarray, counts: np.ndarray, n_bytes: int) -> None:
        """Write documents of so many ids each, one after the other; they may go on in the next file."""
        self._offsets.write((self._written.n_tokens + np.cumsum(counts)).tobytes())
        while len(ids):
            room = SHARD_TOKENS - self._written.n_tokens % SHARD_TOKENS
            self._file.write(ids[:room].tobytes())
            self._written.n_tokens += len(ids[:room])
            ids = ids[room:]
            if self._written.n_tokens % SHARD_TOKENS == 0:
                self._next_file()
        self._written.n_documents += len(counts)
        self._written.n_bytes += n_bytes

    def _next_file(self) -> None:
        self._sync(self._file)
        self._file.close()
        self._file = self._open(shard_path(self._folder, self._name, self._written.n_tokens // SHARD_TOKENS), 0)

    def flush(self) -> None:
        """To the disk, so that neither a journal nor a rename can tell of what is not there."""
        self._sync(self._file)
        self._sync(self._offsets)

    @staticmethod
    def _sync(file: Any) -> None:
        file.flush()
        os.fsync(file.fileno())


def _hashes(text: str) -> tuple[int, int]:
    """Two independent 64-bit numbers from the content: for the split, for the BPE sample."""
    digest = content_digest(text.encode())
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


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
        split_hash, sample_hash = _hashes(text)
        if split_hash < threshold or sample_hash >= rate:
            continue
        taken += len(text)
        yield text
        progress("training the tokenizer", read, n_bytes)
        if taken >= (
            2 * BPE_SAMPLE_BYTES if n_bytes else BPE_SAMPLE_BYTES
        ):  # compressed files hold more than their size
            return


def sample_training(source: Source, share: float, n_bytes: float, progress: Progress) -> tuple[list[str], str]:
    """Training documents of a source that is one of several, and what its text is.

    Args:
        source: read from beginning to end.
        share: of its documents kept for validation; none of those is sampled.
        n_bytes: how much text is wanted; up to twice as much comes of compressed files, and less of a short source.
        progress: told how far it is.

    Returns:
        Documents chosen by content hash, in order; and the chained SHA-256 of all documents, hexadecimal.

    Raises:
        UserError: the source cannot be read or split.
    """
    threshold, size = _threshold(source, share), source.n_bytes
    rate = int(min(1.0, n_bytes / size) * 2**64) if size else 2**64
    most = 2 * n_bytes if size else n_bytes
    texts, read, told, taken, content = [], 0, 0, 0, b""
    for text in source.documents():
        read += len(text)
        split_hash, sample_hash = _hashes(text)
        content = hashlib.sha256(content + content_digest(text.encode())).digest()
        if split_hash >= threshold and sample_hash < rate and taken < most:
            taken += len(text.encode())
            texts.append(text)
        if read - told >= _GROUP_BYTES:
            progress("sampling text for the tokenizer", read, size)
            told = read
    return texts, content.hex()
