"""What finished runs of a sweep have measured, in one small file: a study goes on with it where the runs' folders are not.

The file is a JSON object: "shared" has the settings of the run that was kept first, by dotted name, and "runs" has for each
name the "settings" in which that run differs, the "metrics" lines of evaluations and of the last step, and "evaluation".
Losses by position, by which an evaluation is mostly as long as it is, and paths of this machine are left out.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

from seqpe_jax import config
from seqpe_jax.distributed.progress import METRICS_FILE, read_metrics
from seqpe_jax.errors import InputError
from seqpe_jax.files import EVALUATION_FILE, as_path, atomic_dir, atomic_write, parse_json
from seqpe_jax.sweeps.run import RESTORED, SweepRun, map_runs
from seqpe_jax.sweeps.trial_graph import TrialGraph
from seqpe_jax.trees import flat, nested

PARTS = {"settings": dict, "metrics": list, "evaluation": dict}  # of each run


class ResultsCache:
    """The file of a sweep's finished runs."""

    def __init__(self, path: str | os.PathLike):
        """Reads it, if it is there. Raises: InputError: it is none of these."""
        self._path = as_path(path)
        self._shared: dict[str, Any] = {}
        self._runs: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            return
        try:
            content = parse_json(self._path.read_bytes())
            self._shared, self._runs = content["shared"], content["runs"]
            good = isinstance(self._shared, dict) and all(
                isinstance(run[part], kind) for run in self._runs.values() for part, kind in PARTS.items()
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            good = False
        if not good:
            raise InputError(
                f"--results={path} holds no results of a sweep, or is damaged: name one that --results has written, or none"
            )
        self._shared = _renamed(self._shared)
        self._runs = {name: run | {"settings": _renamed(run["settings"])} for name, run in self._runs.items()}

    def restore(self, stages: TrialGraph) -> tuple[list[str], list[str]]:
        """Makes the folders of kept runs that have none, first of those that decide fields of others.

        Returns:
          The names of these runs, and a line for each decision that they led to.

        Raises:
          InputError: a kept run has other settings than the sweep's run of its name.
        """
        names: list[str] = []
        decided: list[str] = []
        while restored := [run.name for run in stages.runs.values() if self._restore(run)]:
            names += restored
            decided += stages.settle({run.name for run in stages.runs.values() if run.remaining_commands()})
        return names, decided

    def keep(self, runs: Iterable[SweepRun]) -> None:
        """Writes what finished runs have measured into the file, beside what is there; other runs are passed over."""
        runs = list(runs)
        passed_over = map_runs(runs, lambda run: run.restored or bool(run.remaining_commands()))
        found = {run.name: self._entry(run) for run, passed in zip(runs, passed_over, strict=True) if not passed}
        if any(self._runs.get(name) != entry for name, entry in found.items()):
            self._runs |= found
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in self._runs.items())
            atomic_write(self._path, f'{{\n "shared": {json.dumps(self._shared)},\n "runs": {{\n{lines}\n }}\n}}\n')

    def _entry(self, run: SweepRun) -> dict[str, Any]:
        settings = _leaves(run)
        self._shared = self._shared or settings
        differing = {name: value for name, value in settings.items() if self._shared.get(name) != value}
        lines = read_metrics(run.folder)
        last = lines[-1]["step"] if lines else 0  # says that the run is finished
        lines = [line for line in lines if line["step"] == last or any(name.startswith("eval/") for name in line)]
        evaluation = parse_json((run.folder / EVALUATION_FILE).read_bytes()) if run.evaluated else {}
        for name in ("checkpoint", "made_from"):  # of files of this machine
            evaluation.pop(name, None)
        for result in evaluation.get("results", []):
            result.pop("loss_by_position", None)
        return {"settings": differing, "metrics": lines, "evaluation": evaluation}

    def _restore(self, run: SweepRun) -> bool:
        """Makes a run's folder from what is kept of it; returns whether it did."""
        kept = self._runs.get(run.name)
        if kept is None or run.trial.best or (run.evaluated and not kept["evaluation"]):
            return False
        if run.folder.exists() and any(run.folder.iterdir()):
            return False
        where = f"--results={self._path}: run '{run.name}'"
        try:
            settings = config.to_dict(config.from_dict(nested(self._shared | kept["settings"], ".")))
        except InputError as error:
            raise InputError(f"{where} is none of this version: {error}") from error
        if lines := config.difference(settings, config.to_dict(run.trial.settings)):
            raise InputError(
                f"{where} is another one there ({', '.join(lines)}): give it a new name, or name a new file"
            )
        with atomic_dir(run.folder, "--workdir") as folder:
            (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in kept["metrics"]))
            if run.evaluated:
                (folder / EVALUATION_FILE).write_text(json.dumps(kept["evaluation"], indent=2))
            (folder / RESTORED).write_text(json.dumps({"step": run.steps, "from": str(self._path)}))
            (folder / "config.json").write_text(json.dumps(settings, indent=2))
        return True


def _renamed(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted name under the names of today, so that those of a run replace shared ones."""
    return {config.RENAMED.get(name, name): value for name, value in leaves.items()}


def _leaves(run: SweepRun) -> dict[str, Any]:
    """Returns the settings of a run by dotted name, as JSON reads them back."""
    return json.loads(json.dumps(flat(config.to_dict(run.trial.settings), ".")))
