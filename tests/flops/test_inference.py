"""Prefill and decode: against the forward count, against a sum token by token, and against torch's counter on real decoding."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from dlcm.model import Model, build_model
from flops import count, decode, prefill
from flops.count import COMPONENTS, FlopCount

DLCM = ModelConfig(
    kind="dlcm", vocab_size=96, d_token=32, d_concept=48, n_encoder_layers=2, n_concept_layers=3, n_decoder_layers=2,
    d_head=16, n_heads_token=4, n_kv_heads_token=2, n_heads_concept=3, d_ff_token=80, d_ff_concept=128,
)  # fmt: skip
DENSE = ModelConfig(
    kind="dense", vocab_size=96, d_token=32, n_encoder_layers=3, d_head=16, n_heads_token=4, n_kv_heads_token=2, d_ff_token=80
)  # fmt: skip
FIRST = DLCM.model_copy(update={"pooling": "first"})
ONCE = DLCM.model_copy(update={"cross_attention": "once", "smoothing": "none", "tie_embeddings": True})
SEGMENTS = [3, 1, 5, 2, 4, 1, 1, 6, 3]  # 26 tokens


def sums(*counts: FlopCount) -> dict[str, float]:
    return {part: sum(flops.components[part] for flops in counts) for part in COMPONENTS}


@pytest.mark.parametrize("cross", ["exact", "replicated"])
@pytest.mark.parametrize("config", [DLCM, DENSE, FIRST, ONCE], ids=["dlcm", "dense", "first", "once"])
@pytest.mark.parametrize(("n", "m"), [(64, 1), (64, 64), (1, 7), (1000, 24)])
def test_a_prompt_and_the_tokens_behind_it_cost_the_forward_pass_of_both(config, cross, n, m):
    parts = prefill(config, n, 4.0, logits="all", cross=cross), decode(config, n, m, 4.0, cross=cross)
    assert sums(*parts) == dict(count(config, n + m, 4.0, cross=cross).components)


def test_without_context_decoding_costs_the_forward_pass():
    assert dict(decode(DLCM, 0, 96, 4.0).components) == dict(count(DLCM, 96, 4.0).components)


def test_decoding_costs_the_same_in_one_go_and_token_by_token():
    steps = [decode(DLCM, 100 + i, 1, 3.7) for i in range(20)]
    assert sums(*steps) == pytest.approx(sums(decode(DLCM, 100, 20, 3.7)), rel=1e-12)


@pytest.mark.parametrize("config", [DLCM, DENSE], ids=["dlcm", "dense"])
def test_reading_a_prompt_leaves_out_all_logits_but_the_last(config):
    left_out = prefill(config, 64, logits="all").forward - prefill(config, 64).forward
    assert left_out == 63 * 2 * config.d_token * config.vocab_size


def test_a_new_token_of_the_dense_model_costs_what_a_count_by_hand_says():
    # Three layers of width 32, 4 query heads and 2 key-value heads of 16, hidden width 80, V = 96; behind 100 tokens:
    # Q and O 2 x 2·32·64 = 8,192, K and V 2 x 2·32·32 = 4,096, SwiGLU 6·32·80 = 15,360: 27,648 a layer;
    # scores and values 4·64·(100 + 1/2) = 25,728 a layer; logits 2·32·96 = 6,144.
    assert decode(DENSE, 100).forward == 3 * (27_648 + 25_728) + 6_144
    square = decode(DENSE, 100).full_square
    assert square is not None
    assert square.forward == 3 * (27_648 + 4 * 64 * 101) + 6_144


def test_a_batch_of_prompts_costs_the_sum_of_its_prompts():
    lengths = [17, 40, 39]
    assert sums(*(prefill(DLCM, n) for n in lengths)) == pytest.approx(sums(prefill(DLCM, documents=lengths)))
    assert sums(*(decode(DLCM, n, 5) for n in lengths)) == pytest.approx(sums(decode(DLCM, n_new=5, documents=lengths)))
    assert decode(DLCM, n_new=5, documents=lengths).n_tokens == 15


def test_replication_reads_r_times_as_many_keys():
    exact, replicated = (decode(DLCM, 1000, 8, 4.0, cross=cross) for cross in ("exact", "replicated"))
    pairs = 1000 * 8 + 32
    assert replicated.forward - exact.forward == 2 * 4 * 64 * pairs * (1 - 1 / 4)
    assert {k for k in COMPONENTS if exact.components[k] != replicated.components[k]} == {"cross_attention"}


def test_the_backbone_costs_an_rth_of_its_concepts():
    """Without scores (no context to speak of, by difference) the share of a token is 1/R of what a concept costs."""
    costs = [decode(DLCM, 10**6, 1, ratio).components["pooling"] for ratio in (2.0, 4.0, 8.0)]
    assert costs == [2 * 32 * 48 / ratio for ratio in (2, 4, 8)]


@pytest.mark.parametrize("config", [DLCM, FIRST], ids=["mean", "first"])
def test_known_segments_add_up_wherever_they_are_cut(config):
    whole = prefill(config, 26, logits="all", segments=SEGMENTS)
    for n in range(1, 26):
        cut = list(cut_segments(SEGMENTS, n))
        parts = prefill(config, n, logits="all", segments=cut), decode(config, n, 26 - n, segments=SEGMENTS)
        assert sums(*parts) == sums(whole)


def test_known_segments_of_equal_length_approach_the_rate():
    """What differs is the open segment and half a concept of visibility: both vanish as 1/n."""
    for n, error in ((400, 0.02), (4000, 0.002), (40_000, 0.0002)):
        rate, known = prefill(DLCM, n, 4.0), prefill(DLCM, n, segments=[4] * (n // 4))
        assert known.forward == pytest.approx(rate.forward, rel=error)


def cut_segments(segments: list[int], n: int) -> Iterator[int]:
    for length in segments:
        if n > 0:
            yield min(length, n)
        n -= length


# Work of the decoder blocks by module, as in flops.measure, on the real model with its cache.
COMPONENT_OF = {
    "encoder": "encoder", "boundary": "boundary", "concepts.w_up": "pooling", "concepts.blocks": "backbone",
    "decoder": "decoder", "unembedding": "head",
}  # fmt: skip


def counted(model: Model, run: Callable[[], object]) -> dict[str, float]:
    """FLOPs that torch counts, by component; the MATH backend, because the fused ones count as zero on a CPU."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run()
    # The calls of blocks are counted in their modules; `encode`, `decode` and the cache are no modules.
    found = {path.removeprefix("Model."): sum(n.values()) for path, n in counter.get_flop_counts().items()}
    parts: dict[str, float] = dict.fromkeys(COMPONENTS, 0.0)
    for path, flops in found.items():
        if path.startswith("decoder.") and path.count(".") == 2 and path.endswith(".cross"):
            parts["cross_attention"] += flops
            parts["decoder"] -= flops
        head, _, last = path.rpartition(".")
        component = COMPONENT_OF.get(head if last.isdigit() else path)
        if component:
            parts[component] += flops
    assert sum(parts.values()) == counter.get_total_flops()
    return parts


