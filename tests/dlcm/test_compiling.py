"""Whether a run compiles: what is asked for, else what was measured, and the same again after an interruption."""

import json

import pytest

from dlcm.compiling import SHORTEST_RUN_S, CompileFigures, choose_compile
from dlcm.config import RunConfig
from tests.dlcm.conftest import small_config

STEPS = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def config(steps=STEPS, **train):
    fields = {"tokens": steps * 512, "batch_tokens": 512, **train}
    return RunConfig.model_validate({"model": small_config().model_dump(), "train": fields})


class Clock:
    """Stands in for the measuring: eager steps, compiled steps, and how long the first compiled one takes."""

    def __init__(self, eager, compiled, first):
        self.eager, self.compiled, self.first, self.calls = eager, compiled, first, []

    def __call__(self, compiled, n_steps):
        self.calls.append(compiled)
        return (
            [self.first, *[self.compiled] * (n_steps - 1)]
            if compiled
            else [self.eager * 9, *[self.eager] * (n_steps - 1)]
        )


def test_what_is_asked_for_is_not_measured(tmp_path):
    clock = Clock(1.0, 0.1, 5.0)
    for asked in (True, False):
        assert choose_compile(config(compile=asked), tmp_path, "cuda", "GPU", clock) is asked
    assert choose_compile(config(), tmp_path, "cpu", "cpu", clock) is False
    assert clock.calls == []


@pytest.mark.parametrize(
    ("compiled", "first", "pays"),
    [(0.5, 60.5, True), (0.5, 600.5, False), (1.1, 60.0, False), (0.9, 60.9, True), (0.95, 60.95, False)],
)
def test_it_pays_where_the_steps_save_more_than_the_compilation_takes(compiled, first, pays, tmp_path):
    """By hand: 1,000 steps of one second, each (1 - compiled) faster, against first - compiled seconds."""
    assert choose_compile(config(), tmp_path, "cuda", "GPU", Clock(1.0, compiled, first)) is pays


def test_a_shape_is_measured_once_and_another_shape_anew(tmp_path):
    clock = Clock(1.0, 0.5, 60.0)
    for seed_steps in (STEPS, 2 * STEPS):
        assert choose_compile(config(seed_steps), tmp_path / "a", "cuda", "GPU", clock)
    assert clock.calls == [False, True]
    choose_compile(config(batch_tokens=1024), tmp_path / "b", "cuda", "GPU", clock)
    choose_compile(config(), tmp_path / "b", "cuda", "another GPU", clock)
    assert clock.calls == [False, True] * 3


def test_other_ranks_sharing_and_recomputation_are_other_shapes(tmp_path):
    clock = Clock(1.0, 0.5, 60.0)
    ways = [(config(), 1), (config(), 2), (config(parallel="fsdp"), 2), (config(activation_checkpointing=True), 1)]
    for run, n_ranks in ways * 2:
        choose_compile(run, tmp_path, "cuda", "GPU", clock, n_ranks=n_ranks)
    assert clock.calls == [False, True] * len(ways)


def test_a_cache_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "file" / "cache"))
    assert choose_compile(config(), tmp_path, "cuda", "GPU", Clock(1.0, 0.5, 60.0))


def test_figures_that_cannot_be_read_are_measured_again(tmp_path):
    clock = Clock(1.0, 0.5, 60.0)
    choose_compile(config(), tmp_path, "cuda", "GPU", clock)
    (path,) = (tmp_path / "cache" / "compile").glob("*.json")
    path.write_text('{"eager_s": 1.0')
    assert choose_compile(config(), tmp_path, "cuda", "GPU", clock)
    assert clock.calls == [False, True] * 2
    assert json.loads(path.read_text())["compiled_s"] == 0.5


def test_a_run_that_is_shorter_than_a_compilation_is_not_tried_compiled(tmp_path):
    clock = Clock(SHORTEST_RUN_S / STEPS / 2, 0.0, 0.0)
    assert not choose_compile(config(), tmp_path, "cuda", "GPU", clock)
    assert clock.calls == [False]
    assert choose_compile(config(10 * STEPS), tmp_path, "cuda", "GPU", clock)  # a longer one of the same shape is


def test_a_run_that_goes_on_keeps_the_choice_it_began_with(tmp_path):
    clock = Clock(1.0, 0.5, 60.0)
    for before in (False, True):
        (tmp_path / "env.json").write_text(json.dumps({"compiled": before}))
        assert choose_compile(config(), tmp_path, "cuda", "GPU", clock) is before
    assert clock.calls == []


@pytest.mark.parametrize(
    ("model", "train"),
    [({"attention_backend": "reference"}, {}), ({}, {"precision": "fp32"}), ({"d_head": 4}, {})],
    ids=["no operator of its own", "flash takes no fp32", "flash takes no heads of 4"],
)
def test_an_attention_that_cannot_be_compiled_is_left_alone(model, train, tmp_path):
    model = small_config(**model).model_dump()
    run = RunConfig.model_validate({**config(**train).model_dump(), "model": model})
    clock = Clock(1.0, 0.1, 1.0)
    assert not choose_compile(run, tmp_path, "cuda", "GPU", clock)
    assert clock.calls == []


def test_ranks_do_what_rank_zero_knows(tmp_path):
    """A rank whose file system shows it no figures must not measure alone."""
    clock = Clock(1.0, 0.5, 60.0)
    told = iter([None, CompileFigures(1.0, 0.5, 60.0)])  # nothing in env.json, then what rank 0 has read
    assert choose_compile(config(), tmp_path, "cuda", "GPU", clock, lambda _: next(told))
    assert clock.calls == []
