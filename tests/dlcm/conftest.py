import pytest
import torch

from dlcm.config import BoundaryConfig, ModelConfig
from dlcm.model import Model, build_model

# Models this small spend more time handing work to threads than doing it.
torch.set_num_threads(1)

DETECTORS = ("learned", "cosine", "fixed", "random", "delimiter_word", "delimiter_sentence")
VOCAB = 61


def small_config(detector: str = "learned", **overrides) -> ModelConfig:
    boundary = {"detector": detector, "compression_ratio": 3.0, "d_scan": 8, **overrides.pop("boundary", {})}
    fields = {
        "vocab_size": VOCAB,
        "d_token": 16,
        "d_concept": 24,
        "n_encoder_layers": 2,
        "n_concept_layers": 2,
        "n_decoder_layers": 2,
        "d_head": 8,
        "n_heads_token": 2,
        "n_kv_heads_token": 1,
        "n_heads_concept": 4,
        "n_kv_heads_concept": 2,
        "d_ff_token": 24,
        "d_ff_concept": 40,
        "boundary": BoundaryConfig(**boundary),
    }
    return ModelConfig(**{**fields, **overrides})


def dense_config(**overrides) -> ModelConfig:
    fields = {
        "kind": "dense",
        "vocab_size": VOCAB,
        "d_token": 16,
        "n_encoder_layers": 2,
        "d_head": 8,
        "n_heads_token": 2,
        "n_kv_heads_token": 1,
        "d_ff_token": 24,
    }
    return ModelConfig(**{**fields, **overrides})


def awake(config: ModelConfig, seed: int = 0) -> Model:
    """A model in float64 in which nothing is at its initial identity: every path carries signal."""
    model = build_model(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
        if hasattr(model, "boundary"):
            detector = model.boundary
            detector.offset_threshold.fill_(0.1)
            detector.offset_sample.fill_(-0.1)
            if hasattr(detector, "delimiters_V4"):
                detector.delimiters_V4.copy_(torch.rand(config.vocab_size, 4, generator=generator) < 0.3)
    return model


def random_tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokens():
    return random_tokens


class Killed(Exception):
    """What ends a training from outside."""


def kill_at(step: int):
    """An `on_step` that ends the training after a step."""

    def on_step(progress):
        if progress.step == step:
            raise Killed

    return on_step
