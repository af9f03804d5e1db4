"""The profile route: vertices against closed forms and brute force, what is refused, intervals, and the check of a fitted law."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from analysis import ResultsData, fit, laws
from analysis.budget_groups import find_budgets
from analysis.growth import weighted_slope
from analysis.isoflop import isoflop
from analysis.isoflop_check import check_against
from analysis.plots import new_figure
from analysis.plots_isoflop import plot_isoflop, plot_vertices
from analysis.vertex import find_vertex, residuals, shared_skew, unit_error
from dlcm.errors import UserError
from tests.analysis.conftest import PLANTED_DLCM, cost
from tests.analysis.test_fit import epoch_data, shared

NEAR_EQUAL = {"E": 1.82, "A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366}
UNEQUAL = {"E": 1.8, "A": 900.0, "alpha": 0.25, "B": 8000.0, "beta": 0.45}
BUDGETS = np.array([1e18, 1e19, 1e20, 1e21])


def best_size(truth, C):
    """Closed form for C = 6 N D: the derivative of A N^-alpha + B (C / 6N)^-beta is 0."""
    a, b = truth["alpha"], truth["beta"]
    return (a * truth["A"] / (b * truth["B"])) ** (1 / (a + b)) * (C / 6) ** (b / (a + b))


def exponent(truth):
    return truth["beta"] / (truth["alpha"] + truth["beta"])


def planted(truth=NEAR_EQUAL, sizes=None, noise=0.0, seed=0, n=8, budgets=BUDGETS) -> ResultsData:
    """Sizes at each budget: the same at all of them, or by default within a factor 4 of its best, off centre by up to 1.35."""
    rng = np.random.default_rng(seed)
    off = np.exp(rng.uniform(-0.3, 0.3, len(budgets)))
    grid = [
        best_size(truth, C) * o * np.geomspace(0.25, 4, n) if sizes is None else sizes for C, o in zip(budgets, off)
    ]
    C = np.repeat(budgets, len(grid[0]))
    N = np.concatenate(grid)
    D = C / (6 * N)
    loss = laws.CHINCHILLA.predict(truth, N=N, D=D) * np.exp(rng.normal(0, noise, len(N)))
    return ResultsData.from_arrays(N=N, D=D, C=C, loss=loss)


def lopsided(**more) -> ResultsData:
    """The same sizes at every budget, as in a grid: each curve is cut elsewhere."""
    ends = best_size(UNEQUAL, BUDGETS[[0, -1]])
    return planted(UNEQUAL, sizes=np.geomspace(ends[0] / 8, ends[1] * 8, 22), **more)


# -- where a vertex is ------------------------------------------------------------------------------------------------


def test_the_vertex_of_a_parabola_is_exact():
    x = np.log(np.geomspace(1e7, 3e8, 7))
    y = 1.0 + 0.04 * (x - 17.3) ** 2
    found = find_vertex(x, np.stack([y, y + 0.01 * x]))
    assert found.place[0] == pytest.approx(17.3, abs=1e-9)
    assert found.place[1] == pytest.approx(17.3 - 0.01 / 0.08, abs=1e-9)
    assert found.curvature == pytest.approx(0.08)
    assert found.height[0] == pytest.approx(1.0)


def test_vertices_and_growth_of_a_planted_law_are_the_closed_form():
    found = isoflop(planted(), n_bootstrap=0)
    for profile in found.profiles:
        best = best_size(NEAR_EQUAL, profile.budget)
        assert profile.value == pytest.approx(best, rel=2e-3)
        assert profile.tokens == pytest.approx(profile.budget / (6 * profile.value), rel=1e-9)
        at_best = laws.CHINCHILLA.predict(NEAR_EQUAL, N=best, D=profile.budget / (6 * best))
        assert profile.loss == pytest.approx(float(at_best), rel=1e-4)
    assert found["N"].value == pytest.approx(exponent(NEAR_EQUAL), abs=1e-3)
    assert found["D"].value == pytest.approx(1 - exponent(NEAR_EQUAL), abs=1e-3)
    assert found["N"].coefficient * 1e20 ** found["N"].value == pytest.approx(best_size(NEAR_EQUAL, 1e20), rel=0.01)


def test_a_parabola_through_all_points_is_biased_and_the_vertices_are_not():
    data = lopsided()
    found = isoflop(data, n_bootstrap=0)
    best = best_size(UNEQUAL, BUDGETS)
    naive = [np.polyfit(p.curve.x, np.log(data.loss[p.curve.rows]), 2) for p in found.profiles]
    naive = np.array([np.exp(-c[1] / (2 * c[0])) for c in naive])
    np.testing.assert_allclose([p.others["parabola"] for p in found.profiles], naive, rtol=1e-6)
    # off by more than a quarter, and differently at each budget, so that the exponent is wrong by .03
    assert np.max(np.abs(naive / best - 1)) > 0.25
    slope = np.polyfit(np.log(BUDGETS), np.log(naive), 1)[0]
    assert slope - exponent(UNEQUAL) > 0.025
    np.testing.assert_allclose([p.value for p in found.profiles], best, rtol=1.5e-3)
    assert found["N"].value == pytest.approx(exponent(UNEQUAL), abs=2e-4)
    # a parabola in a window that goes with the vertex has the same small bias everywhere, which leaves the exponent alone
    off = np.array([p.others["local parabola"] for p in found.profiles]) / best - 1
    assert np.all((off < -0.05) & (off > -0.065))
    assert found["N"].spread[0] <= found["N"].value < slope - 0.02 < found["N"].spread[1]


def test_the_skew_of_a_sum_of_powers_is_the_difference_of_its_exponents():
    # of a exp(-alpha x) + b exp(beta x), third over second derivative at the minimum, for any a and b
    alpha, beta = 0.25, 0.45
    xs = [np.linspace(-1, 1, 41), np.linspace(-0.5, 1.5, 41)]
    ys = [np.exp(-alpha * x) / alpha + np.exp(beta * (x - shift)) / beta for x, shift in zip(xs, (0.0, 0.5))]
    parabolas = [find_vertex(x, y[None]) for x, y in zip(xs, ys)]
    skew = shared_skew(xs, [y[None] for y in ys], parabolas)
    assert skew[0] == pytest.approx(beta - alpha, rel=0.08)
    for x, y, place in zip(xs, ys, (0.0, beta * 0.5 / (alpha + beta))):
        assert find_vertex(x, y[None], skew).place[0] == pytest.approx(place, abs=2e-3)
    assert shared_skew(xs[:1], [ys[0][None]], parabolas[:1])[0] == 0.0


@pytest.mark.slow
def test_under_noise_the_lowest_run_is_several_times_farther_off_than_the_vertex():
    errors = {"lowest": [], "vertex": []}
    for seed in range(40):
        data = planted(noise=0.002, seed=seed)
        for profile in isoflop(data, n_bootstrap=0).profiles:
            best = best_size(NEAR_EQUAL, profile.budget)
            rows = profile.curve.rows
            errors["lowest"].append(np.log(data.N[rows][np.argmin(data.loss[rows])] / best))
            errors["vertex"].append(np.log(profile.value / best))
    rms = {name: np.sqrt(np.mean(np.square(v))) for name, v in errors.items()}
    assert rms["vertex"] < 0.05
    assert rms["lowest"] > 4 * rms["vertex"]


def test_runs_that_spent_more_or_less_are_brought_to_their_budget():
    # large models spent 4% too much, small ones 4% too little
    N = np.concatenate([best_size(NEAR_EQUAL, C) * np.geomspace(0.25, 4, 8) for C in BUDGETS])
    C = np.repeat(BUDGETS, 8) * np.tile(np.geomspace(0.96, 1.04, 8), 4)
    loss = laws.CHINCHILLA.predict(NEAR_EQUAL, N=N, D=C / (6 * N))
    found = isoflop(ResultsData.from_arrays(N=N, D=C / (6 * N), C=C, loss=loss), n_bootstrap=0)
    off = [np.log(p.value / best_size(NEAR_EQUAL, p.budget)) for p in found.profiles]
    raw = [find_vertex(p.curve.x, np.log(loss[p.curve.rows])[None]).place[0] for p in found.profiles]
    raw = [place - np.log(best_size(NEAR_EQUAL, p.budget)) for place, p in zip(raw, found.profiles)]
    assert np.max(np.abs(off)) < 0.01
    assert np.min(np.abs(raw)) > 0.03


# -- what belongs together --------------------------------------------------------------------------------------------


def test_budgets_are_where_most_runs_lie():
    rng = np.random.default_rng(0)
    dense = [c * np.exp(rng.uniform(-0.03, 0.03, 9)) for c in (1e18, 1e19, 1e20)]
    stray = [3e18, 4e18, 3e19]
    found = np.exp(find_budgets(np.log(np.concatenate([*dense, stray])), 2 * np.log1p(0.06)))
    np.testing.assert_allclose(found, [1e18, 1e19, 1e20], rtol=0.03)


def test_runs_off_every_budget_are_counted_and_given_budgets_are_used():
    data = planted(n=8)
    data.C[[0, 9]] *= 1.5
    found = isoflop(data, n_bootstrap=0)
    assert found.n_outside == 2
    assert [len(p.curve.rows) for p in found.profiles] == [7, 7, 8, 8]
    one = isoflop(data, budgets=[1e20], n_bootstrap=0)
    assert [p.budget for p in one.profiles] == [1e20]
    assert one.n_outside == len(data) - 8
    assert one["N"].value is None
    assert "1 profile with a vertex; 3 are needed" in one.report()


def dlcm_sweep(**columns) -> ResultsData:
    """Sizes at three budgets and four pairs of R and P, priced by the synthetic cost."""
    sizes = np.geomspace(1e5, 3e7, 10)
    C, R, P, N = (v.ravel() for v in np.meshgrid([1e13, 1e14, 1e15], [2.0, 8.0], [0.3, 0.6], sizes, indexing="ij"))
    D = C / cost(N, 1.0, R, P)
    loss = laws.COMPRESSION_AWARE.predict(PLANTED_DLCM, N=N, D=D, R=R, P=P)
    more = {name: value(len(N)) for name, value in columns.items()}
    return ResultsData.from_arrays(N=N, D=D, C=C, R=R, P=P, loss=loss, model=["dlcm"] * len(N), **more)


def best_on_line(C, *, over="N", **held):
    """Brute force: the least loss over one coordinate at a budget, D from the cost."""

    def loss(place):
        inputs = {**held, over: float(np.exp(place)) if over == "N" else place}
        D = C / cost(inputs["N"], 1.0, inputs["R"], inputs["P"])
        return float(laws.COMPRESSION_AWARE.predict(PLANTED_DLCM, D=D, **inputs))

    span = (np.log(1e5), np.log(1e8)) if over == "N" else (0.05, 0.95)
    found = optimize.minimize_scalar(loss, bounds=span, method="bounded", options={"xatol": 1e-9}).x
    return float(np.exp(found) if over == "N" else found)


@pytest.mark.slow
def test_profiles_hold_r_and_p_and_find_the_best_size_of_each():
    data = dlcm_sweep()
    result = fit(laws.COMPRESSION_AWARE.fix(t_t=0, t_c=0, t_d=0), data, n_bootstrap=0)
    found = check_against(isoflop(data, n_bootstrap=50), data, result)
    assert len(found.profiles) == 12
    ok = [p for p in found.profiles if p.is_ok]
    assert len(ok) >= 10
    for profile in ok:
        best = best_on_line(profile.budget, R=profile.held["R"], P=profile.held["P"])
        # attention's share of the cost, and with it the skew, differs between budgets
        assert profile.value == pytest.approx(best, rel=0.045)
    # the law's optimum is found along the runs' own line, without the cost function
    for at in found.check.budgets:
        assert at.surface == pytest.approx(best_on_line(at.budget, R=at.held["R"], P=at.held["P"]), rel=4e-3)
    held = [g.held for g in found.growth if g.name == "N"]
    assert held[0] == {"R": 2.0, "P": 0.3}
    assert held[-1] == {}
    assert found["N"].n_vertices == len(ok)


@pytest.mark.slow
def test_profiles_over_p_find_the_best_share_of_each_size():
    P = np.linspace(0.15, 0.85, 8)
    C, N, P = (v.ravel() for v in np.meshgrid([1e14, 3e14, 1e15, 3e15], [1e6, 2e6], P, indexing="ij"))
    D = C / cost(N, 1.0, 4.0, P)
    loss = laws.COMPRESSION_AWARE.predict(PLANTED_DLCM, N=N, D=D, R=4.0, P=P)
    data = ResultsData.from_arrays(N=N, D=D, C=C, R=4.0, P=P, loss=loss, model=["dlcm"] * len(N))
    result = fit(laws.COMPRESSION_AWARE.fix(t_t=0, t_c=0, t_d=0), data, n_bootstrap=0)
    found = check_against(isoflop(data, over="P", n_bootstrap=20), data, result)
    ok = [p for p in found.profiles if p.is_ok]
    assert len(ok) >= 4
    for profile in ok:
        best = best_on_line(profile.budget, over="P", N=profile.held["N"], R=4.0)
        assert profile.value == pytest.approx(best, abs=0.01)
    assert found.check.verdict in ("agree", "disagree")
    assert "P* changes by" in found.check.text


def test_boundary_kinds_are_never_in_one_profile():
    kinds = dlcm_sweep(boundary=lambda n: np.where(np.arange(n) % 2, "learned", "fixed"))
    held = {p.held["boundary"] for p in isoflop(kinds, n_bootstrap=0).profiles}
    assert held == {"learned", "fixed"}


# -- what is refused --------------------------------------------------------------------------------------------------


def one_profile(loss, n=8) -> ResultsData:
    N = np.geomspace(1e8, 1.6e9, n)
    return ResultsData.from_arrays(N=N, D=1e20 / (6 * N), C=1e20, loss=loss(np.log(N / 4e8)))


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda x: 3 - 0.1 * x + 0.01 * x**2, "still falls at the largest N (1.6e+09); its minimum lies beyond"),
        (lambda x: 3 + 0.1 * x + 0.01 * x**2, "still falls at the least N (1e+08); its minimum lies beyond"),
        (lambda x: 3 * np.exp(0.02 * (x - 1.18) ** 2), "1 size above its vertex at N = 1.3e+09; 2 are needed"),
        (lambda x: 3 * np.exp(0.02 * (x + 1.2) ** 2), "1 size below its vertex at N = 1.2e+08; 2 are needed"),
        (lambda x: 3 - 0.05 * (x - 0.3) ** 2, "still falls at the least N"),
        (lambda x: 3 + 0.02 * np.cos(2.6 * x), "the curve bends down; it has no minimum"),
    ],
)
def test_a_curve_without_a_vertex_is_refused_with_the_reason(loss, reason):
    profile = isoflop(one_profile(loss, n=9), n_bootstrap=0).profiles[0]
    assert profile.status == "refused"
    assert reason in profile.reason
    assert profile.value is None
    assert profile.reason in isoflop(one_profile(loss, n=9), n_bootstrap=0).report()


def test_four_sizes_are_too_few_however_many_seeds():
    N = np.repeat(np.geomspace(1e8, 8e8, 4), 3)
    loss = 3 + 0.05 * np.log(N / 2.5e8) ** 2
    found = isoflop(ResultsData.from_arrays(N=N, D=1e20 / (6 * N), C=1e20, loss=loss))
    assert found.profiles[0].reason == "4 sizes; 5 are needed"


def test_a_dip_that_is_noise_is_refused_and_the_same_dip_without_noise_is_not():
    noise = np.random.default_rng(1).normal(0, 0.01, 9)
    noisy, clean = (
        isoflop(one_profile(lambda x, e=e: (3 + 0.004 * x**2) * np.exp(e), n=9)).profiles[0] for e in (noise, 0 * noise)
    )
    assert clean.is_ok
    assert noisy.status == "refused"
    assert "not told from noise" in noisy.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "Q"}, "run over N, R or P"),
        ({"over": "P"}, "dense runs have P = 0"),
        ({"tolerance": 2.0}, "tolerance = 2"),
        ({"budgets": [-1.0]}, "give training FLOPs above 0"),
        ({"budgets": [1e25]}, "no 5 runs lie within 6% of one budget"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        isoflop(planted(), **options)


def test_data_that_hold_no_profiles_are_refused(demo_frame, write_results):
    from analysis import load_results

    with pytest.raises(UserError, match="say whose profiles"):
        isoflop(load_results(write_results(demo_frame)))
    data = planted()
    with pytest.raises(UserError, match="C of the runs are not known"):
        isoflop(dataclasses.replace(data, C=np.full(len(data), np.nan)))


# -- intervals --------------------------------------------------------------------------------------------------------


def test_unit_error_is_the_scatter_of_vertices_under_equal_errors():
    x = np.log(np.geomspace(1e8, 2e9, 9))
    y = 1 + 0.03 * (x - np.log(4e8)) ** 2
    vertex = find_vertex(x, y[None])
    noise = 1e-4
    drawn = find_vertex(x, y + np.random.default_rng(0).normal(0, noise, (4000, 9)))
    # the window moves with the vertex, which the formula leaves out
    assert drawn.place.std() / noise == pytest.approx(unit_error(x, vertex), rel=0.1)


def test_residuals_are_scaled_by_the_leverage_of_weighted_least_squares():
    x = np.log(np.geomspace(1e8, 2e9, 9))
    y = 1 + 0.03 * (x - np.log(4e8)) ** 2 + np.random.default_rng(1).normal(0, 1e-3, 9)
    vertex = find_vertex(x, y[None])
    plain, scaled = residuals(x, y[None], vertex)
    W = np.diag(vertex.weights[0])
    X = np.stack([np.ones(9), x - 20, (x - 20) ** 2], axis=1)
    hat = X @ np.linalg.inv(X.T @ W @ X) @ X.T @ W
    np.testing.assert_allclose(plain, y - hat @ y, atol=1e-9)
    np.testing.assert_allclose(scaled, (y - hat @ y) / (1 - np.diag(hat)), atol=1e-8)


@pytest.mark.slow
def test_intervals_hold_the_planted_vertices_and_exponent():
    hits = {"vertex": [], "exponent": []}
    for seed in range(60):
        found = isoflop(planted(noise=0.002, seed=seed), n_bootstrap=200, seed=seed)
        hits["vertex"] += [p.low <= best_size(NEAR_EQUAL, p.budget) <= p.high for p in found.profiles if p.is_ok]
        hits["exponent"].append(found["N"].low <= exponent(NEAR_EQUAL) <= found["N"].high)
    # errors of a share of 0.95: 0.014 over 240 vertices, 0.028 over 60 exponents
    assert 0.90 <= np.mean(hits["vertex"]) <= 0.98
    assert np.mean(hits["exponent"]) >= 0.90


def test_budgets_that_share_a_trunk_move_together_in_the_bootstrap():
    data = planted(sizes=np.geomspace(3e7, 3e9, 14), budgets=np.array([1e19, 1.2e19, 1.44e19, 1.7e19]))
    errors = np.tile(np.random.default_rng(0).normal(0, 0.002, 14), 4)  # a size errs alike at every budget
    data = dataclasses.replace(data, loss=data.loss * np.exp(errors))
    trunks = [f"trunk{i % 14}" for i in range(len(data))]
    shared_trunks = ResultsData.from_arrays(N=data.N, D=data.D, C=data.C, loss=data.loss, trunk=trunks)
    spread = {}
    for name, rows in (("apart", data), ("shared", shared_trunks)):
        found = isoflop(rows, n_bootstrap=400)
        width = found["N"].high - found["N"].low
        spread[name] = (np.nanmean(found.replicates, axis=1).std(), width)
    assert spread["shared"][0] > 1.3 * spread["apart"][0]
    assert spread["shared"][1] != spread["apart"][1]


def test_a_shared_slope_is_that_of_regression_with_an_intercept_each():
    rng = np.random.default_rng(0)
    x, groups, weights = rng.normal(size=9), np.repeat([0, 1, 2], 3), rng.uniform(0.5, 2, 9)
    y = 0.4 * x + np.array([1.0, -2.0, 5.0])[groups] + rng.normal(0, 0.1, 9)
    columns = np.column_stack([x, *(groups == g for g in range(3))])
    root = np.sqrt(weights)
    expected = np.linalg.lstsq(columns * root[:, None], y * root, rcond=None)[0]
    slope, left = weighted_slope(x, y[None], weights, groups)
    assert slope[0] == pytest.approx(expected[0])
    np.testing.assert_allclose(left[0], y - columns @ expected, atol=1e-12)
    y[4] = np.nan
    kept = np.arange(9) != 4
    expected = np.linalg.lstsq((columns * root[:, None])[kept], (y * root)[kept], rcond=None)[0]
    assert weighted_slope(x, y[None], weights, groups)[0][0] == pytest.approx(expected[0])


# -- beside a fitted law ----------------------------------------------------------------------------------------------


def checked(data, law=laws.CHINCHILLA, **options):
    return check_against(isoflop(data, **options), data, fit(law, data, n_bootstrap=0))


@pytest.mark.slow
def test_a_true_law_agrees_and_its_own_optimum_is_the_closed_form():
    found = checked(planted(noise=0.002, seed=1), n_bootstrap=300)
    check = found.check
    assert check.verdict == "agree"
    result = fit(laws.CHINCHILLA, planted(noise=0.002, seed=1), n_bootstrap=0)
    for at in check.budgets:
        assert at.surface == pytest.approx(best_size(result.values, at.budget), rel=1e-4)
        assert at.apart.value == pytest.approx(at.vertex / at.surface, rel=1e-9)
        assert not at.apart.is_told
    assert check.growth[0].surface == pytest.approx(exponent(result.values), abs=1e-4)
    # the bias of the rule, as it is: noise-free runs of the fitted law
    clean = dataclasses.replace(
        planted(noise=0.002, seed=1), loss=laws.CHINCHILLA.predict(result.values, N=found_n(found), D=found_d(found))
    )
    for at, profile in zip(check.budgets, isoflop(clean, n_bootstrap=0).profiles):
        assert at.bias == pytest.approx(profile.value / at.surface, rel=1e-6)
        assert at.parabola_bias == pytest.approx(profile.others["parabola"] / at.surface, rel=1e-6)
    assert "The profiles and chinchilla agree." in found.report()
    json.dumps(found.to_dict(), allow_nan=False)


def found_n(found):
    return np.concatenate([np.exp(p.curve.x) for p in found.profiles])


def found_d(found):
    return np.concatenate([np.exp(p.curve.log_tokens) for p in found.profiles])


def test_the_difference_of_the_two_routes_is_better_known_than_if_they_had_other_runs():
    found = checked(planted(noise=0.002, seed=2), n_bootstrap=400)
    growth = found.check.growth[0]
    vertices, surface, apart = (
        high - low
        for low, high in (
            (found["N"].low, found["N"].high),
            (growth.low, growth.high),
            (growth.apart.low, growth.apart.high),
        )
    )
    assert apart < 0.95 * np.hypot(vertices, surface)


@pytest.mark.slow
def test_a_law_that_does_not_hold_is_said_to_disagree_and_where():
    # at the least budget a model learns as one of half its size does: its N* doubles, and no Chinchilla surface follows
    data = planted(noise=0.001, n=12)
    size = data.N * np.where(data.C < 5e18, 0.5, 1.0)
    loss = laws.CHINCHILLA.predict(NEAR_EQUAL, N=size, D=data.D)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.001, len(data)))
    data = dataclasses.replace(data, loss=loss * noise)
    check = checked(data, n_bootstrap=300).check
    assert check.verdict == "disagree"
    assert "The profiles and chinchilla" in check.text
    assert "DISAGREE" in check.text
    assert "One of the two is wrong" in check.text
    assert [b.apart.is_told for b in check.budgets] == [True, False, False, False]
    assert "1 of 4 budgets differ beyond sampling, most 1e+18 FLOPs" in check.text


@pytest.mark.slow
def test_a_fit_of_other_runs_or_without_tokens_is_not_compared():
    data = planted(noise=0.002)
    found = isoflop(data, n_bootstrap=20)
    with pytest.raises(UserError, match="are of different runs"):
        check_against(found, data, fit(laws.CHINCHILLA, data.take(np.arange(20)), n_bootstrap=0))
    with pytest.raises(UserError, match="without a bootstrap"):
        check_against(isoflop(data, n_bootstrap=0), data, fit(laws.CHINCHILLA, data, n_bootstrap=0))
    without_tokens = fit(laws.CHINCHILLA.apply(laws.Change("drop", "B")), data, n_bootstrap=0)
    with pytest.raises(UserError, match="no loss of N and D"):
        check_against(found, data, without_tokens)


@pytest.mark.slow
def test_published_runs_give_the_published_exponent_by_profiles():
    """Hoffmann et al. 2022, table 2: isoFLOP profiles give 0.49 (0.462, 0.534); the surface of these points gives 0.514."""
    found = checked(epoch_data(), n_bootstrap=300)
    growth = found["N"]
    assert growth.n_vertices >= 7
    assert growth.low < 0.49 + 0.022
    assert growth.low <= 0.514 <= growth.high
    assert 0.46 < growth.value < 0.55
    assert found.check.growth[0].apart.low < 0 < found.check.growth[0].apart.high
    # their budgets: 6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21, read off a figure
    known = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21])
    budgets = np.array([p.budget for p in found.profiles if p.is_ok])
    assert np.all(np.min(np.abs(np.log(known[:, None] / budgets)), axis=1) < 0.12)


# -- plots and the command line ---------------------------------------------------------------------------------------


def test_the_plots_show_every_run_and_each_vertex():
    found = checked(planted(noise=0.002), n_bootstrap=50)
    _, ax = new_figure()
    plot_isoflop(ax, found)
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    for profile in found.profiles:
        runs = np.column_stack([np.exp(profile.curve.x), profile.losses])
        assert all(np.isclose(drawn, point, rtol=1e-9).all(axis=1).any() for point in runs)
        assert np.isclose(drawn, (profile.value, profile.loss), rtol=1e-9).all(axis=1).any()
    _, ax = new_figure()
    plot_vertices(ax, found)
    assert ax.get_legend_handles_labels()[1][0] == "vertices"
    with pytest.raises(UserError, match="nothing to draw"):
        plot_isoflop(ax, found, held={"R": 3.0})


@pytest.mark.slow
def test_the_verb_isoflop_prints_text_or_json_and_draws(run, write_results, tmp_path):
    data = planted(noise=0.002)
    frame = pd.DataFrame({"params": data.N, "flops": data.C, "loss": data.loss})
    path = write_results(frame, "own.csv")
    options = [path, "--columns", "N=params,C=flops,D=C/(6*N),loss=loss", "--bootstrap", "100"]
    code, text, error = run("isoflop", *options, "--plot", tmp_path / "iso.png")
    assert code == 0, error
    assert "4 of 4 have a vertex" in text
    assert "The profiles and chinchilla" in text
    assert (tmp_path / "iso.png").stat().st_size > 1000
    code, text, error = run("isoflop", *options, "--json", "--law", "none")
    found = json.loads(text)["profiles"][0]
    assert found["check"] is None
    assert found["growth"][0]["value"] == pytest.approx(isoflop(data, n_bootstrap=0)["N"].value, rel=1e-6)
    code, _, error = run("isoflop", *options, "--budget", "1e30")
    assert code != 0
    assert "no 5 runs lie within 6%" in error
    assert "--tolerance" in error


@pytest.mark.slow
def test_the_verb_isoflop_takes_each_family_of_a_sweep(run, write_results, adequate_frame):
    path = write_results(adequate_frame)
    code, text, error = run("isoflop", path, "--bootstrap", "50", "--json", "--tolerance", "0.1")
    assert code == 0, error
    assert [p["family"] for p in json.loads(text)["profiles"]] == ["dense", "dlcm"]


def test_shared_data_are_read_from_elsewhere():
    assert shared("chinchilla_epoch.csv").exists()
