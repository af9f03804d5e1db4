"""Boundary statistics of a batch that is spread over processes: two real ones, over gloo, with unequal numbers of tokens."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dlcm.boundary import gather_scores, global_statistics, ratio_loss, uniform_draws
from dlcm.loss import next_token_loss
from tests.dlcm.conftest import awake, random_tokens, small_config
from tests.dlcm.ranks import run_ranks

# Documents of each rank: 72 tokens against 31.
DOCUMENTS = ((40, 25, 7), (13, 1, 17))
RATIO, WEIGHT = 1.5, 0.5
pytestmark = pytest.mark.slow  # two interpreters that import torch
# A loss of each rank's own F and G, as the mistake would be.
VARIANTS = ("global", "per_rank")


def batch_of(ranks):
    """Tokens, targets, cu_seqlens and draws of these ranks' documents, packed; rank 1 repeats few words."""
    lengths = [length for rank in ranks for length in DOCUMENTS[rank]]
    tokens = torch.cat([random_tokens(sum(DOCUMENTS[rank]), rank) % (61 if rank == 0 else 2) for rank in ranks])
    draws = torch.cat([uniform_draws(3, 5, 1000 * rank + torch.arange(sum(DOCUMENTS[rank]))) for rank in ranks])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    targets = torch.cat([part.roll(-1) for part in tokens.split([sum(DOCUMENTS[rank]) for rank in ranks])])
    return tokens, targets, cu_seqlens, draws


def fresh_model():
    return awake(small_config())


def objective(model, ranks, variant):
    """The language-model loss and the ratio loss, scaled for the averaging of gradients over the ranks that are there.

    The detector's own weights have their gradient from the ratio loss alone: boundaries are decoupled.
    """
    tokens, targets, cu_seqlens, draws = batch_of(ranks)
    out = model(tokens, cu_seqlens=cu_seqlens, draws=draws)
    prob_sum = out.boundary_prob.sum()
    statistics = global_statistics(out.n_concepts, prob_sum, tokens.numel())
    loss = next_token_loss(out.logits, targets, reduction="sum") * statistics.n_ranks / statistics.n_tokens
    if variant == "per_rank":
        n = torch.tensor(tokens.numel(), dtype=torch.float64)
        own = type(statistics)(out.boundaries.sum(), prob_sum / n, n)
        return loss + WEIGHT * ratio_loss(own, RATIO), statistics, own
    return loss + WEIGHT * ratio_loss(statistics, RATIO), statistics, statistics


def gradients(model, ranks, variant):
    model.zero_grad()
    loss, statistics, used = objective(model, ranks, variant)
    loss.backward()
    inner = getattr(model, "module", model)
    return {
        "gradients": {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None},
        "ratio_loss": ratio_loss(statistics, RATIO).detach(),
        "rate": statistics.rate,
        "own_rate": used.rate,
        "prob": statistics.prob.detach(),
        "n_tokens": statistics.n_tokens,
    }


def controlled(ranks):
    """The offsets after some steps of control; scores drift, and the ranks' differ."""
    detector = awake(small_config()).boundary
    for step in range(12):
        g = torch.Generator().manual_seed(step)
        scores = [
            torch.randn(sum(DOCUMENTS[rank]), generator=g, dtype=torch.float64) - rank + 0.1 * step for rank in (0, 1)
        ]
        draws = [uniform_draws(0, step, 1000 * rank + torch.arange(sum(DOCUMENTS[rank]))) for rank in (0, 1)]
        mine = torch.cat([scores[rank] for rank in ranks])
        sharp = ((mine + detector.offset_sample) / detector.temperature).sigmoid()
        boundaries = torch.cat([draws[rank] for rank in ranks]) < sharp
        statistics = global_statistics(boundaries.sum(), mine.sigmoid().sum(), mine.numel())
        detector.control(statistics.rate, gather_scores(mine), first_step=step == 0)
    return {"sample": detector.offset_sample, "threshold": detector.offset_threshold, "slope": detector.rate_slope}


def work(folder):
    """One rank: everything that the tests look at, in one file."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    model = DistributedDataParallel(fresh_model())
    found = {variant: gradients(model, [rank], variant) for variant in VARIANTS}
    found["control"] = controlled([rank])
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    codes, said = run_ranks(2, work, folder)
    assert codes == [0, 0], said
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    return gradients(fresh_model(), [0, 1], "global")


def cosine(a, b, names):
    a, b = (torch.cat([x[name].flatten() for name in names]) for x in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


def test_the_ranks_see_the_statistics_of_the_whole_batch(ranks, alone):
    for found in ranks:
        for name in ("rate", "prob", "ratio_loss", "n_tokens"):
            torch.testing.assert_close(found["global"][name], alone[name], atol=1e-12, rtol=0)


def test_gradients_averaged_over_two_unequal_ranks_are_those_of_one_process(ranks, alone):
    assert set(alone["gradients"]) == {name for name, _ in fresh_model().named_parameters()}
    for found in ranks:
        for name, expected in alone["gradients"].items():
            torch.testing.assert_close(found["global"]["gradients"][name], expected, atol=1e-9, rtol=0)


def test_a_ratio_loss_of_each_rank_alone_would_have_another_gradient(ranks, alone):
    """What makes the tests above discriminate: the ranks' own rates lie on both sides of the target."""
    own = sorted(float(found["per_rank"]["own_rate"]) for found in ranks)
    assert own[0] < 1 / RATIO < own[1]
    names = ("boundary.w_q.weight", "boundary.w_k.weight")
    assert cosine(ranks[0]["per_rank"]["gradients"], alone["gradients"], names) < 0
    assert cosine(ranks[0]["global"]["gradients"], alone["gradients"], names) == pytest.approx(1.0, abs=1e-12)


def test_the_controller_moves_alike_on_every_rank_and_as_on_one_process(ranks):
    expected = controlled([0, 1])
    for name, value in expected.items():
        assert torch.equal(ranks[0]["control"][name], ranks[1]["control"][name])
        torch.testing.assert_close(ranks[0]["control"][name], value, atol=1e-9, rtol=0)
    assert float(expected["sample"]) != 0


def test_without_a_process_group_a_process_is_the_whole_batch():
    p = torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True)
    found = global_statistics(1, p.sum(), 2)
    assert (found.n_ranks, float(found.rate), float(found.prob.detach())) == (1, 0.5, 0.375)
    assert torch.autograd.grad(found.prob, p)[0].tolist() == [0.5, 0.5]
    assert gather_scores(p) is p
