"""What is evaluated: questions from a JSONL file, from lm-evaluation-harness, or from the corpus itself. No torch, no lm-eval.

A task is named by a word: `corpus`, the path of a .jsonl file, `lm-eval:NAME`, or a suite, which stands for several. With `@K`
behind it every question comes after K answered ones.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dlcm.corpus import JSONL_SUFFIXES, read_rows
from dlcm.errors import UserError, nearest

CORPUS_TASK = "corpus"
LM_EVAL_PREFIX = "lm-eval:"
# The twelve zero-shot tasks of the paper's table 2, in its order, by their names in lm-evaluation-harness.
SUITES = {
    "paper": (
        "lm-eval:commonsense_qa",
        "lm-eval:hellaswag",
        "lm-eval:winogrande",
        "lm-eval:openbookqa",
        "lm-eval:piqa",
        "lm-eval:arc_challenge",
        "lm-eval:arc_easy",
        "lm-eval:mmlu",
        "lm-eval:boolq",
        "lm-eval:race",
        "lm-eval:ceval-valid",
        "lm-eval:cmmlu",
    )
}
# Part of every task hash: raise it when the same items would be scored in another way.
SCORING_VERSION = 2
SHOT_SEED = 1234
_BETWEEN_SHOTS = "\n\n"
_DELIMITER = " "
# What a row of a file may be, by its keys; other keys are left alone.
_KINDS = {
    "choices": ("query", "choices", "gold"),
    "contexts": ("contexts", "ending", "gold"),
    "last_word": ("text",),
}
_ROWS = "; or ".join(", ".join(keys) for keys in _KINDS.values())

Scoring = Literal["likelihood", "gain", "greedy"]


@dataclass(frozen=True)
class Item:
    """One question: answers, each behind its prompt, of which one is right.

    Attributes:
        prompts: what stands before each answer: the same for all, or, of context pairs, what the answers differ in.
        answers: as the model reads them, with what separates them from the prompt.
        gold: index of the right one.
        answer_bytes: UTF-8 bytes of each answer without what separates it from the prompt.
        prompt_ids: the prompts as token ids, where the task is cut at tokens; else None and the text is encoded.
        answer_ids: the answers as token ids, likewise.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int
    answer_bytes: tuple[int, ...]
    prompt_ids: tuple[tuple[int, ...], ...] | None = None
    answer_ids: tuple[tuple[int, ...], ...] | None = None

    @property
    def solved(self) -> str:
        """Question and right answer, as they stand in the prompt of another question."""
        return self.prompts[self.gold] + self.answers[self.gold]


@dataclass(frozen=True)
class EvalTask:
    """A named list of items.

    Attributes:
        name: names the result.
        items: the questions.
        scoring: when an item is answered right. `likelihood`: its right answer has the largest log p(answer | prompt); `gain`:
            the largest log p(answer | prompt) - log p(answer), which lm-eval calls acc_mutual_info; `greedy`: each of its tokens
            is the likeliest one (LAMBADA).
        source: where the items are from.
        n_shot: answered questions in each prompt.
        shots: items that those are taken from, in order; an item that is among them has the next one in its own place.
    """

    name: str
    items: tuple[Item, ...]
    scoring: Scoring = "likelihood"
    source: str = ""
    n_shot: int = 0
    shots: tuple[int, ...] = ()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of prompts, answers and scoring, hexadecimal: an equal hash is the same test."""
        digest = hashlib.sha256(json.dumps([SCORING_VERSION, self.name, self.scoring]).encode())
        for item in self.items:
            digest.update(json.dumps(asdict(item), sort_keys=True).encode())
        return digest.hexdigest()

    @cached_property
    def n_characters(self) -> int:
        """Characters of all prompts and answers: what reading each answer behind its prompt would go through."""
        return sum(len(text) for item in self.items for text in (*item.prompts, *item.answers))

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing among the answers; 0 where any word could be the answer."""
        if self.scoring == "greedy":
            return 0.0
        return sum(1 / len(item.answers) for item in self.items) / len(self.items)

    @property
    def constant(self) -> float:
        """Accuracy of giving the answer of one place always, the best one: a habit reaches it without knowing anything."""
        if self.scoring == "greedy":
            return 0.0
        return max(Counter(item.gold for item in self.items).values()) / len(self.items)


