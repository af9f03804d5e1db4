"""Running sums of a training run, and those of one step."""

from collections.abc import Mapping
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
    lowest_loss: float | None = None  # of the running loss
    good_step: int | None = None  # newest checkpoint that was saved near the lowest loss
    uncalibrated: float | None = None
    wall_s: float = 0.0
    stable_loss: float | None = None
    trunk: str | None = None
    trunk_tokens: int = 0
    trunk_wall_s: float = 0.0
    scales: dict[str, float] = field(default_factory=dict)  # of the last step that measured them

    @property
    def tokens_per_concept(self) -> float:
        """R over the interval so far."""
        return self.n_tokens / max(self.boundary_sum, 1)

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
    squares: dict[str, float] = field(default_factory=dict)

    def add_scales(self, scales: Mapping[str, Tensor], n_tokens: int) -> None:
        """Add the mean squares of activations of a micro-batch, weighted by its tokens."""
        for name, square in scales.items():
            self.squares[name] = self.squares.get(name, 0.0) + float(square) * n_tokens
