"""The plots of a report: training, extrapolation, loss by place in the window, answers, likeness of position vectors."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from seqpe_jax.evaluation.tables import UNITS

# Okabe and Ito's colours, told apart by colour-blind readers; one per encoding, the same in every plot. Their light
# orange and sky blue are a little darker here, so that labels in them can be read on white.
COLOURS = {
    "seqpe": "#D55E00", "rotary": "#0072B2", "alibi": "#009E73", "learned": "#CC79A7", "sinusoidal": "#B87A00",
    "none": "#3A9BD1", "rotary_axial": "#332288", "rotary_mixed": "#117733",
}  # fmt: skip
OTHER, INK = "#555555", "#333333"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), "-.")  # of further runs of one encoding
SIZE, DPI = (8, 5), 140
LABEL_GAP = 13.0  # points between the middles of two labels


def training_curves(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws the task loss (nats) by step, smoothed over what was reported, and the other terms beside it.

    Returns:
      False when no run has two reported steps.
    """
    names = {name for run in runs for line in run.metrics for name in line if name.startswith("train/term/")}
    names = {name for name in names if any(len(_term(run, name)[0]) > 1 for run in runs)}
    others = sorted(names - {"train/term/task"})
    if "train/term/task" not in names:
        return False
    figure = plt.figure(figsize=(SIZE[0] + (3 if others else 0), SIZE[1]), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(max(1, len(others)), 2 if others else 1, width_ratios=[2.2, 1] if others else None)
    per = "/".join(sorted({UNITS[run.data].removesuffix("s") for run in runs}))
    axes = _dress(figure.add_subplot(grid[:, 0]), "training step", f"task loss (nats per {per})")
    _title(axes, "Task loss while training")
    ends = []
    for run, dash in _dashes(runs):
        steps, losses = _term(run, "train/term/task")
        if len(steps) > 1:
            axes.plot(steps, losses, color=_colour(run), linewidth=0.7, alpha=0.3)
            smooth = _smooth(losses)
            axes.plot(steps, smooth, color=_colour(run), linestyle=dash)
            ends.append((steps[-1], smooth[-1], run))
    for row, name in enumerate(others):
        side = _dress(figure.add_subplot(grid[row, 1]), "training step" if row == len(others) - 1 else "", "")
        _title(side, f"{name.removeprefix('train/term/').capitalize()} term")
        side.set_yscale("log")
        for run, dash in _dashes(runs):
            steps, losses = _term(run, name)
            if len(steps) > 1:
                side.plot(steps, losses, color=_colour(run), linewidth=0.7, alpha=0.3)
                side.plot(steps, _smooth(losses), color=_colour(run), linestyle=dash)
    axes.set_xlim(0, 1.02 * max(step for step, *_ in ends))
    _label_ends(axes, ends)
    return _save(figure, path)


def extrapolation(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws bits per byte (or the loss in nats) against the evaluated length, the training length marked.

    Returns:
      False when no run was evaluated.
    """
    runs = [run for run in runs if run.data == "text"]
    metric = "bits_per_byte"
    if not all(metric in result for run in runs for result in run.results):
        metric = "loss"
    unit = {"bits_per_byte": "bits per byte", "loss": "loss (nats per token)"}[metric]
    return _by_extent(runs, metric, "Past the training length", "evaluated length (tokens)", unit, path)


def extrapolation_answers(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws the share of answers found against the evaluated length, the training length marked. False without any."""
    runs = [run for run in runs if run.data == "questions"]
    x, y = "evaluated length (tokens)", "contains the answer (percent)"
    return _by_extent(runs, "contains", "Answers past the training length", x, y, path)


def extrapolation_sizes(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws top-1 accuracy against the evaluated size, the training size marked. False when no run was evaluated."""
    runs = [run for run in runs if run.data == "images"]
    side = "side of the image (pixels)"
    return _by_extent(runs, "top1", "Past the training size", side, "top-1 accuracy (percent)", path)


def _by_extent(runs: Sequence[Any], metric: str, title: str, x: str, y: str, path: pathlib.Path) -> bool:
    curves = []
    for run, dash in _dashes(runs):
        points = sorted((result["extent"], result[metric]) for result in run.results if metric in result)
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            curves.append((run, dash, *np.array(points).T))
    if not curves:
        return False
    figure, axes = _figure(x, y)
    _title(axes, title, above=1)
    for run, dash, lengths, values in curves:
        axes.plot(lengths, values, marker="o", markersize=5, color=_colour(run), linestyle=dash)
    trained = {run.training["extent"] for run, *_ in curves}
    _length_axis(axes, {length for _, _, lengths, _ in curves for length in lengths}, trained)
    _label_ends(axes, [(lengths[-1], values[-1], run) for run, _, lengths, values in curves])
    _mark_training(axes, trained)
    return _save(figure, path)


def loss_by_position(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws the loss (nats) by place in the longest evaluated window. False when no run has that curve."""
    runs = [run for run in runs if run.data == "text"]
    longest = max((result["extent"] for run in runs for result in run.results), default=0)
    curves = [
        (run, dash, np.asarray(result["loss_by_position"]["position"]) + 1, result["loss_by_position"]["loss"])
        for run, dash in _dashes(runs)
        for result in run.results
        if result["extent"] == longest and result.get("loss_by_position")
    ]
    if not curves:
        return False
    figure, axes = _figure("place in the window (tokens)", "loss (nats per token)")
    _title(axes, f"Loss by place in a window of {longest} tokens", above=1)
    for run, dash, places, losses in curves:
        axes.plot(places, losses, color=_colour(run), linestyle=dash)
    trained = {run.training["extent"] for run, *_ in curves}
    first = max(1, min(places[0] for _, _, places, _ in curves))
    ticks = {2**power for power in range(math.ceil(math.log2(first)), math.floor(math.log2(longest)) + 1)}
    _length_axis(axes, ticks | {longest}, trained | {first})
    _label_ends(axes, [(places[-1], losses[-1], run) for run, _, places, losses in curves])
    _mark_training(axes, trained)
    return _save(figure, path)


def answer_depth(run: Any, path: pathlib.Path) -> bool:
    """Draws the share of right answers (percent) by evaluated length and depth of the passage in its context.

    Returns:
      False when no result of the run has scores by depth.
    """
    results = sorted((result for result in run.results if result.get("depth")), key=lambda result: result["extent"])
    if not results:
        return False
    bins = results[0]["depth"]
    shares_DL = np.array([[part["contains"] for part in result["depth"]] for result in results], float).T
    figure, axes = plt.subplots(figsize=(2.2 + 1.1 * len(results), 1.6 + 0.55 * len(bins)), dpi=DPI, layout="constrained")
    image = axes.imshow(shares_DL, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for row, column in np.argwhere(np.isfinite(shares_DL)):
        share = shares_DL[row, column]
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="black" if share > 55 else "white")
    axes.set_xticks(range(len(results)), [result["label"] for result in results])
    axes.set_yticks(range(len(bins)), [f"{part['from']:.0%} to {part['to']:.0%}" for part in bins])
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"evaluated length (tokens; trained at {run.training['label']})")
    axes.set_ylabel("depth of the passage")
    _title(axes, f"Answers found by length and depth: {run.name}")
    bar = figure.colorbar(image, label="contains the answer (percent)", pad=0.02)
    bar.outline.set_visible(False)
    return _save(figure, path)


def similarity(run: Any, path: pathlib.Path) -> bool:
    """Draws the cosine between the vectors of a few pivots and of all positions of a window or grid; False without any."""
    if run.similarity is None:
        return False
    pivots, positions, cosine = (run.similarity[name] for name in ("pivots", "positions", "cosine"))
    if positions.shape[1] > 1:
        return _similarity_on_grid(run, pivots, positions, cosine, path)
    pivots, positions, trained = pivots[:, 0], positions[:, 0], run.training["extent"]
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.5 + 0.5 * len(pivots)), dpi=DPI, layout="constrained")
    edges = np.append(positions, positions[-1] + 1)
    rows = np.arange(len(pivots) + 1)
    # From the least cosine there is, or vectors that are alike everywhere would show one colour only.
    low = math.floor(min(float(np.nanmin(cosine)), 0.95) * 20) / 20
    image = axes.pcolormesh(edges, rows, cosine, cmap="cividis", vmin=low, vmax=1.0, rasterized=True)
    axes.hlines(rows[1:-1], edges[0], edges[-1], color="white", linewidth=2.5)
    for row, pivot in enumerate(pivots):
        axes.plot(pivot + 0.5, row + 0.5, marker="v", color="white", markeredgecolor="black", markersize=7)
    axes.set_yticks(rows[:-1] + 0.5, [str(pivot) for pivot in pivots])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("position")
    axes.set_ylabel("pivot (triangle)")
    _title(axes, f"Likeness of position vectors: {run.name}", above=1)
    if edges[0] < trained < edges[-1]:
        axes.axvline(trained, color="white", linewidth=2.5)
        axes.axvline(trained, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"training length {trained}", (trained, 1), xycoords=("data", "axes fraction"),
            xytext=(0, 4), textcoords="offset points", ha=_side(axes, trained), color=INK, fontsize=9,
        )  # fmt: skip
    bar = figure.colorbar(image, label="cosine", pad=0.02)
    bar.outline.set_visible(False)
    return _save(figure, path)


