"""One budget and all that is said of it: the best allocation of each family, choices held against it, savings against dense."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.allocation import Bounds
from analysis.budget import Cost
from analysis.cost import OWN_WAY, Shapes, shapes_of_results, unit_of
from analysis.data import ResultsData
from analysis.design import largest_level
from analysis.families import largest_budget
from analysis.law import FAMILIES
from analysis.optimum import Optimum, optimum
from analysis.own_cost import OwnPrices
from analysis.regret import Regret, regret
from analysis.result import FitResult
from analysis.savings import Savings, savings
from dlcm.errors import UserError

Prices = Shapes | OwnPrices
Choice = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A budget to be spent.

    Attributes:
        cost: `cost(N, D, R, P)` in the unit of the budget.
        budget: what to spend.
        tokens: D where it is given.
    """

    cost: Cost
    budget: float
    tokens: float | None = None

    @property
    def unit(self) -> str:
        """What the budget counts."""
        return unit_of(self.cost)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the fits say of one budget.

    Attributes:
        optima: family (or name of a law that says no family) -> best allocation.
        regrets: family -> what each choice costs against it.
        savings: the DLCM against the dense baseline at equal predicted loss, where both were fitted.
        missing: family -> why it has no answer, where another one has.
    """

    optima: Mapping[str, Optimum]
    regrets: Mapping[str, tuple[Regret, ...]]
    savings: Savings | None
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def report(self) -> str:
        """As text."""
        parts = []
        for family, best in self.optima.items():
            parts.append("\n".join([best.report(), *(f"  - {r.text}" for r in self.regrets.get(family, ()))]))
        parts += [self.savings.text] if self.savings else []
        return "\n\n".join([*parts, *(f"{family}: no answer: {reason}" for family, reason in self.missing.items())])

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        first = next(iter(self.optima.values()))
        return {
            "budget_flops": first.budget,
            "unit": first.unit,
            "tokens": first.tokens,
            "optima": {family: best.to_dict() for family, best in self.optima.items()},
            "regrets": {family: [r.to_dict() for r in found] for family, found in self.regrets.items()},
            "savings": self.savings.to_dict() if self.savings else None,
            "missing": dict(self.missing),
        }


def answer(
    fits: Mapping[str, FitResult],
    ask: Ask,
    choices: Sequence[Choice] = (),
    *,
    bounds: Bounds | None = None,
    limit: float | None = None,
    force: bool = False,
) -> Answer:
    """Spend one budget under each fit.

    Args:
        fits: family -> fit.
        ask: the budget.
        choices: values of N, D, R, P to hold against the optimum; one that names R or P is a choice of a DLCM.
        bounds: as for `optimum`.
        limit: as for `optimum`.
        force: as for `optimum`.

    Raises:
        UserError: what `optimum` raises where no fit has an answer, what `regret` and `savings` raise, or a choice that no fit
            describes.
    """
    settings: dict[str, Any] = {"tokens": ask.tokens, "bounds": bounds, "limit": limit, "force": force}
    optima: dict[str, Optimum] = {}
    failed: dict[str, UserError] = {}
    for family, fit in fits.items():
        try:
            optima[family] = optimum(fit, ask.cost, ask.budget, **settings)
        except UserError as error:
            failed[family] = error
    if not optima:
        raise next(iter(failed.values()))
    regrets: dict[str, tuple[Regret, ...]] = {}
    for choice in choices:
        for family in _described_by(choice, {name: fits[name] for name in optima}):
            arguments: dict[str, Any] = {**choice, **settings}
            found = regret(fits[family], ask.cost, ask.budget, **arguments)
            regrets[family] = (*regrets.get(family, ()), found)
    saved = savings(optima["dlcm"], fits["dense"], ask.cost) if set(FAMILIES) <= optima.keys() else None
    return Answer(optima, regrets, saved, {family: str(error) for family, error in failed.items()})


def _described_by(choice: Choice, fits: Mapping[str, FitResult]) -> list[str]:
    if set(choice) & {"R", "P"} and set(fits) - {"dense"}:
        return [family for family in fits if family != "dense"]
    return list(fits)


def fits_by_family(fits: Sequence[FitResult]) -> dict[str, FitResult]:
    """Family -> fit; one of both families counts for either, one that names no family stands under its law's name.

    Raises:
        UserError: two fits of one family, fits under different conventions, or a law that is no loss of N, D, R and P.
    """
    found: dict[str, FitResult] = {}
    for fit in fits:
        own = {f: fit.for_family(f) for f in ("dlcm", "dense")} if fit.law.is_joint else {}
        for family, one in (own or {fit.law.family or fit.law.name: fit}).items():
            if family in found:
                raise UserError(
                    f"two fits describe {family} models ({found[family].law.name}, {fit.law.name}); give one"
                )
            found[family] = one
    for fit in fits[1:]:
        fit.convention.require_same(fits[0].convention, "an optimum")
    order = ("dlcm", "dense")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def find_prices(
    results: Path | None,
    fits: Sequence[FitResult],
    *,
    cost: str | None = None,
    inference_cost: str | None = None,
    vocab_size: int | None = None,
    seq_len: int | None = None,
) -> Prices:
    """What the models cost: as the user wrote it, or the shapes of the sweep behind results or fits.

    Args:
        results: a sweep folder or a results file; None where there are fits alone.
        fits: where there are no results, those that they were made from are looked for.
        cost: training FLOPs as arithmetic, see `OwnPrices`.
        inference_cost: FLOPs per served token, likewise.
        vocab_size: prices shapes apart from their sweep.
        seq_len: their window, where no results tell it.

    Raises:
        UserError: the models cannot be priced; with the ways out.
    """
    if cost is not None:
        return OwnPrices(cost, inference_cost)
    if inference_cost is not None:
        raise UserError("--inference-cost: goes with --cost; by itself the shapes of the sweep tell what serving costs")
    if vocab_size is not None and seq_len is not None:
        return Shapes(vocab_size, seq_len)
    if results is not None:
        return shapes_of_results(results, vocab_size=vocab_size, seq_len=seq_len)
    for fit in fits:
        if Path(fit.source).exists():
            return shapes_of_results(fit.source, vocab_size=vocab_size, seq_len=seq_len)
    raise UserError(
        f"a fit tells no cost, and the results behind it ({fits[0].source}) are not here; give the sweep folder "
        f"and --fit FIT.json, or --vocab-size and --seq-len, or {OWN_WAY}"
    )


def budget_of_runs(prices: Prices, data: ResultsData | None, fits: Mapping[str, FitResult]) -> float:
    """Training FLOPs of the largest runs, by the results where they tell it, or else by what their models cost.

    Raises:
        UserError: it is not known.
    """
    if data is not None:
        if (data.C > 0).any():
            return largest_budget(data)
        spent = np.asarray(prices.training()(data.N, data.D, data.R, data.P), dtype=float)
        return largest_level(spent[np.isfinite(spent)])
    largest = max(fit.ranges["C"][1] for fit in fits.values())
    if largest > 0:
        return largest
    raise UserError("the fit does not tell what its runs cost; say what to spend with --budget")
