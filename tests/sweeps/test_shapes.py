"""Sizes and shares become architectures within tolerance, and the smooth cost follows the integer shapes."""

import re

import numpy as np
import pytest

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import count, parameters
from sweeps.shapes import Parts, ShapeRule, dense_shape, dlcm_shape, split_layers
from sweeps.smooth_cost import cost_function, size_at_cost

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


DECADES = [3e5, 1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10]
SHARES = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
# Largest |N error| and |P error| of each row of the grid, in percent and in points: a change that worsens one is seen here.
LARGEST_ERRORS = {1: (0.5, 0.0097), 2: (0.7, 0.0062), 4: (0.8, 0.0085)}


@pytest.mark.parametrize("heads_per_kv", LARGEST_ERRORS)
def test_from_a_third_of_a_million_to_ten_billion_every_shape_is_within_tolerance(heads_per_kv):
    rule, table = ShapeRule(heads_per_kv=heads_per_kv), {}
    for size in DECADES:
        for share in SHARES:
            params = parameters(built(dlcm_shape(size, share, rule)))
            table[size, share] = (abs(params.non_embedding / size - 1), abs(params.concept_share - share))
    lines = [
        f"{size:8.1e} " + "  ".join(f"{100 * table[size, p][0]:.2f}% {table[size, p][1]:.4f}" for p in SHARES)
        for size in DECADES
    ]
    print("\n".join(lines))  # shown where a bound breaks
    n_error, p_error = (max(errors[i] for errors in table.values()) for i in (0, 1))
    assert n_error <= LARGEST_ERRORS[heads_per_kv][0] / 100 <= 0.01
    assert p_error <= LARGEST_ERRORS[heads_per_kv][1] <= 0.01


@pytest.mark.parametrize("size", [1e6, 1e7, 1e8, 1e9, 1e10])
@pytest.mark.parametrize(("ratio", "seq_len"), [(1.1, 256), (1.5, 1024), (2.0, 4096), (4.0, 4096), (8.0, 4096)])
def test_at_fixed_size_and_above_one_token_a_concept_flops_fall_in_the_share(size, ratio, seq_len):
    configs = [built(dlcm_shape(size, share)) for share in SHARES]
    # Over the realised size, which is off by up to a percent from one share to the next.
    costs = [count(c, seq_len, ratio).forward_per_token / parameters(c).non_embedding for c in configs]
    assert all(cheaper < dearer for dearer, cheaper in zip(costs, costs[1:]))


def depth_of(shape: dict) -> int:
    return sum(shape.get(f"n_{part}_layers", 0) for part in ("encoder", "concept", "decoder"))


@pytest.mark.many
@pytest.mark.parametrize("share", SHARES)
def test_a_bigger_size_is_never_shallower_and_at_equal_depth_never_narrower(share):
    ladder = [dlcm_shape(float(f"{size:.5g}"), share) for size in np.geomspace(3e5, 1e10, 200)]
    for smaller, bigger in zip(ladder, ladder[1:]):
        assert depth_of(bigger) >= depth_of(smaller)
        if depth_of(bigger) == depth_of(smaller):
            assert bigger["d_token"] >= smaller["d_token"]
            assert bigger["d_concept"] >= smaller["d_concept"]


def test_a_bigger_dense_size_is_never_shallower_and_at_equal_depth_at_most_one_step_narrower():
    # A dense width between two numbers of heads takes the larger one, and d_ff gives way: one step of width at the most.
    ladder = [dense_shape(float(f"{size:.5g}")) for size in np.geomspace(3e5, 1e10, 200)]
    for smaller, bigger in zip(ladder, ladder[1:]):
        assert depth_of(bigger) >= depth_of(smaller)
        step = smaller["d_head"] // 2
        assert bigger["d_token"] >= smaller["d_token"] - step or depth_of(bigger) > depth_of(smaller)


@pytest.mark.parametrize("multiple", [64, 128])
def test_widths_are_multiples_of_what_the_rule_says(multiple):
    rule = ShapeRule(multiple_of=multiple, d_head=64)
    for size in (3e8, 1e9, 1e10):
        shape = dlcm_shape(size, 0.5, rule)
        assert all(shape[name] % multiple == 0 for name in ("d_token", "d_concept", "d_ff_token", "d_ff_concept"))
        assert shape["d_head"] == 64
        params = parameters(built(shape))
        assert abs(params.non_embedding / size - 1) <= 0.01
        assert abs(params.concept_share - 0.5) <= 0.01
        assert dense_shape(size, rule)["d_token"] % multiple == 0


def test_multiples_that_are_too_coarse_are_refused_with_a_way_out():
    with pytest.raises(UserError, match="loosen shape.tolerance_size"):
        dlcm_shape(1e6, 0.5, ShapeRule(multiple_of=128))


def test_a_head_width_of_the_model_comes_before_that_of_the_rule():
    assert dlcm_shape(1e7, 0.5, ShapeRule(d_head=64), Parts(d_head=32))["d_head"] == 32
    assert dlcm_shape(1e7, 0.5, ShapeRule(d_head=64))["d_head"] == 64
    assert dense_shape(1e7, ShapeRule(d_head=64))["d_head"] == 64


@pytest.mark.parametrize(("size", "share"), [(4_000, 0.5), (20_000, 0.9), (300_000, 0.99)])
def test_the_nearest_shape_that_a_refusal_names_can_be_asked_for(size, share):
    with pytest.raises(UserError) as refused:
        dlcm_shape(size, share)
    near_size, near_share = re.search(r"nearest is size ([\d,]+), concept_share (0\.\d+)", str(refused.value)).groups()
    params = parameters(built(dlcm_shape(float(near_size.replace(",", "")), float(near_share))))
    assert abs(params.non_embedding / float(near_size.replace(",", "")) - 1) <= 0.01
    assert abs(params.concept_share - float(near_share)) <= 0.01


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


@pytest.mark.many
@pytest.mark.parametrize(
    ("vocab", "seq_len", "least"), [(1024, 256, 3e5), (4096, 256, 3e5), (32768, 1024, 1e7), (128_815, 4096, 1e8)]
)
def test_a_dense_model_of_equal_cost_is_found_among_the_integer_shapes(vocab, seq_len, least):
    for size in (s for s in (3e5, 1e6, 3e6, 1e7, 1e8, 1e9, 1e10) if s >= least):
        for share, ratio in ((0.2, 2.0), (0.5, 4.0), (0.8, 8.0)):
            boundary = {"compression_ratio": ratio}
            target = count(
                built(dlcm_shape(size, share), vocab_size=vocab, boundary=boundary), seq_len
            ).training_per_token
            found = size_at_cost(target, vocab_size=vocab, seq_len=seq_len)
            dense = count(built(dense_shape(found), "dense", vocab_size=vocab), seq_len).training_per_token
            assert dense == pytest.approx(target, rel=0.02), (size, share, ratio)


def test_a_cost_that_no_dense_shape_has_is_refused():
    # With a vocabulary of 128,815 a model of this cost is nearly all head, in steps of its width.
    with pytest.raises(UserError, match="is 6% off: the head of so small a model outweighs the rest; raise the size"):
        size_at_cost(4e7, vocab_size=128_815, seq_len=4096)


def test_no_model_means_infinite_cost():
    cost = cost_function(vocab_size=4096, seq_len=256)
    assert np.isinf(cost(1e5, 1.0, 4.0, 0.999))
    assert np.isinf(cost(1e5, 1.0, 4.0, 1e-4))
    assert np.isinf(cost(np.array([10.0, 45.0]), 1.0, 1.0, 0.0)).all()
