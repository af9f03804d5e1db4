"""Compiled stacks compute what the eager model computes, in one graph each, compiled once."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from dlcm.concepts import concept_bound
from dlcm.errors import UserError
from dlcm.model import Model
from tests.dlcm.conftest import awake, dense_config, small_config

N_TOKENS = 160
# Each batch packs another number of documents, empty ones too, and has another number of concepts.
LENGTHS = [[160], [100, 60], [50, 1, 9, 100], [30, 0, 130], [1, 2, 3, 4, 150], [20] * 8, [80, 80]]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches():
    for i, lengths in enumerate(LENGTHS):
        g = torch.Generator().manual_seed(i)
        cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        flags = torch.rand(N_TOKENS, generator=g) < 0.1 + 0.05 * i
        flags[cu[:-1][cu.diff() > 0]] = True
        tokens, targets = torch.randint(0, 61, (2, N_TOKENS), generator=g)
        yield tokens, targets, cu, flags


def step(model: Model, batch, **inputs):
    tokens, targets, cu, _ = batch
    model.zero_grad()
    out = model(tokens, cu_seqlens=cu, **inputs)
    loss = F.cross_entropy(out.logits, targets)
    if out.detection is not None:
        loss = loss + out.boundary_prob.square().mean()
    loss.backward()
    return out.logits.detach().clone(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


ONE_LAYER = {"n_encoder_layers": 1, "n_concept_layers": 1, "n_decoder_layers": 1}
CONFIGS = {
    "mean": small_config(**ONE_LAYER),
    "first": small_config(**ONE_LAYER, pooling="first", smoothing="none"),
    # An untrained detector may put a boundary at most tokens: at this ratio the bound has room for all.
    "straight_through": small_config(**ONE_LAYER, boundary={"straight_through": True, "compression_ratio": 1.5}),
    "once": small_config(cross_attention="once", concept_bias="none"),
    "dense": dense_config(),
}
SLOW = ("mean", "first", "straight_through", "once")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CONFIGS])
def test_a_compiled_model_equals_the_eager_one_and_is_compiled_once_whatever_the_batch(name):
    config = CONFIGS[name]
    eager, compiled = awake(config).train(), awake(config).train()
    compiled.compile_stacks(backend="aot_eager")
    n_concepts = set()
    for i, batch in enumerate(batches()):
        # Detected boundaries where there is a draw to take, injected ones elsewhere: both reach the same graphs.
        draws = torch.rand(N_TOKENS, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        inputs = {"draws": draws} if name == "straight_through" else {}
        if name not in ("dense", "straight_through"):
            inputs = {"boundaries": batch[3]}
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            logits, gradients = step(compiled, batch, **inputs)
        expected, expected_gradients = step(eager, batch, **inputs)
        torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[key], atol=1e-10, rtol=1e-10, msg=key)
        n_concepts.add(int(batch[3].sum()))
    assert len(n_concepts) == len(LENGTHS)
    assert counters["stats"]["unique_graphs"] == (1 if config.is_dense else 3)
    assert not counters["graph_break"]


def test_evaluation_of_a_compiled_model_runs_uncompiled():
    model = awake(small_config()).eval()
    tokens, _, cu, _ = next(batches())
    expected = model(tokens, cu_seqlens=cu).logits
    model.compile_stacks(backend="aot_eager")
    assert torch.equal(model(tokens, cu_seqlens=cu).logits, expected)
    assert counters["stats"]["unique_graphs"] == 0


def test_padding_of_concepts_changes_nothing():
    model = awake(small_config(smoothing="causal")).train()
    for batch in list(batches())[:3]:
        plain = step(model, batch, boundaries=batch[3])
        model._padding = lambda packing: lambda n: concept_bound(packing.n_total, 3.0, n)
        padded = step(model, batch, boundaries=batch[3])
        del model._padding
        torch.testing.assert_close(padded[0], plain[0], atol=1e-12, rtol=1e-12)
        for key, gradient in plain[1].items():
            torch.testing.assert_close(padded[1][key], gradient, atol=1e-12, rtol=1e-12, msg=key)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "replicated", "flex"])
def test_compiling_a_backend_that_cannot_be_compiled_is_refused_with_a_way_out(backend):
    with pytest.raises(UserError, match=f"{backend}; set attention_backend: auto or staircase"):
        Model(small_config(attention_backend=backend)).compile_stacks()


@pytest.mark.slow
def test_a_step_through_the_default_compiler_equals_the_eager_one():
    config = small_config(**ONE_LAYER)
    eager, compiled = awake(config).float().train(), awake(config).float().train()
    compiled.compile_stacks()
    for i, batch in enumerate(list(batches())[:3]):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            logits, gradients = step(compiled, batch, boundaries=batch[3])
        expected, expected_gradients = step(eager, batch, boundaries=batch[3])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[key], atol=1e-4, rtol=1e-3, msg=key)
