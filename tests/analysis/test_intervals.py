"""Intervals by two ways, against theory where theory is exact, and what they are drawn over."""

import numpy as np
import pytest
from scipy import optimize, stats

from analysis import ResultsData, fit, laws
from analysis.bootstrap import bootstrap, draw_weights, weight_variance, without_offsets
from analysis.intervals import interval
from analysis.objective import Problem
from analysis.profile import profile_intervals

LINEAR = laws.CHINCHILLA.fix(alpha=0.35, beta=0.37)
TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def planted(noise=0.004, n=40, seed=0, **columns) -> ResultsData:
    rng = np.random.default_rng(seed)
    N, D = 10 ** rng.uniform(7, 9, n), 10 ** rng.uniform(8.3, 10.3, n)
    loss = laws.CHINCHILLA.predict(TRUTH, N=N, D=D) * np.exp(rng.normal(0, noise, n))
    return ResultsData.from_arrays(N=N, D=D, loss=loss, **columns)


@pytest.mark.parametrize("n", [39, 200, 1000])
def test_one_draw_more_falls_into_the_interval_as_often_as_asked_for(n):
    """Of n draws the r-th has expected rank r / (n + 1) among all; numpy's own percentiles are too near the middle."""
    ranks = np.arange(1, n + 1) / (n + 1)
    low, high = interval(ranks)
    assert (low, high) == pytest.approx((0.025, 0.975), abs=1e-12)
    naive = np.percentile(ranks, [2.5, 97.5])
    assert naive[1] - naive[0] < 0.95 * (1 - 1 / n)


def test_intervals_of_draws_that_are_not_numbers_or_infinite():
    draws = np.array([np.nan, *range(1, 40)])
    assert interval(draws, ignore_nan=True) == pytest.approx((1.0, 39.0))
    low, high = interval(np.array([-np.inf] * 5 + list(range(100))), between=False)
    assert low == -np.inf
    assert high == pytest.approx(97, abs=1.5)


def test_profile_of_least_squares_is_the_t_interval_of_linear_regression():
    """With the exponents held and squared errors the law is linear in E: its interval is known in closed form."""
    data = planted()
    result = fit(LINEAR, data, loss="mse", n_bootstrap=0)
    X = np.column_stack([np.ones(len(data)), data.N**-0.35, data.D**-0.37])
    coefficients, squares, *_ = np.linalg.lstsq(X, data.loss, rcond=None)
    error = np.sqrt(squares[0] / (len(data) - 3) * np.linalg.inv(X.T @ X)[0, 0])
    half = stats.t.ppf(0.975, len(data) - 3) * error
    assert result.values["E"] == pytest.approx(coefficients[0], rel=1e-9)
    assert result["E"].profile == pytest.approx((coefficients[0] - half, coefficients[0] + half), rel=1e-5)


def test_profile_ends_are_where_the_refitted_objective_has_risen_to_the_limit():
    """By brute force: alpha held at each end, the others refitted by another optimiser."""
    problem = Problem.build(laws.CHINCHILLA, planted(), "log_mse")
    theta = problem.theta(fit(laws.CHINCHILLA, planted(), loss="log_mse", n_bootstrap=0).values)
    least = problem.penalties(problem.residuals(theta)).sum()
    limit = least * (1 + stats.f.ppf(0.95, 1, len(problem) - 5) / (len(problem) - 5))
    i = [p.name for p in problem.law.free].index("alpha")
    others = np.arange(5) != i
    for end in profile_intervals(problem, theta)["alpha"]:

        def residuals(x, end=end):
            full = np.empty(5)
            full[others], full[i] = x, end
            return problem.residuals(full)

        refitted = optimize.least_squares(residuals, theta[others], xtol=1e-14, ftol=1e-14, gtol=1e-14)
        assert 2 * refitted.cost == pytest.approx(limit, rel=2e-2 * (limit / least - 1))


def test_a_profile_that_has_no_end_is_open_and_one_of_nothing_is_nothing():
    problem = Problem.build(LINEAR, planted(), "log_mse")
    theta = problem.theta(fit(LINEAR, planted(), loss="log_mse", n_bootstrap=0).values)
    # so high a level asks for more than the 8 standard errors that are looked at
    assert profile_intervals(problem, theta, level=1 - 1e-13)["E"][1] == np.inf
    amplitudes = LINEAR.fix(E=1.8)
    result = fit(amplitudes, planted(), n_bootstrap=0)
    assert [p.profile for p in result.parameters] == [None] * 5


