"""The staircase kernels against the dense reference in float64; the same tests run on a GPU or under the interpreter."""

import math
from itertools import product

import pytest
import torch

from dlcm.attention import cross_attention as attend
from dlcm.backends import reference
from dlcm.concepts import Packing, Segments, segment
from dlcm.errors import UserError
from tests.dlcm.triton_worker import SMALL, Interpreter, solve

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Several tiles of 32 in one document, tiles with many documents, empty documents, and documents of one token.
LENGTHS = [1, 5, 0, 70, 1, 0, 16]
OPTIONS = list(product([False, True], [False, True]))
NAMES = ("output", "query gradient", "key gradient", "value gradient")


@pytest.fixture(scope="module")
def run():
    """Solve a problem of `make` with the kernels: output, log-sum-exp, gradients."""
    interpreter = Interpreter() if DEVICE == "cpu" else None

    def solve_one(case, own_segment, log_length, tiles=SMALL, n_splits=1, dtype=torch.float32, backward=True):
        segments, *qkv, d_out = case
        problem = {
            "segments": segments,
            "own_segment": own_segment,
            "log_length": log_length,
            "qkv": [x.detach().to(dtype) for x in qkv],
            "d_out": d_out.to(dtype) if backward else None,
            "tiles": tiles,
            "n_splits": n_splits,
        }
        return solve(problem) if interpreter is None else interpreter.solve(problem)

    yield solve_one
    if interpreter is not None:
        interpreter.close()


def cut(lengths, rate=0.35, n_padding=0, seed=0) -> Segments:
    packing = Packing.from_lengths(torch.tensor(lengths, dtype=torch.int64, device=DEVICE))
    draws = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    flags = (draws.to(DEVICE) < rate) | packing.is_first_T
    return segment(flags, packing, lambda n: n + n_padding)


