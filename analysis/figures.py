"""Figures by name: what each shows, what it needs, and how it is drawn from a `FigureContext`.

A figure that cannot be drawn says why in one line.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure as MplFigure

from analysis import figure_draw
from analysis.figure_context import FigureContext
from analysis.plots import save_figure
from dlcm.errors import UserError, nearest

SUFFIXES = (".png", ".svg")
"""Formats in which a folder of figures is written."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure that `dlcm analyze plot --figure NAME` draws.

    Attributes:
        name: what it is asked for by.
        title: what it shows.
        needs: what the results must hold.
        draw: context -> figure; raises a `UserError` that says in one line what is missing.
    """

    name: str
    title: str
    needs: str
    draw: Callable[[FigureContext], MplFigure]


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """What came of a list of figures.

    Attributes:
        files: what was written.
        missing: name -> why it could not be drawn.
        notes: what was left out of figures that could.
    """

    files: tuple[Path, ...]
    missing: Mapping[str, str]
    notes: tuple[str, ...]


def find_figure(name: str) -> Figure:
    """A figure by name.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name not in FIGURES:
        raise UserError(f"no figure {name!r}{nearest(name, FIGURES)}")
    return FIGURES[name]


def draw_figure(context: FigureContext, name: str) -> MplFigure:
    """One figure.

    Raises:
        UserError: no such figure, or what the results lack for it.
    """
    figure = find_figure(name)
    context.tell(f"drawing {name}")
    try:
        return figure.draw(context)
    except UserError as error:
        raise UserError(f"figure {name}: {error}") from None


def save_figures(
    context: FigureContext, names: Iterable[str], folder: Path, suffixes: Sequence[str] = SUFFIXES
) -> Drawn:
    """Draw what the data allow of some figures into a folder, each in every format."""
    files, missing = [], {}
    for name in names:
        try:
            drawn = draw_figure(context, name)
        except UserError as error:
            missing[name] = str(error).removeprefix(f"figure {name}: ")
            continue
        files += [save_figure(drawn, folder / f"{name}{s}", data=context.data, shows=name) for s in suffixes]
    return Drawn(tuple(files), missing, tuple(dict.fromkeys(context.notes)))


_TEXTS = {
    "loss_vs_compute": ("loss against training FLOPs, with the fitted frontiers", "training FLOPs"),
    "loss_vs_share": ("loss against P for each R at one budget", "DLCM runs with training FLOPs"),
    "loss_per_flop": (
        "loss against P for each R at one size: on equal tokens, and at equal FLOPs",
        "DLCM runs of one size at two shares P or more, and a cost",
    ),
    "loss_vs_size": ("loss against N at several D, with the fitted law", "runs"),
    "iso_loss": (
        "lines of equal loss over R and P at a budget, with the optimum and its intervals",
        "DLCM runs at two or more R and P, and a cost",
    ),
    "allocation": ("best N, D, R and P against the budget, with bands", "runs at several budgets, and a cost"),
    "savings": (
        "FLOPs saved at equal loss against the size of the dense baseline",
        "runs of both families, and a cost",
    ),
    "isoflop": (
        "loss against N at equal FLOPs, with the vertices of its curves",
        "five sizes or more at equal training FLOPs",
    ),
    "predicted_vs_measured": ("predicted against measured loss", "runs"),
    "hold_outs": ("predicted against measured loss with the largest budgets held out", "runs at several budgets"),
    "residuals": ("what each law leaves unexplained", "runs"),
    "drop_curve": ("exponents with the largest losses left out", "more runs than constants"),
    "lr_transfer": ("loss against the learning rate at each size", "three rates or more at a size under muP"),
    "realised_ratio": ("realised over requested R, in training and at evaluation", "DLCM runs"),
    "ratio_over_training": ("realised R over training", "the sweep folder, with metrics.jsonl of its runs"),
    "tokens_per_concept": ("realised R by content", "inside.json of runs (dlcm show RUN --validation)"),
    "loss_by_position": (
        "loss less dense by place in the concept",
        "inside.json of runs (dlcm show RUN --validation --against DENSE)",
    ),
    "decay_gain": (
        "drop of the loss over the final decay against the loss where it begins (eq 23)",
        "loss_nats_stable of runs (train.measure_stable)",
    ),
    "downstream": (
        "accuracy against the loss, with the accuracy to expect of the best allocation",
        "accuracies of several runs (acc_TASK), and what guessing scores",
    ),
}
FIGURES: Mapping[str, Figure] = {
    name: Figure(name, shows, needs, getattr(figure_draw, f"draw_{name}")) for name, (shows, needs) in _TEXTS.items()
}
