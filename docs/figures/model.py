"""Draws docs/figures/model.png: `python docs/figures/model.py`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

LENGTHS = (3, 2, 4, 3)
# Okabe and Ito's palette, lightened: one colour a segment.
COLOURS = ("#9CD3F2", "#F7CE7A", "#8FD6BC", "#E5B3CE")
NULL, STACK, INK, LEAK = "#D9D9D9", "#F2F2F2", "#222222", "#C0392B"
SEGMENT = [k for k, length in enumerate(LENGTHS) for _ in range(length)]
STARTS = [sum(LENGTHS[:k]) for k in range(len(LENGTHS))]
WIDTH = 12.0


def box(ax: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 9) -> None:
    """A rounded box with centred text."""
    style = "round,pad=0.02,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=0.8))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
    """A thin arrow."""
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": style, "color": INK, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    )


def row(ax: Axes, y: float, symbol: str) -> None:
    """One box a token, in the colour of its segment."""
    for t, k in enumerate(SEGMENT):
        box(ax, t + 0.12, y, 0.76, 0.5, f"${symbol}_{{{t + 1}}}$", COLOURS[k])


def tokens_to_segments(ax: Axes) -> None:
    """Tokens, encoder, boundaries."""
    row(ax, 0.0, "x")
    box(ax, 0, 0.85, WIDTH, 0.6, "encoder: causal transformer over tokens, width d", STACK)
    row(ax, 1.8, "h")
    for t in range(12):
        arrow(ax, (t + 0.5, 0.52), (t + 0.5, 0.83))
        arrow(ax, (t + 0.5, 1.47), (t + 0.5, 1.78))
    for t in STARTS:
        ax.plot([t, t], [1.68, 2.62], color=LEAK, linewidth=1.6, linestyle="--")
        ax.text(t + 0.06, 2.5, "b = 1", fontsize=8, color=LEAK, va="center")


def segments_to_concepts(ax: Axes) -> list[float]:
    """Pooling, backbone, smoother; returns where the concepts stand."""
    centres = [start + length / 2 for start, length in zip(STARTS, LENGTHS)]
    for k, (start, length, centre) in enumerate(zip(STARTS, LENGTHS, centres)):
        for t in range(start, start + length):
            ax.plot([t + 0.5, centre], [2.32, 3.2], color=INK, linewidth=0.6)
        box(ax, centre - 0.55, 3.2, 1.1, 0.6, f"$c_{k + 1}$", COLOURS[k], 11)
        arrow(ax, (centre, 3.82), (centre, 4.13))
        arrow(ax, (centre, 4.97), (centre, 5.23))
        box(ax, centre - 0.55, 5.25, 1.1, 0.6, f"$z_{k + 1}$", COLOURS[k], 11)
    box(
        ax,
        0.4,
        4.15,
        WIDTH - 0.8,
        0.8,
        "backbone: causal transformer over concepts, width D; norm; causal smoother (eq 11)",
        STACK,
    )
    box(ax, -1.35, 5.25, 1.1, 0.6, r"null $\varnothing$", NULL)
    ax.text(-1.55, 3.5, "pool, $W_{up}$\n(eq 7)", fontsize=9, va="center")
    ax.text(-1.55, 2.05, "boundaries\n(eqs 5, 6)", fontsize=9, va="center")
    return centres


def concepts_to_logits(ax: Axes, centres: list[float]) -> None:
    """Cross-attention, decoder, logits."""
    box(
        ax,
        0,
        6.65,
        WIDTH,
        0.6,
        "decoder: each layer attends to tokens, then to concepts (eqs 12-14), then feeds forward",
        STACK,
    )
    for centre in (-0.8, *centres):
        arrow(ax, (centre, 5.87), (min(max(centre, 0.3), WIDTH - 0.3), 6.63))
    arrow(ax, (WIDTH, 2.05), (WIDTH + 0.55, 2.05), "-")
    ax.plot([WIDTH + 0.55] * 2, [2.05, 6.95], color=INK, linewidth=0.8)
    arrow(ax, (WIDTH + 0.55, 6.95), (WIDTH + 0.04, 6.95))
    ax.text(WIDTH + 0.68, 4.5, "H", fontsize=11, va="center")
    row(ax, 7.6, "y")
    for t in range(12):
        arrow(ax, (t + 0.5, 7.27), (t + 0.5, 7.58))
    seen = ([r"$\varnothing$"], ["$z_1$"], ["$z_1$", "$z_2$"], ["$z_1$", "$z_2$", "$z_3$"])
    for centre, names in zip(centres, seen):
        ax.text(centre, 8.4, "saw " + " ".join(names), ha="center", fontsize=9)
    ax.text(-1.55, 7.85, "logits (eq 21)", fontsize=9, va="center")


def visibility(ax: Axes) -> None:
    """Which concept each token may see, and which one the printed rule adds."""
    n = len(LENGTHS)
    for t, j in enumerate(SEGMENT):
        for k in range(-1, n):
            visible = k < j and (k >= 0 or j == 0)
            colour = (NULL if k < 0 else COLOURS[k]) if visible else "white"
            leak = k == j
            ax.add_patch(
                Rectangle(
                    (k + 1, t), 1, 1, facecolor=colour, edgecolor=LEAK if leak else "#AAAAAA",
                    hatch="////" if leak else None, linewidth=0.6,
                )
            )  # fmt: skip
    ax.set_xlim(0, n + 1)
    ax.set_ylim(len(SEGMENT), 0)
    ax.set_xticks([k + 0.5 for k in range(n + 1)], [r"$\varnothing$", *(f"$z_{k + 1}$" for k in range(n))])
    ax.set_yticks([t + 0.5 for t in range(len(SEGMENT))], [f"$y_{{{t + 1}}}$" for t in range(len(SEGMENT))])
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.set_title("who sees which concept", fontsize=10, pad=18)
    ax.set_xlabel("filled: ours, k < j\nhatched: what the printed\nrule k ≤ j would add (leaks)", fontsize=9)


def main() -> None:
    """Draw both panels."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[5.2, 1])
    left.set_xlim(-1.7, 13.1)
    left.set_ylim(-0.15, 8.75)
    left.axis("off")
    tokens_to_segments(left)
    concepts_to_logits(left, segments_to_concepts(left))
    visibility(right)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
