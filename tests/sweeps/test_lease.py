"""Exactly one holder, whatever dies, freezes or wakes."""

import json
import multiprocessing
import os
import socket
import time

import pytest

from dlcm.record import RunBusyError
from sweeps import lease as lease_module
from sweeps.lease import LEASE_S, LeaseLostError, acquire, beats_elsewhere, file_age, is_held, lease, now_at

NAME = ".claim"


def elsewhere(folder, *, generation=1, age_s=0.0):
    """The lease of another machine, whose lock does not reach us."""
    place = folder / f"{NAME}.d"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{generation:08d}.lease"
    path.write_text(json.dumps({"host": "another"}))
    os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    return path


def test_one_process_holds_and_the_next_takes_over_when_it_lets_go(tmp_path):
    with lease(tmp_path, NAME) as first:
        assert is_held(tmp_path, NAME)
        with pytest.raises(RunBusyError, match="another process"):
            acquire(tmp_path, NAME)
    assert not is_held(tmp_path, NAME)
    with lease(tmp_path, NAME) as second:
        assert second.generation == first.generation + 1
        assert len(list((tmp_path / f"{NAME}.d").glob("*.lease"))) == 1


def hold_and_die(folder, ready):
    held = acquire(folder, NAME)
    ready.set()
    time.sleep(60)
    held.release()


def test_a_killed_holder_frees_the_lease_at_once_on_its_machine(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold_and_die, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    assert is_held(tmp_path, NAME)
    process.kill()
    process.join()
    with lease(tmp_path, NAME) as mine:
        assert mine.generation == 2


def test_the_lease_of_another_machine_counts_until_it_runs_out(tmp_path):
    elsewhere(tmp_path)
    assert beats_elsewhere(tmp_path, NAME)
    with pytest.raises(RunBusyError):
        acquire(tmp_path, NAME)
    elsewhere(tmp_path, age_s=LEASE_S + 1)
    assert not is_held(tmp_path, NAME)
    with lease(tmp_path, NAME) as mine:
        assert mine.generation == 2


def test_a_released_lease_of_another_machine_is_free_at_once(tmp_path):
    elsewhere(tmp_path).with_suffix(".released").touch()
    with lease(tmp_path, NAME) as mine:
        assert mine.generation == 2


def test_a_holder_that_was_frozen_finds_that_it_was_taken_over(tmp_path):
    with lease(tmp_path, NAME) as mine:
        mine.check()
        mine.touch()
        elsewhere(tmp_path, generation=mine.generation + 1)
        with pytest.raises(LeaseLostError, match="taken this run over"):
            mine.check()


def test_a_touched_lease_is_young(tmp_path):
    with lease(tmp_path, NAME) as mine:
        path = next((tmp_path / f"{NAME}.d").glob("*.lease"))
        os.utime(path, (0, 0))
        mine.touch()
        assert abs(file_age(path)) < 5


def test_ages_do_not_depend_on_our_clock(tmp_path, monkeypatch):
    path = elsewhere(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert file_age(path) < 5
    assert beats_elsewhere(tmp_path, NAME)


def test_two_machines_cannot_make_the_same_generation(tmp_path, monkeypatch):
    # The other one is as fast as we are, and its lock does not reach us.
    made = lease_module._make

    def slower(path, text):
        elsewhere(tmp_path, generation=1)
        return made(path, text)

    monkeypatch.setattr(lease_module, "_make", slower)
    with pytest.raises(RunBusyError):
        acquire(tmp_path, NAME)
    assert json.loads((tmp_path / f"{NAME}.d" / "00000001.lease").read_text())["host"] == "another"


def test_a_folder_that_cannot_be_written_to_still_has_a_time(tmp_path):
    assert abs(now_at(tmp_path / "absent") - time.time()) < 5
    assert socket.gethostname() != "another"
