"""A run branched from the trunk of a longer one is the run that it would have been alone, to the bit."""

import pytest
import torch

from dlcm.checkpoint import checkpoint_paths
from dlcm.config import RunConfig
from dlcm.errors import UserError
from dlcm.optim import lr_factor
from dlcm.record import read_metrics
from dlcm.train import load_result, train
from dlcm.trainer import Trainer
from dlcm.trunk import UnusableBranchError, branch_path
from tests.dlcm.conftest import dense_config, small_config
from tests.dlcm.test_train import VOCAB, Killed, assert_same_run, cache, corpus_path, kill_at, make_config  # noqa: F401


def of_length(config: RunConfig, n_steps: int, **optim) -> RunConfig:
    blocks = config.model_dump()
    blocks["train"] |= {"tokens": n_steps * 512, "measure_stable": optim.get("schedule") != "cosine"}
    blocks["optim"] |= {"warmup_tokens": 2 * 512, **optim}
    return RunConfig.model_validate(blocks)


def steps_alike(a: RunConfig, b: RunConfig) -> int:
    """The number of first steps of equal learning rate, by comparison."""
    n = min(a.n_steps, b.n_steps)
    return next((i for i in range(n) if lr_factor(a, i) != lr_factor(b, i)), n)


MODELS = {
    "dlcm": lambda: small_config(vocab_size=VOCAB),
    "threshold": lambda: small_config(vocab_size=VOCAB, boundary={"decision": "threshold"}),
    "random": lambda: small_config("random", vocab_size=VOCAB),
    "dense": lambda: dense_config(vocab_size=VOCAB),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("killed_at", [None, 11, 15])
def test_a_branch_equals_the_run_alone_bitwise(kind, killed_at, corpus_path, tmp_path):  # noqa: F811
    base = make_config(corpus_path, MODELS[kind]())
    long, short = of_length(base, 24), of_length(base, 15)
    assert long.trunk == short.trunk
    train(short, tmp_path / "alone")
    if killed_at is not None:
        with pytest.raises(Killed):
            train(long, tmp_path / "long", keep=[short.n_stable_steps], on_step=kill_at(killed_at))
    train(long, tmp_path / "long", keep=[short.n_stable_steps])
    steps = []
    train(short, tmp_path / "branch", trunk=tmp_path / "long", on_step=lambda progress: steps.append(progress.step))
    assert steps == list(range(13, 16))  # the decay alone: a fifth of 15 steps
    told = load_result(tmp_path / "branch")
    assert (told.trunk, told.trunk_tokens) == (long.run_id, 12 * 512)
    assert told.trunk_wall_s > 0
    assert_same_run(tmp_path / "alone", tmp_path / "branch")


@pytest.mark.slow
def test_a_branch_that_is_killed_goes_on_from_its_own_checkpoint(corpus_path, tmp_path):  # noqa: F811
    base = make_config(corpus_path, checkpoint_every=1)
    long, short = of_length(base, 24), of_length(base, 15)
    train(short, tmp_path / "alone")
    train(long, tmp_path / "long", keep=[12])
    with pytest.raises(Killed):
        train(short, tmp_path / "branch", trunk=tmp_path / "long", on_step=kill_at(14))
    branch_path(tmp_path / "long", 12).unlink()  # no longer needed
    train(short, tmp_path / "branch", trunk=tmp_path / "long")
    assert_same_run(tmp_path / "alone", tmp_path / "branch")
    assert load_result(tmp_path / "branch").trunk == long.run_id


@pytest.mark.slow
def test_what_the_longer_run_keeps_does_not_change_it(corpus_path, tmp_path):  # noqa: F811
    long = of_length(make_config(corpus_path), 24)
    train(long, tmp_path / "a")
    train(long, tmp_path / "b", keep=[7, 12])
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("decay_share", [0.0, 0.07, 0.2, 0.25, 0.33, 0.5])
@pytest.mark.parametrize("n_steps", [10, 11, 15, 97, 250])
def test_stable_steps_are_those_whose_rate_does_not_depend_on_the_length(decay_share, n_steps, corpus_path):  # noqa: F811
    base = make_config(corpus_path)
    short = of_length(base, n_steps, decay_share=decay_share, final_lr_ratio=0.1)
    long = of_length(base, 1_000, decay_share=0.3)
    assert short.n_stable_steps <= steps_alike(short, long)
    if decay_share >= 0.1:  # else the last tenth, over which R is averaged, is what ends the common part
        assert short.n_stable_steps >= steps_alike(short, long) - 1


def test_only_runs_that_begin_alike_have_a_trunk(corpus_path):  # noqa: F811
    base = make_config(corpus_path)
    run = of_length(base, 20)
    assert of_length(base, 30).trunk == run.trunk == of_length(base, 20, decay_share=0.5).trunk
    assert base.trunk is None  # its warm-up is a share of its length
    assert of_length(base, 20, schedule="cosine").trunk is None
    others = [
        of_length(base, 20, lr_token=0.5),
        of_length(base, 20, warmup_tokens=512),
        run.model_copy(update={"seed": 1}),
        run.model_copy(update={"train": run.train.model_copy(update={"batch_tokens": 256})}),
        run.model_copy(update={"train": run.train.model_copy(update={"log_every": 1})}),
    ]
    assert run.trunk not in {other.trunk for other in others}


def test_a_warm_up_that_reaches_into_the_decay_is_refused(corpus_path):  # noqa: F811
    with pytest.raises(ValueError, match="reaches into the decay"):
        of_length(make_config(corpus_path), 20, warmup_tokens=17 * 512)


@pytest.mark.slow
def test_a_branch_of_another_run_is_refused(corpus_path, tmp_path):  # noqa: F811
    base = make_config(corpus_path)
    long, short = of_length(base, 24), of_length(base, 15)
    with pytest.raises(UserError, match="has not kept its state"):
        train(short, tmp_path / "branch", trunk=tmp_path / "long")
    train(long, tmp_path / "long", keep=[12])
    other = short.model_copy(update={"seed": 3})
    with pytest.raises(UserError, match="not the same up to this step"):
        train(other, tmp_path / "other", trunk=tmp_path / "long")
    path = branch_path(tmp_path / "long", 12)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UnusableBranchError, match="damaged"):
        train(short, tmp_path / "branch", trunk=tmp_path / "long")
    with pytest.raises(ValueError, match="beyond the 19 stable steps"):
        train(long, tmp_path / "again", keep=[20])


