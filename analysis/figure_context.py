"""What figures are drawn from: the runs, and what follows from them, each found when the first figure asks for it and kept."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd

from analysis import laws
from analysis.data import ResultsData
from analysis.design import SAME_BUDGET, count_runs
from analysis.families import Tell, fit_families, largest_budget
from analysis.fit import fit
from analysis.law import FAMILIES
from analysis.result import FitResult
from analysis.search import Cost
from dlcm.errors import UserError

if TYPE_CHECKING:
    from analysis.frontier import Frontier
    from analysis.optimum import Optimum

Value = TypeVar("Value")
_POINTS = 13


@dataclasses.dataclass(frozen=True, eq=False)
class FigureContext:
    """The runs, and all that figures share. A property raises a `UserError` that says in one line what is missing.

    Attributes:
        data: the usable runs.
        find_cost: training FLOPs, `cost(N, D, R, P)`, or the `UserError` that tells why they are not known.
        saved: family -> fit that was made before; other families are fitted to the runs.
        asked: training FLOPs that were asked for; the largest that was run where None.
        folder: of the sweep, with its runs; None where there are arrays alone.
        table: all rows of the results, those that did not end well too; those of `data` where None.
        tasks: whose accuracies are drawn; all of them where empty. chance: what guessing scores, where it is not recorded.
        seed: of starts and bootstrap. n_bootstrap: refits for intervals and bands.
        tell: called with a line before what takes time.
        notes: what was left out of figures that could be drawn all the same.
    """

    data: ResultsData
    find_cost: Callable[[], Cost]
    saved: Mapping[str, FitResult] = dataclasses.field(default_factory=dict)
    asked: float | None = None
    folder: Path | None = None
    table: pd.DataFrame | None = None
    tasks: Sequence[str] = ()
    chance: float | None = None
    seed: int = 0
    n_bootstrap: int = 200
    tell: Tell = lambda _: None
    notes: list[str] = dataclasses.field(default_factory=list)

    def optional(self, without: str, find: Callable[[], Value]) -> Value | None:
        """What `find` returns; where it cannot be had, None and a note of what is `without` it, and why."""
        try:
            return find()
        except UserError as error:
            self.notes.append(f"{without}: {error}")
            return None

    def rows(self, family: str) -> ResultsData:
        """Runs of a family.

        Raises:
            UserError: there is none.
        """
        rows = self.data.of_family(family)
        if not len(rows):
            raise UserError(f"the results hold no finished {family} run")
        return rows

    @functools.cached_property
    def cost(self) -> Cost:
        """Training FLOPs, `cost(N, D, R, P)`."""
        return self.find_cost()

    @functools.cached_property
    def fits(self) -> dict[str, FitResult]:
        """Family -> fit, of the families that have runs or a saved fit.

        Raises:
            UserError: no family has any.
        """
        wanted = [family for family in FAMILIES if family not in self.saved]
        fitted = fit_families(self.data, self.tell, seed=self.seed, n_bootstrap=self.n_bootstrap, families=wanted)
        found = {**self.saved, **fitted}
        if not found:
            raise UserError("the results hold neither a finished dense run nor a finished dlcm run")
        return found

    def fit(self, family: str) -> FitResult:
        """The fit of one family.

        Raises:
            UserError: the results hold no run of it.
        """
        if family not in self.fits:
            raise UserError(f"it needs a law of the {family} models, and the results hold no finished {family} run")
        return self.fits[family]

    @functools.cached_property
    def decay(self) -> FitResult:
        """The law of the decay gain (eq 23)."""
        rows = self.rows("dlcm")
        self.tell(f"fitting {laws.DECAY_GAIN.name} to {count_runs(len(rows))}, {self.n_bootstrap} bootstrap refits")
        return fit(laws.DECAY_GAIN, rows, seed=self.seed, n_bootstrap=self.n_bootstrap)

    @functools.cached_property
    def budget(self) -> float:
        """Training FLOPs that were asked for, or the largest budget of the DLCM runs, or of all where there is none.

        Raises:
            UserError: neither is known.
        """
        return largest_budget(self.data) if self.asked is None else self.asked

    @functools.cached_property
    def frontiers(self) -> dict[str, "Frontier"]:
        """Family -> best allocations over the budgets of its runs.

        Raises:
            UserError: the models cannot be priced, or no family has runs at two budgets.
        """
        from analysis.frontier import frontier

        found = {}
        for family, fitted in self.fits.items():
            low, high = fitted.ranges["C"]
            if low > 0 and high > SAME_BUDGET * low:
                self.tell(f"best {family} allocations of {low:.3g} to {high:.3g} FLOPs")
                found[family] = frontier(fitted, self.cost, np.geomspace(low, high, _POINTS), force=True)
        if not found:
            raise UserError("it needs runs at two training budgets or more, and known training FLOPs (--columns C=...)")
        return found

    @functools.cached_property
    def optimum(self) -> "Optimum":
        """Best allocation of the budget for the DLCM."""
        from analysis.optimum import optimum

        return optimum(self.fit("dlcm"), self.cost, self.budget, flat=None, force=True)

    def sweep_folder(self) -> Path:
        """Where the runs are.

        Raises:
            UserError: it is not known.
        """
        if self.folder is None:
            raise UserError("it reads what runs wrote into the sweep folder; give that folder")
        return self.folder

    def all_rows(self) -> pd.DataFrame:
        """The results table, diverged and failed runs included."""
        return self.data.frame if self.table is None else self.table
