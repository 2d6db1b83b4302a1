"""The runs that a report compares: config, measurements and table row of each."""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from seqpe_jax.config import ENCODINGS, Config, encoding_name, to_dict
from seqpe_jax.data.registry import COUNT_NAMES, DATA_IMAGE, DATA_TEXT, DATASETS, Dataset
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path
from seqpe_jax.metric_registry import DATA_SECONDS, GOODPUT, STEP_SECONDS
from seqpe_jax.reporting.load_run import (
    checked_config,
    get_field,
    parse_object,
    read_attention,
    read_evaluation,
    read_position_curves,
    read_similarity,
    size_of,
)
from seqpe_jax.run_dir import CONFIG_FILE, FAILED, LOG_FILE, SWEEP_FILE, RunDir
from seqpe_jax.trees import flatten_dict, unflatten_dict

# Fields that may differ between the runs of a row: the seed, and those that change where and how a run executes.
PER_RUN_FIELDS = ("seed", "eval", "checkpoint", "mesh", "report", "profile", "precision.random_bits")
# Fields that must be equal for results to be comparable.
COMPARED_FIELDS = ("steps", "batch_size", "data.name", "data.length", "data.size", "data.paths", "data.tokenizer")
MAX_FIELD_TABLES = (
    2  # a run with more open fields has its parts chosen by trials, whose name without the seed is its row's
)
UNSET = "unset"
UNDECIDED = "not decided yet"


