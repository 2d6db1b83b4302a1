"""Plots of a report: training, extrapolation, loss by position, answers, classes, position curves, similarity, attention."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, NullFormatter

from seqpe_jax.data.registry import COUNT_NAMES
from seqpe_jax.reporting.cost_table import Benchmark, retention_table
from seqpe_jax.reporting.cost_table import quality_and_cost as quality_and_cost_values
from seqpe_jax.reporting.plot_style import (
    DPI,
    FIGURE_SIZE,
    INK,
    MAX_BANDS,
    RC_PARAMS,
    CurveEnd,
    Plot,
    label_ends,
    label_inches,
    log2_axis,
    mark_training,
    new_figure,
    row_styles,
    style_axes,
    write_above,
)
from seqpe_jax.reporting.study import Run, Study
from seqpe_jax.reporting.t_tests import interval
from seqpe_jax.reporting.tables import context_metric, metrics_of, number

Values = dict[str, dict[float, list[float]]]  # row -> extent -> a value of each run
Curve = tuple[np.ndarray, np.ndarray]  # x, y
# Terms of `load_run.read_position_curves` and their axes.
TERM_TITLES = {
    "logit": "added to the logit",
    "kernel": "mean cosine of the angles",
    "factor": "mean factor of q and k",
    "gate": "mean product of gates",
}
MAX_NAMED_LAYERS = 8  # more would hide the curves
MAX_WRITTEN_CLASSES = 20  # of a confusion matrix, with its numbers in it
TASK_COLUMNS = 2  # panels of algorithmic tasks next to each other
LENGTH_BINS = 10  # of each evaluation: few examples have the same length
MAX_MAPS = 6  # layers and heads of which maps are drawn


def plot_study(study: Study, benchmarks: Sequence[Benchmark] = ()) -> Iterator[Plot]:
    """Yields the plots that compare runs; the caller closes each (`close`) before it takes the next.

    Args:
      study: the runs.
      benchmarks: measured costs.
    """
    for draw in (
        contexts,
        extrapolation,
        extrapolation_answers,
        outputs_by_length,
        extrapolation_sizes,
        functools.partial(quality_and_cost, benchmarks=benchmarks),
        attention_spread,
        training_curves,
        training_terms,
        loss_by_position,
    ):
        with matplotlib.rc_context(RC_PARAMS):
            plot = draw(study)
        if plot is not None:
            yield plot


def plot_run(run: Run) -> Iterator[Plot]:
    """Yields the plots of one run; the caller closes each before it takes the next."""
    for draw in (answer_depth, suite_depth, confusion, position_curves, similarity, attention):
        with matplotlib.rc_context(RC_PARAMS):
            plot = draw(run)
        if plot is not None:
            yield plot


def close(plot: Plot) -> None:
    """Frees the figure's memory."""
    plt.close(plot.figure)


def training_curves(study: Study) -> Plot | None:
    """Draws the smoothed task loss in nats by training step; None without a run of two reported steps."""
    curves = _term_curves(study, "train/term/task")
    if not curves:
        return None
    per = "/".join(sorted({COUNT_NAMES[run.data_kind].removesuffix("s") for run in study.runs}))
    figure, axes = new_figure("training step", f"task loss (nats per {per})", len(curves))
    ends = _draw_curves(axes, study, curves)
    axes.set_xlim(0, 1.02 * max(end[0] for end in ends))
    label_ends(axes, ends)
    last = "; ".join(f"{row} {loss:.3f} at step {step:g}" for step, loss, row, _ in ends)
    alt = f"Line chart of the task loss by training step, smoothed. Last values: {last}."
    return Plot("training_curves", "Task loss during training", alt, figure)


