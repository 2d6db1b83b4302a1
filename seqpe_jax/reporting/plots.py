"""The plots of a report: training, extrapolation, loss by place in the window, answers, likeness of position vectors."""

import functools
import math
import statistics
from collections.abc import Iterator, Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter

from seqpe_jax.data.registry import COUNT_NAMES
from seqpe_jax.reporting.cost_table import Benchmark, quality_and_cost_values, summary
from seqpe_jax.reporting.plot_style import (
    BANDS,
    DPI,
    DRESS,
    INK,
    SIZE,
    Plot,
    dress,
    label_ends,
    length_axis,
    mark_training,
    new_figure,
    of_row,
    room,
    side,
    styles_of,
)
from seqpe_jax.reporting.study import Run, Study
from seqpe_jax.reporting.t_tests import interval
from seqpe_jax.reporting.tables import context_metric, metrics_of, number

Curves = dict[str, dict[float, list[float]]]  # row -> extent -> a value of each of its runs


def of_study(study: Study, benchmarks: Sequence[Benchmark] = ()) -> Iterator[Plot]:
    """Draws what compares the runs. The caller closes each figure (`close`) before it takes the next."""
    for draw in (
        contexts,
        extrapolation,
        extrapolation_answers,
        extrapolation_sizes,
        functools.partial(quality_and_cost, benchmarks=benchmarks),
        training_curves,
        training_terms,
        loss_by_position,
    ):
        with matplotlib.rc_context(DRESS):
            plot = draw(study)
        if plot is not None:
            yield plot


def of_run(run: Run) -> Iterator[Plot]:
    """Draws what one run holds, in the same way."""
    for draw in (answer_depth, similarity, attention):
        with matplotlib.rc_context(DRESS):
            plot = draw(run)
        if plot is not None:
            yield plot


def close(plot: Plot) -> None:
    """Frees the figure's memory."""
    plt.close(plot.figure)


def training_curves(study: Study) -> Plot | None:
    """Draws the task loss (nats) by step, smoothed over what was reported; of several runs of a row, their mean too.

    Returns:
      None when no run has two reported steps.
    """
    curves = _of_rows(study, "train/term/task")
    if not curves:
        return None
    per = "/".join(sorted({COUNT_NAMES[run.data].removesuffix("s") for run in study.runs}))
    figure, axes = new_figure("training step", f"task loss (nats per {per})", len(curves))
    ends = _draw_term(axes, study, curves)
    axes.set_xlim(0, 1.02 * max(end[0] for end in ends))
    label_ends(axes, ends)
    last = "; ".join(f"{row} {loss:.3f} at step {step:g}" for step, loss, row, _ in ends)
    alt = f"Line chart of the task loss by training step, smoothed. Last values: {last}."
    return Plot("training_curves", "Task loss while training", alt, figure)


def training_terms(study: Study) -> Plot | None:
    """Draws the other terms of the loss by step. None when no run has any."""
    names = {name for run in study.runs for line in run.metrics for name in line if name.startswith("train/term/")}
    curves = {name: _of_rows(study, name) for name in sorted(names - {"train/term/task"})}
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return None
    size = (SIZE[0], max(2.6, room(max(map(len, curves.values())))) * len(curves) + 0.4)
    figure, plots = plt.subplots(
        len(curves), 1, figsize=size, dpi=DPI, layout="constrained", squeeze=False, sharex=True
    )
    for axes, (name, found) in zip(plots[:, 0], curves.items(), strict=True):
        term = name.removeprefix("train/term/")
        dress(axes, "training step" if axes is plots[-1, 0] else "", f"{term} term")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the axis' own are formulas, which are shown as they are written
        axes.yaxis.set_minor_formatter(NullFormatter())
        label_ends(axes, _draw_term(axes, study, found))
    rows = dict.fromkeys(row for found in curves.values() for row in found)
    terms = " and ".join(name.removeprefix("train/term/") for name in curves)
    alt = f"Line charts of the {terms} terms of the loss by training step, on logarithmic axes, of {', '.join(rows)}."
    return Plot("training_terms", "Other terms of the loss while training", alt, figure)