def in_terms_of_torch(config: ModelConfig, flops: FlopCount, n_calls: int) -> dict[str, float]:
    """The twin that kernels compute, and two stated differences: the smoother is elementwise, the null concept's value is one more
    row of V in each call of each cross-attention."""
    assert flops.full_square is not None
    parts = dict(flops.full_square.components) | {"smoothing": 0.0}
    if not config.is_dense and config.pooling == "mean":
        null = 2 * config.d_concept * config.n_kv_heads_token * config.d_head
        parts["cross_attention"] += n_calls * config.n_cross_attentions * null
    return parts


@pytest.mark.many
@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("config", [DLCM, DENSE, FIRST, ONCE], ids=["dlcm", "dense", "first", "once"])
def test_torch_counts_the_same_on_real_decoding_with_caches(config, n):
    segments = [3, 1, 4, 2, 3]
    length = sum(segments)
    starts = {0, *itertools.accumulate(segments)}
    tokens = torch.arange(length)[None] % config.vocab_size
    boundaries = torch.tensor([[t in starts for t in range(length)]])
    model = build_model(config).eval()
    cache = model.new_cache(1)

    def step(begin: int, end: int) -> None:
        injected = None if config.is_dense else boundaries[:, begin:end]
        model(tokens[:, begin:end], cache=cache, boundaries=injected)

    read = counted(model, lambda: step(0, n))
    expected = prefill(config, n, logits="all", segments=list(cut_segments(segments, n)))
    # Injected boundaries bypass the detector, whose two products are checked in tests/flops/test_measure.py.
    assert read == in_terms_of_torch(config, expected, 1) | {"boundary": 0.0}
    new = counted(model, lambda: [step(t, t + 1) for t in range(n, length)])
    expected = decode(config, n, length - n, segments=segments)
    assert new == in_terms_of_torch(config, expected, length - n) | {"boundary": 0.0}


def test_torch_counts_the_same_where_a_detector_decides():
    boundary = DLCM.boundary
    assert boundary is not None
    config = DLCM.model_copy(
        update={"boundary": boundary.model_copy(update={"detector": "fixed", "compression_ratio": 4.0})}
    )
    model, n, m = build_model(config).eval(), 6, 5
    cache, tokens = model.new_cache(1), torch.arange(n + m)[None]
    read = counted(model, lambda: model(tokens[:, :n], cache=cache))
    assert read == in_terms_of_torch(config, prefill(config, n, logits="all", segments=[4, 2]), 1)
    new = counted(model, lambda: [model(tokens[:, t : t + 1], cache=cache) for t in range(n, n + m)])
    assert new == in_terms_of_torch(config, decode(config, n, m, segments=[4, 4, 3]), m)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: prefill(DLCM, 0), "at least one token"),
        (lambda: prefill(DLCM, documents=[]), "at least one token"),
        (lambda: prefill(DLCM, 8, 0.5), "below 1"),
        (lambda: prefill(DLCM, 8, segments=[4, 3]), "7 tokens in all for 8"),
        (lambda: prefill(DLCM, documents=[4, 4], segments=[4]), "not both"),
        (lambda: decode(DLCM, 8, 0), "at least one new token"),
        (lambda: decode(DLCM, -1), "negative"),
        (lambda: decode(DLCM, 8, 2, segments=[8]), "8 tokens in all for 10"),
    ],
)
def test_what_cannot_be_decoded_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()
