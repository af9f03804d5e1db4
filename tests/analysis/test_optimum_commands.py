"""`dlcm analyze optimum` on a user's own table, a sweep's and saved fits: every option against a closed form or the library."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import FitResult, fit, laws, load_results, optimum
from analysis.cost import InferenceCost, LifetimeCost, Shapes
from analysis.regret import regret
from tests.analysis.conftest import VOCABULARY

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
BUDGET = 1e20
OWN = ("--cost", "6*N*D", "--inference-cost", "2*N")


def training(N, D, R, P):
    return 6 * N * D


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A user's CSV under names of its own, from Chinchilla's law without noise."""
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e11, 5)))
    loss = laws.CHINCHILLA.predict(TRUTH, N=N, D=D)
    file = tmp_path_factory.mktemp("mine") / "mine.csv"
    file.write_text(
        "\n".join(
            ["params,seen,val_loss", *(f"{n!r},{d!r},{x!r}" for n, d, x in zip(N.tolist(), D.tolist(), loss.tolist()))]
        )
    )
    return file


@pytest.fixture(scope="module")
def my_fit(mine):
    data = load_results(mine, columns={"N": "params", "D": "seen", "loss": "val_loss"})
    result = fit(laws.CHINCHILLA, data, n_bootstrap=10)
    result.save(mine.with_name("fit.json"))
    return mine.with_name("fit.json")


MAPPED = ("--columns", "N=params,D=seen,loss=val_loss")


def best_size(budget):
    a, b = TRUTH["alpha"], TRUTH["beta"]
    return (a * TRUTH["A"] / (b * TRUTH["B"])) ** (1 / (a + b)) * (budget / 6) ** (b / (a + b))


@pytest.mark.slow
def test_a_users_table_and_cost_give_the_closed_form_for_each_budget(run, mine):
    budgets = (3e19, 1e20, 1e21)
    options = [part for c in budgets for part in ("--budget", c)]
    code, out, err = run("optimum", mine, *MAPPED, *OWN, *options, "--bootstrap", 0, "--json")
    assert code == 0, err
    answers = json.loads(out)["answers"]
    assert [a["budget_flops"] for a in answers] == list(budgets)
    for answer in answers:
        assert answer["unit"] == "training FLOPs"
        assert answer["savings"] is None
        (best,) = answer["optima"].values()
        N, D = (c["value"] for c in best["choices"][:2])
        assert best_size(answer["budget_flops"]) == pytest.approx(N, rel=1e-5)
        assert pytest.approx(answer["budget_flops"], rel=1e-9) == 6 * N * D


def test_without_a_budget_the_largest_run_is_spent_again(run, mine, my_fit):
    _, out, _ = run("optimum", mine, *MAPPED, *OWN, "--bootstrap", 0, "--json")
    assert json.loads(out)["answers"][0]["budget_flops"] == pytest.approx(6e21)
    code, out, err = run("optimum", my_fit, *OWN)
    assert (code, out) == (2, "")
    assert "--budget" in err


def test_a_saved_fit_answers_as_in_python(run, my_fit):
    result = FitResult.load(my_fit)
    best = optimum(result, training, BUDGET)
    for where in ((my_fit,), ("absent.csv", "--fit", my_fit)):
        code, out, err = run("optimum", *where, *OWN, "--budget", BUDGET, "--json")
        assert code == 0, err
        assert json.loads(out)["answers"][0]["optima"]["dense"] == json.loads(json.dumps(best.to_dict()))
    code, out, _ = run("optimum", my_fit, *OWN, "--budget", BUDGET)
    assert out.rstrip("\n") == best.report()


def test_budgets_of_serving_and_of_a_lifetime(run, my_fit):
    result = FitResult.load(my_fit)
    serve = InferenceCost(lambda N, D, R, P: 2 * N, training)
    options = ("--inference-budget", 1e9, "--inference-budget", 2e9, "--tokens", 1e10)
    code, out, err = run("optimum", my_fit, *OWN, *options, "--json")
    assert code == 0, err
    for answer, budget in zip(json.loads(out)["answers"], (1e9, 2e9)):
        assert answer["unit"] == "inference FLOPs per token"
        assert answer["tokens"] == 1e10
        N, D = (c["working_value"] for c in answer["optima"]["dense"]["choices"][:2])
        assert (pytest.approx(budget / 2, rel=1e-9), 1e10) == (N, D)
    code, out, err = run("optimum", my_fit, *OWN, "--budget", BUDGET, "--served", 1e11, "--json")
    best = optimum(result, LifetimeCost(training, serve, 1e11), BUDGET)
    assert json.loads(out)["answers"][0]["optima"]["dense"]["choices"][0]["value"] == best["N"].value
    assert best["N"].value < 0.9 * best_size(BUDGET)


