import json

import numpy as np
import pytest
from scipy import optimize, stats
from typer.testing import CliRunner

from analysis import ResultsData, fit, laws
from analysis.bootstrap import draw_weights, weight_variance
from analysis.commands import app
from analysis.descent import minimise
from analysis.growth import allocation_exponent
from analysis.holdout import hold_out, leave_levels_out
from analysis.laws import Change
from analysis.nested import nested_test
from analysis.objective import Problem
from analysis.plots import new_figure
from analysis.plots_fit import plot_hold_outs
from analysis.validate import candidates, choose, label_law, parse_law
from dlcm.errors import UserError

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
STAR = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
PAIR = ("chinchilla", "chinchilla:beta=alpha")
DLCM = {
    "E0": 1.6, "A_t": 140.0, "t_t": 0.0, "d1": 0.26, "A_c": 60.0, "g": 0.22, "t_c": 0.0, "d2": 0.25, "A_d": 1200.0,
    "t_d": 0.0, "a": 0.33,
}  # fmt: skip


def isoflop_data(seed=0, noise=0.004, excess=0.0, per_budget=8) -> ResultsData:
    """Eight sizes around the best at each of six budgets; `excess` raises the loss of small budgets, most of their large models."""
    C = np.repeat([1e18, 3e18, 1e19, 3e19, 1e20, 3e20], per_budget)
    middle = 0.1 * np.sqrt(C)
    N = middle * np.tile(np.geomspace(0.25, 4, per_budget), 6)
    D = C / (6 * N)
    loss = laws.CHINCHILLA.predict(TRUTH, N=N, D=D) * (1 + excess * (C / 1e18) ** -0.5 * N / middle)
    drawn = np.random.default_rng(seed).normal(0, noise, len(N))
    return ResultsData.from_arrays(N=N, D=D, C=C, loss=loss * np.exp(drawn))


def plain_residuals(x, N, D, loss, tied=False):
    E, a, alpha, b, *rest = x
    beta = alpha if tied else rest[0]
    return np.log((E + np.exp(a) * (N / 1e8) ** -alpha + np.exp(b) * (D / 1e9) ** -beta) / loss)


def plain_least_squares(data, tied=False):
    """Residuals of scipy's own fit of a Chinchilla law, written out anew."""
    start = [1.8, np.log(480 * 1e8**-0.35), 0.35, np.log(2100 * 1e9**-0.37)] + ([] if tied else [0.37])
    args = (data.N, data.D, data.loss, tied)
    answer = optimize.least_squares(plain_residuals, start, args=args, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    return answer.fun, len(start)


@pytest.mark.slow
def test_aicc_is_that_of_a_least_squares_fit_written_out():
    data = isoflop_data(seed=4)
    choice = choose(PAIR, data, n_bootstrap=0, n_draws=0)
    assert choice.errors == "gaussian"
    expected = {}
    for label, tied in (("chinchilla", False), ("chinchilla, beta = alpha", True)):
        residuals, k = plain_least_squares(data, tied)
        n, k = len(residuals), k + 1
        log_likelihood = stats.norm.logpdf(residuals, scale=np.sqrt(np.mean(residuals**2))).sum()
        expected[label] = -2 * log_likelihood + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        assert choice[label].aicc == pytest.approx(expected[label], abs=1e-4)
        assert choice[label].n_constants == k
    difference = expected["chinchilla, beta = alpha"] - expected["chinchilla"]
    assert choice["chinchilla, beta = alpha"].behind == pytest.approx(difference, abs=1e-4)
    assert choice["chinchilla"].weight == pytest.approx(1 / (1 + np.exp(-difference / 2)), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 8, 9])
def test_the_law_is_not_chosen_by_the_error_of_hold_outs(seed):
    # the exponents differ; on these draws the law that ties them predicts the largest budgets better all the same
    choice = choose(PAIR, isoflop_data(seed), n_bootstrap=0, n_draws=0)
    naive = min(choice.scores, key=lambda s: s.hold_out_error)
    assert naive.label == "chinchilla, beta = alpha"
    assert choice.chosen.label == "chinchilla"
    assert "Hold-outs disagree: chinchilla, beta = alpha predicts" in choice.sentence
    assert "The data support chinchilla over chinchilla, beta = alpha (AICc" in choice.sentence


