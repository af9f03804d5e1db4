"""Where a sweep's learning rates come from: a file that `dlcm analyze lr` wrote, or the sweep's own words.

schema: 1
lr_token: 0.01          # of the base widths
lr_concept: 0.01
d_token_base: 64
d_concept_base: 64
source: {sweep: lr_transfer, results: 3f0c..., transfers: true}
"""

import hashlib
from collections.abc import Set
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from dlcm.config import Frozen
from dlcm.errors import UserError, parse
from dlcm.yaml_io import load_yaml

RATES = {"optim.lr_token": "lr_token", "optim.lr_concept": "lr_concept"}
BASES = {"model.d_token_base": "d_token_base", "model.d_concept_base": "d_concept_base"}


class Source(Frozen):
    """The runs behind tuned rates."""

    sweep: str = Field(description="name of the sweep")
    results: str = Field(description="SHA-256 of its results, hexadecimal")
    transfers: bool | None = Field(
        description="whether the best rate stayed in place over the widths; None for one width"
    )


class TunedRates(Frozen):
    """Learning rates of the base widths, and the widths that they hold for."""

    schema_version: int = Field(alias="schema", description="version of this file's layout", ge=1, le=1)
    lr_token: PositiveFloat = Field(description="peak rate of the token side at the base width")
    lr_concept: PositiveFloat = Field(description="peak rate of the concept side at the base width")
    d_token_base: PositiveInt = Field(description="token width that the rates hold at")
    d_concept_base: PositiveInt = Field(description="concept width that they hold at")
    batch_tokens: PositiveInt | None = Field(default=None, description="tokens of a step of the runs behind it")
    tokens: PositiveInt | None = Field(default=None, description="training tokens of those runs")
    source: Source


def read_tuned(path: Path) -> TunedRates:
    """Read a tuned file.

    Raises:
        UserError: no such file, or not one of these.
    """
    return parse(TunedRates, load_yaml(path), str(path))


def apply_tuned(path: Path, given: Set[str], where: str) -> dict[str, Any]:
    """Values of the base of a sweep that a tuned file sets.

    Args:
        path: the file.
        given: keys that the sweep sets in its base or axes.
        where: names the sweep in messages.

    Raises:
        UserError: no such file, not one of these, or the sweep sets a rate or a base width as well.
    """
    found = read_tuned(path)
    values = {key: getattr(found, name) for key, name in (RATES | BASES).items()}
    if clash := [key for key in values if key in given]:
        raise UserError(f"{where}: both tuned ({path.name}) and {clash[0]} set it; keep one")
    return values


def describe_source(path: str | None, given: Set[str]) -> str:
    """In words, for the column `lr_source`: the file with a hash of its content, the sweep file, or the default."""
    if path is not None:
        return f"{Path(path).name} sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}"
    return "sweep file" if any(key in given for key in RATES) else "default"
