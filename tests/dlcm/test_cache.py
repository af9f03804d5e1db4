"""Decoding with a cache equals the full forward pass."""

import pytest
import torch

from dlcm.model import build_model
from tests.dlcm.conftest import DETECTORS, VOCAB, awake, dense_config, random_tokens, small_config

CONFIGS = {
    **{detector: small_config(detector) for detector in DETECTORS},
    "first": small_config(pooling="first"),
    "first without bias": small_config(pooling="first", concept_bias="none"),
    "without bias": small_config(concept_bias="none"),
    "without smoother": small_config(smoothing="none"),
    "one cross-attention": small_config(cross_attention="once"),
    "dense": dense_config(),
}
N_ROWS, LENGTH = 5, 41


def batch(seed: int = 0) -> torch.Tensor:
    return torch.stack([random_tokens(LENGTH, 100 * seed + row) for row in range(N_ROWS)])


@torch.no_grad()
def decode(model, tokens_BT, chunk, boundaries_BT=None):
    cache, outputs = model.new_cache(tokens_BT.shape[0]), []
    for start in range(0, tokens_BT.shape[1], chunk):
        part = slice(start, start + chunk)
        flags = None if boundaries_BT is None else boundaries_BT[:, part]
        outputs.append(model(tokens_BT[:, part], cache=cache, boundaries=flags))
    return (
        torch.cat([out.logits for out in outputs], dim=1),
        torch.cat([out.boundaries for out in outputs], dim=1),
        torch.cat([out.boundary_prob for out in outputs], dim=1),
    )


@pytest.mark.many
@pytest.mark.parametrize("chunk", [1, 3, LENGTH])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_in_chunks_equals_the_full_forward_pass(name, chunk):
    """Rows have different boundaries. In float64 the two agree to rounding; in fp32 to the bound that decoding promises."""
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model, tokens = awake(CONFIGS[name]).to(dtype), batch()
        full = model(tokens)
        logits, boundaries, prob = decode(model, tokens, chunk)
        assert torch.equal(boundaries, full.boundaries)
        torch.testing.assert_close(logits, full.logits, atol=bound, rtol=0)
        torch.testing.assert_close(prob, full.boundary_prob, atol=bound, rtol=0)
        if name in ("learned", "first"):
            assert len({tuple(row.tolist()) for row in boundaries}) == N_ROWS


@pytest.mark.many
@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("kind", ["every token", "one segment", "random"])
def test_injected_boundaries_decode_as_in_the_full_pass(kind, pooling):
    model, tokens = awake(small_config(pooling=pooling)), batch()
    rate = {"every token": 1.0, "one segment": 0.0, "random": 0.3}[kind]
    flags = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < rate
    flags[:, 0] = True
    for chunk in (1, 4, 7):
        logits, boundaries, _ = decode(model, tokens, chunk, flags)
        assert torch.equal(boundaries, flags)
        torch.testing.assert_close(logits, model(tokens, boundaries=flags).logits, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_rows_may_advance_by_different_numbers_of_tokens(pooling):
    """Padding on the right is neither read nor remembered; a row may get nothing at all."""
    model, tokens = awake(small_config(pooling=pooling)), batch(1)
    cache, done = model.new_cache(N_ROWS), torch.zeros(N_ROWS, dtype=torch.int64)
    full = model(tokens).logits
    generator = torch.Generator().manual_seed(0)
    while (done < LENGTH).any():
        lengths = torch.minimum(torch.randint(0, 6, (N_ROWS,), generator=generator), LENGTH - done)
        chunk = torch.randint(0, VOCAB, (N_ROWS, 5), generator=generator)
        for row in range(N_ROWS):
            chunk[row, : lengths[row]] = tokens[row, done[row] : done[row] + lengths[row]]
        out = model(chunk, cache=cache, lengths=lengths)
        for row in range(N_ROWS):
            part = slice(int(done[row]), int(done[row] + lengths[row]))
            torch.testing.assert_close(out.logits[row, : lengths[row]], full[row, part], atol=1e-10, rtol=0)
            assert not out.logits[row, lengths[row] :].any()
        done += lengths
    assert torch.equal(cache.n_tokens_B, done)


@pytest.mark.parametrize(
    "config", [small_config(), small_config(pooling="first"), dense_config()], ids=["mean", "first", "dense"]
)
def test_selected_rows_go_on_as_if_they_had_been_alone(config):
    model, tokens = awake(config), batch(2)
    cache, rows = model.new_cache(N_ROWS), torch.tensor([3, 0, 3])
    model(tokens[:, :20], cache=cache)
    cache.select(rows)
    out = model(tokens[rows, 20:], cache=cache)
    torch.testing.assert_close(out.logits, model(tokens[rows]).logits[:, 20:], atol=1e-10, rtol=0)


def test_the_concept_stack_runs_only_when_a_segment_closes():
    model, calls = awake(small_config()), []
    model.concepts.w_up.register_forward_hook(lambda *_: calls.append(1))
    flags = torch.tensor([[True, False, False, True, False, True]])
    cache, ran = model.new_cache(1), []
    for t in range(6):
        calls.clear()
        model(batch()[:1, t : t + 1], cache=cache, boundaries=flags[:, t : t + 1])
        ran.append(bool(calls))
    assert ran == [False, False, False, True, False, True]


def test_a_cache_refuses_what_it_cannot_continue():
    model = build_model(small_config())
    cache = model.new_cache(2)
    for tokens, options in ((batch()[:3], {}), (batch()[0], {}), (batch()[:2], {"cu_seqlens": torch.tensor([0, 3])})):
        with pytest.raises(ValueError, match="with a cache"):
            model(tokens, cache=cache, **options)
