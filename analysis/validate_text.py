"""A model choice as a sentence, as text and as JSON."""

import dataclasses
import math
import textwrap
from typing import TYPE_CHECKING, Any

from analysis.holdout import ALLOCATION, LeftOut

if TYPE_CHECKING:
    from analysis.validate import LawScore, ModelChoice

_WIDTH = 116
_FAR = 2.0
"""Times the error inside the data beyond which a law that is asked for what it has not seen predicts worse than it fits."""


def format_sentence(choice: "ModelChoice") -> str:
    """What the runs support, what hold-outs and drifts say to it, and what is not identified."""
    return " ".join(
        filter(None, [_support(choice), _against(choice), _hold_outs(choice), _drifts(choice.chosen), _unknown(choice)])
    )


def _support(choice: "ModelChoice") -> str:
    chosen, others = choice.chosen, [s for s in choice.scores if s is not choice.chosen]
    if not math.isfinite(chosen.aicc):
        return f"{choice.n_clusters} runs are too few to choose between laws: the fewest constants, {chosen.label}, are taken."
    if not others:
        return f"One law was given, {chosen.label}: there is nothing to choose."
    if choice.undecided:
        close = " and ".join(choice.undecided)
        taken = f"the fewest constants, {chosen.label}, are taken"
        return f"The data do not decide between {chosen.label} and {close} (AICc within 2): {taken}."
    second = others[0]
    lower = f"{second.behind:.1f} lower" if math.isfinite(second.behind) else "which needs more runs"
    return f"The data support {chosen.label} over {second.label} (AICc {lower})."


def _against(choice: "ModelChoice") -> str:
    """What else speaks against the chosen law: a test that rejects it, or a fit that is not sound."""
    found = []
    rejected = [t for t in choice.nested if t.small == choice.chosen.label and t.probability < 0.05]
    if rejected:
        worst = min(rejected, key=lambda t: t.probability)
        found.append(f"A nested test rejects it against {worst.large} (p = {worst.probability:.2g}).")
    if not choice.chosen.fit.sound:
        found.append(f"Its fit is {choice.chosen.fit.status}.")
    return " ".join(found)


def _hold_outs(choice: "ModelChoice") -> str:
    errors = [(e, s) for s in choice.scores if (e := s.hold_out_error) is not None]
    mine = choice.chosen.hold_out_error
    if mine is None or not errors:
        return "No hold-out: the budgets do not leave enough runs on both sides of a cut."
    least, best = min(errors, key=lambda pair: pair[0])
    n = len(choice.chosen.holdouts)
    where = f"held out ({n} cut{'s' * (n != 1)} of {choice.chosen.holdouts[0].axis})"
    if _percent(least) == _percent(mine):  # alike as far as they are printed
        return f"Hold-outs agree: {_percent(mine)} on the largest budgets {where}."
    return (
        f"Hold-outs disagree: {best.label} predicts the largest budgets {where} within {_percent(least)}, the chosen law within "
        f"{_percent(mine)}; the error of a hold-out alone chooses nothing."
    )


def _drifts(score: "LawScore") -> str:
    """Always that of the best N, which hold-outs do not see; of the other exponents where they drift."""
    told = [d for d in score.drifts if d.name == ALLOCATION] or [d for d in score.drifts if d.drifts]
    if not told:
        return ""
    what = "; ".join(d.describe() for d in told)
    if any(d.drifts for d in told):
        return (
            f"Exponents drift more than sampling explains: {what}: they are not settled, whatever the hold-out error."
        )
    return f"The exponent of the best N moves no more than sampling explains: {what}."


def _unknown(choice: "ModelChoice") -> str:
    """Of the chosen law, and of the whole law that it is a reduction of: what it holds may be there, the runs do not say."""
    unknown = choice.chosen.not_identified
    text = f"Not identified: {', '.join(unknown)}." if unknown else "All of its constants are identified."
    whole = choice.whole
    if whole is not choice.chosen and (more := whole.not_identified):
        text += f" Of the {len(whole.constants)} constants of {whole.label}, not identified: {', '.join(more)}."
    return text


