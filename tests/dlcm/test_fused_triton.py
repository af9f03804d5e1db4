"""The GPU kernels of a block's elementwise chains against float64; on a GPU, or under Triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F

from dlcm.config import BoundaryConfig, ModelConfig
from dlcm.model import build_model
from tests.dlcm.triton_worker import Interpreter, solve, trained

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-2


@pytest.fixture(scope="module")
def call():
    """Call a function of `dlcm.backends.fused_triton`; what it gives as a tuple."""
    interpreter = Interpreter() if DEVICE == "cpu" else None

    def run(function, *inputs):
        moved = [_moved(x) for x in inputs]
        problem = {"function": function, "inputs": moved}
        found = solve(problem) if interpreter is None else interpreter.solve(problem)
        return tuple(x if x is None else x.cpu() for x in found)

    yield run
    if interpreter is not None:
        interpreter.close()


def _moved(x):
    if isinstance(x, tuple):
        return tuple(map(_moved, x))
    return x.detach().to(DEVICE) if isinstance(x, torch.Tensor) else x


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, right, what):
    assert found.shape == right.shape, what
    assert torch.isfinite(found).all(), what
    eps = max(torch.finfo(found.dtype).eps, 1e-6)
    assert (found.double() - right).norm() <= 2 * eps * right.norm() + 1e-12, what


@pytest.mark.parametrize("width", [6, 64, 1088])
@pytest.mark.parametrize(("rows", "narrow"), [(1, torch.float32), (70, torch.bfloat16)])
@pytest.mark.parametrize("adds", [False, True])
def test_the_norm_behind_a_sum_and_its_gradients_are_those_of_float64(call, width, rows, narrow, adds):
    x, branch, weight = numbers(rows, width), numbers(rows, width, dtype=narrow, seed=1), numbers(width, seed=2)
    d_total, d_normed = numbers(rows, width, seed=3), numbers(rows, width, dtype=narrow, seed=4)
    exact = [y.double().requires_grad_() for y in (x, branch, weight)]
    total = exact[0] + exact[1] if adds else exact[0] * 1.0
    normed = F.rms_norm(total, (width,), exact[2], EPS)
    found = call("add_rms_norm", x, branch if adds else None, weight, EPS, narrow)
    assert found[1].dtype == narrow
    for a, b, what in zip(found, (total, normed), ("sum", "normed")):
        assert_near(a, b.detach(), what)
    for reads in (False, True):
        objective = (normed * d_normed.double()).sum() + reads * (total * d_total.double()).sum()
        of = exact if adds else (exact[0], exact[2])
        right = torch.autograd.grad(objective, of, retain_graph=True)
        kept = (found[0], weight, found[2], narrow if adds else None)
        d_x, d_branch, d_weight = call("add_rms_norm_backward", d_total if reads else None, d_normed, *kept)
        assert_near(d_x, right[0], "gradient of x")
        assert_near(d_weight, right[-1], "gradient of the gain")
        assert (d_branch is None) is not adds
        if adds:
            assert d_branch.dtype == narrow
            assert_near(d_branch, right[1], "gradient of the branch")


@pytest.mark.parametrize(("n_heads", "n_kv", "d_head"), [(1, 1, 2), (3, 3, 64), (4, 2, 96), (4, 1, 128)])
@pytest.mark.parametrize(("n_tokens", "dtype"), [(37, torch.float32), (200, torch.bfloat16)])
def test_heads_and_their_gradients_are_those_of_float64(call, n_heads, n_kv, d_head, n_tokens, dtype):
    x = numbers(n_tokens, (n_heads + 2 * n_kv) * d_head, dtype=dtype)
    gains = tuple(numbers(d_head, seed=i) for i in (1, 2))
    angle = torch.arange(n_tokens)[:, None, None] * torch.linspace(0.1, 1.0, d_head // 2)
    cos, sin = angle.cos(), angle.sin()
    exact, exact_gains = x.double().requires_grad_(), [w.double().requires_grad_() for w in gains]
    parts = exact.unflatten(1, (-1, d_head)).split([n_heads, n_kv, n_kv], 1)

    def rotated(y, weight):
        a, b = F.rms_norm(y, (d_head,), weight, EPS).chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    right = (rotated(parts[0], exact_gains[0]), rotated(parts[1], exact_gains[1]), parts[2])
    found = call("heads", x, gains, EPS, cos, sin, n_heads, n_kv)
    for a, b, what in zip(found, right, ("queries", "keys", "values")):
        assert a.dtype == dtype
        assert_near(a, b.detach(), what)
    grads = [numbers(*y.shape, dtype=dtype, seed=3 + i) for i, y in enumerate(right)]
    objective = sum((y * g.double()).sum() for y, g in zip(right, grads))
    expected = torch.autograd.grad(objective, (exact, *exact_gains))
    for a, b, what in zip(call("heads_backward", *grads, x, gains, cos, sin, found[3]), expected, ("input", "q", "k")):
        assert_near(a, b, f"gradient of {what}")


@pytest.mark.parametrize("width", [6, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_and_its_gradient_are_those_of_float64(call, width, dtype):
    x, d_out = 3 * numbers(5, 2 * width), numbers(5, width, dtype=dtype, seed=1)
    x = x.to(dtype)
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, 1)
    right = F.silu(gate) * up
    (out,) = call("swiglu", x)
    assert_near(out, right.detach(), "output")
    (d_x,) = call("swiglu_backward", d_out, x)
    assert_near(d_x, torch.autograd.grad(right, exact, d_out.double())[0], "gradient")


def test_no_rows_give_no_rows(call):
    empty = numbers(0, 64)
    assert [x.shape[0] for x in call("add_rms_norm", empty, empty, numbers(64), EPS, torch.float32)] == [0, 0, 0]
    d_x, d_branch, d_weight = call("add_rms_norm_backward", None, empty, empty, numbers(64), numbers(0), torch.float32)
    assert d_x.shape == d_branch.shape == (0, 64)
    assert torch.equal(d_weight, torch.zeros(64))
    gains, angles = (numbers(8), numbers(8)), numbers(0, 1, 4)
    q, k, v, scale = call("heads", numbers(0, 32), gains, EPS, angles, angles, 2, 1)
    assert (q.shape, k.shape, v.shape) == ((0, 2, 8), (0, 1, 8), (0, 1, 8))
    assert call("heads_backward", q, k, v, numbers(0, 32), gains, angles, angles, scale)[0].shape == (0, 32)
    assert call("swiglu", numbers(0, 8))[0].shape == (0, 4)
    assert call("swiglu_backward", numbers(0, 4), numbers(0, 8))[0].shape == (0, 8)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu has whole models")
@pytest.mark.parametrize("kind", ["dense", "dlcm"])
def test_a_model_of_these_functions_has_the_loss_and_gradients_of_float64(kind):
    shape = {"vocab_size": 40, "d_token": 16, "n_heads_token": 4, "n_kv_heads_token": 2, "d_head": 4, "d_ff_token": 24}
    shape |= {"kind": kind, "n_encoder_layers": 2}
    if kind == "dlcm":
        shape |= {"d_concept": 24, "n_heads_concept": 6, "n_concept_layers": 1, "n_decoder_layers": 1}
        shape |= {"d_ff_concept": 32, "boundary": BoundaryConfig(compression_ratio=3.0)}
    model = build_model(ModelConfig.model_validate(shape))
    torch.nn.init.normal_(model.unembedding.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 40, (38,), generator=torch.Generator().manual_seed(2))
    cu, boundaries = torch.tensor([0, 25, 37]), torch.arange(37) % 5 == 0
    interpreter = Interpreter()
    try:
        problem = {"model": model, "tokens": tokens, "cu_seqlens": cu, "boundaries": boundaries}
        loss, *gradients = interpreter.solve(problem)
    finally:
        interpreter.close()
    model.double()
    right = model(tokens[:-1], cu_seqlens=cu, boundaries=boundaries, targets=tokens[1:]).loss_sum
    torch.testing.assert_close(loss.double(), right.detach(), rtol=1e-6, atol=0)
    for (name, _), a, b in zip(trained(model), gradients, torch.autograd.grad(right, [p for _, p in trained(model)])):
        assert (a.double() - b).norm() <= 2e-5 * b.norm() + 1e-8, name


@pytest.mark.parametrize("d_head", [64, 96])
def test_kernels_compile_for_a_hopper_gpu(d_head, tmp_path, monkeypatch):
    # No GPU is needed to compile, and the interpreter checks no types.
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from dlcm.backends import cross_entropy_triton, fused_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    half, rows = fused_triton._half(d_head)
    constants = {"WIDTH": 1088, "BLOCK_W": 2048, "ROWS": 1, "ADDS": True, "COPIES": True, "BLOCK": 1024, "GRAD": True}
    of_sums = {"R": 6, "WIDTH": 1088, "BLOCK_W": fused_triton._SUM_WIDTH, "ROWS": fused_triton._SUM_ROWS}
    of_heads = {"H": 4, "G": 2, "HALF": d_head // 2, "BLOCK_A": half, "ROWS": rows}
    wide = {"x", "total", "weight", "scale", "d_total", "d_x", "d_weight", "weight_q", "weight_k", "cos", "sin", "nats"}
    kernels = {name: getattr(fused_triton, name) for name in dir(fused_triton) if name.endswith("_kernel")}
    kernels["softmax_delta_kernel"] = cross_entropy_triton.softmax_delta_kernel
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        given = constants | (of_heads if name.startswith("heads") else of_sums if name == "sums_kernel" else {})
        given = {key: value for key, value in given.items() if key in kernel.arg_names}
        narrow = {"x", "d_x"} if name.startswith(("heads", "swiglu")) else set()
        types = {key: "*fp32" if key in wide - narrow else "*bf16" for key in kernel.arg_names}
        types |= {"eps": "fp32", "targets": "*i64"} | (
            {"parts": "*fp32", "out": "*fp32"} if name == "sums_kernel" else {}
        )
        types |= dict.fromkeys(("n_rows", "n_tokens", "vocab_size", "n_programs", "n_first"), "i32")
        types |= dict.fromkeys(given, "constexpr")
        source = ASTSource(
            kernel,
            {key: types[key] for key in kernel.arg_names},
            {(kernel.arg_names.index(key),): value for key, value in given.items()},
        )
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert "st.local" not in compiled.asm["ptx"], f"{name} spills registers"
