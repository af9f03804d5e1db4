import json
import math

import datasets
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_harness
from torch import nn

from dlcm.config import DataConfig
from dlcm.corpus_task import corpus_task
from dlcm.errors import UserError
from dlcm.harness import HarnessModel, HarnessTask
from dlcm.model import build_model
from dlcm.shards import open_corpus
from dlcm.tasks import EvalTask, Item, jsonl_task
from dlcm.tokens import Tokenizer
from tests.dlcm.conftest import awake, dense_config, small_config
from tests.dlcm.texts import write_texts

BYTES = Tokenizer()


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Recurrent(nn.Module):
    """Logits from all tokens since the start of the packed sequence; records what it was called with."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(vocab_size, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, vocab_size, generator=generator))
        self.calls: list[list[int]] = []

    def forward(self, tokens, *, cu_seqlens):
        assert tokens.dtype == torch.int64
        assert cu_seqlens[0] == 0
        assert cu_seqlens[-1] == len(tokens)
        parts = tokens.split(cu_seqlens.diff().tolist())
        self.calls.append([len(part) for part in parts])
        states = [(0.7 * self.embedding[part]).cumsum(0).tanh() for part in parts]
        return Answer(torch.cat(states) @ self.head)


class Lookup(nn.Module):
    """Knows the tokens that follow every `order` tokens of a stream, and nothing else."""

    def __init__(self, vocab_size, stream, order=3):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = dense_config()
        self.vocab_size, self.order, self.next = vocab_size, order, {}
        for i in range(len(stream) - order):
            self.next.setdefault(tuple(stream[i : i + order]), set()).add(stream[i + order])

    def forward(self, tokens, *, cu_seqlens=None, cache=None, lengths=None):
        if cache is not None:
            (row,) = cache
            row += tokens[0, : None if lengths is None else lengths[0]].tolist()
            return Answer(self(torch.tensor(row)).logits[None, -tokens.shape[1] :])
        logits, ids = torch.zeros(len(tokens), self.vocab_size), tokens.tolist()
        for i in range(self.order - 1, len(ids)):
            for follower in self.next.get(tuple(ids[i + 1 - self.order : i + 1]), ()):
                logits[i, follower] = 20.0
        return Answer(logits)

    def new_cache(self, batch_size):
        return IdsOfRows([[] for _ in range(batch_size)])


class IdsOfRows(list):
    n_tokens_B = n_segments_B = torch.ones(1)


def by_hand(model, tokenizer, context, continuation):
    """Log-likelihood of one continuation, one sequence at a time, in float64."""
    ids = [tokenizer.eot_id, *context, *continuation]
    with torch.no_grad():
        logits = model(torch.tensor(ids), cu_seqlens=torch.tensor([0, len(ids)])).logits.double()
    log_prob = logits.log_softmax(1)
    first = len(ids) - len(continuation)
    total = sum(float(log_prob[i - 1, ids[i]]) for i in range(first, len(ids)))
    return total, all(int(logits[i - 1].argmax()) == ids[i] for i in range(first, len(ids)))


def ask(*pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, 0) for pair in pairs]


PAIRS = [
    ("a context", " and more"),
    ("", "no context"),
    ("x", " y"),
    ("a much longer context, " * 3, "ü"),
    ("a ", " b"),
]


def test_packed_scores_are_those_of_one_sequence_at_a_time():
    model = Recurrent(257)
    lm = HarnessModel(model, BYTES, 1000)
    answers = lm.loglikelihood(ask(*PAIRS))
    assert len(model.calls) == 1
    for (context, continuation), (value, greedy) in zip(PAIRS, answers):
        moved = len(context) - len(context.rstrip())  # lm-eval gives the white space at a context's end to the answer
        context, continuation = context.rstrip(), context[len(context) - moved :] + continuation
        expected = by_hand(model, BYTES, context.encode(), continuation.encode())
        assert value == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


def test_batches_hold_long_sequences_first_and_stay_below_the_limit():
    model = Recurrent(257)
    pairs = [("c" * n, "x") for n in (3, 50, 20, 49, 7, 120)]
    packed = HarnessModel(model, BYTES, 1000, batch_tokens=100).loglikelihood(ask(*pairs))
    assert all(sum(call) <= 100 or len(call) == 1 for call in model.calls)
    assert [max(call) for call in model.calls] == sorted((max(call) for call in model.calls), reverse=True)
    alone = [HarnessModel(model, BYTES, 1000).loglikelihood(ask(pair))[0] for pair in pairs]
    assert [value for value, _ in packed] == pytest.approx([value for value, _ in alone], rel=1e-5)


def test_a_real_model_scores_packed_as_it_scores_alone():
    model = awake(small_config(vocab_size=257)).eval()
    answers = HarnessModel(model, BYTES, 200).loglikelihood(ask(*PAIRS[:4]))
    for (context, continuation), (value, _) in zip(PAIRS, answers):
        expected, _ = by_hand(
            model, BYTES, context.rstrip().encode(), (context[len(context.rstrip()) :] + continuation).encode()
        )
        assert value == pytest.approx(expected, rel=1e-5)


def test_what_is_too_long_loses_its_beginning_but_never_a_part_of_the_answer():
    model = Recurrent(257)
    lm = HarnessModel(model, BYTES, 16)
    (value, _), (whole, _) = lm.loglikelihood(ask(("0123456789" * 5, "answer"), ("c" * 50, "a" * 40)))
    assert sorted(length for call in model.calls for length in call) == [16, 40]
    assert value == pytest.approx(by_hand(model, BYTES, b"0123456789", b"answer")[0], rel=1e-5)
    assert whole == pytest.approx(by_hand(model, BYTES, b"", b"a" * 40)[0], rel=1e-5)


def test_ids_given_with_a_request_are_scored_as_they_are():
    model = Recurrent(257)
    value, _ = HarnessModel(model, BYTES, 100).loglikelihood(ask(("text", "not encoded", [200, 3], [255, 0])))[0]
    assert value == pytest.approx(by_hand(model, BYTES, [200, 3], [255, 0])[0], rel=1e-5)


def test_rolling_scores_every_token_once():
    model = Recurrent(257)
    text = "a text that is longer than the window of the model"
    lm = HarnessModel(model, BYTES, 1000)
    values = lm.loglikelihood_rolling(ask((text,), ("short",), kind="loglikelihood_rolling"))
    assert values[0] == pytest.approx(by_hand(model, BYTES, b"", text.encode())[0], rel=1e-5)
    assert values[1] == pytest.approx(by_hand(model, BYTES, b"", b"short")[0], rel=1e-5)
    flat = HarnessModel(Lookup(257, b""), BYTES, 8).loglikelihood_rolling(ask((text,), kind="loglikelihood_rolling"))
    assert flat[0] == pytest.approx(-len(text) * math.log(257), rel=1e-6)


def test_generation_is_greedy_and_stops_where_it_should():
    stream = b"one two three. four five\xc3\xa9 six"
    lm = HarnessModel(Lookup(257, [*stream, 256]), BYTES, 100)

    def generate(**options):
        return lm.generate_until(ask(("one", options), kind="generate_until"))[0]

    assert generate(until=["."]) == " two three"
    assert generate(until=["\n"], max_gen_toks=5) == " two "
    assert generate(until=[]) == stream[3:].decode()
    with pytest.raises(UserError, match="do_sample"):
        generate(do_sample=True, temperature=0.8)


def item(query, choices, gold):
    answers = tuple(f" {choice}" for choice in choices)
    return Item((query,) * len(choices), answers, gold, tuple(len(choice.encode()) for choice in choices))


ITEMS = (
    item("Two and two is", ("four", "five", "twenty-two"), 0),
    item("", ("yes", "nö"), 1),
    item("{{ not a template }}", ("a", "b"), 0),
    item("12", ("a much longer answer", "b"), 0),
)


@pytest.fixture(scope="module")
def scored():
    model = Recurrent(257)
    lm = HarnessModel(model, BYTES, 100)
    return model, run_harness(lm, {"mine": HarnessTask(EvalTask("mine", ITEMS))}, bootstrap_iters=1, log_samples=True)


def test_accuracies_and_bits_per_byte_are_those_computed_by_hand(scored):
    model, answer = scored
    acc, acc_norm, bits = [], [], []
    for item in ITEMS:
        values = [by_hand(model, BYTES, item.prompts[0].encode(), answer.encode())[0] for answer in item.answers]
        acc.append(float(np.argmax(values) == item.gold))
        acc_norm.append(float(np.argmax(np.array(values) / item.answer_bytes) == item.gold))
        bits.append(-values[item.gold] / math.log(2) / item.answer_bytes[item.gold])
    scores = answer["results"]["mine"]
    for name, expected in (("acc", acc), ("acc_norm", acc_norm), ("bits_per_byte", bits)):
        assert scores[f"{name},none"] == pytest.approx(np.mean(expected), rel=1e-5)
        assert scores[f"{name}_stderr,none"] == pytest.approx(
            np.std(expected, ddof=1) / math.sqrt(len(ITEMS)), rel=1e-4
        )


def harness_scores(model, task):
    return run_harness(HarnessModel(model, BYTES, 200), {task.name: HarnessTask(task)}, bootstrap_iters=1)


PAIRS_OF_CONTEXTS = [
    {"contexts": [f"{i} so the cat", f"{i} so the dog", f"{i} as"], "ending": f"ran {i}.", "gold": i % 3}
    for i in range(9)
]
TEXTS = [{"text": f"It was {i} and one and {i}"} for i in range(9)]
CHOICES = [{"query": f"{i} and", "choices": [f"a {i}", "no", f"c {i} {i}"], "gold": i % 3} for i in range(9)]
THEIR_TASKS = {
    "choices": (
        CHOICES,
        {
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "output_type": "multiple_choice",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        },
    ),
    "contexts": (
        PAIRS_OF_CONTEXTS,
        {
            "doc_to_text": "gold",
            "doc_to_choice": "contexts",
            "doc_to_target": "ending",
            "output_type": "multiple_choice",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "last_word": (
        TEXTS,
        {
            "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
            "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
            "output_type": "loglikelihood",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
}


@pytest.mark.parametrize("kind", THEIR_TASKS)
def test_each_kind_of_row_is_scored_as_lm_evals_own_task_scores_it(kind, tmp_path):
    rows, config = THEIR_TASKS[kind]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours, model = (
        jsonl_task(path),
        Lookup(257, b"It was 1 and one and 1 It was 5 and one and 5 so the dog ran", order=2),
    )
    answer = harness_scores(model, ours)
    data = {
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "task": "theirs",
    }
    theirs = run_harness(
        HarnessModel(model, BYTES, 200), {"theirs": ConfigurableTask(config=data | config)}, bootstrap_iters=1
    )
    assert [s["acc"] for s in answer["samples"]["x"]] == [s["acc"] for s in theirs["samples"]["theirs"]]
    assert [[a[:2] for a in s["arguments"]] for s in answer["samples"]["x"]] == [
        [tuple(a) for a in s["arguments"]] for s in theirs["samples"]["theirs"]
    ]
    assert answer["results"]["x"]["acc,none"] == theirs["results"]["theirs"]["acc,none"]
    if kind == "choices":  # of equal text, bytes and characters are one
        assert answer["results"]["x"]["acc_norm,none"] == theirs["results"]["theirs"]["acc_norm,none"]
    if kind == "last_word":
        assert 0 < answer["results"]["x"]["acc,none"] < 1


def test_an_answer_that_is_no_number_is_wrong_and_the_others_count():
    task = HarnessTask(EvalTask("t", ITEMS))
    assert task.process_results(ITEMS[0], [(math.nan, False), (-1.0, False), (-2.0, False)])["acc"] == 0.0
    assert task.process_results(ITEMS[0], [(-1.0, False), (math.nan, False), (-2.0, False)])["acc_norm"] == 0.0
    assert task.process_results(ITEMS[0], [(-1.0, False), (-2.0, False), (-3.0, False)])["acc"] == 1.0


def test_what_another_sequence_begins_with_is_read_once():
    model = Recurrent(257)
    lm = HarnessModel(model, BYTES, 1000)
    pairs = [
        ("A or B?", " A"),
        ("A or B?", " B"),
        ("A or B?", " A"),
        ("A or B?", " A is it"),
        ("A", " or"),
        ("C", " A"),
    ]
    answers = lm.loglikelihood(ask(*pairs))
    # An answer's last token is predicted, not read: all of the first question begin the pass over "A or B? A is i".
    assert model.calls == [[15, 3]]
    for (context, continuation), (value, greedy) in zip(pairs, answers):
        expected = by_hand(model, BYTES, context.encode(), continuation.encode())
        assert value == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


@pytest.mark.slow
def test_the_corpus_task_is_scored_by_the_gain_over_the_prior(tmp_path):
    corpus = open_corpus(DataConfig(corpus=str(write_texts(tmp_path)), tokenizer="bpe-400", validation_share=0.3))
    task, model = corpus_task(corpus, limit=40), Recurrent(corpus.tokenizer.vocab_size)
    answer = run_harness(HarnessModel(model, corpus.tokenizer, 256), {"corpus": HarnessTask(task)}, bootstrap_iters=1)
    acc, acc_norm = [], []
    for item in task.items:
        given = np.array([by_hand(model, corpus.tokenizer, item.prompt_ids[0], ids)[0] for ids in item.answer_ids])
        alone = np.array([by_hand(model, corpus.tokenizer, (), ids)[0] for ids in item.answer_ids])
        acc.append(float(np.argmax(given - alone) == item.gold))
        acc_norm.append(float(np.argmax(given / item.answer_bytes) == item.gold))
    scores = answer["results"]["corpus"]
    assert scores["acc,none"] == pytest.approx(np.mean(acc))
    assert scores["acc_norm,none"] == pytest.approx(np.mean(acc_norm))


def test_the_prompt_reaches_the_model_as_it_stands_in_the_row(scored):
    samples = scored[1]["samples"]["mine"]
    assert [sample["arguments"][0][0] for sample in samples] == [item.prompts[0] for item in ITEMS]
    assert samples[0]["arguments"][2][1] == " twenty-two"


@pytest.mark.slow
def test_a_model_that_knows_the_text_answers_the_corpus_task_and_one_that_knows_nothing_does_not(tmp_path):
    corpus = open_corpus(DataConfig(corpus=str(write_texts(tmp_path)), tokenizer="bpe-400", validation_share=0.3))
    task = corpus_task(corpus, limit=200)
    vocab_size, stream = corpus.tokenizer.vocab_size, np.asarray(corpus.validation.tokens).tolist()

    def accuracy(model):
        lm = HarnessModel(model, corpus.tokenizer, 256)
        answer = run_harness(lm, {task.name: HarnessTask(task)}, bootstrap_iters=1, log_samples=False)
        return answer["results"]["corpus"]["acc,none"]

    assert accuracy(Lookup(vocab_size, stream, order=16)) > 0.95
    assert abs(accuracy(Recurrent(vocab_size)) - 0.25) < 0.13


def test_nothing_is_fetched_and_nothing_is_printed(monkeypatch, capsys):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = build_model(small_config(vocab_size=257)).eval()
    run_harness(HarnessModel(model, BYTES, 64), {"t": HarnessTask(EvalTask("t", ITEMS))}, log_samples=False)
    assert capsys.readouterr() == ("", "")
