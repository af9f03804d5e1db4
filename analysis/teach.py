"""What a plan will teach: the expectations of both families and the worth of each value, as `dlcm sweep plan` prints them."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.cost import cost_of_plan
from analysis.expect import N_SIMULATED, Expected, design_of, expect
from analysis.expect_text import format_expected, format_variations
from analysis.prior import Prior, default_prior
from analysis.variations import Progress, Variation, vary
from dlcm.errors import UserError

if TYPE_CHECKING:
    from sweeps.plan import Plan

_LEAST = 40
_CELLS = 100_000
"""Losses simulated at most, runs times sweeps, as long as that leaves the least number of sweeps."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """What a plan will teach.

    Attributes:
        expected: of each family that has runs, DLCM first.
        variations: of the DLCM runs; empty where they were not asked for.
        missing: why nothing can be expected; empty where something can.
    """

    expected: tuple[Expected, ...]
    variations: tuple[Variation, ...] = ()
    missing: str = ""

    def report(self) -> str:
        """As text."""
        if self.missing:
            return f"What it will teach: not simulated: {self.missing}"
        parts = [format_expected(self.expected), format_variations(self.variations)]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "expected": [e.to_dict() for e in self.expected],
            "variations": [dataclasses.asdict(v) for v in self.variations],
            "missing": self.missing or None,
        }


def teach(
    plan: "Plan",
    *,
    target: float | None = None,
    prior: Prior | None = None,
    noise: float | None = None,
    variations: bool = True,
    n: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Lesson:
    """Simulate a plan under a prior law, and every one-step change of it.

    Args:
        plan: from `sweeps.plan`.
        target: training FLOPs of the optimum; those of the plan's largest run by default.
        prior: of the DLCM or of the dense law; the shipped ones by default.
        noise: standard deviation of log loss from run to run; the prior's own by default.
        variations: whether to simulate the changes, the longer part.
        n: simulated sweeps; 200 by default, fewer where runs are many, 40 at the least.
        seed: seeds the noise.
        progress: called with (changes done, all).

    Raises:
        UserError: a prior, noise or target that cannot be used.
    """
    n = n or int(np.clip(_CELLS / len(plan), _LEAST, N_SIMULATED))
    spent = target if target is not None else max(run.flops_train_planned for run in plan.runs)
    families = [f for f in ("dlcm", "dense") if any(run.config.model.kind == f for run in plan.runs)]
    if prior is not None and prior.law.family not in families:
        raise UserError(
            f"the prior is a law of {prior.law.family} models, and the sweep has {' and '.join(families)} runs only"
        )
    priors = {f: prior if prior is not None and prior.law.family == f else default_prior(f) for f in families}
    priors = {f: p.with_noise(noise) for f, p in priors.items()}
    try:
        cost = cost_of_plan(plan)
    except UserError as error:
        return Lesson((), missing=str(error))
    found = tuple(expect(design_of(plan, f), p, cost, spent, n=n, seed=seed) for f, p in priors.items())
    changes: tuple[Variation, ...] = ()
    if variations and "dlcm" in families:
        changes = vary(plan, found[0], cost, n=max(n // 2, _LEAST // 2), seed=seed, progress=progress)
    return Lesson(found, changes)