@pytest.mark.slow
def test_a_small_hold_out_error_does_not_hide_that_the_allocation_drifts():
    choice = choose(["chinchilla"], isoflop_data(0, noise=0.002, excess=0.02), n_bootstrap=100, n_draws=0)
    score = choice.chosen
    # by its hold-outs this fit is excellent at every cut
    assert all(h.error < 0.006 for h in score.holdouts)
    star = next(d for d in score.drifts if d.name == "N*")
    # and yet the exponent is wrong by 0.04 and more, and falls towards the true one as larger budgets come in
    assert all(v - STAR > 0.04 for v in star.at_cuts)
    assert star.at_cuts[0] > star.at_cuts[1] > star.at_cuts[2] > star.value
    assert star.drifts
    assert "Exponents drift more than sampling explains: N* 0.5" in choice.sentence


@pytest.mark.slow
def test_without_a_misfit_nothing_is_said_to_drift():
    choice = choose(["chinchilla"], isoflop_data(5, noise=0.002), n_bootstrap=100, n_draws=0)
    assert not any(d.drifts for d in choice.chosen.drifts)
    assert "moves no more than sampling explains: N* 0.5" in choice.sentence


@pytest.mark.slow
def test_a_hold_out_is_the_fit_of_the_runs_below_the_cut_and_its_error_beyond():
    data = isoflop_data(3)
    problem = Problem.build(laws.CHINCHILLA, data, "log_mse")
    theta = problem.theta(TRUTH)
    found, _ = hold_out(problem, theta, data, np.random.default_rng(0), cuts=(1e19, 1e20))
    for one in found:
        below = one.cut >= data.C
        plain = fit(laws.CHINCHILLA, data.take(below), loss="log_mse", n_bootstrap=0)
        predicted = plain.predict(N=data.N[~below], D=data.D[~below])
        residuals = np.log(predicted / data.loss[~below])
        assert (one.n_train, one.n_held) == (below.sum(), (~below).sum())
        assert one.error == pytest.approx(np.sqrt(np.mean(residuals**2)), rel=1e-4)
        assert one.bias == pytest.approx(residuals.mean(), rel=1e-3, abs=1e-7)
        np.testing.assert_allclose(one.predicted, predicted, rtol=1e-6)
        assert one.exponents["alpha"] == pytest.approx(plain.values["alpha"], rel=1e-3)
        star = plain.values["beta"] / (plain.values["alpha"] + plain.values["beta"])
        assert one.exponents["N*"] == pytest.approx(star, rel=1e-3)


def test_default_cuts_lie_between_budgets_and_leave_half_to_four_fifths_of_the_runs():
    data = isoflop_data(3)
    problem = Problem.build(laws.CHINCHILLA, data)
    found, _ = hold_out(problem, problem.theta(TRUTH), data, np.random.default_rng(0))
    assert [h.cut for h in found] == pytest.approx([1e19, 3e19, 1e20])
    assert [h.n_train for h in found] == [24, 32, 40]


@pytest.mark.slow
def test_one_budget_cannot_be_held_out_and_that_is_said():
    data = isoflop_data(3).take(np.arange(8))
    choice = choose(["chinchilla"], data, n_bootstrap=0, n_draws=0)
    assert not choice.chosen.holdouts
    assert "No hold-out" in choice.sentence


def grid(noise=0.0, seed=0) -> ResultsData:
    N, P, R, D = np.array(
        np.meshgrid([1e7, 4e7, 1.6e8, 6e8], [0.3, 0.5, 0.7], [2.0, 4.0, 8.0], [2e9, 8e9, 3e10, 1e11])
    ).reshape(4, -1)
    loss = laws.COMPRESSION_AWARE.predict(DLCM, N=N, D=D, R=R, P=P)
    drawn = np.random.default_rng(seed).normal(0, noise, len(N))
    return ResultsData.from_arrays(N=N, D=D, R=R, P=P, loss=loss * np.exp(drawn), model=["dlcm"] * len(N))


