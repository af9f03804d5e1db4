import io
import re

import numpy as np
import pandas as pd
import pytest

from analysis import flops_vs_accuracy, format_table, load_results
from analysis.accuracy import match_baselines
from analysis.outcomes import TaskOutcomes
from analysis.tables import macro_average, with_average_row
from dlcm.errors import UserError

PAPER = {
    "CSQA": (21.38, 19.74), "HellaSwag": (46.66, 45.99), "Winogrande": (57.22, 56.20), "OBQA": (26.80, 23.80),
    "PIQA": (75.52, 73.10), "ARC-C": (34.81, 33.04), "ARC-E": (69.91, 67.30), "MMLU": (25.40, 25.70),
    "BoolQ": (62.54, 64.01), "RACE": (35.31, 36.03), "C-Eval": (26.08, 24.37), "CMMLU": (25.23, 25.47),
}  # fmt: skip


@pytest.fixture
def table(demo_frame, write_results):
    return flops_vs_accuracy(load_results(write_results(demo_frame))).frame


def test_the_papers_rows_average_to_42_24_and_41_23():
    rows = pd.DataFrame([{"task": k, "DLCM": a, "dense": b} for k, (a, b) in PAPER.items()])
    last = with_average_row(rows, ["DLCM", "dense"]).iloc[-1]
    assert (last["task"], last["DLCM"], last["dense"]) == ("average", 42.24, 41.23)
    turned = rows.set_index("task").T.reset_index(drop=True)
    assert list(macro_average(turned, list(PAPER))) == [42.24, 41.23]


def test_averages_are_the_mean_of_the_exported_cells(table):
    exported = pd.read_csv(io.StringIO(format_table(table, "csv")))
    tasks = ["acc_openbook_qa", "acc_passage"]
    np.testing.assert_allclose(exported["average"], exported[tasks].mean(axis=1), atol=0.005 + 1e-9)
    heads, _, *lines = format_table(table, "md").splitlines()
    heads = [c.strip() for c in heads.strip("|").split("|")]
    for line in lines:
        cells = dict(zip(heads, (c.strip() for c in line.strip("|").split("|"))))
        first, second, average = (
            float(cells[c].split(" ± ")[0]) for c in ("openbook_qa (%)", "passage (%)", "average (%)")
        )
        assert average == pytest.approx((first + second) / 2, abs=0.005 + 1e-9)


def test_rows_are_sorted_by_training_flops_and_keep_every_run(table, demo_frame):
    assert table["flops_train"].is_monotonic_increasing
    assert set(table["run"]) == set(demo_frame["run_id"])
    assert {"tokens_per_concept", "loss_nats", "bits_per_byte", "flops_per_token_forward"} <= set(table.columns)


def test_acc_norm_and_standard_errors_are_no_tasks_of_their_own(table):
    assert [c for c in table.columns if c.startswith("acc_") and not c.endswith("_stderr")] == [
        "acc_openbook_qa",
        "acc_passage",
    ]
    assert (table["acc_passage_stderr"] == 2.0).all()


def test_a_run_without_a_task_has_no_average(demo_frame, write_results):
    frame = demo_frame.copy()
    frame.loc[0, "acc_passage"] = np.nan
    found = flops_vs_accuracy(load_results(write_results(frame))).frame.set_index("run")
    assert np.isnan(found.loc[frame["run_id"][0], "average"])
    assert found["average"].notna().sum() == len(frame) - 1
    assert "| - |" in format_table(found.reset_index(), "md")


def test_results_without_evaluation_give_a_table_without_accuracies(demo_frame, write_results):
    frame = demo_frame[[c for c in demo_frame if not c.startswith(("acc_", "bpb_"))]]
    found = flops_vs_accuracy(load_results(write_results(frame))).frame
    assert "average" not in found
    assert len(found) == len(frame)


def test_latex_is_a_balanced_booktabs_table_with_escaped_names(table):
    text = format_table(table, "tex")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}", r"\end{tabular}"):
        assert text.count(rule) == 1
    columns = len(re.search(r"tabular\}\{(\w+)\}", text).group(1))
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == len(table) + 1
    assert all(line.count(" & ") == columns - 1 for line in body)
    assert re.search(r"(?<!\\)[_%](?!.*usepackage)", "".join(body)) is None


