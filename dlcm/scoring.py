"""Log-likelihoods of many sequences, each distinct beginning read once.

A causal model gives every beginning of a sequence what it gives it alone. So a sequence that another one begins with costs
nothing, and sequences that begin alike (answers behind one question, questions behind the same examples) are read as a tree: what
they share goes into a cache once, and its row is then taken as often as there are branches. Sequences that share little are
packed, several to one forward pass, without padding.

T tokens of one packed forward pass, B rows of a cache, L tokens of the longest row of one level, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tokens = tuple[int, ...]

# A run of shared tokens that is worth a branch.
_LEAST_RUN = 4
# The share of a sequence that it must have in common with a neighbour to be read in a tree. Per token a tree costs more than a
# packed pass, whose attention pads nothing: little where matrices are wide, up to three times as much in the smallest proxies (on
# a CPU, see docs/evaluation.md). On a GPU, where it was never measured, trees are for prompts with examples alone.
_LEAST_SHARE, _LEAST_SHARE_NARROW, _WIDE = 0.4, 0.75, 128


@dataclass(frozen=True)
class Question:
    """What is asked: the log-likelihood of the last `n_asked` tokens behind the others."""

    tokens: Tokens
    n_asked: int

    @property
    def input(self) -> Tokens:
        """What is read; the last token is predicted."""
        return self.tokens[:-1]

    def predictions(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Places from `start` to `end` that predict an asked token, and that token."""
        first = len(self.tokens) - 1 - self.n_asked
        for place in range(max(start, first), min(end, len(self.tokens) - 1)):
            yield place, self.tokens[place + 1]


@dataclass(frozen=True)
class Node:
    """A run of tokens that several sequences share, or the end of one.

    Attributes:
        parent: place of the node before it among those of its level; 0 for a root.
        members: the sequences behind it, as indices.
        start: where the run begins in each of them.
        end: where it ends.
    """

    parent: int
    members: tuple[int, ...]
    start: int
    end: int


class Scorer:
    """Answers questions with a model."""

    def __init__(
        self, model: Any, batch_tokens: int, autocast: contextlib.AbstractContextManager, *, trees: bool
    ) -> None:
        """Wrap a model.

        Args:
            model: called as `model(tokens_T, cu_seqlens=...)`; its answer has `.logits`, (T, V).
            batch_tokens: tokens of one forward pass; of a tree, of the rows of its cache.
            autocast: context of the forward pass.
            trees: whether the model has `new_cache`, and is called as `model(tokens_BL, cache=..., lengths=...)` too.
        """
        self.model, self._batch_tokens, self._autocast, self._trees = model, batch_tokens, autocast, trees
        self._device = next(model.parameters()).device
        wide = trees and self._device.type == "cpu" and model.config.d_token >= _WIDE
        self._least_share = _LEAST_SHARE if wide else _LEAST_SHARE_NARROW

    @torch.no_grad()
    def score(self, questions: Sequence[Question], told: Callable[[int], Any]) -> list[tuple[float, bool]]:
        """Sum of log p (nats) over the asked tokens, and whether each of them is the likeliest one.

        Args:
            questions: in any order.
            told: called with how many are answered.
        """
        values, greedy = [0.0] * len(questions), [True] * len(questions)
        inputs = [question.input for question in questions]
        carried = carriers(inputs)
        order = sorted(carried, key=inputs.__getitem__)
        shared = share_of_neighbours([inputs[i] for i in order]) if self._trees else [0.0] * len(order)
        alike = [i for i, share in zip(order, shared) if share >= self._least_share]
        alone = sorted(
            (i for i, share in zip(order, shared) if share < self._least_share), key=lambda i: -len(inputs[i])
        )
        batches = [(batch, self._read_packed) for batch in self._batches(alone, inputs, padded=False)]
        batches += [(batch, self._read_tree) for batch in self._batches(alike, inputs, padded=True)]
        done = 0
        for batch, read in batches:
            asked = [[(j, questions[j]) for j in carried[i]] for i in batch]
            for j, value, likeliest in read([inputs[i] for i in batch], asked):
                values[j] += value
                greedy[j] &= likeliest
            done += sum(map(len, asked))
            told(done)
        return list(zip(values, greedy))

    def _batches(self, order: Sequence[int], inputs: Sequence[Tokens], *, padded: bool) -> Iterator[list[int]]:
        """In order, up to the token limit; `padded` counts every sequence as long as the longest one."""
        batch: list[int] = []
        total = longest = 0
        for i in order:
            n = len(inputs[i]) + 1
            longest = max(longest, n)
            would_be = longest * (len(batch) + 1) if padded else total + n
            if batch and would_be > self._batch_tokens:
                yield batch
                batch, total, longest = [], 0, n
            batch.append(i)
            total += n
        if batch:
            yield batch

    def _read_packed(
        self, inputs: Sequence[Tokens], asked: Sequence[Sequence[tuple[int, Question]]]
    ) -> Iterator[tuple[int, float, bool]]:
        cu_seqlens = [0]
        for sequence in inputs:
            cu_seqlens.append(cu_seqlens[-1] + len(sequence))
        tokens_T = torch.tensor([token for sequence in inputs for token in sequence], device=self._device)
        starts = torch.tensor(cu_seqlens, dtype=torch.int32, device=self._device)
        with self._autocast:
            logits_TV = self.model(tokens_T, cu_seqlens=starts).logits
        wanted = [
            (j, start + place, token)
            for start, sequence, questions in zip(cu_seqlens, inputs, asked)
            for j, question in questions
            for place, token in question.predictions(0, len(sequence))
        ]
        yield from _read_off(logits_TV, wanted)

    def _read_tree(
        self, inputs: Sequence[Tokens], asked: Sequence[Sequence[tuple[int, Question]]]
    ) -> Iterator[tuple[int, float, bool]]:
        nodes = branches(inputs, range(len(inputs)), 0, 0)
        cache = self.model.new_cache(len(nodes))
        while nodes:
            runs = [inputs[node.members[0]][node.start : node.end] for node in nodes]
            width = max(map(len, runs))
            tokens_BL = torch.tensor([[*run, *[0] * (width - len(run))] for run in runs], device=self._device)
            lengths_B = torch.tensor([len(run) for run in runs], device=self._device)
            with self._autocast:
                logits_BLV = self.model(tokens_BL, cache=cache, lengths=lengths_B).logits
            wanted = [
                (j, row * width + place - node.start, token)
                for row, node in enumerate(nodes)
                for i in node.members
                for j, question in asked[i]
                for place, token in question.predictions(node.start, node.end)
            ]
            yield from _read_off(logits_BLV.flatten(0, 1), wanted)
            nodes = [
                child
                for row, node in enumerate(nodes)
                if len(node.members) > 1
                for child in branches(inputs, node.members, node.end, row)
            ]
            if nodes:
                cache.select(torch.tensor([node.parent for node in nodes], device=self._device))