@pytest.mark.slow
def test_each_level_of_each_axis_is_left_out_in_turn_and_predicted_from_the_rest():
    data, law = grid(noise=0.003), parse_law("compression_aware:t_t=0,t_c=0,t_d=0")
    problem = Problem.build(law, data, "log_mse")
    theta = problem.theta(DLCM)
    found = leave_levels_out(problem, theta, data, np.random.default_rng(0))
    assert [left.axis for left in found] == ["N"] * 4 + ["D"] * 4 + ["R"] * 3 + ["P"] * 3
    assert [left.edge for left in found if left.axis == "N"] == [True, False, False, True]
    for left in (found[0], found[6], found[9], found[13]):
        out = data.values(left.axis) == left.low
        assert left.low == left.high
        assert left.n_held == out.sum()
        plain = fit(law, data.take(~out), loss="log_mse", n_bootstrap=0, reduce=False)
        rows = data.take(out)
        residuals = np.log(plain.predict(N=rows.N, D=rows.D, R=rows.R, P=rows.P) / rows.loss)
        assert left.error == pytest.approx(np.sqrt(np.mean(residuals**2)), rel=1e-3)


@pytest.mark.slow
def test_a_level_without_which_the_law_cannot_be_fitted_is_not_predicted():
    data = grid()
    data = data.take(np.isin(data.D, [2e9, 8e9, 3e10]))
    law = parse_law("compression_aware:t_t=0,t_c=0,t_d=0")
    problem = Problem.build(law, data)
    found = leave_levels_out(problem, problem.theta(DLCM), data, np.random.default_rng(0))
    by_tokens = [left for left in found if left.axis == "D"]
    assert len(by_tokens) == 3
    for left in by_tokens:
        assert left.error is None
        assert "D takes two values" in left.reason


@pytest.mark.slow
def test_the_f_statistic_is_that_of_a_linear_model():
    # k R^b N^c is linear in logarithms: the test of b = 0 there is textbook
    rng = np.random.default_rng(2)
    N, R, stable = 10 ** rng.uniform(6, 9, 20), rng.choice([2.0, 4.0, 8.0], 20), rng.uniform(2, 4, 20)
    gain = 0.02 * stable**1.5 * R**0.05 * N**-0.05 * np.exp(rng.normal(0, 0.05, 20))
    data = ResultsData.from_arrays(N=N, D=1e9, R=R, loss=stable, stable_loss=stable, decay_gain=gain)
    choice = choose(["decay_gain", "decay_gain:b=0"], data, n_bootstrap=0, n_draws=999)
    test = choice.nested[0]
    columns = np.stack([np.ones(20), np.log(stable), np.log(N), np.log(R)], axis=1)
    rss = [np.linalg.lstsq(columns[:, :k], np.log(gain), rcond=None)[1][0] for k in (3, 4)]
    f = (rss[0] - rss[1]) / (rss[1] / 16)
    assert test.f == pytest.approx(f, rel=1e-5)
    assert test.p == pytest.approx(stats.f.sf(f, 1, 16), rel=1e-5)
    # errors are normal here, so the resampled probability has to agree but for its own sampling
    assert test.p_resampled == pytest.approx(test.p, abs=0.05)


@pytest.mark.slow
def test_the_resampled_test_holds_its_level_where_runs_of_a_trunk_err_together():
    rng = np.random.default_rng(5)
    N = np.repeat(10 ** np.linspace(6, 9, 10), 3)
    D = np.tile([1e9, 4e9, 1.6e10], 10)
    trunks = np.repeat([f"t{i}" for i in range(10)], 3)
    large_law = laws.CHINCHILLA.fix(E=1.8, beta=0.37)
    small_law = large_law.fix(alpha=0.35)
    clean = large_law.predict(TRUTH, N=N, D=D)
    rejected = {"F": 0, "resampled": 0}
    for _ in range(150):
        loss = clean * np.exp(np.repeat(rng.normal(0, 0.004, 10), 3) + rng.normal(0, 0.001, 30))
        data = ResultsData.from_arrays(N=N, D=D, loss=loss, trunk=trunks)
        small, large = (Problem.build(law, data, "log_mse") for law in (small_law, large_law))
        thetas = (minimise(small, small.theta(TRUTH))[0], minimise(large, large.theta(TRUTH))[0])
        test = nested_test(small, large, thetas, data.clusters, rng, labels=("small", "large"), n_draws=99)
        rejected["F"] += test.p < 0.05
        rejected["resampled"] += (test.p_resampled or 0.0) < 0.05
    # 7.5 of 150 are expected, 15 or more in 1 of 100 such tests; F takes the runs of a trunk for independent
    assert rejected["resampled"] < 15 < rejected["F"]