@dataclass(frozen=True)
class TaskWord:
    """What a task's word stands for.

    Attributes:
        kind: where its items are from.
        target: path of the file, or the name in lm-evaluation-harness.
        n_shot: answered questions in each prompt.
    """

    kind: Literal["corpus", "file", "lm-eval"]
    target: str
    n_shot: int = 0

    @property
    def name(self) -> str:
        """Name of its result, `eval/<name>.json`; a file is named by its stem."""
        name = Path(self.target).name if self.kind == "file" else self.target
        if self.kind == "file":
            name = next((name.removesuffix(suffix) for suffix in JSONL_SUFFIXES if name.endswith(suffix)), name)
        return name + (f"_{self.n_shot}shot" if self.n_shot else "")

    @property
    def word(self) -> str:
        """The word again."""
        return ("lm-eval:" if self.kind == "lm-eval" else "") + self.target + (f"@{self.n_shot}" if self.n_shot else "")


def parse_task(word: str) -> TaskWord:
    """Read a task's word.

    Raises:
        UserError: it is none; names the nearest.
    """
    match = re.fullmatch(r"(.+?)(?:@(\d{1,4}))?", word, re.DOTALL)
    target, n_shot = (match[1], int(match[2] or 0)) if match else (word, 0)
    if target.endswith(JSONL_SUFFIXES):
        return TaskWord("file", target, n_shot)
    if target.startswith(LM_EVAL_PREFIX) and len(target) > len(LM_EVAL_PREFIX):
        return TaskWord("lm-eval", target.removeprefix(LM_EVAL_PREFIX), n_shot)
    if target != CORPUS_TASK:
        raise UserError(
            f"unknown task {word!r}{nearest(target, [CORPUS_TASK, *SUITES])}, or give a path ending in .jsonl, or lm-eval:NAME"
        )
    if n_shot:
        raise UserError(
            f"task {word}: the built-in task is cut from running text and has no examples; leave out @{n_shot}"
        )
    return TaskWord("corpus", CORPUS_TASK)


def task_name(word: str) -> str:
    """Name of a task in `eval/<task>.json`."""
    return parse_task(word).name


def expand_tasks(words: Sequence[str]) -> tuple[str, ...]:
    """The words with those of suites in place of their names; each once."""
    found: dict[str, None] = {}
    for word in words:
        suite, at, n_shot = word.partition("@")
        for task in [f"{member}{at}{n_shot}" for member in SUITES[suite]] if suite in SUITES else [word]:
            found[task] = None
    return tuple(found)