def _read_off(logits_TV: Tensor, wanted: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, float, bool]]:
    """Log p of (question, row, token), and whether the token is the likeliest; log-softmax in float32."""
    listed = list(wanted)
    if not listed:
        return
    owners, rows, tokens = zip(*listed)
    rows_R, where_N = torch.tensor(rows, device=logits_TV.device).unique(return_inverse=True)
    tokens_N = torch.tensor(tokens, device=logits_TV.device)
    read_RV = logits_TV[rows_R].float()
    log_prob_N = read_RV[where_N, tokens_N] - read_RV.logsumexp(1)[where_N]
    likeliest_N = read_RV.argmax(1)[where_N] == tokens_N
    yield from zip(owners, log_prob_N.double().tolist(), likeliest_N.tolist())


def carriers(inputs: Sequence[Tokens]) -> dict[int, list[int]]:
    """Which inputs need a pass of their own -> the inputs that it answers: itself, those equal to it, its beginnings.

    In lexicographic order an input is the beginning of another one if and only if it is that of its successor.
    """
    found: dict[int, list[int]] = {}
    carrier = -1
    for i in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        if carrier < 0 or inputs[carrier][: len(inputs[i])] != inputs[i]:
            carrier = i
            found[i] = []
        found[carrier].append(i)
    return found


def share_of_neighbours(ordered: Sequence[Tokens]) -> list[float]:
    """Of sequences in lexicographic order: the part of each that it shares with the neighbour that is more like it."""
    runs = [0, *(common(one, other) for one, other in zip(ordered, ordered[1:])), 0]
    return [max(runs[i], runs[i + 1]) / max(len(sequence), 1) for i, sequence in enumerate(ordered)]


def branches(inputs: Sequence[Tokens], members: Sequence[int], start: int, parent: int) -> list[Node]:
    """The nodes behind a run that ends at `start`: of members that share `_LEAST_RUN` tokens more, and of each other one.

    Args:
        inputs: sequences, none of which another one begins with.
        members: indices of those that share their first `start` tokens, in lexicographic order.
        start: where the nodes begin.
        parent: their parent.
    """
    found: list[Node] = []
    todo = [tuple(members)]
    while todo:
        group = todo.pop()
        first = inputs[group[0]]
        end = common(first, inputs[group[-1]]) if len(group) > 1 else len(first)
        if len(group) == 1 or end - start >= _LEAST_RUN:
            found.append(Node(parent, group, start, end))
            continue
        # They part soon: each of their branches begins here as well.
        parts: dict[int, list[int]] = {}
        for i in group:
            parts.setdefault(inputs[i][end], []).append(i)
        todo += [tuple(part) for part in parts.values()]
    return found


def common(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
