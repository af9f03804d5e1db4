"""The coordinate check of muP: do activations keep their scale when a model gets wider?

A model is trained for a few AdamW steps on one batch at several widths, and the root mean square of every group of
activations is recorded. If the parametrisation is right the scales do not depend on the width; then the best learning rate
of a narrow proxy holds for a wide model (Yang et al. 2022). A DLCM has two widths, so it is checked three ways: the token
width grows alone, the concept width grows alone, both grow together.

Three parametrisations can be compared, all from the same initial weights as far as their rules agree:

- `matrix`, ours: every matrix is scaled by the width of its own fan-in (`dlcm.optim`);
- `module`, the paper's (eqs 19, 20): the cross-attention is a token module, so its K and V are scaled by the token width,
  though they read the concept width;
- `standard`: no muP. One learning rate for all matrices, logits not divided.

Shape legend: T tokens, S documents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dlcm.boundary import global_statistics, ratio_loss, uniform_draws
from dlcm.config import ModelConfig, OptimConfig
from dlcm.layers import CrossAttention
from dlcm.loss import next_token_loss
from dlcm.model import Model, Output, build_model
from dlcm.optim import build_optimizer

Axis = Literal["token", "concept", "both"]
Grouping = Literal["matrix", "module", "standard"]
AXES: tuple[Axis, ...] = get_args(Axis)
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)
_LOSS = "loss"


@dataclass(frozen=True)
class TrainingBatch:
    """The one batch that every step of every width sees.

    Attributes:
        tokens_T: int64, documents packed flat.
        targets_T: int64, the next token of each.
        cu_seqlens_S1: int64, starts of the documents and the total length.
    """

    tokens_T: Tensor
    targets_T: Tensor
    cu_seqlens_S1: Tensor


@dataclass(frozen=True)
class CoordinateCheck:
    """Activation scales over widths and steps.

    Attributes:
        axis: which width grew.
        grouping: the parametrisation.
        factors: widths over the base widths, ascending, from 1.
        scales: root mean square by group of activations; one row a factor, one column a step: before the first optimizer
            step, then after each one.
        losses: language-model loss in nats per token; rows and columns as in `scales`.
    """

    axis: Axis
    grouping: Grouping
    factors: tuple[int, ...]
    scales: Mapping[str, tuple[tuple[float, ...], ...]]
    losses: tuple[tuple[float, ...], ...]

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses[0]) - 1

    def growth(self, step: int = -1) -> dict[str, float]:
        """Largest scale of each group over the widths, over its scale at the base width, after `step` steps."""
        return {name: _over(max(row[step] for row in rows), rows[0][step]) for name, rows in self.scales.items()}

    def shrinkage(self, step: int = -1) -> dict[str, float]:
        """Smallest scale of each group over the widths, over its scale at the base width, after `step` steps."""
        return {name: _over(min(row[step] for row in rows), rows[0][step]) for name, rows in self.scales.items()}


def check_coordinates(
    base: ModelConfig,
    batch: TrainingBatch,
    *,
    axis: Axis,
    grouping: Grouping = "matrix",
    factors: Sequence[int] = (1, 2, 4, 8),
    n_steps: int = 10,
    optim: OptimConfig | None = None,
    seeds: Sequence[int] = (0,),
) -> CoordinateCheck:
    """Train `base` and wider models for a few steps and record the scale of their activations.

    Every step is one of training: boundaries are drawn, the ratio loss is added, the controller moves. The learning rate is
    constant, and gradients are not clipped, since clipping to one norm would hide how gradients grow with width.

    Args:
        base: a model at its muP base widths.
        batch: tokens of `base.vocab_size`.
        axis: which width grows. Heads and hidden widths grow along, the width of a head and of the boundary scan do not.
        grouping: the parametrisation.
        factors: widths over the base widths, ascending from 1.
        n_steps: optimizer steps.
        optim: learning rates of the base width, and the rest of AdamW; the defaults of a run by default.
        seeds: of initial weights and boundary draws; scales and losses are means over them, since those of one seed scatter by
            some 20% when a width is small.

    Returns:
        Scales and losses.

    Raises:
        ValueError: factors that do not start at 1, a dense model with a concept axis.
    """
    if not factors or factors[0] != 1:
        raise ValueError(f"factors must start at 1, the base width; got {tuple(factors)}")
    optim = optim or OptimConfig()
    runs = [
        [_train(parametrised(widen(base, factor, axis), grouping, seed), batch, n_steps, optim, seed) for seed in seeds]
        for factor in factors
    ]
    groups = {name: tuple(_mean([run[name] for run in of_width]) for of_width in runs) for name in runs[0][0]}
    losses = groups.pop(_LOSS)
    return CoordinateCheck(axis, grouping, tuple(factors), groups, losses)


def widen(base: ModelConfig, factor: int, axis: Axis) -> ModelConfig:
    """`base` with the token width, the concept width or both `factor` times as large, at the base widths of `base`.

    Raises:
        ValueError: `base` is dense and has no concept width, or is not at its base widths.
    """
    if (base.mup_scale_token, base.mup_scale_concept) != (1.0, 1.0):
        raise ValueError("a coordinate check starts from a model at its muP base widths")
    if base.is_dense and axis != "token":
        raise ValueError("a dense model has a token width alone")
    sides = ("token", "concept") if axis == "both" else (axis,)
    names = ("d_{}", "d_ff_{}", "n_heads_{}", "n_kv_heads_{}")
    wider = {name.format(side): factor * getattr(base, name.format(side)) for side in sides for name in names}
    return ModelConfig.model_validate(base.model_dump() | wider)


@torch.no_grad()
def parametrised(config: ModelConfig, grouping: Grouping, seed: int = 0) -> Model:
    """An initialised model whose optimizer groups and logits follow `grouping`."""
    model = build_model(config, seed=seed)
    if grouping == "module":
        for module in model.modules():
            if isinstance(module, CrossAttention):
                for matrix in (module.w_k, module.w_v):
                    # Initial variance base / s_token in place of base / s_concept, and the learning rate alike.
                    matrix.side = "token"
                    matrix.weight.mul_((config.mup_scale_concept / config.mup_scale_token) ** 0.5)
    if grouping == "standard":
        own = {"d_token_base": config.d_token, "d_concept_base": config.d_concept}
        unscaled = Model(config.model_copy(update=own))
        unscaled.load_state_dict(model.state_dict())
        return unscaled
    return model


def _train(model: Model, batch: TrainingBatch, n_steps: int, optim: OptimConfig, seed: int) -> dict[str, list[float]]:
    """Scales by group, and the loss, before the first step and after each."""
    optimizer = build_optimizer(model, optim)
    probe = _Probe(model)
    rows: dict[str, list[float]] = {}
    for step in range(n_steps + 1):
        # The same draws at every step and width: what moves is the model alone.
        draws_T = uniform_draws(seed, 0, torch.arange(batch.tokens_T.numel())).to(batch.tokens_T.device)
        optimizer.zero_grad(set_to_none=True)
        probe.clear()
        out = model(batch.tokens_T, cu_seqlens=batch.cu_seqlens_S1, draws=draws_T)
        loss = next_token_loss(out.logits, batch.targets_T)
        for name, value in {**probe.scales, "logits": _rms(out.logits), _LOSS: float(loss.detach())}.items():
            rows.setdefault(name, []).append(value)
        if step == n_steps:
            break
        if out.detection is not None and out.detection.score_T is not None:
            loss = loss + _ratio_term(model, out)
            rate = out.n_concepts / out.boundaries.numel()
            model.boundary.control(rate, out.detection.score_T.detach(), first_step=step == 0)
        loss.backward()
        optimizer.step()
    probe.remove()
    return rows


def _ratio_term(model: Model, out: Output) -> Tensor | float:
    config = model.boundary.config
    if config.detector != "learned":
        return 0.0
    statistics = global_statistics(out.n_concepts, out.boundary_prob.sum(), out.boundaries.numel())
    return config.ratio_loss_weight * ratio_loss(statistics, config.compression_ratio)


def watched(model: Model) -> dict[str, nn.Module]:
    """The module behind each group of activations, in the order of the forward pass."""
    modules: dict[str, nn.Module] = {f"encoder.{i}": block for i, block in enumerate(model.encoder)}
    if model.config.is_dense:
        return modules
    if model.boundary.config.detector == "learned":
        modules |= {"boundary.q": model.boundary.w_q, "boundary.k": model.boundary.w_k}
    modules["pooled"] = model.concepts.w_up
    modules |= {f"backbone.{i}": block for i, block in enumerate(model.concepts.blocks)}
    modules["concepts"] = model.concepts
    for i, block in enumerate(model.decoder):
        cross = block.cross
        if isinstance(cross, CrossAttention):
            parts = {"k": cross.w_k, "v": cross.w_v, "out": cross.w_o}
            modules |= {f"cross.{i}.{part}": module for part, module in parts.items()}
        modules[f"decoder.{i}"] = block
    return modules


class _Probe:
    """Forward hooks that keep the scale of every watched module's output in `scales`."""

    def __init__(self, model: Model) -> None:
        self.scales: dict[str, float] = {}
        self._rows: dict[str, int] = {}
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in watched(model).items()]

    def clear(self) -> None:
        self.scales.clear()
        self._rows.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(_module: nn.Module, _args: Any, out: Any) -> None:
            x = out if isinstance(out, Tensor) else out.z_KC
            # W_V is also applied to the null concept, a single row: the call on the concepts is the one with more rows.
            if x.shape[0] >= self._rows.get(name, 0):
                self._rows[name], self.scales[name] = x.shape[0], _rms(x)

        return record


def _over(scale: float, base: float) -> float:
    # Logits are zero at every width before the first step: nothing has grown.
    return scale / base if base else math.inf if scale else 1.0


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows))


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())
