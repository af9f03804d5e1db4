"""Planning is pure and light: budgets become tokens, points become runs with their realised size, share and cost."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dlcm.errors import UserError
from flops import count, parameters
from sweeps import Sweep, plan
from sweeps.plan_table import format_csv, format_plan, plan_json, short_count

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "sweeps" / "recipes").glob("*.yaml"))
BASE = {"size": 4e5, "concept_share": 0.5, "compression_ratio": 4}


def planned(**blocks):
    return plan(Sweep.from_dict({"name": "s", "base": BASE, "budgets": {"tokens": [100_000]}, **blocks}))


def refused(**blocks) -> str:
    with pytest.raises(UserError) as error:
        planned(**blocks)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans_and_says_what_it_asks(path):
    made = plan(Sweep.from_yaml(path))
    assert len(made) >= (2 if path.stem == "table3" else 16)  # table3 is for counting, not for fitting
    assert made.sweep.name == path.stem
    assert len({run.run_id for run in made.runs}) == len(made)
    assert sum(run.budget_share for run in made.runs) == pytest.approx(1)
    text = path.read_text()
    assert text.startswith("# ")
    assert len([line for line in text.splitlines() if line.startswith("#")]) >= 4
    for run in made.runs:
        if not run.config.model.is_dense and "size" in run.design:
            assert abs(run.params.non_embedding / run.design["size"] - 1) <= 0.01
            assert abs(run.concept_share - run.design["concept_share"]) <= 0.01


def test_the_shipped_recipes_are_those_of_the_design():
    assert {path.stem for path in RECIPES} >= {
        "demo",
        "compression",
        "allocation",
        "isoflop",
        "lr_transfer",
        "paper",
        "table3",
    }


def test_the_demo_covers_what_it_promises():
    made = plan(Sweep.from_yaml(ROOT / "sweeps" / "recipes" / "demo.yaml"))
    dlcm = [run for run in made.runs if not run.config.model.is_dense]
    dense = [run for run in made.runs if run.config.model.is_dense]
    assert len(dlcm) >= 12
    assert {run.compression_target for run in dlcm} == {2, 4}
    assert len({run.design["concept_share"] for run in dlcm}) == 3
    assert len({run.budget for run in made.runs}) == 2
    assert len({run.params.non_embedding for run in dense}) == 3


def test_a_flops_budget_is_spent_but_not_exceeded():
    for run in planned(budgets={"flops": [5e11, 1e12]}, baseline={}).runs:
        budget = 5e11 if run.budget.startswith("5e+11") else 1e12
        step = run.config.train.batch_tokens * run.flops.training_per_token
        assert budget - step < run.flops_train_planned <= budget
        assert run.tokens % run.config.train.batch_tokens == 0


def test_tokens_per_parameter_follow_the_realised_size():
    (run,) = planned(budgets={"tokens_per_parameter": [2]}).runs
    assert 0 <= 2 * run.params.non_embedding - run.tokens < run.config.train.batch_tokens


def test_the_planned_cost_is_that_of_the_closed_form():
    for run in planned(baseline={}).runs:
        model = run.config.model
        assert run.params == parameters(model)
        assert run.flops_train_planned == pytest.approx(
            count(model, 256, model.compression_target).training_per_token * run.tokens
        )


def test_the_baseline_has_each_dense_model_once():
    made = planned(
        axes={
            "grid": {"size": [3e5, 5e5], "compression_ratio": [2, 4], "optim.lr_concept": [1e-3, 2e-3], "seed": [0, 1]}
        },
        baseline={"match": "parameters"},
    )
    dense = [run for run in made.runs if run.config.model.is_dense]
    assert len(made) - len(dense) == 16
    assert len(dense) == 4
    for run in dense:
        assert abs(run.params.non_embedding / run.design["size"] - 1) <= 0.01
        assert run.config.optim.lr_concept == run.config.optim.lr_token
        assert run.compression_target == 1


def test_the_baseline_may_have_its_own_sizes_seeds_and_fields():
    made = planned(baseline={"sizes": [2e5, 6e5], "seeds": [5, 6], "set": {"optim.lr_token": 1e-3}})
    dense = [run for run in made.runs if run.config.model.is_dense]
    assert {(run.design["size"], run.config.seed) for run in dense} == {(s, r) for s in (2e5, 6e5) for r in (5, 6)}
    assert {run.config.optim.lr_token for run in dense} == {1e-3}


def test_a_baseline_matched_by_flops_costs_as_much_per_token():
    made = planned(base={**BASE, "size": 5e6}, baseline={"match": "flops"})
    dlcm, dense = made.runs
    assert dense.flops.training_per_token == pytest.approx(dlcm.flops.training_per_token, rel=0.04)
    assert dense.params.non_embedding < dlcm.params.non_embedding


def test_equal_points_are_one_run():
    assert len(planned(axes={"list": [{"seed": 0}, {"seed": 0}, {"seed": 1}]})) == 2


def test_all_shapes_share_one_mup_base():
    made = planned(axes={"grid": {"size": [3e5, 5e6]}}, baseline={})
    assert {run.config.model.d_token_base for run in made.runs} == {64}
    assert {run.config.model.d_concept_base for run in made.runs if not run.config.model.is_dense} == {64}
    (run,) = planned(base={**BASE, "model": {"d_token_base": 48, "d_concept_base": 80}}).runs
    assert (run.config.model.d_token_base, run.config.model.d_concept_base) == (48, 80)


def test_the_vocabulary_follows_the_tokenizer():
    (run,) = planned(base={**BASE, "data": {"tokenizer": "bpe-1000"}}).runs
    assert run.config.model.vocab_size == 1000


def test_a_model_may_be_given_by_its_widths():
    widths = {"d_token": 64, "n_encoder_layers": 4, "n_heads_token": 4, "d_head": 16, "d_ff_token": 176}
    (run,) = planned(base={"model": {"kind": "dense", **widths}}).runs
    assert run.config.model.d_token == 64
    made = planned(base={"model": {"kind": "dense", **widths}, "train": {"tokens": "100k"}}, budgets=None)
    assert (made.runs[0].tokens, made.runs[0].budget) == (98_304, "")


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"base": {**BASE, "compression_ratio": 1}}, "R must be above 1"),
        ({"axes": {"grid": {"compression_ratio": [4, 0.5]}}}, "R must be above 1"),
        ({"base": {**BASE, "compression_ratio": "many"}}, "compression_ratio = 'many' is not a number"),
        ({"base": {**BASE, "size": 3000}}, "no integer shape within tolerance"),
        ({"base": {**BASE, "size": -1}}, "must be a positive number"),
        ({"base": {**BASE, "concept_share": 1.5}}, "strictly between 0 and 1"),
        ({"base": {"size": 4e5}}, "needs concept_share"),
        ({"base": {"concept_share": 0.5}}, "concept_share needs size"),
        ({"base": {**BASE, "model": {"d_token": 64}}}, "size decides the shape, so model.d_token cannot be given too"),
        ({"budgets": {"tokens": [2000]}}, "less than one step of train.batch_tokens = 2,048"),
        ({"budgets": {"flops": [1e6]}}, "less than one step"),
        ({"budgets": None}, "no length of the runs"),
        ({"base": {**BASE, "train": {"tokens": 10_000}}}, "both budgets and train.tokens"),
        ({"base": {**BASE, "model": {"kind": "dense"}}}, "a dense model takes no concept_share"),
        ({"base": {**BASE, "boundary": "learnt"}}, "got 'learnt'"),
        ({"base": {**BASE, "optim": {"lr_token": "fast"}}}, "optim.lr_token"),
        ({"base": {**BASE, "data": {"seq_len": 300}}}, "not a multiple of data.seq_len = 300"),
        ({"base": {**BASE, "data": {"tokenizer": "hub:x/y"}}}, "give model.vocab_size"),
        ({"base": {}}, "missing key 'model.d_token'"),
        ({"base": {}, "baseline": {}}, "no size to match"),
    ],
)
def test_an_impossible_plan_is_refused_and_names_the_way_out(blocks, words):
    assert words in refused(**blocks)


def test_a_refusal_names_the_run():
    message = refused(axes={"grid": {"size": [4e5, 4e6]}}, budgets={"flops": [2e10]})
    assert "run [size=4e+06" in message
    assert message.startswith("sweep 's'")


def test_the_frame_has_the_columns_of_the_results_table(tmp_path):
    made = planned(baseline={})
    frame = made.to_frame()
    columns = {
        *("run_id", "sweep", "model", "boundary", "seed", "params_total", "params_embedding", "params_token"),
        *("params_concept", "concept_share", "compression_target", "tokens", "seq_len", "flops_train_planned"),
        *("flops_per_token_forward", "lr_token", "lr_concept", "budget", "budget_share"),
    }
    assert columns <= set(frame.columns)
    dense = frame[frame["model"] == "dense"].iloc[0]
    assert (dense["boundary"], dense["concept_share"], dense["compression_target"], dense["params_concept"]) == (
        "none",
        0,
        1,
        0,
    )
    made.save(tmp_path / "plan.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "plan.parquet"), frame)


def test_table_csv_and_json_tell_the_same_runs():
    made = planned(axes={"grid": {"seed": [0, 1, 2]}}, baseline={})
    ids = [run.run_id for run in made.runs]
    assert [line.split(",")[0] for line in format_csv(made).splitlines()[1:]] == ids
    assert [run["run_id"] for run in json.loads(json.dumps(plan_json(made)))["runs"]] == ids
    table = format_plan(made, limit=2)
    assert ids[1] in table
    assert ids[2] not in table
    assert "and 4 more" in table


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1234567, "1.23M"), (999_950, "1M"), (2e11, "200B")])
def test_short_counts(number, text):
    assert short_count(number) == text


@pytest.mark.slow
def test_planning_loads_no_torch():
    code = (
        "import sys; from sweeps import Sweep, plan\n"
        f"assert len(plan(Sweep.from_yaml({str(RECIPES[0])!r}))) > 1\n"
        "print([m for m in ('torch', 'scipy', 'matplotlib', 'submitit', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("boundary", ["learned", "cosine", "fixed", "random", "delimiter_word", "delimiter_sentence"]),
        ("model.boundary.straight_through", [False, True]),
        ("model.boundary.control", ["none", "bias"]),
        ("model.boundary.decision", ["sample", "threshold"]),
        ("model.pooling", ["mean", "first"]),
        ("model.smoothing", ["none", "causal"]),
        ("model.concept_bias", ["none", "log_length"]),
        ("model.cross_attention", ["every_layer", "once"]),
        ("model.attention_backend", ["reference", "sdpa", "replicated", "flex", "staircase"]),
    ],
)
def test_every_choice_of_the_model_can_be_an_axis(axis, values):
    sweep = Sweep.from_dict(
        {
            "name": "choices",
            "axes": {"grid": {"size": [3e5], "concept_share": [0.5], axis: values}},
            "budgets": {"tokens": [1e6]},
        }
    )
    runs = plan(sweep).runs
    path = {"boundary": "model.boundary.detector"}.get(axis, axis).split(".")
    found = []
    for run in runs:
        value = run.config
        for name in path:
            value = getattr(value, name)
        found.append(value)
    assert found == values
    assert len({run.run_id for run in runs}) == len(values)
