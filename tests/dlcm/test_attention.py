import inspect
import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from dlcm import attention
from dlcm.attention import resolve, self_attention
from dlcm.backends import causal_cpu, flex, ops, rows, staircase_cpu, varlen
from dlcm.concepts import Packing, segment
from dlcm.errors import UserError
from dlcm.loss import next_token_loss
from tests.dlcm.conftest import awake, random_tokens, small_config

# On a CPU, FlexAttention says that it materializes all scores; here they are few.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")

PACKINGS = [[7], [5, 5, 5], [1, 9, 0, 4, 16, 3]]
# With blocks of four tokens: ends of documents and of blocks fall together, miss each other, and all documents are short.
BLOCK_PACKINGS = [[8, 4, 12, 16], [7, 1, 21, 0, 5], [3, 2, 4, 1]]
SELF_BACKENDS = ["reference", "sdpa", "staircase"]
TRAINING_BACKENDS = ["reference", "sdpa", "replicated", "staircase"]
BACKENDS = [*TRAINING_BACKENDS, "flex"]
FORMS = list(itertools.product([False, True], [False, True]))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(staircase_cpu, "BLOCK", 4)
    monkeypatch.setattr(rows, "ALONE", 4)


def make_case(lengths, seed=0, n_heads=4, n_kv=2, d_head=8, dtype=torch.float64, rate=0.4, every=None, pad=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    packing = Packing.from_lengths(torch.tensor(lengths))
    flags = torch.rand(n, generator=g) < rate if every is None else packing.position_T % every == 0
    segments = segment(flags | packing.is_first_T, packing, (lambda m: m + pad) if pad else None)

    def draw(n_rows, heads):
        return torch.randn(n_rows, heads, d_head, generator=g, dtype=dtype).requires_grad_()

    k = segments.lengths_K.numel()
    return packing, segments, draw(n, n_heads), draw(n, n_kv), draw(n, n_kv), draw(k + 1, n_kv), draw(k + 1, n_kv)


def cross_attention(q, k, v, segments, *, own_segment, **options):
    """With the null concept as row 0 of keys and values, as the loops have it."""
    null = None if own_segment else v[0]
    return attention.cross_attention(q, k[1:], v[1:], null, segments, own_segment=own_segment, **options)


def loop_self(q, k, v, lengths):
    out, start, group = torch.zeros_like(q), 0, q.shape[1] // k.shape[1]
    for length in lengths:
        for t in range(start, start + length):
            for h in range(q.shape[1]):
                scores = k[start : t + 1, h // group] @ q[t, h] / math.sqrt(q.shape[2])
                out[t, h] = scores.softmax(0) @ v[start : t + 1, h // group]
        start += length
    return out


def loop_cross(q, k, v, segments, own_segment, log_length):
    """Attention over *replicated* concepts: every visible earlier token puts down one copy of its concept (eq 17)."""
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    starts = segments.tokens.cu_seqlens_S1
    for t in range(q.shape[0]):
        first = int(starts[segments.tokens.sequence_T[t]])
        mine = int(segments.segment_T[t])
        copies = [
            int(segments.segment_T[s]) + 1
            for s in range(first, t + 1)
            if own_segment or int(segments.segment_T[s]) < mine
        ]
        seen = copies if log_length else sorted(set(copies))
        seen = seen or [0]
        for h in range(q.shape[1]):
            scores = k[seen, h // group] @ q[t, h] / math.sqrt(q.shape[2])
            out[t, h] = scores.softmax(0) @ v[seen, h // group]
    return out


def with_gradients(compute, leaves):
    """The output, and its gradients for the same odd direction."""
    out = compute()
    direction = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad(out, leaves, direction, materialize_grads=True)


def assert_same(results, expected, bound=1e-12):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, atol=bound, rtol=bound)


@pytest.mark.parametrize("backend", SELF_BACKENDS)
@pytest.mark.parametrize("lengths", PACKINGS)
def test_self_attention_and_its_gradients_equal_a_loop_over_positions(backend, lengths):
    packing, _, *leaves, _, _ = make_case(lengths)
    expected = with_gradients(lambda: loop_self(*leaves, lengths), leaves)
    assert_same(with_gradients(lambda: self_attention(*leaves, packing, backend), leaves), expected)


@pytest.mark.many
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("own_segment", "log_length"), FORMS)
@pytest.mark.parametrize("lengths", PACKINGS)
def test_cross_attention_equals_a_loop_over_replicated_concepts(backend, own_segment, log_length, lengths):
    _, segments, q, _, _, k, v = make_case(lengths, seed=1)
    with torch.no_grad():
        out = cross_attention(q, k, v, segments, own_segment=own_segment, log_length=log_length, backend=backend)
        torch.testing.assert_close(out, loop_cross(q, k, v, segments, own_segment, log_length), atol=1e-12, rtol=0)


@pytest.mark.many
@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@pytest.mark.parametrize(("own_segment", "log_length"), FORMS)
def test_gradients_of_cross_attention_equal_those_of_the_loop(backend, own_segment, log_length):
    _, segments, q, _, _, k, v = make_case(PACKINGS[2], seed=1)
    options = {"own_segment": own_segment, "log_length": log_length}
    expected = with_gradients(lambda: loop_cross(q, k, v, segments, own_segment, log_length), (q, k, v))
    found = with_gradients(lambda: cross_attention(q, k, v, segments, **options, backend=backend), (q, k, v))
    assert_same(found, expected)


@pytest.mark.many
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("every", [None, 1, 4, 100])
@pytest.mark.parametrize("lengths", [*PACKINGS, *BLOCK_PACKINGS])
def test_backends_agree_in_output_and_in_every_gradient(small_blocks, lengths, every, pad, heads):
    """Over ends of documents, blocks and segments that fall together or not, padded concepts, and grouped heads."""
    case = {"seed": 2, "n_heads": heads[0], "n_kv": heads[1], "every": every, "pad": pad}
    packing, segments, q, k, v, kc, vc = make_case(lengths, **case)
    expected = with_gradients(lambda: self_attention(q, k, v, packing, "reference"), (q, k, v))
    for backend in SELF_BACKENDS[1:]:
        assert_same(with_gradients(lambda b=backend: self_attention(q, k, v, packing, b), (q, k, v)), expected)
    for own_segment, log_length in FORMS:
        options = {"own_segment": own_segment, "log_length": log_length}

        def compute(backend, options=options):
            return cross_attention(q, kc, vc, segments, **options, backend=backend)

        expected = with_gradients(lambda: compute("reference"), (q, kc, vc))
        for backend in TRAINING_BACKENDS[1:]:
            assert_same(with_gradients(lambda b=backend: compute(b), (q, kc, vc)), expected)
        if every is None and pad:
            with torch.no_grad():
                assert_same([compute("flex")], expected[:1])


@pytest.mark.parametrize(("own_segment", "log_length"), FORMS)
def test_documents_longer_than_a_block_agree_at_the_block_size_in_use(own_segment, log_length):
    lengths = [2 * staircase_cpu.BLOCK + 31, 3, staircase_cpu.BLOCK, 40]
    _, segments, q, _, _, k, v = make_case(lengths, seed=5, rate=0.2)
    options = {"own_segment": own_segment, "log_length": log_length}
    results = [
        with_gradients(lambda b=backend: cross_attention(q, k, v, segments, **options, backend=b), (q, k, v))
        for backend in TRAINING_BACKENDS
    ]
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.many
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[0], [0, 0], [1], [0, 1, 0]])
@pytest.mark.parametrize("own_segment", [False, True])
def test_empty_and_single_token_documents_work(backend, lengths, own_segment):
    packing, segments, q, k, v, kc, vc = make_case(lengths, seed=1)
    with torch.set_grad_enabled(backend != "flex"):
        out = cross_attention(q, kc, vc, segments, own_segment=own_segment, log_length=True, backend=backend)
        assert self_attention(q, k, v, packing, backend).shape == out.shape == q.shape
        expected = loop_cross(q, kc, vc, segments, own_segment, True)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        if backend != "flex":
            out.sum().backward()
            assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in (q, kc, vc))


