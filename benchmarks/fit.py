"""Speed of fits against the field's usual recipe, run beside it: `python benchmarks/fit.py [--data FILE] [--assert]`.

The usual recipe (Hoffmann et al. 2022, appendix D.3; Besiroglu et al. 2024): 4,500 starts on a grid, each descended by SciPy's
L-BFGS-B on the sum of Huber penalties of the log residuals, and a bootstrap that draws rows with replacement and descends from
the answer. Here it has an analytic gradient and sums instead of means, so that it converges: it is the recipe at its best.
Both sides are judged by one objective, computed apart from either.

`--data` is a CSV with the columns `Model Size`, `Training FLOP` and `loss`, such as the 245 points that Besiroglu et al. read
from the figure of Hoffmann et al.; its five largest losses are left out. Without it 240 points are planted on a like design.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from analysis import ResultsData, fit, laws
from analysis.bootstrap import bootstrap
from analysis.ensemble import n_processors
from analysis.objective import Problem
from analysis.prior import default_prior
from benchmarks.common import environment, format_table, write_result

Array = np.ndarray
DELTA = 1e-3
GRID = (
    np.arange(0.0, 26.0, 5.0),  # log A
    np.arange(0.0, 26.0, 5.0),  # log B
    np.arange(-1.0, 1.1, 0.5),  # log E
    np.arange(0.0, 2.1, 0.5),  # alpha
    np.arange(0.0, 2.1, 0.5),  # beta
)
LEAST_RATIO = {"certified fit against 4,500 starts": 20.0, "4,000 refits": 5.0}
MOST_SECONDS = 60.0
_SAME = 1e-9


def load(path: Path | None) -> tuple[ResultsData, str]:
    """The 240 points, and what they are."""
    if path is None:
        rng = np.random.default_rng(0)
        N, D = 10 ** rng.uniform(7.6, 10.2, 240), 10 ** rng.uniform(8.5, 11.5, 240)
        truth = {"E": 1.82, "A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366}
        loss = laws.CHINCHILLA.predict(truth, N=N, D=D) * np.exp(0.004 * rng.standard_t(3, 240))
        return ResultsData.from_arrays(N=N, D=D, loss=loss), "240 planted points"
    frame = pd.read_csv(path)
    N, C, loss = (frame[c].to_numpy(float) for c in ("Model Size", "Training FLOP", "loss"))
    keep = loss < np.sort(loss)[-5]
    # 6 N D is how the authors of these data counted; it is no cost function of this project
    data = ResultsData.from_arrays(N=N[keep], D=(C / (6 * N))[keep], C=C[keep], loss=loss[keep])
    return data, f"{path.name}, {len(data)} points"


class Usual:
    """Sum of Huber penalties of log residuals over theta = (log A, log B, log E, alpha, beta), on rows of the data."""

    def __init__(self, data: ResultsData):
        self.logs = np.log(np.stack([data.N, data.D, data.loss]))

    def objective(self, theta: Array, rows: Array | slice = slice(None)) -> tuple[float, Array]:
        """Over delta squared, with its gradient."""
        log_n, log_d, log_loss = self.logs[:, rows]
        a, b, e, alpha, beta = theta
        parts = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
        top = parts.max(axis=0)
        shares = np.exp(parts - top)
        total = shares.sum(axis=0)
        shares /= total
        residual = top + np.log(total) - log_loss
        size = np.abs(residual)
        value = np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)).sum()
        slope = np.clip(residual, -DELTA, DELTA)
        by_a, by_b, by_e = shares * slope
        gradient = np.array([by_a.sum(), by_b.sum(), by_e.sum(), -(by_a * log_n).sum(), -(by_b * log_d).sum()])
        return float(value) / DELTA**2, gradient / DELTA**2

    def descend(self, start: Array, rows: Array | slice = slice(None)) -> tuple[Array, float]:
        """One L-BFGS-B descent."""
        answer = optimize.minimize(self.objective, start, args=(rows,), jac=True, method="L-BFGS-B")
        return answer.x, float(answer.fun)

    def from_grid(self) -> tuple[Array, float]:
        """The best of 4,500 descents."""
        return min((self.descend(np.array(s)) for s in itertools.product(*GRID)), key=lambda found: found[1])


def timed(function: Any, *arguments: Any, **options: Any) -> tuple[Any, float]:
    """Result and seconds."""
    began = time.perf_counter()
    return function(*arguments, **options), time.perf_counter() - began


def median_fit(data: ResultsData, repeats: int) -> tuple[Any, float]:
    """A certified fit without a bootstrap, and its median seconds."""
    runs = [timed(fit, laws.CHINCHILLA, data, delta=DELTA, n_bootstrap=0, reduce=False) for _ in range(repeats)]
    return runs[0][0], float(np.median([seconds for _, seconds in runs]))


def theta_of(values: dict[str, float]) -> Array:
    """Constants by name as the usual recipe's theta."""
    return np.array([*(np.log([values["A"], values["B"], values["E"]])), values["alpha"], values["beta"]])


