"""What a sweep will teach, before it is run: simulate its losses from a prior law, refit, and see how far the answers scatter."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.data import ResultsData
from analysis.descent import minimise
from analysis.design import levels, reduce_law
from analysis.ensemble import natural_values, refit_many
from analysis.identify import wide_interval
from analysis.intervals import interval
from analysis.laws import Law
from analysis.objective import Problem
from analysis.prior import Prior
from analysis.search import Cost, Search
from analysis.starts import draw_starts
from dlcm.errors import UserError

if TYPE_CHECKING:
    from sweeps.plan import Plan

Array = np.ndarray

N_SIMULATED = 200
_N_ROOM = 100.0
"""The best N at the target is searched within this factor of the prior's own, on either side."""
_ANY_SIZE = (1e3, 1e14)
_EXACT = 1e-12
"""Mean squared log residual below which a law without noise is reproduced."""
_BLUR = 3.0
_N_STARTS = 5
_AS_GOOD = 1e-3
"""Relative difference of objectives that no run could tell: two answers closer than that are both answers."""
_EDGE = 0.01


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One answer of a sweep: what was planted, and where the refits put it.

    Attributes:
        planted: its value under the prior; of a reduction, in the fit without noise.
        low: lower end of the interval that holds 95% of the simulated answers. high: upper end.
        spread: width of the interval that holds 80% of them, as a ratio's logarithm where `is_log`; less at the mercy of a few
            simulations than the ends of the other, so designs are compared by it.
        is_log: whether widths are ratios (N, R, D) or differences (exponents, P, the floor).
        at_low: share of the simulations that end at the lower edge of the search. at_high: at the upper edge.
        held: why it is no answer of this sweep; empty where it is one.
        doubt: why a fit of this sweep would likely call it not identified; empty where it would not.
    """

    name: str
    planted: float
    low: float
    high: float
    spread: float
    is_log: bool = False
    at_low: float = 0.0
    at_high: float = 0.0
    held: str = ""
    doubt: str = ""

    @property
    def at_edge(self) -> float:
        """Share of the simulations that end at either edge of the search."""
        return self.at_low + self.at_high

    @property
    def width(self) -> float:
        """Width of the interval: log(high / low), or high - low; NaN where it is held."""
        if self.held:
            return float("nan")
        return float(np.log(self.high / self.low)) if self.is_log else self.high - self.low

    def describe(self) -> str:
        """One line: planted value and expected interval, and how often the search ends at an edge."""
        if self.held:
            return f"{self.name} = {self.planted:.4g} (held: {self.held})"
        text = f"{self.name} = {self.planted:.4g}  expected 95% {self.low:.4g} to {self.high:.4g}"
        for share, side in ((self.at_low, "lower"), (self.at_high, "upper")):
            if share > 0.05:
                text += f"; at the {side} end of its range in {100 * share:.0f}% of the simulations"
        return text


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """What one family of a sweep's runs will tell.

    Attributes:
        family: `dlcm` or `dense`.
        law: the law that the runs support, a reduction of the prior's where they cannot tell every constant.
        prior: what was planted.
        n_runs: runs of the family.
        n_simulated: simulated sweeps.
        target: training FLOPs that the optimum is asked for.
        constants: floor and exponents.
        choices: the optimum's N, R and P (N alone for a dense model).
        loss: predicted loss at the optimum.
        beyond_prior: how far the runs reach outside those behind the prior, in decades, by input.
    """

    family: str
    law: Law
    prior: Prior
    n_runs: int
    n_simulated: int
    target: float
    constants: tuple[Quantity, ...]
    choices: tuple[Quantity, ...]
    loss: Quantity
    beyond_prior: Mapping[str, float]

    def __getitem__(self, name: str) -> Quantity:
        """A quantity by name: `expected["P"].width`."""
        for quantity in (*self.constants, *self.choices, self.loss):
            if quantity.name == name:
                return quantity
        raise UserError(f"no {name!r} is expected of this sweep; there is {', '.join(q.name for q in self.quantities)}")

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Constants, choices and loss."""
        return (*self.constants, *self.choices, self.loss)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""

        def as_dict(quantity: Quantity) -> dict[str, Any]:
            width = None if quantity.held else quantity.width
            return {**dataclasses.asdict(quantity), "width": width}

        return {
            "family": self.family,
            "law": self.law.name,
            "equation": self.law.equation,
            "reductions": [change.describe() for change in self.law.changes],
            "prior": self.prior.to_dict(),
            "decades_beyond_prior": dict(self.beyond_prior),
            "n_runs": self.n_runs,
            "n_simulated": self.n_simulated,
            "target_flops": self.target,
            "constants": [as_dict(q) for q in self.constants],
            "optimum": [as_dict(q) for q in self.choices],
            "loss_nats": as_dict(self.loss),
        }


