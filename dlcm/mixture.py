"""Several sources of text in one training stream, each by its weight.

Every block of `BLOCK_WINDOWS` windows has a fixed number of windows of each source, apportioned by the weights: a weight
holds to one part in 1024. Within a block the r-th of the n windows of a source falls at a random time between r/n and (r+1)/n,
keyed by (seed, block): so the shares hold in every stretch of the stream up to a window or so of each source, not only over
whole blocks, and a run of a few hundred windows has the mixture that it was asked for. Each source goes through its own epochs
in its own order (`Split.draw`), so its windows come as if it were alone.

Which source the i-th window is from is a function of (seed, i) alone: computed, not stored, one block at a time.

One tokenizer serves all sources. A `bpe-N` is trained on text of all of them by their weights. Each source is tokenized into a
cache folder of its own, which depends on the weights through the content of the tokenizer alone.

W windows, S tokens of a window.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlcm.build import BPE_SAMPLE_BYTES, FORMAT_VERSION, Progress, sample_training
from dlcm.config import DataConfig
from dlcm.corpus import open_source
from dlcm.data_config import BLOCK_WINDOWS
from dlcm.errors import UserError
from dlcm.record import read_json, write_json
from dlcm.shards import Batch, Corpus, Split, Windows, cache_root, cached, cached_tokens, open_plain
from dlcm.tokens import Tokenizer, parse_tokenizer

# Between the positions of two sources: no stream is as long, so that draws of boundaries, which are keyed by position, differ.
STREAM_POSITIONS = 2**44
_ORDER_KEY = 1  # beside (seed, block): permutations of epochs are keyed by (seed, epoch)


def apportion(weights: Sequence[float], n: int) -> list[int]:
    """Whole numbers that add up to `n`, in proportion to the weights, at least one each (largest remainder).

    Args:
        weights: above 0, with a sum of 1.
        n: at least as many as there are weights.
    """
    counts = [math.floor(n * weight) for weight in weights]
    rest = [n * weight - count for weight, count in zip(weights, counts)]
    for i in sorted(range(len(weights)), key=lambda i: (-rest[i], i))[: n - sum(counts)]:
        counts[i] += 1
    for i in [i for i, count in enumerate(counts) if not count]:
        counts[counts.index(max(counts))] -= 1
        counts[i] = 1
    return counts


def block_sources(counts: Sequence[int], seed: int, block: int) -> np.ndarray:
    """The source of each window of a block, in order.

    Args:
        counts: windows of each source in the block.
        seed: of the run.
        block: its number.
    """
    n_windows = np.array(counts)
    # The words of Philox do not change between versions of numpy.
    words = np.random.Philox(np.random.SeedSequence((seed, block, _ORDER_KEY))).random_raw(int(n_windows.sum()))
    source = np.repeat(np.arange(len(counts)), n_windows)
    rank = np.arange(len(source)) - (n_windows.cumsum() - n_windows)[source]
    time = (rank + (words >> np.uint64(11)) * 2.0**-53) / n_windows[source]
    return source[np.argsort(time, kind="stable")]


class MixedSplit:
    """The training documents of all sources, drawn by their weights.

    Attributes:
        splits: that of each source.
        counts: windows of each source in a block.
        n_tokens: of all sources together.
        n_bytes: of the text of all documents.
    """

    def __init__(self, splits: Mapping[str, Split], weights: Sequence[float]) -> None:
        """Mix splits in proportion to weights that add up to 1."""
        self.splits = dict(splits)
        self.counts = apportion(weights, BLOCK_WINDOWS)
        self.n_tokens = sum(split.n_tokens for split in self.splits.values())
        self.n_bytes = sum(split.n_bytes for split in self.splits.values())

    def epochs_by_source(self, tokens: int) -> dict[str, float]:
        """How often a training budget of `tokens` goes through each source."""
        shares = (count / BLOCK_WINDOWS for count in self.counts)
        return {name: share * split.epochs(tokens) for (name, split), share in zip(self.splits.items(), shares)}

    def epochs(self, tokens: int) -> float:
        """How often a training budget of `tokens` goes through the source that it goes through most often."""
        return max(self.epochs_by_source(tokens).values())

    def batch(self, step: int, *, seed: int, batch_tokens: int, seq_len: int) -> Batch:
        """The batch of one step, as `Split.batch`: a function of (seed, step) alone.

        Raises:
            UserError: a source is shorter than one window.
        """
        per_step = batch_tokens // seq_len
        source_W, drawn_W = self._drawn(step * per_step, per_step, seed)
        tokens_WS = np.empty((per_step, seq_len + 1), np.int64)
        starts_W = np.empty(per_step, np.int64)
        inside: list[np.ndarray] = [np.empty(0, np.int64)] * per_step
        for i, split in enumerate(self.splits.values()):
            here = np.flatnonzero(source_W == i)
            if not here.size:
                continue
            found = split.draw(drawn_W[here], seed=seed, seq_len=seq_len)
            tokens_WS[here], starts_W[here] = found.tokens_WS, found.starts_W + i * STREAM_POSITIONS
            for place, documents in zip(here, found.inside):
                inside[place] = documents
        return Windows(tokens_WS, inside, starts_W).pack()

    def _drawn(self, first: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each of `n` windows of the stream from `first` on, and its number among those of that source."""
        blocks = range(first // BLOCK_WINDOWS, -(-(first + n) // BLOCK_WINDOWS))
        found = [_numbered_block(tuple(self.counts), seed, block) for block in blocks]
        wanted = slice(first - blocks.start * BLOCK_WINDOWS, first - blocks.start * BLOCK_WINDOWS + n)
        return np.concatenate([source for source, _ in found])[wanted], np.concatenate([n for _, n in found])[wanted]


@functools.lru_cache(maxsize=4)  # small batches ask for the same block many times
def _numbered_block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each window of a block, and its number among all windows of that source."""
    source = block_sources(counts, seed, block)
    number = np.empty(len(source), np.int64)
    for i, count in enumerate(counts):
        number[source == i] = block * count + np.arange(count)
    return source, number


@dataclass(frozen=True)
class Part:
    """A source of a mixture; a plain corpus is the only part of itself, without a name.

    Attributes:
        name: as in the config.
        weight: its share; those of all parts add up to 1.
        corpus: its documents.
    """

    name: str
    weight: float
    corpus: Corpus


@dataclass(frozen=True)
class Mixture:
    """Tokenized sources, and the training stream that is drawn from them.

    Attributes:
        tokenizer: that of all sources.
        fingerprint: SHA-256 of the fingerprints of all sources.
        train: the training documents.
        parts: the sources, in the order of their names.
        texts: source -> SHA-256 that tells its text; with a tokenizer that was trained on the mixture it is of the text alone.
    """

    tokenizer: Tokenizer
    fingerprint: str
    train: MixedSplit
    parts: tuple[Part, ...]
    texts: Mapping[str, str]


def parts_of(corpus: Corpus | Mixture) -> tuple[Part, ...]:
    """The sources of a mixture, or a plain corpus as the only one."""
    return corpus.parts if isinstance(corpus, Mixture) else (Part("", 1.0, corpus),)


def fixed_windows(parts: Sequence[Part], n_tokens: int, seq_len: int) -> list[int]:
    """How many windows of each source a fixed set of at most `n_tokens` takes: by weight, at least one of each."""
    return apportion([part.weight for part in parts], max(n_tokens // seq_len, len(parts)))


def open_mixture(config: DataConfig, progress: Progress | None = None) -> Mixture:
    """Open the sources of a mixture; build what the cache does not hold. As `open_corpus`.

    Raises:
        UserError: as `open_corpus`, by the name of the source; or a source that is shorter than one window.
    """
    sources, texts = config.mixture or {}, {}
    tokenizer = config.tokenizer
    if parse_tokenizer(tokenizer)[0] == "bpe":
        folder = cached(_tokenizer_key(config), lambda folder: _train_tokenizer(config, folder, progress), progress)
        tokenizer, texts = str(folder / "tokenizer.json"), read_json(folder / "texts.json")
    parts = []
    for name, one in alone(config, tokenizer).items():
        with _named(name):
            corpus = open_plain(one, progress)
            for split in (corpus.train, corpus.validation):
                split.n_windows(config.seq_len)
        parts.append(Part(name, sources[name].weight, corpus))
    fingerprints = [[part.name, part.corpus.fingerprint] for part in parts]
    return Mixture(
        parts[0].corpus.tokenizer,
        hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest(),
        MixedSplit({part.name: part.corpus.train for part in parts}, [part.weight for part in parts]),
        tuple(parts),
        texts or dict(fingerprints),
    )


def mixture_tokens(config: DataConfig) -> dict[str, int] | None:
    """Training tokens of each source, if the cache holds all of them; nothing is built.

    Raises:
        UserError: no such corpus or tokenizer.
    """
    tokenizer = config.tokenizer
    if parse_tokenizer(tokenizer)[0] == "bpe":
        path = cache_root() / _tokenizer_key(config) / "tokenizer.json"
        if not path.exists():
            return None
        tokenizer = str(path)
    found = {name: cached_tokens(one) for name, one in alone(config, tokenizer).items()}
    known = {name: n for name, n in found.items() if n is not None}
    return known if len(known) == len(found) else None


def alone(config: DataConfig, tokenizer: str) -> dict[str, DataConfig]:
    """Each source as a corpus of its own."""
    return {
        name: config.model_copy(
            update={"mixture": None, "corpus": source.corpus, "text_key": source.text_key, "tokenizer": tokenizer}
        )
        for name, source in (config.mixture or {}).items()
    }


@contextlib.contextmanager
def _named(name: str) -> Generator[None]:
    """Errors inside say which source they are of."""
    try:
        yield
    except UserError as error:
        place = f"data.mixture.{name}"
        told = str(error).replace("data.corpus", f"{place}.corpus").replace("data.text_key", f"{place}.text_key")
        raise UserError(told if place in told else f"{place}: {told}") from None


def _tokenizer_key(config: DataConfig) -> str:
    """Name of the cache folder of the tokenizer that is trained on a mixture."""
    sources = []
    for name, one in alone(config, config.tokenizer).items():
        with _named(name):
            sources.append([name, open_source(one).fingerprint(), (config.mixture or {})[name].weight])
    parts = [FORMAT_VERSION, "mixture", sources, f"bpe-{parse_tokenizer(config.tokenizer)[1]}", config.validation_share]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _train_tokenizer(config: DataConfig, folder: Path, progress: Progress | None) -> None:
    """Train on text of all sources in proportion to their weights, and write down which text they hold."""
    samples, texts = {}, {}
    for name, one in alone(config, config.tokenizer).items():
        with _named(name):
            wanted = (config.mixture or {})[name].weight * BPE_SAMPLE_BYTES
            source = open_source(one)
            samples[name], texts[name] = sample_training(
                source, config.validation_share, wanted, progress or (lambda *_: None)
            )
    weights = {name: source.weight for name, source in (config.mixture or {}).items()}
    tokenizer = Tokenizer.train(blend(samples, weights, BPE_SAMPLE_BYTES), parse_tokenizer(config.tokenizer)[1])
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tokenizer.save(partial / "tokenizer.json")
    write_json(partial / "texts.json", texts)
    partial.rename(folder)


def blend(samples: Mapping[str, Sequence[str]], weights: Mapping[str, float], most: float) -> Iterator[str]:
    """Documents of all samples, in bytes by the weights, `most` in all or little more.

    It is as long as the sample that lasts longest at its weight; shorter ones are repeated, as training repeats their text.
    """
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in samples.items()}
    total = min(most, max(size / weights[name] for name, size in sizes.items()))
    for name, texts in samples.items():
        taken = 0
        for text in itertools.cycle(texts):
            if taken >= total * weights[name]:
                break
            yield text
            taken += len(text.encode())
