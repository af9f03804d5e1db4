"""Each distinct beginning is read once, and nothing else changes: every answer is that of one sequence read alone."""

import contextlib
import random

import pytest
import torch

from dlcm import scoring
from dlcm.scoring import Question, Scorer, branches, carriers, common, share_of_neighbours
from tests.dlcm.conftest import VOCAB, awake, dense_config, small_config

MODELS = {
    "dense": lambda: awake(dense_config()),
    "learned": lambda: awake(small_config("learned")),
    "fixed": lambda: awake(small_config("fixed", pooling="first")),
    "delimiter": lambda: awake(small_config("delimiter_word", smoothing="none", concept_bias="none")),
}


def alone(model, question):
    """Log-likelihood and greedy match of one sequence, without packing, cache or tree."""
    with torch.no_grad():
        logits = model(torch.tensor([question.input])).logits[0].double()
    log_prob, n = logits.log_softmax(-1), len(question.tokens)
    places = range(n - 1 - question.n_asked, n - 1)
    value = sum(float(log_prob[i, question.tokens[i + 1]]) for i in places)
    return value, all(int(logits[i].argmax()) == question.tokens[i + 1] for i in places)


def tree_of_questions(seed, n_items=6, examples=True):
    """Answers behind questions behind examples; some answers begin others, some are asked twice."""
    draw = random.Random(seed)

    def words(low, high):
        return tuple(draw.randrange(1, VOCAB) for _ in range(draw.randint(low, high)))

    shots, questions = ((0, *words(20, 30)) if examples else (0,)), []
    for _ in range(n_items):
        context = shots + words(5, 14)
        for _ in range(draw.randint(2, 4)):
            answer = words(1, 6)
            questions.append(Question(context + answer, len(answer)))
        questions.append(Question(context + answer + words(2, 3), 2))  # what was just asked begins this one
        questions.append(questions[-2])
    questions += [Question((0, *words(3, 20)), 2) for _ in range(4)]
    draw.shuffle(questions)
    return questions


def scorer(model, *, batch_tokens=200, trees=True):
    return Scorer(model.eval(), batch_tokens, contextlib.nullcontext(), trees=trees)


@pytest.mark.many
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_every_answer_is_that_of_the_sequence_read_alone(name, seed, monkeypatch):
    monkeypatch.setattr(scoring, "_LEAST_SHARE_NARROW", 0.3)
    model, questions, told = MODELS[name](), tree_of_questions(seed), []
    found = scorer(model).score(questions, told.append)
    assert told[-1] == len(questions)
    for question, (value, greedy) in zip(questions, found):
        expected, likeliest = alone(model, question)
        assert value == pytest.approx(expected, abs=1e-4)  # float32 where it is read off
        assert greedy == likeliest


def distinct_beginnings(questions):
    return len({question.input[:n] for question in questions for n in range(1, len(question.input) + 1)})


def test_in_a_tree_each_distinct_beginning_is_read_once(monkeypatch):
    monkeypatch.setattr(scoring, "_LEAST_SHARE_NARROW", 0.0)
    monkeypatch.setattr(scoring, "_LEAST_RUN", 1)
    model, questions, read = MODELS["dense"](), tree_of_questions(0), []
    real = model.forward

    def counted(tokens, **more):
        read.append(int(more["lengths"].sum()))
        return real(tokens, **more)

    monkeypatch.setattr(model, "forward", counted)
    scorer(model, batch_tokens=100_000).score(questions, lambda _: None)
    assert sum(read) == distinct_beginnings(questions)


def test_a_tree_is_read_by_parts_that_fit_and_few_tokens_more_are_read(monkeypatch):
    monkeypatch.setattr(scoring, "_LEAST_SHARE_NARROW", 0.3)
    model, questions, rows, read = MODELS["dense"](), tree_of_questions(1, n_items=20), [], []
    real = model.forward

    def counted(tokens, **more):
        if "lengths" in more:
            rows.append(len(tokens))
            read.append(int(more["lengths"].sum()))
        return real(tokens, **more)

    monkeypatch.setattr(model, "forward", counted)
    scorer(model, batch_tokens=500).score(questions, lambda _: None)
    assert max(rows) * max(len(q.tokens) for q in questions) < 1000
    packed = sum(len(questions[i].input) for i in carriers([q.input for q in questions]))
    assert sum(read) < packed / 2


def test_without_trees_long_sequences_come_first_and_batches_keep_the_limit():
    calls = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, *, cu_seqlens):
            calls.append(cu_seqlens.diff().tolist())
            return type("Answer", (), {"logits": torch.zeros(len(tokens), VOCAB)})()

    draw = random.Random(0)
    questions = [Question(tuple(draw.randrange(VOCAB) for _ in range(n)), 1) for n in (3, 50, 20, 49, 7, 120)]
    scorer(Model(), batch_tokens=100, trees=False).score(questions, lambda _: None)
    assert calls == [[119], [49, 48], [19, 6, 2]] or [max(call) for call in calls] == sorted(
        map(max, calls), reverse=True
    )


def test_an_input_is_carried_by_one_that_begins_with_it():
    inputs = [(1, 2), (1, 2, 3), (1,), (1, 2, 3), (2,), (1, 3)]
    found = carriers(inputs)
    assert {frozenset(inputs[j] for j in members) for members in found.values()} == {
        frozenset({(1,), (1, 2), (1, 2, 3)}),
        frozenset({(2,)}),
        frozenset({(1, 3)}),
    }
    assert sorted(j for members in found.values() for j in members) == list(range(6))


def test_what_parts_after_few_tokens_is_no_branch():
    inputs = [(0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 6), (0, 2, 7), (0, 2, 8)]
    nodes = branches(inputs, range(4), 0, 0)
    assert sorted((node.members, node.start, node.end) for node in nodes) == [
        ((0, 1), 0, 5),
        ((2,), 0, 3),
        ((3,), 0, 3),
    ]
    assert [(n.members, n.start, n.end, n.parent) for n in branches(inputs, (0, 1), 5, 7)] == [
        ((1,), 5, 6, 7),
        ((0,), 5, 6, 7),
    ]
    assert common((1, 2), (1, 2, 3)) == 2
    assert share_of_neighbours(inputs) == pytest.approx([5 / 6, 5 / 6, 2 / 3, 2 / 3])
