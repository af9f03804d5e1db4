"""Planning and counting against their bounds: `python benchmarks/plan.py` prints and records, `--assert` holds the bounds.

- Ten thousand runs are planned, in two sweeps: few models with many seeds, and few seeds at many budgets. CPU time and peak
  memory of a fresh interpreter each, no shape in a cache. Bounds: 2 s, 500 MB.
- FLOPs of the models of such a sweep: `count_many` on all at once and `count` one by one, beside what one would do without a
  closed form: the model instantiated on the meta device and one forward pass under torch's counter. Bound: 20,000 a second.
- `dlcm --help`, a fresh interpreter, best of five. Bound: 0.5 s.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.common import environment, format_table, write_result
from dlcm.config import ModelConfig
from flops import count, count_many
from flops.measure import count_with_torch
from sweeps.shapes import dlcm_shape

PLAN_SECONDS, PLAN_MEGABYTES, CONFIGS_PER_SECOND, HELP_SECONDS = 2.0, 500.0, 20_000.0, 0.5
GRID = {
    "size": [3e5, 5e5, 1e6, 2e6, 4e6],
    "compression_ratio": [2, 3, 4, 6, 8],
    "concept_share": [0.3, 0.4, 0.5, 0.6, 0.7],
}
SWEEPS = {
    "80 seeds": {"axes": {"grid": {**GRID, "seed": list(range(80))}}, "budgets": {"flops": [1e14]}},
    "5 budgets, 16 seeds": {
        "axes": {"grid": {**GRID, "seed": list(range(16))}},
        "budgets": {"flops": [1e14, 2e14, 4e14, 8e14, 1.6e15]},
    },
}
_PLAN = r"""
import json, re, sys, time
from sweeps import Sweep, plan
sweep = Sweep.from_dict({"name": "large", **json.loads(sys.argv[1])})
start = time.process_time()
made = plan(sweep)
seconds = time.process_time() - start
# VmHWM: `ru_maxrss` would be that of the parent, which has torch, where it is larger.
peak = int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024 / 1e6
print(json.dumps({"runs": len(made), "cpu_s": seconds, "peak_mb": peak}))
"""


def plan_row(name: str) -> dict[str, float | str]:
    """CPU seconds and peak megabytes (of the whole interpreter) of planning a sweep of ten thousand runs."""
    command = [sys.executable, "-c", _PLAN, json.dumps(SWEEPS[name])]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"sweep": name, **json.loads(told)}


def models(n: int) -> list[ModelConfig]:
    """`n` DLCMs of the grid's sizes and shares, of different vocabularies, so that no two are equal."""
    shapes = [dlcm_shape(size, share) for size in GRID["size"] for share in GRID["concept_share"]]
    return [ModelConfig(kind="dlcm", vocab_size=1024 + i, **shapes[i % len(shapes)]) for i in range(n)]


def count_rows(repeats: int) -> list[dict[str, float | str]]:
    """Configs a second of three ways of counting, the median of interleaved repeats, and their ratio to instantiating."""
    many, some, few = models(10_000), models(1_000), models(10)
    ways: dict[str, tuple[Sequence[ModelConfig], Callable[[], object]]] = {
        "count_many, 10,000 at once": (many, lambda: count_many(many, 1024)),
        "count, one by one": (some, lambda: [count(config, 1024) for config in some]),
        "model on meta, torch's counter": (few, lambda: [count_with_torch(config, 1024) for config in few]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (_, function) in ways.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: len(configs) / sorted(seconds[name])[repeats // 2] for name, (configs, _) in ways.items()}
    slowest = rates["model on meta, torch's counter"]
    return [{"way": name, "configs/s": rate, "ratio": rate / slowest} for name, rate in rates.items()]


def seconds_of_help() -> float:
    """Wall time of `dlcm --help` in a fresh interpreter, best of five."""
    command = [sys.executable, "-c", "from dlcm.cli import main; main()", "--help"]
    found = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Measure, print, record, and with --assert hold the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assert", dest="hold", action="store_true", help="fail where a bound is missed")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    planned = [plan_row(name) for name in SWEEPS]
    counted = count_rows(args.repeats)
    help_s = seconds_of_help()
    print(format_table(planned), format_table(counted), f"dlcm --help: {help_s:.2f} s", sep="\n\n")
    payload = {"environment": environment("cpu"), "plan": planned, "count": counted, "help_s": help_s}
    print(f"written to {write_result('plan_cpu', payload)}")
    if args.hold:
        faults = [f"{row['sweep']}: {row['cpu_s']:.2f} s" for row in planned if float(row["cpu_s"]) > PLAN_SECONDS]
        faults += [
            f"{row['sweep']}: {row['peak_mb']:.0f} MB" for row in planned if float(row["peak_mb"]) > PLAN_MEGABYTES
        ]
        if float(counted[0]["configs/s"]) < CONFIGS_PER_SECOND:
            faults.append(f"count_many: {counted[0]['configs/s']:.0f} configs/s")
        if help_s > HELP_SECONDS:
            faults.append(f"dlcm --help: {help_s:.2f} s")
        if faults:
            sys.exit("missed: " + ", ".join(faults))


if __name__ == "__main__":
    main()
