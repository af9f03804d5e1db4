"""What answering costs: the prompt (prefill), and each new token behind it (decode), with the caches of `dlcm.cache`.

What is remembered is not computed again. Then the cost of a token depends on where it stands only through the keys that it
reads, and both counts follow from `flops.ops` with other numbers of tokens, concepts, logits and query-key pairs:

                     forward of L       prefill of n            decode of m behind n
    tokens           L                  n                       m
    concepts         L/R                n/R                     m/R
    logits           L                  1 ("last") or n         m
    token pairs      L²/2               n²/2                    ((n + m)² - n²)/2 = n·m + m²/2
    concept pairs    (L/R)²/2           (n/R)²/2                n·m/R² + (m/R)²/2
    cross pairs      L·(L/R)/2          n·(n/R)/2               (n·m + m²/2)/R

Derivation of the last column. Token i of the new ones (i = 1 .. m) reads the keys of the n + i tokens up to itself; as everywhere
here the diagonal counts half, so that the sum is n·m + m²/2. A segment closes every R tokens, and only then the backbone runs:
m/R concepts pass through it, each once, and read the concepts before them, which gives the same sum with n/R and m/R. A token
projects Q and O in each cross-attention, K and V are projected once for each new concept, and the token reads the concepts that
are there: (n + i)/R of them, with half a concept off on average, again the same sum over R. Concept replication reads
a key for each earlier token instead: n·m + m²/2.

So prefill(n, logits="all") + decode(n, m) is the forward pass of n + m tokens, term by term: caches move work, they do not
change it. There are two conventions in this, and what they leave out vanishes as 1/n. The diagonal counts half. And concepts are
counted at their rate: the segment that is open at the end counts by the share of it that has been read, although it has not
passed through the backbone. Where the segments are known, `segments` counts them as they are: the backbone runs at the tokens
that close one, never on the open one, and a token reads the concepts that it sees.

Left out as in training: norms, softmax, the reading and writing of the caches (bytes, not FLOPs), the sampling of tokens.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import ops
from flops.components import Cross, Sizes, Work, checked_ratio, forward_flops
from flops.count import FlopCount

Logits = Literal["last", "all"]


def prefill(
    config: ModelConfig,
    n_tokens: int = 2048,
    tokens_per_concept: float | None = None,
    *,
    logits: Logits = "last",
    cross: Cross = "exact",
    documents: Sequence[int] | None = None,
    segments: Sequence[int] | None = None,
) -> FlopCount:
    """FLOPs of reading a prompt of n tokens into empty caches: the forward pass, with the logits of its last token alone.

    With L = n and M = n/R, the rows are those of `flops.count.count`; the head is 2·d·V ("last"), or 2·n·d·V.

    Args:
        config: DLCM or dense.
        n_tokens: tokens of the prompt.
        tokens_per_concept: realised R; the config's target by default. Ignored for a dense model.
        logits: `last` to go on from the prompt, `all` to score it.
        cross: `exact` or `replicated`, as in `count`.
        documents: lengths of several prompts in one batch, without padding; they replace `n_tokens`. The last token of each
            has logits.
        segments: lengths of the segments of the one prompt, the open one last; they replace R.

    Returns:
        FLOPs of the prompt; `per_token` figures are over its tokens. `.training` has no meaning here.

    Raises:
        UserError: a prompt without tokens, R below 1, segments that do not sum to the prompt.
    """
    lengths = _lengths(n_tokens, documents)
    ratio = checked_ratio(config, tokens_per_concept)
    n_logits = sum(lengths) if logits == "all" else len(lengths)
    if segments is None or config.is_dense:
        parts = [_between(0, n, ratio, cross) for n in lengths]
    else:
        _check_segments(segments, lengths, documents)
        parts, ratio = [_segmented(config, segments, 0, lengths[0], cross)], lengths[0] / len(segments)
    n_concepts, *pairs = _total(parts)
    work = Work(sum(lengths), n_concepts, n_logits, *pairs)
    square = work.squared()
    if segments is not None and cross == "exact":
        # Uneven segments: what is seen is not half of the rectangle that a dense kernel computes.
        square = square._replace(cross_pairs=lengths[0] * n_concepts)
    return _counted(config, work, square, ratio)


def decode(
    config: ModelConfig,
    n_context: int = 2048,
    n_new: int = 1,
    tokens_per_concept: float | None = None,
    *,
    cross: Cross = "exact",
    documents: Sequence[int] | None = None,
    segments: Sequence[int] | None = None,
) -> FlopCount:
    """FLOPs of m new tokens, one after the other, behind n tokens that the caches hold, logits for each.

    Encoder and decoder layers: 2·m·d·a(2h + 2g) + 4·h·a·S + 6·m·d·d_ff with S = n·m + m²/2. Backbone: the same with D and the
    m/R concepts that close, S = n·m/R² + (m/R)²/2. Cross-attention: 4·m·d·h·a + 4·(m/R)·D·g·a + 4·h·a·S,
    S = (n·m + m²/2)/R. Boundary 4·m·d·d_scan, W_up 2·(m/R)·d·D, logits 2·m·d·V.

    The twin `.full_square` is what a kernel that gets the tokens one at a time computes: a row of keys has nothing to mask, so
    that it differs from the count only by the diagonals, which it takes whole: n·m + m(m + 1)/2.

    Args:
        config: DLCM or dense.
        n_context: tokens that the caches hold; 0 is allowed.
        n_new: new tokens.
        tokens_per_concept: realised R; the config's target by default. Ignored for a dense model.
        cross: `exact` or `replicated`, as in `count`.
        documents: contexts of the rows of a batch; they replace `n_context`, and every row gets `n_new` tokens.
        segments: lengths of the segments of context and new tokens together, the open one last; they replace R.

    Returns:
        FLOPs of the new tokens; `per_token` figures are over them, all rows together. `.training` has no meaning here.

    Raises:
        UserError: no new token, R below 1, segments that do not sum to context and new tokens.
    """
    contexts = _lengths(n_context, documents, least=0)
    if n_new < 1:
        raise UserError(f"n_new = {n_new}: decoding needs at least one new token")
    ratio = checked_ratio(config, tokens_per_concept)
    if segments is None or config.is_dense:
        parts = [_between(n, n + n_new, ratio, cross) for n in contexts]
    else:
        _check_segments(segments, [contexts[0] + n_new], documents)
        ratio = sum(segments) / len(segments)
        parts = [_segmented(config, segments, contexts[0], contexts[0] + n_new, cross)]
    n_tokens = n_new * len(contexts)
    n_concepts, token_pairs, concept_pairs, cross_pairs = _total(parts)
    work = Work(n_tokens, n_concepts, n_tokens, token_pairs, concept_pairs, cross_pairs)
    row_by_row = work._replace(
        token_pairs=token_pairs + n_tokens / 2,
        concept_pairs=concept_pairs + n_concepts / 2,
        cross_pairs=cross_pairs + n_tokens / 2 if cross == "replicated" else cross_pairs,
    )
    return _counted(config, work, row_by_row, ratio)


# Concepts that pass through the backbone, then pairs of a self-attention over tokens, of one over concepts, of a cross-attention.
_Part = tuple[float, float, float, float]


def _between(begin: int, end: int, ratio: float, cross: Cross) -> _Part:
    """Tokens `begin` to `end` of one document at R = `ratio`: the forward pass up to the end less that up to the beginning."""

    def up_to(n: int) -> _Part:
        m = n / ratio
        return m, ops.causal_pairs(n), ops.causal_pairs(m), ops.cross_pairs(n, m, cross == "replicated")

    return _difference(up_to(end), up_to(begin))


def _segmented(config: ModelConfig, segments: Sequence[int], begin: int, end: int, cross: Cross) -> _Part:
    """The same where the segments are known: a mean is there once the next segment begins, a first state at once."""
    own = int(config.pooling == "first")
    starts = [0, *itertools.accumulate(segments)][:-1]

    def up_to(n: int) -> _Part:
        read = [min(length, n - start) for start, length in zip(starts, segments) if start < n]
        n_concepts = max(len(read) - 1 + own, 0)
        seen = sum(length * (j + own) for j, length in enumerate(read))
        pairs = ops.causal_pairs(n)
        return n_concepts, pairs, ops.causal_pairs(n_concepts), pairs if cross == "replicated" else seen

    return _difference(up_to(end), up_to(begin))


def _difference(a: _Part, b: _Part) -> _Part:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]


def _total(parts: Sequence[_Part]) -> _Part:
    a, b, c, d = (math.fsum(column) for column in zip(*parts))
    return a, b, c, d


def _counted(config: ModelConfig, work: Work, computed: Work, ratio: float) -> FlopCount:
    sizes = Sizes.of(config)
    twin = FlopCount(work.n_tokens, ratio, forward_flops(sizes, computed))
    return FlopCount(work.n_tokens, ratio, forward_flops(sizes, work), twin)


def _lengths(n_tokens: int, documents: Sequence[int] | None, least: int = 1) -> list[int]:
    lengths = [int(n) for n in ([n_tokens] if documents is None else documents)]
    if not lengths or min(lengths) < least:
        what = "a prompt needs at least one token" if least else "a context cannot be negative"
        raise UserError(f"{what}, got lengths {lengths[:8]}")
    return lengths


def _check_segments(segments: Sequence[int], lengths: Sequence[int], documents: Sequence[int] | None) -> None:
    if documents is not None:
        raise UserError("segments are those of one document; give documents or segments, not both")
    if min(segments, default=0) < 1 or sum(segments) != lengths[0]:
        raise UserError(
            f"segments of {sum(segments)} tokens in all for {lengths[0]} tokens; each token is in one segment"
        )
