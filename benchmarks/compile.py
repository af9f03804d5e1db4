"""Where does torch.compile pay? `python benchmarks/compile.py [--quick] [--precision bf16]`: steps, eager and compiled.

For DLCMs and dense models of some sizes: the median seconds of a step of both kinds, which take turns; the seconds of the first
compiled step with an empty cache, and in a second process that finds what the first one made; and the steps after which a
compiled run ends earlier. `train.compile: auto` (`dlcm/compiling.py`) rests on this: never on a CPU, measured on a GPU.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from typing import Any

import torch

from benchmarks.common import environment, format_table, write_result
from dlcm.config import RunConfig
from dlcm.shards import open_corpus
from dlcm.train import step_seconds
from sweeps.shapes import dense_shape, dlcm_shape

# Sizes, tokens of a window, tokens of a batch, vocabulary; measured steps.
SETTINGS = {
    "cpu": ((3e5, 1e6, 5e6), 256, 2_048, "bpe-1024", 12),
    "cuda": ((1e6, 2e7, 3.5e8), 2_048, 32_768, "bpe-4096", 30),
    "quick": ((1e5,), 128, 512, "bpe-1024", 3),
}


def run_config(kind: str, size: float, setting: str, precision: str) -> RunConfig:
    """A training of this size that is longer than what is measured of it."""
    _, seq_len, batch_tokens, tokenizer, _ = SETTINGS[setting]
    shape = {"kind": "dense", **dense_shape(size)} if kind == "dense" else dlcm_shape(size, 0.5)
    return RunConfig.model_validate(
        {
            "model": {"vocab_size": int(tokenizer.removeprefix("bpe-")), **shape},
            "data": {"corpus": "stdlib", "tokenizer": tokenizer, "seq_len": seq_len},
            "train": {"tokens": 10**10, "batch_tokens": batch_tokens, "precision": precision},
        }
    )


def child(kind: str, size: float, setting: str, precision: str, n_steps: int) -> dict[str, float]:
    """In a process of its own: the first compiled step, then, where asked for, medians of both kinds in turns."""
    config = run_config(kind, size, setting, precision)
    corpus = open_corpus(config.data)
    compiled = step_seconds(config, corpus, compiled=True)
    found = {"first_s": next(compiled)}
    if n_steps:
        eager = step_seconds(config, corpus, compiled=False)
        pairs = list(islice(zip(eager, compiled), n_steps + 2))[2:]
        found |= {
            "eager_s": statistics.median(a for a, _ in pairs),
            "compiled_s": statistics.median(b for _, b in pairs),
        }
    return found


def measure(kind: str, size: float, setting: str, precision: str) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as cache:

        def start(n_steps: int) -> dict[str, float]:
            arguments = [kind, str(size), setting, precision, str(n_steps)]
            command = [sys.executable, "-m", "benchmarks.compile", "--child", *arguments]
            done = subprocess.run(
                command,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            return json.loads(done.stdout.splitlines()[-1])

        cold, warm = start(0), start(SETTINGS[setting][-1])
    gain = warm["eager_s"] - warm["compiled_s"]
    return {
        "model": kind,
        "size": size,
        "eager, ms": 1e3 * warm["eager_s"],
        "compiled, ms": 1e3 * warm["compiled_s"],
        "eager over compiled": warm["eager_s"] / warm["compiled_s"],
        "first step, s": cold["first_s"],
        "first step again, s": warm["first_s"],
        "pays after steps": math.ceil(cold["first_s"] / gain) if gain > 0 else None,
    }


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one tiny size, to try the script")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, size, setting, precision, n_steps = options.child
        print(json.dumps(child(kind, float(size), setting, precision, int(n_steps))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = "quick" if options.quick else device
    open_corpus(run_config("dense", 1e5, setting, options.precision).data)
    rows = [
        measure(kind, size, setting, options.precision) for size in SETTINGS[setting][0] for kind in ("dlcm", "dense")
    ]
    print(format_table(rows))
    about = {"environment": environment(device), "precision": options.precision, "threads": torch.get_num_threads()}
    print(f"-> {write_result(f'compile_{setting}', {**about, 'rows': rows})}")


if __name__ == "__main__":
    main()
