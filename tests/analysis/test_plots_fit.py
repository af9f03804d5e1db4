"""Figures that judge a fit: what they draw against other ways to the same numbers."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import optimize, stats

from analysis import ResultsData, fit, laws
from analysis.identify import correlation_matrix
from analysis.objective import Problem
from analysis.plots import new_figure
from analysis.plots_fit import draw_fit, plot_correlations, plot_profile, plot_residuals
from analysis.profile import profile_curve
from dlcm.errors import UserError

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
NAMES = ["E", "A", "alpha", "B", "beta"]


def planted(noise=0.004, seed=0, misfit=0.0) -> ResultsData:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 3e9, 8), np.geomspace(1e9, 1e11, 6), indexing="ij"))
    loss = laws.CHINCHILLA.predict(TRUTH, N=N, D=D) * np.exp(np.random.default_rng(seed).normal(0, noise, len(N)))
    loss = loss * (1 + misfit * np.log(N / 1e8) ** 2)
    return ResultsData.from_arrays(N=N, D=D, C=6 * N * D, loss=loss)


def minimum(data: ResultsData, loss="log_mse"):
    problem = Problem.build(laws.CHINCHILLA, data, loss)
    result = fit(laws.CHINCHILLA, data, loss=loss, n_bootstrap=40)
    return problem, problem.theta(result.values), result


def test_a_profile_is_the_objective_with_the_constant_held_and_the_others_refitted():
    data = planted()
    problem, theta, result = minimum(data)
    curve = profile_curve(problem, theta, "alpha")
    least, spare = problem.objective(theta), len(data) - 5
    i = NAMES.index("alpha")
    others = np.arange(5) != i
    for at in range(4, len(curve.values), 9):

        def residuals(x, held=curve.values[at]):
            full = np.empty(5)
            full[others], full[i] = x, held
            return problem.residuals(full)

        refitted = optimize.least_squares(residuals, theta[others], xtol=1e-14, ftol=1e-14, gtol=1e-14)
        rise = (2 * refitted.cost - least) / least * spare / stats.f.ppf(0.95, 1, spare)
        assert curve.rises[at] == pytest.approx(rise, rel=1e-3, abs=1e-6)
    below = curve.values <= result.values["alpha"]
    low = np.interp(-1.0, -curve.rises[below], curve.values[below])
    assert low == pytest.approx(result["alpha"].profile[0], rel=2e-3)
    assert curve.rises.min() == 0.0
    assert curve.values[curve.rises.argmin()] == pytest.approx(result.values["alpha"])


def test_a_profile_that_cannot_be_made_is_refused():
    data = planted()
    problem, theta, _ = minimum(data)
    with pytest.raises(UserError, match="no profile of 'alhpa'; did you mean 'alpha'"):
        profile_curve(problem, theta, "alhpa")
    few = Problem.build(laws.CHINCHILLA, data.take([0, 7, 20, 33, 47]), "log_mse")
    with pytest.raises(UserError, match="5 runs leave nothing to scale a profile of alpha by"):
        profile_curve(few, theta, "alpha")


def test_correlations_are_those_of_scipys_covariance():
    data = planted()
    problem, theta, _ = minimum(data)

    def logs(_, E, a, alpha, b, beta):
        return np.log(
            E
            + np.exp(a) * (data.N / problem.scales["N"]) ** -alpha
            + np.exp(b) * (data.D / problem.scales["D"]) ** -beta
        )

    start = [theta[0] * problem.target_scale, theta[1] + np.log(problem.target_scale), theta[2]]
    start += [theta[3] + np.log(problem.target_scale), theta[4]]
    covariance = optimize.curve_fit(logs, data.N, np.log(data.loss), p0=start, xtol=1e-14, ftol=1e-14)[1]
    spread = np.sqrt(np.diag(covariance))
    matrix = correlation_matrix(problem.residuals_and_jacobian(theta)[1])
    np.testing.assert_allclose(matrix, covariance / np.outer(spread, spread), atol=2e-4)
    _, ax = new_figure()
    plot_correlations(ax, NAMES, matrix)
    np.testing.assert_array_equal(ax.images[0].get_array(), matrix)
    assert [t.get_text() for t in ax.get_yticklabels()] == NAMES
    assert len(ax.texts) == 20


@pytest.mark.many
@pytest.mark.parametrize("by", ["C", "N", "D", "loss"])
def test_residuals_are_measured_over_predicted_and_their_means_show_a_pattern(by):
    for misfit, shows in ((0.0, False), (0.003, True)):
        data = planted(misfit=misfit)
        result = fit(laws.CHINCHILLA, data, n_bootstrap=0)
        _, ax = new_figure()
        plot_residuals(ax, data, result, by=by)
        drawn = np.asarray(ax.collections[0].get_offsets())
        left = 100 * np.log(data.loss / result.predict(N=data.N, D=data.D))
        np.testing.assert_allclose(drawn, np.column_stack([data.values(by), left]))
        (means,) = ax.containers
        centre = np.asarray(means.lines[0].get_xydata())[:, 1]
        half = [np.ptp(np.asarray(s)[:, 1]) / 2 for s in means.lines[2][0].get_segments()]
        if by == "N":
            # eight sizes are cut into six groups
            assert len(centre) == 6
            assert bool(np.any(np.abs(centre) > 2 * np.array(half))) == shows
        if by == "D":
            groups = [left[d == data.D] for d in np.unique(data.D)]
            np.testing.assert_allclose(centre, [g.mean() for g in groups])
            np.testing.assert_allclose(half, [1.96 * g.std(ddof=1) / np.sqrt(8) for g in groups])


@pytest.mark.slow
def test_residuals_fall_back_to_n_where_flops_are_not_known_and_refuse_other_conventions():
    data = dataclasses.replace(planted(), C=np.full(48, np.nan))
    result = fit(laws.CHINCHILLA, data, n_bootstrap=0)
    _, ax = new_figure()
    plot_residuals(ax, data, result)
    assert ax.get_xlabel() == "parameters N"
    other = dataclasses.replace(data, convention=dataclasses.replace(data.convention, n="total"))
    with pytest.raises(UserError, match="conventions differ"):
        plot_residuals(ax, other, result)


@pytest.mark.slow
def test_a_profile_is_drawn_with_both_intervals_and_says_when_the_constant_is_not_identified():
    problem, theta, result = minimum(planted())
    _, ax = new_figure()
    plot_profile(ax, result, profile_curve(problem, theta, "beta"))
    beta = result["beta"]
    assert ax.get_title(loc="left") == (
        f"95%: profile {beta.profile[0]:.3g} to {beta.profile[1]:.3g}, bootstrap {beta.low:.3g} to {beta.high:.3g}"
    )
    bar = next(line for line in ax.lines if np.ptp(line.get_ydata()) == 0 and line.get_ydata()[0] < 0)
    np.testing.assert_allclose(bar.get_xdata(), [beta.low, beta.high])
    noisy, theta, result = minimum(planted(noise=0.2))
    assert not result["alpha"].identified
    plot_profile(ax, result, profile_curve(noisy, theta, "alpha"))
    assert ax.get_title(loc="left") == "not identified"


def test_the_figure_of_a_fit_has_a_panel_for_each_exponent_and_only_takes_its_own_runs():
    data = planted()
    result = fit(laws.CHINCHILLA, data, n_bootstrap=20)
    figure = draw_fit(data, result)
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels == ["parameters N", "measured loss (nats/token)", "training compute (FLOPs)", "", "alpha", "beta"]
    with pytest.raises(UserError, match="are not the runs of the fit"):
        draw_fit(planted(seed=1), result)


def test_a_law_of_another_target_is_drawn_too():
    R, N, stable = (v.ravel() for v in np.meshgrid([2.0, 4.0, 8.0], [1e6, 1e7, 1e8], np.linspace(3, 6, 4)))
    gain = 0.02 * stable**1.5 * R**0.2 * N**-0.05 * np.exp(np.random.default_rng(0).normal(0, 0.02, len(N)))
    data = ResultsData.from_arrays(
        N=N, D=1e9, R=R, P=0.5, loss=stable * (1 - gain), model=["dlcm"] * len(N), loss_nats_stable=stable
    )
    figure = draw_fit(data, fit(laws.DECAY_GAIN, data, n_bootstrap=0))
    assert figure.axes[0].get_xlabel() == "measured decay gain"
    measured = np.asarray(figure.axes[0].collections[0].get_offsets())[:, 0]
    np.testing.assert_allclose(measured, gain, rtol=1e-9)


@pytest.mark.slow
def test_the_verb_fit_draws_its_figure_and_refuses_a_file_that_is_none(run, write_results, demo_frame, tmp_path):
    path = write_results(demo_frame)
    options = ["fit", path, "--law", "chinchilla", "--bootstrap", "10"]
    code, text, error = run(*options, "--plot", tmp_path / "fit.svg")
    assert code == 0, error
    assert text.rstrip().endswith(f"-> {tmp_path / 'fit.svg'}")
    assert "<svg" in (tmp_path / "fit.svg").read_text(encoding="utf-8")[:1000]
    code, text, error = run(*options, "--n", "both", "--json", "--plot", tmp_path / "fit.png")
    assert code == 0, error
    files = json.loads(text)["plots"]
    assert files == [str(tmp_path / f"fit.{n}.png") for n in ("non_embedding", "total")]
    code, text, error = run(*options, "--plot", tmp_path / "fit.txt")
    assert code != 0
    assert "figures are written as .png, .svg, .pdf" in error
    assert not text
