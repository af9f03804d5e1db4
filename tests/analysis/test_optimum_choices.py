"""What may be said around an optimum: flat directions, regret of a choice, how far from the data, budgets of every kind."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import optimize

from analysis import laws, optimum
from analysis.cost import InferenceCost, LifetimeCost
from analysis.flat import flat_ranges
from analysis.regret import regret
from analysis.search import Search
from dlcm.errors import UserError
from tests.analysis.conftest import cost, forward_flops

BUDGET = 3e13
SERVE = InferenceCost(lambda N, D, R, P: forward_flops(N, R, P) + 0 * np.asarray(D), cost)


def loss_of(result, **held):
    """(N, R, P) -> predicted loss at the budget, D by the toy cost's own inverse: a plain route beside the search."""

    def loss(N, R, P):
        return float(result.predict(N=N, D=BUDGET / (3 * forward_flops(N, R, P)), R=R, P=P))

    return loss


# -- flat directions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1e-3, 1e-4])
def test_the_ends_of_a_flat_range_cost_the_threshold_after_the_others_are_chosen_again(adequate_fits, threshold):
    result = adequate_fits["dlcm"]
    best = optimum(result, cost, BUDGET, flat=threshold)
    loss = loss_of(result)
    (n0, n1), (r0, r1), (p0, p1) = (result.ranges[k] for k in "NRP")
    flat = {f.name: f for f in best.flat}
    assert set(flat) == set("NDRP")
    for P, is_open in ((flat["P"].low, flat["P"].low_open), (flat["P"].high, flat["P"].high_open)):
        assert not is_open
        again = optimize.minimize(
            lambda x, P=P: loss(np.exp(x[0]), x[1], P), [np.log(best["N"].value), 2.5], method="L-BFGS-B",
            bounds=[(np.log(n0), np.log(n1)), (r0, r1)], options={"ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        assert again.fun == pytest.approx(best.loss * (1 + threshold), rel=1e-7)
    # the least R is on the edge of the data, where the range is cut
    assert flat["R"].low_open
    assert flat["R"].low == pytest.approx(r0, rel=1e-9)
    again = optimize.minimize(
        lambda x: loss(np.exp(x[0]), flat["R"].high, x[1]), [np.log(best["N"].value), 0.5], method="L-BFGS-B",
        bounds=[(np.log(n0), np.log(n1)), (p0, p1)], options={"ftol": 1e-15, "gtol": 1e-10},
    )  # fmt: skip
    assert again.fun == pytest.approx(best.loss * (1 + threshold), rel=1e-7)


def test_flat_ranges_of_size_and_tokens_are_the_roots_of_the_dense_loss(adequate_fits):
    result = adequate_fits["dense"]
    best = optimum(result, cost, BUDGET)
    flat = {f.name: f for f in best.flat}
    rise = lambda x: loss_of(result)(np.exp(x), 1.0, 0.0) / best.loss - 1.001  # noqa: E731
    centre = np.log(best["N"].value)
    low, high = (np.exp(optimize.brentq(rise, *sorted((centre, end)))) for end in np.log(result.ranges["N"]))
    assert flat["N"].low == pytest.approx(low, rel=1e-6)
    assert flat["N"].high == pytest.approx(high, rel=1e-6)
    assert flat["D"].low == pytest.approx(BUDGET / (3 * forward_flops(high, 1, 0)), rel=1e-6)
    assert flat["D"].high == pytest.approx(BUDGET / (3 * forward_flops(low, 1, 0)), rel=1e-6)
    assert set(flat) == {"N", "D"}


@pytest.mark.slow
def test_flat_ranges_at_fixed_tokens_hold_for_size_too(adequate_fits):
    result = adequate_fits["dlcm"]
    best = optimum(result, SERVE, 4e6, tokens=1e7)
    flat = {f.name: f for f in best.flat}
    assert set(flat) == set("NRP")
    (r0, r1), (p0, p1) = (result.ranges[k] for k in "RP")
    P, R = np.meshgrid(np.linspace(p0, p1, 600), np.geomspace(r0, r1, 600))
    from analysis.budget import sizes_for_budget

    N = sizes_for_budget(SERVE, 4e6, 1e7, R, P)
    cheap = result.predict(N=N, D=1e7, R=R, P=P) <= best.loss * 1.001
    # a fine grid of everything that costs less than the threshold
    for name, values in (("N", N), ("R", R), ("P", P)):
        assert flat[name].low == pytest.approx(values[cheap].min(), rel=0.01)
        assert flat[name].high == pytest.approx(values[cheap].max(), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "size"), [(3e13, 1e6), (3e11, 2e6)], ids=["within", "in a corner"])
def test_flat_ranges_of_one_size_are_those_of_a_fine_grid(adequate_fits, budget, size):
    result = adequate_fits["dlcm"]
    best = optimum(result, cost, budget, bounds={"N": (size, size)})
    (r0, r1), (p0, p1) = (result.ranges[k] for k in "RP")
    P, R = np.meshgrid(np.linspace(p0, p1, 1500), np.geomspace(r0, r1, 1500))
    D = budget / (3 * forward_flops(size, R, P))
    cheap = result.predict(N=size, D=D, R=R, P=P) <= best.loss * 1.001
    assert [f.name for f in best.flat] == ["D", "R", "P"]
    for flat, values in zip(best.flat, (D, R, P)):
        assert flat.low == pytest.approx(values[cheap].min(), rel=2e-3)
        assert flat.high == pytest.approx(values[cheap].max(), rel=2e-3)
        assert flat.low_open == (values[cheap].min() == values.min())
        assert flat.high_open == (values[cheap].max() == values.max())


@pytest.mark.many
@pytest.mark.parametrize(("rise", "edge"), [(0.05, 3.25), (0.05, 4.0), (0.03, 3.25), (0.07, 4.0)])
def test_a_flat_range_ends_where_the_loss_first_rises_although_it_falls_again(rise, edge):
    """Along R the loss has a second well at 3, behind a hump of 0.065 c at 2.5."""
    names = ("E", "A", "a", "B", "b", "c")
    law = laws.from_expression(
        "E + A*N**-a + B*D**-b + c*(R - 2)**2*((R - 3)**2 + 0.01)", dict.fromkeys(names, (0, 1e4))
    )
    values = {"E": 1.8, "A": 480.0, "a": 0.35, "B": 2100.0, "b": 0.37, "c": 0.1}
    box = {"N": (1e8, 1e11), "R": (1.0, edge), "P": (0.5, 0.5)}
    search = Search(law, lambda N, D, R, P: 6 * N * D, 1e21, box)
    problem = SimpleNamespace(
        search=search, solve="D", is_open=lambda n: n in "NR", result=SimpleNamespace(values=values)
    )
    best = search.minimise(values)
    flat = {f.name: f for f in flat_ranges(problem, best, rise * values["c"] / best[4])}["R"]
    left = lambda R: (R - 2) ** 2 * ((R - 3) ** 2 + 0.01) - rise  # noqa: E731
    grid = np.linspace(2.0, edge, 100_001)
    first = grid[np.argmax(left(grid) > 0)]
    assert flat.high == pytest.approx(optimize.brentq(left, first - 1e-3, first + 1e-3), rel=1e-6)
    assert not flat.high_open


def test_the_report_says_flat_directions_in_plain_words(adequate_fits):
    best = optimum(adequate_fits["dlcm"], cost, BUDGET)
    P = next(f for f in best.flat if f.name == "P")
    assert f"any P in {P.low:.3g} to {P.high:.3g} costs < 0.1% loss" in best.report()
    assert "(lower end: edge of what was searched)" in best.report()
    assert {"P", "R", "N", "D"} == {f["name"] for f in best.to_dict()["flat"]}
    assert optimum(adequate_fits["dlcm"], cost, BUDGET, flat=None).flat == ()
    with pytest.raises(UserError, match="flat = 0"):
        optimum(adequate_fits["dlcm"], cost, BUDGET, flat=0.0)


# -- regret ------------------------------------------------------------------------------------------------------------


def test_regret_is_the_difference_of_two_predicted_losses_pair_by_pair(adequate_fits):
    result = adequate_fits["dlcm"]
    best = optimum(result, cost, BUDGET)
    N, R, P = 1e6, 4.0, 0.4
    D = BUDGET / (3 * float(forward_flops(N, R, P)))
    found = regret(result, cost, BUDGET, N=N, R=R, P=P)
    np.testing.assert_allclose(found.D, D, rtol=1e-9)
    assert found.value == pytest.approx(float(result.predict(N=N, D=D, R=R, P=P)) - best.loss, rel=1e-9)
    losses = np.array([float(result.law.predict(v, N=N, D=D, R=R, P=P)) for v in result.replicate_values()])
    pairs = losses - best.replicates[:, 4]
    np.testing.assert_allclose((found.low, found.high), np.percentile(pairs, [2.5, 97.5], method="weibull"), rtol=1e-6)
    # unpaired, the interval would be wider: both losses move together
    unpaired = np.subtract.outer(losses, best.replicates[:, 4])
    assert found.high - found.low < np.ptp(np.percentile(unpaired, [2.5, 97.5]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dlcm", "dense"])
def test_regret_vanishes_at_the_optimum_and_is_positive_elsewhere(adequate_fits, family):
    result = adequate_fits[family]
    best = optimum(result, cost, BUDGET, flat=None)
    N, D, R, P = best.point
    for choice in ({"N": N, "R": R, "P": P}, {"N": N}, {"D": D}, {"N": N, "D": D, "R": R, "P": P}):
        at_best = regret(result, cost, BUDGET, **choice)
        assert at_best.value == pytest.approx(0.0, abs=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(8):
        choice = {"N": float(np.exp(rng.uniform(np.log(2e4), np.log(2e7))))}
        if family == "dlcm":
            choice |= {"R": float(rng.uniform(1.5, 9.0)), "P": float(rng.uniform(0.2, 0.8))}
        found = regret(result, cost, BUDGET, **choice, force=True)
        assert found.value > 0
        assert found.low >= -1e-12


def test_what_a_choice_leaves_open_is_chosen_best(adequate_fits):
    result = adequate_fits["dlcm"]
    found = regret(result, cost, BUDGET, R=4.0)
    loss = loss_of(result)
    rng = np.random.default_rng(0)
    (n0, n1), (p0, p1) = result.ranges["N"], result.ranges["P"]
    tried = [loss(N, 4.0, P) for N, P in zip(np.geomspace(n0, n1, 4000), rng.uniform(p0, p1, 4000))]
    assert found.loss <= min(tried) + 1e-12
    assert found.chosen == ("R",)
    by_tokens = regret(result, cost, BUDGET, D=5e6)
    assert by_tokens.D == 5e6
    assert cost(by_tokens.N, by_tokens.D, by_tokens.R, by_tokens.P) == pytest.approx(BUDGET, rel=1e-8)


def test_regret_under_an_inference_budget_keeps_the_tokens(adequate_fits):
    result = adequate_fits["dlcm"]
    best = optimum(result, SERVE, 4e6, tokens=1e7, flat=None)
    found = regret(result, SERVE, 4e6, tokens=1e7, R=4.0, P=0.5)
    assert SERVE(found.N, found.D, 4.0, 0.5) == pytest.approx(4e6, rel=1e-9)
    expected = float(result.predict(N=found.N, D=1e7, R=4.0, P=0.5)) - best.loss
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_choices_that_make_no_sense_are_refused(adequate_fits):
    result = adequate_fits["dlcm"]
    for choice, words in (
        ({}, "at least one of N, D, R and P"),
        ({"P": 1.0}, "P = 1 is no choice"),
        ({"R": 0.5}, "R = 0.5 is no choice"),
        ({"N": 1e6, "D": 1e9, "R": 4.0, "P": 0.5}, "more than the budget of 3e"),
        ({"N": 1e6, "D": 1e6, "R": 4.0}, "give P as well"),
        ({"N": 1e9, "R": 4.0, "P": 0.5}, "the choice and what follows from it lie outside the data"),
    ):
        with pytest.raises(UserError, match=words):
            regret(result, cost, BUDGET, **choice)
    with pytest.raises(UserError, match="a dense model has R = 1"):
        regret(adequate_fits["dense"], cost, BUDGET, N=1e6, R=4.0)
    with pytest.raises(UserError, match="leave one out"):
        regret(result, SERVE, 4e6, tokens=1e7, D=2e7)


# -- budgets of other kinds, and how far from the data -------------------------------------------------------------------


def test_a_training_budget_at_given_tokens_leaves_the_size_to_follow(adequate_fits):
    best = optimum(adequate_fits["dense"], cost, BUDGET, tokens=1e7)
    assert best["D"].status == "held"
    assert best["D"].reason == "given"
    assert cost(*best.point) == pytest.approx(BUDGET, rel=1e-9)
    assert "and D = 1e+07 tokens" in best.headline
    assert best.verdict == "nothing to choose"


def test_an_inference_budget_says_its_unit_and_needs_tokens(adequate_fits):
    best = optimum(adequate_fits["dlcm"], SERVE, 4e6, tokens=1e7)
    assert "4e+06 inference FLOPs per token and D = 1e+07 tokens" in best.headline
    assert best.to_dict()["unit"] == "inference FLOPs per token"
    with pytest.raises(UserError, match="give the tokens D as well"):
        optimum(adequate_fits["dlcm"], SERVE, 4e6)


def test_a_lifetime_is_judged_by_what_training_takes_of_it(adequate_fits):
    result = adequate_fits["dense"]
    alone = optimum(result, LifetimeCost(cost, SERVE, 0.0), BUDGET)
    assert alone["N"].value == pytest.approx(optimum(result, cost, BUDGET)["N"].value, rel=1e-9)
    served = optimum(result, LifetimeCost(cost, SERVE, 2e8), 1e15)
    training = float(cost(*served.point))
    assert training < 7e14
    assert served.decades_outside["C"] == pytest.approx(np.log10(training / result.ranges["C"][1]), rel=1e-9)
    assert served.decades_outside["C"] < optimum(result, cost, 1e15).decades_outside["C"]
    assert served["N"].value < optimum(result, cost, 1e15)["N"].value


def test_sizes_are_searched_beyond_the_data_as_far_as_the_budget_lies_beyond(adequate_fits):
    result = adequate_fits["dense"]
    assert optimum(result, cost, BUDGET)["N"].searched == result.ranges["N"]
    beyond = optimum(result, cost, 3e15)
    assert beyond["N"].searched[1] == pytest.approx(10 * result.ranges["N"][1], rel=1e-6)
    assert beyond["N"].searched[0] == result.ranges["N"][0]
    assert beyond["N"].status == "ok"
    below = optimum(result, cost, 3e10)
    assert below["N"].searched[0] == pytest.approx(result.ranges["N"][0] / 10, rel=1e-6)


def test_beyond_the_limit_an_answer_is_refused_with_the_distance_and_the_way_out(adequate_fits):
    result = adequate_fits["dense"]
    with pytest.raises(UserError, match=r"C by 2 decades; 1 are allowed.*--force"):
        optimum(result, cost, 3e16)
    assert optimum(result, cost, 3e16, force=True).decades_outside["C"] == pytest.approx(2.0, abs=0.01)
    assert optimum(result, cost, 3e16, limit=2.5).loss > 0
    with pytest.raises(UserError, match="0.1 are allowed"):
        optimum(result, cost, 1e15, limit=0.1)
    unsound = dataclasses.replace(result, status=type(result.status)("bound_hit"))
    with pytest.raises(UserError, match=r"the fit is bound_hit.*0.3 are allowed.*mend the fit"):
        optimum(unsound, cost, 1e15)
    with pytest.raises(UserError, match="limit = -1"):
        optimum(result, cost, BUDGET, limit=-1.0)


def test_a_law_of_something_else_has_no_optimum(adequate_fits):
    from analysis import laws

    other = dataclasses.replace(adequate_fits["dlcm"], law=laws.DECAY_GAIN)
    with pytest.raises(UserError, match="an optimum needs a loss of N, D, R and P"):
        optimum(other, cost, BUDGET)