@dataclasses.dataclass(frozen=True)
class Run:
    """Content of a run folder; missing parts are empty.

    Attributes:
      name: name of the folder.
      config: nested dicts.
      metrics: objects of metrics.jsonl.
      evaluation: object of evaluation.json, or {}; each result has the "extent" and "label" of `load_run.size_of`.
      similarity: arrays of similarity.npz, or None.
      attention: arrays of attention.npz, or None.
      failure: reason for which a sweep's run failed, or "".
      started: whether the folder exists; False for a trial of a sweep that has not begun.
      is_tuning: whether it only decides fields of other runs of a sweep; it is not evaluated after training.
      row: its row in tables, shared by runs that differ in the seed alone.
      position_curves: arrays of position_curves.npz, or None.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    similarity: dict[str, np.ndarray] | None
    attention: dict[str, np.ndarray] | None
    failure: str = ""
    started: bool = True
    is_tuning: bool = False
    row: str = ""
    position_curves: dict[str, np.ndarray] | None = None

    @property
    def encoding(self) -> str:
        """Name of the encoding, with its gate."""
        encoding = self.config["encoding"]
        gate = encoding.get("gate", "none")
        return encoding_name(encoding["kind"], "none" if gate == UNDECIDED else gate)

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config["seed"]

    @property
    def dataset(self) -> Dataset | None:
        """Data set of training; None where this installation does not know it."""
        return DATASETS.get(self.config["data"].get("name"))

    @property
    def data_kind(self) -> str:
        """Kind of the data: "text", "questions" or "images"."""
        if self.dataset is not None:
            return self.dataset.kind
        return DATA_IMAGE if self.config["data"].get("size") else DATA_TEXT

    @property
    def training_size(self) -> dict[str, Any]:
        """Extent and label of a training example."""
        data = self.config["data"]
        return size_of({"size": data["size"]} if self.data_kind == DATA_IMAGE else {"length": data["length"]})

    @property
    def results(self) -> list[dict[str, Any]]:
        """Evaluation results, one for each length or size."""
        return [result for result in self.evaluation.get("results", []) if "context" not in result]

    @property
    def context_results(self) -> list[dict[str, Any]]:
        """Evaluation results of the same tokens under several context lengths, ascending."""
        found = [result for result in self.evaluation.get("results", []) if "context" in result]
        return sorted(found, key=lambda result: result["extent"])

    @property
    def evaluated(self) -> bool:
        """True if there are evaluation results."""
        return bool(self.evaluation.get("results"))

    @property
    def parameters(self) -> int | None:
        """Number of parameters, once evaluated."""
        return self.evaluation.get("parameters")

    @property
    def training_flops(self) -> float | None:
        """FLOPs of training per token or image, once evaluated."""
        return self.evaluation.get("training_flops")

    @property
    def steps_planned(self) -> int | None:
        """Training steps in the config."""
        return self.config.get("steps")

    @property
    def steps_done(self) -> int | None:
        """Last reported step."""
        return self.metrics[-1]["step"] if self.metrics else None

    @property
    def seconds(self) -> float | None:
        """Training time so far."""
        return self.metrics[-1].get("time") if self.metrics else None

    @property
    def per_second(self) -> float | None:
        """Median of the reported throughputs, in tokens or images per second."""
        return self._of_reports(f"train/{COUNT_NAMES[self.data_kind]}_per_second", statistics.median)

    @property
    def step_seconds(self) -> float | None:
        """Median of the reported step times."""
        return self._of_reports(STEP_SECONDS, statistics.median)

    @property
    def data_seconds(self) -> float | None:
        """Mean of the reported waits for data in a step."""
        return self._of_reports(DATA_SECONDS, statistics.fmean)

    @property
    def goodput(self) -> float | None:
        """Last reported fraction of the time since the first start that was spent in steps that count."""
        return self._of_reports(GOODPUT, lambda values: values[-1])

    @property
    def peak_bytes(self) -> int | None:
        """Largest reported memory of a device; None where the backend does not report it."""
        return self._of_reports("device/memory_bytes", max)

    @property
    def unfinished(self) -> bool:
        """True if training steps remain."""
        return bool(self.steps_planned) and (self.steps_done or 0) < self.steps_planned

    @property
    def state(self) -> str:
        """State of the run in words."""
        if not self.started:
            return f"failed: {self.failure}" if self.failure else "not started"
        if self.failure:
            return f"failed at step {self.steps_done or 0} of {self.steps_planned}: {self.failure}"
        if self.unfinished:
            return f"unfinished: step {self.steps_done or 0} of {self.steps_planned}"
        return "finished" if self.evaluated or self.is_tuning else "not evaluated"

    def _of_reports(self, name: str, reduce: Callable[[list[float]], float]) -> Any:
        values = [line[name] for line in self.metrics if name in line]
        return reduce(values) if values else None


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that a report compares.

    Attributes:
      name: name of the folder.
      runs: runs in the order of the report, with those that a sweep has not started.
      tuning_runs: runs of a sweep that only decide fields of others.
      sweep_trials: trials in the folder's sweep.json by name; empty without one.
      not_begun: rows of a plan that have no run yet.
    """

    name: str
    runs: list[Run]
    tuning_runs: list[Run] = dataclasses.field(default_factory=list)
    sweep_trials: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    not_begun: list[str] = dataclasses.field(default_factory=list)

    @property
    def config(self) -> str:
        """Config file of the sweep's first trial, "" without a sweep."""
        return next((trial.get("config", "") for trial in self.sweep_trials.values()), "")

    @property
    def rows(self) -> list[str]:
        """Rows of the tables."""
        return list(dict.fromkeys(run.row for run in self.runs))

    def runs_of(self, row: str) -> list[Run]:
        """Returns the runs of a row, which differ in the seed."""
        return [run for run in self.runs if run.row == row]

    @property
    def counted(self) -> list[Run]:
        """Runs whose results count: unfinished runs do not where another run of the row has finished."""
        finished = {run.row for run in self.runs if run.evaluated and not run.unfinished}
        return [run for run in self.runs if not run.unfinished or run.row not in finished]


def last_measured(run: Run, metric: str) -> float | None:
    """Returns a metric of a run at its last step, None where it is missing or not finite."""
    values = [line[metric] for line in run.metrics if metric in line and line["step"] == run.steps_planned]
    return values[-1] if values and math.isfinite(values[-1]) else None


