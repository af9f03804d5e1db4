"""What the profile route found: profiles with status, how their vertices grow, and how they compare with a fitted law."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.budget_groups import Curve
from analysis.convention import Convention
from dlcm.errors import UserError

if TYPE_CHECKING:
    from analysis.isoflop_check import Disagreement

Array = np.ndarray
RULES = {"local parabola": "a local parabola", "parabola": "a parabola through all points"}
"""Other rules for a vertex, by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """The runs of one budget as a curve, and its vertex.

    Attributes:
        held: what is the same in all its runs: R and P, or N and P, as they were asked for.
        budget: training FLOPs, the median of the runs'.
        curve: its runs.
        status: `ok`, or `refused`, with the reason.
        value: N* (or R*, P*), None where it is refused. low, high: 95% interval; None without a bootstrap.
        tokens: D* that goes with it. tokens_low, tokens_high: its interval.
        loss: at the vertex, nats per token.
        unit_error: error of its place over that of the runs' log losses; by it the vertices are weighted.
        losses: of its runs, brought to the budget, (n,). curvature, skew: of log loss at the vertex, along the axis.
        others: the vertex by other rules, of RULES; a rule that finds none is not there.
    """

    held: Mapping[str, float | str]
    budget: float
    curve: Curve
    losses: Array
    status: str
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    tokens: float | None = None
    tokens_low: float | None = None
    tokens_high: float | None = None
    loss: float | None = None
    unit_error: float = np.inf
    curvature: float = np.nan
    skew: float = 0.0
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        """Whether it has a vertex."""
        return self.status == "ok"


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a vertex moves with the budget: a straight line through the vertices.

    Attributes:
        name: N, D, R or P.
        held: of the profiles; empty where several sets of profiles share one slope.
        value: a of N* ~ C^a; of P the change over a decade of budgets. None where it is not identified.
        low: lower end of the 95% interval; None without a bootstrap. high: upper end.
        coefficient: N* at 1 FLOP, so that N* = coefficient C^a; None for P and where slopes are shared.
        spread: lowest and highest value over the rules for the vertex.
        scatter: root mean square of the vertices about the line (relative; of P absolute).
        n_vertices: how many it goes through.
        reason: why it is not identified.
    """

    name: str
    held: Mapping[str, float | str]
    value: float | None
    low: float | None = None
    high: float | None = None
    coefficient: float | None = None
    spread: tuple[float, float] | None = None
    scatter: float | None = None
    n_vertices: int = 0
    reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class IsoFlop:
    """Vertices over budgets.

    Attributes:
        over: N, R or P.
        profiles: by what is held, then by budget.
        growth: of the coordinate, and of D where it is N; for each set of held values, and one slope for all behind them where
            there are several.
        replicates: places of the vertices (log N, log R or log odds of P) in each draw of the bootstrap, NaN where a draw has no
            vertex, (n_bootstrap, profiles).
        multipliers: of the clusters in each draw, (n_bootstrap, clusters), in the order of `clusters`.
        n_outside: runs that belong to no profile.
        check: how the vertices compare with a fitted law; None where there is none.
    """

    over: str
    family: str
    profiles: tuple[Profile, ...]
    growth: tuple[Growth, ...]
    replicates: Array
    n_runs: int
    n_outside: int
    tolerance: float
    n_bootstrap: int
    seed: int
    source: str
    data_hash: str
    convention: Convention
    check: "Disagreement | None" = None

    def __getitem__(self, name: str) -> Growth:
        """The growth of N, D, R or P: over all profiles where there are several sets of them."""
        for growth in reversed(self.growth):
            if growth.name == name:
                return growth
        raise UserError(f"isoFLOP profiles over {self.over} say nothing of {name!r}")

    def report(self) -> str:
        """As text."""
        from analysis.isoflop_text import format_report

        return format_report(self)

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, the draws of the bootstrap left out."""
        from analysis.isoflop_text import to_json

        return to_json(self)
