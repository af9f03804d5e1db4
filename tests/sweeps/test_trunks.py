"""Runs that share a trunk: who is trained whole, who branches, and what happens when the trunk does not come."""

import json
import math
import multiprocessing

import pandas as pd
import pytest

from dlcm.record import read_json, write_json
from dlcm.trunk import UnusableBranchError
from flops import count
from flops.hardware import Hardware, accelerator
from sweeps import claim, trunks
from sweeps.collect import collect
from sweeps.costs import cost_plan
from sweeps.launch import launch, resubmit
from sweeps.resources import group_runs
from sweeps.spec import ClusterConfig
from sweeps.store import load_sweep, save_sweep
from sweeps.worker import work
from tests.sweeps.tiny import FakeTrain, finish, make_plan, result_json


def family_plan(folder, lengths=(20, 30, 40), seeds=(0,), **more):
    """One model at several token budgets, with a warm-up in tokens."""
    return make_plan(
        folder,
        seeds=seeds,
        base_update={"optim.warmup_tokens": 256},
        budgets={"tokens": [128 * n for n in lengths]},
        **more,
    )


@pytest.fixture
def folder(tmp_path):
    save_sweep(family_plan(tmp_path), tmp_path / "s")
    return tmp_path / "s"


class FakeTrunkTrain(FakeTrain):
    """Also keeps what it is told to keep, and notes whom it branched from."""

    def __init__(self, behave=None):
        super().__init__(behave)
        self.branched = {}

    def __call__(self, config, run_dir, *, trunk=None, keep=(), **more):
        self.branched[config.n_steps] = None if trunk is None else read_json(trunk / "run.json")["n_steps"]
        if trunk is not None:
            assert (trunk / "branches" / f"step-{config.n_stable_steps:08d}.pt").exists()
        write_json(run_dir / "run.json", {"n_steps": config.n_steps})
        if self.behave is not None:
            self.behave(config)  # a run that fails does so before it keeps anything
        for step in keep:
            (run_dir / "branches").mkdir(exist_ok=True)
            (run_dir / "branches" / f"step-{step:08d}.pt").touch()
        return super().__call__(config, run_dir, **more)


def test_the_plan_counts_a_trunk_once(tmp_path):
    plan = family_plan(tmp_path)
    short, middle, long = plan.runs
    assert {run.trunk_run for run in plan.runs} == {long.run_id}
    assert [run.steps_shared for run in plan.runs] == [16, 24, 0]  # four fifths of the run: the decay is the rest
    per_token = long.flops.training_per_token
    assert plan.flops == pytest.approx(per_token * 128 * (20 + 30 + 40))
    assert plan.flops_marginal == pytest.approx(per_token * 128 * (4 + 6 + 40))
    assert sum(run.budget_share for run in plan.runs) == pytest.approx(1)
    assert short.budget_share == pytest.approx(4 / 50)
    assert middle.flops_train_planned == pytest.approx(per_token * 128 * 30)


def test_runs_that_differ_otherwise_share_nothing(tmp_path):
    plan = family_plan(tmp_path, seeds=(0, 1))
    assert len({run.trunk_run for run in plan.runs}) == 2
    alone = make_plan(tmp_path, budgets={"tokens": [128 * 20, 128 * 30]}, seeds=(0,))  # warm-up as a share
    assert [run.trunk_run for run in alone.runs] == [None, None]
    assert alone.flops == alone.flops_marginal


def test_the_key_of_a_plan_groups_as_the_hash_of_the_config(tmp_path):
    plan = make_plan(
        tmp_path,
        axes={
            "grid": {"seed": [0, 1], "optim.lr_token": [1e-3, 2e-3], "optim.decay_share": [0.2, 0.5]},
            "zip": {"train.log_every": [1, 2]},
        },
        base_update={"optim.warmup_tokens": 256},
        budgets={"tokens": [128 * 20, 128 * 30]},
    )
    by_plan, by_config = {}, {}
    for run in plan.runs:
        by_plan.setdefault(run.trunk_run, set()).add(run.run_id)
        by_config.setdefault(run.config.trunk, set()).add(run.run_id)
    assert sorted(map(sorted, by_plan.values())) == sorted(map(sorted, by_config.values()))
    assert len(by_plan) == 8


def test_one_worker_trains_the_trunk_then_its_branches_and_clears_up(folder, monkeypatch):
    fake = FakeTrunkTrain().install(monkeypatch)
    report = work(folder, submission=1, capture=False)
    assert len(report.finished) == 3
    assert fake.branched == {40: None, 30: 40, 20: 40}
    assert not list(folder.glob("*/branches/*.pt"))


