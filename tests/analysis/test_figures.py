"""Figures by name: each is drawn without a warning, whole, with units, from data that are planted; what is missing is said."""

import dataclasses
import functools
import inspect
import itertools
import json
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import load_results
from analysis.figure_context import FigureContext
from analysis.figures import FIGURES, draw_figure, find_figure, save_figures
from analysis.plots import finish, new_figure, save_figure
from dlcm.errors import UserError
from dlcm.record import begin_metrics, write_json
from tests.analysis.conftest import cost, make_frame
from tests.analysis.test_lr import planted as planted_rates
from tests.analysis.test_plots_inside import planted as planted_inside

GALLERY = Path(__file__).parents[2] / "docs/gallery.md"
UNITS = (
    r"\((nats/token|FLOPs|%|tokens per concept|% of the tokens|95% interval)\)",
    r"parameters N\*?|training tokens D\*?|tokens per concept( R\*?)?$|target tokens per concept R|backbone share P\*?( of the parameters)?",
    r"largest losses left out|base learning rate|content of the validation set|place in the concept",
)
DECAY = {"k": 0.02, "a": 1.5, "b": 0.1, "c": 0.02}


def complete(frame, folder: Path) -> Path:
    """A sweep folder with all that any figure reads."""
    rng = np.random.default_rng(3)
    n_free = frame["params_total"] - frame["params_embedding"]
    loss, R = frame["loss_nats"].to_numpy(), frame["tokens_per_concept"].to_numpy()
    stable = loss / 0.9
    for _ in range(50):  # the loss where the decay begins follows from its own gain
        stable = loss / (1 - DECAY["k"] * stable ** DECAY["a"] * R ** DECAY["b"] * n_free ** DECAY["c"])
    stable = stable * (1 + rng.normal(0, 1e-4, len(frame)))
    right = rng.binomial(400, 0.25 + 0.6 / (1 + np.exp(2 * (loss - np.median(loss)))))
    frame = frame.assign(loss_nats_stable=stable, chance_passage=0.25, acc_passage=right / 400).drop(
        columns=[c for c in frame if "openbook" in c or "norm" in c]
    )
    folder.mkdir(exist_ok=True)
    frame.to_parquet(folder / "results.parquet")
    for run_id, target, tokens in frame.loc[
        frame["model"] == "dlcm", ["run_id", "compression_target", "tokens"]
    ].to_numpy():
        seen = np.linspace(0.05, 1, 20)
        ratio = target * (1 + 0.4 * np.exp(-12 * seen) + rng.normal(0, 0.01, 20))
        lines = [
            {"step": i, "tokens": s * tokens, "tokens_per_concept": r} for i, (s, r) in enumerate(zip(seen, ratio))
        ]
        (folder / run_id).mkdir(exist_ok=True)
        begin_metrics(folder / run_id / "metrics.jsonl", lines)
    for target in (2.0, 4.0, 8.0):
        write_json(folder / f"inside-{target:g}" / "inside.json", planted_inside(target))
    return folder


@pytest.fixture(scope="module")
def context(adequate_frame, adequate_fits, tmp_path_factory) -> FigureContext:
    folder = complete(adequate_frame, tmp_path_factory.mktemp("sweep"))
    return FigureContext(
        load_results(folder), lambda: cost, saved=adequate_fits, folder=folder, table=planted_rates(noise=0.01),
        n_bootstrap=20,
    )  # fmt: skip


