"""How often runs go through their text: where more than once, the tokens of a law are not all new. No torch.

Muennighoff et al. 2023 (arXiv 2305.16264): up to about four epochs, repeated text lowers the loss almost as new text does;
further ones add less and less. A law with D tokens knows nothing of that.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dlcm.config import DataConfig
from dlcm.corpus import open_source
from dlcm.data_config import BLOCK_WINDOWS
from dlcm.errors import UserError
from dlcm.mixture import alone, apportion, mixture_tokens
from dlcm.shards import cached_tokens
from dlcm.tokens import parse_tokenizer

if TYPE_CHECKING:
    from sweeps.plan import Plan

# Where a text is not tokenized yet: bytes of a token of a BPE of some thousand entries on English or code, roughly.
_BYTES_PER_TOKEN = 3.5
# Files whose size says little of the text in them.
_PACKED = (".gz", ".zst", ".parquet")


def describe_repeats(epochs: Iterable[float | None], *, about: bool = False) -> str | None:
    """One sentence on runs that go through their text more than once; None where none does.

    Args:
        epochs: of each run; of a mixture, those of the source that is gone through most often. None or NaN: not known.
        about: they are estimates.
    """
    known = [value for value in epochs if value is not None and not math.isnan(value)]
    repeating = [value for value in known if value > 1.0]
    if not repeating:
        return None
    verb = "goes" if len(repeating) == 1 else "go"
    guess = "about " if about else ""
    estimated = " (estimated from the size of files that are not tokenized yet)" if about else ""
    return (
        f"{len(repeating)} of {len(known)} runs {verb} through text more than once, up to {guess}{max(repeating):.3g} epochs"
        f"{estimated}: the D of a law then counts tokens seen, not unique ones; repeats are worth nearly as much as new text "
        "up to about 4 epochs (Muennighoff et al. 2023)"
    )


def plan_repeats(plan: "Plan") -> str | None:
    """`describe_repeats` of planned runs: exact where their text is tokenized, else estimated where files tell their size."""
    sizes: dict[int, tuple[dict[str, float], bool] | None] = {}
    epochs, guessed = [], False
    for run in plan.runs:
        data = run.config.data
        key = id(data)  # runs share their blocks, which live as long as the plan
        if key not in sizes:
            sizes[key] = _training_tokens(data)
        found = sizes[key]
        if found is None:
            continue
        tokens, exact = found
        epochs.append(_epochs(data, tokens, run.tokens))
        guessed |= epochs[-1] > 1.0 and not exact
    return describe_repeats(epochs, about=guessed)


def _epochs(data: DataConfig, sizes: dict[str, float], tokens: int) -> float:
    if data.mixture is None:
        return tokens / sizes[""]
    counts = apportion([source.weight for source in data.mixture.values()], BLOCK_WINDOWS)
    return max(tokens * count / BLOCK_WINDOWS / sizes[name] for name, count in zip(data.mixture, counts))


def _training_tokens(data: DataConfig) -> tuple[dict[str, float], bool] | None:
    """Training tokens of each source (of a plain corpus under the name ""), and whether they are exact; None: not known."""
    try:
        cached = {"": cached_tokens(data)} if data.mixture is None else mixture_tokens(data) or {"": None}
        known = {name: float(n) for name, n in cached.items() if n}
        if len(known) == len(cached):
            return known, True
        per_token = 1.0 if parse_tokenizer(data.tokenizer)[0] == "bytes" else _BYTES_PER_TOKEN
        sources = {"": data} if data.mixture is None else alone(data, data.tokenizer)
        estimated = {}
        for name, one in sources.items():
            source = open_source(one)
            if not source.n_bytes or any(path.suffix in _PACKED for path in source.files):
                return None
            estimated[name] = source.n_bytes * (1 - data.validation_share) / per_token
        return estimated, False
    except (UserError, OSError):
        return None  # a plan may be made where its text is not; training says what is wrong
