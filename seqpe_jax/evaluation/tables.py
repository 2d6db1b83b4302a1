"""The tables of a report, as markdown and CSV."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

MISSING = "-"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table; the first column is aligned left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float) -> str:
    """Returns a value with three decimals, or in short where it is too large for them to matter."""
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def by_length(runs: Sequence[Any], metric: str) -> str:
    """Returns encoding x length of a metric of the runs' evaluations: lower is better, the best of a column is bold.

    Runs that differ in the seed alone share a row: their mean and standard deviation. What was not evaluated is shown
    as missing; a single row has no best.

    Args:
      runs: `evaluation.report.Run`s; metric: a key of evaluation results, such as "bits_per_byte".
    """
    lengths = sorted({result["length"] for run in runs for result in run.results})
    trained = {run.training_length for run in runs}
    names = list(dict.fromkeys(run.row for run in runs))
    found = {
        (name, length): [
            result[metric]
            for run in runs
            if run.row == name
            for result in run.results
            if result["length"] == length and metric in result
        ]
        for name in names
        for length in lengths
    }
    means = {place: statistics.fmean(values) for place, values in found.items() if values}
    finite = {place: mean for place, mean in means.items() if math.isfinite(mean)}
    best = {length: min((finite[place] for place in finite if place[1] == length), default=None) for length in lengths}

    def cell(name: str, length: int) -> str:
        values = found[name, length]
        if not values:
            return MISSING
        text = number(means[name, length])
        if len(names) > 1 and means[name, length] == best[length]:
            text = f"**{text}**"
        return text + (f" ± {number(statistics.stdev(values))}" if len(values) > 1 else "")

    def title(length: int) -> str:
        if len(trained) != 1:
            return str(length)
        times = length / next(iter(trained))
        return f"{length} ({times:g}x)"

    return markdown(
        ["encoding", *map(title, lengths)], [[name, *(cell(name, length) for length in lengths)] for name in names]
    )


def cost(runs: Sequence[Any]) -> str:
    """Returns what each run cost: parameters, training seconds, tokens per second (median of the reports)."""

    def cell(value: float | None, form: Callable[[float], str]) -> str:
        return MISSING if value is None else form(value)

    rows = [
        [
            run.name,
            run.encoding,
            cell(run.parameters, lambda value: f"{value:,}"),
            cell(run.steps_done, lambda value: f"{value:,}"),
            cell(run.seconds, lambda value: f"{value:.0f}"),
            cell(run.tokens_per_second, lambda value: f"{value:,.0f}"),
        ]
        for run in runs
    ]
    return markdown(["run", "encoding", "parameters", "steps", "training seconds", "tokens/s"], rows)


def results_csv(runs: Sequence[Any]) -> str:
    """Returns one line per run and evaluated length; empty where a metric was not measured."""
    metrics = ("tokens", "loss", "perplexity", "bits_per_byte", "word_perplexity")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "encoding", "seed", "training_length", "length", *metrics])
    for run in runs:
        for result in run.results:
            place = [run.name, run.encoding, run.seed, run.training_length, result["length"]]
            writer.writerow([*place, *(result.get(metric, "") for metric in metrics)])
    return out.getvalue()
