"""Quality far beyond the training length next to its cost, as `benchmark --output` files in a study's folder have it."""

import json
import os
from collections.abc import Sequence
from typing import Any

from seqpe_jax.axes import size_label
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path
from seqpe_jax.metric_registry import Metric
from seqpe_jax.reporting.study import Run, Study
from seqpe_jax.reporting.tables import MEANS_NOTE, MISSING, Cell, Table, mean_cell, row_heading

BENCHMARK_FILES = "benchmark*.json"  # in the study's folder, each of one mode
MODES = {"train": "training step", "eval": "evaluation"}
ROPE_KINDS = ("rotary_axial", "rotary", "rotary_mixed")  # costs are relative to the first that a study of images has
FACTOR = 8  # of the training length or size, at which retention is measured

Benchmark = dict[str, Any]


def read_benchmarks(workdir: str | os.PathLike) -> list[Benchmark]:
    """Reads the benchmarks of training and evaluation in a study's folder.

    Args:
      workdir: folder of the study.

    Raises:
      InputError: a file that `benchmark --output` did not write.
    """
    benchmarks = []
    for path in sorted(as_path(workdir).glob(BENCHMARK_FILES)):
        try:
            one = json.loads(path.read_bytes())
            for run in one["runs"]:
                run["label"] = size_label(tuple(run["size"]) if "size" in run else (run["length"],))
                _ = run["encoding"] + run["mode"], run["median_s"] + run["peak_bytes"]
            first, *others = _encodings(one) or [""]
            _ = [one["ratios"][f"{first}/{other}"]["time"] + 0 for other in others]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not as `benchmark --output` writes it: write it again, or remove it"
            ) from error
        if one["runs"] and one["runs"][0]["mode"] in MODES:
            benchmarks.append(one)
    return sorted(benchmarks, key=lambda one: list(MODES).index(one["runs"][0]["mode"]))


def missing_commands(study: Study, workdir: str | os.PathLike, benchmarks: Sequence[Benchmark]) -> str:
    """Returns the commands that measure missing costs.

    Args:
      study: the runs.
      workdir: its folder.
      benchmarks: those that it has.

    Returns:
      One command a line; "" where none is missing.
    """
    measured = {one["runs"][0]["mode"] for one in benchmarks}
    variants = dict.fromkeys([_reference([], study), *(_variant(study, run) for run in study.runs)])
    config = (study.config or "CONFIG").partition(":")[0]
    return "\n".join(
        f"python -m seqpe_jax.benchmark --config={config} --compare={','.join(variants)} --mode={mode} "
        f"--output={as_path(workdir) / f'benchmark_{mode}.json'}"
        for mode in MODES
        if mode not in measured
    )


def _variant(study: Study, run: Run) -> str:
    """Variant of the sweep's config file that a run has; its kind of encoding where none is recorded."""
    return study.sweep_trials.get(run.name, {}).get("config", "").partition(":")[2] or run.encoding


def retention_table(study: Study, kind: str, metric: Metric, benchmarks: Sequence[Benchmark]) -> Table | None:
    """Returns row x quality at the training length, quality far beyond, retention, and cost.

    Retention is the ratio of a run's quality far beyond the training length to that at it (the inverse where lower is
    better). Costs are those of a training step and of an evaluation, relative to RoPE.

    Args:
      study: the runs.
      kind: kind of data.
      metric: measure of quality.
      benchmarks: measured costs.

    Returns:
      None where runs were evaluated at one length alone.
    """
    runs = [run for run in study.counted if run.data_kind == kind]
    sizes = _near_and_far(runs)
    if sizes is None:
        return None
    near, far, factor = sizes
    rows = []
    for row in dict.fromkeys(run.row for run in study.runs if run.data_kind == kind):
        measured = [_values(run, metric) for run in runs if run.row == row]
        columns = (
            ([own.get(near) for own in measured], metric.decimals),
            ([own.get(far) for own in measured], metric.decimals),
            ([_retention(own, near, far, metric) for own in measured], 3),
        )
        cells = [
            mean_cell([value for value in values if value is not None], decimals, runs=len(values))
            for values, decimals in columns
        ]
        rows.append([Cell(row), *cells, *(cell for one in benchmarks for cell in _relative_cost(study, row, one))])
    size_name = "size" if kind == "images" else "length"
    header = [row_heading(study), f"at {near} (1x)", f"at {far} ({factor:.3g}x)", "retention"]
    for one in benchmarks:
        first = one["runs"][0]
        header += [f"{MODES[first['mode']]} at {first['label']}, time", "memory"]
    ratio = f"{far} over {near}" if metric.higher_is_better else f"{near} over {far}"
    note = f"Retention: value at {ratio}, of each run; 1 is no loss. {MEANS_NOTE}."
    if benchmarks:
        references = " and ".join(dict.fromkeys(_reference(_encodings(one), study) for one in benchmarks))
        devices = " and ".join(dict.fromkeys(str(one.get("device", "an unknown device")) for one in benchmarks))
        note += f" Time and memory: relative to {references}, measured in turns on {devices}."
    return Table(f"{metric.title.rstrip(',')}, retention past the training {size_name}, and cost", header, rows, note)


