"""Reads the folders of runs and writes their report: tables, plots, CSV."""

import dataclasses
import json
import math
import pathlib
import statistics
import urllib.parse
import zipfile
from typing import Any

import numpy as np

from seqpe_jax.errors import InputError
from seqpe_jax.evaluation import plots, tables
from seqpe_jax.runtime.progress import read_metrics

# Equal in all runs, or their numbers do not compare.
COMPARED = ("steps", "batch_size", "data.name", "data.length", "data.size", "data.paths", "data.tokenizer")
# Tables of a report: data -> metric, title, whether more is better.
TABLES = {
    "text": (
        ("bits_per_byte", "Bits per byte by evaluated length (lower is better)", False),
        ("perplexity", "Perplexity by evaluated length (lower is better)", False),
        ("word_perplexity", "Word perplexity by evaluated length (lower is better)", False),
    ),
    "questions": (
        ("contains", "Answers found, in percent, by evaluated length (higher is better)", True),
        ("exact_match", "Exact match in percent by evaluated length (higher is better)", True),
        ("f1", "F1 in percent by evaluated length (higher is better)", True),
        ("answer_perplexity", "Perplexity of the answers by evaluated length (lower is better)", False),
    ),
    "images": (
        ("top1", "Top-1 accuracy in percent by evaluated size (higher is better)", True),
        ("top5", "Top-5 accuracy in percent by evaluated size (higher is better)", True),
    ),
}
QUESTIONS = ("stdlib_qa", "squad_long", "qa_jsonl")  # values of data.name
# May differ between runs that are repetitions of each other: seed, and what changes where a run runs.
REPEATED = ("seed", "eval", "checkpoint", "mesh", "report", "profile")

