import math

import numpy as np
import pytest
import torch
from scipy import stats

from dlcm.boundary import BoundaryDetector, delimiter_table, global_statistics, ratio_loss, uniform_draws
from dlcm.concepts import Packing
from dlcm.config import BoundaryConfig
from dlcm.errors import UserError, parse
from tests.dlcm.conftest import DETECTORS, awake, random_tokens, small_config


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0, 8.0])
def test_the_ratio_loss_is_equation_10_and_has_its_closed_form_gradient(ratio):
    g = torch.Generator().manual_seed(0)
    p = torch.rand(64, generator=g, dtype=torch.float64).requires_grad_()
    n_boundaries = int((torch.rand(64, generator=g) < 0.3).sum())
    loss = ratio_loss(global_statistics(n_boundaries, p.sum(), 64), ratio)
    F, G = n_boundaries / 64, float(p.detach().mean())
    printed = ratio / (ratio - 1) * ((ratio - 1) * F * G + (1 - F) * (1 - G)) - 1
    assert float(loss.detach()) == pytest.approx(printed, abs=1e-12)
    (grad,) = torch.autograd.grad(loss, p)
    expected = ratio**2 / (ratio - 1) * (F - 1 / ratio) / 64
    torch.testing.assert_close(grad, torch.full_like(grad, expected), atol=1e-12, rtol=0)


def test_the_ratio_loss_is_minus_one_at_its_trap():
    assert float(ratio_loss(global_statistics(0, torch.tensor(1.0), 1), 4.0)) == pytest.approx(-1.0)


def test_micro_batches_of_unequal_size_have_the_global_value_and_add_up_to_the_gradient_of_the_whole_batch():
    g = torch.Generator().manual_seed(1)
    w = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    x = torch.randn(90, 5, generator=g, dtype=torch.float64)
    n_boundaries = (torch.rand(90, generator=g) < 0.4).sum()
    whole = ratio_loss(global_statistics(n_boundaries, (x @ w).sigmoid().sum(), 90), 4.0)
    ahead = global_statistics(n_boundaries, (x @ w).sigmoid().sum().detach(), 90)
    losses = [ratio_loss(ahead.through((part @ w).sigmoid().sum()), 4.0) for part in x.split([10, 50, 30])]
    for loss in losses:
        torch.testing.assert_close(loss, whole, atol=1e-12, rtol=0)
    parts = sum(torch.autograd.grad(loss, w)[0] for loss in losses)
    torch.testing.assert_close(parts, torch.autograd.grad(whole, w)[0], atol=1e-12, rtol=0)