def test_a_worker_with_its_share_of_runs_still_takes_the_branches_of_its_trunk(tmp_path, monkeypatch):
    save_sweep(family_plan(tmp_path, seeds=(0, 1)), tmp_path / "s")
    FakeTrunkTrain().install(monkeypatch)
    report = work(tmp_path / "s", submission=1, max_runs=1, capture=False)
    assert len(report.finished) == 3
    seeds = {run.config.seed for run in load_sweep(tmp_path / "s").runs if run.run_id in report.finished}
    assert len(seeds) == 1


def test_when_the_trunk_fails_the_next_longest_takes_its_place(folder, monkeypatch):
    def behave(config):
        if config.n_steps == 40:
            raise ValueError("broken")

    fake = FakeTrunkTrain(behave).install(monkeypatch)
    report = work(folder, submission=1, capture=False)
    assert (len(report.finished), len(report.failed)) == (2, 1)
    assert fake.branched == {40: None, 30: None, 20: 30}
    # The next submission trains what failed; nobody needs anything of it by then.
    fake.behave = None
    work(folder, submission=2, capture=False)
    assert fake.branched[40] is None
    assert not list(folder.glob("*/branches/*.pt"))


def test_a_run_that_was_planned_after_its_longer_ones_had_ended_is_trained_alone(tmp_path, monkeypatch):
    fake = FakeTrunkTrain().install(monkeypatch)
    save_sweep(family_plan(tmp_path, lengths=(40,)), tmp_path / "s")
    work(tmp_path / "s", submission=1, capture=False)
    save_sweep(family_plan(tmp_path, lengths=(20, 40)), tmp_path / "s")
    work(tmp_path / "s", submission=2, capture=False)
    assert fake.branched == {40: None, 20: None}


def test_a_run_that_has_begun_goes_on_by_itself(folder):
    sweep = load_sweep(folder)
    (family,) = trunks.families(sweep.runs).values()
    short, middle, long = family
    assert [run.n_steps for run in family] == [20, 30, 40]
    nobody, everybody = (lambda _: False), (lambda _: True)
    assert trunks.start_of(short, family, everybody) == trunks.Start(ready=False)
    assert trunks.start_of(short, family, nobody) == trunks.Start(ready=True)
    assert trunks.start_of(long, family, everybody) == trunks.Start(ready=True)
    kept = trunks.kept_state(middle, short)
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert trunks.start_of(short, family, everybody) == trunks.Start(ready=True, trunk=middle)
    assert trunks.steps_to_keep(long, family) == (16, 24)
    assert trunks.steps_to_keep(middle, family) == (16,)
    (short.path / "checkpoints").mkdir(parents=True)
    (short.path / "checkpoints" / "step-00000004.pt").touch()
    assert trunks.start_of(short, family, everybody) == trunks.Start(ready=True)
    write_json(short.path / "result.json", result_json(short.config))
    assert trunks.steps_to_keep(long, family) == (24,)
    trunks.tidy(family)
    assert not kept.exists()


def test_a_family_is_one_unit_of_work_for_a_scheduler(tmp_path):
    save_sweep(family_plan(tmp_path, seeds=(0, 1)), tmp_path / "s")
    runs = load_sweep(tmp_path / "s").runs
    (group,) = group_runs(runs, ClusterConfig(time="1:00:00"))
    assert (group.n_tasks, group.minutes, len(group.run_ids)) == (2, 60, 6)


def test_the_time_of_a_branch_is_that_of_its_decay(tmp_path):
    plan = family_plan(tmp_path)
    hours = [run.hours for run in cost_plan(plan, Hardware(accelerator("H100"), 1, 0.3)).runs]
    assert hours[0] < 0.5 * hours[2]
    assert all(math.isfinite(x) for x in hours)


@pytest.mark.slow
def test_a_sweep_with_trunks_has_the_results_of_one_without(tmp_path, monkeypatch):
    """Trained for real: every figure of every run is the same to the bit; what was spent is not."""
    plan = family_plan(tmp_path, lengths=(20, 30, 40))
    launch(plan, tmp_path / "shared", "debug", threads=1)
    with monkeypatch.context() as patch:
        patch.setattr(claim, "start_of", lambda *_: trunks.Start(ready=True))
        launch(plan, tmp_path / "alone", "debug", threads=1)
    shared, alone = collect(tmp_path / "shared"), collect(tmp_path / "alone")
    own = ["trunk", "tokens_shared", "flops_train_marginal", "wall_s", "sweep"]
    pd.testing.assert_frame_equal(shared.drop(columns=own), alone.drop(columns=own))
    assert shared["tokens_shared"].tolist() == [16 * 128, 24 * 128, 0]
    assert shared["trunk"].iloc[:2].tolist() == [plan.runs[2].run_id] * 2
    assert alone["tokens_shared"].tolist() == [0, 0, 0]
    spent = shared["flops_train_marginal"] / shared["flops_train"]
    assert spent.tolist() == pytest.approx([0.2, 0.2, 1.0])


def _work(folder, queue):
    queue.put(work(folder, submission=1, threads=1).finished)


