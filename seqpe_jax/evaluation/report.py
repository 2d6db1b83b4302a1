"""Reads the folders of runs and writes their report: tables, plots, CSV."""

import dataclasses
import json
import pathlib
import statistics
from typing import Any

import numpy as np

from seqpe_jax.errors import InputError
from seqpe_jax.evaluation import plots, tables

COMPARED = ("steps", "batch_size", "seed", "data.name", "data.length", "data.paths", "data.tokenizer")


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds; parts that are not there are empty.

    Attributes:
      name: of the folder; config: nested dicts; metrics: objects of metrics.jsonl.
      evaluation: as `evaluate --output` writes it, or {}; similarity: arrays of similarity.npz, or None.
    """

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    similarity: dict[str, np.ndarray] | None

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
        return self.metrics[-1]["time"] if self.metrics else None

    @property
    def tokens_per_second(self) -> float | None:
        """Median of the reported rates."""
        rates = [line["train/tokens_per_second"] for line in self.metrics if "train/tokens_per_second" in line]
        return statistics.median(rates) if rates else None


def read_run(folder: pathlib.Path) -> Run:
    """Returns a run's folder as a `Run`. Raises: InputError for a file that cannot be read."""
    metrics = []
    path = folder / "metrics.jsonl"
    if path.exists():
        for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
            if line.endswith("\n"):  # a run that is being written may end in half a line
                metrics.append(_json(line, f"{path}, line {number}"))
    evaluation, similarity = folder / "evaluation.json", folder / "similarity.npz"
    arrays = None
    if similarity.exists():
        try:
            arrays = dict(np.load(similarity))
        except (OSError, ValueError) as error:
            raise InputError(f"{similarity} cannot be read ({error}): evaluate the run again") from error
    return Run(
        folder.resolve().name,
        _json((folder / "config.json").read_text(), str(folder / "config.json")),
        metrics,
        _json(evaluation.read_text(), str(evaluation)) if evaluation.exists() else {},
        arrays,
    )


def find_runs(workdir: str | pathlib.Path) -> list[Run]:
    """Returns the run of a folder, or the runs of its subfolders, SeqPE first.

    Raises:
      InputError: there is no run.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"no such directory: {workdir} (--workdir takes a run's folder, or a folder of runs)")
    folders = [workdir] if (workdir / "config.json").exists() else sorted(workdir.iterdir())
    runs = [read_run(folder) for folder in folders if (folder / "config.json").exists()]
    if not runs:
        raise InputError(f"{workdir} holds no run: neither it nor a folder in it has a config.json as `train` writes it")
    return sorted(runs, key=lambda run: (run.encoding != "seqpe", run.name))


def write_report(workdir: str | pathlib.Path, output: str | pathlib.Path) -> str:
    """Writes report.md, results.csv and the plots; returns the main table as markdown.

    Raises:
      InputError: see `find_runs`.
    """
    runs = find_runs(workdir)
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    bits = any("bits_per_byte" in result for run in runs for result in run.results)
    main = tables.by_length(runs, "bits_per_byte" if bits else "perplexity")
    parts = [f"# {pathlib.Path(workdir).resolve().name}\n"]
    parts += [f"> The runs differ in {line}\n" for line in differences(runs)]
    if bits:
        parts.append("## Bits per byte by evaluated length (lower is better)\n\n" + main)
    parts.append("## Perplexity by evaluated length\n\n" + tables.by_length(runs, "perplexity"))
    if any("word_perplexity" in result for run in runs for result in run.results):
        parts.append("## Word perplexity by evaluated length\n\n" + tables.by_length(runs, "word_perplexity"))
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
            parts.append(f"## Likeness of position vectors: {run.name}\n\n![Likeness of position vectors]({name})\n")
    (output / "report.md").write_text("\n".join(parts))
    (output / "results.csv").write_text(tables.results_csv(runs))
    return main


def differences(runs: list[Run]) -> list[str]:
    """Returns one line for each field that should be equal for runs to be compared, and is not."""
    lines = []
    for field in COMPARED:
        values = {}
        for run in runs:
            value = run.config
            for key in field.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            values.setdefault(json.dumps(value), []).append(run.name)
        if len(values) > 1:
            lines.append(f"{field}: " + "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items()))
    return lines


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from error
