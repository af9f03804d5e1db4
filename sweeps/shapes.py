"""From a size N and a concept share P to a real architecture, and the cost of the shapes in between.

The rule, for N non-embedding parameters and share P of them in the backbone:

1. The dense model of that size has `aspect` units of width for each layer: N = 12·n·d² and d = aspect·n give its depth
   n = (N / (12·aspect²))^(1/3), at least `min_layers`, rounded to an even number.
2. A DLCM keeps that depth. `backbone_depth` of its layers are the backbone; of the rest, `encoder_depth` stand before it
   and the others behind it (10 + 16 + 6 of 32 layers in the paper). `layers` fixes the split instead, for sweeps over
   width alone (muP).
3. The head width is 16, 32 or 64 by the dense width; it does not depend on P, so that shapes of one size are alike.
4. Widths are then free: the concept width D solves (backbone parameters) = N·P, the token width d solves (all the rest) =
   N·(1 - P). Both are multiples of half the head width, and have the nearest number of heads (72 wide: 5 heads of 16).
   The SwiGLU's hidden width, near `ff_ratio` times the width and a multiple of 8 (4 or 2 where 8 is too coarse), takes
   up what the rounding left over.

Among the integer shapes within tolerance (|N error| <= 1%, |P error| <= 0.01 by default) the one nearest to the ideal
proportions is taken; the search is exhaustive around the real-valued solution and deterministic.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from dlcm.config import Frozen, ModelConfig, PositiveInt, Share
from dlcm.errors import UserError
from flops import ops

SHAPE_FIELDS = (
    "d_token", "d_concept", "n_encoder_layers", "n_concept_layers", "n_decoder_layers", "n_heads_token", "n_heads_concept",
    "n_kv_heads_token", "n_kv_heads_concept", "d_ff_token", "d_ff_concept",
)  # fmt: skip
_FF_STEPS = (8, 4, 2)
_FF_RANGE = (0.5, 2.0)  # d_ff may lie between half and twice ff_ratio times the width
_WIDTHS_EACH_SIDE = 4  # steps of width tried on either side of the real-valued width
_LEAST_WIDTH = 8
_EXTRA_LAYERS = (0, -1, 1)  # tried in this order where the stated split has no shape within tolerance


class ShapeRule(Frozen):
    """How a size becomes an architecture; the defaults are the paper's proportions."""

    aspect: float = Field(default=48.0, gt=0.0, description="width over depth of the dense model of the same size")
    min_layers: int = Field(default=4, ge=3, description="least depth, encoder + backbone + decoder")
    backbone_depth: float = Field(default=0.5, gt=0.0, lt=1.0, description="share of the layers in the backbone")
    encoder_depth: float = Field(
        default=0.625, gt=0.0, lt=1.0, description="share of the token-side layers before the backbone"
    )
    layers: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        default=None, description="encoder, backbone and decoder layers of every size; a dense model has their sum"
    )
    ff_ratio: float = Field(default=8 / 3, gt=0.0, description="hidden width of the SwiGLU over the width, about")
    heads_per_kv: PositiveInt = Field(default=1, description="query heads that share one key-value head (GQA)")
    tolerance_size: Share = Field(default=0.01, description="largest relative error of N")
    tolerance_share: Share = Field(default=0.01, description="largest absolute error of P")

    def __hash__(self) -> int:
        """Shapes are cached by their rule."""
        return hash(tuple(self.__dict__.values()))


@dataclass(frozen=True)
class Parts:
    """The choices of a model config that its parameter count depends on beside the widths."""

    detector: str = "learned"
    d_scan: int = 64
    smoothed: bool = True
    with_null: bool = True
    cross_everywhere: bool = True
    d_head: int | None = None

    @classmethod
    def of(cls, model: dict[str, Any]) -> "Parts":
        """Those of a nested mapping of model fields; the config's defaults where a key is absent."""
        boundary = model.get("boundary") or {}
        fields = ModelConfig.model_fields
        return cls(
            detector=boundary.get("detector", cls.detector),
            d_scan=boundary.get("d_scan", cls.d_scan),
            smoothed=model.get("smoothing", fields["smoothing"].default) == "causal",
            with_null=model.get("pooling", fields["pooling"].default) == "mean",
            cross_everywhere=model.get("cross_attention", fields["cross_attention"].default) == "every_layer",
            d_head=model.get("d_head"),
        )

    @property
    def scan_width(self) -> int:
        """d_scan of a learned boundary, 0 of every other."""
        return self.d_scan if self.detector == "learned" else 0