def training_terms(study: Study) -> Plot | None:
    """Draws the smoothed other terms of the loss by training step; None without any."""
    names = {name for run in study.runs for line in run.metrics for name in line if name.startswith("train/term/")}
    curves = {name: _term_curves(study, name) for name in sorted(names - {"train/term/task"})}
    curves = {name: found for name, found in curves.items() if found}
    if not curves:
        return None
    height = max(2.6, label_inches(max(map(len, curves.values())))) * len(curves) + 0.4
    figure, plots = plt.subplots(
        len(curves), 1, figsize=(FIGURE_SIZE[0], height), dpi=DPI, layout="constrained", squeeze=False, sharex=True
    )
    for axes, (name, found) in zip(plots[:, 0], curves.items(), strict=True):
        term = name.removeprefix("train/term/")
        style_axes(axes, "training step" if axes is plots[-1, 0] else "", f"{term} term")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default is a formula, which is not parsed
        axes.yaxis.set_minor_formatter(NullFormatter())
        label_ends(axes, _draw_curves(axes, study, found))
    rows = dict.fromkeys(row for found in curves.values() for row in found)
    terms = " and ".join(name.removeprefix("train/term/") for name in curves)
    alt = f"Line charts of the {terms} terms of the loss by training step, on logarithmic axes, of {', '.join(rows)}."
    return Plot("training_terms", "Other terms of the loss during training", alt, figure)


def contexts(study: Study) -> Plot | None:
    """Draws the gain from context: a metric of the same tokens under each context, less that under the smallest.

    Returns:
      None without a run that was evaluated under two contexts.
    """
    runs = [run for run in study.counted if run.context_results]
    metric = context_metric(study)
    values: Values = {}
    smallest = min((run.context_results[0]["extent"] for run in runs), default=0)
    for run in runs:
        own = {result["extent"]: result[metric.name] for result in run.context_results}
        if len(own) > 1 and smallest in own and all(map(math.isfinite, own.values())):
            for extent, value in own.items():
                values.setdefault(run.row, {}).setdefault(extent, []).append(value - own[smallest])
    x, y = "context (tokens)", f"{metric.title[0].lower()}{metric.title[1:]}, less that at {smallest:g}"
    title = "Gain from context: the same tokens, more context before them"
    return _plot_by_extent(study, runs, values, "contexts", title, x, y, zero_line=True)


def extrapolation(study: Study) -> Plot | None:
    """Draws bits per byte (or the loss in nats) by evaluated length; None without evaluations of text."""
    runs = [run for run in study.counted if run.data_kind == "text"]
    metric, y = "bits_per_byte", "bits per byte"
    if not all(metric in result for run in runs for result in run.results):
        metric, y = "loss", "loss (nats per token)"
    title, x = "Past the training length", "evaluated length (tokens)"
    return _plot_by_extent(study, runs, _values_of(runs, metric), "extrapolation", title, x, y)


def extrapolation_answers(study: Study, metric: str = "contains") -> Plot | None:
    """Draws the percentage of right answers by evaluated length; None without evaluations of answers.

    Args:
      study: the runs.
      metric: "contains", or one of the exact matches.
    """
    runs = [run for run in study.counted if run.data_kind == "questions"]
    title, x = "Answers past the training length", "evaluated length (tokens)"
    y = "contains the answer (percent)" if metric == "contains" else "exact match (percent)"
    return _plot_by_extent(study, runs, _values_of(runs, metric), "extrapolation_answers", title, x, y)


def outputs_by_length(study: Study) -> Plot | None:
    """Draws the percentage of right outputs by input length, a panel for each algorithmic task; None without any."""
    tasks: dict[str, list[Run]] = {}
    for run in study.counted:
        if run.data_kind == "sequences" and any("by_length" in result for result in run.results):
            tasks.setdefault(run.config["data"].get("task", ""), []).append(run)
    if not tasks:
        return None
    columns = min(len(tasks), TASK_COLUMNS)
    lines = math.ceil(len(tasks) / columns)
    height = max(FIGURE_SIZE[1] * 0.8, label_inches(max(len({run.row for run in own}) for own in tasks.values())))
    figure, panels = plt.subplots(
        lines, columns, figsize=(FIGURE_SIZE[0] * columns, height * lines), dpi=DPI, layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(tasks) :]:
        axes.remove()
    last = []
    for axes, (task, own) in zip(panels.flat, tasks.items(), strict=False):
        style_axes(axes, "length of the input (symbols)", "right outputs (percent)")
        axes.set_title(task, fontsize=11, pad=18)
        curves: dict[str, list[Curve]] = {}
        for run in own:
            curves.setdefault(run.row.removeprefix(f"{task}-"), []).append(_accuracy_curve(run))
        rows = dataclasses.replace(
            study, runs=[dataclasses.replace(run, row=run.row.removeprefix(f"{task}-")) for run in own], not_begun=[]
        )
        ends = _draw_curves(axes, rows, curves)
        axes.set_ylim(0, 102)
        label_ends(axes, ends)
        mark_training(axes, {run.training_size["extent"] for run in own})
        last.append(f"{task}: " + ", ".join(f"{row} {number(value)} at {length:g}" for length, value, row, _ in ends))
    alt = f"Line charts of right outputs by input length; the training length is marked. {'; '.join(last)}."
    return Plot("outputs_by_length", "Right outputs by input length", alt, figure)


