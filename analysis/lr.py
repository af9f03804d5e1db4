"""Do learning rates transfer over widths? The best rate of each size, how far it moves, and a file that sweeps refer to."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots import BLACK, BLUE, FONT, GREEN, ORANGE, PURPLE, SMALL, VERMILION
from dlcm.errors import UserError

Array = np.ndarray
MAX_SHIFT_STEPS = 1.0
_NEEDED = (
    "params_total", "params_embedding", "lr_token", "lr_concept", "loss_nats", "status", "d_token", "d_token_base",
    "d_concept", "d_concept_base", "model", "seed", "tokens",
)  # fmt: skip
_STYLES = (
    (BLUE, "o", "-"),
    (VERMILION, "^", "--"),
    (GREEN, "D", "-."),
    (PURPLE, "v", ":"),
    (ORANGE, "P", "-"),
    (BLACK, "s", "--"),
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss over the base learning rate at one size, both rates equal.

    Attributes:
        parametrization: `mup`: one base width for all sizes; `standard`: each size is its own.
        n: non-embedding parameters.
        d_token: token width.
        rates: base learning rates, ascending.
        losses: validation losses in nats, means over seeds; infinite where a run diverged.
    """

    parametrization: str
    n: int
    d_token: int
    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        """The grid's rate of least loss."""
        return self.rates[int(np.argmin(self.losses))]

    @property
    def is_inside(self) -> bool:
        """Whether rates on both sides of the best were tried."""
        return self.best not in (self.rates[0], self.rates[-1])

    @property
    def refined(self) -> float:
        """Vertex of the parabola in log rate through the best and its neighbours; the best itself at the grid's edge."""
        i = int(np.argmin(self.losses))
        if not self.is_inside or not np.isfinite(self.losses[i - 1 : i + 2]).all():
            return self.best
        a, b, _ = np.polyfit(np.log(self.rates[i - 1 : i + 2]), self.losses[i - 1 : i + 2], 2)
        return float(np.exp(-b / (2 * a))) if a > 0 else self.best


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How the best rate moves with the size.

    Attributes:
        curves: by parametrization and size.
        step: ratio of neighbouring rates of the grid.
        off_diagonal: lowest loss with unequal rates less that with equal ones, nats, by size; empty where none was tried.
        facts: of the runs under muP, for the tuned file.
    """

    curves: tuple[Curve, ...]
    step: float
    off_diagonal: Mapping[int, float]
    facts: Mapping[str, Any]

    def of(self, parametrization: str) -> list[Curve]:
        """Curves of a parametrization, by size."""
        return sorted((c for c in self.curves if c.parametrization == parametrization), key=lambda c: c.n)

    def shift(self, parametrization: str) -> float | None:
        """Largest distance between the best rates of two sizes, in steps of the grid; None with fewer than two sizes."""
        best = [np.log(curve.best) for curve in self.of(parametrization)]
        return float((max(best) - min(best)) / np.log(self.step)) if len(best) > 1 else None

    def drift(self, parametrization: str) -> float | None:
        """Slope of the log of the refined rate over the log of the width; -1 where the best rate falls as 1 / width."""
        curves = self.of(parametrization)
        if len(curves) < 2:
            return None
        return float(np.polyfit([np.log(c.d_token) for c in curves], [np.log(c.refined) for c in curves], 1)[0])

    @property
    def transfers(self) -> bool | None:
        """Whether, under muP, the best rate moves by one step at most, with rates on both sides tried; None for one size."""
        shift = self.shift("mup")
        if shift is None:
            return None
        return shift <= MAX_SHIFT_STEPS + 1e-9 and all(curve.is_inside for curve in self.of("mup"))

    @property
    def rate(self) -> float:
        """The rate to use: the grid's rate of least summed excess loss over the sizes of muP."""
        curves = self.of("mup")
        common = sorted(set.intersection(*(set(curve.rates) for curve in curves)))
        excess = [sum(c.losses[c.rates.index(rate)] - min(c.losses) for c in curves) for rate in common]
        return common[int(np.argmin(excess))]


