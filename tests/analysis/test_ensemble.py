"""Many refits at once give what one fit after the other gives."""

import numpy as np
import pytest

from analysis import fit, laws
from analysis.data import ResultsData
from analysis.ensemble import natural_values, refit_many
from analysis.objective import Problem
from analysis.prior import default_prior
from analysis.search import Search
from sweeps.smooth_cost import cost_function


def grid(law=laws.COMPRESSION_AWARE, **axes) -> ResultsData:
    """Every combination of sizes, ratios, shares and tokens per parameter, with the default prior's losses."""
    axes = {"N": (1e7, 4e7, 2e8, 1e9), "R": (2, 4, 8), "P": (0.3, 0.5, 0.7), "M": (10, 40, 160), **axes}
    N, R, P, M = (v.ravel() for v in np.meshgrid(*(np.array(axes[k], dtype=float) for k in "NRPM"), indexing="ij"))
    prior = default_prior(law.family)
    loss = law.predict(prior.values, N=N, D=N * M, R=R, P=P)
    return ResultsData.from_arrays(N=N, D=N * M, R=R, P=P, C=6 * N * N * M, loss=loss)


@pytest.fixture(scope="module")
def noisy() -> tuple[Problem, np.ndarray]:
    problem = Problem.build(laws.COMPRESSION_AWARE, grid())
    noise = np.random.default_rng(1).normal(0, 0.004, (3, len(problem)))
    return problem, problem.target * np.exp(noise)


@pytest.mark.slow
def test_batched_refits_reach_the_objective_of_the_full_fit(noisy):
    problem, targets = noisy
    data = grid()
    thetas, found = refit_many(problem, problem.theta(default_prior().values), targets=targets)
    for row, target in enumerate(targets):
        other = ResultsData.from_arrays(
            N=data.N, D=data.D, R=data.R, P=data.P, C=data.C, loss=target * problem.target_scale
        )
        alone = fit(laws.COMPRESSION_AWARE, other, n_bootstrap=0)
        assert found[row] == pytest.approx(alone.objective, rel=1e-6)
        values = natural_values(problem, thetas)
        for name in ("d1", "g", "d2", "a"):
            assert values[name][row] == pytest.approx(alone.values[name], rel=0.02)


@pytest.mark.parametrize("loss", ["log_huber", "log_mse"])
def test_without_noise_the_planted_constants_come_back_from_elsewhere(loss):
    planted = default_prior("dense").values
    problem = Problem.build(laws.CHINCHILLA, grid(laws.CHINCHILLA, R=(1,), P=(0,)), loss=loss)
    start = problem.theta({**planted, "alpha": 0.5, "beta": 0.25})
    values = natural_values(problem, refit_many(problem, start)[0])
    for name, value in planted.items():
        assert values[name][0] == pytest.approx(value, rel=1e-3), name


def test_refits_stay_inside_the_bounds(noisy):
    problem, targets = noisy
    lower, upper = problem.bounds()
    thetas, _ = refit_many(problem, problem.theta(default_prior().values), targets=targets * np.exp(0.5))
    assert np.all(thetas >= lower)
    assert np.all(thetas <= upper)


def test_chunks_do_not_change_the_answers(noisy, monkeypatch):
    problem, targets = noisy
    start = problem.theta(default_prior().values)
    whole, _ = refit_many(problem, start, targets=targets)
    monkeypatch.setattr("analysis.ensemble._CELLS", 1)
    np.testing.assert_allclose(refit_many(problem, start, targets=targets)[0], whole, rtol=1e-12)


def test_searching_many_sets_of_constants_finds_what_searching_each_finds():
    prior = default_prior()
    cost = cost_function(vocab_size=8192, seq_len=1024)
    search = Search(prior.law, cost, 1e20, {"N": (1e7, 1e11), "R": (2, 8), "P": (0.2, 0.8)})
    exponents = np.array([0.3, 0.35, 0.4])
    many = {name: np.full(3, value) for name, value in prior.values.items()} | {"d2": exponents}
    found = search.minimise_many(many)
    for row, exponent in enumerate(exponents):
        alone = search.minimise({**prior.values, "d2": float(exponent)})
        assert found[row, 4] == pytest.approx(alone[4], rel=1e-6)
        assert found[row, 3] == pytest.approx(alone[3], abs=2e-3)
        assert np.log(found[row, 0]) == pytest.approx(np.log(alone[0]), abs=2e-2)
