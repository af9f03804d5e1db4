"""Savings against dense at equal predicted loss, for training, serving and a lifetime, against the closed forms of a law."""

import dataclasses

import numpy as np
import pytest

from analysis import ResultsData, fit, laws, load_results, optimum, savings
from analysis.cost import InferenceCost, LifetimeCost, Shapes
from dlcm.errors import UserError
from tests.analysis.conftest import VOCABULARY, cost, forward_flops

CHINCHILLA = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
SERVED = 3e12


def training(N, D, R, P):
    return 6 * N * D


SERVE = InferenceCost(lambda N, D, R, P: 2 * N + 0 * np.asarray(D), training)


@pytest.fixture(scope="module")
def dense_fit():
    N, D = np.array(np.meshgrid(np.geomspace(1e7, 1e12, 7), np.geomspace(1e9, 1e13, 6))).reshape(2, -1)
    loss = laws.CHINCHILLA.predict(CHINCHILLA, N=N, D=D) * np.exp(np.random.default_rng(0).normal(0, 0.002, len(N)))
    return fit(laws.CHINCHILLA, ResultsData.from_arrays(N=N, D=D, loss=loss), n_bootstrap=40)


def dlcm_optimum(dense_fit, unit, budget, tokens=None):
    """An optimum of the DLCM as it is reported, with a loss a little below that of a dense model of moderate size."""
    loss = float(dense_fit.predict(N=3e9, D=tokens or 6e10)) * 0.99
    best = optimum(dense_fit, training, 1e21, flat=None)
    rng = np.random.default_rng(1)
    draws = best.replicates.copy()
    draws[:, 4] = loss * np.exp(rng.normal(0, 0.002, len(draws)))
    return dataclasses.replace(best, budget=budget, unit=unit, tokens=tokens, loss=loss, replicates=draws)


def training_flops(loss, v):
    """C of the least loss under 6ND: L = E + K C^(-ab/(a+b)), from N* and D* in closed form."""
    a, b, A, B = v["alpha"], v["beta"], v["A"], v["B"]
    G = (a * A / (b * B)) ** (1 / (a + b))
    K = (A * G**-a + B * G**b) * 6 ** (a * b / (a + b))
    return (K / (loss - v["E"])) ** ((a + b) / (a * b))


def inference_flops(loss, v, D):
    return 2 * (v["A"] / (loss - v["E"] - v["B"] / D ** v["beta"])) ** (1 / v["alpha"])


def lifetime_flops(loss, v):
    """6ND + 2NS with D from the conditions of the optimum: alpha A N^-alpha / (beta B D^-beta) = (6D + 2S) / 6D."""
    a, b, A, B = v["alpha"], v["beta"], v["A"], v["B"]
    D = np.geomspace(1e9, 1e14, 400_001)
    N = (a * A / (b * B) * D**b * 6 * D / (6 * D + 2 * SERVED)) ** (1 / a)
    along = v["E"] + A / N**a + B / D**b
    total = 6 * N * D + 2 * N * SERVED
    return np.exp(np.interp(-loss, -along, np.log(total)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "inference", "lifetime"])
def test_savings_and_their_interval_are_those_of_the_closed_form(dense_fit, kind):
    tokens = 6e10 if kind == "inference" else None
    price, closed = {
        "training": (training, training_flops),
        "inference": (SERVE, lambda loss, v: inference_flops(loss, v, tokens)),
        "lifetime": (LifetimeCost(training, SERVE, SERVED), lifetime_flops),
    }[kind]
    flops = closed(float(dense_fit.predict(N=3e9, D=6e10)) * 0.99, dense_fit.values)
    best = dlcm_optimum(dense_fit, "FLOPs", 0.7 * flops, tokens)
    found = savings(best, dense_fit, price)
    assert found.dense_flops == pytest.approx(flops, rel=1e-6)
    assert found.share == pytest.approx(0.3, abs=1e-6)
    drawn = [1 - best.budget / closed(x, v) for x, v in zip(best.replicates[:, 4], dense_fit.replicate_values())]
    expected = np.percentile(drawn, [2.5, 97.5], method="nearest")
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-5)
    assert found.status == "ok"
    assert found.decades_outside == {}


@pytest.mark.slow
def test_with_real_costs_the_dense_model_has_the_loss_at_its_flops(adequate_fits):
    shapes = Shapes(VOCABULARY, 256)
    lifetime = shapes.lifetime(1e7)
    for price, budget, tokens in (
        (shapes.training(), 3e13, None),
        (lifetime, 3e13, None),
        (shapes.inference(), 4e6, 1e7),
    ):
        best = optimum(adequate_fits["dlcm"], price, budget, tokens=tokens, flat=None)
        found = savings(best, adequate_fits["dense"], price)
        assert (found.unit, found.tokens) == (best.unit, tokens)
        again = optimum(adequate_fits["dense"], price, found.dense_flops, tokens=tokens, flat=None, force=True)
        # the dense model of a training budget has a size among those of the runs
        assert again.loss == pytest.approx(best.loss, rel=1e-7)
        assert found.low <= found.share <= found.high
        assert best.unit in found.text


