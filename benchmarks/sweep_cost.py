"""What shared trunks save: `python benchmarks/sweep_cost.py` runs one sweep of 3 sizes and 4 token budgets with and without them.

Both sweeps are planned, submitted to worker processes and collected as any other. The baseline is the same sweep with a warm-up
of the same length given as a share of each run, so that its runs cannot share; the learning rates of its steps differ in the
warm-up of the shorter runs alone. Times are wall seconds of the runs as their results have them, validation included, and the
seconds from the submit to the end of the last run; both sweeps have the machine for themselves, one after the other.

    python benchmarks/sweep_cost.py --assert      fails below 1.8 times less
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import environment, format_table, write_result
from sweeps import Sweep, plan
from sweeps.collect import collect
from sweeps.launch import launch
from sweeps.watch import take_snapshot

WARMUP_TOKENS = 16_384
LEAST = 1.8


def sweep(shared: bool, tokens: list[int], sizes: list[str], workers: int) -> Sweep:
    """The sweep; with a warm-up in tokens its runs can share trunks."""
    optim: dict[str, Any] = {"lr_token": 1e-2, "lr_concept": 1e-2}
    base: dict[str, Any] = {
        "data": {"corpus": "stdlib", "tokenizer": "bpe-1024", "seq_len": 256, "validation_tokens": 16_384},
        "train": {"batch_tokens": 1024},
        "compression_ratio": 4,
        "concept_share": 0.5,
    }
    if shared:
        optim["warmup_tokens"] = WARMUP_TOKENS
    else:
        optim["warmup_share"] = WARMUP_TOKENS / max(tokens)
    return Sweep.from_dict(
        {
            "name": "shared" if shared else "alone",
            "base": {**base, "optim": optim},
            "axes": {"grid": {"size": sizes}},
            "budgets": {"tokens": tokens},
            "cluster": {"concurrency": workers, "threads": 1},
        }
    )


def measure(spec: Sweep, folder: Path) -> dict[str, Any]:
    """Submit a sweep to local workers, wait, collect."""
    started = time.perf_counter()
    launch(plan(spec), folder, "local")
    while not take_snapshot(folder).is_over:
        time.sleep(0.2)
    elapsed = time.perf_counter() - started
    frame: pd.DataFrame = collect(folder)
    if not (frame["status"] == "finished").all():
        raise SystemExit(f"error: {folder}: not all runs finished")
    return {
        "runs": len(frame),
        "branches": int((frame["tokens_shared"] > 0).sum()),
        "flops": float(frame["flops_train_marginal"].sum()),
        "run_seconds": float(frame["wall_s"].sum()),
        "elapsed_seconds": elapsed,
        "loss_nats": frame["loss_nats"].round(4).tolist(),
    }


def main() -> None:
    """Run both, print and store the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[262_144, 393_216, 524_288, 655_360])
    parser.add_argument("--sizes", nargs="+", default=["0.1M", "0.2M", "0.4M"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="sweep_cost_cpu")
    parser.add_argument("--assert", dest="must", action="store_true", help=f"fail below {LEAST} times less")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: measure(sweep(name == "shared", options.tokens, options.sizes, options.workers), Path(folder) / name)
            for name in ("alone", "shared")
        }
    columns = {"flops": "training FLOPs", "run_seconds": "run seconds", "elapsed_seconds": "elapsed seconds"}
    ratios = {key: found["alone"][key] / found["shared"][key] for key in columns}
    rows = [
        {"": told, **{name: found[name][key] for name in found}, "times less": ratios[key]}
        for key, told in columns.items()
    ]
    print(format_table(rows))
    path = write_result(
        options.name, {"environment": environment("cpu"), "options": vars(options), **found, "less": ratios}
    )
    print(f"-> {path}")
    if options.must and min(ratios.values()) < LEAST:
        raise SystemExit(f"error: {min(ratios.values()):.2f} times less, {LEAST} wanted")


if __name__ == "__main__":
    main()
