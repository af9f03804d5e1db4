"""The figure of what a fit owes to a few runs."""

import itertools
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from analysis.plots import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION, finish
from analysis.sensitivity import DropCurve

_STYLES = tuple(
    zip(
        (BLUE, VERMILION, GREEN, PURPLE, ORANGE, BLACK),
        ("o", "^", "D", "v", "P", "s"),
        ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))),
    )
)


def plot_drop_curve(ax: Axes, curve: DropCurve) -> Axes:
    """Exponents against the number of largest losses that were left out, with their 95% intervals."""
    places = np.arange(len(curve.ks))
    for i, ((name, values), (color, marker, dashes)) in enumerate(zip(curve.values.items(), itertools.cycle(_STYLES))):
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "linestyle": dashes,
            "markersize": 4,
            "linewidth": 1.1,
        }
        shift = 0.06 * (i - (len(curve.values) - 1) / 2)
        ax.plot(places + shift, values, label=name, zorder=3, **style)
        if name in curve.low:
            ax.vlines(
                places + shift, curve.low[name], curve.high[name], color=color, linewidth=0.8, alpha=0.7, zorder=2
            )
    ax.set_xticks(places, [str(k) for k in curve.ks])
    ax.margins(y=0.12)
    return finish(ax, "largest losses left out", "exponent (95% interval)", legend="top", title=curve.law)
