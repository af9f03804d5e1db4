"""What a forward pass returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm.boundary import Boundaries
from dlcm.concepts import Segments

# Where activations are measured, in the order in which a token meets them; a dense model has the first two.
PARTS = ("embedding", "encoder", "concepts", "decoder")


@dataclass(frozen=True)
class Output:
    """What a forward pass returns; the leading shape is that of the tokens.

    Attributes:
        logits: (..., V), in the compute dtype; (..., 0) where targets were given.
        boundaries: bool; every token for a dense model.
        boundary_prob: p_t; ones for a dense model.
        segments: the concepts, packed; None for a dense model and with a cache.
        detection: scores and statistics of the detector; None for a dense model or injected boundaries.
        loss_sum: sum of the cross-entropies in nats, differentiable; None without targets.
        nats: cross-entropy of each token, without gradient, like the tokens; None without targets.
        scales: mean square of the activations behind each part, fp32 scalars without gradient; None where not asked for.
    """

    logits: Tensor
    boundaries: Tensor
    boundary_prob: Tensor
    segments: Segments | None
    detection: Boundaries | None
    loss_sum: Tensor | None = None
    nats: Tensor | None = None
    scales: dict[str, Tensor] | None = None

    @property
    def n_concepts(self) -> int:
        """M, the number of concepts; the number of tokens for a dense model."""
        return int(self.boundaries.sum()) if self.segments is None else self.segments.n_concepts

    @property
    def tokens_per_concept(self) -> float:
        """Realised R of this pass: L / M."""
        return self.boundaries.numel() / max(self.n_concepts, 1)


@torch.no_grad()
def mean_square(x: Tensor) -> Tensor:
    """Mean square of activations, in fp32."""
    return x.detach().float().square().mean()