def test_a_choice_is_held_against_the_optimum(run, my_fit):
    found = regret(FitResult.load(my_fit), training, BUDGET, N=3e9)
    code, out, err = run("optimum", my_fit, *OWN, "--budget", BUDGET, "--at", "N=3e9", "--at", "D = 2e10", "--json")
    assert code == 0, err
    regrets = json.loads(out)["answers"][0]["regrets"]["dense"]
    assert [r["chosen"] for r in regrets] == [["N"], ["D"]]
    assert regrets[0] == json.loads(json.dumps(found.to_dict()))
    assert regrets[0]["value"] > 0.001
    assert found.text in run("optimum", my_fit, *OWN, "--budget", BUDGET, "--at", "N=3e9")[1]


def test_bounds_hold_the_search_and_limits_the_distance(run, my_fit):
    code, out, _ = run("optimum", my_fit, *OWN, "--budget", BUDGET, "--bounds", "N=2e7:1e8", "--json")
    choice = json.loads(out)["answers"][0]["optima"]["dense"]["choices"][0]
    assert choice["searched"] == [2e7, 1e8]
    assert choice["status"] == "not identified"
    far = ("optimum", my_fit, *OWN, "--budget", 1e25)
    code, out, err = run(*far)
    assert (code, out, err.splitlines()[-1].count("--force")) == (2, "", 1)
    assert run(*far, "--limit", 3)[0] == run(*far, "--force")[0] == 0


@pytest.mark.slow
def test_sweeps_results_are_priced_by_their_shapes_and_compared_with_dense(run, adequate_fits, tmp_path):
    files = []
    for family, result in adequate_fits.items():
        files += ["--fit", tmp_path / f"{family}.json"]
        result.save(files[-1])
    shapes = ("--vocab-size", VOCABULARY, "--seq-len", 256)
    at = ("--budget", 3e13, "--at", "P=0.5,R=4")
    code, out, err = run("optimum", "absent.parquet", *files, *shapes, *at, "--json")
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    assert list(answer["optima"]) == ["dlcm", "dense"]
    # a choice of R and P is one of the DLCM
    assert list(answer["regrets"]) == ["dlcm"]
    best = optimum(adequate_fits["dlcm"], Shapes(VOCABULARY, 256).training(), 3e13)
    assert answer["optima"]["dlcm"]["loss_nats"] == pytest.approx(best.loss, rel=1e-12)
    assert answer["savings"]["budget"] == 3e13
    serving = run("optimum", "absent.parquet", *files, *shapes, "--inference-budget", 4e6, "--tokens", 1e7, "--json")[1]
    saved = json.loads(serving)["answers"][0]["savings"]
    assert (saved["unit"], saved["tokens"]) == ("inference FLOPs per token", 1e7)
    assert saved["low"] <= saved["share"] <= saved["high"]
    text = run("optimum", "absent.parquet", *files, *shapes, *at)[1]
    assert "Choosing N = " in text
    assert text.rstrip().endswith(answer["savings"]["text"])


def test_requests_of_other_lengths_cost_otherwise(run, adequate_fits, tmp_path):
    adequate_fits["dense"].save(tmp_path / "fit.json")
    shapes = ("--vocab-size", VOCABULARY, "--seq-len", 256, "--tokens", 1e7, "--inference-budget", 5e6, "--json")
    sizes = []
    for serving in ((), ("--serving", "200:50")):
        code, out, err = run("optimum", tmp_path / "fit.json", *shapes, *serving)
        assert code == 0, err
        sizes.append(json.loads(out)["answers"][0]["optima"]["dense"]["choices"][0]["working_value"])
    # logits of fewer tokens leave more for the rest
    assert sizes[1] > 1.05 * sizes[0]