def contexts(study: Study) -> Plot | None:
    """Draws what context is worth: the same tokens under each context, less their value under the smallest, which is 0.

    Returns:
      None when no run was evaluated under two contexts.
    """
    runs = [run for run in study.counted if run.contexts]
    metric = context_metric(study)
    curves: Curves = {}
    smallest = min((run.contexts[0]["extent"] for run in runs), default=0)
    for run in runs:
        values = {result["extent"]: result[metric.name] for result in run.contexts}
        if len(values) > 1 and smallest in values and all(map(math.isfinite, values.values())):
            for extent, value in values.items():
                curves.setdefault(run.row, {}).setdefault(extent, []).append(value - values[smallest])
    if not curves:
        return None
    x, y = "context (tokens)", f"{metric.title[0].lower()}{metric.title[1:]}, less that at {smallest:g}"
    title = "What context is worth: the same tokens, more context before them"
    return _by_extent(study, runs, curves, "contexts", title, x, y, zero=True)


def extrapolation(study: Study) -> Plot | None:
    """Draws bits per byte (or the loss in nats) against the evaluated length, the training length marked.

    Returns:
      None when no run was evaluated.
    """
    runs = [run for run in study.counted if run.data == "text"]
    metric = "bits_per_byte"
    if not all(metric in result for run in runs for result in run.results):
        metric = "loss"
    unit = {"bits_per_byte": "bits per byte", "loss": "loss (nats per token)"}[metric]
    x = "evaluated length (tokens)"
    return _by_extent(study, runs, _values(runs, metric), "extrapolation", "Past the training length", x, unit)


def extrapolation_answers(study: Study) -> Plot | None:
    """Draws the share of answers found against the evaluated length, the training length marked. None without any."""
    runs = [run for run in study.counted if run.data == "questions"]
    x, y = "evaluated length (tokens)", "contains the answer (percent)"
    values = _values(runs, "contains")
    return _by_extent(study, runs, values, "extrapolation_answers", "Answers past the training length", x, y)


def extrapolation_sizes(study: Study) -> Plot | None:
    """Draws top-1 accuracy against the evaluated size, the training size marked. None when no run was evaluated."""
    runs = [run for run in study.counted if run.data == "images"]
    x, y = "side of the image (pixels)", "top-1 accuracy (percent)"
    return _by_extent(study, runs, _values(runs, "top1"), "extrapolation_sizes", "Past the training size", x, y)


def _values(runs: Sequence[Run], metric: str) -> Curves:
    curves: Curves = {}
    for run in runs:
        for result in run.results:
            if metric in result and math.isfinite(result[metric]):
                curves.setdefault(run.row, {}).setdefault(result["extent"], []).append(result[metric])
    return curves


def _by_extent(
    study: Study, runs: Sequence[Run], curves: Curves, name: str, title: str, x: str, y: str, zero: bool = False
) -> Plot | None:
    """One line per row through the means of its runs, in a band of the 95% confidence interval of the mean.

    Args:
      zero: whether a line marks 0.
    """
    if not curves:
        return None
    figure, axes = new_figure(x, y, len(curves))
    if zero:
        axes.axhline(0.0, color=INK, linewidth=1.2, zorder=0.5)
    styles, ends = styles_of(study), []
    for row, found in curves.items():
        extents = sorted(found)
        means = np.array([statistics.fmean(found[extent]) for extent in extents])
        half = np.array([interval(found[at]) if len(found[at]) > 1 else 0.0 for at in extents])
        colour, dash = styles[row]
        axes.plot(extents, means, marker="o", markersize=4.5, color=colour, linestyle=dash, **of_row(row))
        if half.any() and len(curves) <= BANDS:
            low, high = means - half, means + half
            axes.fill_between(extents, low, high, color=colour, alpha=0.13, linewidth=0, **of_row(row))
        ends.append((extents[-1], means[-1], row, colour))
    trained = {run.training["extent"] for run in runs if run.row in curves}
    length_axis(axes, {extent for found in curves.values() for extent in found}, trained)
    label_ends(axes, ends)
    mark_training(axes, trained)
    spans = "; ".join(
        f"{row} {number(statistics.fmean(found[min(found)]))} at {min(found):g}, "
        f"{number(statistics.fmean(found[max(found)]))} at {max(found):g}"
        for row, found in curves.items()
    )
    marked = " and ".join(f"{extent:g}" for extent in sorted(trained))
    alt = f"Line chart of {y} by {x}; trained at {marked}, which is marked. {spans}. All values are in the table."
    return Plot(name, title, alt, figure)


