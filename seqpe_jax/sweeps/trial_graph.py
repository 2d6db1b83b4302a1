"""Trials of a sweep, which of them decide fields of others, and their record in sweep.json.

The record lets an edited sweep resume without mixing up its runs. Each trial is an object of "config", "overrides" and
"settings". One with open fields has "best": FIELD -> {"runs", "minimise" or "maximise"}, with "count" and "base" where
several runs are combined, and once they are decided "decided": FIELD -> {"value", "run" (the best), "metric", "measured"
(run -> number, null where it failed)}, with "combined" where the value comes from several runs. A run that begins with the
parameters of another has "begins_with": {"init_from": that run}, decided as {"value": folder, "run"}.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write, parse_json
from seqpe_jax.run_dir import SWEEP_FILE, RunDir
from seqpe_jax.sweeps.run import SweepRun
from seqpe_jax.sweeps.spec import BestOf, FolderOf, Range, Search, SweepFile, Trial, make_trial, value_of

Decision = dict[str, Any]  # of one field, as the record holds it
Decisions = dict[str, Decision]  # of one trial, by field


def record_trials(workdir: str | os.PathLike, sweep: SweepFile, trials: Sequence[Trial]) -> list[str]:
    """Writes trials into WORKDIR/sweep.json, next to those that are recorded.

    Args:
      workdir: folder of the sweep.
      sweep: the sweep file.
      trials: trials of `runs()`, or those of a search so far.

    Returns:
      Names of recorded trials that are not among these.

    Raises:
      InputError: the folder holds other things, the record is damaged, or trials or ranges have changed since they were
        recorded (each is named, with its fields).
    """
    workdir = as_path(workdir)
    record = _read(workdir)
    changed = []
    for trial in trials:
        old = record["points"].get(trial.name)
        if old is not None and (lines := _changes(workdir, trial, old)):
            changed.append(f"'{trial.name}' ({', '.join(lines)})")
    if changed:
        raise InputError(
            f"{sweep.path} has changed since {workdir} was begun, in {'; '.join(changed)}: give changed runs new names, "
            "or use a new --workdir"
        )
    search = _search_to_json(sweep.search)
    if record.get("search") and search:
        lines = [line for line in config.difference(record["search"], search) if not line.startswith("trials:")]
        if lines:
            raise InputError(
                f"{sweep.path}: SEARCH has changed since {workdir} was begun, in {'; '.join(lines)}: use a new --workdir"
            )
    added = {trial.name: _to_json(trial, record["points"].get(trial.name, {})) for trial in trials}
    missing = [name for name in record["points"] if name not in added]
    _write(workdir, {"sweep": sweep.path, "search": search or record.get("search"), "points": record["points"] | added})
    return missing


def recorded_decisions(workdir: str | os.PathLike) -> dict[str, Decisions]:
    """Returns trial name -> its recorded decisions. Raises: InputError: the record is damaged."""
    workdir = as_path(workdir)
    if not (workdir / SWEEP_FILE).exists():
        return {}
    return {name: trial["decided"] for name, trial in _read(workdir)["points"].items() if "decided" in trial}


class TrialGraph:
    """The runs of a sweep; a run with open fields depends on the runs that decide them.

    A decision leaves out runs that failed, and says so. It is recorded, and fixed once a dependent run has started; until
    then it is made again, since a failed run may have been repeated.

    Attributes:
      runs: name -> run, in the order of the sweep. Runs that decide fields of others are not evaluated on the test split.
      decisions: name -> recorded decisions.
    """

    def __init__(self, workdir: AnyPath, trials: Sequence[Trial]):
        """Creates the graph from trials and the record of a sweep folder. Raises: InputError: a damaged record."""
        self._workdir = workdir
        deciding = {
            name for trial in trials for best in trial.best.values() for name in best.runs if isinstance(best, BestOf)
        }
        self.runs = {trial.name: SweepRun(trial, workdir / trial.name, trial.name not in deciding) for trial in trials}
        self.decisions = recorded_decisions(workdir)
        self._final = {
            (field, best): self.decisions[name][field]
            for name, run in self.runs.items()
            if name in self.decisions and (run.folder / "config.json").exists()
            for field, best in run.trial.best.items()
        }

    def updated(self, runs: Sequence[SweepRun]) -> list[SweepRun]:
        """Returns the runs with the fields that have been decided since."""
        return [self.runs.get(run.name, run) for run in runs]

    def decide(self, pending: Collection[str] = ()) -> list[str]:
        """Decides open fields as far as possible and records the decisions.

        Args:
          pending: names of runs that will be executed, and have not ended even if they failed before.

        Returns:
          One line for each new decision.
        """
        new: dict[str, Decisions] = {}
        for name, run in self.runs.items():
            decisions = {
                field: self._final.get((field, best)) or self._decision(best, field, pending)
                for field, best in run.trial.best.items()
            }
            if decisions and all(decisions.values()):
                new[name] = decisions
                values = {field: one["value"] for field, one in decisions.items()}
                self.runs[name] = dataclasses.replace(run, trial=_closed(run.trial, values))
        if new:
            record = _read(self._workdir)
            for name, decisions in new.items():
                settings = config.to_dict(self.runs[name].trial.settings)
                record["points"][name] |= {"settings": settings, "decided": decisions}
            _write(self._workdir, record)
        lines: dict[str, list[str]] = {}
        for name, decisions in new.items():
            for field, one in decisions.items():
                if self.decisions.get(name, {}).get(field) != one:
                    lines.setdefault(describe_decision(field, one), []).append(name)
        self.decisions |= new
        return [f"{', '.join(names)}: {line}" for line, names in lines.items()]

    def check_selection(self, chosen: Sequence[SweepRun]) -> None:
        """Checks that chosen runs depend on no unfinished run outside the selection. Raises: InputError."""
        names = {run.name for run in chosen}
        for run in chosen:
            for field, best in run.trial.best.items():
                missing = [name for name in best.runs if name not in names and not self._has_ended(self.runs[name], ())]
                if missing and (field, best) not in self._final:
                    raise InputError(
                        f"'{run.name}' depends on {', '.join(missing)} (they select {field}): add them to --only or run "
                        "them first"
                    )

    def blocked_runs(self, runs: Sequence[SweepRun]) -> list[str]:
        """Returns one line for each group of blocked runs, with the runs that they depend on."""
        groups: dict[str, list[str]] = {}
        for run in self.updated(runs):
            for field, best in run.trial.best.items():
                unmeasured = [one for one in map(self.runs.get, best.runs) if not self._decides(one, best)]
                states = ", ".join(f"{one.name} ({self._state(one)})" for one in unmeasured)
                groups.setdefault(f"for {states} to decide {field}", []).append(run.name)
        return [f"{', '.join(names)} wait{'s' * (len(names) == 1)} {words}" for words, names in groups.items()]

    @staticmethod
    def _state(run: SweepRun) -> str:
        return "failed" if run.failure() else "not finished" if run.remaining_commands() else "measured no number"

    def _decision(self, best: BestOf | FolderOf, field: str, pending: Collection[str]) -> Decision | None:
        """Decision on a field; None while runs are under way, and where all failed."""
        if isinstance(best, FolderOf):
            source = self.runs[best.run]
            return None if source.remaining_commands() else {"value": str(source.folder), "run": best.run}
        runs = [self.runs[name] for name in dict.fromkeys((*best.runs, *filter(None, [best.base])))]
        if not all(self._has_ended(run, pending) for run in runs):
            return None
        measured = {run.name: self._measured(run, best) for run in runs}
        ranked = sorted(
            (name for name in best.runs if measured[name] is not None),  # sorted keeps the order of equal ones
            key=lambda name: measured[name],
            reverse=bool(best.maximise),
        )
        if not ranked:
            return None
        chosen, value = ranked[0], self._value(ranked[0], field)
        if best.base:
            plain = self._value(best.base, field)
            changed = [name for name in ranked[: best.count] if self._value(name, field) != plain]
            chosen = changed[0] if changed else best.base
            value = self._value(chosen, field)
        decision = {"value": value, "run": chosen, "metric": best.metric, "measured": measured}
        return decision | ({"combined": True} if best.base else {})

    def _value(self, name: str, field: str) -> Any:
        return value_of(self.runs[name].trial.settings, field)

    @staticmethod
    def _has_ended(run: SweepRun, pending: Collection[str]) -> bool:
        return not run.remaining_commands() or (run.name not in pending and run.failure() is not None)

    def _decides(self, run: SweepRun, best: BestOf | FolderOf) -> bool:
        """True if a run has what decides a field."""
        return not run.remaining_commands() if isinstance(best, FolderOf) else self._measured(run, best) is not None

    @staticmethod
    def _measured(run: SweepRun, best: BestOf) -> float | None:
        """Metric of a finished run at its last step; None without it, or where it is not finite."""
        if run.remaining_commands():
            return None
        values = [line.get(best.metric) for line in RunDir(run.folder).read_metrics() if line["step"] == run.steps]
        return next((value for value in values if value is not None and math.isfinite(value)), None)


def describe_decision(field: str, decision: Decision) -> str:
    """Returns a decision in words.

    Args:
      field: dotted field.
      decision: its value, and what it is based on.
    """
    value, run = decision["value"], decision["run"]
    if "metric" not in decision:
        return f"{field}={value} ({run} is finished)"
    failed = [name for name, measured in decision["measured"].items() if measured is None]
    left_out = f"; without {', '.join(failed)}, which failed" if failed else ""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    if decision.get("combined"):
        number = decision["measured"][run]
        return f"{field}={shown} (as in {run}, {decision['metric']} {number if number is None else format(number, '.4g')}{left_out})"
    return f"{field}={shown} ({run} has the best {decision['metric']}, {decision['measured'][run]:.4g}{left_out})"


def _closed(trial: Trial, values: Mapping[str, Any]) -> Trial:
    """Returns a trial with its open fields decided.

    A decided value that the config has anyway is no option of the run: options that a config does not read are refused,
    such as a gate's initial bias where the best run has no gate.
    """
    needed = {**trial.overrides, **values}
    closed = make_trial(trial.name, trial.config, needed)
    for field in values:
        fewer = {name: value for name, value in needed.items() if name != field}
        with contextlib.suppress(InputError):  # not a config without this value, so it is needed
            if make_trial(trial.name, trial.config, fewer).settings == closed.settings:
                needed = fewer
    return make_trial(trial.name, trial.config, needed)


def _read(workdir: AnyPath) -> dict[str, Any]:
    """Returns the record of a folder, an empty one for an empty or missing folder."""
    path = workdir / SWEEP_FILE
    if not path.exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise InputError(f"workdir {workdir} holds other things, but no {SWEEP_FILE}: choose a new or empty folder")
        return {"points": {}}
    try:
        record = parse_json(path.read_bytes())
        complete = all({"config", "overrides", "settings"} <= trial.keys() for trial in record["points"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{path} is damaged: remove it, and it is written anew; finished runs stay finished")
    return record


def _write(workdir: AnyPath, record: dict[str, Any]) -> None:
    """Writes the record atomically, with one line for each trial."""
    trials = ",\n".join(f"  {json.dumps(name)}: {json.dumps(trial)}" for name, trial in record["points"].items())
    head = "".join(f' "{name}": {json.dumps(record[name])},\n' for name in ("sweep", "search"))
    atomic_write(workdir / SWEEP_FILE, "{\n" + head + ' "points": {\n' + trials + "\n }\n}\n")


def _to_json(trial: Trial, old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a trial as the record holds it, with the decisions of its old entry."""
    entry = {"config": trial.config, "overrides": trial.overrides, "settings": config.to_dict(trial.settings)}
    entry |= {name: value for name, value in _open_to_json(trial).items() if value}
    if "decided" in old:
        entry |= {"settings": old["settings"], "decided": old["decided"]}
    return entry


