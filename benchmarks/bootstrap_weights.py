"""How strongly must runs be weighted for refits to scatter as new sweeps would? `python benchmarks/bootstrap_weights.py`.

Apart from all that makes a law hard: the noise is so small that the law is linear in its constants, which lie inside their
bounds, and intervals of exponents are those of a linear regression with the design of the sweep. What is left is the bootstrap
itself: how often its intervals hold the truth, by the variance of the weights, the design, and delta over the noise, which makes
the Huber loss one of squares (above 1) or of absolute deviations (below). Beside the coverage stand the variance with which 95%
is covered, between the two nearest that were tried, and the one that `analysis.bootstrap` takes.
"""

import argparse
import dataclasses
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from scipy import stats

from analysis import laws
from analysis.bootstrap import draw_weights, weight_variance
from analysis.ensemble import n_processors, refit_many
from analysis.inputs import prepare
from analysis.intervals import LEVEL, interval
from analysis.objective import Problem
from benchmarks.common import environment, format_table, write_result
from benchmarks.coverage import Case, cases

NOISE = 1e-6
DELTAS = (0.05, 0.3, 3.0)
"""Delta over the noise."""
VARIANCES = (0.5, 0.7, 1.0, 1.4, 2.0)
DESIGNS = ("dense, 27 cells", "dense, 80 cells", "eq 22, 27 cells, tokens vary", "eq 22, 192 cells")
REFITS = 200
_SEED = 7


def one_sweep(case: Case, delta: float, seed: int) -> tuple[float, list[list[bool]]]:
    """The variance of `analysis.bootstrap`, and for each of `VARIANCES` whether the interval of each exponent holds it."""
    rng = np.random.default_rng([_SEED, seed])
    law = case.law if case.law.family == "dense" else laws.get("compression_aware.no_offsets")
    case = dataclasses.replace(case, law=law, truth={k: v for k, v in case.truth.items() if not k.startswith("t_")})
    problem = Problem.build(law, prepare(law, case.simulate(NOISE, rng)), delta=delta * NOISE)
    planted = problem.theta(case.truth)
    theta = refit_many(problem, planted)[0][0]
    exponents = [i for i, p in enumerate(law.free) if p.kind == "exponent"]
    clusters = [str(i) for i in range(len(problem))]
    held = []
    for variance in VARIANCES:
        weights = draw_weights(clusters, REFITS, rng, variance)
        low, high = interval(refit_many(problem, theta, weights=weights)[0][:, exponents])
        held.append(((low <= planted[exponents]) & (planted[exponents] <= high)).tolist())
    return weight_variance(problem, theta, len(problem)), held


def measure(case: Case, delta: float, n: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """One row: coverage over sweeps and exponents under each variance."""
    sweeps = list(pool.map(one_sweep, [case] * n, [delta] * n, range(n), chunksize=4))
    covered = np.mean([held for _, held in sweeps], axis=(0, 2))
    return {
        "design": case.name,
        "delta over noise": delta,
        "sweeps": n,
        **{f"covered at {variance:g}": float(c) for variance, c in zip(VARIANCES, covered)},
        "needed": needed(covered),
        "taken": float(np.mean([taken for taken, _ in sweeps])),
    }


def needed(covered: np.ndarray) -> float | None:
    """The variance at which 95% is covered: widths of intervals go as its root, and the normal quantile as the width."""
    width = np.log(stats.norm.ppf((1 + np.clip(covered, 0, 0.9999)) / 2))
    target = np.log(stats.norm.ppf((1 + LEVEL) / 2))
    if not width[0] <= target <= width[-1]:
        return None
    return float(np.exp(np.interp(target, width, np.log(VARIANCES))))


def main() -> None:
    """Simulate, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sims", type=int, default=200, help="simulated sweeps a row")
    args = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(n_processors()) as pool:
        for case in (case for case in cases() if case.name in DESIGNS):
            for delta in DELTAS:
                rows.append(measure(case, delta, args.sims, pool))
                print(format_table(rows[-1:]), flush=True)
    about = {"environment": environment("cpu"), "noise": NOISE, "refits": REFITS}
    print(f"-> {write_result('bootstrap_weights', {**about, 'rows': rows})}")


if __name__ == "__main__":
    main()
