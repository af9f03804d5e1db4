"""What a run says of itself on the way: speed, MFU, time left, the scale of its activations, and where it was still good."""

import json
import math
from importlib.metadata import EntryPoint
from itertools import count as from_zero

import numpy as np
import pytest
import torch

from dlcm import checkpoint
from dlcm.config import RunConfig
from dlcm.console import Reporter
from dlcm.errors import UserError
from dlcm.loader import Loader
from dlcm.meter import load_meter
from dlcm.micro_batch import micro_batches
from dlcm.output import PARTS
from dlcm.record import read_metrics
from dlcm.shards import open_corpus
from dlcm.train import load_result, train
from dlcm.trainer import Trainer
from flops import count
from tests.dlcm.conftest import dense_config, small_config


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} word and {i * i} more " * 20}) + "\n" for i in range(60)))
    return path


def make(text, model=None, **train_fields):
    return RunConfig.model_validate(
        {
            "model": (model or small_config(vocab_size=257)).model_dump(),
            "data": {"corpus": str(text), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 512},
            "optim": {"lr_token": 1e-2, "lr_concept": 1e-2},
            "train": {"tokens": 6 * 256, "batch_tokens": 256, "log_every": 1, "checkpoint_every": 2, **train_fields},
        }
    )


@pytest.mark.many
@pytest.mark.parametrize("micro", [256, 64])
@pytest.mark.parametrize("model", [small_config(vocab_size=257), dense_config(vocab_size=257)], ids=["dlcm", "dense"])
def test_scales_are_the_root_mean_squares_of_what_leaves_each_part(model, micro, text, tmp_path):
    """Independent: forward hooks on the last block of each stack, in the first step of the run."""
    config = make(text, model, micro_batch_tokens=micro)
    trainer = Trainer(config, tmp_path)
    seen = {part: [] for part in PARTS}
    modules = {"embedding": trainer.model.embedding, "encoder": trainer.model.encoder[-1]}
    if not model.is_dense:
        modules |= {"concepts": trainer.model.concepts, "decoder": trainer.model.decoder[-1]}
    for part, module in modules.items():
        module.register_forward_hook(
            lambda *of, part=part: seen[part].append((of[2].z_KC if part == "concepts" else of[2]).detach().double())
        )
    batch = trainer.corpus.train.batch(0, seed=0, batch_tokens=256, seq_len=64)
    trainer.model.train()
    for part in micro_batches(batch, config):
        tokens_T, _, cu, draws_T = trainer._to_device(part)
        trainer.model(tokens_T, cu_seqlens=cu, draws=draws_T)
    train(config, tmp_path / "run")
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    for part in PARTS:
        if part not in modules:
            assert row[f"rms_{part}"] is None
            continue
        # Each micro-batch weighs as its tokens do: all alike here.
        squares = [x.square().mean() for x in seen[part]]
        assert row[f"rms_{part}"] == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-5)


def test_scales_are_measured_only_in_steps_that_are_logged(text, tmp_path):
    config = make(text, log_every=3)
    measured = []
    trainer = Trainer(config, tmp_path)
    forward = trainer.model.forward
    trainer.model.forward = lambda *a, **kw: measured.append(kw.get("with_scales")) or forward(*a, **kw)
    with trainer.loader:
        for trainer.step in range(6):
            trainer.train_step()
    assert measured == [False, False, True, False, False, True]


@pytest.mark.slow
def test_measuring_scales_does_not_change_a_run(text, tmp_path):
    often, never = train(make(text), tmp_path / "a"), train(make(text, log_every=1000), tmp_path / "b")
    assert often.loss_nats == never.loss_nats


def test_mfu_is_flops_a_second_over_the_peak_of_the_device():
    config = RunConfig.model_validate({"model": small_config().model_dump(), "train": {"tokens": 4096}})
    environment = {"device": "NVIDIA H100 80GB HBM3", "n_ranks": 2, "processor": "x", "threads": 1}
    meter = load_meter(config, environment)
    assert meter is not None
    expected = count(config.model, 256, 2.5).training_per_token * 1e6 / (2 * 989.4e12)  # bf16 peak of the datasheet
    assert meter(1e6, 2.5) == pytest.approx(expected, rel=1e-12)
    assert load_meter(config, {**environment, "device": "an unknown card"}) is None