def read_study(workdir: str | os.PathLike) -> Study:
    """Reads one run, a folder of runs or the folder of a sweep.

    Args:
      workdir: run folder, folder whose subfolders are runs, or sweep folder.

    Returns:
      The runs; those of SeqPE come first.

    Raises:
      InputError: there is no run, or a file cannot be read.
    """
    workdir = as_path(workdir)
    if not workdir.is_dir():
        raise InputError(f"no such directory: {workdir} (--workdir takes a run's folder, or a folder of runs)")
    trials = _read_sweep_trials(workdir)
    tuning_runs: list[Run] = []
    if trials is not None:
        deciding = _deciding_trials(trials, workdir / SWEEP_FILE)
        runs = [
            read_run(workdir / name) if (workdir / name / CONFIG_FILE).exists() else _not_started(workdir / name, trial)
            for name, trial in trials.items()
        ]
        tuning_runs = [dataclasses.replace(run, is_tuning=True) for run in runs if run.name in deciding]
        runs = [run for run in runs if run.name not in deciding]
    else:
        folders = [workdir] if (workdir / CONFIG_FILE).exists() else sorted(workdir.iterdir())
        runs = [read_run(folder) for folder in folders if (folder / CONFIG_FILE).exists()]
    if not runs:
        raise InputError(f"{workdir} holds no run: neither it nor a folder in it has a config.json that `train` wrote")
    runs = sorted(runs, key=lambda run: run.encoding != "seqpe")
    rows = _with_rows(runs, named=trials is not None)
    for at, run in enumerate(rows):
        if len((trials or {}).get(run.name, {}).get("best", {})) > MAX_FIELD_TABLES:
            rows[at] = dataclasses.replace(run, row=run.name.removesuffix(f"-{run.seed}"))
    return Study(workdir.resolve().name, rows, tuning_runs, trials or {})


def read_run(folder: AnyPath) -> Run:
    """Reads a run folder. Raises: InputError: a file cannot be read."""
    run_dir = RunDir(folder)
    run_dir.check_files()
    path = folder / CONFIG_FILE
    run = Run(
        folder.resolve().name,
        checked_config(parse_object(path.read_bytes(), str(path)), str(path)),
        run_dir.read_metrics(),
        read_evaluation(folder),
        read_similarity(folder),
        read_attention(folder),
        position_curves=read_position_curves(folder),
    )
    return dataclasses.replace(run, failure=_failure(folder) if run.unfinished or not run.evaluated else "")


def differences(study: Study) -> list[str]:
    """Returns one line for each setting that should be equal for a comparison and is not."""
    lines, runs = [], study.runs

    def compare(label: str, values: list[tuple[Any, str]]) -> None:
        names: dict[str, list[str]] = {}
        for value, name in values:
            names.setdefault(json.dumps(value), []).append(name)
        if len(names) > 1:
            lines.append(f"{label}: " + "; ".join(f"{value} ({', '.join(found)})" for value, found in names.items()))

    for name in COMPARED_FIELDS:
        compare(name, [(get_field(run.config, name), run.name) for run in runs])
    compare("seed", [(sorted(run.seed for run in study.runs_of(row)), row) for row in study.rows])
    contexts = [
        ([[result[name] for name in ("context", "targets", "stride")] for result in run.context_results], run.name)
        for run in runs
    ]
    compare("[context, targets, stride] evaluated", [(value, name) for value, name in contexts if value])
    compare("evaluated split", [(run.evaluation["split"], run.name) for run in runs if "split" in run.evaluation])
    for label in dict.fromkeys(result["label"] for run in runs for result in run.results):
        at_label = [(run, result) for run in runs for result in run.results if result["label"] == label]
        for kind, count in (("text", "tokens"), ("questions", "examples"), ("images", "examples")):
            values = [(result.get(count), run.name) for run, result in at_label if run.data_kind == kind]
            compare(f"{count} evaluated at {label}", values)
    return lines


