"""Products beside each other are plain operations, and so run on any device."""

import pytest
import torch
from torch.nn import functional as F

from dlcm import fused_gpu

SIZES = [[5], [3, 4, 2]]


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("sizes", SIZES)
def test_products_beside_each_other_and_their_gradients_are_those_of_each(sizes):
    x, weights = numbers(7, 6), [numbers(n, 6, seed=n) for n in sizes]
    right = torch.cat([F.linear(x, weight) for weight in weights], 1)
    found = fused_gpu.products(x, *weights)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    grad = numbers(*right.shape, seed=9).detach()
    expected = torch.autograd.grad(right, [x, *weights], grad)
    for a, b in zip(torch.autograd.grad(found, [x, *weights], grad), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(fused_gpu.products(x, *weights), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("no_grad", [False, True])
def test_under_autocast_they_are_bf16_and_gradients_come_in_the_dtype_of_the_weights(sizes, no_grad):
    x, *weights = (
        w.detach().float().requires_grad_() for w in (numbers(7, 6), *(numbers(n, 6, seed=n) for n in sizes))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(not no_grad):
        found = fused_gpu.products(x, *weights)
        right = torch.cat([F.linear(x, weight) for weight in weights], 1)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, right)
    if not no_grad:
        gradients = torch.autograd.grad(found.float().square().sum(), [x, *weights])
        assert all(g.dtype == torch.float32 for g in gradients)


def test_they_are_not_for_other_devices_nor_for_float64():
    assert not fused_gpu.applies(torch.zeros(2, 2))
    assert not fused_gpu.applies(torch.zeros(2, 2, device="meta"))