def _open_to_json(trial: Trial) -> dict[str, dict[str, Any]]:
    """Returns what decides the open fields of a trial, as the record holds it."""
    begins = {field: one.run for field, one in trial.best.items() if isinstance(one, FolderOf)}
    best = {field: _best_to_json(one) for field, one in trial.best.items() if isinstance(one, BestOf)}
    return {"best": best, "begins_with": begins}


def _best_to_json(best: BestOf) -> dict[str, Any]:
    combined = {"count": best.count, "base": best.base} if best.base else {}
    return {"runs": list(best.runs), "minimise" if best.minimise else "maximise": best.metric, **combined}


def _search_to_json(search: Search | None) -> dict[str, Any] | None:
    if search is None:
        return None
    ranges = {
        field: dataclasses.asdict(values) if isinstance(values, Range) else list(values)
        for field, values in search.ranges.items()
    }
    values = {name: getattr(search, name) for name in ("minimise", "maximise", "trials")}
    return json.loads(json.dumps(values | {"ranges": ranges, "overrides": dict(search.overrides)}))


def _changes(workdir: AnyPath, trial: Trial, old: dict[str, Any]) -> list[str]:
    """Returns the differences between a trial and its record; fields of later versions have their defaults there."""
    try:
        before = config.to_dict(config.from_dict(old["settings"]))
    except InputError as error:
        raise InputError(
            f"{workdir / SWEEP_FILE}: the recorded run '{trial.name}' cannot be read by this version: {error}"
        ) from error
    decided = tuple(f"{field}: " for field in old.get("decided", {}))
    lines = config.difference(before, config.to_dict(trial.settings))
    open_fields = _open_to_json(trial)
    others = [line for name, now in open_fields.items() for line in config.difference(old.get(name, {}), now)]
    return others + [line for line in lines if not line.startswith(decided)]
