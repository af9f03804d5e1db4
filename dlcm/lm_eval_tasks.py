"""Tasks of lm-evaluation-harness as items: its prompts, its answers, its data, fetched from the hub or from the hub's cache.

A group, such as `mmlu`, is one task whose items are those of its parts, one part after the other; its accuracy is then the mean
over items, which is how lm-eval weights the groups of the paper's suite.
"""

import contextlib
import functools
import io
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from itertools import groupby
from typing import Any

from dlcm.errors import UserError, nearest
from dlcm.tasks import LM_EVAL_PREFIX, SHOT_SEED, EvalTask, Item, Scoring, TaskWord

_HUB = "https://huggingface.co"
_REACH_S = 5.0
_KINDS: dict[str, Scoring] = {"multiple_choice": "likelihood", "loglikelihood": "greedy"}


def lm_eval_task(name: str, limit: int | None = None, n_shot: int = 0) -> EvalTask:
    """The items of a task of lm-evaluation-harness.

    Args:
        name: as lm-eval has it: a task, or a group.
        limit: items, at most; of a group the first ones of each part.
        n_shot: answered questions before each question, from where lm-eval takes them, by a fixed seed.

    Raises:
        UserError: lm-eval has no such task, it does not compare answers, or its data cannot be had.
    """
    word = f"{LM_EVAL_PREFIX}{name}"
    manager = _manager()
    if name not in manager.all_tasks:
        raise UserError(f"task {word}: lm-eval has none of this name{_near(name, manager.all_tasks)}")
    _use_cache_alone_where_the_hub_does_not_answer()
    try:
        with _quiet():
            from lm_eval import tasks

            # pyrefly: ignore[deprecated]  what replaces it is not in lm-eval 0.4.9
            parts = list(_leaves(tasks.get_task_dict([name], manager)))
    except (
        Exception
    ) as error:  # of the hub, of the data's builder, of the network: whatever they raise, the way out is one
        told = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"task {word}: its data cannot be had ({told}); run this once where the hub answers, which keeps them in its cache "
            "(HF_HOME), or give the items as a local FILE.jsonl (docs/evaluation.md)"
        ) from None
    most = None if limit is None else math.ceil(limit / len(parts))
    scorings: set[Scoring] = {_scoring(part, word) for part in parts}
    if len(scorings) > 1:
        raise UserError(f"task {word}: its parts are not scored alike; name them one by one")
    items = tuple(item for part in parts for item in _items(part, word, most, n_shot))[:limit]
    source = ", ".join(
        [word, f"version {parts[0].VERSION}", *sorted({str(part.config.dataset_path) for part in parts})]
    )
    return EvalTask(TaskWord("lm-eval", name, n_shot).name, items, scorings.pop(), source, n_shot)


@functools.lru_cache(maxsize=1)
def _manager() -> Any:
    """lm-eval's list of tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _near(name: str, names: list[str]) -> str:
    """The nearest name; of the thousands that there are, not all where none is near."""
    told = nearest(name, names)
    return told if "did you mean" in told else "; `lm-eval ls tasks` lists them"


def _leaves(found: dict) -> Iterator[Any]:
    for value in found.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


def _scoring(part: Any, word: str) -> Scoring:
    kind = _KINDS.get(part.OUTPUT_TYPE)
    named = [metric["metric"] for metric in part.config.metric_list or ()]
    if kind is None or callable(part.config.process_results) or "acc" not in named:
        how = ", ".join(map(str, named)) or "a function of its own"
        raise UserError(
            f"task {word}: {part.config.task} is {part.OUTPUT_TYPE} scored by {how}; "
            "here answers are compared by their likelihood (multiple_choice or loglikelihood with acc)"
        )
    return kind


def _items(part: Any, word: str, limit: int | None, n_shot: int) -> Iterator[Item]:
    part.set_config("num_fewshot", n_shot)
    part.set_fewshot_seed(SHOT_SEED)
    with _quiet():
        part.build_all_requests(limit=limit)
    for number, requests in groupby(part.instances, key=lambda request: request.doc_id):
        asked = sorted(requests, key=lambda request: request.idx)
        yield _item(
            part, [request.args for request in asked], asked[0].doc, f"task {word}: {part.config.task}, item {number}"
        )


def _item(part: Any, pairs: list[tuple[str, Any]], doc: Any, where: str) -> Item:
    if part.OUTPUT_TYPE == "loglikelihood":
        answer = str(pairs[0][1])
        return Item((pairs[0][0],), (answer,), 0, (len(answer.strip().encode()),))
    choices = [str(choice) for choice in part.doc_to_choice(doc)]
    gold = part.doc_to_text(doc) if part.multiple_input else part.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    if isinstance(gold, list) or not 0 <= int(gold) < len(choices):
        raise UserError(f"{where}: has no single right answer among its choices")
    answers = [str(part.doc_to_target(doc))] * len(choices) if part.multiple_input else choices
    prompts, continuations = zip(*pairs[: len(choices)])  # requests without a prompt may follow
    n_bytes = tuple(len(answer.encode()) for answer in answers)
    return Item(tuple(prompts), tuple(continuations), int(gold), n_bytes)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the progress bars of lm-eval and of the hub, which cannot be turned off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@functools.lru_cache(maxsize=1)
def _use_cache_alone_where_the_hub_does_not_answer() -> None:
    """Ask the hub once; the libraries would try each file of each data set five times, and wait in between."""
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", _HUB), method="HEAD")
        urllib.request.urlopen(request, timeout=_REACH_S).close()
    except urllib.error.HTTPError:
        return  # an answer
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        for module in ("huggingface_hub.constants", "datasets.config"):  # where they were read already
            if module in sys.modules:
                for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
                    if hasattr(sys.modules[module], switch):
                        setattr(sys.modules[module], switch, True)
