"""How far do losses of one design scatter between seeds? `python benchmarks/seed_noise.py [--seeds 6] [--dir FOLDER]`

The noise that expected intervals are simulated with is the standard deviation of log loss from run to run. Here it is measured on
the demo's proxies: one DLCM at two ratios and the dense model of its size, each under several seeds at the demo's larger budget.
A run into --dir continues where it stopped.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.common import environment, format_table, write_result
from sweeps import Sweep, collect, launch, plan


def sweep_of(n_seeds: int) -> Sweep:
    """The demo's base at one size and share, over ratios and seeds."""
    demo = Sweep.from_yaml(Path(__file__).parents[1] / "sweeps" / "recipes" / "demo.yaml")
    grid = {"size": [4e5], "concept_share": [0.5], "compression_ratio": [2, 4], "seed": list(range(n_seeds))}
    data = {"name": "seed_noise", "base": demo.base, "axes": {"grid": grid}, "budgets": {"flops": [6e11]}}
    return Sweep.from_dict({**data, "baseline": {"match": "parameters"}})


def main() -> None:
    """Train, collect, and give the scatter of each design with the error that so few seeds leave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--dir", type=Path, default=None, help="keeps the runs; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.dir or Path(scratch)) / "seed_noise"
        launch(plan(sweep_of(args.seeds)), folder, cluster="debug")
        frame = pd.DataFrame(collect(folder))
    rows = []
    for (model, ratio), group in frame[frame["status"] == "finished"].groupby(["model", "compression_target"]):
        logs = np.log(group["loss_nats"].to_numpy(float))
        n = len(logs)
        rows.append(
            {
                "model": model,
                "R": float(ratio),
                "params": int(group["params_total"].iloc[0]),
                "tokens": int(group["tokens"].iloc[0]),
                "seeds": n,
                "mean_loss_nats": float(group["loss_nats"].mean()),
                "sd_log_loss": float(logs.std(ddof=1)),
                # Of a standard deviation from n normal draws: 1 / sqrt(2 (n - 1)) of itself.
                "sd_error": float(logs.std(ddof=1) / np.sqrt(2 * (n - 1))),
            }
        )
    print(format_table(rows))
    print(f"written: {write_result('seed_noise', {'environment': environment('cpu'), 'rows': rows})}")


if __name__ == "__main__":
    main()
