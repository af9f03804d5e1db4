"""`dlcm show` in the terminal and as JSON: a text with its concepts, by one run or by several side by side.

Nothing is told by colour alone: concepts are set off by marks, and every figure stands in a table too.
"""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dlcm.inside import Inside

SHOW_SCHEMA = 1
OWN, BOTH, CONTROL = "│", "║", "┊"
MARKS = {
    OWN: "a concept begins",
    BOTH: "one begins, and one of the control too",
    CONTROL: "one of the control alone",
}
# Two tints of different lightness, so that neighbours differ in greyscale as well; the text on them is black on any terminal.
_TINTS = ("black on #cfe4f5", "black on #f7d7a3")
# From light to dark, for losses of 0, 1/4, .. of a uniform guess.
_LEVELS = ("black on #fff3e0", "black on #fdcf95", "black on #f79f4f", "#ffffff on #bf4a0a", "#ffffff on #6b2504")
LEVEL_SHARE = 0.25
"""Each level of loss is this share of what a uniform guess costs, ln V; the last has no end."""


def visible(text: str, keep: str = "\n") -> str:
    """Text that cannot act on what shows it: control and format characters become visible signs, but for those in `keep`."""
    return "".join(char if char in keep else _sign(char) for char in text)


def _sign(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    # Format characters turn the reading order around or hide; but joiners are part of emoji and of some scripts.
    if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") and code not in (0x200C, 0x200D):
        return f"⟨U+{code:04X}⟩"
    return char


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def mark_of(inside: Inside, t: int) -> str:
    """The mark before token t: who begins a concept there; empty where nobody does."""
    own = inside.begins_T is not None and bool(inside.begins_T[t])
    control = inside.control_T is not None and bool(inside.control_T[t])
    return BOTH if own and control else OWN if own else CONTROL if control else ""


def title_of(inside: Inside) -> str:
    """What the run is, in a few words."""
    if inside.boundary is None:
        return "dense"
    return f"{inside.boundary.detector.replace('_', ' ')}, R = {inside.boundary.compression_ratio:g}"


def figures_of(inside: Inside) -> list[tuple[str, str]]:
    """Name and value of what is said of a text as a whole, in the same order for every run."""
    shared, loss, control = inside.shared, inside.loss_nats, inside.control_loss_nats
    difference = None if loss is None or control is None else control - loss
    return [
        ("tokens", f"{inside.n_tokens:,}"),
        ("concepts", "-" if inside.n_concepts is None else f"{inside.n_concepts:,}"),
        ("tokens per concept", number(inside.tokens_per_concept, 2)),
        ("threshold of p", number(inside.threshold)),
        ("nats per token", number(loss)),
        ("bits per byte", number(inside.bits_per_byte)),
        ("nats per token, control", number(control)),
        ("control less own", "-" if difference is None else f"{difference:+.4f}"),
        ("boundaries of both", "-" if shared is None else f"{shared['both']:,}"),
        ("of the model alone", "-" if shared is None else f"{shared['model']:,}"),
        ("of the control alone", "-" if shared is None else f"{shared['control']:,}"),
    ]


def print_inside(looks: Sequence[Inside], console: Console, *, with_tokens: bool = False) -> None:
    """Print a text as each of the runs reads it.

    Args:
        looks: one a run, of the same text.
        console: where to; its width is shared out.
        with_tokens: a table of all tokens as well.
    """
    grid = Table(expand=True, show_edge=False, pad_edge=False, header_style="bold")
    for inside in looks:
        grid.add_column(title_of(inside), ratio=1, overflow="fold")
    grid.add_row(*(_block(inside, console) for inside in looks))
    console.print(grid)
    summary = Table(show_edge=False, pad_edge=False, header_style="bold")
    summary.add_column("", no_wrap=True)
    for inside in looks:
        summary.add_column(Text(inside.run_id), justify="right", overflow="fold")
    for row in zip(*(figures_of(inside) for inside in looks)):
        summary.add_row(row[0][0], *(value for _, value in row))
    console.print("", summary, "", _legend(looks, console), sep="\n")
    for inside in looks if with_tokens else ():
        console.print("", _token_table(inside), sep="\n")


def _block(inside: Inside, console: Console) -> RenderableType:
    parts: list[RenderableType] = []
    if not inside.spans.text:
        return Text("(an empty text)", style="italic")
    if inside.boundary is not None or console.color_system is None:
        parts.append(_concepts(inside))
    if console.color_system is not None:
        parts += [Text("\nloss of each token", style="italic"), _losses(inside)]
    return Group(*parts)


def _concepts(inside: Inside) -> Text:
    text, concept_T = Text(), inside.concept_T
    for t, piece in enumerate(inside.spans.pieces(), 1):
        text.append(mark_of(inside, t), "bold")
        text.append(_shown(piece), "" if concept_T is None else _TINTS[concept_T[t] % 2])
    return text


def _losses(inside: Inside) -> Text:
    text = Text()
    for t, piece in enumerate(inside.spans.pieces(), 1):
        text.append(_shown(piece), _LEVELS[level_of(inside, t)])
    return text


def level_of(inside: Inside, t: int) -> int:
    """How dark token t is, from 0 on: its loss in quarters of what a uniform guess costs."""
    return min(int(inside.nats_T[t] / (LEVEL_SHARE * math.log(inside.vocab_size))), len(_LEVELS) - 1)


def _shown(piece: str) -> str:
    # Line ends and tabs count as tokens: they are seen as such.
    return visible(piece.replace("\t", "⇥   ").replace("\n", "↵\n"))


def _legend(looks: Sequence[Inside], console: Console) -> Text:
    text = Text()
    if any(inside.boundary is not None for inside in looks):
        shown = MARKS.items() if any(inside.control_T is not None for inside in looks) else [(OWN, MARKS[OWN])]
        text.append("   ".join(f"{mark} {words}" for mark, words in shown) + "\n")
    if any(inside.control_T is not None for inside in looks):
        text.append("control: the same weights with a concept every R tokens, R as the model has it on this text\n")
    if console.color_system is not None:
        guess = math.log(looks[0].vocab_size)
        text.append("nats: ")
        for i, style in enumerate(_LEVELS):
            low, high = (f"{LEVEL_SHARE * share * guess:.1f}" for share in (i, i + 1))
            text.append(f" {low} to {high} " if i < len(_LEVELS) - 1 else f" {low} and more ", style)
        text.append(f"   a uniform guess: {guess:.2f}\n")
    text.rstrip()
    return text


def _token_table(inside: Inside) -> Table:
    dense = inside.boundary is None
    table = Table(title=Text(f"{inside.run_id}: every token"), title_justify="left", show_edge=False, pad_edge=False)
    for name in ["token", *([] if dense else ["concept", "begins", "p"]), "nats"]:
        table.add_column(name, justify="left" if name in ("token", "begins") else "right", overflow="fold")
    if inside.control_T is not None:
        table.add_column("nats, control", justify="right")
    for row in token_rows(inside):
        piece = "start of text" if row["start"] is None else repr(row["text"]) if row["text"] else "(goes on)"
        cells: list[RenderableType] = [Text(visible(piece))]
        if not dense:
            cells += [str(row["concept"] + 1), mark_of(inside, row["index"]), number(row["prob"])]
        cells.append(number(row["nats"]))
        if inside.control_T is not None:
            cells.append(number(row["control_nats"]))
        table.add_row(*cells)
    return table


def token_rows(inside: Inside) -> list[dict[str, Any]]:
    """One object a token, the start of text first; JSON's null where there is nothing to say."""
    ids = [None, *inside.spans.ids_T.tolist()]
    pieces, starts = ["", *inside.spans.pieces()], [None, *inside.spans.starts[:-1].tolist()]
    own = {"concept": inside.concept_T, "begins": inside.begins_T, "prob": inside.prob_T, "nats": inside.nats_T}
    own |= {"control_begins": inside.control_T, "control_nats": inside.control_nats_T}
    columns = {name: [None] * inside.n_tokens if x_T is None else _known(x_T) for name, x_T in own.items()}
    return [
        {"index": t, "id": ids[t], "start": starts[t], "text": pieces[t], **{name: x[t] for name, x in columns.items()}}
        for t in range(inside.n_tokens)
    ]


def inside_json(inside: Inside) -> dict[str, Any]:
    """What `dlcm show --json` says of one run."""
    return {
        "run_id": inside.run_id,
        "checkpoint": inside.checkpoint,
        "model": "dense" if inside.boundary is None else "dlcm",
        "detector": inside.boundary and inside.boundary.detector,
        "compression_target": inside.boundary and inside.boundary.compression_ratio,
        "seq_len": inside.seq_len,
        "n_tokens": inside.n_tokens,
        "n_concepts": inside.n_concepts,
        "tokens_per_concept": inside.tokens_per_concept,
        "threshold": inside.threshold,
        "loss_nats": inside.loss_nats,
        "bits_per_byte": inside.bits_per_byte,
        "control_loss_nats": inside.control_loss_nats,
        "boundaries": inside.shared,
        "tokens": token_rows(inside),
    }


def _known(x_T: np.ndarray) -> list[Any]:
    return [None if isinstance(value, float) and math.isnan(value) else value for value in x_T.tolist()]