def design_of(plan: "Plan", family: str) -> ResultsData:
    """The planned runs of one family as data without losses (loss NaN): realised N and P, tokens, planned R and cost.

    Of a sweep over several boundary detectors, the runs of one alone: `learned` where it is there, else the most frequent.
    """
    runs = [run for run in plan.runs if run.config.model.kind == family]
    kinds = [run.config.model.boundary.detector if run.config.model.boundary else "none" for run in runs]
    if len(set(kinds)) > 1:
        kept = "learned" if "learned" in kinds else max(sorted(set(kinds)), key=kinds.count)
        runs = [run for run, kind in zip(runs, kinds) if kind == kept]
    return ResultsData.from_arrays(
        N=[run.params.non_embedding for run in runs],
        D=[run.tokens for run in runs],
        C=[run.flops_train_planned for run in runs],
        R=[run.compression_target for run in runs],
        P=[run.concept_share for run in runs],
        loss=np.nan,
        run_id=[run.run_id for run in runs],
        source=plan.sweep.where,
    )


def expect(
    design: ResultsData,
    prior: Prior,
    cost: Cost,
    target: float,
    *,
    law: Law | None = None,
    box: Mapping[str, tuple[float, float]] | None = None,
    n: int = N_SIMULATED,
    seed: int = 0,
) -> Expected:
    """Simulate a sweep `n` times, refit each as `fit` would (log-Huber), and search each refit's optimum.

    log loss = log of the prior's law + Gaussian noise of `prior.noise`, independent between runs. The noise of a run depends on
    its id and the seed alone, so that two designs that share runs share their noise.

    Args:
        design: planned runs of the prior's family, see `design_of`; its losses are not read.
        prior: law, constants and noise.
        cost: training FLOPs, `cost(N, D, R, P)`.
        target: training FLOPs that the optimum is asked for.
        law: what is refitted; by default what `fit` would choose for these runs.
        box: ranges of R and P (and N) that the optimum may take; those of the design by default.
        n: simulated sweeps.
        seed: seeds the noise.

    Raises:
        UserError: no runs, a target that is no positive number, or no model that the target pays for.
    """
    if not len(design):
        raise UserError(f"{design.source}: no {prior.law.family} run, so nothing can be expected of them")
    if not (np.isfinite(target) and target > 0):
        raise UserError(f"target = {target:g} FLOPs; give a number above 0")
    family = prior.law.family or "dlcm"
    planted = prior.law.predict(prior.values, N=design.N, D=design.D, R=design.R, P=design.P)
    data = dataclasses.replace(design, loss=np.asarray(planted))
    law = law or reduce_law(prior.law, data)
    problem = Problem.build(law, data)
    theta = _noise_free(problem, prior)
    noise = prior.noise * _noise(design.run_ids, n, seed)
    targets = problem.target * np.exp(noise)
    thetas, reached = refit_many(problem, theta, targets=targets)
    if _blurred(problem, theta, thetas, prior.noise):
        thetas = _from_many_starts(problem, thetas, reached, targets, seed)
    centre, values = problem.values(theta), natural_values(problem, thetas)
    blurred = _blurred(problem, theta, thetas, prior.noise)
    search = Search(law, cost, target, search_box(design, prior, cost, target, box))
    no_trade = _no_trade(law)
    found = search.minimise_many({k: np.append(v, centre[k]) for k, v in values.items()})
    return Expected(
        family=family,
        law=law,
        prior=prior,
        n_runs=len(design),
        n_simulated=n,
        target=float(target),
        constants=_constants(law, centre, values, blurred),
        choices=tuple(_choice(name, found, search, no_trade) for name in ("NRP" if family == "dlcm" else "N")),
        loss=dataclasses.replace(_quantity("loss", found[-1, 4], found[:-1, 4]), held=no_trade),
        beyond_prior=prior.beyond(N=_reach(design.N), D=_reach(design.D)),
    )