def quality_and_cost(study: Study, benchmarks: Sequence[Benchmark]) -> Plot | None:
    """Draws the quality far beyond the training length against the time of a training step, as times RoPE's.

    Returns:
      None when `benchmark` did not time the training steps of two rows.
    """
    main = dict(reversed(metrics_of(study)))  # of each kind of data the first
    if len(main) != 1:
        return None
    [(data, metric)] = main.items()
    found = quality_and_cost_values(study, data, metric, benchmarks)
    if len(found) < 2:
        return None
    table = summary(study, data, metric, benchmarks)
    quality = f"{metric.title.rstrip(',')} {table.header[2]}"
    figure, axes = new_figure("time of a training step (times RoPE's)", quality, len(found))
    styles, ends = styles_of(study), []
    for row, (time, value) in found.items():
        axes.plot([time], [value], marker="o", markersize=7, color=styles[row][0], linestyle="", **of_row(row))
        ends.append((time, value, row, styles[row][0]))
    label_ends(axes, ends)
    each = "; ".join(f"{row} {number(value)} at {time:.2f} times" for row, (time, value) in found.items())
    alt = f"Scatter plot of {quality} by the time of a training step relative to RoPE's. {each}."
    return Plot("quality_and_cost", "Quality beyond the training length, and its cost", alt, figure)


def loss_by_position(study: Study) -> Plot | None:
    """Draws the loss (nats) by place in the longest evaluated window; None when no run has that curve."""
    runs = [run for run in study.counted if run.data == "text"]
    longest = max((result["extent"] for run in runs for result in run.results), default=0)
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run in runs:
        for result in run.results:
            if result["extent"] == longest and (found := result.get("loss_by_position")):
                curves.setdefault(run.row, []).append((np.asarray(found["position"]) + 1, np.asarray(found["loss"])))
    if not curves:
        return None
    figure, axes = new_figure("place in the window (tokens)", "loss (nats per token)", len(curves))
    styles, ends = styles_of(study), []
    for row, found in curves.items():
        for places, losses in _with_mean(found):
            look = {"color": styles[row][0], "linestyle": styles[row][1]} | _weight(found, losses)
            axes.plot(places, losses, **look, **of_row(row))
        ends.append((places[-1], losses[-1], row, styles[row][0]))
    trained = {run.training["extent"] for run in runs if run.row in curves}
    first = max(1, min(places[0] for found in curves.values() for places, _ in found))
    ticks = {2**power for power in range(math.ceil(math.log2(first)), math.floor(math.log2(longest)) + 1)}
    length_axis(axes, ticks | {longest}, trained | {first})
    label_ends(axes, ends)
    mark_training(axes, trained)
    last = "; ".join(f"{row} {loss:.3f}" for _, loss, row, _ in ends)
    alt = f"Line chart of the loss by place in a window of {longest} tokens. At its end: {last}."
    return Plot("loss_by_position", f"Loss by place in a window of {longest} tokens", alt, figure)