DEFAULT_RULE, DEFAULT_PARTS = ShapeRule(), Parts()


def real_depth(size: Any, rule: ShapeRule) -> Any:
    """Depth of the dense model of `size` parameters as a real number: (N / (12·aspect²))^(1/3), at least `min_layers`."""
    if rule.layers:
        return np.full_like(np.asarray(size, dtype=float), sum(rule.layers))
    return np.maximum(rule.min_layers, np.cbrt(np.asarray(size, dtype=float) / (12 * rule.aspect**2)))


def split_layers(size: float, rule: ShapeRule) -> tuple[int, int, int]:
    """Encoder, backbone and decoder layers at `size` non-embedding parameters."""
    if rule.layers:
        return rule.layers
    depth = max(rule.min_layers, 2 * math.floor(float(real_depth(size, rule)) / 2 + 0.5))
    backbone = min(max(1, round(depth * rule.backbone_depth)), depth - 2)
    encoder = min(max(1, math.floor((depth - backbone) * rule.encoder_depth + 0.5)), depth - backbone - 1)
    return encoder, backbone, depth - backbone - encoder


def head_width(size: float, rule: ShapeRule) -> int:
    """Width of a head: 16 below a dense width of 192, 32 below 768, 64 above."""
    dense_width = math.sqrt(size / (12 * float(real_depth(size, rule))))
    return 16 if dense_width < 192 else 32 if dense_width < 768 else 64