def drawn(context: FigureContext, name: str):
    """The figure, laid out and rasterised, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_figure(context, name)
        figure.canvas.draw()
    return figure


@pytest.fixture(scope="module")
def figures(context) -> Callable:
    """Each figure, drawn once."""
    return functools.cache(lambda name: drawn(context, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_whole_without_a_warning_and_with_units(context, figures, name, tmp_path):
    figure = figures(name)
    shown = [ax for ax in figure.axes if ax.axison]
    assert shown
    for ax in shown:
        labels = [ax.get_xlabel(), ax.get_ylabel()]
        # of panels that share an axis the outer one has the label
        shared = [ax.get_shared_x_axes().get_siblings(ax), ax.get_shared_y_axes().get_siblings(ax)]
        for k, (label, others) in enumerate(zip(labels, shared)):
            found = [label] if label else [(o.get_xlabel, o.get_ylabel)[k]() for o in others]
            assert any(re.search(unit, text) for unit in UNITS for text in found), (name, found)
        assert ax.has_data()
    # nothing is cut off at the edge of the page
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert -0.02 <= box.x0 <= box.x1 <= width + 0.02, name
    assert -0.02 <= box.y0 <= box.y1 <= height + 0.02, name
    assert width <= 2 * 3.4
    facts = json.loads(
        Image.open(save_figure(figure, tmp_path / "f.png", data=context.data, shows=name)).info["Description"]
    )
    assert facts["results_hash"] == context.data.hash
    assert facts["commit"]
    assert facts["shows"] == name


@pytest.mark.many
@pytest.mark.parametrize("name", FIGURES)
def test_series_are_told_apart_without_colour(figures, name):
    """The entries of a legend, as black and white pixels: no two have the same ones."""
    figure = figures(name)
    pixels = np.asarray(figure.canvas.buffer_rgba(), dtype=float)
    ink = (pixels[::-1, :, :3] @ (0.299, 0.587, 0.114)) < 240
    legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()] + figure.legends
    for legend in legends:
        em = legend.get_texts()[0].get_fontsize() * figure.dpi / 72
        masks = []
        for text in legend.get_texts():
            box = text.get_window_extent()
            right, middle = round(box.x0 - 0.4 * em), round((box.y0 + box.y1) / 2)
            masks.append(ink[middle - round(0.6 * em) : middle + round(0.6 * em), right - round(2.1 * em) : right])
        for one, other in itertools.combinations(masks, 2):
            assert one.any()
            assert np.sum(one & other) < 0.9 * np.sum(one | other), name


@pytest.mark.slow
def test_a_thousand_runs_draw_every_figure_without_a_warning(tmp_path):
    frame = make_frame(
        np.geomspace(1e5, 3e7, 8), np.geomspace(3e11, 3e15, 6), dense_sizes=np.geomspace(1e5, 3e7, 12),
        ratios=(2.0, 4.0, 8.0, 16.0), shares=(0.2, 0.35, 0.5, 0.65, 0.8), noise=0.002,
    )  # fmt: skip
    assert len(frame) > 1000
    folder = complete(frame, tmp_path / "sweep")
    big = FigureContext(
        load_results(folder), lambda: cost, folder=folder, table=planted_rates(noise=0.01), n_bootstrap=30
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = save_figures(big, FIGURES, tmp_path / "plots")
    assert found.missing == {}
    assert found.notes == ()
    assert len(found.files) == 2 * len(FIGURES)
    assert max(file.stat().st_size for file in found.files) < 2_000_000


REASONS = {
    "loss_vs_compute": "training FLOPs of the runs are not known; map them with --columns C=",
    "loss_vs_share": "hold no finished dlcm run",
    "loss_per_flop": "hold no finished dlcm run",
    "iso_loss": "it needs a law of the dlcm models",
    "allocation": "needs runs at two training budgets or more",
    "savings": "it needs a law of the dlcm models",
    "isoflop": "--columns C=",
    "lr_transfer": "no column .*lr_token",
    "realised_ratio": "hold no finished dlcm run",
    "ratio_over_training": "hold no finished dlcm run",
    "tokens_per_concept": "no run has inside.json; make it with `dlcm show",
    "loss_by_position": "no run has inside.json; make it with `dlcm show",
    "decay_gain": "hold no finished dlcm run",
    "downstream": "no run was evaluated on a task",
}


@pytest.fixture
def own_table(tmp_path) -> Path:
    """A user's table of dense runs, with N, D and loss and nothing else."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    loss = 1.8 + 480 / N**0.35 + 2100 / D**0.37
    path = tmp_path / "mine" / "runs.csv"
    path.parent.mkdir()
    path.write_text("\n".join(["N,D,loss", *(f"{n},{d},{x}" for n, d, x in zip(N, D, loss))]))
    return path