def test_padding_has_no_weight_even_where_its_scores_would_overflow():
    """Padding repeats the first query of its sequence, whose own score may be far below those of later keys."""
    packing = Packing.from_lengths(torch.tensor([3, 2]))
    q, k, v = (torch.ones(5, 1, 2, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        k[0], k[3] = -3000.0, -3000.0
        k[1:3], k[4] = 3000.0, 3000.0
    for gradient in torch.autograd.grad(self_attention(q, k, v, packing, "staircase").sum(), (q, k, v)):
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("backend", ["sdpa", "replicated", "staircase"])
@pytest.mark.parametrize("own_segment", [False, True])
@pytest.mark.parametrize("log_length", [False, True])
def test_in_bf16_cross_attention_is_within_twice_the_error_of_eager_bf16(
    small_blocks, backend, own_segment, log_length
):
    _, segments, q, _, _, k, v = make_case([40, 24, 64], seed=3, rate=0.1)
    options = {"own_segment": own_segment, "log_length": log_length}
    exact = with_gradients(lambda: cross_attention(q, k, v, segments, **options, backend="reference"), (q, k, v))
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    errors = {}
    for name in ("reference", backend):
        found = with_gradients(lambda b=name: cross_attention(*low, segments, **options, backend=b), low)
        errors[name] = [float((a.double() - b).detach().norm()) for a, b in zip(found, exact, strict=True)]
    assert all(a <= 2 * b for a, b in zip(errors[backend], errors["reference"], strict=True)), errors


@pytest.mark.parametrize("backend", SELF_BACKENDS[1:])
def test_in_bf16_self_attention_is_within_twice_the_error_of_eager_bf16(backend):
    packing, _, *leaves, _, _ = make_case([40, 24, 64], seed=3)
    exact = with_gradients(lambda: self_attention(*leaves, packing, "reference"), leaves)
    low = [x.detach().bfloat16().requires_grad_() for x in leaves]
    errors = {}
    for name in ("reference", backend):
        found = with_gradients(lambda b=name: self_attention(*low, packing, b), low)
        errors[name] = [float((a.double() - b).detach().norm()) for a, b in zip(found, exact, strict=True)]
    assert all(a <= 2 * b for a, b in zip(errors[backend], errors["reference"], strict=True)), errors


@pytest.mark.many
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own_segment", [False, True])
def test_the_log_length_bias_matters_in_every_backend(backend, own_segment):
    _, segments, q, _, _, k, v = make_case([30], seed=4)
    with torch.no_grad():
        biased, plain = (
            cross_attention(q, k, v, segments, own_segment=own_segment, log_length=flag, backend=backend)
            for flag in (True, False)
        )
    assert (biased - plain).abs().max() > 0.1


@pytest.mark.many
@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_model_has_the_same_loss_and_gradients_with_every_backend(backend, pooling):
    tokens, cu = random_tokens(30, 1), torch.tensor([0, 11, 12, 30])
    losses, gradients = [], []
    for name in ("reference", backend):
        model = awake(small_config(pooling=pooling, attention_backend=name))
        loss = next_token_loss(model(tokens, cu_seqlens=cu).logits, tokens.roll(-1))
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))
    assert_same(losses[:1], losses[1:])
    assert_same(gradients[0], gradients[1], 1e-11)