@pytest.mark.slow
def test_a_frontier_is_a_table_and_a_figure_with_the_exponents_of_the_law(run, my_fit, tmp_path):
    span = ("--frontier", "1e19:1e22:5")
    files = ("--table", tmp_path / "t.csv", "--plot", tmp_path / "f.svg")
    code, out, err = run("optimum", my_fit, *OWN, *span, *files, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["answers"] == []
    assert found["files"] == [str(tmp_path / "t.csv"), str(tmp_path / "f.svg")][::-1]
    (each,) = found["frontiers"]
    assert [row["budget_flops"] for row in each["dense"]["budgets"]] == pytest.approx(np.geomspace(1e19, 1e22, 5))
    a, b = TRUTH["alpha"], TRUTH["beta"]
    assert [e["value"] for e in each["dense"]["exponents"][:2]] == pytest.approx([b / (a + b), a / (a + b)], rel=1e-4)
    table = pd.read_csv(tmp_path / "t.csv")
    np.testing.assert_allclose(table["N"], best_size(table["budget"].to_numpy()), rtol=1e-5)
    assert set(table["model"]) == {"dense"}
    assert "parameters N*" in (tmp_path / "f.svg").read_text()
    assert run("optimum", my_fit, *OWN, *span, "--table", tmp_path / "t.md")[0] == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    heads, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[-1]))
    last = dict(zip(heads, cells, strict=True))
    assert last["budget"] == "1.00e+22"
    assert last["N"].split()[0].endswith(("M", "G"))
    assert len(last["loss (nats)"].split()[0]) == len("2.1234")  # four decimals, as in the text
    code, out, _ = run("optimum", my_fit, *OWN, *span)
    assert "N* ~ budget^0.514" in out
    assert out.count("e+19") + out.count("e+20") + out.count("e+21") + out.count("e+22") >= 5


def test_frontiers_of_a_lifetime_and_of_serving(run, my_fit):
    code, out, err = run("optimum", my_fit, *OWN, "--frontier", "1e20:1e21:3", "--served", 1e11, "--json")
    assert code == 0, err
    assert "served tokens" in json.loads(out)["frontiers"][0]["dense"]["unit"]
    code, out, err = run("optimum", my_fit, *OWN, "--inference-frontier", "1e8:1e9:3", "--tokens", 1e10, "--json")
    assert code == 0, err
    rows = json.loads(out)["frontiers"][0]["dense"]["budgets"]
    assert [r["N"]["value"] for r in rows] == pytest.approx([5e7, 5e8 / 10**0.5, 5e8], rel=1e-9)


