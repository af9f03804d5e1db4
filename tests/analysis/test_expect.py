"""Expected intervals: against theory, against repeated fits, and honest where the runs tell nothing."""

import dataclasses

import numpy as np
import pytest

from analysis import fit, laws
from analysis.data import ResultsData
from analysis.expect import design_of, expect
from analysis.objective import Problem
from analysis.optimum import optimum
from analysis.prior import Prior, default_prior, prior_from_fit
from analysis.search import Search
from analysis.teach import teach
from analysis.variations import vary
from dlcm.errors import UserError
from sweeps import Sweep, plan
from sweeps.shapes import Parts, ShapeRule
from sweeps.smooth_cost import cost_function

from .test_ensemble import grid

COST = cost_function(vocab_size=8192, seq_len=1024)
# The paper's main model at its trillion tokens: 3 x forward FLOPs of `flops.count` at R = 4, windows of 2,048.
MAIN_MODEL_FLOPS = 6.306e21


def dense_grid(n_seeds: int = 1) -> ResultsData:
    data = grid(laws.CHINCHILLA, R=(1,), P=(0,), N=(1e7, 3e7, 1e8, 3e8, 1e9), M=(5, 20, 80, 320))
    rows = np.tile(np.arange(len(data)), n_seeds)
    taken = data.take(rows)
    taken.frame["run_id"] = [f"run{i}-s{k // len(data)}" for k, i in enumerate(rows)]
    return taken


def small_sweep(**changes) -> Sweep:
    data = {
        "name": "small",
        "base": {"model": {"vocab_size": 4096}, "data": {"tokenizer": "bytes"}},
        "axes": {
            "grid": {"size": [1e6, 4e6, 16e6], "compression_ratio": [2, 4, 8], "concept_share": [0.3, 0.5, 0.7]},
        },
        "budgets": {"tokens_per_parameter": [10, 20, 60]},
        "baseline": {"match": "parameters"},
        **changes,
    }
    return Sweep.from_dict(data)


# -- the prior ---------------------------------------------------------------------------------------------------------


def paper_search(prior: Prior, **box) -> np.ndarray:
    cost = cost_function(vocab_size=128_815, seq_len=2048, rule=ShapeRule(heads_per_kv=2), parts=Parts(d_head=64))
    ranges = {"N": (1e8, 1e12), "R": (1.0, 1.0), "P": (0.0, 0.0), **box}
    return Search(prior.law, cost, MAIN_MODEL_FLOPS, ranges).minimise(prior.values)


def test_the_default_prior_without_compression_equals_the_dense_law():
    dlcm, dense = default_prior(), default_prior("dense")
    shares = np.linspace(0.01, 0.9, 9_000)
    best = dlcm.law.predict(dlcm.values, N=1e9, D=2e10, R=1.0, P=shares).min()
    assert best == pytest.approx(float(dense.law.predict(dense.values, N=1e9, D=2e10)), rel=1e-6)


def test_the_default_prior_has_its_best_share_at_a_half_and_saves_a_fifth():
    best = paper_search(default_prior(), R=(4.0, 4.0), P=(0.05, 0.95))
    assert best[3] == pytest.approx(0.5, abs=0.02)
    dense = default_prior("dense")
    cost = cost_function(vocab_size=128_815, seq_len=2048, rule=ShapeRule(heads_per_kv=2), parts=Parts(d_head=64))
    budgets = np.geomspace(0.5, 4, 200) * MAIN_MODEL_FLOPS
    box = {"N": (1e8, 1e12), "R": (1.0, 1.0), "P": (0.0, 0.0)}
    losses = [Search(dense.law, cost, c, box).minimise(dense.values)[4] for c in budgets[::10]]
    needed = np.interp(-best[4], -np.array(losses), budgets[::10])
    assert 1 - MAIN_MODEL_FLOPS / needed == pytest.approx(0.20, abs=0.02)


def test_under_a_cost_in_flops_the_default_prior_prefers_the_largest_ratio():
    # The backbone's cost is proportional to N P / R and its term of the loss to R^g / (N P)^d2: with g < d2 growing both
    # alike costs nothing and lowers the loss.
    assert paper_search(default_prior(), R=(2.0, 8.0), P=(0.05, 0.95), N=(1e8, 1e13))[2] == pytest.approx(8.0)


