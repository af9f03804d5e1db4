"""What an accuracy curve is examined for beside its minimum: does it move, is its form right, do families of models share it."""

from typing import Any

import numpy as np
from scipy import stats

from analysis.data import ResultsData
from analysis.result import FitResult

Array = np.ndarray
TREND = 0.05
"""Significance at which an accuracy counts as moving with the loss."""
_FAMILIES = 0.01
"""Significance at which dense and DLCM runs count as lying on different curves."""
_PATTERN = 0.001
"""Significance at which neighbouring runs count as erring alike."""
_LEAST_RUNS = 3
_EXACT = 1e-9


def trend(result: FitResult, target: Array, weight: Array) -> float:
    """Significance of the F test of one accuracy for all runs against the curve.

    Args:
        result: the curve.
        target: what was fitted, (n,).
        weight: of each run in it, (n,).
    """
    level = float(np.sum(weight * target) / np.sum(weight**2))
    flat, curved = float(np.sum((target - level * weight) ** 2)), result.objective
    k, spare = result.n_free - 1, len(target) - result.n_free
    if k < 1 or spare < 1:
        return 1.0 if curved >= flat else 0.0
    if curved <= 0:
        return 0.0
    return float(stats.f.sf(max(flat - curved, 0.0) / k / (curved / spare), k, spare))


def pattern(loss: Array, residuals: Array, link: str) -> tuple[str, ...]:
    """Whether runs of neighbouring losses err alike: then the form does not hold. A sentence, or nothing.

    The ratio of the mean squared difference of successive residuals to their mean square is 2 for independent ones (von Neumann
    1941), with variance 4 (n - 2) / (n^2 - 1).

    Args:
        loss: of each run, (n,).
        residuals: in units in which all are equally wide, (n,).
        link: name of the form.
    """
    ordered, n = residuals[np.argsort(loss, kind="stable")], len(residuals)
    square = float(np.mean(ordered**2))
    if n < 2 * _LEAST_RUNS or square < _EXACT**2:
        return ()
    ratio = float(np.mean(np.diff(ordered) ** 2)) / square
    z = (2 - ratio) / np.sqrt(4 * (n - 2) / (n**2 - 1))
    if stats.norm.sf(z) > _PATTERN:
        return ()
    text = f"runs of like loss err alike (von Neumann's ratio {ratio:.2f} for 2, z = {z:.1f}): the {link} does not hold over all"
    return (f"{text} of them, and its intervals, which take it for granted, are too narrow beyond the data",)


def families(data: ResultsData, errors: Array) -> tuple[str, ...]:
    """Whether dense and DLCM runs lie on one curve (Welch's t test of their errors). A sentence, or nothing.

    Args:
        data: the runs.
        errors: of their accuracies, (n,).
    """
    models: Array = data.frame["model"].astype(str).to_numpy() if "model" in data.frame else np.full(len(data), "")
    names = sorted(set(models))
    apart = [errors[models == name] for name in names]
    if len(names) != 2 or min(map(len, apart)) < _LEAST_RUNS:
        return ()
    test: Any = stats.ttest_ind(*apart, equal_var=False)
    if test.pvalue > _FAMILIES:
        return ()
    means = " and ".join(f"{name} {100 * own.mean():+.2f}" for name, own in zip(names, apart))
    text = f"{names[0]} and {names[1]} models do not lie on one curve (points off it: {means}; p = {test.pvalue:.1g})"
    return (f"{text}; fit them apart with --where \"model == '{names[0]}'\"",)
