"""The built-in task: which of four passages continues a document of the validation text? No torch, no lm-eval."""

from dataclasses import dataclass

import numpy as np

from dlcm.errors import UserError
from dlcm.mixture import Mixture, Part, apportion, parts_of
from dlcm.shards import Corpus
from dlcm.tasks import CORPUS_TASK, EvalTask, Item

N_CHOICES = 4
_UNIGRAM_TOKENS = 2_000_000


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
    return EvalTask(CORPUS_TASK, tuple(items[:most]), "gain", CORPUS_TASK)


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
        prompts=(decode(context),) * len(passages),
        answers=tuple(decode(passage) for passage in passages),
        gold=gold,
        answer_bytes=tuple(int(lengths[passage].sum()) for passage in passages),
        prompt_ids=(tuple(context),) * len(passages),
        answer_ids=tuple(tuple(passage) for passage in passages),
    )