@pytest.mark.slow
def test_the_stable_loss_is_measured_where_the_decay_begins_and_changes_nothing(corpus_path, tmp_path):  # noqa: F811
    base = make_config(corpus_path)
    config = of_length(base, 15)
    silent = config.model_copy(update={"train": config.train.model_copy(update={"measure_stable": False})})
    told, plain = train(config, tmp_path / "told"), train(silent, tmp_path / "plain")
    assert plain.loss_nats_stable is None
    assert told.loss_nats == plain.loss_nats
    # A run that ends there, at full rate, has that loss as its last one.
    ends = of_length(base, 12, decay_share=0.0)
    assert told.loss_nats_stable == train(ends, tmp_path / "ends").loss_nats
    assert told.loss_nats_stable != told.loss_nats
    assert torch.isfinite(torch.tensor(told.loss_nats_stable))


@pytest.mark.slow
def test_a_branch_has_all_lines_of_the_log_though_its_trunk_was_cut_back(corpus_path, tmp_path):  # noqa: F811
    """The trunk is killed behind the branch, before its next checkpoint, and again while it catches up."""
    base = make_config(corpus_path, checkpoint_every=10)
    long, short = of_length(base, 40), of_length(base, 20)
    train(short, tmp_path / "alone")
    for step in (18, 11):
        with pytest.raises(Killed):
            train(long, tmp_path / "long", keep=[short.n_stable_steps], on_step=kill_at(step))
    assert max(row["step"] for row in read_metrics(tmp_path / "long" / "metrics.jsonl")) < short.n_stable_steps
    train(short, tmp_path / "branch", trunk=tmp_path / "long")
    assert_same_run(tmp_path / "alone", tmp_path / "branch")


@pytest.mark.slow
def test_a_branch_that_diverges_can_go_back_to_where_it_left_the_trunk(corpus_path, tmp_path, monkeypatch):  # noqa: F811
    base = make_config(corpus_path, checkpoint_every=10)
    long, short = of_length(base, 40), of_length(base, 20)
    train(long, tmp_path / "long", keep=[short.n_stable_steps])
    monkeypatch.setattr(Trainer, "_divergence", lambda self, *_: "told so" if self.step == 18 else None)
    result = train(short, tmp_path / "branch", trunk=tmp_path / "long")
    assert (result.status, result.last_good_step) == ("diverged", short.n_stable_steps)
    assert [path.name for path in checkpoint_paths(tmp_path / "branch")] == ["step-00000016.pt"]
