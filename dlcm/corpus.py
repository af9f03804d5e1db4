"""Corpus sources -> documents (str), streamed in constant memory and in the same order every time.

A document is one file, one JSONL line, one table row, or one block of a large text file:

- a text file of at most `WHOLE_FILE_BYTES` inside a folder (or `stdlib`, `packages`) is one document;
- a larger one, and a corpus that is a single text file, is cut at line ends into blocks of at most `BLOCK_CHARS`
  characters (inside a line only where no line ends in the block), so that a split by document has documents to split.

Joining the blocks gives the file back, byte for byte. Documents without a visible character are left out.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from dlcm.config import DataConfig
from dlcm.errors import UserError, nearest, user_path

BLOCK_CHARS = 8_192
WHOLE_FILE_BYTES = 256 * 1024
TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".html", ".csv", ".py", ".pyi", ".c", ".h", ".cpp", ".js", ".ts", ".rs"}
)
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_NAMED = ("stdlib", "packages")
_ZSTD_PIECE = 64 * 1024  # compressed bytes at a time: what they hold is some hundreds of kilobytes
_PACKAGE_SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst")


@dataclass(frozen=True)
class Source:
    """Where the documents of a corpus come from.

    Attributes:
        spec: the `corpus` string of the config.
        root: folder that file names are relative to; None for a hub data set.
        files: the files in reading order; empty for a hub data set.
        text_key: key or column of the text in JSONL, parquet and hub rows.
        skip_foreign: leave out text files that are not UTF-8 (the standard library tests decoders with some) instead
            of refusing them.
    """

    spec: str
    root: Path | None
    files: tuple[Path, ...]
    text_key: str
    skip_foreign: bool

    @cached_property
    def n_bytes(self) -> int | None:
        """Size of the files as stored; None where it is not known before reading."""
        return sum(path.stat().st_size for path in self.files) if self.files else None

    def fingerprint(self) -> str:
        """Hash of the names, sizes and modification times: changes when the source does, without reading it."""
        digest = hashlib.sha256(json.dumps([self.spec if self.root is None else "files", self.text_key]).encode())
        for path in self.files:
            stat = path.stat()
            digest.update(f"\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """All documents with a visible character, in order; errors as `numbered`."""
        return (text for _, text in self.numbered())

    def numbered(self, first: int = 0) -> Iterator[tuple[int, str]]:
        """Documents with a visible character, in order, and the number of the file that each is from.

        Args:
            first: file to begin with; a hub data set is one file.

        Raises:
            UserError: an unreadable file, a line that is not JSON, a row without its text; with file and line.
        """
        if self.root is None:
            yield from ((0, text) for text in _hub_rows(self.spec, self.text_key) if not text.isspace() and text)
            return
        alone = len(self.files) == 1 and not self.skip_foreign
        for number, path in enumerate(self.files[first:], first):
            try:
                yield from ((number, text) for text in self._read(path, alone) if not text.isspace() and text)
            except OSError as error:
                raise UserError(f"{path}: not readable ({error.strerror or error})") from None

    def _read(self, path: Path, alone: bool) -> Iterator[str]:
        if _is_jsonl(path):
            return _read_jsonl(path, self.text_key)
        if path.suffix == ".parquet":
            return _read_parquet(path, self.text_key)
        return self._read_text(path, whole=not alone and path.stat().st_size <= WHOLE_FILE_BYTES)

    def _read_text(self, path: Path, whole: bool) -> Iterator[str]:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if whole:
                    yield file.read()
                else:
                    yield from cut_text(file)
        except UnicodeDecodeError as error:
            if not self.skip_foreign:
                raise UserError(f"{path}: not UTF-8 ({error.reason}); convert it, e.g. with iconv -t utf-8") from None


def open_source(config: DataConfig) -> Source:
    """Find the files of `config.corpus`, without reading them.

    Raises:
        UserError: an unknown kind (with the nearest), a missing path, or nothing to read there.
    """
    spec, key = config.corpus, config.text_key
    if spec.startswith("hf:"):
        if not spec.removeprefix("hf:"):
            raise UserError("data.corpus: 'hf:' needs the name of a data set, as in hf:owner/name")
        return Source(spec, None, (), key, skip_foreign=False)
    if spec == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return Source(spec, root, _some(spec, _stdlib_files(root)), key, skip_foreign=True)
    if spec == "packages":
        return Source(spec, Path(sysconfig.get_path("purelib")), _some(spec, _package_files()), key, skip_foreign=True)
    if not spec.strip():
        raise UserError("data.corpus: empty; give stdlib, packages, hf:NAME or a path (. for the working directory)")
    path = user_path(spec, "data.corpus")
    try:
        if path.is_dir():
            return Source(spec, path.resolve(), _some(spec, _folder_files(path.resolve())), key, skip_foreign=False)
        if path.is_file():
            with path.open("rb"):
                pass  # readable?
            return Source(spec, path.resolve().parent, (path.resolve(),), key, skip_foreign=False)
    except OSError as error:
        raise UserError(f"data.corpus: {spec}: not readable ({error.strerror or error})") from None
    if "/" not in spec and not path.suffix:
        head, colon, _ = spec.partition(":")
        hint = nearest(head + colon, (*_NAMED, "hf:"))
        raise UserError(f"data.corpus: unknown corpus {spec!r}, and no such file or folder{hint}, or give a path")
    raise UserError(f"data.corpus: {spec}: no such file or folder (looked in {Path.cwd()})")


def cut_text(file: IO[str], block_chars: int = BLOCK_CHARS) -> Iterator[str]:
    """Cut a text stream at line ends into blocks of at most `block_chars` characters; joined they are the stream."""
    rest = ""
    while piece := file.read(block_chars):
        rest += piece
        while len(rest) >= block_chars:
            end = rest.rfind("\n", 0, block_chars) + 1 or block_chars
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _some(spec: str, files: Iterable[Path]) -> tuple[Path, ...]:
    found = tuple(files)
    if not found:
        raise UserError(
            f"data.corpus: {spec}: holds no readable text; expected files such as .txt, .md, .py, .jsonl or .parquet"
        )
    return found


def _walk(root: Path, leave_out: Callable[[str], bool], *, links: bool = False) -> Iterator[Path]:
    """Files below `root`, folders and files in the order of their names; folders that are left out are not entered.

    With `links` linked folders are entered too, each place once: a link may lead back to where it stands.
    """
    seen = {os.path.realpath(root)}
    for folder, inside, names in os.walk(root, followlinks=links):
        inside[:] = sorted(name for name in inside if not leave_out(name))
        for name in tuple(inside) if links else ():
            place = os.path.realpath(Path(folder, name))
            if place in seen:
                inside.remove(name)
            seen.add(place)
        yield from (Path(folder, name) for name in sorted(names))


def _stdlib_files(root: Path) -> Iterator[Path]:
    for path in _walk(root, {"site-packages", "__pycache__"}.__contains__):
        if path.suffix in {".py", ".txt"} and path.is_file():
            yield path


def _package_files() -> list[Path]:
    from importlib.metadata import distributions

    found = set()
    for distribution in distributions():
        root = Path(str(distribution.locate_file(""))).resolve()
        # RECORD read as the CSV that it is: `distribution.files` would look up every file on the disk first.
        for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
            if row and row[0].endswith(_PACKAGE_SUFFIXES) and not row[0].startswith(".."):
                found.add(root / row[0])
    return sorted(path for path in found if path.is_file())


def _folder_files(root: Path) -> Iterator[Path]:
    for path in _walk(root, lambda name: name.startswith("."), links=True):
        known = path.suffix in TEXT_SUFFIXES or path.suffix == ".parquet" or _is_jsonl(path)
        if known and not path.name.startswith(".") and path.is_file():
            yield path


def _is_jsonl(path: Path) -> bool:
    return path.name.endswith(JSONL_SUFFIXES)


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    for number, row in read_rows(path):
        yield _text_of(row, key, f"{path}:{number}")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a .jsonl, .jsonl.gz or .jsonl.zst file; blank lines are passed over.

    Raises:
        UserError: unreadable or damaged file, or a line that is not a JSON object, with its number.
    """
    number = 0
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, _parse_row(line, f"{path}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged after line {number} ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # naming the class would import zstandard for every corpus
            raise
        raise UserError(f"{path}: damaged after line {number} ({error}); fetch it again") from None


def _open_binary(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_Chunks(_zstd_chunks(path)))
    return path.open("rb")


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Content of the frames of a file.

    Raises:
        EOFError: the file ends inside a frame, which zstandard's own stream reader takes for an end.
    """
    import zstandard

    decoder, rest = None, b""
    with path.open("rb") as file:
        while piece := rest or file.read(_ZSTD_PIECE):
            decoder = decoder or zstandard.ZstdDecompressor().decompressobj()
            yield decoder.decompress(piece)
            rest = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise EOFError("the file ends inside a zstd frame")


class _Chunks(io.RawIOBase):
    """A file of pieces that come one by one."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._left = chunk
        n = min(len(buffer), len(self._left))
        buffer[:n], self._left = self._left[:n], self._left[n:]
        return n


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); mend or delete the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _text_of(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise UserError(f"{where}: no key '{key}'{nearest(key, row)}; set data.text_key")
    text = row[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: key '{key}' holds {type(text).__name__}, expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: key '{key}' holds half of a surrogate pair; mend or delete the line") from None
    return text


def _read_parquet(path: Path, key: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file ({error})") from None
    with file:
        if key not in file.schema_arrow.names:
            raise UserError(f"{path}: no column '{key}'{nearest(key, file.schema_arrow.names)}; set data.text_key")
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=[key]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _text_of({key: value}, key, f"{path}: row {row}")


def _hub_rows(spec: str, key: str) -> Iterator[str]:
    """Rows of `hf:NAME` or `hf:NAME:CONFIG`, split `train`, streamed."""
    name, _, config = spec.removeprefix("hf:").partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"data.corpus: {spec} needs the extra 'hf': pip install 'dlcm-scaling[hf]'") from None
    try:
        rows = iter(load_dataset(name, config or None, split="train", streaming=True))
    except Exception as error:  # the hub raises errors of several libraries
        raise UserError(f"data.corpus: {spec}: cannot be loaded ({type(error).__name__}: {error})") from None
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise UserError(f"data.corpus: {spec}: broke off after row {number} ({error}); run again") from None
        if row is None:
            return
        number += 1
        yield _text_of(dict(row), key, f"{spec}: row {number}")
