"""Do learning rates transfer over widths? The best rate of each size, how far it moves, and a file that sweeps refer to."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.frames import numeric_column
from analysis.intervals import ends
from analysis.lr_curve import Curve, RatedRun
from analysis.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION, finish, save_figure
from dlcm.errors import UserError

Array = np.ndarray
MAX_SHIFT_STEPS = 1.0
N_DRAWS = 1000
_NEEDED = (
    "params_total", "params_embedding", "lr_token", "lr_concept", "loss_nats", "status", "d_token", "d_token_base",
    "d_concept", "d_concept_base", "model", "seed", "tokens",
)  # fmt: skip
_WHOLE = ("params_total", "params_embedding", "seed", "d_token", "d_token_base", "d_concept", "d_concept_base")
_NUMBERS = (*_WHOLE, "lr_token", "lr_concept", "loss_nats")
_STYLES = (
    (BLUE, "o", "-"),
    (VERMILION, "^", "--"),
    (GREEN, "D", "-."),
    (PURPLE, "v", ":"),
    (ORANGE, "P", "-"),
    (BLACK, "s", "--"),
)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How the best rate moves with the size.

    Attributes:
        curves: by parametrization and size.
        step: ratio of neighbouring rates of the grid.
        off_diagonal: lowest loss with unequal rates less that with equal ones, nats, by size; empty where none was tried.
        facts: of the runs under muP, for the tuned file.
        left_out: why runs were left out -> how many.
    """

    curves: tuple[Curve, ...]
    step: float
    off_diagonal: Mapping[int, float]
    facts: Mapping[str, Any]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def of(self, parametrization: str) -> list[Curve]:
        """Curves of a parametrization, by size."""
        return sorted((c for c in self.curves if c.parametrization == parametrization), key=lambda c: c.n)

    def shift(self, parametrization: str) -> float | None:
        """Largest distance between the best rates of two sizes, in steps of the grid; None with fewer than two sizes."""
        best = [np.log(curve.best) for curve in self.of(parametrization)]
        return float((max(best) - min(best)) / np.log(self.step)) if len(best) > 1 else None

    @functools.cached_property
    def _drawn(self) -> dict[str, Array | None]:
        return {kind: self._draw(kind) for kind in {curve.parametrization for curve in self.curves}}

    def _draw(self, parametrization: str) -> Array | None:
        """Best rates that the runs allow, (sizes, draws); None where they leave no residual.

        The noise of a run is taken to be the same at all sizes, so that its variance has the degrees of freedom of all of them;
        coefficients follow a t distribution with so many.
        """
        curves, rng = self.of(parametrization), np.random.default_rng(0)
        squares, freedom = (sum(found) for found in zip(*(curve.residual for curve in curves)))
        if freedom < 1:
            return None
        sigmas = np.sqrt(squares / rng.chisquare(freedom, N_DRAWS))
        return np.array([curve.draws(rng, sigmas) for curve in curves])

    def interval(self, curve: Curve) -> tuple[float, float] | None:
        """95% interval of the best rate of a size; None where the runs leave no residual, or do not bend upwards."""
        drawn = self._drawn[curve.parametrization]
        if drawn is None or curve.parabola is None:
            return None
        return ends(drawn[self.of(curve.parametrization).index(curve)])

    def shift_interval(self, parametrization: str) -> tuple[float, float] | None:
        """95% interval of `shift`; None where the runs leave no residual, or those of a size do not bend upwards."""
        curves, drawn = self.of(parametrization), self._drawn.get(parametrization)
        if len(curves) < 2 or drawn is None or any(curve.parabola is None for curve in curves):
            return None
        return ends(np.ptp(np.log(drawn), axis=0) / np.log(self.step))

    def drift(self, parametrization: str) -> float | None:
        """Slope of the log of the best rate over the log of the width; -1 where it falls as 1 / width."""
        curves = self.of(parametrization)
        if len(curves) < 2:
            return None
        return float(np.polyfit([np.log(c.d_token) for c in curves], [np.log(c.best) for c in curves], 1)[0])

    @property
    def transfers(self) -> bool | None:
        """Whether, under muP, the best rate moves by one step at most, with rates on both sides tried; None for one size.

        By the point estimate; `shift_interval` says how sure that is.
        """
        shift = self.shift("mup")
        if shift is None:
            return None
        return shift <= MAX_SHIFT_STEPS + 1e-9 and all(curve.is_inside for curve in self.of("mup"))

    @property
    def rate(self) -> float:
        """The rate to use: the grid's rate of least summed excess loss over the sizes of muP."""
        curves = self.of("mup")
        common = sorted(set.intersection(*(set(curve.means) for curve in curves)))
        return min(common, key=lambda rate: sum(curve.excess(rate) for curve in curves))