def _accuracy_curve(run: Run) -> Curve:
    """Returns input lengths and percentages of right outputs, means over tenths of the lengths of each result."""
    points = []
    for found in (result["by_length"] for result in run.results if "by_length" in result):
        lengths, percentages = np.asarray(found["length"], float), np.asarray(found["accuracy"], float)
        for part in np.array_split(np.arange(len(lengths)), min(len(lengths), LENGTH_BINS)):
            points.append((lengths[part].mean(), percentages[part].mean()))
    lengths, percentages = np.array(sorted(points)).T
    return lengths, percentages


def extrapolation_sizes(study: Study) -> Plot | None:
    """Draws top-1 accuracy by evaluated size; None without evaluations of images."""
    runs = [run for run in study.counted if run.data_kind == "images"]
    title, x, y = "Past the training size", "side of the image (pixels)", "top-1 accuracy (percent)"
    return _plot_by_extent(study, runs, _values_of(runs, "top1"), "extrapolation_sizes", title, x, y)


def _values_of(runs: Sequence[Run], metric: str) -> Values:
    values: Values = {}
    for run in runs:
        for result in run.results:
            if metric in result and math.isfinite(result[metric]):
                values.setdefault(run.row, {}).setdefault(result["extent"], []).append(result[metric])
    return values


def _plot_by_extent(
    study: Study, runs: Sequence[Run], values: Values, name: str, title: str, x: str, y: str, zero_line: bool = False
) -> Plot | None:
    """Draws a line for each row through the means of its runs, with the 95% confidence interval as a band.

    Args:
      study: the runs.
      runs: those that were evaluated.
      values: the values; None is returned without any.
      name: file name of the plot.
      title: heading of the plot.
      x: label of the axis.
      y: label of the axis.
      zero_line: whether 0 is marked.
    """
    if not values:
        return None
    figure, axes = new_figure(x, y, len(values))
    if zero_line:
        axes.axhline(0.0, color=INK, linewidth=1.2, zorder=0.5)
    styles, ends = row_styles(study), []
    for row, own in values.items():
        extents = sorted(own)
        means = np.array([statistics.fmean(own[extent]) for extent in extents])
        half = np.array([interval(own[extent]) if len(own[extent]) > 1 else 0.0 for extent in extents])
        colour, dash = styles[row]
        axes.plot(extents, means, marker="o", markersize=4.5, color=colour, linestyle=dash)
        if half.any() and len(values) <= MAX_BANDS:
            axes.fill_between(extents, means - half, means + half, color=colour, alpha=0.13, linewidth=0)
        ends.append((extents[-1], means[-1], row, colour))
    trained = {run.training_size["extent"] for run in runs if run.row in values}
    log2_axis(axes, {extent for own in values.values() for extent in own}, trained)
    label_ends(axes, ends)
    mark_training(axes, trained)
    spans = "; ".join(
        f"{row} {number(statistics.fmean(own[min(own)]))} at {min(own):g}, "
        f"{number(statistics.fmean(own[max(own)]))} at {max(own):g}"
        for row, own in values.items()
    )
    marked = " and ".join(f"{extent:g}" for extent in sorted(trained))
    alt = f"Line chart of {y} by {x}; trained at {marked}, which is marked. {spans}. All values are in the table."
    return Plot(name, title, alt, figure)