@pytest.mark.slow
def test_two_notations_of_one_law_are_compared_once():
    choice = choose(["chinchilla:beta=alpha", "overtrained"], isoflop_data(), n_bootstrap=0, n_draws=0)
    assert len(choice.scores) == 1
    assert choice.merged == ("overtrained says the same as chinchilla, beta = alpha on these runs",)


@pytest.mark.slow
def test_outliers_do_not_decide_between_laws():
    # three diverging runs swamp squared residuals; under the Laplace likelihood they do not
    data = isoflop_data(0, noise=0.001)
    data.loss[[3, 20, 40]] *= 1.08
    choice = choose(PAIR, data, n_bootstrap=0, n_draws=0)
    assert choice.errors == "laplace"
    assert choice.chosen.label == "chinchilla"
    squares = [float(np.sum(plain_least_squares(data, tied)[0] ** 2)) for tied in (False, True)]
    n = len(data)
    penalty = [2 * k + 2 * k * (k + 1) / (n - k - 1) for k in (6, 5)]
    naive = [n * np.log(rss / n) + p for rss, p in zip(squares, penalty)]
    assert naive[1] < naive[0] + 2  # the naive way takes the simpler law, which is wrong


@pytest.mark.slow
def test_rows_of_one_run_count_once():
    data = isoflop_data(4)
    thrice = data.take(np.tile(np.arange(len(data)), 3))
    once, again = (choose(PAIR, d, n_bootstrap=0, n_draws=0) for d in (data, thrice))
    assert again.n_clusters == len(data)
    for score in once.scores:
        assert again[score.label].behind == pytest.approx(score.behind, abs=1e-3)


@pytest.mark.slow
def test_too_few_runs_choose_no_law():
    choice = choose(PAIR, isoflop_data(0).take(np.arange(0, 48, 8)), n_bootstrap=0, n_draws=0)
    assert all(not np.isfinite(s.aicc) for s in choice.scores)
    assert "too few to choose" in choice.sentence
    assert choice.chosen.label == "chinchilla, beta = alpha"
    json.dumps(choice.to_dict(), allow_nan=False)


def test_the_allocation_exponent_of_power_laws_is_b_over_a_plus_b():
    found = allocation_exponent(laws.CHINCHILLA, TRUTH, {"N": 3e8, "D": 1e10})
    assert found == pytest.approx(STAR, rel=1e-6)
    assert allocation_exponent(laws.CHINCHILLA.apply(Change("drop", "B")), TRUTH, {"N": 3e8, "D": 1e10}) is None


def test_the_allocation_exponent_is_the_slope_of_the_best_size_where_there_are_offsets_and_two_terms():
    values = {**DLCM, "t_t": 5e6, "t_c": 2e7, "t_d": 1e8}
    R, P = 4.0, 0.5

    def best(C):
        def loss(x):
            return float(laws.COMPRESSION_AWARE.predict(values, N=np.exp(x), D=C / np.exp(x), R=R, P=P))

        span = (np.log(1e7), np.log(1e10))
        return optimize.minimize_scalar(loss, bounds=span, method="bounded", options={"xatol": 1e-10}).x

    C = 1e19
    slope = (best(C * 1.05) - best(C / 1.05)) / (2 * np.log(1.05))
    N = np.exp(best(C))
    found = allocation_exponent(laws.COMPRESSION_AWARE, values, {"N": N, "D": C / N, "R": R, "P": P})
    assert found == pytest.approx(slope, rel=1e-3)