def test_probabilities_follow_equations_5_and_6_and_the_first_token_of_a_document_is_one():
    model = awake(small_config())
    detector = model.boundary
    h = torch.randn(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = detector(h, random_tokens(12, 0), Packing(torch.tensor([0, 7, 12])))
    for t in range(12):
        if t in (0, 7):
            assert out.prob_T[t] == 1.0
            assert out.decision_T[t]
            continue
        q, k = detector.w_q.weight.detach() @ h[t - 1], detector.w_k.weight.detach() @ h[t]
        p = (1 - float(q @ k / (q.norm() * k.norm()))) / 2
        assert float(out.prob_T[t]) == pytest.approx(p, abs=1e-9)
        assert bool(out.decision_T[t]) == (math.log(p / (1 - p)) + float(detector.offset_threshold) >= 0)


def test_zero_vectors_give_a_probability_of_one_half_and_finite_gradients():
    detector = awake(small_config()).boundary
    h = torch.zeros(5, 16, dtype=torch.float64, requires_grad=True)
    out = detector(h, random_tokens(5, 0), Packing(torch.tensor([0, 5])))
    assert out.prob_T[1:].tolist() == [0.5] * 4
    (grad,) = torch.autograd.grad(out.prob_T.sum(), h)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("ratio", [2.0, 2.5, 4.0, 7.3])
def test_fixed_boundaries_come_every_r_tokens_for_any_real_r(ratio):
    detector = BoundaryDetector(BoundaryConfig(detector="fixed", compression_ratio=ratio), 8, 10)
    decision = detector(
        torch.zeros(2000, 8), torch.zeros(2000, dtype=torch.long), Packing(torch.tensor([0, 2000]))
    ).decision_T
    assert 2000 / int(decision.sum()) == pytest.approx(ratio, rel=2e-3)
    gaps = decision.nonzero().squeeze(1).diff()
    assert set(gaps.tolist()) <= {math.floor(ratio), math.ceil(ratio)}


def test_word_and_sentence_boundaries_follow_the_text():
    text = b"It is. So was\nit 2 go!"
    ids = torch.tensor(list(text))
    packing = Packing(torch.tensor([0, len(text)]))
    starts = {}
    for granularity in ("word", "sentence"):
        detector = BoundaryDetector(BoundaryConfig(detector=f"delimiter_{granularity}"), 8, 256)
        detector.delimiters_V4.copy_(delimiter_table([bytes([i]) for i in range(256)], 256, granularity))
        starts[granularity] = detector(torch.zeros(len(text), 8), ids, packing).decision_T.nonzero().squeeze(1).tolist()
    assert starts["word"] == [0, 3, 7, 10, 14, 17, 19]
    assert starts["sentence"] == [0, 6, 14]


def test_draws_are_uniform_and_keyed_by_seed_step_and_position():
    position = torch.arange(20_000)
    u = uniform_draws(7, 3, position)
    assert torch.equal(u, uniform_draws(7, 3, position))
    assert torch.equal(u[100:200], uniform_draws(7, 3, position[100:200]))
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    for other in (uniform_draws(8, 3, position), uniform_draws(7, 4, position), u.roll(1)):
        assert abs(np.corrcoef(u.numpy(), other.numpy())[0, 1]) < 0.03
    assert 0 < float(u.min()) < float(u.max()) < 1


@pytest.mark.many
@pytest.mark.parametrize(
    ("detector", "decision"),
    [("learned", "sample"), ("learned", "threshold"), ("cosine", "sample"), ("random", "sample")],
)
@pytest.mark.parametrize("ratio", [2.0, 4.0, 8.0])
def test_the_controller_holds_the_rate_in_training_and_at_inference_while_the_scores_drift(detector, decision, ratio):
    """States whose neighbours grow more and more alike push every score down, as a training run does."""
    torch.manual_seed(0)
    config = BoundaryConfig(detector=detector, decision=decision, compression_ratio=ratio, d_scan=16)
    module = BoundaryDetector(config, 16, 50)
    if detector == "learned":
        for w in (module.w_q, module.w_k):
            torch.nn.init.normal_(w.weight)
    packing = Packing(torch.arange(9) * 256)

    def states(step):
        g = torch.Generator().manual_seed(step)
        shared = torch.randn(2048, 16, generator=g)
        return shared + (0.2 + 0.004 * step) * shared.roll(1, 0)

    tokens = torch.randint(0, 5000, (2048,))
    sampled, counted = 0, 0
    for step in range(300):
        h = states(step)
        out = module(h, tokens, packing, uniform_draws(0, step, torch.arange(2048)))
        module.control(float(out.decision_T.float().mean()), out.score_T.detach(), first_step=step == 0)
        if step >= 200:
            sampled += int(out.decision_T.sum())
            counted += 2048
    assert counted / sampled == pytest.approx(ratio, rel=0.02)
    last = [states(step) for step in range(290, 310)]
    module.calibrate(torch.cat([module(h, tokens, packing).score_T for h in last[:10]]))
    inference = sum(int(module(h, tokens.roll(i), packing).decision_T.sum()) for i, h in enumerate(last[10:]))
    assert 10 * 2048 / inference == pytest.approx(ratio, rel=0.05)


def test_a_ratio_of_one_or_less_is_refused_with_the_reason():
    with pytest.raises(UserError, match="boundary: compression_ratio: input should be greater than 1, got 1"):
        parse(BoundaryConfig, {"compression_ratio": 1}, "boundary")


@pytest.mark.parametrize("decision", ["sample", "threshold"])
def test_where_all_scores_are_equal_the_controller_stays_finite_and_sampling_still_holds_the_rate(decision):
    """Encoder states that are all alike, as before anything is learned: no threshold can tell them apart, draws can."""
    detector = BoundaryDetector(BoundaryConfig(decision=decision), 8, 10)
    packing, score = Packing(torch.tensor([0, 1000, 2000])), torch.full((2000,), 0.7)
    score[packing.is_first_T] = math.inf
    taken = 0
    for step in range(100):
        if decision == "sample":
            sharp = ((score + detector.offset_sample) / detector.temperature).sigmoid()
            boundaries = uniform_draws(0, step, torch.arange(2000)) < sharp
        else:
            boundaries = score + detector.offset_threshold >= 0
        detector.control(float(boundaries.double().mean()), score, first_step=step == 0)
        taken += int(boundaries.sum()) if step >= 50 else 0
    for buffer in detector.buffers():
        assert torch.isfinite(buffer).all()
    if decision == "sample":
        assert 50 * 2000 / taken == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("detector", DETECTORS)
def test_documents_of_one_token_are_one_boundary_each_under_every_detector(detector):
    model = awake(small_config(detector))
    n = 5
    packing = Packing(torch.arange(n + 1))
    h = torch.randn(n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = model.boundary(h, random_tokens(n, 0), packing, uniform_draws(0, 0, torch.arange(n)))
    assert out.decision_T.all()
    assert (out.prob_T == 1).all()
    before = [buffer.clone() for buffer in model.boundary.buffers()]
    if out.score_T is not None:
        # Nothing but first tokens: there is nothing to control, and nothing moves.
        model.boundary.control(1.0, out.score_T)
        model.boundary.calibrate(out.score_T)
    assert all(torch.equal(a, b) for a, b in zip(before, model.boundary.buffers()))


@pytest.mark.parametrize("detector", ["fixed", "delimiter_word", "delimiter_sentence"])
def test_a_detector_without_a_score_has_nothing_to_control_whatever_the_config_says(detector):
    module = BoundaryDetector(BoundaryConfig(detector=detector, control="bias"), 8, 10)
    out = module(torch.zeros(6, 8), torch.arange(6), Packing(torch.tensor([0, 6])), torch.rand(6))
    assert out.score_T is None
    assert not module.is_controlled
    assert module.controlled_offset is None


def test_the_ratio_loss_alone_leaves_every_offset_where_it_is():
    module = BoundaryDetector(BoundaryConfig(control="none"), 8, 10)
    for step in range(5):
        module.control(0.9, torch.randn(100), first_step=step == 0)
    assert float(module.offset_sample) == float(module.offset_threshold) == 0.0
    assert module.controlled_offset is None


@pytest.mark.parametrize("gain", [0.2, 1.0, 1.8])
def test_a_wrong_rate_is_taken_back_by_the_gain_in_one_step(gain):
    """In the middle of a wide spread of scores the rate answers linearly: the error shrinks by 1 - gain."""
    detector = BoundaryDetector(BoundaryConfig(compression_ratio=2, decision="threshold", control_gain=gain), 8, 10)
    score = torch.linspace(-4, 4, 8000)
    detector.offset_threshold.fill_(0.2)
    detector.rate_slope.fill_(1 / 8)  # of a rate over scores spread evenly over 8 logits

    def rate():
        return float((score + detector.offset_threshold >= 0).double().mean())

    before = rate() - 0.5
    detector.control(rate(), score)
    assert before == pytest.approx(0.025, abs=1e-3)
    assert rate() - 0.5 == pytest.approx((1 - gain) * before, abs=1e-3)