@pytest.mark.slow
def test_workers_side_by_side_train_each_run_once_and_branch(tmp_path):
    plan = family_plan(tmp_path, lengths=(20, 30, 40), seeds=(0, 1))
    save_sweep(plan, tmp_path / "s")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_work, args=(tmp_path / "s", queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    finished = [run_id for _ in workers for run_id in queue.get(timeout=120)]
    for worker in workers:
        worker.join()
    assert sorted(finished) == sorted(run.run_id for run in plan.runs)
    assert (collect(tmp_path / "s")["tokens_shared"] > 0).sum() == 4


def test_a_retry_of_a_branch_alone_trains_it_without_its_trunk(tmp_path, monkeypatch):
    fake = FakeTrunkTrain().install(monkeypatch)
    plan = family_plan(tmp_path)
    save_sweep(plan, tmp_path / "s")
    short = plan.runs[0].run_id
    resubmit(tmp_path / "s", "debug", run_ids=[short], threads=1)
    assert fake.branched == {20: None}
    assert read_json(tmp_path / "s" / short / "result.json")["status"] == "finished"


def test_a_later_submission_branches_from_a_trunk_that_an_earlier_one_finished(folder, monkeypatch):
    fake = FakeTrunkTrain().install(monkeypatch)
    work(folder, submission=1, capture=False, stop=lambda: any(folder.glob("*/result.json")))
    assert fake.branched == {40: None}
    left = [run.run_id for run in load_sweep(folder).runs if run.n_steps < 40]
    work(folder, submission=2, capture=False, only=left)
    assert fake.branched == {40: None, 30: 40, 20: 40}
    assert not list(folder.glob("*/branches/*.pt"))


def test_a_trunk_sent_out_alone_keeps_what_the_others_will_need(folder, monkeypatch):
    FakeTrunkTrain().install(monkeypatch)
    long = next(run for run in load_sweep(folder).runs if run.n_steps == 40)
    work(folder, submission=1, capture=False, only=[long.run_id])
    assert sorted(path.name for path in long.path.glob("branches/*.pt")) == ["step-00000016.pt", "step-00000024.pt"]


def test_nobody_waits_for_a_trunk_that_stands_behind_the_branch_already(folder):
    (family,) = trunks.families(load_sweep(folder).runs).values()
    short, middle, long = family
    (long.path / "checkpoints").mkdir(parents=True)
    checkpoint = long.path / "checkpoints" / "step-00000015.pt"
    checkpoint.touch()
    is_long = lambda run: run is long  # noqa: E731
    assert trunks.start_of(short, family, is_long) == trunks.Start(ready=False)
    checkpoint.rename(checkpoint.with_name("step-00000016.pt"))
    assert trunks.start_of(short, family, is_long) == trunks.Start(ready=True)
    assert trunks.start_of(middle, family, is_long) == trunks.Start(ready=False)


def test_a_run_is_trained_alone_where_the_state_kept_for_it_is_damaged(folder, monkeypatch):
    class Torn(FakeTrunkTrain):
        def __call__(self, config, run_dir, *, trunk=None, **more):
            if trunk is not None and config.n_steps == 20:
                raise UnusableBranchError("step-00000016.pt: damaged")
            return super().__call__(config, run_dir, trunk=trunk, **more)

    fake = Torn().install(monkeypatch)
    report = work(folder, submission=1, capture=False)
    assert (len(report.finished), report.failed) == (3, [])
    assert fake.branched == {40: None, 30: 40, 20: None}
    short = min(load_sweep(folder).runs, key=lambda run: run.n_steps)
    assert "damaged" in read_json(short.path / "status.json")["note"]


def test_the_marginal_costs_of_a_family_sum_to_what_was_trained_though_the_trunk_diverged(folder):
    short, middle, long = load_sweep(folder).runs
    finish(long, "diverged", tokens=36 * 128, step=36)
    log = long.path / "metrics.jsonl"
    rows = [{"step": step, "boundary_rate": 0.2 if step <= 12 else 0.25} for step in (12, 36)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in (short, middle):
        finish(run, tokens_per_concept_train=4.0, trunk=long.run_id, trunk_tokens=run.n_stable_steps * 128)
    frame = collect(folder).set_index("run_id")
    at = frame.loc[long.run_id]
    assert at["tokens_per_concept_train"] is pd.NA or math.isnan(at["tokens_per_concept_train"])
    model, seq_len = long.config.model, long.config.data.seq_len
    realised = 36 / (12 * 0.2 + 24 * 0.25)
    of_long = 36 * 128 * count(model, seq_len, realised).training_per_token
    assert at["flops_train_marginal"] == pytest.approx(of_long)
    branches = 128 * (4 + 6) * count(model, seq_len, 4.0).training_per_token
    assert frame["flops_train_marginal"].sum() == pytest.approx(of_long + branches)
