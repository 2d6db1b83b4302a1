"""The report of a study: markdown with PNG plots, CSV, and one self-contained HTML page."""

import os
import pathlib
import urllib.parse
from collections.abc import Iterable
from typing import Any

import jinja2

from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write
from seqpe_jax.metric_registry import Metric
from seqpe_jax.reporting import cost_table, plot_style, plots, tables
from seqpe_jax.reporting.significance import (
    TEST_NOTE,
    UNTESTED,
    Comparison,
    outcome_sentence,
    outcomes,
    sentences,
    significance_tests,
    worse_cells,
)
from seqpe_jax.reporting.stored_results import read_stored_study
from seqpe_jax.reporting.study import Run, Study, differences, read_study
from seqpe_jax.reporting.tuning_table import tuning_notes, tuning_tables

UNMEASURED = (
    "The cost of encodings relative to RoPE is measured by a benchmark in which they take turns. The report shows time and "
    "memory next to quality if it finds the benchmark's file in the folder of the runs. Not measured yet:"
)
NOT_EVALUATED = (
    "No run has been evaluated yet: `python -m seqpe_jax.evaluate --checkpoint=RUN --output=RUN/evaluation.json`\n"
)
Tests = dict[tuple[str, Metric], list[Comparison]]  # (kind of data, its main metric) -> results


def write_report(
    workdir: str | os.PathLike | None, output: str | os.PathLike, *, results: str | os.PathLike | None = None
) -> str:
    """Writes report.html, report.md, results.csv and the plots.

    Args:
      workdir: folder of a run, of a sweep, or of runs; or None.
      output: folder to write.
      results: results file of a sweep, instead of `workdir`.

    Returns:
      The main table in markdown.

    Raises:
      InputError: see `read_study` and `read_stored_study`; or `output` cannot be written.
    """
    study = read_study(workdir) if workdir is not None else read_stored_study(results)
    benchmarks = cost_table.read_benchmarks(workdir) if workdir is not None else []
    output = as_path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={output} cannot be made a folder ({error.strerror}): choose another") from error
    tests = {(kind, metric): significance_tests(study, kind, metric) for kind, metric in _main_metrics(study)}
    parts = {
        "study": study,
        "notes": notes(study),
        "test_sentences": [
            (
                f"{metric.title.rstrip(',')}, {metric.direction}",
                sentences(results, metric) + _outcomes(study, kind, metric),
            )
            for (kind, metric), results in tests.items()
            if results
        ],
        "results": _result_tables(study, tests, benchmarks),
        "cost": tables.training_cost(study),
        "missing_commands": cost_table.missing_commands(study, workdir, benchmarks) if workdir is not None else "",
        "tuning": tuning_tables(study),
        "runs": tables.run_states(study),
        "differing": tables.differing_fields(study),
        "shared": tables.shared_fields(study),
        **_write_plots(study, benchmarks, output),
    }
    atomic_write(output / "results.csv", tables.results_csv(study))
    atomic_write(output / "report.md", _markdown(parts))
    atomic_write(output / "report.html", _html(parts))
    return tables.markdown(parts["results"][0]) if parts["results"] else NOT_EVALUATED


def notes(study: Study) -> list[str]:
    """Returns caveats for comparing the runs: missing and stale results, differing settings."""
    lines = [f"The runs differ in {line}" for line in differences(study)]
    if study.not_begun:
        lines.append(f"Not begun, so in no table: {', '.join(study.not_begun)}")
    missing: dict[str, list[str]] = {}
    for run in study.runs:
        if run.failure or not run.started:
            missing.setdefault(run.state, []).append(run.name)
    for state, names in missing.items():
        lines.append(f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} missing: {state}")
    for run in study.runs:
        done, at = run.steps_done, run.evaluation.get("step")
        if run.failure or not run.started:
            continue
        if run.unfinished:
            left_out = run.evaluated and run not in study.counted
            suffix = ", so its results are left out where others of its row have finished" if left_out else ""
            lines.append(f"{run.name} is not finished: step {done or 0} of {run.steps_planned}{suffix}")
        elif not run.evaluated:
            lines.append(f"{run.name} is not evaluated")
        if at is not None and done is not None and at != done:
            lines.append(f"{run.name} was evaluated at step {at}, but its last reported step is {done}")
        is_code = run.dataset is not None and run.dataset.answers == "code"
        if is_code and any("exact_match" in result for result in run.results):
            lines.append(
                f"{run.name}: exact matches and F1 are normalised as SQuAD's, by which '-1' equals '1': evaluate it again "
                "for those of answers as they are written"
            )
    uneven = [
        run.name
        for run in study.runs
        if run.data_kind == "text" and len({one.get("tokens") for one in run.results}) > 1
    ]
    if uneven:
        lines.append(
            f"The lengths of {', '.join(uneven)} were evaluated on different tokens, and do not compare: evaluate again"
        )
    lines += tuning_notes(study)
    baselines = {
        run.evaluation["without_context"]["contains"] for run in study.runs if "without_context" in run.evaluation
    }
    return lines + [f"Guessing without the passage finds {found:.1f}% of the answers" for found in sorted(baselines)]


