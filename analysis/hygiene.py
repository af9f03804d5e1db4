"""What to know before a fit is believed: every warning of the list of pitfalls, as code.

Each check looks at the data, at a fit of them, or at both, and says what it found with its figures. None of them changes a
number. Sources: Hoffmann et al. 2022; Besiroglu et al. 2024 (arXiv 2404.10102); Porian et al. 2024 (arXiv 2406.19146);
Pearce and Song 2024 (arXiv 2406.12907).
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.cells import find_gaps
from analysis.data import ResultsData
from analysis.design import COLLINEAR, MIN_DECADES_OF_N, count_runs, find_levels, levels
from analysis.finding import Finding, Severity, gravest_first
from analysis.result import FitResult

Array = np.ndarray
MAX_WARMUP_SHARE = 0.1
MAX_EMBEDDING_SHARE = 0.1
FEWEST_REFITS = 40
"""Refits below which percentiles of 2.5 and 97.5 are the extremes, or less."""
OUTLYING = 5.0
"""Robust standard deviations of the residuals beyond which a run is called an outlier."""
LEAST_SPARE = 10
"""Runs beyond the constants below which residuals say nothing of outliers: the law goes through too many of them."""
SAME_FLOPS = 0.01
_MOST_KINDS = 8
_NAMES = ("run_id", "sweep", "model", "budget", "status", "device", "commit", "trunk", "lr_source")
"""Columns of text that tell where a run is from, not what it is."""
_NOTE, _WARNING, _ERROR = Severity.NOTE, Severity.WARNING, Severity.ERROR


def examine(data: ResultsData, result: FitResult | None = None) -> tuple[Finding, ...]:
    """Everything that was found, the gravest first.

    Args:
        data: the runs of one family, or of several: then what concerns a family is looked for in each.
        result: a fit of these data.
    """
    found: list[Finding] = []
    for check in _OF_DATA:
        found += check(data)
    if result is not None:
        for check in _OF_FIT:
            found += check(data.of_family(result.law.family), result)
    return gravest_first(dict.fromkeys(found))


# -- of the data ------------------------------------------------------------------------------------------------------


def missing_cells(data: ResultsData) -> list[Finding]:
    """Diverged, lost and absent runs: a law that is fitted on what survived may describe the survivors."""
    gaps = find_gaps(data)
    found = [Finding("missing_cells", _WARNING, f"budget {line}") for line in gaps.describe()]
    named = {cell.run_id for cell in gaps.cells}
    others = Counter(e.reason for e in data.exclusions if e.run_id not in named)
    if others:
        reasons = ", ".join(f"{n} {reason}" for reason, n in others.items())
        found.append(Finding("left_out", _WARNING, f"left out, so that what follows is provisional: {reasons}"))
    return found


def shared_runs(data: ResultsData) -> list[Finding]:
    """Rows that err together: checkpoints of a run, branches of a trunk."""
    n_rows, n_clusters = len(data), len(set(data.clusters))
    if n_clusters == n_rows:
        return []
    text = f"{n_rows} rows come from {n_clusters} independent runs or trunks; they count as {n_clusters}, resampled together"
    return [Finding("shared_runs", _NOTE, text)]


def mixed_kinds(data: ResultsData) -> list[Finding]:
    """Runs that differ in what a law knows nothing of: another training set or boundary detector has a law of its own."""
    found = []
    for family, rows in _families(data):
        sizes = find_levels(rows.N)[0]
        for column in rows.frame.columns.difference(list(_NAMES)):
            if pd.api.types.is_numeric_dtype(rows.frame[column]):
                continue
            values = rows.frame[column].astype(str)
            kinds = sorted(set(values))
            # a name of the size, or of the run, says nothing new
            is_name = len(set(zip(sizes, values))) == len(set(sizes)) or len(kinds) == len(rows)
            if 1 < len(kinds) <= _MOST_KINDS and not is_name:
                text = (
                    f"{family}runs differ in {column} ({', '.join(kinds)}), and one law takes them for alike: "
                    f"choose with --where \"{column} == '{kinds[0]}'\""
                )
                found.append(Finding("mixed_kinds", _WARNING, text))
    return found


def few_seeds(data: ResultsData) -> list[Finding]:
    """Small models are cheap and noisy: without two seeds there, nobody knows the noise."""
    found = []
    for family, rows in _families(data):
        near, sizes = find_levels(rows.N)
        small = [s for s in sizes if s <= np.sqrt(sizes[0] * sizes[-1]) * 1.0001]
        seeds = rows.frame["seed"].astype(str).to_numpy() if "seed" in rows.frame else np.full(len(rows), "one")
        once = [size for i, size in enumerate(sizes) if size in small and len(set(seeds[near == i])) < 2]
        if once:
            text = f"{family}fewer than two seeds at N = {_listed(once)}: the noise of small models is not measured"
            found.append(Finding("few_seeds", _WARNING, text))
    return found


def narrow_span(data: ResultsData) -> list[Finding]:
    """Exponents from a narrow range of N, or from N and D that rise together, are hardly more than slopes."""
    found = []
    for family, rows in _families(data):
        decades = float(np.log10(rows.N.max() / rows.N.min()))
        if decades < MIN_DECADES_OF_N:
            text = f"{family}N spans {decades:.2f} decades; below {MIN_DECADES_OF_N} exponents are unreliable"
            found.append(Finding("narrow_span", _WARNING, text))
        x, y = np.log(rows.N), np.log(rows.D)
        if len(rows) > 2 and np.ptp(x) > 1e-9 and np.ptp(y) > 1e-9:
            together = float(np.corrcoef(x, y)[0, 1])
            if abs(together) > COLLINEAR:
                text = f"{family}D is collinear with N (correlation of logarithms {together:+.2f})"
                found.append(Finding("collinear", _WARNING, f"{text}: their effects cannot be told apart"))
    return found


def rate_at_edge(data: ResultsData) -> list[Finding]:
    """The best of several learning rates is the highest or the lowest that was tried: the model may be under-tuned."""
    if "lr_token" not in data.frame:
        return []
    edges: list[str] = []
    for family, rows in _families(data):
        rates = rows.values("lr_token")
        for size, group in _designs(rows):
            tried = sorted(set(rates[group]))
            if len(tried) < 2:
                continue
            mean = {rate: rows.loss[group][rates[group] == rate].mean() for rate in tried}
            best = min(tried, key=mean.__getitem__)
            if best in (tried[0], tried[-1]):
                which = "lowest" if best == tried[0] else "highest"
                edges.append(f"{family}N = {size:.3g}: {best:g}, the {which} of {len(tried)}")
    edges = list(dict.fromkeys(edges))  # a size has as many designs as it has budgets
    if not edges:
        return []
    more = f"; and {len(edges) - 4} more" if len(edges) > 4 else ""
    text = f"the best learning rate lies at the edge of those tried ({'; '.join(edges[:4])}{more})"
    return [Finding("rate_at_edge", _WARNING, f"{text}: these models may be under-tuned")]


def tuning_record(data: ResultsData) -> list[Finding]:
    """Every size should say where its learning rate is from."""
    if "lr_source" not in data.frame:
        text = "where learning rates come from is not recorded (no column lr_source)"
        return [Finding("tuning_not_recorded", _NOTE, text)]
    source: Array = data.frame["lr_source"].fillna("nothing").astype(str).to_numpy()
    untuned = np.array(["sha256:" not in s for s in source])
    if not untuned.any():
        return []
    origin = ", ".join(sorted(set(source[untuned])))
    runs = f"{count_runs(int(untuned.sum()))} (N = {_listed(levels(data.N[untuned]))})"
    return [Finding("not_tuned", _WARNING, f"no record of a tuned learning rate for {runs}: from {origin}")]


def warmup_share(data: ResultsData) -> list[Finding]:
    """A warm-up that is long beside the run bends the law of small budgets."""
    share = _warmup(data)
    if share is None:
        text = "the warm-up's share of the tokens is not recorded (warmup_share, warmup_tokens)"
        return [Finding("warmup_not_recorded", _NOTE, text)]
    long = np.isfinite(share) & (share > MAX_WARMUP_SHARE + 1e-9)
    if not long.any():
        return []
    text = f"warm-up takes more than {100 * MAX_WARMUP_SHARE:g}% of the tokens in {count_runs(int(long.sum()))}"
    text += f", up to {100 * share[long].max():.0f}%: the short runs are worse than they could be"
    return [Finding("long_warmup", _WARNING, text)]


def _warmup(data: ResultsData) -> Array | None:
    """Share of the tokens spent warming up: a column of the results, or what the plan beside them says."""
    if "warmup_share" in data.frame:
        return data.values("warmup_share")
    if "warmup_tokens" in data.frame:
        return data.values("warmup_tokens") / data.D
    file = Path(data.source).parent / "plan.parquet"
    if not Path(data.source).is_file() or not file.is_file():
        return None
    try:
        plan = pd.read_parquet(file, columns=["run_id", "config"])
        configs = {run: json.loads(config) for run, config in zip(plan["run_id"], plan["config"])}
        optim = {run: (c["optim"].get("warmup_tokens"), c["optim"].get("warmup_share")) for run, c in configs.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    shares = []
    for run, tokens in zip(data.run_ids, data.D):
        warm, share = optim.get(run, (None, None))
        shares.append(warm / tokens if warm is not None else np.nan if share is None else share)
    return np.array(shares, dtype=float)


def counted_flops(data: ResultsData) -> list[Finding]:
    """C = 6 N D counts neither attention nor, where N leaves the embeddings out, the head."""
    known = np.isfinite(data.C) & (data.C > 0)
    if not known.any():
        return []
    ratio = data.C[known] / (6 * data.N[known] * data.D[known])
    if np.abs(ratio - 1).max() > SAME_FLOPS:
        return []
    head = (
        "the head is not"
        if data.convention.n == "non_embedding"
        else "where N leaves the embeddings out, the head is not"
    )
    text = f"C is 6 N D: attention is not counted, and {head}; at small sizes both are a large part of the cost"
    return [Finding("six_n_d", _NOTE if data.convention.n == "total" else _WARNING, text)]


def embedding_share(data: ResultsData) -> list[Finding]:
    """Where embeddings are a large part of the small models, exponents depend on whether N counts them."""
    if not {"params_total", "params_embedding"} <= set(data.frame.columns):
        return []
    share = data.values("params_embedding") / data.values("params_total")
    if share.max() <= MAX_EMBEDDING_SHARE:
        return []
    text = f"embeddings are up to {100 * share.max():.0f}% of all parameters: exponents depend on whether N counts them"
    return [Finding("embedding_share", _WARNING, f"{text} (here: {data.convention.n}); fit both ways (--n both)")]


def recorded(data: ResultsData) -> list[Finding]:
    """What a reader needs to repeat the fit and the toolkit cannot know."""
    found = []
    if not Path(data.source.partition(" where ")[0]).is_file():
        found.append(
            Finding("no_file", _NOTE, f"the data ({data.source}) are no file: their hash alone says which they were")
        )
    if data.convention.n.startswith("as given"):
        text = (
            f"whether N counts embeddings is not stated: it is {data.convention.n}; say --n non_embedding or --n total"
        )
        found.append(Finding("n_not_stated", _WARNING, text))
    return found


# -- of a fit ---------------------------------------------------------------------------------------------------------


def not_certified(_: ResultsData, result: FitResult) -> list[Finding]:
    """What the minimum was examined for and failed: convergence, starts, bounds, conditioning."""
    return [Finding(f"check_{c.name}", _ERROR, c.text) for c in result.checks if not c.passed]


def outliers(data: ResultsData, result: FitResult) -> list[Finding]:
    """Runs far off the law: look at what they do to the exponents."""
    if result.law.target != "loss" or len(data) < result.n_free + LEAST_SPARE:
        return []
    inputs = {name: data.values(name) for name in dict.fromkeys(("N", "D", "R", "P", *result.law.inputs))}
    residuals = np.log(result.predict(**inputs) / data.loss)
    spread = 1.4826 * float(np.median(np.abs(residuals - np.median(residuals))))
    far = np.abs(residuals - np.median(residuals)) > OUTLYING * spread
    if not far.any() or spread < 1e-9:
        return []
    names = ", ".join(data.run_ids[i] for i in np.argsort(-np.abs(residuals))[: min(4, int(far.sum()))])
    text = (
        f"{count_runs(int(far.sum()))} more than {OUTLYING:g} robust standard deviations off the law (worst: {names})"
    )
    return [Finding("outliers", _WARNING, f"{text}: see what leaving out the largest losses does (drop curve)")]


def loss_choice(_: ResultsData, result: FitResult) -> list[Finding]:
    """What the choice of loss and delta moves is beside the interval, not in it."""
    moved = []
    exponents = {p.name for p in result.law.parameters if p.kind == "exponent"}
    for p in result.parameters:
        if not (p.identified and p.name in exponents and p.spread and p.low is not None and p.high is not None):
            continue
        if p.spread[1] - p.spread[0] > (p.high - p.low) / 3:
            moved.append(f"{p.name} {p.spread[0]:.4g} to {p.spread[1]:.4g}")
    if not moved:
        return []
    text = f"the choice of loss and delta moves more than a third of a 95% interval: {', '.join(moved)}"
    return [Finding("loss_choice", _WARNING, text)]


def without_intervals(_: ResultsData, result: FitResult) -> list[Finding]:
    """A number without an interval says nothing about the next sweep."""
    if len(result.replicates):
        return []
    text = "no bootstrap was run, or there are fewer than three independent runs: the constants have no interval"
    return [Finding("no_intervals", _WARNING, text)]


def few_refits(_: ResultsData, result: FitResult) -> list[Finding]:
    """The ends of a 95% interval are the outermost fortieths of the refits."""
    n = len(result.replicates)
    if not 0 < n < FEWEST_REFITS:
        return []
    text = (
        f"{n} bootstrap refit{'s' * (n > 1)}, where a 95% interval needs {FEWEST_REFITS} or more: take no end for one"
    )
    return [Finding("few_refits", _WARNING, text)]


_OF_DATA: tuple[Callable[[ResultsData], list[Finding]], ...] = (
    missing_cells,
    narrow_span,
    shared_runs,
    mixed_kinds,
    few_seeds,
    rate_at_edge,
    tuning_record,
    warmup_share,
    counted_flops,
    embedding_share,
    recorded,
)
_OF_FIT: tuple[Callable[[ResultsData, FitResult], list[Finding]], ...] = (
    not_certified,
    outliers,
    loss_choice,
    without_intervals,
    few_refits,
)


def _families(data: ResultsData) -> list[tuple[str, ResultsData]]:
    """Prefix and rows of each family; no prefix where there is only one."""
    names = sorted(set(data.frame["model"].astype(str))) if "model" in data.frame else []
    if len(names) < 2:
        return [("", data)]
    return [(f"{name}: ", data.of_family(name)) for name in names]


def _listed(sizes: Sequence[float], most: int = 4) -> str:
    more = f" and {len(sizes) - most} more" if len(sizes) > most else ""
    return ", ".join(f"{s:.3g}" for s in sizes[:most]) + more


def _designs(rows: ResultsData) -> list[tuple[float, Array]]:
    """Size and row positions of runs that differ by learning rate and seed alone."""
    keys: dict[tuple, list[int]] = {}
    (size, sizes), (tokens, _) = find_levels(rows.N), find_levels(rows.D)
    ratio = rows.frame["compression_target"] if "compression_target" in rows.frame else np.round(rows.R, 1)
    for i, key in enumerate(zip(size, tokens, np.round(rows.P, 2), ratio)):
        keys.setdefault(tuple(float(k) for k in key), []).append(i)
    return [(sizes[int(key[0])], np.array(positions)) for key, positions in keys.items()]
