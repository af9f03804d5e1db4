"""The chains of elementwise operations of a block as single GPU kernels, each with its gradient.

A block is products of matrices, attention, and what lies between them: sums, norms, rotary positions and the gate. The latter
only move memory, and PyTorch's operations move it many times, in fp32, with a launch for each; here every chain reads its
inputs once and writes its outputs once, in the dtype that the next product takes. Computed in fp32. Sums over rows (gradients
of gains) are taken by a fixed number of programs in a fixed order: two runs are equal bit by bit.

Shape legend: N rows of any kind, W their width; T tokens, H query heads, G key-value heads, A head width; F hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcm.backends.kernel_types import constexpr

# Elements of a tile, and programs that share the rows where a sum over all of them is taken: several for each multiprocessor.
_TILE, _ELEMENTS = 2048, 1024
_PROGRAMS, _HEAD_PROGRAMS = 792, 2112
# Tile of the sums over these programs.
_SUM_WIDTH, _SUM_ROWS = 16, 128


def add_rms_norm(
    x: Tensor, branch: Tensor | None, weight_W: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum x + branch, its norm times the gain in `dtype`, and one over the root of the mean square of each row.

    Args:
        x: contiguous rows (.., W).
        branch: what is added, contiguous, of any dtype; None adds nothing, and x comes back itself.
        weight_W: the gain.
        eps: added to the mean square.
        dtype: of the normed rows.
    """
    width = x.shape[-1]
    n_rows = x.numel() // width
    total = x if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    scale_N = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    if n_rows:
        block, rows = _tile(width)
        with torch.cuda.device_of(x):
            norm_kernel[triton.cdiv(n_rows, rows),](
                x, x if branch is None else branch, weight_W, total, normed, scale_N, n_rows, eps,
                WIDTH=width, BLOCK_W=block, ROWS=rows, ADDS=branch is not None, num_warps=_warps(block * rows),
            )  # fmt: skip
    return total, normed, scale_N