def test_the_bootstrap_of_least_squares_scatters_as_theory_says():
    """One constant, the mean of log losses: its standard error is s / sqrt(n), and its quantiles are Student's."""
    law = laws.CHINCHILLA.apply(*(laws.Change("drop", name) for name in ("A", "B")))
    rng = np.random.default_rng(0)
    loss = 3 * np.exp(rng.normal(0, 0.01, 12))
    problem = Problem.build(law, ResultsData.from_arrays(N=1e8, D=1e9, loss=loss), "log_mse")
    theta = np.array([np.exp(np.log(problem.target).mean())])
    draws = bootstrap(problem, theta, [str(i) for i in range(12)], n=4000, rng=rng)
    students = stats.t.ppf(0.975, 11) / stats.norm.ppf(0.975)
    assert np.log(draws).std() == pytest.approx(students * np.log(loss).std(ddof=1) / np.sqrt(12), rel=0.04)


def test_weights_have_the_mean_and_the_variance_asked_for():
    weights = draw_weights([str(i) for i in range(40)], 20000, np.random.default_rng(0), variance=1.25)
    assert weights.mean(axis=1) == pytest.approx(1.0, abs=1e-12)
    # scaled to a fixed sum, gamma variates of shape a are Dirichlet: variance (n - 1) / (n a + 1)
    assert weights.var(axis=0).mean() == pytest.approx(39 / (40 / 1.25 + 1), rel=0.03)


@pytest.mark.parametrize("loss", ["log_mse", "log_huber"])
@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_weights_are_those_of_squares_as_far_as_residuals_lie_within_delta(noise, loss):
    problem, theta = with_offsets(noise)
    problem = problem.with_loss(loss)
    least_squares = 108 / 96 * (stats.t.ppf(0.975, 97) / stats.norm.ppf(0.975)) ** 2
    # delta is 1e-3
    within = 1.0 if loss == "log_mse" else 2 * stats.norm.cdf(1e-3 / noise) - 1
    found = weight_variance(problem, theta, 108)
    assert found == pytest.approx(within * least_squares + (1 - within) * 0.8, abs=0.1 * (least_squares - 0.8))


def test_weights_of_hardly_more_runs_than_constants_are_not_all_on_one_run():
    problem, theta = with_offsets()
    assert weight_variance(problem, theta, 5) < 10
    assert draw_weights(list("abcde"), 1000, np.random.default_rng(0), 9.0).max(axis=1).min() < 5


@pytest.mark.slow
def test_runs_of_one_trunk_get_one_weight_and_widen_the_interval():
    """Four branches of a trunk that share its error are one observation of it."""
    rng = np.random.default_rng(2)
    N = np.geomspace(1e7, 1e9, 12).repeat(4)
    D = np.tile(np.geomspace(2e8, 2e10, 4), 12)
    errors = rng.normal(0, 0.01, 12).repeat(4) + rng.normal(0, 0.0005, 48)
    loss = laws.CHINCHILLA.predict(TRUTH, N=N, D=D) * np.exp(errors)
    runs = [f"r{i}" for i in range(48)]
    trunk = [None if i % 4 == 3 else f"r{i - i % 4 + 3}" for i in range(48)]
    apart = ResultsData.from_arrays(N=N, D=D, loss=loss, run_id=runs)
    shared = ResultsData.from_arrays(N=N, D=D, loss=loss, run_id=runs, trunk=trunk)
    assert len(set(shared.clusters)) == 12
    weights = draw_weights(shared.clusters, 3, rng)
    assert np.all(weights.reshape(3, 12, 4) == weights.reshape(3, 12, 4)[:, :, :1])
    widths = [
        r["alpha"].high - r["alpha"].low for r in (fit(laws.CHINCHILLA, d, n_bootstrap=400) for d in (apart, shared))
    ]
    assert widths[1] > 1.2 * widths[0]


