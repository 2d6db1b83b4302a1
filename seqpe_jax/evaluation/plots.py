"""The plots of a report: training, extrapolation, loss by place in the window, likeness of position vectors."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers; one per encoding, the same in every plot.
COLOURS = {
    "seqpe": "#D55E00", "rotary": "#0072B2", "alibi": "#009E73", "learned": "#CC79A7", "sinusoidal": "#E69F00",
    "none": "#56B4E9",
}  # fmt: skip
OTHER = "#555555"
SIZE, DPI = (8, 5), 130


def training_curves(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws the smoothed task loss (nats) by step; returns False when no run has metrics."""
    figure, axes = _figure("training step", "task loss (nats per token)")
    drawn = False
    for run in runs:
        points = [(line["step"], line["train/term/task"]) for line in run.metrics if "train/term/task" in line]
        if len(points) < 2:
            continue
        steps, losses = np.array(points).T
        width = max(1, len(losses) // 20)
        kernel = np.ones(width) / width
        axes.plot(steps[width - 1 :], np.convolve(losses, kernel, "valid"), color=_colour(run), label=run.name)
        drawn = True
    return _save(figure, axes, path, drawn)


def extrapolation(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws bits per byte (or the loss in nats) against the evaluated length, the training length marked."""
    evaluated = [run for run in runs if run.results]
    bits = all("bits_per_byte" in result for run in evaluated for result in run.results)
    figure, axes = _figure("evaluated length (tokens)", "bits per byte" if bits else "loss (nats per token)")
    lengths = sorted({result["length"] for run in evaluated for result in run.results})
    for run in evaluated:
        results = sorted(run.results, key=lambda result: result["length"])
        values = [result["bits_per_byte" if bits else "loss"] for result in results]
        axes.plot([result["length"] for result in results], values, "o-", color=_colour(run), label=run.name)
        axes.annotate(
            run.name, (results[-1]["length"], values[-1]), xytext=(8, 0), textcoords="offset points", va="center",
            color=_colour(run),
        )  # fmt: skip
    if lengths:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_xlim(lengths[0] * 0.9, lengths[-1] * 1.6)
    for length in {run.training_length for run in evaluated}:
        axes.axvline(length, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            "trained at this length", (length, 0.98), xycoords=("data", "axes fraction"), xytext=(6, 0),
            textcoords="offset points", va="top", fontsize=9,
        )  # fmt: skip
    return _save(figure, axes, path, bool(evaluated), legend=False)


def loss_by_position(runs: Sequence[Any], path: pathlib.Path) -> bool:
    """Draws the loss (nats) by place in the longest evaluated window."""
    figure, axes = _figure("place in the window (tokens)", "loss (nats per token)")
    longest = max((result["length"] for run in runs for result in run.results), default=0)
    drawn = False
    for run in runs:
        for result in run.results:
            curve = result.get("loss_by_position")
            if result["length"] == longest and curve:
                axes.plot(curve["position"], curve["loss"], color=_colour(run), label=run.name)
                drawn = True
    for length in {run.training_length for run in runs if run.results}:
        axes.axvline(length, color="black", linestyle="--", linewidth=1)
    return _save(figure, axes, path, drawn)


def similarity(run: Any, path: pathlib.Path) -> bool:
    """Draws the cosine between the vectors of a few pivots and of all positions of a window; False without any."""
    if run.similarity is None:
        return False
    pivots, positions, cosine = (run.similarity[name] for name in ("pivots", "positions", "cosine"))
    figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
    rows = np.arange(len(pivots) + 1)
    edges = np.append(positions, positions[-1] + 1)
    image = axes.pcolormesh(edges, rows, cosine, cmap="viridis", vmin=min(0.0, float(cosine.min())), vmax=1.0)
    axes.set_yticks(rows[:-1] + 0.5, [str(pivot) for pivot in pivots])
    axes.scatter(pivots + 0.5, rows[:-1] + 0.5, marker="|", s=300, color="white", linewidths=1)
    axes.set_xlabel("position")
    axes.set_ylabel("pivot position")
    axes.axvline(run.training_length, color="white", linestyle="--", linewidth=1)
    figure.colorbar(image, label="cosine of position vectors")
    figure.savefig(path)
    plt.close(figure)
    return True


def _figure(x: str, y: str) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=SIZE, dpi=DPI, layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: plt.Figure, axes: plt.Axes, path: pathlib.Path, drawn: bool, legend: bool = True) -> bool:
    if drawn:
        if legend:
            axes.legend(frameon=False)
        figure.savefig(path)
    plt.close(figure)
    return drawn


def _colour(run: Any) -> str:
    return COLOURS.get(run.encoding, OTHER)
