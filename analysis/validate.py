"""choose(laws, data) -> ModelChoice: which law the runs support, and which of its constants they do not give.

The choice is by AICc, over likelihoods that are stated. Hold-outs, levels left out and nested tests stand beside it: they may
contradict it, and then that is said; none of them chooses, least of all the error of a hold-out, which is small for laws whose
best allocations lie far apart.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from analysis import laws as known
from analysis.certify import solve
from analysis.data import ResultsData
from analysis.design import reduce_by_axes
from analysis.families import Tell
from analysis.fit import fit
from analysis.holdout import Drift, HoldOut, LeftOut, hold_out, leave_levels_out
from analysis.laws import Change, Law
from analysis.nested import NestedTest, is_nested, nested_test
from analysis.objective import Problem
from analysis.result import FitResult
from analysis.unknown import constants_asked, not_identified
from dlcm.errors import UserError, nearest

Array = np.ndarray

WITHIN = 2.0
"""Laws whose AICc is so close to the least are not told apart (Burnham and Anderson 2002, section 2.6)."""
_EXACT = 1e-9
"""Relative error below which a fit is exact, and its likelihood one of rounding."""
_SAME = 1e-7
"""Two laws with as many constants whose predictions differ by no more are one law in two notations."""


@dataclasses.dataclass(frozen=True, eq=False)
class LawScore:
    """One law against the runs.

    Attributes:
        law: as fitted: reduced by what the design cannot tell.
        n_constants: estimated constants, the width of the errors included.
        aicc: under the likelihood that describes the errors better; infinite where runs are too few for it.
        behind: AICc above the least. weight: Akaike weight.
        fit: under the toolkit's loss, with certificate and status of each constant.
        holdouts: one a cut. drifts: of each exponent over the cuts. left_out: one a level and axis.
    """

    label: str
    law: Law
    n_constants: int
    aicc: float
    behind: float
    weight: float
    fit: FitResult
    holdouts: tuple[HoldOut, ...]
    drifts: tuple[Drift, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def hold_out_error(self) -> float | None:
        """Root mean square relative error over all cuts; None without one."""
        if not self.holdouts:
            return None
        return float(np.sqrt(np.mean([h.error**2 for h in self.holdouts])))

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of all constants of the law asked for."""
        return constants_asked(self.law)

    @property
    def not_identified(self) -> dict[str, str]:
        """Constant of the law asked for -> why the runs do not give it."""
        return not_identified(self.fit)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelChoice:
    """What `choose` found.

    Attributes:
        scores: laws by AICc, least first.
        chosen: the law with the fewest constants of those within 2 of the least AICc.
        undecided: labels of the other laws within 2.
        errors: `gaussian` or `laplace`: the likelihood behind AICc.
        merged: what was left out because it says the same as another law on these runs.
        nested: tests of reductions against their laws.
    """

    scores: tuple[LawScore, ...]
    chosen: LawScore
    undecided: tuple[str, ...]
    errors: str
    n_runs: int
    n_clusters: int
    merged: tuple[str, ...]
    nested: tuple[NestedTest, ...]
    source: str
    data_hash: str

    def __getitem__(self, label: str) -> LawScore:
        """The score of one law by its label."""
        for score in self.scores:
            if score.label == label:
                return score
        raise UserError(f"model choice: no law {label!r}{nearest(label, [s.label for s in self.scores])}")

    @property
    def whole(self) -> LawScore:
        """The richest law compared that the chosen one is a reduction of; the chosen one itself where there is none."""
        wider = [s for s in self.scores if is_nested(self.chosen.law, s.law)]
        return max(wider, key=lambda s: s.n_constants, default=self.chosen)

    @property
    def sentence(self) -> str:
        """The finding in plain words."""
        from analysis.validate_text import format_sentence

        return format_sentence(self)

    def report(self) -> str:
        """Finding, laws by AICc, hold-outs, levels left out, nested tests."""
        from analysis.validate_text import format_choice

        return format_choice(self)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; infinite and missing figures are null."""
        from analysis.validate_text import choice_json

        return choice_json(self)


def candidates(family: str) -> tuple[Law, ...]:
    """The laws that are compared by default.

    Raises:
        UserError: neither `dense` nor `dlcm`.
    """
    dense, dlcm = known.CHINCHILLA, known.COMPRESSION_AWARE
    plain = dlcm.fix(t_t=0, t_c=0, t_d=0)
    found = {
        "dense": (dense, dense.tie(beta="alpha"), dense.fix(E=0), dense.apply(Change("drop", "B"))),
        "dlcm": (dlcm, plain, plain.tie(d2="d1"), plain.tie(d2="d1", a="d1"), plain.fix(g=0), plain.fix(E0=0)),
    }
    if family not in found:
        raise UserError(f"unknown family {family!r}{nearest(family, found)}")
    return found[family]


def label_law(law: Law) -> str:
    """Name and changes: `compression_aware, t_t = 0, d2 = d1, without A_d`."""
    words = {"fix": "{c.parameter} = {c.value:g}", "tie": "{c.parameter} = {c.other}", "drop": "without {c.parameter}"}
    return ", ".join([law.name, *(words[c.op].format(c=c) for c in law.changes)])


def parse_law(text: str) -> Law:
    """A law from `name`, or from `name:t_t=0,d2=d1,-A_d`: constants held, tied, and terms dropped.

    Raises:
        UserError: no such law or constant, or a change that is none of the three.
    """
    name, _, rest = text.partition(":")
    law = known.get(name.strip())
    for part in filter(None, (p.strip() for p in rest.split(","))):
        left, equals, right = (p.strip() for p in part.partition("="))
        if part.startswith("-"):
            law = law.apply(Change("drop", part[1:].strip()))
        elif not equals or not left or not right:
            raise UserError(f"law {text!r}: {part!r} is no change; write t_t=0 to hold, d2=d1 to tie, -A_d to drop")
        elif right in {p.name for p in law.parameters}:
            law = law.apply(Change("tie", left, other=right))
        else:
            try:
                law = law.apply(Change("fix", left, value=float(right)))
            except ValueError:
                names = [p.name for p in law.parameters]
                raise UserError(
                    f"law {text!r}: {right!r} is neither a number nor a constant{nearest(right, names)}"
                ) from None
    return law


@dataclasses.dataclass(frozen=True, eq=False)
class _Candidate:
    """A law on the data: problem, answer, and answer under squared log residuals."""

    label: str
    law: Law
    fit: FitResult
    robust: Problem
    theta: Array
    squares: Problem
    theta_squares: Array

    def deviances(self, clusters: Sequence[str]) -> dict[str, float]:
        """-2 log likelihood, at its greatest over the width of the errors, for either distribution of them.

        Every cluster counts once, with the mean over its rows: rows of one run repeat each other.
        """
        names, of_row = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
        count, n = np.bincount(of_row), len(names)
        square = np.bincount(of_row, self.squares.residuals(self.theta_squares) ** 2) / count
        size = np.bincount(of_row, np.abs(self.robust.with_loss("log_mse").residuals(self.theta))) / count
        variance, width = max(float(square.mean()), _EXACT**2), max(float(size.mean()), _EXACT)
        return {"gaussian": n * (np.log(2 * np.pi * variance) + 1), "laplace": 2 * n * (np.log(2 * width) + 1)}


def choose(
    laws: Sequence[Law | str] | None,
    data: ResultsData,
    *,
    cuts: Sequence[float] | None = None,
    delta: float = 1e-3,
    seed: int = 0,
    n_bootstrap: int = 200,
    n_draws: int = 199,
    tell: Tell | None = None,
) -> ModelChoice:
    """Compare laws on one data set.

    AICc is -2 log L + 2k + 2k(k + 1) / (n - k - 1), with n the number of clusters and k the constants and the width of the
    errors. The log residuals are Gaussian (L at the least squares) or Laplacian (at the answer of the log-Huber loss, which
    for a small delta is that of least absolute residuals): the one under which the best law is likelier is used for all.

    Each law is first reduced by what the design cannot tell (an axis with one value), so that constants that do nothing do
    not count. Laws that are then the same, or predict the same, are compared once.

    Args:
        laws: laws, or names that `parse_law` reads; `candidates` of the data's family where None.
        data: the runs.
        cuts: values of C up to which hold-outs are fitted; by default those that leave 50, 65 and 80% of the runs.
        delta: width of the Huber loss.
        seed: seeds starts, bootstrap and signs.
        n_bootstrap: refits for intervals and for the errors of drifts; 0 for none.
        n_draws: sets of observations of a nested test; 0 for the F distribution.
        tell: called with a line before each step.

    Raises:
        UserError: no law, laws of different families or targets, or no run of the family.
    """
    tell = tell or (lambda _: None)
    asked = _asked(laws, data)
    rows = data.of_family(asked[0].family)
    if not len(rows):
        raise UserError(f"{data.source}: no {asked[0].family} run to compare laws on; the runs are of another family")
    rng = np.random.default_rng(seed)

    def candidate(law: Law) -> _Candidate:
        label = label_law(law)
        tell(f"fitting {label} to {len(rows)} runs")
        return _candidate(label, reduce_by_axes(law, rows), rows, delta, seed, n_bootstrap, rng)

    found, merged = _distinct(map(candidate, asked))
    errors, aicc = _score(found, rows.clusters)
    tell("holding out the largest budgets, and each level of each axis")
    scores = []
    for one, value, (behind, weight) in zip(found, aicc, _akaike(aicc)):
        chosen_cuts = tuple(cuts) if cuts else None
        holdouts, drifts = hold_out(one.robust, one.theta, rows, rng, cuts=chosen_cuts, n_bootstrap=n_bootstrap)
        left = leave_levels_out(one.robust, one.theta, rows, rng)
        k = len(one.law.free) + 1
        scores.append(LawScore(one.label, one.law, k, float(value), behind, weight, one.fit, holdouts, drifts, left))
    tell("testing reductions against their laws")
    tests = _tests(found, rows, rng, n_draws)
    ranked = sorted(scores, key=lambda s: (s.aicc, s.n_constants))
    close = [s for s in ranked if s.behind <= WITHIN] or ranked
    chosen = min(close, key=lambda s: (s.n_constants, s.aicc))
    return ModelChoice(
        scores=tuple(ranked),
        chosen=chosen,
        undecided=tuple(s.label for s in close if s is not chosen),
        errors=errors,
        n_runs=len(set(rows.run_ids)),
        n_clusters=len(set(rows.clusters)),
        merged=merged,
        nested=tests,
        source=rows.source,
        data_hash=rows.hash,
    )


def _asked(laws: Sequence[Law | str] | None, data: ResultsData) -> list[Law]:
    if laws is None:
        laws = candidates("dlcm" if "model" in data.frame and len(data.dlcm) else "dense")
    asked = [parse_law(law) if isinstance(law, str) else law for law in laws]
    if not asked:
        raise UserError("model choice: give at least one law")
    for law in asked[1:]:
        if (law.family, law.target) != (asked[0].family, asked[0].target):
            what = f"{asked[0].name} ({asked[0].family}, {asked[0].target}) and {law.name} ({law.family}, {law.target})"
            raise UserError(f"model choice: {what} describe different runs; compare laws of one family and target")
    return asked


def _distinct(candidates: Iterable[_Candidate]) -> tuple[list[_Candidate], tuple[str, ...]]:
    """Those that say something of their own, and of each other one which it repeats."""
    found: list[_Candidate] = []
    merged: list[str] = []
    for candidate in candidates:
        twin = next((other for other in found if _same(other, candidate)), None)
        if twin is None:
            found.append(candidate)
        else:
            merged.append(f"{candidate.label} says the same as {twin.label} on these runs")
    return found, tuple(merged)


def _akaike(aicc: Array) -> list[tuple[float, float]]:
    """How far each law lies behind the best, and its Akaike weight; a law with too few runs for its AICc has none."""
    known = np.isfinite(aicc)
    behind = np.full(len(aicc), np.inf)
    behind[known] = aicc[known] - np.min(aicc[known], initial=np.inf)
    weight = np.exp(-behind / 2)
    return list(zip(behind.tolist(), (weight / (weight.sum() or 1.0)).tolist()))


def _candidate(
    label: str, law: Law, rows: ResultsData, delta: float, seed: int, n_bootstrap: int, rng: np.random.Generator
) -> _Candidate:
    result = fit(law, rows, delta=delta, seed=seed, n_bootstrap=n_bootstrap, reduce=False)
    robust = Problem.build(law, rows, "log_huber", delta)
    squares = robust.with_loss("log_mse")
    return _Candidate(label, law, result, robust, robust.theta(result.values), squares, solve(squares, rng).theta)


def _same(one: _Candidate, other: _Candidate) -> bool:
    if len(one.law.free) != len(other.law.free):
        return False
    differ = one.squares.residuals(one.theta_squares) - other.squares.residuals(other.theta_squares)
    return float(np.max(np.abs(differ))) < _SAME


def _score(found: list[_Candidate], clusters: Sequence[str]) -> tuple[str, Array]:
    """The likelihood under which the best law is likelier, and AICc of each law under it."""
    n = len(set(clusters))
    by_errors = {}
    for errors in ("gaussian", "laplace"):
        values = []
        for candidate in found:
            k = len(candidate.law.free) + 1
            spare = n - k - 1
            correction = 2 * k + 2 * k * (k + 1) / spare if spare > 0 else np.inf
            values.append(candidate.deviances(clusters)[errors] + correction)
        by_errors[errors] = np.array(values)
    errors = min(by_errors, key=lambda name: float(np.min(by_errors[name])))
    return errors, by_errors[errors]


def _tests(
    found: list[_Candidate], rows: ResultsData, rng: np.random.Generator, n_draws: int
) -> tuple[NestedTest, ...]:
    tests = []
    for small in found:
        for large in found:
            if is_nested(small.law, large.law) and len(rows) > len(large.law.free):
                labels = (small.label, large.label)
                thetas = (small.theta_squares, large.theta_squares)
                tests.append(
                    nested_test(
                        small.squares, large.squares, thetas, rows.clusters, rng, labels=labels, n_draws=n_draws
                    )
                )
    return tuple(tests)
