"""Sampling from a trained model: what is drawn, when it stops, and what is shown on the way."""

import json
import subprocess
import sys

import pytest
import torch

from dlcm.config import RunConfig
from dlcm.errors import UserError
from dlcm.generate import Sampling, generate
from dlcm.tokens import Tokenizer
from dlcm.train import train
from tests.dlcm.conftest import awake, dense_config, small_config
from tests.dlcm.texts import write_texts

BYTES = Tokenizer()
CONFIGS = {
    "mean": small_config(vocab_size=257),
    "first": small_config(vocab_size=257, pooling="first"),
    "dense": dense_config(vocab_size=257),
}


class Spelling(torch.nn.Module):
    """A model that writes given bytes, whatever it reads; or whose next token always has the same distribution."""

    def __init__(self, text=None, logits=None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.config, self.text, self.logits = dense_config(), text, logits

    def new_cache(self, batch_size):
        return Written(batch_size)

    def forward(self, tokens_Bt, *, cache, lengths=None):
        if lengths is None:
            cache.n_written += 1
        if self.logits is not None:
            return type("Answer", (), {"logits": self.logits.expand(tokens_Bt.shape[0], tokens_Bt.shape[1], -1)})
        logits = torch.zeros(*tokens_Bt.shape, 257)
        logits[..., self.text[cache.n_written]] = 50.0
        return type("Answer", (), {"logits": logits})


class Written:
    def __init__(self, n_rows):
        self.n_rows, self.n_written = n_rows, 0
        self.n_tokens_B = self.n_segments_B = torch.ones(n_rows)

    def select(self, rows_B):
        self.n_rows = rows_B.numel()


@torch.no_grad()
def greedy_by_recomputing(model, prompt, n):
    ids = [256, *prompt.encode()]
    for _ in range(n):
        token = int(model(torch.tensor(ids)).logits[-1].argmax())
        ids.append(token)
        if token == 256:
            break
    return bytes(i for i in ids[1 + len(prompt.encode()) :] if i < 256).decode("utf-8", "replace")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_decoding_of_unequal_prompts_equals_recomputing_every_token(name):
    model = awake(CONFIGS[name]).eval()
    prompts = ["", "a", "a longer prompt, with ü", "x" * 40]
    done = generate(model, BYTES, prompts, Sampling(30, temperature=0.0))
    assert [c.text for c in done] == [greedy_by_recomputing(model, prompt, 30) for prompt in prompts]


@pytest.mark.slow
def test_prompts_longer_than_a_chunk_are_read_whole(monkeypatch):
    monkeypatch.setattr("dlcm.generate._CHUNK", 7)
    model = awake(CONFIGS["mean"]).eval()
    prompts = ["short", "a prompt that needs several chunks to be read", "of 7 tok"]
    done = generate(model, BYTES, prompts, Sampling(12, temperature=0.0))
    assert [c.text for c in done] == [greedy_by_recomputing(model, prompt, 12) for prompt in prompts]


@pytest.mark.slow
def test_a_text_depends_on_seed_and_index_and_not_on_its_neighbours():
    model = awake(CONFIGS["mean"]).eval()
    first = generate(model, BYTES, ["one", "two", "three"], Sampling(20, seed=5))
    again = generate(model, BYTES, ["another one", "two", "x"], Sampling(20, seed=5))
    other = generate(model, BYTES, ["one", "two", "three"], Sampling(20, seed=6))
    same = generate(model, BYTES, ["two", "two"], Sampling(20, seed=5))
    assert first[1] == again[1]
    assert first[1].text != other[1].text
    assert same[0].text != same[1].text
    assert first[1].tokens_per_concept > 1.0


@pytest.mark.slow
def test_tokens_are_drawn_with_the_tempered_probabilities_of_the_likeliest_set():
    """Against the closed form, within five standard errors of each share."""
    logits, n = torch.full((257,), -30.0), 6000
    logits[65:70] = torch.tensor([2.0, 1.0, 0.5, -1.0, -2.0])
    temperature, top_p = 1.5, 0.9
    prob = (logits.double() / temperature).softmax(0)
    kept, mass = [], 0.0
    for i in prob.argsort(descending=True).tolist():
        kept.append(i)
        mass += float(prob[i])
        if mass >= top_p:
            break
    assert 2 <= len(kept) < 5
    done = generate(Spelling(logits=logits), BYTES, [""] * n, Sampling(1, temperature, top_p))
    counts = torch.zeros(257)
    for completion in done:
        counts[ord(completion.text)] += 1
    for i in range(257):
        share = float(prob[i]) / mass if i in kept else 0.0
        assert abs(counts[i] / n - share) <= 5 * (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize(
    ("written", "stop", "text", "reason"),
    [
        (b"one two. three", (".",), "one two", "stop"),
        (b"one STOP two", ("STOP", "two"), "one ", "stop"),
        (b"one STO STOP two", ("STOP",), "one STO ", "stop"),
        (b"aab aaab", ("aaab",), "aab ", "stop"),
        ("naïve ü".encode() + bytes([0]), (), "naïve ü\0", "length"),
        ([*b"the end", 256], (), "the end", "end"),
        ([*b"wait ST", 256], ("STOP",), "wait ST", "end"),
    ],
)
def test_stop_strings_and_characters_of_several_tokens_are_never_shown_in_part(written, stop, text, reason):
    pieces = []
    sampling = Sampling(len(written), temperature=0.0, stop=stop)
    (done,) = generate(Spelling(written), BYTES, [""], sampling, on_text=lambda i, new: pieces.append((i, new)))
    assert (done.text, done.reason) == (text, reason)
    assert "".join(new for _, new in pieces) == text
    assert all(i == 0 and "�" not in new for i, new in pieces)
    if "ü" not in text:
        assert len(pieces) > 1


def test_a_character_that_is_never_completed_is_replaced_at_the_end():
    (done,) = generate(Spelling("ü".encode()), BYTES, [""], Sampling(1, temperature=0.0))
    assert done.text == "�"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_impossible_sampling_is_refused_by_name(fields, name):
    with pytest.raises(UserError, match=f"^{name}: .*expected"):
        Sampling(**fields)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    (folder / "texts").mkdir()
    texts = write_texts(folder / "texts")
    config = RunConfig(
        model=small_config(vocab_size=400),
        data={"corpus": str(texts), "tokenizer": "bpe-400", "seq_len": 32, "validation_share": 0.3},
        train={"tokens": 512, "batch_tokens": 256},
    )
    train(config, folder / "run")
    return folder / "run"


def dlcm(*args, text=None):
    command = [sys.executable, "-c", "from dlcm.cli import main; main()", "generate", *map(str, args)]
    return subprocess.run(command, input=text, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_writes_text_to_standard_output_and_the_same_again_with_the_same_seed(run_dir):
    streamed = dlcm(run_dir, "def ", "-n", 12)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.startswith("def ")
    assert "12 tokens, ended by length" in streamed.stderr
    record = json.loads(dlcm(run_dir, "-", "-n", 12, "--samples", 2, "--json", text="def ").stdout)
    assert "def " + record["texts"][0]["text"] + "\n\n" == streamed.stdout
    assert len(record["texts"]) == 2
    assert record["texts"][0]["tokens_per_concept"] >= 1.0


@pytest.mark.slow
def test_the_command_names_what_is_wrong(run_dir, tmp_path):
    for args, words in (
        ((tmp_path / "none", "x"), "run.json"),
        ((run_dir, "x", "--top-p", "2"), "top_p: 2.0; expected"),
    ):
        answer = dlcm(*args)
        assert answer.returncode == 2
        assert words in answer.stderr
        assert len(answer.stderr.strip().splitlines()) == 1
