"""The coordinate check: with our grouping activations keep their scale over eight times the width, and only with ours."""

import math

import pytest
import torch

from dlcm.config import OptimConfig
from dlcm.coordinates import AXES, TrainingBatch, check_coordinates, parametrised, widen
from dlcm.model import build_model
from dlcm.optim import parameter_groups
from tests.dlcm.conftest import VOCAB, dense_config, small_config

D_TOKEN, D_CONCEPT = 48, 64


def base_config(**overrides):
    shape = {"d_token": D_TOKEN, "d_concept": D_CONCEPT, "d_ff_token": 2 * D_TOKEN, "d_ff_concept": 2 * D_CONCEPT}
    heads = {"d_head": 16, "n_heads_token": 3, "n_kv_heads_token": 3, "n_heads_concept": 4, "n_kv_heads_concept": 4}
    layers = {"n_encoder_layers": 1, "n_concept_layers": 2, "n_decoder_layers": 1}
    return small_config(**{**shape, **heads, **layers, **overrides})


def chain_batch(n: int = 256) -> TrainingBatch:
    """Text in which each token has three followers, in three documents."""
    g = torch.Generator().manual_seed(0)
    followers, tokens = torch.randint(0, VOCAB, (VOCAB, 3), generator=g), [0]
    for choice in torch.randint(0, 3, (n,), generator=g).tolist():
        tokens.append(int(followers[tokens[-1], choice]))
    stream = torch.tensor(tokens)
    return TrainingBatch(stream[:-1], stream[1:], torch.tensor([0, n // 4, n // 2, n]))


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_no_activation_grows_or_shrinks_twofold_over_eight_times_the_width(axis):
    check = check_coordinates(base_config(), chain_batch(), axis=axis, factors=(1, 8), n_steps=10)
    expected = {"encoder.0", "boundary.q", "boundary.k", "pooled", "backbone.0", "backbone.1", "concepts"}
    expected |= {"cross.0.k", "cross.0.v", "cross.0.out", "decoder.0", "logits"}
    assert set(check.scales) == expected
    assert check.n_steps == 10
    assert {name: x for name, x in check.growth().items() if x > 2.0} == {}
    assert {name: x for name, x in check.shrinkage().items() if x < 0.5} == {}
    # The model did learn in these steps: scales that stand still because nothing moves would prove nothing.
    assert all(row[-1] < row[0] - 0.2 for row in check.losses)


@pytest.mark.slow
def test_grouping_by_module_lets_cross_keys_and_values_grow_with_the_concept_width():
    """The paper scales K and V of the cross-attention by the token width (eqs 19, 20), though they read concepts."""
    ours, paper = (
        check_coordinates(base_config(), chain_batch(), axis="concept", grouping=grouping, factors=(1, 8))
        for grouping in ("matrix", "module")
    )
    for name in ("cross.0.k", "cross.0.v"):
        assert ours.growth()[name] < 2.0
        # Variance alone, with the initial weights left where they are, gives the square root of 8.
        assert paper.growth(step=0)[name] == pytest.approx(math.sqrt(8), rel=0.25)
        assert paper.growth()[name] > 1.3 * ours.growth()[name]
    assert paper.growth()["cross.0.v"] > 3.0


@pytest.mark.slow
def test_without_mup_the_activations_of_a_wide_model_run_away():
    check = check_coordinates(base_config(), chain_batch(), axis="token", grouping="standard", factors=(1, 8))
    assert check.growth()["encoder.0"] > 2.0
    assert check.growth()["logits"] > 2.0


def test_the_groupings_differ_in_cross_keys_and_values_alone():
    config = widen(base_config(), 4, "concept")
    ours, paper = parametrised(config, "matrix"), parametrised(config, "module")
    cross = [f"decoder.0.cross.{name}.weight" for name in ("w_k", "w_v")]
    rates = []
    for model in (ours, paper):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, OptimConfig())
        rates.append({names[id(p)]: group["lr"] for group in groups for p in group["params"]})
    changed = [name for name in rates[0] if rates[0][name] != rates[1][name]]
    assert sorted(changed) == sorted(cross)
    assert all(rates[1][name] == 4 * rates[0][name] for name in cross)
    for (name, a), b in zip(ours.named_parameters(), paper.parameters()):
        assert torch.equal(2 * a if name in cross else a, b), name


def test_without_mup_the_weights_start_alike_and_nothing_is_scaled():
    config = widen(base_config(), 4, "both")
    model, ours = parametrised(config, "standard"), build_model(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))
    assert {group["lr"] for group in parameter_groups(model, OptimConfig())} == {OptimConfig().lr_token}
    assert model.config.mup_scale_token == 1.0


def test_at_the_base_width_all_parametrisations_are_one():
    checks = [
        check_coordinates(base_config(), chain_batch(96), axis="token", grouping=grouping, factors=(1,), n_steps=2)
        for grouping in ("matrix", "module", "standard")
    ]
    assert checks[0].scales == checks[1].scales == checks[2].scales
    assert set(checks[0].growth().values()) == {1.0}


def test_values_are_measured_on_the_concepts_not_on_the_null_concept():
    config, batch = base_config(), chain_batch(96)
    check = check_coordinates(config, batch, axis="token", factors=(1,), n_steps=0)
    model, seen = build_model(config), {}
    model.decoder[0].cross.register_forward_pre_hook(lambda module, args: seen.update(concepts=args[2].z_KC))
    draws_matter_not = torch.arange(96) % 3 == 0
    model(batch.tokens_T, boundaries=draws_matter_not)
    null = model.decoder[0].cross.w_v(model.concepts.null_1C)
    values = model.decoder[0].cross.w_v(seen["concepts"])
    measured = check.scales["cross.0.v"][0][0]
    assert abs(measured - _rms(values)) < abs(measured - _rms(null))
    assert measured == pytest.approx(_rms(values), rel=0.1)


def _rms(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def test_a_dense_model_is_checked_along_its_one_width():
    base = dense_config(d_token=32, n_heads_token=4, n_kv_heads_token=2)
    check = check_coordinates(base, chain_batch(96), axis="token", factors=(1, 2), n_steps=1)
    assert set(check.scales) == {"encoder.0", "encoder.1", "logits"}
    with pytest.raises(ValueError, match="token width alone"):
        check_coordinates(base, chain_batch(96), axis="both")


def test_a_check_that_does_not_start_at_the_base_width_is_refused():
    with pytest.raises(ValueError, match="must start at 1"):
        check_coordinates(base_config(), chain_batch(96), axis="token", factors=(2, 4))
    with pytest.raises(ValueError, match="at its muP base widths"):
        check_coordinates(base_config(d_token_base=32), chain_batch(96), axis="token")
