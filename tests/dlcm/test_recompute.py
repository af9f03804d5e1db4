"""Activation checkpointing changes what is kept between forward and backward pass, and nothing else."""

import pytest
import torch
from torch._dynamo.utils import counters

from dlcm.config import RunConfig
from dlcm.model import build_model
from dlcm.recompute import recompute_blocks
from dlcm.train import train
from tests.dlcm.conftest import awake, dense_config, random_tokens, small_config
from tests.dlcm.test_train import VOCAB, cache, corpus_path, make_config  # noqa: F401

N_TOKENS = 120
CONFIGS = {
    "dlcm": small_config(),
    "straight-through": small_config(boundary={"straight_through": True}),
    "first": small_config(pooling="first", cross_attention="once"),
    "cosine": small_config("cosine"),
    "dense": dense_config(),
}


def gradients(model, bf16):
    """Gradients of losses and probabilities, with sampled decisions; and the bytes of what autograd kept for them."""
    tokens, cu = random_tokens(N_TOKENS, 0), torch.tensor([0, 30, 31, N_TOKENS])
    draws = torch.rand(N_TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = model(tokens, cu_seqlens=cu, draws=draws, targets=tokens)
        loss = out.loss_sum if model.config.is_dense else out.loss_sum + out.boundary_prob.square().sum()
    n_bytes = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, n_bytes


@pytest.mark.many
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("precision", ["float64", "fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same_to_the_bit(name, precision):
    config = CONFIGS[name]
    plain, frugal = (
        awake(config).train() if precision == "float64" else awake(config).float().train() for _ in range(2)
    )
    recompute_blocks(frugal.blocks())
    expected, all_bytes = gradients(plain, precision == "bf16")
    found, some_bytes = gradients(frugal, precision == "bf16")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert some_bytes < all_bytes


@pytest.mark.parametrize("bf16", [False, True])
def test_a_layer_more_keeps_its_input_alone(bf16):
    """The states between the layers: T x W in fp32 on the token side."""
    sizes = []
    for n_layers in (2, 3):
        model = build_model(dense_config(n_encoder_layers=n_layers)).train()
        recompute_blocks(model.blocks())
        sizes.append(gradients(model, bf16)[1])
    assert sizes[1] - sizes[0] == 4 * N_TOKENS * 16


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("name", [pytest.param("dlcm", marks=pytest.mark.slow), "dense"])
def test_compiled_stacks_recompute_as_well_without_breaks(name, by_block, fresh_compiler):
    plain, frugal, eager = (awake(CONFIGS[name]).train() for _ in range(3))
    recompute_blocks(frugal.blocks())
    for model in (plain, frugal):
        model.compile_stacks(by_block=by_block, backend="aot_eager")
    expected, _ = gradients(eager, bf16=False)
    found, some_bytes = gradients(frugal, bf16=False)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-10, rtol=1e-10, msg=key)
    assert not counters["graph_break"]
    _, all_bytes = gradients(plain, bf16=False)
    assert some_bytes < 0.8 * all_bytes


@pytest.mark.slow
def test_names_of_parameters_stay():
    model = build_model(small_config())
    names = list(model.state_dict())
    recompute_blocks(model.blocks())
    assert list(model.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dlcm", "dense"])
def test_a_run_with_it_is_the_run_without_it_to_the_bit(kind, corpus_path, tmp_path):  # noqa: F811
    model = small_config(vocab_size=VOCAB) if kind == "dlcm" else dense_config(vocab_size=VOCAB)
    blocks = make_config(corpus_path, model).model_dump()
    blocks["train"] |= {"tokens": 6 * blocks["train"]["batch_tokens"]}
    train(RunConfig.model_validate(blocks), tmp_path / "plain")
    blocks["train"] |= {"activation_checkpointing": True}
    train(RunConfig.model_validate(blocks), tmp_path / "frugal")
    weights = [
        torch.load(max((tmp_path / name / "checkpoints").glob("*.pt")), weights_only=True)["model"]
        for name in ("plain", "frugal")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
