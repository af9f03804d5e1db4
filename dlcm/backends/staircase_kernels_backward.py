"""Backward kernels of the `staircase` backend; `staircase_kernels` says how they walk, and has what all of them share.

Shape legend: M queries and N keys of a tile, A head width (padded to a power of two), H query heads, G key-value heads.
"""

import triton
import triton.language as tl

from dlcm.backends.kernel_types import constexpr
from dlcm.backends.staircase_kernels import (
    LOG2_E,
    biased,
    load_rows,
    scores,
    store_rows,
    walk_keys,
)

# No token has such an index: a key that it is the first to see is seen by none.
_NEVER = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["n_tokens"])
def row_kernel(
    out,
    d_out,
    lse,
    row_terms,
    n_tokens,
    H: constexpr,
    D_HEAD: constexpr,
    BLOCK_A: constexpr,
    BLOCK_M: constexpr,
):
    """What the backward kernels need of each row: log-sum-exp in base 2 and `<d_out, out>`, as (2, H, T).

    Tokens run fastest there, because a tile reads both for many tokens of one head.
    """
    head = tl.program_id(1)
    t_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_M = t_M < n_tokens
    out_MA = load_rows(out, t_M, row_M, head, H, D_HEAD, BLOCK_A, True).to(tl.float32)
    d_out_MA = load_rows(d_out, t_M, row_M, head, H, D_HEAD, BLOCK_A, True).to(tl.float32)
    lse_M = tl.load(lse + t_M.to(tl.int64) * H + head, mask=row_M, other=0.0)
    row_terms += head.to(tl.int64) * n_tokens
    tl.store(row_terms + t_M, lse_M * LOG2_E, mask=row_M)
    tl.store(row_terms + tl.full([], H, tl.int64) * n_tokens + t_M, tl.sum(out_MA * d_out_MA, 1), mask=row_M)


