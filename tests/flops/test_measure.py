"""The closed form equals torch's and fvcore's counters on the built model: component by component, forward and training."""

import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlcm.config import BoundaryConfig, ModelConfig
from dlcm.errors import UserError
from dlcm.model import Model, build_model
from flops import count, measure, parameters
from flops.free import FREE, FVCORE_FREE
from tests.flops.test_count import PAPER_DENSE, PAPER_DLCM

BASE = measure.EXAMPLES["dlcm"]


def tiny(**changes) -> ModelConfig:
    boundary = {"d_scan": 8, "compression_ratio": 3.0, **changes.pop("boundary", {})}
    fields = {
        "vocab_size": 61, "d_token": 16, "d_concept": 24, "d_head": 8, "n_encoder_layers": 1, "n_concept_layers": 1,
        "n_decoder_layers": 1, "n_heads_token": 2, "n_kv_heads_token": 1, "n_heads_concept": 4, "n_kv_heads_concept": 2,
        "d_ff_token": 24, "d_ff_concept": 40, "boundary": BoundaryConfig(**boundary),
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def tiny_dense(**changes) -> ModelConfig:
    fields = {
        "kind": "dense", "vocab_size": 61, "d_token": 16, "n_encoder_layers": 2, "d_head": 8, "n_heads_token": 2,
        "n_kv_heads_token": 1, "d_ff_token": 24,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


SHAPES = {
    "dense": (tiny_dense(), {}),
    "dense tied": (tiny_dense(tie_embeddings=True), {}),
    "dense, a key-value head each": (tiny_dense(n_kv_heads_token=2), {}),
    "dense, deep": (tiny_dense(n_encoder_layers=5), {}),
    "dense, heads narrower than the width": (tiny_dense(d_token=40), {}),
    "dense, heads wider than the width": (tiny_dense(n_heads_token=6, n_kv_heads_token=3), {}),
    "dense, 2 tokens": (tiny_dense(), {"seq_len": 2}),
    "dense, 128 tokens": (tiny_dense(), {"seq_len": 128}),
    "dense, packed": (tiny_dense(), {"documents": [5, 0, 17, 1]}),
    "dlcm": (tiny(), {}),
    "tied": (tiny(tie_embeddings=True), {}),
    "a key-value head each": (tiny(n_kv_heads_token=2, n_kv_heads_concept=4), {}),
    "one key-value head": (tiny(n_heads_token=4, n_kv_heads_concept=1), {}),
    "concepts narrower than tokens": (tiny(d_token=48, d_concept=16, n_heads_concept=2), {}),
    "wide feed-forward": (tiny(d_ff_token=104, d_ff_concept=8), {}),
    "deep": (tiny(n_encoder_layers=2, n_concept_layers=3, n_decoder_layers=4), {}),
    "one cross-attention of three": (tiny(n_decoder_layers=3, cross_attention="once"), {}),
    "no log-length bias": (tiny(concept_bias="none"), {}),
    "first token as concept": (tiny(pooling="first"), {}),
    "first token, no bias": (tiny(pooling="first", concept_bias="none"), {}),
    "no smoother": (tiny(smoothing="none"), {}),
    "muP multiplier": (tiny(d_token_base=8), {}),
    "wide scan": (tiny(boundary={"d_scan": 32}), {}),
    "cosine": (tiny(boundary={"detector": "cosine"}), {}),
    "fixed": (tiny(boundary={"detector": "fixed"}), {}),
    "random": (tiny(boundary={"detector": "random"}), {}),
    "words": (tiny(boundary={"detector": "delimiter_word"}), {}),
    "R = 1": (tiny(), {"tokens_per_concept": 1.0}),
    "R = 2.5": (tiny(), {"tokens_per_concept": 2.5}),
    "R = 8": (tiny(), {"tokens_per_concept": 8.0, "seq_len": 64}),
    "5 tokens": (tiny(), {"seq_len": 5}),
    "96 tokens": (tiny(), {"seq_len": 96}),
    "packed": (tiny(), {"documents": [5, 0, 17, 1]}),
    "packed, R = 2": (tiny(), {"documents": [12, 12, 7], "tokens_per_concept": 2.0}),
}  # fmt: skip


def test_at_least_thirty_shapes_are_checked():
    assert len(SHAPES) >= 30
    assert sum(config.is_dense for config, _ in SHAPES.values()) >= 5


@pytest.mark.many
@pytest.mark.parametrize("name", SHAPES)
def test_closed_form_equals_both_counters_forward_and_training(name):
    config, options = SHAPES[name]
    found = measure.check(config, **{"seq_len": 29, **options})
    assert found.failures == ()
    assert all(row.difference == 0 for row in (*found.rows, found.training))
    assert all(row.fvcore is not None for row in found.rows)
    assert found.training.torch == 3 * sum(row.torch for row in found.rows) > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", [PAPER_DENSE, PAPER_DLCM], ids=["1.3B", "2.3B"])
def test_models_of_billions_are_checked_without_their_memory(config):
    found = measure.check(config, 2048)
    assert found.failures == ()
    assert found.parameters.built > 1.2e9


@pytest.mark.slow
def test_each_difference_is_listed_with_its_amount_and_what_a_model_lacks_is_not():
    reasons = {d.reason.split(":")[0].split(",")[0] for d in measure.check(tiny(), 12).differences}
    assert reasons == {"attention as full squares", "V of the null concept", "the smoother is elementwise arithmetic"}
    plain = measure.check(tiny(pooling="first", smoothing="none"), 12).differences
    assert {d.reason.split(":")[0] for d in plain} == {"attention as full squares"}
    dense = measure.check(tiny_dense(), 12).differences
    assert [(d.component, d.flops) for d in dense] == [("encoder", 2 * 4 * 16 * 12**2 / 2)]


class Adds(nn.Module):
    """A model whose feed-forward branch does one thing more."""

    def __init__(self, ff: nn.Module, function) -> None:
        super().__init__()
        self.ff, self.function = ff, function

    def forward(self, x):
        return self.ff(x) + self.function(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.cdist(x, x)[:, :1], "aten._cdist_forward"),  # products inside an operation without a count
        (lambda x: torch.fft.rfft(x).real.sum(), "aten._fft_r2c"),
        (lambda x: x.erf(), "aten.erf"),  # elementwise, but nobody has said so
    ],
)
def test_an_operation_that_is_neither_counted_nor_listed_fails_by_name(monkeypatch, function, words):
    plain = Model.__init__

    def changed(self, config):
        plain(self, config)
        self.encoder[0].ff = Adds(self.encoder[0].ff, function)

    monkeypatch.setattr(Model, "__init__", changed)
    with pytest.raises(UserError, match=words):
        measure.check(tiny_dense(), 8)


