"""GPU kernels of the `staircase` backend: attention of tokens to a contiguous range of concepts, forward and backward.

Tokens t are packed flat, and so are the concepts, the keys n. Token t sees the keys [lo_t, hi_t), so key n is seen by the
tokens [first_n, end_n); all four are non-decreasing. Every kernel walks over the documents that its block touches (one, but
for blocks at a seam) and there over the tiles that hold something visible: work S = L·M/2. Tiles that a whole block sees are
computed without a mask, the ones on the stairs with it.

Key tiles are counted from the first key of a document, query tiles from its last token. So the numbers that are added up for
a token or a concept, and their order, do not depend on what is packed beside its document: results are equal bit by bit.
Nothing is accumulated by atomics; two runs with the same tiles are equal bit by bit as well.

Scores are kept in base 2, with a bias that is the logarithm of how many tokens of concept n lie at or before token t.

Shape legend: M queries and N keys of a tile, A head width (padded to a power of two), H query heads, G key-value heads.
"""

import triton
import triton.language as tl

from dlcm.backends.kernel_types import constexpr

# Below any score, yet finite: exp2(-inf - m) of a row that has seen nothing yet is zero and not NaN.
LOWEST = tl.constexpr(-1.0e30)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _addresses(x, row_R, head, HEADS: constexpr, D_HEAD: constexpr, BLOCK_A: constexpr):
    """Addresses (R, A) of rows of one head in a contiguous (rows, heads, width); 64-bit, for long packings of wide models."""
    row_R = row_R.to(tl.int64) * HEADS + head
    return x + row_R[:, None] * D_HEAD + tl.arange(0, BLOCK_A)[None, :]


@triton.jit
def load_rows(x, row_R, keep_R, head, HEADS: constexpr, D_HEAD: constexpr, BLOCK_A: constexpr, MASKED: constexpr):
    """Rows of one head; zero behind the head width and, with `MASKED`, where not kept."""
    x_RA = _addresses(x, row_R, head, HEADS, D_HEAD, BLOCK_A)
    inside_1A = (tl.arange(0, BLOCK_A) < D_HEAD)[None, :]
    if MASKED and BLOCK_A != D_HEAD:
        return tl.load(x_RA, mask=keep_R[:, None] & inside_1A, other=0.0)
    if MASKED:
        return tl.load(x_RA, mask=keep_R[:, None], other=0.0)
    if BLOCK_A != D_HEAD:
        return tl.load(x_RA, mask=inside_1A, other=0.0)
    return tl.load(x_RA)


@triton.jit
def store_rows(x, row_R, keep_R, head, value_RA, HEADS: constexpr, D_HEAD: constexpr, BLOCK_A: constexpr):
    """Write kept rows of one head in the dtype of `x`."""
    x_RA = _addresses(x, row_R, head, HEADS, D_HEAD, BLOCK_A)
    inside_RA = keep_R[:, None] & (tl.arange(0, BLOCK_A) < D_HEAD)[None, :]
    tl.store(x_RA, value_RA.to(x.dtype.element_ty), mask=inside_RA)


@triton.jit
def biased(s, t, first, bias, OWN_BIAS: constexpr):
    """Scores with their bias; `t`, `first` and `bias` broadcast against `s` from either side.

    In the own segment, which is not complete at the query, t - first + 1 tokens lie at or before it; in an earlier one that
    number is above the length, so the smaller one counts.
    """
    if OWN_BIAS:
        s += tl.minimum(bias, tl.log2(tl.maximum(t - first + 1, 1).to(tl.float32)))
    else:
        s += bias
    return s


@triton.jit
def scores(
    q_MA,
    k_NA,
    first,
    bias,
    t_M,
    n_N,
    keep_N,
    limit_M,
    scale_2,
    HAS_BIAS: constexpr,
    OWN_BIAS: constexpr,
    STAIR: constexpr,
    PRECISION: constexpr,
):
    """Scores (M, N) of a tile, for the kernels that hold queries and walk over keys; -inf from the limit of a row on."""
    s_MN = tl.dot(q_MA, tl.trans(k_NA), input_precision=PRECISION) * scale_2
    if STAIR:
        if HAS_BIAS:
            bias_N = tl.load(bias + n_N, mask=keep_N, other=0.0)
            if OWN_BIAS:
                first_N = tl.load(first + n_N, mask=keep_N, other=0)
            else:
                first_N = n_N
            s_MN = biased(s_MN, t_M[:, None], first_N[None, :], bias_N[None, :], OWN_BIAS)
        s_MN = tl.where(n_N[None, :] < limit_M[:, None], s_MN, float("-inf"))
    elif HAS_BIAS:
        s_MN += tl.load(bias + n_N)[None, :]
    return s_MN


