"""Does the boundary rate hold? `python benchmarks/ratio_control.py` trains a proxy for each R and way of control, and draws it.

Three ways, each over a full training on the standard library's text:

    loss        the ratio loss alone, decisions sampled in training and thresholded at p >= 1/2 after it, as in the paper
    sample      the controller, decisions sampled in training
    threshold   the controller, decisions thresholded in training as at inference

and the figures that decide: R in training, over the last tenth of the steps, and R on the validation text. With a controller
that is measured twice: uncalibrated, under a threshold set on as much training text, and calibrated on the validation text,
as its loss is. Training and calibrated evaluation must lie within 2% of the target.

    python benchmarks/ratio_control.py --seeds 0 1 2 --steps 600
    python benchmarks/ratio_control.py --ratios 4 --modes loss sample --steps 3000 --name ratio_drift

A run that is there is not trained again: `--runs FOLDER` keeps them, and a second call goes on where the first stopped.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.common import environment, format_table, write_result
from dlcm.config import RunConfig
from dlcm.console import Reporter
from dlcm.record import read_metrics
from dlcm.shards import open_corpus
from dlcm.train import train

TOLERANCE = 0.02
MODES = {
    "loss": {"control": "none", "decision": "sample"},
    "sample": {"control": "bias", "decision": "sample"},
    "threshold": {"control": "bias", "decision": "threshold"},
}
LABELS = {
    "loss": "ratio loss alone",
    "sample": "controller, sampled",
    "threshold": "controller, thresholded",
}


@dataclass(frozen=True)
class Style:
    """How the runs of one kind are drawn."""

    label: str
    colour: str
    mark: str
    line: Any = "-"


STYLES = {
    "loss": Style(LABELS["loss"], "#D55E00", "s"),
    "sample": Style(LABELS["sample"], "#0072B2", "o"),
    "threshold": Style(LABELS["threshold"], "#009E73", "^", (0, (4, 1.5))),
}
ENDS = {
    "tokens_per_concept_train": "training, last tenth",
    "tokens_per_concept_uncalibrated": "evaluation, uncalibrated",
    "tokens_per_concept_calibrated": "evaluation, calibrated",
}
FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def proxy(ratio: float, mode: str, seed: int, steps: int, batch_tokens: int) -> RunConfig:
    """A DLCM of 0.5M non-embedding parameters on the embedded corpus."""
    model = {
        "vocab_size": 1024,
        "d_token": 64,
        "d_concept": 96,
        "n_encoder_layers": 2,
        "n_concept_layers": 2,
        "n_decoder_layers": 2,
        "d_head": 32,
        "n_heads_token": 2,
        "n_heads_concept": 3,
        "d_ff_token": 192,
        "d_ff_concept": 288,
        "boundary": {"compression_ratio": ratio, **MODES[mode]},
    }
    return RunConfig.model_validate(
        {
            "model": model,
            "data": {"corpus": "stdlib", "tokenizer": "bpe-1024", "seq_len": 256},
            "optim": {"lr_token": 3e-3, "lr_concept": 3e-3},
            "train": {
                "tokens": steps * batch_tokens,
                "batch_tokens": batch_tokens,
                "log_every": 1,
                "checkpoint_every": 200,
            },
            "seed": seed,
        }
    )


def run_one(config: RunConfig, folder: Path, report: Reporter, what: str) -> dict[str, Any]:
    """Train, and return what the run directory says."""
    run_dir = folder / config.run_id
    result = train(config, run_dir, on_step=lambda at: report(what, at.step, at.n_steps, f"loss {at.loss_nats:.3f}"))
    rows = read_metrics(run_dir / "metrics.jsonl")
    target = config.model.compression_target
    controlled = result.tokens_per_concept_uncalibrated is not None
    before = result.tokens_per_concept_uncalibrated if controlled else result.tokens_per_concept
    after = result.tokens_per_concept if controlled else None
    return {
        "status": result.status,
        "params": result.params,
        "tokens_per_concept_train": result.tokens_per_concept_train,
        "tokens_per_concept_uncalibrated": before,
        "tokens_per_concept_calibrated": after,
        "held_train": _held(result.tokens_per_concept_train, target),
        "held_evaluation": _held(result.tokens_per_concept, target),
        "loss_nats": result.loss_nats,
        "domains": result.domains,
        "wall_s": result.wall_s,
        "boundary_rate": [row["boundary_rate"] for row in rows],
        "boundary_prob": [row["boundary_prob"] for row in rows],
    }


def _held(realised: float | None, target: float) -> bool:
    return realised is not None and abs(realised / target - 1.0) <= TOLERANCE


def draw(runs: list[dict[str, Any]], path: Path, styles: Mapping[str, Style] = STYLES) -> None:
    """Above, R over the steps of training, a panel for each target; below, how far off R ends up, in training and after it.

    `styles` are those of the runs' `mode`; a run has its rates by step, or every `log_every` steps.
    """
    ratios = sorted({run["ratio"] for run in runs})
    styles = {mode: style for mode, style in styles.items() if any(run["mode"] == mode for run in runs)}
    figure = Figure(figsize=(2.7 * len(ratios) + 1.4, 4.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, len(ratios), height_ratios=[1.5, 1.0])
    ends: list[Axes] = []
    for i, ratio in enumerate(ratios):
        here = [run for run in runs if run["ratio"] == ratio]
        above = figure.add_subplot(grid[0, i])
        _draw_course(above, here, ratio, styles)
        ends.append(figure.add_subplot(grid[1, i], sharex=ends[0] if ends else None))
        _draw_ends(ends[-1], here, ratio, styles)
        above.set_title(f"R = {ratio:g}", fontsize=9)
        if i == 0:
            above.set_ylabel("tokens per concept in training", fontsize=8)
        else:
            ends[-1].set_yticklabels([])
    band = Patch(color="#D0D0D0", label="target ± 2%")
    lines = [
        Line2D([], [], color=of.colour, ls=of.line, marker=of.mark, ms=5, mec="white", label=of.label)
        for of in styles.values()
    ]
    figure.legend(
        handles=[band, *lines], loc="outside lower center", ncols=4, handlelength=3.5, fontsize=8, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_course(ax: Axes, runs: list[dict[str, Any]], ratio: float, styles: Mapping[str, Style]) -> None:
    ax.axhspan(ratio * (1 - TOLERANCE), ratio * (1 + TOLERANCE), color="#D0D0D0", lw=0)
    ax.axhline(ratio, color="black", lw=0.8)
    first = min(run["seed"] for run in runs)
    for run in sorted(runs, key=lambda run: list(styles).index(run["mode"])):
        of = styles[run["mode"]]
        steps, realised = _smoothed(run["boundary_rate"])
        steps = [run.get("log_every", 1) * step for step in steps]
        ax.plot(steps, realised, color=of.colour, ls=of.line, lw=1.4, alpha=1.0 if run["seed"] == first else 0.45)
    ax.set_ylim(*_limits(runs, ratio))
    _tidy(ax, "step")


def _draw_ends(ax: Axes, runs: list[dict[str, Any]], ratio: float, styles: Mapping[str, Style]) -> None:
    """Deviation from the target, one row a figure; the ways of control side by side in it, a mark for each seed."""
    ax.axvspan(-100 * TOLERANCE, 100 * TOLERANCE, color="#D0D0D0", lw=0)
    ax.axvline(0.0, color="black", lw=0.8)
    for run in runs:
        of, place = styles[run["mode"]], list(styles).index(run["mode"])
        for row, name in enumerate(ENDS):
            if run[name] is None:
                continue
            deviation = 100 * (run[name] / ratio - 1)
            height = row + 0.22 * (place - (len(styles) - 1) / 2)
            ax.plot(deviation, height, of.mark, color=of.colour, ms=5, mec="white", mew=0.4)
    ax.set_yticks(range(len(ENDS)), ENDS.values())
    ax.set_ylim(len(ENDS) - 0.5, -0.5)
    _tidy(ax, "off the target (%)")


def _tidy(ax: Axes, label: str) -> None:
    ax.set_xlabel(label, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


def _smoothed(rates: list[float]) -> tuple[list[float], list[float]]:
    """Tokens over concepts in 20 windows of steps, at their centres; the last one ends with the last step."""
    window = max(len(rates) // 20, 1)
    starts = range(len(rates) % window, len(rates), window)
    return (
        [start + window / 2 for start in starts],
        [1.0 / statistics.fmean(rates[start : start + window]) for start in starts],
    )


def _limits(runs: list[dict[str, Any]], ratio: float) -> tuple[float, float]:
    """All of the curves but their first window, where the rate is not yet under control, with the band in sight."""
    seen = [ratio * (1 - 4 * TOLERANCE), ratio * (1 + 4 * TOLERANCE)]
    for run in runs:
        seen += _smoothed(run["boundary_rate"])[1][1:]
    margin = 0.06 * (max(seen) - min(seen))
    return max(min(seen) - margin, 0.9), max(seen) + margin


def table(runs: list[dict[str, Any]]) -> str:
    """One row a run: R in training and at evaluation beside its target, and the loss."""
    rows = [
        {
            "R": f"{run['ratio']:g}",
            "control": LABELS[run["mode"]],
            "seed": run["seed"],
            "training": _with_error(run["tokens_per_concept_train"], run["ratio"]),
            "evaluation, uncalibrated": _with_error(run["tokens_per_concept_uncalibrated"], run["ratio"]),
            "evaluation, calibrated": _with_error(run["tokens_per_concept_calibrated"], run["ratio"]),
            "loss (nats)": f"{run['loss_nats']:.4f}" if run["loss_nats"] is not None else None,
            "seconds": round(run["wall_s"]),
        }
        for run in runs
    ]
    return format_table(rows)


def _with_error(realised: float | None, target: float) -> str | None:
    return None if realised is None else f"{realised:.3f} ({realised / target - 1:+.1%})"


def main() -> None:
    """Train, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs; a temporary one by default")
    parser.add_argument("--name", default="ratio_control", help="name of the result and of the figure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary, Reporter() as report:
        folder = options.runs or Path(temporary)
        points = [(r, mode, seed) for seed in options.seeds for r in options.ratios for mode in options.modes]
        first = proxy(*points[0], options.steps, options.batch_tokens)
        open_corpus(first.data, report)
        runs = []
        for ratio, mode, seed in points:
            config = proxy(ratio, mode, seed, options.steps, options.batch_tokens)
            found = run_one(config, folder, report, f"R = {ratio:g}, {LABELS[mode]}, seed {seed}")
            runs.append({"ratio": ratio, "mode": mode, "seed": seed, **found})
    runs.sort(key=lambda run: (run["ratio"], list(MODES).index(run["mode"]), run["seed"]))
    print(table(runs))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = proxy(options.ratios[0], options.modes[0], options.seeds[0], options.steps, options.batch_tokens)
    path = write_result(
        options.name,
        {
            "environment": environment(device),
            "tolerance": TOLERANCE,
            "steps": options.steps,
            "batch_tokens": options.batch_tokens,
            "config_of_first_run": config.model_dump(mode="json"),
            "runs": runs,
        },
    )
    figure = FIGURES / f"{options.name}.png"
    draw(runs, figure)
    print(f"written to {path} and {figure}")


if __name__ == "__main__":
    main()