def answer_depth(run: Run) -> Plot | None:
    """Draws the share of right answers (percent) by evaluated length and depth of the passage in its context.

    Returns:
      None when no result of the run has scores by depth.
    """
    results = sorted((result for result in run.results if result.get("depth")), key=lambda result: result["extent"])
    if not results:
        return None
    bins = results[0]["depth"]
    shares_DL = np.array([[part["contains"] for part in result["depth"]] for result in results], float).T
    figure, axes = plt.subplots(
        figsize=(2.2 + 1.1 * len(results), 1.0 + 0.5 * len(bins)), dpi=DPI, layout="constrained"
    )
    image = axes.imshow(shares_DL, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="none")
    for row, column in np.argwhere(np.isfinite(shares_DL)):
        share = shares_DL[row, column]
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="black" if share > 55 else "white")
    axes.set_xticks(range(len(results)), [result["label"] for result in results])
    axes.set_yticks(range(len(bins)), [f"{part['from']:.0%} to {part['to']:.0%}" for part in bins])
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"evaluated length (tokens; trained at {run.training['label']})")
    axes.set_ylabel("depth of the passage")
    bar = figure.colorbar(image, label="contains the answer (percent)", pad=0.02)
    bar.outline.set_visible(False)
    values = "; ".join(
        f"{result['label']} tokens: {', '.join(f'{share:.0f}' if np.isfinite(share) else '-' for share in shares_L)}"
        for result, shares_L in zip(results, shares_DL.T, strict=True)
    )
    alt = f"Heat map of answers found, in percent, from the start to the end of the context. {values}."
    return Plot(f"answer_depth_{run.name}", "Answers by length and depth", alt, figure)


def similarity(run: Run) -> Plot | None:
    """Draws the cosine between the vectors of a few pivots and of all positions of a window or grid; None without any."""
    if run.similarity is None:
        return None
    pivots, positions, cosine = (run.similarity[name] for name in ("pivots", "positions", "cosine"))
    # From the least cosine there is, or vectors that are alike everywhere would show one colour only.
    low = math.floor(min(float(np.nanmin(cosine)), 0.95) * 20) / 20
    draw = _similarity_on_grid if positions.shape[1] > 1 else _similarity_on_line
    figure = draw(run, pivots, positions, cosine, low)
    places = "; ".join(f"({', '.join(map(str, pivot))})" if len(pivot) > 1 else str(pivot[0]) for pivot in pivots)
    alt = (
        f"Heat maps of the cosine between the position vectors of pivots {places} and those of all {len(positions)} "
        f"positions, from {np.nanmin(cosine):.2f} to {np.nanmax(cosine):.2f}."
    )
    return Plot(f"similarity_{run.name}", "Likeness of position vectors", alt, figure)