@pytest.mark.slow
def test_out_of_reach_counts_as_all_saved_or_as_lost_without_bound(dense_fit):
    hopeless, easy = (dlcm_optimum(dense_fit, "FLOPs", 1e21) for _ in range(2))
    hopeless.replicates[:10, 4], easy.replicates[:10, 4] = 1.0, 50.0
    assert savings(hopeless, dense_fit, training).high == 1.0
    assert savings(easy, dense_fit, training).low is None
    for loss in (1.0, 50.0):
        assert savings(dataclasses.replace(easy, loss=loss), dense_fit, training).status == "not identified"


def test_a_dense_model_beyond_its_runs_is_said_to_be(adequate_fits):
    serve = InferenceCost(lambda N, D, R, P: forward_flops(N, R, P) + 0 * np.asarray(D), cost)
    best = optimum(adequate_fits["dlcm"], serve, 4e6, tokens=1e7, flat=None)
    wide = savings(dataclasses.replace(best, loss=best.loss * 0.93), adequate_fits["dense"], serve)
    assert wide.decades_outside["N"] > 0.1
    assert "that dense model lies outside the data: N by" in wide.text
    held = savings(best, adequate_fits["dense"], serve, sizes=(1e4, 1e5))
    assert held.dense_flops is None


def test_savings_are_the_flops_of_the_dense_model_at_equal_loss(adequate_fits):
    best = optimum(adequate_fits["dlcm"], cost, 3e13)
    saved = savings(best, adequate_fits["dense"], cost)
    frontier = optimum(adequate_fits["dense"], cost, saved.dense_flops)
    assert frontier.loss == pytest.approx(best.loss, rel=1e-8)
    assert saved.share == pytest.approx(1 - 3e13 / saved.dense_flops)
    assert saved.low <= saved.share <= saved.high


def test_a_losing_dlcm_is_said_plainly(adequate_fits):
    # a DLCM that costs twice as much at the same law
    best = optimum(adequate_fits["dlcm"], lambda N, D, R, P: 2 * cost(N, D, R, P), 3e13)
    best = dataclasses.replace(best, choices=tuple(dataclasses.replace(c, at_edge="") for c in best.choices))
    saved = savings(best, adequate_fits["dense"], cost)
    assert saved.share < -0.5
    assert "the dense model wins at this scale" in saved.text
    assert saved.status == "ok"


def cheaper(N, D, R, P):
    """A DLCM that costs four fifths at the same law."""
    return 0.8 * cost(N, D, R, P)


def test_a_dlcm_at_the_wall_of_its_search_loses_to_nobody_and_saves_at_least_what_it_does(adequate_fits):
    """The largest size that was run is no property of DLCMs: beyond it they may save what they do not within it."""
    dense = adequate_fits["dense"]
    free = savings(optimum(adequate_fits["dlcm"], cheaper, 3e13), dense, cost)
    small = (float(dense.ranges["N"][0]), 1.1 * float(dense.ranges["N"][0]))
    walled = optimum(adequate_fits["dlcm"], cheaper, 3e13, bounds={"N": small})
    assert walled["N"].at_edge == "upper"
    saved = savings(walled, dense, cost)
    assert saved.share < 0 < free.share
    assert saved.status == "not identified"
    assert saved.text.startswith("which family is cheaper is not identified")
    assert "of the DLCM lie on the edge of what was searched, beyond which it may save more" in saved.text
    assert "wins" not in saved.text
    assert free.status == "lower bound"  # R lies on an edge there
    assert "(saved by the DLCM: at least +" in free.text


def test_a_dense_model_at_the_wall_of_its_sizes_needs_at_most_what_it_does(adequate_fits):
    best = optimum(adequate_fits["dlcm"], cheaper, 3e13)
    best = dataclasses.replace(best, choices=tuple(dataclasses.replace(c, at_edge="") for c in best.choices))
    needed = savings(best, adequate_fits["dense"], cost)
    assert (needed.status, needed.dense_at_edge) == ("ok", False)
    small = (0.3 * needed.dense_size, 0.5 * needed.dense_size)
    saved = savings(best, adequate_fits["dense"], cost, sizes=small)
    assert saved.dense_at_edge
    assert saved.share > needed.share > 0
    assert saved.status == "not identified"
    losing = dataclasses.replace(best, budget=6 * best.budget, replicates=best.replicates)
    saved = savings(losing, adequate_fits["dense"], cost, sizes=small)
    assert saved.status == "upper bound"
    assert "the dense model wins at this scale: it needs" in saved.text
    assert "(saved by the DLCM: at most -" in saved.text


def test_savings_beyond_reach_are_not_identified(adequate_fits):
    best = dataclasses.replace(optimum(adequate_fits["dlcm"], cost, 3e13), loss=1.0)
    saved = savings(best, adequate_fits["dense"], cost)
    assert saved.status == "not identified"
    assert saved.share is None


@pytest.mark.slow
def test_savings_refuse_fits_of_different_conventions(adequate_fits, adequate_frame, write_results):
    best = optimum(adequate_fits["dlcm"], cost, 3e13)
    other = fit(laws.CHINCHILLA, load_results(write_results(adequate_frame), n="total"), n_bootstrap=0)
    with pytest.raises(UserError, match="conventions differ"):
        savings(best, other, cost)
    with pytest.raises(UserError, match="not a law of the dense baseline"):
        savings(best, adequate_fits["dlcm"], cost)