def test_a_fit_becomes_a_prior_with_its_own_noise():
    data = dense_grid(3)
    rng = np.random.default_rng(0)
    noisy = dataclasses.replace(data, loss=data.loss * np.exp(rng.normal(0, 0.006, len(data))))
    result = fit(laws.CHINCHILLA, noisy, n_bootstrap=0)
    prior = prior_from_fit(result)
    assert prior.noise == pytest.approx(0.006, rel=0.2)
    assert prior.values["alpha"] == result.values["alpha"]
    assert prior.ranges["N"] == pytest.approx((1e7, 1e9))


def test_a_fit_with_a_tied_exponent_becomes_a_prior_of_the_whole_law():
    data = dense_grid()
    rng = np.random.default_rng(0)
    noisy = dataclasses.replace(data, loss=data.loss * np.exp(rng.normal(0, 0.002, len(data))))
    result = fit(laws.CHINCHILLA.tie(beta="alpha"), noisy, n_bootstrap=0, reduce=False)
    prior = prior_from_fit(result)
    assert prior.law == laws.CHINCHILLA
    assert prior.values["beta"] == prior.values["alpha"] == result.values["alpha"]


def test_a_fit_that_dropped_a_term_is_no_prior():
    one_length = dense_grid().take(np.flatnonzero(dense_grid().D / dense_grid().N == 20))
    same_tokens = dataclasses.replace(one_length, D=np.full(len(one_length), 1e9))
    result = fit(laws.CHINCHILLA, same_tokens, n_bootstrap=0)
    with pytest.raises(UserError, match="term of B was dropped"):
        prior_from_fit(result)


@pytest.mark.parametrize("noise", [0.0, -0.1, 0.5, float("nan")])
def test_noise_out_of_range_is_refused(noise):
    with pytest.raises(UserError, match="standard deviation of log loss"):
        default_prior().with_noise(noise)


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_exponents_scatter_as_theory_says():
    # Least absolute deviations, which a Huber loss far inside the noise is, have sqrt(pi/2) times the standard deviation
    # of least squares under Gaussian noise; that of least squares is noise * sqrt(diag (J'J)^-1) to first order.
    data, prior = dense_grid(8), default_prior("dense").with_noise(0.01)
    problem = Problem.build(laws.CHINCHILLA, data)
    jacobian = problem.residuals_and_jacobian(problem.theta(prior.values))[1]
    theory = 0.01 * np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian))) * np.sqrt(np.pi / 2)
    expected = expect(data, prior, COST, 1e20, n=400)
    names = [p.name for p in laws.CHINCHILLA.free]
    for name in ("E", "alpha", "beta"):
        sd = theory[names.index(name)] * (problem.target_scale if name == "E" else 1.0)
        assert expected[name].width / 3.92 == pytest.approx(sd, rel=0.2), name


def test_twice_the_seeds_narrow_by_the_root_of_two():
    prior = default_prior("dense").with_noise(0.003)
    widths = [expect(dense_grid(k), prior, COST, 1e20, n=400)["alpha"].spread for k in (2, 4)]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(2), rel=0.15)


def test_half_the_noise_halves_every_interval():
    prior = default_prior("dense")
    wide, narrow = (expect(dense_grid(4), prior.with_noise(s), COST, 1e20) for s in (0.004, 0.002))
    for name in ("E", "alpha", "beta", "N"):
        assert wide[name].spread / narrow[name].spread == pytest.approx(2.0, rel=0.2), name


@pytest.mark.slow
def test_the_expected_interval_is_that_of_repeated_fits_and_optima():
    data, prior = dense_grid(), default_prior("dense").with_noise(0.004)
    expected = expect(data, prior, COST, 1e20, n=400)
    rng = np.random.default_rng(5)
    alphas, sizes = [], []
    for _ in range(60):
        noisy = dataclasses.replace(data, loss=data.loss * np.exp(rng.normal(0, 0.004, len(data))))
        result = fit(laws.CHINCHILLA, noisy, n_bootstrap=0)
        alphas.append(result.values["alpha"])
        sizes.append(optimum(result, COST, 1e20, bounds={"N": (1e7, 1e12)})["N"].value)
    # The scatter of 60 answers is itself known to about 10%.
    assert np.std(alphas) == pytest.approx(expected["alpha"].width / 3.92, rel=0.3)
    assert np.std(np.log(sizes)) == pytest.approx(expected["N"].width / 3.92, rel=0.3)


