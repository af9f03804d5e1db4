import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dlcm import encoders
from dlcm.encoders import Encoders, encode
from dlcm.tokens import Tokenizer

GROUPS = [[f"group {i}, document {j}: naïve 数 {i * j}\n".encode() * 20 for j in range(i % 4 + 1)] for i in range(40)]


@pytest.fixture(scope="module")
def gpt2_pattern():
    return Tokenizer.train([document.decode() for group in GROUPS for document in group], 400)


@pytest.fixture(scope="module")
def another_pattern(gpt2_pattern):
    """One that goes through the library document by document."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    other = Backend.from_str(gpt2_pattern.backend.to_str())
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}|\s+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert Tokenizer(other)._words is None
    return Tokenizer(other)


@pytest.fixture
def two_at_once(monkeypatch):
    monkeypatch.setattr(encoders, "n_processes", lambda: 2)
    monkeypatch.setattr(encoders, "_WORTH_BYTES", 0)


def by_the_library(tokenizer, documents):
    encoded = tokenizer.backend.encode_batch([document.decode() for document in documents], add_special_tokens=False)
    return [[tokenizer.eot_id, *item.ids] for item in encoded]


def split(answer):
    return [part.tolist() for part in np.split(answer.ids_T, np.cumsum(answer.count_D)[:-1])]


def pids(pool):
    return [process._child.pid for process in pool._processes]


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_pattern", "another_pattern"])
def test_groups_come_back_in_order_with_the_ids_of_the_library_and_the_hashes_of_one_process(
    name, request, two_at_once
):
    tokenizer = request.getfixturevalue(name)
    with Encoders(tokenizer, None) as pool:
        answers = list(pool.map(enumerate(GROUPS)))
        assert len(pids(pool)) == 2
    assert [label for label, _, _ in answers] == list(range(len(GROUPS)))
    for (_, documents, answer), group in zip(answers, GROUPS):
        assert documents == group
        assert split(answer) == by_the_library(tokenizer, group)
        assert answer.digests == encode(tokenizer, group).digests
        assert answer.ids_T.dtype == tokenizer.dtype


def test_only_a_few_groups_are_under_way(gpt2_pattern, two_at_once):
    taken = []
    with Encoders(gpt2_pattern, None) as pool:
        for done, _ in enumerate(pool.map((taken.append(i), group) for i, group in enumerate(GROUPS * 3))):
            assert len(taken) - done <= 6


def test_little_text_and_bytes_and_a_single_processor_start_no_process(gpt2_pattern, monkeypatch):
    monkeypatch.setattr(encoders, "_Process", None)
    monkeypatch.setattr(encoders, "n_processes", lambda: 2)
    for tokenizer, worth, n in ((gpt2_pattern, 10**9, 2), (Tokenizer(), 0, 2), (gpt2_pattern, 0, 1)):
        monkeypatch.setattr(encoders, "_WORTH_BYTES", worth)
        monkeypatch.setattr(encoders, "n_processes", lambda n=n: n)
        with Encoders(tokenizer, None) as pool:
            assert len(list(pool.map(enumerate(GROUPS)))) == len(GROUPS)


def test_there_are_as_many_processes_as_processors_that_may_be_used(monkeypatch):
    for usable in ({0}, {3, 5}, set(range(64))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, usable=usable: usable)
        assert encoders.n_processes() == min(len(usable), 8)


@pytest.mark.slow
@pytest.mark.parametrize("n_dead", [1, 2])
def test_what_a_dead_process_had_in_hand_is_done_by_the_builder(n_dead, gpt2_pattern, two_at_once):
    def found():
        with Encoders(gpt2_pattern, None) as pool:
            for label, _, answer in pool.map(enumerate(GROUPS)):
                for pid in pids(pool)[: n_dead * (label == 3)]:
                    os.kill(pid, signal.SIGKILL)
                yield split(answer)

    with pytest.warns(UserWarning, match="ended with status -9"):
        assert list(found()) == [by_the_library(gpt2_pattern, group) for group in GROUPS]


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_processes_leave_when_the_builder_is_interrupted(error, gpt2_pattern, two_at_once):
    pool = Encoders(gpt2_pattern, None)

    def interrupted():
        with pool:
            for label, _, _ in pool.map(enumerate(GROUPS * 50)):
                if label == 5:
                    raise error

    with pytest.raises(error):
        interrupted()
    assert len(pids(pool)) == 2
    assert all(is_gone(pid) for pid in pids(pool))
    assert not any(thread.is_alive() for thread in pool._threads._threads)


ORPHANS = """
import itertools, signal, sys
from dlcm import encoders
from dlcm.tokens import Tokenizer
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
encoders.n_processes, encoders._WORTH_BYTES = (lambda: 2), 0
groups = ((i, [b"some text of no great length %d" % i * 1000]) for i in itertools.count())
with encoders.Encoders(Tokenizer.train(["some text"], 300), None) as pool:
    for label, _, _ in pool.map(groups):
        if label == 5:
            print(*(process._child.pid for process in pool._processes), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_builder_that_is_killed(sent):
    builder = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with builder:
        children = [int(pid) for pid in builder.stdout.readline().split()]
        assert len(children) == 2
        assert not any(is_gone(pid) for pid in children)
        builder.send_signal(sent)
        assert builder.wait(timeout=60) == -sent
    deadline = time.monotonic() + 60
    while not all(is_gone(pid) for pid in children):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)


SCRIPT = """
import os, sys
print("main", flush=True)
from dlcm import encoders
from dlcm.config import DataConfig
from dlcm.shards import open_corpus
encoders.n_processes, encoders._WORTH_BYTES = (lambda: 2), 0
corpus = open_corpus(DataConfig(corpus=sys.argv[1], tokenizer="bpe-300"))
print(corpus.train.n_bytes + corpus.validation.n_bytes)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_builds_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "text.txt").write_text("some text that is read\n" * 20_000)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "text.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["main", str((tmp_path / "text.txt").stat().st_size)]
    assert done.stderr == ""


def test_a_process_that_encodes_loads_neither_torch_nor_pydantic():
    code = "import sys; import dlcm.encoders; print(*{'torch', 'pydantic', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
