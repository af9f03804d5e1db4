"""`dlcm show --html`: a text with its concepts as one file that opens offline.

No script runs in it and nothing is fetched: the four views of the text are radio buttons and style rules. What a colour says is
said by a mark, a line or a title too, and by the table of all tokens. The text may be anything: it is escaped, and control and
format characters are shown as signs.
"""

import html
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from dlcm.inside import Inside
from dlcm.provenance import source_commit
from dlcm.record import write_atomic
from dlcm.show import BOTH, CONTROL, MARKS, OWN, figures_of, mark_of, number, title_of, token_rows, visible

_CLASSES = {OWN: "own", BOTH: "both", CONTROL: "ctl", "": ""}
_VIEWS = {
    "concepts": "Concepts",
    "loss": "Loss of each token",
    "prob": "Probability that a concept begins",
    "control": "Loss under the control",
}
# Nats between own boundaries and those of the control that are shown at full strength.
_FULL_DIFFERENCE = 1.0
_SHARES = ((0, "lowest"), (0.25, "·"), (0.5, "middle"), (0.75, "·"), (1, "highest"))
_SPACING = "\n\t"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def save_html(looks: Sequence[Inside], path: Path) -> None:
    """Write the page, whole or not at all."""
    write_atomic(path, format_html(looks))


def format_html(looks: Sequence[Inside]) -> str:
    """The page.

    Args:
        looks: one a run, of the same text.
    """
    style = resources.files("dlcm").joinpath("show.css").read_text(encoding="utf-8")
    commit, changes = source_commit()
    code = f"{commit[:12]}{' with changes' if changes else ''}" if commit else "unknown"
    has = {
        "concepts": any(inside.boundary is not None for inside in looks),
        "loss": True,
        "prob": any(inside.prob_T is not None for inside in looks),
        "control": any(inside.control_T is not None for inside in looks),
    }
    views = [name for name in _VIEWS if has[name]]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>Inside the concepts: {_escape(", ".join(title_of(inside) for inside in looks))}</title>
<style>
{style}</style>
</head>
<body>
<h1>Inside the concepts</h1>
<p>A text as {"a trained model reads" if len(looks) == 1 else "trained models read"} it: where concepts begin, and what each \
token costs. Point at a token for its figures; the table below each text has all of them.</p>
<fieldset>
<legend>The text shows</legend>
{"".join(_radio(name, name == views[0]) for name in views)}</fieldset>
<div class="legend">
{_legend(looks, views)}</div>
<main class="runs">
{"".join(_article(inside, i) for i, inside in enumerate(looks))}</main>
<footer>Code {_escape(code)}; weights of {_escape("; ".join(f"{x.run_id}: {x.checkpoint}" for x in looks))}. The first token \
of each text is the end of text that opens it: it is read, and counts in the tokens per concept, but is not predicted.</footer>
</body>
</html>
"""


def _radio(name: str, checked: bool) -> str:
    state = " checked" if checked else ""
    return f'<label><input type="radio" name="view" id="v-{name}"{state}> {_VIEWS[name]}</label>\n'


def _legend(looks: Sequence[Inside], views: Sequence[str]) -> str:
    """What the signs of each view mean; those of the marks stand in every view."""
    guess = math.log(looks[0].vocab_size)
    marks = "".join(
        f'<span><span class="key {_CLASSES[mark]}"></span>{words}</span>\n'
        for mark, words in MARKS.items()
        if mark == OWN or "control" in views
    )
    marks = marks if "concepts" in views else ""
    control = (
        "<span>control: the same weights with a concept every R tokens, R as the model has it on this text</span>\n"
        if "control" in views
        else ""
    )
    loss = "".join(
        f'<span class="swatch loss" style="--l:{share}">{share * guess:.1f}</span>' for share in (0, 0.25, 0.5, 0.75, 1)
    )
    prob = "".join(f'<span class="swatch prob" style="--p:{share}">{word}</span>' for share, word in _SHARES)
    signs = {
        "concepts": '<span><span class="swatch c0">one concept</span><span class="swatch c1">the next</span></span>',
        "loss": f"<span>nats: {loss} and more; a uniform guess costs {guess:.2f}</span>",
        "prob": f"<span>p in this text: {prob}</span>",
        "control": '<span><span class="swatch up" style="--d:1">the control costs more</span> '
        f'<span class="swatch down" style="--d:1">it costs less</span>; full strength from {_FULL_DIFFERENCE:g} nat on</span>',
    }
    return "".join(f'<div class="for-{name}">{signs[name]}\n{marks}{control}</div>\n' for name in views)


def _article(inside: Inside, number_of_run: int) -> str:
    title = f"run-{number_of_run}"
    figures = "".join(f"<dt>{name}</dt><dd>{value}</dd>\n" for name, value in figures_of(inside) if value != "-")
    body = "".join(_concepts(inside)) or "<em>(an empty text)</em>"
    return f"""<article aria-labelledby="{title}">
