"""What N, D, C, R, P and the loss mean in a data set, in words that go on the card of every fit."""

import dataclasses
from typing import Literal

from dlcm.errors import UserError

NConvention = Literal["non_embedding", "total"]
CConvention = Literal["causal", "full"]
RConvention = Literal["evaluation", "training", "target"]

N_TEXT = {
    "non_embedding": "parameters without embedding and unembedding (params_total - params_embedding)",
    "total": "all parameters (params_total)",
}
_D_TEXT = {"tokens": "training tokens"}
_P_TEXT = {"non_embedding": "backbone parameters over parameters without embeddings (params_concept / N_non_embedding)"}
_LOSS_TEXT = {"nats": "validation loss, nats per token"}
C_COLUMN = {"causal": "flops_train", "full": "flops_train_full"}
C_TEXT = {
    "causal": "training FLOPs at the realised R, causal attention halved (flops_train)",
    "full": "training FLOPs at the realised R, attention as full squares (flops_train_full)",
}
R_COLUMN = {"evaluation": "tokens_per_concept", "training": "tokens_per_concept_train", "target": "compression_target"}
R_TEXT = {
    "evaluation": "realised tokens per concept at evaluation",
    "training": "realised tokens per concept in training, last 10% of steps",
    "target": "requested tokens per concept",
}


@dataclasses.dataclass(frozen=True)
class Convention:
    """What N, C and R mean in a data set. Fits under different conventions are never compared.

    Each is a word for what this toolkit's tables hold, or else the words in which a user's table was mapped.
    """

    n: str = "non_embedding"
    c: str = "causal"
    r: str = "evaluation"
    d: str = "tokens"
    p: str = "non_embedding"
    loss: str = "nats"

    def definitions(self) -> dict[str, str]:
        """Symbol -> definition, for the fit card."""
        return {
            "N": N_TEXT.get(self.n, self.n),
            "D": _D_TEXT.get(self.d, self.d),
            "C": C_TEXT.get(self.c, self.c),
            "R": R_TEXT.get(self.r, self.r),
            "P": _P_TEXT.get(self.p, self.p),
            "loss": _LOSS_TEXT.get(self.loss, self.loss),
        }

    def require_same(self, other: "Convention", what: str) -> None:
        """Refuse to mix conventions.

        Raises:
            UserError: N, C or R mean different things in the two.
        """
        if self != other:
            mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
            differ = [key for key in mine if mine[key] != theirs[key]]
            first, second = (", ".join(f"{key.upper()} {v[key]}" for key in differ) for v in (mine, theirs))
            raise UserError(
                f"{what}: conventions differ ({first}; {second}); load both results with the same n, c and r"
            )


DEFAULT = Convention()


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """A run that is left out of a fit, and why; the family of the model where it is known."""

    run_id: str
    reason: str
    family: str = dataclasses.field(default="", compare=False)
