"""The plots of docs/ from the stored results of the studies, as a report draws them; `results.py` is the command.

A plot holds the digest of its results and of the rows that it shows. The plot of growth is drawn by growth.py.
"""

import dataclasses
import hashlib
import pathlib
import sys

import matplotlib
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from stored_studies import STORED, is_stored, study_of

from seqpe_jax.reporting import plot_style, plots
from seqpe_jax.reporting.study import Study

STUDIES = {
    "study_text_fair+study_seqpe_recipe": plots.extrapolation,
    "study_text": plots.extrapolation,
    "questions": plots.extrapolation_answers,
    "study_images": plots.extrapolation_sizes,
}
# Rows of a study that has more of them than curves are distinguishable.
ROWS = {
    "study_text_fair": ("seqpe", "seqpe_recipe", "fox", "cable", "alibi", "rotary", "scale_invariant"),
    "study_text": ("seqpe", "fox", "cable", "kerple", "alibi", "fire", "rotary", "learned", "none"),
    "study_images": ("seqpe", "rotary_mixed", "rotary_axial", "sinusoidal", "lookhere", "learned", "fire", "rotary"),
}
DIGEST = "Source"  # of the PNG's texts


def shown(name: str) -> Study:
    """Returns a stored study, of the rows that are drawn."""
    study = study_of(name)
    return dataclasses.replace(study, runs=[run for run in study.runs if run.row in ROWS.get(study.name, (run.row,))])


def update(check: bool) -> int:
    """Draws and writes the plots that are stale, or says which are; returns the exit code."""
    stale = 0
    for name, draw in STUDIES.items():
        if not is_stored(name):
            continue
        parts = name.split("+")
        path = STORED / f"{parts[0]}.png"
        files = [STORED / f"{part}.csv" for part in parts if is_stored(part)]
        of = b"".join(file.read_bytes() for file in files) + repr(ROWS.get(parts[0])).encode()
        digest = hashlib.sha256(of).hexdigest()
        if path.exists() and Image.open(path).text.get(DIGEST) == digest:
            continue
        stale += 1
        if check:
            print(
                f"docs/results/{path.name} is not of {' and '.join(file.name for file in files)}: run benchmarks/results.py",
                file=sys.stderr,
            )
            continue
        with matplotlib.rc_context(plot_style.RC_PARAMS):
            plot = draw(shown(name))
            plot.figure.savefig(path, dpi=plot_style.DPI, metadata={DIGEST: digest})
        plots.close(plot)
        print(f"written: docs/results/{path.name}")
    return int(check and stale > 0)
