"""Style of the plots: colours, axes, curve names, and their forms as PNG and SVG."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from seqpe_jax.reporting.study import Study

# Encoding -> colour on white, on black; the same in all plots. The first six are Okabe and Ito's for colour-blind readers;
# their light orange is slightly darker here, so that text in it is legible on white.
COLOURS = {
    "seqpe": ("#D55E00", "#FF8A3C"),
    "rotary": ("#0072B2", "#58AEEE"),
    "alibi": ("#009E73", "#2ECDA0"),
    "learned": ("#CC79A7", "#EBA0CB"),
    "sinusoidal": ("#B87A00", "#E3B23C"),
    "none": ("#767676", "#A3A3A3"),
    "rotary_axial": ("#332288", "#A79BF5"),
    "rotary_mixed": ("#117733", "#72C96B"),
    "fox": ("#882255", "#D98BB0"),
    "cable": ("#5F4B8B", "#B9A6E8"),
    "kerple": ("#8B4513", "#D9A066"),
    "fire": ("#C2185B", "#FF7AA8"),
    "t5": ("#00838F", "#4DC8D4"),
    "pope": ("#6B7A00", "#C2CF4A"),
    "scale_invariant": ("#3F51B5", "#9DAAF2"),
    "alibi_grid": ("#00796B", "#4DB6AC"),
    "lookhere": ("#795548", "#C8A08E"),
    "rope_id": ("#0D47A1", "#7FA8E8"),
    "pape": ("#AD5A00", "#F0A35E"),
    "other": ("#555555", "#BBBBBB"),
}
INK, GRID = "#333333", "#DDDDDD"
# Line styles of the rows that share a colour.
DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 3)),
    (0, (1, 3)),
)
FIGURE_SIZE = (7.2, 4.3)  # inches
DPI = 140
MAX_BANDS = 6  # rows whose confidence intervals are drawn; more would hide each other
LABEL_HEIGHT = 13.0  # points between the middles of two curve names
RC_PARAMS = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # names may hold dollar signs
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "lines.solid_capstyle": "round",
}
CurveEnd = tuple[float, float, str, str]  # x, y, row, colour


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Attributes:
      name: file name without extension.
      title: heading in the page.
      alt: description for readers who do not see it.
      figure: matplotlib's figure.
    """

    name: str
    title: str
    alt: str
    figure: plt.Figure

    def png(self) -> bytes:
        """Returns the figure as PNG, on white."""
        out = io.BytesIO()
        with matplotlib.rc_context(RC_PARAMS):
            self.figure.savefig(out, format="png", dpi=DPI)
        return out.getvalue()

    def svg(self) -> str:
        """Returns the figure as an SVG element without background, in the colours that its page defines (`css_colours`).

        Raster images are embedded. Element ids begin with the plot's name, so that many figures fit into one page.
        """
        out = io.StringIO()
        with matplotlib.rc_context(RC_PARAMS):
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(out, format="svg", transparent=True, dpi=DPI, metadata=metadata)
        svg = out.getvalue()
        svg = svg[svg.index("<svg") :]
        prefix = re.sub(r"\W+", "-", self.name)
        for pattern, replacement in (
            (r' xmlns(:\w+)?="[^"]*"', ""),
            (r"\bxlink:href=", "href="),
            (r' id="image\w*"', ""),  # a hash of the content, which a figure may show twice
            (r'\bid="', f'id="{prefix}-'),
            (r'(\bhref="|url\()#', rf"\1#{prefix}-"),
            (r"'DejaVu Sans'[^;\"]*", "var(--sans)"),
        ):
            svg = re.sub(pattern, replacement, svg)
        for hex_, name in ((INK, "ink"), (GRID, "rule"), *((light, name) for name, (light, _) in COLOURS.items())):
            svg = re.sub(hex_, f"var(--{name})", svg, flags=re.IGNORECASE)
        width = math.ceil(72 * self.figure.get_figwidth())
        attributes = f'role="img" aria-label="{html.escape(self.alt)}" style="--width: {width}px"'
        return svg.replace("<svg ", f"<svg {attributes} ", 1).strip()


