"""Does the realised R hold at every size, over a whole training? Draws a sweep over sizes and R.

    dlcm sweep submit benchmarks/sweeps/ratio_sizes.yaml
    python benchmarks/ratio_sizes.py runs/ratio_sizes [--assert]

Two figures of each run decide: tokens per concept in training, over the last tenth of the steps, and on the validation set, each
within 2% of the target (`--assert`). The third, uncalibrated, is what R on the validation set would be under a threshold set on
training text: how far off the target other text is to be expected.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table, write_result
from benchmarks.ratio_control import ENDS, FIGURES, TOLERANCE, Style, draw
from dlcm.errors import UserError
from dlcm.record import read_json, read_metrics
from dlcm.train import load_result
from sweeps.store import StoredRun, load_sweep

_LOOKS = (("#0072B2", "o", "-"), ("#D55E00", "s", (0, (4, 1.5))), ("#009E73", "^", (0, (1, 1))))


def read_run(run: StoredRun) -> dict[str, Any]:
    """The figures of a finished run.

    Raises:
        UserError: it has not finished.
    """
    result = load_result(run.path)
    if result.status != "finished":
        raise UserError(f"{run.path}: {result.status}; the figure needs every run finished")
    rows = read_metrics(run.path / "metrics.jsonl")
    target = run.config.model.compression_target
    return {
        "run_id": run.run_id,
        "n_non_embedding": result.params["token"] + result.params["concept"],
        "ratio": target,
        "seed": run.config.seed,
        "steps": result.step,
        "tokens": result.tokens,
        "epochs": result.epochs,
        "log_every": run.config.train.log_every,
        "loss_nats": result.loss_nats,
        "tokens_per_concept_train": result.tokens_per_concept_train,
        "tokens_per_concept_uncalibrated": result.tokens_per_concept_uncalibrated,
        "tokens_per_concept_calibrated": result.tokens_per_concept,
        "boundary_rate": [row["boundary_rate"] for row in rows],
        "code": read_json(run.path / "env.json")["git_commit"],
    }


def deviation(run: dict[str, Any], name: str) -> float:
    """How far a realised R is off its target, as a share."""
    return run[name] / run["ratio"] - 1.0


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a run."""
    return [
        {
            "parameters": run["n_non_embedding"],
            "R": run["ratio"],
            "steps": run["steps"],
            "loss, nats": f"{run['loss_nats']:.3f}",
            **{told: f"{run[name]:.3f} ({100 * deviation(run, name):+z.1f}%)" for name, told in ENDS.items()},
        }
        for run in runs
    ]


def main() -> None:
    """Read, print, store, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="directory of the finished sweep")
    parser.add_argument("--name", default="ratio_sizes", help="name of the result and of the figure")
    parser.add_argument("--assert", dest="must", action="store_true")
    options = parser.parse_args()
    runs = sorted(
        (read_run(run) for run in load_sweep(options.sweep).runs),
        key=lambda run: (run["n_non_embedding"], run["ratio"]),
    )
    sizes = sorted({run["n_non_embedding"] for run in runs})
    styles = {str(n): Style(f"{n / 1e6:.2g}M", *look) for n, look in zip(sizes, _LOOKS)}
    for run in runs:
        run["mode"] = str(run["n_non_embedding"])
    print(format_table(table(runs)))
    about = {"environment": environment("cpu"), "tolerance": TOLERANCE, "rows": table(runs), "runs": runs}
    path, figure = write_result(options.name, about), FIGURES / f"{options.name}.png"
    draw(runs, figure, styles)
    print(f"-> {path} and {figure}")
    decisive = ("tokens_per_concept_train", "tokens_per_concept_calibrated")
    off = [run["run_id"] for run in runs if any(abs(deviation(run, name)) > TOLERANCE for name in decisive)]
    if options.must and off:
        raise SystemExit(f"error: more than {TOLERANCE:.0%} off the target: {', '.join(off)}")


if __name__ == "__main__":
    main()
