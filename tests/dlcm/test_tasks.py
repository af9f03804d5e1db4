import gzip
import json

import numpy as np
import pytest

from dlcm.config import DataConfig
from dlcm.corpus_task import CorpusTaskConfig, corpus_task
from dlcm.errors import UserError
from dlcm.shards import open_corpus
from dlcm.tasks import SUITES, check_tasks, expand_tasks, jsonl_task, parse_task, task_name
from tests.dlcm.texts import write_texts

ROW = {"query": "Two and two is", "choices": ["four", "fünf"], "gold": 0}


def write_rows(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return open_corpus(DataConfig(corpus=str(write_texts(folder)), tokenizer="bpe-400", validation_share=0.3))


def test_rows_are_read_with_their_bytes_and_other_keys_left_alone(tmp_path):
    path = write_rows(tmp_path / "sums.jsonl", {**ROW, "source": 1}, "", {**ROW, "choices": ["a", "b", "c"], "gold": 2})
    task = jsonl_task(path)
    assert (task.name, task.scoring, task.source) == ("sums", "likelihood", str(path))
    assert task.items[0].prompts == ("Two and two is",) * 2
    assert task.items[0].answers == (" four", " fünf")
    assert [item.answer_bytes for item in task.items] == [(4, 5), (1, 1, 1)]
    assert task.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert len(jsonl_task(path, limit=1).items) == 1


def test_a_compressed_file_is_the_same_task(tmp_path):
    plain = write_rows(tmp_path / "sums.jsonl", ROW)
    packed = tmp_path / "sums.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert jsonl_task(packed).items == jsonl_task(plain).items
    assert jsonl_task(packed).hash == jsonl_task(plain).hash


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["a", "b"]}, "no key 'gold'"),
        ({"quary": "q", "choices": ["a", "b"], "gold": 0}, "no key 'query'; did you mean 'quary'"),
        ({**ROW, "query": 3}, "query: expected text, found int"),
        ({**ROW, "choices": ["only"]}, "choices: expected a list of two or more"),
        ({**ROW, "choices": ["a", ""]}, "none empty"),
        ({**ROW, "choices": "ab"}, "choices: expected a list"),
        ({**ROW, "gold": 2}, "gold: expected the index of an answer, 0 to 1, found 2"),
        ({**ROW, "gold": True}, "found True"),
        ({**ROW, "gold": "0"}, "found '0'"),
        (
            {"contexts": ["a", "b"], "ending": "c", "gold": 0},
            "a row of contexts, ending, gold among rows of query, choices",
        ),
        ({"question": "q"}, "not a question; a row is query, choices, gold; or contexts, ending, gold; or text"),
        ("{broken", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, message):
    path = write_rows(tmp_path / "x.jsonl", ROW, row)
    with pytest.raises(UserError, match=message) as error:
        jsonl_task(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        jsonl_task(write_rows(tmp_path / "x.jsonl"))


def test_tasks_that_cannot_be_evaluated_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "a").mkdir()
    write_rows(tmp_path / "piqa.jsonl", ROW)
    paths = [write_rows(folder / "x.jsonl", ROW) for folder in (tmp_path, tmp_path / "a")]
    check_tasks(["corpus", str(paths[0])])
    cases = [
        (["corpsu"], "unknown task 'corpsu'; did you mean 'corpus'"),
        (["papr"], "unknown task 'papr'; did you mean 'paper'"),
        (["lm-eval:"], "unknown task 'lm-eval:'"),
        (["corpus@2"], "task corpus@2: the built-in task .* has no examples"),
        (["paper", f"{tmp_path}/piqa.jsonl"], "another task has the name 'piqa'"),
        (["none.jsonl"], "none.jsonl: no such file"),
        ([str(path) for path in paths], "another task has the name 'x'"),
        ([str(write_rows(tmp_path / "corpus.jsonl", ROW))], "another task has the name 'corpus'"),
        ([str(write_rows(tmp_path / "my task.jsonl", ROW))], "rename the file"),
    ]
    for tasks, message in cases:
        with pytest.raises(UserError, match=message):
            check_tasks(tasks)


def test_a_task_is_named_by_the_stem_of_its_file():
    words = ("corpus", "a/b/piqa.jsonl", "x.v2.jsonl.gz", "u@5/piqa.jsonl@5", "lm-eval:piqa", "lm-eval:mmlu@5")
    names = ["corpus", "piqa", "x.v2", "piqa_5shot", "piqa", "mmlu_5shot"]
    assert [task_name(word) for word in words] == names
    assert [parse_task(word).word for word in words] == list(words)


def test_a_suite_stands_for_its_tasks_each_once():
    assert len(SUITES["paper"]) == 12
    assert expand_tasks(["lm-eval:piqa", "paper"])[:2] == ("lm-eval:piqa", "lm-eval:commonsense_qa")
    assert len(expand_tasks(["lm-eval:piqa", "paper", "corpus"])) == 13
    assert expand_tasks(["paper@5"])[0] == "lm-eval:commonsense_qa@5"


