"""Results file of a sweep (`--results`): measurements of finished runs, so that a sweep continues without their folders.

`reporting.stored_results` describes the file, and makes a report of it alone. Evaluations are stored without the long losses
by position and without paths of this machine.
"""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_dir, atomic_write, parse_json
from seqpe_jax.reporting.stored_results import StoredResults, read_results
from seqpe_jax.run_dir import EVALUATION_FILE, METRICS_FILE, RunDir
from seqpe_jax.sweeps.run import RESTORED_FILE, SweepRun, map_runs
from seqpe_jax.sweeps.spec import BestOf, FolderOf, Trial
from seqpe_jax.sweeps.trial_graph import TrialGraph
from seqpe_jax.trees import flatten_dict


class ResultsCache:
    """The results file of a sweep."""

    def __init__(self, path: str | os.PathLike, trials: Sequence[Trial] = ()):
        """Reads the file, if there is one.

        Args:
          path: JSON file.
          trials: runs of the sweep, as its file yields them; the file says which of them decide others.

        Raises:
          InputError: it is another file.
        """
        self._path = as_path(path)
        stored = read_results(path) if self._path.exists() else StoredResults()
        self._shared, self._runs, self._stored_plan = stored.shared, stored.runs, stored.plan
        self._plan = plan_of(trials) or stored.plan

    def restore(self, graph: TrialGraph) -> tuple[list[str], list[str]]:
        """Creates the missing folders of runs in the file, starting with runs that decide fields of others.

        Args:
          graph: runs of the sweep.

        Returns:
          The names of these runs, and one line for each decision that follows.

        Raises:
          InputError: the file holds a run of the same name with other settings.
        """
        names: list[str] = []
        decided: list[str] = []
        needed = self._needed_folders(graph)
        while restored := [run.name for run in graph.runs.values() if run.name not in needed and self._restore(run)]:
            names += restored
            decided += graph.decide({run.name for run in graph.runs.values() if run.remaining_commands()})
        return names, decided

    def _needed_folders(self, graph: TrialGraph) -> set[str]:
        """Returns the names of runs with whose checkpoints others begin that are not in the file: they are run again."""
        sources = {
            name: [one.run for one in run.trial.best.values() if isinstance(one, FolderOf)]
            for name, run in graph.runs.items()
        }
        needed: set[str] = set()
        missing = [name for name in sources if name not in self._runs]
        while missing:
            found = set(sources[missing.pop()]) - needed
            needed |= found
            missing += found
        return needed

    def update(self, runs: Iterable[SweepRun]) -> None:
        """Writes the results of finished runs into the file.

        Args:
          runs: runs of the sweep; those that are not finished are ignored.
        """
        runs = list(runs)
        ignored = map_runs(runs, lambda run: run.restored or bool(run.remaining_commands()))
        found = {run.name: self._entry(run) for run, skip in zip(runs, ignored, strict=True) if not skip}
        if any(self._runs.get(name) != entry for name, entry in found.items()) or self._plan != self._stored_plan:
            self._runs, self._stored_plan = self._runs | found, self._plan
            head = f' "shared": {json.dumps(self._shared)},\n'
            parts = [_block("runs", self._runs), *([_block("plan", self._plan)] if self._plan else [])]
            atomic_write(self._path, "{\n" + head + ",\n".join(parts) + "\n}\n")

    def _entry(self, run: SweepRun) -> dict[str, Any]:
        settings = json.loads(json.dumps(flatten_dict(_settings_of(run), ".")))  # tuples become lists
        self._shared = self._shared or settings
        differing = {name: value for name, value in settings.items() if self._shared.get(name) != value}
        lines = RunDir(run.folder).read_metrics()
        last = lines[-1]["step"] if lines else 0  # shows that the run is finished
        lines = [line for line in lines if line["step"] == last or any(name.startswith("eval/") for name in line)]
        evaluation = parse_json((run.folder / EVALUATION_FILE).read_bytes()) if run.evaluated else {}
        for name in ("checkpoint", "made_from"):  # of this machine
            evaluation.pop(name, None)
        for result in evaluation.get("results", []):
            for name in ("loss_by_position", "by_class", "confused", "confusion"):
                result.pop(name, None)
        return {"settings": differing, "metrics": lines, "evaluation": evaluation}

    def _restore(self, run: SweepRun) -> bool:
        """Creates the folder of a run; returns whether it was created."""
        entry = self._runs.get(run.name)
        open_fields = run.trial.best
        if any(not isinstance(one, FolderOf) for one in open_fields.values()):
            return False
        if entry is None or (run.evaluated and not entry["evaluation"]):
            return False
        if run.folder.exists() and any(run.folder.iterdir()):
            return False
        where = f"--results={self._path}: run '{run.name}'"
        try:
            stored = StoredResults(self._shared, self._runs)
            settings = config.to_dict(config.from_dict(stored.settings_of(run.name)))
        except InputError as error:
            raise InputError(f"{where} cannot be read by this version: {error}") from error
        wanted = _settings_of(run) | {field: one.run for field, one in open_fields.items()}
        if lines := config.difference(settings, wanted):
            raise InputError(
                f"{where} is another one there ({', '.join(lines)}): give it a new name, or name a new file"
            )
        with atomic_dir(run.folder, "--workdir") as folder:
            (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in entry["metrics"]))
            if run.evaluated:
                (folder / EVALUATION_FILE).write_text(json.dumps(entry["evaluation"], indent=2))
            (folder / RESTORED_FILE).write_text(json.dumps({"step": run.steps, "from": str(self._path)}))
            (folder / "config.json").write_text(json.dumps(settings, indent=2))
        return True


def _settings_of(run: SweepRun) -> dict[str, Any]:
    """Returns the config of a run; of a folder that it begins with in the same sweep, the name alone."""
    settings = config.to_dict(run.trial.settings)
    source = as_path(settings["init_from"]) if settings["init_from"] else None
    if source is not None and source.absolute().parent == as_path(run.folder).absolute().parent:
        settings["init_from"] = source.name
    return settings


def plan_of(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Returns the plan of a sweep: row -> its runs, and the trials that decide their open fields.

    A row is the name of a run without its seed. Its trials are left out where its fields are decided by different ones.

    Args:
      trials: runs of the sweep, as its file yields them.
    """
    open_fields = {
        trial.name: {field: best for field, best in trial.best.items() if isinstance(best, BestOf)} for trial in trials
    }
    deciding = {name for fields in open_fields.values() for best in fields.values() for name in best.runs}
    plan: dict[str, dict[str, Any]] = {}
    for trial in trials:
        if trial.name in deciding:
            continue
        row = plan.setdefault(
            trial.name.removesuffix(f"-{trial.settings.seed}"), {"runs": [], "fields": [], "trials": []}
        )
        row["runs"].append(trial.name)
        own = open_fields[trial.name]
        if len(set(own.values())) == 1:
            [best] = set(own.values())
            direction = "minimise" if best.minimise else "maximise"
            row |= {"fields": list(own), "trials": list(best.runs), direction: best.metric}
    return plan


def _block(name: str, entries: dict[str, Any]) -> str:
    """One key of the file, with one line for each entry."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
    return f' "{name}": {{\n{lines}\n }}'