# --- flex ---


@pytest.mark.parametrize("own_segment", [False, True])
@pytest.mark.parametrize(
    ("lengths", "rate", "pad"),
    [
        ([700, 600], 0.3, 0),
        ([128, 256, 128], 0.5, 0),
        ([1000], 1.0, 24),
        ([5] * 70 + [400], 0.6, 0),
        ([1] * 300, 0.0, 0),
    ],
)
def test_the_block_mask_covers_what_create_block_mask_finds(lengths, rate, pad, own_segment):
    packing, segments, *_ = make_case(lengths, rate=rate, pad=pad, d_head=2)
    ours = flex.block_mask(segments, own_segment)
    sizes = packing.n_total, segments.lengths_K.numel()
    torchs = torch_flex.create_block_mask(flex.mask_mod(segments, own_segment), None, None, *sizes, device="cpu")
    assert ours.shape == torchs.shape
    assert bool((ours.to_dense() >= torchs.to_dense()).all())
    found, known = (dense_blocks(m.full_kv_num_blocks, m.full_kv_indices) for m in (ours, torchs))
    assert torch.equal(found, known)
    # Rows and columns tell the same blocks: the backward pass walks over the columns.
    transposed = dense_blocks(ours.q_num_blocks, ours.q_indices).transpose(-1, -2)
    assert torch.equal(transposed, dense_blocks(ours.kv_num_blocks, ours.kv_indices))
    if min(lengths) > 1:
        # Beyond what is seen there are only blocks that a gap between documents falls into, here none.
        assert torch.equal(ours.to_dense(), torchs.to_dense())