def quality_and_cost(
    study: Study, kind: str, metric: Metric, benchmarks: Sequence[Benchmark]
) -> dict[str, tuple[float, float]]:
    """Returns row -> (time of a training step relative to RoPE, quality far beyond the training length)."""
    table = retention_table(study, kind, metric, [one for one in benchmarks if one["runs"][0]["mode"] == "train"][:1])
    if table is None or len(table.header) < 5:
        return {}
    return {row[0].text: (row[4].value, row[2].value) for row in table.rows if None not in (row[4].value, row[2].value)}


def _near_and_far(runs: Sequence[Run]) -> tuple[str, str, float] | None:
    """Labels of the training length and of one FACTOR times as far, or else the farthest; and how far that is."""
    trained = {run.training_size["label"]: run.training_size["extent"] for run in runs if run.results}
    extents = {result["label"]: result["extent"] for run in runs for result in run.results}
    if len(trained) != 1 or not trained.keys() <= extents.keys():
        return None
    [(near, extent)] = trained.items()
    factors = {label: far / extent for label, far in extents.items() if far > extent}
    if not factors:
        return None
    far = min(factors, key=lambda label: (factors[label] != FACTOR, -factors[label]))
    return near, far, factors[far]


def _values(run: Run, metric: Metric) -> dict[str, float]:
    return {result["label"]: result[metric.name] for result in run.results if metric.name in result}


def _retention(values: dict[str, float], near: str, far: str, metric: Metric) -> float | None:
    over, under = (far, near) if metric.higher_is_better else (near, far)
    return values[over] / values[under] if {near, far} <= values.keys() and values[under] else None


def _encodings(one: Benchmark) -> list[str]:
    return [run["encoding"] for run in one["runs"]]


def _reference(names: Sequence[str], study: Study) -> str:
    """The RoPE that costs are relative to, or the first encoding without one; any is among no names."""
    kinds = ROPE_KINDS if study.runs[0].data_kind == "images" else ("rotary", *ROPE_KINDS)
    return next((kind for kind in kinds if not names or kind in names), names[0] if names else "")


def _relative_cost(study: Study, row: str, one: Benchmark) -> list[Cell]:
    """Time and memory of a row's encoding, relative to RoPE in the same run of `benchmark`.

    A row is found under its own name, or under its kind of encoding where that has one row alone: variants of an encoding
    differ in cost.
    """
    names = _encodings(one)
    kinds = {own: study.runs_of(own)[0].encoding for own in study.rows}
    name = row if row in names else kinds[row]
    if name not in names or (name != row and list(kinds.values()).count(name) > 1):
        return [Cell(MISSING), Cell(MISSING)]
    # Ratios of turns, on which other load of the machine has the same effect; the first encoding over each other one.
    first_over = {names[0]: 1.0} | {other: one["ratios"][f"{names[0]}/{other}"]["time"] for other in names[1:]}
    memory = {run["encoding"]: run["peak_bytes"] for run in one["runs"]}
    rope = _reference(names, study)
    ratios = (first_over[rope] / first_over[name], memory[name] / memory[rope])
    return [Cell(f"{ratio:.2f}", ratio) for ratio in ratios]
