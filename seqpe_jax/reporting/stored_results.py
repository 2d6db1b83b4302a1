"""A study read from the results file of its sweep (`sweep --results`), without the folders of its runs.

The file is a JSON object. "shared" holds the settings of the first run by dotted field; "runs" holds for each run the
"settings" that differ, the "metrics" lines of evaluations and of the last step, and its "evaluation". "plan" holds each row
of the study: the names of its "runs" and, where trials decide some "fields" of these, the names of the "trials" and the
metric that they "minimise" or "maximise". Files of older versions have no plan.
"""

import dataclasses
import os
from typing import Any

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, parse_json
from seqpe_jax.reporting.load_run import check_evaluation, checked_config, get_field
from seqpe_jax.reporting.study import Run, Study, last_measured
from seqpe_jax.trees import unflatten_dict

ENTRY_PARTS = {"settings": dict, "metrics": list, "evaluation": dict}  # of each run
PLAN_PARTS = {"runs": list, "fields": list, "trials": list}  # of each row


@dataclasses.dataclass
class StoredResults:
    """Content of a results file.

    Attributes:
      shared: settings that runs have unless their own differ, by dotted field.
      runs: run name -> "settings", "metrics" and "evaluation".
      plan: row -> "runs", "fields", "trials" and the metric; {} in files of older versions.
    """

    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    plan: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def settings_of(self, name: str) -> dict[str, Any]:
        """Returns the nested config of a run, without shared fields that its encoding does not have."""
        own = self.runs[name]["settings"]
        kind = (self.shared | own).get("encoding.kind")
        shared = {field: value for field, value in self.shared.items() if not _is_foreign(field, kind)}
        return unflatten_dict(shared | own, ".")


def _is_foreign(field: str, kind: Any) -> bool:
    """Returns whether other encodings have a field, by its dotted name, and this kind has not."""
    section, _, name = field.partition(".")
    known = section == "encoding" and kind in config.ENCODINGS
    return known and bool(config.kinds_with(name)) and not config.ENCODINGS[kind].has(name)


def read_results(path: str | os.PathLike) -> StoredResults:
    """Reads a results file, with current names of config fields.

    Args:
      path: JSON file.

    Raises:
      InputError: no such file, or another one.
    """
    file = as_path(path)
    if not file.exists():
        raise InputError(f"no such file: {path} (--results takes a JSON file that `sweep --results` has written)")
    try:
        content = parse_json(file.read_bytes())
        shared, runs, plan = content["shared"], content["runs"], content.get("plan", {})
        valid = isinstance(shared, dict) and all(
            isinstance(entry[part], kind)
            for entries, parts in ((runs, ENTRY_PARTS), (plan, PLAN_PARTS))
            for entry in entries.values()
            for part, kind in parts.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise InputError(
            f"--results={path} holds no results of a sweep, or is damaged: name one that --results has written, or none"
        )
    runs = {name: run | {"settings": _with_current_names(run["settings"])} for name, run in runs.items()}
    return StoredResults(_with_current_names(shared), runs, plan)


def _with_current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted field under current names, so that those of a run replace shared ones."""
    return {config.RENAMED.get(name, name): value for name, value in settings.items()}


def read_stored_study(path: str | os.PathLike) -> Study:
    """Reads a study from its results file.

    Args:
      path: JSON file with a plan.

    Returns:
      The study, with the rows of the plan. Missing runs of a row have the settings of its best trial so far; rows without
      any run in the file are only named, in `Study.not_begun`.

    Raises:
      InputError: no such file, another one, one without a plan or without runs.
    """
    stored = read_results(path)
    if not stored.plan:
        raise InputError(
            f"--results={path} does not say which trials belong to which row, as those of older versions: "
            "`sweep --sweep=FILE --workdir=DIR --results=FILE --status=true` adds it"
        )
    found = {name: _stored_run(path, stored, name) for name in stored.runs}
    runs, tuning_runs, sweep_trials, not_begun = [], [], {}, []
    for row, planned in stored.plan.items():
        own = [name for name in (*planned["trials"], *planned["runs"]) if name in found]
        if not own:
            not_begun.append(row)
            continue
        winner = _winner(planned, found)
        settings = found[winner or own[0]].config
        for name in planned["trials"]:
            trial = found.get(name) or _missing(name, settings)
            tuning_runs.append(dataclasses.replace(trial, is_tuning=True))
        best = {name: planned[name] for name in ("minimise", "maximise") if name in planned}
        best["runs"] = planned["trials"]
        for name in planned["runs"]:
            run = found.get(name) or _missing(name, settings)
            runs.append(dataclasses.replace(run, row=row))
            decided = {field: {"value": get_field(run.config, field), "run": winner} for field in planned["fields"]}
            sweep_trials[name] = {"best": dict.fromkeys(planned["fields"], best)}
            sweep_trials[name] |= {"decided": decided} if winner else {}
    if not runs:
        raise InputError(f"--results={path} has no run of its plan")
    runs.sort(key=lambda run: not run.row.startswith("seqpe"))
    return Study(as_path(path).stem, runs, tuning_runs, sweep_trials, not_begun)


def _winner(planned: dict[str, Any], found: dict[str, Run]) -> str:
    """Name of the best trial once all have ended, "" before; of equal ones the first.

    They have ended where runs of the row are there; trials that are missing then have failed.
    """
    metric = planned.get("minimise") or planned.get("maximise", "")
    measured = {name: last_measured(found[name], metric) for name in planned["trials"] if name in found}
    known = {name: value for name, value in measured.items() if value is not None}
    ended = len(measured) == len(planned["trials"]) or any(name in found for name in planned["runs"])
    if not known or not ended:
        return ""
    return (max if "maximise" in planned else min)(known, key=known.__getitem__)


def _stored_run(path: str | os.PathLike, stored: StoredResults, name: str) -> Run:
    entry, source = stored.runs[name], f"--results={path}: run '{name}'"
    settings = checked_config(stored.settings_of(name), source)
    evaluation = check_evaluation(entry["evaluation"], source) if entry["evaluation"] else {}  # {} of a trial
    return Run(name, settings, entry["metrics"], evaluation, None, None)


def _missing(name: str, settings: dict[str, Any]) -> Run:
    seed = name.rpartition("-")[2]
    own = settings | ({"seed": int(seed)} if seed.isdigit() else {})
    return Run(name, own, [], {}, None, None, started=False)
