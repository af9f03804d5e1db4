import io
import re

import numpy as np
import pandas as pd
import pytest

from analysis import flops_vs_accuracy, format_table, load_results
from analysis.tables import macro_average, with_average_row
from dlcm.errors import UserError

PAPER = {
    "CSQA": (21.38, 19.74), "HellaSwag": (46.66, 45.99), "Winogrande": (57.22, 56.20), "OBQA": (26.80, 23.80),
    "PIQA": (75.52, 73.10), "ARC-C": (34.81, 33.04), "ARC-E": (69.91, 67.30), "MMLU": (25.40, 25.70),
    "BoolQ": (62.54, 64.01), "RACE": (35.31, 36.03), "C-Eval": (26.08, 24.37), "CMMLU": (25.23, 25.47),
}  # fmt: skip


@pytest.fixture
def table(demo_frame, write_results):
    return flops_vs_accuracy(load_results(write_results(demo_frame)))


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
    for line in format_table(table, "md").splitlines()[2:]:
        cells = [c.strip() for c in line.strip("|").split("|")]
        first, second, average = (float(c.split(" ± ")[0]) for c in cells[-3:])
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
    found = flops_vs_accuracy(load_results(write_results(frame))).set_index("run")
    assert np.isnan(found.loc[frame["run_id"][0], "average"])
    assert found["average"].notna().sum() == len(frame) - 1
    assert "| - |" in format_table(found.reset_index(), "md")


def test_results_without_evaluation_give_a_table_without_accuracies(demo_frame, write_results):
    frame = demo_frame[[c for c in demo_frame if not c.startswith(("acc_", "bpb_"))]]
    found = flops_vs_accuracy(load_results(write_results(frame)))
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
