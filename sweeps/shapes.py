"""From a size N and a concept share P to a real architecture.

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

A ladder of sizes is smooth: at one share P a bigger size is never shallower and, at equal depth, neither width is smaller (with
grouped heads, by no more than a fraction of a head).

Among the integer shapes within tolerance (|N error| <= 1%, |P error| <= 0.01 by default) the one nearest to the ideal
proportions is taken; the search is exhaustive around the real-valued solution and deterministic.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from dlcm.config import Frozen, ModelConfig
from dlcm.errors import UserError
from dlcm.frozen import PositiveInt, Share
from flops import ops

Array = np.ndarray
SHAPE_FIELDS = (
    "d_token", "d_concept", "n_encoder_layers", "n_concept_layers", "n_decoder_layers", "n_heads_token", "n_heads_concept",
    "n_kv_heads_token", "n_kv_heads_concept", "d_ff_token", "d_ff_concept",
)  # fmt: skip
_FF_STEPS = (8, 4, 2)
_FF_RANGE = (0.5, 2.0)  # d_ff may lie between half and twice ff_ratio times the width
_WIDTHS_EACH_SIDE = 4  # steps of width tried on either side of the real-valued width
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
    d_head: PositiveInt | None = Field(
        default=None,
        description="width of a head; 16, 32 or 64 by the dense width where absent; model.d_head comes first",
    )
    multiple_of: PositiveInt | None = Field(
        default=None,
        description="widths and d_ff are multiples of this, e.g. 64 for tensor cores; half the head width, and 8, where absent",
    )
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
    """Width of a head: as the rule says, else 16 below a dense width of 192, 32 below 768, 64 above."""
    if rule.d_head:
        return rule.d_head
    dense_width = math.sqrt(size / (12 * float(real_depth(size, rule))))
    return 16 if dense_width < 192 else 32 if dense_width < 768 else 64


@functools.lru_cache(maxsize=16384)
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
        UserError: no integer shape within tolerance; the message names the nearest one, whose N and P can be asked for.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"concept_share = {share:g} must lie strictly between 0 and 1; a dense model has no backbone")
    _check_size(size)
    return _best(
        f"size = {size:,.0f} and concept_share = {share:g}", rule, functools.partial(_dlcm, size, share, rule, parts)
    )


@functools.lru_cache(maxsize=16384)
def dense_shape(size: float, rule: ShapeRule = DEFAULT_RULE, d_head: int | None = None) -> dict[str, int]:
    """The shape of the dense model with about `size` non-embedding parameters; as `dlcm_shape`."""
    _check_size(size)
    return _best(f"dense size = {size:,.0f}", rule, functools.partial(_dense, size, rule, d_head))


@dataclass(frozen=True)
class _Found:
    """The best candidate of one search: its score, shape, and realised N and P."""

    score: float
    shape: dict[str, int]
    n: int
    p: float


def _best(wanted: str, rule: ShapeRule, search: Callable[[int, int], _Found | None]) -> dict[str, int]:
    """The first shape within tolerance over splits and steps of d_ff in their order of preference.

    Raises:
        UserError: there is none.
    """
    best: _Found | None = None
    steps = (rule.multiple_of,) if rule.multiple_of else _FF_STEPS
    for extra, step in itertools.product((0,) if rule.layers else _EXTRA_LAYERS, steps):
        found = search(step, extra)
        if found is not None and (best is None or found.score < best.score):
            best = found
        if best is not None and best.score < _OUTSIDE:
            return best.shape
    raise _no_shape(wanted, best)


# A shape outside the tolerance scores above every shape within it; inside, proportions decide and misfit breaks ties.
_OUTSIDE = 1e3


def _score(misfit: Array, stretch: Array) -> Array:
    """Squared logarithm of d_ff over its ideal, and a little for the edge of the tolerance."""
    # Landing on the edge weighs like a d_ff that is 17% off its ratio: exp(sqrt(0.025)) = 1.17.
    return np.where(misfit > 1, _OUTSIDE * misfit, 0.025 * misfit) + stretch


def _stretch(f: Array, d: Array, rule: ShapeRule) -> Array:
    return np.log(f / (rule.ff_ratio * d)) ** 2


def _dense(size: float, rule: ShapeRule, d_head: int | None, step: int, extra: int) -> _Found | None:
    """The best dense shape near the real-valued one: every width, each with its two hidden widths."""
    a, n = d_head or head_width(size, rule), sum(split_layers(size, rule)) + extra
    d = _widths(root(*layer_quadratic(n, rule, a, size, tail=1.0)), a, rule)  # (widths,)
    h, kv = _heads(d, a, rule)
    f = _ff_widths((size - d) / n, d, h, kv, a, rule, step)  # (widths, 2)
    found = n * ops.layer_parameters(d[:, None], h[:, None], kv[:, None], a, f) + d[:, None]
    score = _score(abs(found / size - 1) / rule.tolerance_size, _stretch(f, d[:, None], rule))
    i, j = np.unravel_index(int(np.argmin(score)), score.shape)
    shape = {
        "d_token": d[i], "d_head": a, "n_encoder_layers": n, "n_heads_token": h[i], "n_kv_heads_token": kv[i],
        "d_ff_token": f[i, j],
    }  # fmt: skip
    return _Found(float(score[i, j]), {k: int(v) for k, v in shape.items()}, int(found[i, j]), 0.0)


def _dlcm(size: float, share: float, rule: ShapeRule, parts: Parts, step: int, extra: int) -> _Found | None:
    """The best integer shape near the real-valued one, over concept widths x hidden widths x token widths x hidden widths."""
    n_encoder, n_backbone, n_decoder = split_layers(size, rule)
    if (n_backbone := n_backbone + extra) < 1:
        return None
    a, n_token = parts.d_head or head_width(size, rule), n_encoder + n_decoder
    n_cross = n_decoder if parts.cross_everywhere else 1
    D = _widths(root(*layer_quadratic(n_backbone, rule, a, size * share)), a, rule)
    h_D, kv_D = _heads(D, a, rule)
    f_D = _ff_widths(size * share / n_backbone, D, h_D, kv_D, a, rule, step)
    # One row for each concept width and hidden width, (rows,); the token widths then depend on what is left of N.
    D, h_D, kv_D = (np.repeat(v, 2) for v in (D, h_D, kv_D))
    f_D = f_D.reshape(-1)
    concept = n_backbone * ops.layer_parameters(D, h_D, kv_D, a, f_D)
    rest = size - concept
    d = _widths(token_width(rest, D, n_token, n_cross, rule, a, parts), a, rule)  # (rows, widths)
    h, kv = _heads(d, a, rule)
    between = ops.concept_side_parameters(d, D[:, None], parts.smoothed, parts.with_null) + d
    between = between + ops.boundary_parameters(d, parts.scan_width)
    between = between + n_cross * ops.cross_parameters(d, D[:, None], h, kv, a)
    f = _ff_widths((rest[:, None] - between) / n_token, d, h, kv, a, rule, step)  # (rows, widths, 2)
    layer = ops.layer_parameters(d[..., None], h[..., None], kv[..., None], a, f)
    total = n_token * layer + between[..., None] + concept[:, None, None]
    p = concept[:, None, None] / total
    misfit = np.maximum(abs(total / size - 1) / rule.tolerance_size, abs(p - share) / rule.tolerance_share)
    score = _score(misfit, _stretch(f, d[..., None], rule) + _stretch(f_D, D, rule)[:, None, None])
    i, j, k = np.unravel_index(int(np.argmin(score)), score.shape)
    shape = {
        "d_token": d[i, j], "d_concept": D[i], "d_head": a, "n_encoder_layers": n_encoder, "n_concept_layers": n_backbone,
        "n_decoder_layers": n_decoder, "n_heads_token": h[i, j], "n_kv_heads_token": kv[i, j], "n_heads_concept": h_D[i],
        "n_kv_heads_concept": kv_D[i], "d_ff_token": f[i, j, k], "d_ff_concept": f_D[i],
    }  # fmt: skip
    integers = {key: int(value) for key, value in shape.items()}
    return _Found(float(score[i, j, k]), integers, int(total[i, j, k]), float(p[i, j, k]))


def _widths(ideal: Any, a: int, rule: ShapeRule) -> Array:
    """Multiples of the unit of width around each ideal, nearest first, (..., widths)."""
    unit = _unit(a, rule)
    centre = np.maximum(1, np.round(np.asarray(ideal) / unit))
    multiples = centre[..., None] + np.arange(-_WIDTHS_EACH_SIDE, _WIDTHS_EACH_SIDE + 1)
    widths = unit * np.maximum(1, multiples)  # repeats of the least width do no harm
    order = np.argsort(abs(widths - np.asarray(ideal)[..., None]), axis=-1, kind="stable")
    return np.take_along_axis(widths, order, axis=-1).astype(np.int64)


def _unit(a: int, rule: ShapeRule) -> int:
    """What widths are multiples of: as the rule says, else half the head width."""
    return rule.multiple_of or max(a // 2, 1)


def _heads(d: Array, a: int, rule: ShapeRule) -> tuple[Array, Array]:
    """Query heads nearest to d / a (a whole number of groups), and key-value heads."""
    kv = np.maximum(1, np.floor(d / (a * rule.heads_per_kv) + 0.5)).astype(np.int64)
    return kv * rule.heads_per_kv, kv


def _ff_widths(layer_budget: Any, d: Array, h: Array, kv: Array, a: int, rule: ShapeRule, step: int) -> Array:
    """The two multiples of `step` around the hidden width that spends `layer_budget` parameters on one layer, (..., 2)."""
    ideal = (layer_budget - ops.layer_parameters(d, h, kv, a, 0)) / (3 * d)
    low, high = (bound * rule.ff_ratio * d for bound in _FF_RANGE)
    # A budget that no d_ff in range spends: the end of the range, so that the nearest feasible shape can be named.
    ideal = np.minimum(np.maximum(ideal, np.maximum(low, step)), high)
    below = np.maximum(step, step * np.floor(ideal / step))
    above = np.maximum(step, step * np.ceil(ideal / step))
    return np.stack([below, above], axis=-1).astype(np.int64)


def layer_quadratic(n_layers: Any, rule: ShapeRule, a: Any, target: Any, tail: Any = 0.0) -> tuple[Any, Any, Any]:
    """Coefficients of n·(c2·d² + 2d + 2a) + tail·d = target in d, with d_ff = ff_ratio·d and h·a = d."""
    c2 = 2 + 2 / rule.heads_per_kv + 3 * rule.ff_ratio
    return n_layers * c2, 2 * n_layers + tail, 2 * a * n_layers - target


def token_width(rest: Any, D: Any, n_token: Any, n_cross: Any, rule: ShapeRule, a: Any, parts: Parts) -> Any:
    """The real d at which everything but the backbone has `rest` parameters: a quadratic, because h·a = d throughout."""
    group = rule.heads_per_kv
    quadratic, linear, constant = layer_quadratic(n_token, rule, a, rest, tail=1.0)
    quadratic = quadratic + 2 * n_cross
    linear = linear + D + 2 * parts.scan_width + n_cross * (1 + 2 * D / group)
    constant = constant + (1 + parts.with_null + ops.SMOOTHER_WIDTH * parts.smoothed) * D + 2 * a * n_cross
    return root(quadratic, linear, constant)


def root(quadratic: Any, linear: Any, constant: Any) -> Any:
    """The positive root; 0 where the target is too small for any width."""
    root = (-linear + np.sqrt(np.maximum(linear * linear - 4 * quadratic * constant, 0.0))) / (2 * quadratic)
    return np.maximum(root, 0.0)


def _check_size(size: float) -> None:
    if not size > 0 or not math.isfinite(size):
        raise UserError(f"size = {size:g} must be a positive number of non-embedding parameters")


def _no_shape(wanted: str, best: _Found | None) -> UserError:
    if best is None:
        return UserError(f"{wanted}: no shape exists; raise the size")
    shape = best.shape
    layers = [shape[key] for key in ("n_encoder_layers", "n_concept_layers", "n_decoder_layers") if key in shape]
    widths = "x".join(str(shape[key]) for key in ("d_token", "d_concept") if key in shape)
    near = f"size {best.n:,}" + (f", concept_share {best.p:.3f}" if "d_concept" in shape else "")
    return UserError(
        f"{wanted}: no integer shape within tolerance; nearest is {near} (layers {'+'.join(map(str, layers))}, width {widths}): "
        "ask for that, raise the size, or loosen shape.tolerance_size and shape.tolerance_share"
    )
