"""The best allocation over budgets, against the closed form of Chinchilla's law and against the optimum of each budget."""

import dataclasses

import numpy as np
import pytest

from analysis import ResultsData, fit, laws, optimum
from analysis.cost import InferenceCost
from analysis.frontier import frontier
from analysis.plots import new_figure
from analysis.plots_optimum import draw_allocation, plot_allocation
from dlcm.errors import UserError
from tests.analysis.conftest import cost, forward_flops

CHINCHILLA = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
BUDGETS = np.geomspace(1e19, 1e22, 7)


def training(N, D, R, P):
    return 6 * N * D


@pytest.fixture(scope="module")
def noisy_fit():
    N, D = np.array(np.meshgrid(np.geomspace(1e7, 1e11, 7), np.geomspace(1e9, 1e12, 5))).reshape(2, -1)
    loss = laws.CHINCHILLA.predict(CHINCHILLA, N=N, D=D) * np.exp(np.random.default_rng(0).normal(0, 0.003, len(N)))
    return fit(laws.CHINCHILLA, ResultsData.from_arrays(N=N, D=D, C=6 * N * D, loss=loss), n_bootstrap=60)


def closed_form(budgets, v):
    """N*, D* and loss under 6ND."""
    a, b, A, B = v["alpha"], v["beta"], v["A"], v["B"]
    N = (a * A / (b * B)) ** (1 / (a + b)) * (budgets / 6) ** (b / (a + b))
    D = budgets / 6 / N
    return np.column_stack([N, D, v["E"] + A / N**a + B / D**b])


def test_allocation_and_bands_are_the_closed_form_of_each_refit(noisy_fit):
    found = frontier(noisy_fit, training, BUDGETS)
    np.testing.assert_allclose(found.points[:, [0, 1, 4]], closed_form(BUDGETS, noisy_fit.values), rtol=1e-6)
    each = np.stack([closed_form(BUDGETS, v) for v in noisy_fit.replicate_values()])
    low, high = np.percentile(each, [2.5, 97.5], axis=0, method="weibull")
    np.testing.assert_allclose(found.low[:, [0, 1, 4]], low, rtol=1e-6)
    np.testing.assert_allclose(found.high[:, [0, 1, 4]], high, rtol=1e-6)


def test_exponents_are_beta_and_alpha_over_their_sum_with_the_intervals_of_the_refits(noisy_fit):
    found = frontier(noisy_fit, training, BUDGETS)
    alpha, beta = (np.array([v[k] for v in noisy_fit.replicate_values()]) for k in ("alpha", "beta"))
    a, b = noisy_fit.values["alpha"], noisy_fit.values["beta"]
    for name, value, each in (("N", b / (a + b), beta / (alpha + beta)), ("D", a / (a + b), alpha / (alpha + beta))):
        slope = found[name]
        assert slope.value == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(
            (slope.low, slope.high), np.percentile(each, [2.5, 97.5], method="weibull"), rtol=1e-6
        )
    assert (found["R"].status, found["P"].status) == ("held", "held")
    assert found.moving == ("N", "D")


@pytest.mark.parametrize("kind", ["training", "inference"])
def test_each_row_is_the_optimum_of_its_budget(adequate_fits, kind):
    result = adequate_fits["dlcm"]
    serve = InferenceCost(lambda N, D, R, P: forward_flops(N, R, P) + 0 * np.asarray(D), cost)
    price, tokens, budgets = (cost, None, [3e12, 3e13, 1e14]) if kind == "training" else (serve, 1e7, [2e6, 4e6])
    found = frontier(result, price, budgets[::-1], tokens=tokens)
    for i, budget in enumerate(budgets):
        best = optimum(result, price, budget, tokens=tokens, flat=None)
        assert found.budgets[i] == budget
        np.testing.assert_allclose(found.points[i], [*best.point, best.loss], rtol=1e-9)
        for k, name in enumerate("NDRP"):
            assert found.statuses[name][i] == best[name].status
            if best[name].low is not None:
                np.testing.assert_allclose((found.low[i, k], found.high[i, k]), (best[name].low, best[name].high))
        assert found.outside[i] == best.decades_outside
    if tokens:
        assert "D" not in found.moving


def test_what_is_not_identified_has_no_exponent_and_is_marked(adequate_fits):
    found = frontier(adequate_fits["dlcm"], cost, np.geomspace(3e12, 1e14, 4))
    # the planted law wants less compression than any run had
    assert found["R"].value is None
    assert found["R"].reason.startswith("at 4 of 4 budgets the optimum lies on the lower edge")
    assert "R: not identified" in found.report()
    assert " ?" in found.report()
    assert all("R" in names for names in found.table()["not_identified"])
    assert found.to_dict()["budgets"][0]["R"]["status"] == "not identified"


