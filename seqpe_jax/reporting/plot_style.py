"""How a plot is drawn: colours, axes, names at the ends of curves, and its forms as PNG and SVG."""

import dataclasses
import html
import io
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from seqpe_jax.reporting.study import Study

# One per encoding, the same in every plot: on white, and on black. The first six are Okabe and Ito's, told apart by
# colour-blind readers; their light orange is a little darker here, so that labels in it can be read on white.
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
    "other": ("#555555", "#BBBBBB"),
}
INK, GRID = "#333333", "#DDDDDD"
DASHES = (  # of further rows of one colour
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.5)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (9, 3)),
    (0, (1, 3)),
)
SIZE, DPI = (7.2, 4.3), 140
BANDS = 6  # more would hide each other
ROW = "row-"  # begins matplotlib's id of what is drawn for a row
LABEL_GAP = 13.0  # points between the middles of two labels
DRESS = {
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


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawn figure.

    Attributes:
      name: of its file; title: in the page; alt: what it shows, for people who do not see it; figure: matplotlib's.
    """

    name: str
    title: str
    alt: str
    figure: plt.Figure

    def png(self) -> bytes:
        """Returns the figure as PNG, on white."""
        out = io.BytesIO()
        with matplotlib.rc_context(DRESS):
            self.figure.savefig(out, format="png", dpi=DPI)
        return out.getvalue()

    def svg(self) -> str:
        """Returns the figure as an SVG element for a page that defines `variables`: vectors, text as text, no background.

        Raster parts are inside it; its ids begin with the plot's name, so that many fit in one page.
        """
        out = io.StringIO()
        with matplotlib.rc_context(DRESS):
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(out, format="svg", transparent=True, dpi=DPI, metadata=nothing)
        svg = out.getvalue()
        svg = svg[svg.index("<svg") :]
        own = re.sub(r"\W+", "-", self.name)
        for pattern, by in (
            (r' xmlns(:\w+)?="[^"]*"', ""),
            (r"\bxlink:href=", "href="),
            (r' id="image\w*"', ""),  # of its content, which a figure may show twice
            (rf' id="{ROW}([0-9a-f]+)"', r' data-row="\1"'),
            (r'\bid="', f'id="{own}-'),
            (r'(\bhref="|url\()#', rf"\1#{own}-"),
            (r"'DejaVu Sans'[^;\"]*", "var(--sans)"),
        ):
            svg = re.sub(pattern, by, svg)
        for hex_, name in ((INK, "ink"), (GRID, "rule"), *((light, name) for name, (light, _) in COLOURS.items())):
            svg = re.sub(hex_, f"var(--{name})", svg, flags=re.IGNORECASE)
        width = math.ceil(72 * self.figure.get_figwidth())
        told = f'role="img" aria-label="{html.escape(self.alt)}" style="--width: {width}px"'
        return svg.replace("<svg ", f"<svg {told} ", 1).strip()


def variables(dark: bool) -> dict[str, str]:
    """Returns the colours that an `svg` asks its page for: name -> value."""
    return {name: pair[dark] for name, pair in COLOURS.items()}


def styles_of(study: Study) -> dict[str, tuple[str, Any]]:
    """Returns row -> colour and line style: an encoding's own colour, or one each where it has too many rows for that.

    An encoding with a gate, "KIND+GATE", has the colour of its kind.
    """
    rows: dict[str, list[str]] = {}
    for row in study.rows:
        if runs := study.of(row):
            encoding = runs[0].encoding
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


def key_of(row: str) -> str:
    """Returns what a row is called in the `data-row` of its curves and labels."""
    return f"{zlib.crc32(row.encode('utf-8', 'backslashreplace')):08x}"


def of_row(row: str) -> dict[str, str]:
    """Returns what tells matplotlib that something is drawn for a row, so that the page can leave it out."""
    return {"gid": ROW + key_of(row)}


def legend(study: Study) -> list[tuple[str, str, str]]:
    """Returns (row, its key, the name of its colour) of the rows that are drawn."""
    names = {light: name for name, (light, _) in COLOURS.items()}
    return [(row, key_of(row), names[colour]) for row, (colour, _) in styles_of(study).items()]


def length_axis(axes: plt.Axes, lengths: set[float], also: set[float]) -> None:
    """Makes x a base-2 logarithm with the lengths as ticks, wide enough for what else is shown."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [f"{length:g}" for length in sorted(lengths)])
    axes.minorticks_off()
    axes.set_xlim(min(lengths | also) / 1.15, max(lengths | also) * 1.08)


def mark_training(axes: plt.Axes, trained: set[float]) -> None:
    """Marks the lengths or sizes of training with a line and a word."""
    for length in sorted(trained):
        axes.axvline(length, color=INK, linestyle="--", linewidth=1.2, zorder=0.5)
        axes.annotate(
            f"trained at {length:g}",
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha=side(axes, length),
            color=INK,
            fontsize=9,
        )


def side(axes: plt.Axes, x: float) -> str:
    """Returns the alignment that keeps a text at x inside the axes."""
    place = axes.transAxes.inverted().transform(axes.transData.transform((x, axes.get_ylim()[0])))[0]
    return "left" if place < 0.15 else "right" if place > 0.85 else "center"


def label_ends(axes: plt.Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each curve's name at the height of its end right of the axes, moved apart where names would touch."""
    if not ends:
        return
    axes.autoscale_view()
    axes.figure.canvas.draw()  # the layout must stand before heights are known
    points = 72 / axes.figure.dpi
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [axes.transData.transform((x, y))[1] * points for x, y, *_ in ends]
    heights = list(wanted)
    for _ in range(200):
        moved = False
        for low in range(len(heights) - 1):
            overlap = LABEL_GAP - (heights[low + 1] - heights[low])
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
            **of_row(row),
        )


def new_figure(x: str, y: str, labels: int) -> tuple[plt.Figure, plt.Axes]:
    """A figure of one plot, high enough for so many names beside it."""
    size = (SIZE[0], max(SIZE[1], room(labels)))
    figure, axes = plt.subplots(figsize=size, dpi=DPI, layout="constrained")
    return figure, dress(axes, x, y)


def room(labels: int) -> float:
    """Height in inches of a plot with so many names beside it."""
    return (1.2 * LABEL_GAP * labels + 60) / 72


def dress(axes: plt.Axes, x: str, y: str) -> plt.Axes:
    """Returns the axes with their labels, a light grid and no frame."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
