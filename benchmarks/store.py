"""A sweep of ten thousand runs: `python benchmarks/store.py` times submit, status and collect, `--assert` holds the bounds.

Bounds on two cores: submit prepares within 10 s, status answers within 2 s, collect within 10 s. Nothing is trained: run
directories are written as training leaves them. The scheduler is a stand-in that answers at once (scripts named sbatch, squeue,
...), so that the times are ours alone. Each verb runs in a fresh interpreter, imports included, as a person calls it; the
baseline beside it is the same verb on an eightieth of the runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table, write_result
from sweeps.store import StoredRun, load_sweep

BOUNDS = {"submit": 10.0, "status, none begun": 2.0, "status, all ended": 2.0, "collect": 10.0}
GRID = {
    "size": [3e5, 5e5, 1e6, 2e6, 4e6],
    "compression_ratio": [2, 3, 4, 6, 8],
    "concept_share": [0.3, 0.4, 0.5, 0.6, 0.7],
}
_SCRIPTS = {
    "sbatch": "echo Submitted batch job $$",
    "srun": "exit 0",
    "scontrol": "echo MaxArraySize = 1001",
    # Every task of every array that is asked for is waiting.
    "squeue": 'jobs=$(echo "$@" | grep -o "jobs=[0-9,]*")\n'
    'for j in $(echo ${jobs#jobs=} | tr , " "); do seq -f "${j}_%g|PENDING" 0 1000; done',
    "sacct": "exit 1",
}


def sweep_of(n_seeds: int, folder: Path) -> dict[str, Any]:
    """A sweep of 125 runs for each seed, on a text of its own."""
    (folder / "text.txt").write_text("a line of text\n" * 1000)
    return {
        "name": "large",
        "base": {"data": {"corpus": str(folder / "text.txt"), "tokenizer": "bytes", "seq_len": 256}},
        "axes": {"grid": {**GRID, "seed": list(range(n_seeds))}},
        "budgets": {"flops": [1e14]},
        "cluster": {"partition": "gpu", "gpus": 1},
    }


def stand_in(folder: Path) -> None:
    """Put a scheduler that answers at once first on PATH."""
    place = folder / "bin"
    place.mkdir()
    for name, script in _SCRIPTS.items():
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o755)
    os.environ["PATH"] = f"{place}{os.pathsep}{os.environ['PATH']}"


def finish(run: StoredRun, loss: float = 4.0) -> None:
    """What training leaves of a run that ends at this loss in nats, with a short metrics log."""
    config = run.config
    run.path.mkdir(exist_ok=True)
    facts = {"schema": 1, "run_id": run.run_id}
    row = run.row
    ratio = float(row["compression_target"])
    groups = {name: int(row[f"params_{name}"]) for name in ("total", "embedding", "token", "concept")}
    result = {
        "status": "finished", "step": run.n_steps, "tokens": run.tokens, "loss_nats": loss, "bits_per_byte": loss / 2,
        "tokens_per_concept": ratio, "tokens_per_concept_train": ratio, "tokens_per_concept_uncalibrated": ratio, "epochs": 1.0,
        "params": groups, "wall_s": 10.0, "device": "cpu", "reason": None,
    }  # fmt: skip
    beat = {
        "state": "stopped", "phase": "train", "reason": None, "pid": 1, "host": "node", "job_id": "1_1", "submission": 1,
        "deaths": 0, "starts": 1, "step": run.n_steps, "n_steps": run.n_steps, "tokens_per_s": 1e4, "loss_nats": loss,
        "time": 0.0,
    }  # fmt: skip
    (run.path / "result.json").write_text(json.dumps(facts | result))
    (run.path / "status.json").write_text(json.dumps(facts | beat))
    (run.path / "env.json").write_text(json.dumps(facts | {"git_commit": "0" * 40, "git_dirty_hash": None}))
    steps = [max(1, run.n_steps * i // 10) for i in range(1, 11)]
    lines = [
        json.dumps({"step": step, "loss_nats": loss, "lr": 1e-3, "tokens": step * config.train.batch_tokens})
        for step in steps
    ]
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def seconds(*arguments: str) -> float:
    """Wall time of a verb in a fresh interpreter."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "from dlcm.cli import main; main()", *arguments], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def measure(n_seeds: int) -> dict[str, float]:
    """Seconds of each verb on a sweep of 125 runs for each seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "large.json"
        path.write_text(json.dumps(sweep_of(n_seeds, folder)))
        runs = folder / "runs"
        found = {"submit": seconds("sweep", "submit", str(path), "--cluster", "slurm", "--dir", str(runs))}
        directory = str(runs / "large")
        found["status, none begun"] = seconds("sweep", "status", directory)
        for run in load_sweep(runs / "large").runs:
            finish(run)
        found["status, all ended"] = seconds("sweep", "status", directory)
        found["collect"] = seconds("sweep", "collect", directory)
        return found


def main() -> None:
    """Measure, print, record, and with --assert hold the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assert", dest="hold", action="store_true", help="fail where a bound is missed")
    parser.add_argument("--seeds", type=int, default=80, help="125 runs each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        stand_in(Path(name))
        small, large = measure(1), measure(args.seeds)
    n_small, n_large = 125, 125 * args.seeds
    rows = [
        {
            "verb": verb,
            f"{n_small:,} runs, s": small[verb],
            f"{n_large:,} runs, s": s,
            "ratio": s / small[verb],
            "bound, s": BOUNDS[verb],
        }
        for verb, s in large.items()
    ]
    print(format_table(rows))
    if args.seeds == 80:
        print(f"written to {write_result('store_cpu', {'environment': environment('cpu'), 'rows': rows})}")
    faults = [f"{verb} {s:.1f} s" for verb, s in large.items() if s > BOUNDS[verb]]
    if args.hold and faults:
        sys.exit("missed: " + ", ".join(faults))


if __name__ == "__main__":
    main()