NOT_EVALUATED = (
    "No run has been evaluated yet: `python -m seqpe_jax.evaluate --checkpoint=RUN --output=RUN/evaluation.json`\n"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds; parts that are not there are empty.

    Attributes:
      name: of the folder; config: nested dicts; metrics: objects of metrics.jsonl.
      evaluation: as `evaluate --output` writes it, or {}; its results know their "extent", the length or the side of a
        square of that area, and their "label".
      similarity, attention: arrays of similarity.npz and attention.npz, or None.
      row: the run's row in tables; runs that differ in the seed alone share it.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    similarity: dict[str, np.ndarray] | None
    attention: dict[str, np.ndarray] | None
    row: str = ""

    @property
    def encoding(self) -> str:
        """Kind of the encoding."""
        return self.config["encoding"]["kind"]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config["seed"]

    @property
    def data(self) -> str:
        """What the run reads: "text", "questions" or "images"."""
        if self.config["data"].get("name") in QUESTIONS:
            return "questions"
        return "images" if self.config["data"].get("size") else "text"

    @property
    def training(self) -> dict[str, Any]:
        """Extent and label of a training example, as of the results."""
        data = self.config["data"]
        return _scale({"size": data["size"][-2:]} if self.data == "images" else {"length": data["length"]})

    @property
    def results(self) -> list[dict[str, Any]]:
        """Evaluation results, one per length or size."""
        return self.evaluation.get("results", [])

    @property
    def parameters(self) -> int | None:
        """Number of parameters, once evaluated."""
        return self.evaluation.get("parameters")

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
        name = f"train/{tables.UNITS[self.data]}_per_second"
        rates = [line[name] for line in self.metrics if name in line]
        return statistics.median(rates) if rates else None


def read_run(folder: pathlib.Path) -> Run:
    """Returns a run's folder as a `Run`. Raises: InputError for a file that cannot be read."""
    config = _object(
        (folder / "config.json").read_bytes(), str(folder / "config.json"),
        {"seed": int, "data.length": int, "encoding.kind": str},
    )  # fmt: skip
    return Run(
        folder.resolve().name, config, read_metrics(folder), _evaluation(folder), _similarity(folder), _attention(folder)
    )


def find_runs(workdir: str | pathlib.Path) -> list[Run]:
    """Returns the run of a folder, or the runs of its subfolders, SeqPE first.

    Raises:
      InputError: there is no run, or one has a file that cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"no such directory: {workdir} (--workdir takes a run's folder, or a folder of runs)")
    folders = [workdir] if (workdir / "config.json").exists() else sorted(workdir.iterdir())
    runs = [read_run(folder) for folder in folders if (folder / "config.json").exists()]
    if not runs:
        raise InputError(f"{workdir} holds no run: neither it nor a folder in it has a config.json that `train` wrote")
    return _rows(sorted(runs, key=lambda run: (run.encoding != "seqpe", run.name)))


def write_report(workdir: str | pathlib.Path, output: str | pathlib.Path) -> str:
    """Writes report.md, results.csv and the plots; returns the main table as markdown.

    Raises:
      InputError: see `find_runs`; or `output` is not a folder that can be written.
    """
    runs = find_runs(workdir)
    output = pathlib.Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={output} cannot be made a folder ({error.strerror}): choose another") from error
    parts = [f"# {pathlib.Path(workdir).resolve().name}\n", *(f"> {note}\n" for note in notes(runs))]
    shown = [
        (f"## {title}\n", tables.by_scale(alike, metric, more_is_better=more))
        for data, kinds in TABLES.items()
        for metric, title, more in kinds
        if (alike := [run for run in runs if run.data == data])
        and any(metric in result for run in alike for result in run.results)
    ]
    for title, table in shown or [("", NOT_EVALUATED)]:
        parts.append(f"{title}\n{table}" if title else table)
    parts.append("## Cost\n\n" + tables.cost(runs))
    for name, title, draw in (
        ("extrapolation", "Past the training length", plots.extrapolation),
        ("extrapolation_answers", "Answers past the training length", plots.extrapolation_answers),
        ("extrapolation_sizes", "Past the training size", plots.extrapolation_sizes),
        ("training_curves", "Training", plots.training_curves),
        ("loss_by_position", "Loss by place in the longest window", plots.loss_by_position),
    ):
        if draw(runs, output / f"{name}.png"):
            parts.append(f"## {title}\n\n![{title}]({name}.png)\n")
    for run in runs:
        for kind, title, draw in (
            ("answer_depth", "Answers by length and depth", plots.answer_depth),
            ("similarity", "Likeness of position vectors", plots.similarity),
            ("attention", "Where the class token looks", plots.attention),
        ):
            name = f"{kind}_{run.name}.png"
            if draw(run, output / name):
                parts.append(f"## {title}: {run.name}\n\n![{title}: {run.name}]({urllib.parse.quote(name)})\n")
    (output / "report.md").write_text("\n".join(parts))
    (output / "results.csv").write_text(tables.results_csv(runs))
    return shown[0][1] if shown else NOT_EVALUATED


def notes(runs: list[Run]) -> list[str]:
    """Returns what a reader must know before comparing the runs: where they differ, what is unfinished or stale."""
    lines = [f"The runs differ in {line}" for line in differences(runs)]
    for run in runs:
        planned, done, at = run.config.get("steps"), run.steps_done, run.evaluation.get("step")
        if planned and done is not None and done < planned:
            lines.append(f"{run.name} is not finished: step {done} of {planned}")
        if at is not None and done is not None and at != done:
            lines.append(f"{run.name} was evaluated at step {at}, but its last reported step is {done}")
    guessed = {run.evaluation["without_context"]["contains"] for run in runs if "without_context" in run.evaluation}
    lines += [f"Guessing without the passage finds {share:.1f}% of the answers" for share in sorted(guessed)]
    return lines


def differences(runs: list[Run]) -> list[str]:
    """Returns one line for each thing that should be equal for runs to be compared, and is not."""
    lines = []

    def compare(what: str, values: list[tuple[Any, str]]) -> None:
        names: dict[str, list[str]] = {}
        for value, name in values:
            names.setdefault(json.dumps(value), []).append(name)
        if len(names) > 1:
            lines.append(f"{what}: " + "; ".join(f"{value} ({', '.join(found)})" for value, found in names.items()))

    for field in COMPARED:
        compare(field, [(_field(run.config, field), run.name) for run in runs])
    rows = dict.fromkeys(run.row for run in runs)
    compare("seed", [(sorted(run.seed for run in runs if run.row == row), row) for row in rows])
    compare("evaluated split", [(run.evaluation["split"], run.name) for run in runs if "split" in run.evaluation])
    for label in dict.fromkeys(result["label"] for run in runs for result in run.results):
        read = [(run, result) for run in runs for result in run.results if result["label"] == label]
        for data, count in (("text", "tokens"), ("questions", "examples"), ("images", "examples")):
            values = [(result.get(count), run.name) for run, result in read if run.data == data]
            compare(f"{count} evaluated at {label}", values)
    return lines


def _rows(runs: list[Run]) -> list[Run]:
    """Names rows: by the encoding, and by the runs too where an encoding was trained in several ways."""
    settings = [json.dumps({key: run.config[key] for key in sorted(run.config.keys() - set(REPEATED))}) for run in runs]
    named = []
    for run, own in zip(runs, settings, strict=True):
        same = [other.name for other, theirs in zip(runs, settings, strict=True) if theirs == own]
        ways = {theirs for other, theirs in zip(runs, settings, strict=True) if other.encoding == run.encoding}
        row = run.encoding if len(ways) == 1 else f"{run.encoding} ({', '.join(same)})"
        named.append(dataclasses.replace(run, row=row))
    return named


def _evaluation(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    if not path.exists():
        return {}
    evaluation = _object(path.read_bytes(), str(path), {"results": list})
    for result in evaluation["results"]:
        try:
            result |= _scale(result)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} has a result without a length or size: write it with `evaluate --output`") from error
    return evaluation


def _scale(result: dict[str, Any]) -> dict[str, Any]:
    """Returns {"extent", "label"} of a length or a [height, width]."""
    if "length" in result:
        return {"extent": int(result["length"]), "label": str(result["length"])}
    height, width = result["size"]
    label = f"{height}" if height == width else f"{height}x{width}"
    return {"extent": math.sqrt(height * width), "label": label}


def _similarity(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    arrays = _arrays(folder / "similarity.npz", pivots=2, positions=2, cosine=2)
    if arrays and arrays["cosine"].shape != (len(arrays["pivots"]), len(arrays["positions"])):
        raise InputError(f"{folder / 'similarity.npz'}: cosine is not [pivots, positions]: evaluate the run again")
    return arrays


def _attention(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    return _arrays(folder / "attention.npz", images=4, attention=4)


def _arrays(path: pathlib.Path, **axes: int) -> dict[str, np.ndarray] | None:
    """Reads arrays that have at least so many axes each."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in axes}
        if any(arrays[name].ndim < count for name, count in axes.items()):
            raise ValueError({name: value.shape for name, value in arrays.items()})
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not an archive of {', '.join(axes)}: evaluate the run again") from error
    return arrays


def _field(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _object(text: bytes, where: str, fields: dict[str, type]) -> dict[str, Any]:
    """Parses a JSON object that must have some fields, given by dotted names."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    for field, kind in fields.items():
        if not isinstance(_field(value, field), kind):
            raise InputError(f"{where} has no {kind.__name__} '{field}': it is not as this package writes it")
    return value
