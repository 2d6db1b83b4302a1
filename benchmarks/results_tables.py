"""The tables and sentences of README.md and docs/ from the stored results of the studies; `results.py` is the command.

Each stands between its mark and `<!-- end of KIND -->`. STUDY is the name of a study, or FIRST+SECOND, with the rows of both.

- `<!-- results: STUDY METRIC [rows] -->`: a line for each row, or for those named (comma-separated, in that order), a
  column for each evaluated length or size, with means, intervals and tests over all rows of the study as a report has them
  (`seqpe_jax.reporting`), then parameters and FLOPs.
- `<!-- contexts: STUDY [rows] -->`: the same tokens under several contexts.
- `<!-- parts: STUDY -->`: the parts, learning rates and constants that trials chose.
- `<!-- trials: STUDY ROW METRIC ... -->`: the trials of one row, what each changes in the first, and its metrics on the validation split;
  ROW is "all" in a study of trials alone.
- `<!-- significance: STUDIES METRIC [labels]; ... -->`: for each length or size, or for those named, the row with the best mean,
  those that are significantly worse, those that tie with it, in the order of their means, and those that are not tested.
- `<!-- tasks: STUDY FIRST-LAST -->`: of a study of algorithmic tasks, a line for each encoding, a column for each task: right
  outputs in percent, the mean over input lengths FIRST to LAST, another column for inputs whose outputs are all right where a
  task has several, and how many runs are left.
- `<!-- steps: STUDY METRIC -->`: of a study with rows called NAME_STEPS, a line for each encoding and evaluated length, a
  column for each number of training steps.
- `<!-- seeds: NAME SPLIT -->`: docs/results/NAME.json, {ROW-SEED: {SPLIT@LENGTH: value}}: a line for each seed and row.
- `<!-- suites: NAME -->`: docs/results/NAME.json, the probes of `evaluate --suite` by length, which `results.py --suites` stores.
- `<!-- published: NAME STORED -->`: figures of others in docs/results/published.json, with the table that they were read in,
  and those of a model of ours.
- `<!-- headline: STUDY METRIC ROWS -->`: the plot of the study, the outcome for rows against the strongest other encoding,
  and how far a study has come that is not finished.
"""

import dataclasses
import json
import pathlib
import re
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from results_plots import ROWS
from stored_studies import (
    ROOT,
    STORED,
    WORK,
    by_steps,
    is_stored,
    metric_of,
    planned_studies,
    study_of,
    title,
)

from seqpe_jax.config import encoding_name
from seqpe_jax.data.registry import ALGORITHMIC_TASKS
from seqpe_jax.reporting import tables
from seqpe_jax.reporting.significance import (
    Comparison,
    outcome_sentence,
    outcomes,
    significance_tests,
    worse_cells,
)
from seqpe_jax.reporting.study import Study, format_value, get_field, last_measured
from seqpe_jax.reporting.tuning_table import tuning_tables

MARK = re.compile(
    r"(<!-- (results|contexts|parts|trials|significance|tasks|steps|seeds|suites|published|headline): ([^>]+) -->\n).*?(<!-- end of \2 -->)",
    re.DOTALL,
)
TASKS = {
    "study_text_fair": "text",
    "encoder_width": "text",
    "extend_context": "text",
    "study_questions": "questions",
    "study_images_fair": "images",
    "study_glyphs": "glyphs",
    "moving_digits": "video",
}
MAX_TIES = 4  # rows that tie of which a table of several studies gives the names; then it gives their number
# Sweeps that are not called as their studies, for the configs of runs that no docs/results/STUDY.json has.
SWEEPS = {"ablation_digits": "ablation"}


