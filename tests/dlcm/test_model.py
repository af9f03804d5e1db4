import pytest
import torch

from dlcm.boundary import uniform_draws
from dlcm.config import ModelConfig
from dlcm.loss import next_token_loss
from dlcm.model import build_model
from tests.dlcm.conftest import DETECTORS, VOCAB, awake, dense_config, random_tokens, small_config

POOLINGS = ("mean", "first")
N_SEEDS = 50


def draws_for(n: int, seed: int) -> torch.Tensor:
    return uniform_draws(seed, 0, torch.arange(n))


@pytest.mark.many
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_truncating_the_suffix_leaves_earlier_logits_unchanged(detector, pooling, sampled):
    """Boundaries are recomputed from the prefix alone, so a leak through them shows as well."""
    model = awake(small_config(detector, pooling=pooling))
    for seed in range(N_SEEDS):
        n = 12 + seed % 17
        tokens = random_tokens(n, seed)
        draws = draws_for(n, seed) if sampled else None
        full = model(tokens, draws=draws)
        cut = 1 + seed % (n - 1)
        prefix = model(tokens[:cut], draws=None if draws is None else draws[:cut])
        assert torch.equal(prefix.boundaries, full.boundaries[:cut])
        assert (prefix.logits - full.logits[:cut]).abs().max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_editing_the_suffix_leaves_earlier_logits_and_boundaries_unchanged(detector, pooling):
    model = awake(small_config(detector, pooling=pooling))
    for seed in range(N_SEEDS):
        tokens, cut = random_tokens(24, seed), 1 + seed % 23
        edited = torch.cat([tokens[:cut], random_tokens(24 - cut, seed + 999)])
        before, after = model(tokens), model(edited)
        assert torch.equal(before.boundaries[:cut], after.boundaries[:cut])
        assert (before.logits[:cut] - after.logits[:cut]).abs().max() < 1e-9


def test_a_dense_model_is_causal():
    model = awake(dense_config())
    for seed in range(N_SEEDS):
        tokens, cut = random_tokens(24, seed), 1 + seed % 23
        assert (model(tokens[:cut]).logits - model(tokens).logits[:cut]).abs().max() < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"smoothing": "none"}, {"concept_bias": "none"}, {"cross_attention": "once"}])
def test_every_option_is_causal_and_changes_the_output(options):
    default = awake(small_config())
    model = awake(small_config(**options))
    model.load_state_dict({k: v for k, v in default.state_dict().items() if k in model.state_dict()})
    tokens = random_tokens(30, 0)
    assert (model(tokens).logits - default(tokens).logits).abs().max() > 1e-6
    for cut in range(1, 30):
        assert (model(tokens[:cut]).logits - model(tokens).logits[:cut]).abs().max() < 1e-9


@pytest.mark.many
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_packed_equals_per_document_equals_padded(detector, pooling):
    model = awake(small_config(detector, pooling=pooling))
    lengths = [5, 1, 17, 8]
    documents = [random_tokens(n, 50 + n) for n in lengths]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed = model(torch.cat(documents), cu_seqlens=cu)
    padded = torch.stack([torch.cat([d, d.new_zeros(17 - d.numel())]) for d in documents])
    rows = model(padded)
    for i, document in enumerate(documents):
        alone = model(document)
        part = slice(int(cu[i]), int(cu[i + 1]))
        assert torch.equal(packed.boundaries[part], alone.boundaries)
        assert (packed.logits[part] - alone.logits).abs().max() < 1e-9
        assert (rows.logits[i, : document.numel()] - alone.logits).abs().max() < 1e-9


def test_gradients_of_packed_documents_are_those_of_the_documents_alone():
    model = awake(small_config())
    documents = [random_tokens(n, n) for n in (6, 13, 9)]
    cu = torch.tensor([0, 6, 19, 28])
    next_token_loss(
        model(torch.cat(documents), cu_seqlens=cu).logits, torch.cat(documents).roll(1), reduction="sum"
    ).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rolled = torch.cat(documents).roll(1).split([6, 13, 9])
    for document, target in zip(documents, rolled):
        next_token_loss(model(document).logits, target, reduction="sum").backward()
    for name, p in model.named_parameters():
        if name in packed:
            torch.testing.assert_close(p.grad, packed[name], atol=1e-9, rtol=1e-9, msg=name)


