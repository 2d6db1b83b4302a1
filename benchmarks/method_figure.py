"""Draws the method: position -> digits -> encoder -> vector -> attention, with the two losses on the vectors.

    python benchmarks/method_figure.py

Writes docs/method.svg.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
INK = "#333333"
FILL = {"digits": "#FFF3E0", "encoder": "#E3F2FD", "vector": "#FBE9E7", "attention": "#E8F5E9", "loss": "#F3E5F5"}


def box(axes, x: float, y: float, width: float, height: float, text: str, fill: str, size: float = 10) -> None:
    """A rounded box with centred text; (x, y) is its lower left corner, in inches."""
    shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.08", fc=FILL[fill], ec=INK, lw=1)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.4)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>", dashed: bool = False) -> None:
    """An arrow between two points, in inches."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=12, lw=1.2, color=INK, ls="--" if dashed else "-")
    )


def draw() -> plt.Figure:
    """The figure, 10 x 4.2 inches."""
    figure = plt.figure(figsize=(10, 4.2))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(0, 4.2))
    axes.axis("off")

    axes.text(0.25, 3.95, "positions", fontsize=10, color=INK, va="center")
    rows = ((3.25, "text: token 1207", "0 1 2 0 7"), (2.55, "image: row 3, column 14", "0 3 · 1 4"))
    for y, position, digits in rows:
        axes.text(0.25, y + 0.25, position, fontsize=9.5, color=INK, va="center")
        box(axes, 2.05, y, 1.25, 0.5, digits, "digits", 11)
        arrow(axes, (3.3, y + 0.25), (3.85, 3.15))
    axes.text(2.67, 3.95, "strings of digits", fontsize=10, color=INK, ha="center", va="center")

    box(axes, 3.9, 2.5, 1.5, 1.3, "light\ntransformer\nencoder", "encoder")
    arrow(axes, (5.4, 3.15), (5.9, 3.15))
    box(axes, 5.95, 2.5, 1.2, 1.3, "position\nvector\n$e_p$", "vector")
    arrow(axes, (7.15, 3.15), (7.65, 3.15))
    box(
        axes,
        7.7,
        2.5,
        2.05,
        1.3,
        "attention\n$q_i \\cdot k_j + \\phi(e_i) \\cdot \\psi(e_j)$\n(or added, or multiplied)",
        "attention",
        9.5,
    )

    box(
        axes,
        0.9,
        0.3,
        3.9,
        1.25,
        "contrastive loss\nthe nearest of several candidates\nhas the most similar vector",
        "loss",
        9.5,
    )
    far = "distillation loss\nvectors far beyond the training length\nrelate to each other as those within it do"
    box(axes, 5.35, 0.3, 3.9, 1.25, far, "loss", 9.5)
    arrow(axes, (6.3, 2.5), (3.9, 1.57), "<|-", dashed=True)
    arrow(axes, (6.8, 2.5), (7.1, 1.57), "<|-", dashed=True)
    return figure


def main() -> None:
    """Writes the figure."""
    matplotlib.rcParams["svg.hashsalt"] = "seqpe"  # the same file each time
    draw().savefig(DOCS / "method.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