@functools.lru_cache(maxsize=4096)
def dlcm_shape(
    size: float, share: float, rule: ShapeRule = DEFAULT_RULE, parts: Parts = DEFAULT_PARTS
) -> dict[str, int]:
    """The shape of a DLCM with about `size` non-embedding parameters, `share` of them in the backbone.

    Args:
        size: N, non-embedding parameters.
        share: P, strictly between 0 and 1.
        rule: proportions and tolerances.
        parts: what else the parameter count depends on.

    Returns:
        The shape fields of `ModelConfig` (the caller must not change the mapping: it is shared).

    Raises:
        UserError: no integer shape within tolerance; the message names the nearest one and its N and P.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"concept_share = {share:g} must lie strictly between 0 and 1; a dense model has no backbone")
    _check_size(size)
    best: tuple[float, dict[str, int], float, float] | None = None
    for extra, step in itertools.product(_EXTRA_LAYERS, _FF_STEPS):
        for shape, n, p in _dlcm_candidates(size, share, rule, parts, step, extra):
            misfit = max(abs(n / size - 1) / rule.tolerance_size, abs(p - share) / rule.tolerance_share)
            score = _score(misfit, shape, rule)
            if best is None or score < best[0]:
                best = (score, shape, n, p)
        if best is not None and best[0] < _OUTSIDE:
            return best[1]
    raise _no_shape(f"size = {size:,.0f} and concept_share = {share:g}", best)


@functools.lru_cache(maxsize=4096)
def dense_shape(size: float, rule: ShapeRule = DEFAULT_RULE, d_head: int | None = None) -> dict[str, int]:
    """The shape of the dense model with about `size` non-embedding parameters; as `dlcm_shape`."""
    _check_size(size)
    a = d_head or head_width(size, rule)
    depth = sum(split_layers(size, rule))
    best: tuple[float, dict[str, int], float, float] | None = None
    for extra, step in itertools.product(_EXTRA_LAYERS, _FF_STEPS):
        n = depth + (0 if rule.layers else extra)
        ideal = _root(*_layer_quadratic(n, rule, a, size, tail=1.0))
        for d in _widths(ideal, a):
            h, kv = _heads(d, a, rule)
            for f in _ff_widths((size - d) / n, d, h, kv, a, rule, step):
                found = n * ops.layer_parameters(d, h, kv, a, f) + d
                shape = {
                    "d_token": d, "d_head": a, "n_encoder_layers": n, "n_heads_token": h, "n_kv_heads_token": kv, "d_ff_token": f,
                }  # fmt: skip
                score = _score(abs(found / size - 1) / rule.tolerance_size, shape, rule)
                if best is None or score < best[0]:
                    best = (score, shape, found, 0.0)
        if best is not None and best[0] < _OUTSIDE:
            return best[1]
    raise _no_shape(f"dense size = {size:,.0f}", best)


# A shape outside the tolerance scores above every shape within it; inside, proportions decide and misfit breaks ties.
_OUTSIDE = 1e3


def _score(misfit: float, shape: dict[str, int], rule: ShapeRule) -> float:
    stretch = math.log(shape["d_ff_token"] / (rule.ff_ratio * shape["d_token"])) ** 2
    if "d_concept" in shape:
        stretch += math.log(shape["d_ff_concept"] / (rule.ff_ratio * shape["d_concept"])) ** 2
    # Landing on the edge of the tolerance weighs like a d_ff that is 17% off its ratio: exp(sqrt(0.025)) = 1.17.
    return (_OUTSIDE * misfit if misfit > 1 else 0.025 * misfit) + stretch


def _dlcm_candidates(
    size: float, share: float, rule: ShapeRule, parts: Parts, step: int, extra: int
) -> Iterator[tuple[dict[str, int], int, float]]:
    """Integer shapes near the real-valued solution, each with its N and P."""
    n_encoder, n_backbone, n_decoder = split_layers(size, rule)
    if extra and rule.layers:
        return
    if (n_backbone := n_backbone + extra) < 1:
        return
    a = parts.d_head or head_width(size, rule)
    n_cross = n_decoder if parts.cross_everywhere else 1
    ideal_D = _root(*_layer_quadratic(n_backbone, rule, a, size * share))
    for D in _widths(ideal_D, a):
        h_D, kv_D = _heads(D, a, rule)
        for f_D in _ff_widths(size * share / n_backbone, D, h_D, kv_D, a, rule, step):
            concept = n_backbone * ops.layer_parameters(D, h_D, kv_D, a, f_D)
            rest = size - concept
            ideal_d = _token_width(rest, D, n_encoder + n_decoder, n_cross, rule, a, parts)
            for d in _widths(ideal_d, a):
                h, kv = _heads(d, a, rule)
                between = ops.concept_side_parameters(d, D, parts.smoothed, parts.with_null) + d
                between += ops.boundary_parameters(d, parts.scan_width) + n_cross * ops.cross_parameters(d, D, h, kv, a)
                for f in _ff_widths((rest - between) / (n_encoder + n_decoder), d, h, kv, a, rule, step):
                    token = (n_encoder + n_decoder) * ops.layer_parameters(d, h, kv, a, f) + between
                    shape = {
                        "d_token": d, "d_concept": D, "d_head": a, "n_encoder_layers": n_encoder,
                        "n_concept_layers": n_backbone, "n_decoder_layers": n_decoder, "n_heads_token": h,
                        "n_kv_heads_token": kv, "n_heads_concept": h_D, "n_kv_heads_concept": kv_D,
                        "d_ff_token": f, "d_ff_concept": f_D,
                    }  # fmt: skip
                    yield shape, token + concept, concept / (token + concept)


def _widths(ideal: float, a: int) -> list[int]:
    """Multiples of half the head width around `ideal`, nearest first."""
    unit = max(a // 2, 1)
    centre = max(1, round(ideal / unit))
    multiples = range(max(1, centre - _WIDTHS_EACH_SIDE), centre + _WIDTHS_EACH_SIDE + 1)
    return sorted((unit * m for m in multiples), key=lambda width: abs(width - ideal))


def _heads(d: int, a: int, rule: ShapeRule) -> tuple[int, int]:
    """Query heads nearest to d / a (a whole number of groups), and key-value heads."""
    kv = max(1, math.floor(d / (a * rule.heads_per_kv) + 0.5))
    return kv * rule.heads_per_kv, kv


def _ff_widths(layer_budget: float, d: int, h: int, kv: int, a: int, rule: ShapeRule, step: int) -> list[int]:
    """The two multiples of `step` around the hidden width that spends `layer_budget` parameters on one layer."""
    ideal = (layer_budget - ops.layer_parameters(d, h, kv, a, 0)) / (3 * d)
    low, high = (bound * rule.ff_ratio * d for bound in _FF_RANGE)
    # A budget that no d_ff in range spends: the end of the range, so that the nearest feasible shape can be named.
    ideal = min(max(ideal, low, step), high)
    return sorted({max(step, step * math.floor(ideal / step)), step * math.ceil(ideal / step)})


def _layer_quadratic(n_layers: Any, rule: ShapeRule, a: Any, target: Any, tail: Any = 0.0) -> tuple[Any, Any, Any]:
    """Coefficients of n·(c2·d² + 2d + 2a) + tail·d = target in d, with d_ff = ff_ratio·d and h·a = d."""
    c2 = 2 + 2 / rule.heads_per_kv + 3 * rule.ff_ratio
    return n_layers * c2, 2 * n_layers + tail, 2 * a * n_layers - target


def _token_width(rest: Any, D: Any, n_token: Any, n_cross: Any, rule: ShapeRule, a: Any, parts: Parts) -> Any:
    """The real d at which everything but the backbone has `rest` parameters: a quadratic, because h·a = d throughout."""
    group = rule.heads_per_kv
    quadratic, linear, constant = _layer_quadratic(n_token, rule, a, rest, tail=1.0)
    quadratic = quadratic + 2 * n_cross
    linear = linear + D + 2 * parts.scan_width + n_cross * (1 + 2 * D / group)
    constant = constant + (1 + parts.with_null + ops.SMOOTHER_WIDTH * parts.smoothed) * D + 2 * a * n_cross
    return _root(quadratic, linear, constant)


def _root(quadratic: Any, linear: Any, constant: Any) -> Any:
    """The positive root; 0 where the target is too small for any width."""
    root = (-linear + np.sqrt(np.maximum(linear * linear - 4 * quadratic * constant, 0.0))) / (2 * quadratic)
    return np.maximum(root, 0.0)


def _check_size(size: float) -> None:
    if not size > 0 or not math.isfinite(size):
        raise UserError(f"size = {size:g} must be a positive number of non-embedding parameters")


def _no_shape(wanted: str, best: tuple[float, dict[str, int], float, float] | None) -> UserError:
    if best is None:
        return UserError(f"{wanted}: no shape exists; raise the size")
    _, shape, n, p = best
    layers = [shape[key] for key in ("n_encoder_layers", "n_concept_layers", "n_decoder_layers") if key in shape]
    widths = "x".join(str(shape[key]) for key in ("d_token", "d_concept") if key in shape)
    near = f"size {n:,.0f}" + (f", concept_share {p:.3f}" if "d_concept" in shape else "")
    return UserError(
        f"{wanted}: no integer shape within tolerance; nearest is {near} (layers {'+'.join(map(str, layers))}, width {widths}): "
        "ask for that, raise the size, or loosen shape.tolerance_size and shape.tolerance_share"
    )


CostFunction = Callable[[Any, Any, Any, Any], Any]


def cost_function(
    *,
    vocab_size: int,
    seq_len: int,
    rule: ShapeRule = DEFAULT_RULE,
    parts: Parts = DEFAULT_PARTS,
) -> CostFunction:
    """The training FLOPs of a model as a smooth function of N, D, R and P: the shape rule with real-valued widths.

    The depth, the split of the layers and both widths follow the rule at the head of this file without rounding, and
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
        is_dense = P <= 0
        dlcm = _dlcm_forward(
            N, np.where(is_dense, 1.0, R), np.where(is_dense, 0.5, P), vocab_size, seq_len, rule, parts
        )
        forward = np.where(is_dense, _dense_forward(N, vocab_size, seq_len, rule, parts), dlcm)
        total = ops.TRAINING_FACTOR * forward / seq_len * D
        return float(total) if total.ndim == 0 else total

    return cost


