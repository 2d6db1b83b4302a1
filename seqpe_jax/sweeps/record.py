"""What a sweep's folder remembers of its points, so that a sweep edited after it started mixes nothing up.

A point whose fields other runs decide has them under "best": FIELD -> {"runs", "minimise" or "maximise"}, and once they are
decided under "decided": FIELD -> {"value", "run" (the best), "metric", "measured" (run -> number, null where it failed)}.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write, parse_json
from seqpe_jax.sweeps.spec import BestOf, Range, Search, SweepFile, Trial

FILE = "sweep.json"

Decision = dict[str, Any]
Decisions = dict[str, Decision]  # of a point, by field


def remember(workdir: str | os.PathLike, sweep: SweepFile, points: tuple[Trial, ...]) -> list[str]:
    """Writes the points into WORKDIR/sweep.json beside those that are there; returns the names that the sweep has no more.

    Args:
      points: of the sweep's runs, or of a search so far.

    Raises:
      InputError: a folder of something else, a damaged record, points or ranges that changed since they were recorded
        (each named, with the fields).
    """
    workdir = as_path(workdir)
    kept = _read(workdir)
    changed = []
    for trial in points:
        old = kept["points"].get(trial.name)
        if old is not None and (lines := _differences(workdir, trial, old)):
            changed.append(f"'{trial.name}' ({', '.join(lines)})")
    if changed:
        raise InputError(
            f"{sweep.path} has changed since {workdir} was begun, in {'; '.join(changed)}: give changed points new names, "
            "or use a new --workdir"
        )
    search = _plain(sweep.search)
    if kept.get("search") and search:
        lines = config.difference(kept["search"], search)
        lines = [line for line in lines if not line.startswith("trials:")]
        if lines:
            raise InputError(
                f"{sweep.path}: SEARCH has changed since {workdir} was begun, in {'; '.join(lines)}: use a new --workdir"
            )
    told = {trial.name: _told(trial, kept["points"].get(trial.name, {})) for trial in points}
    gone = [name for name in kept["points"] if name not in told]
    _write(workdir, {"sweep": sweep.path, "search": search or kept.get("search"), "points": kept["points"] | told})
    return gone


def decisions(workdir: str | os.PathLike) -> dict[str, Decisions]:
    """Returns what has been decided, by the names of points. Raises: InputError: the record is damaged."""
    path = as_path(workdir)
    if not (path / FILE).exists():
        return {}
    return {name: trial["decided"] for name, trial in _read(path)["points"].items() if "decided" in trial}


def decide(workdir: str | os.PathLike, decided: Mapping[str, Decisions], points: Mapping[str, Trial]) -> None:
    """Writes decisions beside the points that they settle.

    Args:
      decided: by the names of points; points: these, with their fields as decided.
    """
    workdir = as_path(workdir)
    kept = _read(workdir)
    for name, own in decided.items():
        kept["points"][name] |= {"settings": config.to_dict(points[name].settings), "decided": own}
    _write(workdir, kept)


def _read(workdir: AnyPath) -> dict[str, Any]:
    path = workdir / FILE
    if not path.exists():
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise InputError(f"workdir {workdir} holds other things, but no {FILE}: choose a new or empty folder")
        return {"points": {}}
    try:
        kept = parse_json(path.read_bytes())
        complete = all({"config", "overrides", "settings"} <= trial.keys() for trial in kept["points"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{path} is damaged: remove it, and the points are recorded anew; finished runs stay finished")
    return kept


def _told(trial: Trial, old: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a point as the record has it; what was decided stays."""
    told = {"config": trial.config, "overrides": trial.overrides, "settings": config.to_dict(trial.settings)}
    if trial.best:
        told["best"] = {field: _plain_best(best) for field, best in trial.best.items()}
    if "decided" in old:
        told |= {"settings": old["settings"], "decided": old["decided"]}
    return told


def _plain_best(best: BestOf) -> dict[str, Any]:
    return {"runs": list(best.runs), "minimise" if best.minimise else "maximise": best.metric}


def _write(workdir: AnyPath, values: dict[str, Any]) -> None:
    """Writes the record, whole or not at all, with one line for each point."""
    points = ",\n".join(f"  {json.dumps(name)}: {json.dumps(trial)}" for name, trial in values["points"].items())
    head = "".join(f' "{name}": {json.dumps(values[name])},\n' for name in ("sweep", "search"))
    text = "{\n" + head + ' "points": {\n' + points + "\n }\n}\n"
    atomic_write(workdir / FILE, text)


def _settings(workdir: AnyPath, name: str, old: dict[str, Any]) -> config.Config:
    try:
        return config.from_dict(old["settings"])
    except InputError as error:
        raise InputError(f"{workdir / FILE}: the recorded run '{name}' is none of this version: {error}") from error


def _differences(workdir: AnyPath, trial: Trial, old: dict[str, Any]) -> list[str]:
    before = config.to_dict(
        _settings(workdir, trial.name, old)
    )  # fields that a later version added have their defaults
    now = config.to_dict(trial.settings)
    best = {field: _plain_best(one) for field, one in trial.best.items()}
    lines = config.difference(old.get("best", {}), best)
    decided = tuple(f"{field}: " for field in old.get("decided", {}))
    return lines + [line for line in config.difference(before, now) if not line.startswith(decided)]


def _plain(search: Search | None) -> dict[str, Any] | None:
    """Returns a search as JSON holds it."""
    if search is None:
        return None
    ranges = {
        field: dataclasses.asdict(values) if isinstance(values, Range) else list(values)
        for field, values in search.ranges.items()
    }
    values = {name: getattr(search, name) for name in ("minimise", "maximise", "trials")}
    return json.loads(json.dumps(values | {"ranges": ranges, "overrides": dict(search.overrides)}))