def test_markdown_has_one_cell_a_column(table):
    widths = {line.count("|") for line in format_table(table, "md").splitlines()}
    assert len(widths) == 1


def test_unknown_formats_and_columns_are_refused(table):
    with pytest.raises(UserError, match="did you mean 'tex'"):
        format_table(table, "texx")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no column 'acc_pasage'; did you mean 'acc_passage'"):
        macro_average(table, ["acc_pasage"])


def evaluated(**accuracies) -> pd.DataFrame:
    """Dense runs at 1e18, 1e19 and 1e20 FLOPs and DLCM runs at 1e19, with two tasks of 400 items each."""
    rows = []
    for i, (name, (model, flops, R, acc)) in enumerate(accuracies.items()):
        rows.append(
            {
                "run_id": name, "model": model, "seed": 0, "params_total": 10**8 + 10**6, "params_embedding": 10**6,
                "params_token": 10**8 - (model == "dlcm") * 5 * 10**7, "params_concept": (model == "dlcm") * 5 * 10**7,
                "concept_share": 0.5 + 0.001 * i if model == "dlcm" else 0.0, "compression_target": R,
                "tokens_per_concept": R, "tokens_per_concept_train": R, "tokens": 10**9, "seq_len": 2048,
                "flops_train": flops, "flops_train_planned": flops, "flops_per_token_forward": flops / 3e9,
                "loss_nats": 3.0, "bits_per_byte": 1.0, "status": "finished", "budget": "",
                **{f"acc_{t}": acc + d for t, d in (("a", 0.01), ("b", -0.01))},
                **{f"acc_{t}_stderr": 0.02 for t in "ab"}, "bpb_a": 1.5,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


RUNS = {
    "d1": ("dense", 1e18, 1.0, 0.30), "d2": ("dense", 1e19, 1.0, 0.40), "d3": ("dense", 1e20, 1.0, 0.50),
    "r2": ("dlcm", 1.05e19, 2.0, 0.45), "r4": ("dlcm", 0.95e19, 4.0, 0.405), "alone": ("dlcm", 4e18, 4.0, 0.55),
}  # fmt: skip


@pytest.fixture
def data(write_results):
    return load_results(write_results(evaluated(**RUNS)))


def test_a_run_is_compared_with_the_dense_run_of_equal_training_flops(data):
    table = flops_vs_accuracy(data).frame.set_index("run")
    assert table["baseline"].dropna().to_dict() == {"r2": "d2", "r4": "d2"}
    # two tasks, each a difference of two accuracies with errors of 2 points: sqrt(2 * (4 + 4)) / 2 = 2
    assert table.loc["r2", ["gain", "gain_low", "gain_high"]].tolist() == pytest.approx(
        [5.0, 5 - 1.96 * 2, 5 + 1.96 * 2], abs=0.01
    )
    assert np.isnan(table.loc["alone", "gain"])


def test_a_baseline_of_the_runs_own_seed_is_preferred():
    table = pd.DataFrame(
        {"model": ["dense", "dense", "dlcm"], "average": [1.0, 1.0, 1.0], "flops_train": [1e18, 1.08e18, 1e18]}
    )
    assert match_baselines(table, ["0", "1", "1"]) == {2: 1}
    assert match_baselines(table, ["0", "1", "2"]) == {2: 0}


def test_of_several_dense_shapes_at_one_budget_the_best_is_the_baseline():
    """Not the one whose FLOPs happen to be nearest, and not the one of the luckiest accuracy."""
    table = pd.DataFrame(
        {
            "model": ["dense", "dense", "dense", "dlcm"],
            "average": [30.0, 44.0, 40.0, 45.0],
            "flops_train": [1e18, 1.002e18, 1.001e18, 1e18],
            "loss_nats": [3.4, 3.2, 3.1, 3.0],
        }
    )
    assert match_baselines(table, ["0"] * 4) == {3: 2}


def test_differences_are_paired_by_item_where_the_items_are_the_same(data):
    """Both runs answer 396 of 400 items alike: the error is that of 4 differing items, not of 800 answers."""
    one = np.zeros(400, dtype=bool)
    one[:160] = True
    other = one.copy()
    other[160:164] = True
    outcomes = {
        "d2": {t: TaskOutcomes("h", one) for t in "ab"},
        "r2": {t: TaskOutcomes("h", other) for t in "ab"},
        "r4": {t: TaskOutcomes("another", other) for t in "ab"},
    }
    table = flops_vs_accuracy(data, outcomes=outcomes).frame.set_index("run")
    error = 100 * np.std(other.astype(float) - one, ddof=1) / np.sqrt(400) / np.sqrt(2)
    assert table.loc["r2", "gain_high"] - table.loc["r2", "gain"] == pytest.approx(1.96 * error, abs=0.01)
    assert table.loc["r4", "gain_high"] - table.loc["r4", "gain"] == pytest.approx(1.96 * 2, abs=0.01)


def test_the_share_saved_is_read_off_the_best_dense_runs_in_log_flops(data):
    table = flops_vs_accuracy(data).frame.set_index("run")
    # 45% lies half way between the dense runs' 40% and 50%, that is at 10^19.5 FLOPs
    assert table.loc["r2", "saved"] == pytest.approx(100 * (1 - 1.05e19 / 10**19.5), abs=0.06)
    assert table.loc["r2", "saved_low"] < table.loc["r2", "saved"] < table.loc["r2", "saved_high"]
    assert np.isnan(table.loc["alone", "saved"])  # no dense run reaches 55%
    assert table.loc[["d1", "d2", "d3"], "saved"].isna().all()


def test_groups_follow_each_other_with_rules_between_and_shapes_rounding_joins_no_two_groups(data):
    found = flops_vs_accuracy(data, by=["R", "P"])
    assert found.frame["compression_target"].tolist() == [1.0, 1.0, 1.0, 2.0, 4.0, 4.0]
    assert found.breaks == (3, 4)
    assert found.format("tex").count(r"\midrule") == 3
    by_share = flops_vs_accuracy(data, by=["P"])  # 0.503, 0.504 and 0.505 are one value
    assert by_share.breaks == (3,)
    with pytest.raises(UserError, match=r"--by paramz: .* has no such column"):
        flops_vs_accuracy(data, by=["paramz"])


def test_the_best_is_bold_only_where_it_is_significantly_better(data, write_results):
    found = flops_vs_accuracy(data, by=["R"])
    runs = found.frame["run"].tolist()
    assert (runs.index("d3"), "average") in found.bold  # 10 points above the next, error 2
    assert (runs.index("alone"), "average") in found.bold
    assert "**51.00" in found.format("md")
    assert r"\textbf{51.00" in found.format("tex")
    closer = evaluated(**{**RUNS, "d3": ("dense", 1e20, 1.0, 0.43)})
    again = flops_vs_accuracy(load_results(write_results(closer)), by=["R"])
    assert (again.frame["run"].tolist().index("d3"), "average") not in again.bold


def test_every_average_and_its_error_is_recomputed_from_the_exported_file(data, tmp_path):
    frame = pd.read_csv(io.StringIO(flops_vs_accuracy(data).format("csv")))
    np.testing.assert_allclose(frame["average"], frame[["acc_a", "acc_b"]].mean(axis=1), atol=0.005 + 1e-9)
    errors = np.sqrt(frame["acc_a_stderr"] ** 2 + frame["acc_b_stderr"] ** 2) / 2
    np.testing.assert_allclose(frame["average_stderr"], errors, atol=0.005 + 1e-9)


@pytest.mark.slow
def test_the_verb_exports_each_format_by_suffix_and_says_what_it_cannot(dlcm, write_results, tmp_path):
    results = str(write_results(evaluated(**RUNS)))
    for suffix in ("csv", "md", "tex", "parquet"):
        status, _, err = dlcm("analyze", "export", results, "--by", "R", "-o", str(tmp_path / f"t.{suffix}"))
        assert (status, err) == (0, "")
        assert (tmp_path / f"t.{suffix}").exists()
    assert len(pd.read_parquet(tmp_path / "t.parquet")) == len(pd.read_csv(tmp_path / "t.csv")) == 6
    status, _, err = dlcm("analyze", "export", results, "--format", "parquet")
    assert status != 0
    assert "--out" in err
    status, _, err = dlcm("analyze", "export", results, "--context", "4096")
    assert status != 0
    assert "stands apart from its sweep" in err
