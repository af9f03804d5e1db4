"""Plots of what `dlcm show --validation` measured inside the concepts. Each takes an Axes and returns it.

They read `inside.json` of the runs; nothing is trained or evaluated here, and no torch is loaded.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy import stats

from analysis.plots import RUN_STYLES, SMALL, finish, ratio_ticks
from dlcm.errors import UserError
from dlcm.record import read_json

Array = np.ndarray
Record = Mapping[str, Any]

INSIDE_SCHEMA = 1
_WAY_OUT = "dlcm show RUN_DIR --validation --against DENSE_RUN_DIR"
_PLACES = {
    "relative": "place in the concept",
    "offset": "tokens from the start of the concept",
    "from_end": "tokens to the end of the concept",
}
_MEASURES = {
    "difference": "loss less dense (nats/token)",
    "model": "validation loss (nats/token)",
}


def load_inside(folder: str | Path) -> list[Record]:
    """`inside.json` of a run, or of all runs of a sweep that have one, in the order of their targets of R.

    Raises:
        UserError: none, a damaged one, or one of another version.
    """
    folder = Path(folder)
    paths = [folder / "inside.json"] if (folder / "inside.json").exists() else sorted(folder.glob("*/inside.json"))
    if not paths:
        raise UserError(f"{folder}: no run has inside.json; make it with `{_WAY_OUT}`")
    records = [read_json(path) for path in paths]
    for path, record in zip(paths, records):
        if record.get("schema") != INSIDE_SCHEMA:
            raise UserError(
                f"{path}: schema {record.get('schema')!r}, this version reads {INSIDE_SCHEMA}; make it anew: `{_WAY_OUT}`"
            )
    return sorted(records, key=lambda record: (record["compression_target"], record["run_id"]))


def plot_loss_by_position(
    ax: Axes, records: Sequence[Record], *, place: str = "relative", measure: str = "difference", level: float = 0.95
) -> Axes:
    """Loss by the place of the predicted token in its concept, one series a run.

    The difference to a dense model is taken on the same tokens: which tokens stand first or last is the choice of the boundaries,
    and such tokens are harder or easier for any model.

    Args:
        ax: where to draw.
        records: of runs, as `load_inside` gives them.
        place: `relative` (first token, three parts between, last token; of concepts of three tokens and more), `offset` or
            `from_end`.
        measure: `difference` to the dense model, or the loss of the `model`.
        level: of the bars, which are t intervals over documents.

    Raises:
        UserError: unknown `place` or `measure`, or a record without a dense model to compare with.
    """
    for name, value, valid in (("place", place, _PLACES), ("measure", measure, _MEASURES)):
        if value not in valid:
            raise UserError(f"{name}: {value!r}; expected one of {', '.join(valid)}")
    longest = 0
    for i, (record, label, style) in enumerate(_series(records)):
        groups = record["places"][place]
        if measure not in groups:
            raise UserError(f"{record['run_id']}: inside.json has no dense model to compare with; `{_WAY_OUT}`")
        # The last group from the start or from the end holds all that is further away: it has no place on an axis.
        rows = groups[measure] if place == "relative" else groups[measure][:-1]
        value, half, known = _bars(rows, level)
        at = np.arange(len(value))[known]
        longest = max(longest, len(value))
        ax.errorbar(at + _shift(i, len(records)), value[known], half[known], label=label, **_errorbar(style))
    if measure == "difference":
        ax.axhline(0, color="#707070", linewidth=0.8, zorder=1)
        place_of_word: Any = ("axes fraction", "data")
        ax.annotate(
            "dense", (1.0, 0.0), xycoords=place_of_word, ha="right", va="bottom", fontsize=SMALL, color="#707070"
        )
    if place == "relative":
        words = ["first\ntoken", *("" for _ in range(longest - 2)), "last\ntoken"]
        words[longest // 2] = "middle"
        ax.set_xticks(range(longest), words)
    else:
        ax.set_xticks(range(0, longest, max(longest // 6, 1)))
    return finish(ax, _PLACES[place], _MEASURES[measure], legend="top")


def plot_tokens_per_concept(ax: Axes, records: Sequence[Record], *, level: float = 0.95) -> Axes:
    """Realised tokens per concept by content, and by source of a mixture, one series a run; a line at each target.

    Args:
        ax: where to draw.
        records: of runs, as `load_inside` gives them.
        level: of the bars, which are t intervals over documents.
    """
    names = list(dict.fromkeys(name for record in records for name in _contents(record)))
    values: list[float] = []
    for i, (record, label, style) in enumerate(_series(records)):
        found = _contents(record)
        rows = [found.get(name, {"value": None, "stderr": None, "n_documents": 0}) for name in names]
        value, half, known = _bars(rows, level)
        at = np.arange(len(names))[known]
        ax.axhline(record["compression_target"], color=style["color"], linewidth=0.7, linestyle=":", zorder=1)
        bars: dict[str, Any] = _errorbar(style) | {"linestyle": "none"}
        ax.errorbar(at + _shift(i, len(records)), value[known], half[known], label=label, **bars)
        values += [*(value - half)[known].tolist(), *(value + half)[known].tolist(), record["compression_target"]]
    ax.set_yscale("log", base=2)
    ax.set_ylim(0.85 * min(values), 1.15 * max(values))
    ax.yaxis.set_major_locator(FixedLocator(ratio_ticks(0.85 * min(values), 1.15 * max(values))))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)
    return finish(ax, "content of the validation set", "tokens per concept", legend="top", title="dotted: target R")


def _contents(record: Record) -> dict[str, Mapping[str, Any]]:
    parts = {"all": record["tokens_per_concept"]}
    parts |= {name: of["tokens_per_concept"] for name, of in record["content"].items()}
    return parts | {f"source\n{name}": of["tokens_per_concept"] for name, of in (record["sources"] or {}).items()}


def _series(records: Sequence[Record]) -> list[tuple[Record, str, dict[str, Any]]]:
    """Each record with a label and a style; runs of one target are told apart by their names."""
    targets = [record["compression_target"] for record in records]
    labels = [
        f"R = {target:g}" + (f", {record['run_id']}" if targets.count(target) > 1 else "")
        for record, target in zip(records, targets)
    ]
    return list(zip(records, labels, itertools.cycle(RUN_STYLES)))


def _bars(rows: Sequence[Mapping[str, Any]], level: float) -> tuple[Array, Array, Array]:
    """Values, half widths of their intervals, and which have both."""
    value = np.array([np.nan if row["value"] is None else row["value"] for row in rows], float)
    error = np.array([np.nan if row["stderr"] is None else row["stderr"] for row in rows], float)
    freedom = np.array([row["n_documents"] - 1 for row in rows], float)
    known = np.isfinite(value) & np.isfinite(error)
    half = error * stats.t.ppf(0.5 + level / 2, np.where(known, freedom, 1.0))
    return value, half, known


def _errorbar(style: Mapping[str, Any]) -> dict[str, Any]:
    return {**style, "markersize": 3.5, "linewidth": 1.0, "elinewidth": 0.8, "capsize": 1.5, "zorder": 3}


def _shift(i: int, n: int) -> float:
    """Series stand beside each other, so that their bars do not lie on one another."""
    return 0.0 if n == 1 else 0.24 * (i / (n - 1) - 0.5)
