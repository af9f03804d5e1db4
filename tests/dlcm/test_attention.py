import math

import pytest
import torch

from dlcm import attention
from dlcm.attention import self_attention
from dlcm.concepts import Packing, segment

PACKINGS = [[7], [5, 5, 5], [1, 9, 0, 4, 16, 3]]


def make_case(lengths, seed=0, n_heads=4, n_kv=2, d_head=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    packing = Packing.from_lengths(torch.tensor(lengths))
    flags = (torch.rand(n, generator=g) < 0.4) | packing.is_first_T
    segments = segment(flags, packing)

    def draw(rows, heads):
        return torch.randn(rows, heads, d_head, generator=g, dtype=dtype).requires_grad_()

    k = segments.lengths_K.numel()
    return packing, segments, draw(n, n_heads), draw(n, n_kv), draw(n, n_kv), draw(k + 1, n_kv), draw(k + 1, n_kv)


def cross_attention(q, k, v, segments, *, own_segment, **options):
    """With the null concept as row 0 of keys and values, as the loops have it."""
    null = None if own_segment else v[0]
    return attention.cross_attention(q, k[1:], v[1:], null, segments, own_segment=own_segment, **options)


def loop_self(q, k, v, lengths):
    out, start, group = torch.zeros_like(q), 0, q.shape[1] // k.shape[1]
    for length in lengths:
        for t in range(start, start + length):
            for h in range(q.shape[1]):
                scores = k[start : t + 1, h // group] @ q[t, h] / math.sqrt(q.shape[2])
                out[t, h] = scores.softmax(0) @ v[start : t + 1, h // group]
        start += length
    return out


def loop_cross(q, k, v, segments, own_segment, log_length):
    """Attention over *replicated* concepts: every visible earlier token puts down one copy of its concept (eq 17)."""
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    starts = segments.tokens.cu_seqlens_S1
    for t in range(q.shape[0]):
        first = int(starts[segments.tokens.sequence_T[t]])
        mine = int(segments.segment_T[t])
        copies = [
            int(segments.segment_T[s]) + 1
            for s in range(first, t + 1)
            if own_segment or int(segments.segment_T[s]) < mine
        ]
        rows = copies if log_length else sorted(set(copies))
        rows = rows or [0]
        for h in range(q.shape[1]):
            scores = k[rows, h // group] @ q[t, h] / math.sqrt(q.shape[2])
            out[t, h] = scores.softmax(0) @ v[rows, h // group]
    return out


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("lengths", PACKINGS)
def test_self_attention_equals_a_loop_over_positions(backend, lengths):
    packing, _, q, k, v, _, _ = make_case(lengths)
    torch.testing.assert_close(
        self_attention(q, k, v, packing, backend), loop_self(q, k, v, lengths), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("own_segment", [False, True])
@pytest.mark.parametrize("log_length", [False, True])
@pytest.mark.parametrize("lengths", PACKINGS)
def test_cross_attention_equals_a_loop_over_replicated_concepts(backend, own_segment, log_length, lengths):
    _, segments, q, _, _, k, v = make_case(lengths, seed=1)
    out = cross_attention(q, k, v, segments, own_segment=own_segment, log_length=log_length, backend=backend)
    torch.testing.assert_close(out, loop_cross(q, k, v, segments, own_segment, log_length), atol=1e-12, rtol=0)


@pytest.mark.parametrize("own_segment", [False, True])
@pytest.mark.parametrize("log_length", [False, True])
def test_backends_agree_in_output_and_in_every_gradient(own_segment, log_length):
    packing, segments, q, k, v, kc, vc = make_case(PACKINGS[2], seed=2)
    leaves, results = (q, k, v, kc, vc), {}
    for backend in ("reference", "sdpa"):
        out = self_attention(q, k, v, packing, backend).square().sum()
        cross = cross_attention(q, kc, vc, segments, own_segment=own_segment, log_length=log_length, backend=backend)
        results[backend] = (
            out + cross.square().sum(),
            *torch.autograd.grad(out + cross.square().sum(), leaves, materialize_grads=True),
        )
    for a, b in zip(results["reference"], results["sdpa"]):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("log_length", [False, True])
def test_sdpa_in_bf16_is_within_twice_the_error_of_eager_bf16(log_length):
    lengths = [40, 24, 64]
    packing, segments, q, k, v, kc, vc = make_case(lengths, seed=3)
    options = {"own_segment": False, "log_length": log_length}
    exact = cross_attention(q, kc, vc, segments, backend="reference", **options)
    low = [x.bfloat16() for x in (q, kc, vc)]
    errors = {
        b: (cross_attention(*low, segments, backend=b, **options).double() - exact).norm()
        for b in ("reference", "sdpa")
    }
    assert errors["sdpa"] <= 2 * errors["reference"]
    exact = self_attention(q, k, v, packing, "reference")
    low = [x.bfloat16() for x in (q, k, v)]
    errors = {b: (self_attention(*low, packing, b).double() - exact).norm() for b in ("reference", "sdpa")}
    assert errors["sdpa"] <= 2 * errors["reference"]


def test_without_the_bias_replication_and_concepts_differ():
    _, segments, q, _, _, k, v = make_case([30], seed=4)
    biased, plain = (
        cross_attention(q, k, v, segments, own_segment=False, log_length=flag, backend="sdpa") for flag in (True, False)
    )
    assert (biased - plain).abs().max() > 0.1