def pages() -> list[pathlib.Path]:
    """Returns the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table(name: str, key: str, rows: str = "") -> str:
    """Returns the markdown table of a metric of a stored study; rows: names, comma-separated, "" = all as they come."""
    if not is_stored(name):
        return "No row has been evaluated yet.\n"
    study = study_of(name)
    data, metric = metric_of(study, key)
    whole = tables.by_size(study, data, metric, worse_cells(significance_tests(study, data, metric)), work=True)
    _, extents = tables.values_of(study, data, metric)
    header = ["run", *(title(study, label) for label in extents), *whole.header[1 + len(extents) :]]
    lines = {row[0].text: row for row in whole.rows if not all(cell.missing for cell in row[1:])}
    wanted = [lines[row] for row in rows.split(",")] if rows else lines.values()
    return tables.markdown(tables.Table("", header, list(wanted)))


def contexts_table(name: str, rows: str = "") -> str:
    """Returns the markdown table of the same tokens under several contexts; rows: as in `table`."""
    if not is_stored(name):
        return "No row has been evaluated yet.\n"
    study = study_of(name)
    if rows:
        study = dataclasses.replace(study, runs=[run for row in rows.split(",") for run in study.runs_of(row)])
    found = tables.by_context(study)
    if found is None:
        return "No row has been evaluated yet.\n"
    lines = [row for row in found.rows if not all(cell.missing for cell in row[1:])]
    return tables.markdown(tables.Table("", found.header, lines)) + f"\n{tables.escape(found.note)}\n"


def parts_table(name: str) -> str:
    """Returns the markdown table of the parts that trials chose, its note, and how far the study has come."""
    study = study_of(name)
    found = tuning_tables(study)[-1]
    return f"{tables.markdown(found)}\n{tables.escape(found.note)}\n\n{_progress(study)}"


def trials_table(name: str, row: str, *metrics: str) -> str:
    """Returns the markdown table of the trials of a row: what each changes in the first one, and its metrics.

    Args:
      name: study.
      row: row of the study that chooses by trials; "all", the rows of a study of trials alone.
      metrics: those shown, as in `metrics.jsonl` without their `eval/`; the lowest value of each is bold.
    """
    study = study_of(name)
    if row == "all":
        trials, best = study.runs, {}
    else:
        best = study.sweep_trials[study.runs_of(row)[0].name]["best"]
        runs = {run.name: run for run in study.tuning_runs}
        trials = [runs[trial] for trial in next(iter(best.values()))["runs"]]
    measured = {metric: [last_measured(run, f"eval/{metric}") for run in trials] for metric in metrics}
    lowest = {
        metric: min((value for value in values if value is not None), default=None)
        for metric, values in measured.items()
    }
    rows = []
    for index, run in enumerate(trials):
        changed = [
            f"{field.partition('.')[2]}={format_value(value)}"
            for field in best
            if (value := get_field(run.config, field)) != get_field(trials[0].config, field)
        ]
        cells = [tables.Cell(run.name if row == "all" else ", ".join(changed) or "the first")]
        for metric, values in measured.items():
            value = values[index]
            text = tables.MISSING if value is None else f"{value:.4f}"
            cells.append(tables.Cell(text, value, best=value is not None and value == lowest[metric]))
        rows.append(cells)
    return tables.markdown(tables.Table("", ["trial", *metrics], rows))


def tasks_table(name: str, lengths: str) -> str:
    """Returns the markdown table of a study of algorithmic tasks.

    A task whose inputs have several outputs has a second column, of the inputs whose outputs are all right.

    Args:
      name: study.
      lengths: "FIRST-LAST", the input lengths whose mean is shown; each result has those above the one before it.
    """
    first, last = map(int, lengths.split("-"))
    if name not in planned_studies():
        return "No run has been evaluated yet.\n"
    study = study_of(name)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for run in (run for run in study.runs if run.evaluated):
        settings = run.config
        kind = encoding_name(settings["encoding"]["kind"], settings["encoding"].get("gate", "none"))
        positions = "random" if settings["eval"]["positions"] == "random" else "counted"
        own = found.setdefault((kind, positions), {})
        task = settings["data"]["task"]
        own[task] = mean_over_lengths(run.results, first, last, "accuracy")
        _, outputs = ALGORITHMIC_TASKS[task]
        if outputs(last) > 1:
            own[f"{task}, all"] = mean_over_lengths(run.results, first, last, "exact_match")
    if not found:
        return "No run has been evaluated yet.\n"
    names = list(dict.fromkeys(column for own in found.values() for column in own))
    best = {column: max(own[column] for own in found.values() if column in own) for column in names}
    rows = [
        [*map(tables.Cell, key), *(_percent_cell(own.get(column), best[column]) for column in names)]
        for key, own in found.items()
    ]
    done, planned = sum(run.evaluated for run in study.runs), len(study.runs) + len(study.not_begun)
    left = f"\n{done} of {planned} runs.\n" if done < planned else ""
    return tables.markdown(tables.Table("", ["encoding", "positions", *names], rows, words=(0, 1))) + left


def steps_table(name: str, metric: str) -> str:
    """Returns the markdown table of a metric by evaluated length, encoding and training steps; bold: the best of each."""
    if not is_stored(name):
        return "No row has been evaluated yet.\n"
    study = study_of(name)
    labels = {result["extent"]: result["label"] for run in study.runs for result in run.results}
    rows, columns = [], sorted({run.config["steps"] for run in study.runs if run.evaluated})
    for extent, label in sorted(labels.items()):
        own = {
            row: {steps: statistics.fmean(values) for steps, values in found.items()}
            for row, found in by_steps(study, metric, extent).items()
        }
        best = {steps: min(values[steps] for values in own.values() if steps in values) for steps in columns}
        for row, values in own.items():
            cells = [tables.Cell(row), tables.Cell(title(study, label))]
            for steps in columns:
                value = values.get(steps)
                text = tables.MISSING if value is None else f"{value:.3f}"
                cells.append(tables.Cell(text, value, best=value == best[steps]))
            rows.append(cells)
    done, planned = sum(run.evaluated for run in study.runs), len(study.runs) + len(study.not_begun)
    left = f"\n{done} of {planned} runs.\n" if done < planned else ""
    header = ["run", "evaluated at", *(f"{steps} steps" for steps in columns)]
    return tables.markdown(tables.Table("", header, rows, words=(0, 1))) + left


def mean_over_lengths(results: list[dict], first: int, last: int, metric: str) -> float:
    """Returns the mean of a percentage over input lengths; each result is the mean over those above the one before it."""
    ordered = sorted(results, key=lambda result: result["length"])
    weights, before = [], 0
    for result in ordered:
        weights.append(result["length"] - before if first <= before + 1 and result["length"] <= last else 0)
        before = result["length"]
    if sum(weights) != last - first + 1:
        raise ValueError(f"lengths {first} to {last} are not those of {[result['length'] for result in ordered]}")
    return sum(weight * result[metric] for weight, result in zip(weights, ordered, strict=True)) / sum(weights)


def _percent_cell(value: float | None, best: float) -> tables.Cell:
    """A percentage, and whether it is the best of its column."""
    if value is None:
        return tables.Cell(tables.MISSING)
    text = f"{value:.1f}"
    return tables.Cell(text, value, best=text == f"{best:.1f}" != "0.0")


def seeds_table(name: str, split: str) -> str:
    """Returns the markdown table of a split's values by length, of each seed the rows in the order of their names."""
    stored = json.loads((STORED / f"{name}.json").read_text())
    lengths = sorted({int(key.partition("@")[2]) for values in stored.values() for key in values})
    rows = []
    for run, values in sorted(stored.items(), key=lambda item: item[0].rpartition("-")[::-1]):
        row, _, seed = run.rpartition("-")
        rows.append([seed, row, *(f"{values[f'{split}@{length}']:.3f}" for length in lengths)])
    return tables.markdown_of_rows(["seed", "row", *map(str, lengths)], rows)