@pytest.mark.slow
def test_all_that_the_data_allow_are_drawn_and_the_others_have_a_reason(run, own_table, tmp_path):
    code, out, err = run("plot", own_table, "--figure", "all", "-o", tmp_path / "p", "--bootstrap", 0, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["missing"].keys() == REASONS.keys()
    for name, reason in found["missing"].items():
        assert re.search(REASONS[name], reason), (name, reason)
        assert "\n" not in reason
    made = {f"{name}.{suffix}" for name in FIGURES.keys() - REASONS.keys() for suffix in ("png", "svg")}
    assert {file.name for file in (tmp_path / "p").iterdir()} == {Path(f).name for f in found["files"]} == made


@pytest.mark.slow
def test_a_figure_by_name_is_drawn_to_the_file_that_is_named(run, own_table, tmp_path):
    code, out, _ = run("plot", own_table, "--figure", "residuals", "-o", tmp_path / "r.pdf", "--bootstrap", 0)
    assert code == 0
    assert out.strip() == str(tmp_path / "r.pdf")
    assert (tmp_path / "r.pdf").read_bytes().startswith(b"%PDF")
    two = ("--figure", "residuals", "--figure", "predicted_vs_measured", "--figure", "residuals")
    code, out, _ = run("plot", own_table, *two, "-o", tmp_path / "two", "--bootstrap", 0, "--json")
    assert code == 0
    assert len(json.loads(out)["files"]) == 4


@pytest.mark.many
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--figure", "residual"), "no figure 'residual'; did you mean 'residuals'?"),
        (("--figure", "residuals", "-o", "r.gif"), "saved as .png, .svg or .pdf, not .gif"),
        (
            ("--figure", "residuals", "--figure", "savings", "-o", "r.png"),
            "holds one figure, and 2 figures are asked for",
        ),
        (("-o", "r.png"), "holds one figure, and all figures are asked for"),
        (
            ("--figure", "residuals", "--figure", "decay_gain"),
            "figure decay_gain: the results hold no finished dlcm run",
        ),
        (("--figure", "savings", "--fit", "none.json"), "none.json"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_leaves_nothing_behind(
    run, own_table, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("plot", own_table, *arguments, "--bootstrap", 0)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_list_names_every_figure_with_what_it_needs(run):
    code, out, _ = run("plot", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(FIGURES)
    assert all("; needs " in line for line in out.splitlines())
    code, out, _ = run("plot", "--list", "--json")
    assert [row["name"] for row in json.loads(out)["figures"]] == list(FIGURES)
    code, _, err = run("plot")
    assert code == 2
    assert "give results.parquet or .csv, or a sweep folder" in err
    with pytest.raises(UserError, match="did you mean 'iso_loss'"):
        find_figure("isoloss")


def test_the_gallery_lists_every_figure_with_a_function_that_exists():
    rows = re.findall(r"^\| `(\w+)` \| .* \| `([\w.]+)` \|$", GALLERY.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(FIGURES)
    for _, function in rows:
        module, name = function.rsplit(".", 1)
        assert next(iter(inspect.signature(getattr(import_module(module), name)).parameters)) == "ax"


@pytest.mark.slow
def test_what_figures_share_is_found_once(context, monkeypatch):
    families, frontier = (import_module(f"analysis.{name}") for name in ("families", "frontier"))
    told: list[str] = []
    counted: dict[str, int] = {}

    def count(module, name: str) -> None:
        real: Callable = getattr(module, name)

        def counting(*args, **kwargs):
            counted[name] = counted.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(families, "fit")
    count(frontier, "frontier")
    fresh = dataclasses.replace(context, saved={}, n_bootstrap=3, tell=told.append, notes=[])
    for name in ("loss_vs_compute", "allocation", "predicted_vs_measured", "residuals", "iso_loss"):
        drawn(fresh, name)
    assert counted == {"fit": 2, "frontier": 2}
    assert "drawing iso_loss" in told


def test_a_figure_without_its_frontier_says_so(context):
    def unknown():
        raise UserError("no price")

    poor = dataclasses.replace(context, find_cost=unknown, notes=[])
    figure = drawn(poor, "loss_vs_compute")
    assert not any("frontier" in text.get_text() for text in figure.axes[0].get_legend().get_texts())
    assert poor.notes == ["loss_vs_compute: no fitted frontiers: no price"]
    with pytest.raises(UserError, match="figure iso_loss: no price"):
        draw_figure(poor, "iso_loss")


@pytest.mark.parametrize(("n", "letters"), [(2, 30), (3, 12), (4, 5), (5, 14), (7, 21)])
def test_entries_of_a_legend_go_into_as_many_columns_as_fit(n, letters):
    figure, ax = new_figure()
    for i in range(n):
        ax.plot([0, 1], [0, i], label="none of them is wider"[: letters - i % 3].ljust(letters - i % 3, "e"))
    finish(ax, "x", "y", legend="top")
    figure.canvas.draw()
    assert figure.get_tightbbox().x1 <= 3.42
    height = ax.get_position().height * figure.get_figheight()
    assert height > 1.2
