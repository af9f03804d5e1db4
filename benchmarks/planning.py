"""How fast the command answers and a thousand runs are planned: `python benchmarks/planning.py` asserts and records it.

Limits: `dlcm --help` within 0.5 s (best of five, a fresh interpreter each), 1,000 runs planned within 1 s of CPU time.
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from sweeps import Sweep, plan

HELP_SECONDS, PLAN_SECONDS = 0.5, 1.0
RESULT = Path(__file__).parent / "results" / "planning.json"


def seconds_of_help() -> float:
    """Wall time of `dlcm --help` in a fresh interpreter."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", "from dlcm.cli import main; main()", "--help"], check=True, capture_output=True
    )
    return time.perf_counter() - start


def seconds_of_plan() -> tuple[int, float]:
    """Number of runs, and CPU time of planning them with no shape in the cache."""
    grid = {
        "size": [3e5, 5e5, 1e6, 2e6, 4e6],
        "compression_ratio": [2, 3, 4, 6, 8],
        "concept_share": [0.3, 0.4, 0.5, 0.6, 0.7],
        "seed": list(range(8)),
    }
    sweep = Sweep.from_dict({"name": "thousand", "axes": {"grid": grid}, "budgets": {"flops": [1e14]}})
    start = time.process_time()
    return len(plan(sweep)), time.process_time() - start


def main() -> None:
    """Measure, record, then assert."""
    n_runs, plan_s = seconds_of_plan()
    help_s = min(seconds_of_help() for _ in range(5))
    result = {
        "help_s": round(help_s, 3),
        "help_limit_s": HELP_SECONDS,
        "plan_runs": n_runs,
        "plan_cpu_s": round(plan_s, 3),
        "plan_limit_s": PLAN_SECONDS,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    assert help_s < HELP_SECONDS, f"dlcm --help took {help_s:.2f} s"
    assert plan_s < PLAN_SECONDS, f"planning {n_runs} runs took {plan_s:.2f} s"


if __name__ == "__main__":
    main()
