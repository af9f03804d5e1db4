"""How fast text becomes batches: `python benchmarks/data.py` tokenizes and shards a corpus, and times the drawing of batches.

tokenizing   the whole build of an empty cache with a BPE that is trained already: reading, hashing, encoding, writing, in MB of
             UTF-8 text a second, and how many processors it kept busy. The baseline is `encode_batch_fast` of the `tokenizers`
             library on the beginning of the same text with all processors, in the same run; the ids must be the same.
loader       the drawing of the batches of a training, as a share of its steps, for proxies of some sizes.

python benchmarks/data.py --corpus some/folder --assert       fails below 20 MB/s, or with a loader above 1% of a step
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.common import environment, format_table, write_result
from dlcm import build
from dlcm.config import DataConfig, RunConfig
from dlcm.corpus import open_source
from dlcm.shards import Corpus, open_corpus
from dlcm.train import step_seconds
from sweeps.shapes import dlcm_shape

LEAST_MB_PER_S, MOST_LOADER_SHARE = 20.0, 0.01


def tokenizing(config: DataConfig, sample_mb: float) -> dict[str, Any]:
    """Rates of a whole build, and of the encoding alone against the library's, on the first `sample_mb` of text."""
    trained = open_corpus(config)
    path = trained.folder / "tokenizer.json"
    texts, size = [], 0
    for text in open_source(config).documents():
        texts.append(text)
        size += len(text.encode())
        if size > sample_mb * 1e6:
            break
    groups = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    assert trained.tokenizer.backend is not None
    started = measured()
    theirs = [trained.tokenizer.backend.encode_batch_fast(group, add_special_tokens=False) for group in groups]
    library_s, library_cpu_s = measured() - started
    started = measured()
    ours = [trained.tokenizer.encode_batch(group) for group in groups]
    _, encoding_cpu_s = measured() - started
    same = all(np.array_equal(a, b.ids) for mine, found in zip(ours, theirs) for a, b in zip(mine, found, strict=True))
    if not same:
        raise SystemExit("error: the ids are not those of the library")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"DLCM_CACHE": folder}):
        started = measured()
        built = open_corpus(config.model_copy(update={"tokenizer": str(path)}))
        build_s, build_cpu_s = measured() - started
        total = built.train.n_bytes + built.validation.n_bytes
    build_rate, library_rate = total / build_s / 1e6, size / library_s / 1e6
    return {
        "text MB": total / 1e6,
        "build MB/s": build_rate,
        "processors busy": build_cpu_s / build_s,
        "build MB/CPU s": total / build_cpu_s / 1e6,
        "library MB/s": library_rate,
        "library MB/CPU s": size / library_cpu_s / 1e6,
        "build over library": build_rate / library_rate,
        "encoding over library, CPU": library_cpu_s / encoding_cpu_s,
    }


def measured() -> np.ndarray:
    """Seconds on the clock, and of the processors: of this process and of those that it has waited for."""
    spent = os.times()
    return np.array([time.perf_counter(), spent.user + spent.system + spent.children_user + spent.children_system])


def loader(corpus: Corpus, config: DataConfig, size: float, batch_tokens: int, n_steps: int) -> dict[str, Any]:
    """Median seconds of drawing a batch, over those of a step."""
    model = {"vocab_size": corpus.tokenizer.vocab_size, **dlcm_shape(size, 0.5)}
    train = {"tokens": 10**12, "batch_tokens": batch_tokens}
    run = RunConfig.model_validate({"model": model, "data": config.model_dump(), "train": train})
    steps = statistics.median(list(islice(step_seconds(run, corpus), n_steps + 2))[2:])
    drawn = []
    for step in range(200):
        started = time.perf_counter()
        corpus.train.batch(step, seed=0, batch_tokens=batch_tokens, seq_len=config.seq_len)
        drawn.append(time.perf_counter() - started)
    draw = statistics.median(drawn)
    return {"size": size, "step ms": 1e3 * steps, "draw ms": 1e3 * draw, "share": draw / steps}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus", nargs="+", default=["stdlib"], help="as data.corpus; several are measured one by one"
    )
    parser.add_argument("--tokenizer", default="bpe-4096")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--sample-mb", type=float, default=15.0)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 5e6])
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--name", default="data_cpu")
    parser.add_argument("--assert", dest="must", action="store_true")
    options = parser.parse_args()
    rates, shares = [], []
    for name in options.corpus:
        config = DataConfig(corpus=name, tokenizer=options.tokenizer, text_key=options.text_key)
        rates.append({"corpus": Path(name).name, **tokenizing(config, options.sample_mb)})
    print(format_table(rates))
    config = DataConfig(corpus=options.corpus[0], tokenizer=options.tokenizer, text_key=options.text_key)
    corpus = open_corpus(config)
    shares = [loader(corpus, config, size, options.batch_tokens, options.steps) for size in options.sizes]
    print(format_table(shares))
    found = {
        "environment": environment("cpu"),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "journal_bytes": build.JOURNAL_BYTES,
        "tokenizing": rates,
        "loader": shares,
    }
    print(f"-> {write_result(options.name, found)}")
    slow = [row["corpus"] for row in rates if row["build MB/s"] < LEAST_MB_PER_S]
    heavy = [row["size"] for row in shares if row["share"] > MOST_LOADER_SHARE]
    if options.must and (slow or heavy):
        raise SystemExit(f"error: below {LEAST_MB_PER_S:g} MB/s: {slow}; loader above {MOST_LOADER_SHARE:.0%}: {heavy}")


if __name__ == "__main__":
    main()
