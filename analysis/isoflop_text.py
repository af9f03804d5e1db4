"""IsoFLOP profiles as text and as JSON."""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.design import count_runs
from analysis.isoflop_result import RULES

if TYPE_CHECKING:
    from analysis.isoflop_check import Apart, Disagreement, InGrowth
    from analysis.isoflop_result import Growth, IsoFlop, Profile

_WIDTH = 116


def format_report(found: "IsoFlop") -> str:
    """Profiles with their vertices, how these grow, and how they compare with a fitted law."""
    n_ok = sum(p.is_ok for p in found.profiles)
    family = f" of {found.family} models" if found.family else ""
    lines = [f"IsoFLOP profiles over {found.over}{family}: {n_ok} of {len(found.profiles)} have a vertex"]
    lines += [
        f"  {count_runs(found.n_runs)} of {found.source}, hash {found.data_hash}; {found.n_outside} at no budget "
        f"(within {100 * found.tolerance:g}% of one)"
    ]
    lines += ["", *_table(found)]
    lines += ["", *(f"  {describe_growth(g)}" for g in found.growth)]
    if found.check is not None:
        lines += ["", *textwrap.wrap(describe_check(found.check), _WIDTH)]
    refits = f"95%, wild bootstrap by cluster, {found.n_bootstrap} draws, seed {found.seed}"
    lines += [
        "",
        f"  vertices   local fits to log loss, skew shared; intervals {refits if found.n_bootstrap else 'none'}",
    ]
    lines += [f"  {key:<10} {value}" for key, value in found.convention.definitions().items() if key in "NDCRP"]
    return "\n".join(lines)