def format_value(value: Any) -> str:
    """Returns the value of a config field as people write it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _with_rows(runs: list[Run], named: bool) -> list[Run]:
    """Returns the runs with their rows: the encoding and, of an encoding with several variants, their differing fields.

    Args:
      runs: runs of a study.
      named: whether a sweep names the runs. Then a variant with one run has that run's name, and one whose runs are
        NAME-SEED has that NAME.
    """
    settings = [
        {
            name: value
            for name, value in (_default_fields(run.config["encoding"]["kind"]) | flatten_dict(run.config, ".")).items()
            if not {name, name.partition(".")[0]} & set(PER_RUN_FIELDS)
        }
        for run in runs
    ]
    for run, own in zip(runs, settings, strict=True):  # seeds of a row begin with seeds of a row
        own["init_from"] = pathlib.PurePath(own.get("init_from", "")).name.removesuffix(f"-{run.seed}")
    variants = [json.dumps(own, sort_keys=True) for own in settings]
    encodings = dict.fromkeys(run.encoding for run in runs)
    names: dict[str, set[str]] = {}
    for run, variant in zip(runs, variants, strict=True):
        name = run.name if variants.count(variant) == 1 else run.name.removesuffix(f"-{run.seed}")
        names.setdefault(variant, set()).add(name)
    unique = {variant: own.pop() for variant, own in names.items() if named and len(own) == 1}
    rows = {}
    for encoding in encodings:
        own = {
            variant: values
            for run, variant, values in zip(runs, variants, settings, strict=True)
            if run.encoding == encoding
        }
        for variant, label in zip(own, _differing_fields(list(own.values())), strict=True):
            rows[variant] = f"{encoding} ({', '.join(label)})" if label else encoding
            if len(own) > 1 and variant in unique and unique[variant] not in encodings.keys() - {encoding}:
                rows[variant] = unique[variant]
    return [dataclasses.replace(run, row=rows[variant]) for run, variant in zip(runs, variants, strict=True)]


@functools.cache
def _default_fields(kind: str) -> dict[str, Any]:
    """Defaults of the config with an encoding, for fields that are newer than a run."""
    config = Config() if kind not in ENCODINGS else dataclasses.replace(Config(), encoding=ENCODINGS[kind]())
    return flatten_dict(to_dict(config), ".")


def _differing_fields(variants: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns "field=value" of each variant for fields in which it differs from most variants."""
    names = dict.fromkeys(name for variant in variants for name in variant)
    values = {name: [format_value(own[name]) if name in own else UNSET for own in variants] for name in names}
    values = {name: found for name, found in values.items() if len(set(found)) > 1}
    labels: list[list[str]] = [[] for _ in variants]
    for name, found in values.items():
        (usual, count), (_, second) = collections.Counter(found).most_common(2)
        for label, value in zip(labels, found, strict=True):
            if value != usual or count == second:
                label.append(f"{_short_name(name, values)}={value}")
    return labels


def _short_name(name: str, among: Sequence[str]) -> str:
    """Returns a dotted name without its section, where no other name has the same end."""
    end = name.partition(".")[2]
    others = [other for other in among if other != name]
    return name if not end or any(f".{other}".endswith(f".{end}") for other in others) else end


def _read_sweep_trials(workdir: AnyPath) -> dict[str, dict[str, Any]] | None:
    """Returns the trials in sweep.json by name, None without the file."""
    path = workdir / SWEEP_FILE
    if not path.exists():
        return None
    trials = parse_object(path.read_bytes(), str(path), {"points": dict})["points"]
    for name, trial in trials.items():
        trial["settings"] = checked_config(get_field(trial, "settings"), f"{path}, point '{name}',")
    return trials


def _deciding_trials(trials: dict[str, dict[str, Any]], path: AnyPath) -> set[str]:
    """Returns the names of trials that decide fields of others. Raises: InputError: some are not in the record."""
    try:
        named = {
            run
            for trial in trials.values()
            for best in trial.get("best", {}).values()
            for run in (*best["runs"], *filter(None, [best.get("base")]))
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not say which runs decide: it is not as this package writes it") from error
    if lost := named - trials.keys():
        raise InputError(
            f"{path} has no point '{min(lost)}', which decides others: it is not as this package writes it"
        )
    return named


def _not_started(folder: AnyPath, trial: dict[str, Any]) -> Run:
    open_fields = trial.get("best", {}).keys() - trial.get("decided", {}).keys()
    config = unflatten_dict(flatten_dict(trial["settings"], ".") | dict.fromkeys(open_fields, UNDECIDED), ".")
    return Run(folder.name, config, [], {}, None, None, _failure(folder), started=False)


def _failure(folder: AnyPath) -> str:
    """Returns the reason in the last line of a failed run's log, "" of a run that did not fail."""
    path = folder / LOG_FILE
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1].removeprefix(FAILED) if lines and lines[-1].startswith(FAILED) else ""