def analyse_transfer(frame: pd.DataFrame, source: str = "results") -> Transfer:
    """Read the results of a sweep over learning rates and sizes.

    Args:
        frame: results.parquet of the sweep; DLCM runs count, each once.
        source: where they are from, for messages.

    Raises:
        UserError: a column is missing or holds something that is no number, there are fewer than three rates at any size, no run
            under muP, or none there that ended well.
    """
    if absent := [name for name in _NEEDED if name not in frame]:
        raise UserError(f"{source}: no column {', '.join(absent)}; collect the sweep again with this version")
    runs, left_out = _usable(frame, source)
    own = (runs["d_token_base"] == runs["d_token"]) & (runs["d_concept_base"] == runs["d_concept"])
    several = runs.groupby("d_token_base")["d_token"].transform("nunique") > 1
    runs["parametrization"] = np.where(own & ~several, "standard", "mup")
    if runs["n"].nunique() == 1:
        runs["parametrization"] = "mup"
    equal = np.isclose(runs["lr_token"], runs["lr_concept"])
    grid = np.sort(runs.loc[equal, "lr_token"].unique())
    step = float(np.exp(np.median(np.diff(np.log(grid))))) if len(grid) > 1 else 1.0
    curves = []
    for (kind, n, width), group in runs[equal].groupby(["parametrization", "n", "d_token"]):
        if group["lr_token"].nunique() >= 3:
            columns = group["lr_token"].astype(float), group["loss"].astype(float), group["seed"].astype(int)
            points = tuple(map(RatedRun, *columns))
            curves.append(Curve(str(kind), int(n), int(width), step, points))
    if not any(curve.parametrization == "mup" for curve in curves):
        raise UserError(
            f"{source}: no size under muP has three learning rates with runs that ended; run more of the sweep"
        )
    if empty := [c for c in curves if c.parametrization == "mup" and not np.isfinite(list(c.means.values())).any()]:
        raise UserError(
            f"{source}: every run of N = {empty[0].n:,} under muP diverged, so that no rate is the best; try lower ones"
        )
    return Transfer(tuple(curves), step, _off_diagonal(runs[~equal], curves), _facts(runs), left_out)


def _usable(frame: pd.DataFrame, source: str) -> tuple[Any, dict[str, int]]:
    """DLCM runs that ended, each once, with `n` and with `loss`, infinite where it diverged; and why others were left out."""
    table: Any = frame  # the stubs of pandas know too many types of a column
    runs = table[(table["model"] == "dlcm") & table["status"].isin(["finished", "diverged"])].copy()
    for name in _NUMBERS:
        runs[name] = numeric_column(runs, name, source)
    runs["n"] = runs["params_total"] - runs["params_embedding"]
    runs["loss"] = runs["loss_nats"].where(runs["status"] == "finished", np.inf)
    rated = (runs["lr_token"] > 0) & (runs["lr_concept"] > 0)
    twice = runs.duplicated("run_id") if "run_id" in runs else np.zeros(len(runs), bool)
    faults = {
        "given twice": twice,
        "without a loss, though finished": runs["loss"].isna() & ~twice,
        "without a learning rate above 0": ~rated & runs["loss"].notna() & ~twice,
        "without a size, width or seed": runs[list(_WHOLE)].isna().any(axis=1) & rated & runs["loss"].notna() & ~twice,
    }
    kept = ~np.logical_or.reduce([np.asarray(fault, bool) for fault in faults.values()])
    return runs[kept], {reason: int(np.sum(fault)) for reason, fault in faults.items() if np.any(fault)}