def add_rms_norm_backward(
    d_total: Tensor | None,
    d_normed: Tensor,
    total: Tensor,
    weight_W: Tensor,
    scale_N: Tensor,
    branch: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of the branch in its dtype (None without one), and of the gain.

    Args:
        d_total: gradient of x + branch by whoever else reads it, contiguous; None where nobody does.
        d_normed: gradient of the normed rows, contiguous.
        total: x + branch.
        weight_W: the gain.
        scale_N: as `add_rms_norm` gave it.
        branch: dtype of the branch.
    """
    width = total.shape[-1]
    n_rows = total.numel() // width
    block, rows = _tile(width)
    n_programs = min(_PROGRAMS, triton.cdiv(n_rows, rows))
    d_x = torch.empty_like(total)
    d_branch = d_x if branch is None or branch == total.dtype else torch.empty_like(total, dtype=branch)
    d_weight_PW = torch.empty(n_programs, width, dtype=torch.float32, device=total.device)
    if n_rows:
        with torch.cuda.device_of(total):
            norm_grad_kernel[n_programs,](
                d_normed if d_total is None else d_total, d_normed, total, weight_W, scale_N, d_x, d_branch, d_weight_PW,
                n_rows, WIDTH=width, BLOCK_W=block, ROWS=rows, ADDS=d_total is not None, COPIES=d_branch is not d_x,
                num_warps=_warps(block * rows),
            )  # fmt: skip
    (d_weight_W,) = _sums(d_weight_PW[:, None], (1,))
    return d_x, None if branch is None else d_branch, d_weight_W.to(weight_W.dtype)


def heads(
    x_TX: Tensor,
    weights_2A: tuple[Tensor, Tensor],
    eps: float,
    cos_T1A: Tensor,
    sin_T1A: Tensor,
    n_heads: int,
    n_kv: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries (T, H, A) and keys (T, G, A), normed and rotated, values (T, G, A), and the scales of the norms (T, H + G).

    Args:
        x_TX: (T, (H + 2 G) A), contiguous: queries, keys and values beside each other.
        weights_2A: gains of queries and keys.
        eps: added to the mean square.
        cos_T1A: cosines of half the head width.
        sin_T1A: sines.
        n_heads: H.
        n_kv: G.
    """
    n_tokens, d_head = x_TX.shape[0], x_TX.shape[1] // (n_heads + 2 * n_kv)
    q, k, v = (x_TX.new_empty(n_tokens, n, d_head) for n in (n_heads, n_kv, n_kv))
    scale = torch.empty(n_tokens, n_heads + n_kv, dtype=torch.float32, device=x_TX.device)
    if n_tokens:
        half, rows = _half(d_head)
        with torch.cuda.device_of(x_TX):
            heads_kernel[triton.cdiv(n_tokens, rows), n_heads + 2 * n_kv](
                x_TX, *weights_2A, cos_T1A, sin_T1A, q, k, v, scale, n_tokens, eps,
                H=n_heads, G=n_kv, HALF=d_head // 2, BLOCK_A=half, ROWS=rows, num_warps=_warps(half * rows),
            )  # fmt: skip
    return q, k, v, scale


def heads_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    x_TX: Tensor,
    weights_2A: tuple[Tensor, Tensor],
    cos_T1A: Tensor,
    sin_T1A: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what `heads` took, (T, (H + 2 G) A), and of both gains, given those of what it gave, all contiguous."""
    (n_tokens, n_heads, d_head), n_kv = d_q.shape, d_k.shape[1]
    half, rows = _half(d_head)
    n_programs = min(max(1, _HEAD_PROGRAMS // (n_heads + 2 * n_kv)), triton.cdiv(n_tokens, rows))
    d_x = torch.empty_like(x_TX)
    d_gains = torch.empty(n_programs, n_heads + n_kv, d_head, dtype=torch.float32, device=x_TX.device)
    if n_tokens:
        with torch.cuda.device_of(x_TX):
            heads_grad_kernel[n_programs, n_heads + 2 * n_kv](
                d_q, d_k, d_v, x_TX, *weights_2A, cos_T1A, sin_T1A, scale, d_x, d_gains, n_tokens,
                H=n_heads, G=n_kv, HALF=d_head // 2, BLOCK_A=half, ROWS=rows, num_warps=_warps(half * rows),
            )  # fmt: skip
    d_gain_q_A, d_gain_k_A = _sums(d_gains, (n_heads, n_kv))
    return d_x, d_gain_q_A, d_gain_k_A


def _sums(parts_PRW: Tensor, groups: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Sums (W,) over programs and over each group of rows: R rows are so many of the first group, then so many of the next.

    One launch. PyTorch's reduction takes one a group, and 30 microseconds on an H200 for so few columns.
    """
    n_programs, n_rows, width = parts_PRW.shape
    out_GW = parts_PRW.new_zeros(len(groups), width) if not n_programs else parts_PRW.new_empty(len(groups), width)
    if n_programs:
        with torch.cuda.device_of(parts_PRW):
            sums_kernel[triton.cdiv(width, _SUM_WIDTH), len(groups)](
                parts_PRW, out_GW, n_programs, groups[0],
                R=n_rows, WIDTH=width, BLOCK_W=_SUM_WIDTH, ROWS=_SUM_ROWS,
            )  # fmt: skip
    return out_GW.unbind()


def swiglu(x_TX: Tensor) -> Tensor:
    """silu(gate) * up, (T, F), of both beside each other in a contiguous (T, 2 F)."""
    n_tokens, width = x_TX.shape[0], x_TX.shape[1] // 2
    out_TF = x_TX.new_empty(n_tokens, width)
    if n_tokens:
        with torch.cuda.device_of(x_TX):
            swiglu_kernel[n_tokens, triton.cdiv(width, _ELEMENTS)](x_TX, out_TF, WIDTH=width, BLOCK=_ELEMENTS)
    return out_TF


def swiglu_backward(d_out_TF: Tensor, x_TX: Tensor) -> Tensor:
    """Gradients of gate and up beside each other, (T, 2 F), given that of `swiglu`, contiguous."""
    n_tokens, width = d_out_TF.shape
    d_x = torch.empty_like(x_TX)
    if n_tokens:
        with torch.cuda.device_of(x_TX):
            swiglu_grad_kernel[n_tokens, triton.cdiv(width, _ELEMENTS)](
                d_out_TF, x_TX, d_x, WIDTH=width, BLOCK=_ELEMENTS
            )
    return d_x


def _tile(width: int) -> tuple[int, int]:
    """Width of a tile, a power of two, and its rows."""
    block = triton.next_power_of_2(width)
    return block, max(1, _TILE // block)


def _half(d_head: int) -> tuple[int, int]:
    """Width of a tile that holds half a head, and its rows."""
    half = triton.next_power_of_2(d_head // 2)
    return half, max(1, _TILE // half)


def _warps(n_elements: int) -> int:
    return max(1, min(16, n_elements // 512))


@triton.jit(do_not_specialize=["n_rows"])
def norm_kernel(
    x, branch, weight, total, normed, scale, n_rows, eps,
    WIDTH: constexpr, BLOCK_W: constexpr, ROWS: constexpr, ADDS: constexpr,
):  # fmt: skip
    """Some rows."""
    row_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at_W = tl.arange(0, BLOCK_W)
    inside_NW = (row_N < n_rows)[:, None] & (at_W < WIDTH)[None, :]
    at_NW = row_N.to(tl.int64)[:, None] * WIDTH + at_W[None, :]
    x_NW = tl.load(x + at_NW, mask=inside_NW, other=0.0).to(tl.float32)
    if ADDS:
        x_NW += tl.load(branch + at_NW, mask=inside_NW, other=0.0).to(tl.float32)
        tl.store(total + at_NW, x_NW.to(total.dtype.element_ty), mask=inside_NW)
        # What the gradient will find there.
        x_NW = x_NW.to(total.dtype.element_ty).to(tl.float32)
    scale_N = tl.rsqrt(tl.sum(x_NW * x_NW, 1) / WIDTH + eps)
    weight_W = tl.load(weight + at_W, mask=at_W < WIDTH, other=0.0).to(tl.float32)
    y_NW = x_NW * scale_N[:, None] * weight_W[None, :]
    tl.store(normed + at_NW, y_NW.to(normed.dtype.element_ty), mask=inside_NW)
    tl.store(scale + row_N, scale_N, mask=row_N < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def norm_grad_kernel(
    d_total, d_normed, total, weight, scale, d_x, d_branch, d_weight, n_rows,
    WIDTH: constexpr, BLOCK_W: constexpr, ROWS: constexpr, ADDS: constexpr, COPIES: constexpr,
):  # fmt: skip
    """Every n-th tile of rows: with y = x s w and s = (mean x^2 + eps)^(-1/2), dx = s (g w - x s^2 mean(g w x))."""
    at_W = tl.arange(0, BLOCK_W)
    weight_W = tl.load(weight + at_W, mask=at_W < WIDTH, other=0.0).to(tl.float32)
    d_weight_W = tl.zeros([BLOCK_W], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS):
        row_N = first + tl.arange(0, ROWS)
        inside_NW = (row_N < n_rows)[:, None] & (at_W < WIDTH)[None, :]
        at_NW = row_N.to(tl.int64)[:, None] * WIDTH + at_W[None, :]
        x_NW = tl.load(total + at_NW, mask=inside_NW, other=0.0).to(tl.float32)
        g_NW = tl.load(d_normed + at_NW, mask=inside_NW, other=0.0).to(tl.float32)
        scale_N1 = tl.load(scale + row_N, mask=row_N < n_rows, other=0.0)[:, None]
        d_weight_W += tl.sum(g_NW * x_NW * scale_N1, 0)
        g_NW *= weight_W[None, :]
        mean_N1 = (tl.sum(g_NW * x_NW, 1) / WIDTH)[:, None]
        d_x_NW = scale_N1 * (g_NW - x_NW * (scale_N1 * scale_N1 * mean_N1))
        if ADDS:
            d_x_NW += tl.load(d_total + at_NW, mask=inside_NW, other=0.0).to(tl.float32)
        tl.store(d_x + at_NW, d_x_NW.to(d_x.dtype.element_ty), mask=inside_NW)
        if COPIES:
            tl.store(d_branch + at_NW, d_x_NW.to(d_branch.dtype.element_ty), mask=inside_NW)
    tl.store(d_weight + tl.program_id(0) * WIDTH + at_W, d_weight_W, mask=at_W < WIDTH)


@triton.jit(do_not_specialize=["n_programs"])
def sums_kernel(parts, out, n_programs, n_first, R: constexpr, WIDTH: constexpr, BLOCK_W: constexpr, ROWS: constexpr):
    """Some columns of the first `n_first` of the R rows of each program, or of those behind."""
    group = tl.program_id(1)
    begin, count = group * n_first, (1 - group) * n_first + group * (R - n_first)
    at_W = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    sum_W = tl.zeros([BLOCK_W], tl.float32)
    for first in range(0, n_programs * count, ROWS):
        row_N = first + tl.arange(0, ROWS)
        inside_NW = (row_N < n_programs * count)[:, None] & (at_W < WIDTH)[None, :]
        place_N = row_N // count * R + begin + row_N % count
        sum_W += tl.sum(tl.load(parts + place_N[:, None] * WIDTH + at_W[None, :], mask=inside_NW, other=0.0), 0)
    tl.store(out + group * WIDTH + at_W, sum_W, mask=at_W < WIDTH)


@triton.jit
def _gain(weight_q, weight_k, at_A, head, H: constexpr, WIDTH: constexpr):
    """Half of the gain of a query or of a key."""
    head_A = at_A * 0 + head
    of_q_A = tl.load(weight_q + at_A, mask=(at_A < WIDTH) & (head_A < H), other=0.0)
    return (of_q_A + tl.load(weight_k + at_A, mask=(at_A < WIDTH) & (head_A >= H), other=0.0)).to(tl.float32)


@triton.jit
def _places(t_T, head, at_A, HEADS: constexpr, HALF: constexpr):
    """Addresses (T, A) of the first half of a head in a contiguous (tokens, heads, width)."""
    return (t_T * HEADS + head)[:, None] * (2 * HALF) + at_A[None, :]


@triton.jit(do_not_specialize=["n_tokens"])
def heads_kernel(
    x, weight_q, weight_k, cos, sin, q, k, v, scale, n_tokens, eps,
    H: constexpr, G: constexpr, HALF: constexpr, BLOCK_A: constexpr, ROWS: constexpr,
):  # fmt: skip
    """One head of some tokens; the two halves of a head are rotated as pairs. What a head is not is masked away."""
    head = tl.program_id(1)
    t_T = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at_A = tl.arange(0, BLOCK_A)
    inside_TA = (t_T < n_tokens)[:, None] & (at_A < HALF)[None, :]
    from_TA = _places(t_T, head, at_A, H + 2 * G, HALF)
    a_TA = tl.load(x + from_TA, mask=inside_TA, other=0.0)
    b_TA = tl.load(x + from_TA + HALF, mask=inside_TA, other=0.0)
    if head >= H + G:
        to_TA = _places(t_T, head - H - G, at_A, G, HALF)
        tl.store(v + to_TA, a_TA, mask=inside_TA)
        tl.store(v + to_TA + HALF, b_TA, mask=inside_TA)
    else:
        w_a = _gain(weight_q, weight_k, at_A, head, H, HALF)
        w_b = _gain(weight_q + HALF, weight_k + HALF, at_A, head, H, HALF)
        a, b = a_TA.to(tl.float32), b_TA.to(tl.float32)
        scale_T = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)
        tl.store(scale + t_T * (H + G) + head, scale_T, mask=t_T < n_tokens)
        a, b = a * scale_T[:, None] * w_a[None, :], b * scale_T[:, None] * w_b[None, :]
        angle_TA = t_T[:, None] * HALF + at_A[None, :]
        cos_TA = tl.load(cos + angle_TA, mask=inside_TA, other=0.0).to(tl.float32)
        sin_TA = tl.load(sin + angle_TA, mask=inside_TA, other=0.0).to(tl.float32)
        first_TA = (a * cos_TA - b * sin_TA).to(q.dtype.element_ty)
        second_TA = (a * sin_TA + b * cos_TA).to(q.dtype.element_ty)
        head_1A = (at_A * 0 + head)[None, :]
        query_TA, key_TA = inside_TA & (head_1A < H), inside_TA & (head_1A >= H)
        to_TA = _places(t_T, head, at_A, H, HALF)
        tl.store(q + to_TA, first_TA, mask=query_TA)
        tl.store(q + to_TA + HALF, second_TA, mask=query_TA)
        to_TA = _places(t_T, head - H, at_A, G, HALF)
        tl.store(k + to_TA, first_TA, mask=key_TA)
        tl.store(k + to_TA + HALF, second_TA, mask=key_TA)


@triton.jit(do_not_specialize=["n_tokens"])
def heads_grad_kernel(
    d_q, d_k, d_v, x, weight_q, weight_k, cos, sin, scale, d_x, d_weight, n_tokens,
    H: constexpr, G: constexpr, HALF: constexpr, BLOCK_A: constexpr, ROWS: constexpr,
):  # fmt: skip
    """Every n-th tile of tokens of one head."""
    head = tl.program_id(1)
    at_A = tl.arange(0, BLOCK_A)
    w_a = _gain(weight_q, weight_k, at_A, head, H, HALF)
    w_b = _gain(weight_q + HALF, weight_k + HALF, at_A, head, H, HALF)
    d_w_a, d_w_b = tl.zeros([BLOCK_A], tl.float32), tl.zeros([BLOCK_A], tl.float32)
    for first in range(tl.program_id(0) * ROWS, n_tokens, tl.num_programs(0) * ROWS):
        t_T = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside_TA = (t_T < n_tokens)[:, None] & (at_A < HALF)[None, :]
        to_TA = _places(t_T, head, at_A, H + 2 * G, HALF)
        if head >= H + G:
            from_TA = _places(t_T, head - H - G, at_A, G, HALF)
            tl.store(d_x + to_TA, tl.load(d_v + from_TA, mask=inside_TA, other=0.0), mask=inside_TA)
            tl.store(d_x + to_TA + HALF, tl.load(d_v + from_TA + HALF, mask=inside_TA, other=0.0), mask=inside_TA)
        else:
            head_1A = (at_A * 0 + head)[None, :]
            query_TA, key_TA = inside_TA & (head_1A < H), inside_TA & (head_1A >= H)
            q_TA, k_TA = _places(t_T, head, at_A, H, HALF), _places(t_T, head - H, at_A, G, HALF)
            g_a = tl.load(d_q + q_TA, mask=query_TA, other=0.0) + tl.load(d_k + k_TA, mask=key_TA, other=0.0)
            g_b = tl.load(d_q + q_TA + HALF, mask=query_TA, other=0.0)
            g_b += tl.load(d_k + k_TA + HALF, mask=key_TA, other=0.0)
            angle_TA = t_T[:, None] * HALF + at_A[None, :]
            cos_TA = tl.load(cos + angle_TA, mask=inside_TA, other=0.0).to(tl.float32)
            sin_TA = tl.load(sin + angle_TA, mask=inside_TA, other=0.0).to(tl.float32)
            g_a, g_b = g_a.to(tl.float32), g_b.to(tl.float32)
            # Against the rotation.
            y_a, y_b = g_a * cos_TA + g_b * sin_TA, g_b * cos_TA - g_a * sin_TA
            x_a = tl.load(x + to_TA, mask=inside_TA, other=0.0).to(tl.float32)
            x_b = tl.load(x + to_TA + HALF, mask=inside_TA, other=0.0).to(tl.float32)
            scale_T1 = tl.load(scale + t_T * (H + G) + head, mask=t_T < n_tokens, other=0.0)[:, None]
            d_w_a += tl.sum(y_a * x_a * scale_T1, 0)
            d_w_b += tl.sum(y_b * x_b * scale_T1, 0)
            y_a, y_b = y_a * w_a[None, :], y_b * w_b[None, :]
            mean_T1 = (tl.sum(y_a * x_a + y_b * x_b, 1) / (2 * HALF))[:, None] * scale_T1 * scale_T1
            tl.store(d_x + to_TA, (scale_T1 * (y_a - x_a * mean_T1)).to(d_x.dtype.element_ty), mask=inside_TA)
            tl.store(d_x + to_TA + HALF, (scale_T1 * (y_b - x_b * mean_T1)).to(d_x.dtype.element_ty), mask=inside_TA)
    if head < H + G:
        row = (tl.program_id(0) * (H + G) + head) * (2 * HALF)
        tl.store(d_weight + row + at_A, d_w_a, mask=at_A < HALF)
        tl.store(d_weight + row + HALF + at_A, d_w_b, mask=at_A < HALF)


@triton.jit
def swiglu_kernel(x, out, WIDTH: constexpr, BLOCK: constexpr):
    """A part of one row."""
    row = tl.program_id(0).to(tl.int64)
    at_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = at_F < WIDTH
    gate_F = tl.load(x + row * 2 * WIDTH + at_F, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(x + row * 2 * WIDTH + WIDTH + at_F, mask=inside_F, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at_F, (gate_F * tl.sigmoid(gate_F) * up_F).to(out.dtype.element_ty), mask=inside_F)


@triton.jit
def swiglu_grad_kernel(d_out, x, d_x, WIDTH: constexpr, BLOCK: constexpr):
    """A part of one row."""
    row = tl.program_id(0).to(tl.int64)
    at_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_F = at_F < WIDTH
    gate_at, up_at = row * 2 * WIDTH + at_F, row * 2 * WIDTH + WIDTH + at_F
    gate_F = tl.load(x + gate_at, mask=inside_F, other=0.0).to(tl.float32)
    up_F = tl.load(x + up_at, mask=inside_F, other=0.0).to(tl.float32)
    g_F = tl.load(d_out + row * WIDTH + at_F, mask=inside_F, other=0.0).to(tl.float32)
    open_F = tl.sigmoid(gate_F)
    d_gate_F = g_F * up_F * open_F * (1.0 + gate_F * (1.0 - open_F))
    tl.store(d_x + gate_at, d_gate_F.to(d_x.dtype.element_ty), mask=inside_F)
    tl.store(d_x + up_at, (g_F * gate_F * open_F).to(d_x.dtype.element_ty), mask=inside_F)