PAIR = {
    "contexts": ["The cup broke because the cup", "The cup broke because the stone"],
    "ending": "was hard.",
    "gold": 1,
}


def test_context_pairs_are_contexts_of_one_ending(tmp_path):
    task = jsonl_task(write_rows(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "gold": 0}))
    assert task.items[0].prompts == tuple(PAIR["contexts"])
    assert task.items[0].answers == (" was hard.",) * 2
    assert task.items[0].answer_bytes == (9, 9)
    assert [item.gold for item in task.items] == [1, 0]
    assert (task.scoring, task.chance) == ("likelihood", 0.5)


def test_giving_one_answer_always_is_right_as_often_as_the_commonest_place(tmp_path):
    rows = [{**ROW, "choices": ["a", "b", "c"], "gold": gold} for gold in (2, 0, 2, 1, 2)]
    task = jsonl_task(write_rows(tmp_path / "x.jsonl", *rows))
    assert (task.chance, task.constant) == (pytest.approx(1 / 3), 3 / 5)


def test_the_last_word_is_what_is_asked_for(tmp_path):
    rows = [{"text": "He gave it back to her, the old  maid \n"}, {"text": "eins\nzwölf"}]
    task = jsonl_task(write_rows(tmp_path / "words.jsonl", *rows))
    assert [(item.prompts, item.answers) for item in task.items] == [
        (("He gave it back to her, the old",), ("  maid",)),
        (("eins",), ("\nzwölf",)),
    ]
    assert [item.answer_bytes for item in task.items] == [(4,), (6,)]
    assert (task.scoring, task.chance, task.constant) == ("greedy", 0.0, 0.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "contexts": ["one"]}, "contexts: expected a list of two or more"),
        ({**PAIR, "ending": ""}, "ending: empty"),
        ({**PAIR, "gold": 2}, "gold: expected the index of an answer, 0 to 1, found 2"),
        ({"contexts": ["a", "b"], "gold": 0}, "no key 'ending'"),
        ({"text": "one"}, "text: expected two words or more"),
        ({"text": 1}, "text: expected text, found int"),
    ],
)
def test_a_malformed_pair_or_text_is_named_by_file_and_line(tmp_path, row, message):
    with pytest.raises(UserError, match=message) as error:
        jsonl_task(write_rows(tmp_path / "x.jsonl", "", row))
    assert str(error.value).startswith(f"{tmp_path}/x.jsonl:2: ")


def numbered(n):
    return [{"query": f"question {i}", "choices": [f"yes {i}", f"no {i}"], "gold": i % 2} for i in range(n)]


def test_examples_are_answered_questions_of_the_file_and_never_the_question_itself(tmp_path):
    rows = numbered(12)
    task = jsonl_task(write_rows(tmp_path / "x.jsonl", *rows), n_shot=3)
    solved = [f"question {i} {('yes', 'no')[i % 2]} {i}" for i in range(12)]
    assert (task.name, task.n_shot, len(task.shots)) == ("x_3shot", 3, 4)
    for i, item in enumerate(task.items):
        *examples, question = item.prompts[0].split("\n\n")
        assert question == rows[i]["query"]
        assert examples == [solved[j] for j in task.shots if j != i][:3]
        assert item.prompts == item.prompts[:1] * 2
    alone = jsonl_task(tmp_path / "x.jsonl")
    assert [item.answers for item in task.items] == [item.answers for item in alone.items]
    assert task.hash != alone.hash
    assert jsonl_task(tmp_path / "x.jsonl", 5, 3).items == task.items[:5]


def test_a_question_that_reads_like_this_one_is_no_example_for_it(tmp_path):
    twins = [ROW, ROW, *numbered(3)]
    for item in jsonl_task(write_rows(tmp_path / "x.jsonl", *twins), n_shot=3).items[:2]:
        assert item.prompts[0].count(ROW["query"]) == 1


def test_examples_of_pairs_and_texts_end_with_the_right_answer(tmp_path):
    pairs = jsonl_task(write_rows(tmp_path / "p.jsonl", PAIR, {**PAIR, "ending": "was soft.", "gold": 0}), n_shot=1)
    assert pairs.items[0].prompts[0] == f"{PAIR['contexts'][0]} was soft.\n\n{PAIR['contexts'][0]}"
    assert pairs.items[1].prompts[1] == f"{PAIR['contexts'][1]} was hard.\n\n{PAIR['contexts'][1]}"
    texts = jsonl_task(write_rows(tmp_path / "t.jsonl", {"text": "a b"}, {"text": "c d e"}), n_shot=1)
    assert [item.prompts[0] for item in texts.items] == ["c d e\n\na", "a b\n\nc d"]


