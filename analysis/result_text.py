"""A fit as text, in the order a reader asks: what was fitted, the constants, can I trust it, how do I repeat it."""

import textwrap
from collections import Counter

import numpy as np

from analysis.design import count_runs
from analysis.result import Estimate, FitResult, ParameterStatus
from analysis.unknown import constants_asked

_WIDTH = 116


def format_report(result: FitResult) -> str:
    """All of a fit as plain text."""
    blocks = [
        _head(result),
        "\n".join(format_parameters(result)),
        "\n".join(_trust(result)),
        "\n".join(format_findings(result)),
        "\n".join(_card(result)),
    ]
    return "\n\n".join(block for block in blocks if block)


def _head(result: FitResult) -> str:
    lines = [f"Law {result.law.name} ({result.law.source}): {result.status}", f"  {result.law.equation}"]
    lines += _wrap([f"reduced: {change.describe()}" for change in result.law.changes])
    lines += _wrap([*result.notes, *_unknown(result)])
    return "\n".join(lines)


def _unknown(result: FitResult) -> list[str]:
    """Which constants of the whole law the runs do not give, where a reduction has taken some of them away."""
    listed = {p.name for p in result.parameters if p.status is ParameterStatus.NOT_IDENTIFIED}
    unknown = result.not_identified
    if listed >= set(unknown):
        return []
    how_many = f"{len(unknown)} of the {len(constants_asked(result.law))} constants of {result.law.name}"
    return [f"{how_many} are not given by these runs: {', '.join(unknown)}"]


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
    if p.profile is not None:
        text += "  profile {} to {}".format(*(f"{end:.4g}" if np.isfinite(end) else "open" for end in p.profile))
    if p.other_loss is not None:
        text += f"  ({p.other_loss:.4g} under {other_loss})"
    if p.spread is not None:
        text += f"  {p.spread[0]:.4g} to {p.spread[1]:.4g} over losses"
    if p.status is ParameterStatus.AT_BOUND:
        text += f"  AT BOUND: {p.reason}"
    return text


def format_findings(result: FitResult) -> list[str]:
    """What is worth knowing before the fit is believed, without what the notes say already; empty where there is nothing."""
    new = [f.describe() for f in result.findings if f.text not in result.notes]
    lines = ["  findings"] if new else []
    for text in new:
        lines += textwrap.wrap(text, _WIDTH, initial_indent="    - ", subsequent_indent="      ")
    return lines


def _trust(result: FitResult) -> list[str]:
    spread = f"root mean square relative error {100 * result.rms:.3g}%"
    spread += f", R² {result.r2:.4f} (log loss)" if result.r2 is not None else ""
    lines = [
        f"  fit          {count_runs(result.n_runs)}, {result.n_free} free constants; objective {result.objective:.6g}; {spread}",
    ]
    for i, check in enumerate(result.checks):
        lines.append(f"  {'checks' if i == 0 else '':<11}  {'passed' if check.passed else 'FAILED'}  {check.text}")
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
        "damped Gauss-Newton and Newton steps, polished by trust-region Gauss-Newton and L-BFGS-B, analytic gradient",
        "intervals": _intervals(result),
        **result.convention.definitions(),
        "data": f"{result.source}, hash {result.data_hash}",
    }
    return ["  card"] + [f"    {key:<11}{value}" for key, value in rows.items()]


def _intervals(result: FitResult) -> str:
    if not len(result.replicates):
        return "none"
    by = "run" if result.n_clusters == result.n_runs else f"trunk ({result.n_clusters} for {result.n_runs} runs)"
    return (
        f"95%, Bayesian bootstrap by {by}, {len(result.replicates)} refits, percentiles; profile: likelihood ratio, 95%"
    )


def _wrap(lines: list[str]) -> list[str]:
    wrapped = []
    for line in lines:
        wrapped += textwrap.wrap(line, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return wrapped
