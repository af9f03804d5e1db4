import json
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import yaml

from dlcm import cli, evaluate
from dlcm.config import RunConfig
from dlcm.console import Reporter
from dlcm.errors import UserError
from dlcm.evaluate import format_results, pending
from dlcm.train import train
from tests.dlcm.conftest import small_config
from tests.dlcm.texts import write_texts

ROWS = [{"query": f"{i} the of", "choices": ["and", "to", "in", "is"], "gold": i % 4} for i in range(12)]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    return RunConfig(
        model=small_config(vocab_size=257),
        data={"corpus": str(folder), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 1024},
        train={"tokens": 4 * 512, "batch_tokens": 512},
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(config, run_dir)
    return run_dir


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def dlcm(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    point = EntryPoint("model", "dlcm.commands:app", "dlcm.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dlcm", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_the_record_holds_every_field_of_the_contract(trained, task_file):
    results = evaluate(trained, ["corpus", str(task_file)], limit=10)
    for result, name in zip(results, ("corpus", "words")):
        record = json.loads((trained / "eval" / f"{name}.json").read_text())
        assert record["schema"] == 2
        assert (record["task"], record["n"], record["chance"], record["n_shot"]) == (name, 10, 0.25, 0)
        assert 0 <= record["acc"] <= 1
        for key in ("acc_stderr", "acc_norm", "acc_norm_stderr", "bits_per_byte", "bits_per_byte_stderr"):
            assert isinstance(record[key], float)
        assert record["bits_per_byte"] > 0
        assert {"lm_eval", "torch", "dlcm-scaling"} <= set(record["versions"])
        assert record["task_hash"] == result.task_hash


@pytest.mark.slow
def test_what_was_measured_is_read_back_until_the_task_changes_or_force_is_given(trained, task_file, monkeypatch):
    first = evaluate(trained, [str(task_file)], force=True)
    measured = []
    from dlcm import harness

    real = harness.HarnessModel.loglikelihood
    monkeypatch.setattr(harness.HarnessModel, "loglikelihood", lambda *args: measured.append(1) or real(*args))
    assert evaluate(trained, [str(task_file)]) == first
    assert measured == []
    assert evaluate(trained, [str(task_file)], force=True) == first
    assert measured == [1]
    assert evaluate(trained, [str(task_file)], limit=5)[0].n == 5
    task_file.write_text(task_file.read_text() + json.dumps(ROWS[0]) + "\n")
    assert evaluate(trained, [str(task_file)])[0].n == 13
    (trained / "eval" / "words.json").write_text("{torn")
    assert evaluate(trained, [str(task_file)])[0].n == 13
    assert len(measured) == 4


def test_what_each_item_did_is_kept_and_its_means_are_the_scores(trained, task_file):
    (result,) = evaluate(trained, [str(task_file)], force=True)
    record = json.loads((trained / "eval" / "words.json").read_text())
    correct, bits = (
        [int(digit) for digit in record["correct"]],
        [float(x) for x in record["item_bits_per_byte"].split()],
    )
    assert len(correct) == len(bits) == result.n == 12
    assert np.mean(correct) == pytest.approx(result.acc)
    assert np.std(correct, ddof=1) / 12**0.5 == pytest.approx(result.acc_stderr)
    assert np.mean([int(digit) for digit in record["correct_norm"]]) == pytest.approx(result.acc_norm)
    assert np.mean(bits) == pytest.approx(result.bits_per_byte, rel=1e-3)
    assert np.std(bits, ddof=1) / 12**0.5 == pytest.approx(result.bits_per_byte_stderr, rel=1e-2)


@pytest.mark.slow
def test_all_tasks_are_answered_in_one_pass_as_each_alone(trained, task_file, tmp_path, monkeypatch):
    (tmp_path / "last.jsonl").write_text("".join(json.dumps({"text": f"{i} the of and"}) + "\n" for i in range(5)))
    pair = {"contexts": ["the of", "in the"], "ending": "and", "gold": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps({**pair, "gold": 0}) + "\n")
    tasks = ["corpus", str(task_file), f"{task_file}@2", str(tmp_path / "last.jsonl"), str(tmp_path / "pairs.jsonl")]
    alone = [evaluate(trained, [task], limit=10, force=True)[0] for task in tasks]
    from dlcm import harness

    calls, real = [], harness.HarnessModel.loglikelihood
    monkeypatch.setattr(harness.HarnessModel, "loglikelihood", lambda *args: calls.append(1) or real(*args))
    together = evaluate(trained, tasks, limit=10, force=True)
    assert calls == [1]
    assert [result.task for result in together] == ["corpus", "words", "words_2shot", "last", "pairs"]
    for one, other in zip(alone, together):
        assert (one.correct, one.correct_norm, one.task_hash, one.n_truncated) == (
            other.correct,
            other.correct_norm,
            other.task_hash,
            other.n_truncated,
        )
        assert one.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-5)
    last, pairs = together[3:]
    assert (last.acc_norm, last.correct_norm, last.chance) == (None, None, 0.0)
    assert pairs.correct in ("10", "01")  # the same two contexts, the other one right


def test_prompts_that_are_cut_are_counted_and_told(trained, task_file):
    (result,) = evaluate(trained, [f"{task_file}@8"])
    assert (result.max_length, result.n_truncated, result.n) == (64, 12, 12)
    assert "longer than the 64 tokens" in format_results([result])
    assert evaluate(trained, [str(task_file)])[0].n_truncated == 0


def test_what_would_be_measured_is_told_without_measuring(trained, task_file):
    evaluate(trained, [str(task_file)], force=True)
    again = pending(trained, [str(task_file), f"{task_file}@1"])
    assert again.tasks == (f"{task_file}@1",)
    # A byte is a token here: four answers of each row behind the row and one that is answered.
    texts = [4 * len(row["query"]) + sum(len(choice) + 1 for choice in row["choices"]) for row in ROWS]
    shots = [len(f"{i} the of {row['choices'][row['gold']]}\n\n") for i, row in enumerate(ROWS)]
    assert sum(texts) + 4 * 12 * min(shots) <= again.n_tokens <= sum(texts) + 4 * 12 * max(shots)
    assert pending(trained, [str(task_file)], limit=3).tasks == (str(task_file),)
    assert pending(trained, [str(task_file)], force=True).tasks == (str(task_file),)
    task_file.write_text(task_file.read_text() + json.dumps(ROWS[0]) + "\n")
    assert pending(trained, [str(task_file)]).tasks == (str(task_file),)


def test_progress_is_told_to_the_end(trained, task_file):
    calls = []
    evaluate(trained, [str(task_file)], force=True, progress=lambda *args: calls.append(args))
    assert calls[-1] == ("evaluating", 48, 48)


def test_a_bad_row_leaves_the_earlier_result_untouched(trained, task_file):
    evaluate(trained, [str(task_file)])
    before = (trained / "eval" / "words.json").read_bytes()
    task_file.write_text(task_file.read_text() + '{"query": "no more"}\n')
    with pytest.raises(UserError, match=r"words\.jsonl:13: no key 'choices'"):
        evaluate(trained, ["corpus", str(task_file)], force=True)
    assert (trained / "eval" / "words.json").read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.json: no such file"):
        evaluate(tmp_path, ["corpus"])


def test_a_single_item_has_no_standard_error_and_says_so_with_null(trained, task_file):
    result = evaluate(trained, [str(task_file)], limit=1)[0]
    assert result.acc_stderr is None
    assert "±" not in format_results([result]).splitlines()[1]
    json.loads((trained / "eval" / "words.json").read_text(), parse_constant=pytest.fail)


def write_config(path, config, **changes):
    data = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition("__")
        data[section][name] = value
    path.write_text(yaml.safe_dump(data))
    return path


def test_the_train_verb_trains_shows_progress_and_is_finished_the_second_time(dlcm, config, tmp_path):
    path = write_config(tmp_path / "config.yaml", config)
    code, out, err = dlcm("train", path, tmp_path / "run")
    assert code == 0
    assert "finished after 4 steps" in out
    assert "nats per token" in out
    assert "training, 25%" in err
    code, out, err = dlcm("train", path, tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)["run_id"] == config.run_id
    assert "training" not in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__token": 5}, "unknown key 'train.token'; did you mean 'tokens'?"),
        ({"data__corpus": "stdlb"}, "unknown corpus 'stdlb'"),
        ({"data__corpus": "no/such/folder"}, "no/such/folder: no such file or folder"),
        ({"data__tokenizer": "bite"}, "unknown tokenizer 'bite'"),
        ({"data__tokenizer": "bpe-400"}, "tokenizer"),
        ({"train__tokens": 100}, "less than one step"),
    ],
)
def test_the_train_verb_refuses_in_one_line_and_leaves_no_result(dlcm, config, tmp_path, changes, message):
    path = write_config(tmp_path / "config.yaml", config, **changes)
    code, out, err = dlcm("train", path, tmp_path / "run")
    assert code == 2
    assert out == ""
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_config_that_is_not_yaml_is_refused_with_its_line(dlcm, tmp_path):
    (tmp_path / "c.yaml").write_text("train: [1\nx: 2\n")
    code, _, err = dlcm("train", tmp_path / "c.yaml", tmp_path / "run")
    assert code == 2
    assert "c.yaml:2:" in err


class Stream:
    def __init__(self, terminal):
        self.text, self.terminal, self.encoding = "", terminal, "utf-8"

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.terminal


def test_progress_is_plain_lines_in_a_file(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dlcm.console.time.monotonic", lambda: now[0])
    stream = Stream(terminal=False)
    with Reporter(stream=stream) as report:
        for i in range(100):
            now[0] += 1.0
            report("tokenizing", i, 100, "note")
        report("training", 1, None)
    lines = stream.text.splitlines()
    assert len(lines) == 11
    assert lines[0] == "tokenizing, 0%, note"
    assert lines[-2].startswith("tokenizing, 9")
    assert "s left" in lines[-2]
    assert lines[-1] == "training"
    assert "\x1b" not in stream.text


def test_progress_is_a_live_line_on_a_terminal_and_nothing_when_quiet():
    stream = Stream(terminal=True)
    with Reporter(stream=stream) as report:
        report("tokenizing", 1, 2)
        report("training", 1, 2, "loss 3.2")
    assert "training" in stream.text
    quiet = Stream(terminal=True)
    with Reporter(quiet=True, stream=quiet) as report:
        report("training", 1, 2)
    assert quiet.text == ""
