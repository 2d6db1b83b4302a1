"""Reads the folders of runs: what each trained, what it measured, which row of a report it belongs to."""

import collections
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from seqpe_jax.config import Config, encoding_name, to_dict
from seqpe_jax.data.registry import COUNT_NAMES, DATA_IMAGE, DATA_TEXT, DATASETS, Dataset
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path
from seqpe_jax.reporting.load_run import (
    config_of,
    field,
    object_of,
    read_attention,
    read_evaluation,
    read_similarity,
    scale_of,
)
from seqpe_jax.run_dir import RunDir
from seqpe_jax.trees import flat, nested

SWEEP, LOG, FAILED = "sweep.json", "log.txt", "== failed: "  # what a sweep leaves: its points, logs, how a log may end
# May differ between runs that are repetitions of each other: seed, and what changes where a run runs.
REPEATED = ("seed", "eval", "checkpoint", "mesh", "report", "profile", "precision.random_bits")
UNSET = "unset"
UNDECIDED = "not decided yet"
# Equal in all runs, or their numbers do not compare.
COMPARED = ("steps", "batch_size", "data.name", "data.length", "data.size", "data.paths", "data.tokenizer")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds; parts that are not there are empty.

    Attributes:
      name: of the folder; config: nested dicts; metrics: objects of metrics.jsonl.
      evaluation: as `evaluate --output` writes it, or {}; its results know their "extent", the length or the side of a
        square or cube that holds as much, and their "label".
      similarity, attention: arrays of similarity.npz and attention.npz, or None.
      failure: what a sweep says of a run that failed; started: False for a point of a sweep that has no run yet.
      tried: it is of a sweep's first stage, which is measured while it trains and not evaluated afterwards.
      row: the run's row in tables; runs that differ in the seed alone share it.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    similarity: dict[str, np.ndarray] | None
    attention: dict[str, np.ndarray] | None
    failure: str = ""
    started: bool = True
    tried: bool = False
    row: str = ""

    @property
    def encoding(self) -> str:
        """Name of the encoding (`config.encoding_name`)."""
        encoding = self.config["encoding"]
        return encoding_name(encoding["kind"], encoding.get("gate", "none"))

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config["seed"]

    @property
    def dataset(self) -> Dataset | None:
        """The data set that the run was trained on; None where this installation does not know it."""
        return DATASETS.get(self.config["data"].get("name"))

    @property
    def data(self) -> str:
        """What the run reads: "text", "questions" or "images"."""
        if self.dataset is not None:
            return self.dataset.kind
        return DATA_IMAGE if self.config["data"].get("size") else DATA_TEXT

    @property
    def training(self) -> dict[str, Any]:
        """Extent and label of a training example, as of the results."""
        data = self.config["data"]
        return scale_of({"size": data["size"]} if self.data == "images" else {"length": data["length"]})

    @property
    def results(self) -> list[dict[str, Any]]:
        """Evaluation results, one per length or size."""
        return [result for result in self.evaluation.get("results", []) if "context" not in result]

    @property
    def contexts(self) -> list[dict[str, Any]]:
        """Evaluation results of the same tokens under contexts of several lengths, the smallest context first."""
        found = [result for result in self.evaluation.get("results", []) if "context" in result]
        return sorted(found, key=lambda result: result["extent"])

    @property
    def evaluated(self) -> bool:
        """Whether there are evaluation results."""
        return bool(self.evaluation.get("results"))

    @property
    def parameters(self) -> int | None:
        """Number of parameters, once evaluated."""
        return self.evaluation.get("parameters")

    @property
    def training_flops(self) -> float | None:
        """FLOPs of training per token or image, once evaluated; see `objectives.flops`."""
        return self.evaluation.get("training_flops")

    @property
    def steps_planned(self) -> int | None:
        """Steps that the config asks for."""
        return self.config.get("steps")

    @property
    def steps_done(self) -> int | None:
        """Last step that was reported."""
        return self.metrics[-1]["step"] if self.metrics else None

    @property
    def seconds(self) -> float | None:
        """Training time so far."""
        return self.metrics[-1].get("time") if self.metrics else None

    @property
    def per_second(self) -> float | None:
        """Median of the reported rates, in tokens or images."""
        return self._of_reports(f"train/{COUNT_NAMES[self.data]}_per_second", statistics.median)

    @property
    def step_seconds(self) -> float | None:
        """Median of the reported times of a step."""
        return self._of_reports("train/step_seconds", statistics.median)

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that a device held; None where the backend does not count."""
        return self._of_reports("device/memory_bytes", max)

    @property
    def unfinished(self) -> bool:
        """Whether steps are left."""
        return bool(self.steps_planned) and (self.steps_done or 0) < self.steps_planned

    @property
    def state(self) -> str:
        """How far the run is."""
        if not self.started:
            return f"failed: {self.failure}" if self.failure else "not started"
        if self.failure:
            return f"failed at step {self.steps_done or 0} of {self.steps_planned}: {self.failure}"
        if self.unfinished:
            return f"unfinished: step {self.steps_done or 0} of {self.steps_planned}"
        return "finished" if self.evaluated or self.tried else "not evaluated"

    def _of_reports(self, name: str, choose: Callable[[list[float]], float]) -> Any:
        values = [line[name] for line in self.metrics if name in line]
        return choose(values) if values else None


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs that a report is about, in its order; those that a sweep has not started too.

    Attributes:
      trials: runs of a sweep's first stage, which only decide fields of the others; points: of the sweep, as its record has
        them, by name; empty where there is none.
    """

    name: str
    runs: list[Run]
    trials: list[Run] = dataclasses.field(default_factory=list)
    points: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> str:
        """The config file of the sweep's first run; "" where nobody knows."""
        return next((point.get("config", "") for point in self.points.values()), "")

    @property
    def rows(self) -> list[str]:
        """Rows of the tables."""
        return list(dict.fromkeys(run.row for run in self.runs))

    def of(self, row: str) -> list[Run]:
        """Returns the runs of a row: repetitions of each other."""
        return [run for run in self.runs if run.row == row]

    @property
    def counted(self) -> list[Run]:
        """The runs whose results count: not those of an unfinished run beside finished ones of its row."""
        finished = {run.row for run in self.runs if run.evaluated and not run.unfinished}
        return [run for run in self.runs if not run.unfinished or run.row not in finished]