def test_too_few_rows_for_the_examples_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"x\.jsonl: 3 rows are too few for 3 examples"):
        jsonl_task(write_rows(tmp_path / "x.jsonl", *numbered(3)), n_shot=3)


def test_the_right_answer_is_the_text_that_follows_and_the_wrong_ones_are_from_other_documents(corpus):
    task = corpus_task(corpus)
    texts = [corpus.validation.document(i)[1:].tolist() for i in range(corpus.validation.n_documents)]
    bytes_per_token = corpus.train.n_bytes / corpus.train.n_tokens
    n_context, length = round(100 / bytes_per_token), round(20 / bytes_per_token)
    table = corpus.tokenizer.token_bytes()
    for item in task.items[:50]:
        assert len(item.prompt_ids[0]) == n_context
        assert [len(ids) for ids in item.answer_ids] == [length] * 4
        assert all(table[ids[0]][:1].isspace() for ids in item.answer_ids)
        assert item.answer_bytes == tuple(sum(len(table[i]) for i in ids) for ids in item.answer_ids)
        home = [contains(text, [*item.prompt_ids[0], *item.answer_ids[item.gold]]) for text in texts]
        assert sum(home) == 1
        for i, ids in enumerate(item.answer_ids):
            if i != item.gold:
                assert any(contains(text, list(ids)) for text, own in zip(texts, home) if not own)


def contains(text, part):
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1) if text[i] == part[0])


def test_token_frequencies_alone_do_not_tell_the_right_answer(corpus):
    task = corpus_task(corpus)
    counts = np.bincount(corpus.train.tokens, minlength=corpus.tokenizer.vocab_size) + 1.0
    log_prob = np.log(counts / counts.sum())
    scores = np.array([[log_prob[list(ids)].sum() for ids in item.answer_ids] for item in task.items])
    gold = scores[np.arange(len(scores)), [item.gold for item in task.items]]
    below, equal = (scores < gold[:, None] - 1e-9).sum(1), (abs(scores - gold[:, None]) < 1e-9).sum(1)
    # Credit for a tie is shared: the model would have to guess.
    accuracy = np.where(below + equal == 4, 1 / equal, 0.0).mean()
    assert abs(accuracy - 0.25) < 3 * np.sqrt(0.1875 / len(gold))
    assert np.median(scores.max(1) - scores.min(1)) < 0.1 * scores.std()


def test_no_two_answers_of_an_item_are_equal(corpus):
    assert all(len(set(item.answer_ids)) == 4 for item in corpus_task(corpus).items)


def test_every_place_holds_the_right_answer_equally_often(corpus):
    gold = np.bincount([item.gold for item in corpus_task(corpus).items], minlength=4)
    assert gold.sum() == 600
    assert (abs(gold - 150) < 45).all()


def test_documents_take_turns(corpus):
    one_each = corpus_task(corpus, limit=corpus.validation.n_documents)
    joined = [" ".join(map(str, corpus.validation.document(i))) for i in range(corpus.validation.n_documents)]
    homes = {
        next(i for i, text in enumerate(joined) if " ".join(map(str, item.prompt_ids[0])) in text)
        for item in one_each.items
    }
    assert len(homes) == corpus.validation.n_documents


@pytest.mark.slow
def test_the_task_is_the_same_every_time_and_a_limit_takes_its_beginning(corpus):
    task = corpus_task(corpus)
    assert corpus_task(corpus).hash == task.hash
    assert corpus_task(corpus, limit=20).items == task.items[:20]
    assert corpus_task(corpus, config=CorpusTaskConfig(seed=1)).hash != task.hash


def test_too_little_validation_text_is_refused_with_the_way_out(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"a short document, number {i}")
    corpus = open_corpus(DataConfig(corpus=str(tmp_path), tokenizer="bytes"))
    with pytest.raises(UserError, match=r"task 'corpus': too few validation documents.*data\.validation_share"):
        corpus_task(corpus)


def test_one_endless_document_does_not_keep_the_others_out(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        words = rng.choice(["red", "green", "blue", "of", "the", "and"], 20_000 if i == 0 else 300)
        (tmp_path / f"{i}.txt").write_text(f"{i} " + " ".join(words))
    corpus = open_corpus(DataConfig(corpus=str(tmp_path), tokenizer="bytes", validation_share=0.9))
    assert len(corpus_task(corpus, config=CorpusTaskConfig(n_cuts=100, n_items=50)).items) == 50


def test_the_shared_benchmarks_are_tasks(shared_data):
    for name, n, chance in (("openbook_qa", 500, 0.25), ("piqa", 1838, 0.5)):
        task = jsonl_task(shared_data / "eval" / f"{name}.jsonl")
        assert (task.name, len(task.items), task.chance) == (name, n, chance)
