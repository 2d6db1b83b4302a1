"""Tables of a report, and their forms: markdown and CSV (`page.html` renders HTML)."""

import csv
import dataclasses
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from seqpe_jax.data.registry import COUNT_NAMES
from seqpe_jax.metric_registry import LOSS, METRICS, Metric
from seqpe_jax.reporting.study import UNSET, Run, Study, format_value
from seqpe_jax.reporting.t_tests import interval
from seqpe_jax.trees import flatten_dict

MISSING = "-"
MIB = 2**20
PREFIXES = ("", "k", "M", "G", "T", "P")  # of counts, by powers of 1000
MEANS_NOTE = "Mean ± half the width of its 95% confidence interval (Student's t)"
FLOPS_NOTE = (
    "FLOPs: matrix products of a training step, three times those of its forward pass, with the position encoder, its "
    "losses and its terms in attention, per token or image at the training size; attention counts all keys, also those "
    "that causality masks."
)
WINDOWS_NOTE = (
    "Consecutive windows of each length: longer windows have fewer tokens near their start, so a value can fall with the "
    "length without a gain from context, which evaluate --contexts measures."
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
      text: value as people read it; MISSING without one.
      value: the number in full precision, None for words.
      best: whether it is the best of its column.
      after: text behind it, such as its confidence interval.
    """

    text: str
    value: float | None = None
    best: bool = False
    after: str = ""

    @property
    def missing(self) -> bool:
        """True if the cell is empty."""
        return self.text == MISSING


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      title: heading.
      header: names of the columns.
      rows: cells; the first of a row is its name.
      note: explanation of the columns.
      words: indices of columns that hold words, not numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    words: Sequence[int] = ()

    @property
    def groups(self) -> list[list[Sequence[Cell]]]:
        """Consecutive rows of the same name."""
        return [list(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row[0].text)]


def markdown(table: Table) -> str:
    """Returns a table in markdown; words are aligned left, numbers right, and the best cells are bold."""
    rule = ["---" if column == 0 or column in table.words else "---:" for column in range(len(table.header))]
    style = {True: "**{}**", False: "{}"}
    body = [[style[cell.best].format(escape(cell.text)) + escape(cell.after) for cell in row] for row in table.rows]
    lines = [[escape(cell) for cell in table.header], rule, *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def markdown_of_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a markdown table of strings."""
    return markdown(Table("", header, [[Cell(text) for text in row] for row in rows]))


def escape(text: str) -> str:
    """Returns text that markdown shows literally; names of runs may hold its marks."""
    return re.sub(r"[\\`*<>|\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(re.split(r"[\r\n]+", text)))


def mean(values: Sequence[float]) -> float:
    """Returns the mean, which is not finite where a value is not."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def number(value: float, decimals: int = 3) -> str:
    """Returns a value with so many decimals, or in scientific form where it is too large for them to matter."""
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.3g}"


def with_prefix(value: float) -> str:
    """Returns a count in three digits with a decimal prefix, e.g. 2.75 M."""
    value = float(f"{value:.3g}")
    power = min(math.floor(math.log10(value)) // 3, len(PREFIXES) - 1) if value >= 1 else 0
    return f"{value / 1000**power:#.3g}".rstrip(".") + f" {PREFIXES[power]}".rstrip()


def mean_cell(
    values: Sequence[float], decimals: int, *, runs: int = 0, best: bool = False, mark: str = "", sign: bool = False
) -> Cell:
    """Returns the mean of several runs, with its confidence interval.

    Args:
      values: one for each run; a missing cell without any.
      decimals: digits after the point.
      runs: number of runs that should have a value; fewer values are reported in the cell.
      best: whether it is the best of its column.
      mark: text behind the interval.
      sign: whether positive values get a plus.
    """
    if not values:
        return Cell(MISSING)
    average = mean(values)
    after = f" ± {number(interval(values), decimals)}{mark}" if len(values) > 1 else ""
    if len(values) < runs:
        after += f" ({len(values)} of {runs})"
    return Cell("+" * (sign and average >= 0) + number(average, decimals), average, best, after)


def metrics_of(study: Study) -> list[tuple[str, Metric]]:
    """Returns the (kind of data, metric) that the study measured, the main metric of each kind first."""
    return [
        (kind, metric)
        for kind, metrics in METRICS.items()
        for metric in metrics
        if any(metric.name in result for run in study.runs if run.data_kind == kind for result in run.results)
    ]


def by_size(
    study: Study, kind: str, metric: Metric, worse: Collection[tuple[str, str]] = (), note: str = "", work: bool = False
) -> Table:
    """Returns row x evaluated length or size: the mean of a metric over seeds, the best of a column marked.

    Args:
      study: the runs.
      kind: kind of data.
      metric: the metric.
      worse: (row, label) of cells that get a star, as significantly worse than the best row.
      note: explanation of the stars.
      work: whether to add columns of parameters and FLOPs.
    """
    values, extents = values_of(study, kind, metric)
    rows = list(dict.fromkeys(run.row for run in study.runs if run.data_kind == kind))
    trained = {run.training_size["extent"] for run in study.runs if run.data_kind == kind}
    best = _best_rows(values, metric)

    def cell(row: str, label: str) -> Cell:
        leads, star = len(rows) > 1 and row in best.get(label, ()), "*" * ((row, label) in worse)
        found = values.get((row, label), ())
        return mean_cell(found, metric.decimals, runs=len(study.runs_of(row)), best=leads, mark=star)

    def title(label: str) -> str:
        return f"{label} ({extents[label] / next(iter(trained)):.3g}x)" if len(trained) == 1 else label

    has_intervals = any(len(found) > 1 for found in values.values())
    windows = WINDOWS_NOTE * (kind == "text" and len(extents) > 1)
    notes = [windows, _seeds_note(values), note * (has_intervals and len(rows) > 1), FLOPS_NOTE * work]
    return Table(
        f"{metric.title} by evaluated {'size' if kind == 'images' else 'length'} ({metric.direction})",
        [row_heading(study), *map(title, extents), *(work_header(kind) if work else ())],
        [
            [Cell(row), *(cell(row, label) for label in extents), *(work_cells(study.runs_of(row)) if work else ())]
            for row in rows
        ],
        " ".join(filter(None, notes)),
    )


KEY_LOSS = Metric("key_loss", "Loss of the tokens that need context (nats per token)")


def by_context(study: Study, metric: Metric | None = None) -> Table | None:
    """Returns row x context length: a metric of the same tokens under each context, and the gain from context.

    The gain is the difference from the smallest context to the largest, of each run. None without such evaluations.

    Args:
      study: the runs.
      metric: the metric; `KEY_LOSS` is of the tokens that each model chooses by its own gain; None = `context_metric`.
    """
    runs = [run for run in study.counted if run.context_results]
    if metric is not None:
        runs = [
            run for run in runs if all(isinstance(result.get(metric.name), float) for result in run.context_results)
        ]
    if not runs:
        return None
    metric = metric or context_metric(study)
    extents = {result["label"]: result["extent"] for run in runs for result in run.context_results}
    labels = sorted(extents, key=lambda label: extents[label])
    rows = list(dict.fromkeys(run.row for run in study.runs if run.data_kind == "text"))
    values: dict[tuple[str, str], list[float]] = {}
    gains: dict[str, list[float]] = {}
    for run in runs:
        own = {result["label"]: result[metric.name] for result in run.context_results}
        for label, value in own.items():
            values.setdefault((run.row, label), []).append(value)
        if len(labels) > 1 and {labels[0], labels[-1]} <= own.keys():
            gains.setdefault(run.row, []).append(own[labels[-1]] - own[labels[0]])
    best = _best_rows(values, metric)
    lines = []
    for row in rows:
        count = len(study.runs_of(row))
        leads = {label: len(rows) > 1 and row in best[label] for label in labels}
        cells = [
            mean_cell(values.get((row, label), ()), metric.decimals, runs=count, best=leads[label]) for label in labels
        ]
        if len(labels) > 1:
            cells.append(mean_cell(gains.get(row, ()), metric.decimals, runs=count, sign=True))
        lines.append([Cell(row), *cells])
    counted = "key_tokens" if metric is KEY_LOSS else "targets"
    counts = " or ".join(dict.fromkeys(f"{result[counted]:,}" for run in runs for result in run.context_results))
    note = f"The same {counts} tokens, with at most so many tokens of context before each."
    if metric is KEY_LOSS:
        note = f"{note.replace('The same', 'LongPPL: the')} Each model's own tokens, whose loss falls most from {labels[0]} to {labels[-1]}."
    if len(labels) > 1:
        note += " The last column is the gain from context: below 0 it helps, above 0 it harms."
    return Table(
        f"{metric.title} by context ({metric.direction})",
        [row_heading(study), *labels, *([f"from {labels[0]} to {labels[-1]}"] if len(labels) > 1 else [])],
        lines,
        " ".join(filter(None, [note, _seeds_note(values)])),
    )


def context_metric(study: Study) -> Metric:
    """Returns the metric that compares contexts: bits per byte, or the loss where a result has none."""
    bits = METRICS["text"][0]
    measured = all(bits.name in result for run in study.counted for result in run.context_results)
    return bits if measured else LOSS


def by_distance(study: Study) -> Table | None:
    """Returns row x distance in tokens from the answer to the end of the question: answers found at the longest length.

    Mean over runs of their percentages. None where no run was scored by distance.
    """
    runs = [run for run in study.counted if run.data_kind == "questions"]
    scored = [(run, result) for run in runs for result in run.results if result.get("distance")]
    longest = max((result["extent"] for _, result in scored), default=0)
    values: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[int, int], list[int]] = {}
    for run, result in scored:
        for part in result["distance"] if result["extent"] == longest else ():
            counts.setdefault((part["from"], part["to"]), []).append(part["examples"])
            if part["contains"] is not None:
                values.setdefault((run.row, part["from"]), []).append(part["contains"])
    if not values:
        return None
    edges = sorted(counts)
    trained = " or ".join(dict.fromkeys(run.training_size["label"] for run in runs))
    return Table(
        "Answers found, in percent, by distance to the answer",
        [
            row_heading(study),
            *(f"{low} to {high - 1} (n={statistics.fmean(counts[low, high]):.0f})" for low, high in edges),
        ],
        [
            [Cell(row), *(mean_cell(values.get((row, low), ()), 1) for low, _ in edges)]
            for row in dict.fromkeys(run.row for run in runs)
        ],
        f"Tokens from the answer, in its passage, to the end of the question, in prompts of {longest:g} tokens; trained at "
        f"{trained}. n: questions, on average over runs. {_seeds_note(values)}".strip(),
    )


def training_cost(study: Study) -> Table:
    """Returns the training cost of each row: the mean over its runs, and its confidence interval."""

    def cell(values: Sequence[float | None], form: Callable[[float], str]) -> Cell:
        known = [value for value in values if value is not None]
        if not known:
            return Cell(MISSING)
        after = f" ± {form(interval(known))}" if len(known) > 1 and interval(known) else ""
        return Cell(form(mean(known)), mean(known), after=after)

    def integer(value: float) -> str:
        return f"{value:,.0f}"

    rows = []
    for row in study.rows:
        runs = study.runs_of(row)
        rows.append(
            [
                Cell(row),
                cell([run.parameters for run in runs], integer),
                cell([run.step_seconds for run in runs], lambda value: f"{1000 * value:,.1f}"),
                cell([run.data_seconds for run in runs], lambda value: f"{1000 * value:,.1f}"),
                cell([run.per_second for run in runs], integer),
                cell([run.seconds for run in runs if not run.unfinished], integer),
                cell([run.goodput for run in runs], lambda value: f"{value:.0%}"),
                cell([run.peak_bytes for run in runs], lambda value: integer(value / MIB)),
            ]
        )
    rate = "/".join(sorted({COUNT_NAMES[run.data_kind] for run in study.runs})) + " per s"
    return Table(
        "Cost of training",
        [
            row_heading(study),
            "parameters",
            "step (ms)",
            "wait for data (ms)",
            rate,
            "training seconds",
            "goodput",
            "peak memory (MiB)",
        ],
        rows,
        "Step time and throughput: medians of a run's reports. Wait for data: the mean part of a step. Training seconds: of "
        "finished runs. Goodput: the fraction of all time since a run's first start that was spent in steps that count. Peak "
        "memory: of one device, where the backend reports it (the CPU's does not).",
    )


def run_states(study: Study) -> Table:
    """Returns the state of each run, tuning runs last."""

    def cell(value: float | None, form: str) -> Cell:
        return Cell(MISSING) if value is None else Cell(format(value, form), value)

    rows = [
        [
            Cell(run.name),
            Cell(run.row or "tuning"),
            cell(run.seed, "d"),
            Cell(run.state),
            cell(run.steps_done, ",d"),
            cell(run.evaluation.get("step"), ",d"),
            cell(run.seconds, ",.0f"),
        ]
        for run in (*study.runs, *study.tuning_runs)
    ]
    header = ["run", "row", "seed", "state", "steps", "evaluated at step", "training seconds"]
    return Table("Runs", header, rows, words=(1, 3))


def differing_fields(study: Study) -> Table:
    """Returns each config field that differs between runs, with the runs of each of its values."""
    rows = []
    for name, values in _field_values(study).items():
        if len(values) > 1:
            rows += [[Cell(name), Cell(value), Cell(_run_names(study, runs))] for value, runs in values.items()]
    return Table("Fields that differ between runs", ["field", "value", "runs"], rows, words=(1, 2))


def shared_fields(study: Study) -> Table:
    """Returns the config fields that are equal in all runs."""
    rows = [[Cell(name), Cell(next(iter(values)))] for name, values in _field_values(study).items() if len(values) == 1]
    return Table("Fields that all runs share", ["field", "value"], rows, words=(1,))


def results_csv(study: Study) -> str:
    """Returns one CSV line for each run and evaluated length, size or context; missing values are empty."""
    columns_of = {
        "text": ("tokens", "loss", "perplexity", "bits_per_byte", "word_perplexity"),
        "questions": (
            "examples",
            "loss",
            "answer_perplexity",
            "contains",
            "contains_all",
            "exact_match",
            "exact_match_strict",
            "f1",
        ),
        "sequences": ("examples", "loss", "accuracy", "exact_match"),
        "images": ("examples", "loss", "top1", "top5"),
    }
    columns = list(dict.fromkeys(column for run in study.runs for column in columns_of[run.data_kind]))
    work = ("parameters", "training_flops")
    size_name = "length" if all(run.data_kind != "images" for run in study.runs) else "size"
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if any(run.context_results for run in study.runs):
        columns = ["context", "targets", "stride", *columns]
    writer.writerow(["run", "row", "state", "encoding", "seed", f"training_{size_name}", size_name, *columns, *work])
    for run in study.runs:
        for result in [*run.results, *run.context_results] or [{"label": ""}]:
            label = "" if "context" in result else result["label"]
            keys = [run.name, run.row, run.state, run.encoding, run.seed, run.training_size["label"], label]
            values = [result.get(column, "") for column in columns] + [run.evaluation.get(name, "") for name in work]
            writer.writerow([*map(_no_formula, keys), *values])
    return out.getvalue()


def _no_formula(cell: Any) -> Any:
    """Returns a cell that no spreadsheet evaluates: a name that begins like a formula gets an apostrophe before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def values_of(study: Study, kind: str, metric: Metric) -> tuple[dict[tuple[str, str], list[float]], dict[str, float]]:
    """Returns the values of a metric.

    Args:
      study: the runs.
      kind: kind of data.
      metric: the metric.

    Returns:
      (row, label) -> a value of each run that counts; label -> extent, ascending.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for run in study.counted:
        for result in run.results:
            if run.data_kind == kind and metric.name in result:
                values.setdefault((run.row, result["label"]), []).append(result[metric.name])
    extents = {
        result["label"]: result["extent"] for run in study.runs if run.data_kind == kind for result in run.results
    }
    return values, dict(sorted(extents.items(), key=lambda item: item[1]))


def _best_rows(values: dict[tuple[str, str], list[float]], metric: Metric) -> dict[str, list[str]]:
    """Returns label -> the rows with the best finite mean; several where they are equal."""
    choose = max if metric.higher_is_better else min
    means = {key: mean(own) for key, own in values.items()}
    best = {}
    for label in dict.fromkeys(label for _, label in values):
        finite = {row: value for (row, at), value in means.items() if at == label and math.isfinite(value)}
        best[label] = [row for row, value in finite.items() if value == choose(finite.values())]
    return best


def row_heading(study: Study) -> str:
    """Returns the heading of the first column."""
    return "encoding" if all(run.row.split(" ")[0] == run.encoding for run in study.runs) else "run"


def work_header(kind: str) -> tuple[str, str]:
    """Returns the headings of `work_cells` for a kind of data."""
    return "parameters", f"FLOPs per {COUNT_NAMES[kind][:-1]}"


def work_cells(runs: Sequence[Run]) -> list[Cell]:
    """Returns the parameters, and the training FLOPs per token or image, of runs with the same model."""
    cells = []
    for values, form in (
        ([run.parameters for run in runs], lambda value: f"{value:,}"),
        ([run.training_flops for run in runs], with_prefix),
    ):
        known = next((value for value in values if value is not None), None)
        cells.append(Cell(MISSING) if known is None else Cell(form(known), known))
    return cells


def _seeds_note(values: Mapping[Any, Sequence[float]]) -> str:
    """Explanation of means over seeds, "" where each row has one."""
    counts = sorted(set(map(len, values.values())))
    return f"{MEANS_NOTE}, over {' or '.join(map(str, counts))} seeds." if max(counts, default=0) > 1 else ""


def _field_values(study: Study) -> dict[str, dict[str, list[str]]]:
    """Returns field -> value -> names of the runs that have it."""
    configs = {run.name: flatten_dict(run.config, ".") for run in study.runs}
    fields: dict[str, dict[str, list[str]]] = {}
    for name in dict.fromkeys(name for config in configs.values() for name in config):
        for run, config in configs.items():
            value = format_value(config[name]) if name in config else UNSET
            fields.setdefault(name, {}).setdefault(value, []).append(run)
    return fields


def _run_names(study: Study, names: Sequence[str]) -> str:
    """Returns names of runs, or of rows where all runs of a row are among them."""
    shown = []
    for row in study.rows:
        own = [run.name for run in study.runs_of(row)]
        among = [name for name in own if name in names]
        shown += [row] if own and among == own else among
    return ", ".join(shown)