def _similarity_on_grid(
    run: Any, pivots: np.ndarray, positions: np.ndarray, cosine: np.ndarray, path: pathlib.Path
) -> bool:
    """One heat map per pivot over the last two axes; with more axes, where the others are the pivot's."""
    figure, plots = plt.subplots(
        1, len(pivots), figsize=(2.1 * len(pivots) + 0.8, 3.0), dpi=DPI, layout="constrained", squeeze=False
    )
    low = math.floor(min(float(np.nanmin(cosine)), 0.95) * 20) / 20
    sides = positions.max(axis=0) + 1
    for axes, pivot, values in zip(plots[0], pivots, cosine, strict=True):
        plane = values.reshape(sides)[tuple(pivot[:-2])]
        image = axes.imshow(plane, cmap="cividis", vmin=low, vmax=1.0)
        axes.plot(pivot[-1], pivot[-2], marker="x", color="white", markeredgewidth=2, markersize=7)
        axes.set_title(f"pivot ({', '.join(map(str, pivot))})", fontsize=9, color=INK)
        axes.tick_params(labelsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    figure.suptitle(f"Likeness of position vectors: {run.name}", fontsize=11, fontweight="bold", color=INK)
    bar = figure.colorbar(image, ax=plots[0].tolist(), label="cosine", shrink=0.8)
    bar.outline.set_visible(False)
    return _save(figure, path)


def attention(run: Any, path: pathlib.Path) -> bool:
    """Draws images and, over each, the class token's attention of the last layer, averaged over heads; False without."""
    if run.attention is None:
        return False
    images, weights = run.attention["images"], run.attention["attention"].mean(axis=1)
    if images.ndim == 5:  # clips: their middle frames
        images = images[:, images.shape[1] // 2]
        weights = weights[:, weights.shape[1] // 2]
    size = (1.9 * len(images), 4.2)
    figure, plots = plt.subplots(2, len(images), figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    height, width = images.shape[1:3]
    for column, (image, map_) in enumerate(zip(images, weights, strict=True)):
        for axes in plots[:, column]:
            axes.imshow(image, cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
        plots[1, column].imshow(map_, cmap="inferno", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    title = f"Where the class token looks ({height}x{width}): {run.name}"
    figure.suptitle(title, fontsize=11, fontweight="bold", color=INK)
    return _save(figure, path)


def _term(run: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a term; a term that a step did not compute is 0 and left out."""
    points = [(line["step"], line[name]) for line in run.metrics if line.get(name) and math.isfinite(line[name])]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each value and its neighbours, over a tenth of the curve at most, as many on either side."""
    reach = len(values) // 20
    sums = np.cumsum(np.insert(values, 0, 0.0))
    places = np.arange(len(values))
    near = np.minimum(reach, np.minimum(places, places[::-1]))
    return (sums[places + near + 1] - sums[places - near]) / (2 * near + 1)


def _dashes(runs: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Returns each run with a line style that tells it from runs of the same colour."""
    before: dict[str, int] = {}
    styled = []
    for run in runs:
        count = before.get(_colour(run), 0)
        before[_colour(run)] = count + 1
        styled.append((run, DASHES[count % len(DASHES)]))
    return styled


def _length_axis(axes: plt.Axes, lengths: set[int], shown: set[float]) -> None:
    """Makes x a base-2 logarithm with the lengths as ticks, wide enough for what else is shown."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [f"{length:g}" for length in sorted(lengths)])
    axes.minorticks_off()
    axes.set_xlim(min(lengths | shown) / 1.15, max(lengths | shown) * 1.08)


def _mark_training(axes: plt.Axes, trained: set[int]) -> None:
    for length in sorted(trained):
        axes.axvline(length, color=INK, linestyle="--", linewidth=1.2, zorder=0.5)
        axes.annotate(
            f"trained at {length:g}", (length, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha=_side(axes, length), color=INK, fontsize=9,
        )  # fmt: skip


def _side(axes: plt.Axes, x: float) -> str:
    """Returns the alignment that keeps a text at x inside the axes."""
    place = axes.transAxes.inverted().transform(axes.transData.transform((x, axes.get_ylim()[0])))[0]
    return "left" if place < 0.15 else "right" if place > 0.85 else "center"


def _label_ends(axes: plt.Axes, ends: Sequence[tuple[float, float, Any]]) -> None:
    """Writes each curve's name at the height of its end right of the axes, moved apart where names would touch."""
    if not ends:
        return
    axes.autoscale_view()
    axes.figure.canvas.draw()  # the layout must stand before heights are known
    points = 72 / axes.figure.dpi
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [axes.transData.transform((x, y))[1] * points for x, y, _ in ends]
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
    for (x, y, run), height, old in zip(ends, heights, wanted, strict=True):
        fraction = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0]
        inside = fraction < 0.9  # a curve that ends early is named at its end
        axes.annotate(
            run.name, (x if inside else 1, y), xycoords="data" if inside else ("axes fraction", "data"),
            xytext=(6, 0 if inside else height - old), textcoords="offset points", va="center",
            color=_colour(run), fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _figure(x: str, y: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
    return figure, _dress(axes, x, y)


def _dress(axes: plt.Axes, x: str, y: str) -> plt.Axes:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _title(axes: plt.Axes, text: str, above: int = 0) -> None:
    """Sets a title with room for so many lines between it and the axes."""
    axes.set_title(text, fontsize=11, fontweight="bold", color=INK, pad=8 + 14 * above)


def _save(figure: plt.Figure, path: pathlib.Path) -> bool:
    figure.savefig(path)
    plt.close(figure)
    return True


def _colour(run: Any) -> str:
    return COLOURS.get(run.encoding, OTHER)