def test_a_meter_that_fails_is_left_out(monkeypatch, capsys):
    broken = EntryPoint("mfu", "no_such_module:meter", "dlcm.meters")
    working = EntryPoint("mfu", "tests.dlcm.test_watched:constant_meter", "dlcm.meters")
    monkeypatch.setattr("dlcm.meter.entry_points", lambda group: [broken, working])
    meter = load_meter(RunConfig.model_validate({"model": small_config().model_dump(), "train": {"tokens": 4096}}), {})
    assert meter is not None
    assert meter(1e6, 2.5) == 0.25
    said = "warning: meter no_such_module:meter is left out (ModuleNotFoundError: No module named 'no_such_module')\n"
    assert capsys.readouterr().err == said


def constant_meter(config, environment):
    return lambda tokens_per_s, ratio: 0.25


def test_progress_tells_speed_time_left_and_mfu(text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dlcm.trainer.load_meter", lambda *_: lambda tokens_per_s, ratio: tokens_per_s / 1e6 + 0 * ratio
    )
    ticks = from_zero()
    monkeypatch.setattr("dlcm.trainer.time.perf_counter", lambda: float(next(ticks)))
    seen = []
    train(make(text), tmp_path, on_step=seen.append)
    assert [at.step for at in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].seconds_left == 0.0
    assert seen[0].seconds_left == pytest.approx(5 * 2.0)  # the clock ticks at the start, before a step and after it
    assert all(at.tokens_per_s == 256.0 and at.mfu == pytest.approx(256e-6) for at in seen)
    assert seen[0].told().endswith("256 tokens/s  MFU 0.0%")
    assert {row["mfu"] for row in read_metrics(tmp_path / "metrics.jsonl")} == {0.0003}


def test_time_left_of_a_run_that_goes_on_is_told_from_what_it_did_itself(monkeypatch, capsys):
    now = iter([0.0, 0.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr("dlcm.console.time.monotonic", lambda: next(now))
    with Reporter() as report:
        report("training", 900, 1000)
        report("training", 920, 1000)
    assert capsys.readouterr().err.splitlines() == ["training, 90%", "training, 92%, 80 s left"]


def test_batches_drawn_ahead_are_those_of_their_step_in_any_order(text):
    config = make(text)
    corpus = open_corpus(config.data)
    with Loader(corpus, config) as loader:
        for step in (0, 1, 2, 4, 3, 5, 0):
            ahead = loader.batch(step)
            here = corpus.train.batch(step, seed=0, batch_tokens=256, seq_len=64)
            assert np.array_equal(ahead.tokens_T, here.tokens_T)
            assert np.array_equal(ahead.windows, here.windows)


def test_a_fault_of_the_loader_is_raised_where_its_batch_is_asked_for(text, monkeypatch):
    config = make(text)
    corpus = open_corpus(config.data)
    draw = corpus.train.batch

    def torn(step, **fields):
        if step == 1:
            raise UserError("no such window")
        return draw(step, **fields)

    monkeypatch.setattr(corpus.train, "batch", torn)
    with Loader(corpus, config) as loader:
        loader.batch(0)
        with pytest.raises(UserError, match="no such window"):
            loader.batch(1)


def diverging(monkeypatch, at_step: int):
    """Let the loss be three times ln V from a step on, while the run is otherwise what it is."""
    step = Trainer.train_step

    def train_step(self):
        loss, norm = step(self)
        return (3 * math.log(257) if self.step >= at_step else loss), norm

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(text, tmp_path, monkeypatch):
    """The running loss rises slowly: checkpoints are written on the way up, and the newest two are worthless."""
    diverging(monkeypatch, at_step=5)
    result = train(make(text, tokens=40 * 256, divergence_factor=2.0), tmp_path)
    assert result.status == "diverged"
    assert result.last_good_step == 4
    steps = [int(path.stem.split("-")[1]) for path in checkpoint.checkpoint_paths(tmp_path)]
    assert steps[-1] == 4
    assert len(steps) == 3
    assert steps[1] > 6
    state = torch.load(tmp_path / "checkpoints" / "step-00000004.pt", weights_only=True)
    assert state["tally"]["running_loss"] < 1.05 * math.log(257)
    assert load_result(tmp_path).last_good_step == 4


def test_a_run_that_ends_well_keeps_the_newest_two_alone(text, tmp_path):
    result = train(make(text), tmp_path)
    assert result.last_good_step is None
    assert [path.name for path in checkpoint.checkpoint_paths(tmp_path)] == ["step-00000006.pt", "step-00000004.pt"]
