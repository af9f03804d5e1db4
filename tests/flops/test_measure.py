"""The closed form equals torch's and fvcore's counters on the built model, component by component."""

import pytest

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import parameters

measure = pytest.importorskip("flops.measure", reason="needs torch")

BASE = measure.EXAMPLES["dlcm"]


def variants() -> dict[str, ModelConfig]:
    fixed = BASE.boundary.model_copy(update={"detector": "fixed", "compression_ratio": 3.0})
    return {
        **measure.EXAMPLES,
        "once": BASE.model_copy(update={"cross_attention": "once"}),
        "first": BASE.model_copy(update={"pooling": "first", "smoothing": "none"}),
        "tied": BASE.model_copy(update={"tie_embeddings": True}),
        "fixed": BASE.model_copy(update={"boundary": fixed}),
    }


@pytest.mark.parametrize("name", ["dlcm", "dense", "once", "first", "tied", "fixed"])
def test_closed_form_equals_both_counters_exactly(name):
    rows, params = measure.check(variants()[name], seq_len=48)
    assert [row for row in rows if not row.agrees] == []
    assert params.agrees
    assert sum(row.torch for row in rows) > 0


def test_parameter_groups_equal_those_of_the_built_model():
    built = measure.build_model(BASE)
    counted = parameters(BASE)
    sizes = {name: weight.numel() for name, weight in built.named_parameters()}
    backbone = sum(n for name, n in sizes.items() if name.startswith("concepts.blocks."))
    embedding = sum(n for name, n in sizes.items() if "embedding" in name)
    assert (backbone, embedding, sum(sizes.values())) == (counted.concept, counted.embedding, counted.total)


def test_a_model_too_large_to_run_is_refused():
    with pytest.raises(UserError, match="check a smaller model"):
        measure.check(BASE.model_copy(update={"vocab_size": 4_000_000}))