def _reach(values: Array) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _noise_free(problem: Problem, prior: Prior) -> Array:
    """Constants of the fit without noise: the prior's own, or of a reduction the nearest that it can come."""
    if not problem.law.changes:
        return problem.theta(prior.values)
    # A reduction has no constants that the prior has not: a tie keeps one of its two names.
    first = minimise(problem, problem.theta(prior.values), rounds=3)
    if first[1] * problem.delta**2 <= _EXACT * len(problem):
        return first[0]
    starts = draw_starts(problem, np.random.default_rng(0), n_starts=4, n_candidates=60)
    others = [minimise(problem, start, rounds=3) for start in starts]
    return min((first, *others), key=lambda answer: answer[1])[0]


def _from_many_starts(problem: Problem, thetas: Array, reached: Array, targets: Array, seed: int) -> Array:
    """Refits from starts all over, as `fit` makes them; of those that fit as well as the best, one at random for each sweep.

    From the planted constants alone a descent stays where a flat floor lets it stay.
    """
    rng = np.random.default_rng((seed, len(targets)))
    starts = draw_starts(problem, rng, n_starts=_N_STARTS, n_candidates=20 * _N_STARTS)
    others = [refit_many(problem, start, targets=targets) for start in starts]
    answers = np.stack([thetas, *(answer for answer, _ in others)])
    values = np.stack([reached, *(value for _, value in others)])
    as_good = values <= values.min(axis=0) * (1 + _AS_GOOD)
    picked = np.argmax(np.where(as_good, rng.random(values.shape), -1.0), axis=0)
    return np.take_along_axis(answers, picked[None, :, None], axis=0)[0]


def _blurred(problem: Problem, theta: Array, thetas: Array, noise: float) -> dict[str, str]:
    """Constants that the refits seem to know better than any unbiased estimate could.

    By the Cramer-Rao bound no estimate scatters less than noise * sqrt(diag (J'J)^-1). Refits that do so have stayed where they
    began, on a floor as flat as that: the runs do not tell these constants, and the narrow scatter must not be shown.
    """
    lower, upper = problem.bounds()
    # A constant on its bound is held by it: the bound is that of the others alone.
    inside = (theta > lower + 1e-9) & (theta < upper - 1e-9)
    jacobian = problem.residuals_and_jacobian(theta)[1][:, inside]
    if not jacobian.size:
        return {}
    norms = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    unit = jacobian / norms
    sizes, axes = np.linalg.eigh(unit.T @ unit)
    bound = noise * np.sqrt(np.sum(axes**2 / np.maximum(sizes, 1e-15 * sizes[-1]), axis=1)) / norms
    found = {}
    for i, least in zip(np.flatnonzero(inside), bound):
        p, possible = problem.law.free[i], (upper[i] - lower[i]) / 4
        if p.kind in ("floor", "exponent") and thetas[:, i].std() * _BLUR < min(least, possible):
            found[p.name] = "these runs cannot tell it from the other constants"
    return found


def _noise(run_ids: Sequence[str], n: int, seed: int) -> Array:
    """Standard normal draws, (n, runs), each run's from its own stream."""
    columns = [np.random.default_rng((seed, zlib.crc32(run_id.encode()))).standard_normal(n) for run_id in run_ids]
    return np.stack(columns, axis=1)


