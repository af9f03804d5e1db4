"""Which text a run reads, as its config has it: a corpus, or a mixture of sources. No numpy, so that planning is fast."""

import re
from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import Field

from dlcm.frozen import Frozen, PositiveInt

# Windows in a block of the training stream, in which every source has its share of them (`dlcm.mixture`).
BLOCK_WINDOWS = 1_024
MAX_SOURCES = 64
_NAME = re.compile(r"[a-z0-9_]{1,32}")
# Columns of results that are there already: `loss_nats_stable`, `tokens_per_concept_train`.
_TAKEN_NAMES = ("stable", "train")
# Decimals of a weight: 7 beside 3 is the same mixture as 0.7 beside 0.3, to the last digit that counts.
_DIGITS = 12


class SourceConfig(Frozen):
    """One source of a mixture."""

    corpus: str = Field(description="as `data.corpus`")
    weight: float = Field(gt=0.0, description="share of the training tokens; the weights are scaled to a sum of 1")
    text_key: str = Field(default="text", description="as `data.text_key`")


def normalised(sources: Mapping[str, SourceConfig]) -> dict[str, SourceConfig]:
    """The sources in the order of their names, weights scaled to a sum of 1: one way to write one mixture.

    Raises:
        ValueError: a name that could be no column, fewer than two sources, or one with less than a window of a block.
    """
    for name in sources:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} names no source; use up to 32 of a-z, 0-9 and _")
        if name in _TAKEN_NAMES:
            raise ValueError(f"{name!r} would name columns of results that mean something else; choose another name")
    if not 2 <= len(sources) <= MAX_SOURCES:
        way_out = "give a single one as data.corpus" if len(sources) < 2 else "join some of them in one folder"
        raise ValueError(f"{len(sources)} of the 2 to {MAX_SOURCES} sources that a mixture takes; {way_out}")
    total = sum(source.weight for source in sources.values())
    # Weights that were scaled before are left as they are: read back, a config stays the same config.
    scale = 1.0 if abs(total - 1.0) < 1e-9 else total
    found = {}
    for name, source in sorted(sources.items()):
        weight = round(source.weight / scale, _DIGITS)
        if weight < 1 / BLOCK_WINDOWS:
            raise ValueError(
                f"{name}.weight is {weight:.3g} of the whole, less than one window in {BLOCK_WINDOWS}; raise it, or leave "
                "the source out"
            )
        found[name] = source.model_copy(update={"weight": weight})
    return found


def check_alone(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse keys of a plain corpus beside a mixture, which has its own in each source.

    Args:
        given: `corpus` and `text_key` of the data.
        defaults: what they are where nobody gave them.

    Raises:
        ValueError: one of them was given.
    """
    for name, value in given.items():
        if value != defaults[name]:
            raise ValueError(f"both {name} = {value!r} and a mixture, whose sources have a {name} each; keep one")


class DataConfig(Frozen):
    """Which text, cut how."""

    corpus: str = Field(
        default="stdlib",
        description="`stdlib`, `packages`, `hf:NAME`, or a path: text file, folder, .jsonl[.gz|.zst], .parquet",
    )
    tokenizer: str = Field(
        default="bpe-4096", description="`bytes`, `bpe-VOCAB` (trained on the corpus), a tokenizer.json, or `hub:NAME`"
    )
    text_key: str = Field(default="text", description="key or column of the text in JSONL, parquet and hub data sets")
    mixture: dict[str, SourceConfig] | None = Field(
        default=None,
        description="several sources in place of `corpus`, by name, each with `corpus`, `weight`, `text_key`",
    )
    seq_len: PositiveInt = Field(
        default=256, description="tokens of one packed window; attention never crosses a document"
    )
    validation_share: float = Field(
        default=0.05, gt=0.0, lt=1.0, description="share of documents kept for validation, by content hash"
    )
    validation_tokens: PositiveInt = Field(default=65_536, description="tokens of the fixed validation set, at most")

    @pydantic.field_validator("mixture")
    @classmethod
    def _normalise(cls, sources: dict[str, SourceConfig] | None) -> dict[str, SourceConfig] | None:
        return None if sources is None else normalised(sources)

    @pydantic.model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.mixture is not None:
            fields = type(self).model_fields
            plain = ("corpus", "text_key")
            check_alone({name: getattr(self, name) for name in plain}, {name: fields[name].default for name in plain})
        return self