def quality_and_cost(study: Study, benchmarks: Sequence[Benchmark]) -> Plot | None:
    """Draws quality far beyond the training length by the time of a training step relative to RoPE.

    Args:
      study: the runs.
      benchmarks: measured costs.

    Returns:
      None where `benchmark` did not time the training steps of two rows.
    """
    main = dict(reversed(metrics_of(study)))  # the first metric of each kind of data
    if len(main) != 1:
        return None
    [(kind, metric)] = main.items()
    points = quality_and_cost_values(study, kind, metric, benchmarks)
    if len(points) < 2:
        return None
    table = retention_table(study, kind, metric, benchmarks)
    quality = f"{metric.title.rstrip(',')} {table.header[2]}"
    figure, axes = new_figure("time of a training step (relative to RoPE)", quality, len(points))
    styles, ends = row_styles(study), []
    for row, (time, value) in points.items():
        axes.plot([time], [value], marker="o", markersize=7, color=styles[row][0], linestyle="")
        ends.append((time, value, row, styles[row][0]))
    label_ends(axes, ends)
    each = "; ".join(f"{row} {number(value)} at {time:.2f} times" for row, (time, value) in points.items())
    alt = f"Scatter plot of {quality} by the time of a training step relative to RoPE's. {each}."
    return Plot("quality_and_cost", "Quality beyond the training length, and its cost", alt, figure)


def attention_spread(study: Study) -> Plot | None:
    """Draws the mean distance and entropy of attention of each head, a line of dots for each row; None without any.

    Dots have the colour of their layer; of a row with several seeds the first is drawn.
    """
    spreads = {}
    for run in study.counted:
        if spread := run.evaluation.get("attention"):
            spreads.setdefault(run.row, (run, spread))
    if not spreads:
        return None
    kinds = {"patches" if "patches" in spread else "tokens" for _, spread in spreads.values()}
    size = (FIGURE_SIZE[0], 1.3 + 0.3 * len(spreads))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, dpi=DPI, layout="constrained", sharey=True)
    style_axes(left, f"mean distance ({' or '.join(sorted(kinds))})", "")
    style_axes(right, "entropy (nats)", "")
    layers = max(len(spread["distance"]) for _, spread in spreads.values())
    for line, (_, spread) in enumerate(spreads.values()):
        for axes, name in ((left, "distance"), (right, "entropy")):
            for layer, heads in enumerate(spread[name]):
                colour = matplotlib.colormaps["cividis"](layer / max(1, layers - 1))
                height = line + 0.3 * ((layer + 0.5) / len(spread[name]) - 0.5) * 2
                axes.plot(heads, [height] * len(heads), "o", markersize=3.5, color=colour, alpha=0.85)
    trained = {run.training_size["extent"] for run, _ in spreads.values()}
    if kinds == {"tokens"}:
        left.set_xscale("symlog", base=2, linthresh=1)
        left.xaxis.set_major_formatter("{x:g}")
        mark_training(left, trained)
    keys = {spread.get("tokens", spread.get("patches")) for _, spread in spreads.values()}
    for count in keys:
        right.axvline(math.log(count), color=INK, linestyle=":", linewidth=1.2)
    right.set_xlim(left=0)
    left.set_yticks(range(len(spreads)), list(spreads))
    left.invert_yaxis()
    values = "; ".join(
        f"{row} {number(float(np.nanmin(spread['distance'])), 1)} to {number(float(np.nanmax(spread['distance'])), 1)} and "
        f"{number(float(np.nanmin(spread['entropy'])), 2)} to {number(float(np.nanmax(spread['entropy'])), 2)} nats"
        for row, (_, spread) in spreads.items()
    )
    alt = (
        f"Dots of the mean attention distance and entropy of each head among {' or '.join(map(str, sorted(keys)))} "
        f"{' or '.join(sorted(kinds))}, coloured by layer from dark to light; the dotted line is the entropy of equal "
        f"attention to all. From the smallest to the largest head: {values}."
    )
    return Plot("attention_spread", "How far and how evenly heads attend", alt, figure)


