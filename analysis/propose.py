"""Which runs to pay for: the set under a budget that pins down the compute-optimal N, R and P best.

Every candidate run i carries information about the constants theta of the law, J_i = x_i x_i' / noise², x_i = d log L /
d theta. The optimum x* = argmin L(x; theta) under cost(x, D) = target moves with theta by the implicit function theorem,

    G = dx*/dtheta = -(d²L/dx²)^-1 d²L/dx dtheta,

so a set with information M = sum J_i leaves it with covariance G M^-1 G'. The criterion is the mean of log variances over
`log N*`, `log R*` and `P*` (those that lie inside their range): scale-free, and so is the greedy choice of the run that lowers it
most for its price. It is averaged over draws from around the prior, because a design that is best for one set of constants
alone is fragile: it puts all runs where that law bends, and cannot notice that another bends elsewhere. A small weight on
log det M keeps every constant of the law estimable.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from analysis.data import ResultsData
from analysis.laws import Law
from analysis.objective import Problem
from analysis.prior import Prior
from analysis.search import Cost, Search

Array = np.ndarray
Progress = Callable[[int, int], None]

N_DRAWS = 12
_EXPONENT_SPREAD = 0.2
"""Standard deviation of the logarithm of an exponent among the draws around the prior."""
_DETERMINANT_WEIGHT = 0.1
_RIDGE = 1e-2
"""What is known of each centred constant before the sweep, as an information: a standard deviation of 10."""
_STEP = 1e-3
_MAX_ROUNDS = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """Which candidates to run, and how often.

    Attributes:
        counts: runs of each candidate (seeds), (n,).
        criterion: mean over the draws of the mean log variance of the optimum's coordinates, and the determinant's part.
        flops: training FLOPs of all.
    """

    counts: Array
    criterion: float
    flops: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Draw:
    """Around one set of constants: the candidates' gradients over the noise (n, p), and the optimum's (k, p)."""

    gradients: Array
    targets: Array


def choose_runs(
    candidates: ResultsData,
    prior: Prior,
    cost: Cost,
    target: float,
    *,
    budget: float,
    law: Law,
    box: Mapping[str, tuple[float, float]],
    max_runs: int,
    max_seeds: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Choice:
    """Greedy choice by information per FLOP, then exchanges until none helps.

    Args:
        candidates: runs that may be chosen, with their costs in `C`.
        prior: law, constants and noise.
        cost: training FLOPs, `cost(N, D, R, P)`.
        target: training FLOPs of the optimum that is to be known.
        budget: training FLOPs of all runs together.
        law: what will be fitted: the prior's law or a reduction that holds offsets.
        box: ranges of N, R and P that the optimum may take.
        max_runs: runs at most.
        max_seeds: how often one candidate may be run.
        seed: seeds the draws around the prior.
        progress: called with (runs chosen, max_runs).
    """
    draws = _draws(candidates, prior, cost, target, law, box, seed)
    design = _Design(draws, candidates.C, budget, max_runs, max_seeds)
    while design.add():
        if progress:
            progress(int(design.counts.sum()), max_runs)
    design.exchange()
    return Choice(design.counts.copy(), design.criterion(), float(design.counts @ candidates.C))


def _draws(
    candidates: ResultsData,
    prior: Prior,
    cost: Cost,
    target: float,
    law: Law,
    box: Mapping[str, tuple[float, float]],
    seed: int,
) -> list[_Draw]:
    """The prior itself, and sets of constants around it that predict the same losses at the centre of the candidates."""
    rng = np.random.default_rng(seed)
    planted = prior.law.predict(prior.values, N=candidates.N, D=candidates.D, R=candidates.R, P=candidates.P)
    problem = Problem.build(law, dataclasses.replace(candidates, loss=np.asarray(planted)))
    centre = problem.theta(prior.values)
    lower, upper = problem.bounds()
    found = []
    for k in range(N_DRAWS):
        theta = centre.copy()
        for i, p in enumerate(law.free):
            if k and p.kind == "exponent":
                theta[i] *= np.exp(rng.normal(0, _EXPONENT_SPREAD))
            elif k and p.kind == "amplitude":
                theta[i] += rng.normal(0, _EXPONENT_SPREAD)
        theta = np.clip(theta, lower, upper)
        gradients = problem.residuals_and_jacobian(theta)[1] / prior.noise
        found.append(_Draw(gradients, _optimum_gradient(problem, theta, cost, target, box)))
    return found


def _optimum_gradient(
    problem: Problem, theta: Array, cost: Cost, target: float, box: Mapping[str, tuple[float, float]]
) -> Array:
    """G = dx*/dtheta, (k, p), over the coordinates of (log N, log R, P) whose best value lies inside the box."""
    search = Search(problem.law, cost, target, box)
    values = problem.values(theta)
    best = search.minimise(values)
    x = np.array([np.log(best[0]), np.log(best[2]), best[3]])
    inside = (x > search.lower + 2 * _STEP) & (x < search.upper - 2 * _STEP)
    free = np.flatnonzero(inside)
    if not len(free):
        return np.empty((0, len(theta)))
    moves = _STEP * np.eye(3)[free]

    def losses(points: Array) -> Array:
        return search.losses(values, points, search.tokens_at(points))

    k = len(free)
    hessian = np.empty((k, k))
    for i in range(k):
        for j in range(k):
            stencil = np.stack(
                [x + moves[i] + moves[j], x + moves[i] - moves[j], x - moves[i] + moves[j], x - moves[i] - moves[j]]
            )
            signs = np.array([1.0, -1.0, -1.0, 1.0])
            hessian[i, j] = signs @ losses(stencil) / (4 * _STEP**2)
    points = np.concatenate([x + moves, x - moves])
    slopes = _gradient_by_theta(problem, theta, points, search.tokens_at(points))
    mixed = (slopes[:k] - slopes[k:]) / (2 * _STEP)
    # A valley without curvature would give an infinite gradient: the least curvature is bounded by a millionth of the largest.
    sizes, axes = np.linalg.eigh(hessian)
    sizes = np.maximum(sizes, 1e-6 * max(float(sizes.max()), 1e-12))
    return -(axes / sizes) @ axes.T @ mixed


def _gradient_by_theta(problem: Problem, theta: Array, points: Array, tokens: Array) -> Array:
    """dL/dtheta at points (log N, log R, P), (m, p), by the law's analytic gradient on the problem's centred variables."""
    N, R, P = np.exp(points[:, 0]), np.exp(points[:, 1]), points[:, 2]
    raw = problem.law.compute_variables({"N": N, "D": tokens, "R": R, "P": P})
    centred = {name: v / problem.scales[name] for name, v in raw.items()}
    columns = problem.coordinates.evaluate(theta, centred, gradient=True)[1]
    return problem.target_scale * np.stack([np.broadcast_to(c, N.shape) for c in columns], axis=1)


class _Design:
    """Counts of the candidates with the inverse information of every draw, kept up to date run by run."""

    def __init__(self, draws: list[_Draw], costs: Array, budget: float, max_runs: int, max_seeds: int) -> None:
        self.draws = [d for d in draws if len(d.targets)] or draws
        self.costs, self.budget, self.max_runs, self.max_seeds = (
            np.asarray(costs, dtype=float),
            budget,
            max_runs,
            max_seeds,
        )
        self.counts = np.zeros(len(costs), dtype=int)
        p = draws[0].gradients.shape[1]
        self.inverses = [np.eye(p) / _RIDGE for _ in self.draws]
        self.spent = 0.0

    def gains(self, sign: float = 1.0) -> Array:
        """How much the criterion falls when each candidate is run once more (sign 1) or once less (sign -1), (n,).

        Sherman-Morrison: M^-1 after adding s x x' is M^-1 - s (M^-1 x)(M^-1 x)' / (1 + s x' M^-1 x).
        """
        total = np.zeros(len(self.costs))
        for draw, inverse in zip(self.draws, self.inverses):
            moved = draw.gradients @ inverse
            leverage = np.einsum("np,np->n", moved, draw.gradients)
            denominator = np.maximum(1 + sign * leverage, 1e-9)
            if len(draw.targets):
                variances = np.einsum("kp,pq,kq->k", draw.targets, inverse, draw.targets)
                shifts = (moved @ draw.targets.T) ** 2 / denominator[:, None]
                after = np.maximum(variances - sign * shifts, 1e-300)
                total += np.mean(np.log(variances) - np.log(after), axis=1)
            total += _DETERMINANT_WEIGHT * np.log(denominator) / inverse.shape[0] * 2
        return total / len(self.draws)

    def criterion(self) -> float:
        """Mean log variance over draws and coordinates, less the determinant's part."""
        total = 0.0
        for draw, inverse in zip(self.draws, self.inverses):
            if len(draw.targets):
                total += float(np.mean(np.log(np.einsum("kp,pq,kq->k", draw.targets, inverse, draw.targets))))
            total += _DETERMINANT_WEIGHT * float(np.linalg.slogdet(inverse)[1]) / inverse.shape[0] * 2
        return total / len(self.draws)

    def change(self, i: int, sign: int) -> None:
        """Run candidate `i` once more or once less."""
        for k, (draw, inverse) in enumerate(zip(self.draws, self.inverses)):
            x = draw.gradients[i]
            moved = inverse @ x
            self.inverses[k] = inverse - sign * np.outer(moved, moved) / (1 + sign * float(x @ moved))
        self.counts[i] += sign
        self.spent += sign * self.costs[i]

    def add(self) -> bool:
        """Run the candidate that lowers the criterion most for what it takes of the budget or of the number of runs."""
        affordable = (self.counts < self.max_seeds) & (self.costs <= self.budget - self.spent)
        if self.counts.sum() >= self.max_runs or not affordable.any():
            return False
        score = np.where(affordable, self.gains() / self._price(), -np.inf)
        self.change(int(np.argmax(score)), 1)
        return True

    def _price(self) -> Array:
        """What a run takes of what is left of both purses, FLOPs and number of runs: the scarcer one decides."""
        left = max(self.budget - self.spent, 1e-3 * self.budget)
        return self.costs / left + 1.0 / max(self.max_runs - int(self.counts.sum()), 1)

    def exchange(self) -> None:
        """Take out the run that is missed least for what it costs, fill up anew, and keep that while it helps."""
        best, kept = self.criterion(), self._state()
        failures = 0
        for _ in range(_MAX_ROUNDS):
            chosen = np.flatnonzero(self.counts)
            if not len(chosen):
                return
            loss = -self.gains(-1.0)[chosen] / self._price()[chosen]
            self.change(int(chosen[np.argsort(loss)[failures % len(chosen)]]), -1)
            while self.add():
                pass
            value = self.criterion()
            if value < best - 1e-9:
                best, kept, failures = value, self._state(), 0
            else:
                self._restore(kept)
                failures += 1
                if failures >= min(20, len(chosen)):
                    return

    def _state(self) -> tuple[Array, list[Array], float]:
        return self.counts.copy(), [inverse.copy() for inverse in self.inverses], self.spent

    def _restore(self, state: tuple[Array, list[Array], float]) -> None:
        counts, inverses, self.spent = state
        self.counts, self.inverses = counts.copy(), [inverse.copy() for inverse in inverses]
