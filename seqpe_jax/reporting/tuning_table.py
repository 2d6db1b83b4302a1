"""Tables of a sweep's tuning runs: their metric for each value of the field that they decide."""

from typing import Any

from seqpe_jax.reporting.study import MAX_FIELD_TABLES, Run, Study, format_value, get_field, last_measured
from seqpe_jax.reporting.tables import MISSING, Cell, Table, number, row_heading, work_cells, work_header

BestOf = dict[str, Any]  # {"runs", "minimise" or "maximise"}, as sweep.json holds it
RATE, BEST_TWO = (
    "optimizer.learning_rate",
    "two",
)  # a field; the trial with the best two parts of `choose_parts_then_repeat`


def tuning_tables(study: Study) -> list[Table]:
    """Returns a table row x value for each decided field and metric; the chosen value is marked.

    Runs that failed or have not ended are missing. Rows that choose their parts, with `choose_parts_then_repeat`, come
    together in one table row x trial.
    """
    groups: dict[tuple[str, str, bool], dict[str, tuple[BestOf, Any]]] = {}
    chosen: dict[str, tuple[dict[str, BestOf], dict[str, Any]]] = {}
    for run in study.runs:
        trial = study.sweep_trials.get(run.name, {})
        if len(trial.get("best", {})) > MAX_FIELD_TABLES:
            chosen[run.row] = trial["best"], trial.get("decided", {})
            continue
        for name, best in trial.get("best", {}).items():
            key = (name, best.get("minimise") or best["maximise"], "maximise" in best)
            groups.setdefault(key, {})[run.row] = best, trial.get("decided", {}).get(name)
    tables = [_table(study, *key, rows) for key, rows in groups.items()]
    return [*tables, *([_parts_table(study, chosen)] if chosen else [])]


def _parts_table(study: Study, rows: dict[str, tuple[dict[str, BestOf], dict[str, Any]]]) -> Table:
    """Returns the table of rows that choose their parts by trials.

    Args:
      study: the runs.
      rows: row -> its open fields with their trials, and the decision on each field.
    """
    runs = {run.name: run for run in study.tuning_runs}
    kind = study.runs[0].data_kind
    lines, metrics, definitions = [], {}, {}
    for row, (best, decided) in rows.items():
        trials = next(iter(best.values()))
        metric = trials.get("minimise") or trials["maximise"]
        metrics[metric] = None
        measured = {name: last_measured(runs[name], metric) for name in trials["runs"]}
        known = {name: value for name, value in measured.items() if value is not None}
        winner = next((decision["run"] for decision in decided.values()), None)
        plain = trials["runs"][0]
        offered = _offered_parts(trials["runs"], runs, list(best))
        definitions = {part: _fields(changed) for part, changed in offered.items()} | definitions
        chosen = {field: one["value"] for field, one in decided.items()}
        changed = {field: value for field, value in chosen.items() if value != get_field(runs[plain].config, field)}
        taken = {part: own for part, own in offered.items() if own.keys() <= changed.keys()}
        as_offered = {field: value for own in taken.values() for field, value in own.items()}
        rest = {field: value for field, value in changed.items() if as_offered.get(field) != value}
        rate = rest.pop(RATE, chosen.get(RATE))
        choose = min if "minimise" in trials else max
        leading = winner or (choose(known, key=known.__getitem__) if known else None)
        so_far = f"so far {leading}" if leading else MISSING
        lines.append(
            [
                Cell(row),
                Cell(f"{len(known)} of {len(measured)}", len(known)),
                _number_cell(measured[plain]),
                _number_cell(known.get(leading)),
                Cell((" + ".join(taken) or "none") if winner else so_far),
                Cell(MISSING) if rate is None else Cell(format_value(rate), rate),
                Cell(_fields(rest) or MISSING),
                *work_cells(study.runs_of(row)),
            ]
        )
    note = (
        f"{' or '.join(metrics)} on the validation split at the last step of each trial; every row has the same number of "
        "trials. The first has no part, then come each part alone, the best two together, learning rates and constants, "
        "each from the best trial so far. The runs in all other tables have the fields of the best trial."
    )
    if definitions:
        note += f" Parts: {'; '.join(f'{part}: {fields}' for part, fields in definitions.items())}."
    return Table(
        "Parts and constants chosen",
        [
            row_heading(study),
            "trials",
            "without a part",
            "best",
            "parts",
            "learning rate",
            "other fields",
            *work_header(kind),
        ],
        lines,
        note,
        words=(4, 6),
    )


def _offered_parts(names: list[str], runs: dict[str, Run], fields: list[str]) -> dict[str, dict[str, Any]]:
    """Returns part -> the fields that it changes, of the trials that add one part to the first trial."""
    plain, *others = names
    parts = {}
    for name in others:
        part = name.removeprefix(f"{plain.removesuffix('-plain')}-")
        if part == BEST_TWO or "=" in part:  # later trials begin from the best so far
            break
        own = {field: get_field(runs[name].config, field) for field in fields}
        parts[part] = {field: value for field, value in own.items() if value != get_field(runs[plain].config, field)}
    return {part: changed for part, changed in parts.items() if changed}


def _fields(values: dict[str, Any]) -> str:
    """Returns fields without their section: `rotary_pairs=4`, `contrastive.weight=0.1`."""
    return ", ".join(f"{field.partition('.')[2]}={format_value(value)}" for field, value in values.items())


def _number_cell(value: float | None) -> Cell:
    return Cell(MISSING) if value is None else Cell(number(value, 4), value)


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
    one, two = last_measured(run, metric), last_measured(other, metric)
    return one is not None and (two is None or (one > two if higher_is_better else one < two))


def _cell(run: Run | None, metric: str, chosen: str) -> Cell:
    measured = last_measured(run, metric) if run else None
    return Cell(MISSING) if measured is None else Cell(number(measured, 4), measured, run.name == chosen)


def tuning_notes(study: Study) -> list[str]:
    """Returns one line for each tuning run that has not finished, with the rows that it decides.

    Rows that choose their parts by many trials have one line each.
    """
    lines = []
    runs = {run.name: run for run in study.tuning_runs}
    chosen: dict[str, list[str]] = {}
    waits: dict[str, dict[tuple[str, bool], list[str]]] = {}
    for row in study.rows:
        trial = study.sweep_trials.get(study.runs_of(row)[0].name, {})
        best = trial.get("best", {})
        if len(best) > MAX_FIELD_TABLES:
            chosen[row] = next(iter(best.values()))["runs"]
            continue
        for name, one in best.items():
            for run in one["runs"]:
                waits.setdefault(run, {}).setdefault((name, name in trial.get("decided", {})), []).append(row)
    for name, rows in waits.items():
        for (field, decided), own in rows.items():
            if runs[name].state != "finished":
                without = "was chosen without it" if decided else "waits for it"
                lines.append(f"{name} is missing: {runs[name].state}; {field} of {', '.join(own)} {without}")
    for row, trials in chosen.items():
        done = [name for name in trials if runs[name].state == "finished"]
        if len(done) < len(trials):
            lines.append(f"{row} has {len(done)} of its {len(trials)} trials")
    return lines
