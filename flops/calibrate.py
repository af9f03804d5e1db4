"""Measures how fast this device trains: real steps of a few models, and its best matrix product.

Steps are those of `dlcm.train` (draws of the batch, forward, losses, backward, clipping, AdamW, ratio controller), on random ids
in documents of log-normal length, so that no corpus is needed.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from dlcm.config import RunConfig
from dlcm.errors import UserError
from dlcm.provenance import describe_environment, processor_name
from dlcm.shards import Corpus, Split
from dlcm.tokens import Tokenizer
from dlcm.train import step_seconds
from flops.calibration import Calibration, Point
from flops.count import count, parameters
from flops.hardware import computed_flops
from flops.memory import largest_micro_batch

Progress = Callable[[str, float, float | None, str], None]
"""Called with what is measured, seconds gone, seconds in all, and a note."""

# Steps before the clock runs: first allocations, AdamW's moments, the controller's start; compilation where there is any.
_WARM_UP, _FEWEST = 2, 3
_PEAK_SHARE = 0.1
# To judge beforehand whether a step is short enough: a share of the peak that any model reaches.
_SLOW = 0.1
_LARGEST_ID = 2**15


def calibrate(configs: Sequence[RunConfig], *, seconds: float = 30.0, progress: Progress | None = None) -> Calibration:
    """Measure this device: the GPU if there is one, else the processor with torch's present number of threads.

    The time is shared equally. A model whose micro-batch is too large for the device, or takes longer than its share, is measured
    with fewer windows, or, where even one is too much, left out.

    Args:
        configs: runs, one for each model to measure; of equal models the first counts.
        seconds: about how long.
        progress: told what is measured.

    Raises:
        UserError: no model could be measured, or `seconds` is not positive.
    """
    if not seconds > 0:
        raise UserError(f"seconds = {seconds:g} leaves no time to measure; give 30")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()

    def report(note: str) -> None:
        if progress is not None:
            progress("measuring", min(time.perf_counter() - began, seconds), seconds, note)

    report("matrix products")
    peak, memory_bytes = matmul_peak(device, _PEAK_SHARE * seconds), _memory_bytes(device)
    chosen = list({config.model: config for config in reversed(configs)}.values())[::-1]
    points, left_out = [], []
    for i, config in enumerate(chosen):
        gone = time.perf_counter() - began
        share = max(seconds - gone, 0.1 * seconds) / (len(chosen) - i)
        n = parameters(config.model).non_embedding
        small = _measurable(config, device, peak, memory_bytes, share)
        if small is None:
            left_out.append(n)
        else:
            points.append(_measure(small, share, device, lambda n=n: report(f"steps of {n:,} parameters")))
    if not points:
        raise UserError(
            f"none of {len(chosen)} models could be measured in {seconds:g} s on this device; the smallest has "
            f"{min(left_out):,} parameters: give a smaller one, or a longer --seconds"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    environment = describe_environment(name, torch.get_num_threads())
    return Calibration(
        device=name,
        device_type=device.type,
        threads=torch.get_num_threads(),
        peak_flops=peak,
        memory_bytes=memory_bytes,
        points=tuple(sorted(points, key=lambda point: point.flops_per_token)),
        left_out=tuple(left_out),
        versions=environment["versions"],
        git_commit=environment["git_commit"],
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def matmul_peak(device: torch.device, seconds: float) -> float:
    """FLOP/s of the best of repeated square matrix products, 2·n³ each: bf16 on a GPU, fp32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = float("inf"), time.perf_counter() + seconds
    for i in itertools.count():
        wait()
        began = time.perf_counter()
        torch.matmul(a, b)
        wait()
        now = time.perf_counter()
        best = min(best, now - began)
        if i >= _FEWEST and now >= end:
            break
    return 2.0 * n**3 / best


def _measurable(
    config: RunConfig, device: torch.device, peak: float, memory_bytes: int, share: float
) -> RunConfig | None:
    """The run as it is measured: long, of at most two micro-batches a step, and small enough for memory and time."""
    model, train, seq_len = config.model, config.train, config.data.seq_len
    if model.boundary is not None and model.boundary.detector.startswith("delimiter_"):
        # Random ids have no words. A fixed grid costs as much, and has the R that is counted with.
        boundary = model.boundary.model_copy(update={"detector": "fixed"})
        model = model.model_copy(update={"boundary": boundary})
    bf16 = train.is_bf16(device.type)
    asked = train.micro_batch_tokens or train.batch_tokens
    most = largest_micro_batch(model, asked, seq_len, memory_bytes, bf16=bf16, gpu=device.type == "cuda")
    in_time = share / (_WARM_UP + _FEWEST) * _SLOW * peak / count(model, seq_len).training_per_token
    n_windows = min(asked, most or 0, int(in_time)) // seq_len
    if n_windows < 1:
        return None
    micro = n_windows * seq_len
    split = train.batch_tokens > asked and in_time >= 2 * micro
    batch = 2 * micro if split else micro
    update = {"batch_tokens": batch, "micro_batch_tokens": micro, "tokens": 1_000_000 * batch}
    return config.model_copy(update={"model": model, "train": train.model_copy(update=update)})


def _measure(config: RunConfig, share: float, device: torch.device, tick: Callable[[], None]) -> Point:
    end = time.perf_counter() + share
    steps = step_seconds(config, synthetic_corpus(config))
    for _ in range(_WARM_UP):
        tick()
        next(steps)
    times = []
    while len(times) < _FEWEST or time.perf_counter() < end:
        tick()
        times.append(next(steps))
    flops = count(config.model, config.data.seq_len)
    training, _ = computed_flops(config, flops)
    seconds = statistics.median(times)
    return Point(
        flops_per_token=flops.training_per_token,
        params_non_embedding=parameters(config.model).non_embedding,
        micro_batch_tokens=config.train.micro_batch_tokens or config.train.batch_tokens,
        bf16=config.train.is_bf16(device.type),
        seconds_per_step=seconds,
        flop_per_s=training / config.n_steps / seconds,
        n_steps=len(times),
    )


def synthetic_corpus(config: RunConfig, seed: int = 0) -> Corpus:
    """Random ids in documents whose lengths are log-normal, as those of source files are; enough for several batches."""
    rng = np.random.default_rng(seed)
    n_tokens = max(4 * config.train.batch_tokens, 65_536) + 1
    lengths = np.maximum(rng.lognormal(6.5, 1.2, n_tokens // 8 + 1).astype(np.int64), 8)
    starts = np.concatenate([[0], lengths.cumsum()])
    offsets = np.append(starts[starts < n_tokens], n_tokens)
    ids = rng.integers(0, min(config.model.vocab_size, _LARGEST_ID), n_tokens).astype(np.uint16)
    tokenizer = Tokenizer()
    tokenizer.vocab_size = (
        config.model.vocab_size
    )  # nothing is encoded: all that is asked of it is that it fits the model
    split = Split("synthetic", ids, offsets, n_tokens)
    return Corpus(tokenizer, "synthetic", split, split, Path())


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
