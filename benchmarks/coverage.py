"""Do 95% intervals hold the truth 95% of the time? `python benchmarks/coverage.py [--case NAME] [--noise X] [--sims N]`.

A law is planted, its sweep simulated with noise on the logarithm of the loss, and each simulated sweep fitted as a user would
fit it: `fit` with the law that the runs support, its bootstrap, and `optimum` at a budget inside the data. Counted is how often
the interval of each exponent and of N*, R* and P* holds the planted value (for the optimum: where the planted law has its own),
and how often the tool gives the number at all instead of `not identified`.

Beside it stands what the interval promises: the share of its own refits that it holds. That is 95%, but where refits pile up at
an end, on a bound or on the edge of what was searched: there the interval is open to that side, and holds 97.5% or, with both
ends, all.

The seeds are none on which anything was chosen: the weights of the bootstrap were, on simulated sweeps with lower ones. A row
says which it had, and of which commit it is.

Designs: the paper's 27 cells (3 sizes x 3 ratios x 3 shares, one number of tokens), 27 cells whose tokens vary with them (an
orthogonal array, so that the data term can be told), and larger grids; for the dense law 27 and 80 cells.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from scipy import stats

from analysis import ResultsData, fit, laws, optimum
from analysis.cost import Shapes
from analysis.ensemble import n_processors
from analysis.search import Search
from benchmarks.common import RESULTS, environment, format_table, write_result
from dlcm.provenance import source_commit
from dlcm.record import read_json

Array = np.ndarray
VOCABULARY, SEQ_LEN = 32_768, 2048
DENSE = {"E": 1.82, "A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366}
DLCM = {
    "E0": 1.8, "A_t": 250.0, "t_t": 0.0, "d1": 0.34, "A_c": 60.0, "g": 0.35, "t_c": 0.0, "d2": 0.30,
    "A_d": 2000.0, "t_d": 0.0, "a": 0.366,
}  # fmt: skip
SMALL = {"t_t": 3e6, "t_c": 3e6, "t_d": 3e7}
LARGE = {"t_t": 1e7, "t_c": 1e7, "t_d": 1e8}
"""Offsets that the runs cannot tell from 0 and that move exponents nonetheless, and offsets that they can."""
NOISES = (0.003, 0.01)
QUIET = 0.0003
"""Below delta, where the fit is one of least squares."""
REFITS = 400
_MARGIN, _CHANCE = 0.03, 0.02
_SHOWN = 0.5
_FIRST_SEED = 400_000
# Sweeps in which a number is given: fewer say nothing of how often it is right.
_ENOUGH = 20
# The search ends to 1e-4 of its range: nearer than that two numbers are one.
_SAME = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """A design under a planted law.

    Attributes:
        budget: of the optimum that is asked for: training FLOPs, or where `tokens` are given inference FLOPs per token.
        tokens: D, where the design has one value of it, so that no trade between size and tokens can be found.
        noises: standard deviations of the logarithm of the loss.
    """

    name: str
    law: laws.Law
    truth: Mapping[str, float]
    N: Array
    D: Array
    R: Array
    P: Array
    budget: float
    tokens: float | None = None
    noises: tuple[float, ...] = NOISES

    def simulate(self, noise: float, rng: np.random.Generator) -> ResultsData:
        """One simulated sweep."""
        loss = self.law.predict(self.truth, N=self.N, D=self.D, R=self.R, P=self.P)
        loss = loss * np.exp(rng.normal(0, noise, len(self.N)))
        C = _cost()(self.N, self.D, self.R, self.P)
        return ResultsData.from_arrays(N=self.N, D=self.D, R=self.R, P=self.P, C=C, loss=loss)

    @property
    def price(self) -> Any:
        """What the budget counts."""
        return _cost() if self.tokens is None else _shapes().inference()

    def best(self) -> dict[str, float]:
        """N*, R* and P* of the planted law, searched over the ranges of the design."""
        box = {name: (float(v.min()), float(v.max())) for name, v in (("N", self.N), ("R", self.R), ("P", self.P))}
        solve = "D" if self.tokens is None else "N"
        found = Search(self.law, self.price, self.budget, box, solve=solve, tokens=self.tokens).minimise(self.truth)
        names = {"N*": 0} if self.law.family == "dense" else {"N*": 0, "R*": 2, "P*": 3}
        return {name: float(found[i]) for name, i in names.items()}


@functools.cache
def _shapes() -> Shapes:
    return Shapes(VOCABULARY, SEQ_LEN)


@functools.cache
def _cost() -> Any:
    return _shapes().training()


def _grid(*axes: Any) -> list[Array]:
    return [a.ravel() for a in np.meshgrid(*map(np.asarray, axes), indexing="ij")]


def _dense(name: str, sizes: Array, tokens: Array) -> Case:
    N, D = _grid(sizes, tokens)
    return Case(name, laws.CHINCHILLA, DENSE, N, D, np.ones(len(N)), np.zeros(len(N)), 3e20, noises=(QUIET, *NOISES))


def cases() -> list[Case]:
    """All designs."""
    law, one, levels = laws.COMPRESSION_AWARE, np.ones(27), np.arange(3)
    i, j, k = _grid(levels, levels, levels)
    R, P = np.array([2.0, 4.0, 8.0]), np.array([0.3, 0.5, 0.7])
    wide, sizes = np.array([0.3, 0.55, 0.8]), np.array([5e7, 2.5e8, 1.25e9])
    tokens = np.array([1e9, 5e9, 2.5e10])
    larger = _grid([5e7, 1.5e8, 4.5e8, 1.35e9], [1e9, 4e9, 1.6e10, 6.4e10], [2.0, 4.0, 8.0], [0.3, 0.45, 0.6, 0.8])
    return [
        _dense("dense, 27 cells", np.geomspace(5e7, 5e9, 9), np.array([4e9, 2e10, 1e11])),
        _dense("dense, 80 cells", np.geomspace(2e7, 1e10, 10), np.geomspace(2e9, 3e11, 8)),
        Case(
            "eq 22, the paper's 27 cells",
            law,
            DLCM,
            np.array([274e6, 468e6, 833e6])[i],
            2e11 * one,
            R[j],
            P[k],
            budget=9.5e8,
            tokens=2e11,
        ),
        Case("eq 22, 27 cells, tokens vary", law, DLCM, sizes[i], tokens[(i + j + k) % 3], R[j], wide[k], 1.5e19),
        Case("eq 22, 192 cells", law, DLCM, *larger, budget=1.5e19),
        Case("eq 22, 192 cells, small offsets", law, DLCM | SMALL, *larger, budget=1.5e19),
        Case("eq 22, 192 cells, offsets", law, DLCM | LARGE, *larger, budget=1.5e19),
    ]


def one_sweep(case: Case, noise: float, seed: int) -> dict[str, tuple[float, float, bool, float]]:
    """Quantity -> interval, whether the number is given, and the share of the refits that the interval holds."""
    result = fit(case.law, case.simulate(noise, np.random.default_rng([seed, 1])), n_bootstrap=REFITS, seed=seed)
    found, truth = {}, case.best()

    def held(low: float, high: float, refits: Array) -> float:
        return float(np.mean([_within(refit, low, high) for refit in refits])) if len(refits) else 0.95

    for i, p in enumerate(result.parameters):
        if (
            p.name in {f.exponent for t in case.law.terms for f in t.factors}
            and p.low is not None
            and p.high is not None
        ):
            found[p.name] = (p.low, p.high, p.identified, held(p.low, p.high, result.replicates[:, i]))
    best = optimum(result, case.price, case.budget, tokens=case.tokens, flat=None)
    for name in ("N", "R", "P"):
        choice = best[name]
        if choice.low is not None and choice.high is not None and f"{name}*" in truth:
            share = held(choice.low, choice.high, best.replicates[:, "NDRP".index(name)])
            found[f"{name}*"] = (choice.low, choice.high, choice.status == "ok", share)
    return found


def _within(value: float, low: float, high: float) -> bool:
    return low * (1 - _SAME) <= value <= high * (1 + _SAME)


def measure(case: Case, noise: float, n: int, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """One row a quantity."""
    truth = {**case.truth, **case.best()}
    began = time.perf_counter()
    sweeps = list(pool.map(one_sweep, [case] * n, [noise] * n, range(_FIRST_SEED, _FIRST_SEED + n), chunksize=4))
    print(f"{case.name}, noise {noise:g}: {n} sweeps in {time.perf_counter() - began:.0f} s", flush=True)
    rows = []
    for name in dict.fromkeys(name for sweep in sweeps for name in sweep):
        drawn = [sweep[name] for sweep in sweeps if name in sweep]
        hits = [_within(truth[name], low, high) for low, high, *_ in drawn]
        shown = [(hit, promised) for hit, (_, _, given, promised) in zip(hits, drawn) if given]
        rows.append(
            {
                "design": case.name,
                "noise": noise,
                "of": name,
                "planted": truth[name],
                "covered": float(np.mean(hits)),
                "error": float(np.sqrt(np.mean(hits) * (1 - np.mean(hits)) / len(hits))),
                "sweeps": len(drawn),
                "given": len(shown) / n,
                "promised": float(np.mean([promised for *_, promised in drawn])),
                "covered where given": float(np.mean([hit for hit, _ in shown])) if len(shown) >= _ENOUGH else None,
                "promised where given": float(np.mean([p for _, p in shown])) if len(shown) >= _ENOUGH else None,
                "median width": float(np.median([high - low for low, high, *_ in drawn])),
                "first seed": _FIRST_SEED,
                "commit": source_commit()[0],
            }
        )
    print(format_table(rows), flush=True)
    return rows


def is_off(row: Mapping[str, Any]) -> bool:
    """Whether intervals hold the truth 3% less or more often than they promise, beyond chance (2%).

    All intervals are judged, and those that are shown where these are at least half of them. A number that is shown in few sweeps
    is shown where it came out definite by chance, and no interval makes up for that.
    """
    judged = [(row["covered"], row["promised"], row["sweeps"])]
    if row["given"] >= _SHOWN and row["covered where given"] is not None:
        judged.append((row["covered where given"], row["promised where given"], round(row["given"] * row["sweeps"])))
    return any(_differs(round(covered * n), n, promised) for covered, promised, n in judged)


def _differs(hits: int, n: int, promised: float) -> bool:
    lowest, highest = promised - _MARGIN, min(promised + _MARGIN, 1.0)
    return bool(stats.binom.cdf(hits, n, lowest) < _CHANCE or stats.binom.sf(hits - 1, n, highest) < _CHANCE)


def main() -> None:
    """Simulate, record, and with --assert hold the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="designs whose name contains this; the others keep what was recorded")
    parser.add_argument("--noise", type=float, help="this noise alone; the others keep what was recorded")
    parser.add_argument("--sims", type=int, default=400, help="simulated sweeps a row")
    parser.add_argument(
        "--assert", dest="check", action="store_true", help="fail where an interval covers too rarely or often"
    )
    args = parser.parse_args()
    chosen = [
        (case, noise)
        for case in cases()
        for noise in case.noises
        if (not args.case or args.case in case.name) and args.noise in (None, noise)
    ]
    path, names = RESULTS / "coverage.json", {(case.name, noise) for case, noise in chosen}
    rows = read_json(path)["rows"] if path.exists() and (args.case or args.noise) else []
    rows = [row for row in rows if (row["design"], row["noise"]) not in names]
    order = {(case.name, noise): i for i, (case, noise) in enumerate((c, n) for c in cases() for n in c.noises)}
    about = {"environment": environment("cpu"), "refits": REFITS}
    with ProcessPoolExecutor(n_processors()) as pool:
        for case, noise in chosen:
            rows = sorted([*rows, *measure(case, noise, args.sims, pool)], key=lambda r: order[r["design"], r["noise"]])
            path = write_result("coverage", {**about, "rows": rows})
    print(f"-> {path}")
    if args.check and (off := [row for row in rows if is_off(row)]):
        raise SystemExit("error: off the mark: " + "; ".join(f"{r['design']} {r['noise']} {r['of']}" for r in off))


if __name__ == "__main__":
    main()
