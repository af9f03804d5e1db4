"""What was measured, before any law: realised ratios run by run, and the best of either family at matched compute."""

import dataclasses

import numpy as np
import pandas as pd

from analysis.data import ResultsData, numeric_column
from analysis.design import SAME_BUDGET, design_groups, find_levels

RATIO_TOLERANCE = 0.05
"""Training FLOPs within this ratio are one budget."""


def ratio_table(data: ResultsData, tolerance: float = RATIO_TOLERANCE) -> pd.DataFrame:
    """Target and realised tokens per concept of each DLCM run, and whether both realised ones are within tolerance.

    Without rows where there is no DLCM run, or where the table does not say which ratio was asked for.
    """
    rows = data.dlcm
    if "compression_target" not in rows.frame or "tokens_per_concept_train" not in rows.frame:
        return pd.DataFrame(columns=["run", "target R", "training R", "evaluation R", "held"])
    target = numeric_column(rows.frame, "compression_target", rows.source)
    train = numeric_column(rows.frame, "tokens_per_concept_train", rows.source)
    evaluation = numeric_column(rows.frame, "tokens_per_concept", rows.source)
    held = (np.abs(train / target - 1) <= tolerance) & (np.abs(evaluation / target - 1) <= tolerance)
    return pd.DataFrame(
        {
            "run": rows.run_ids,
            "target R": target,
            "training R": train,
            "evaluation R": evaluation,
            "held": np.where(held, "yes", "NO"),
        }
    )


@dataclasses.dataclass(frozen=True)
class Best:
    """The best design of a family at one budget: mean over its seeds."""

    label: str
    loss: float
    flops: float
    n_seeds: int
    n_designs: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Dense against DLCM at one budget.

    Attributes:
        difference: loss of the best DLCM minus that of the best dense design, nats.
        error: its standard error from repeated seeds; None where no design was repeated.
    """

    flops: float
    dense: Best
    dlcm: Best
    difference: float
    error: float | None

    def describe(self) -> str:
        """The finding in a sentence."""
        error = (
            f" ± {self.error:.3f} (standard error)" if self.error is not None else " (one seed each: no error is known)"
        )
        if self.error is not None and abs(self.difference) < 2 * self.error:
            verdict = "no difference beyond two standard errors"
        else:
            # without repeated seeds a difference may be noise: then it is stated, not judged
            verb = "wins" if self.error is not None else "is lower"
            verdict = f"the {'dense model' if self.difference > 0 else 'DLCM'} {verb} at this scale"
        dense, dlcm = (
            f"{b.loss:.4f} ({b.label}, of {b.n_designs} design{'s' * (b.n_designs != 1)})"
            for b in (self.dense, self.dlcm)
        )
        return (
            f"{self.flops:.3g} FLOPs: {verdict}. Best dense {dense}, best DLCM {dlcm}; "
            f"DLCM minus dense {self.difference:+.4f} nats{error}"
        )


def compare_at_matched_compute(data: ResultsData) -> list[Comparison]:
    """The best design of each family at every budget at which both were run.

    The best of more designs is lower by chance alone; the counts stand beside the losses for that reason.
    """
    noise = seed_noise(data)
    found = []
    at, budgets = find_levels(data.C, SAME_BUDGET)
    for k, level in enumerate(budgets):
        rows = data.take(at == k)
        if not len(rows.dense) or not len(rows.dlcm) or rows.dense is rows.dlcm:
            continue
        dense, dlcm = _best(rows.dense), _best(rows.dlcm)
        error = None if noise is None else noise * float(np.sqrt(1 / dense.n_seeds + 1 / dlcm.n_seeds))
        found.append(Comparison(level, dense, dlcm, dlcm.loss - dense.loss, error))
    return found


def seed_noise(data: ResultsData) -> float | None:
    """Standard deviation of the loss between seeds, pooled over designs that were repeated; None where none was."""
    squares, freedom = 0.0, 0
    for family in (data.dense, data.dlcm):
        for rows in design_groups(family):
            squares += float(np.sum((family.loss[rows] - family.loss[rows].mean()) ** 2))
            freedom += len(rows) - 1
    return float(np.sqrt(squares / freedom)) if freedom else None


def _best(rows: ResultsData) -> Best:
    groups = design_groups(rows)
    means = [float(rows.loss[g].mean()) for g in groups]
    chosen = groups[int(np.argmin(means))]
    N, P, R = (float(np.median(v[chosen])) for v in (rows.N, rows.P, rows.R))
    label = f"N {N:.3g}" + (f", R {R:.3g}, P {P:.2f}" if P > 0 else "")
    return Best(label, min(means), float(np.median(rows.C[chosen])), len(chosen), len(groups))