def format_choice(choice: "ModelChoice") -> str:
    """The report."""
    runs = f"{choice.n_runs} runs" + (f" in {choice.n_clusters} clusters" if choice.n_clusters != choice.n_runs else "")
    lines = [f"Model choice over {len(choice.scores)} laws, {runs}, {choice.source} ({choice.data_hash})"]
    lines += textwrap.wrap(choice.sentence, _WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += [f"  - {m}" for m in choice.merged]
    lines += ["", f"  AICc, log residuals {choice.errors.capitalize()}, constants counted with the width of the errors"]
    width = max(len(s.label) for s in choice.scores)
    for score in choice.scores:
        behind = f"{score.behind:+9.1f}" if math.isfinite(score.behind) else "  too few"
        held = f"  hold-out {_percent(score.hold_out_error)}" if score.hold_out_error is not None else ""
        lines.append(
            f"  {'*' if score is choice.chosen else ' '} {score.label:<{width}}  {score.n_constants:2d} constants {behind}"
            f"  weight {score.weight:.2f}  fit {_percent(score.fit.rms)}{held}  {score.fit.status}"
        )
    lines += _chosen_in_detail(choice.chosen)
    if choice.nested:
        lines += ["", "  Nested tests"] + [f"    {t.describe()}" for t in choice.nested]
    return "\n".join(lines)


def _chosen_in_detail(score: "LawScore") -> list[str]:
    lines: list[str] = []
    if score.holdouts:
        lines += ["", f"  Largest budgets held out, {score.label}"]
        for h in score.holdouts:
            lines.append(
                f"    {h.axis} up to {h.cut:.3g}: {h.n_train} runs fitted, {h.n_held} predicted within {_percent(h.error)} "
                f"(bias {100 * h.bias:+.2f}%)"
            )
        lines += [f"    {d.describe()}" + (": drifts" if d.drifts else "") for d in score.drifts]
    if score.left_out:
        lines += ["", f"  One level left out, {score.label} (fit {_percent(score.fit.rms)})"]
        lines += [f"    {_describe_left(left, score.fit.rms)}" for left in score.left_out]
    if score.not_identified:
        lines += ["", "  Not identified"]
        for name, reason in score.not_identified.items():
            lines += textwrap.wrap(f"{name}: {reason}", _WIDTH, initial_indent="    ", subsequent_indent="      ")
    return lines


def _describe_left(left: LeftOut, rms: float) -> str:
    level = f"{left.low:.3g}" if left.high <= left.low * 1.001 else f"{left.low:.3g} to {left.high:.3g}"
    where = "end" if left.edge else "middle"
    if left.error is None or left.bias is None:
        return f"{left.axis} = {level} ({where}): not predicted: {left.reason}"
    worse = f", {left.error / rms:.1f} times the error of the fit" if left.error > _FAR * rms > 0 else ""
    return f"{left.axis} = {level} ({where}): {_percent(left.error)} (bias {100 * left.bias:+.2f}%){worse}"


def choice_json(choice: "ModelChoice") -> dict[str, Any]:
    """As JSON types."""
    return {
        "sentence": choice.sentence,
        "chosen": choice.chosen.label,
        "undecided": list(choice.undecided),
        "errors": choice.errors,
        "n_runs": choice.n_runs,
        "n_clusters": choice.n_clusters,
        "merged": list(choice.merged),
        "source": choice.source,
        "data_hash": choice.data_hash,
        "laws": [_score_json(s) for s in choice.scores],
        "nested": [{**_plain(t), "text": t.describe()} for t in choice.nested],
    }


def _score_json(score: "LawScore") -> dict[str, Any]:
    return {
        "label": score.label,
        "equation": score.law.equation,
        "n_constants": score.n_constants,
        "aicc": _finite(score.aicc),
        "behind": _finite(score.behind),
        "weight": score.weight,
        "status": str(score.fit.status),
        "rms": score.fit.rms,
        "hold_out_error": score.hold_out_error,
        "values": {p.name: p.value for p in score.fit.parameters},
        "not_identified": score.not_identified,
        "holdouts": [_plain(h) for h in score.holdouts],
        "drifts": [{**_plain(d), "drifts": d.drifts} for d in score.drifts],
        "left_out": [_plain(x) for x in score.left_out],
    }


def _plain(record: Any) -> dict[str, Any]:
    return {key: _finite(value) for key, value in dataclasses.asdict(record).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return value


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.2g}%"
