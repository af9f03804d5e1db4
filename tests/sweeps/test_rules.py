"""How many tokens a step takes, how short a run may be, and the learning rates that follow from the widths."""

import pytest

from dlcm.config import OptimConfig
from dlcm.errors import UserError
from sweeps import Sweep, plan
from sweeps.rules import BatchRule, Minimum

BASE = {"size": 4e5, "concept_share": 0.5, "compression_ratio": 4, "data": {"seq_len": 256}}


def planned(**blocks):
    return plan(Sweep.from_dict({"name": "s", "base": BASE, "budgets": {"tokens": [1_000_000]}, **blocks}))


def refused(**blocks) -> str:
    with pytest.raises(UserError) as error:
        planned(**blocks)
    assert "\n" not in str(error.value)
    return str(error.value)


# The published laws by hand: 0.58 * 1e9^0.571 = 0.58 * 10^5.139 = 79,877 and 0.2920 * 1e19^0.3271 = 0.2920 * 10^6.2149 = 478,951.
@pytest.mark.parametrize(
    ("rule", "x", "tokens"),
    [
        ({}, 1e9, 79_877),
        ({"of": "flops"}, 1e19, 478_951),
        ({"coefficient": 2.0, "exponent": 0.5}, 1e6, 2_000),
    ],
)
def test_the_power_law_is_the_published_one_or_that_given(rule, x, tokens):
    assert BatchRule(rule="power", **rule).batch_tokens(x, 1) == pytest.approx(tokens, rel=1e-3)


def test_a_batch_is_a_whole_number_of_micro_batches_the_nearest_and_at_least_one():
    rule = BatchRule(rule="power", coefficient=1.0, exponent=0.5)
    assert [rule.batch_tokens(x**2, 256) for x in (1, 300, 383, 385, 1000)] == [256, 256, 256, 512, 1024]


def test_runs_of_one_length_have_one_batch_under_the_law_in_tokens():
    made = planned(
        base={**BASE, "train": {"micro_batch_tokens": 512}},
        axes={"grid": {"size": [4e5, 8e5], "compression_ratio": [2, 8]}},
        budgets={"tokens": [1_000_000, 4_000_000]},
        batch={"rule": "power", "coefficient": 1.0, "exponent": 0.5},
    )
    assert {(run.budget, run.config.train.batch_tokens) for run in made.runs} == {
        ("1e+06 tokens", 1024),
        ("4e+06 tokens", 2048),
    }
    for run in made.runs:
        assert run.tokens % run.config.train.batch_tokens == 0
        assert run.config.train.micro_batch_tokens == 512


def test_the_law_in_flops_leaves_out_the_head():
    law = {"rule": "power", "of": "flops", "coefficient": 1e-3, "exponent": 0.5}
    (run,) = planned(budgets={"flops": [1e13]}, batch=law).runs
    without_head = 1e13 * (1 - run.flops.share("head"))
    assert run.config.train.batch_tokens == round(1e-3 * without_head**0.5 / 256) * 256


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"batch": {"rule": "fixed", "of": "tokens"}}, "batch.of has no meaning with rule: fixed"),
        ({"batch": {"rule": "power", "exponent": 0.5}}, "takes coefficient and exponent together"),
        ({"batch": {"rule": "powr"}}, "batch.rule"),
        (
            {"batch": {"rule": "power"}, "base": {**BASE, "train": {"batch_tokens": 512}}},
            "both batch (rule: power) and train.batch_tokens set the batch; keep one",
        ),
        (
            {"batch": {"rule": "power"}, "axes": {"grid": {"train.batch_tokens": [512]}}},
            "both batch (rule: power) and train.batch_tokens",
        ),
        (
            {"batch": {"rule": "power", "coefficient": 1e9, "exponent": 0.5}},
            "tokens, the batch by its rule; raise the budget",
        ),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused_with_the_way_out(blocks, words):
    assert words in refused(**blocks)