def loss_by_position(study: Study) -> Plot | None:
    """Draws the loss in nats by position in the longest evaluated window; None without such results."""
    runs = [run for run in study.counted if run.data_kind == "text"]
    longest = max((result["extent"] for run in runs for result in run.results), default=0)
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        for result in run.results:
            if result["extent"] == longest and (found := result.get("loss_by_position")):
                curves.setdefault(run.row, []).append((np.asarray(found["position"]) + 1, np.asarray(found["loss"])))
    if not curves:
        return None
    figure, axes = new_figure("position in the window (tokens)", "loss (nats per token)", len(curves))
    ends = _draw_curves(axes, study, curves)
    trained = {run.training_size["extent"] for run in runs if run.row in curves}
    first = max(1, min(positions[0] for found in curves.values() for positions, _ in found))
    ticks = {2**power for power in range(math.ceil(math.log2(first)), math.floor(math.log2(longest)) + 1)}
    log2_axis(axes, ticks | {longest}, trained | {first})
    label_ends(axes, ends)
    mark_training(axes, trained)
    last = "; ".join(f"{row} {loss:.3f}" for _, loss, row, _ in ends)
    alt = f"Line chart of the loss by position in a window of {longest} tokens. At its end: {last}."
    return Plot("loss_by_position", f"Loss by position in a window of {longest} tokens", alt, figure)


def answer_depth(run: Run) -> Plot | None:
    """Draws the percentage of answers found by evaluated length and depth of the passage; None without such results."""
    results = sorted((result for result in run.results if result.get("depth")), key=lambda result: result["extent"])
    if not results:
        return None
    figure, axes = plt.subplots(figsize=_heat_map_size(results), dpi=DPI, layout="constrained")
    found_DL = _draw_heat_map(figure, axes, results)
    axes.set_xlabel(f"evaluated length (tokens; trained at {run.training_size['label']})")
    alt = f"Heat map of answers found, in percent, from the start to the end of the context. {_values_by_length(results, found_DL)}."
    return Plot(f"answer_depth_{run.name}", "Answers by length and depth", alt, figure)


