import math

import pytest

from dlcm.config import OptimConfig, RunConfig
from dlcm.model import build_model
from dlcm.optim import lr_factor, parameter_groups
from tests.dlcm.conftest import dense_config, small_config


def run_config(n_steps: int, **optim) -> RunConfig:
    train = {"tokens": n_steps * 512, "batch_tokens": 512}
    return RunConfig(model=dense_config(), data={"seq_len": 256}, optim=optim, train=train)


@pytest.mark.parametrize("config", [small_config(), small_config(tie_embeddings=True, pooling="first"), dense_config()])
def test_groups_cover_every_parameter_exactly_once(config):
    model = build_model(config)
    grouped = [p for group in parameter_groups(model, OptimConfig()) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert sum(p.numel() for p in grouped) == sum(p.numel() for p in model.parameters())


def test_each_matrix_is_scaled_by_its_own_fan_in():
    config = small_config(d_token=32, d_concept=96, d_token_base=16, d_concept_base=24)
    model = build_model(config)
    optim = OptimConfig(lr_token=1e-2, lr_concept=2e-2, weight_decay=0.1, eps=1e-8)
    where = {id(p): group for group in parameter_groups(model, optim) for p in group["params"]}

    def seen(parameter):
        group = where[id(parameter)]
        return group["lr"], group["weight_decay"], group["eps"]

    token, concept = (1e-2 / 2, 0.1 * 2, 1e-8 / 2), (2e-2 / 4, 0.1 * 4, 1e-8 / 4)
    cross = model.decoder[0].cross
    for module in (
        model.encoder[0].attention.w_q,
        model.decoder[1].block.ff.w_down,
        cross.w_q,
        cross.w_o,
        model.concepts.w_up,
    ):
        assert seen(module.weight) == pytest.approx(token)
    assert seen(model.boundary.w_q.weight) == pytest.approx(token)
    for module in (model.concepts.blocks[0].attention.w_v, model.concepts.blocks[1].ff.w_gate, cross.w_k, cross.w_v):
        assert seen(module.weight) == pytest.approx(concept)
    assert seen(model.embedding.weight) == pytest.approx((1e-2, 0.1, 1e-8))
    assert seen(model.unembedding.weight) == pytest.approx((1e-2, 0.1, 1e-8))
    assert seen(model.norm.weight) == pytest.approx((1e-2, 0.0, 1e-8))
    assert seen(model.concepts.smoother_4C) == pytest.approx((2e-2, 0.0, 1e-8))


def test_initial_variance_falls_with_the_fan_in_width():
    wide = build_model(small_config(d_token=256, d_concept=384, d_token_base=16, d_concept_base=24))
    assert wide.encoder[0].ff.w_gate.weight.std().item() == pytest.approx(256**-0.5, rel=0.03)
    assert wide.concepts.blocks[0].ff.w_gate.weight.std().item() == pytest.approx(384**-0.5, rel=0.03)
    assert wide.decoder[0].cross.w_v.weight.std().item() == pytest.approx(384**-0.5, rel=0.05)
    assert wide.embedding.weight.std().item() == pytest.approx(16**-0.5, rel=0.03)


def test_the_schedule_warms_up_holds_and_decays():
    config = run_config(100, schedule="wsd", warmup_share=0.1, decay_share=0.2, final_lr_ratio=0.1)
    factors = [lr_factor(config, s) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert set(factors[10:80]) == {1.0}
    assert factors[80] == 1.0
    assert factors[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[99] == pytest.approx(0.1 + 0.9 * 0.05)
    assert all(b <= a for a, b in zip(factors[80:], factors[81:]))


def test_the_cosine_schedule_halves_in_the_middle():
    config = run_config(100, schedule="cosine", warmup_share=0.0, final_lr_ratio=0.0)
    assert lr_factor(config, 0) == pytest.approx(1.0)
    assert lr_factor(config, 50) == pytest.approx(0.5)
    assert lr_factor(config, 99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_a_run_of_one_step_has_a_positive_learning_rate(schedule):
    assert lr_factor(run_config(1, schedule=schedule), 0) > 0
