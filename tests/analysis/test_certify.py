"""A minimum is certified only where every check passes; each check fails on what it is there to find."""

import numpy as np
import pytest
from scipy import optimize

from analysis import ResultsData, certify, fit, laws
from analysis.certify import solve
from analysis.objective import Problem
from analysis.result import FitResult, Status

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def planted(noise=0.004, n_sizes=6, n_tokens=6, seed=0) -> ResultsData:
    N, D = np.array(np.meshgrid(np.geomspace(1e7, 1e9, n_sizes), np.geomspace(2e8, 2e10, n_tokens))).reshape(2, -1)
    loss = laws.CHINCHILLA.predict(TRUTH, N=N, D=D) * np.exp(np.random.default_rng(seed).normal(0, noise, len(N)))
    return ResultsData.from_arrays(N=N, D=D, loss=loss)


def checks(result: FitResult) -> dict[str, bool]:
    return {check.name: check.passed for check in result.checks}


def test_a_good_fit_passes_every_check_and_says_so():
    result = fit(laws.CHINCHILLA, planted(), n_bootstrap=0)
    assert result.status is Status.CERTIFIED
    assert checks(result) == dict.fromkeys(("gradient", "polish", "starts", "bounds", "moved", "condition"), True)
    assert result.report().startswith("Law chinchilla (Hoffmann et al. 2022, eq 10): certified")
    assert result.report().count("passed  ") == 6


def stopped_early(problem, theta, rounds=12):
    return theta, problem.scaled_objective(theta)[0]


def test_descents_that_stop_early_are_not_certified(monkeypatch):
    """The optimisers are taken away: what is left is the false convergence that others report as success."""
    monkeypatch.setattr(certify, "minimise", stopped_early)
    monkeypatch.setattr(
        certify, "refit_many", lambda p, s, **_: (s, np.array([p.scaled_objective(t)[0] for t in s]) * p.delta**2)
    )
    result = fit(laws.CHINCHILLA, planted(), n_bootstrap=0)
    assert result.status is Status.NOT_CONVERGED
    assert not any(checks(result)[name] for name in ("gradient", "starts", "moved"))
    assert not result.sound


def test_an_answer_that_a_polish_still_lowers_is_not_certified(monkeypatch):
    calls = []

    def late(problem, theta, rounds=12):
        """Only its last call, that of the second polish, descends."""
        calls.append(1)
        return real(problem, theta, rounds) if len(calls) == 4 else stopped_early(problem, theta + 1e-3)

    real = certify.minimise
    monkeypatch.setattr(certify, "minimise", late)
    result = solve(Problem.build(laws.CHINCHILLA, planted()), np.random.default_rng(0))
    assert [check.passed for check in result.checks if check.name == "polish"] == [False]


def test_the_promise_of_the_gradient_is_kept_by_the_objective():
    """What the gradient promises is a lower bound of what an independent optimiser then gains."""
    problem = Problem.build(laws.CHINCHILLA, planted())
    best = solve(problem, np.random.default_rng(0)).theta
    for shift in (1e-4, 1e-3, 1e-2):
        theta = best + shift * np.array([1.0, -1.0, 1.0, -1.0, 1.0])
        value = problem.scaled_objective(theta)[0]
        answer = optimize.minimize(
            problem.scaled_objective, theta, jac=True, method="L-BFGS-B", bounds=list(zip(*problem.bounds()))
        )
        assert 0 < certify.drop_ahead(problem, theta) <= (value - answer.fun) * (1 + 1e-6)


@pytest.mark.slow
def test_offsets_of_a_range_without_bend_are_ill_conditioned_or_not_identified():
    """Sizes over a tenth of a decade: every power of N is a straight line, and E, A and alpha are one constant."""
    N, D = np.array(np.meshgrid(np.geomspace(1e8, 1.0001e8, 5), np.geomspace(2e8, 2e10, 5))).reshape(2, -1)
    data = ResultsData.from_arrays(N=N, D=D, loss=laws.CHINCHILLA.predict(TRUTH, N=N, D=D))
    result = fit(laws.CHINCHILLA, data, n_bootstrap=0, reduce=False)
    assert result.condition > certify.MAX_CONDITION
    assert not checks(result)["condition"]
    assert result.status is not Status.CERTIFIED


@pytest.mark.many
@pytest.mark.parametrize("loss", ["log_huber", "log_mse", "mse"])
def test_the_minimum_is_that_of_an_independent_optimiser(loss):
    """Nelder and Mead's simplex knows no gradient and none of our coordinates."""
    data = planted()
    result = fit(laws.CHINCHILLA, data, loss=loss, n_bootstrap=0)

    def objective(x):
        E, alpha, beta = x[0], x[2], x[4]
        prediction = E + np.exp(x[1] - alpha * np.log(data.N / 1e8)) + np.exp(x[3] - beta * np.log(data.D / 2e9))
        r = prediction - data.loss if loss == "mse" else np.log(np.maximum(prediction, 1e-9) / data.loss)
        size = np.abs(r)
        penalty = np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)) if loss == "log_huber" else r**2
        return penalty.sum()

    v = result.values
    start = [v["E"], np.log(v["A"] * 1e8 ** -v["alpha"]), v["alpha"], np.log(v["B"] * 2e9 ** -v["beta"]), v["beta"]]
    assert objective(start) == pytest.approx(result.objective, rel=1e-9)
    options = {"maxiter": 4000, "maxfev": 4000, "xatol": 1e-12, "fatol": 1e-16}
    answer = optimize.minimize(objective, np.array(start) * 1.02, method="Nelder-Mead", options=options)
    assert result.objective <= answer.fun * (1 + 1e-9)


def test_checks_survive_json(tmp_path):
    result = fit(laws.CHINCHILLA, planted(), n_bootstrap=0)
    result.save(tmp_path / "fit.json")
    again = FitResult.load(tmp_path / "fit.json")
    assert again.checks == result.checks
    assert [p.profile for p in again.parameters] == [p.profile for p in result.parameters]