def check_tasks(words: Sequence[str]) -> None:
    """Refuse what cannot be evaluated before anything is loaded.

    Raises:
        UserError: an unknown task (with the nearest), a missing file, or two tasks of one name.
    """
    names = {CORPUS_TASK: CORPUS_TASK}
    for word in expand_tasks(words):
        task = parse_task(word)
        if task.kind == "file" and not Path(task.target).is_file():
            raise UserError(f"task {task.target}: no such file (looked in {Path.cwd()})")
        if names.setdefault(task.name, word) != word:
            raise UserError(
                f"task {word}: another task has the name '{task.name}', which names the result; rename the file"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", task.name):
            raise UserError(
                f"task {word}: rename the file; its stem names columns, so letters, digits, _, . and - only"
            )


def jsonl_task(path: Path, limit: int | None = None, n_shot: int = 0) -> EvalTask:
    """Read a file of questions, all of one kind; keys that a kind does not have are left alone.

    `{"query": ..., "choices": [...], "gold": index}`: which choice follows the query?
    `{"contexts": [...], "ending": ..., "gold": index}`: behind which context is the ending likeliest (Winogrande)?
    `{"text": ...}`: does the model write the last word by itself (LAMBADA)?

    Args:
        path: of the file.
        limit: items, at most; the first ones.
        n_shot: answered questions of the same file before each question: the same for all, drawn by a fixed seed, but never
            the question itself or one that reads the same.

    Raises:
        UserError: a row that is none of these, or of another kind than those before it, with file and line; fewer questions
            than examples need.
    """
    items, kind = [], None
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        here = _kind(row, where)
        if kind is not None and kind != here:
            raise UserError(
                f"{where}: a row of {', '.join(_KINDS[here])} among rows of {', '.join(_KINDS[kind])}; one kind a file"
            )
        kind = here
        items.append(_READERS[here](row, where))
    if kind is None:
        raise UserError(f"{path}: no rows")
    shots = tuple(np.random.default_rng(SHOT_SEED).permutation(len(items)).tolist()) if n_shot else ()
    shown = [_with_shots(item, items, shots, n_shot, path) for item in items[:limit]]
    name = TaskWord("file", str(path), n_shot).name
    scoring: Scoring = "greedy" if kind == "last_word" else "likelihood"
    return EvalTask(name, tuple(shown), scoring, str(path), n_shot, shots[: n_shot + 1])


def _with_shots(item: Item, items: Sequence[Item], order: Sequence[int], n_shot: int, path: Path) -> Item:
    """The item behind the first `n_shot` answered ones in `order` that do not read like it."""
    if not n_shot:
        return item
    own, chosen = item.solved, []
    for i in order:
        if items[i].solved != own:
            chosen.append(items[i].solved)
        if len(chosen) == n_shot:
            break
    else:
        raise UserError(f"{path}: {len(items)} rows are too few for {n_shot} examples that differ from the question")
    before = "".join(text + _BETWEEN_SHOTS for text in chosen)
    return Item(tuple(before + prompt for prompt in item.prompts), item.answers, item.gold, item.answer_bytes)


def _kind(row: dict[str, Any], where: str) -> str:
    """The kind of a row: the one whose keys it has, else the one of which it has most."""
    for kind, keys in _KINDS.items():
        if all(key in row for key in keys):
            return kind
    kind, keys = max(_KINDS.items(), key=lambda pair: sum(key in row for key in pair[1]))
    if not any(key in row for key in keys):
        raise UserError(f"{where}: not a question; a row is {_ROWS}")
    absent = next(key for key in keys if key not in row)
    raise UserError(f"{where}: no key '{absent}'{nearest(absent, row)}; a row is {', '.join(keys)}")


def _texts(row: dict[str, Any], key: str, where: str) -> list[str]:
    found = row[key]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) and text for text in found):
        raise UserError(f"{where}: {key}: expected a list of two or more texts, none empty")
    return found


def _text(row: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    found = row[key]
    if not isinstance(found, str):
        raise UserError(f"{where}: {key}: expected text, found {type(found).__name__}")
    if not found and not empty:
        raise UserError(f"{where}: {key}: empty")
    return found


def _gold(row: dict[str, Any], n: int, where: str) -> int:
    gold = row["gold"]
    if type(gold) is not int or not 0 <= gold < n:
        raise UserError(f"{where}: gold: expected the index of an answer, 0 to {n - 1}, found {gold!r}")
    return gold


def _choices(row: dict[str, Any], where: str) -> Item:
    query, choices = _text(row, "query", where, empty=True), _texts(row, "choices", where)
    gold, n_bytes = _gold(row, len(choices), where), tuple(len(choice.encode()) for choice in choices)
    return Item((query,) * len(choices), tuple(_DELIMITER + choice for choice in choices), gold, n_bytes)


def _contexts(row: dict[str, Any], where: str) -> Item:
    contexts, ending = _texts(row, "contexts", where), _text(row, "ending", where)
    n = len(contexts)
    return Item(tuple(contexts), (_DELIMITER + ending,) * n, _gold(row, n, where), (len(ending.encode()),) * n)


def _last_word(row: dict[str, Any], where: str) -> Item:
    match = re.fullmatch(r"(.*\S)(\s+)(\S+)\s*", _text(row, "text", where), re.DOTALL)
    if match is None:
        raise UserError(f"{where}: text: expected two words or more, the last of which is asked for")
    return Item((match[1],), (match[2] + match[3],), 0, (len(match[3].encode()),))


_READERS = {"choices": _choices, "contexts": _contexts, "last_word": _last_word}