def search_box(
    design: ResultsData,
    prior: Prior,
    cost: Cost,
    target: float,
    given: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, tuple[float, float]]:
    """Where the optimum may lie: R and P as given or as in the design, N within a factor of 100 of the prior's best.

    A coordinate with one value in the design is held.

    Raises:
        UserError: the target pays for no model.
    """
    if prior.law.family == "dense":
        box = {"R": (1.0, 1.0), "P": (0.0, 0.0)}
    else:
        box = {name: _span(design.values(name)) for name in "RP"} | dict(given or {})
    if "N" in box:
        return box
    if len(levels(design.N)) == 1:
        return {**box, "N": _span(design.N)}
    low, high = _priced_sizes(cost, target, box)
    best = Search(prior.law, cost, target, {**box, "N": (low, high)}).minimise(prior.values)[0]
    return {**box, "N": (max(best / _N_ROOM, low), min(best * _N_ROOM, high))}


def _span(values: Array) -> tuple[float, float]:
    """Lowest and highest value; their middle twice where realised values only scatter around one."""
    if len(levels(values)) == 1:
        middle = float(np.median(values))
        return middle, middle
    return _reach(values)


def _no_trade(law: Law) -> str:
    """Why a budget cannot be divided under this law; empty where it can."""
    missing = [name for name in "ND" if name not in law.inputs]
    return (
        f"the runs have one value of {' and of '.join(missing)}, so no trade between N and D is known"
        if missing
        else ""
    )


def _priced_sizes(cost: Cost, target: float, box: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Sizes that have a cost at every R and P of the box, and that the target trains on one token each at the least."""
    sizes = np.geomspace(*_ANY_SIZE, 111)
    corners = np.array([(r, p) for r in box["R"] for p in box["P"]])
    price = np.asarray(cost(sizes[:, None], 1.0, corners[:, 0], corners[:, 1]))
    usable = sizes[np.isfinite(price).all(axis=1) & (price.max(axis=1) < target)]
    if not len(usable):
        raise UserError(f"target = {target:g} FLOPs pays for no model; give a larger target")
    return float(usable[0]), float(usable[-1])


def _constants(
    law: Law, centre: Mapping[str, float], values: Mapping[str, Array], blurred: Mapping[str, str]
) -> tuple[Quantity, ...]:
    held = {name: next((c.reason for c in law.changes if c.parameter == name), "by choice") for name, _ in law.fixed}
    held |= blurred
    found = []
    for p in law.parameters:
        if p.kind not in ("floor", "exponent"):
            continue
        quantity = _quantity(p.name, centre[p.name], values[p.name])
        if p.name in held:
            quantity = dataclasses.replace(quantity, held=held[p.name])
        elif reason := wide_interval(p, quantity.low, quantity.high):
            quantity = dataclasses.replace(quantity, doubt=reason)
        found.append(quantity)
    return tuple(found)


def _quantity(name: str, planted: float, values: Array, *, is_log: bool = False) -> Quantity:
    (low, high), (first, last) = interval(values), interval(values, level=0.8)
    spread = np.log(last / first) if is_log else last - first
    return Quantity(name, float(planted), float(low), float(high), float(spread), is_log)


def _choice(name: str, found: Array, search: Search, no_trade: str) -> Quantity:
    column, axis = "NDRP".index(name), "NRP".index(name)
    quantity = _quantity(name, found[-1, column], found[:-1, column], is_log=name != "P")
    if held := no_trade if search.open[axis] else "the design has one value":
        return dataclasses.replace(quantity, held=held)
    position = found[:-1, column] if name == "P" else np.log(found[:-1, column])
    margin = _EDGE * (search.upper[axis] - search.lower[axis])
    at_low = float(np.mean(position <= search.lower[axis] + margin))
    at_high = float(np.mean(position >= search.upper[axis] - margin))
    return dataclasses.replace(quantity, at_low=at_low, at_high=at_high)
