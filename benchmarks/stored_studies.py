"""The stored results of the studies, as a report reads the folders of their runs.

A study is docs/results/STUDY.json, as `sweep --results` writes it, if that says which runs belong to which row. Else it is
docs/results/STUDY.csv, the results.csv of its report; parameters and FLOPs, which older files lack, are in
docs/results/work.json, which `results.py --work` writes from the configs of the studies' runs.
"""

import csv
import dataclasses
import functools
import json
import pathlib

from seqpe_jax.metric_registry import METRICS, Metric
from seqpe_jax.reporting.load_run import size_of
from seqpe_jax.reporting.stored_results import read_results, read_stored_study
from seqpe_jax.reporting.study import Run, Study

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORED = ROOT / "docs" / "results"
WORK = STORED / "work.json"
MEASURED = ("bits_per_byte", "contains", "exact_match", "exact_match_strict", "f1", "top1", "tokens", "examples")


@functools.cache
def planned_studies() -> tuple[str, ...]:
    """Returns the names of the studies whose results file has a plan."""
    files = sorted([*STORED.glob("study_*.json"), *STORED.glob("extend_context.json")])
    return tuple(path.stem for path in files if read_results(path).plan)


def is_stored(name: str) -> bool:
    """Returns whether a study has results of rows, not only trials; of studies that are joined, the first."""
    name = name.partition("+")[0]
    if name in planned_studies():
        return any(run.evaluated for run in study_of(name).runs)
    return (STORED / f"{name}.csv").exists()


@functools.cache
def study_of(name: str) -> Study:
    """Returns a stored study: the results of its runs, where they were trained, and what their models cost.

    "FIRST+SECOND" has the rows of both, under the name of the first; the second may be missing. Of a CSV file, a run's row is its name less its seed.
    """
    if "+" in name:
        first, *others = (study_of(part) for part in name.split("+") if part in planned_studies() or is_stored(part))
        return dataclasses.replace(
            first,
            runs=[*first.runs, *(run for study in others for run in study.runs)],
            tuning_runs=[*first.tuning_runs, *(run for study in others for run in study.tuning_runs)],
            sweep_trials=first.sweep_trials
            | {key: trial for study in others for key, trial in study.sweep_trials.items()},
            not_begun=[*first.not_begun, *(row for study in others for row in study.not_begun)],
        )
    if name in planned_studies():
        return read_stored_study(STORED / f"{name}.json")
    with (STORED / f"{name}.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if not line.get("context")]  # contexts are no evaluated lengths
    work = json.loads(WORK.read_text()).get(name, {})
    results: dict[str, list[dict]] = {}
    for line in lines:
        numbers = {key: float(line[key]) for key in MEASURED if line.get(key)}
        results.setdefault(line["run"], []).append(numbers | _scale(line))
    runs = []
    for run, found in results.items():
        line = next(line for line in lines if line["run"] == run)
        row = run.removesuffix(f"-{line['seed']}")
        data = {"length": 1, "name": None}
        if "training_length" in line:
            data["length"] = int(line["training_length"])
        elif "training_size" in line and _is_images(lines):
            data["size"] = _sides(line["training_size"])
        elif "training_size" in line:  # of a study that had images besides its texts
            data["length"] = int(line["training_size"])
        config = {"encoding": {"kind": line.get("encoding", row)}, "seed": int(line["seed"]), "data": data}
        runs.append(Run(run, config, [], {"results": found, **work.get(row, {})}, None, None, row=row))
    return Study(name, runs)


def by_steps(study: Study, metric: str, extent: float) -> dict[str, dict[int, list[float]]]:
    """Returns encoding -> training steps -> values of a metric at one length, of a study with rows called NAME_STEPS."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in (run for run in study.runs if run.evaluated):
        value = next(result[metric] for result in run.results if result["extent"] == extent)
        name = run.row.removesuffix(f"_{run.config['steps']}")
        found.setdefault(name, {}).setdefault(run.config["steps"], []).append(value)
    return found


def metric_of(study: Study, key: str) -> tuple[str, Metric]:
    """Returns the kind of data of a study's runs, and a metric of these by its key."""
    data = study.runs[0].data_kind
    return data, next(metric for metric in METRICS[data] if metric.name == key)


def _is_images(lines: list[dict[str, str]]) -> bool:
    return any(line.get("top1") for line in lines)


def _scale(line: dict[str, str]) -> dict:
    """The extent and the label of a line's length, size or step."""
    if "length" in line:
        return size_of({"length": line["length"]})
    return size_of({"size": _sides(line["size"])})


def _sides(size: str) -> list[int]:
    """The sides of a size, of which a square has one."""
    sides = [int(side) for side in size.split("x")]
    return sides * 2 if len(sides) == 1 else sides


def title(study: Study, label: str) -> str:
    """Returns the head of a column: the length or size, and how many times that of training it is."""
    trained = study.runs[0].training_size["label"]
    return f"{label} ({int(label.split('x')[-1]) / int(trained.split('x')[-1]):g}x)"
