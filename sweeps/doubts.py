"""What a user should know of a plan before it is trained: sentences that stop nothing. No torch."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.epochs import plan_repeats
from sweeps.tuned import read_tuned

if TYPE_CHECKING:
    from sweeps.plan import Plan

# The best rate falls with the tokens of a run, and rises with those of a step, by some power below one: within these factors
# by a step or so of the grid (x1.5) that rates are searched on.
_FAR_BATCH, _FAR_TOKENS = 2.0, 10.0


def plan_doubts(plan: "Plan") -> tuple[str, ...]:
    """Repeated text, tuned rates that are used far from where they were found, validation sets that differ."""
    repeats = plan_repeats(plan)
    return (*([repeats] if repeats else []), *_tuned_doubts(plan), *_validation_doubts(plan))


def _tuned_doubts(plan: "Plan") -> Iterator[str]:
    if plan.sweep.tuned is None:
        return
    path = Path(plan.sweep.tuned)
    found, n = read_tuned(path), len(plan.runs)
    if found.source.transfers is False:
        yield (
            f"{path.name}: its best rate did not stay in place over the widths (source.transfers: false): wider models of "
            "this sweep may be trained at a poor rate"
        )
    for name, at, far, values in (
        ("batch_tokens", found.batch_tokens, _FAR_BATCH, [run.config.train.batch_tokens for run in plan.runs]),
        ("tokens", found.tokens, _FAR_TOKENS, [run.tokens for run in plan.runs]),
    ):
        factors = [] if at is None else [math.exp(abs(math.log(value / at))) for value in values]
        if outside := [factor for factor in factors if factor > far]:
            yield (
                f"{path.name}: {len(outside)} of {n} runs have {name} up to {max(outside):.3g} times away from the {at:,} that "
                "the rates were tuned at; the best rate moves with it"
            )


def _validation_doubts(plan: "Plan") -> Iterator[str]:
    windows = sorted({run.config.data.seq_len for run in plan.runs})
    if len(windows) > 1:
        yield (
            f"data.seq_len takes {len(windows)} values ({', '.join(map(str, windows))}): runs of different windows are judged on "
            "other stretches of the validation text, with other contexts; compare losses within one"
        )
