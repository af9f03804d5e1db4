"""Several ranks and recomputation: tokens a second and peak memory, as ratios to one rank that keeps all.

    python benchmarks/parallel.py [--quick] [--size 350M] [--kind dlcm|dense]

Each rank has a batch of the same size, so an ideal machine has n times the tokens a second with n ranks; `efficiency` is the
share of that. One rank for each GPU, two (gloo) on a CPU; with one GPU recomputation is measured alone. Every way to train is a
job of its own, so that none inherits another's memory; the jobs take turns, `ROUNDS` times, and medians are compared. Peaks are
those of training in torch's allocator, the largest over the ranks, beside the estimate of `flops.memory`.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, format_table, write_result
from benchmarks.step import RATIO, SHARE
from dlcm.config import RunConfig
from dlcm.distributed import joined
from dlcm.memory_fault import is_out_of_memory
from dlcm.train import step_seconds
from flops.calibrate import synthetic_corpus
from flops.hardware import run_memory
from sweeps.shapes import dense_shape, dlcm_shape

ROOT = Path(__file__).parents[1]
ROUNDS, WARM = 3, 3
# Parameters without embeddings, vocabulary, windows of a rank and their length, timed steps of a job.
SETTINGS = {"cpu": (5e6, 4096, 8, 512, 5), "cuda": (3.5e8, 32_768, 8, 2048, 20), "quick": (2e5, 512, 2, 128, 2)}
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9}


def config_of(
    kind: str, size: float, setting: Sequence[float], n_ranks: int, parallel: str, recompute: bool
) -> RunConfig:
    """The run of a job."""
    _, vocab_size, n_windows, seq_len, _ = (int(x) for x in setting)
    shape = {**dense_shape(size), "kind": "dense"} if kind == "dense" else dlcm_shape(size, SHARE)
    model = {**shape, "vocab_size": vocab_size} | ({"boundary": {"compression_ratio": RATIO}} if kind == "dlcm" else {})
    batch = n_windows * seq_len * n_ranks
    train = {"tokens": 1000 * batch, "batch_tokens": batch, "parallel": parallel, "activation_checkpointing": recompute}
    optim = {"lr_token": 1e-5, "lr_concept": 1e-5}
    return RunConfig.model_validate({"model": model, "data": {"seq_len": seq_len}, "train": train, "optim": optim})


def rank_main(job: Path) -> None:
    """Be one rank of a job: time its steps, then its peak, and write both."""
    told = json.loads(job.read_text())
    config = RunConfig.model_validate(told["config"])
    with joined() as ranks:
        found: dict[str, Any] = {}
        try:
            steps = step_seconds(config, synthetic_corpus(config))
            times = list(islice(steps, WARM + told["steps"]))[WARM:]
            found = {"seconds": statistics.median(times), "peak": _peak(config, steps)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = {"out_of_memory": True}
        job.with_suffix(f".{ranks.rank}").write_text(json.dumps(found))


def _peak(config: RunConfig, steps: Any) -> int:
    """Most bytes that this rank's allocator held at once, over all of training so far on a GPU, on a CPU in a run anew."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    steps.close()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in islice(step_seconds(config, synthetic_corpus(config)), 2):
            pass
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def run_job(config: RunConfig, n_ranks: int, steps: int, folder: Path) -> dict[str, Any] | None:
    """Seconds of a step and peak bytes of one job; None where memory did not suffice."""
    job = folder / "job.json"
    job.write_text(json.dumps({"config": config.model_dump(mode="json"), "steps": steps}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(n_ranks):
        ranks = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        told = {**ranks, "MASTER_PORT": port, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
        variables = os.environ | {key: str(value) for key, value in told.items()}
        processes.append(subprocess.Popen([sys.executable, __file__, "--rank-of", str(job)], env=variables, cwd=ROOT))
    codes = [process.wait() for process in processes]
    files = [job.with_suffix(f".{rank}") for rank in range(n_ranks)]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    for file in files:
        file.unlink(missing_ok=True)
    if any(x.get("out_of_memory") for x in found):
        return None
    if any(codes):
        raise SystemExit(f"error: a rank ended with {codes}")
    return {key: max(x[key] for x in found) for key in ("seconds", "peak")}


def measure(kind: str, size: float, setting: Sequence[float], n_rounds: int) -> list[dict[str, Any]]:
    """A row for each way of training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n_devices = torch.cuda.device_count() if device == "cuda" else 2
    ways = [("alone", 1)] + ([("ddp", n_devices), ("fsdp", n_devices)] if n_devices > 1 else [])
    jobs = {
        (mode, recompute): (n, config_of(kind, size, setting, n, "auto" if n == 1 else mode, recompute))
        for mode, n in ways
        for recompute in (False, True)
    }
    found: dict[tuple[str, bool], list[dict[str, Any] | None]] = {name: [] for name in jobs}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n_rounds):
            for name, (n, config) in jobs.items():
                found[name].append(run_job(config, n, int(setting[-1]), Path(folder)))
    rows: list[dict[str, Any]] = []
    for (mode, recompute), (n, config) in jobs.items():
        row: dict[str, Any] = {"mode": mode, "ranks": n, "recomputes": "yes" if recompute else "no"}
        whole = [x for x in found[mode, recompute] if x is not None]
        if len(whole) == n_rounds:
            rate = config.train.batch_tokens / statistics.median(x["seconds"] for x in whole)
            peak = max(x["peak"] for x in whole)
            base = rows[0] if rows else {"tokens/s": rate, "peak MB": peak / 1e6}
            row |= {"tokens/s": rate, "tokens/s ratio": rate / base["tokens/s"] if base.get("tokens/s") else None}
            row |= {"efficiency": None if row["tokens/s ratio"] is None else row["tokens/s ratio"] / n}
            row |= {"peak MB": peak / 1e6, "peak ratio": peak / 1e6 / base["peak MB"] if base.get("peak MB") else None}
        else:
            row["tokens/s"] = "out of memory"
        row["estimated MB"] = replace(run_memory(config, device, n), evaluation=0.0).total / 1e6
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny size and one round, to try the script")
    parser.add_argument("--size", help="parameters without embeddings, such as 1.3B")
    parser.add_argument("--kind", choices=("dlcm", "dense"), default="dlcm")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        rank_main(options.rank_of)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = SETTINGS["quick" if options.quick else device]
    size = setting[0]
    if options.size is not None:
        size = float(options.size.rstrip("".join(UNITS))) * UNITS.get(options.size[-1], 1.0)
    rows = measure(options.kind, size, setting, 1 if options.quick else ROUNDS)
    print(format_table(rows))
    if not options.quick:
        payload = {"environment": environment(device), "kind": options.kind, "size": size, "rows": rows}
        print(f"-> {write_result(f'parallel_{device}', payload)}")


if __name__ == "__main__":
    main()