@pytest.mark.slow
def test_the_seed_alone_decides_the_replicates_however_many_threads_there_are(monkeypatch):
    first = fit(laws.CHINCHILLA, planted(), n_bootstrap=300, seed=4).replicates
    monkeypatch.setattr("analysis.ensemble.n_processors", lambda: 1)
    np.testing.assert_array_equal(fit(laws.CHINCHILLA, planted(), n_bootstrap=300, seed=4).replicates, first)
    assert not np.array_equal(fit(laws.CHINCHILLA, planted(), n_bootstrap=300, seed=5).replicates, first)


OFFSETS = {
    "E0": 1.8, "A_t": 250.0, "d1": 0.34, "A_c": 60.0, "g": 0.35, "d2": 0.30, "A_d": 2000.0, "a": 0.366,
    "t_t": 0.0, "t_c": 0.0, "t_d": 0.0,
}  # fmt: skip


def with_offsets(noise=0.003, **offsets) -> tuple[Problem, np.ndarray]:
    """A grid of 108 cells under eq 22, and the answer of the whole law."""
    levels = ([5e7, 2.5e8, 1.25e9], [1e9, 4e9, 1.6e10, 6.4e10], [2.0, 4.0, 8.0], [0.3, 0.55, 0.8])
    N, D, R, P = (a.ravel() for a in np.meshgrid(*levels, indexing="ij"))
    law, truth = laws.COMPRESSION_AWARE, OFFSETS | offsets
    errors = np.random.default_rng(3).normal(0, noise, len(N))
    loss = law.predict(truth, N=N, D=D, R=R, P=P) * np.exp(errors)
    data = ResultsData.from_arrays(N=N, D=D, R=R, P=P, loss=loss)
    problem = Problem.build(law, data, "log_mse")
    return problem, problem.theta(fit(law, data, loss="log_mse", n_bootstrap=0, reduce=False).values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted_offsets", "may_be_zero"),
    [({}, {"t_t", "t_c", "t_d"}), ({"t_d": 3e9}, {"t_t", "t_c"}), ({"t_t": 3e8, "t_c": 3e8, "t_d": 3e9}, set())],
)
def test_offsets_that_may_be_zero_are_those_that_an_f_test_by_another_optimiser_leaves(planted_offsets, may_be_zero):
    problem, theta = with_offsets(**planted_offsets, noise=0.0005 if planted_offsets else 0.003)
    found = without_offsets(problem, theta)
    names = [p.name for p in problem.law.free]
    assert {n for n, held in zip(names, found[0] if found else []) if held} == may_be_zero
    if found is not None:
        held, there = found
        small = problem.with_law(*(laws.Change("fix", n, value=0.0, reason="test") for n in may_be_zero))
        spare = len(problem) - len(theta)
        full = optimize.least_squares(problem.residuals, theta, bounds=problem.bounds(), xtol=1e-12)
        less = optimize.least_squares(small.residuals, there[~held], bounds=small.bounds(), xtol=1e-12)
        assert problem.objective(there) == pytest.approx(2 * less.cost, rel=1e-4)
        f = (less.cost - full.cost) / len(may_be_zero) / (full.cost / spare)
        assert f < stats.f.ppf(0.95, len(may_be_zero), spare)


@pytest.mark.slow
def test_where_an_offset_may_be_zero_a_third_of_the_refits_hold_it_there():
    clusters = [str(i) for i in range(108)]
    problem, theta = with_offsets()
    draws = bootstrap(problem, theta, clusters, n=101, rng=np.random.default_rng(0))
    offsets = [i for i, p in enumerate(problem.law.free) if p.kind == "offset"]
    at_zero = (draws[:, offsets] == problem.bounds()[0][offsets]).all(axis=1)
    assert at_zero[::3].all()
    assert not at_zero[1::3].all()
    assert not at_zero[2::3].all()
    held = problem.with_law(*(laws.Change("fix", n, value=0.0, reason="test") for n in ("t_t", "t_c", "t_d")))
    variance = weight_variance(problem, theta, 108, at_zero=True)
    assert variance > weight_variance(problem, theta, 108)
    weights = draw_weights(clusters, 101, np.random.default_rng(0), variance)
    again = optimize.least_squares(
        lambda x: np.sqrt(weights[0]) * held.residuals(x), np.delete(theta, offsets), xtol=1e-12, x_scale="jac"
    )
    np.testing.assert_allclose(np.delete(draws[0], offsets), again.x, rtol=2e-3, atol=2e-3)