def dense_blocks(counts, indices):
    rank = torch.arange(indices.shape[-1])
    return torch.zeros_like(indices).scatter(-1, indices.long(), (rank < counts[..., None]).to(indices.dtype))


@pytest.mark.many
@pytest.mark.parametrize(("own_segment", "log_length"), FORMS)
def test_gradients_through_flex_are_right_where_its_refusal_on_a_cpu_is_lifted(monkeypatch, own_segment, log_length):
    """Torch refuses the backward pass on a CPU though its dense formulas are there: they see our block mask and bias."""
    _, segments, q, _, _, k, v = make_case([150, 5, 20], seed=6)
    where = segments, own_segment, log_length
    seen_T = torch.ones(175, dtype=torch.bool) if own_segment else segments.ordinal_T > 0
    if not hasattr(torch_flex, "_validate_device"):
        pytest.skip("this torch refuses in another way")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    mask, bias = flex._kept(segments, own_segment, log_length, q.dtype)

    def by_flex():
        heads = [x.transpose(0, 1)[None] for x in (q, k[1:], v[1:])]
        out = torch_flex.flex_attention(*heads, score_mod=bias, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)[seen_T]

    def by_reference():
        return attention.reference.cross_attention(q, k[1:], v[1:], *where)[seen_T]

    assert_same(with_gradients(by_flex, (q, k, v)), with_gradients(by_reference, (q, k, v)))


def test_training_through_flex_on_a_cpu_is_refused_with_a_way_out():
    _, segments, q, _, _, k, v = make_case([9])
    with pytest.raises(UserError, match="set attention_backend: auto"):
        cross_attention(q, k, v, segments, own_segment=False, log_length=True, backend="flex")


# --- choice of kernels ---


def test_auto_is_the_staircase_on_a_cpu_and_in_half_precision_on_a_gpu(monkeypatch):
    assert resolve("auto", torch.empty(0)) == "staircase"
    elsewhere = torch.empty(0, device="meta")
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    assert resolve("auto", elsewhere) == "sdpa"
    assert resolve("auto", elsewhere.bfloat16()) == "staircase"
    monkeypatch.setattr(attention, "has_triton", lambda: False)
    assert resolve("auto", elsewhere.bfloat16()) == "sdpa"
    with pytest.raises(UserError, match="pip install triton"):
        resolve("staircase", elsewhere)


def half_case(n_heads=4, n_kv=2, lengths=(5, 0, 9)):
    return make_case(list(lengths), n_heads=n_heads, n_kv=n_kv, dtype=torch.bfloat16)


