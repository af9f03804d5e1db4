"""What a fit owes to choices that are not the data's: the loss, its delta, a few large losses, what N counts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import laws
from analysis.bootstrap import bootstrap
from analysis.certify import solve
from analysis.data import NConvention, ResultsData
from analysis.descent import minimise
from analysis.ensemble import refit_many
from analysis.fit import fit
from analysis.intervals import ends
from analysis.law import Law
from analysis.objective import Problem
from analysis.result import FitResult
from dlcm.errors import UserError

Array = np.ndarray
DROPS = (0, 1, 3, 5, 12)
N_EXPONENT = "N exponent"


def allocation_exponent(law: Law, values: Mapping[str, Any]) -> Any:
    """Exponent of N in the best allocation of C = k N D: beta / (alpha + beta).

    None where the law has not that form, or one constant for both exponents.
    """
    powers = {}
    for term in getattr(law, "terms", ()):
        factor = term.factors[0]
        if len(term.factors) == 1 and factor.sign < 0 and factor.offset is None:
            powers[factor.variable] = factor.exponent
    # With one constant for both it is one half, whatever the data say.
    if set(powers) != {"N", "D"} or powers["N"] == powers["D"]:
        return None
    held = {**values, **dict(law.fixed)}
    return held[powers["D"]] / (held[powers["N"]] + held[powers["D"]])


def has_exponent(law: Law) -> bool:
    """Whether a drop curve of the law has something to show."""
    return bool(_exponents(law))


def _exponents(law: Law) -> list[str]:
    return [p.name for p in law.free if p.kind in ("exponent", "other")]


@dataclasses.dataclass(frozen=True, eq=False)
class DropCurve:
    """A fit repeated with the k largest losses left out.

    Attributes:
        law: what was fitted. ks: how many were left out. n_runs: rows that remained.
        values: column -> estimate at each k: each exponent, and the allocation's exponent of N where the law gives one.
        low: column -> lower end of the 95% interval at each k; empty without a bootstrap. high: upper end.
    """

    law: str
    ks: tuple[int, ...]
    n_runs: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]
    low: Mapping[str, tuple[float, ...]]
    high: Mapping[str, tuple[float, ...]]

    @property
    def drift(self) -> dict[str, float]:
        """Column -> difference between its highest and its lowest value."""
        return {name: max(values) - min(values) for name, values in self.values.items()}

    @property
    def main(self) -> str:
        """The column to look at first: the allocation's exponent, or else the first exponent."""
        return N_EXPONENT if N_EXPONENT in self.values else next(iter(self.values))

    def table(self) -> pd.DataFrame:
        """One row a k."""
        columns: dict[str, Any] = {"dropped": list(self.ks), "runs": list(self.n_runs)}
        for name, values in self.values.items():
            columns[name] = list(values)
            if name in self.low:
                columns |= {f"{name} low": list(self.low[name]), f"{name} high": list(self.high[name])}
        return pd.DataFrame(columns)

    def rounded(self) -> pd.DataFrame:
        """The table for people: values with their intervals as text."""
        columns: dict[str, Any] = {
            "largest losses left out": list(map(str, self.ks)),
            "runs": list(map(str, self.n_runs)),
        }
        for name, values in self.values.items():
            pairs = zip(self.low[name], self.high[name]) if name in self.low else [None] * len(values)
            columns[name] = [f"{v:.4f}" + (f" ({e[0]:.4f} to {e[1]:.4f})" if e else "") for v, e in zip(values, pairs)]
        return pd.DataFrame(columns)

    def describe(self) -> str:
        """`N exponent .565 / .544 / .514 with the 0 / 1 / 5 largest losses left out`."""
        values = " / ".join(f"{v:.3f}" for v in self.values[self.main])
        return f"{self.main} {values} with the {' / '.join(map(str, self.ks))} largest losses left out"


