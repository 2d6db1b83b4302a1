"""Writes all that README.md and docs/ say about the studies, from their stored results in docs/results/.

    python benchmarks/results.py             writes CSV files, plots, tables and sentences
    python benchmarks/results.py --check     says which of them are stale, and changes nothing
    python benchmarks/results.py --suites FOLDER NAME           stores the probes that a run was asked (evaluate --suite)
    python benchmarks/results.py --work STUDY ...               stores parameters and FLOPs of studies' rows

A study is docs/results/STUDY.json, which `sweep --results` writes; one from before these files had a plan is
docs/results/STUDY.csv. A study that is not finished is shown as far as it has come, and says what is missing.
"""

import sys

import results_plots
import results_tables
from stored_studies import STORED, is_stored, planned_studies, study_of

from seqpe_jax.reporting import tables


def update_csv(check: bool) -> int:
    """Writes docs/results/STUDY.csv of each study with a plan, or says which are stale; returns the exit code."""
    stale = 0
    for name in filter(is_stored, planned_studies()):
        path, text = STORED / f"{name}.csv", tables.results_csv(study_of(name))
        if path.exists() and path.read_text() == text:
            continue
        stale += 1
        if check:
            print(f"docs/results/{name}.csv is not of {name}.json: run benchmarks/results.py", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"written: docs/results/{name}.csv")
    return int(check and stale > 0)


def main(check: bool) -> int:
    """Writes all files, or says which are stale; returns the exit code."""
    return max([update(check) for update in (update_csv, results_plots.update, results_tables.update)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--suites"] and len(sys.argv) == 4:
        sys.exit(results_tables.store_suites(*sys.argv[2:]))
    if sys.argv[1:2] == ["--work"] and len(sys.argv) > 2:
        sys.exit(results_tables.store_work(sys.argv[2:]))
    if sys.argv[1:] not in ([], ["--check"]):
        wrong = "give nothing, --check, --suites FOLDER NAME, or --work STUDY ..."
        print(f"error: {' '.join(sys.argv[1:])}: {wrong}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main("--check" in sys.argv))