@pytest.mark.parametrize("function", [torch.relu, torch.erf, nn.functional.gelu], ids=["relu", "erf", "gelu"])
def test_fvcore_has_no_list_of_its_own_of_what_is_free(function):
    """relu is on fvcore's list of operations to ignore, and not on ours."""

    class Module(nn.Module):
        def forward(self, x):
            return function(x)

    with pytest.raises(UserError, match=f"fvcore has no count for aten::{function.__name__}"):
        measure.analyse(Module(), (torch.zeros(3),))


def test_work_in_an_unknown_module_fails(monkeypatch):
    monkeypatch.delitem(measure._MODULES, r"unembedding")
    with pytest.raises(UserError, match="lie in known modules"):
        measure.check(tiny_dense(), 8)


@pytest.mark.slow
def test_a_wrong_closed_form_is_told_by_component(monkeypatch):
    from flops import ops

    right = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda length, d, f: right(length, d, f) + 2)
    found = measure.check(tiny(), 12)
    assert found.failures == ("forward encoder", "forward backbone", "forward decoder", "training")
    assert {row.component: row.difference for row in found.rows if not row.agrees} == dict.fromkeys(
        ("encoder", "backbone", "decoder"), -2
    )


def test_too_short_a_sequence_is_refused():
    with pytest.raises(UserError, match="two tokens and two concepts"):
        measure.check(tiny(), 3)


def test_no_free_operation_is_one_that_multiplies_matrices():
    products = ("mm", "matmul", "linear", "einsum", "conv", "attention", "cdist", "fft", "solve", "dot")
    for name in (*FREE, *FVCORE_FREE):
        assert not any(product in name for product in products), name


@pytest.mark.parametrize("detector", ["learned", "cosine", "fixed"])
def test_boundaries_that_the_model_finds_itself_cost_the_same_as_injected_ones(detector):
    """The check injects boundaries; here a real model decides, and torch counts it on the CPU."""
    config = tiny(boundary={"detector": detector}, attention_backend="reference")
    model = build_model(config).eval()
    tokens = torch.randint(0, 61, (31,), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(tokens)
    assert output.n_concepts > 1
    square = count(config, documents=[31], concepts=[output.n_concepts]).full_square
    null = 2 * 24 * 8  # V of the null concept
    assert counter.get_total_flops() == square.forward - square.components["smoothing"] + null


def test_packed_documents_of_one_length_cost_what_each_costs_alone():
    """Scaled-dot-product attention in its plain form: documents of one length are a batch, and nothing between them is computed."""
    config = tiny(attention_backend="sdpa")
    model, boundaries = build_model(config).eval(), (torch.arange(36) % 12) % 3 == 0
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(36, dtype=torch.int64), cu_seqlens=torch.tensor([0, 12, 24, 36]), boundaries=boundaries)
    square = count(config, documents=[12, 12, 12], concepts=[4, 4, 4]).full_square
    # Boundaries are injected, so the detector does not run.
    free = square.components["smoothing"] + square.components["boundary"]
    assert counter.get_total_flops() == square.forward - free + 2 * 24 * 8


def test_parameter_groups_equal_those_of_the_built_model():
    built, counted = build_model(BASE), parameters(BASE)
    sizes = {name: weight.numel() for name, weight in built.named_parameters()}
    backbone = sum(n for name, n in sizes.items() if name.startswith("concepts.blocks."))
    embedding = sum(n for name, n in sizes.items() if "embedding" in name)
    assert (backbone, embedding, sum(sizes.values())) == (counted.concept, counted.embedding, counted.total)


@pytest.mark.slow
def test_the_verb_prints_three_columns_the_difference_and_the_list(dlcm, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny().model_dump(mode="json")))
    status, out, err = dlcm("flops", "check", path, "--seq-len", 24)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[1].split() == ["FLOPs", "closed", "form", "listed", "torch", "fvcore", "difference"]
    assert all(line.split()[-1] == "0" for line in lines[2:10])
    assert "null concept" in out
    assert "fvcore counts multiply-adds: doubled" in out
    told = json.loads(dlcm("flops", "check", path, "--json")[1])
    assert told["agrees"]
    assert told["models"][str(path)]["training"]["fvcore"] is None


@pytest.mark.slow
def test_the_verb_fails_where_a_figure_differs(dlcm, tmp_path, monkeypatch):
    from flops import ops

    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny_dense().model_dump(mode="json")))
    monkeypatch.setattr(ops, "logits", lambda length, d, vocab_size: length * d * vocab_size)
    status, out, err = dlcm("flops", "check", path)
    assert status == 2
    assert f"differ in {path}: forward head" in err
    assert "head" in out