def test_nothing_flows_between_packed_documents():
    """Bitwise: with injected boundaries all shapes stay the same, so even rounding may not change."""
    model = awake(small_config()).float()
    a, b, c = random_tokens(9, 1), random_tokens(14, 2), random_tokens(11, 3)
    cu = torch.tensor([0, 9, 23, 34])
    flags = torch.rand(34, generator=torch.Generator().manual_seed(0)) < 0.4
    flags[cu[:-1]] = True
    edited = model(torch.cat([a, random_tokens(14, 7), c]), cu_seqlens=cu, boundaries=flags).logits
    original = model(torch.cat([a, b, c]), cu_seqlens=cu, boundaries=flags).logits
    assert torch.equal(original[:9], edited[:9])
    assert torch.equal(original[23:], edited[23:])
    assert not torch.equal(original[9:23], edited[9:23])


def test_edited_documents_leave_the_boundaries_of_others_unchanged():
    model = awake(small_config())
    cu = torch.tensor([0, 9, 23, 34])
    tokens = random_tokens(34, 0)
    edited = tokens.clone()
    edited[9:23] = random_tokens(14, 9)
    before, after = (model(x, cu_seqlens=cu).boundaries for x in (tokens, edited))
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[23:], after[23:])


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_language_model_loss_reaches_the_detector_only_through_the_straight_through_path(straight_through):
    model = awake(small_config(boundary={"straight_through": straight_through}))
    tokens = random_tokens(40, 0)
    out = model(tokens, draws=draws_for(40, 0))
    next_token_loss(out.logits, tokens.roll(-1)).backward(retain_graph=True)
    grads = [w.weight.grad for w in (model.boundary.w_q, model.boundary.w_k)]
    if straight_through:
        assert all(g is not None and g.abs().max() > 0 for g in grads)
    else:
        assert all(g is None or not g.any() for g in grads)
    model.zero_grad()
    out.boundary_prob.sum().backward()
    assert all(w.weight.grad.abs().max() > 0 for w in (model.boundary.w_q, model.boundary.w_k))


@pytest.mark.many
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_parameter_is_used(detector, pooling):
    model = awake(small_config(detector, pooling=pooling))
    tokens = random_tokens(40, 0)
    out = model(tokens, draws=draws_for(40, 0))
    loss = next_token_loss(out.logits, tokens.roll(-1))
    if detector == "learned":
        loss = loss + out.boundary_prob.sum()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_smoother_is_the_identity_at_initialisation_and_the_first_loss_is_that_of_uniform_guessing():
    config = small_config()
    smooth, plain = build_model(config), build_model(config.model_copy(update={"smoothing": "none"}))
    plain.load_state_dict({k: v for k, v in smooth.state_dict().items() if "smoother" not in k})
    tokens = random_tokens(40, 0)
    assert not smooth(tokens).logits.any()
    for model in (smooth, plain):
        torch.nn.init.normal_(model.unembedding.weight, generator=torch.Generator().manual_seed(0))
    assert torch.equal(smooth(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "config", [small_config(), small_config(pooling="first"), dense_config()], ids=["mean", "first", "dense"]
)
def test_an_empty_input_and_a_single_token_work(config, n):
    out = awake(config)(random_tokens(n, 0))
    assert out.logits.shape == (n, VOCAB)
    assert out.n_concepts == n
    assert torch.isfinite(out.logits).all()


def test_all_boundaries_one_segment_and_an_empty_document_work():
    model = awake(small_config())
    tokens = random_tokens(12, 0)
    every = model(tokens, boundaries=torch.ones(12, dtype=torch.bool))
    assert every.tokens_per_concept == 1.0
    one = torch.zeros(12, dtype=torch.bool)
    one[0] = True
    assert model(tokens, boundaries=one).n_concepts == 1
    with_empty = model(tokens, cu_seqlens=torch.tensor([0, 0, 5, 5, 12]))
    without = model(tokens, cu_seqlens=torch.tensor([0, 5, 12]))
    assert torch.equal(with_empty.logits, without.logits)


def test_a_tied_model_shares_its_embedding_and_a_seed_repeats_its_weights():
    tied = build_model(small_config(tie_embeddings=True))
    assert tied.unembedding.weight is tied.embedding.weight
    a, b, c = (build_model(small_config(), seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embedding.weight"], c["embedding.weight"])


def test_configs_round_trip_through_json():
    config = small_config("random", pooling="first")
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
