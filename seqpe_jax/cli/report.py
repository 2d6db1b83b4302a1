"""Writes the report of one run, of a folder of runs or of a sweep: one HTML page; and markdown, CSV and plots.

python -m seqpe_jax.report --workdir=runs/quickstart --output=runs/quickstart/report
python -m seqpe_jax.report --results=docs/results/study_text_fair.json --output=runs/study_text/report
"""

from absl import flags

from seqpe_jax.cli import common
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path

_WORKDIR = common.define_path("workdir", "folder of a run, of a sweep, or a folder whose subfolders are runs")
_RESULTS = common.define_path("results", "JSON file of `sweep --results`, instead of a folder; it needs no runs")
_OUTPUT = common.define_path("output", "folder for report.html, report.md, results.csv and the plots", writes="folder")


def main() -> None:
    """Writes the report, and prints its table."""
    from seqpe_jax.reporting import report

    if bool(_WORKDIR.value) == bool(_RESULTS.value):
        raise InputError("report reads one study: give either --workdir=DIR, or --results=FILE.json of a sweep")
    table = report.write_report(_WORKDIR.value, _OUTPUT.value, results=_RESULTS.value)
    print(f"{table}\nthe whole report: {as_path(_OUTPUT.value) / 'report.html'}")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["output"])
    common.run(main)