def _similarity_on_line(
    run: Run, pivots: np.ndarray, positions: np.ndarray, cosine: np.ndarray, low: float
) -> plt.Figure:
    pivots, positions, trained = pivots[:, 0], positions[:, 0], run.training["extent"]
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.3 + 0.45 * len(pivots)), dpi=DPI, layout="constrained")
    edges = np.append(positions, positions[-1] + 1)
    rows = np.arange(len(pivots) + 1)
    image = axes.pcolormesh(edges, rows, cosine, cmap="cividis", vmin=low, vmax=1.0, rasterized=True)
    axes.hlines(rows[1:-1], edges[0], edges[-1], color="white", linewidth=2.5)
    for row, pivot in enumerate(pivots):
        axes.plot(pivot + 0.5, row + 0.5, marker="v", color="white", markeredgecolor="black", markersize=7)
    axes.set_yticks(rows[:-1] + 0.5, [str(pivot) for pivot in pivots])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("position")
    axes.set_ylabel("pivot (triangle)")
    if edges[0] < trained < edges[-1]:
        axes.axvline(trained, color="white", linewidth=2.5)
        axes.axvline(trained, color="black", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"training length {trained}",
            (trained, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha=side(axes, trained),
            color=INK,
            fontsize=9,
        )
    bar = figure.colorbar(image, label="cosine", pad=0.02)
    bar.outline.set_visible(False)
    return figure


def _similarity_on_grid(
    run: Run, pivots: np.ndarray, positions: np.ndarray, cosine: np.ndarray, low: float
) -> plt.Figure:
    """One heat map per pivot over the last two axes; with more axes, where the others are the pivot's."""
    columns = min(len(pivots), 5)
    rows = math.ceil(len(pivots) / columns)
    size = (1.75 * columns + 0.9, 2.1 * rows)
    figure, plots = plt.subplots(rows, columns, figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    sides = positions.max(axis=0) + 1
    for axes in plots.flat[len(pivots) :]:
        axes.set_axis_off()
    for axes, pivot, values in zip(plots.flat, pivots, cosine, strict=False):
        plane = values.reshape(sides)[tuple(pivot[:-2])]
        image = axes.imshow(plane, cmap="cividis", vmin=low, vmax=1.0, interpolation="none")
        axes.plot(pivot[-1], pivot[-2], marker="x", color="white", markeredgewidth=2, markersize=7)
        axes.set_title(f"pivot ({', '.join(map(str, pivot))})", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[:].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    bar = figure.colorbar(image, ax=plots.ravel().tolist(), label="cosine", shrink=0.8)
    bar.outline.set_visible(False)
    return figure


def attention(run: Run) -> Plot | None:
    """Draws images and, over each, the class token's attention of the last layer, averaged over heads; None without."""
    if run.attention is None:
        return None
    images, weights = run.attention["images"], run.attention["attention"].mean(axis=1)
    if images.ndim == 5:  # clips: their middle frames
        images = images[:, images.shape[1] // 2]
        weights = weights[:, weights.shape[1] // 2]
    size = (1.6 * len(images), 3.3)
    figure, plots = plt.subplots(2, len(images), figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    height, width = images.shape[1:3]
    for column, (image, map_) in enumerate(zip(images, weights, strict=True)):
        for axes in plots[:, column]:
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none")
            axes.set_axis_off()
        over = (-0.5, width - 0.5, height - 0.5, -0.5)
        plots[1, column].imshow(map_, cmap="inferno", alpha=0.65, extent=over, interpolation="none")
    alt = (
        f"{len(images)} test images of {height} x {width} pixels, and under each the same image coloured by the attention "
        "that the class token pays to its patches in the last layer, averaged over heads."
    )
    return Plot(f"attention_{run.name}", f"Where the class token looks ({height} x {width} pixels)", alt, figure)


def _of_rows(study: Study, name: str) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Steps and smoothed values of a term for the runs of each row; a term that a step did not compute is 0, left out."""
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for run in study.runs:
        points = [(line["step"], line[name]) for line in run.metrics if line.get(name) and math.isfinite(line[name])]
        if len(points) > 1:
            steps, values = np.array(points, float).T
            curves.setdefault(run.row, []).append((steps, _smooth(values)))
    return curves


def _draw_term(
    axes: plt.Axes, study: Study, curves: dict[str, list[tuple[np.ndarray, np.ndarray]]]
) -> list[tuple[float, float, str, str]]:
    """Draws each row's runs and their mean; returns where it ends, its name and colour."""
    styles, ends = styles_of(study), []
    for row, found in curves.items():
        colour, dash = styles[row]
        for steps, values in _with_mean(found):
            axes.plot(steps, values, color=colour, linestyle=dash, **_weight(found, values), **of_row(row))
        ends.append((steps[-1], values[-1], row, colour))
    return ends


def _with_mean(curves: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the curves and, of more than one, their mean at the places that all have, last."""
    common = sorted(set.intersection(*(set(places) for places, _ in curves)))
    if len(curves) == 1 or len(common) < 2:
        return curves
    each = [dict(zip(places, values, strict=True)) for places, values in curves]
    return [*curves, (np.array(common), np.array([statistics.fmean(one[at] for one in each) for at in common]))]


def _weight(curves: list[tuple[np.ndarray, np.ndarray]], values: np.ndarray) -> dict[str, float]:
    """Thin for one of several runs, else strong."""
    one_of_many = len(curves) > 1 and any(values is own for _, own in curves)
    return {"linewidth": 0.7, "alpha": 0.35} if one_of_many else {"linewidth": 1.6, "alpha": 1.0}


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the mean of each value and its neighbours, over a tenth of the curve at most, as many on either side."""
    reach = len(values) // 20
    sums = np.cumsum(np.insert(values, 0, 0.0))
    places = np.arange(len(values))
    near = np.minimum(reach, np.minimum(places, places[::-1]))
    return (sums[places + near + 1] - sums[places - near]) / (2 * near + 1)
