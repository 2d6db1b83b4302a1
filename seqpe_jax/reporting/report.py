"""Writes the report of a study: markdown with PNG plots, CSV, and one HTML page that holds everything."""

import base64
import hashlib
import os
import pathlib
import urllib.parse
from collections.abc import Iterable
from typing import Any

import jinja2

from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write
from seqpe_jax.reporting import cost_table, plot_style, plots, tables, tuning_table
from seqpe_jax.reporting.significance import TEST_NOTE, TestResult, sentences, significance_tests, worse
from seqpe_jax.reporting.study import Run, Study, differences, read_study

TEMPLATE, SCRIPT = "page.html", "page.js"
UNMEASURED = (
    "What encodings cost beside RoPE is told by a benchmark in which they take turns; where the report finds it beside the "
    "runs, it shows time and memory beside quality. Not measured yet:"
)
NOT_EVALUATED = (
    "No run has been evaluated yet: `python -m seqpe_jax.evaluate --checkpoint=RUN --output=RUN/evaluation.json`\n"
)


def write_report(workdir: str | os.PathLike, output: str | os.PathLike) -> str:
    """Writes report.html, report.md, results.csv and the plots; returns the main table as markdown.

    Raises:
      InputError: see `runs.read_study`; or `output` is not a folder that can be written.
    """
    study, benchmarks = read_study(workdir), cost_table.read_benchmarks(workdir)
    output = as_path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={output} cannot be made a folder ({error.strerror}): choose another") from error
    judged = {(data, metric): significance_tests(study, data, metric) for data, metric in _main_metrics(study)}
    parts = {
        "study": study,
        "notes": notes(study),
        "significance_tests": [
            (f"{metric.title.rstrip(',')}, {metric.direction}", sentences(found, metric))
            for (_, metric), found in judged.items()
            if found
        ],
        "measured": _measured(study, judged, benchmarks),
        "cost": tables.cost(study),
        "unmeasured": cost_table.command(study, workdir, benchmarks),
        "tuning_tables": tuning_table.tuning_tables(study),
        "points": tables.points(study),
        "differing": tables.differing(study),
        "shared": tables.shared(study),
        **_figures(study, benchmarks, output),
    }
    atomic_write(output / "results.csv", tables.results_csv(study))
    atomic_write(output / "report.md", _markdown(parts))
    atomic_write(output / "report.html", _html(parts))
    return tables.markdown(parts["measured"][0]) if parts["measured"] else NOT_EVALUATED


def notes(study: Study) -> list[str]:
    """Returns what a reader must know before comparing the runs: what is missing or stale, where they differ."""
    lines = [f"The runs differ in {line}" for line in differences(study)]
    for run in study.runs:
        done, at = run.steps_done, run.evaluation.get("step")
        if run.failure or not run.started:
            lines.append(f"{run.name} is missing: {run.state}")
        elif run.unfinished:
            left_out = run.evaluated and run not in study.counted
            beside = ", so its results are left out beside finished runs" if left_out else ""
            lines.append(f"{run.name} is not finished: step {done or 0} of {run.steps_planned}{beside}")
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
        run.name for run in study.runs if run.data == "text" and len({one.get("tokens") for one in run.results}) > 1
    ]
    if uneven:
        lines.append(
            f"The lengths of {', '.join(uneven)} were evaluated on different tokens, and do not compare: evaluate again"
        )
    lines += tuning_table.notes(study)
    guessed = {
        run.evaluation["without_context"]["contains"] for run in study.runs if "without_context" in run.evaluation
    }
    lines += [f"Guessing without the passage finds {share:.1f}% of the answers" for share in sorted(guessed)]
    return lines


def _main_metrics(study: Study) -> list[tuple[str, tables.Metric]]:
    measured = tables.metrics_of(study)
    return [next(one for one in measured if one[0] == data) for data in dict.fromkeys(data for data, _ in measured)]


def _measured(
    study: Study, judged: dict[tuple[str, tables.Metric], list[TestResult]], benchmarks: list[cost_table.Benchmark]
) -> list[tables.Table]:
    """The tables of results: the main metric by length, what is kept of it and what that costs, then the others.

    Args:
      judged: the main metric of each kind of data, with its verdicts.
    """
    kept = [cost_table.summary(study, data, metric, benchmarks) for data, metric in judged]
    others = [one for one in tables.metrics_of(study) if one not in judged]
    main = [tables.by_scale(study, *one, worse(found), TEST_NOTE, work=True) for one, found in judged.items()]
    found = [
        *main,
        tables.by_context(study),
        *kept,
        tables.by_distance(study),
        *(tables.by_scale(study, data, metric) for data, metric in others),
    ]
    return [table for table in found if table is not None]


