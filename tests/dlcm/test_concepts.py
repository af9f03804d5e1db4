import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm.concepts import Packing, pool_first, pool_mean, segment, shift


def loop_segments(boundaries: list[bool], lengths: list[int]):
    """Segments by a plain loop: a list of (document, [token indices])."""
    out, t = [], 0
    for document, length in enumerate(lengths):
        for i in range(length):
            if boundaries[t]:
                assert i == 0 or out
                out.append((document, []))
            out[-1][1].append(t)
            t += 1
    return out


@st.composite
def packed(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    flags = []
    for length in lengths:
        flags += [True, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))] if length else []
    return lengths, flags


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(packed())
def test_segments_equal_those_of_a_plain_loop(case):
    lengths, flags = case
    packing = Packing.from_lengths(torch.tensor(lengths))
    segments = segment(torch.tensor(flags, dtype=torch.bool), packing)
    expected = loop_segments(flags, lengths)
    assert segments.lengths_K.tolist() == [len(run) for _, run in expected]
    assert segments.lengths_K.sum() == sum(lengths)
    assert segments.lengths_K.numel() == sum(flags)
    assert segments.concepts.sequence_T.tolist() == [document for document, _ in expected]
    assert segments.starts_K.tolist() == [run[0] for _, run in expected]
    by_token = {t: (k, i) for k, (_, run) in enumerate(expected) for i, t in enumerate(run)}
    assert [(k, i) for k, i in zip(segments.segment_T.tolist(), segments.offset_T.tolist())] == [
        by_token[t] for t in range(sum(lengths))
    ]
    firsts = {}
    for k, (document, _) in enumerate(expected):
        firsts.setdefault(document, k)
    assert segments.ordinal_T.tolist() == [
        by_token[t][0] - firsts[expected[by_token[t][0]][0]] for t in range(sum(lengths))
    ]


@settings(max_examples=60, deadline=None)
@given(packed(), st.integers(0, 4))
def test_pooling_and_shifting_equal_plain_loops(case, n):
    lengths, flags = case
    packing = Packing.from_lengths(torch.tensor(lengths))
    segments = segment(torch.tensor(flags, dtype=torch.bool), packing)
    x = torch.randn(sum(lengths), 3, dtype=torch.float64)
    expected = loop_segments(flags, lengths)
    mean = torch.stack([x[run].mean(0) for _, run in expected]) if expected else x[:0]
    torch.testing.assert_close(pool_mean(x, segments), mean, atol=1e-12, rtol=0)
    first = torch.stack([x[run[0]] for _, run in expected]) if expected else x[:0]
    assert torch.equal(pool_first(x, segments), first)
    moved, t = torch.zeros_like(x), 0
    for length in lengths:
        for i in range(length):
            if i >= n:
                moved[t] = x[t - n]
            t += 1
    assert torch.equal(shift(x, packing.position_T, n), moved)


def test_means_of_low_precision_states_are_accumulated_in_fp32():
    packing = Packing.from_lengths(torch.tensor([4096]))
    flags = torch.zeros(4096, dtype=torch.bool)
    flags[0] = True
    x = torch.full((4096, 1), 1.001, dtype=torch.bfloat16)
    assert pool_mean(x, segment(flags, packing)).item() == x[0].item()


def test_a_document_that_does_not_start_with_a_boundary_is_refused():
    with pytest.raises(ValueError, match="first token of every document"):
        segment(torch.tensor([True, False, False]), Packing.from_lengths(torch.tensor([2, 1])))


def test_buckets_hold_every_sequence_once_and_pad_less_than_twofold():
    lengths = torch.tensor([1, 0, 7, 8, 100, 65, 3, 64])
    packing = Packing.from_lengths(lengths)
    seen = []
    for bucket in packing.buckets:
        index, real = packing.index_NL(bucket)
        seen += index[real].tolist()
        assert real.sum() * 2 >= real.numel()
    assert sorted(seen) == list(range(int(lengths.sum())))
