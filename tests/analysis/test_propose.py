"""The choice of runs: its algebra against direct computation, its designs against the grid, and its file."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from analysis.cost import cost_of_plan
from analysis.expect import design_of, search_box
from analysis.objective import Problem
from analysis.prior import default_prior
from analysis.proposal import propose
from analysis.proposal_text import format_proposal, proposal_yaml
from analysis.propose import _Design, _Draw, _optimum_gradient, choose_runs
from analysis.search import Search
from dlcm.errors import UserError
from sweeps import Sweep, plan
from sweeps.smooth_cost import cost_function

from .test_ensemble import grid
from .test_expect import small_sweep

COST = cost_function(vocab_size=8192, seq_len=1024)
TARGET = 1e20


def random_design(rng, n=30, p=5, k=2) -> _Design:
    draws = [_Draw(rng.normal(size=(n, p)), rng.normal(size=(k, p))) for _ in range(3)]
    return _Design(draws, rng.uniform(0.5, 2.0, n), budget=12.0, max_runs=10, max_seeds=2)


def direct_criterion(design: _Design, counts: np.ndarray) -> float:
    total = 0.0
    for draw in design.draws:
        p = draw.gradients.shape[1]
        inverse = np.linalg.inv(1e-2 * np.eye(p) + (draw.gradients * counts[:, None]).T @ draw.gradients)
        total += float(np.mean(np.log(np.diag(draw.targets @ inverse @ draw.targets.T))))
        total += 0.1 * 2 / p * float(np.linalg.slogdet(inverse)[1])
    return total / len(design.draws)


def test_gains_are_the_changes_of_the_criterion():
    design = random_design(np.random.default_rng(0))
    for _ in range(6):
        design.add()
    assert design.criterion() == pytest.approx(direct_criterion(design, design.counts), rel=1e-9)
    gains, losses = design.gains(), design.gains(-1.0)
    for i in range(len(design.counts)):
        step = np.eye(len(design.counts), dtype=int)[i]
        assert gains[i] == pytest.approx(design.criterion() - direct_criterion(design, design.counts + step), rel=1e-6)
        if design.counts[i]:
            less = direct_criterion(design, design.counts - step)
            assert losses[i] == pytest.approx(design.criterion() - less, rel=1e-6)


def test_a_choice_keeps_budget_runs_and_seeds():
    design = random_design(np.random.default_rng(1))
    while design.add():
        pass
    before = design.criterion()
    design.exchange()
    assert design.criterion() <= before
    assert design.counts.max() <= 2
    assert design.counts.sum() <= 10
    assert design.counts @ design.costs == pytest.approx(design.spent)
    assert design.spent <= 12.0
    assert design.criterion() == pytest.approx(direct_criterion(design, design.counts), rel=1e-6)


def test_the_gradient_of_the_optimum_is_how_far_it_moves():
    prior, data = default_prior(), grid()
    problem = Problem.build(prior.law.fix(t_t=0, t_c=0, t_d=0), data)
    theta = problem.theta(prior.values)
    box = {"N": (1e7, 1e12), "R": (4.0, 4.0), "P": (0.05, 0.95)}
    gradient = _optimum_gradient(problem, theta, COST, TARGET, box)
    assert gradient.shape == (2, len(theta))
    search = Search(problem.law, COST, TARGET, box)

    def best(t):
        found = search.minimise(problem.values(t))
        return np.array([np.log(found[0]), found[3]])

    for i, p in enumerate(problem.law.free):
        if p.kind == "floor":
            np.testing.assert_allclose(gradient[:, i], 0.0, atol=1e-9)
            continue
        h = 1e-3 * max(abs(theta[i]), 0.1)
        step = h * np.eye(len(theta))[i]
        moved = (best(theta + step) - best(theta - step)) / (2 * h)
        np.testing.assert_allclose(gradient[:, i], moved, rtol=0.03, atol=2e-3)


@pytest.mark.slow
def test_a_chosen_set_beats_random_sets_of_equal_cost():
    prior, candidates = default_prior(), grid(M=(10, 20, 40, 80, 160), P=(0.3, 0.4, 0.5, 0.6, 0.7))
    law = prior.law.fix(t_t=0, t_c=0, t_d=0)
    box = search_box(candidates, prior, COST, TARGET)
    budget = 0.2 * float(candidates.C.sum())
    choice = choose_runs(
        candidates, prior, COST, TARGET, budget=budget, law=law, box=box, max_runs=60, max_seeds=1, seed=0
    )
    assert choice.flops <= budget
    from analysis.propose import _draws

    draws = _draws(candidates, prior, COST, TARGET, law, box, seed=0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        design = _Design(draws, candidates.C, budget, 60, 1)
        for i in rng.permutation(len(candidates)):
            if design.counts.sum() < 60 and candidates.C[i] <= budget - design.spent:
                design.change(int(i), 1)
        assert choice.criterion < design.criterion()


@pytest.fixture(scope="module")
def proposal():
    return propose(small_sweep(), default_prior(), budget=3e16, target=TARGET, n=60)


def test_a_proposal_is_within_its_budget_and_its_grid_costs_as_much(proposal):
    assert 0.9 * 3e16 < proposal.plan.flops <= 3e16
    assert 0.99 * 3e16 <= proposal.grid.flops <= 3e16
    assert len(proposal.plan) <= len(proposal.grid) == 81


def test_a_proposal_varies_every_axis_enough_to_fit_the_law(proposal):
    design = design_of(proposal.plan, "dlcm")
    from analysis.design import levels, reduce_law

    assert all(len(levels(design.values(name))) >= 3 for name in "NDRP")
    assert reduce_law(default_prior().law, design).free == proposal.expected.law.free


def test_the_written_sweep_plans_to_the_proposed_runs(proposal, tmp_path):
    path = tmp_path / "design.yaml"
    path.write_text(proposal_yaml(proposal))
    again = plan(Sweep.from_yaml(path))
    assert [run.run_id for run in again.runs] == [run.run_id for run in proposal.plan.runs]
    assert "Expected 95% intervals" in path.read_text()


def test_a_proposal_says_what_was_chosen_and_beside_what(proposal):
    text = format_proposal(proposal)
    assert "full grid" in text
    assert f"{len(proposal.plan)} runs" in text
    told = proposal.to_dict()
    json.dumps(told)
    assert told["grid"]["n_runs"] == 81


@pytest.mark.slow
def test_more_budget_never_blurs_the_choice():
    prior, candidates = default_prior(), grid()
    law = prior.law.fix(t_t=0, t_c=0, t_d=0)
    box = search_box(candidates, prior, COST, TARGET)
    total = float(candidates.C.sum())
    found = [
        choose_runs(candidates, prior, COST, TARGET, budget=share * total, law=law, box=box, max_runs=80).criterion
        for share in (0.05, 0.2, 0.8)
    ]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize(("budget", "target"), [(0, 1e20), (1e17, -1), (float("nan"), 1e20)])
def test_numbers_that_are_no_budget_are_refused(budget, target):
    with pytest.raises(UserError, match="give a number above 0"):
        propose(small_sweep(), default_prior(), budget=budget, target=target)


def test_a_template_without_sizes_is_refused():
    model = {"d_token": 64, "d_concept": 64, "n_encoder_layers": 1, "n_concept_layers": 1, "n_decoder_layers": 1}
    model |= {"n_heads_token": 2, "n_heads_concept": 2, "d_ff_token": 128, "d_ff_concept": 128, "vocab_size": 512}
    bare = small_sweep(base={"model": model}, axes={"grid": {"compression_ratio": [2, 4]}}, baseline=None)
    bare = bare.model_copy(update={"budgets": bare.budgets.model_copy(update={"tokens_per_parameter": (2000.0,)})})
    with pytest.raises(UserError, match="have no size"):
        propose(bare, default_prior(), budget=1e17, target=1e20)


def test_the_cost_of_a_plan_is_that_of_its_shape_rule():
    planned = plan(small_sweep())
    cost = cost_of_plan(planned)
    run = max((r for r in planned.runs if not r.config.model.is_dense), key=lambda r: r.params.non_embedding)
    found = cost(run.params.non_embedding, run.tokens, run.compression_target, run.concept_share)
    assert found == pytest.approx(run.flops_train_planned, rel=0.05)


# -- the command line --------------------------------------------------------------------------------------------------


def dlcm(*args, cwd):
    command = [sys.executable, "-c", "from dlcm.cli import main; main()", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(small_sweep().to_yaml())
    return path


@pytest.mark.slow
def test_the_verb_writes_a_sweep_and_never_over_another(template, tmp_path):
    done = dlcm("sweep", "design", template, "--budget", "3e16", "--target", "1e20", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["file"] == "small-design.yaml"
    written = tmp_path / "small-design.yaml"
    before = written.read_text()
    assert len(yaml.safe_load(before)["axes"]["list"]) == told["n_runs"]
    again = dlcm("sweep", "design", template, "--budget", "3e16", "--target", "1e20", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert written.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "-1", "--target", "1e20"), "budget = -1"),
        (("--budget", "1e9", "--target", "1e20"), "raise the budget"),
        (("--budget", "3e16", "--target", "1e20", "--noise", "2"), "standard deviation of log loss"),
        (("--budget", "3e16", "--target", "1e20", "--prior", "no.json"), "no.json"),
        (("--budget", "3e16"), "--target"),
    ],
)
def test_a_design_that_cannot_be_made_is_one_line_and_writes_nothing(template, tmp_path, options, words):
    done = dlcm("sweep", "design", template, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*-design.yaml"))


def test_a_template_whose_every_run_takes_most_of_the_budget_is_refused():
    axes = {"grid": {"size": [1e6], "compression_ratio": [2, 4], "concept_share": [0.5]}}
    template = small_sweep(axes=axes, budgets={"tokens": [1e7]}, baseline=None)
    dear = 2.5 * max(run.flops_train_planned for run in plan(template).runs)
    with pytest.raises(UserError, match=r"no candidate costs at most 0\.125 of the budget .*give a larger budget"):
        propose(template, default_prior(), budget=dear, target=TARGET)


def test_a_proposal_keeps_the_model_of_its_template(proposal):
    assert proposal.plan.sweep.base["model.vocab_size"] == 4096
    assert proposal.plan.sweep.baseline is None