@pytest.mark.parametrize(
    ("optim", "least"),
    [
        ({"schedule": "cosine", "warmup_share": 0.05}, 20),
        ({"schedule": "cosine", "warmup_share": 0.01}, 100),
        ({"schedule": "cosine", "warmup_share": 0.0}, 10),  # the last tenth, over which R is averaged
        ({"schedule": "wsd", "warmup_share": 0.1, "decay_share": 0.02}, 50),
        ({"schedule": "cosine", "warmup_share": 0.1, "decay_share": 0.02}, 10),  # a cosine has no decay of its own
    ],
)
def test_a_run_needs_a_whole_step_of_each_part_of_its_schedule(optim, least):
    assert Minimum().steps_of(OptimConfig(**optim)) == least
    assert Minimum(steps=7).steps_of(OptimConfig(**optim)) == 7


def test_runs_below_the_minimum_are_refused_by_name_with_the_reason_and_their_number():
    told = refused(
        axes={"grid": {"seed": [0, 1]}},
        base={**BASE, "train": {"batch_tokens": 1024}},
        budgets={"tokens": [10_240, 1_024_000]},
        minimum={"steps": 11},
    )
    assert "run [" in told
    assert "seed=0" in told
    assert "10240 tokens: 10 steps are fewer than minimum.steps = 11" in told
    assert "set minimum.steps lower (0 allows all)" in told
    assert "2 of 4 runs are too short" in told


def test_the_default_minimum_is_that_of_the_schedule():
    short = {"base": {**BASE, "train": {"batch_tokens": 1024}}, "budgets": {"tokens": [10_240]}}
    assert "10 steps are fewer than the 20 that its schedule needs" in refused(**short)
    assert len(planned(**short, minimum={"steps": 0})) == 1
    assert len(planned(**short, minimum={"steps": 10})) == 1


def test_too_few_tokens_for_the_parameters_are_refused_and_rounding_is_forgiven():
    blocks = {"base": {**BASE, "train": {"batch_tokens": 1024}}, "budgets": {"tokens_per_parameter": [2]}}
    # The tokens are rounded down to whole steps, so they are a little below 2 a parameter.
    (run,) = planned(**blocks, minimum={"tokens_per_parameter": 2}).runs
    assert run.tokens < 2 * run.params.non_embedding
    told = refused(**blocks, minimum={"tokens_per_parameter": 2.1})
    assert "tokens per parameter are fewer than minimum.tokens_per_parameter = 2.1" in told
    assert "lower the size" in told


def test_effective_learning_rates_are_those_of_the_paper_at_the_width():
    # eq 19 and 20: eta / (d / d_base), for matrices of each side by its own width.
    base = {
        **BASE,
        "optim": {"lr_token": 1e-2, "lr_concept": 2e-2},
        "model": {"d_token_base": 32, "d_concept_base": 64},
    }
    dlcm, dense = planned(base=base, baseline={}).runs
    model = dlcm.config.model
    assert dlcm.lr_token_effective == pytest.approx(1e-2 * 32 / model.d_token)
    assert dlcm.lr_concept_effective == pytest.approx(2e-2 * 64 / model.d_concept)
    assert dense.lr_token_effective == pytest.approx(1e-2 * 32 / dense.config.model.d_token)
    assert dense.lr_concept_effective == dense.lr_token_effective
    frame = plan(Sweep.from_dict({"name": "s", "base": base, "budgets": {"tokens": [1e6]}})).to_frame()
    assert frame.lr_token_effective[0] == dlcm.lr_token_effective


def test_a_baseline_of_equal_cost_that_no_shape_has_names_its_run():
    base = {**BASE, "concept_share": 0.7, "model": {"vocab_size": 32_768}, "data": {"seq_len": 4096}}
    told = refused(base={**base, "train": {"batch_tokens": 4096}}, baseline={"match": "flops"})
    assert "run [" in told
    assert "baseline: no dense shape costs" in told
