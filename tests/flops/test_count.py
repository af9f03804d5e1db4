"""The closed form of FLOPs and parameters: term by term, against the paper's model, and its relations."""

from typing import Any

import numpy as np
import pytest

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import count, count_many, ops, parameters
from flops.count import COMPONENTS

PAPER: dict[str, Any] = {
    "vocab_size": 128_815, "d_token": 1536, "d_head": 64, "n_heads_token": 24, "n_kv_heads_token": 12, "d_ff_token": 4096,
}  # fmt: skip
PAPER_DENSE = ModelConfig(kind="dense", n_encoder_layers=32, **PAPER)
PAPER_DLCM = ModelConfig(
    kind="dlcm", n_encoder_layers=10, n_concept_layers=16, n_decoder_layers=6, d_concept=3072, n_heads_concept=48,
    n_kv_heads_concept=24, d_ff_concept=6144, **PAPER,
)  # fmt: skip
SMALL = ModelConfig(
    kind="dlcm", vocab_size=100, d_token=32, d_concept=48, n_encoder_layers=2, n_concept_layers=3, n_decoder_layers=2,
    d_head=16, n_heads_token=2, n_kv_heads_token=1, n_heads_concept=3, d_ff_token=80, d_ff_concept=128,
)  # fmt: skip


def test_paper_model_has_the_published_parameters():
    params = parameters(PAPER_DLCM)
    assert 2.23e9 <= params.total <= 2.26e9
    # P with embeddings: the reference figure is 0.60; ours is 0.609, at the lower end of the range of totals above.
    assert params.concept / params.total == pytest.approx(0.609, abs=0.0005)
    assert 1.2e9 <= parameters(PAPER_DENSE).total <= 1.35e9


def test_paper_model_costs_less_than_its_dense_baseline():
    dlcm, dense = count(PAPER_DLCM, seq_len=2048, tokens_per_concept=4.0), count(PAPER_DENSE, seq_len=2048)
    assert 0.92 <= dlcm.forward_per_token / dense.forward_per_token <= 0.94
    # The reference says 33-34% and gives no sequence length. At 2,048 it is 32.9%; without attention scores 34.3%, and then
    # the ratio is 0.962: the two reference figures hold together only for lengths from about 1,420 to 1,920.
    assert dlcm.share("backbone") == pytest.approx(0.3293, abs=0.0005)


def test_components_follow_the_table_term_by_term():
    c, L, R = SMALL, 96, 4.0
    M, d, D, V, a, h, g, f = L / R, 32, 48, 100, 16, 2, 1, 80
    layer = 2 * L * d * a * (2 * h + 2 * g) + 4 * h * a * L**2 / 2 + 6 * L * d * f
    backbone = 2 * M * D * a * (2 * 3 + 2 * 3) + 4 * 3 * a * M**2 / 2 + 6 * M * D * 128
    expected = {
        "embedding": 0,
        "encoder": 2 * layer,
        "boundary": 4 * L * d * 64,
        "pooling": 2 * M * d * D,
        "backbone": 3 * backbone,
        "smoothing": 2 * 4 * M * D,
        "cross_attention": 2 * (4 * L * d * h * a + 4 * M * D * g * a + 4 * h * a * L * M / 2),
        "decoder": 2 * layer,
        "head": 2 * L * d * V,
    }
    assert dict(count(c, L, R).components) == pytest.approx(expected)
    assert tuple(expected) == COMPONENTS


def test_training_costs_three_forward_passes():
    flops = count(SMALL, 128, 3.0)
    assert flops.training == 3 * flops.forward
    assert flops.training_per_token * 128 == pytest.approx(flops.training)


def test_full_square_adds_only_attention_scores():
    flops = count(SMALL, 96, 4.0)
    assert flops.full_square is not None
    added = flops.full_square.forward - flops.forward
    M = 24
    assert added == pytest.approx(4 * 4 * 32 * 96**2 / 2 + 3 * 4 * 48 * M**2 / 2 + 2 * 4 * 32 * 96 * M / 2)


def test_replicated_cross_attention_costs_r_times_the_scores():
    exact, replicated = count(SMALL, 96, 4.0), count(SMALL, 96, 4.0, cross="replicated")
    scores = 2 * 4 * 32 * 96 * 24 / 2
    assert replicated.forward - exact.forward == pytest.approx(scores * (4 - 1))


def test_packing_equals_the_sum_of_its_documents():
    lengths, concepts = [17, 40, 39], [5, 9, 12]
    packed = count(SMALL, documents=lengths, concepts=concepts)
    alone = [count(SMALL, documents=[n], concepts=[m]).forward for n, m in zip(lengths, concepts)]
    assert packed.forward == pytest.approx(sum(alone))
    assert packed.tokens_per_concept == pytest.approx(96 / 26)
    assert packed.forward < count(SMALL, 96, 96 / 26).forward


@pytest.mark.parametrize("config", [SMALL, PAPER_DLCM], ids=["small", "2.3B"])
@pytest.mark.parametrize("cross", ["exact", "replicated"])
def test_cost_falls_strictly_with_compression(config, cross):
    costs = [count(config, 256, 1 + 0.25 * i, cross=cross).forward_per_token for i in range(125)]
    assert all(cheaper < dearer for dearer, cheaper in zip(costs, costs[1:]))