def suite_depth(run: Run) -> Plot | None:
    """Draws the same of each probe of `evaluate --suite` that is at one depth; None without such results."""
    probes = {
        probe: sorted((result for result in results if result.get("depth")), key=lambda result: result["extent"])
        for probe, results in run.evaluation.get("suites", {}).get("probes", {}).items()
    }
    probes = {probe: results for probe, results in probes.items() if results}
    if not probes:
        return None
    width, height = _heat_map_size(next(iter(probes.values())))
    size = (width, (height + 0.4) * len(probes))
    figure, plots = plt.subplots(len(probes), 1, figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    lines = []
    for axes, (probe, results) in zip(plots[:, 0], probes.items(), strict=True):
        found_DL = _draw_heat_map(figure, axes, results)
        axes.set_title(probe)
        lines.append(f"{probe}: {_values_by_length(results, found_DL)}")
    plots[-1, 0].set_xlabel(f"length of the prompt (tokens; trained at {run.training_size['label']})")
    alt = f"Heat maps of answers found, in percent, from the start to the end of the text. {'. '.join(lines)}."
    return Plot(f"suite_depth_{run.name}", "Probes by length and depth", alt, figure)


def _heat_map_size(results: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Inches of a heat map of results by length and depth."""
    return 2.2 + 1.1 * len(results), 1.0 + 0.5 * len(results[0]["depth"])


def _draw_heat_map(figure: Any, axes: Any, results: Sequence[dict[str, Any]]) -> np.ndarray:
    """Draws the percentage of answers found by length and depth, and returns it, float[depths, lengths]."""
    bins = results[0]["depth"]
    found_DL = np.array([[part["contains"] for part in result["depth"]] for result in results], float).T
    image = axes.imshow(found_DL, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="none")
    for row, column in np.argwhere(np.isfinite(found_DL)):
        value = found_DL[row, column]
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="black" if value > 55 else "white")
    axes.set_xticks(range(len(results)), [result["label"] for result in results])
    axes.set_yticks(range(len(bins)), [f"{part['from']:.0%} to {part['to']:.0%}" for part in bins])
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("depth of the passage")
    bar = figure.colorbar(image, label="contains the answer (percent)", pad=0.02)
    bar.outline.set_visible(False)
    return found_DL


def _values_by_length(results: Sequence[dict[str, Any]], found_DL: np.ndarray) -> str:
    """Says the values of a heat map."""
    return "; ".join(
        f"{result['label']} tokens: {', '.join(f'{value:.0f}' if np.isfinite(value) else '-' for value in found_D)}"
        for result, found_D in zip(results, found_DL.T, strict=True)
    )


def confusion(run: Run) -> Plot | None:
    """Draws how often each class is taken for each other at the size nearest to that of training; None without counts."""
    results = [result for result in run.results if result.get("confusion")]
    if not results:
        return None
    result = min(results, key=lambda result: abs(result["extent"] - run.training_size["extent"]))
    names, counts = list(map(str, result["confusion"]["classes"])), np.array(result["confusion"]["counts"], float)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(100 * counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    side = 2.5 + 0.32 * len(names)
    figure, axes = plt.subplots(figsize=(side + 1.0, side), dpi=DPI, layout="constrained")
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=100, interpolation="none")
    if len(names) <= MAX_WRITTEN_CLASSES:
        for row, column in np.argwhere(counts > 0):
            value = share[row, column]
            colour = "black" if value > 55 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(left=False, bottom=False, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = figure.colorbar(image, label="percent of the true class", shrink=0.8)
    bar.outline.set_visible(False)
    right = "; ".join(
        f"{name}: {value:.0f}" for name, value in zip(names, share.diagonal(), strict=True) if np.isfinite(value)
    )
    alt = f"Heat map of predicted classes by true class at {result['label']} pixels. Percent right: {right}."
    return Plot(f"confusion_{run.name}", f"Predicted classes ({result['label']} pixels)", alt, figure)


def position_curves(run: Run) -> Plot | None:
    """Draws what attention gains by distance in each layer and head; on a grid, maps around a patch. None without it."""
    if run.position_curves is None:
        return None
    distances = run.position_curves["distances"]
    terms = {name: values for name, values in run.position_curves.items() if name in TERM_TITLES}
    terms = {name: _distinct(values) for name, values in terms.items() if np.isfinite(values).any()}
    if not terms or distances.max() < 2:
        return None
    if distances.ndim > 1:
        figure, form = (
            _terms_on_grid(terms),
            f"Maps around a patch of a grid of {len(distances)} x {distances.shape[1]}",
        )
    else:
        figure = _terms_on_line(run, distances, terms)
        form = f"Line charts by distance from the last of {distances[-1] + 1} tokens"
    names = "; ".join(
        f"{TERM_TITLES[name]} from {number(np.nanmin(values))} to {number(np.nanmax(values))} in "
        f"{values.shape[0]} different layer(s) and {values.shape[1]} head(s)"
        for name, values in terms.items()
    )
    return Plot(
        f"position_curves_{run.name}",
        "What attention gains by distance",
        f"{form}, by layer and head: {names}.",
        figure,
    )


def _distinct(values: np.ndarray) -> np.ndarray:
    """Returns [layers, heads, ...] with one layer where all are equal, and one head where all are."""
    for axis in (0, 1):
        first = np.take(values, [0], axis)
        if np.array_equal(values, np.broadcast_to(first, values.shape), equal_nan=True):
            values = first
    return values


def _terms_on_line(run: Run, distances: np.ndarray, terms: dict[str, np.ndarray]) -> plt.Figure:
    """One plot for each term, with a line for each layer and head in the colour of the layer."""
    size = (FIGURE_SIZE[0], 0.6 + 2.6 * len(terms))
    figure, plots = plt.subplots(len(terms), 1, figsize=size, dpi=DPI, layout="constrained", squeeze=False, sharex=True)
    seen = distances > 0  # a logarithmic axis has no 0
    last = int(distances[-1])
    for axes, (name, values) in zip(plots[:, 0], terms.items(), strict=True):
        style_axes(axes, "distance (tokens)" if axes is plots[-1, 0] else "", TERM_TITLES[name])
        for layer, of_layer in enumerate(values):
            colour = matplotlib.colormaps["cividis"](layer / max(1, len(values) - 1))
            for head, curve in enumerate(of_layer):
                label = f"layer {layer + 1}" if len(values) > 1 and not head else None
                axes.plot(distances[seen], curve[seen], color=colour, linewidth=1.1, alpha=0.85, label=label)
        log2_axis(axes, {2**power for power in range(last.bit_length())}, {1, last})
        if run.training_size["extent"] < last:
            mark_training(axes, {run.training_size["extent"]})
        if 1 < len(values) <= MAX_NAMED_LAYERS:
            axes.legend(fontsize=8, frameon=False, ncols=2)
    return figure


def _terms_on_grid(terms: dict[str, np.ndarray]) -> plt.Figure:
    """A map for each layer (rows) and head (columns) of each term; of many, some that are evenly spaced."""
    chosen = {
        name: [np.unique(np.linspace(0, count - 1, MAX_MAPS).astype(int)) for count in values.shape[:2]]
        for name, values in terms.items()
    }
    lines = [(name, layer) for name, (layers, _) in chosen.items() for layer in layers]
    columns = max(len(heads) for _, heads in chosen.values())
    size = (1.3 * columns + 1.8, 1.4 * len(lines) + 0.3)
    figure, plots = plt.subplots(len(lines), columns, figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    for axes in plots.flat:
        axes.set_axis_off()
    for name, values in terms.items():
        rows = [at for at, (own, _) in enumerate(lines) if own == name]
        low, high = np.nanmin(values), np.nanmax(values)
        for at in rows:
            for axes, head in zip(plots[at], chosen[name][1], strict=False):
                layer = lines[at][1]
                image = axes.imshow(values[layer, head], cmap="cividis", vmin=low, vmax=high, interpolation="none")
                axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        bar = figure.colorbar(image, ax=plots[rows].ravel().tolist(), label=TERM_TITLES[name])
        bar.outline.set_visible(False)
    return figure


def similarity(run: Run) -> Plot | None:
    """Draws the cosine between the vectors of a few anchors and of all positions of a window or grid; None without any."""
    if run.similarity is None:
        return None
    anchors, positions, cosine = (run.similarity[name] for name in ("anchors", "positions", "cosine"))
    # The scale starts at the smallest cosine; from 0, nearly equal vectors would show one colour.
    low = math.floor(min(float(np.nanmin(cosine)), 0.95) * 20) / 20
    draw = _similarity_on_grid if positions.shape[1] > 1 else _similarity_on_line
    figure = draw(run, anchors, positions, cosine, low)
    names = "; ".join(f"({', '.join(map(str, anchor))})" if len(anchor) > 1 else str(anchor[0]) for anchor in anchors)
    alt = (
        f"Heat maps of the cosine between the position vectors of anchors {names} and those of all {len(positions)} "
        f"positions, from {np.nanmin(cosine):.2f} to {np.nanmax(cosine):.2f}."
    )
    return Plot(f"similarity_{run.name}", "Similarity of position vectors", alt, figure)


def _similarity_on_line(
    run: Run, anchors: np.ndarray, positions: np.ndarray, cosine: np.ndarray, low: float
) -> plt.Figure:
    """One line of a heat map for each anchor."""
    anchors, positions, trained = anchors[:, 0], positions[:, 0], run.training_size["extent"]
    size = (FIGURE_SIZE[0], 1.3 + 0.45 * len(anchors))
    figure, axes = plt.subplots(figsize=size, dpi=DPI, layout="constrained")
    edges = np.append(positions, positions[-1] + 1)
    rows = np.arange(len(anchors) + 1)
    image = axes.pcolormesh(edges, rows, cosine, cmap="cividis", vmin=low, vmax=1.0, rasterized=True)
    axes.hlines(rows[1:-1], edges[0], edges[-1], color="white", linewidth=2.5)
    for row, anchor in enumerate(anchors):
        axes.plot(anchor + 0.5, row + 0.5, marker="v", color="white", markeredgecolor="black", markersize=7)
    axes.set_yticks(rows[:-1] + 0.5, [str(anchor) for anchor in anchors])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("position")
    axes.set_ylabel("anchor (triangle)")
    if edges[0] < trained < edges[-1]:
        axes.axvline(trained, color="white", linewidth=2.5)
        axes.axvline(trained, color="black", linestyle="--", linewidth=1.2)
        write_above(axes, trained, f"training length {trained}")
    bar = figure.colorbar(image, label="cosine", pad=0.02)
    bar.outline.set_visible(False)
    return figure


def _similarity_on_grid(
    run: Run, anchors: np.ndarray, positions: np.ndarray, cosine: np.ndarray, low: float
) -> plt.Figure:
    """One heat map for each anchor over the last two axes, at the anchor's coordinates of other axes."""
    columns = min(len(anchors), 5)
    rows = math.ceil(len(anchors) / columns)
    size = (1.75 * columns + 0.9, 2.1 * rows)
    figure, plots = plt.subplots(rows, columns, figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    sides = positions.max(axis=0) + 1
    for axes in plots.flat[len(anchors) :]:
        axes.set_axis_off()
    for axes, anchor, values in zip(plots.flat, anchors, cosine, strict=False):
        plane = values.reshape(sides)[tuple(anchor[:-2])]
        image = axes.imshow(plane, cmap="cividis", vmin=low, vmax=1.0, interpolation="none")
        axes.plot(anchor[-1], anchor[-2], marker="x", color="white", markeredgewidth=2, markersize=7)
        axes.set_title(f"anchor ({', '.join(map(str, anchor))})", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[:].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    bar = figure.colorbar(image, ax=plots.ravel().tolist(), label="cosine", shrink=0.8)
    bar.outline.set_visible(False)
    return figure


def attention(run: Run) -> Plot | None:
    """Draws images and over each the class token's attention in the last layer, averaged over heads; None without it."""
    if run.attention is None:
        return None
    images, weights = run.attention["images"], run.attention["attention"].mean(axis=1)
    if images.ndim == 5:  # videos: their middle frames
        images = images[:, images.shape[1] // 2]
        weights = weights[:, weights.shape[1] // 2]
    size = (1.6 * len(images), 3.3)
    figure, plots = plt.subplots(2, len(images), figsize=size, dpi=DPI, layout="constrained", squeeze=False)
    height, width = images.shape[1:3]
    for column, (image, weights_HW) in enumerate(zip(images, weights, strict=True)):
        for axes in plots[:, column]:
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none")
            axes.set_axis_off()
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        plots[1, column].imshow(weights_HW, cmap="inferno", alpha=0.65, extent=extent, interpolation="none")
    alt = (
        f"{len(images)} test images of {height} x {width} pixels, and under each the same image coloured by the attention "
        "that the class token pays to its patches in the last layer, averaged over heads."
    )
    return Plot(f"attention_{run.name}", f"Attention of the class token ({height} x {width} pixels)", alt, figure)


def _term_curves(study: Study, name: str) -> dict[str, list[Curve]]:
    """Returns row -> steps and smoothed values of a loss term in each run; 0 means that a step did not compute it."""
    curves: dict[str, list[Curve]] = {}
    for run in study.runs:
        points = [(line["step"], line[name]) for line in run.metrics if line.get(name) and math.isfinite(line[name])]
        if len(points) > 1:
            steps, values = np.array(points, float).T
            curves.setdefault(run.row, []).append((steps, _smooth(values)))
    return curves


def _draw_curves(axes: plt.Axes, study: Study, curves: dict[str, list[Curve]]) -> list[CurveEnd]:
    """Draws the runs of each row, thin where there are several, and their mean; returns the ends of the means."""
    styles, ends = row_styles(study), []
    for row, runs in curves.items():
        colour, dash = styles[row]
        drawn = _with_mean(runs)
        for x, y in drawn:
            thin = len(runs) > 1 and any(y is own for _, own in runs)
            weight = {"linewidth": 0.7, "alpha": 0.35} if thin else {"linewidth": 1.6, "alpha": 1.0}
            axes.plot(x, y, color=colour, linestyle=dash, **weight)
        x, y = drawn[-1]
        ends.append((x[-1], y[-1], row, colour))
    return ends


def _with_mean(curves: list[Curve]) -> list[Curve]:
    """Returns the curves and, of several, their mean over the common x, last."""
    common = sorted(set.intersection(*(set(x) for x, _ in curves)))
    if len(curves) == 1 or len(common) < 2:
        return curves
    values = [dict(zip(x, y, strict=True)) for x, y in curves]
    return [*curves, (np.array(common), np.array([statistics.fmean(one[x] for one in values) for x in common]))]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the centred moving average over at most a tenth of the curve, over fewer values near its ends."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(len(values))
    half = np.minimum(len(values) // 20, np.minimum(index, index[::-1]))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