def drop_curve(
    law: Law | str,
    data: ResultsData,
    ks: Sequence[int] = DROPS,
    *,
    n_bootstrap: int = 200,
    seed: int = 0,
    **options: Any,
) -> DropCurve:
    """Fit with the k largest losses left out, for each k: one search, then descents from its answer.

    Args:
        law: a law or its name.
        data: results; rows of the law's family are used.
        ks: numbers of losses to leave out.
        n_bootstrap: refits for each interval; 0 for none.
        seed: seeds starts and bootstrap.
        **options: `loss` and `delta` of the fit.

    Raises:
        UserError: a k leaves no more runs than the law has constants, or the law has no exponent.
    """
    law = laws.get(law) if isinstance(law, str) else law
    rows = data.of_family(law.family)
    problem = Problem.build(law, rows, **options)
    exponents = _exponents(law)
    ks = sorted({int(k) for k in ks})
    if not exponents:
        raise UserError(f"law {law.name} has no free exponent; a drop curve would show nothing")
    if not ks or ks[0] < 0 or len(rows) - ks[-1] <= len(law.free):
        few = f"leave too few of {len(rows)} runs for {len(law.free)} constants"
        raise UserError(f"{rows.source}: the {', '.join(map(str, ks))} largest losses {few}; give smaller numbers")
    rng = np.random.default_rng(seed)
    order = np.argsort(rows.loss, kind="stable")
    whole = solve(problem, rng).theta
    values: dict[str, list[float]] = {}
    intervals: dict[str, list[tuple[float, float]]] = {}
    for k in ks:
        kept = np.sort(order[: len(rows) - k])
        part = problem.take(kept)
        theta = _descend(part, whole, rng)
        for name, value in _columns(law, part.values(theta), exponents).items():
            values.setdefault(name, []).append(float(value))
        if n_bootstrap:
            clusters = [rows.clusters[i] for i in kept]
            draws = [part.values(t) for t in bootstrap(part, theta, clusters, n=n_bootstrap, rng=rng)]
            drawn = {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
            for name, column in _columns(law, drawn, exponents).items():
                intervals.setdefault(name, []).append(ends(column))
    return DropCurve(
        law=law.name,
        ks=tuple(ks),
        n_runs=tuple(len(rows) - k for k in ks),
        values={name: tuple(v) for name, v in values.items()},
        low={name: tuple(low for low, _ in pairs) for name, pairs in intervals.items()},
        high={name: tuple(high for _, high in pairs) for name, pairs in intervals.items()},
    )


def _descend(problem: Problem, theta: Array, rng: np.random.Generator) -> Array:
    """From the whole data's answer, and from elsewhere too: without its largest losses a fit may lie in another valley."""
    from analysis.starts import draw_starts

    starts = np.vstack([theta, *draw_starts(problem, rng, n_starts=6, n_candidates=60)])
    thetas, objectives = refit_many(problem, starts)
    return minimise(problem, thetas[int(np.argmin(objectives))], rounds=2)[0]


def _columns(law: Law, values: Mapping[str, Any], exponents: Sequence[str]) -> dict[str, Any]:
    share = allocation_exponent(law, values)
    return {**({} if share is None else {N_EXPONENT: share}), **{name: values[name] for name in exponents}}


@dataclasses.dataclass(frozen=True, eq=False)
class BothConventions:
    """One law fitted with N without and with embeddings.

    Attributes:
        fits: convention -> fit. They are two laws: constants of one say nothing of the other.
    """

    fits: Mapping[NConvention, FitResult]

    @property
    def exponents(self) -> dict[str, tuple[float, float]]:
        """Exponent -> its value without and with embeddings; the allocation's exponent of N where the law gives one."""
        first = self.fits["non_embedding"]
        names = [p.name for p in first.law.free if p.kind in ("exponent", "other")]
        both = [_columns(f.law, f.values, [n for n in names if n in f.values]) for f in self.fits.values()]
        return {name: (float(both[0][name]), float(both[1][name])) for name in both[0] if name in both[1]}

    def table(self) -> pd.DataFrame:
        """One row an exponent: value and interval under either convention."""
        rows = []
        for name, pair in self.exponents.items():
            row: dict[str, Any] = {"exponent": name}
            for (convention, result), value in zip(self.fits.items(), pair):
                row[convention] = value
                low, high = _interval(result, name)
                row |= {f"{convention} low": low, f"{convention} high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def report(self) -> str:
        """Both fits' exponents beside each other, as text."""
        lines = ["Exponents by what N counts (two laws; do not mix their constants)"]
        for row in self.table().to_dict("records"):
            cells = []
            for c in self.fits:
                known = row[f"{c} low"] is not None
                interval = f" (95% {row[f'{c} low']:.4g} to {row[f'{c} high']:.4g})" if known else ""
                cells.append(f"{c} {row[c]:.4g}{interval}")
            lines.append(f"  {row['exponent']:<10}  " + "   ".join(cells))
        lines += [f"  {convention}: {result.status}" for convention, result in self.fits.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            # pyrefly: ignore[bad-argument-type]  pandas takes None
            "exponents": self.table().astype(object).where(lambda f: f.notna(), None).to_dict("records"),
            "fits": {convention: result.to_dict() for convention, result in self.fits.items()},
        }


def _interval(result: FitResult, name: str) -> tuple[float | None, float | None]:
    if not len(result.replicates):
        return None, None
    draws = result.replicate_values()
    column = allocation_exponent(result.law, {k: np.array([d[k] for d in draws]) for k in draws[0]})
    if name != N_EXPONENT:
        column = np.array([draw[name] for draw in draws])
    return ends(column)


def both_conventions(law: Law | str, data: ResultsData, **options: Any) -> BothConventions:
    """Fit under both meanings of N.

    Args:
        law: a law or its name.
        data: results that hold `params_total` and `params_embedding`.
        **options: of `fit`.

    Raises:
        UserError: the results do not hold both counts.
    """
    conventions: tuple[NConvention, NConvention] = ("non_embedding", "total")
    return BothConventions({n: fit(law, data.under(n), **options) for n in conventions})
