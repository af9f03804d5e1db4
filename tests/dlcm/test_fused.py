"""The fused functions against PyTorch's operations taken apart, and their gradients against finite differences."""

import pytest
import torch
from torch.nn import functional as F

from dlcm.fused import applies, rms_norm, rms_norm_rotated, swiglu

ROWS, HEADS, WIDTH = 7, 3, 8


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    angle_T1A = torch.arange(ROWS).double()[:, None, None] * torch.linspace(0.1, 1.0, WIDTH // 2).double()
    return angle_T1A.cos(), angle_T1A.sin()


def rotated_apart(x, weight, eps):
    cos, sin = angles()
    a, b = F.rms_norm(x, (WIDTH,), weight, eps).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


CASES = {
    "norm": (
        lambda x, w: rms_norm(x, w, 1e-2),
        lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-2),
        ((ROWS, HEADS, WIDTH), (WIDTH,)),
    ),
    "norm of heads, rotated": (
        lambda x, w: rms_norm_rotated(x, w, 1e-2, *angles()),
        lambda x, w: rotated_apart(x, w, 1e-2),
        ((ROWS, HEADS, WIDTH), (WIDTH,)),
    ),
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up, ((ROWS, WIDTH), (ROWS, WIDTH))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_operations_taken_apart(name):
    fused, apart, shapes = CASES[name]
    inputs = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected, found = apart(*inputs), fused(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1.0, 1.0, expected.numel(), dtype=torch.float64).view_as(expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((expected * weight).sum(), inputs)
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    fused, _, shapes = CASES[name]
    assert torch.autograd.gradcheck(fused, [numbers(*shape, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("name", CASES)
def test_inputs_and_gradients_of_any_strides_are_taken(name):
    fused, _, shapes = CASES[name]
    inputs = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    strided = [torch.stack([x, x], -1)[..., 0].detach().requires_grad_() for x in inputs]
    weight = numbers(*reversed(shapes[0])).detach().permute(*reversed(range(len(shapes[0]))))
    expected = torch.autograd.grad((fused(*inputs) * weight.contiguous()).sum(), inputs)
    # The gradient arrives transposed, as from a kernel that is laid out by heads.
    found = torch.autograd.grad(fused(*strided), strided, weight)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, WIDTH, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm(x, torch.ones(WIDTH, dtype=torch.float64), 1e-6).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1e3))


def test_a_norm_keeps_its_input_and_one_number_a_row():
    x, weight, kept = numbers(ROWS, WIDTH), numbers(WIDTH), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    assert sorted(t.numel() for t in kept) == sorted([x.numel(), weight.numel(), ROWS])


def test_narrow_types_autocast_and_other_devices_are_left_to_pytorch():
    x = torch.zeros(2, WIDTH)
    assert applies(x)
    assert applies(x.double())
    assert not applies(x.bfloat16())
    assert not applies(x.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not applies(x)
