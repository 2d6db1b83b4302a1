"""The plots of docs/ from the stored results of the studies, as a report draws them; `results.py` is the command.

A plot holds the digest of its results and of the rows that it shows. The plot of growth is drawn by growth.py.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import statistics
import sys
from collections.abc import Callable

import matplotlib
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from stored_studies import STORED, by_steps, is_stored, study_of, title

from seqpe_jax.reporting import plot_style, plots
from seqpe_jax.reporting.load_run import check_evaluation
from seqpe_jax.reporting.study import Run, Study


def steps_plot(study: Study) -> plots.Plot:
    """Draws bits per byte against training steps, a panel for each evaluated length, a line for each encoding."""
    labels = {result["extent"]: result["label"] for run in study.runs for result in run.results}
    figure, panels = matplotlib.pyplot.subplots(
        1, len(labels), figsize=(12.0, 4.2), dpi=plot_style.DPI, layout="constrained", squeeze=False
    )
    for at, (axes, (extent, label)) in enumerate(zip(panels[0], sorted(labels.items()), strict=True)):
        plot_style.style_axes(axes, "training steps", "" if at else "bits per byte")
        axes.set_title(f"evaluated at {title(study, label)}", fontsize=11)
        curves, ends = by_steps(study, "bits_per_byte", extent), []
        for name, values in curves.items():
            steps = sorted(values)
            means = [statistics.fmean(values[step]) for step in steps]
            encoding, _, form = name.partition("_")
            colour = plot_style.COLOURS[encoding][0]
            axes.plot(steps, means, marker="o", markersize=4.5, color=colour, linestyle=plot_style.DASHES[bool(form)])
            ends.append((steps[-1], means[-1], name, colour))
        plot_style.log2_axis(axes, {step for values in curves.values() for step in values}, set())
        plot_style.label_ends(axes, ends)
    return plots.Plot("steps", "Training steps", "", figure)


STUDIES = {
    "study_text_fair+study_seqpe_recipe": plots.extrapolation,
    "study_second_scale": plots.extrapolation,
    "study_longer_training": steps_plot,
    "study_questions": functools.partial(plots.extrapolation_answers, metric="exact_match_strict"),
    "study_images_fair": plots.extrapolation_sizes,
    "study_glyphs": plots.extrapolation_sizes,
    "study_algorithmic": plots.outputs_by_length,
}
# Rows of a study that has more of them than curves are distinguishable.
ROWS = {
    "study_text_fair": ("seqpe", "seqpe_recipe", "kerple", "fox", "cable", "alibi", "rotary", "scale_invariant"),
    "study_longer_training": tuple(
        f"{row}_{steps}"
        for row in ("seqpe", "fox", "alibi", "rotary", "alibi_pairs")  # rotary_plain is far above all others
        for steps in (1000, 3000, 10_000, 30_000)
    ),
    "study_images_fair": (
        "seqpe",
        "sinusoidal",
        "lookhere",
        "alibi_grid",
        "fire",
        "rotary_mixed",
        "rotary_axial",
        "learned",
    ),
}
SUITES = ("retrieval_suites", "retrieval_ruler")  # probes that `results.py --suites` stored
DIGEST = "Source"  # of the PNG's texts


def shown(name: str) -> Study:
    """Returns a stored study, of the rows that are drawn."""
    study = study_of(name)
    return dataclasses.replace(study, runs=[run for run in study.runs if run.row in ROWS.get(study.name, (run.row,))])


def asked_run(name: str) -> Run:
    """Returns the run whose probes are stored in docs/results/NAME.json."""
    content = json.loads((STORED / f"{name}.json").read_text())
    evaluation = check_evaluation({"results": [], "suites": content["suites"]}, f"docs/results/{name}.json")
    return Run(name, content["config"], [], evaluation, None, None)


def update(check: bool) -> int:
    """Draws and writes the plots that are stale, or says which are; returns the exit code."""
    stale = 0
    for name, draw in STUDIES.items():
        parts = name.split("+")
        files = [STORED / f"{part}.csv" for part in parts if is_stored(part)]
        if is_stored(name):
            rows = repr(ROWS.get(parts[0]))
            stale += _update_plot(check, parts[0], files, rows, lambda name=name, draw=draw: draw(shown(name)))
    for name in SUITES:
        if (path := STORED / f"{name}.json").exists():
            stale += _update_plot(check, name, [path], "", lambda name=name: plots.suite_depth(asked_run(name)))
    return int(check and stale > 0)


def _update_plot(check: bool, name: str, files: list[pathlib.Path], rows: str, draw: Callable[[], plots.Plot]) -> int:
    """Draws docs/results/NAME.png where it is not of files and rows, or says so; returns the number of stale plots."""
    path = STORED / f"{name}.png"
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files) + rows.encode()).hexdigest()
    if path.exists() and Image.open(path).text.get(DIGEST) == digest:
        return 0
    if check:
        of = " and ".join(file.name for file in files)
        print(f"docs/results/{path.name} is not of {of}: run benchmarks/results.py", file=sys.stderr)
        return 1
    with matplotlib.rc_context(plot_style.RC_PARAMS):
        plot = draw()
        plot.figure.savefig(path, dpi=plot_style.DPI, metadata={DIGEST: digest})
    plots.close(plot)
    print(f"written: docs/results/{path.name}")
    return 1
