"""A proposed design as text and as a commented sweep file."""

from collections import Counter
from typing import TYPE_CHECKING

from analysis.expect import Quantity
from analysis.variations import BUDGET, value_of

if TYPE_CHECKING:
    from analysis.proposal import Proposal

_NAMES = {"size": "N", "compression_ratio": "R", "concept_share": "P", BUDGET: "tokens"}


def format_proposal(proposal: "Proposal") -> str:
    """What was chosen, and what it will tell beside the full grid of equal cost."""
    plan, grid = proposal.plan, proposal.grid
    lines = [
        f"Proposed: {len(plan)} runs of {proposal.n_candidates:,} candidates, {plan.flops:.3g} of "
        f"{proposal.budget:.3g} training FLOPs",
        *_histogram(proposal),
        f"Beside it, the full grid of the template's values: {len(grid)} runs, {grid.flops:.3g} training FLOPs, "
        f"sizes x{proposal.grid_scale:.3g}",
        "",
        f"Expected 95% intervals ({proposal.expected.n_simulated} simulated sweeps of each, noise "
        f"{100 * proposal.expected.prior.noise:.2g}% of the loss; prior: {proposal.expected.prior.source})",
    ]
    narrowing = proposal.narrowing
    rows = [["", "prior", "proposed", "full grid", "scatter"]]
    for q in proposal.expected.quantities:
        other = proposal.expected_grid[q.name]
        ratio = f"x{narrowing[q.name]:.2f}" if q.name in narrowing else "-"
        rows.append([q.name, f"{q.planted:.4g}", _interval(q), _interval(other), ratio])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    target = f"N, R, P and loss: the optimum at {proposal.expected.target:.3g} training FLOPs"
    return "\n".join([*lines, f"  {target}; scatter: central 80% of the proposed over that of the grid"])


def _interval(quantity: Quantity) -> str:
    if quantity.held:
        return quantity.held
    edge = f" ({100 * quantity.at_edge:.0f}% at an end)" if quantity.at_edge > 0.05 else ""
    return f"{quantity.low:.4g} to {quantity.high:.4g}{edge}"


def _histogram(proposal: "Proposal") -> list[str]:
    """How often each value was chosen, one line an axis."""
    from sweeps.plan_table import short_count

    lines = []
    for axis, name in _NAMES.items():
        if axis == BUDGET:
            values = [run.tokens / run.params.non_embedding for run in proposal.plan.runs]
            lines.append(f"  tokens per parameter: {min(values):.3g} to {max(values):.3g}")
            continue
        counts = Counter(value_of(run, axis) or 0.0 for run in proposal.plan.runs)
        shown = (f"{short_count(v) if axis == 'size' else f'{v:g}'} ({counts[v]})" for v in sorted(counts))
        lines.append(f"  {name}: {', '.join(shown)}")
    return lines


def proposal_yaml(proposal: "Proposal") -> str:
    """The sweep file, with what it was made from as a comment at its head."""
    expected = proposal.expected
    told = "; ".join(f"{q.name} {q.low:.4g} to {q.high:.4g}" for q in expected.choices if not q.held)
    head = [
        f"Runs chosen to pin down the optimum at {expected.target:.3g} training FLOPs, under {proposal.budget:.3g} FLOPs.",
        f"Prior: {expected.prior.source}; noise {expected.prior.noise:.3g} of log loss.",
        f"Expected 95% intervals: {told or 'none: nothing is free'}.",
        "The dense baseline is not among the runs: add a baseline block for it.",
    ]
    return "".join(f"# {line}\n" for line in head) + proposal.plan.sweep.to_yaml()
