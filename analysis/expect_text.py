"""Expectations as text for people."""

from collections.abc import Sequence

from analysis.design import count_runs
from analysis.expect import Expected, Quantity
from analysis.variations import Variation, most_telling

_FAMILY = {"dlcm": "DLCM", "dense": "Dense"}


def format_expected(expected: Sequence[Expected]) -> str:
    """What each family of runs will tell: law, constants, and the optimum with its expected interval."""
    if not expected:
        return ""
    first = expected[0]
    lines = [
        f"What it will teach: 95% of {first.n_simulated} simulated sweeps, refitted, fall into these intervals",
        f"  noise {100 * first.prior.noise:.2g}% of the loss from run to run",
    ]
    for found in expected:
        lines += [
            "",
            f"{_FAMILY[found.family]}, {count_runs(found.n_runs)}, prior: {found.prior.source}",
            f"  {found.law.equation}",
        ]
        lines += [f"  fitted with {change.describe()}" for change in found.law.changes]
        if beyond := found.beyond_prior:
            far = ", ".join(f"{name} by {decades:.1f} decades" for name, decades in beyond.items())
            lines.append(
                f"  the prior is extrapolated ({far}): a rough guide; fit first results, and give them with --prior"
            )
        lines += _rows(found.constants)
        lines += [f"  least loss at {found.target:.3g} training FLOPs:", *_rows((*found.choices, found.loss))]
    return "\n".join(lines)


def _rows(quantities: Sequence[Quantity]) -> list[str]:
    """One aligned line a quantity."""
    cells = []
    for q in quantities:
        interval = q.held or f"{q.low:.4g} to {q.high:.4g}"
        cells.append(
            (q.name, f"{q.planted:.4g}", interval + _edges(q) + (f"   not identified: {q.doubt}" if q.doubt else ""))
        )
    name, value = (max((len(row[i]) for row in cells), default=0) for i in (0, 1))
    return [f"    {row[0].ljust(name)}  {row[1].rjust(value)}   {row[2]}".rstrip() for row in cells]


def _edges(quantity: Quantity) -> str:
    if quantity.held:
        return ""
    sides = ((quantity.at_low, "lower"), (quantity.at_high, "upper"))
    told = [f"{100 * share:.0f}% at the {side} end of its range" for share, side in sides if share > 0.05]
    return f"   ({', '.join(told)})" if told else ""


def format_variations(variations: Sequence[Variation]) -> str:
    """The table of one-step changes: runs, cost, and the factor by which each answer gets wider (above 1) or narrower."""
    told = [v for v in variations if not v.refused]
    names = list(dict.fromkeys(name for v in told for name in v.widths))
    if not names:
        return ""
    rows = [["change", "runs", "FLOPs", *names]]
    rows += [
        [v.label, str(v.n_runs), f"x{v.flops:.2f}", *(_factor(v.widths.get(name)) for name in names)] for v in told
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["Which values matter: the scatter of each answer (central 80%, offsets held at 0) over that of this sweep"]
    lines += [
        "  " + "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines += [f"  {v.label}: not simulated: {v.refused}" for v in variations if v.refused]
    for name in ("P", "N", "R"):
        worst = most_telling(tuple(variations), name)
        if worst is not None and worst.widths[name] > 1.05:
            lines.append(f"  {name} rests most on {worst.label.removeprefix('without ')}.")
    return "\n".join(lines)


def _factor(value: float | None) -> str:
    if value is None:
        return "-"
    return f"x{value:.2f}" if value < 10 else f"x{value:.0f}"