def _real_head(size: Any, rule: ShapeRule, parts: Parts) -> Any:
    # The head width only enters the 2a parameters of each QK-norm: its steps move the cost by less than 0.01%.
    return parts.d_head or np.where(np.sqrt(size / (12 * real_depth(size, rule))) < 192, 16, 32)


def _dense_forward(N: Any, vocab_size: int, seq_len: int, rule: ShapeRule, parts: Parts) -> Any:
    """Forward FLOPs of one sequence through the dense model with real-valued depth and width."""
    depth, a = real_depth(N, rule), _real_head(N, rule, parts)
    d = _root(*_layer_quadratic(depth, rule, a, N, tail=1.0))
    layer = ops.layer(seq_len, ops.causal_pairs(seq_len), d, d / a, d / a / rule.heads_per_kv, a, rule.ff_ratio * d)
    return depth * layer + ops.logits(seq_len, d, vocab_size)


def _dlcm_forward(N: Any, R: Any, P: Any, vocab_size: int, seq_len: int, rule: ShapeRule, parts: Parts) -> Any:
    """Forward FLOPs of one sequence through the DLCM with real-valued depth, split and widths."""
    depth, a = real_depth(N, rule), _real_head(N, rule, parts)
    if rule.layers:
        n_backbone, n_decoder = float(rule.layers[1]), float(rule.layers[2])
    else:
        n_backbone = np.maximum(1.0, depth * rule.backbone_depth)
        n_decoder = np.maximum(1.0, (depth - n_backbone) * (1 - rule.encoder_depth))
    n_token = depth - n_backbone
    n_cross = n_decoder if parts.cross_everywhere else 1.0
    group = rule.heads_per_kv
    D = _root(*_layer_quadratic(n_backbone, rule, a, N * P))
    d = _token_width(N * (1 - P), D, n_token, n_cross, rule, a, parts)
    n_concepts = seq_len / R
    token_layer = ops.layer(seq_len, ops.causal_pairs(seq_len), d, d / a, d / a / group, a, rule.ff_ratio * d)
    concept_layer = ops.layer(n_concepts, ops.causal_pairs(n_concepts), D, D / a, D / a / group, a, rule.ff_ratio * D)
    cross = ops.cross_projections(seq_len, n_concepts, d, D, d / a, d / a / group, a)
    cross = cross + ops.attention_scores(ops.cross_pairs(seq_len, n_concepts), d / a, a)
    between = ops.boundary(seq_len, d, parts.scan_width) + ops.pooling(n_concepts, d, D)
    between = between + (ops.smoothing(n_concepts, D) if parts.smoothed else 0.0)
    logits = ops.logits(seq_len, d, vocab_size)
    total = n_token * token_layer + n_backbone * concept_layer + n_cross * cross + between + logits
    return np.where((d >= _LEAST_WIDTH) & (D >= _LEAST_WIDTH), total, np.inf)


def size_at_cost(
    training_per_token: float,
    *,
    vocab_size: int,
    seq_len: int,
    rule: ShapeRule = DEFAULT_RULE,
    d_head: int | None = None,
) -> float:
    """Non-embedding parameters of the dense model that costs `training_per_token` FLOPs (real-valued widths).

    Raises:
        UserError: no dense model is that cheap.
    """
    cost = cost_function(vocab_size=vocab_size, seq_len=seq_len, rule=rule, parts=Parts(d_head=d_head))
    low, high = 1e2, 1e14
    if not cost(low, 1.0, 1.0, 0.0) < training_per_token < cost(high, 1.0, 1.0, 0.0):
        raise UserError(f"no dense model costs {training_per_token:g} training FLOPs per token")
    for _ in range(80):  # bisection in log N: the cost rises with N; 80 halvings are below the resolution of a float
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle, 1.0, 1.0, 0.0) < training_per_token else (low, middle)
    return float(f"{low:.6g}")