def read_study(workdir: str | os.PathLike) -> Study:
    """Returns the run of a folder, the runs of its subfolders, or the points of its sweep; SeqPE first.

    Raises:
      InputError: there is no run, or one has a file that cannot be read.
    """
    workdir = as_path(workdir)
    if not workdir.is_dir():
        raise InputError(f"no such directory: {workdir} (--workdir takes a run's folder, or a folder of runs)")
    points = _points(workdir)
    trials: list[Run] = []
    if points is not None:
        deciding = _deciding(points, workdir / SWEEP)
        runs = [
            read_run(workdir / name)
            if (workdir / name / "config.json").exists()
            else _not_started(workdir / name, point)
            for name, point in points.items()
        ]
        trials = [dataclasses.replace(run, tried=True) for run in runs if run.name in deciding]
        runs = [run for run in runs if run.name not in deciding]
    else:
        folders = [workdir] if (workdir / "config.json").exists() else sorted(workdir.iterdir())
        runs = [read_run(folder) for folder in folders if (folder / "config.json").exists()]
    if not runs:
        raise InputError(f"{workdir} holds no run: neither it nor a folder in it has a config.json that `train` wrote")
    runs = sorted(runs, key=lambda run: run.encoding != "seqpe")
    return Study(workdir.resolve().name, _rows(runs, chosen=points is not None), trials, points or {})


def read_run(folder: AnyPath) -> Run:
    """Returns a run's folder as a `Run`. Raises: InputError for a file that cannot be read."""
    (run_dir := RunDir(folder)).check_files()
    config = config_of(object_of((file := folder / "config.json").read_bytes(), str(file)), str(file))
    run = Run(
        folder.resolve().name,
        config,
        run_dir.read_metrics(),
        read_evaluation(folder),
        read_similarity(folder),
        read_attention(folder),
    )
    return dataclasses.replace(run, failure=_failure(folder) if run.unfinished or not run.evaluated else "")


def differences(study: Study) -> list[str]:
    """Returns one line for each thing that should be equal for runs to be compared, and is not."""
    lines, runs = [], study.runs

    def compare(what: str, values: list[tuple[Any, str]]) -> None:
        names: dict[str, list[str]] = {}
        for value, name in values:
            names.setdefault(json.dumps(value), []).append(name)
        if len(names) > 1:
            lines.append(f"{what}: " + "; ".join(f"{value} ({', '.join(found)})" for value, found in names.items()))

    for name in COMPARED:
        compare(name, [(field(run.config, name), run.name) for run in runs])
    rows = dict.fromkeys(run.row for run in runs)
    compare("seed", [(sorted(run.seed for run in study.of(row)), row) for row in rows])
    asked = [
        ([[result[name] for name in ("context", "targets", "stride")] for result in run.contexts], run.name)
        for run in runs
    ]
    compare("[context, targets, stride] evaluated", [(value, name) for value, name in asked if value])
    compare("evaluated split", [(run.evaluation["split"], run.name) for run in runs if "split" in run.evaluation])
    for label in dict.fromkeys(result["label"] for run in runs for result in run.results):
        read = [(run, result) for run in runs for result in run.results if result["label"] == label]
        for data, count in (("text", "tokens"), ("questions", "examples"), ("images", "examples")):
            values = [(result.get(count), run.name) for run, result in read if run.data == data]
            compare(f"{count} evaluated at {label}", values)
    return lines


