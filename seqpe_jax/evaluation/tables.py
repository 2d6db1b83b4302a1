"""The tables of a report, as markdown and CSV."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

MISSING = "-"
UNITS = {"text": "tokens", "questions": "tokens", "images": "images"}  # of what a run reads


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table; the first column is aligned left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float) -> str:
    """Returns a value with three decimals, or in short where it is too large for them to matter."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def by_scale(runs: Sequence[Any], metric: str, *, more_is_better: bool = False) -> str:
    """Returns encoding x length or size of a metric of the runs' evaluations; the best of a column is bold.

    Runs that differ in the seed alone share a row: their mean and standard deviation. What was not evaluated is shown
    as missing; a single row has no best.

    Args:
      runs: `evaluation.report.Run`s; metric: a key of evaluation results, such as "bits_per_byte".
    """
    extents = {result["label"]: result["extent"] for run in runs for result in run.results}
    labels = sorted(extents, key=extents.get)
    trained = {run.training["extent"] for run in runs}
    names = list(dict.fromkeys(run.row for run in runs))
    found = {
        (name, label): [
            result[metric]
            for run in runs
            if run.row == name
            for result in run.results
            if result["label"] == label and metric in result
        ]
        for name in names
        for label in labels
    }
    means = {place: statistics.fmean(values) for place, values in found.items() if values}
    finite = {place: mean for place, mean in means.items() if math.isfinite(mean)}
    choose = max if more_is_better else min
    best = {label: choose((finite[place] for place in finite if place[1] == label), default=None) for label in labels}

    def cell(name: str, label: str) -> str:
        values = found[name, label]
        if not values:
            return MISSING
        text = number(means[name, label])
        if len(names) > 1 and means[name, label] == best[label]:
            text = f"**{text}**"
        return text + (f" ± {number(statistics.stdev(values))}" if len(values) > 1 else "")

    def title(label: str) -> str:
        return f"{label} ({extents[label] / next(iter(trained)):.3g}x)" if len(trained) == 1 else label

    return markdown(["encoding", *map(title, labels)], [[name, *(cell(name, label) for label in labels)] for name in names])


def cost(runs: Sequence[Any]) -> str:
    """Returns what each run cost: parameters, training seconds, tokens or images per second (median of the reports)."""

    def cell(value: float | None, form: Callable[[float], str]) -> str:
        return MISSING if value is None else form(value)

    rows = [
        [
            run.name,
            run.encoding,
            cell(run.parameters, lambda value: f"{value:,}"),
            cell(run.steps_done, lambda value: f"{value:,}"),
            cell(run.seconds, lambda value: f"{value:.0f}"),
            cell(run.per_second, lambda value: f"{value:,.0f}"),
        ]
        for run in runs
    ]
    unit = "/".join(sorted({UNITS[run.data] for run in runs})) + " per s"
    return markdown(["run", "encoding", "parameters", "steps", "training seconds", unit], rows)


def results_csv(runs: Sequence[Any]) -> str:
    """Returns one line per run and evaluated length or size; empty where a metric was not measured."""
    metrics = {
        "text": ("tokens", "loss", "perplexity", "bits_per_byte", "word_perplexity"),
        "questions": ("examples", "loss", "answer_perplexity", "contains", "exact_match", "f1"),
        "images": ("examples", "loss", "top1", "top5"),
    }
    columns = list(dict.fromkeys(metric for run in runs for metric in metrics[run.data]))
    scale = "length" if all(run.data != "images" for run in runs) else "size"
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "encoding", "seed", f"training_{scale}", scale, *columns])
    for run in runs:
        for result in run.results:
            place = [run.name, run.encoding, run.seed, run.training["label"], result["label"]]
            writer.writerow([*place, *(result.get(metric, "") for metric in columns)])
    return out.getvalue()