def suites_table(name: str) -> str:
    """Returns the markdown table of stored probes: the score by length, and the effective length of each suite."""
    path = STORED / f"{name}.json"
    if not path.exists():
        return "No model has been asked yet.\n"
    suites = json.loads(path.read_text())["suites"]
    lengths = sorted({result["length"] for own in suites["probes"].values() for result in own})
    rows = []
    for probe, own in suites["probes"].items():
        scores = {result["length"]: f"{result['score']:.0f}" for result in own}
        rows.append([probe, *(scores.get(length, tables.MISSING) for length in lengths)])
    effective = {suite: own["effective_length"] or f"below {lengths[0]}" for suite, own in suites["suites"].items()}
    said = ", ".join(f"{suite} {length}" for suite, length in effective.items())
    table = tables.markdown_of_rows(["probe", *map(str, lengths)], rows)
    return f"{table}\nEffective length, at {suites['effective_score']}%: {said}.\n"


def published_table(name: str, stored: str = "") -> str:
    """Returns the markdown table of figures of others, where they were read, and a row of a model of ours.

    Args:
      name: a suite in docs/results/published.json, whose columns such as 4K are lengths.
      stored: the probes of a model, docs/results/STORED.json; "" = none.
    """
    own = json.loads((STORED / "published.json").read_text())[name]
    found = dict(own["rows"])
    words = f"{own['of']}. Read in {own['source']}."
    if stored:
        content = json.loads((STORED / f"{stored}.json").read_text())
        settings, suite = content["config"], content["suites"]["suites"][name]
        trained, tokenizer = settings["data"]["length"], settings["data"]["tokenizer"]
        model = settings["model"]
        label = f"{settings['encoding']['kind']}, {model['layers']} layers of width {model['width']} (this page)"
        values = {"claimed": str(trained), "effective": str(suite["effective_length"] or "")}
        scores = {f"{int(length) // 1024}K": f"{score:.1f}" for length, score in suite["score"].items()}
        found = {label: [(values | scores).get(column, "") for column in own["columns"]]} | found
        words += (
            f" The first row is the model of the table above: trained at {trained} {tokenizer}, mean over the "
            f"{len(content['suites']['probes'])} tasks there. Its lengths are in {tokenizer}, those of the others in tokens."
        )
    rows = [[row, *(cell or tables.MISSING for cell in cells)] for row, cells in found.items()]
    return f"{tables.markdown_of_rows(['model', *own['columns']], rows)}\n{words}\n"


