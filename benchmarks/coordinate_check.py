"""The coordinate check of muP, three ways: `python benchmarks/coordinate_check.py [--quick] [--assert] [--plot-only]`.

A small DLCM takes 10 AdamW steps at 1, 2, 4 and 8 times its base width (token width alone, concept width alone, both), under
our grouping by matrix, under the paper's grouping by module (eqs 19, 20), and without muP. Prints how much the root mean
square of every group of activations grows, writes `results/coordinate_check.json` and draws
`docs/figures/coordinate_check.png`.

Limit (`--assert`): with our grouping no group grows more than twofold. `--quick` takes one seed at the two
outer widths, and writes nothing.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, environment, format_table, write_result
from dlcm.config import DataConfig, ModelConfig, OptimConfig
from dlcm.coordinates import AXES, GROUPINGS, CoordinateCheck, TrainingBatch, check_coordinates
from dlcm.record import read_json
from dlcm.shards import open_corpus

LIMIT = 2.0
N_STEPS, N_TOKENS, SEQ_LEN, VOCAB = 10, 512, 256, 1024
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "coordinate_check.png"
TITLES = {
    "matrix": "by matrix (ours)",
    "module": "by module (paper)",
    "standard": "no muP",
    "token": "token width grows",
    "concept": "concept width grows",
    "both": "both grow",
}
# What is drawn: the last layer of each stack, and where the two widths meet. Okabe and Ito's palette.
CURVES = {
    "encoder.1": ("encoder", "#0072B2", "o", "-"),
    "boundary.q": ("boundary q", "#CC79A7", "v", ":"),
    "pooled": ("pooled concepts", "#000000", "s", "--"),
    "backbone.1": ("backbone", "#009E73", "D", "-."),
    "cross.1.k": ("cross K", "#E69F00", "P", "-"),
    "cross.1.v": ("cross V", "#D55E00", "^", "-"),
    "cross.1.out": ("cross output", "#56B4E9", "X", "--"),
    "decoder.1": ("decoder", "#999999", "<", "-"),
    "logits": ("logits", "#7F3C8D", "*", ":"),
}


def base_model(d_token: int, d_concept: int) -> ModelConfig:
    """Two layers in every stack, heads of 16."""
    return ModelConfig(
        vocab_size=VOCAB,
        d_token=d_token,
        d_concept=d_concept,
        d_head=16,
        n_encoder_layers=2,
        n_concept_layers=2,
        n_decoder_layers=2,
        n_heads_token=d_token // 16,
        n_heads_concept=d_concept // 16,
        d_ff_token=2 * d_token,
        d_ff_concept=2 * d_concept,
    )


def first_batch() -> TrainingBatch:
    """The first training batch of the standard library's text."""
    corpus = open_corpus(DataConfig(corpus="stdlib", tokenizer=f"bpe-{VOCAB}", seq_len=SEQ_LEN))
    batch = corpus.train.batch(0, seed=0, batch_tokens=N_TOKENS, seq_len=SEQ_LEN)
    tokens_T, targets_T = torch.from_numpy(batch.tokens_T), torch.from_numpy(batch.targets_T)
    return TrainingBatch(tokens_T, targets_T, torch.from_numpy(batch.cu_seqlens).long())


def record(check: CoordinateCheck) -> dict[str, Any]:
    """One check as plain numbers: scales after the last step by group, one number a width."""
    return {
        "axis": check.axis,
        "grouping": check.grouping,
        "factors": check.factors,
        "scales": {name: [float(f"{row[-1]:.5g}") for row in rows] for name, rows in check.scales.items()},
        "losses": [float(f"{row[-1]:.5g}") for row in check.losses],
    }


def table(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Largest scale over the widths relative to the base width: a row a group, a column a check."""
    return [
        {"activations": name}
        | {f"{c['grouping']}, {c['axis']}": max(c["scales"][name]) / c["scales"][name][0] for c in checks}
        for name in checks[0]["scales"]
    ]


def draw(checks: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Scale over width, relative to the base width, log-log: a row of panels each parametrisation, a column each axis."""
    figure = Figure(figsize=(10, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(GROUPINGS), len(AXES), sharex=True, sharey=True)
    for check in checks:
        row, column = GROUPINGS.index(check["grouping"]), AXES.index(check["axis"])
        ax, factors = panels[row][column], check["factors"]
        ax.axhspan(1 / LIMIT, LIMIT, color="#EEEEEE", zorder=0)
        for name, (label, colour, marker, style) in CURVES.items():
            scales = check["scales"][name]
            relative = [scale / scales[0] for scale in scales]
            ax.plot(factors, relative, color=colour, marker=marker, linestyle=style, markersize=5, label=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xticks(factors, [f"{factor}x" for factor in factors])
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        if row == 0:
            ax.set_title(TITLES[check["axis"]])
        if row == len(GROUPINGS) - 1:
            ax.set_xlabel("width over base width")
        if column == 0:
            ax.set_ylabel(f"{TITLES[check['grouping']]}\nactivation scale over base")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Check, print, record, draw, then assert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed at 1x and 8x; writes nothing")
    parser.add_argument("--assert", action="store_true", dest="check", help="fail where our grouping misses the limit")
    parser.add_argument("--plot-only", action="store_true", help="draw the recorded result again")
    args = parser.parse_args()
    path = RESULTS / "coordinate_check.json"
    if args.plot_only:
        draw(read_json(path)["checks"], FIGURE)
        return
    base = base_model(64, 96)
    factors, seeds = ((1, 8), (0,)) if args.quick else ((1, 2, 4, 8), (0, 1, 2))
    optim, batch, checks = OptimConfig(), first_batch(), []
    for grouping in GROUPINGS:
        for axis in AXES:
            began = time.perf_counter()
            check = check_coordinates(
                base, batch, axis=axis, grouping=grouping, factors=factors, n_steps=N_STEPS, optim=optim, seeds=seeds
            )
            checks.append(record(check))
            print(f"{TITLES[grouping]}, {TITLES[axis]}: {time.perf_counter() - began:.0f} s", flush=True)
    rows = table(checks)
    print(format_table(rows))
    if not args.quick:
        setup = {"base": base.model_dump(mode="json"), "optim": optim.model_dump(), "seeds": seeds}
        setup |= {"n_steps": N_STEPS, "batch_tokens": N_TOKENS, "limit": LIMIT}
        write_result(path.stem, {"environment": environment("cpu"), **setup, "checks": checks})
        draw(checks, FIGURE)
    ours = {(row["activations"], axis): row[f"matrix, {axis}"] for row in rows for axis in AXES}
    worst = max(ours, key=lambda key: ours[key])
    print(
        f"largest growth with our grouping: {ours[worst]:.2f}x, {worst[0]} when {TITLES[worst[1]]} (limit {LIMIT:g}x)"
    )
    if args.check:
        assert ours[worst] <= LIMIT


if __name__ == "__main__":
    main()
