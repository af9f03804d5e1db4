"""Intervals by drawing runs with replacement. A run is drawn whole: its checkpoints are not independent."""

from collections.abc import Callable, Sequence

import numpy as np

from analysis.descent import approach, refit
from analysis.objective import Problem
from analysis.starts import draw_starts

Array = np.ndarray

_FRESH_CANDIDATES = 20
_FEW_RUNS = 5


def bootstrap(
    problem: Problem,
    theta: Array,
    run_ids: Sequence[str],
    *,
    n: int,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, int]:
    """Refit on `n` resamples of runs.

    Each refit descends from the answer. Where runs are few, it descends from a fresh start as well and keeps the better:
    a warm start alone stays in its valley there, and makes intervals too narrow.

    Args:
        problem: the fitted problem.
        theta: its answer.
        run_ids: run of each row.
        n: number of resamples.
        rng: source of the draws.
        progress: called with (done, n).

    Returns:
        thetas (n, p), and how many resamples held fewer distinct runs than free constants.
    """
    groups: dict[str, list[int]] = {}
    for row, run_id in enumerate(run_ids):
        groups.setdefault(run_id, []).append(row)
    rows_of = [np.array(rows) for rows in groups.values()]
    found = np.empty((n, len(theta)))
    n_degenerate = 0
    small = len(groups) < _FEW_RUNS * len(theta)
    for i in range(n):
        drawn = rng.integers(len(rows_of), size=len(rows_of))
        n_degenerate += len(set(drawn.tolist())) < len(theta)
        resample = problem.take(np.concatenate([rows_of[j] for j in drawn]))
        if small:
            fresh = draw_starts(resample, rng, n_starts=1, n_candidates=_FRESH_CANDIDATES)
            answers = [approach(resample, start, max_steps=25) for start in (theta, *fresh)]
            found[i] = min(answers, key=lambda answer: answer[1])[0]
        else:
            found[i] = refit(resample, theta)[0]
        if progress:
            progress(i + 1, n)
    return found, n_degenerate
