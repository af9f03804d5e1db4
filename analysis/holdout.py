"""What a law says of runs that it was not fitted to: the largest budgets held out, and one level of an axis left out.

The error on held-out runs is half of it. A law can predict the loss of the next budget within 1% and be far from the best
allocation, since the loss is flat there. So every cut also gives the exponents, and their drift is held against what
resampling of the runs would move them by.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.bootstrap import draw_weights, weight_variance
from analysis.data import ResultsData
from analysis.design import SAME_BUDGET, find_levels, reduce_by_axes
from analysis.ensemble import natural_values, refit_many
from analysis.growth import allocation_exponent
from analysis.laws import Law
from analysis.objective import Problem
from analysis.starts import draw_starts

Array = np.ndarray

SHARES = (0.5, 0.65, 0.8)
"""Shares of the runs that are trained on, where cuts are not given."""
ALLOCATION = "N*"
"""Name of the allocation exponent among the exponents of a hold-out."""
_MAX_LEVELS = 6
_BINS = 5
_STARTS = 8
_CANDIDATES = 80
_SPARE = 2
"""Runs wanted beyond the constants in what is left."""
DRIFTS = 2.0
"""Standard errors beyond which an exponent that moves with the cut drifts."""


@dataclasses.dataclass(frozen=True)
class HoldOut:
    """One cut: fitted up to it, judged beyond it.

    Attributes:
        axis: what is cut, `C`, or `N` where training FLOPs are not known.
        cut: largest value that was trained on.
        error: root mean square of log(prediction / observation) on the runs held out; `bias` is its mean.
        exponents: exponent -> value from the runs below the cut; `N*` is that of the best N in C = N D.
        measured: the target of the runs held out; `predicted`: what the law said of them.
    """

    axis: str
    cut: float
    n_train: int
    n_held: int
    error: float
    bias: float
    exponents: Mapping[str, float]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Drift:
    """How an exponent moves as the largest budgets are left out.

    Attributes:
        value: from all runs.
        at_cuts: from the runs below each cut, cuts rising.
        z: the largest move over its standard error (bootstrap of the difference, the same weights in both fits); None without.
    """

    name: str
    value: float
    at_cuts: tuple[float, ...]
    z: float | None

    @property
    def drifts(self) -> bool:
        """Whether it moves more than the sampling of the runs explains."""
        return self.z is not None and abs(self.z) > DRIFTS

    def describe(self) -> str:
        """`N* .602, .578, .548 as the cut rises, .514 on all runs (z = 3.1)`."""
        cuts = ", ".join(f"{v:.3f}" for v in self.at_cuts)
        return f"{self.name} {cuts} as the cut rises, {self.value:.3f} on all runs" + (
            f" (z = {self.z:+.1f})" if self.z is not None else ""
        )


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """One level of an axis left out of the fit.

    Attributes:
        low: least value of the level; high: largest.
        edge: whether it is the first or last level: predicting it is extrapolation.
        error: root mean square of log(prediction / observation) there; None where the rest cannot support the law, with `reason`.
    """

    axis: str
    low: float
    high: float
    n_held: int
    edge: bool
    error: float | None
    bias: float | None
    reason: str = ""


def hold_out(
    problem: Problem,
    theta: Array,
    data: ResultsData,
    rng: np.random.Generator,
    *,
    cuts: tuple[float, ...] | None = None,
    n_bootstrap: int = 0,
) -> tuple[tuple[HoldOut, ...], tuple[Drift, ...]]:
    """Fit the runs up to each cut and predict those beyond.

    Args:
        problem: law and loss on all runs of `data`.
        theta: its answer.
        data: the runs, in the problem's order.
        rng: source of starts and weights.
        cuts: values of C (of N where C is not known); by default at budgets that leave 50, 65 and 80% of the runs below.
        n_bootstrap: refits for the errors of the drifts; 0 for none.

    Returns:
        One hold-out a cut, cuts rising, and the drift of each exponent; none where no cut leaves enough runs on both sides.
    """
    axis, values = cut_axis(data)
    chosen = [(c, values <= c * (1 + 1e-9)) for c in sorted(cuts)] if cuts else _default_cuts(values)
    least = len(problem.law.free) + _SPARE
    chosen = [(c, below) for c, below in chosen if below.sum() >= least and not below.all()]
    if not chosen:
        return (), ()
    variance = weight_variance(problem, theta, len(set(data.clusters)))
    weights = draw_weights(data.clusters, n_bootstrap, rng, variance) if n_bootstrap else None
    at = _centre(data)
    everything = _exponents(problem, theta[None], at)
    resampled = _exponents(problem, refit_many(problem, theta, weights=weights)[0], at) if n_bootstrap else {}
    found, moves = [], []
    for cut, below in chosen:
        answer = refit_rows(problem, theta, below, rng)
        residuals = problem.take(~below).with_loss("log_mse").residuals(answer)
        exponents = {name: float(v[0]) for name, v in _exponents(problem, answer[None], at).items()}
        measured = data.values(problem.law.target)[~below]
        found.append(
            HoldOut(
                axis=axis,
                cut=float(cut),
                n_train=int(below.sum()),
                n_held=int((~below).sum()),
                error=_rms(residuals),
                bias=float(residuals.mean()),
                exponents=exponents,
                measured=tuple(measured.tolist()),
                predicted=tuple((measured * np.exp(residuals)).tolist()),
            )
        )
        if weights is not None:
            part = refit_many(problem.take(below), answer, weights=weights[:, below])[0]
            moves.append({n: v - resampled[n] for n, v in _exponents(problem, part, at).items()})
    drifts = [_drift(name, float(value[0]), found, moves) for name, value in everything.items()]
    return tuple(found), tuple(drifts)


def cut_axis(data: ResultsData) -> tuple[str, Array]:
    """What `largest` means: training FLOPs where every run has them, else parameters."""
    return ("C", data.C) if np.all(np.isfinite(data.C) & (data.C > 0)) else ("N", data.N)


def _default_cuts(values: Array) -> list[tuple[float, Array]]:
    """Between budgets: at the levels that leave nearest to each share of the runs below."""
    at, budgets = find_levels(values, SAME_BUDGET)
    ends = np.array([values[at == k].max() for k in range(len(budgets))])
    if len(ends) < 2:
        return []
    below = np.array([np.mean(values <= end) for end in ends[:-1]])
    picked = sorted({int(np.argmin(np.abs(below - share))) for share in SHARES})
    return [(float(ends[i]), values <= ends[i]) for i in picked]


def refit_rows(problem: Problem, theta: Array, rows: Array, rng: np.random.Generator) -> Array:
    """The best of several descents on some rows, from the answer on all of them and from fresh starts; constants (p,)."""
    part = problem.take(np.flatnonzero(rows))
    starts = [theta, *draw_starts(part, rng, n_starts=_STARTS, n_candidates=_CANDIDATES)]
    thetas, values = refit_many(part, np.stack(starts), max_steps=200)
    return thetas[int(np.argmin(values))]


def _exponents(problem: Problem, thetas: Array, at: Mapping[str, float]) -> dict[str, Array]:
    """Free exponents, and the allocation exponent where the law has one, of each theta (S, p): name -> (S,)."""
    names = [p.name for p in problem.law.free]
    found = {p.name: thetas[:, names.index(p.name)] for p in problem.law.free if p.kind == "exponent"}
    allocation = allocation_exponent(problem.law, natural_values(problem, thetas), at)
    if allocation is not None and np.isfinite(allocation).mean() > 0.5:
        found[ALLOCATION] = np.broadcast_to(allocation, len(thetas))
    return found


def _centre(data: ResultsData) -> dict[str, float]:
    return {
        "N": float(np.exp(np.mean(np.log(data.N)))),
        "D": float(np.exp(np.mean(np.log(data.D)))),
        "R": float(np.exp(np.mean(np.log(data.R)))),
        "P": float(np.mean(data.P)),
    }


def _drift(name: str, value: float, found: list[HoldOut], moves: list[dict[str, Array]]) -> Drift:
    at_cuts = tuple(h.exponents.get(name, float("nan")) for h in found)
    scores: list[float] = []
    for at_cut, drawn in zip(at_cuts, moves):
        spread = float(np.nanstd(drawn[name])) if name in drawn else float("nan")
        if np.isfinite(at_cut) and np.isfinite(spread) and spread > 0:
            scores.append((at_cut - value) / spread)
    return Drift(name, value, at_cuts, max(scores, key=abs) if scores else None)


def leave_levels_out(
    problem: Problem, theta: Array, data: ResultsData, rng: np.random.Generator
) -> tuple[LeftOut, ...]:
    """Leave each size, each R, each P, each D out in turn, fit the rest, and predict what was left out.

    Axes with more than six levels are cut into five groups of neighbouring levels; an axis with fewer than three is let alone:
    without one of two levels nothing is known about the axis.
    """
    found = []
    for axis in ("N", "D", "R", "P"):
        if axis not in problem.law.inputs:
            continue
        values = data.values(axis)
        if not (values > 0).all():
            continue
        group, _ = find_levels(values)
        if group.max() < 2:
            continue
        if group.max() >= _MAX_LEVELS:
            edges = np.quantile(values, np.linspace(0, 1, _BINS + 1)[1:-1])
            group = np.unique(np.searchsorted(edges, values), return_inverse=True)[1]
        found += [_leave(problem, theta, data, axis, values, group == k, rng) for k in range(group.max() + 1)]
    return tuple(found)


def _leave(
    problem: Problem, theta: Array, data: ResultsData, axis: str, values: Array, out: Array, rng: np.random.Generator
) -> LeftOut:
    low, high = float(values[out].min()), float(values[out].max())
    facts: dict[str, Any] = {"axis": axis, "low": low, "high": high, "n_held": int(out.sum())}
    facts["edge"] = bool(low == values.min() or high == values.max())
    reason = _unsupported(problem.law, data.take(~out))
    if reason:
        return LeftOut(**facts, error=None, bias=None, reason=reason)
    answer = refit_rows(problem, theta, ~out, rng)
    residuals = problem.take(np.flatnonzero(out)).with_loss("log_mse").residuals(answer)
    return LeftOut(**facts, error=_rms(residuals), bias=float(residuals.mean()))


def _unsupported(law: Law, rest: ResultsData) -> str:
    """Why the rest cannot support the law; empty where it can."""
    if len(rest) < len(law.free) + _SPARE:
        return f"{len(rest)} runs remain for {len(law.free)} constants"
    further = reduce_by_axes(law, rest).changes[len(law.changes) :]
    return further[0].describe() if further else ""


def _rms(residuals: Array) -> float:
    return float(np.sqrt(np.mean(residuals**2)))