def _figures(study: Study, benchmarks: list[cost_table.Benchmark], output: AnyPath) -> dict[str, Any]:
    """Draws all plots and writes their PNGs; returns those of the study and, of runs, [title, [(run, plot), ...]]."""
    drawn = []
    of_rows: dict[str, list[tuple[Run, dict[str, str]]]] = {}
    progress = ProgressLine(1 + len(study.runs), label="plots of run")

    def keep(plot: plot_style.Plot) -> dict[str, str]:
        atomic_write(output / f"{plot.name}.png", plot.png())
        kept = {"name": plot.name, "title": plot.title, "alt": plot.alt, "svg": plot.svg()}
        plots.close(plot)
        return kept

    for plot in plots.of_study(study, benchmarks):
        drawn.append(keep(plot))
    for number, run in enumerate(study.runs, 1):
        progress.update(number)
        for plot in plots.of_run(run):
            of_rows.setdefault(plot.title, []).append((run, keep(plot)))
    progress.update(1 + len(study.runs))
    progress.close()
    return {"drawn": drawn, "of_runs": of_rows}


def _markdown(parts: dict[str, Any]) -> str:
    """The page as markdown, beside its plots."""
    plain = tables.plain
    shown = [f"# {plain(parts['study'].name)}\n", *(f"> {plain(note)}\n" for note in parts["notes"])]
    for metric, told in parts["significance_tests"]:
        shown.append("".join(f"{line}\n" for line in (f"{plain(metric)}:", "", *(f"- {plain(one)}" for one in told))))
    if not parts["measured"]:
        shown.append(NOT_EVALUATED)
    for table in (*parts["measured"], parts["cost"], *parts["tuning_tables"], parts["points"], parts["differing"]):
        if table.rows:
            note = [f"{plain(table.note)}\n"] if table.note else []
            shown += [f"## {plain(table.title)}\n", *note, tables.markdown(table)]
            if table is parts["cost"] and parts["unmeasured"]:
                shown += [f"{UNMEASURED}\n", f"```\n{parts['unmeasured']}\n```\n"]

    def figure(title: str, plot: dict[str, str]) -> str:
        alt = plain(plot["alt"].replace("[", "(").replace("]", ")"))
        return f"## {plain(title)}\n\n![{alt}]({urllib.parse.quote(plot['name'])}.png)\n"

    shown += [figure(plot["title"], plot) for plot in parts["drawn"]]
    shown += [
        figure(f"{plot['title']}: {run.name}", plot) for found in parts["of_runs"].values() for run, plot in found
    ]
    return "\n".join(shown)


def _html(parts: dict[str, Any]) -> str:
    """The page as HTML that asks for nothing outside itself."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    study: Study = parts["study"]
    contents = {
        "notes": "Before comparing" * bool(parts["notes"]),
        "results": "Results",
        "costs": "Cost",
        "tuning": "Tuning" * bool(parts["tuning_tables"]),
        "curves": "Curves" * bool(parts["drawn"]),
        **{f"of-runs-{at}": title for at, title in enumerate(parts["of_runs"], 1)},
        "runs": "Runs",
        "configs": "Configs",
    }
    script = pathlib.Path(__file__).with_name(SCRIPT).read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return templates.get_template(TEMPLATE).render(
        about=_about(study),
        script=script,
        script_hash=f"sha256-{digest}",  # the one that the page may run
        legend=plot_style.legend(study),
        unmeasured_words=UNMEASURED,
        colours={"light": plot_style.variables(dark=False), "dark": plot_style.variables(dark=True)},
        contents=[(id_, title) for id_, title in contents.items() if title],
        firsts={study.of(row)[0].name for row in study.rows if study.of(row)},
        not_evaluated=NOT_EVALUATED.strip(),
        **parts,
    )


def _about(study: Study) -> str:
    """What was run, in a line."""

    def joined(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    what = f"{len(study.runs)} runs" if len(study.runs) > 1 else "1 run"
    trained = joined(run.training["label"] for run in study.runs)
    unit = "pixels" if study.runs[0].data == "images" else "tokens"
    return (
        f"{what} of {joined(run.encoding for run in study.runs)} on "
        f"{joined(run.config['data'].get('name') for run in study.runs)}, trained at {trained} {unit} for "
        f"{joined(run.steps_planned for run in study.runs)} steps; seeds {joined(sorted(run.seed for run in study.runs))}."
    )
