"""What holds for the families of models in a set of runs: the law of each, and the budget that stands for them."""

import math
from collections.abc import Callable, Iterable

from analysis import laws
from analysis.data import ResultsData
from analysis.design import count_runs, largest_level
from analysis.fit import fit
from analysis.law import FAMILIES
from analysis.result import FitResult
from dlcm.errors import UserError

Tell = Callable[[str], None]
"""Called with a line before what takes time."""
FAMILY_LAWS = {"dense": laws.CHINCHILLA, "dlcm": laws.COMPRESSION_AWARE}
NO_FLOPS = "the training FLOPs of the runs are not known; map them with --columns C=..."


def fit_families(
    data: ResultsData,
    tell: Tell,
    *,
    seed: int,
    n_bootstrap: int,
    families: Iterable[str] = FAMILIES,
) -> dict[str, FitResult]:
    """Family -> fit of its law, for those of `families` that have runs.

    Args:
        data: the runs.
        tell: called with a line before each fit.
        seed: of starts and bootstrap.
        n_bootstrap: refits for the intervals.
        families: to fit, in this order.
    """
    found = {}
    for family in families:
        law, n_runs = FAMILY_LAWS[family], len(data.of_family(family))
        if n_runs:
            tell(f"fitting {law.name} to {count_runs(n_runs)}, {n_bootstrap} bootstrap refits")
            found[family] = fit(law, data, seed=seed, n_bootstrap=n_bootstrap)
    return found


def require_budget(budget: float) -> float:
    """A budget that was asked for.

    Raises:
        UserError: no number above 0.
    """
    if not (math.isfinite(budget) and budget > 0):
        raise UserError(f"--budget {budget:g}: give training FLOPs, a number above 0")
    return float(budget)


def largest_budget(data: ResultsData) -> float:
    """Largest budget that DLCM runs trained with, FLOPs; of all runs where there is none of the DLCM.

    Raises:
        UserError: no run says what it cost.
    """
    rows = data.dlcm if len(data.dlcm) else data
    known = [c for c in rows.C.tolist() if c > 0]
    if not known:
        raise UserError(NO_FLOPS)
    return largest_level(known)
