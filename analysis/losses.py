"""What the choice of loss and of its delta moves."""

import dataclasses

import numpy as np

from analysis.ensemble import refit_many
from analysis.objective import LossKind, Problem

Array = np.ndarray
LOSS_CHOICES: tuple[tuple[LossKind, float], ...] = (
    ("log_huber", 1e-4),
    ("log_huber", 1e-3),
    ("log_huber", 1e-2),
    ("log_mse", 1e-3),
)
"""Losses that a fit is repeated under: absolute, middling and nearly squared log errors, and squared ones."""


def loss_spread(problem: Problem, theta: Array) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each free constant under `LOSS_CHOICES` and the problem's own loss.

    Args:
        problem: the fitted problem.
        theta: its answer, (p,), from which the others are descended to.
    """
    found = [problem.values(theta)]
    for loss, delta in LOSS_CHOICES if len(theta) else ():
        if (loss, delta) != (problem.loss, problem.delta):
            other = dataclasses.replace(problem, loss=loss, delta=delta)
            found.append(problem.values(refit_many(other, theta)[0][0]))
    return {p.name: (min(v[p.name] for v in found), max(v[p.name] for v in found)) for p in problem.law.free}
