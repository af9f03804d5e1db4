"""The best allocation over a range of budgets: how N, D, R and P grow with what is spent, and where that leaves the data."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.allocation import Allocation, Bounds, allocate
from analysis.budget import Cost
from analysis.convention import Convention
from analysis.intervals import ends, interval
from analysis.optimum import Choice, describe_outside, fit_notes, judge_choices
from analysis.result import FitResult
from dlcm.errors import UserError

Array = np.ndarray
COORDINATES = "NDRP"
_FEWEST = 3
"""Budgets from which a slope is given."""


@dataclasses.dataclass(frozen=True)
class Exponent:
    """How one coordinate of the best allocation grows with the budget.

    Attributes:
        name: N, D, R or P.
        value: a of x* ~ budget^a, the slope of log x* on log budget by least squares over the budgets at which x* is identified
            and the same others lie on an edge of what was searched; of P, which is a share, the change of P* over a decade
            of budgets.
        low: lower end of the 95% interval over the bootstrap refits; None without. high: upper end.
        status: `ok`, `held`, or `not identified`. reason: why, or over which budgets.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    status: str
    reason: str = ""

    def describe(self) -> str:
        """`N* ~ budget^0.49  95% 0.47 to 0.51`."""
        if self.status == "held":
            return f"{self.name}: held: {self.reason}"
        if self.value is None:
            return f"{self.name}: not identified: {self.reason}"
        ends = "no interval" if self.low is None else f"95% {self.low:.3g} to {self.high:.3g}"
        rest = f" ({self.reason})" if self.reason else ""
        if self.name == "P":
            return f"P* changes by {self.value:+.3g} a decade  {ends}" + rest
        return f"{self.name}* ~ budget^{self.value:.3f}  {ends}" + rest


