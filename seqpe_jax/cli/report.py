"""Writes the report of one run, of a folder of runs or of a sweep: one HTML page; and markdown, CSV and plots.

python -m seqpe_jax.report --workdir=runs/quickstart --output=runs/quickstart/report
"""

from absl import flags

from seqpe_jax.cli import common
from seqpe_jax.files import as_path

_WORKDIR = common.define_path("workdir", "folder of a run, of a sweep, or a folder whose subfolders are runs")
_OUTPUT = common.define_path("output", "folder for report.html, report.md, results.csv and the plots", writes="folder")


def main() -> None:
    """Writes the report, and prints its table."""
    from seqpe_jax.reporting import report

    table = report.write_report(_WORKDIR.value, _OUTPUT.value)
    print(f"{table}\nthe whole report: {as_path(_OUTPUT.value) / 'report.html'}")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["workdir", "output"])
    common.run(main)
