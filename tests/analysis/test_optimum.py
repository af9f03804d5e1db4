import dataclasses

import numpy as np
import pytest

from analysis import ResultsData, fit, laws, optimum
from analysis.search import tokens_for_budget
from dlcm.errors import UserError
from tests.analysis.conftest import PLANTED_DLCM, cost

CHINCHILLA = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


@pytest.fixture(scope="module")
def chinchilla_fit():
    N, D = np.array(np.meshgrid(np.geomspace(1e7, 1e11, 6), np.geomspace(1e9, 1e12, 5))).reshape(2, -1)
    loss = laws.CHINCHILLA.predict(CHINCHILLA, N=N, D=D)
    return fit(laws.CHINCHILLA, ResultsData.from_arrays(N=N, D=D, loss=loss), n_bootstrap=3)


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


def test_an_interval_that_ends_where_the_search_does_says_so(adequate_fits):
    result = adequate_fits["dlcm"]
    free = optimum(result, cost, 3e13)["P"]
    assert free.censored == (False, False)
    middle = (free.value + free.high) / 2
    held = optimum(result, cost, 3e13, bounds={"P": (free.value - 10 * (free.high - free.value), middle)})["P"]
    assert held.status == "ok"
    assert held.high == pytest.approx(middle)
    assert held.censored == (False, True)
    assert "(upper end: edge of what was searched)" in held.describe()


def test_what_the_user_holds_is_given_and_what_the_data_hold_is_said_to_be(adequate_fits):
    result = adequate_fits["dlcm"]
    assert optimum(result, cost, 3e13, bounds={"R": (4, 4)})["R"].reason == "given"
    one = dataclasses.replace(result, ranges={**result.ranges, "R": (4.0, 4.1)})
    assert optimum(one, cost, 3e13)["R"].reason == "the data hold one value"


def test_distance_from_the_data_stands_in_the_line_of_the_loss(adequate_fits):
    inside, outside = (optimum(adequate_fits["dense"], cost, c) for c in (3e13, 3e15))
    assert "inside the data" in inside.report().splitlines()[0]
    assert "outside the data: " in outside.report().splitlines()[0]
    assert outside.decades_outside["C"] == pytest.approx(1.0, abs=0.05)


def test_an_unsound_fit_is_not_extrapolated_unless_asked(adequate_fits):
    unsound = dataclasses.replace(adequate_fits["dense"], status=type(adequate_fits["dense"].status)("bound_hit"))
    assert optimum(unsound, cost, 3e13).loss > 0
    with pytest.raises(UserError, match="--force"):
        optimum(unsound, cost, 3e17)
    assert optimum(unsound, cost, 3e17, force=True).notes


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
