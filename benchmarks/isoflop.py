"""How far off is N* from isoFLOP profiles, by which rule? `python benchmarks/isoflop.py [--sims 200] [--assert]`.

Dense sweeps of five budgets are simulated under a planted law, whose best size has a closed form, with noise on the logarithm of
the loss. N* and its exponent are taken by the lowest run, by an interpolating curve (Akima), by a parabola through all runs of a
budget and by `isoflop`. Recorded are the root mean square of log(N* / truth) and of the exponent's error; how often the 95%
intervals of `isoflop` hold the truth; how many profiles it refuses; and how often it says that the fitted law, which is true,
disagrees.

Designs: sizes within a factor 4 of each budget's best, off centre by up to 1.35; and one set of sizes for all budgets, which cuts
each profile elsewhere, under a law of unequal exponents.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from analysis import ResultsData, fit, laws
from analysis.ensemble import n_processors
from analysis.isoflop import isoflop
from analysis.isoflop_check import check_against
from analysis.vertex import whole_parabola_vertex
from benchmarks.common import environment, format_table, write_result

Array = np.ndarray
BUDGETS = np.geomspace(1e18, 1e22, 5)
NEAR_EQUAL = {"E": 1.82, "A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366}
UNEQUAL = {"E": 1.8, "A": 900.0, "alpha": 0.25, "B": 8000.0, "beta": 0.45}
DESIGNS = {
    "6 sizes around the best": (NEAR_EQUAL, 6),
    "9 sizes around the best": (NEAR_EQUAL, 9),
    "16 sizes at all budgets": (UNEQUAL, 16),
}
NOISES = (0.002, 0.005)
DRAWS = 400
_LOWEST = 0.92


def best_size(truth: dict[str, float], C: Any) -> Any:
    """N* for C = 6 N D, in closed form."""
    a, b = truth["alpha"], truth["beta"]
    return (a * truth["A"] / (b * truth["B"])) ** (1 / (a + b)) * (C / 6) ** (b / (a + b))


def simulate(design: str, noise: float, seed: int) -> ResultsData:
    """One sweep."""
    truth, n = DESIGNS[design]
    rng = np.random.default_rng([seed, 3])
    if "all budgets" in design:
        low, high = best_size(truth, BUDGETS[[0, -1]])
        sizes = np.tile(np.geomspace(low / 5, high * 5, n), (len(BUDGETS), 1))
    else:
        middles = best_size(truth, BUDGETS) * np.exp(rng.uniform(-0.3, 0.3, len(BUDGETS)))
        sizes = middles[:, None] * np.geomspace(0.25, 4, n)
    C, N = np.repeat(BUDGETS, n), sizes.ravel()
    D = C / (6 * N)
    loss = laws.CHINCHILLA.predict(truth, N=N, D=D) * np.exp(rng.normal(0, noise, len(N)))
    return ResultsData.from_arrays(N=N, D=D, C=C, loss=loss)


def one_sweep(design: str, noise: float, seed: int) -> dict[str, Any]:
    """Errors of each rule, and what the intervals hold."""
    truth, data = DESIGNS[design][0], simulate(design, noise, seed)
    found = isoflop(data, n_bootstrap=DRAWS, seed=seed)
    found = check_against(found, data, fit(laws.CHINCHILLA, data, n_bootstrap=0, seed=seed))
    slope = truth["beta"] / (truth["alpha"] + truth["beta"])
    places: dict[str, list[float]] = {"lowest run": [], "Akima": [], "parabola": []}
    for C in BUDGETS:
        own = data.C == C
        x, y = np.log(data.N[own]), np.log(data.loss[own])
        fine = np.linspace(x[0], x[-1], 2001)
        places["lowest run"].append(x[np.argmin(y)])
        places["Akima"].append(fine[np.argmin(Akima1DInterpolator(x, y)(fine))])
        places["parabola"].append(whole_parabola_vertex(x, y))
    errors = {rule: np.array(v) - np.log(best_size(truth, BUDGETS)) for rule, v in places.items()}
    slopes = {rule: np.polyfit(np.log(BUDGETS), v, 1)[0] for rule, v in places.items() if np.all(np.isfinite(v))}
    ok = [p for p in found.profiles if p.is_ok]
    errors["isoflop"] = np.log([(p.value or np.nan) / best_size(truth, p.budget) for p in ok])
    growth = found["N"]
    if growth.value is not None:
        slopes["isoflop"] = growth.value
    return {
        "errors": errors,
        "slopes": {rule: v - slope for rule, v in slopes.items()},
        "vertices": [(p.low or 0.0) <= best_size(truth, p.budget) <= (p.high or 0.0) for p in ok],
        "exponent": None if growth.low is None or growth.high is None else growth.low <= slope <= growth.high,
        "refused": 1 - len(ok) / len(found.profiles),
        "disagree": found.check is not None and found.check.verdict == "disagree",
    }


def measure(design: str, noise: float, n: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """One row."""
    sweeps = list(pool.map(one_sweep, [design] * n, [noise] * n, range(n), chunksize=4))
    row: dict[str, Any] = {"design": design, "noise": f"{100 * noise:g}%"}
    for rule in ("lowest run", "Akima", "parabola", "isoflop"):
        errors = np.concatenate([s["errors"][rule] for s in sweeps])
        row[f"error of N*: {rule}"] = float(np.sqrt(np.nanmean(errors**2)))
    for rule in ("parabola", "isoflop"):
        row[f"of its exponent: {rule}"] = float(
            np.sqrt(np.mean([s["slopes"][rule] ** 2 for s in sweeps if rule in s["slopes"]]))
        )
    row["N* covered"] = float(np.mean([hit for s in sweeps for hit in s["vertices"]]))
    row["exponent covered"] = float(np.mean([s["exponent"] for s in sweeps if s["exponent"] is not None]))
    row["refused"] = float(np.mean([s["refused"] for s in sweeps]))
    row["law wrongly doubted"] = float(np.mean([s["disagree"] for s in sweeps]))
    return row


def main() -> None:
    """Simulate, record, and with --assert hold the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sims", type=int, default=200, help="simulated sweeps a row")
    parser.add_argument("--assert", dest="check", action="store_true", help="fail where an interval covers too rarely")
    args = parser.parse_args()
    with ProcessPoolExecutor(n_processors()) as pool:
        rows = [measure(design, noise, args.sims, pool) for design in DESIGNS for noise in NOISES]
    print(format_table(rows))
    payload = {"environment": environment("cpu"), "sweeps": args.sims, "draws": DRAWS, "rows": rows}
    print(f"-> {write_result('isoflop', payload)}")
    off = [r for r in rows if min(r["N* covered"], r["exponent covered"]) < _LOWEST or r["law wrongly doubted"] > 0.08]
    if args.check and off:
        raise SystemExit("error: off the mark: " + "; ".join(f"{r['design']} {r['noise']}" for r in off))


if __name__ == "__main__":
    main()