<h2 id="{title}">{_escape(title_of(inside))}</h2>
<div class="id">{_escape(inside.run_id)}</div>
<div class="text" dir="auto">{body}</div>
<dl>
{figures}</dl>
<details>
<summary>Every token in a table</summary>
<div class="scroll" tabindex="0" role="region" aria-labelledby="{title}">{_table(inside)}</div>
</details>
</article>
"""


def _concepts(inside: Inside) -> Iterator[str]:
    """The text: a group a concept, a span a token."""
    rows = token_rows(inside)[1:]
    if inside.boundary is None:
        yield from (_token(inside, row) for row in rows)
        return
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["concept"], []).append(row)
    for concept, group in groups.items():
        nats = sum(row["nats"] for row in group) / len(group)
        begins = "" if group[0]["prob"] is None or not group[0]["begins"] else f", begins with p {group[0]['prob']:.2f}"
        label = f"concept {concept + 1}: {len(group)} token{'s' if len(group) > 1 else ''}{begins}, {nats:.2f} nats per token"
        tokens = "".join(_token(inside, row) for row in group)
        yield f'<span class="c{concept % 2}" role="group" aria-label="{label}">{tokens}</span>'


def _token(inside: Inside, row: dict) -> str:
    mark = mark_of(inside, row["index"])
    classes, style = ["t", _CLASSES[mark]], [f"--l:{_unit(row['nats'] / math.log(inside.vocab_size)):.2f}"]
    told = [
        f"{visible(repr(row['text']))}: {row['nats']:.3f} nats" if row["text"] else f"(goes on): {row['nats']:.3f} nats"
    ]
    if row["prob"] is not None:
        style.append(f"--p:{_place(row['prob'], inside):.2f}")
        told += [f"concept {row['concept'] + 1}", f"p {row['prob']:.3f}", *([MARKS[mark]] if mark else [])]
    if row["control_nats"] is not None:
        difference = row["control_nats"] - row["nats"]
        style.append(f"--d:{_unit(abs(difference) / _FULL_DIFFERENCE):.2f}")
        # What rounds to nothing is underlined by nothing.
        classes.append("up" if difference > 0.01 else "down" if difference < -0.01 else "")
        told.append(f"{row['control_nats']:.3f} nats under the control")
    classes.append("nl" if row["text"].startswith("\n") else "on" if not row["text"] else "")
    return (
        f'<span class="{" ".join(filter(None, classes))}" style="{";".join(style)}" title="{_escape("; ".join(told))}">'
        f"{_escape(visible(row['text'], keep=_SPACING))}</span>"
    )


def _table(inside: Inside) -> str:
    names = ["token", "nats"]
    if inside.boundary is not None:
        names += ["concept", "p", "begins"]
    if inside.control_T is not None:
        names += ["control begins", "nats, control"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = []
    for row in token_rows(inside):
        first = "start of text" if row["start"] is None else repr(row["text"]) if row["text"] else "(goes on)"
        cells = [visible(first), number(row["nats"])]
        if inside.boundary is not None:
            cells += [str(row["concept"] + 1), number(row["prob"]), "yes" if row["begins"] else ""]
        if inside.control_T is not None:
            cells += ["yes" if row["control_begins"] else "", number(row["control_nats"])]
        body.append("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in cells) + "</tr>")
    caption = f"<caption>{_escape(inside.run_id)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"


def _place(prob: float, inside: Inside) -> float:
    """Where a probability stands between the lowest and the highest of the text: most of them lie close together."""
    assert inside.prob_T is not None
    low, high = float(inside.prob_T[1:].min()), float(inside.prob_T[1:].max())
    return (prob - low) / (high - low) if high > low else 0.5


def _unit(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
