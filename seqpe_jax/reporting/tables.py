"""The tables of a report, and their forms: markdown and CSV (`page.html` holds the HTML)."""

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
from seqpe_jax.reporting.study import UNSET, Run, Study, shown
from seqpe_jax.reporting.t_tests import interval
from seqpe_jax.trees import flat

MISSING = "-"
MIB = 2**20
SIZES = ("", "k", "M", "G", "T", "P")  # of counts
MEANS = "Mean ± half the width of its 95% confidence interval (Student's t)"
WORK = (
    "FLOPs: of the matrix products of a training step, three times those of its forward pass, with the position encoder, "
    "its losses and its features in attention, over the tokens or images that the step reads at the training size; in "
    "attention all keys count, those that causality hides too."
)


WINDOWS = (
    "Windows of each length, one after the other: in longer ones fewer tokens stand at a window's beginning, so that a "
    "value may fall with the length without a gain from context, which evaluate --contexts measures."
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One place of a table.

    Attributes:
      text: as people read it; MISSING where there is nothing.
      value: the number in full, or None; best: whether it leads its column; after: what follows it, such as its spread.
    """

    text: str
    value: float | None = None
    best: bool = False
    after: str = ""

    @property
    def missing(self) -> bool:
        """Whether there is nothing."""
        return self.text == MISSING


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, names of columns, and rows whose first cell names them.

    Attributes:
      note: what a reader must know to read it; words: columns that hold words, not numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    words: Sequence[int] = ()

    @property
    def groups(self) -> list[list[Sequence[Cell]]]:
        """Runs of rows with the same name."""
        return [list(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row[0].text)]


def markdown(table: Table) -> str:
    """Returns a markdown table; the first column and columns of words are aligned left, the others right."""
    rule = ["---" if column == 0 or column in table.words else "---:" for column in range(len(table.header))]
    best = {True: "**{}**", False: "{}"}
    body = [[best[cell.best].format(plain(cell.text)) + plain(cell.after) for cell in row] for row in table.rows]
    lines = [[plain(cell) for cell in table.header], rule, *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def plain(text: str) -> str:
    """Returns words that markdown shows as they are: names of runs and fields may hold what it reads as marks."""
    return re.sub(r"[\\`*<>|\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(re.split(r"[\r\n]+", text)))


def markdown_of_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the markdown table of cells that are words already."""
    return markdown(Table("", header, [[Cell(text) for text in row] for row in rows]))


def mean(values: Sequence[float]) -> float:
    """Returns the mean, which is not finite where a value is not."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def number(value: float, decimals: int = 3) -> str:
    """Returns a value with so many decimals, or in short where it is too large for them to matter."""
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.3g}"


def with_unit(value: float) -> str:
    """Returns a count in three digits and the unit of its size, e.g. 2.75 M."""
    value = float(f"{value:.3g}")
    power = min(math.floor(math.log10(value)) // 3, len(SIZES) - 1) if value >= 1 else 0
    return f"{value / 1000**power:#.3g}".rstrip(".") + f" {SIZES[power]}".rstrip()


def metrics_of(study: Study) -> list[tuple[str, Metric]]:
    """Returns what the study measured: kinds of data and metrics, the main one first."""
    return [
        (data, metric)
        for data, metrics in METRICS.items()
        for metric in metrics
        if any(metric.name in result for run in study.runs if run.data == data for result in run.results)
    ]


def by_scale(
    study: Study, data: str, metric: Metric, worse: Collection[tuple[str, str]] = (), rule: str = "", work: bool = False
) -> Table:
    """Returns row x length or size of a metric of the runs' evaluations; the best of a column is marked.

    Runs that differ in the seed alone share a row: their mean and its confidence interval. What was not evaluated is shown
    as missing, and where some of a row's runs were not, how many were; a single row has no best.

    Args:
      study: the runs.
      data: the kind of data.
      metric: what is shown.
      worse: (row, label) of cells to mark as worse than the best row, by tests.
      rule: what these tests are, for the note.
      work: whether parameters and FLOPs stand beside the results.
    """
    runs = [run for run in study.runs if run.data == data]
    found, extents = values_of(study, data, metric)
    names = list(dict.fromkeys(run.row for run in runs))
    trained = {run.training["extent"] for run in runs}
    best = _best(found, metric)

    def cell(name: str, label: str) -> Cell:
        values = found.get((name, label))
        if not values:
            return Cell(MISSING)
        average, after = mean(values), ""
        if len(values) > 1:
            after = f" ± {number(interval(values), metric.decimals)}" + "*" * ((name, label) in worse)
        if len(values) < len(study.of(name)):
            after += f" ({len(values)} of {len(study.of(name))})"
        return Cell(number(average, metric.decimals), average, len(names) > 1 and name in best[label], after)

    def title(label: str) -> str:
        return f"{label} ({extents[label] / next(iter(trained)):.3g}x)" if len(trained) == 1 else label

    several = any(len(values) > 1 for values in found.values())
    windows = WINDOWS * (data == "text" and len(extents) > 1)
    note = [windows, _seeds(found), rule * (several and len(names) > 1), WORK * work]
    return Table(
        f"{metric.title} by evaluated {'size' if data == 'images' else 'length'} ({metric.direction})",
        [
            heading(study),
            *map(title, extents),
            *(("parameters", f"FLOPs per {COUNT_NAMES[data][:-1]}") if work else ()),
        ],
        [
            [Cell(name), *(cell(name, label) for label in extents), *(_work(study.of(name)) if work else ())]
            for name in names
        ],
        " ".join(filter(None, note)),
    )


def by_context(study: Study) -> Table | None:
    """Returns row x context: a metric of the same tokens under each context, and the difference that context makes.

    Mean and 95% confidence interval over the runs of a row; the difference is that of each run, from the smallest context
    to the largest. None where no run was evaluated so.
    """
    runs = [run for run in study.counted if run.contexts]
    if not runs:
        return None
    metric = context_metric(study)
    extents = {result["label"]: result["extent"] for run in runs for result in run.contexts}
    labels = sorted(extents, key=lambda label: extents[label])
    names = list(dict.fromkeys(run.row for run in study.runs if run.data == "text"))
    found: dict[tuple[str, str], list[float]] = {}
    gains: dict[str, list[float]] = {}
    for run in runs:
        values = {result["label"]: result[metric.name] for result in run.contexts}
        for label, value in values.items():
            found.setdefault((run.row, label), []).append(value)
        if len(labels) > 1 and {labels[0], labels[-1]} <= values.keys():
            gains.setdefault(run.row, []).append(values[labels[-1]] - values[labels[0]])
    best = _best(found, metric)

    def cell(values: Sequence[float] | None, name: str, leads: bool = False, sign: str = "") -> Cell:
        if not values:
            return Cell(MISSING)
        average, after = mean(values), f" ± {number(interval(values), metric.decimals)}" if len(values) > 1 else ""
        if len(values) < len(study.of(name)):
            after += f" ({len(values)} of {len(study.of(name))})"
        text = number(average, metric.decimals)
        return Cell(sign * (average >= 0) + text, average, leads, after)

    rows = []
    for name in names:
        leads = [len(names) > 1 and name in best[label] for label in labels]
        cells = [cell(found.get((name, label)), name, lead) for label, lead in zip(labels, leads, strict=True)]
        rows.append([Cell(name), *cells, *([cell(gains.get(name), name, sign="+")] if len(labels) > 1 else [])])
    counts = " or ".join(dict.fromkeys(f"{result['targets']:,}" for run in runs for result in run.contexts))
    note = f"The same {counts} tokens, with at most so many tokens of context before each."
    if len(labels) > 1:
        note += " The last column is what context is worth: below 0 it helps, above 0 it harms."
    return Table(
        f"{metric.title} by context ({metric.direction})",
        [heading(study), *labels, *([f"from {labels[0]} to {labels[-1]}"] if len(labels) > 1 else [])],
        rows,
        " ".join(filter(None, [note, _seeds(found)])),
    )


def context_metric(study: Study) -> Metric:
    """Returns what contexts are compared by: bits per byte, or the loss where a result has none."""
    bits = METRICS["text"][0]
    there = all(bits.name in result for run in study.counted for result in run.contexts)
    return bits if there else LOSS


def _work(runs: Sequence[Run]) -> list[Cell]:
    """Parameters and training FLOPs per token or image of a row, whose runs have the same model."""
    cells = []
    for values, form in (
        ([run.parameters for run in runs], lambda value: f"{value:,}"),
        ([run.training_flops for run in runs], with_unit),
    ):
        known = next((value for value in values if value is not None), None)
        cells.append(Cell(MISSING) if known is None else Cell(form(known), known))
    return cells


def by_distance(study: Study) -> Table | None:
    """Returns row x distance from the question back to the answer: answers found at the longest evaluated length.

    Mean and confidence interval over runs of their shares in percent; the number of questions of a column is the mean over
    runs. None where nothing was scored by distance.
    """
    runs = [run for run in study.counted if run.data == "questions"]
    longest = max((result["extent"] for run in runs for result in run.results if result.get("distance")), default=0)
    found: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[int, int], list[int]] = {}
    for run in runs:
        for result in run.results:
            for part in (result.get("distance") or []) if result["extent"] == longest else []:
                counts.setdefault((part["from"], part["to"]), []).append(part["examples"])
                if part["contains"] is not None:
                    found.setdefault((run.row, part["from"]), []).append(part["contains"])
    if not found:
        return None

    def cell(row: str, low: int) -> Cell:
        values = found.get((row, low))
        if not values:
            return Cell(MISSING)
        after = f" ± {number(interval(values), 1)}" if len(values) > 1 else ""
        return Cell(number(mean(values), 1), mean(values), after=after)

    def title(low: int, high: int, asked: Sequence[int]) -> str:
        return f"{low} to {high - 1} (n={statistics.fmean(asked):.0f})"

    trained = " or ".join(dict.fromkeys(run.training["label"] for run in runs))
    return Table(
        "Answers found, in percent, by distance to the answer",
        [heading(study), *(title(*edges, asked) for edges, asked in sorted(counts.items()))],
        [[Cell(row), *(cell(row, low) for low, _ in sorted(counts))] for row in dict.fromkeys(run.row for run in runs)],
        f"Tokens from the answer, in its passage, to the end of the question, in prompts of {longest:g} tokens; trained at "
        f"{trained}. n: questions, on average over runs. {_seeds(found)}".strip(),
    )


def cost(study: Study) -> Table:
    """Returns what the runs of each row cost: the mean over its runs, and its confidence interval."""

    def cell(values: Sequence[float | None], form: Callable[[float], str]) -> Cell:
        values = [value for value in values if value is not None]
        if not values:
            return Cell(MISSING)
        after = f" ± {form(interval(values))}" if len(values) > 1 and interval(values) else ""
        return Cell(form(mean(values)), mean(values), after=after)

    def whole(value: float) -> str:
        return f"{value:,.0f}"

    rows = [
        [
            Cell(row),
            cell([run.parameters for run in study.of(row)], whole),
            cell([run.step_seconds for run in study.of(row)], lambda value: f"{1000 * value:,.1f}"),
            cell([run.per_second for run in study.of(row)], whole),
            cell([run.seconds for run in study.of(row) if not run.unfinished], whole),
            cell([run.peak_bytes for run in study.of(row)], lambda value: whole(value / MIB)),
        ]
        for row in study.rows
    ]
    unit = "/".join(sorted({COUNT_NAMES[run.data] for run in study.runs})) + " per s"
    return Table(
        "Cost of training",
        [heading(study), "parameters", "step (ms)", unit, "training seconds", "peak memory (MiB)"],
        rows,
        "Step and rate: medians of what a run reported. Time: of finished runs. Memory: the most that a device held, where "
        "the backend counts it (the CPU's does not).",
    )


def points(study: Study) -> Table:
    """Returns one line per run, those of a first stage last, or point of a sweep that has none yet: how far it is."""

    def cell(value: float | None, form: str) -> Cell:
        return Cell(MISSING) if value is None else Cell(format(value, form), value)

    rows = [
        [
            Cell(run.name),
            Cell(run.row or "first stage"),
            cell(run.seed, "d"),
            Cell(run.state),
            cell(run.steps_done, ",d"),
            cell(run.evaluation.get("step"), ",d"),
            cell(run.seconds, ",.0f"),
        ]
        for run in (*study.runs, *study.trials)
    ]
    header = ["run", "row", "seed", "state", "steps", "evaluated at step", "training seconds"]
    return Table("Runs", header, rows, words=(1, 3))


def differing(study: Study) -> Table:
    """Returns each field of the configs that is not equal in all runs, with the runs of each of its values."""
    rows = []
    for name, values in _fields(study).items():
        if len(values) > 1:
            rows += [[Cell(name), Cell(value), Cell(_called(study, runs))] for value, runs in values.items()]
    return Table("Fields that differ between runs", ["field", "value", "runs"], rows, words=(1, 2))


def shared(study: Study) -> Table:
    """Returns the fields of the configs that are equal in all runs."""
    rows = [[Cell(name), Cell(next(iter(values)))] for name, values in _fields(study).items() if len(values) == 1]
    return Table("Fields that all runs share", ["field", "value"], rows, words=(1,))


def results_csv(study: Study) -> str:
    """Returns one line per run and evaluated length, size or context; empty where something was not measured."""
    metrics = {
        "text": ("tokens", "loss", "perplexity", "bits_per_byte", "word_perplexity"),
        "questions": ("examples", "loss", "answer_perplexity", "contains", "exact_match", "exact_match_strict", "f1"),
        "images": ("examples", "loss", "top1", "top5"),
    }
    columns = list(dict.fromkeys(metric for run in study.runs for metric in metrics[run.data]))
    work = ("parameters", "training_flops")
    scale = "length" if all(run.data != "images" for run in study.runs) else "size"
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if any(run.contexts for run in study.runs):
        columns = ["context", "targets", "stride", *columns]
    writer.writerow(["run", "row", "state", "encoding", "seed", f"training_{scale}", scale, *columns, *work])
    for run in study.runs:
        for result in [*run.results, *run.contexts] or [{"label": ""}]:
            label = "" if "context" in result else result["label"]
            place = [run.name, run.row, run.state, run.encoding, run.seed, run.training["label"], label]
            numbers = [
                *(result.get(metric, "") for metric in columns),
                *(run.evaluation.get(name, "") for name in work),
            ]
            writer.writerow([*map(_no_formula, place), *numbers])
    return out.getvalue()


def _no_formula(cell: Any) -> Any:
    """A cell that no spreadsheet computes: a name that begins like a formula gets an apostrophe before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def values_of(study: Study, data: str, metric: Metric) -> tuple[dict[tuple[str, str], list[float]], dict[str, float]]:
    """Returns the values of each (row, label) of the runs that count, and the extents by label, rising."""
    runs = [run for run in study.runs if run.data == data]
    found: dict[tuple[str, str], list[float]] = {}
    for run in study.counted:
        for result in run.results:
            if run.data == data and metric.name in result:
                found.setdefault((run.row, result["label"]), []).append(result[metric.name])
    extents = {result["label"]: result["extent"] for run in runs for result in run.results}
    return found, dict(sorted(extents.items(), key=lambda item: item[1]))


def _best(found: dict[tuple[str, str], list[float]], metric: Metric) -> dict[str, list[str]]:
    """The rows with the best mean of each label: more than one where they are equal, none where none is finite."""
    choose = max if metric.higher_is_better else min
    means = {place: mean(values) for place, values in found.items()}
    best = {}
    for label in dict.fromkeys(label for _, label in found):
        finite = {name: mean for (name, at), mean in means.items() if at == label and math.isfinite(mean)}
        best[label] = [name for name, mean in finite.items() if mean == choose(finite.values())]
    return best


def heading(study: Study) -> str:
    """Returns what rows are named by."""
    return "encoding" if all(run.row.split(" ")[0] == run.encoding for run in study.runs) else "run"


def _seeds(found: Mapping[Any, Sequence[float]]) -> str:
    """What stands beside means, of values by row and column; "" where there is one of each."""
    counts = sorted(set(map(len, found.values())))
    return f"{MEANS}, over {' or '.join(map(str, counts))} seeds." if max(counts, default=0) > 1 else ""


def _fields(study: Study) -> dict[str, dict[str, list[str]]]:
    """Field -> its values -> the runs that have them."""
    configs = {run.name: flat(run.config, ".") for run in study.runs}
    fields: dict[str, dict[str, list[str]]] = {}
    for name in dict.fromkeys(name for config in configs.values() for name in config):
        for run, config in configs.items():
            value = shown(config[name]) if name in config else UNSET
            fields.setdefault(name, {}).setdefault(value, []).append(run)
    return fields


def _called(study: Study, names: Sequence[str]) -> str:
    """Names runs, by their rows where all of a row are there."""
    called = []
    for row in study.rows:
        own = [run.name for run in study.of(row)]
        there = [name for name in own if name in names]
        called += [row] if own and there == own else there
    return ", ".join(called)
