"""Rules of a sweep: how many tokens a step and the warm-up take, and how short a run may be. No torch."""

import math
from typing import Literal

from pydantic import Field, model_validator

from dlcm.config import FINAL_SHARE, Frozen, OptimConfig, RunConfig

PUBLISHED_BATCH = {"tokens": (0.58, 0.571), "flops": (0.2920, 0.3271)}
"""Coefficient and exponent of published laws of the best batch, in tokens; `BatchRule` has their sources."""


class BatchRule(Frozen):
    """How many tokens an optimizer step takes.

    `fixed` takes `train.batch_tokens`. `power` takes B = coefficient · X^exponent tokens, rounded to the nearest whole
    number of micro-batches (of windows, where `train.micro_batch_tokens` is not given), at least one. X is

    - `tokens`: the training tokens of the run, D. Default B = 0.58 · D^0.571 (Step Law: Li et al. 2025, arXiv
      2503.04715; runs of 59M to 1B parameters). Runs of equal length then have equal batches, whatever their N, P and R,
      and differ in nothing else. Zhang et al. 2024 (arXiv 2410.21676) find the critical batch, too, to follow D and
      hardly N: their exponent is 0.47.
    - `flops`: the training FLOPs of the run without the head, C. Default B = 0.2920 · C^0.3271 (DeepSeek LLM 2024, arXiv
      2401.02954, eq. 1; fitted from 1e17 to 2e19 FLOPs). Their C counts attention as a full square, ours its causal
      half, which moves B by some percent at most.

    Both laws were fitted to dense models far above the size of a proxy: outside their range they are extrapolations.
    Learning rates do not follow the batch: they are those of `optim`, tuned at one batch and scaled by width (muP).
    """

    rule: Literal["fixed", "power"] = Field(default="fixed", description="`fixed`: train.batch_tokens; `power`: a law")
    of: Literal["tokens", "flops"] | None = Field(default=None, description="X of the power law; tokens where absent")
    coefficient: float | None = Field(default=None, gt=0, description="the published one where absent")
    exponent: float | None = Field(default=None, ge=0, le=1, description="the published one where absent")

    @model_validator(mode="after")
    def _check(self) -> "BatchRule":
        given = [name for name in ("of", "coefficient", "exponent") if getattr(self, name) is not None]
        if self.rule == "fixed" and given:
            raise ValueError(f"batch.{given[0]} has no meaning with rule: fixed; remove it, or set rule: power")
        if (self.coefficient is None) != (self.exponent is None):
            raise ValueError(
                "batch takes coefficient and exponent together: one without the other is no law; give both"
            )
        return self

    def batch_tokens(self, x: float, unit: int) -> int:
        """Tokens of a step under the power law.

        Args:
            x: training tokens, or training FLOPs without the head, as `of` says.
            unit: tokens of a micro-batch, or of a window.
        """
        coefficient, exponent = PUBLISHED_BATCH[self.of or "tokens"]
        if self.coefficient is not None and self.exponent is not None:
            coefficient, exponent = self.coefficient, self.exponent
        return max(1, math.floor(coefficient * x**exponent / unit + 0.5)) * unit


class WarmupRule(Frozen):
    """How many tokens the warm-up takes.

    `fixed` takes what `optim.warmup_tokens` or `optim.warmup_share` say. `parameters` takes coefficient x N tokens, with N the
    non-embedding parameters (N tokens: Porian et al. 2024, arXiv 2406.19146, who found that a warm-up that is long beside
    the model bends the law of small models). It does not depend on the length of a run: runs of one model differ in
    their decay alone, and under `wsd` share a trunk.
    """

    rule: Literal["fixed", "parameters"] = Field(
        default="fixed", description="`fixed`: as `optim` says; `parameters`: by N"
    )
    coefficient: float = Field(default=1.0, gt=0, description="tokens per non-embedding parameter")

    def tokens(self, non_embedding: int) -> int:
        """Tokens of the warm-up of a model under the rule `parameters`."""
        return round(self.coefficient * non_embedding)


class Minimum(Frozen):
    """How short a run may be. A plan with a shorter one is refused: its loss says more of the schedule than of the model."""

    steps: int | None = Field(
        default=None,
        ge=0,
        description="optimizer steps; by default as many as give the warm-up, the decay and the last tenth, over which R is "
        "averaged, a whole step each: 20 with the default schedule; 0 allows all",
    )
    tokens_per_parameter: float = Field(
        default=0.0, ge=0, description="training tokens over non-embedding parameters; 0 allows all"
    )

    def steps_of(self, optim: OptimConfig) -> int:
        """The least number of steps under a schedule."""
        if self.steps is not None:
            return self.steps
        warmup_share = optim.warmup_share if optim.warmup_tokens is None else 0.0
        shares = (FINAL_SHARE, warmup_share, optim.decay_share if optim.schedule == "wsd" else 0.0)
        return max(math.ceil(1 / share - 1e-9) for share in shares if share > 0)

    def fault(self, config: RunConfig, non_embedding: int) -> str:
        """Why a run is too short, and the way out; empty where it is not.

        Tokens are whole steps, so a run within one step of the tokens that are asked for has them.

        Args:
            config: the run.
            non_embedding: its non-embedding parameters.
        """
        if config.n_steps < (least := self.steps_of(config.optim)):
            told = f"minimum.steps = {least}"
            if self.steps is None:
                told = f"the {least} that its schedule needs"
            way_out = "raise the budget, lower the batch, or set minimum.steps lower (0 allows all)"
            return f"{config.n_steps} steps are fewer than {told}; {way_out}"
        if config.tokens + config.train.batch_tokens <= self.tokens_per_parameter * non_embedding:
            ratio = config.tokens / non_embedding
            way_out = "raise the budget, lower the size, or lower minimum.tokens_per_parameter (0 allows all)"
            return (
                f"{ratio:.3g} tokens per parameter are fewer than minimum.tokens_per_parameter = "
                f"{self.tokens_per_parameter:g}; {way_out}"
            )
        return ""