@pytest.mark.many
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--at", "Q=1"), "--at Q=1: 'Q' is no coordinate"),
        (("--at", "N=big"), "N=big is no number"),
        (("--at", "N=1e9,N=2e9"), "N is given twice"),
        (("--at", "R=4", "--budget", 1e20), "a dense model has R = 1"),
        (("--bounds", "N"), "write NAME=LOW:HIGH"),
        (("--bounds", "X=1:2", "--budget", 1e20), "'X' is not searched"),
        (("--inference-budget", 1e9), "--tokens"),
        (("--served", 1e9), "--served: the FLOPs of training and serving together"),
        (("--served", -1, "--budget", 1e20), "served tokens = -1"),
        (("--serving", "10:5"), "--serving: says what serving costs"),
        (("--serving", "ten"), "write READ:WRITTEN"),
        (("--serving", "10:5", "--served", 1e9, "--budget", 1e20), "a cost that is written down knows no lengths"),
        (("--budget", 0), "budget = 0"),
        (("--cost", "6*N*T"), "'T' is neither of N, D, R, P"),
        (("--cost", "-6*N*D"), "a cost is above 0 everywhere"),
        (("--cost", "6ND"), "is no expression"),
        (("--cost", "6*N", "--budget", 1e20), "does not rise with D"),
        (("--cost", "6*N*D", "--inference-cost", "2*M"), "'M' is neither"),
        (("--frontier", "1e20"), "write LOW:HIGH or LOW:HIGH:POINTS"),
        (("--frontier", "1e20:1e19"), "write LOW:HIGH"),
        (("--frontier", "1e19:1e20:1"), "2 to 200 points"),
        (("--inference-frontier", "1e8:1e9"), "--tokens"),
        (("--budget", 1e20, "--plot", "f.png"), "--plot: shows one frontier"),
        (("--frontier", "1e19:1e20", "--table", "f.txt"), "written as .csv, .md, .tex"),
        (("--frontier", "1e19:1e27"), "--force"),
        (("--columns", "N=params"), "--columns: chooses the rows of a new fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line_with_the_way_out(run, my_fit, options, words):
    own = () if "--cost" in options else OWN
    code, out, err = run("optimum", my_fit, *own, *options)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.slow
def test_models_without_a_price_are_told_every_way_out(run, mine, my_fit, adequate_frame, write_results):
    code, _, err = run("optimum", mine, *MAPPED)
    assert code == 2
    assert all(way in err for way in ("give the sweep folder", "--vocab-size", '--cost "6*N*D"'))
    assert "no column 'seq_len'" in run("optimum", mine, *MAPPED, "--vocab-size", 100)[2]
    # nothing says whether these parameters count embeddings
    assert "--n non_embedding" in run("optimum", mine, *MAPPED, "--vocab-size", 100, "--seq-len", 256)[2]
    shapes = ("--vocab-size", 100, "--seq-len", 256, "--n", "non_embedding", "--budget", 1e20, "--bootstrap", 0)
    assert run("optimum", mine, *MAPPED, *shapes)[0] == 0
    assert "--inference-cost" in run("optimum", my_fit, "--cost", "6*N*D", "--served", 1e9, "--budget", 1e20)[2]
    assert "goes with --cost" in run("optimum", my_fit, "--inference-cost", "2*N", "--budget", 1e20)[2]
    # the results that the fit was made from are where it says
    path = write_results(adequate_frame)
    fit(laws.CHINCHILLA, load_results(path), n_bootstrap=0).save(path.with_name("fit.json"))
    assert run("optimum", path.with_name("fit.json"), "--vocab-size", VOCABULARY)[0] == 0
    path.rename(path.with_name("moved.parquet"))
    assert "are not here" in run("optimum", path.with_name("fit.json"), "--vocab-size", VOCABULARY)[2]


@pytest.mark.slow
def test_report_and_plot_take_a_users_cost_too(run, mine, tmp_path):
    with_flops = ("--columns", "N=params,D=seen,loss=val_loss,C=6*N*D")
    for verb, more in (("report", ()), ("plot", ("--figure", "loss_vs_compute"))):
        more = (*more, "--bootstrap", 0)
        code, out, err = run(verb, mine, *with_flops, "--cost", "6*N*D", *more, "--out", tmp_path / verb, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert not [note for note in [*found["missing"], *found.get("notes", [])] if "frontiers" in note]
        if verb == "report":
            N = found["optima"]["dense"]["choices"][0]["value"]
            assert best_size(found["budget_flops"]) == pytest.approx(N, rel=1e-4)
        code, _, err = run(verb, mine, *with_flops, "--cost", "6*N*T", *more, "--out", tmp_path / verb)
        assert (code, "'T' is neither" in err) == (2, True)
    # without one, what cannot be had is said with the way out
    _, out, _ = run("plot", mine, *with_flops, *more, "--out", tmp_path / "bare", "--json")
    assert "loss_vs_compute: no fitted frontiers" in json.loads(out)["notes"][0]
    assert "--cost" in json.loads(out)["notes"][0]


def test_two_fits_of_one_family_are_refused(run, my_fit):
    assert "two fits describe dense models" in run("optimum", my_fit, "--fit", my_fit, *OWN, "--budget", 1e20)[2]


def test_a_family_without_an_answer_says_why_beside_the_others(run, adequate_frame, tmp_path):
    is_dense = adequate_frame["model"] == "dense"
    kept = ~is_dense | (is_dense.cumsum() == 1)  # of the dense runs the first alone
    adequate_frame[kept].to_parquet(tmp_path / "results.parquet")
    shapes = ("--vocab-size", VOCABULARY, "--seq-len", 256, "--budget", 3e13, "--bootstrap", 0)
    code, out, err = run("optimum", tmp_path / "results.parquet", *shapes, "--json")
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    assert list(answer["optima"]) == ["dlcm"]
    assert "one number of tokens" in answer["missing"]["dense"]
    _, text, _ = run("optimum", tmp_path / "results.parquet", *shapes)
    assert "\ndense: no answer: law chinchilla: the runs hold one number of tokens" in text