@triton.jit
def walk_keys(t, m0, m_end, t_M, hi_M, lo, hi, end, OWN_BIAS: constexpr, BLOCK_N: constexpr):
    """The keys that the rows [t, ...) of one document in the block [m0, m_end) see.

    Gives the first row of the next document; the first key; where the tiles stop that every row of the block sees whole; the last
    key + 1; that limit for each row by itself, zero for the rows of other documents.
    """
    lo_t = tl.load(lo + t)
    t_next = tl.minimum(tl.load(end + lo_t), m_end)
    hi_last = tl.load(hi + t_next - 1)
    seen_by_all = tl.load(hi + m0)
    if OWN_BIAS:
        seen_by_all -= 1  # the bias of a row's own segment is not the key's alone, so that tile counts as a stair
    # Rows of another document in the block see none of these keys.
    seen_by_all = tl.where((t == m0) & (t_next == m_end), seen_by_all, lo_t)
    n_stair = lo_t + tl.maximum(seen_by_all - lo_t, 0) // BLOCK_N * BLOCK_N
    limit_M = tl.where((t_M >= t) & (t_M < t_next), hi_M, 0)
    return t_next, lo_t, n_stair, hi_last, limit_M


@triton.jit
def _attend_tile(
    acc_MA,
    sum_M,
    max_M,
    q_MA,
    k,
    v,
    first,
    bias,
    t_M,
    n_N,
    n_end,
    limit_M,
    group,
    scale_2,
    G: constexpr,
    D_HEAD: constexpr,
    BLOCK_A: constexpr,
    HAS_BIAS: constexpr,
    OWN_BIAS: constexpr,
    STAIR: constexpr,
    PRECISION: constexpr,
):
    """One step of the online softmax."""
    keep_N = n_N < n_end
    k_NA = load_rows(k, n_N, keep_N, group, G, D_HEAD, BLOCK_A, STAIR)
    s_MN = scores(q_MA, k_NA, first, bias, t_M, n_N, keep_N, limit_M, scale_2, HAS_BIAS, OWN_BIAS, STAIR, PRECISION)
    new_max_M = tl.maximum(max_M, tl.max(s_MN, 1))
    p_MN = tl.exp2(s_MN - new_max_M[:, None])
    shrink_M = tl.exp2(max_M - new_max_M)
    sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
    v_NA = load_rows(v, n_N, keep_N, group, G, D_HEAD, BLOCK_A, STAIR)
    acc_MA = tl.dot(p_MN.to(v_NA.dtype), v_NA, acc_MA * shrink_M[:, None], input_precision=PRECISION)
    return acc_MA, sum_M, new_max_M


@triton.jit(do_not_specialize=["n_tokens"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    lo,
    hi,
    first,
    end,
    bias,
    n_tokens,
    scale,
    H: constexpr,
    G: constexpr,
    D_HEAD: constexpr,
    BLOCK_A: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    HAS_BIAS: constexpr,
    OWN_BIAS: constexpr,
    PRECISION: constexpr,
):
    """Outputs (T, H, A) and log-sum-exp (T, H) of one block of queries of one head; zero for rows that see nothing."""
    # The last rows of a document have the most to do: they start first.
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    group = head // (H // G)
    scale_2 = scale * LOG2_E
    t_M = m0 + tl.arange(0, BLOCK_M)
    row_M = t_M < n_tokens
    q_MA = load_rows(q, t_M, row_M, head, H, D_HEAD, BLOCK_A, True)
    acc_MA = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    max_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    m_end = tl.minimum(m0 + BLOCK_M, n_tokens)
    hi_M = tl.load(hi + t_M, mask=row_M, other=0)
    n_N = tl.arange(0, BLOCK_N)
    t = m0
    while t < m_end:
        t, n_start, n_stair, n_end, limit_M = walk_keys(t, m0, m_end, t_M, hi_M, lo, hi, end, OWN_BIAS, BLOCK_N)
        for n in range(n_start, n_stair, BLOCK_N):
            acc_MA, sum_M, max_M = _attend_tile(
                acc_MA, sum_M, max_M, q_MA, k, v, first, bias, t_M, n + n_N, n_end, limit_M, group, scale_2,
                G, D_HEAD, BLOCK_A, HAS_BIAS, OWN_BIAS, False, PRECISION,
            )  # fmt: skip
        for n in range(n_stair, n_end, BLOCK_N):
            acc_MA, sum_M, max_M = _attend_tile(
                acc_MA, sum_M, max_M, q_MA, k, v, first, bias, t_M, n + n_N, n_end, limit_M, group, scale_2,
                G, D_HEAD, BLOCK_A, HAS_BIAS, OWN_BIAS, True, PRECISION,
            )  # fmt: skip
    saw_M = sum_M > 0.0
    sum_M = tl.where(saw_M, sum_M, 1.0)
    store_rows(out, t_M, row_M, head, acc_MA / sum_M[:, None], H, D_HEAD, BLOCK_A)
    lse_M = tl.where(saw_M, (max_M + tl.log2(sum_M)) * LN_2, 0.0)
    tl.store(lse + t_M.to(tl.int64) * H + head, lse_M, mask=row_M)
