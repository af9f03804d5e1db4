"""Tokenizing by several processes: groups of documents go out, and come back in their order.

The processes are started as `python -c` with an entry of their own and speak over pipes. Nothing is forked, the main module of
the caller is not imported again (a script needs no guard), and they load neither torch nor pydantic. A process whose pipe ends
leaves: none outlives the one that builds, however that ends. What a process that died had in hand is encoded by the builder.

D documents, T ids.
"""

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from dlcm.tokens import Tokenizer

DIGEST_BYTES = 16
_WORTH_BYTES = 4 * 2**20  # of text: encoded in the time that a process takes to start
_MOST_PROCESSES = 8  # reading and writing, which one process does, keep no more busy
_ENTRY = "import sys; sys.path[:] = sys.argv[1:]; from dlcm.encoders import serve; serve()"

Label = TypeVar("Label")


@dataclass(frozen=True)
class Encoded:
    """A group of documents, tokenized.

    Attributes:
        ids_T: the documents one after the other, an end of text before each.
        count_D: int64, ids of each document.
        digests: `DIGEST_BYTES` of the content of each document, BLAKE2b.
    """

    ids_T: np.ndarray
    count_D: np.ndarray
    digests: bytes


def encode(tokenizer: Tokenizer, documents: list[bytes]) -> Encoded:
    """Tokenize and hash UTF-8 documents."""
    return Encoded(*tokenizer.encode_documents(documents), b"".join(map(content_digest, documents)))


def content_digest(document: bytes) -> bytes:
    """BLAKE2b of a document."""
    return hashlib.blake2b(document, digest_size=DIGEST_BYTES).digest()


def n_processes() -> int:
    """One for each processor that this process may use; one means none beside it."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_PROCESSES)


class Encoders(Generic[Label]):
    """Context manager: tokenizes groups of documents, in other processes too where there is much text.

    Args:
        tokenizer: what to encode with.
        expected_bytes: of text in all; None where that is not known.
    """

    def __init__(self, tokenizer: Tokenizer, expected_bytes: int | None) -> None:
        self._tokenizer = tokenizer
        # A few megabytes are encoded here before there are other processes, unless much more is to come for certain.
        self._alone_bytes = 0 if expected_bytes and expected_bytes > 2 * _WORTH_BYTES else _WORTH_BYTES
        self._processes: list[_Process] = []
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None  # one for each process, which it waits for

    def __enter__(self) -> "Encoders[Label]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.end()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def map(self, groups: Iterable[tuple[Label, list[bytes]]]) -> Iterator[tuple[Label, list[bytes], Encoded]]:
        """Encode labelled groups; they come back in the order in which they came, a few are under way at a time."""
        under_way: deque[tuple[Label, list[bytes], Future[Encoded | None]]] = deque()
        seen, alone = 0, True
        for label, documents in groups:
            if alone and seen >= self._alone_bytes:
                self._start()
                alone = False
            seen += sum(map(len, documents))
            if self._threads is None:
                yield label, documents, encode(self._tokenizer, documents)
                continue
            under_way.append((label, documents, self._threads.submit(self._ask, documents)))
            if len(under_way) > 2 * len(self._processes):
                yield self._done(*under_way.popleft())
        while under_way:
            yield self._done(*under_way.popleft())

    def _start(self) -> None:
        """Start the processes, unless they would be of no use: bytes are only read and written."""
        n = n_processes()
        if n < 2 or not sys.executable or self._tokenizer.backend is None:
            return
        spec = self._tokenizer.backend.to_str()
        with contextlib.suppress(OSError):  # no more processes, no more memory: fewer do as well
            for _ in range(n):
                self._processes.append(_Process(spec))
        for process in self._processes:
            self._idle.put(process)
        if self._processes:
            self._threads = ThreadPoolExecutor(len(self._processes))

    def _ask(self, documents: list[bytes]) -> Encoded | None:
        """In a thread: let the next idle process encode; None where it died, now or before."""
        process = self._idle.get()
        encoded = process.ask(documents) if process is not None else None
        self._idle.put(process if encoded is not None else None)
        return encoded

    def _done(
        self, label: Label, documents: list[bytes], answer: "Future[Encoded | None]"
    ) -> tuple[Label, list[bytes], Encoded]:
        return label, documents, answer.result() or encode(self._tokenizer, documents)


class _Process:
    """A process that encodes one group after another."""

    def __init__(self, spec: str) -> None:
        quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-c", _ENTRY, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet},
            process_group=0,  # a Ctrl-C of the terminal is the builder's to act on
        )
        self._spec: str | None = spec
        self._ending = False

    def ask(self, documents: list[bytes]) -> Encoded | None:
        """Encode; None if the process has died."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            if self._spec is not None:
                pickle.dump(self._spec, self._child.stdin)
                self._spec = None
            pickle.dump(documents, self._child.stdin, protocol=5)
            self._child.stdin.flush()
            return pickle.load(self._child.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            status = self._child.wait()
            if not self._ending:
                warnings.warn(f"a process that tokenizes ended with status {status}; going on without it", stacklevel=2)
            return None

    def end(self) -> None:
        """Leave at once."""
        self._ending = True
        self._child.kill()
        self._child.wait()

    def close(self) -> None:
        """Close the pipes, when nobody speaks through them any more."""
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):  # what was written and not sent
                assert pipe is not None
                pipe.close()


def serve() -> None:
    """Be such a process: a tokenizer comes first, then groups of documents, until the pipe ends."""
    import tokenizers

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes nowhere near the answers
    try:
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(pickle.load(requests)))
        while True:
            pickle.dump(encode(tokenizer, pickle.load(requests)), answers, protocol=5)
            answers.flush()
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)
