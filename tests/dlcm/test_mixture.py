"""Mixtures: which windows are drawn, what is measured of each source, and what is refused."""

import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dlcm import mixture as mixtures
from dlcm.checkpoint import checkpoint_paths
from dlcm.config import DataConfig, RunConfig
from dlcm.corpus_task import corpus_task
from dlcm.data_config import BLOCK_WINDOWS
from dlcm.errors import UserError, parse
from dlcm.micro_batch import micro_batches
from dlcm.mixture import STREAM_POSITIONS, MixedSplit, apportion, blend, open_mixture
from dlcm.record import read_json, read_metrics
from dlcm.shards import Split, open_corpus
from dlcm.train import train
from dlcm.trainer import Trainer
from dlcm.validation import calibrate_threshold, evaluate_loss
from tests.dlcm.conftest import dense_config, small_config

WORDS = {
    "code": ["def f(x):\n", "    return x\n", "x = 1\n", "import os\n", "f(3)\n", "y += x\n"],
    "wiki": ["The river ", "was long ", "and the town ", "stood there. ", "It had ", "a bridge.\n"],
    "zoo": ["lion ", "tiger ", "bear ", "owl ", "hawk ", "newt\n"],
}


def write_source(folder, name, n_documents=60, words=150):
    draw = np.random.default_rng(sorted(WORDS).index(name))
    path = folder / f"{name}.jsonl"
    texts = [f"{i} " + "".join(draw.choice(WORDS[name], words)) for i in range(n_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sources")
    for name in WORDS:
        write_source(path, name)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def data_of(folder, weights=None, **more):
    weights = weights or {"code": 0.7, "wiki": 0.3}
    sources = {name: {"corpus": str(folder / f"{name}.jsonl"), "weight": weight} for name, weight in weights.items()}
    return {"mixture": sources, "tokenizer": "bytes", "seq_len": 64, "validation_share": 0.2, **more}


def run_config(folder, model=None, data=None, **train_fields):
    return RunConfig(
        model=model or small_config(vocab_size=257),
        data=data or data_of(folder, validation_tokens=1280),
        optim={"lr_token": 1e-2, "lr_concept": 1e-2},
        train={"tokens": 12 * 512, "batch_tokens": 512, "log_every": 3, "checkpoint_every": 4, **train_fields},
    )


def random_split(n_tokens, seed):
    draw = np.random.default_rng(seed)
    offsets = np.append(np.sort(draw.choice(np.arange(1, n_tokens), n_tokens // 40, replace=False)), n_tokens)
    return Split("train", draw.integers(0, 256, n_tokens).astype(np.uint16), np.append(0, offsets), n_tokens)


SPLITS = {"a": random_split(5_000, 0), "b": random_split(900, 1), "c": random_split(40_000, 2)}
WEIGHTS = [0.25, 0.6, 0.15]


def sources_drawn(mixed, n, seed=3, seq_len=16):
    batch = mixed.batch(0, seed=seed, batch_tokens=n * seq_len, seq_len=seq_len)
    return batch.windows // STREAM_POSITIONS, batch.windows % STREAM_POSITIONS


# Weights and configs


@pytest.mark.parametrize("n", [7, 10, 100, 1024])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.25, 0.25), (0.1, 0.2, 0.3, 0.4), (0.001, 0.999), (1.0,)])
def test_apportioning_is_that_of_a_plain_loop_in_exact_numbers(weights, n):
    exact = [Fraction(w).limit_denominator(10**6) * n for w in weights]
    counts = [int(x) for x in exact]
    while sum(counts) < n:  # one at a time to whoever is furthest behind
        behind = [x - c for x, c in zip(exact, counts)]
        counts[behind.index(max(behind))] += 1
    for i in range(len(counts)):
        if counts[i] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    assert apportion(weights, n) == counts
    assert sum(counts) == n


def test_one_mixture_has_one_run_id_however_it_is_written(folder):
    sources = {name: {"corpus": str(folder / f"{name}.jsonl")} for name in WORDS}

    def written(weights):
        mixture = {name: {**sources[name], "weight": weight} for name, weight in weights.items()}
        return run_config(folder, data=data_of(folder) | {"mixture": mixture})

    first = written({"code": 0.2, "wiki": 0.5, "zoo": 0.3})
    assert first.run_id == written({"zoo": 3, "code": 2, "wiki": 5}).run_id
    assert first.run_id != written({"code": 0.2, "wiki": 0.3, "zoo": 0.5}).run_id
    assert list(written({"zoo": 3, "code": 2, "wiki": 5}).data.mixture) == ["code", "wiki", "zoo"]


def test_a_mixture_read_back_is_the_same_config(folder):
    draw = np.random.default_rng(0)
    for _ in range(50):
        names = [f"s{i}" for i in range(draw.integers(2, 40))]
        mixture = {name: {"corpus": "stdlib", "weight": float(w)} for name, w in zip(names, draw.uniform(0.5, 9, 40))}
        config = run_config(folder, data={"mixture": mixture, "seq_len": 64})
        assert sum(s.weight for s in config.data.mixture.values()) == pytest.approx(1, abs=1e-9)
        assert RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))).run_id == config.run_id


A = {"corpus": "stdlib", "weight": 1}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"mixture": {"a": A, "b": {**A, "wieght": 1}}}, "data.mixture.b.wieght'; did you mean 'weight'"),
        ({"mixture": {"a": A, "b": {"corpus": "stdlib"}}}, "missing key 'data.mixture.b.weight'"),
        ({"mixture": {"a": A, "b": {**A, "weight": 0}}}, "data.mixture.b.weight"),
        ({"mixture": {"a": A, "b": {**A, "weight": 1e-4}}}, "b.weight is 0.0001 of the whole"),
        ({"mixture": {"a": A}}, "give a single one as data.corpus"),
        ({"mixture": {}}, "give a single one as data.corpus"),
        ({"mixture": {f"s{i}": A for i in range(65)}}, "65 of the 2 to 64 sources"),
        ({"mixture": {"a": A, "B-b": A}}, "'B-b' names no source"),
        ({"mixture": {"a": A, "train": A}}, "'train' would name columns"),
        ({"mixture": {"a": A, "b": A}, "corpus": "packages"}, "both corpus = 'packages' and a mixture"),
        ({"mixture": {"a": A, "b": A}, "text_key": "body"}, "both text_key = 'body' and a mixture"),
        ({"mixture": [A, A]}, "data.mixture"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused_in_one_line(data, words):
    with pytest.raises(UserError) as error:
        parse(DataConfig, data, "run.yaml", "data")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_example_of_the_page_on_training_is_a_mixture():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    block = re.search(r"```yaml\n(data:\n  mixture:.*?)```", page, re.DOTALL)
    data = parse(DataConfig, yaml.safe_load(block[1])["data"], "docs", "data")
    assert {name: source.weight for name, source in data.mixture.items()} == {"code": 0.7, "wiki": 0.3}


# The order of the data


def test_every_block_has_the_apportioned_number_of_windows_of_each_source():
    mixed = MixedSplit(SPLITS, WEIGHTS)
    source, _ = sources_drawn(mixed, 6 * BLOCK_WINDOWS)
    for block in source.reshape(6, BLOCK_WINDOWS):
        assert np.bincount(block, minlength=3).tolist() == apportion(WEIGHTS, BLOCK_WINDOWS) == [256, 614, 154]


@pytest.mark.slow
def test_shares_hold_in_every_stretch_of_the_stream_not_only_in_whole_blocks():
    mixed = MixedSplit(SPLITS, WEIGHTS)
    for seed in range(4):
        source, _ = sources_drawn(mixed, 3 * BLOCK_WINDOWS, seed=seed)
        for i, count in enumerate(mixed.counts):
            expected = np.arange(1, len(source) + 1) * count / BLOCK_WINDOWS
            assert np.abs((source == i).cumsum() - expected).max() < len(SPLITS) + 1


def test_the_order_inside_a_block_differs_between_blocks_and_seeds():
    mixed = MixedSplit(SPLITS, WEIGHTS)
    first, second = sources_drawn(mixed, 2 * BLOCK_WINDOWS)[0].reshape(2, -1)
    assert (first != second).any()
    assert (first != sources_drawn(mixed, BLOCK_WINDOWS, seed=4)[0]).any()


def test_each_source_goes_through_its_own_epochs_as_if_it_were_alone():
    mixed = MixedSplit(SPLITS, WEIGHTS)
    source, start = sources_drawn(mixed, 3_000)
    for i, split in enumerate(SPLITS.values()):
        mine = start[source == i]
        alone = split.batch(0, seed=3, batch_tokens=len(mine) * 16, seq_len=16).windows
        np.testing.assert_array_equal(mine, alone)
    assert (source == 1).sum() > 30 * SPLITS["b"].n_windows(16)  # many epochs of the small one


def test_a_mixture_of_one_source_is_that_source():
    alone = SPLITS["a"]
    mixed = MixedSplit({"a": alone}, [1.0])
    for step in (0, 3, 50):
        one = mixed.batch(step, seed=7, batch_tokens=640, seq_len=32)
        other = alone.batch(step, seed=7, batch_tokens=640, seq_len=32)
        for name in ("tokens_T", "targets_T", "cu_seqlens", "windows"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_windows_are_cut_from_their_sources_with_every_document_start():
    mixed, seq_len = MixedSplit(SPLITS, WEIGHTS), 32
    batch = mixed.batch(40, seed=1, batch_tokens=64 * seq_len, seq_len=seq_len)
    splits, starts = list(SPLITS.values()), []
    for w, position in enumerate(batch.windows.tolist()):
        split, start = splits[position // STREAM_POSITIONS], position % STREAM_POSITIONS
        here = slice(w * seq_len, (w + 1) * seq_len)
        assert batch.tokens_T[here].tolist() == split.tokens[start : start + seq_len].tolist()
        assert batch.targets_T[here].tolist() == split.tokens[start + 1 : start + seq_len + 1].tolist()
        inside = {int(x) - start for x in split.offsets if start <= x < start + seq_len} | {0}
        starts += [w * seq_len + x for x in sorted(inside)]
    assert batch.cu_seqlens.tolist() == [*starts, 64 * seq_len]


@pytest.mark.slow
def test_a_batch_is_a_function_of_seed_and_step_alone():
    mixed = MixedSplit(SPLITS, WEIGHTS)
    whole = mixed.batch(0, seed=2, batch_tokens=16 * 2_400, seq_len=16).windows  # over the ends of blocks
    for size in (1, 7, 300):
        steps = [mixed.batch(s, seed=2, batch_tokens=16 * size, seq_len=16).windows for s in range(2_400 // size)]
        drawn = np.concatenate(steps)
        np.testing.assert_array_equal(drawn, whole[: len(drawn)])


def test_ranks_and_micro_batches_draw_the_same_windows_in_the_same_order(folder, cache):
    config = run_config(folder, data=data_of(folder))
    batch = open_corpus(config.data).train.batch(5, seed=0, batch_tokens=512, seq_len=64)
    small = run_config(folder, data=data_of(folder), micro_batch_tokens=128)
    for n_ranks, cut in ((1, config), (2, config), (3, config), (2, small)):
        parts = [part for rank in range(n_ranks) for part in micro_batches(batch, cut, rank, n_ranks)]
        assert torch.cat([part[0] for part in parts]).tolist() == batch.tokens_T.tolist()
        positions = (batch.windows[:, None] + np.arange(64)).ravel()
        assert torch.cat([part[3] for part in parts]).tolist() == positions.tolist()


def test_positions_of_sources_differ_and_do_not_move_with_the_sizes_of_others():
    source, start = sources_drawn(MixedSplit(SPLITS, WEIGHTS), 4_000)
    for i, split in enumerate(SPLITS.values()):
        assert start[source == i].max() < split.n_tokens < STREAM_POSITIONS
    longer = {**SPLITS, "a": random_split(9_000, 5)}
    source_2, start_2 = sources_drawn(MixedSplit(longer, WEIGHTS), 4_000)
    np.testing.assert_array_equal(source, source_2)
    np.testing.assert_array_equal(start[source > 0], start_2[source > 0])


def test_epochs_of_a_source_are_its_tokens_over_its_size():
    mixed, seq_len = MixedSplit(SPLITS, WEIGHTS), 16
    n = 4 * BLOCK_WINDOWS
    source, _ = sources_drawn(mixed, n, seq_len=seq_len)
    expected = {name: (source == i).sum() * seq_len / split.n_tokens for i, (name, split) in enumerate(SPLITS.items())}
    assert mixed.epochs_by_source(n * seq_len) == pytest.approx(expected)
    assert mixed.epochs(n * seq_len) == pytest.approx(max(expected.values()))
    assert SPLITS["a"].epochs_by_source(100) is None


# Tokenizers and the cache


def test_other_weights_tokenize_nothing_again_under_a_given_tokenizer(folder, cache):
    open_mixture(DataConfig(**data_of(folder)))
    told = []
    other = DataConfig(**data_of(folder, {"code": 0.1, "wiki": 0.9}))
    open_mixture(other, lambda *at: told.append(at))
    assert told == []
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_one_tokenizer_is_trained_on_training_text_of_all_sources_by_weight(folder, cache, monkeypatch):
    seen = []
    monkeypatch.setattr(mixtures, "BPE_SAMPLE_BYTES", 20_000)
    train_on = mixtures.Tokenizer.train

    def watched(texts, size):
        seen.extend(texts)
        return train_on(seen, size)

    monkeypatch.setattr(mixtures.Tokenizer, "train", watched)
    mixture = open_mixture(DataConfig(**data_of(folder, {"code": 0.8, "wiki": 0.2}, tokenizer="bpe-400")))
    sizes = dict.fromkeys(("code", "wiki"), 0)
    texts = {n: {json.loads(row)["text"] for row in (folder / f"{n}.jsonl").open()} for n in sizes}
    validation = set()
    for part in mixture.parts:
        split = part.corpus.validation
        validation |= {mixture.tokenizer.decode(split.document(i)) for i in range(split.n_documents)}
    for text in seen:
        name = next(name for name in texts if text in texts[name])
        sizes[name] += len(text)
    assert not validation & set(seen)
    assert sizes["code"] / sum(sizes.values()) == pytest.approx(0.8, abs=0.05)
    assert len({part.corpus.tokenizer.fingerprint for part in mixture.parts}) == 1
    assert mixture.tokenizer.vocab_size <= 400
    seen.clear()
    again = open_mixture(DataConfig(**data_of(folder, {"code": 0.8, "wiki": 0.2}, tokenizer="bpe-400")))
    assert (again.fingerprint, seen) == (mixture.fingerprint, [])


@pytest.mark.parametrize("sizes", [{"a": 50, "b": 400}, {"a": 400, "b": 400}, {"a": 5, "b": 9_000}])
def test_a_short_source_is_repeated_in_the_text_of_the_tokenizer(sizes):
    samples = {name: ["x" * 10 if name == "a" else "y" * 10] * (n // 10 or 1) for name, n in sizes.items()}
    text = "".join(blend(samples, {"a": 0.25, "b": 0.75}, 8_000))
    assert text.count("x") / len(text) == pytest.approx(0.25, abs=0.05)
    assert len(text) <= 8_000 + 20


def test_equal_documents_are_on_the_same_side_of_every_large_source(tmp_path, cache):
    shared = [f"document {i} " + "w " * 30 for i in range(300)]
    for name, own in (("one", "p"), ("two", "q")):
        texts = [*shared, *(f"{own} {i} " + "v " * 30 for i in range(60))]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = {name: {"corpus": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("one", "two")}
    mixture = open_mixture(DataConfig(mixture=sources, tokenizer="bytes", seq_len=64))

    def texts_of(split):
        return {mixture.tokenizer.decode(split.document(i)) for i in range(split.n_documents)}

    trained = set.union(*(texts_of(part.corpus.train) for part in mixture.parts))
    assert not trained & set.union(*(texts_of(part.corpus.validation) for part in mixture.parts))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_faults_of_a_source_name_it(folder, tmp_path, cache, tokenizer):
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "alone"}\n')
    (tmp_path / "key.jsonl").write_text('{"body": "alone"}\n')
    for corpus, words in (
        (tmp_path / "absent.txt", "no such file"),
        (tmp_path / "short.jsonl", "too few for one window"),
        (tmp_path / "one.jsonl", "only one document"),
        (tmp_path / "key.jsonl", "set data.mixture.wiki.text_key"),
    ):
        data = data_of(folder, tokenizer=tokenizer)
        data["mixture"]["wiki"]["corpus"] = str(corpus)
        with pytest.raises(UserError, match=words) as error:
            open_corpus(DataConfig(**data))
        assert "data.mixture.wiki" in str(error.value)
        assert "data.corpus" not in str(error.value)


# What is measured


def by_source(trainer, config):
    """Sums of nats, tokens, bytes, concepts of the fixed windows of each source, in a plain loop over single windows."""
    model, found = trainer.model.eval(), {}
    for part, n in zip(trainer.corpus.parts, apportion([0.7, 0.3], config.data.validation_tokens // 64)):
        split, rows = part.corpus.validation, []
        n_windows = (split.n_tokens - 1) // 64
        n = min(n, n_windows)
        for start in (64 * (i * n_windows // n) for i in range(n)):
            ids = torch.from_numpy(np.asarray(split.tokens[start : start + 65]).astype(np.int64))
            cuts = [0, *(int(x) - start for x in split.offsets if start < x < start + 64), 64]
            with torch.no_grad():
                out = model(ids[:-1], cu_seqlens=torch.tensor(cuts))
            nats = torch.nn.functional.cross_entropy(out.logits.double(), ids[1:], reduction="sum")
            n_bytes = int((ids[1:] != 256).sum())
            rows.append((float(nats), 64, n_bytes, int(out.boundaries.sum())))
        found[part.name] = np.sum(rows, axis=0)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("validation_tokens", [20 * 64, 33 * 64])
def test_the_loss_is_the_mean_by_weights_and_of_the_union_where_windows_share_out(folder, tmp_path, validation_tokens):
    config = run_config(folder, data=data_of(folder, validation_tokens=validation_tokens))
    trainer = Trainer(config, tmp_path)
    trainer.train_step()
    calibrate_threshold(trainer.model, trainer.corpus, config)
    found = evaluate_loss(trainer.model, trainer.corpus, config)
    sums = by_source(trainer, config)
    for name, (nats, tokens, n_bytes, concepts) in sums.items():
        source = found.sources[name]
        assert source["tokens"] == tokens
        assert source["loss_nats"] == pytest.approx(nats / tokens, rel=1e-5)
        assert source["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
        assert source["tokens_per_concept"] == pytest.approx(tokens / concepts)
    code, wiki = sums["code"], sums["wiki"]
    assert found.loss_nats == pytest.approx(0.7 * code[0] / code[1] + 0.3 * wiki[0] / wiki[1], rel=1e-5)
    bytes_per_token = 0.7 * code[2] / code[1] + 0.3 * wiki[2] / wiki[1]
    assert found.bits_per_byte == pytest.approx(found.loss_nats / math.log(2) / bytes_per_token)
    union = code + wiki
    assert found.tokens_per_concept == pytest.approx(union[1] / union[3])
    assert found.tokens_per_concept == pytest.approx(3.0, rel=0.01)  # the target, under the calibrated threshold
    assert sum(domain["tokens"] for domain in found.domains.values()) == union[1]
    if validation_tokens == 20 * 64:  # 14 and 6 windows: the weights exactly
        assert (code[1], wiki[1]) == (14 * 64, 6 * 64)
        assert found.loss_nats == pytest.approx(union[0] / union[1], rel=1e-5)
        assert found.bits_per_byte == pytest.approx(union[0] / math.log(2) / union[2], rel=1e-5)


def test_a_source_too_small_for_its_part_of_the_validation_set_still_counts_by_weight(folder, tmp_path):
    config = run_config(folder, data=data_of(folder, {"code": 0.5, "wiki": 0.5}, validation_tokens=1_000_000))
    trainer = Trainer(config, tmp_path)
    found = evaluate_loss(trainer.model, trainer.corpus, config)
    losses = [source["loss_nats"] for source in found.sources.values()]
    assert found.sources["code"]["tokens"] != found.sources["wiki"]["tokens"]
    assert found.loss_nats == pytest.approx(sum(losses) / 2)


def test_each_source_has_evaluation_items_by_weight_and_answers_of_its_own(folder):
    mixture = open_corpus(DataConfig(**data_of(folder, {"code": 0.25, "wiki": 0.75}, validation_share=0.5)))
    task = corpus_task(mixture, limit=40)
    words = {name: {word.strip() for word in WORDS[name]} for name in ("code", "wiki")}
    kinds = []
    for item in task.items:
        passages = [*item.prompts, *item.answers]
        kinds.append("code" if any(mark in item.prompts[0] for mark in ("(", "=", "import", "return")) else "wiki")
        other = "wiki" if kinds[-1] == "code" else "code"
        assert not any(word in passage for word in words[other] for passage in passages)
    assert (kinds.count("code"), kinds.count("wiki")) == (10, 30)
    assert len(corpus_task(mixture, limit=1).items) == 1


# Training


def record_of(run_dir):
    rows = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(run_dir / "metrics.jsonl")]
    result = {k: v for k, v in read_json(run_dir / "result.json").items() if k != "wall_s"}
    return rows, result, torch.load(checkpoint_paths(run_dir)[0], weights_only=True)["model"]


@pytest.mark.slow
def test_a_mixture_that_was_killed_goes_on_to_the_same_bits(folder, tmp_path):
    config = run_config(folder)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 7:
            raise Killed

    train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "torn", on_step=kill)
    train(config, tmp_path / "torn")
    (rows, result, model), (rows_2, result_2, model_2) = record_of(tmp_path / "whole"), record_of(tmp_path / "torn")
    assert (rows, result) == (rows_2, result_2)
    assert all(torch.equal(model[name], model_2[name]) for name in model)


@pytest.mark.slow
def test_other_micro_batches_give_the_same_run_up_to_rounding(folder, tmp_path):
    whole = train(run_config(folder), tmp_path / "whole")
    cut = train(run_config(folder), tmp_path / "cut", micro_batch_tokens=128)
    assert cut.loss_nats == pytest.approx(whole.loss_nats, rel=1e-4)


@pytest.mark.slow
def test_two_ranks_train_a_mixture_as_one_does(folder, tmp_path):
    config = run_config(folder)
    (tmp_path / "run.json").write_text(json.dumps(config.model_dump(mode="json")))
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [*ranks, Path(sys.executable).with_name("dlcm"), "train", tmp_path / "run.json", tmp_path / "two"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    one, two = train(config, tmp_path / "one"), read_json(tmp_path / "two" / "result.json")
    assert read_json(tmp_path / "two" / "env.json")["n_ranks"] == 2
    assert two["loss_nats"] == pytest.approx(one.loss_nats, rel=1e-4)
    for name, source in one.sources.items():
        assert two["sources"][name]["loss_nats"] == pytest.approx(source["loss_nats"], rel=1e-4)


@pytest.mark.slow
def test_training_says_what_it_found_of_each_source(folder, tmp_path, dlcm):
    def run(weight):
        weights = {"code": 1 - weight, "wiki": weight}
        config = run_config(folder, model=dense_config(vocab_size=257), data=data_of(folder, weights), tokens=80 * 512)
        path = tmp_path / f"{weight}.json"
        path.write_text(json.dumps(config.model_dump(mode="json")))
        status, out, err = dlcm("train", path, tmp_path / f"run-{weight}")
        assert (status, "error" in err) == (0, False)
        return read_json(tmp_path / f"run-{weight}" / "result.json"), out

    little, out = run(0.05)
    much, _ = run(0.6)
    assert much["sources"]["wiki"]["loss_nats"] < little["sources"]["wiki"]["loss_nats"]
    assert much["sources"]["wiki"]["weight"] == 0.6
    assert much["epochs_by_source"] == {name: source["epochs"] for name, source in much["sources"].items()}
    assert much["epochs"] == max(much["epochs_by_source"].values())
    assert f"source wiki, weight 0.05: {little['sources']['wiki']['loss_nats']:.4f} nats per token" in out
    assert read_json(tmp_path / "run-0.6" / "run.json")["config"]["data"]["mixture"]["code"]["weight"] == 0.4


def test_a_plain_corpus_has_no_sources(folder, tmp_path):
    data = {"corpus": str(folder / "wiki.jsonl"), "tokenizer": "bytes", "seq_len": 64}
    result = train(run_config(folder, data=data, tokens=512, batch_tokens=512), tmp_path / "run")
    assert (result.sources, result.epochs_by_source) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_a_source_whose_text_changed_is_refused_by_name(tmp_path, cache, tokenizer):
    for name in ("code", "wiki"):
        write_source(tmp_path, name)
    config = run_config(
        tmp_path, model=small_config(vocab_size=300), data=data_of(tmp_path, tokenizer=tokenizer), tokens=512
    )
    train(config, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with (tmp_path / "wiki.jsonl").open("a") as file:
        file.write('{"text": "one more document"}\n')
    with pytest.raises(UserError, match=r"the text of data\.mixture\.wiki is not the one"):
        train(config, tmp_path / "run")