def shown(value: Any) -> str:
    """Returns a config's value as people write it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _rows(runs: list[Run], chosen: bool) -> list[Run]:
    """Names rows: by the encoding and, where it was trained in several ways, by the fields in which they differ.

    Args:
      chosen: whether somebody chose the runs' names, in a sweep: there, a way that was trained once has the run's name, and
        one whose runs are called NAME-SEED has that name.
    """
    defaults = flat(to_dict(Config()), ".")  # which fields have that a run is older than
    whole = [defaults | flat(run.config, ".") for run in runs]
    settings = [
        {name: value for name, value in own.items() if not {name, name.partition(".")[0]} & set(REPEATED)}
        for own in whole
    ]
    ways = [json.dumps(own, sort_keys=True) for own in settings]
    named, encodings = {}, dict.fromkeys(run.encoding for run in runs)
    given: dict[str, set[str]] = {}
    for run, way in zip(runs, ways, strict=True):
        given.setdefault(way, set()).add(run.name if ways.count(way) == 1 else run.name.removesuffix(f"-{run.seed}"))
    alone = {way: names.pop() for way, names in given.items() if chosen and len(names) == 1}
    for encoding in encodings:
        own = {way: values for run, way, values in zip(runs, ways, settings, strict=True) if run.encoding == encoding}
        labels = _differing(list(own.values()))
        for way, label in zip(own, labels, strict=True):
            named[way] = f"{encoding} ({', '.join(label)})" if label else encoding
            if len(own) > 1 and way in alone and alone[way] not in encodings.keys() - {encoding}:
                named[way] = alone[way]
    return [dataclasses.replace(run, row=named[way]) for run, way in zip(runs, ways, strict=True)]


def _differing(ways: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns "field=value" of each way where it has not the value that most ways have."""
    names = dict.fromkeys(name for way in ways for name in way)
    values = {name: [shown(way[name]) if name in way else UNSET for way in ways] for name in names}
    values = {name: found for name, found in values.items() if len(set(found)) > 1}
    labels: list[list[str]] = [[] for _ in ways]
    for name, found in values.items():
        (usual, count), (_, second) = collections.Counter(found).most_common(2)
        for label, value in zip(labels, found, strict=True):
            if value != usual or count == second:
                label.append(f"{_short(name, values)}={value}")
    return labels


def _short(name: str, among: Sequence[str]) -> str:
    """Returns a dotted name without its first part where no other name ends so."""
    parts, others = name.split("."), [other for other in among if other != name]
    end = ".".join(parts[1:])
    return name if not end or any(f".{other}".endswith(f".{end}") for other in others) else end


def _points(workdir: AnyPath) -> dict[str, dict[str, Any]] | None:
    """Name -> point of a sweep's folder, as its record has it; None for another folder."""
    path = workdir / SWEEP
    if not path.exists():
        return None
    points = object_of(path.read_bytes(), str(path), {"points": dict})["points"]
    for name, point in points.items():
        point["settings"] = config_of(field(point, "settings"), f"{path}, point '{name}',")
    return points


def _deciding(points: dict[str, dict[str, Any]], path: AnyPath) -> set[str]:
    """Names of the points whose runs decide fields of others. Raises: InputError: points name what is not there."""
    try:
        named = {run for point in points.values() for best in point.get("best", {}).values() for run in best["runs"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not say which runs decide: it is not as this package writes it") from error
    if lost := named - points.keys():
        raise InputError(
            f"{path} has no point '{min(lost)}', which decides others: it is not as this package writes it"
        )
    return named


def _not_started(folder: AnyPath, point: dict[str, Any]) -> Run:
    open_fields = point.get("best", {}).keys() - point.get("decided", {}).keys()
    config = nested(flat(point["settings"], ".") | dict.fromkeys(open_fields, UNDECIDED), ".")
    return Run(folder.name, config, [], {}, None, None, _failure(folder), started=False)


def _failure(folder: AnyPath) -> str:
    """What the last line of a run's log says of its failure; "" where it did not fail."""
    path = folder / LOG
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1].removeprefix(FAILED) if lines and lines[-1].startswith(FAILED) else ""
