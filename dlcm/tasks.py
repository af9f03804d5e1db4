"""What is evaluated: multiple-choice items from a JSONL file or from the corpus itself. No torch, no lm-eval."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlcm.corpus import JSONL_SUFFIXES, read_rows
from dlcm.errors import UserError, nearest
from dlcm.mixture import Mixture, Part, apportion, parts_of
from dlcm.shards import Corpus

CORPUS_TASK = "corpus"
# Part of every task hash: raise it when the same items would be scored in another way.
SCORING_VERSION = 1
N_CHOICES = 4
_ROW_KEYS = ("query", "choices", "gold")
_UNIGRAM_TOKENS = 2_000_000


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        query: the prompt.
        choices: the answers, as text.
        gold: index of the right one.
        choice_bytes: UTF-8 bytes of each answer.
        query_ids: the prompt as token ids, where the task is cut at tokens; else None and the text is encoded.
        choice_ids: the answers as token ids, likewise.
    """

    query: str
    choices: tuple[str, ...]
    gold: int
    choice_bytes: tuple[int, ...]
    query_ids: tuple[int, ...] | None = None
    choice_ids: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class EvalTask:
    """A named list of items.

    Attributes:
        name: names the result.
        items: the questions.
        delimiter: stands between prompt and answer.
        against_prior: `acc` takes the answer with the largest log p(answer | query) - log p(answer), which lm-eval calls
            acc_mutual_info, instead of the largest log p(answer | query).
    """

    name: str
    items: tuple[Item, ...]
    delimiter: str
    against_prior: bool = False

    @property
    def hash(self) -> str:
        """SHA-256 of the items, hexadecimal: an equal hash is the same test."""
        digest = hashlib.sha256(json.dumps([self.name, self.delimiter, self.against_prior]).encode())
        for item in self.items:
            digest.update(json.dumps(asdict(item), sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)


@dataclass(frozen=True)
class CorpusTaskConfig:
    """Sizes of the built-in task.

    Lengths are in bytes of text, turned into tokens by the training split's mean, so that the task is about as hard under
    every tokenizer. They are short because what a proxy of some hundred thousand training tokens has learned is local: a
    longer continuation adds more noise than signal, and the accuracy of the smallest models drowns in it.

    Attributes:
        context_bytes: text before the cut.
        continuation_bytes: text of each answer.
        n_items: questions, at most.
        n_cuts: cuts, at most, that questions and wrong answers are chosen from.
        seed: of documents, cuts and the order of answers.
    """

    context_bytes: int = 100
    continuation_bytes: int = 20
    n_items: int = 600
    n_cuts: int = 20_000
    seed: int = 0


def task_name(task: str) -> str:
    """Name of a task in `eval/<task>.json`: a task that is a file is named by its stem."""
    name = Path(task).name
    return next((name.removesuffix(suffix) for suffix in JSONL_SUFFIXES if name.endswith(suffix)), name)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what cannot be evaluated before anything is loaded.

    Raises:
        UserError: an unknown task (with the nearest), a missing file, or two tasks of one name.
    """
    names: dict[str, str] = {}
    for task in tasks:
        is_file = task.endswith(JSONL_SUFFIXES)
        if is_file and not Path(task).is_file():
            raise UserError(f"task {task}: no such file (looked in {Path.cwd()})")
        if not is_file and task != CORPUS_TASK:
            raise UserError(f"unknown task {task!r}{nearest(task, [CORPUS_TASK])}, or give a path ending in .jsonl")
        name = task_name(task)
        if (is_file and name == CORPUS_TASK) or names.setdefault(name, task) != task:
            raise UserError(f"task {task}: another task has the name '{name}', which names the result; rename the file")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(
                f"task {task}: rename the file; its stem names columns, so letters, digits, _, . and - only"
            )


def jsonl_task(path: Path, limit: int | None = None) -> EvalTask:
    """Read `{"query": ..., "choices": [...], "gold": index}` lines; other keys are left alone.

    Raises:
        UserError: a row that is not that, with file and line.
    """
    items = []
    for number, row in read_rows(path):
        items.append(_item(row, f"{path}:{number}"))
        if limit and len(items) == limit:
            break
    if not items:
        raise UserError(f"{path}: no rows")
    return EvalTask(task_name(str(path)), tuple(items), " ")


def corpus_task(
    corpus: Corpus | Mixture, limit: int | None = None, config: CorpusTaskConfig = CorpusTaskConfig()
) -> EvalTask:
    """Which of four continuations is the true next passage of a validation document?

    Every validation document is cut where a word begins (a token that starts with white space), so that the
    continuations of its cuts do not overlap; a cut has a context of the document before it and a continuation after it.
    Items are drawn from the documents in turn, so that long documents do not dominate. The three wrong answers are
    continuations of cuts of *other* documents, none equal to the true one or to another. All such continuations are
    ranked with the true one by their log-likelihood under the training split's token frequencies, and three neighbours
    are taken, so that the true one is the first, second, third or last of the four with equal probability.

    So the four have the same number of tokens, begin with a word, and are about equally plausible by themselves: a model
    that knows frequencies alone stays at chance, and what decides is the context. Everything is cut at tokens, so the
    answers are encoded as in training.

    Scoring (ours): the right answer is drawn from p(answer | context) and the wrong ones from p(answer), so the best guess
    is the answer with the largest ratio p(answer | context) / p(answer). The plain likelihood would mix in how usual
    each passage is to the model, which hides what it learned: over six proxies between 5.8 and 4.3 nats the ratio's
    accuracy rises with every drop of the loss, the plain one's does not.

    Of a mixture each source has items by its weight, all within the source: passages of another kind of text would be told
    apart without being understood.

    Raises:
        UserError: the validation split has too few long documents; of a mixture, that of a source.
    """
    parts = parts_of(corpus)
    most = min(config.n_items, limit or config.n_items)
    wanted = apportion([part.weight for part in parts], max(most, len(parts)))
    items = [item for part, n in zip(parts, wanted) for item in _corpus_items(part, n, config)]
    return EvalTask(CORPUS_TASK, tuple(items[:most]), "", against_prior=True)


def _corpus_items(part: Part, n_items: int, config: CorpusTaskConfig) -> list[Item]:
    """At most `n_items` items of the validation documents of one source."""
    corpus, rng = part.corpus, np.random.default_rng(config.seed)
    bytes_per_token = corpus.train.n_bytes / corpus.train.n_tokens
    n_context, length = (max(2, round(n / bytes_per_token)) for n in (config.context_bytes, config.continuation_bytes))
    cuts, documents = _cuts(corpus, n_context, length, rng.permutation(corpus.validation.n_documents), config.n_cuts)
    passages = corpus.validation.tokens[cuts[:, None] + np.arange(length)]
    # Code repeats itself: of equal passages one stands for all, so that no wrong answer equals the right one.
    _, rest, which = np.unique(passages, axis=0, return_index=True, return_inverse=True)
    which, home = which.reshape(-1), documents[rest]
    if not len(rest) or len(rest) - np.bincount(home).max() - 1 < N_CHOICES - 1:
        whose = f"of data.mixture.{part.name} " if part.name else ""
        raise UserError(
            f"task '{CORPUS_TASK}': too few validation documents {whose}have {n_context + length} tokens; "
            "raise data.validation_share or give more and longer documents"
        )
    score = _unigram_scores(corpus, passages)
    ranked = np.argsort(score[rest], kind="stable")
    items = []
    for i in _in_turn(documents, rng)[:n_items].tolist():
        others = rest[ranked[(home[ranked] != documents[i]) & (ranked != which[i])]]
        place = np.searchsorted(score[others], score[i]) - rng.integers(N_CHOICES)
        first = int(np.clip(place, 0, len(others) - N_CHOICES + 1))
        wrong = others[first : first + N_CHOICES - 1]
        order = rng.permutation(N_CHOICES)
        chosen = cuts[np.concatenate([[i], wrong])[order]]
        items.append(_passages(corpus, int(cuts[i]), chosen, int(np.argmin(order)), (n_context, length)))
    return items


def _item(row: dict[str, Any], where: str) -> Item:
    for key in _ROW_KEYS:
        if key not in row:
            raise UserError(f"{where}: no key '{key}'{nearest(key, row)}; a row is query, choices, gold")
    query, choices, gold = (row[key] for key in _ROW_KEYS)
    if not isinstance(query, str):
        raise UserError(f"{where}: query: expected text, found {type(query).__name__}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: choices: expected a list of two or more texts, none empty")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise UserError(f"{where}: gold: expected the index of a choice, 0 to {len(choices) - 1}, found {gold!r}")
    return Item(query, tuple(choices), gold, tuple(len(choice.encode()) for choice in choices))


def _cuts(
    corpus: Corpus, n_context: int, length: int, order: np.ndarray, at_most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Stream positions where a continuation of `length` tokens begins, and the document of each, documents in `order`."""
    split = corpus.validation
    starts_word = np.array([token[:1].isspace() for token in corpus.tokenizer.token_bytes()])
    most_of_one = max(1, at_most // 10)  # one endless document may not keep the others out
    cuts, documents = [], []
    for d in order.tolist():
        first, end = int(split.offsets[d]), int(split.offsets[d + 1])
        words = first + np.flatnonzero(starts_word[split.tokens[first:end]])
        free, here = first + 1 + n_context, []
        for position in words[words <= end - length].tolist():
            if position >= free:
                here.append(position)
                free = position + length
        here = here[:: max(1, len(here) // most_of_one)][:most_of_one]
        cuts += here
        documents += [d] * len(here)
        if len(cuts) >= at_most:
            break
    return np.array(cuts, np.int64), np.array(documents, np.int64)


def _unigram_scores(corpus: Corpus, passages: np.ndarray) -> np.ndarray:
    """Log-likelihood of each passage (a row) under add-one token frequencies of the training split, nats."""
    train, vocab_size = corpus.train, corpus.tokenizer.vocab_size
    sample = train.tokens[np.arange(0, train.n_tokens, max(1, train.n_tokens // _UNIGRAM_TOKENS))]
    counts = np.bincount(sample, minlength=vocab_size) + 1.0
    return np.log(counts / counts.sum())[passages].sum(1)


def _in_turn(documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of all cuts, in random order but one of each document before the second of any."""
    shuffled = rng.permutation(len(documents))
    seen: dict[int, int] = {}
    turns = []
    for document in documents[shuffled].tolist():
        seen[document] = seen.get(document, -1) + 1
        turns.append(seen[document])
    return shuffled[np.argsort(turns, kind="stable")]


def _passages(corpus: Corpus, cut: int, chosen: np.ndarray, gold: int, sizes: tuple[int, int]) -> Item:
    tokens, lengths, decode = corpus.validation.tokens, corpus.tokenizer.byte_lengths, corpus.tokenizer.decode
    context = tokens[cut - sizes[0] : cut].tolist()
    passages = [tokens[c : c + sizes[1]].tolist() for c in chosen]
    return Item(
        query=decode(context),
        choices=tuple(decode(passage) for passage in passages),
        gold=gold,
        choice_bytes=tuple(int(lengths[passage].sum()) for passage in passages),
        query_ids=tuple(context),
        choice_ids=tuple(tuple(passage) for passage in passages),
    )
