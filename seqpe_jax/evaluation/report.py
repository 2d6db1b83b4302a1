"""Reads the folders of runs and writes their report: tables, plots, CSV."""

import dataclasses
import json
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
COMPARED = ("steps", "batch_size", "data.name", "data.length", "data.paths", "data.tokenizer")
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
      evaluation: as `evaluate --output` writes it, or {}; similarity: arrays of similarity.npz, or None.
      row: the run's row in tables; runs that differ in the seed alone share it.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    similarity: dict[str, np.ndarray] | None
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
    def training_length(self) -> int:
        """Tokens of a training window."""
        return self.config["data"]["length"]

    @property
    def results(self) -> list[dict[str, Any]]:
        """Evaluation results, one per length."""
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
    def tokens_per_second(self) -> float | None:
        """Median of the reported rates."""
        rates = [line["train/tokens_per_second"] for line in self.metrics if "train/tokens_per_second" in line]
        return statistics.median(rates) if rates else None


def read_run(folder: pathlib.Path) -> Run:
    """Returns a run's folder as a `Run`. Raises: InputError for a file that cannot be read."""
    config = _object(
        (folder / "config.json").read_bytes(), str(folder / "config.json"),
        {"seed": int, "data.length": int, "encoding.kind": str},
    )  # fmt: skip
    return Run(folder.resolve().name, config, read_metrics(folder), _evaluation(folder), _similarity(folder))


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
    bits = any("bits_per_byte" in result for run in runs for result in run.results)
    evaluated = any(run.results for run in runs)
    main = tables.by_length(runs, "bits_per_byte" if bits else "perplexity") if evaluated else NOT_EVALUATED
    parts = [f"# {pathlib.Path(workdir).resolve().name}\n", *(f"> {note}\n" for note in notes(runs))]
    if not evaluated:
        parts.append(NOT_EVALUATED)
    if bits:
        parts.append("## Bits per byte by evaluated length (lower is better)\n\n" + main)
    if evaluated:
        title = "## Perplexity by evaluated length (lower is better)\n\n"
        parts.append(title + tables.by_length(runs, "perplexity"))
    if any("word_perplexity" in result for run in runs for result in run.results):
        title = "## Word perplexity by evaluated length (lower is better)\n\n"
        parts.append(title + tables.by_length(runs, "word_perplexity"))
    parts.append("## Cost\n\n" + tables.cost(runs))
    for name, title, draw in (
        ("extrapolation", "Past the training length", plots.extrapolation),
        ("training_curves", "Training", plots.training_curves),
        ("loss_by_position", "Loss by place in the longest window", plots.loss_by_position),
    ):
        if draw(runs, output / f"{name}.png"):
            parts.append(f"## {title}\n\n![{title}]({name}.png)\n")
    for run in runs:
        name = f"similarity_{run.name}.png"
        if plots.similarity(run, output / name):
            title = f"Likeness of position vectors: {run.name}"
            parts.append(f"## {title}\n\n![{title}]({urllib.parse.quote(name)})\n")
    (output / "report.md").write_text("\n".join(parts))
    (output / "results.csv").write_text(tables.results_csv(runs))
    return main


def notes(runs: list[Run]) -> list[str]:
    """Returns what a reader must know before comparing the runs: where they differ, what is unfinished or stale."""
    lines = [f"The runs differ in {line}" for line in differences(runs)]
    for run in runs:
        planned, done, at = run.config.get("steps"), run.steps_done, run.evaluation.get("step")
        if planned and done is not None and done < planned:
            lines.append(f"{run.name} is not finished: step {done} of {planned}")
        if at is not None and done is not None and at != done:
            lines.append(f"{run.name} was evaluated at step {at}, but its last reported step is {done}")
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
    for length in sorted({result["length"] for run in runs for result in run.results}):
        read = [(run.name, result) for run in runs for result in run.results if result["length"] == length]
        compare(f"tokens evaluated at length {length}", [(result.get("tokens"), name) for name, result in read])
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
        if not isinstance(result, dict) or not isinstance(result.get("length"), int):
            raise InputError(f"{path} has a result without a length: write it with `evaluate --output` of a text run")
    return evaluation


def _similarity(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    path = folder / "similarity.npz"
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("pivots", "positions", "cosine")}
        if arrays["cosine"].shape != (len(arrays["pivots"]), len(arrays["positions"])):
            raise ValueError(f"cosine has shape {arrays['cosine'].shape}")
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not an archive of pivots [n], positions [m] and cosine [n, m]: evaluate the run again"
        ) from error
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