class FakeVarlen:
    """A varlen function with a given signature: reads sequences off its own arguments and computes by loops in float64."""

    def __init__(self, names: str) -> None:
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names.split()]
        )

    def __call__(self, *given, **named):
        arguments = self.__signature__.bind(*given, **named).arguments
        lengths = (arguments.get("cu_seq_q", arguments.get("cu_seqlens_q"))).diff()
        assert lengths.dtype == torch.int32
        assert max(lengths.tolist()) == arguments.get("max_q", arguments.get("max_seqlen_q"))
        assert arguments.get("window_size") == (-1, 0) or arguments.get("causal") is True
        q, k, v = itertools.islice(arguments.values(), 3)
        assert arguments.get("enable_gqa") is not False or q.shape[1] == k.shape[1]
        scale = arguments.get("scale", arguments.get("softmax_scale")) or q.shape[-1] ** -0.5
        return loop_self(q.double() * scale * math.sqrt(q.shape[-1]), k.double(), v.double(), lengths.tolist())


TORCH_2_11 = "query key value cu_seq_q cu_seq_k max_q max_k return_aux scale window_size"
FLASH = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal"


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("names", [TORCH_2_11, f"{TORCH_2_11} enable_gqa", FLASH], ids=["2.11", "2.13", "flash-attn"])
def test_varlen_calls_say_which_sequences_there_are_and_that_they_are_causal(monkeypatch, names, scale):
    packing, _, q, k, v, *_ = half_case()
    fake = FakeVarlen(names)
    monkeypatch.setattr(varlen, "_torch_varlen", lambda: fake)
    monkeypatch.setattr(varlen, "_takes_groups", lambda: "enable_gqa" in names)
    monkeypatch.setattr(varlen, "find_spec", lambda _: True if names == FLASH else None)
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = fake
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    out = varlen.self_attention(q, k, v, packing, scale)
    factor = 1.0 if scale is None else scale * math.sqrt(q.shape[-1])
    expected = loop_self(q.double() * factor, k.double(), v.double(), [5, 0, 9])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-2 if scale else 1e-6)


def test_torchs_varlen_function_has_the_arguments_that_are_passed():
    parameters = inspect.signature(varlen._torch_varlen()).parameters
    names = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert list(parameters)[:7] == names
    assert {"scale", "window_size"} <= parameters.keys()


@pytest.mark.parametrize("n_kv", [4, 2])
def test_the_flash_operators_take_what_is_passed_and_give_the_shapes_of_the_inputs(n_kv):
    """On the meta device: what the operators check of their arguments, without a GPU."""
    packing, _, q, k, v, *_ = half_case(n_kv=n_kv)
    q, k, v = (x.detach().to("meta") for x in (q, k, v))
    packing.__dict__["_varlen"] = packing.cu_seqlens_S1.int().to("meta"), 9, False
    out, lse = varlen.forward(q, k, v, packing)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:2], torch.float32)
    gradients = varlen.backward(out, q, k, v, out, lse, packing)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def test_flash_refuses_what_its_kernels_do_not_take_with_a_way_out():
    packing, _, q, k, v, *_ = make_case([4])
    with pytest.raises(UserError, match="set train.precision: bf16"):
        varlen.self_attention(q, k, v, packing)
    narrow = [x.detach().bfloat16()[..., :6] for x in (q, k, v)]
    with pytest.raises(UserError, match="change d_head"):
        varlen.self_attention(*narrow, packing)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [causal_cpu, staircase_cpu], ids=["self", "cross"])
def test_operators_for_the_compiler_pass_the_checks_of_torch(pair):
    """Schema, shapes without data, autograd registration, and tracing: torch.library's own suite."""
    packing, segments, q, k, v, kc, vc = make_case([5, 9, 3], pad=4)
    if pair is causal_cpu:
        torch.library.opcheck(ops.self_attention, (q, k, v, packing.cu_seqlens_S1))
        return
    where = packing.cu_seqlens_S1, segments.concepts.cu_seqlens_S1, segments.segment_T, segments.lengths_K
    torch.library.opcheck(ops.cross_attention, (q, kc[1:], vc[1:], *where, False, True))
