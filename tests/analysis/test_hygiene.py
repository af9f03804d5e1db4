"""What is found in data and fits before they are believed, and what a fit owes to a few runs."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from analysis import FitResult, ResultsData, fit, laws, load_results
from analysis.cells import find_gaps
from analysis.finding import Severity
from analysis.fit_tables import format_fit, parameter_table
from analysis.hygiene import examine, few_refits
from analysis.plots import new_figure
from analysis.plots_fit import plot_fit
from analysis.plots_hygiene import plot_drop_curve
from analysis.sensitivity import N_EXPONENT, allocation_exponent, both_conventions, drop_curve
from dlcm.errors import UserError
from tests.analysis.test_fit import epoch_data

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def planted(noise=0.004, n_sizes=6, n_tokens=6, seed=0, **columns) -> ResultsData:
    N, D = np.array(np.meshgrid(np.geomspace(1e7, 1e9, n_sizes), np.geomspace(2e8, 2e10, n_tokens))).reshape(2, -1)
    loss = laws.CHINCHILLA.predict(TRUTH, N=N, D=D) * np.exp(np.random.default_rng(seed).normal(0, noise, len(N)))
    return ResultsData.from_arrays(N=N, D=D, loss=loss, **columns)


def names(findings) -> set[str]:
    return {finding.name for finding in findings}


# -- drop curve -------------------------------------------------------------------------------------------------------


def test_the_drop_curve_of_the_chinchilla_data_is_the_published_one():
    curve = drop_curve(laws.CHINCHILLA, epoch_data(n_dropped=0), (0, 1, 3, 5, 12), n_bootstrap=0)
    np.testing.assert_allclose(curve.values[N_EXPONENT], (0.565, 0.544, 0.524, 0.514, 0.505), atol=6e-4)
    assert curve.n_runs == (245, 244, 242, 240, 233)


def test_each_point_of_the_drop_curve_is_the_minimum_that_another_optimiser_finds():
    data = planted(noise=0.01)
    curve = drop_curve("chinchilla", data, (0, 4), n_bootstrap=0, loss="log_mse")
    for i, k in enumerate(curve.ks):
        kept = np.argsort(data.loss)[: len(data) - k]
        N, D, loss = data.N[kept] / 1e8, data.D[kept] / 2e9, data.loss[kept]

        def residuals(x, N=N, D=D, loss=loss):
            return np.log(x[0] + np.exp(x[1]) * N ** -x[2] + np.exp(x[3]) * D ** -x[4]) - np.log(loss)

        found = optimize.least_squares(residuals, [1.5, -0.5, 0.3, 0.0, 0.4], xtol=1e-15, ftol=1e-15, gtol=1e-15).x
        assert curve.values["alpha"][i] == pytest.approx(found[2], rel=1e-5)
        assert curve.values[N_EXPONENT][i] == pytest.approx(found[4] / (found[2] + found[4]), rel=1e-5)


@pytest.mark.slow
def test_the_drop_curve_has_intervals_a_table_and_a_figure():
    curve = drop_curve(laws.CHINCHILLA, planted(), (0, 2, 5), n_bootstrap=40)
    table = curve.table()
    assert table["dropped"].tolist() == [0, 2, 5]
    assert (table["alpha low"] < table["alpha"]).all()
    assert (table["alpha"] < table["alpha high"]).all()
    _, ax = new_figure()
    assert plot_drop_curve(ax, curve) is ax
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2", "5"]


def test_a_drop_curve_that_leaves_too_few_runs_is_refused():
    with pytest.raises(UserError, match="leave too few of 36 runs for 5 constants"):
        drop_curve(laws.CHINCHILLA, planted(), (0, 31))


# -- missing cells ----------------------------------------------------------------------------------------------------


def test_a_hole_in_a_cross_is_named_with_its_budget():
    data = planted().take(np.arange(36) != 8)
    gaps = find_gaps(data)
    assert [c.design for c in gaps.cells] == [f"N = {planted().N[8]:.3g} D = {planted().D[8]:.3g}"]
    assert gaps.describe()[0].startswith(
        f"D = {planted().D[8]:.3g} is provisional: 1 of 6 cells missing (1 not in the results)"
    )
    assert not find_gaps(planted()).cells
    assert any("provisional" in f.text for f in examine(data) if f.name == "missing_cells")


def test_designs_that_are_no_cross_have_no_holes():
    rng = np.random.default_rng(0)
    data = ResultsData.from_arrays(N=10 ** rng.uniform(7, 9, 60), D=10 ** rng.uniform(9, 11, 60), loss=3.0)
    assert not find_gaps(data).cells


def test_the_plan_beside_the_results_says_which_runs_are_missing_and_why(demo_frame, tmp_path):
    plan = demo_frame[["run_id", "model", "flops_train_planned", "budget"]]
    plan.to_parquet(tmp_path / "plan.parquet")
    frame = demo_frame.copy()
    frame.loc[0, "status"] = "diverged"
    frame.drop(index=[3]).to_parquet(tmp_path / "results.parquet")
    gaps = find_gaps(load_results(tmp_path))
    assert gaps.origin == "plan"
    assert {c.run_id: c.reason for c in gaps.cells} == {
        demo_frame["run_id"][0]: "diverged",
        demo_frame["run_id"][3]: "not in the results",
    }
    budget = demo_frame["budget"][0]
    assert any(line.startswith(f"{budget} is provisional: ") for line in gaps.describe())
    assert not find_gaps(load_results(tmp_path).dense).cells


# -- findings ---------------------------------------------------------------------------------------------------------


def test_good_data_and_a_good_fit_give_no_warning(tmp_path, demo_frame):
    rows = planted(seed=1)
    twice = pd.concat([pd.DataFrame({"params": rows.N, "D": rows.D, "loss": rows.loss, "seed": s}) for s in (0, 1)])
    noise = np.random.default_rng(2).normal(0, 0.004, len(twice))
    twice = twice.assign(loss=twice["loss"] * np.exp(noise), lr_source="lr.yaml sha256:0", warmup_share=0.02)
    twice.to_csv(tmp_path / "mine.csv", index=False)
    mapping = {"N": "params", "D": "D", "loss": "loss", "C": "7*N*D"}
    data = load_results(tmp_path / "mine.csv", columns=mapping, n="non_embedding")
    result = fit(laws.CHINCHILLA, data, n_bootstrap=200)
    assert [f for f in result.findings if f.severity is not Severity.NOTE] == []
    assert "findings" not in result.report() or "warning" not in result.report()


def test_findings_are_part_of_the_fit_and_survive_json(tmp_path):
    result = fit(laws.CHINCHILLA, planted(), n_bootstrap=0)
    assert {"few_seeds", "no_intervals", "no_file"} <= names(result.findings)
    result.save(tmp_path / "fit.json")
    again = FitResult.load(tmp_path / "fit.json")
    assert again.findings == result.findings
    assert [p.spread for p in again.parameters] == [p.spread for p in result.parameters]
    old = json.loads((tmp_path / "fit.json").read_text())
    del old["findings"]
    assert FitResult.from_dict(old).findings == ()
    assert "warning: no bootstrap was run" in " ".join(result.report().split())


def test_errors_come_before_warnings_and_notes():
    order = [f.severity for f in examine(planted().take(np.arange(6)), fit(laws.CHINCHILLA, planted(), n_bootstrap=0))]
    assert order == sorted(order, key=["error", "warning", "note"].index)


@pytest.mark.slow
def test_one_law_under_both_conventions_has_its_exponents_side_by_side(adequate_frame, write_results):
    data = load_results(write_results(adequate_frame)).dense
    both = both_conventions(laws.CHINCHILLA, data, n_bootstrap=30)
    apart = fit(laws.CHINCHILLA, data.under("total"), n_bootstrap=0)
    assert both.exponents["alpha"][1] == pytest.approx(apart.values["alpha"], rel=1e-6)
    assert both.exponents["alpha"][0] != pytest.approx(both.exponents["alpha"][1], rel=1e-2)
    assert "do not mix" in both.report()
    assert json.loads(json.dumps(both.to_dict(), allow_nan=False))["exponents"][0]["exponent"] == N_EXPONENT


# -- tables and figures of a fit --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_fit(demo_frame, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    demo_frame.to_parquet(folder / "results.parquet")
    return fit(laws.COMPRESSION_AWARE, load_results(folder), n_bootstrap=20)


def test_tables_of_a_fit_print_no_number_for_what_is_not_identified(demo_fit):
    table = parameter_table(demo_fit).set_index("parameter")
    unknown = [p.name for p in demo_fit.parameters if p.value is None]
    assert unknown
    assert table.loc[unknown, ["value", "low", "high", "profile_low", "losses_low"]].isna().all(axis=None)
    for fmt in ("md", "tex"):
        lines = format_fit(demo_fit, fmt).splitlines()
        for name in unknown:
            head = f"| {name} |" if fmt == "md" else f"${laws_symbol(name)}$ &"
            (line,) = [x for x in lines if x.startswith(head)]
            assert "not identified" in line


def laws_symbol(name: str) -> str:
    from analysis.law_text import symbol

    return symbol(name, latex=True)


def test_the_latex_of_a_fit_is_balanced_and_escaped(demo_fit):
    text = format_fit(demo_fit, "tex")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 2
    assert text.count("{") == text.count("}")
    first = text.split(r"\end{tabular}")[0]
    rows = [line for line in first.splitlines() if line.endswith(r"\\")]
    assert len(rows) == len(demo_fit.parameters) + 1
    assert all(line.count(" & ") == 5 for line in rows)
    body = text.split(r"\midrule")[2]
    assert not [c for line in body.splitlines() for c in ("%", "#") if c in line.replace("\\" + c, "")]


def test_the_card_states_what_a_reader_needs(demo_fit):
    text = format_fit(demo_fit, "md")
    for needed in (
        "objective",
        "delta 0.001",
        "optimiser",
        "starts",
        "left out",
        "params_total",
        "hash",
        demo_fit.data_hash,
    ):
        assert needed in text


def test_a_fit_is_drawn_against_its_runs():
    data = planted(n_tokens=5)
    result = fit(laws.CHINCHILLA, data, n_bootstrap=0)
    _, ax = new_figure()
    plot_fit(ax, data, result)
    line = next(x for x in ax.lines if x.get_label().startswith("D ="))
    N, loss = line.get_xdata(), line.get_ydata()
    D = min(data.D, key=lambda d: np.abs(result.predict(N=N, D=d) - loss).max())
    np.testing.assert_allclose(loss, result.predict(N=N, D=D), rtol=1e-6)


def test_runs_of_several_training_sets_are_told_from_names_of_sizes_and_runs(tmp_path):
    data = planted()
    table = data.frame.assign(
        N=data.N, D=data.D, loss=data.loss, run=[f"r{i}" for i in range(len(data))],
        architecture=[f"w{n:.0f}" for n in data.N], training_set=[("web", "books")[(i + i // 6) % 2] for i in range(len(data))],
    )  # fmt: skip
    table.to_csv(tmp_path / "runs.csv", index=False)
    found = {f.name: f.text for f in examine(load_results(tmp_path / "runs.csv"))}
    assert "runs differ in training_set (books, web)" in found["mixed_kinds"]
    assert "--where \"training_set == 'books'\"" in found["mixed_kinds"]
    assert "architecture" not in found["mixed_kinds"]
    chosen = load_results(tmp_path / "runs.csv").select("training_set == 'web'")
    assert "mixed_kinds" not in names(examine(chosen))


def test_findings_of_few_runs_are_told_without_a_drop_curve(run, tmp_path):
    """Three runs for three constants: no fit without the largest losses can be made, and nothing else is lost for it."""
    frame = pd.DataFrame({"N": [1e7, 1e8, 1e9], "D": [1e9, 2e9, 4e9], "loss": [3.0, 2.7, 2.5]})
    frame.to_csv(tmp_path / "three.csv", index=False)
    call = [
        "hygiene",
        tmp_path / "three.csv",
        "--columns",
        "N=N,D=D,loss=loss",
        "--law",
        "chinchilla",
    ]
    code, out, err = run(*call, "--bootstrap", 0)
    assert code == 0, err
    assert "no bootstrap was run" in out
    assert "no fits without the largest losses: 3 runs are too few" in out
    assert json.loads(run(*call, "--bootstrap", 0, "--json")[1])["drop_curve"] is None


def test_a_tied_exponent_is_no_finding_about_the_allocation():
    law = laws.CHINCHILLA
    values = {"E": 1.7, "A": 400.0, "alpha": 0.3, "B": 400.0, "beta": 0.4}
    assert allocation_exponent(law, values) == pytest.approx(0.4 / 0.7)
    assert allocation_exponent(law.tie(beta="alpha"), values) is None


def test_a_handful_of_refits_is_said_to_be_too_few_for_an_interval(adequate_fits):
    n = len(adequate_fits["dense"].replicates)
    (finding,) = few_refits(None, adequate_fits["dense"])
    assert finding.text.startswith(f"{n} bootstrap refits, where a 95% interval needs 40 or more")
    assert few_refits(None, dataclasses.replace(adequate_fits["dense"], replicates=())) == []
