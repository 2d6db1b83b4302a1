"""Tables of a sweep's tuning runs: their metric for each value of the field that they decide."""

import math
from typing import Any

from seqpe_jax.reporting.study import Run, Study, format_value, get_field
from seqpe_jax.reporting.tables import MISSING, Cell, Table, number, row_heading

BestOf = dict[str, Any]  # {"runs", "minimise" or "maximise"}, as sweep.json holds it
MAX_FIELD_TABLES = 2  # a row with more open fields has chosen its parts by trials that differ in several of them


def tuning_tables(study: Study) -> list[Table]:
    """Returns a table row x value for each decided field and metric; the chosen value is marked.

    Runs that failed or have not ended are missing. Rows that choose their parts, with `choose_parts_then_repeat`, come
    together in one table row x trial.
    """
    groups: dict[tuple[str, str, bool], dict[str, tuple[BestOf, Any]]] = {}
    chosen: dict[str, tuple[BestOf, dict[str, Any]]] = {}
    for run in study.runs:
        trial = study.sweep_trials.get(run.name, {})
        if len(trial.get("best", {})) > MAX_FIELD_TABLES:
            chosen[run.row] = next(iter(trial["best"].values())), trial.get("decided", {})
            continue
        for name, best in trial.get("best", {}).items():
            key = (name, best.get("minimise") or best["maximise"], "maximise" in best)
            groups.setdefault(key, {})[run.row] = best, trial.get("decided", {}).get(name)
    tables = [_table(study, *key, rows) for key, rows in groups.items()]
    return [*tables, *([_parts_table(study, chosen)] if chosen else [])]


def _parts_table(study: Study, rows: dict[str, tuple[BestOf, dict[str, Any]]]) -> Table:
    """Returns the table of rows that choose their parts by trials.

    Args:
      study: the runs.
      rows: row -> its trials, and the decision on each field.
    """
    runs = {run.name: run for run in study.tuning_runs}
    lines, metrics = [], {}
    for row, (trials, decided) in rows.items():
        metric = trials.get("minimise") or trials["maximise"]
        metrics[metric] = None
        measured = {name: _measured(runs[name], metric) for name in trials["runs"]}
        known = {name: value for name, value in measured.items() if value is not None}
        winner = next((decision["run"] for decision in decided.values()), None)
        values = ", ".join(
            f"{field.rpartition('.')[2]}={format_value(each['value'])}" for field, each in decided.items()
        )
        plain = measured[trials["runs"][0]]
        lines.append(
            [
                Cell(row),
                Cell(f"{len(known)} of {len(measured)}", len(known)),
                Cell(MISSING) if plain is None else Cell(number(plain, 4), plain),
                Cell(number(known[winner], 4), known[winner]) if winner in known else Cell(MISSING),
                Cell(winner.removeprefix(f"{row}-") if winner else MISSING),
                Cell(values or MISSING),
            ]
        )
    note = (
        f"{' or '.join(metrics)} on the validation split at the last step of each trial; the first trial has no part. The runs "
        "in all other tables have the fields of the best trial."
    )
    return Table(
        "Parts and constants chosen",
        [row_heading(study), "trials", "without a part", "best", "trial", "fields of the best trial"],
        lines,
        note,
    )


def _table(study: Study, name: str, metric: str, higher_is_better: bool, rows: dict[str, tuple[BestOf, Any]]) -> Table:
    """Returns the table of one field.

    Args:
      study: the runs.
      name: dotted field.
      metric: metric that decides.
      higher_is_better: its direction.
      rows: row -> the runs that decide, and the decision or None.
    """
    runs = {run.name: run for run in study.tuning_runs}
    value_of = {run: get_field(runs[run].config, name) for run in runs}
    deciding = dict.fromkeys(run for best, _ in rows.values() for run in best["runs"])
    columns = sorted(
        dict.fromkeys(value_of[run] for run in deciding),
        key=lambda value: value if isinstance(value, (int, float)) else 0,
    )
    lines, at_edge, has_choice = [], [], False
    for row, (best, decision) in rows.items():
        by_value: dict[Any, Run] = {}  # the best run of each value
        for run in best["runs"]:
            value = value_of[run]
            if _is_better(runs[run], by_value.setdefault(value, runs[run]), metric, higher_is_better):
                by_value[value] = runs[run]
        has_choice |= len(by_value) < len(best["runs"])
        chosen = decision["run"] if decision else ""
        cells = [_cell(by_value.get(value), metric, chosen) for value in columns]
        decided = Cell(format_value(decision["value"]), decision["value"]) if decision else Cell(MISSING)
        lines.append([Cell(row), *cells, decided])
        own = [value for value in columns if value in by_value]
        if decision and len(own) > 2 and decision["value"] in (own[0], own[-1]):
            at_edge.append(row)
    seeds = " or ".join(map(str, sorted({runs[run].seed for run in deciding})))
    note = (
        f"{metric} on the validation split at the last step, of one run each with seed {seeds}; "
        f"{'higher' if higher_is_better else 'lower'} is better"
        f"{', and the best of several runs is shown' * has_choice}. The runs in all other tables have the chosen value."
    )
    if at_edge:
        note += f" At an end of the grid, so that the best value may lie outside it: {', '.join(at_edge)}."
    return Table(f"Choice of {name}", [row_heading(study), *map(format_value, columns), "chosen"], lines, note)


def _is_better(run: Run, other: Run, metric: str, higher_is_better: bool) -> bool:
    one, two = _measured(run, metric), _measured(other, metric)
    return one is not None and (two is None or (one > two if higher_is_better else one < two))


def _measured(run: Run, metric: str) -> float | None:
    """Metric of a run at its last step, None where it is missing or not finite."""
    values = [line[metric] for line in run.metrics if metric in line and line["step"] == run.steps_planned]
    return values[-1] if values and math.isfinite(values[-1]) else None


def _cell(run: Run | None, metric: str, chosen: str) -> Cell:
    measured = _measured(run, metric) if run else None
    return Cell(MISSING) if measured is None else Cell(number(measured, 4), measured, run.name == chosen)


def tuning_notes(study: Study) -> list[str]:
    """Returns one line for each tuning run that has not finished, with the rows that it decides."""
    lines = []
    for run in study.tuning_runs:
        waits: dict[tuple[str, bool], list[str]] = {}
        for row in study.rows:
            trial = study.sweep_trials.get(study.runs_of(row)[0].name, {})
            for name, best in trial.get("best", {}).items():
                if run.name in best["runs"]:
                    waits.setdefault((name, name in trial.get("decided", {})), []).append(row)
        for (name, decided), rows in waits.items():
            if run.state != "finished":
                without = "was chosen without it" if decided else "waits for it"
                lines.append(f"{run.name} is missing: {run.state}; {name} of {', '.join(rows)} {without}")
    return lines