@dataclasses.dataclass(frozen=True, eq=False)
class Frontier:
    """Least predicted loss over a range of budgets under one fit.

    Attributes:
        unit: what the budgets count. tokens: D where it was given.
        budgets: ascending, (n,).
        points: N, D, R, P and loss at each budget, (n, 5).
        low: lower ends of their 95% intervals, (n, 5); None without a bootstrap. high: upper ends.
        statuses: coordinate -> `ok`, `held` or `not identified` at each budget.
        walls: at each budget the coordinates that lie on an edge of what was searched: the others hold given these.
        outside: at each budget how far the optimum lies outside the data, in decades, by name; empty inside.
        data: N, D, R, P, C -> range in the data.
        exponents: of N, D, R and P.
    """

    law: str
    unit: str
    tokens: float | None
    budgets: Array
    points: Array
    low: Array | None
    high: Array | None
    statuses: Mapping[str, tuple[str, ...]]
    walls: tuple[tuple[str, ...], ...]
    outside: tuple[Mapping[str, float], ...]
    data: Mapping[str, tuple[float, float]]
    exponents: tuple[Exponent, ...]
    notes: tuple[str, ...]
    convention: Convention
    data_hash: str

    def __getitem__(self, name: str) -> Exponent:
        """The exponent of one coordinate: `frontier["N"].value`."""
        for exponent in self.exponents:
            if exponent.name == name:
                return exponent
        raise UserError(f"a frontier has no {name!r}; valid: {', '.join(COORDINATES)}")

    @property
    def inside(self) -> Array:
        """At which budgets the optimum lies inside the data, (n,)."""
        return np.array([not far for far in self.outside])

    @property
    def moving(self) -> tuple[str, ...]:
        """Coordinates that are not held."""
        return tuple(name for name in COORDINATES if set(self.statuses[name]) != {"held"})

    def table(self) -> pd.DataFrame:
        """One row a budget: each coordinate and the loss with intervals, what is not identified, and how far outside the data."""
        columns: dict[str, Any] = {"budget": self.budgets}
        for i, name in enumerate((*COORDINATES, "loss")):
            columns[name] = self.points[:, i]
            if self.low is not None and self.high is not None and name in (*self.moving, "loss"):
                columns |= {f"{name}_low": self.low[:, i], f"{name}_high": self.high[:, i]}
        unknown = [
            [n for n in COORDINATES if self.statuses[n][i] == "not identified"] for i in range(len(self.budgets))
        ]
        columns["not_identified"] = [" ".join(names) for names in unknown]
        columns["on_edge"] = [" ".join(names) for names in self.walls]
        columns["decades_outside"] = [max(far.values(), default=0.0) for far in self.outside]
        return pd.DataFrame(columns)

    def report(self) -> str:
        """As text."""
        given = "" if self.tokens is None else f" at D = {self.tokens:.3g}"
        lines = [f"Best allocations of {self.budgets[0]:.3g} to {self.budgets[-1]:.3g} {self.unit}{given} ({self.law})"]
        lines += [f"  {exponent.describe()}" for exponent in self.exponents]
        lines += [f"  - {note}" for note in self.notes]
        rows = [["budget", *self.moving, "loss", ""], *(self._row(i) for i in range(len(self.budgets)))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ["", *("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)]
        if any("?" in cell for row in rows for cell in row):
            lines += ["", "?: not identified; the number is the end of what was searched, or follows from one that is"]
        if any("|" in cell for row in rows for cell in row):
            lines += ["|: given another coordinate on the edge of what was searched"]
        return "\n".join(lines)

    def _row(self, i: int) -> list[str]:
        cells = [f"{self.budgets[i]:.3g}"]
        for name in (*self.moving, "loss"):
            column = (*COORDINATES, "loss").index(name)
            digits = ".4f" if name == "loss" else ".3g"
            text = f"{self.points[i, column]:{digits}}"
            if name != "loss" and self.statuses[name][i] == "not identified":
                text += " ?"
            elif self.low is not None and self.high is not None:
                text += f" ({self.low[i, column]:{digits}} to {self.high[i, column]:{digits}})"
                text += " |" if name != "loss" and self.walls[i] else ""
            cells.append(text)
        return [*cells, describe_outside(self.outside[i]) if self.outside[i] else ""]

    def __str__(self) -> str:
        return self.report()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        rows = []
        for i, budget in enumerate(self.budgets.tolist()):
            row: dict[str, Any] = {
                "budget_flops": budget,
                "decades_outside": dict(self.outside[i]),
                "on_edge": list(self.walls[i]),
            }
            for k, name in enumerate((*COORDINATES, "loss")):
                value: dict[str, Any] = {"value": float(self.points[i, k])}
                if self.low is not None and self.high is not None:
                    value["interval"] = [float(self.low[i, k]), float(self.high[i, k])]
                row[name] = value | ({} if name == "loss" else {"status": self.statuses[name][i]})
            rows.append(row)
        return {
            "law": self.law,
            "unit": self.unit,
            "tokens": self.tokens,
            "exponents": [dataclasses.asdict(e) for e in self.exponents],
            "budgets": rows,
            "notes": list(self.notes),
        }


def join_tables(frontiers: Mapping[str, Frontier]) -> pd.DataFrame:
    """The tables of several families under each other, with the family in the first column."""
    parts = [f.table().assign(model=family) for family, f in frontiers.items()]
    joined = pd.concat(parts, ignore_index=True)
    joined.insert(0, "model", joined.pop("model"))
    return joined


def frontier(
    result: FitResult,
    cost: Cost,
    budgets: Sequence[float] | Array,
    *,
    tokens: float | None = None,
    bounds: Bounds | None = None,
    family: str | None = None,
    limit: float | None = None,
    force: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Frontier:
    """Best allocation at each of several budgets, each with the intervals of all bootstrap refits.

    Args:
        result: a fit.
        cost: `cost(N, D, R, P)`.
        budgets: in the unit of the cost, in any order.
        tokens: as for `optimum`.
        bounds: as for `optimum`.
        family: as for `optimum`.
        limit: as for `optimum`, for every budget.
        force: as for `optimum`.
        tell: called with a line before each budget.

    Raises:
        UserError: fewer than two budgets, or what `optimum` raises of one of them.
    """
    spent = np.unique(np.asarray(budgets, dtype=float))
    if len(spent) < 2:
        raise UserError("a frontier is over several budgets; give two or more")
    problems, points, draws, outside = [], [], [], []
    for budget in spent.tolist():
        problem = allocate(result, cost, budget, tokens=tokens, bounds=bounds, family=family)
        if tell is not None:
            tell(f"spending {problem.stated}")
        best = problem.best()
        outside.append(problem.refuse_far(best, limit=limit, force=force))
        problems.append(problem)
        points.append(best)
        draws.append(problem.replicates())
    table, refits = np.stack(points), np.stack(draws, axis=1)  # (n, 5), (refits, n, 5)
    low, high = interval(refits) if len(refits) else (None, None)
    by_budget = [judge_choices(problem, best, drawn) for problem, best, drawn in zip(problems, points, draws)]
    judged = {name: [choices[name] for choices in by_budget] for name in COORDINATES}
    first: Allocation = problems[0]
    return Frontier(
        law=first.law.name,
        unit=first.unit,
        tokens=first.tokens,
        budgets=spent,
        points=table,
        low=low,
        high=high,
        statuses={name: tuple(c.status for c in choices) for name, choices in judged.items()},
        walls=tuple(tuple(n for n, choice in choices.items() if choice.at_edge) for choices in by_budget),
        outside=tuple(outside),
        data={name: result.ranges[name] for name in (*COORDINATES, "C")},
        exponents=tuple(
            _exponent(name, spent, table[:, i], refits[:, :, i], judged[name]) for i, name in enumerate(COORDINATES)
        ),
        notes=fit_notes(result),
        convention=result.convention,
        data_hash=result.data_hash,
    )


def _exponent(name: str, budgets: Array, values: Array, refits: Array, judged: Sequence[Choice]) -> Exponent:
    """The slope over the budgets at which the coordinate is identified, the same others being on an edge at all of them."""
    fine = [choice.status == "ok" for choice in judged]
    if not any(fine) and judged[0].status == "held":
        return Exponent(name, None, None, None, "held", judged[0].reason)
    # Where another coordinate meets its edge the slope has a kink: no line goes through both sides.
    counts = Counter(choice.given for choice in judged if choice.status == "ok")
    given = max(counts, key=lambda walls: (counts[walls], -len(walls)), default=())
    known = np.array([ok and choice.given == given for ok, choice in zip(fine, judged)])
    if known.sum() < min(_FEWEST, len(budgets)):
        unknown = [choice.reason for choice in judged if choice.status != "ok"]
        reason = unknown[0] if unknown else "another coordinate reaches an edge of what was searched between them"
        where = f"at {(~known).sum()} of {len(budgets)} budgets "
        return Exponent(name, None, None, None, "not identified", where + reason)
    x = np.log10(budgets[known])
    centred = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    into = (lambda v: v) if name == "P" else np.log10
    low = high = None
    if len(refits):
        low, high = ends(into(refits[:, known]) @ centred)
    on_edge = [f"given {' and '.join(given)} on the edge of what was searched"] if given else []
    others = "the same others lie on an edge" if given else "no other lies on an edge"
    which = "it is identified" if sum(fine) == known.sum() else others
    where = [] if known.all() else [f"over the {known.sum()} of {len(budgets)} budgets at which {which}"]
    slope = float(into(values[known]) @ centred)
    return Exponent(name, slope, low, high, "ok", ", ".join([*where, *on_edge]))
