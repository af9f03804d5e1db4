import pytest
import torch
from torch.nn import functional as F

from dlcm import chunk
from dlcm.chunk import chunk_rows
from dlcm.loss import linear_cross_entropy
from tests.dlcm.triton_worker import Interpreter, solve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


@pytest.fixture(scope="module")
def kernel():
    """Losses, and what stands in the place of the logits, of the GPU's kernel: on a GPU, or under the interpreter."""
    pytest.importorskip("triton")
    interpreter = Interpreter() if DEVICE == "cpu" else None

    def run(logits, targets, gradient=True):
        problem = {"logits": logits.to(DEVICE), "targets": targets.to(DEVICE), "gradient": gradient}
        return solve(problem) if interpreter is None else interpreter.solve(problem)

    yield run
    if interpreter is not None:
        interpreter.close()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("vocab", [2, 257, 5_000])  # less than a step through it, and several with an end
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_the_losses_and_their_gradient_in_the_logits(kernel, vocab, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (5 * torch.randn(9, vocab, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab, (9,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])
    exact = logits.double()
    nats, delta = (x.cpu() for x in kernel(logits, targets))
    torch.testing.assert_close(nats.double(), F.cross_entropy(exact, targets, reduction="none"), rtol=2e-6, atol=2e-6)
    right = exact.softmax(1) - F.one_hot(targets, vocab)
    assert delta.dtype == dtype
    torch.testing.assert_close(delta.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.slow
def test_the_kernel_takes_logits_far_apart_and_leaves_them_where_no_gradient_is_wanted(kernel):
    logits = torch.tensor([[3e4, 0.0, -3e4], [-3e4, -3e4, -3e4], [0.0, float("-inf"), 1.0]])
    targets = torch.tensor([2, 1, 0])
    nats, left = (x.cpu() for x in kernel(logits, targets, gradient=False))
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(left, logits)
    assert torch.isfinite(kernel(logits, targets)[1]).all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs in another process")
@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_loss_is_as_exact_as_that_of_whole_logits(dtype):
    x, weight, targets = inputs(64, 32, 5_000, torch.float32)
    right = F.cross_entropy(x.double() @ weight.double().T, targets, reduction="sum")
    near = [y.detach().to(DEVICE).requires_grad_() for y in (x, weight)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, nats = linear_cross_entropy(*near, targets.to(DEVICE))
        usual = F.cross_entropy((near[0] @ near[1].T).float(), targets.to(DEVICE), reduction="sum")
    assert abs(total.cpu() - right) <= 2 * abs(usual.cpu() - right) + 1e-3
    torch.testing.assert_close(nats.sum(), total)
    for of in (total, usual):
        assert of.dtype == torch.float32
    found, expected = torch.autograd.grad(total, near), torch.autograd.grad(right, (x, weight))
    for ours, exact, theirs in zip(found, expected, torch.autograd.grad(usual, near)):
        assert (ours.cpu() - exact).norm() <= 2 * (theirs.cpu() - exact).norm()
