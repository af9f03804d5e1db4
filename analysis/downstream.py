"""Loss -> accuracy on a task, and from there accuracy at a budget: two fits in a chain, with an interval that holds both.

The first fit is a scaling law, the second an `AccuracyLaw` over its prediction: the validation loss, or the bits per byte of the
right answer, which move long before accuracies do. The floor of the second, where a model guesses, is a property of the task and
is never estimated: near it, any floor fits.

An interval of the chain pairs refits of one stage with refits of the other at random. That is right where, given the loss that a
run reached, its accuracy errs independently of how far that loss lies from the law.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis import curve_checks as checks
from analysis.accuracy_law import ERRORS, LINKS, SCORE, WEIGHT, AccuracyLaw, Errors, Link, accuracy_law, score
from analysis.chain import Accuracy, beyond
from analysis.data import ResultsData, numeric_column
from analysis.design import count_runs
from analysis.fit import N_BOOTSTRAP, fit
from analysis.intervals import ends, interval
from analysis.law import Change
from analysis.optimum import Optimum
from analysis.parametric import simulate_refits
from analysis.result import FitResult, ParameterStatus, Status
from analysis.task_data import Source, find_chance, find_items, task_data
from dlcm.errors import UserError, nearest
from dlcm.record import read_json, write_json

Array = np.ndarray
SCHEMA_VERSION = 2
LEAST_RUNS = 3
_ITEMS = 1000
"""Items of a task of unknown size, to tell an accuracy of 0 from one that is small."""


def fit_downstream(
    data: ResultsData,
    task: str,
    *,
    source: Source = "loss",
    chance: float | None = None,
    ceiling: float | None = None,
    link: Link = "sigmoid",
    errors: Errors = "binomial",
    seed: int = 0,
    n_bootstrap: int = N_BOOTSTRAP,
) -> "DownstreamFit":
    """Fit accuracy on a task over the loss, or over the bits per byte of the right answer.

    Args:
        data: results with `acc_<task>`; those that `task_data` returns, or whole ones.
        task: its name.
        source: `loss` or `bpb`.
        chance: accuracy of guessing; recorded by evaluations of this toolkit, needed otherwise.
        ceiling: highest accuracy, held there; estimated between chance and 1 where None.
        link: `sigmoid`, or `exponential` (no ceiling).
        errors: `binomial`, runs weighted by their items where these are known; or `equal`, least squares of the accuracies.
        seed: seeds starts and refits.
        n_bootstrap: refits for the intervals; 0 for none.

    Raises:
        UserError: no such task, chance is not known, accuracies that are no shares, a ceiling out of range, or too few runs.
    """
    for what, given, known in (("link", link, LINKS), ("errors", errors, ERRORS)):
        if given not in known:
            raise UserError(f"unknown {what} {given!r}{nearest(str(given), known)}")
    rows = task_data(data, task, source)
    floor = find_chance(rows, task, chance)
    if len(set(rows.run_ids)) < LEAST_RUNS or np.ptp(rows.loss) <= 0:
        raise UserError(
            f"{rows.source}: {count_runs(len(set(rows.run_ids)))} with an accuracy on {task} at {len(set(rows.loss.tolist()))} "
            f"losses; a curve needs {LEAST_RUNS} at least"
        )
    accuracy, items = numeric_column(rows.frame, f"acc_{task}", rows.source), find_items(rows, task)
    law = accuracy_law(link, floor, errors, (float(rows.loss.min()), float(rows.loss.max())))
    law = _hold_ceiling(law, ceiling)
    n_items = float(np.nanmedian(items)) if np.isfinite(items).any() else None
    items = np.where(np.isfinite(items), items, n_items or 1.0)
    weight = np.sqrt(items / items.mean()) if errors == "binomial" else np.ones(len(rows))
    # Bartlett's correction of none right among n; the law predicts something above 0
    seen = np.maximum(accuracy, 1 / (4 * (n_items or _ITEMS)))
    target = seen if errors == "equal" else score(seen, weight)
    scored = dataclasses.replace(rows, frame=rows.frame.assign(**{SCORE: target, WEIGHT: weight}))
    result = fit(law, scored, loss="mse", seed=seed, n_bootstrap=n_bootstrap, resample=simulate_refits)
    # of the accuracy's own findings the certificate has all; those of sizes and budgets are about the law of the loss
    findings = tuple(f for f in result.findings if f.name.startswith("check_"))
    seen_by_fit = hashlib.sha256(rows.hash.encode() + np.ascontiguousarray(accuracy, dtype="<f8").tobytes())
    result = dataclasses.replace(result, findings=findings, data_hash=seen_by_fit.hexdigest()[:12])
    other = accuracy_law("exponential" if link == "sigmoid" else "sigmoid", floor, errors, law.span)
    by_other = fit(other, scored, loss="mse", seed=seed, n_bootstrap=n_bootstrap, resample=simulate_refits)
    errs, spare = accuracy - law.accuracy(result.values, rows.loss), len(rows) - result.n_free
    residuals = target - law.predict(result.values, loss=rows.loss, weight=weight)
    told = n_items is not None and errors == "binomial" and spare > 0
    curve = DownstreamFit(
        task=task, source=source, fit=result, other=by_other, n_items=n_items,
        seen=(float(accuracy.min()), float(accuracy.max())), rms=float(np.sqrt(np.mean(errs**2))),
        trend=checks.trend(result, target, weight),
        notes=(*checks.pattern(rows.loss, residuals, link), *checks.families(rows, errs)),
        scatter=4 * float(items.mean()) * result.objective / spare if told else None,
    )  # fmt: skip
    return curve if curve.moves else curve.without_constants()


def _hold_ceiling(law: AccuracyLaw, ceiling: float | None) -> AccuracyLaw:
    if ceiling is None:
        return law
    if law.link == "exponential":
        raise UserError("ceiling: the exponential link has none; leave it out, or take the sigmoid")
    if not law.chance < ceiling <= 1:
        raise UserError(f"ceiling = {ceiling:g}; give a share above chance ({law.chance:g}) and up to 1")
    return law.apply(Change("fix", "ceiling", value=float(ceiling)))


@dataclasses.dataclass(frozen=True, eq=False)
class DownstreamFit:
    """Accuracy on a task over a loss.

    Attributes:
        fit: of an `AccuracyLaw`, in its own units (`score`); certified as any other fit is.
        other: the other form, fitted to the same runs.
        n_items: items of the task, the median over the runs; None where not known.
        scatter: residual variance over that of independent items; None where their number is not known.
        trend: significance of the test that the accuracy moves with the loss at all (F test against one accuracy for all runs).
        seen: lowest and highest accuracy of the runs.
        rms: root mean square of accuracies off the curve.
        notes: what else was found, in sentences.
    """

    task: str
    source: Source
    fit: FitResult
    other: FitResult
    n_items: float | None
    scatter: float | None
    trend: float
    seen: tuple[float, float]
    rms: float
    notes: tuple[str, ...] = ()

    @property
    def law(self) -> AccuracyLaw:
        """The curve."""
        assert isinstance(self.fit.law, AccuracyLaw)
        return self.fit.law

    @property
    def other_law(self) -> AccuracyLaw:
        """The curve of the other form."""
        assert isinstance(self.other.law, AccuracyLaw)
        return self.other.law

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return self.law.chance

    @property
    def status(self) -> Status:
        """Of the fit: `certified` only where every check passed and every constant is identified."""
        return self.fit.status

    @property
    def moves(self) -> bool:
        """Whether the accuracy moves with the loss; where it does not, nothing can be predicted from a loss."""
        return self.trend < checks.TREND

    @property
    def unit(self) -> str:
        """What is predicted from, with its unit."""
        return "loss (nats/token)" if self.source == "loss" else "right answer (bits/byte)"

    def predict(self, loss: Any) -> Array:
        """Accuracy at a loss (or at bits per byte)."""
        return self.law.accuracy(self.fit.values, loss)

    def predict_other(self, loss: Any) -> Array:
        """Accuracy at a loss by the other form: what the choice of form moves, which an interval of one form does not hold."""
        return self.other_law.accuracy(self.other.values, loss)

    def predict_interval(self, loss: Any) -> tuple[Array, Array]:
        """95% interval of the accuracy to be expected at a loss, where the form of the curve is the right one.

        Raises:
            UserError: the curve was fitted without a bootstrap.
        """
        return self._interval(self.law, self.fit, loss)

    def predict_either(self, loss: Any) -> tuple[Array, Array]:
        """From the lowest to the highest end of the 95% intervals by the two forms.

        Raises:
            UserError: the curve was fitted without a bootstrap.
        """
        own, other = self.predict_interval(loss), self._interval(self.other_law, self.other, loss)
        return np.minimum(own[0], other[0]), np.maximum(own[1], other[1])

    @staticmethod
    def _interval(law: AccuracyLaw, result: FitResult, loss: Any) -> tuple[Array, Array]:
        if not len(result.replicates):
            raise UserError("this curve has no bootstrap; fit again with n_bootstrap > 0 for intervals")
        columns = {p.name: result.replicates[:, i, None] for i, p in enumerate(result.parameters)}
        low, high = interval(law.accuracy(columns, np.atleast_1d(np.asarray(loss, dtype=float))))
        return low.reshape(np.shape(loss)), high.reshape(np.shape(loss))

    def at(self, fitted: FitResult, **inputs: float) -> Accuracy:
        """Accuracy to be expected at N, D, R, P: of a law of the loss, chained with this curve.

        Args:
            fitted: a fit of the loss that the curve starts from.
            **inputs: of the law.

        Raises:
            UserError: the law is of another loss, or an input is missing.
        """
        self._require_same(fitted.convention.loss)
        loss = float(fitted.predict(**inputs))
        draws = np.array([float(fitted.law.predict(v, **inputs)) for v in fitted.replicate_values()])
        where = ", ".join(f"{name} = {value:.4g}" for name, value in inputs.items())
        name, value = next(iter(inputs.items()))
        place = (f"{where} ({fitted.law.name})", f"{name} = {value:.3g}")
        notes = () if fitted.sound else (f"the law is {fitted.status}",)
        return self._chain(place, loss, draws, fitted.outside(**inputs), notes)

    def at_optimum(self, best: Optimum) -> Accuracy:
        """Accuracy to be expected of the best allocation of a budget; every refit of the law has its own best one.

        Raises:
            UserError: the optimum is of another loss.
        """
        self._require_same(best.convention.loss)
        N, D, R, P = best.point
        shape = f"N = {N:.3g}, D = {D:.3g}" + ("" if P == 0 else f", R = {R:.3g}, P = {P:.3g}")
        where = f"{best.budget:.3g} {best.unit} ({best.law}, {shape})"
        family = "DLCM" if P > 0 else "dense"
        place = (where, f"{family} at {best.budget:.3g} FLOPs")
        return self._chain(place, best.loss, best.replicates[:, 4], best.decades_outside, best.notes)

    def _require_same(self, loss: str) -> None:
        if loss != self.fit.convention.loss:
            own = self.fit.convention.definitions()["loss"]
            raise UserError(
                f"task {self.task}: the curve starts from {own}, the law predicts another loss; "
                "fit the law to task_data(data, task, source)"
            )

    def _chain(
        self,
        place: tuple[str, str],
        loss: float,
        draws: Array,
        outside: Mapping[str, float],
        notes: tuple[str, ...],
    ) -> Accuracy:
        paired = self._paired(self.law, self.fit, draws)
        by_other = self._paired(self.other_law, self.other, draws)
        own, other = (ends(found) if len(found) else None for found in (paired, by_other))
        return Accuracy(
            task=self.task,
            where=place[0],
            short=place[1],
            unit=self.unit,
            loss=loss,
            loss_interval=ends(draws) if len(draws) else None,
            accuracy=float(self.predict(loss)),
            interval=own,
            other=(self.other_law.link, float(self.predict_other(loss))),
            either=(min(own[0], other[0]), max(own[1], other[1])) if own and other else None,
            beyond=beyond(loss, self.law.span),
            span=self.law.span,
            decades_outside=dict(outside),
            reason="" if self.moves else self.no_trend,
            notes=notes if self.fit.sound else (*notes, f"the curve is {self.status}"),
            replicates=paired,
        )

    def _paired(self, law: AccuracyLaw, result: FitResult, losses: Array) -> Array:
        """Accuracies of the refits of a curve at the losses of the refits of a law, paired at random."""
        if not len(losses) or not len(result.replicates):
            return np.empty(0)
        n = max(len(losses), len(result.replicates))
        at = np.resize(np.random.default_rng(self.fit.seed).permutation(losses), n)
        return law.accuracy(
            {p.name: np.resize(result.replicates[:, i], n) for i, p in enumerate(result.parameters)}, at
        )

    def without_constants(self) -> "DownstreamFit":
        """The curve with no constant identified: of accuracies that do not move with the loss none has a meaning."""
        parameters = tuple(
            p if p.status is ParameterStatus.HELD
            else dataclasses.replace(p, status=ParameterStatus.NOT_IDENTIFIED, reason=self.no_trend)
            for p in self.fit.parameters
        )  # fmt: skip
        gravity = list(Status)
        status = max(self.fit.status, Status.NOT_IDENTIFIED, key=gravity.index)
        notes = (f"not identified: {self.no_trend}", *(n for n in self.fit.notes if not n.startswith("not identified")))
        return dataclasses.replace(
            self, fit=dataclasses.replace(self.fit, parameters=parameters, status=status, notes=notes)
        )

    @property
    def no_trend(self) -> str:
        """That the accuracy does not move, in words."""
        what = "all at chance" if self.seen[0] <= self.chance + 0.01 and self.seen[1] <= self.chance + 0.05 else "flat"
        return f"accuracies do not rise as the {self.source} falls (F test, p = {self.trend:.2g}; {what})"

    def report(self) -> str:
        """The curve as text: constants, whether it can be trusted, how to repeat it."""
        from analysis.downstream_text import format_curve

        return format_curve(self)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("fit", "other")}
        facts = {"chance": self.chance, "link": self.law.link, "status": str(self.status), "moves": self.moves}
        lists = {"seen": list(self.seen), "notes": list(self.notes)}
        fits = {"fit": self.fit.to_dict(), "other": self.other.to_dict()}
        return {"schema": SCHEMA_VERSION, **own, **lists, **facts, **fits}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "curve") -> "DownstreamFit":
        """The inverse of `to_dict`.

        Raises:
            UserError: another schema, or a missing key.
        """
        if data.get("schema") != SCHEMA_VERSION or "task" not in data:
            raise UserError(f"{where}: no accuracy curve of schema {SCHEMA_VERSION}; fit again")
        try:
            own: dict[str, Any] = {f.name: data[f.name] for f in dataclasses.fields(cls)}
            own |= {
                "fit": FitResult.from_dict(data["fit"], where),
                "other": FitResult.from_dict(data["other"], where),
                "seen": tuple(data["seen"]),
                "notes": tuple(data["notes"]),
            }
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: not a curve written by this version ({error}); fit again") from None
        return cls(**own)

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "DownstreamFit":
        """Read what `save` wrote."""
        return cls.from_dict(read_json(Path(path)), str(path))
