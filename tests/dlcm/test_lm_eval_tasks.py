import json
import os
import urllib.request
from pathlib import Path

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import pytest
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager, get_task_dict

from dlcm import lm_eval_tasks
from dlcm.errors import UserError
from dlcm.harness import HarnessModel, HarnessTask
from dlcm.lm_eval_tasks import lm_eval_task
from dlcm.tasks import SHOT_SEED, SUITES, parse_task
from dlcm.tokens import Tokenizer
from tests.dlcm.test_harness import Recurrent

BYTES = Tokenizer()
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {train}}}}}
test_split: test
training_split: train
metadata: {{version: 3.0}}
"""
TASKS = {
    "letters": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nA. {{options[0]}}\\nB. {{options[1]}}\\nAnswer:"
doc_to_target: letter
doc_to_choice: [A, B]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "endings": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{options}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "pairs": """
output_type: multiple_choice
doc_to_text: label
doc_to_target: question
doc_to_choice: "{{options}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "words": """
output_type: loglikelihood
doc_to_text: "{{question.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+question.split(' ')[-1]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{options[0]}}"
generation_kwargs: {until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def rows(n, start=0):
    for i in range(start, start + n):
        yield {
            "question": f"how is {i} was it",
            "options": [f"one {i}", f"more of {i}"],
            "letter": "AB"[i % 2],
            "label": i % 2,
        }


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """lm-eval's own manager over tasks whose data lie on this machine."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, n, start in (("test", 20, 0), ("train", 8, 50)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(n, start)))
    for name, text in TASKS.items():
        head = HEAD.format(name=name, file=folder / "test.jsonl", train=folder / "train.jsonl")
        (folder / f"{name}.yaml").write_text(head + text)
    metrics = "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]"
    (folder / "group.yaml").write_text(f"group: both\ntask: [letters, endings]\n{metrics}\n")
    (folder / "mixed.yaml").write_text("group: mixed\ntask: [letters, words]\n")
    (folder / "far.yaml").write_text(
        HEAD.format(name="far", file="x", train="x").replace("json", "no-such-owner/data", 1) + TASKS["letters"]
    )
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(autouse=True)
def place(manager, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda: manager)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (datasets.config, huggingface_hub.constants):  # which read it before
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)


def scores(task, name):
    answer = run_harness(HarnessModel(Recurrent(257), BYTES, 400), {name: task}, bootstrap_iters=1)
    return answer["results"][name], answer["samples"][name]


@pytest.mark.many
@pytest.mark.parametrize("n_shot", [0, 2])
@pytest.mark.parametrize("name", ["letters", "endings", "pairs", "words"])
def test_its_items_are_asked_and_scored_as_lm_eval_does(manager, name, n_shot):
    ours = lm_eval_task(name, n_shot=n_shot)
    theirs = get_task_dict([name], manager)[name]
    theirs.set_config("num_fewshot", n_shot)
    theirs.set_fewshot_seed(SHOT_SEED)
    (mine, my_samples), (peers, their_samples) = scores(HarnessTask(ours), ours.name), scores(theirs, name)
    assert ours.name == name + ("_2shot" if n_shot else "")
    for one, other in zip(my_samples, their_samples):
        assert [tuple(pair) for pair in one["arguments"]] == [tuple(pair) for pair in other["arguments"]]
        assert one["acc"] == other["acc"]
    assert mine["acc,none"] == peers["acc,none"]
    if name == "endings":
        assert mine["acc_norm,none"] == peers["acc_norm,none"]
    assert (my_samples[0]["arguments"][0][0].count("how is") == 1 + n_shot) or name in ("pairs", "words")
    assert ours.source.startswith(f"lm-eval:{name}, version 3.0")


def test_a_group_is_one_task_and_its_accuracy_is_the_groups(manager):
    ours = lm_eval_task("both")
    assert len(ours.items) == 40
    mine, _ = scores(HarnessTask(ours), "both")
    parts = [scores(task, name)[0]["acc,none"] for name, task in get_task_dict(["letters", "endings"], manager).items()]
    assert mine["acc,none"] == pytest.approx(sum(parts) / 2)
    assert len(lm_eval_task("both", limit=6).items) == 6
    assert [len(item.answers[0]) for item in lm_eval_task("both", limit=6).items] == [2, 2, 2, 6, 6, 6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leters", "lm-eval has none of this name; did you mean 'letters'"),
        ("xyz", "none of this name; `lm-eval ls tasks` lists them"),
        ("written", "written is generate_until scored by exact_match; here answers are compared"),
        ("mixed", "its parts are not scored alike"),
        ("far", r"its data cannot be had \(.*run this once where the hub answers.*local FILE\.jsonl"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_way_out(name, message):
    with pytest.raises(UserError, match=message) as error:
        lm_eval_task(name)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_alone_is_used(monkeypatch):
    calls = []

    def refuse(*_, **__):
        calls.append(1)
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    lm_eval_tasks._use_cache_alone_where_the_hub_does_not_answer.cache_clear()
    for _ in range(2):
        with pytest.raises(UserError, match="its data cannot be had"):
            lm_eval_task("far")
    assert calls == [1]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    lm_eval_tasks._use_cache_alone_where_the_hub_does_not_answer.cache_clear()


@pytest.mark.slow
def test_every_task_of_the_papers_suite_is_one_of_lm_evals():
    folder = Path(lm_eval.tasks.__file__).parent
    named = {
        line.split(":", 1)[1].strip()
        for path in folder.rglob("*.yaml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith(("task:", "group:"))
    }
    assert [word for word in SUITES["paper"] if parse_task(word).target not in named] == []
