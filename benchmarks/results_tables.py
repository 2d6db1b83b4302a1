"""Writes the tables of README.md and docs/ from the stored results of the studies, docs/results/STUDY.csv.

    python benchmarks/results_tables.py            rewrites every table between its two marks
    python benchmarks/results_tables.py --check    says which page differs, and changes nothing
    python benchmarks/results_tables.py --curve SWEEP METRIC STUDY     stores what runs measured while training
    python benchmarks/results_tables.py --work STUDY ...               stores parameters and FLOPs of studies' rows

A table of results stands between `<!-- results: STUDY METRIC [rows] -->` and `<!-- end of results -->`: a line for each
row, or for those named (comma-separated, in that order), a column for each evaluated length or size, with means, intervals
and tests over all rows of the study as a report has them (`seqpe_jax.reporting`), then parameters and FLOPs.

A table of significance tests stands between `<!-- significance: STUDY METRIC [labels]; ... -->` and `<!-- end of
significance -->` (or `verdicts`): for each length or size, or for those named, the row with the best mean, those that are
significantly worse, those that tie with it, in the order of their means, and those that are not tested.
"""

import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from stored_studies import ROOT, STORED, WORK, metric_of, study_of, title

from seqpe_jax.reporting import tables
from seqpe_jax.reporting.significance import Comparison, significance_tests, worse_cells

RESULTS = re.compile(r"(<!-- results: (\S+) (\S+)(?: (\S+))? -->\n).*?(<!-- end of results -->)", re.DOTALL)
TESTS = re.compile(
    r"(<!-- (?:significance|verdicts): ([^>]+) -->\n).*?(<!-- end of (?:significance|verdicts) -->)", re.DOTALL
)
TASKS = {
    "study_text": "text",
    "encoder_width": "text",
    "questions": "questions",
    "study_images": "images",
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
    study = study_of(name)
    data, metric = metric_of(study, key)
    by_step = name.endswith("_by_step")
    marked = set() if by_step else worse_cells(significance_tests(study, data, metric))
    whole = tables.by_size(study, data, metric, marked, work=not by_step)
    _, extents = tables.values_of(study, data, metric)
    header = ["run", *(title(study, label) for label in extents), *whole.header[1 + len(extents) :]]
    lines = {row[0].text: row for row in whole.rows}
    return tables.markdown(tables.Table("", header, [lines[row] for row in rows.split(",")] if rows else whole.rows))


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
                lines.append([TASKS[name]] * many + [title(study, result.label), *_row_names(result, many)])
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


def store_curve(sweep: str, metric: str, study: str) -> int:
    """Stores a metric of the validation split by step, of all finished runs of a sweep's folder; returns the exit code."""
    rows = []
    for folder in sorted(path.parent for path in pathlib.Path(sweep).glob("*/evaluation.json")):
        seed = json.loads((folder / "config.json").read_text())["seed"]
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        rows += [[folder.name, seed, x["step"], x[f"eval/{metric}"]] for x in lines if f"eval/{metric}" in x]
    lines = [["run", "seed", "step", metric.partition("@")[0]], *rows]
    (STORED / f"{study}.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return 0 if rows else 1


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


def rewritten(page: str) -> str:
    """Returns the text of a page with its tables made anew."""
    page = RESULTS.sub(lambda mark: f"{mark[1]}{table(mark[2], mark[3], mark[4] or '')}{mark[5]}", page)
    return TESTS.sub(lambda mark: f"{mark[1]}{significance_table(mark[2])}{mark[3]}", page)


def main(check: bool) -> int:
    """Rewrites the pages, or says which would change; returns the exit code."""
    stale = [page for page in pages() if rewritten(page.read_text()) != page.read_text()]
    for page in stale:
        name = page.relative_to(ROOT)
        if check:
            print(f"{name} does not hold what docs/results says: run benchmarks/results_tables.py", file=sys.stderr)
        else:
            page.write_text(rewritten(page.read_text()))
            print(f"written: {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--curve"] and len(sys.argv) == 5:
        sys.exit(store_curve(*sys.argv[2:]))
    if sys.argv[1:2] == ["--work"] and len(sys.argv) > 2:
        sys.exit(store_work(sys.argv[2:]))
    if sys.argv[1:] not in ([], ["--check"]):
        wrong = (
            f"error: {' '.join(sys.argv[1:])}: give nothing, --check, --curve SWEEP METRIC STUDY, or --work STUDY ..."
        )
        print(wrong, file=sys.stderr)
        sys.exit(2)
    sys.exit(main("--check" in sys.argv))