def test_the_noise_of_a_run_does_not_depend_on_its_neighbours():
    prior = default_prior("dense")
    whole = expect(dense_grid(), prior, COST, 1e20, n=20)
    rows = np.arange(len(dense_grid()))[::-1]
    assert expect(dense_grid().take(rows), prior, COST, 1e20, n=20)["alpha"].low == pytest.approx(
        whole["alpha"].low, rel=1e-4
    )


def test_the_same_seed_gives_the_same_intervals():
    prior = default_prior("dense")
    first, again, other = (expect(dense_grid(), prior, COST, 1e20, n=20, seed=seed).to_dict() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.slow
def test_what_one_share_cannot_tell_is_not_given_a_narrow_interval():
    # At one P the token and the concept term are two powers of the same N: nothing but their sum is seen.
    data = grid(P=(0.5,), R=(4,))
    expected = expect(data, default_prior(), COST, 1e20, n=60)
    told = {q.name: q for q in expected.constants}
    assert all(told[name].held or told[name].doubt for name in ("d1", "d2"))
    assert not told["a"].held
    assert not told["a"].doubt


def test_without_a_second_length_no_trade_is_known():
    data = dense_grid()
    same = dataclasses.replace(data, D=np.full(len(data), 1e10))
    expected = expect(same, default_prior("dense"), COST, 1e20, n=20)
    assert "one value of D" in expected["N"].held


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan")])
def test_a_target_that_is_no_budget_is_refused(target):
    with pytest.raises(UserError, match="give a number above 0"):
        expect(dense_grid(), default_prior("dense"), COST, target)


def test_a_target_that_pays_for_nothing_is_refused():
    with pytest.raises(UserError, match="pays for no model"):
        expect(dense_grid(), default_prior("dense"), COST, 10.0)


# -- sweeps ------------------------------------------------------------------------------------------------------------


def test_a_design_takes_one_boundary_kind():
    axes = {"size": [1e6], "boundary": ["fixed", "learned"], "compression_ratio": [2, 4], "concept_share": [0.5]}
    planned = plan(small_sweep(axes={"grid": axes}))
    assert len(design_of(planned, "dlcm")) == 2 * 3


@pytest.mark.slow
def test_each_change_has_the_runs_that_it_says():
    planned = plan(small_sweep())
    lesson = teach(planned, target=1e20, n=40, variations=False)
    found = {v.label: v for v in vary(planned, lesson.expected[0], COST, n=20)}
    assert {f"without R = {r}" for r in (2, 4, 8)} <= found.keys()
    # 81 DLCM runs and 9 dense ones: without one ratio 54 and 9, without one size 54 and 6, with one more seed twice as many.
    assert found["without R = 4"].n_runs == 63
    assert found["without N = 1M"].n_runs == 60
    assert found["with seed 1"].n_runs == 180
    assert found["with seed 1"].flops == pytest.approx(2.0)
    assert found["with N = 64M"].n_runs == 120
    assert found["with seed 1"].widths["a"] < 1
    assert not [v for v in found.values() if v.refused]


@pytest.mark.slow
def test_a_value_in_a_list_block_is_not_added_but_said():
    entries = [{"size": s, "concept_share": 0.5, "compression_ratio": 4} for s in (1e6, 4e6, 16e6)]
    planned = plan(small_sweep(axes={"list": entries}))
    lesson = teach(planned, target=1e20, n=20)
    refused = [v for v in lesson.variations if v.refused]
    assert refused
    assert all("list block" in v.refused for v in refused)
    assert "not simulated" in lesson.report()


def test_sweeps_over_vocabularies_have_no_one_cost_and_say_so():
    axes = {"size": [1e6], "model.vocab_size": [1024, 4096], "compression_ratio": [2], "concept_share": [0.5]}
    lesson = teach(plan(small_sweep(axes={"grid": axes})), n=20)
    assert "differ in model.vocab_size" in lesson.missing
    assert lesson.report().startswith("What it will teach: not simulated")


def test_a_prior_of_a_family_without_runs_is_refused():
    planned = plan(small_sweep(baseline=None))
    with pytest.raises(UserError, match="law of dense models"):
        teach(planned, prior=default_prior("dense"))