def test_a_slope_is_over_budgets_at_which_the_same_others_are_at_their_edge(adequate_fits):
    """P* moves otherwise once N may not grow: the slope is that of the budgets before, or of those behind."""
    result, budgets = adequate_fits["dlcm"], np.geomspace(3e12, 1e14, 7)
    free = frontier(result, cost, budgets)
    assert free["N"].reason == "given R on the edge of what was searched"
    wall = float(free.points[3, 0])
    walled = frontier(result, cost, budgets, bounds={"N": (float(result.ranges["N"][0]), wall)})
    before = frontier(result, cost, budgets[:3])
    given = [optimum(result, cost, b, bounds={"N": (float(result.ranges["N"][0]), wall)})["P"].given for b in budgets]
    assert given == [("R",)] * 3 + [("N", "R")] * 4
    where = "over the 4 of 7 budgets at which the same others lie on an edge"
    assert walled["P"].reason == f"{where}, given N and R on the edge of what was searched"
    assert walled.walls == (("R",),) * 3 + (("N", "R"),) * 4
    assert walled.table()["on_edge"].tolist() == ["R"] * 3 + ["N R"] * 4
    assert "|: given another coordinate on the edge" in walled.report()
    assert walled["N"].value == pytest.approx(before["N"].value, rel=1e-6)
    assert walled["N"].reason.startswith("over the 3 of 7 budgets at which it is identified, given R on the edge")


def test_where_the_frontier_leaves_the_data_is_said_and_limited(adequate_fits):
    result = adequate_fits["dense"]
    found = frontier(result, cost, [3e13, 3e14, 1e15])
    assert found.inside.tolist() == [True, True, False]
    assert found.table()["decades_outside"].tolist()[-1] == pytest.approx(np.log10(1e15 / 3e14), abs=0.03)
    assert found.report().splitlines()[-1].endswith("decades")
    with pytest.raises(UserError, match="--force"):
        frontier(result, cost, [3e13, 3e16])
    assert not frontier(result, cost, [3e13, 3e16], force=True).inside[1]
    with pytest.raises(UserError, match="give two or more"):
        frontier(result, cost, [3e13, 3e13])


def test_without_a_bootstrap_there_are_no_bands(noisy_fit):
    bare = dataclasses.replace(noisy_fit, replicates=noisy_fit.replicates[:0])
    found = frontier(bare, training, BUDGETS)
    assert found.low is found.high is None
    assert "no interval" in found["N"].describe()
    assert "N_low" not in found.table()
    assert "interval" not in found.to_dict()["budgets"][0]["N"]
    assert plot_allocation(new_figure()[1], {"dense": found}, "N").get_lines()


def test_the_figure_has_a_panel_a_moving_coordinate_with_bands_on_what_the_data_cover(noisy_fit, adequate_fits):
    dense = frontier(noisy_fit, training, BUDGETS)
    figure = draw_allocation({"dense": dense})
    assert [ax.get_ylabel() for ax in figure.axes] == ["parameters N*", "training tokens D*"]
    ax = plot_allocation(new_figure()[1], {"dense": dense}, "N")
    band, covered = (c.get_paths()[0].vertices for c in ax.collections)
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [dense.low[0, 0], dense.high[-1, 0]])
    np.testing.assert_allclose([covered[:, 1].min(), covered[:, 1].max()], noisy_fit.ranges["N"])
    np.testing.assert_allclose([covered[:, 0].min(), covered[:, 0].max()], noisy_fit.ranges["C"])
    dlcm = frontier(adequate_fits["dlcm"], cost, np.geomspace(3e12, 1e15, 5))
    assert len(draw_allocation({"dlcm": dlcm, "dense": frontier(adequate_fits["dense"], cost, [3e12, 3e14])}).axes) == 4
    # full only where it is inside the data and identified
    full = plot_allocation(new_figure()[1], {"dlcm": dlcm}, "P").get_lines()[1].get_ydata()
    known = [s == "ok" and inside for s, inside in zip(dlcm.statuses["P"], dlcm.inside)]
    assert np.isfinite(full).tolist() == known
    assert 0 < sum(known) < 5
    with pytest.raises(UserError, match="R is held"):
        plot_allocation(new_figure()[1], {"dense": dense}, "R")
    with pytest.raises(UserError, match="'Q' is no coordinate"):
        plot_allocation(new_figure()[1], {"dense": dense}, "Q")