def store_suites(folder: str, name: str) -> int:
    """Stores the probes that a run has been asked, without its answers, in docs/results/NAME.json; returns the exit code."""
    path = pathlib.Path(folder) / "evaluation.json"
    evaluation = json.loads(path.read_text()) if path.is_file() else {}
    if "suites" not in evaluation:
        print(f"error: {path} is missing or has no suites: run evaluate --suite", file=sys.stderr)
        return 2
    settings = json.loads((pathlib.Path(folder) / "config.json").read_text())
    content = {"config": settings, "step": evaluation["step"], "suites": evaluation["suites"]}
    (STORED / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def headline(page: pathlib.Path, name: str, key: str, rows: str) -> str:
    """Returns the plot of a study, the outcome for rows, and how far a study has come that is not finished.

    Args:
      page: page on which it stands.
      name: study.
      key: metric.
      rows: rows of the study, comma-separated; those that it does not have are left out.
    """
    study = study_of(name)
    kind, metric = metric_of(study, key)
    by_row = [outcomes(study, kind, metric, row) for row in rows.split(",") if row in study.rows]
    by_row = [own for own in by_row if own]
    if not by_row:
        raise ValueError(f"{name}: does not compare {rows} with another encoding")
    found = by_row[0]
    shown = [f"{own[0].text}, {own[1].text} to {own[len(found)].text}" for own in _shown(study, kind, metric)]
    plot = f"{'docs/' * (page.name == 'README.md')}results/{study.name}.png"
    alt = f"{metric.title} at {found[0].label} to {found[-1].label}, {metric.direction}: {'; '.join(shown)}"
    seeds = sorted({sum(run.evaluated for run in study.runs_of(one)) for one in study.rows} - {0})
    task = TASKS[study.name].capitalize()
    said = " ".join(outcome_sentence(own, metric) for own in by_row)
    words = f"**{task}: {said}** {metric.title}, {metric.direction}; "
    words += f"means of {', '.join(map(str, seeds))} seeds, with Holm's correction; a tie means that the seeds do not "
    words += "separate two encodings."
    return f"![{tables.escape(alt)}]({plot})\n\n{' '.join([words, _progress(study).strip()]).strip()}\n"


def _shown(study: Study, kind: str, metric: tables.Metric) -> list[tables.Cell]:
    """The lines of the table of results of the rows in a study's plot."""
    lines = tables.by_size(study, kind, metric).rows
    return [line for line in lines if line[0].text in ROWS.get(study.name, (line[0].text,)) and not line[1].missing]


def _unfinished(study: Study) -> list[str]:
    """Rows of which a run is missing."""
    rows = dict.fromkeys(run.row for run in study.runs if run.unfinished or not run.evaluated)
    return [*rows, *study.not_begun]


def _progress(study: Study) -> str:
    """A paragraph on how far a study has come; "" of a finished one."""
    missing = _unfinished(study)
    if not missing:
        return ""
    done = sum(run.evaluated for run in study.runs), sum(run.state == "finished" for run in study.tuning_runs)
    words = f"The fair study is not finished: {done[0]} runs and {done[1]} trials so far."
    if set(missing) < {*study.rows, *study.not_begun}:
        words += f" Rows with missing runs: {', '.join(missing)}."
    best: dict[str, tuple[float, str, int]] = {}
    for row in study.rows:
        trials = next(iter(study.sweep_trials[study.runs_of(row)[0].name]["best"].values()), None)
        if trials is None:
            continue
        metric = trials.get("minimise") or trials["maximise"]
        own = {run.name: last_measured(run, metric) for run in study.tuning_runs if run.name in trials["runs"]}
        known = {trial: value for trial, value in own.items() if value is not None}
        if known and row in missing:
            first = (min if "minimise" in trials else max)(known, key=known.__getitem__)
            best[row] = known[first], first, len(known)
    if best:
        each = [f"{trial} {value:.3f} (of {count} trials)" for value, trial, count in sorted(best.values())]
        words += (
            f" Best trials of these on the validation split, {metric.removeprefix('eval/')}, seed 0: {', '.join(each)}."
        )
    return words + "\n"


def significance_table(studies: str) -> str:
    """Returns the markdown table of significance tests.

    Args:
      studies: "STUDY METRIC [labels]; ...", labels comma-separated.
    """
    lines, many = [], ";" in studies
    for one in studies.split(";"):
        name, key, *labels = one.split()
        study = study_of(name)
        kind, metric = metric_of(study, key)
        wanted = labels[0].split(",") if labels else None
        for result in significance_tests(study, kind, metric):
            if wanted is None or result.label in wanted:
                lines.append([TASKS[study.name]] * many + [title(study, result.label), *_row_names(result, many)])
    header = ["task"] * many + ["evaluated at", "best mean", "worse", "ties with it", "not tested"]
    if all(line[-1] == tables.MISSING for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    cells = [[tables.Cell(text) for text in line] for line in lines]
    return tables.markdown(tables.Table("", header, cells, words=range(len(header))))


def _row_names(result: Comparison, shorten: bool) -> list[str]:
    """The best row, those that are worse, that tie, and that are not tested; shorten: the first of many that tie."""
    ties = list(result.ties)
    if shorten and len(ties) > MAX_TIES + 1:
        ties = [*ties[:MAX_TIES], f"{len(ties) - MAX_TIES} others"]
    return [", ".join(names) or tables.MISSING for names in ([result.best], result.worse, ties, result.untested)]


def store_work(names: list[str]) -> int:
    """Stores parameters and training FLOPs of studies' rows, from the configs of their runs; returns the exit code."""
    stored = json.loads(WORK.read_text()) if WORK.exists() else {}
    for name in names:
        configs = configs_of(name)
        for run in study_of(name).runs:
            rows = stored.setdefault(name, {})
            if run.row not in rows:
                rows[run.row] = work_of(configs[run.name])
                print(f"{name} {run.row}: {rows[run.row]}", flush=True)
    WORK.write_text(json.dumps(stored, indent=1) + "\n")
    return 0


def configs_of(name: str) -> dict:
    """Returns the config of each run of a study: as docs/results/STUDY.json has it, else of its sweep's file."""
    from seqpe_jax import config
    from seqpe_jax.sweeps import spec
    from seqpe_jax.trees import unflatten_dict

    found = {}
    if (path := STORED / f"{name}.json").exists():
        stored = json.loads(path.read_text())
        for run, entry in stored["runs"].items():
            found[run] = config.from_dict(unflatten_dict(stored["shared"] | entry["settings"], "."))
    if any(run.name not in found for run in study_of(name).runs):
        sweep = spec.read_sweep_file(str(ROOT / "configs" / "sweeps" / f"{SWEEPS.get(name, name)}.py"))
        found = {trial.name: trial.settings for trial in sweep.trials} | found
    return found


def work_of(settings) -> dict[str, float]:
    """Returns {"parameters", "training_flops"} of a config, as `evaluate` stores them; data need not be there."""
    from seqpe_jax.training.trainer import Trainer
    from seqpe_jax.trees import num_params

    trainer = Trainer.of(settings, data_available=False)
    flops = trainer.train_loss.step_flops(trainer.task.example, settings.batch_size, settings.optimizer.accumulate)
    return {
        "parameters": num_params(trainer.abstract_state.params),
        "training_flops": flops / trainer.task.count_per_step,
    }


def rewritten(page: pathlib.Path) -> str:
    """Returns the text of a page with its tables and sentences made anew."""

    def made(mark: re.Match) -> str:
        kind, arguments = mark[2], mark[3]
        words = arguments.split()
        text = {
            "results": lambda: table(*words),
            "contexts": lambda: contexts_table(*words),
            "parts": lambda: parts_table(*words),
            "trials": lambda: trials_table(*words),
            "significance": lambda: significance_table(arguments),
            "tasks": lambda: tasks_table(*words),
            "steps": lambda: steps_table(*words),
            "seeds": lambda: seeds_table(*words),
            "suites": lambda: suites_table(*words),
            "published": lambda: published_table(*words),
            "headline": lambda: headline(page, *words),
        }[kind]()
        return f"{mark[1]}{text}{mark[4]}"

    return MARK.sub(made, page.read_text())


def update(check: bool) -> int:
    """Rewrites the pages that are stale, or says which are; returns the exit code."""
    stale = {page: text for page in pages() if (text := rewritten(page)) != page.read_text()}
    for page, text in stale.items():
        name = page.relative_to(ROOT)
        if check:
            print(f"{name} does not hold what docs/results says: run benchmarks/results.py", file=sys.stderr)
        else:
            page.write_text(text)
            print(f"written: {name}")
    return int(check and bool(stale))
