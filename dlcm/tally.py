"""Running sums of a training run, and those of one step."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Tally:
    """Sums that a resumed run must continue from. Plain numbers, stored in the checkpoint."""

    loss_sum: float = 0.0
    boundary_sum: float = 0.0
    prob_sum: float = 0.0
    n_tokens: int = 0
    final_tokens: int = 0
    final_concepts: int = 0
    running_loss: float | None = None
    uncalibrated: float | None = None
    wall_s: float = 0.0
    stable_loss: float | None = None
    trunk: str | None = None
    trunk_tokens: int = 0
    trunk_wall_s: float = 0.0

    def reset_interval(self) -> None:
        """Begin the next log interval."""
        self.loss_sum = self.boundary_sum = self.prob_sum = 0.0
        self.n_tokens = 0


@dataclass
class StepSums:
    """Sums over the micro-batches of one step."""

    loss: float = 0.0
    concepts: int = 0
    prob: float = 0.0
    tokens: int = 0
    scores: list[Tensor] = field(default_factory=list)
