"""The blocked gradients of causal attention against autograd through a dense mask, in float64."""

import math

import pytest
import torch

from dlcm.backends import causal_blocks, causal_cpu
from dlcm.backends.causal_blocks import causal_backward
from dlcm.concepts import Packing


def dense(q, k, v, scale):
    """Outputs and log-sum-exps; key-value heads are repeated for the query heads that read them."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def inputs(n, heads, groups, length, width, factor=1.0):
    generator = torch.Generator().manual_seed(length)
    shapes = [(n, heads, length, width)] + [(n, groups, length, width)] * 2
    q, k, v = (torch.randn(s, dtype=torch.float64, generator=generator) * factor for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def assert_gradients_match(q, k, v, scale=0.3):
    out, lse = dense(q, k, v, scale)
    d_out = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view_as(out)
    expected = torch.autograd.grad((out * d_out).sum(), (q, k, v))
    with torch.no_grad():
        found = causal_backward(d_out, q, k, v, out, lse, scale)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2), (4, 1)])
def test_gradients_are_those_of_a_dense_mask(length, heads, groups):
    assert_gradients_match(*inputs(2, heads, groups, length, 8))


@pytest.mark.parametrize("scores", [1, 1 << 12])
def test_blocks_chunks_and_parts_of_the_heads_do_not_matter(scores, monkeypatch):
    monkeypatch.setattr(causal_blocks, "_BLOCK", 8)
    monkeypatch.setattr(causal_blocks, "_QUERIES", 16)
    monkeypatch.setattr(causal_blocks, "_SCORES", scores)
    assert_gradients_match(*inputs(2, 4, 2, 50, 8))


def test_scores_far_apart_stay_finite():
    # Keys behind a query may score so much more than those before it that their exponentials would be infinite.
    assert_gradients_match(*inputs(1, 2, 2, 70, 8, factor=30.0))


def test_a_row_whose_log_sum_exp_is_infinity_weighs_nothing():
    q, k, v = (x.detach() for x in inputs(1, 2, 2, 70, 8))
    out, lse = dense(q, k, v, 1.0)
    d_out = torch.ones_like(out)
    d_out[:, :, 40:], lse[:, :, 40:] = 0.0, math.inf
    found = causal_backward(d_out, q, k, v, out, lse, 1.0)
    part = causal_backward(d_out[:, :, :40], *(x[:, :, :40] for x in (q, k, v, out, lse)), 1.0)
    for a, b in zip(found, part):
        torch.testing.assert_close(a[:, :, :40], b, rtol=1e-12, atol=1e-12)
        assert not a[:, :, 40:].any()


def test_packed_sequences_have_the_same_gradients_by_blocks_and_by_the_kernel(monkeypatch):
    """Which of the two is taken depends on the processor: here both, for sequences of unlike length."""
    generator = torch.Generator().manual_seed(0)
    packing = Packing(torch.tensor([0, 70, 370, 371, 640]))
    q, d_out = (torch.randn(640, 4, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    k, v = (torch.randn(640, 2, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    out, lse = causal_cpu.forward(q, k, v, packing)
    calls, found = [], {}

    def counted(*args):
        calls.append(args)
        return causal_backward(*args)

    monkeypatch.setattr(causal_cpu, "causal_backward", counted)
    for way, lengths in (("kernel", range(0)), ("blocks", range(1, 2049))):
        monkeypatch.setattr(causal_cpu, "_BLOCKS", lengths)
        found[way] = causal_cpu.backward(d_out, q, k, v, out, lse, packing)
        assert bool(calls) == (way == "blocks")
    for a, b in zip(*found.values()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
