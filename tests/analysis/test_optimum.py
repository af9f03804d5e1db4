import dataclasses

import numpy as np
import pytest

from analysis import ResultsData, fit, laws, load_results, optimum, savings
from analysis.savings import DenseFrontier
from analysis.search import tokens_for_budget
from dlcm.errors import UserError
from tests.analysis.conftest import PLANTED_DLCM, cost

CHINCHILLA = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


@pytest.fixture(scope="module")
def chinchilla_fit():
    N, D = np.array(np.meshgrid(np.geomspace(1e7, 1e11, 6), np.geomspace(1e9, 1e12, 5))).reshape(2, -1)
    loss = laws.CHINCHILLA.predict(CHINCHILLA, N=N, D=D)
    return fit(laws.CHINCHILLA, ResultsData.from_arrays(N=N, D=D, loss=loss), n_bootstrap=3)


@pytest.fixture(scope="module")
def adequate_fits(adequate_frame, tmp_path_factory):
    path = tmp_path_factory.mktemp("adequate") / "results.parquet"
    adequate_frame.to_parquet(path)
    data = load_results(path)
    law = laws.COMPRESSION_AWARE.fix(t_t=0, t_c=0, t_d=0)
    return {"dense": fit(laws.CHINCHILLA, data, n_bootstrap=20), "dlcm": fit(law, data, n_bootstrap=20)}


@pytest.mark.parametrize("budget", [1e19, 1e21, 1e23])
def test_with_cost_6nd_the_optimum_is_the_closed_form(chinchilla_fit, budget):
    best = optimum(chinchilla_fit, lambda N, D, R, P: 6 * N * D, budget)
    a, b = CHINCHILLA["alpha"], CHINCHILLA["beta"]
    G = (a * CHINCHILLA["A"] / (b * CHINCHILLA["B"])) ** (1 / (a + b))
    assert best["N"].value == pytest.approx(G * (budget / 6) ** (b / (a + b)), rel=1e-6)
    assert best["D"].value == pytest.approx((budget / 6) ** (a / (a + b)) / G, rel=1e-6)
    assert best["N"].status == "ok"
    assert best["R"].status == best["P"].status == "held"


def test_the_optimum_is_no_worse_than_any_point_of_the_budget(adequate_fits):
    result = adequate_fits["dlcm"]
    best = optimum(result, cost, 3e13)
    rng = np.random.default_rng(0)
    (n0, n1), (r0, r1), (p0, p1) = (result.ranges[k] for k in "NRP")
    N = np.exp(rng.uniform(np.log(n0), np.log(n1), 5000))
    R, P = rng.uniform(r0, r1, 5000), rng.uniform(p0, p1, 5000)
    D = tokens_for_budget(cost, 3e13, N, R, P)
    assert best.loss <= result.predict(N=N, D=D, R=R, P=P).min() + 1e-9
    spent = cost(*(best[k].value for k in "NDRP"))
    assert spent == pytest.approx(3e13, rel=1e-9)


def test_planted_optimum_lies_in_its_interval(adequate_fits):
    best = optimum(adequate_fits["dlcm"], cost, 3e13)
    truth = dataclasses.replace(
        adequate_fits["dlcm"],
        parameters=tuple(
            dataclasses.replace(p, working_value=PLANTED_DLCM[p.name]) for p in adequate_fits["dlcm"].parameters
        ),
        replicates=np.empty((0, 11)),
    )
    planted = optimum(truth, cost, 3e13)
    for name in ("N", "P"):
        choice = best[name]
        assert choice.status == "ok"
        assert choice.low * 0.9 <= planted[name].value <= choice.high * 1.1


def test_an_optimum_on_the_edge_is_not_identified(adequate_fits):
    best = optimum(adequate_fits["dlcm"], cost, 3e13)
    # the planted law wants less compression than any run had
    assert best["R"].status == "not identified"
    assert "lower edge" in best["R"].reason
    assert "R: not identified" in best.report()
    assert best.to_dict()["choices"]["NDRP".index("R")]["value"] is None
    assert not best.identified


