"""A fit as text, in the order a reader asks: what was fitted, the constants, can I trust it, how do I repeat it."""

import textwrap
from collections import Counter

from analysis.design import count_runs
from analysis.result import Estimate, FitResult, ParameterStatus

_WIDTH = 116


def format_report(result: FitResult) -> str:
    """All of a fit as plain text."""
    blocks = [
        _head(result),
        "\n".join(format_parameters(result)),
        "\n".join(_trust(result)),
        "\n".join(_card(result)),
    ]
    return "\n\n".join(block for block in blocks if block)


def _head(result: FitResult) -> str:
    lines = [f"Law {result.law.name} ({result.law.source}): {result.status}", f"  {result.law.equation}"]
    lines += _wrap([f"reduced: {change.describe()}" for change in result.law.changes])
    lines += _wrap(list(result.notes))
    return "\n".join(lines)


def format_parameters(result: FitResult) -> list[str]:
    """One line a constant: value and interval, or `not identified` and why."""
    width = max(len(p.name) for p in result.parameters)
    return [f"  {p.name:<{width}}  {describe_estimate(p, result.other_loss)}" for p in result.parameters]


def describe_estimate(p: Estimate, other_loss: str = "") -> str:
    """`0.348 (0.317 to 0.373)`; a constant that is not identified is never printed as a number."""
    if p.status is ParameterStatus.NOT_IDENTIFIED:
        return f"not identified: {p.reason}"
    if p.status is ParameterStatus.HELD:
        return f"{p.working_value:.4g}  held" + (f": {p.reason}" if p.reason else "")
    text = f"{p.working_value:.4g}"
    text += (
        f"  95% {p.low:.4g} to {p.high:.4g}"
        if p.low is not None and p.high is not None
        else "  no interval (no bootstrap)"
    )
    if p.other_loss is not None:
        text += f"  ({p.other_loss:.4g} under {other_loss})"
    if p.status is ParameterStatus.AT_BOUND:
        text += f"  AT BOUND: {p.reason}"
    return text


def _trust(result: FitResult) -> list[str]:
    spread = f"root mean square relative error {100 * result.rms:.3g}%"
    spread += f", R² {result.r2:.4f} (log loss)" if result.r2 is not None else ""
    lines = [
        f"  fit          {count_runs(result.n_runs)}, {result.n_free} free constants; objective {result.objective:.6g}; {spread}",
        f"  descent      {100 * result.share_best:.0f}% of {result.n_starts} starts reach the best objective (within 1e-6)",
        f"  condition    {result.condition:.2g} (centred and scaled)",
    ]
    if result.correlations:
        pairs = [f"{a}-{b} {c:+.3f}" for a, b, c in result.correlations[:6]]
        more = len(result.correlations) - 6
        lines.append("  correlated   " + ", ".join(pairs) + (f", and {more} more pairs" if more > 0 else ""))
    if result.exclusions:
        counts = Counter(e.reason for e in result.exclusions)
        lines.append("  left out     " + ", ".join(f"{n} {reason}" for reason, n in counts.items()))
    else:
        lines.append("  left out     no run")
    return lines


def _card(result: FitResult) -> list[str]:
    delta = f", delta {result.delta:g}" if result.loss == "log_huber" else ""
    rows = {
        "objective": f"sum of {result.loss}{delta}",
        "optimiser": f"variable projection from {result.n_starts} seeded starts (seed {result.seed}), "
        "Gauss-Newton and L-BFGS-B with analytic gradient, re-polished",
        "intervals": f"bootstrap by run, {len(result.replicates)} refits" if len(result.replicates) else "none",
        **result.convention.definitions(),
        "data": f"{result.source}, hash {result.data_hash}",
    }
    return ["  card"] + [f"    {key:<11}{value}" for key, value in rows.items()]


def _wrap(lines: list[str]) -> list[str]:
    wrapped = []
    for line in lines:
        wrapped += textwrap.wrap(line, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return wrapped
