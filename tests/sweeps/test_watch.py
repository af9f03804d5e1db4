import io
from dataclasses import replace

import pytest

from dlcm.record import run_lock
from sweeps.jobs import JobState
from sweeps.states import run_state
from sweeps.store import CLAIM, load_sweep, save_sweep
from sweeps.watch import explain_incomplete, format_duration, format_table, render, take_snapshot, watch
from tests.sweeps.tiny import beat, fail, finish, make_plan


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / "tiny"
    save_sweep(make_plan(tmp_path), path)
    return path


def test_the_time_left_is_the_open_work_over_the_present_rate(folder):
    first, second, third = load_sweep(folder).runs
    finish(first)
    beat(second)
    with run_lock(second.path, CLAIM):
        overview = take_snapshot(folder, {}).overview
    n_steps = second.config.n_steps
    assert overview.share_done == pytest.approx((1 + 3 / n_steps) / 3)
    # One run at 100 tokens/s has its own rest and a whole further run of 128 tokens a step to do.
    assert overview.seconds_left == pytest.approx((n_steps - 3 + n_steps) * 128 / 100)
    assert overview.counts == {"finished": 1, "running": 1, "planned": 1}
    assert third.run_id in format_table(take_snapshot(folder, {}))


def test_a_sweep_with_a_live_job_is_not_over_and_one_with_a_held_run_neither(folder):
    assert take_snapshot(folder, {}).is_over
    assert not take_snapshot(folder, {"1:5": JobState("5", 1, "slurm", "pending")}).is_over
    assert not take_snapshot(folder, {"1:5": JobState("5", 1, "slurm", "unknown")}).is_over
    run = load_sweep(folder).runs[0]
    with run_lock(run.path, CLAIM):
        assert not take_snapshot(folder, {}).is_over


def test_watching_something_else_than_a_terminal_prints_plain_lines_and_ends(folder):
    finish(load_sweep(folder).runs[0])
    out = io.StringIO()
    snapshot = watch(folder, stream=out)
    assert snapshot.overview.n_complete == 1
    assert "finished, loss 4.0000 nats" in out.getvalue()
    assert "1/3 runs complete" in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.slow
def test_watching_gives_up_when_nothing_moves(folder):
    run = load_sweep(folder).runs[0]
    with run_lock(run.path, CLAIM):
        snapshot = watch(folder, stream=io.StringIO(), stall_s=0.2)
    assert not snapshot.is_over


def test_the_live_table_shows_what_moves_first_and_counts_the_rest(folder):
    from rich.console import Console

    first, second, _ = load_sweep(folder).runs
    finish(first)
    fail(second)
    console = Console(file=io.StringIO(), width=160)
    console.print(render(take_snapshot(folder, {}), max_rows=1))
    text = console.file.getvalue()
    assert second.run_id in text
    assert first.run_id not in text
    assert "… and 2 more" in text


def test_runs_that_failed_alike_are_told_in_one_line(folder):
    first, second, third = load_sweep(folder).runs
    fail(first)
    fail(second)
    lines = explain_incomplete([run_state(run) for run in (first, second, third)])
    assert lines == [
        f"2 failed: ValueError: no ({first.run_id} and 1 more)",
        f"1 planned: no worker took it ({third.run_id})",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(9.6, "10s"), (75, "1m15s"), (7260, "2h01m")])
def test_durations_read_as_people_say_them(seconds, text):
    assert format_duration(seconds) == text


def test_the_time_left_follows_the_pace_since_the_watching_began(folder):
    beat(load_sweep(folder).runs[0], step=3)
    snapshot = replace(take_snapshot(folder, {}), pace=0.01)
    assert snapshot.overview.seconds_left == pytest.approx((1 - snapshot.overview.share_done) / 0.01)
