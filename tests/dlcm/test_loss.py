import pytest
import torch
from torch.nn import functional as F

from dlcm import chunk
from dlcm.chunk import chunk_rows
from dlcm.loss import linear_cross_entropy


@pytest.fixture(params=[1, 40, 1 << 20])
def chunks(request, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_ELEMENTS", {"cpu": request.param * 7, "cuda": request.param * 7})


def inputs(n=37, width=5, vocab=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, torch.randint(0, vocab, (n,), generator=generator)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("n", [0, 1, 37])
def test_loss_and_gradients_are_those_of_the_whole_logits(n):
    x, weight, targets = inputs(n)
    expected = F.cross_entropy(x @ weight.T, targets, reduction="sum")
    gradients = torch.autograd.grad(expected * 0.3, (x, weight))
    total, nats = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(nats, F.cross_entropy(x @ weight.T, targets, reduction="none"), rtol=1e-12, atol=1e-12)
    for found, right in zip(torch.autograd.grad(total * 0.3, (x, weight)), gradients):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("chunks")
def test_the_gradient_is_that_of_finite_differences():
    x, weight, targets = inputs(5)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets)[0], (x, weight))


def test_without_gradients_none_are_computed():
    x, weight, targets = inputs()
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets)[0].grad_fn is None
    assert linear_cross_entropy(x.detach(), weight.detach(), targets)[0].requires_grad is False


def test_under_autocast_products_are_in_bf16_and_the_softmax_in_fp32():
    """Against float64: the error is that of rounding to bf16, not that of a bf16 softmax over a large vocabulary."""
    x, weight, targets = inputs(64, 32, 5_000, torch.float32)
    right = F.cross_entropy(x.double() @ weight.double().T, targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, nats = linear_cross_entropy(x, weight, targets)
        eager = F.cross_entropy((x @ weight.T).float(), targets, reduction="sum")
    assert total.dtype == nats.dtype == torch.float32
    assert abs(total - right) <= 2 * abs(eager - right) + 1e-3
    found, expected, usual = (torch.autograd.grad(y, (x, weight)) for y in (total, right, eager))
    for ours, exact, theirs in zip(found, expected, usual):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


def test_a_chunk_is_at_least_one_row_and_no_more_than_there_are():
    assert chunk_rows(10, 1 << 30, "cpu") == 1
    assert chunk_rows(10, 2, "cuda") == 10
