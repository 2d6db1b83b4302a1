"""How the fields of a sweep of two stages were chosen: the runs of its first stage, which no other table counts."""

import math
from typing import Any

from seqpe_jax.reporting.study import Run, Study, field, shown
from seqpe_jax.reporting.tables import MISSING, Cell, Table, heading, number

Best = dict[str, Any]  # {"runs", "minimise" or "maximise"}, as sweep.json has it


def tuning_tables(study: Study) -> list[Table]:
    """Returns, for each field and the metric that decides it, row x tried value: what the runs of the first stage measured.

    The value that the row's own runs have is marked. A run that failed or has not ended is shown as missing.
    """
    found: dict[tuple[str, str, bool], dict[str, tuple[Best, Any]]] = {}
    for run in study.runs:
        point = study.points.get(run.name, {})
        for name, best in point.get("best", {}).items():
            key = (name, best.get("minimise") or best["maximise"], "maximise" in best)
            found.setdefault(key, {})[run.row] = best, point.get("decided", {}).get(name)
    return [_table(study, *key, rows) for key, rows in found.items()]


def _table(study: Study, name: str, metric: str, more: bool, rows: dict[str, tuple[Best, Any]]) -> Table:
    trials = {run.name: run for run in study.trials}
    values = {one: field(run.config, name) for one, run in trials.items()}
    deciding = dict.fromkeys(one for best, _ in rows.values() for one in best["runs"])
    columns = sorted(
        dict.fromkeys(values[one] for one in deciding),
        key=lambda value: value if isinstance(value, (int, float)) else 0,
    )
    lines, edges, several = [], [], False
    for row, (best, decided) in rows.items():
        by_value: dict[Any, Run] = {}
        for run in (trials[one] for one in best["runs"]):
            if _better(run, by_value.setdefault(values[run.name], run), metric, more):
                by_value[values[run.name]] = run
        several |= len(by_value) < len(best["runs"])
        chosen = decided["run"] if decided else ""
        cells = [_cell(by_value.get(value), metric, chosen) for value in columns]
        lines.append([Cell(row), *cells, Cell(shown(decided["value"]), decided["value"]) if decided else Cell(MISSING)])
        own = [value for value in columns if value in by_value]
        if decided and len(own) > 2 and decided["value"] in (own[0], own[-1]):
            edges.append(row)
    seeds = " or ".join(map(str, sorted({trials[one].seed for one in deciding})))
    note = (
        f"{metric} on the validation split at the last step, of one run each with seed {seeds}; "
        f"{'higher' if more else 'lower'} is better{', and the best of several runs is shown' * several}. The chosen value "
        "is that of the runs in all other tables."
    )
    if edges:
        note += f" At the end of what was tried, so that the best may lie beyond: {', '.join(edges)}."
    return Table(f"How {name} was chosen", [heading(study), *map(shown, columns), "chosen"], lines, note)


def _better(run: Run, other: Run, metric: str, more: bool) -> bool:
    """Whether a run measured something better than another one of the same value, or the other nothing."""
    one, two = _measured(run, metric), _measured(other, metric)
    return one is not None and (two is None or (one > two if more else one < two))


def _measured(run: Run, metric: str) -> float | None:
    """Returns what a run measured at its last step; None where that is missing or not finite."""
    found = [line[metric] for line in run.metrics if metric in line and line["step"] == run.steps_planned]
    return found[-1] if found and math.isfinite(found[-1]) else None


def _cell(run: Run | None, metric: str, chosen: str) -> Cell:
    measured = _measured(run, metric) if run else None
    return Cell(MISSING) if measured is None else Cell(number(measured, 4), measured, run.name == chosen)


def notes(study: Study) -> list[str]:
    """Returns a line for each run of the first stage that is not there, with the rows that it was to decide."""
    lines = []
    for run in study.trials:
        waits: dict[tuple[str, bool], list[str]] = {}
        for row in study.rows:
            point = study.points.get(study.of(row)[0].name, {})
            for name, best in point.get("best", {}).items():
                if run.name in best["runs"]:
                    waits.setdefault((name, name in point.get("decided", {})), []).append(row)
        for (name, decided), rows in waits.items():
            if run.state != "finished":
                without = "was chosen without it" if decided else "waits for it"
                lines.append(f"{run.name} is missing: {run.state}; {name} of {', '.join(rows)} {without}")
    return lines