def _off_diagonal(unequal: Any, curves: Sequence[Curve]) -> dict[int, float]:
    best = {curve.n: min(curve.means.values()) for curve in curves if curve.parametrization == "mup"}
    under_mup = unequal[unequal["parametrization"] == "mup"]
    lowest = under_mup.groupby("n")["loss"].min()
    return {int(n): float(loss - best[n]) for n, loss in lowest.items() if n in best}


def _facts(runs: Any) -> dict[str, Any]:
    mup = runs[runs["parametrization"] == "mup"]
    one = mup.iloc[0]
    digest = hashlib.sha256(mup.to_csv(index=False).encode()).hexdigest()
    return {
        "d_token_base": int(one["d_token_base"]),
        "d_concept_base": int(one["d_concept_base"]),
        "tokens": int(mup["tokens"].median()),
        "sweep": str(one["sweep"]) if "sweep" in mup else "unknown",
        "results": digest,
    }


def tuned_yaml(transfer: Transfer) -> str:
    """The file that sweeps name as `tuned`."""
    import yaml

    facts = transfer.facts
    data = {
        "schema": 1,
        "lr_token": transfer.rate,
        "lr_concept": transfer.rate,
        "d_token_base": facts["d_token_base"],
        "d_concept_base": facts["d_concept_base"],
        "tokens": facts["tokens"],
        "source": {"sweep": facts["sweep"], "results": facts["results"], "transfers": transfer.transfers},
    }
    return yaml.safe_dump(data, sort_keys=False)


def format_transfer(transfer: Transfer) -> str:
    """Best rates by size, how far they move, and the verdict."""
    rates = sorted({rate for curve in transfer.curves for rate in curve.means})
    lines = [
        f"{'':9} {'N':>10} {'width':>5} {'runs':>4} {'best':>8} {'95%':>18}   mean loss over the rates {_list(rates)}"
    ]
    for kind in ("mup", "standard"):
        for c in transfer.of(kind):
            found = transfer.interval(c)
            told = "not known" if found is None else f"{found[0]:.3g} to {found[1]:.3g}"
            edge = "" if c.is_inside else "  (at the edge of the grid)"
            means = _list([c.means.get(rate, np.nan) for rate in rates])
            lines.append(f"{kind:9} {c.n:10,} {c.d_token:5} {len(c.runs):4} {c.best:8.3g} {told:>18}   {means}{edge}")
        shift, drift, sure = transfer.shift(kind), transfer.drift(kind), transfer.shift_interval(kind)
        if shift is not None:
            interval = "" if sure is None else f" (95% {sure[0]:.2g} to {sure[1]:.2g})"
            moved = f"moves by {shift:.2g} steps of x{transfer.step:.3g}{interval}"
            lines.append(f"{kind}: the best rate {moved}; as width^{drift:.2f}")
    for n, less in transfer.off_diagonal.items():
        lines.append(f"unequal rates at N = {n:,}: best loss {less:+.4f} nats beside equal ones")
    lines += [f"left out: {n} {reason}" for reason, n in transfer.left_out.items()]
    told = {
        True: "the rate transfers",
        False: "the rate does NOT transfer",
        None: "one size: nothing is said about transfer",
    }
    sure = transfer.shift_interval("mup")
    open_ = transfer.transfers is not None and sure is not None and sure[0] <= MAX_SHIFT_STEPS < sure[1]
    doubt = f", though the interval reaches both sides of {MAX_SHIFT_STEPS:g} step: more seeds would settle it" * open_
    lines.append(f"verdict: {told[transfer.transfers]}{doubt}; base rate {transfer.rate:.3g}, for both sides")
    return "\n".join(lines)


