"""fit(law, data) -> FitResult: the minimum and its certificate, intervals two ways, and which constants the data give."""

import dataclasses
from collections.abc import Callable

import numpy as np

from analysis import identify, laws
from analysis.bootstrap import bootstrap
from analysis.certify import Solution, solve
from analysis.data import ResultsData
from analysis.descent import minimise
from analysis.design import count_runs, reduce_law
from analysis.hygiene import examine
from analysis.inputs import prepare
from analysis.intervals import ends
from analysis.law import FAMILIES
from analysis.laws import Law
from analysis.losses import loss_spread
from analysis.objective import LOSSES, LossKind, Problem
from analysis.profile import profile_intervals
from analysis.result import Estimate, FitResult, ParameterStatus, Status
from dlcm.errors import UserError, nearest

Array = np.ndarray
Progress = Callable[[int, int], None]

N_BOOTSTRAP = 1000
MIN_CLUSTERS_TO_RESAMPLE = 3
FEW_CLUSTERS = 2.0
"""Clusters a free constant below which the bootstrap's intervals are called rough."""
Intervals = dict[str, tuple[float, float]]


def fit(
    law: Law | str,
    data: ResultsData,
    *,
    loss: LossKind = "log_huber",
    delta: float = 1e-3,
    seed: int = 0,
    n_bootstrap: int = N_BOOTSTRAP,
    reduce: bool = True,
    progress: Progress | None = None,
    resample: Callable[..., Array] = bootstrap,
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
        resample: how refits are drawn, with the arguments of `analysis.bootstrap.bootstrap`, the default.

    Raises:
        UserError: unknown law or loss, a delta that is no width, or no run of the law's family.
    """
    law = laws.get(law) if isinstance(law, str) else law
    if loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r}{nearest(str(loss), LOSSES)}")
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta = {delta:g}; give the width of the Huber loss in log units, above 0")
    rows = data.of_family(law.family)
    if not len(rows):
        raise UserError(f"{data.source}: no {law.family} run to fit law {law.name} to; the runs are of another family")
    rows = prepare(law, rows)
    asked, law = law, reduce_law(law, rows) if reduce else law
    problem = Problem.build(law, rows, loss, delta)
    rng = np.random.default_rng(seed)
    solution = solve(problem, rng)
    if len(set(rows.clusters)) < MIN_CLUSTERS_TO_RESAMPLE:
        n_bootstrap = 0  # so few give intervals of no width, which would look like certainty
    replicates = resample(problem, solution.theta, rows.clusters, n=n_bootstrap, rng=rng, progress=progress)
    return _assemble(asked, problem, rows, solution, replicates, seed)


def _assemble(
    asked: Law, problem: Problem, rows: ResultsData, solution: Solution, replicates: Array, seed: int
) -> FitResult:
    law, theta = problem.law, solution.theta
    natural = [problem.values(t) for t in replicates]
    names = [p.name for p in law.parameters]
    draws = np.array([[v[name] for name in names] for v in natural]).reshape(len(natural), len(names))
    other: LossKind = "log_mse" if problem.loss == "log_huber" else "log_huber"
    under_other = problem.with_loss(other)
    others = under_other.values(minimise(under_other, theta)[0])
    reasons = identify.flat_profiles(problem, theta) | dict(solution.geometry.flat) | identify.design_limits(law, rows)
    reasons |= identify.arbitrary_choices(law)
    profiles, spreads = profile_intervals(problem, theta), loss_spread(problem, theta)
    parameters = _estimates(problem, theta, draws, reasons, solution.hits, others, profiles, spreads)
    residuals = problem.with_loss("log_mse").residuals(theta)
    logs = np.log(problem.target)
    scatter = float(np.sum((logs - logs.mean()) ** 2))
    status, notes = _judge(asked, problem, rows, solution, parameters)
    result = FitResult(
        law=law,
        status=status,
        notes=tuple(notes),
        parameters=parameters,
        objective=problem.objective(theta),
        rms=float(np.sqrt(np.mean(residuals**2))),
        r2=1 - float(np.sum(residuals**2)) / scatter if scatter > 0 else None,
        checks=solution.checks,
        n_runs=len(set(rows.run_ids)),
        n_clusters=len(set(rows.clusters)),
        loss=problem.loss,
        delta=problem.delta,
        other_loss=other,
        seed=seed,
        n_starts=solution.n_starts,
        share_best=solution.share_best,
        condition=solution.geometry.number,
        correlations=solution.geometry.correlations,
        replicates=draws,
        ranges=_ranges(law, rows),
        exclusions=rows.exclusions,
        convention=rows.convention,
        source=rows.source,
        data_hash=rows.hash,
    )
    return dataclasses.replace(result, findings=examine(rows, result))


def _ranges(law: Law, rows: ResultsData) -> dict[str, tuple[float, float]]:
    """Input -> (lowest, highest); of a law for both families also `dense N`, `dlcm N` and so on."""
    names = dict.fromkeys((*law.inputs, "N", "D", "C", "R", "P"))
    found = {name: _range(rows, name) for name in names}
    for family in FAMILIES if law.is_joint else ():
        members = rows.take(rows.P == 0 if family == "dense" else rows.P > 0)
        found |= {f"{family} {name}": _range(members, name) for name in names}
    return found


def _range(rows: ResultsData, name: str) -> tuple[float, float]:
    values = rows.values(name)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _estimates(
    problem: Problem,
    theta: Array,
    draws: Array,
    reasons: dict[str, str],
    hits: dict[str, str],
    others: dict[str, float],
    profiles: Intervals,
    spreads: Intervals,
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
            low, high = ends(draws[:, column])
            intervals[p.name] = (low, high)
            wide = identify.wide_interval(p, low, high)
        else:
            wide = None
        reason = (
            reasons.get(p.name) or wide or ("as many constants as runs" if spare <= 0 and len(law.inputs) else None)
        )
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
        more = {"profile": profiles.get(p.name), "spread": spreads.get(p.name)}
        estimates.append(Estimate(p.name, values[p.name], low, high, status, reason, others[p.name], **more))
    return tuple(estimates)


def _judge(
    asked: Law, problem: Problem, rows: ResultsData, solution: Solution, parameters: tuple[Estimate, ...]
) -> tuple[Status, list[str]]:
    """The gravest status, and every finding as a sentence."""
    failed = [(check.status, check.text) for check in solution.checks if not check.passed]
    found = [*failed, *_too_few(asked, problem, rows)]
    unknown = [p.name for p in parameters if p.status is ParameterStatus.NOT_IDENTIFIED]
    spare = [p.name for p in parameters if p.name in unknown and identify.may_be_zero(problem.law, p)]
    unknown = [name for name in unknown if name not in spare]
    if unknown:
        text = f"not identified by these runs: {', '.join(unknown)}; predictions inside the data remain usable, others do not"
        found.append((Status.NOT_IDENTIFIED, text))
    notes = [text for _, text in found]
    if spare:
        text = f"{', '.join(spare)} may be 0 for all that these runs say; the other constants' intervals allow for that"
        notes.append(text)
    n_free, n_clusters = len(problem.law.free), len(set(rows.clusters))
    if problem.law != asked:
        notes.append(f"a nested reduction of {asked.name} was fitted: {n_free} of {len(asked.free)} constants")
    if n_clusters < FEW_CLUSTERS * n_free:
        what = "runs" if n_clusters == len(set(rows.run_ids)) else "trunks"
        notes.append(f"{n_clusters} independent {what} for {n_free} constants: the bootstrap's intervals are rough")
    if rows.exclusions:
        notes.append(f"left out: {count_runs(len(rows.exclusions))}; what they would have said is missing here")
    gravity = list(Status)
    return max((status for status, _ in found), key=gravity.index, default=Status.CERTIFIED), notes


def _too_few(asked: Law, problem: Problem, rows: ResultsData) -> list[tuple[Status, str]]:
    n_runs, n_asked = len(set(rows.run_ids)), len(asked.free)
    if n_runs < n_asked:
        text = f"{count_runs(n_runs)} for the {n_asked} constants of {asked.name}: the law cannot be fitted whole"
    elif n_runs <= n_asked and problem.law == asked:
        text = f"{count_runs(n_runs)} for {n_asked} constants: nothing is left to judge the fit by"
    else:
        return []
    return [(Status.TOO_FEW_POINTS, text)]
