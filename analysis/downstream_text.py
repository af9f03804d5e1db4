"""Accuracy curves, and accuracies at a budget, as text."""

import textwrap
from typing import TYPE_CHECKING

from analysis.design import count_runs
from analysis.optimum import describe_outside
from analysis.result import Estimate, ParameterStatus

if TYPE_CHECKING:
    from analysis.chain import Accuracy
    from analysis.downstream import DownstreamFit

_WIDTH = 116


def format_curve(curve: "DownstreamFit") -> str:
    """A curve as plain text, in the order of a fit's report."""
    fit, law = curve.fit, curve.law
    lines = [f"Accuracy on {curve.task} from {curve.unit}, {law.link} link: {curve.status}", f"  {law.equation}"]
    lines += _wrap([f"reduced: {change.describe()}" for change in law.changes if change.reason])
    lines += _wrap([*fit.notes, *curve.notes])
    width = max(len(name) for name in ("chance", *(p.name for p in fit.parameters)))
    lines += ["", f"  {'chance':<{width}}  {curve.chance:.4g}  held: a property of the task"]
    lines += [f"  {p.name:<{width}}  {_estimate(p)}" for p in fit.parameters]
    lines += ["", f"  fit          {count_runs(fit.n_runs)}, {fit.n_free} free constants; {_scatter(curve)}"]
    for i, check in enumerate(fit.checks):
        lines.append(f"  {'checks' if i == 0 else '':<11}  {'passed' if check.passed else 'FAILED'}  {check.text}")
    seen = f"accuracies {curve.seen[0]:.3f} to {curve.seen[1]:.3f}, {law.span[0]:.4g} to {law.span[1]:.4g}"
    lines += [f"  seen         {seen} {curve.unit}", f"  left out     {_left_out(curve)}", "", "  card"]
    refits = f"95%, parametric bootstrap, {len(fit.replicates)} refits, percentiles" if len(fit.replicates) else "none"
    card = {
        "objective": "least squares of " + ("asin(sqrt(accuracy))" if law.errors == "binomial" else "accuracies"),
        "items": "not known; runs count alike" if curve.n_items is None else f"{curve.n_items:.0f} a run",
        "intervals": refits + "; profile: likelihood ratio, 95%",
        "predictor": fit.convention.definitions()["loss"],
        "data": f"{fit.source}, hash {fit.data_hash}, seed {fit.seed}",
    }
    return "\n".join([*lines, *(f"    {key:<11}{value}" for key, value in card.items())])


def format_accuracy(found: "Accuracy") -> str:
    """`Accuracy on arc_easy at 1e21 training FLOPs (...): 0.62 (95% 0.58 to 0.66), loss 2.61 (...), inside the data`."""
    interval = "" if found.loss_interval is None else " (95% {:.4g} to {:.4g})".format(*found.loss_interval)
    predicted = f"{found.unit} {found.loss:.4g}{interval}"
    if found.reason:
        return f"Accuracy on {found.task} at {found.where}: not identified: {found.reason}; {predicted}"
    ends = "95% {:.4f} to {:.4f}; ".format(*found.interval) if found.interval else ""
    either = "; by either 95% {:.4f} to {:.4f}".format(*found.either) if found.either else ""
    text = f"{found.accuracy:.4f} ({ends}{found.other[1]:.4f} by the {found.other[0]} link{either})"
    beyond = ""
    if found.beyond:
        side = "below the lowest" if found.beyond < 0 else "above the highest"
        beyond = f", {abs(found.beyond):.3g} {side} behind the curve"
    text = f"Accuracy on {found.task} at {found.where}: {text}; {predicted}{beyond}, {describe_outside(found.decades_outside)}"
    return "\n".join([text, *(f"  - {note}" for note in found.notes)])


def _estimate(p: Estimate) -> str:
    if p.status is ParameterStatus.NOT_IDENTIFIED:
        return f"not identified: {p.reason}"
    if p.status is ParameterStatus.HELD:
        return f"{p.working_value:.4g}  held" + (f": {p.reason}" if p.reason else "")
    text = f"{p.working_value:.4g}"
    text += f"  95% {p.low:.4g} to {p.high:.4g}" if p.low is not None and p.high is not None else "  no interval"
    if p.profile is not None:
        text += "  profile {:.4g} to {:.4g}".format(*p.profile)
    return text + (f"  AT BOUND: {p.reason}" if p.status is ParameterStatus.AT_BOUND else "")


def _scatter(curve: "DownstreamFit") -> str:
    text = f"root mean square error {100 * curve.rms:.2f} points"
    if curve.scatter is not None:
        text += f", {curve.scatter:.2g} times the variance of {curve.n_items:.0f} independent items"
    return text


def _left_out(curve: "DownstreamFit") -> str:
    reasons: dict[str, int] = {}
    for exclusion in curve.fit.exclusions:
        reasons[exclusion.reason] = reasons.get(exclusion.reason, 0) + 1
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "no run"


def _wrap(lines: list[str]) -> list[str]:
    wrapped = []
    for line in lines:
        wrapped += textwrap.wrap(line, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return wrapped