def compare_search(usual: Usual, data: ResultsData) -> tuple[dict[str, Any], Any]:
    """A certified fit against the grid of starts."""
    result, ours = median_fit(data, 7)
    (_, reached), theirs = timed(usual.from_grid)
    mine = usual.objective(theta_of(result.values))[0]
    row = {
        "what": "certified fit against 4,500 starts",
        "usual s": theirs,
        "ours s": ours,
        "ratio": theirs / ours,
        "usual objective": reached * DELTA**2,
        "ours objective": mine * DELTA**2,
        "status": str(result.status),
        "not above": mine <= reached * (1 + _SAME),
    }
    return row, result


def compare_refits(usual: Usual, data: ResultsData, result: Any, n: int) -> dict[str, Any]:
    """Bootstrap refits; both from the answer, both with an analytic gradient. Weights differ, their number does not."""
    problem, start = Problem.build(laws.CHINCHILLA, data, "log_huber", DELTA), theta_of(result.values)
    rng = np.random.default_rng(0)

    def by_rows() -> Array:
        return np.array([usual.descend(start, rng.integers(0, len(data), len(data)))[0] for _ in range(n)])

    theirs_found, theirs = timed(by_rows)
    ours_found, ours = timed(
        bootstrap, problem, problem.theta(result.values), data.clusters, n=n, rng=np.random.default_rng(0)
    )
    alphas = theirs_found[:, 3], np.array([problem.values(t)["alpha"] for t in ours_found])
    low_high = [" to ".join(f"{v:.3f}" for v in np.percentile(a, [2.5, 97.5])) for a in alphas]
    return {
        "what": f"{n:,} refits",
        "usual s": theirs,
        "ours s": ours,
        "ratio": theirs / ours,
        "usual alpha 95%": low_high[0],
        "ours alpha 95%": low_high[1],
    }


def time_equation_22(n_runs: int, n_bootstrap: int) -> dict[str, Any]:
    """A whole `fit` of all eleven constants of eq 22, with its checks, profiles and bootstrap."""
    rng = np.random.default_rng(0)
    N, D = 10 ** rng.uniform(7, 10, n_runs), 10 ** rng.uniform(9, 12, n_runs)
    R, P = rng.choice([2.0, 3.0, 4.0, 6.0, 8.0], n_runs), rng.choice([0.3, 0.4, 0.5, 0.6, 0.7], n_runs)
    truth = {**default_prior().values, "t_t": 2e6, "t_c": 3e6, "t_d": 3e8}
    loss = laws.COMPRESSION_AWARE.predict(truth, N=N, D=D, R=R, P=P) * np.exp(rng.normal(0, 0.003, n_runs))
    data = ResultsData.from_arrays(N=N, D=D, R=R, P=P, loss=loss)
    result, seconds = timed(fit, laws.COMPRESSION_AWARE, data, n_bootstrap=n_bootstrap, reduce=False)
    return {
        "what": f"eq 22, {n_runs} runs, {n_bootstrap:,} bootstraps",
        "ours s": seconds,
        "constants": len(result.law.free),
        "status": str(result.status),
    }


def main() -> None:
    """Time, record, and with --assert hold the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CSV of Model Size, Training FLOP, loss")
    parser.add_argument("--assert", dest="check", action="store_true", help="fail where a claim does not hold")
    args = parser.parse_args()
    data, what = load(args.data)
    usual = Usual(data)
    search, result = compare_search(usual, data)
    rows = [search, compare_refits(usual, data, result, 4000), time_equation_22(300, 1000)]
    print(what)
    print(format_table(rows))
    path = write_result(
        "fit_cpu", {"environment": environment("cpu"), "data": what, "processors": n_processors(), "rows": rows}
    )
    print(f"-> {path}")
    if args.check:
        slow = [row["what"] for row in rows if row.get("ratio", np.inf) < LEAST_RATIO.get(row["what"], 0.0)]
        if slow or not search["not above"] or search["status"] != "certified" or rows[2]["ours s"] > MOST_SECONDS:
            raise SystemExit(f"error: a claim does not hold: {slow or rows}")


if __name__ == "__main__":
    main()
