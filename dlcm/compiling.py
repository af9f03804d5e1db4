"""Whether a run compiles its stacks: as the config says, or, with `auto`, where a measurement says that it pays.

On a CPU `auto` never compiles: a DLCM's step is no faster there, the compilation takes most of a minute, and a run must be the
same bits whatever a clock says. On a GPU the first run of a shape measures a few steps of both kinds and leaves the figures in
`$DLCM_CACHE/compile/`, where the next runs of that shape find them. A run that goes on keeps the choice it began with.

What the compiler makes is kept in `$DLCM_CACHE/inductor` (or `TORCHINDUCTOR_CACHE_DIR`), so that of the runs of one shape only
the first one waits for it, on whatever machine of a cluster they run.
"""

import contextlib
import hashlib
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dlcm.attention import check_compilable
from dlcm.backends import varlen
from dlcm.config import SCHEMA_VERSION, RunConfig, canonical_json
from dlcm.errors import UserError
from dlcm.record import read_json, write_json
from dlcm.shards import cache_root

# Steps of either kind that are measured; the first compiled one is the compilation.
N_MEASURED = 8
# Compiling is not worth a try where a whole run takes less than this: it takes about a minute by itself.
SHORTEST_RUN_S = 120.0

Measure = Callable[[bool, int], Sequence[float]]
"""(compiled, number of steps) -> seconds of each, from the first one on."""


@dataclass(frozen=True)
class CompileFigures:
    """Seconds of a step of one shape on one device.

    Attributes:
        eager_s: uncompiled.
        compiled_s: compiled; infinite where it was not measured.
        compilation_s: of the first compiled step, less one of the others.
    """

    eager_s: float
    compiled_s: float
    compilation_s: float

    def pays(self, n_steps: int) -> bool:
        """Whether a run of so many steps ends earlier compiled, its compilation included."""
        return n_steps * (self.eager_s - self.compiled_s) > self.compilation_s


def choose_compile(
    config: RunConfig,
    run_dir: Path,
    device: str,
    device_name: str,
    measure: Measure,
    agree: Callable[[Any], Any] = lambda mine: mine,
    n_ranks: int = 1,
) -> bool:
    """Whether to compile; measures where `auto` needs it and nothing is known.

    Args:
        config: the run, with the micro-batch that it will have.
        run_dir: its directory: what `env.json` there says of an earlier start is kept.
        device: `cpu` or `cuda`.
        device_name: of the device, as its figures are filed under.
        measure: takes steps of this run that leave nothing behind.
        agree: gives what rank 0 has, on all ranks: they must measure together or not at all.
        n_ranks: processes that share the batch.

    Raises:
        UserError: `compile: true` with an attention backend that cannot be compiled.
    """
    asked = config.train.compile
    if asked != "auto":
        return asked
    if device == "cpu" or not _is_compilable(config, device):
        return False
    begun = run_dir / "env.json"
    before = agree(read_json(begun).get("compiled") if begun.exists() else None)
    if before is not None:
        return bool(before)
    path = cache_root() / "compile" / f"{_shape(config, device_name, n_ranks)}.json"
    return compile_figures(config, path, device_name, measure, agree).pays(config.n_steps)


def compile_figures(
    config: RunConfig, path: Path, device_name: str, measure: Measure, agree: Callable[[Any], Any]
) -> CompileFigures:
    """Figures of the shape of a run, read from a file or measured; a run too short for a try is measured uncompiled alone."""
    if (known := agree(_known(path))) is not None:
        return known
    eager_s = agree(statistics.median(measure(False, N_MEASURED)[1:]))
    if eager_s * config.n_steps < SHORTEST_RUN_S:
        return CompileFigures(eager_s, float("inf"), 0.0)  # says nothing about longer runs: not kept
    keep_compiled()
    first, *others = measure(True, N_MEASURED)
    compiled_s = statistics.median(others)
    found = agree(CompileFigures(eager_s, compiled_s, max(first - compiled_s, 0.0)))
    with contextlib.suppress(OSError):  # a cache: a run goes on where it cannot be written
        write_json(path, {"schema": SCHEMA_VERSION, "device": device_name, "torch": torch.__version__, **asdict(found)})
    return found


def _known(path: Path) -> CompileFigures | None:
    try:
        record = read_json(path)
        return CompileFigures(**{name: float(record[name]) for name in CompileFigures.__annotations__})
    except (UserError, KeyError, ValueError, TypeError):
        return None  # a cache: what is absent or cannot be read is measured


def keep_compiled() -> None:
    """Let the compiler keep what it makes where other processes, and machines that share `$DLCM_CACHE`, find it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))


def _is_compilable(config: RunConfig, device: str) -> bool:
    """Whether the compiled graph has kernels for this run on a GPU: its attention is that of flash, in half precision alone."""
    try:
        check_compilable(config.model.attention_backend)
        varlen.check(torch.bfloat16 if config.train.is_bf16(device) else torch.float32, config.model.d_head)
    except UserError:
        return False
    return True


def _shape(config: RunConfig, device_name: str, n_ranks: int) -> str:
    """Hash of what the time of a step depends on."""
    train = config.train
    parts = [
        config.model.model_dump(mode="json"),
        config.data.seq_len,
        train.batch_tokens,
        train.micro_batch_tokens,
        train.precision,
        train.parallel,
        train.activation_checkpointing,
        n_ranks,
        device_name,
        torch.__version__,
    ]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:20]
