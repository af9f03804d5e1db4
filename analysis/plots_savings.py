"""The figure of what the DLCM saves against dense models of growing size. It takes an Axes and returns it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from analysis.optimum import optimum
from analysis.plots import BLUE, finish, log_axis
from analysis.result import FitResult
from analysis.savings import Savings, savings
from analysis.search import Cost
from dlcm.errors import UserError

Array = np.ndarray
_LOWEST = -100.0
"""Percent below which an interval is cut off: a baseline that needs half the FLOPs is lost, by how much more is no matter."""


@dataclasses.dataclass(frozen=True)
class BaselineSize:
    """The savings against the dense model of one size.

    Attributes:
        size: N of the dense model that is best at the FLOPs which it needs for the loss.
        savings: of the DLCM's best allocation with that loss.
        is_bound: whether the size is the smallest or largest that was run, so that a better one may lie beyond.
        dlcm_at_edge: whether a choice of the DLCM lies on an edge of its runs, so that it may save more.
        decades_outside: how far the farther of the two lies outside its runs.
    """

    size: float
    savings: Savings
    is_bound: bool
    dlcm_at_edge: bool
    decades_outside: float


def savings_by_size(
    dlcm: FitResult,
    dense: FitResult,
    cost: Cost,
    budgets: Sequence[float] | Array,
    *,
    tell: Callable[[str], None] | None = None,
) -> tuple[BaselineSize, ...]:
    """What is saved at equal predicted loss, by the size of the dense baseline.

    For each budget the DLCM is allocated best; the dense model that reaches its loss for the fewest FLOPs is the baseline. The
    interval is that of the share at the budget; the size is the one at the fits' own constants.

    Args:
        dlcm: fit of the DLCM.
        dense: fit of the dense baseline.
        cost: training FLOPs, `cost(N, D, R, P)`.
        budgets: training FLOPs of the DLCM.
        tell: called with a line before each budget.

    Returns:
        One entry a budget for which some dense model within reach has the loss, sizes rising.

    Raises:
        UserError: what `optimum` and `savings` raise, or no dense model reaches any of the losses.
    """
    found = []
    for budget in np.asarray(budgets, dtype=float).tolist():
        if tell is not None:
            tell(f"savings at {budget:.3g} FLOPs")
        best = optimum(dlcm, cost, budget, flat=None, force=True)
        saved = savings(best, dense, cost)
        if saved.dense_size is None:
            continue
        outside = max([*best.decades_outside.values(), *saved.decades_outside.values()], default=0.0)
        at_edge = any(choice.at_edge for choice in best.choices)
        found.append(BaselineSize(saved.dense_size, saved, saved.dense_at_edge, at_edge, outside))
    if not found:
        raise UserError(
            f"{dlcm.source}: no dense model within reach has the loss of any DLCM; savings are not identified"
        )
    return tuple(sorted(found, key=lambda entry: entry.size))


def plot_savings(ax: Axes, found: Sequence[BaselineSize]) -> Axes:
    """FLOPs saved at equal loss against the size of the dense baseline, with 95% intervals.

    Filled where both models lie inside the runs, hollow where one does not; a triangle where N, R or P of the DLCM lie on an edge
    of its runs, beyond which it may save more. A baseline of the smallest or largest size that was run, beyond which a better
    one may lie, is left out.

    Args:
        ax: where to draw.
        found: as `savings_by_size` returns it.

    Raises:
        UserError: every baseline is of the smallest or largest size.
    """
    found = [entry for entry in found if not entry.is_bound]
    if not found:
        raise UserError(
            "the best dense size is the smallest or largest that was run at every budget; run dense models beyond it"
        )
    size = np.array([entry.size for entry in found])
    share = 100 * np.array([entry.savings.share for entry in found], dtype=float)
    ends = np.array([(entry.savings.low, entry.savings.high) for entry in found], dtype=float) * 100
    sure = np.array([entry.decades_outside == 0 for entry in found])
    least = np.array([entry.dlcm_at_edge for entry in found])
    known = np.asarray(np.isfinite(ends).all(axis=1))
    ax.axhline(0, color="#707070", linewidth=0.8, zorder=1)
    ax.plot(size, share, color=BLUE, linewidth=0.9, alpha=0.5, zorder=2)
    for own, label, hollow, marker in (
        (sure & ~least, "inside the runs", False, "o"),
        (~sure & ~least, "beyond the runs", True, "o"),
        (least, "at least: DLCM at an edge of its runs", True, "^"),
    ):
        if not own.any():
            continue
        face = "white" if hollow else BLUE
        style: dict[str, Any] = {"marker": marker, "markersize": 4, "color": BLUE, "markerfacecolor": face}
        bars = np.where(known[:, None], np.abs(ends - share[:, None]), 0.0)[own].T
        ax.errorbar(
            size[own], share[own], bars, linestyle="none", elinewidth=0.9, capsize=1.8, label=label, zorder=3, **style
        )
    log_axis(ax, "x", size)
    seen = [0.0, *share, *ends[known].ravel()]
    low, high = max(min(seen), min(_LOWEST, *share)), max(seen)
    margin = 0.08 * (high - low or 1.0)
    ax.set_ylim(low - margin, high + margin)
    bars = ", 95%" if known.any() else ""
    y = f"training FLOPs saved{bars} (%)"
    return finish(ax, "dense baseline: parameters N", y, legend="top", title="at equal predicted loss; 0: as dense")
