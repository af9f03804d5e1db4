import importlib
import threading
import time
from pathlib import Path

import pytest
import torch

import sweeps.heartbeat as heartbeat_module
import sweeps.worker as worker_module
from dlcm.errors import UserError
from dlcm.record import read_json, run_lock, write_json
from sweeps.code import packages_root
from sweeps.heartbeat import MAX_DEATHS, MAX_STARTS
from sweeps.states import run_state, sweep_states
from sweeps.store import CLAIM, load_sweep, save_sweep
from sweeps.worker import thread_environment, work
from tests.sweeps.tiny import FakeTrain, beat, finish, make_plan


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "tiny"
    save_sweep(make_plan(tmp_path), path)
    return path


def start(folder, submission=1, **options):
    return work(folder, submission=submission, capture=False, **options)


def statuses(folder):
    return [state.status for state in sweep_states(load_sweep(folder), {})]


def fail_seed_1(config):
    if config.seed == 1:
        raise ValueError("first line\nthe last line")


def test_the_longest_run_is_taken_first(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "tiny"
    axes = {"grid": {"train.tokens": [256, 1024, 512]}}
    data = make_plan(tmp_path).sweep.model_dump()
    data["base"].pop("train.tokens")
    from sweeps.plan import plan
    from sweeps.spec import Sweep

    save_sweep(plan(Sweep.from_dict(data | {"axes": axes})), path)
    fake = FakeTrain().install(monkeypatch)
    start(path)
    tokens = {run.run_id: run.config.tokens for run in load_sweep(path).runs}
    assert [tokens[run_id] for run_id in fake.calls] == [1024, 512, 256]


def test_a_failing_run_is_recorded_and_the_worker_goes_on(folder, monkeypatch):
    FakeTrain(fail_seed_1).install(monkeypatch)
    report = start(folder)
    assert statuses(folder) == ["finished", "failed", "finished"]
    assert (len(report.finished), len(report.failed)) == (2, 1)
    failure = read_json(load_sweep(folder).runs[1].path / "failure.json")
    assert (failure["stage"], failure["exception"]) == ("train", "ValueError")
    assert failure["message"] == "ValueError: the last line"
    assert "fail_seed_1" in failure["traceback"]


def test_a_later_submission_retries_the_failed_run_alone_and_clears_its_failure(folder, monkeypatch):
    FakeTrain(fail_seed_1).install(monkeypatch)
    start(folder)
    fake = FakeTrain().install(monkeypatch)
    start(folder, submission=1)
    assert fake.calls == []  # a worker of the same submission leaves it alone
    start(folder, submission=2)
    run = load_sweep(folder).runs[1]
    assert fake.calls == [run.run_id]
    assert not (run.path / "failure.json").exists()
    assert statuses(folder) == ["finished"] * 3


def test_finished_and_diverged_runs_are_never_trained_again(folder, monkeypatch):
    first, second, third = load_sweep(folder).runs
    finish(first)
    finish(second, "diverged")
    fake = FakeTrain().install(monkeypatch)
    start(folder)
    assert fake.calls == [third.run_id]


def test_runs_that_left_the_sweep_file_are_not_trained(tmp_path, folder, monkeypatch):
    save_sweep(make_plan(tmp_path, seeds=(1, 2)), folder)
    fake = FakeTrain().install(monkeypatch)
    start(folder)
    assert len(fake.calls) == 2
    assert not any("-s0-" in run_id for run_id in fake.calls)


def test_many_workers_train_each_run_exactly_once(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "tiny"
    save_sweep(make_plan(tmp_path, seeds=range(12)), path)
    fake = FakeTrain(lambda config: time.sleep(0.01)).install(monkeypatch)
    threads = [threading.Thread(target=start, args=(path,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fake.calls) == sorted(run.run_id for run in load_sweep(path).runs)


def test_looking_at_the_status_never_costs_a_worker_its_claim(folder, monkeypatch):
    FakeTrain().install(monkeypatch)
    over = threading.Event()

    def look():
        while not over.is_set():
            statuses(folder)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        report = start(folder)
    finally:
        over.set()
        thread.join()
    assert len(report.finished) == 3


def test_a_cancelled_run_stops_after_its_step_and_the_worker_goes_on(folder, monkeypatch):
    FakeTrain().install(monkeypatch)
    victim = load_sweep(folder).runs[1]

    def cancel(run):
        if run.run_id == victim.run_id:
            write_json(run.path / "cancelled.json", {})

    report = start(folder, on_run=cancel)
    assert statuses(folder) == ["finished", "cancelled", "finished"]
    assert report.cancelled == [victim.run_id]


def test_a_worker_leaves_after_its_share_of_runs_and_takes_only_those_it_may(folder, monkeypatch):
    fake = FakeTrain().install(monkeypatch)
    start(folder, max_runs=1)
    assert len(fake.calls) == 1
    last = load_sweep(folder).runs[2].run_id
    start(folder, only=[last])
    assert fake.calls[1:] == [last]


def test_a_run_that_kills_its_workers_is_left_alone_until_the_next_submission(folder, monkeypatch):
    run = load_sweep(folder).runs[0]
    fake = FakeTrain().install(monkeypatch)
    for more in ({"deaths": MAX_DEATHS, "state": "died"}, {"starts": MAX_STARTS}):
        beat(run, submission=3, **more)
        start(folder, submission=3)
        assert run.run_id not in fake.calls
    start(folder, submission=4)
    assert run.run_id in fake.calls
    assert read_json(run.path / "status.json")["deaths"] == 0


def test_the_run_of_a_dead_worker_is_free_at_once_and_its_start_is_counted(folder, monkeypatch):
    run = load_sweep(folder).runs[0]
    FakeTrain().install(monkeypatch)
    beat(run, submission=3)
    start(folder, submission=3)
    assert run_state(run).status == "finished"
    assert read_json(run.path / "status.json")["starts"] == 2


def test_a_held_run_is_passed_over(folder, monkeypatch):
    fake = FakeTrain().install(monkeypatch)
    first, second, _ = load_sweep(folder).runs
    with run_lock(first.path, CLAIM), run_lock(second.path):
        start(folder)
    assert len(fake.calls) == 1


def test_the_heart_beats_while_a_step_lasts(folder, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "BEAT_S", 0.02)
    seen = []

    def slow(config):
        path = folder / config.run_id / "status.json"
        for _ in range(5):
            time.sleep(0.05)
            seen.append(read_json(path)["time"])

    FakeTrain(slow).install(monkeypatch)
    start(folder, max_runs=1)
    assert len(set(seen)) == 5


def test_a_worker_that_is_told_to_stop_leaves_the_run_for_later_and_says_so(folder, monkeypatch):
    steps = []

    def follow(progress):
        steps.append(progress.step)

    FakeTrain().install(monkeypatch)
    report = start(folder, on_step=follow, stop=lambda: len(steps) >= 3)
    run = load_sweep(folder).runs[0]
    record = read_json(run.path / "status.json")
    assert (record["state"], record["reason"]) == ("stopped", "time-out, preemption or shutdown")
    assert report.stopped == [run.run_id]
    assert len(steps) == 3
    assert run_state(run).status == "lost"
    assert start(folder).finished  # nothing stands in the way of the next worker


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_once_and_says_so(folder, monkeypatch):
    seen = []

    class Short(FakeTrain):
        def __call__(self, config, run_dir, *, micro_batch_tokens=None, **more):
            seen.append(micro_batch_tokens)
            if micro_batch_tokens is None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().__call__(config, run_dir, micro_batch_tokens=micro_batch_tokens, **more)

    Short().install(monkeypatch)
    start(folder, max_runs=1)
    (state, *_) = sweep_states(load_sweep(folder), {})
    assert seen == [None, 64]
    assert state.status == "finished"
    assert state.note == "out of memory with micro-batches of 128 tokens; goes on with 64 (same global batch)"


@pytest.mark.slow
def test_out_of_memory_a_second_time_is_a_failure(folder, monkeypatch):
    def short(config):
        raise MemoryError("no memory at all")

    fake = FakeTrain(short).install(monkeypatch)
    start(folder, max_runs=1)
    (state, *_) = sweep_states(load_sweep(folder), {})
    assert len(fake.calls) == 2
    assert (state.status, state.reason) == ("failed", "MemoryError: no memory at all")


def test_a_worker_whose_run_was_taken_over_leaves_it_untouched(folder, monkeypatch):
    run = load_sweep(folder).runs[0]

    def taken_over(config):
        # What another machine does after this one was silent for too long.
        place = run.path / f"{CLAIM}.d"
        (place / "00000002.lease").write_text('{"host": "elsewhere"}')
        write_json(run.path / "status.json", {**read_json(run.path / "status.json"), "host": "elsewhere"})

    class Careful(FakeTrain):
        def __call__(self, config, run_dir, *, guard, **more):
            taken_over(config)
            guard()
            raise AssertionError("it went on")

    Careful().install(monkeypatch)
    report = start(folder, max_runs=None, only=[run.run_id])
    assert report.n_taken == 0
    assert read_json(run.path / "status.json")["host"] == "elsewhere"
    assert not (run.path / "failure.json").exists()
    assert not (run.path / "result.json").exists()


def test_each_missing_evaluation_is_made_and_a_failing_one_keeps_the_result(tmp_path, monkeypatch):
    path, other = tmp_path / "runs" / "tiny", tmp_path / "other.jsonl"
    other.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    save_sweep(make_plan(tmp_path, evaluate=["corpus", str(other)]), path)
    FakeTrain().install(monkeypatch)
    made = []

    def evaluate(run_dir: Path, tasks, limit, progress):
        if "-s1-" in run_dir.name:
            raise UserError("no such task")
        for task in tasks:
            made.append((run_dir.name, task))
            write_json(run_dir / "eval" / f"{Path(task).stem}.json", {"acc": 0.5, "acc_stderr": 0.1})

    monkeypatch.setattr(importlib.import_module("dlcm.evaluate"), "evaluate", evaluate)
    first, second, third = load_sweep(path).runs
    finish(first)
    write_json(first.path / "eval" / "corpus.json", {"acc": 0.5, "acc_stderr": 0.1})
    start(path)
    assert made == [(first.run_id, str(other)), (third.run_id, "corpus"), (third.run_id, str(other))]
    states = sweep_states(load_sweep(path), {})
    assert [state.is_complete for state in states] == [True, False, True]
    assert (states[1].status, states[1].reason) == ("finished", "evaluation failed: no such task")
    assert second.run_id == states[1].run_id


def test_what_a_run_prints_lands_in_its_log_native_code_included(folder, monkeypatch):
    import os
    import sys

    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # noqa: SIM115 (a descriptor, not a path)

    def chatter(config):
        print("from python")
        os.write(2, b"from native code\n")

    FakeTrain(chatter).install(monkeypatch)
    work(folder, submission=1, max_runs=1)
    text = next(folder.glob("*/logs/worker.log")).read_text()
    assert "from python" in text
    assert "from native code" in text


def test_a_worker_with_another_installation_refuses_to_run(folder, tmp_path):
    with pytest.raises(UserError, match="the sweep was submitted with"):
        start(folder, root=tmp_path)


def test_the_four_packages_come_from_one_place():
    assert (packages_root() / "sweeps" / "worker.py").samefile(worker_module.__file__)


def test_threads_are_set_for_processes_started_inside_and_restored(monkeypatch):
    import os

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with thread_environment(3):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ
