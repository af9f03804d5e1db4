"""A text and the validation set from inside the concepts, against forward passes written out."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlcm.config import RunConfig
from dlcm.errors import UserError
from dlcm.inside import fixed_stride, look_inside, reading_windows
from dlcm.inside_validation import measure_inside, read_validation, validation_tokens
from dlcm.mixture import parts_of
from dlcm.opened import OpenRun, open_run
from dlcm.record import read_json
from dlcm.result import load_result
from dlcm.tokens import Tokenizer
from dlcm.train import train
from tests.dlcm.conftest import awake, dense_config, small_config
from tests.dlcm.texts import write_texts

BYTES = Tokenizer()
TEXT = "def f(x):\n    return 'naïve 你好 🎉'\n"
KINDS = {
    "learned": small_config(vocab_size=257),
    "cosine": small_config("cosine", vocab_size=257),
    "random": small_config("random", vocab_size=257),
    "word": small_config("delimiter_word", vocab_size=257),
    "fixed": small_config("fixed", vocab_size=257),
    "dense": dense_config(vocab_size=257),
}


def opened(name: str, seq_len: int = 256) -> OpenRun:
    """A run as `open_run` gives it, without a training."""
    config = RunConfig(
        model=KINDS[name],
        data={"corpus": "stdlib", "tokenizer": "bytes", "seq_len": seq_len},
        train={"tokens": seq_len, "batch_tokens": seq_len},
    )
    corpus = SimpleNamespace(tokenizer=BYTES)
    return OpenRun(None, config, awake(KINDS[name]).eval(), corpus, "step.pt", torch.autocast("cpu", enabled=False))


@torch.no_grad()
def direct_nats(model, ids, boundaries=None) -> np.ndarray:
    """-ln p of every token but the first, from the logits of one forward pass."""
    logits_TV = model(torch.tensor(ids), boundaries=boundaries).logits
    return -logits_TV.log_softmax(1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_of_each_token_is_that_of_the_model(name):
    run = opened(name)
    inside = look_inside(run, TEXT)
    ids = [256, *TEXT.encode()]
    assert inside.spans.ids_T.tolist() == ids[1:]
    np.testing.assert_allclose(inside.nats_T[1:], direct_nats(run.model, ids), atol=1e-10)
    assert math.isnan(inside.nats_T[0])
    assert inside.loss_nats == pytest.approx(direct_nats(run.model, ids).mean())
    assert inside.bits_per_byte == pytest.approx(inside.loss_nats / math.log(2))  # one byte a token


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_passes_are_made_in_the_precision_of_the_run():
    """A run that was trained under bf16 autocast is read under it: nearly the same losses, but not the same."""
    run = opened("learned")
    run.model.float()
    narrow = replace(run, autocast=torch.autocast("cpu", dtype=torch.bfloat16))
    wide, rounded = look_inside(run, TEXT), look_inside(narrow, TEXT)
    same = wide.begins_T == rounded.begins_T
    assert same.mean() > 0.9
    assert 0 < abs(rounded.loss_nats - wide.loss_nats) < 0.05


@pytest.mark.parametrize("name", ["learned", "cosine", "random", "word", "fixed"])
def test_boundaries_and_probabilities_are_those_of_the_model(name):
    run = opened(name)
    inside = look_inside(run, TEXT)
    with torch.no_grad():
        out = run.model(torch.tensor([256, *TEXT.encode()]))
    assert inside.begins_T.tolist() == out.boundaries.tolist()
    np.testing.assert_allclose(inside.prob_T, out.boundary_prob, atol=1e-6)
    assert inside.tokens_per_concept == out.tokens_per_concept
    assert inside.n_concepts == inside.concept_T[-1] + 1
    if inside.threshold is not None:
        assert ((inside.prob_T >= inside.threshold) == inside.begins_T).all()


@pytest.mark.parametrize("name", ["learned", "word"])
def test_the_control_has_as_many_concepts_at_even_distances_and_its_loss_is_that_of_injected_boundaries(name):
    run = opened(name)
    inside = look_inside(run, TEXT)
    lengths = np.diff(np.flatnonzero(inside.control_T))
    ratio = inside.tokens_per_concept
    assert int(inside.control_T.sum()) == inside.n_concepts
    assert set(lengths.tolist()) <= {math.floor(ratio), math.ceil(ratio)}
    expected = direct_nats(run.model, [256, *TEXT.encode()], torch.from_numpy(inside.control_T))
    np.testing.assert_allclose(inside.control_nats_T[1:], expected, atol=1e-10)
    assert abs(inside.control_loss_nats - inside.loss_nats) > 1e-4
    shared = inside.shared
    assert shared["both"] + shared["model"] == shared["both"] + shared["control"] == inside.n_concepts - 1


def test_a_model_of_fixed_stride_is_its_own_control_and_a_dense_one_has_neither_concepts_nor_control():
    fixed, dense = look_inside(opened("fixed"), TEXT), look_inside(opened("dense"), TEXT)
    assert fixed.begins_T.tolist() == fixed_stride(np.arange(fixed.n_tokens), 3.0).tolist()
    for inside in (fixed, dense):
        assert inside.control_T is inside.control_loss_nats is inside.shared is inside.threshold is None
    assert dense.begins_T is dense.prob_T is dense.n_concepts is dense.tokens_per_concept is None


def test_an_empty_text_is_its_start_alone():
    inside = look_inside(opened("learned"), "")
    assert (inside.n_tokens, inside.n_concepts, inside.spans.pieces()) == (1, 1, [])
    assert inside.loss_nats is inside.bits_per_byte is inside.control_loss_nats is None


@given(st.integers(1, 400), st.integers(1, 60))
def test_windows_score_each_token_once_with_half_a_window_before_it(n_tokens, seq_len):
    windows = list(reading_windows(n_tokens, seq_len))
    scored = [t for _, end, first in windows for t in range(first, end)]
    assert scored == list(range(n_tokens))
    for start, end, first in windows:
        assert end - start <= max(seq_len, 2)
        assert start == 0 or first - start >= max(seq_len // 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned", "dense"])
def test_a_text_longer_than_the_window_is_scored_in_the_first_window_that_holds_each_token(name, monkeypatch):
    monkeypatch.setattr("dlcm.inside._BATCH_TOKENS", 40)  # several windows to a pass, and several passes
    run, text = opened(name, seq_len=16), TEXT * 3
    inside = look_inside(run, text)
    ids = [256, *text.encode()]
    for t in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), 8) if t < s + 16)
        window = ids[start : start + 16]
        assert inside.nats_T[t] == pytest.approx(direct_nats(run.model, window)[t - start - 1], abs=1e-10)
        if name == "learned":
            with torch.no_grad():
                out = run.model(torch.tensor(window))
            assert inside.begins_T[t] == out.boundaries[t - start]
            injected = torch.from_numpy(inside.control_T[start : start + 16].copy())
            injected[0] = True
            nats = direct_nats(run.model, window, injected)
            assert inside.control_nats_T[t] == pytest.approx(nats[t - start - 1], abs=1e-10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A DLCM of a mixture of code and words, a dense run of the same, and a dense run of other windows."""
    folder = tmp_path_factory.mktemp("inside")
    (folder / "words").mkdir()
    (folder / "code").mkdir()
    write_texts(folder / "words")
    for i in range(40):
        lines = "".join(f"def f{j}(x):\n    # the sum of it all is here\n    return x + {i * j}\n" for j in range(20))
        (folder / "code" / f"{i}.py").write_text(lines)
    mixture = {name: {"corpus": str(folder / name), "weight": w} for name, w in (("words", 0.4), ("code", 0.6))}
    data = {
        "mixture": mixture,
        "tokenizer": "bpe-400",
        "seq_len": 64,
        "validation_share": 0.3,
        "validation_tokens": 2048,
    }
    found = {}
    for name, model, more in (
        ("dlcm", small_config(vocab_size=400), {}),
        ("dense", dense_config(vocab_size=400), {}),
        ("other", dense_config(vocab_size=400), {"seq_len": 32}),
    ):
        config = RunConfig(model=model, data=data | more, train={"tokens": 512 * 8, "batch_tokens": 512})
        train(config, folder / name)
        found[name] = open_run(folder / name)
    return found


@pytest.fixture(scope="module")
def record(runs):
    return measure_inside(runs["dlcm"], runs["dense"])


def test_the_validation_set_is_read_as_in_validation(runs, record):
    result = load_result(runs["dlcm"].run_dir)
    assert record["n_tokens"] / record["n_concepts"] == pytest.approx(result.tokens_per_concept)
    for name, found in record["content"].items():
        assert found["tokens_per_concept"]["value"] == pytest.approx(result.domains[name]["tokens_per_concept"])
        assert found["tokens_per_concept"]["n_tokens"] == result.domains[name]["tokens"]
    for name, found in record["sources"].items():
        assert found["tokens_per_concept"]["value"] == pytest.approx(result.sources[name]["tokens_per_concept"])
        assert found["tokens_per_concept"]["n_tokens"] == result.sources[name]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("injected", [False, True])
def test_validation_losses_are_those_of_each_sequence_alone(runs, injected):
    run = runs["dlcm"]
    tokens = validation_tokens(run)
    boundaries_T = fixed_stride(tokens.position_T, 3.7) if injected else None
    reading = read_validation(run, "", boundaries_T=boundaries_T)
    stream = np.concatenate(
        [
            batch.tokens_T
            for part, n in zip(parts_of(run.corpus), np.bincount(tokens.source_T) // 64)
            for batch in part.corpus.validation.windows(64, int(n) * 64)
        ]
    )
    assert len(stream) == len(reading.nats_T)
    for start, end in zip(tokens.cu_seqlens[:-1].tolist(), tokens.cu_seqlens[1:].tolist()):
        own = None if boundaries_T is None else torch.from_numpy(boundaries_T[start:end])
        np.testing.assert_allclose(
            reading.nats_T[start + 1 : end], direct_nats(run.model, stream[start:end], own), atol=2e-5
        )
        assert math.isnan(reading.nats_T[start])
        assert tokens.position_T[start:end].tolist() == list(range(end - start))
        assert len(set(tokens.document_T[start:end].tolist())) == 1
    assert set(np.flatnonzero(tokens.opens_T).tolist()) <= set(tokens.cu_seqlens[:-1].tolist())
    assert (stream[tokens.opens_T] == run.tokenizer.eot_id).all()


def test_the_record_is_written_and_its_parts_agree(runs, record):
    assert read_json(runs["dlcm"].run_dir / "inside.json") == record
    for places in (record["places"], record["control"]["places"]):
        for groups in places.values():
            for model, dense, difference in zip(groups["model"], groups["dense"], groups["difference"]):
                assert model["n_tokens"] == dense["n_tokens"] == difference["n_tokens"]
                if model["n_tokens"]:
                    assert difference["value"] == pytest.approx(model["value"] - dense["value"])
    for other, sign in (("control", 1), ("dense", -1)):
        found = record[other]
        expected = sign * (found["loss_nats"]["value"] - record["loss_nats"]["value"])
        assert found["difference_nats"]["value"] == pytest.approx(expected)
    n_known = sum(row["n_tokens"] for row in record["places"]["offset"]["model"])
    assert 0 < n_known <= record["loss_nats"]["n_tokens"]
    assert abs(record["control"]["n_concepts"] - record["n_concepts"]) <= 0.02 * record["n_concepts"]


def test_runs_that_cannot_be_compared_are_refused_with_the_way_out(runs):
    with pytest.raises(UserError, match="a dense model has no concepts.*--against"):
        measure_inside(runs["dense"])
    with pytest.raises(UserError, match="takes a dense run"):
        measure_inside(runs["dlcm"], runs["dlcm"])
    with pytest.raises(UserError, match=r"data.seq_len is not that of .*dlcm"):
        measure_inside(runs["dlcm"], runs["other"])
