"""fit(law, data) -> FitResult: starts, descent, the checks of convergence, intervals, and which constants the data give."""

import dataclasses
from collections.abc import Callable

import numpy as np

from analysis import identify, laws
from analysis.bootstrap import bootstrap
from analysis.data import ResultsData
from analysis.descent import approach, minimise, refit
from analysis.design import count_runs, reduce_law
from analysis.laws import Law
from analysis.objective import LOSSES, LossKind, Problem
from analysis.result import Estimate, FitResult, ParameterStatus, Status
from analysis.starts import draw_starts
from dlcm.errors import UserError, nearest

Array = np.ndarray
Progress = Callable[[int, int], None]

N_STARTS = 24
MIN_RUNS_TO_RESAMPLE = 3
N_CANDIDATES = 300
_SAME = 1e-6
_NOISE_FREE = 1e-18
"""Mean squared relative error below which a fit is exact, and ratios of objectives are ratios of rounding errors."""


def fit(
    law: Law | str,
    data: ResultsData,
    *,
    loss: LossKind = "log_huber",
    delta: float = 1e-3,
    seed: int = 0,
    n_bootstrap: int = 200,
    reduce: bool = True,
    progress: Progress | None = None,
) -> FitResult:
    """Fit a law to the runs of its family.

    Args:
        law: a law of `analysis.laws`, or its name.
        data: results under one convention; rows of another family than the law's are set aside.
        loss: `log_huber` (Huber of log residuals, robust), `log_mse` or `mse`.
        delta: width of the Huber loss in log units.
        seed: seeds starts and bootstrap.
        n_bootstrap: refits for the intervals; 0 for none.
        reduce: fall back to a nested reduction where the runs cannot support every constant; `result.law.changes` has it.
        progress: called with (refits done, refits).

    Raises:
        UserError: unknown law or loss, or no run of the law's family.
    """
    law = laws.get(law) if isinstance(law, str) else law
    if loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r}{nearest(str(loss), LOSSES)}")
    rows = data.of_family(law.family)
    if not len(rows):
        raise UserError(f"{data.source}: no {law.family} run to fit law {law.name} to; the runs are of another family")
    asked, law = law, reduce_law(law, rows) if reduce else law
    problem = Problem.build(law, rows, loss, delta)
    rng = np.random.default_rng(seed)
    descent = _descend(problem, rng)
    if len(set(rows.run_ids)) < MIN_RUNS_TO_RESAMPLE:
        n_bootstrap = 0  # drawing from so few runs gives intervals of no width, which would look like certainty
    replicates, n_degenerate = bootstrap(
        problem, descent.theta, rows.run_ids, n=n_bootstrap, rng=rng, progress=progress
    )
    return _assemble(asked, problem, rows, descent, replicates, n_degenerate, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class _Descent:
    theta: Array
    n_starts: int
    share_best: float
    drop: float  # relative drop of the objective when polished once more
    moved: bool
    exact: bool


def _descend(problem: Problem, rng: np.random.Generator) -> _Descent:
    starts = draw_starts(problem, rng, n_starts=N_STARTS, n_candidates=N_CANDIDATES)
    # A rough descent of every start, then a long one of each that still might lead.
    rough = [refit(problem, approach(problem, start)[0]) for start in starts]
    order = np.argsort([value for _, value in rough])
    leaders = {int(i): minimise(problem, rough[i][0]) for i in order[:3]}
    theta, value = min(leaders.values(), key=lambda answer: answer[1])
    again = minimise(problem, theta)
    exact = value * problem.delta**2 <= _NOISE_FREE * len(problem)
    drop = 0.0 if exact else (value - again[1]) / value
    theta, value = again if again[1] < value else (theta, value)
    tolerance = max(_SAME * value, _NOISE_FREE * len(problem) / problem.delta**2)
    reached = [leaders.get(i, rough[i])[1] - value <= tolerance for i in range(len(starts))]
    moved = not problem.law.terms or all(np.max(np.abs(theta - start), initial=0.0) > 1e-9 for start in starts)
    if all(p.kind in ("floor", "amplitude") for p in problem.law.free):
        moved = True  # a linear problem: the start is its solution
    return _Descent(theta, len(starts), float(np.mean(reached)), float(drop), moved, bool(exact))


def _assemble(
    asked: Law, problem: Problem, rows: ResultsData, descent: _Descent, replicates: Array, n_degenerate: int, seed: int
) -> FitResult:
    law, theta = problem.law, descent.theta
    natural = [problem.values(t) for t in replicates]
    names = [p.name for p in law.parameters]
    draws = np.array([[v[name] for name in names] for v in natural]).reshape(len(natural), len(names))
    geometry = identify.conditioning(problem, theta)
    hits = identify.bound_hits(problem, theta)
    other: LossKind = "log_mse" if problem.loss == "log_huber" else "log_huber"
    under_other = problem.with_loss(other)
    others = under_other.values(minimise(under_other, theta)[0])
    reasons = identify.flat_profiles(problem, theta) | dict(geometry.flat) | identify.design_limits(law, rows)
    reasons |= identify.arbitrary_choices(asked, law)
    parameters = _estimates(problem, theta, draws, reasons, hits, others)
    residuals = problem.with_loss("log_mse").residuals(theta)
    logs = np.log(problem.target)
    scatter = float(np.sum((logs - logs.mean()) ** 2))
    status, notes = _judge(asked, problem, rows, descent, parameters, hits, n_degenerate, len(natural))
    return FitResult(
        law=law,
        status=status,
        notes=tuple(notes),
        parameters=parameters,
        objective=problem.objective(theta),
        rms=float(np.sqrt(np.mean(residuals**2))),
        r2=1 - float(np.sum(residuals**2)) / scatter if scatter > 0 else None,
        n_runs=len(set(rows.run_ids)),
        loss=problem.loss,
        delta=problem.delta,
        other_loss=other,
        seed=seed,
        n_starts=descent.n_starts,
        share_best=descent.share_best,
        condition=geometry.number,
        correlations=geometry.correlations,
        replicates=draws,
        ranges={name: _range(rows, name) for name in dict.fromkeys((*law.inputs, "N", "D", "C", "R", "P"))},
        exclusions=rows.exclusions,
        convention=rows.convention,
        source=rows.source,
        data_hash=rows.hash,
    )


def _range(rows: ResultsData, name: str) -> tuple[float, float]:
    values = rows.values(name)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _estimates(
    problem: Problem, theta: Array, draws: Array, reasons: dict, hits: dict, others: dict
) -> tuple[Estimate, ...]:
    law, values = problem.law, problem.values(theta)
    held = {name: next((c.reason for c in law.changes if c.parameter == name), "") for name, _ in law.fixed}
    spare = len(problem) - len(law.free)
    unknown: dict[str, str] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for column, p in enumerate(law.parameters):
        if p.name in held:
            continue
        if len(draws):
            low, high = (float(v) for v in np.percentile(draws[:, column], [2.5, 97.5]))
            intervals[p.name] = (low, high)
            wide = identify.wide_interval(p, low, high)
        else:
            wide = None
        reason = reasons.get(p.name) or wide or ("as many constants as runs" if spare <= 0 and len(law.terms) else None)
        if reason:
            unknown[p.name] = reason
    for amplitude, exponents in identify.ties(law).items():
        for exponent in exponents:
            if exponent in unknown:
                unknown.setdefault(amplitude, f"it follows {exponent}, which is not identified")
                if law.floor and exponent in {f.exponent for t in law.terms for f in t.factors if f.sign < 0}:
                    unknown.setdefault(law.floor, f"it trades off with {exponent}, which is not identified")
    estimates = []
    for p in law.parameters:
        low, high = intervals.get(p.name, (None, None))
        if p.name in held:
            estimates.append(Estimate(p.name, values[p.name], None, None, ParameterStatus.HELD, held[p.name]))
            continue
        if p.name in unknown:
            status, reason = ParameterStatus.NOT_IDENTIFIED, unknown[p.name]
        elif p.name in hits:
            status, reason = ParameterStatus.AT_BOUND, hits[p.name]
        else:
            status, reason = ParameterStatus.OK, ""
        estimates.append(Estimate(p.name, values[p.name], low, high, status, reason, others[p.name]))
    return tuple(estimates)


def _judge(
    asked: Law,
    problem: Problem,
    rows: ResultsData,
    descent: _Descent,
    parameters: tuple[Estimate, ...],
    hits: dict[str, str],
    n_degenerate: int,
    n_replicates: int,
) -> tuple[Status, list[str]]:
    """The gravest status, and every finding as a sentence."""
    found: list[tuple[Status, str]] = []
    n_runs, n_asked = len(set(rows.run_ids)), len(asked.free)
    if descent.drop > _SAME:
        found.append(
            (Status.NOT_CONVERGED, f"polishing once more lowered the objective by {descent.drop:.1e}: no minimum yet")
        )
    if not descent.moved:
        found.append((Status.NEVER_MOVED, "the answer equals a starting point: the descent did not work"))
    if n_runs < n_asked:
        found.append(
            (
                Status.TOO_FEW_POINTS,
                f"{count_runs(n_runs)} for the {n_asked} constants of {asked.name}: the law cannot be fitted whole",
            )
        )
    elif n_runs <= n_asked and problem.law == asked:
        found.append(
            (
                Status.TOO_FEW_POINTS,
                f"{count_runs(n_runs)} for {n_asked} constants: nothing is left to judge the fit by",
            )
        )
    if hits:
        text = ", ".join(f"{name} {reason}" for name, reason in hits.items())
        found.append((Status.BOUND_HIT, f"on a bound: {text}; extrapolation is refused"))
    unknown = [p.name for p in parameters if p.status is ParameterStatus.NOT_IDENTIFIED]
    if unknown:
        text = f"not identified by these runs: {', '.join(unknown)}; predictions inside the data remain usable, others do not"
        found.append((Status.NOT_IDENTIFIED, text))
    if problem.law != asked:
        found.append(
            (
                Status.CONVERGED,
                f"a nested reduction of {asked.name} was fitted: {len(problem.law.free)} of {n_asked} constants",
            )
        )
    if descent.share_best < 0.1:
        found.append((Status.CONVERGED, f"only {100 * descent.share_best:.0f}% of the starts reach the best objective"))
    if n_degenerate > n_replicates / 10:
        found.append(
            (
                Status.CONVERGED,
                f"{n_degenerate} of {n_replicates} resamples hold fewer runs than constants: intervals are rough",
            )
        )
    if rows.exclusions:
        found.append(
            (
                Status.CONVERGED,
                f"left out: {count_runs(len(rows.exclusions))}; what they would have said is missing here",
            )
        )
    gravity = list(Status)
    status = max((s for s, _ in found), key=gravity.index, default=Status.CONVERGED)
    return status, [text for _, text in found]
