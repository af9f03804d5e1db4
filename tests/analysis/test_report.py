import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import analyze, fit, laws, load_results
from analysis.compare import compare_at_matched_compute, ratio_table, seed_noise
from analysis.design import describe_support, levels
from analysis.plots import new_figure, plot_loss_vs_compute, plot_realised_ratio, save_figure
from analysis.plots_shares import plot_loss_vs_share
from dlcm.errors import UserError
from tests.analysis.conftest import PLANTED_DENSE, PLANTED_DLCM, cost, make_frame

PLOTS = ("loss_vs_compute", "loss_vs_share", "realised_ratio", "predicted_vs_measured")


@pytest.fixture(scope="module")
def demo_analysis(demo_frame, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    demo_frame.to_parquet(folder / "results.parquet")
    told: list[str] = []
    found = analyze(folder / "results.parquet", folder / "out", cost=cost, n_bootstrap=20, tell=told.append)
    assert told
    return found


@pytest.mark.slow
def test_everything_promised_is_written(demo_analysis):
    out = demo_analysis.out_dir
    expected = [f"plots/{name}.{s}" for name in PLOTS for s in ("png", "svg")]
    expected += [f"tables/flops_vs_accuracy.{s}" for s in ("csv", "md", "tex")] + ["tables/realised_ratios.csv"]
    expected += ["fits/dense.json", "fits/dlcm.json", "summary.md", "report.html"]
    assert sorted(str(p.relative_to(out)) for p in demo_analysis.files) == sorted(expected)
    assert all((out / name).stat().st_size > 100 for name in expected)


@pytest.mark.slow
def test_the_summary_says_what_so_few_runs_cannot_say(demo_analysis):
    text = demo_analysis.summary()
    assert (demo_analysis.out_dir / "summary.md").read_text() == text + "\n"
    for needed in (
        "18 finished runs (6 dense, 12 dlcm)",
        "not identified: only one model size",
        "N spans 0.00 decades; below 1.5",
        "no design was run with two seeds",
        "12 of 12 runs are held",
        "## Best allocation of 3e+12 training FLOPs",
    ):
        assert needed in text
    saved = demo_analysis.savings
    # no winner is named: the best dense size is the smallest that was run, and the DLCM's choices lie on edges as well
    assert saved.dense_at_edge
    assert saved.status == "not identified"
    assert "predicted at equal loss: which family is cheaper is not identified" in text
    assert "wins" not in saved.text
    assert not any("nan" in line.split() for line in text.splitlines())


@pytest.mark.slow
def test_what_the_dense_model_needs_for_the_same_loss_lies_in_the_interval(demo_analysis):
    """By brute force on the laws that the runs were planted from, over what the runs span."""
    R, P = np.meshgrid(np.linspace(2, 4, 41), np.linspace(0.3, 0.7, 41))
    loss = laws.COMPRESSION_AWARE.predict(PLANTED_DLCM, N=9e5, D=3e12 / cost(9e5, 1, R, P), R=R, P=P).min()
    N, C = np.meshgrid(np.geomspace(3e5, 1.2e6, 200), np.geomspace(1e12, 6e12, 1000))
    reached = laws.CHINCHILLA.predict(PLANTED_DENSE, N=N, D=C / cost(N, 1, 1, 0)) <= loss
    truth = 1 - 3e12 / C[reached].min()
    saved = demo_analysis.savings
    assert saved.low <= truth <= saved.high


@pytest.mark.slow
def test_the_summary_says_in_one_sentence_that_runs_repeat_their_text(demo_analysis):
    def summary(epochs):
        frame = demo_analysis.data.frame.drop(columns="epochs")
        frame = frame if epochs is None else frame.assign(epochs=epochs)
        return replace(demo_analysis, data=replace(demo_analysis.data, frame=frame)).summary()

    text = " ".join(summary([0.5] * 16 + [1.0, 4.25]).split())
    assert "- 1 of 18 runs goes through text more than once, up to 4.25 epochs: the D of a law then counts" in text
    for epochs in ([0.5] * 18, [None] * 18, None):
        assert "more than once" not in summary(epochs)


@pytest.mark.slow
def test_the_analysis_is_json(demo_analysis):
    data = json.loads(json.dumps(demo_analysis.to_dict(), allow_nan=False))
    assert data["n_runs"] == 18
    assert len(data["ratios"]) == 12
    assert set(data["optima"]) == {"dense", "dlcm"}


@pytest.mark.slow
def test_figures_carry_their_provenance(demo_analysis):
    from PIL import Image

    path = demo_analysis.out_dir / "plots" / "loss_vs_compute.png"
    facts = json.loads(Image.open(path).info["Description"])
    assert facts["results_hash"] == demo_analysis.data.hash
    assert facts["commit"]
    assert demo_analysis.data.hash in path.with_suffix(".svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("n_dense", "n_dlcm"), [(1, 5), (1, 1), (2, 3), (4, 2)])
def test_a_sweep_cut_off_early_is_analysed_all_the_same(demo_frame, write_results, tmp_path, n_dense, n_dlcm):
    frame = demo_frame.copy()
    position = frame.groupby("model").cumcount()
    kept = position < np.where(frame["model"] == "dense", n_dense, n_dlcm)
    frame.loc[~kept, "status"] = "cancelled"
    found = analyze(write_results(frame), tmp_path / "out", cost=cost, n_bootstrap=3)
    assert set(found.fits) == {"dense", "dlcm"}
    # runs that hold one number of tokens say nothing of its worth: no optimum, and the reason instead
    for family in found.fits.keys() - found.optima.keys():
        assert any(f"optimum of the {family} models" in reason and "hold one" in reason for reason in found.missing)
    assert not any(p.identified for fitted in found.fits.values() for p in fitted.parameters)
    assert f"{18 - n_dense - n_dlcm} cancelled" in found.summary()


@pytest.mark.slow
def test_a_missing_family_is_reported_not_fatal(demo_frame, write_results, tmp_path):
    dense = demo_frame[demo_frame["model"] == "dense"]
    found = analyze(write_results(dense), tmp_path / "out", cost=cost, n_bootstrap=3)
    assert set(found.fits) == {"dense"}
    assert any("no finished dlcm run" in reason for reason in found.missing)
    assert "No DLCM run." in found.summary()


@pytest.mark.slow
def test_without_a_sweep_the_optimum_is_missing_with_its_reason(demo_frame, write_results, tmp_path):
    found = analyze(write_results(demo_frame), tmp_path / "out", n_bootstrap=3)
    assert not found.optima
    assert any("stands apart from its sweep" in reason for reason in found.missing)
    assert (tmp_path / "out" / "plots" / "loss_vs_share.png").exists()


def test_seeds_give_differences_their_error(write_results):
    frame = make_frame([9e5], [1e12], dense_sizes=[3e5], seeds=(0, 1, 2), noise=0.01)
    data = load_results(write_results(frame))
    noise = seed_noise(data)
    (comparison,) = compare_at_matched_compute(data)
    assert noise == pytest.approx(0.01 * 5.4, rel=0.5)
    assert comparison.error == pytest.approx(noise * np.sqrt(2 / 3))
    assert "standard error" in comparison.describe()
    assert describe_support(data.dlcm, "dlcm").n_repeated == 6


def test_a_ratio_that_is_not_held_is_shown(demo_frame, write_results):
    frame = demo_frame.copy()
    frame.loc[0, "tokens_per_concept"] = 2.2
    table = ratio_table(load_results(write_results(frame)))
    assert list(table["held"]).count("NO") == 1


def test_scatter_around_one_target_is_one_level():
    assert levels([1.91, 2.0, 2.1, 3.82, 4.0, 4.2]) == [2.0, 4.0]
    assert len(levels(np.geomspace(1e6, 1e8, 200))) > 20


def test_collinear_sizes_and_tokens_are_warned_about(write_results):
    frame = make_frame([9e5], [1e12], dense_sizes=np.geomspace(1e5, 1e7, 6))
    dense = frame["model"] == "dense"
    frame.loc[dense, "tokens"] = 20 * (frame["params_total"] - frame["params_embedding"])[dense]
    support = describe_support(load_results(write_results(frame)).dense, "dense")
    assert any("collinear" in w for w in support.warnings)
    assert not any("decades" in w for w in support.warnings)


def test_plots_return_their_axes_with_units(demo_frame, write_results):
    data = load_results(write_results(demo_frame))
    for draw in (plot_loss_vs_compute, plot_loss_vs_share, plot_realised_ratio):
        _, ax = new_figure()
        assert draw(ax, data) is ax
        assert "nats/token" in ax.get_ylabel() or "%" in ax.get_ylabel()
        assert ax.get_legend() is not None
    with pytest.raises(UserError, match="no DLCM run within 15%"):
        plot_loss_vs_share(new_figure()[1], data, budget=1e20)


@pytest.mark.slow
def test_figures_are_saved_in_three_formats_and_no_other(tmp_path, demo_frame, write_results):
    data = load_results(write_results(demo_frame))
    figure, ax = new_figure()
    plot_realised_ratio(ax, data)
    for suffix in ("png", "svg", "pdf"):
        assert save_figure(figure, tmp_path / f"f.{suffix}", data=data).stat().st_size > 1000
    with pytest.raises(UserError, match="saved as .png, .svg or .pdf"):
        save_figure(figure, tmp_path / "f.gif")


def test_the_same_figure_is_the_same_file(tmp_path, demo_frame, write_results):
    data = load_results(write_results(demo_frame))
    found = []
    for name in ("a.svg", "b.svg"):
        figure, ax = new_figure()
        plot_realised_ratio(ax, data)
        found.append(save_figure(figure, tmp_path / name, data=data).read_bytes())
    assert found[0] == found[1]


@pytest.mark.slow
def test_importing_analysis_loads_neither_torch_nor_a_scheduler_nor_pyplot():
    code = (
        "import sys\n"
        "from analysis import analyze, fit, laws, load_results, optimum\n"
        "assert callable(fit) and callable(optimum) and laws.CHINCHILLA\n"
        "print([m for m in ('torch', 'submitit', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_fit_verb_prints_the_report_and_writes_json(run, demo_frame, write_results, tmp_path):
    path = write_results(demo_frame)
    code, out, err = run("fit", path, "--law", "chinchilla", "--bootstrap", 3, "--out", tmp_path / "fit.json")
    assert code == 0
    assert "Law chinchilla" in out
    assert "fitting chinchilla to 6 runs" in err
    code, out, _ = run("fit", path, "--law", "chinchilla", "--bootstrap", 3, "--json")
    assert json.loads(out) == json.loads((tmp_path / "fit.json").read_text())


@pytest.mark.slow
def test_plot_export_and_report_verbs_write_their_files(run, demo_frame, write_results, tmp_path):
    path = write_results(demo_frame)
    code, out, _ = run("plot", path, "--out", tmp_path / "p", "--bootstrap", 3, "--json")
    assert code == 0
    found = json.loads(out)
    drawn = {Path(file).stem for file in found["files"]}
    assert set(PLOTS) <= drawn
    assert len(found["files"]) == 2 * len(drawn)
    assert any(note.startswith("loss_vs_share: no fitted law: ") for note in found["notes"])
    code, out, _ = run("export", path, "--format", "tex", "--out", tmp_path / "t.tex")
    assert code == 0
    assert r"\toprule" in (tmp_path / "t.tex").read_text()
    code, out, _ = run("export", path)
    assert out.startswith("| run |")
    code, out, _ = run("report", path, "--bootstrap", 3, "--out", tmp_path / "r")
    assert code == 0
    assert out.startswith("# What the runs say")
    assert Path(tmp_path / "r" / "summary.md").exists()


@pytest.mark.parametrize("verb", ["fit", "optimum", "plot", "export", "report"])
def test_a_missing_file_or_column_is_one_line_and_exit_2(run, verb, demo_frame, write_results, tmp_path):
    code, out, err = run(verb, tmp_path / "absent.parquet")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "absent.parquet: no such file" in err
    code, out, err = run(
        verb,
        write_results(demo_frame.rename(columns={"tokens": "token"})),
        *(["--vocab-size", 9] * (verb == "optimum")),
    )
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "no column 'tokens'; did you mean 'token'" in err
    assert not (tmp_path / "report").exists()


def test_an_unknown_law_is_answered_with_the_nearest(run, demo_frame, write_results):
    code, _, err = run("fit", write_results(demo_frame), "--law", "compresion_aware")
    assert code == 2
    assert "unknown law 'compresion_aware'; did you mean 'compression_aware'" in err


@pytest.mark.slow
def test_fits_of_a_csv_equal_those_of_parquet(demo_frame, write_results):
    results = [
        fit(laws.CHINCHILLA, load_results(write_results(demo_frame, f"r.{s}")), n_bootstrap=0)
        for s in ("csv", "parquet")
    ]
    assert results[0].values == pytest.approx(results[1].values, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fit", "plot", "export"])
def test_verbs_take_a_users_csv(run, verb, tmp_path):
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    loss = laws.CHINCHILLA.predict({"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}, N=N, D=D)
    lines = [
        "params,tokens seen,val_loss,set",
        *(f"{n},{d},{x},c4" for n, d, x in zip(N, D, loss)),
        "1e8,1e9,9.9,other",
    ]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    mapping = (
        "--columns",
        "N=params,D=`tokens seen`,loss=val_loss",
        "--where",
        "set == 'c4'",
        "--exclude",
        "row3=spike",
    )
    plot = ("--figure", "predicted_vs_measured", "--bootstrap", 0, "--out", tmp_path / "p")
    more = {"fit": ("--law", "chinchilla", "--bootstrap", 0), "plot": plot}.get(verb, ())
    code, out, err = run(verb, tmp_path / "mine.csv", *mapping, *more, "--json")
    assert code == 0, err
    found = json.loads(out)
    if verb == "fit":
        assert found["status"] == "certified"
        assert found["n_runs"] == 24
        assert found["exclusions"] == [{"run_id": "row3", "reason": "spike", "family": "dense"}]
        assert found["definitions"]["D"] == "as given (D = `tokens seen`)"
        assert {p["name"]: p["value"] for p in found["parameters"]}["alpha"] == pytest.approx(0.35, rel=1e-5)
    elif verb == "plot":
        assert [Path(f).name for f in found["files"]] == ["predicted_vs_measured.png", "predicted_vs_measured.svg"]
    else:
        assert len(found["rows"]) == 24
        assert found["rows"][0]["params"] == pytest.approx(1e7)


@pytest.mark.slow
def test_of_many_runs_the_summary_tells_the_ends_of_each_target(tmp_path):
    shares = (0.3, 0.4, 0.5, 0.6)
    frame = make_frame([1e5, 5e5, 2e6], [3e11, 3e12], dense_sizes=[], ratios=(2.0, 4.0), shares=shares)
    wide = frame["compression_target"] == 4.0
    frame.loc[frame.index[wide][0], "tokens_per_concept"] = 4.4
    frame.to_parquet(tmp_path / "results.parquet")
    found = analyze(tmp_path / "results.parquet", tmp_path / "out", n_bootstrap=0)
    n = int(wide.sum())
    text = found.summary()
    row = next(line for line in text.splitlines() if line.startswith(f"| 4.00 | {n} |"))
    assert row.endswith(f"| 4.40 | {n - 1} |")
    assert f"{2 * n - 1} of {2 * n} runs are held. tables/realised_ratios.csv has each of them." in text
    each = pd.read_csv(found.out_dir / "tables" / "realised_ratios.csv")
    assert list(each["held"]).count("NO") == 1