def analyse_transfer(frame: pd.DataFrame) -> Transfer:
    """Read the results of a sweep over learning rates and sizes.

    Args:
        frame: results.parquet of the sweep; DLCM runs count.

    Raises:
        UserError: a column is missing, or there are fewer than three rates at any size, or no run under muP.
    """
    if absent := [name for name in _NEEDED if name not in frame]:
        raise UserError(f"results: no column {', '.join(absent)}; collect the sweep again with this version")
    table: Any = frame  # the stubs of pandas know too many types of a column
    runs = table[(table["model"] == "dlcm") & table["status"].isin(["finished", "diverged"])].copy()
    runs["n"] = runs["params_total"] - runs["params_embedding"]
    runs["loss"] = runs["loss_nats"].where(runs["status"] == "finished", np.inf)
    own = (runs["d_token_base"] == runs["d_token"]) & (runs["d_concept_base"] == runs["d_concept"])
    several = runs.groupby("d_token_base")["d_token"].transform("nunique") > 1
    runs["parametrization"] = np.where(own & ~several, "standard", "mup")
    if runs["n"].nunique() == 1:
        runs["parametrization"] = "mup"
    equal = np.isclose(runs["lr_token"], runs["lr_concept"])
    curves = []
    for (kind, n, width), group in runs[equal].groupby(["parametrization", "n", "d_token"]):
        by_rate = group.groupby("lr_token")["loss"].mean().sort_index()
        if len(by_rate) >= 3:
            curves.append(Curve(str(kind), int(n), int(width), tuple(by_rate.index), tuple(by_rate)))
    if not any(curve.parametrization == "mup" for curve in curves):
        raise UserError(
            "results: no size under muP has three learning rates with runs that ended; run more of the sweep"
        )
    first = curves[0].rates
    steps = np.diff(np.log(first))
    return Transfer(tuple(curves), float(np.exp(np.median(steps))), _off_diagonal(runs[~equal], curves), _facts(runs))


def _off_diagonal(unequal: Any, curves: Sequence[Curve]) -> dict[int, float]:
    best = {curve.n: min(curve.losses) for curve in curves if curve.parametrization == "mup"}
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
    lines = [
        f"{'':10} {'N':>9} {'width':>6} {'best':>10} {'refined':>10}   loss over the rates {_list(transfer.curves[0].rates)}"
    ]
    for kind in ("mup", "standard"):
        for c in transfer.of(kind):
            edge = "" if c.is_inside else "  (at the edge of the grid)"
            lines.append(f"{kind:10} {c.n:9,} {c.d_token:6} {c.best:10.3g} {c.refined:10.3g}   {_list(c.losses)}{edge}")
        shift, drift = transfer.shift(kind), transfer.drift(kind)
        if shift is not None:
            lines.append(
                f"{kind}: the best rate moves by {shift:.2g} steps of x{transfer.step:.3g}; as width^{drift:.2f}"
            )
    for n, less in transfer.off_diagonal.items():
        lines.append(f"unequal rates at N = {n:,}: best loss {less:+.4f} nats beside equal ones")
    told = {
        True: "the rate transfers",
        False: "the rate does NOT transfer",
        None: "one size: nothing is said about transfer",
    }
    lines.append(f"verdict: {told[transfer.transfers]}; base rate {transfer.rate:.3g}, for both sides")
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
        "width_exponent": {kind: transfer.drift(kind) for kind in ("mup", "standard")},
        "curves": [{**dataclasses.asdict(c), "best": c.best, "refined": c.refined} for c in transfer.curves],
        "off_diagonal_nats": {str(n): value for n, value in transfer.off_diagonal.items()},
        "facts": dict(transfer.facts),
    }


def plot_transfer(ax: Axes, transfer: Transfer, parametrization: str) -> Axes:
    """Loss over the base learning rate, a curve a size; its lowest point marked. Diverged runs are left out."""
    for c, (colour, marker, line) in zip(transfer.of(parametrization), _STYLES):
        rates, losses = np.array(c.rates), np.array(c.losses)
        shown = np.isfinite(losses)
        ax.plot(
            rates[shown],
            losses[shown],
            color=colour,
            marker=marker,
            linestyle=line,
            ms=3,
            lw=1,
            label=f"{c.n / 1e6:.2g}M",
        )
        ax.plot(c.best, min(c.losses), marker="*", ms=9, color=colour, markeredgecolor=BLACK, markeredgewidth=0.5)
    ax.set_xscale("log")
    ax.set_xlabel("base learning rate", fontsize=FONT)
    ax.set_ylabel("validation loss (nats)", fontsize=FONT)
    shift = transfer.shift(parametrization)
    told = "" if shift is None else f": best moves {shift:.2g} steps"
    ax.set_title(f"{'muP' if parametrization == 'mup' else parametrization}{told}", fontsize=FONT)
    ax.tick_params(labelsize=SMALL)
    ax.legend(fontsize=SMALL, frameon=False, title="N", title_fontsize=SMALL)
    return ax


def save_transfer(transfer: Transfer, folder: Path) -> list[Path]:
    """Write `lr.yaml` and the figure `lr_transfer.png` and `.svg`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dlcm.record import write_atomic

    kinds = [kind for kind in ("mup", "standard") if transfer.of(kind)]
    figure = Figure(figsize=(3.2 * len(kinds), 2.6), dpi=300, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, kind in zip(axes, kinds):
        plot_transfer(ax, transfer, kind)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "lr.yaml", folder / "lr_transfer.png", folder / "lr_transfer.svg"]
    write_atomic(paths[0], tuned_yaml(transfer))
    for path in paths[1:]:
        figure.savefig(path)
    return paths
