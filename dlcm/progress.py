"""What a training says while it runs: to its caller after every step, and in metrics.jsonl."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlcm.output import PARTS
from dlcm.tally import Tally


class StopTraining(Exception):
    """Raised by `on_step` to end the training after the step: a checkpoint is saved first, a later start goes on from it."""

    reason = "told to stop"


@dataclass(frozen=True)
class Progress:
    """Where a run stands; passed to `on_step` after every step.

    Attributes:
        step: steps done.
        n_steps: steps in all.
        tokens: tokens done.
        loss_nats: of the step.
        tokens_per_s: of the step, over all ranks.
        mfu: share of the peak FLOP/s that the step reached; None where no peak of the device is known.
        seconds_left: at the mean speed since this start.
    """

    step: int
    n_steps: int
    tokens: int
    loss_nats: float
    tokens_per_s: float
    mfu: float | None = None
    seconds_left: float | None = None

    def told(self) -> str:
        """Loss, speed and MFU in words."""
        mfu = "" if self.mfu is None else f"  MFU {self.mfu:.1%}"
        return f"loss {self.loss_nats:.3f}  {self.tokens_per_s:,.0f} tokens/s{mfu}"


def metrics_row(
    progress: Progress, tally: Tally, *, lr: float, boundary_offset: float | None, grad_norm: float
) -> Mapping[str, Any]:
    """A line of metrics.jsonl (`dlcm.train` says what it holds); what is not finite becomes null."""
    row: dict[str, Any] = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss_nats": tally.loss_sum / tally.n_tokens,
        "lr": lr,
        "boundary_rate": tally.boundary_sum / tally.n_tokens,
        "boundary_prob": tally.prob_sum / tally.n_tokens,
        "boundary_offset": boundary_offset,
        "tokens_per_concept": tally.tokens_per_concept,
        "tokens_per_s": round(progress.tokens_per_s, 1),
        "mfu": None if progress.mfu is None else round(progress.mfu, 4),
        "grad_norm": grad_norm,
        **{f"rms_{part}": tally.scales.get(part) for part in PARTS},
    }
    return {key: None if value is None or not math.isfinite(value) else value for key, value in row.items()}