def test_a_law_is_read_from_text_and_named_by_its_changes():
    law = parse_law("compression_aware:t_t=0, d2=d1, -A_d")
    expected = laws.COMPRESSION_AWARE.fix(t_t=0).tie(d2="d1").apply(Change("drop", "A_d"))
    assert law == expected
    assert label_law(law) == "compression_aware, t_t = 0, d2 = d1, without A_d"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chinchila", "did you mean 'chinchilla'"),
        ("chinchilla:alpha", "'alpha' is no change"),
        ("chinchilla:beta=alhpa", "did you mean 'alpha'"),
        ("chinchilla:gamma=0", "no parameter 'gamma'"),
    ],
)
def test_a_law_that_cannot_be_read_says_where(text, message):
    with pytest.raises(UserError, match=message):
        parse_law(text)


def test_laws_of_different_runs_are_not_compared():
    with pytest.raises(UserError, match="describe different runs"):
        choose(["chinchilla", "compression_aware"], isoflop_data())
    with pytest.raises(UserError, match="did you mean 'dlcm'"):
        candidates("dlmc")
    with pytest.raises(UserError, match="at least one law"):
        choose([], isoflop_data())


def test_weights_of_a_drift_are_the_same_in_both_fits():
    # the standard error of a difference between a part and the whole is far below that of unrelated fits
    data = isoflop_data(1, noise=0.003)
    problem = Problem.build(laws.CHINCHILLA, data)
    theta = problem.theta(fit(laws.CHINCHILLA, data, n_bootstrap=0).values)
    _, drifts = hold_out(problem, theta, data, np.random.default_rng(0), cuts=(1e20,), n_bootstrap=100)
    star = next(d for d in drifts if d.name == "N*")
    spread = abs((star.at_cuts[0] - star.value) / star.z)
    weights = draw_weights(data.clusters, 100, np.random.default_rng(1), weight_variance(problem, theta, len(data)))
    below = data.C <= 1e20
    from analysis.ensemble import natural_values, refit_many

    def stars(part, weights):
        values = natural_values(problem, refit_many(problem.take(part), theta, weights=weights[:, part])[0])
        return values["beta"] / (values["alpha"] + values["beta"])

    everything = np.ones(len(data), dtype=bool)
    apart = np.hypot(stars(below, weights).std(), stars(everything, weights).std())
    together = (stars(below, weights) - stars(everything, weights)).std()
    assert spread == pytest.approx(together, rel=0.35)
    assert spread < 0.8 * apart


@pytest.fixture(scope="module")
def dense_choice():
    data = isoflop_data(0)
    return data, choose(PAIR, data, n_bootstrap=20, n_draws=19)


def test_plots_show_every_run_fitted_and_held_out(dense_choice):
    data, choice = dense_choice
    _, ax = new_figure()
    plot_hold_outs(ax, data, choice.chosen.fit, choice.chosen.holdouts)
    sizes = [len(c.get_offsets()) for c in ax.collections]
    assert sizes == [48, 24, 16, 8]
    fitted = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(fitted[:, 0], data.loss)
    np.testing.assert_allclose(fitted[:, 1], choice.chosen.fit.predict(N=data.N, D=data.D))


@pytest.mark.slow
def test_the_verb_choose_prints_text_or_json_and_draws(demo_frame, write_results, tmp_path):
    path = write_results(demo_frame)
    options = ["--law", "chinchilla:beta=alpha", "--law", "chinchilla:alpha=0.3,beta=0.3", "--bootstrap", "10"]
    run = CliRunner().invoke(app, ["choose", str(path), *options, "--json", "--plot", str(tmp_path / "held.png")])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert {law["label"] for law in found["laws"]} == {
        "chinchilla, beta = alpha",
        "chinchilla, alpha = 0.3, beta = 0.3",
    }
    assert found["chosen"] in found["sentence"]
    assert (tmp_path / "held.png").stat().st_size > 1000
    text = CliRunner().invoke(app, ["choose", str(path), *options])
    assert text.exit_code == 0
    assert found["sentence"].split(".")[0] in " ".join(text.stdout.split())