def describe_held(held: Mapping[str, float | str]) -> str:
    """`R = 4, P = 0.5`; empty where nothing is held."""
    return ", ".join(f"{k} = {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in held.items())


def describe_growth(growth: "Growth") -> str:
    """`N* ~ C^0.513  95% 0.50 to 0.52`, or why it is not identified."""
    at = describe_held(growth.held)
    at = f" at {at}" if at else ""
    if growth.value is None:
        return f"{growth.name}*{at}: growth not identified: {growth.reason}"
    ends = f"  95% {growth.low:.3g} to {growth.high:.3g}" if growth.low is not None else "  no interval (no bootstrap)"
    if growth.name == "P":
        text = f"P*{at} changes by {growth.value:+.3f} a decade of C{ends}"
    else:
        factor = f"{growth.coefficient:.3g} " if growth.coefficient is not None else ""
        text = f"{growth.name}*{at} = {factor}C^{growth.value:.4f}{ends}" if factor else ""
        text = text or f"{growth.name}*{at} ~ C^{growth.value:.4f}{ends}"
    if growth.spread is not None:
        text += f"; {growth.spread[0]:.3f} to {growth.spread[1]:.3f} over rules for the vertex"
    return text + f"; {growth.n_vertices} vertices"


def describe_check(check: "Disagreement") -> str:
    """The verdict on two routes to one optimum, in words and figures.

    They disagree where any comparison (the growth, the mean over the budgets, each budget) is beyond sampling, with 95% for all
    of them together.
    """
    if check.level is None:
        return f"The profiles cannot be held against {check.law}: no profile has a vertex where the law has an optimum too."
    star = f"{check.over}*"
    certified = "" if check.status == "certified" else f" (its fit is {check.status})"
    opens = {"agree": "agree", "disagree": "DISAGREE"}[check.verdict]
    sentences = [f"The profiles and {check.law}{certified} {opens}."]
    if check.growth:
        sentences.append(_growth_sentence(check.growth[-1], star))
    sentences.append(_level_sentence(check.level, star))
    told = [b for b in check.budgets if b.apart.is_told]
    if told:
        worst = max(told, key=lambda b: abs(np.log(b.vertex / b.surface)))
        sentences.append(
            f"{len(told)} of {len(check.budgets)} budgets differ beyond sampling, most {worst.budget:.3g} FLOPs: "
            f"{worst.vertex:.3g} against {worst.surface:.3g}, {_ends(worst.apart, star)}."
        )
    if check.n_lost:
        sentences.append(f"At {check.n_lost} the law has no optimum near the {_NOUNS[check.over]} of the profile.")
    sentences.append(_bias_sentence(check, star))
    if check.verdict == "disagree":
        sentences.append(
            "One of the two is wrong: look at the law's residuals over the profiles, and whether these are one-sided; follow "
            "neither far beyond the data."
        )
    return " ".join(sentences)


_NOUNS = {"N": "sizes", "R": "ratios", "P": "shares"}


def _level_sentence(level: "Apart", star: str) -> str:
    apart = "apart from the law's" if star == "P*" else "times the law's"
    return f"Over the budgets {star} of the vertices is {_ends(level, star)} {apart}."


def _growth_sentence(growth: "InGrowth", star: str) -> str:
    if star == "P*":
        first = f"{star} changes by {growth.vertices:+.3f} a decade of C by the vertices and by {growth.surface:+.3f}"
    else:
        first = f"{star} grows as C^{growth.vertices:.3f} by the vertices and as C^{growth.surface:.3f}"
    return f"{first} (95% {growth.low:.3f} to {growth.high:.3f}) by the law; difference {_ends(growth.apart, 'P*')}."


def _ends(apart: "Apart", star: str) -> str:
    digits = "+.3f" if star == "P*" else ".2f"
    return f"{apart.value:{digits}} (95% {apart.low:{digits}} to {apart.high:{digits}})"


def _bias_sentence(check: "Disagreement", star: str) -> str:
    """What the rule for the vertex does of its own, were the law true."""
    biases = [b.bias - check.none for b in check.budgets]
    parabola = [b.parabola_bias - check.none for b in check.budgets]
    unit = 1.0 if check.over == "P" else 100.0
    mark, digits = ("", ".3f") if check.over == "P" else ("%", ".1f")
    spans = [f"{min(v) * unit:+{digits}} to {max(v) * unit:+{digits}}{mark}" for v in (biases, parabola)]
    growth = [f", their growth by {g.bias:+.4f}" for g in check.growth[-1:]]
    naive = [f", its growth by {g.parabola_bias:+.4f}" for g in check.growth[-1:]]
    return (
        f"Were the law true, the rule for the vertices would be off by {spans[0]} in {star}{''.join(growth)}; a parabola through "
        f"all points by {spans[1]}{''.join(naive)}."
    )


def _table(found: "IsoFlop") -> list[str]:
    over = found.over
    head = ["budget", *(["held"] if any(p.held for p in found.profiles) else []), "runs", f"{over}*", "D*", "loss"]
    rows = [head]
    refused: dict[int, str] = {}
    for profile in found.profiles:
        own = [
            f"{profile.budget:.3g}",
            *([describe_held(profile.held)] if "held" in head else []),
            str(len(profile.curve.rows)),
        ]
        if not profile.is_ok:
            refused[len(rows)] = f"refused: {profile.reason}"
            rows.append([*own, "", "", ""])
            continue
        star = _with_ends(profile.value, profile.low, profile.high)
        tokens = _with_ends(profile.tokens, profile.tokens_low, profile.tokens_high)
        rows.append([*own, star, tokens, f"{profile.loss:.4f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for k, row in enumerate(rows):
        n = len(row) - 3 if k in refused else len(row)
        text = "  ".join(cell.ljust(w) for cell, w in zip(row[:n], widths))
        lines.append(f"  {text}  {refused[k]}" if k in refused else f"  {text}".rstrip())
    return lines


def _with_ends(value: float | None, low: float | None, high: float | None) -> str:
    text = f"{value:.3g}"
    return text if low is None else f"{text} ({low:.3g} to {high:.3g})"


def to_json(found: "IsoFlop") -> dict[str, Any]:
    """As JSON types, the draws of the bootstrap left out."""
    kept = ("over", "family", "n_runs", "n_outside", "tolerance", "n_bootstrap", "seed", "source", "data_hash")
    data: dict[str, Any] = {name: getattr(found, name) for name in kept}
    data["definitions"] = found.convention.definitions()
    data["profiles"] = [_profile_json(p, found.over) for p in found.profiles]
    data["growth"] = [dataclasses.asdict(g) for g in found.growth]
    data["check"] = None
    if found.check is not None:
        check = dataclasses.asdict(found.check)
        data["check"] = {"verdict": found.check.verdict, "text": found.check.text, **check}
    return data


def _profile_json(profile: "Profile", over: str) -> dict[str, Any]:
    return {
        "held": dict(profile.held),
        "budget": profile.budget,
        "n_runs": len(profile.curve.rows),
        "n_levels": len(profile.curve.levels),
        "status": profile.status,
        "reason": profile.reason,
        over: {"value": profile.value, "low": profile.low, "high": profile.high},
        "D": {"value": profile.tokens, "low": profile.tokens_low, "high": profile.tokens_high},
        "loss": profile.loss,
        "other_rules": {RULES[rule]: value for rule, value in profile.others.items()},
    }