def test_distance_from_the_data_stands_in_the_line_of_the_loss(adequate_fits):
    inside, outside = (optimum(adequate_fits["dense"], cost, c) for c in (3e13, 3e15))
    assert "inside the data" in inside.report().splitlines()[0]
    assert "outside the data: " in outside.report().splitlines()[0]
    assert outside.decades_outside["C"] == pytest.approx(1.0, abs=0.05)


def test_an_unsound_fit_is_not_extrapolated_unless_asked(adequate_fits):
    unsound = dataclasses.replace(adequate_fits["dense"], status=type(adequate_fits["dense"].status)("bound_hit"))
    assert optimum(unsound, cost, 3e13).loss > 0
    with pytest.raises(UserError, match="--extrapolate"):
        optimum(unsound, cost, 3e17)
    assert optimum(unsound, cost, 3e17, extrapolate=True).notes


def test_savings_are_the_flops_of_the_dense_model_at_equal_loss(adequate_fits):
    best = optimum(adequate_fits["dlcm"], cost, 3e13)
    saved = savings(best, adequate_fits["dense"], cost)
    frontier = optimum(adequate_fits["dense"], cost, saved.dense_flops)
    assert frontier.loss == pytest.approx(best.loss, abs=2e-4)
    assert saved.share == pytest.approx(1 - 3e13 / saved.dense_flops)
    assert saved.low <= saved.share <= saved.high


def test_a_losing_dlcm_is_said_plainly(adequate_fits):
    # a DLCM that costs twice as much at the same law
    best = optimum(adequate_fits["dlcm"], lambda N, D, R, P: 2 * cost(N, D, R, P), 3e13)
    saved = savings(best, adequate_fits["dense"], cost)
    assert saved.share < -0.5
    assert "the dense model wins at this scale" in saved.text


def test_savings_beyond_reach_are_not_identified(adequate_fits):
    best = dataclasses.replace(optimum(adequate_fits["dlcm"], cost, 3e13), loss=1.0)
    saved = savings(best, adequate_fits["dense"], cost)
    assert saved.status == "not identified"
    assert saved.share is None


def test_the_dense_frontier_is_the_optimum_of_each_budget(adequate_fits):
    frontier = DenseFrontier(adequate_fits["dense"], cost, 1e13)
    losses = frontier.losses(adequate_fits["dense"].values)
    for i in (50, 60, 70):
        best = optimum(adequate_fits["dense"], cost, frontier.budgets[i], bounds={"N": (frontier.N[0], frontier.N[-1])})
        assert losses[i] == pytest.approx(best.loss, abs=1e-5)


def test_savings_refuse_fits_of_different_conventions(adequate_fits, adequate_frame, write_results):
    best = optimum(adequate_fits["dlcm"], cost, 3e13)
    other = fit(laws.CHINCHILLA, load_results(write_results(adequate_frame), n="total"), n_bootstrap=0)
    with pytest.raises(UserError, match="conventions differ"):
        savings(best, other, cost)
    with pytest.raises(UserError, match="not a law of the dense baseline"):
        savings(best, adequate_fits["dlcm"], cost)


def test_tokens_solve_a_cost_that_is_not_proportional_to_them():
    N = np.geomspace(1e5, 1e9, 7)

    def curved(N, D, R, P):
        return N * D**1.2 + 1e9

    D = tokens_for_budget(curved, 1e18, N, np.ones(7), np.zeros(7))
    np.testing.assert_allclose(curved(N, D, 1, 0), 1e18, rtol=1e-9)


def test_a_useless_cost_or_budget_is_refused(adequate_fits):
    result = adequate_fits["dense"]
    with pytest.raises(UserError, match="does not rise with D"):
        optimum(result, lambda N, D, R, P: 1e9 * N / N, 3e13)
    with pytest.raises(UserError, match="not a positive number"):
        optimum(result, lambda N, D, R, P: -N * D, 3e13)
    with pytest.raises(UserError, match="above 0"):
        optimum(result, cost, -1.0)
    with pytest.raises(UserError, match="'Q' is not searched"):
        optimum(result, cost, 3e13, bounds={"Q": (1, 2)})
    with pytest.raises(UserError, match="is no range"):
        optimum(result, cost, 3e13, bounds={"N": (2e6, 1e6)})