def css_colours(dark: bool) -> dict[str, str]:
    """Returns the CSS variables of `Plot.svg`: name -> colour."""
    return {name: pair[dark] for name, pair in COLOURS.items()}


def row_styles(study: Study) -> dict[str, tuple[str, Any]]:
    """Returns row -> colour and line style: the encoding's colour, or another for each row where an encoding has too many.

    An encoding with a gate, "KIND+GATE", has the colour of its kind.
    """
    rows: dict[str, list[str]] = {}
    for row in study.rows:
        encoding = study.runs_of(row)[0].encoding
        rows.setdefault(encoding if encoding in COLOURS else encoding.partition("+")[0], []).append(row)
    if len(rows) > 1 and max(map(len, rows.values())) <= len(DASHES):
        return {
            row: (COLOURS.get(encoding, COLOURS["other"])[0], DASHES[at])
            for encoding, own in rows.items()
            for at, row in enumerate(own)
        }
    colours = [light for light, _ in COLOURS.values()]
    return {
        row: (colours[at % len(colours)], DASHES[at // len(colours) % len(DASHES)])
        for at, row in enumerate(row for own in rows.values() for row in own)
    }


def new_figure(x: str, y: str, rows: int) -> tuple[plt.Figure, plt.Axes]:
    """Returns a figure of one plot.

    Args:
      x: label of the axis.
      y: label of the axis.
      rows: number of curve names next to the plot.
    """
    size = (FIGURE_SIZE[0], max(FIGURE_SIZE[1], label_inches(rows)))
    figure, axes = plt.subplots(figsize=size, dpi=DPI, layout="constrained")
    return figure, style_axes(axes, x, y)


def label_inches(rows: int) -> float:
    """Returns the height in inches that so many curve names need."""
    return (1.2 * LABEL_HEIGHT * rows + 60) / 72


def style_axes(axes: plt.Axes, x: str, y: str) -> plt.Axes:
    """Returns the axes with labels, a light grid and no frame."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def log2_axis(axes: plt.Axes, ticks: set[float], shown: set[float]) -> None:
    """Makes x logarithmic.

    Args:
      axes: axes to change.
      ticks: values with ticks.
      shown: further values that must be inside.
    """
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.set_xlim(min(ticks | shown) / 1.15, max(ticks | shown) * 1.08)


def mark_training(axes: plt.Axes, trained: set[float]) -> None:
    """Marks training lengths or sizes with a line and a word."""
    for extent in sorted(trained):
        axes.axvline(extent, color=INK, linestyle="--", linewidth=1.2, zorder=0.5)
        write_above(axes, extent, f"trained at {extent:g}")


def write_above(axes: plt.Axes, x: float, text: str) -> None:
    """Writes a text above the axes at x, aligned so that it stays within their width."""
    across = axes.transAxes.inverted().transform(axes.transData.transform((x, axes.get_ylim()[0])))[0]
    axes.annotate(
        text,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="left" if across < 0.15 else "right" if across > 0.85 else "center",
        color=INK,
        fontsize=9,
    )


def label_ends(axes: plt.Axes, ends: Sequence[CurveEnd]) -> None:
    """Writes the name of each curve right of the axes at the height of its end, without overlaps."""
    if not ends:
        return
    axes.autoscale_view()
    axes.figure.canvas.draw()  # heights are known once the layout is
    points = 72 / axes.figure.dpi
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [axes.transData.transform((x, y))[1] * points for x, y, *_ in ends]
    heights = list(wanted)
    for _ in range(200):
        moved = False
        for low in range(len(heights) - 1):
            overlap = LABEL_HEIGHT - (heights[low + 1] - heights[low])
            if overlap > 0.01:
                heights[low] -= overlap / 2
                heights[low + 1] += overlap / 2
                moved = True
        if not moved:
            break
    for (_, y, row, colour), height, old in zip(ends, heights, wanted, strict=True):
        axes.annotate(
            row,
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(6, height - old),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            fontsize=9,
            annotation_clip=False,
        )
