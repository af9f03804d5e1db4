"""Sizes and shares become architectures within tolerance, and the smooth cost follows the integer shapes."""

import numpy as np
import pytest

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import count, parameters
from sweeps.shapes import Parts, ShapeRule, cost_function, dense_shape, dlcm_shape, size_at_cost, split_layers

SIZES = [0.1e6, 0.2e6, 0.3e6, 0.4e6, 0.5e6, 0.75e6, 1e6, 2e6, 5e6, 20e6, 87e6, 274e6, 468e6, 833e6, 3e9]


def built(shape: dict, kind: str = "dlcm", **more) -> ModelConfig:
    return ModelConfig(kind=kind, **{"vocab_size": 4096, **shape, **more})


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("size", SIZES)
def test_realised_size_and_share_are_within_tolerance(size, share):
    params = parameters(built(dlcm_shape(size, share)))
    assert abs(params.non_embedding / size - 1) <= 0.01
    assert abs(params.concept_share - share) <= 0.01


@pytest.mark.parametrize("size", SIZES)
def test_dense_size_is_within_tolerance(size):
    assert abs(parameters(built(dense_shape(size), "dense")).non_embedding / size - 1) <= 0.01


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"cross_attention": "once"}, Parts(cross_everywhere=False)),
        ({"pooling": "first", "smoothing": "none"}, Parts(with_null=False, smoothed=False)),
        ({"boundary": {"detector": "fixed"}}, Parts(detector="fixed")),
        ({}, Parts(d_head=32)),
    ],
)
def test_other_model_choices_enter_the_solution(more, parts):
    assert Parts.of({**more, **({"d_head": parts.d_head} if parts.d_head else {})}) == parts
    params = parameters(built(dlcm_shape(0.4e6, 0.5, parts=parts), **more))
    assert abs(params.non_embedding / 0.4e6 - 1) <= 0.01
    assert abs(params.concept_share - 0.5) <= 0.01


def test_grouped_heads_divide():
    shape = dlcm_shape(274e6, 0.5, ShapeRule(heads_per_kv=2))
    assert shape["n_heads_token"] == 2 * shape["n_kv_heads_token"]
    assert shape["n_heads_concept"] == 2 * shape["n_kv_heads_concept"]


def test_the_paper_split_follows_from_the_rule():
    assert split_layers(12 * 32 * 1536**2, ShapeRule()) == (10, 16, 6)


def test_fixed_layers_hold_for_every_size():
    rule = ShapeRule(layers=(2, 4, 2))
    for size in (0.5e6, 2e6, 8e6):
        shape = dlcm_shape(size, 0.5, rule)
        assert (shape["n_encoder_layers"], shape["n_concept_layers"], shape["n_decoder_layers"]) == (2, 4, 2)
        assert dense_shape(size, rule)["n_encoder_layers"] == 8


def test_the_solver_is_deterministic():
    first = dict(dlcm_shape(0.37e6, 0.45))
    dlcm_shape.cache_clear()
    assert dlcm_shape(0.37e6, 0.45) == first


@pytest.mark.parametrize(("size", "share"), [(2_000, 0.5), (300_000, 0.995)])
def test_an_impossible_shape_names_the_nearest(size, share):
    with pytest.raises(UserError, match=r"nearest is size [\d,]+, concept_share 0\.\d+"):
        dlcm_shape(size, share)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.2, -0.1])
def test_a_share_outside_the_open_interval_is_refused(share):
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        dlcm_shape(1e6, share)


# With a vocabulary far wider than the model, the logits are the cost, and the rounding of d to a multiple of 8 shows.
@pytest.mark.parametrize(("vocab", "seq_len", "least"), [(4096, 256, 0.3e6), (257, 512, 0.3e6), (32_000, 2048, 1e6)])
def test_smooth_cost_agrees_with_the_integer_shapes(vocab, seq_len, least):
    cost = cost_function(vocab_size=vocab, seq_len=seq_len)
    errors = []
    for size in (n for n in (0.3e6, 0.5e6, 1e6, 2e6, 5e6, 30e6, 274e6) if n >= least):
        for share in (0.3, 0.5, 0.7):
            model = built(dlcm_shape(size, share), vocab_size=vocab)
            params = parameters(model)
            for ratio in (2.0, 4.0, 8.0):
                exact = count(model, seq_len, ratio).training_per_token
                errors.append(cost(params.non_embedding, 1.0, ratio, params.concept_share) / exact - 1)
        dense = built(dense_shape(size), "dense", vocab_size=vocab)
        errors.append(
            cost(parameters(dense).non_embedding, 1.0, 1.0, 0.0) / count(dense, seq_len).training_per_token - 1
        )
    assert np.max(np.abs(errors)) < 0.06
    assert np.median(np.abs(errors)) < 0.015


def test_smooth_cost_takes_arrays_and_mixes_families():
    cost = cost_function(vocab_size=4096, seq_len=256)
    N, R, P = np.array([1e6, 2e6, 1e6]), np.array([4.0, 2.0, 1.0]), np.array([0.5, 0.3, 0.0])
    together = cost(N, 1e8, R, P)
    assert together.shape == (3,)
    assert together == pytest.approx([cost(*point) for point in zip(N, [1e8] * 3, R, P)])
    assert isinstance(cost(1e6, 1e8, 4.0, 0.5), float)


def test_smooth_cost_is_continuous_and_monotone():
    cost = cost_function(vocab_size=4096, seq_len=256)
    sizes = np.geomspace(1e5, 1e9, 400)
    curve = cost(sizes, 1.0, 4.0, 0.5)
    assert np.all(np.diff(curve) > 0)
    assert np.max(np.diff(np.log(curve))) < 2 * np.diff(np.log(sizes))[0]
    assert np.all(np.diff(cost(1e6, 1.0, np.linspace(1.5, 16, 50), 0.5)) < 0)
    assert cost(1e6, 2e8, 4.0, 0.5) == pytest.approx(2 * cost(1e6, 1e8, 4.0, 0.5))


def test_size_at_cost_inverts_the_dense_cost():
    cost = cost_function(vocab_size=4096, seq_len=256)
    for size in (3e5, 7e7):
        found = size_at_cost(cost(size, 1.0, 1.0, 0.0), vocab_size=4096, seq_len=256)
        assert found == pytest.approx(size, rel=1e-4)


def test_no_model_means_infinite_cost():
    cost = cost_function(vocab_size=4096, seq_len=256)
    assert np.isinf(cost(1e5, 1.0, 4.0, 0.999))
    assert np.isinf(cost(1e5, 1.0, 4.0, 1e-4))