def _outcomes(study: Study, kind: str, metric: Metric) -> list[str]:
    """A sentence on each row of SeqPE that is tested against other encodings."""
    rows = dict.fromkeys(run.row for run in study.runs if run.config["encoding"]["kind"] == "seqpe")
    found = [outcomes(study, kind, metric, row) for row in rows]
    return [outcome_sentence(one, metric) for one in found if any(each.state != UNTESTED for each in one)]


def _main_metrics(study: Study) -> list[tuple[str, Metric]]:
    """The first metric of each kind of data."""
    measured = tables.metrics_of(study)
    return [next(one for one in measured if one[0] == kind) for kind in dict.fromkeys(kind for kind, _ in measured)]


def _result_tables(study: Study, tests: Tests, benchmarks: list[cost_table.Benchmark]) -> list[tables.Table]:
    """The tables of results: the main metric by length, retention and its cost, then the other metrics."""
    found = [
        *(tables.by_size(study, *key, worse_cells(results), TEST_NOTE, work=True) for key, results in tests.items()),
        tables.by_context(study),
        tables.by_context(study, tables.KEY_LOSS),
        *(cost_table.retention_table(study, *key, benchmarks) for key in tests),
        tables.by_distance(study),
        *(tables.by_size(study, *key) for key in tables.metrics_of(study) if key not in tests),
    ]
    return [table for table in found if table is not None]


def _write_plots(study: Study, benchmarks: list[cost_table.Benchmark], output: AnyPath) -> dict[str, Any]:
    """Writes all plots as PNG.

    Returns:
      {"study_plots": plots, "run_plots": title -> [(run, plot), ...]}, each plot with its name, title, alt and svg.
    """
    run_plots: dict[str, list[tuple[Run, dict[str, str]]]] = {}
    progress = ProgressLine(1 + len(study.runs), label="plots of run")

    def write(plot: plot_style.Plot) -> dict[str, str]:
        atomic_write(output / f"{plot.name}.png", plot.png())
        written = {"name": plot.name, "title": plot.title, "alt": plot.alt, "svg": plot.svg()}
        plots.close(plot)
        return written

    study_plots = [write(plot) for plot in plots.plot_study(study, benchmarks)]
    for number, run in enumerate(study.runs, 1):
        progress.update(number)
        for plot in plots.plot_run(run):
            run_plots.setdefault(plot.title, []).append((run, write(plot)))
    progress.update(1 + len(study.runs))
    progress.close()
    return {"study_plots": study_plots, "run_plots": run_plots}


def _markdown(parts: dict[str, Any]) -> str:
    """The report in markdown, with links to its plots."""
    escape = tables.escape
    blocks = [f"# {escape(parts['study'].name)}\n", *(f"> {escape(note)}\n" for note in parts["notes"])]
    for metric, lines in parts["test_sentences"]:
        blocks.append(
            "".join(f"{line}\n" for line in (f"{escape(metric)}:", "", *(f"- {escape(one)}" for one in lines)))
        )
    if not parts["results"]:
        blocks.append(NOT_EVALUATED)
    for table in (*parts["results"], parts["cost"], *parts["tuning"], parts["runs"], parts["differing"]):
        if table.rows:
            note = [f"{escape(table.note)}\n"] if table.note else []
            blocks += [f"## {escape(table.title)}\n", *note, tables.markdown(table)]
            if table is parts["cost"] and parts["missing_commands"]:
                blocks += [f"{UNMEASURED}\n", f"```\n{parts['missing_commands']}\n```\n"]

    def figure(title: str, plot: dict[str, str]) -> str:
        alt = escape(plot["alt"].replace("[", "(").replace("]", ")"))
        return f"## {escape(title)}\n\n![{alt}]({urllib.parse.quote(plot['name'])}.png)\n"

    blocks += [figure(plot["title"], plot) for plot in parts["study_plots"]]
    for found in parts["run_plots"].values():
        blocks += [figure(f"{plot['title']}: {run.name}", plot) for run, plot in found]
    return "\n".join(blocks)


def _html(parts: dict[str, Any]) -> str:
    """The report as one HTML page without external files."""
    folder = pathlib.Path(__file__).parent
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    study: Study = parts["study"]
    return templates.get_template("page.html").render(
        about=_about(study),
        script=(folder / "page.js").read_text(),
        unmeasured=UNMEASURED,
        colours={"light": plot_style.css_colours(dark=False), "dark": plot_style.css_colours(dark=True)},
        first_runs={study.runs_of(row)[0].name for row in study.rows},
        not_evaluated=NOT_EVALUATED.strip(),
        **parts,
    )


def _about(study: Study) -> str:
    """One line on the runs."""

    def joined(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    count = f"{len(study.runs)} runs" if len(study.runs) > 1 else "1 run"
    trained = joined(run.training_size["label"] for run in study.runs)
    unit = "pixels" if study.runs[0].data_kind == "images" else "tokens"
    return (
        f"{count} of {joined(run.encoding for run in study.runs)} on "
        f"{joined(run.config['data'].get('name') for run in study.runs)}, trained at {trained} {unit} for "
        f"{joined(run.steps_planned for run in study.runs)} steps; seeds {joined(sorted(run.seed for run in study.runs))}."
    )