def fill(segments, n_heads=1, n_kv=1, d_head=16, seed=0):
    """Queries, keys, values and a gradient of the output in float64."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens, n_concepts = segments.segment_T.numel(), segments.lengths_K.numel()
    shapes = [(n_tokens, n_heads), (n_concepts, n_kv), (n_concepts, n_kv), (n_tokens, n_heads)]
    q, k, v, d_out = (torch.randn(*s, d_head, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes)
    return segments, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


def make(lengths=LENGTHS, rate=0.35, n_padding=0, **shape):
    return fill(cut(lengths, rate, n_padding), **shape)


def exact(case, own_segment, log_length, dtype=torch.float64):
    segments, *qkv, d_out = case
    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out = reference.cross_attention(*qkv, segments, own_segment, log_length)
    return out.detach(), *torch.autograd.grad(out, qkv, d_out.to(dtype))


def assert_exact(found, case, own_segment, log_length):
    out, _, *grads = found
    for name, a, b in zip(NAMES, (out, *grads), exact(case, own_segment, log_length)):
        # Where a row sees one concept its gradient is exactly zero, so a floor stands beside the relative bound.
        bound = 1e-5 if name == "output" else 1e-5 * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        assert a.dtype == torch.float32
        assert torch.isfinite(a).all(), name
        torch.testing.assert_close(a.double(), b, atol=bound, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        if b.norm() > 1.0:
            assert (a - b).norm() <= 1e-5 * b.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(("own_segment", "log_length"), OPTIONS)
def test_kernels_equal_the_reference_on_packed_documents_with_padding(run, own_segment, log_length):
    case = make(n_padding=9)
    assert_exact(run(case, own_segment, log_length), case, own_segment, log_length)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "own_segment"), [([50], True), ([64, 32], False), ([1], False), ([1, 1, 1], True), ([0, 2, 0], True)]
)
def test_kernels_equal_the_reference_on_every_packing(run, lengths, own_segment):
    case = make(lengths)
    assert_exact(run(case, own_segment, True), case, own_segment, True)


@pytest.mark.many
@pytest.mark.parametrize("rate", [0.0, 1.0], ids=["one segment", "all boundaries"])
@pytest.mark.parametrize("own_segment", [False, True])
def test_kernels_equal_the_reference_at_both_ends_of_compression(run, rate, own_segment):
    case = make([50, 20], rate)
    assert_exact(run(case, own_segment, True), case, own_segment, True)


@pytest.mark.slow
@pytest.mark.parametrize(("n_splits", "own_segment"), [(1, True), (3, False)])
def test_kernels_equal_the_reference_with_grouped_heads_and_partial_sums(run, n_splits, own_segment):
    case = make([45, 8], n_heads=4, n_kv=2)
    assert_exact(run(case, own_segment, True, n_splits=n_splits), case, own_segment, True)


@pytest.mark.many
@pytest.mark.parametrize(("tiles", "lengths"), [((16, 32, 4, 2), [80]), ((32, 16, 4, 2), [20, 75])])
@pytest.mark.parametrize("own_segment", [False, True])
def test_tiles_that_every_row_sees_whole_equal_the_reference(run, tiles, lengths, own_segment):
    case = make(lengths, rate=0.6)
    assert_exact(run(case, own_segment, True, tiles=tiles), case, own_segment, True)


def test_a_tile_with_an_open_segment_in_it_is_not_taken_for_whole(run):
    # A segment of six tokens, the last of a key tile, lies astride the beginning of a query tile: all of its rows see it, but
    # not with one bias.
    flags = torch.zeros(64, dtype=torch.bool, device=DEVICE)
    flags[[*range(0, 31, 2), *range(36, 64, 3)]] = True
    case = fill(segment(flags, Packing.from_lengths(torch.tensor([64], device=DEVICE))))
    assert_exact(run(case, True, True, tiles=(32, 16, 4, 2)), case, True, True)


@pytest.mark.parametrize(
    "d_head", [2, 24, 80, *(pytest.param(d, marks=pytest.mark.slow) for d in (32, 48, 64, 96, 128, 200, 256))]
)
def test_kernels_equal_the_reference_at_every_head_width(run, d_head):
    case = make([33, 7], d_head=d_head)
    assert_exact(run(case, False, True), case, False, True)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LENGTHS, [40, 0, 61, 1]])
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("n_padding", [0, 40])
def test_kernels_equal_the_reference_on_the_whole_grid(run, lengths, rate, n_padding):
    case = make(lengths, rate, n_padding, n_heads=2, d_head=24)
    for own_segment, log_length in OPTIONS:
        found = run(case, own_segment, log_length, tiles=(32, 16, 4, 2), n_splits=2)
        assert_exact(found, case, own_segment, log_length)


@pytest.mark.parametrize(
    ("dtype", "own_segment"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_half_precision_errs_at_most_twice_as_much_as_the_eager_reference(run, dtype, own_segment):
    case = make([80, 20], d_head=32)
    # Rounded once beforehand, so that both err by their arithmetic alone.
    case = (case[0], *(x.detach().to(dtype).double().requires_grad_(x.requires_grad) for x in case[1:]))
    truth = exact(case, own_segment, True)
    out, _, *grads = run(case, own_segment, True, dtype=dtype)
    eager = exact(case, own_segment, True, dtype)
    for name, a, b, c in zip(NAMES, (out, *grads), eager, truth):
        assert a.dtype == dtype
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm(), name


@pytest.mark.parametrize(("own_segment", "log_length"), OPTIONS)
def test_the_log_sum_exp_is_that_of_the_visible_scores_and_zero_without_any(run, own_segment, log_length):
    case = make([40, 9])
    segments, q, k, _, _ = case
    lse_TH = run(case, own_segment, log_length, backward=False)[1].double()
    lo_T, hi_T = segments.visible(own_segment)
    for t in range(q.shape[0]):
        keys = range(int(lo_T[t]), int(hi_T[t]))
        mine = int(segments.segment_T[t])
        copies = [int(segments.offset_T[t]) + 1 if n == mine else int(segments.lengths_K[n]) for n in keys]
        for h in range(q.shape[1]):
            scores = [
                (q[t, h] @ k[n, 0]).item() / math.sqrt(q.shape[2]) + log_length * math.log(c)
                for n, c in zip(keys, copies)
            ]
            expected = math.log(sum(map(math.exp, scores))) if scores else 0.0
            assert abs(lse_TH[t, h].item() - expected) < 2e-6


def test_rows_that_see_nothing_give_zero_and_take_no_gradient(run):
    case = make()
    out, lse, d_q, *_ = run(case, False, True)
    blind = case[0].ordinal_T == 0
    assert blind.sum() > 5
    for found in (out, lse, d_q):
        assert torch.equal(found[blind], torch.zeros_like(found[blind]))
    d_out = case[4].masked_fill(blind[:, None, None], 1e4)
    for a, b in zip(run((*case[:4], d_out), False, True)[3:], run(case, False, True)[3:]):
        assert torch.equal(a, b)


def test_two_runs_are_equal_bit_by_bit(run):
    case = make([40, 9], n_heads=2)
    for a, b in zip(run(case, False, True, n_splits=2), run(case, False, True, n_splits=2)):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("own_segment", [False, True])
def test_editing_a_document_and_its_boundaries_leaves_all_others_equal_bit_by_bit(run, own_segment):
    lengths, edited = [40, 25, 50], 1
    packing = Packing.from_lengths(torch.tensor(lengths, device=DEVICE))
    other_T = packing.sequence_T != edited
    rates, results = (0.2, 0.7), []
    before, after = (cut(lengths, rate, seed=3) for rate in rates)
    flags_T = torch.where(other_T, *(s.offset_T == 0 for s in (before, after)))
    after = segment(flags_T, packing)
    assert after.n_concepts != before.n_concepts
    base = fill(before)
    content = fill(after, seed=9)
    other_K, other_K_after = (s.concepts.sequence_T != edited for s in (before, after))
    for x, y, here, there in zip(
        base[1:], content[1:], (other_T, other_K, other_K, other_T), (other_T, other_K_after, other_K_after, other_T)
    ):
        y.data[there] = x.data[here]
    results = [run(case, own_segment, True, n_splits=2) for case in (base, content)]
    for a, b, by_token in zip(*results, (True, True, True, False, False)):
        assert torch.equal(a[other_T if by_token else other_K], b[other_T if by_token else other_K_after])
    assert not torch.equal(results[0][0], results[1][0])


def test_a_packed_document_equals_the_document_alone_bit_by_bit(run):
    packed = make([21, 60, 14])
    segments, q, k, v, d_out = packed
    token, concept = (p.sequence_T == 1 for p in (segments.tokens, segments.concepts))
    flags = (segments.offset_T == 0)[token]
    alone = segment(flags, Packing.from_lengths(torch.tensor([60], device=DEVICE)))
    found = run((alone, q[token], k[concept], v[concept], d_out[token]), False, True)
    for a, b, rows in zip(found, run(packed, False, True), (token, token, token, concept, concept)):
        assert torch.equal(a, b[rows])


@pytest.mark.slow
@pytest.mark.parametrize("n_padding", [0, 40])
def test_nothing_above_the_stairs_is_read(run, n_padding):
    case = make([40, 30, 26], n_padding=n_padding)
    segments, q, k, v, d_out = case
    lo_T, hi_T = segments.visible(False)
    index_K = torch.arange(k.shape[0], device=DEVICE)
    unseen_K = ~((index_K[:, None] >= lo_T) & (index_K[:, None] < hi_T)).any(1)
    assert unseen_K.sum() == 3 + n_padding
    poison = (x.detach().masked_fill(unseen_K[:, None, None], math.nan) for x in (k, v))
    for a, b in zip(run((segments, q, *poison, d_out), False, True)[:3], run(case, False, True)[:3]):
        assert torch.equal(a, b)


def test_no_tokens_and_no_concepts_give_empty_results(run):
    case = make([0, 0])
    out, lse, *grads = run(case, False, True)
    assert out.shape == (0, 1, 16)
    assert lse.shape == (0, 1)
    assert [g.shape[0] for g in grads] == [0, 0, 0]


@pytest.mark.slow
def test_the_layout_inverts_who_sees_whom():
    from dlcm.backends.staircase_triton import make_layout

    for own_segment, rate in product([False, True], [0.0, 0.3, 1.0]):
        segments = cut(LENGTHS, rate, n_padding=4)
        layout = make_layout(segments, own_segment, False)
        for n in range(segments.lengths_K.numel()):
            seeing = [t for t in range(sum(LENGTHS)) if layout.lo_T[t] <= n < layout.hi_T[t]]
            assert seeing == list(range(int(layout.first_K[n]), int(layout.end_K[n])))
        assert make_layout(segments, own_segment, False) is layout


def test_tiles_are_chosen_once_for_each_order_of_magnitude_of_tokens(monkeypatch):
    from dlcm.backends import staircase_tiles

    measured = []
    monkeypatch.setattr(staircase_tiles, "_chosen", {})
    monkeypatch.setattr(staircase_tiles, "_fixed", {})
    monkeypatch.setattr(staircase_tiles, "_fastest", lambda found, launch: measured.append(found) or found[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class Queries:
        is_cuda, device, dtype = True, torch.device("cuda", 0), torch.bfloat16

        def __init__(self, n_tokens):
            self.shape = (n_tokens, 8, 96)

    def choose(n_tokens):
        return staircase_tiles.choose("forward", Queries(n_tokens), 2, lambda tiles: None)

    candidates = staircase_tiles.candidates("forward", 96, torch.bfloat16)
    assert {choose(n) for n in (4000, 4096, 5000)} == {candidates[-1]}
    assert len(measured) == 1
    choose(9000)
    assert len(measured) == 2
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(4096) == candidates[0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_keys_are_split_only_where_their_blocks_leave_a_gpu_idle(monkeypatch):
    from dlcm.backends import staircase_tiles

    monkeypatch.setattr(staircase_tiles, "_fixed_splits", [])
    assert staircase_tiles.choose_splits(16384, 32, 128) == 1
    assert staircase_tiles.choose_splits(2048, 8, 128) == 8
    assert staircase_tiles.choose_splits(8192, 8, 128) == 2
    assert all(
        1 <= staircase_tiles.choose_splits(n, g, b) <= 8 for n in (1, 100, 10**6) for g in (1, 32) for b in (16, 128)
    )


@pytest.mark.slow
@pytest.mark.parametrize("d_head", [64, 128])
def test_kernels_compile_for_a_hopper_gpu_with_its_matrix_instructions(d_head, tmp_path, monkeypatch):
    # No GPU is needed to compile, and the interpreter checks no types, layouts or shared memory.
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from dlcm.backends import staircase_kernels, staircase_kernels_backward, staircase_tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, module in (
        ("forward", staircase_kernels),
        ("query_grad", staircase_kernels_backward),
        ("key_grad", staircase_kernels_backward),
    ):
        kernel = getattr(module, f"{name}_kernel")
        tiles = staircase_tiles.candidates(name, d_head, torch.bfloat16)[0]
        constants = {"H": 8, "G": 4, "SPLITS": 1, "D_HEAD": d_head, "BLOCK_A": d_head, "PRECISION": "tf32"}
        constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "HAS_BIAS": True, "OWN_BIAS": False}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        types = dict.fromkeys(("lo", "hi", "first", "end"), "*i32") | dict.fromkeys(("n_tokens", "n_keys"), "i32")
        types |= dict.fromkeys(("bias", "lse", "row_terms"), "*fp32") | dict.fromkeys(constants, "constexpr")
        types["scale"] = "fp32"
        signature = {key: types.get(key, "*bf16") for key in kernel.arg_names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if signature[key][0] == "*"
        }
        source = ASTSource(
            kernel, signature, {(kernel.arg_names.index(key),): value for key, value in constants.items()}, aligned
        )
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= 227 * 1024
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        assert "cp.async" in compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_dtypes_are_refused_in_one_line(dtype):
    from dlcm.backends import staircase_triton

    segments, q, k, v, _ = make([8])
    q, k, v = (x.detach().to(dtype) for x in (q, k, v))
    with pytest.raises(UserError, match=r"bfloat16.*attention_backend"):
        staircase_triton.forward(q, k, v, segments, False, True)


def test_wide_heads_are_refused_in_one_line():
    from dlcm.backends import staircase_triton

    segments, q, k, v, _ = make([8], d_head=264)
    with pytest.raises(UserError, match=r"up to 256, got 264"):
        staircase_triton.forward(q.float(), k.float(), v.float(), segments, False, True)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_machine_without_gpu_is_told_so_in_one_line():
    from dlcm.backends import staircase_triton

    segments, q, k, v, _ = make([8])
    with pytest.raises(UserError, match=r"need a GPU, the queries are on cpu"):
        staircase_triton.forward(q.float(), k.float(), v.float(), segments, False, True)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs in another process")
def test_autograd_on_a_gpu_gives_the_gradients_of_the_reference():
    case = make([300, 200], d_head=64)
    segments, *qkv, d_out = case
    null = torch.zeros(1, 64, device=DEVICE)
    low = [x.detach().float().requires_grad_() for x in qkv]
    out = attend(*low, null, segments, own_segment=False, log_length=True, backend="staircase")
    grads = torch.autograd.grad(out, low, d_out.float())
    assert_exact((out, None, *grads), case, False, True)
