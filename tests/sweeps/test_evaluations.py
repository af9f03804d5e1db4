import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint

import pytest

from analysis import load_results
from analysis.accuracy import flops_vs_accuracy
from dlcm import cli
from dlcm.errors import UserError
from dlcm.record import read_json
from sweeps.collect import collect
from sweeps.evaluations import ask, evaluate_and_show
from sweeps.jobs import job_states, kill_tree, read_jobs
from sweeps.launch import launch, resubmit
from sweeps.session import Options
from sweeps.states import sweep_states
from sweeps.store import load_sweep, save_sweep
from tests.sweeps.test_launch import FakeSlurm
from tests.sweeps.tiny import fail, finish, make_plan

WAIT_S = 120.0
PAIR = {"contexts": ["alpha beta", "gamma"], "ending": "of the", "gold": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A sweep of three runs, two of which are trained, and two tasks."""
    folder = tmp_path_factory.mktemp("evaluations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLCM_CACHE", str(folder / "cache"))
        plan = make_plan(folder)
        save_sweep(plan, folder / "runs" / "tiny")
        resubmit(
            folder / "runs" / "tiny",
            "debug",
            threads=1,
            run_ids=[run.run_id for run in plan.runs if run.config.seed < 2],
        )
        rows = [{"query": f"alpha {i} was", "choices": ["so", "in it", "delta"], "gold": i % 3} for i in range(9)]
        (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "pairs.jsonl").write_text("".join(json.dumps({**PAIR, "gold": i % 2}) + "\n" for i in range(6)))
        yield folder


@pytest.fixture
def folder(place, monkeypatch):
    """The same, not evaluated."""
    monkeypatch.setenv("DLCM_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    sweep = place / "runs" / "tiny"
    (sweep / "evaluate.json").unlink(missing_ok=True)
    for path in sweep.glob("*/eval/*.json"):
        path.unlink()
    return sweep


@pytest.fixture
def dlcm(monkeypatch, capsys):
    """The command line with the verbs that this file is about, installed or not: (exit code, stdout, stderr)."""
    points = [EntryPoint("model.sweep", "sweeps.commands:model_app", "dlcm.commands")]
    points.append(EntryPoint("sweep", "sweeps.commands:app", "dlcm.commands"))
    points.append(EntryPoint("model", "dlcm.commands:app", "dlcm.commands"))
    monkeypatch.setattr(cli, "entry_points", lambda group: points)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dlcm", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def results(sweep):
    return {(path.parts[-3], path.stem): path for path in sorted(sweep.glob("*/eval/*.json"))}


def test_all_finished_runs_are_evaluated_and_shown_and_a_second_time_nothing_is_left(dlcm, folder):
    command = ("eval", "--sweep", "tiny", "-t", "words.jsonl", "-t", "pairs.jsonl@1", "--cluster", "debug")
    code, out, _ = dlcm(*command)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].endswith("tiny: 2 runs to evaluate, 1 not trained (skipped)")
    assert [line.split()[0] for line in lines[1:3]] == ["evaluating", "evaluating"]
    assert lines[3].split() == ["accuracy,", "%", "words", "pairs_1shot"]
    assert lines[4].split() == ["(chance)", "33.3", "50.0"]
    assert lines[5].split() == ["(constant)", "33.3", "50.0"]
    assert [line.count("±") for line in lines[6:8]] == [2, 2]
    before = {key: path.stat().st_mtime_ns for key, path in results(folder).items()}
    assert len(before) == 4
    code, out, _ = dlcm(*command, "--json")
    told = json.loads(out)
    assert (code, told["missing"], len(told["rows"])) == (0, {}, 2)
    for row in told["rows"]:
        for name, found in row["tasks"].items():
            record = read_json(folder / row["run_id"] / "eval" / f"{name}.json")
            assert (found["acc"], found["n"]) == (record["acc"], {"words": 9, "pairs_1shot": 6}[name])
    assert {key: path.stat().st_mtime_ns for key, path in results(folder).items()} == before


def test_the_table_of_results_has_the_accuracies_with_errors_and_so_has_the_export(dlcm, folder):
    dlcm("eval", "--sweep", "tiny", "-t", "words.jsonl", "--cluster", "debug")
    frame = collect(folder)
    done = frame[frame["status"] == "finished"]
    assert (done["n_words"] == 9).all()
    assert done["chance_words"].tolist() == pytest.approx([1 / 3] * 2)
    for column in ("acc_words", "acc_words_stderr", "acc_norm_words", "bpb_words", "bpb_words_stderr"):
        assert done[column].notna().all()
    table = flops_vs_accuracy(load_results(folder)).frame
    assert (table["flops_train"] > 0).all()
    for column in ("acc_words", "acc_words_stderr"):
        assert table[column].tolist() == pytest.approx((100 * done[column]).round(2).tolist())
    code, out, _ = dlcm("sweep", "collect", "tiny")
    assert code == 0
    best, worst = 100 * done["acc_words"].max(), 100 * done["acc_words"].min()
    assert f"words: 2 runs, accuracy {worst:.1f} to {best:.1f} % (chance 33.3 %, constant 33.3 %)" in out


def test_a_run_that_is_trained_later_is_evaluated_as_well(folder, tmp_path, monkeypatch):
    plan = make_plan(tmp_path, seeds=(7,))
    save_sweep(plan, tmp_path / "s")
    ask(tmp_path / "s", ["words.jsonl"])
    launch(plan, tmp_path / "s", "debug", threads=1)
    (state,) = sweep_states(load_sweep(tmp_path / "s"))
    assert state.is_complete
    assert [name for _, name in results(tmp_path / "s")] == ["words"]


@pytest.mark.slow
def test_changed_items_or_limits_are_measured_again_and_nothing_else_is(folder, place):
    options = Options("debug", {})
    how = {"limit": None, "force": False, "detach": None, "as_json": False}
    assert evaluate_and_show(folder, ["words.jsonl", "pairs.jsonl"], options, **how) == 0
    assert ask(folder, ["words.jsonl", "pairs.jsonl"]).hours == {}
    text = (place / "words.jsonl").read_text()
    try:
        (place / "words.jsonl").write_text(text + text.splitlines()[0] + "\n")
        asked = ask(folder, ["words.jsonl", "pairs.jsonl"])
    finally:
        (place / "words.jsonl").write_text(text)
    assert len(asked.hours) == 2
    assert {name for _, name in results(folder)} == {"pairs"}
    assert len(ask(folder, ["pairs.jsonl"], limit=2).hours) == 2
    assert load_sweep(folder).tasks == {str(place / "words.jsonl"): None, str(place / "pairs.jsonl"): 2}
    resubmit(folder, "debug", run_ids=tuple(asked.hours))
    counts = {key: read_json(path)["n"] for key, path in results(folder).items()}
    assert sorted((name, n) for (_, name), n in counts.items()) == [
        ("pairs", 2),
        ("pairs", 2),
        ("words", 9),
        ("words", 9),
    ]


def test_one_run_is_evaluated_in_this_process(dlcm, folder):
    run = next(path.parent for path in folder.glob("*/result.json"))
    code, out, _ = dlcm("eval", run, "--task", "corpus", "--task", "words.jsonl", "--limit", "8")
    assert code == 0
    assert "bits per byte" in out.splitlines()[0]
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["corpus", "8"], ["words", "8"]]
    code, out, _ = dlcm("eval", run, "--limit", "8", "--json")
    assert code == 0
    assert json.loads(out)[0]["task"] == "corpus"


def test_a_bad_row_is_told_before_anything_is_written(dlcm, folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a"}\n')
    code, out, err = dlcm("eval", "--sweep", "tiny", "-t", bad, "--cluster", "debug")
    assert (code, out) == (2, "")
    assert f"{bad}:2: no key 'choices'" in err
    assert not (folder / "evaluate.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give the directory of a run, or --sweep"),
        (("runs/tiny",), "runs/tiny: is a sweep; evaluate its runs with --sweep runs/tiny"),
        (("runs/tiny/x", "--sweep", "tiny"), "give the directory of a run, or --sweep"),
        (("runs/tiny/x", "--cluster", "slurm"), "--cluster goes with --sweep"),
        (("runs/tiny/x", "--task", "corpsu"), "unknown task 'corpsu'; did you mean 'corpus'?"),
        (("runs/tiny/x", "--task", "none.jsonl"), "task none.jsonl: no such file"),
        (("runs/tiny/x",), "runs/tiny/x/run.json: no such file"),
        (("runs/tiny/x", "--detach"), "--detach goes with --sweep"),
        (("--sweep", "tinny"), "did you mean 'tiny'"),
        (("--sweep", "tiny", "-t", "none.jsonl"), "none.jsonl: no such file"),
        (("--sweep", "tiny", "--concurrency", "0"), "must be at least 1"),
        (("--sweep", "tiny", "--limit", "0"), "--limit"),
    ],
)
def test_the_verb_refuses_in_one_line(dlcm, folder, args, message):
    code, out, err = dlcm("eval", *args)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err


def test_an_evaluation_that_fails_is_told_with_its_reason_and_exit_code_1(dlcm, folder, monkeypatch):
    real = importlib.import_module("dlcm.evaluate").evaluate

    def evaluate(run_dir, tasks, **more):
        if "-s1-" in run_dir.name:
            raise UserError("the disk is full")
        return real(run_dir, tasks, **more)

    monkeypatch.setattr(importlib.import_module("dlcm.evaluate"), "evaluate", evaluate)
    command = ("eval", "--sweep", "tiny", "-t", "words.jsonl", "--cluster", "debug")
    code, _, err = dlcm(*command)
    assert code == 1
    assert "the disk is full" in err
    assert "not complete: 1 run; the same command goes on" in err
    assert len(results(folder)) == 1
    monkeypatch.setattr(importlib.import_module("dlcm.evaluate"), "evaluate", real)
    code, out, _ = dlcm(*command)
    assert code == 0
    assert "1 run to evaluate, 1 done before (skipped), 1 not trained (skipped)" in out


def test_a_cluster_is_asked_for_the_time_that_the_evaluation_takes_not_that_of_the_training(
    folder, tmp_path, monkeypatch
):
    submit = importlib.import_module("sweeps.submit")
    FakeSlurm.arrays, FakeSlurm.parameters, FakeSlurm.all_parameters = [], {}, []
    monkeypatch.setattr(submit.submitit, "SlurmExecutor", FakeSlurm)
    monkeypatch.setattr(submit, "max_array_size", lambda: 1001)
    asked = ask(folder, ["words.jsonl"])
    long = dict.fromkeys(asked.hours, 20.0)
    resubmit(folder, "slurm", run_ids=tuple(asked.hours), hours=long)
    assert [len(array) for array in FakeSlurm.arrays] == [2]
    assert FakeSlurm.parameters["time"] == 2880  # half as much again as twenty hours, and a start, by the ladder


def test_hours_are_those_of_training_on_as_many_tokens(place, folder, monkeypatch):
    hours = {"hours_estimated": 3.0}
    runs = tuple(dataclasses.replace(run, row={**run.row, **hours}) for run in load_sweep(folder).runs)
    module = importlib.import_module("sweeps.evaluations")
    monkeypatch.setattr(module, "load_sweep", lambda path: dataclasses.replace(load_sweep(path), runs=runs))
    asked = ask(folder, ["words.jsonl"])
    rows = [json.loads(line) for line in (place / "words.jsonl").read_text().splitlines()]
    read = sum(
        len(row["query"]) + 1 + len(choice) for row in rows for choice in row["choices"]
    )  # bytes are tokens here
    # The training text has an end of text a document beside its bytes.
    assert list(asked.hours.values()) == pytest.approx([3.0 * read / runs[0].tokens] * 2, rel=0.01)


def test_runs_that_failed_or_diverged_are_left_alone(tmp_path, place, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    save_sweep(make_plan(tmp_path), tmp_path / "s")
    first, second, _ = load_sweep(tmp_path / "s").runs
    finish(first, "diverged")
    fail(second)
    asked = ask(tmp_path / "s", ["words.jsonl"])
    assert (asked.hours, asked.done, len(asked.untrained)) == ({}, (), 2)


def until(condition, what):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting: {what}"
        time.sleep(0.02)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_goes_on_where_it_stopped(tmp_path, place, monkeypatch):
    """The whole job is killed with -9 after the first run; the same command measures what is left and nothing twice."""
    monkeypatch.setenv("DLCM_CACHE", str(place / "cache"))
    monkeypatch.chdir(tmp_path)
    plan = make_plan(tmp_path, seeds=range(4))
    sweep = tmp_path / "runs" / "tiny"
    launch(plan, sweep, "debug", threads=1)
    rows = [{"query": f"alpha {i} was", "choices": ["so", "in it", "delta"], "gold": i % 3} for i in range(2000)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "import sys; from pathlib import Path; from sweeps.evaluations import evaluate_and_show; from sweeps.session import Options; "
    code += "sys.exit(evaluate_and_show(Path('runs/tiny'), ['many.jsonl'], Options('local', {}, 1, 1), limit=None, force=False, detach=None, as_json=True))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, sys.path)))}
    first = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    until(lambda: results(sweep), "a first result")
    kill_tree(int(read_jobs(sweep)[-1].job_id))
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: all(job.state == "gone" for job in job_states(sweep).values()), "the end of the workers")
    kept = {key: path.stat().st_mtime_ns for key, path in results(sweep).items()}
    assert 1 <= len(kept) < 4
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert (
        f"{4 - len(kept)} run{'s' if len(kept) < 3 else ''} to evaluate, {len(kept)} done before (skipped)"
        in again.stderr
    )
    told = json.loads(again.stdout)
    assert (len(told["rows"]), told["missing"]) == (4, {})
    now = {key: path.stat().st_mtime_ns for key, path in results(sweep).items()}
    assert {key: now[key] for key in kept} == kept
    assert all(len(read_json(path)["correct"]) == 2000 for path in results(sweep).values())