def test_without_compression_the_cost_is_that_of_a_count_by_hand():
    # L = 10 tokens and as many concepts; d 32, D 48, V 100, heads of 16: two of tokens, three of concepts, one key-value head of
    # tokens, three of concepts; SwiGLU 80 and 128; boundary score 64.
    #
    # A layer of tokens: Q and O 2*10*32*32 = 20,480 each, K and V 2*10*32*16 = 10,240 each; scores and values: 50 pairs (half of
    # 10*10), 2*16 a pair and head, twice, two heads: 6,400; SwiGLU 3 * 2*10*32*80 = 153,600. Sum 221,440. Four of them: 885,760.
    # Boundary: 2 * 2*10*32*64 = 81,920. W_up: 2*10*32*48 = 30,720.
    # A layer of the backbone: Q, K, V, O 4 * 2*10*48*48 = 184,320; scores: 50 pairs, 2*16, twice, three heads: 9,600; SwiGLU
    # 3 * 2*10*48*128 = 368,640. Sum 562,560. Three of them: 1,687,680.
    # Smoother: 4 taps, a multiply-add each, 10*48: 3,840.
    # A cross-attention: Q and O 20,480 each, K and V from width 48 to 16: 2*10*48*16 = 15,360 each; scores: 10*10/2 = 50 pairs,
    # 6,400. Sum 78,080. Two of them: 156,160.
    # Logits: 2*10*32*100 = 64,000.
    by_hand = 885_760 + 81_920 + 30_720 + 1_687_680 + 3_840 + 156_160 + 64_000
    assert by_hand == 2_910_080
    assert count(SMALL, 10, 1.0).forward == by_hand


def test_the_dense_model_has_no_compression():
    assert count(PAPER_DENSE, 256, 4.0).forward == count(PAPER_DENSE, 256).forward


@pytest.mark.parametrize("detector", ["cosine", "fixed", "random", "delimiter_word"])
def test_only_the_learned_detector_has_parameters_and_cost(detector):
    assert SMALL.boundary is not None
    config = SMALL.model_copy(update={"boundary": SMALL.boundary.model_copy(update={"detector": detector})})
    assert parameters(SMALL).total - parameters(config).total == 2 * 32 * 64
    assert count(SMALL, 64).forward - count(config, 64).forward == 4 * 64 * 32 * 64


def test_groups_and_components_sum_to_the_total():
    for config in (SMALL, PAPER_DLCM, PAPER_DENSE, SMALL.model_copy(update={"tie_embeddings": True})):
        params = parameters(config)
        assert sum(params.components.values()) == params.total == params.embedding + params.token + params.concept
    assert parameters(PAPER_DENSE).concept_share == 0


def test_operations_take_arrays():
    widths = np.array([64.0, 128.0])
    assert ops.layer(100, 5000.0, widths, widths / 16, widths / 16, 16, 2.5 * widths).shape == (2,)
    assert ops.layer_parameters(widths, widths / 16, widths / 16, 16, 2.5 * widths)[0] == ops.layer_parameters(
        64, 4, 4, 16, 160
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seq_len": 0}, "at least one token"),
        ({"seq_len": 64, "tokens_per_concept": 0.5}, "below 1"),
        ({"documents": [8, 8], "concepts": [2]}, "one for each"),
    ],
)
def test_impossible_sequences_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        count(SMALL, **arguments)


def many_configs() -> list[ModelConfig]:
    """Shapes of all kinds: dense and not, tied, other detectors, one cross-attention, no smoother, odd R."""
    boundary = SMALL.boundary
    assert boundary is not None
    changes = [
        {}, {"tie_embeddings": True}, {"smoothing": "none"}, {"cross_attention": "once"}, {"pooling": "first"},
        {"boundary": boundary.model_copy(update={"detector": "fixed"})},
        {"boundary": boundary.model_copy(update={"compression_ratio": 3.3})}, {"n_kv_heads_token": 2},
        {"d_concept": 64, "n_heads_concept": 4, "n_kv_heads_concept": 2, "d_ff_concept": 200},
    ]  # fmt: skip
    return [PAPER_DENSE, PAPER_DLCM, *(SMALL.model_copy(update=change) for change in changes)]


@pytest.mark.parametrize("cross", ["exact", "replicated"])
@pytest.mark.parametrize(("seq_len", "ratio"), [(2048, None), (97, 3.7), (131_072, 8)])
def test_many_configs_at_once_cost_what_each_costs_alone_to_the_last_bit(cross, seq_len, ratio):
    configs = many_configs()
    many = count_many(configs, seq_len, ratio, cross=cross)
    for i, config in enumerate(configs):
        one = count(config, seq_len, ratio, cross=cross)
        assert many[i] == one
        assert many.forward[i] == one.forward
        assert many.training_per_token[i] == one.training_per_token
        assert many.forward_per_token[i] == one.forward_per_token
        assert many.share("backbone")[i] == one.share("backbone")


def test_many_configs_take_a_length_and_a_ratio_each():
    configs, lengths, ratios = many_configs()[:3], [64, 128, 999], [2.0, 3.0, 4.4]
    many = count_many(configs, lengths, ratios)
    assert [many[i] for i in range(3)] == [count(*each) for each in zip(configs, lengths, ratios)]


def test_no_configs_at_all_are_an_empty_count():
    assert len(count_many([])) == len(count_many([]).forward) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seq_len": [64, 0]}, "at least one token"),
        ({"tokens_per_concept": [4.0, 0.5]}, "below 1"),
        ({"seq_len": [64]}, "one for each"),
    ],
)
def test_impossible_sequences_among_many_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        count_many([SMALL, SMALL], **arguments)
