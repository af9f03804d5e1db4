"""The loss of twenty steps of each family, written down once: a change that moves one of them changes every run."""

import json

import pytest

from dlcm.config import RunConfig
from dlcm.train import train
from tests.dlcm.conftest import dense_config, small_config

# Nats per token on the validation set. Rounding differs between processors and versions of torch by some 1e-5.
GOLDEN = {
    "learned": 2.14181,
    "learned-threshold": 2.14178,
    "cosine": 2.15195,
    "fixed": 2.11445,
    "random": 2.11318,
    "delimiter_word": 2.11472,
    "dense": 2.07448,
}


def family(name: str):
    if name == "dense":
        return dense_config(vocab_size=257)
    detector, _, decision = name.partition("-")
    return small_config(detector, vocab_size=257, **({"boundary": {"decision": decision}} if decision else {}))


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    lines = [" ".join(f"w{(i * j * j) % 23}" for j in range(1, 120)) for i in range(1, 90)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.many
@pytest.mark.parametrize("name", GOLDEN)
def test_the_loss_of_twenty_steps_is_the_recorded_one(name, text, tmp_path):
    config = RunConfig.model_validate(
        {
            "model": family(name).model_dump(),
            "data": {"corpus": str(text), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 2048},
            "optim": {"lr_token": 1e-2, "lr_concept": 1e-2, "warmup_tokens": 1024},
            "train": {"tokens": 20 * 512, "batch_tokens": 512},
        }
    )
    assert train(config, tmp_path / "run").loss_nats == pytest.approx(GOLDEN[name], abs=1e-4)
