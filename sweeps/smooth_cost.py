"""The cost of a shape as a smooth function of N, D, R and P, and the dense model of a given cost.

The shape rule of `sweeps.shapes` with real-valued depth and widths, priced by `flops.ops`: what an optimum is searched under,
since integer shapes would make the cost jump.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dlcm.config import ModelConfig
from dlcm.errors import UserError
from flops import count, ops
from sweeps.shapes import (
    DEFAULT_PARTS,
    DEFAULT_RULE,
    Parts,
    ShapeRule,
    dense_shape,
    layer_quadratic,
    real_depth,
    root,
    token_width,
)

_LEAST_WIDTH = 8
_SCAN: list[float] = np.linspace(-0.16, 0.16, 81).tolist()  # of log N around the smooth solution
_CLOSE, _FAR = 0.002, 0.05

CostFunction = Callable[[Any, Any, Any, Any], Any]


def cost_function(
    *,
    vocab_size: int,
    seq_len: int,
    rule: ShapeRule = DEFAULT_RULE,
    parts: Parts = DEFAULT_PARTS,
) -> CostFunction:
    """The training FLOPs of a model as a smooth function of N, D, R and P: the shape rule with real-valued widths.

    The depth, the split of the layers and both widths follow the rule of `sweeps.shapes` without rounding, and
    `flops.ops` prices the result, head and attention included. It is what the optimum is searched under: integer
    shapes would make the cost jump.

    Args:
        vocab_size: V.
        seq_len: tokens of one sequence, for the attention scores.
        rule: the sweep's proportions.
        parts: the sweep's other model choices.

    Returns:
        `cost(N, D, R, P)`: N non-embedding parameters, D training tokens, R tokens per concept, P concept share; scalars or
        arrays that broadcast. P = 0 means the dense model, whatever R. Returns training FLOPs in the same shape; infinity
        where one of the two levels would be narrower than 8, since no model is so.

    Example:
        `cost_function(vocab_size=m.vocab_size, seq_len=256, rule=sweep.shape, parts=Parts.of(m.model_dump()))` for a DLCM's `m`.
    """

    def cost(N: Any, D: Any, R: Any, P: Any) -> Any:
        N, D, R, P = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (N, D, R, P)))
        forward = _forward(N, R, P, vocab_size, (seq_len, seq_len), rule, parts)
        total = ops.TRAINING_FACTOR * forward / seq_len * D
        return float(total) if total.ndim == 0 else total

    return cost


def inference_function(
    *,
    vocab_size: int,
    prompt: int,
    new: int = 0,
    score: bool = False,
    rule: ShapeRule = DEFAULT_RULE,
    parts: Parts = DEFAULT_PARTS,
) -> CostFunction:
    """The FLOPs of serving one token as a smooth function of N, R and P, averaged over a request.

    A request reads a prompt and writes new tokens, with caches: `flops.inference.prefill(n)` and then `decode(n, m)`, which
    together are the forward pass of n + m tokens with 1 + m logits (m where there is no prompt).

    Args:
        vocab_size: V.
        prompt: n, tokens of the prompt.
        new: m, tokens that are written.
        score: logits for every token, as in the forward pass of evaluation and training.
        rule: the sweep's proportions.
        parts: the sweep's other model choices.

    Returns:
        `cost(N, D, R, P)` as of `cost_function`, independent of D: FLOPs a token, prompt and new tokens alike.

    Raises:
        UserError: a request without tokens.
    """
    length = prompt + new
    if min(prompt, new) < 0 or length < 1:
        raise UserError(f"a request of {prompt} prompt and {new} new tokens; give at least one token")
    n_logits = length if score else new + (prompt > 0)

    def cost(N: Any, D: Any, R: Any, P: Any) -> Any:
        N, D, R, P = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (N, D, R, P)))
        total = _forward(N, R, P, vocab_size, (length, n_logits), rule, parts) / length
        return float(total) if total.ndim == 0 else total

    return cost


def _forward(N: Any, R: Any, P: Any, vocab_size: int, work: tuple[int, int], rule: ShapeRule, parts: Parts) -> Any:
    """Forward FLOPs of one sequence of `work[0]` tokens, `work[1]` of them with logits; P = 0 is the dense model."""
    is_dense = P <= 0
    if np.all(is_dense):
        return _dense_forward(N, vocab_size, work, rule, parts)
    if not np.any(is_dense):
        return _dlcm_forward(N, R, P, vocab_size, work, rule, parts)
    dlcm = _dlcm_forward(N, np.where(is_dense, 1.0, R), np.where(is_dense, 0.5, P), vocab_size, work, rule, parts)
    return np.where(is_dense, _dense_forward(N, vocab_size, work, rule, parts), dlcm)


def _real_head(size: Any, rule: ShapeRule, parts: Parts) -> Any:
    # The head width only enters the 2a parameters of each QK-norm: its steps move the cost by less than 0.01%.
    return parts.d_head or rule.d_head or np.where(np.sqrt(size / (12 * real_depth(size, rule))) < 192, 16, 32)


def _dense_forward(N: Any, vocab_size: int, work: tuple[int, int], rule: ShapeRule, parts: Parts) -> Any:
    """Forward FLOPs of one sequence through the dense model with real-valued depth and width."""
    seq_len, n_logits = work
    depth, a = real_depth(N, rule), _real_head(N, rule, parts)
    d = root(*layer_quadratic(depth, rule, a, N, tail=1.0))
    layer = ops.layer(seq_len, ops.causal_pairs(seq_len), d, d / a, d / a / rule.heads_per_kv, a, rule.ff_ratio * d)
    # so few parameters that the norms alone have more: there is no width, and no model
    return np.where(d > 0, depth * layer + ops.logits(n_logits, d, vocab_size), np.inf)


def _dlcm_forward(N: Any, R: Any, P: Any, vocab_size: int, work: tuple[int, int], rule: ShapeRule, parts: Parts) -> Any:
    """Forward FLOPs of one sequence through the DLCM with real-valued depth, split and widths."""
    seq_len, n_logits = work
    depth, a = real_depth(N, rule), _real_head(N, rule, parts)
    if rule.layers:
        n_backbone, n_decoder = float(rule.layers[1]), float(rule.layers[2])
    else:
        n_backbone = np.maximum(1.0, depth * rule.backbone_depth)
        n_decoder = np.maximum(1.0, (depth - n_backbone) * (1 - rule.encoder_depth))
    n_token = depth - n_backbone
    n_cross = n_decoder if parts.cross_everywhere else 1.0
    group = rule.heads_per_kv
    D = root(*layer_quadratic(n_backbone, rule, a, N * P))
    d = token_width(N * (1 - P), D, n_token, n_cross, rule, a, parts)
    n_concepts = seq_len / R
    token_layer = ops.layer(seq_len, ops.causal_pairs(seq_len), d, d / a, d / a / group, a, rule.ff_ratio * d)
    concept_layer = ops.layer(n_concepts, ops.causal_pairs(n_concepts), D, D / a, D / a / group, a, rule.ff_ratio * D)
    cross = ops.cross_projections(seq_len, n_concepts, d, D, d / a, d / a / group, a)
    cross = cross + ops.attention_scores(ops.cross_pairs(seq_len, n_concepts), d / a, a)
    between = ops.boundary(seq_len, d, parts.scan_width) + ops.pooling(n_concepts, d, D)
    between = between + (ops.smoothing(n_concepts, D) if parts.smoothed else 0.0)
    logits = ops.logits(n_logits, d, vocab_size)
    total = n_token * token_layer + n_backbone * concept_layer + n_cross * cross + between + logits
    return np.where((d >= _LEAST_WIDTH) & (D >= _LEAST_WIDTH), total, np.inf)


@functools.lru_cache(maxsize=4096)
def size_at_cost(
    training_per_token: float,
    *,
    vocab_size: int,
    seq_len: int,
    rule: ShapeRule = DEFAULT_RULE,
    d_head: int | None = None,
) -> float:
    """The size whose integer dense shape costs `training_per_token` FLOPs, as nearly as the shapes near it allow.

    Where the smooth cost has the answer, the integer shape may be some percent off, more so for small models with a large
    head; sizes within 16% on either side are therefore tried, until one costs the same within 0.2%, and the nearest taken.

    Raises:
        UserError: no dense model is that cheap, or every shape near it is more than 5% off.
    """
    cost = cost_function(vocab_size=vocab_size, seq_len=seq_len, rule=rule, parts=Parts(d_head=d_head))

    def is_below(size: float) -> bool:
        spent = cost(size, 1.0, 1.0, 0.0)
        return spent < training_per_token or math.isinf(spent)  # infinite: too few parameters for any width

    low, high = 1e2, 1e14
    if not is_below(low) or is_below(high):
        raise UserError(f"no dense model costs {training_per_token:g} training FLOPs per token")
    for _ in range(80):  # bisection in log N: the cost rises with N; 80 halvings are below the resolution of a float
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_below(middle) else (low, middle)
    best: tuple[float, float] | None = None
    for step in sorted(_SCAN, key=abs):
        size = float(f"{low * math.exp(step):.6g}")
        try:
            shape = dense_shape(size, rule, d_head)
        except UserError:
            continue
        model = ModelConfig.model_validate({"kind": "dense", "vocab_size": vocab_size, **shape})
        error = abs(count(model, seq_len).training_per_token / training_per_token - 1)
        if best is None or error < best[0]:
            best = (error, size)
        if error < _CLOSE:
            break
    if best is None or best[0] > _FAR:
        nearest = f"; the nearest, of size {best[1]:,.0f}, is {100 * best[0]:.0f}% off" if best else ""
        raise UserError(
            f"no dense shape costs {training_per_token:g} training FLOPs per token{nearest}: the head of so small a model "
            "outweighs the rest; raise the size, lower the vocabulary, or match the baseline by parameters"
        )
    return best[1]
