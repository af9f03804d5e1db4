"""Costs of training, serving and a lifetime against the counts of real configs."""

import numpy as np
import pytest

from analysis.cost import Serving, Shapes, shapes_of_results
from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import count, decode, prefill
from sweeps.shapes import dense_shape, dlcm_shape

SHAPES = Shapes(8192, 512)


def models():
    for size in (3e6, 3e7):
        dense = ModelConfig.model_validate({"kind": "dense", "vocab_size": 8192, **dense_shape(size)})
        yield size, 1.0, 0.0, dense
        for share, ratio in ((0.4, 2.0), (0.6, 5.0)):
            config = {"kind": "dlcm", "vocab_size": 8192, **dlcm_shape(size, share)}
            yield size, ratio, share, ModelConfig.model_validate(config)


def test_serving_costs_what_prefill_and_decoding_of_the_real_shape_cost():
    for N, R, P, config in models():
        for prompt, new in ((700, 100), (64, 64), (900, 0), (0, 256)):
            flops = decode(config, prompt, new, R).forward if new else 0
            flops += prefill(config, prompt, R).forward if prompt else 0
            smooth = SHAPES.inference(Serving(prompt, new))(N, np.nan, R, P)
            # integer widths against real ones
            assert smooth == pytest.approx(flops / (prompt + new), rel=0.06)


def test_by_default_a_served_token_costs_a_forward_pass_of_the_training_window():
    for N, R, P, config in models():
        smooth = SHAPES.inference()(N, np.nan, R, P)
        assert smooth == pytest.approx(count(config, 512, R).forward_per_token, rel=0.06)
        assert 3 * smooth * 1e9 == pytest.approx(SHAPES.training()(N, 1e9, R, P), rel=1e-12)


def test_a_lifetime_is_training_and_serving():
    cost = SHAPES.lifetime(1e12, Serving(300, 40))
    per_token = SHAPES.inference(Serving(300, 40))
    x = (2e7, 5e9, 3.0, 0.5)
    assert cost(*x) == pytest.approx(SHAPES.training()(*x) + 1e12 * per_token(*x), rel=1e-12)
    assert "1e+12 served tokens" in cost.unit


def test_requests_and_lifetimes_that_cannot_be_are_refused(demo_frame, write_results):
    with pytest.raises(UserError, match="at least one token"):
        SHAPES.inference(Serving(0, 0))
    with pytest.raises(UserError, match="served tokens"):
        SHAPES.lifetime(-1.0)
    assert shapes_of_results(write_results(demo_frame), vocab_size=4096) == Shapes(4096, 256)