def _list(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def transfer_json(transfer: Transfer) -> dict[str, Any]:
    """Everything that `format_transfer` tells."""
    return {
        "rate": transfer.rate,
        "transfers": transfer.transfers,
        "step": transfer.step,
        "shift_steps": {kind: transfer.shift(kind) for kind in ("mup", "standard")},
        "shift_steps_interval": {kind: transfer.shift_interval(kind) for kind in ("mup", "standard")},
        "width_exponent": {kind: transfer.drift(kind) for kind in ("mup", "standard")},
        "curves": [
            {
                **dataclasses.asdict(c),
                # A run that diverged has no loss; JSON knows no infinity.
                "runs": [(run.rate, _finite(run.loss), run.seed) for run in c.runs],
                "means": {rate: _finite(mean) for rate, mean in c.means.items()},
                "best": c.best,
                "interval": transfer.interval(c),
                "inside": c.is_inside,
            }
            for c in transfer.curves
        ],
        "off_diagonal_nats": {str(n): value for n, value in transfer.off_diagonal.items()},
        "facts": dict(transfer.facts),
        "left_out": dict(transfer.left_out),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def plot_transfer(ax: Axes, transfer: Transfer, parametrization: str) -> Axes:
    """Loss over the base learning rate by size: runs as points, the parabola, and its vertex with its 95% interval.

    Levels of seeds are taken off the losses. Diverged runs are left out.
    """
    for c, (colour, marker, line) in zip(transfer.of(parametrization), _STYLES):
        shown = [run for run in c.runs if np.isfinite(run.loss)]
        losses = [run.loss - c.levels[run.seed] for run in shown]
        ax.plot([run.rate for run in shown], losses, color=colour, marker=marker, ls="", ms=2.5, alpha=0.6)
        label = f"N = {c.n / 1e6:.2g}M"
        if c.parabola is None:
            ax.plot(list(c.means), list(c.means.values()), color=colour, ls=line, lw=1, label=label)
            continue
        steps = np.linspace(c.window[0].min(), c.window[0].max(), 101)
        ax.plot(c.lowest * c.step**steps, np.polyval(c.parabola, steps), color=colour, ls=line, lw=1, label=label)
        height = float(np.polyval(c.parabola, c.steps_of(c.best)))
        if (found := transfer.interval(c)) is not None:
            ax.plot(found, [height, height], color=colour, lw=2.2, alpha=0.5, solid_capstyle="butt")
        ax.plot(c.best, height, marker="*", ms=8, color=colour, markeredgecolor=BLACK, markeredgewidth=0.5)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(y=0.12)
    shift, sure = transfer.shift(parametrization), transfer.shift_interval(parametrization)
    interval = "" if sure is None else f" ({sure[0]:.1f} to {sure[1]:.1f})"
    told = "" if shift is None else f": moves {shift:.1f}{interval} steps"
    title = f"{'muP' if parametrization == 'mup' else parametrization}{told}"
    return finish(ax, "base learning rate", "validation loss (nats/token)", legend="top", title=title)


def draw_transfer(transfer: Transfer) -> Figure:
    """A figure with a panel for each parametrization that was run."""
    kinds = [kind for kind in ("mup", "standard") if transfer.of(kind)]
    figure = Figure(figsize=(3.2 * len(kinds), 2.6), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, kind in zip(axes, kinds):
        plot_transfer(ax, transfer, kind)
    return figure


def save_transfer(transfer: Transfer, folder: Path) -> list[Path]:
    """Write `lr.yaml` and the figure `lr_transfer.png` and `.svg`."""
    from dlcm.record import write_atomic

    write_atomic(folder / "lr.yaml", tuned_yaml(transfer))
    figure, facts = draw_transfer(transfer), {"results_hash": transfer.facts["results"][:12]}
    return [
        folder / "lr.yaml",
        *(save_figure(figure, folder / f"lr_transfer{kind}", **facts) for kind in (".png", ".svg")),
    ]