@triton.jit
def _query_grad_tile(
    d_q_MA,
    q_MA,
    d_out_MA,
    lse_2_M,
    delta_M,
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
    """d_s k, with d_s = p * (<d_out, v> - delta) and p from the stored log-sum-exp."""
    keep_N = n_N < n_end
    k_NA = load_rows(k, n_N, keep_N, group, G, D_HEAD, BLOCK_A, STAIR)
    v_NA = load_rows(v, n_N, keep_N, group, G, D_HEAD, BLOCK_A, STAIR)
    s_MN = scores(q_MA, k_NA, first, bias, t_M, n_N, keep_N, limit_M, scale_2, HAS_BIAS, OWN_BIAS, STAIR, PRECISION)
    p_MN = tl.exp2(s_MN - lse_2_M[:, None])
    d_p_MN = tl.dot(d_out_MA, tl.trans(v_NA), input_precision=PRECISION)
    d_s_MN = p_MN * (d_p_MN - delta_M[:, None])
    return tl.dot(d_s_MN.to(k_NA.dtype), k_NA, d_q_MA, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n_tokens"])
def query_grad_kernel(
    q,
    k,
    v,
    d_out,
    row_terms,
    d_q,
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
    """Gradient of one block of queries of one head."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1)
    group = head // (H // G)
    scale_2 = scale * LOG2_E
    t_M = m0 + tl.arange(0, BLOCK_M)
    row_M = t_M < n_tokens
    q_MA = load_rows(q, t_M, row_M, head, H, D_HEAD, BLOCK_A, True)
    d_out_MA = load_rows(d_out, t_M, row_M, head, H, D_HEAD, BLOCK_A, True)
    row_terms += head.to(tl.int64) * n_tokens
    lse_2_M = tl.load(row_terms + t_M, mask=row_M, other=0.0)
    delta_M = tl.load(row_terms + tl.full([], H, tl.int64) * n_tokens + t_M, mask=row_M, other=0.0)
    d_q_MA = tl.zeros([BLOCK_M, BLOCK_A], tl.float32)
    m_end = tl.minimum(m0 + BLOCK_M, n_tokens)
    hi_M = tl.load(hi + t_M, mask=row_M, other=0)
    n_N = tl.arange(0, BLOCK_N)
    t = m0
    while t < m_end:
        t, n_start, n_stair, n_end, limit_M = walk_keys(t, m0, m_end, t_M, hi_M, lo, hi, end, OWN_BIAS, BLOCK_N)
        for n in range(n_start, n_stair, BLOCK_N):
            d_q_MA = _query_grad_tile(
                d_q_MA, q_MA, d_out_MA, lse_2_M, delta_M, k, v, first, bias, t_M, n + n_N, n_end, limit_M,
                group, scale_2, G, D_HEAD, BLOCK_A, HAS_BIAS, OWN_BIAS, False, PRECISION,
            )  # fmt: skip
        for n in range(n_stair, n_end, BLOCK_N):
            d_q_MA = _query_grad_tile(
                d_q_MA, q_MA, d_out_MA, lse_2_M, delta_M, k, v, first, bias, t_M, n + n_N, n_end, limit_M,
                group, scale_2, G, D_HEAD, BLOCK_A, HAS_BIAS, OWN_BIAS, True, PRECISION,
            )  # fmt: skip
    store_rows(d_q, t_M, row_M, head, d_q_MA * scale, H, D_HEAD, BLOCK_A)


@triton.jit
def _walk_queries(
    n, n0, n_end, n_N, first_N, lo, first, end, n_tokens, n_keys, OWN_BIAS: constexpr, BLOCK_M: constexpr
):
    """The tokens that see the keys [n, ...) of one document in the block [n0, n_end).

    Returns:
        First key of the next document; last token + 1; how many query tiles see every key of the block, and how many see
        some, both counted from the last token back; the first token for each key by itself, none for those of other documents.
    """
    t_end = tl.load(end + n)
    n_next = tl.minimum(tl.load(lo + t_end, mask=t_end < n_tokens, other=n_keys), n_end)
    n_tiles = tl.cdiv(t_end - tl.load(first + n), BLOCK_M)
    if OWN_BIAS:
        # Tokens inside the segment of the last key have a bias of their own: what all see alike begins behind it.
        t_all = tl.minimum(tl.load(first + n_next, mask=n_next < n_keys, other=_NEVER), t_end)
    else:
        t_all = tl.load(first + n_next - 1)
    n_full = tl.where((n == n0) & (n_next == n_end), (t_end - t_all) // BLOCK_M, 0)
    limit_N = tl.where((n_N >= n) & (n_N < n_next), first_N, _NEVER)
    return n_next, t_end, n_full, n_tiles, limit_N


@triton.jit
def _key_grad_tile(
    d_k_NA,
    d_v_NA,
    k_NA,
    v_NA,
    q,
    d_out,
    row_terms,
    first_N,
    bias_N,
    limit_N,
    t_M,
    n_tokens,
    head,
    scale_2,
    H: constexpr,
    D_HEAD: constexpr,
    BLOCK_A: constexpr,
    HAS_BIAS: constexpr,
    OWN_BIAS: constexpr,
    STAIR: constexpr,
    PRECISION: constexpr,
):
    """One tile of p' d_out and d_s' q, held transposed so that the keys' gradients need no transposition."""
    # The first tile may begin before the first document.
    row_M = t_M >= 0
    q_MA = load_rows(q, t_M, row_M, head, H, D_HEAD, BLOCK_A, STAIR)
    lse_at = row_terms + head.to(tl.int64) * n_tokens + t_M
    delta_at = lse_at + tl.full([], H, tl.int64) * n_tokens
    s_NM = tl.dot(k_NA, tl.trans(q_MA), input_precision=PRECISION) * scale_2
    if STAIR:
        if HAS_BIAS:
            s_NM = biased(s_NM, t_M[None, :], first_N[:, None], bias_N[:, None], OWN_BIAS)
        s_NM = tl.where(t_M[None, :] >= limit_N[:, None], s_NM, float("-inf"))
        lse_2_M = tl.load(lse_at, mask=row_M, other=0.0)
        delta_M = tl.load(delta_at, mask=row_M, other=0.0)
    else:
        if HAS_BIAS:
            s_NM += bias_N[:, None]
        lse_2_M = tl.load(lse_at)
        delta_M = tl.load(delta_at)
    p_NM = tl.exp2(s_NM - lse_2_M[None, :])
    d_out_MA = load_rows(d_out, t_M, row_M, head, H, D_HEAD, BLOCK_A, STAIR)
    d_v_NA = tl.dot(p_NM.to(d_out_MA.dtype), d_out_MA, d_v_NA, input_precision=PRECISION)
    d_p_NM = tl.dot(v_NA, tl.trans(d_out_MA), input_precision=PRECISION)
    d_s_NM = p_NM * (d_p_NM - delta_M[None, :])
    d_k_NA = tl.dot(d_s_NM.to(q_MA.dtype), q_MA, d_k_NA, input_precision=PRECISION)
    return d_k_NA, d_v_NA


@triton.jit(do_not_specialize=["n_tokens", "n_keys"])
def key_grad_kernel(
    q,
    k,
    v,
    d_out,
    row_terms,
    d_k,
    d_v,
    lo,
    first,
    end,
    bias,
    n_tokens,
    n_keys,
    scale,
    H: constexpr,
    G: constexpr,
    SPLITS: constexpr,
    D_HEAD: constexpr,
    BLOCK_A: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    HAS_BIAS: constexpr,
    OWN_BIAS: constexpr,
    PRECISION: constexpr,
):
    """Gradients of one block of keys and values of one head: over all queries that see it, of all query heads that share it.

    With `SPLITS` above one a program takes every `SPLITS`-th (tile, query head) pair and writes a partial sum of its own,
    (SPLITS, K, G, A): few long blocks of keys would leave most of a GPU idle. Adding them up in order keeps the result fixed.
    """
    PER_GROUP: constexpr = H // G
    n0 = tl.program_id(0) * BLOCK_N
    group = tl.program_id(1)
    split = tl.program_id(2)
    scale_2 = scale * LOG2_E
    n_N = n0 + tl.arange(0, BLOCK_N)
    key_N = n_N < n_keys
    k_NA = load_rows(k, n_N, key_N, group, G, D_HEAD, BLOCK_A, True)
    v_NA = load_rows(v, n_N, key_N, group, G, D_HEAD, BLOCK_A, True)
    first_N = tl.load(first + n_N, mask=key_N, other=_NEVER)
    if HAS_BIAS:
        bias_N = tl.load(bias + n_N, mask=key_N, other=0.0)
    else:
        bias_N = tl.zeros([BLOCK_N], tl.float32)
    d_k_NA = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    d_v_NA = tl.zeros([BLOCK_N, BLOCK_A], tl.float32)
    m_M = tl.arange(0, BLOCK_M)
    n_end = tl.minimum(n0 + BLOCK_N, n_keys)
    n = n0
    while n < n_end:
        n, t_end, n_full, n_tiles, limit_N = _walk_queries(
            n, n0, n_end, n_N, first_N, lo, first, end, n_tokens, n_keys, OWN_BIAS, BLOCK_M
        )
        # One loop over (tile, query head) pairs instead of two nested ones keeps the loads of the next pair in flight.
        for i in range(split, n_full * PER_GROUP, SPLITS):
            head = group * PER_GROUP + i % PER_GROUP
            t_M = t_end - (i // PER_GROUP + 1) * BLOCK_M + m_M
            d_k_NA, d_v_NA = _key_grad_tile(
                d_k_NA, d_v_NA, k_NA, v_NA, q, d_out, row_terms, first_N, bias_N, limit_N, t_M, n_tokens, head,
                scale_2, H, D_HEAD, BLOCK_A, HAS_BIAS, OWN_BIAS, False, PRECISION,
            )  # fmt: skip
        done = tl.cdiv(tl.maximum(n_full * PER_GROUP - split, 0), SPLITS)
        for i in range(split + done * SPLITS, n_tiles * PER_GROUP, SPLITS):
            head = group * PER_GROUP + i % PER_GROUP
            t_M = t_end - (i // PER_GROUP + 1) * BLOCK_M + m_M
            d_k_NA, d_v_NA = _key_grad_tile(
                d_k_NA, d_v_NA, k_NA, v_NA, q, d_out, row_terms, first_N, bias_N, limit_N, t_M, n_tokens, head,
                scale_2, H, D_HEAD, BLOCK_A, HAS_BIAS, OWN_BIAS, True, PRECISION,
            )  # fmt: skip
    row_N = n_N.to(tl.int64) + split.to(tl.int64) * n_keys
    store_rows(d_k, row_N, key_N, group, d_k_NA * scale, G, D_HEAD, BLOCK_A)
    store_rows(d_v, row_N, key_N, group, d_v_NA, G, D_HEAD, BLOCK_A)
