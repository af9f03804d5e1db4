"""What people look at, of a thousand runs: `python benchmarks/report.py [--keep DIR]` times it, `--assert` holds the bounds.

A sweep is planned as a user's is, with real shapes; what its runs would leave is written from planted laws with 0.2% of noise on
the loss, and two tasks of 500 items whose accuracy follows the loss. Then the verbs run in fresh interpreters, imports included.
Bounds on two cores: the report is there within 30 s and no larger than 10 MB. Any warning fails. The baseline beside it is the
same on an eighth of the runs.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, format_table, write_result
from benchmarks.store import finish, stand_in
from dlcm.evaluate import TaskResult
from dlcm.record import write_json
from sweeps.store import load_sweep

BOUND_S, BOUND_MB = 30.0, 10.0
DLCM = {"E": 1.7, "A_t": 60.0, "d1": 0.34, "A_c": 18.0, "g": 0.35, "d2": 0.30, "A_d": 130.0, "a": 0.30}
DENSE = {"E": 1.7, "A": 110.0, "alpha": 0.33, "B": 130.0, "beta": 0.30}
NOISE, ITEMS = 0.002, 500
TASKS = {"first": 4.2, "second": 3.4}
"""Name -> loss at which half of what guessing leaves is right."""


def sweep_of(n_budgets: int, folder: Path) -> dict[str, Any]:
    """A sweep of 125 DLCM runs and six dense ones at each budget, on a text of its own."""
    (folder / "text.txt").write_text("a line of text\n" * 1000)
    return {
        "name": f"planted-{n_budgets}",
        "base": {"data": {"corpus": str(folder / "text.txt"), "tokenizer": "bytes", "seq_len": 256}},
        "axes": {
            "grid": {
                "size": [3e5, 8e5, 2e6, 6e6, 1.6e7],
                "compression_ratio": [2, 3, 4, 6, 8],
                "concept_share": [0.3, 0.4, 0.5, 0.6, 0.7],
            }
        },
        "budgets": {"flops": np.geomspace(1e14, 1e16, n_budgets).tolist()},
        "baseline": {"match": "parameters", "sizes": [3e5, 8e5, 2e6, 6e6, 1.6e7, 3e7]},
    }


def planted_loss(row: Any) -> float:
    """Nats per token of a planned run under the planted laws."""
    N, D = float(row["params_total"] - row["params_embedding"]), float(row["tokens"])
    if row["model"] == "dense":
        k = DENSE
        return k["E"] + k["A"] / N ** k["alpha"] + k["B"] / D ** k["beta"]
    k, concept, R = DLCM, float(row["params_concept"]), float(row["compression_target"])
    return (
        k["E"]
        + k["A_t"] / (N - concept) ** k["d1"]
        + k["A_c"] * R ** k["g"] / concept ** k["d2"]
        + k["A_d"] / D ** k["a"]
    )


def outcome(task: str, loss: float, rng: np.random.Generator) -> TaskResult:
    """Four choices, answered as well as the loss allows."""
    right = rng.random(ITEMS) < 0.25 + 0.7 / (1 + np.exp(2.5 * (loss - TASKS[task])))
    acc, bits = float(right.mean()), np.round(rng.normal(loss / 2, 0.2, ITEMS), 4)
    error = float(np.sqrt(acc * (1 - acc) / (ITEMS - 1)))
    digits = "".join(str(int(r)) for r in right)
    return TaskResult(
        task=task, source="planted", n=ITEMS, n_shot=0, shots=(), n_truncated=0, acc=acc, acc_stderr=error, acc_norm=acc,
        acc_norm_stderr=error, bits_per_byte=float(bits.mean()), bits_per_byte_stderr=float(bits.std() / ITEMS**0.5),
        chance=0.25, constant=0.25, task_hash=task, max_length=256, checkpoint="none", versions={}, correct=digits,
        correct_norm=digits, item_bits_per_byte=" ".join(f"{b:.4g}" for b in bits),
    )  # fmt: skip


def dlcm(*arguments: str) -> float:
    """Wall time of a verb in a fresh interpreter; a warning or an error ends all."""
    start = time.perf_counter()
    code = "from dlcm.cli import main; main()"
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "Warning" in done.stderr:
        sys.exit(f"dlcm {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def plant(n_budgets: int, folder: Path) -> tuple[Path, int]:
    """A sweep folder whose runs all ended, and how many they are."""
    file = folder / "sweep.json"
    file.write_text(json.dumps(sweep_of(n_budgets, folder)))
    # submit prepares the folder; no worker is started, since a scheduler that answers and does nothing is asked
    dlcm("sweep", "submit", str(file), "--cluster", "slurm", "--dir", str(folder / "runs"))
    sweep = folder / "runs" / f"planted-{n_budgets}"
    rng, runs = np.random.default_rng(0), load_sweep(sweep).runs
    for run in runs:
        loss = planted_loss(run.row) * float(np.exp(rng.normal(0, NOISE)))
        finish(run, round(loss, 5))
        for task in TASKS:
            found = {"run_id": run.run_id, **dataclasses.asdict(outcome(task, loss, rng))}
            write_json(run.path / "eval" / f"{task}.json", found)
    return sweep, len(runs)


def measure(n_budgets: int, folder: Path) -> dict[str, Any]:
    """Seconds of each verb and the size of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep, n_runs = plant(n_budgets, folder)
    found: dict[str, Any] = {"runs": n_runs, "collect, s": dlcm("sweep", "collect", str(sweep))}
    found["report, s"] = dlcm("analyze", "report", str(sweep))
    found["report, MB"] = (sweep / "report" / "report.html").stat().st_size / 1e6
    found["all figures, s"] = dlcm("analyze", "plot", str(sweep), "--out", str(folder / "plots"))
    found["table, s"] = dlcm("analyze", "export", str(sweep), "--by", "R,P", "--out", str(folder / "table.tex"))
    return found


def main() -> None:
    """Measure, print, record, and with --assert hold the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assert", dest="hold", action="store_true", help="fail where a bound is missed")
    parser.add_argument("--budgets", type=int, default=8, help="131 runs each")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the large sweep, its report and its figures here"
    )
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        name = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stand_in(name)
        os.environ["MPLBACKEND"] = "agg"
        rows = [measure(1, name / "small"), measure(args.budgets, args.keep or name / "large")]
    rows.append({key: rows[1][key] / rows[0][key] for key in rows[0]})
    rows = [{"": label, **row} for label, row in zip(("baseline", "large", "ratio"), rows)]
    print(format_table(rows))
    if args.budgets == 8:
        print(f"written to {write_result('report_cpu', {'environment': environment('cpu'), 'rows': rows})}")
    large = rows[1]
    if args.hold and (large["report, s"] > BOUND_S or large["report, MB"] > BOUND_MB):
        sys.exit(f"missed: {large['report, s']:.1f} s, {large['report, MB']:.1f} MB")


if __name__ == "__main__":
    main()
