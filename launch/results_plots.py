"""Draws the plots of docs/ from the stored results of the studies, docs/results/STUDY.csv, as a report draws them.

    python launch/results_plots.py             draws them all
    python launch/results_plots.py --check     says which plot is of other results, and draws nothing

A plot holds the digest of its results and of the rows that it shows. The tables beside them are made by results_tables.py,
from the same files; the plot of growth by growth.py.
"""

import csv
import hashlib
import pathlib
import sys

import matplotlib
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from seqpe_jax.reporting import drawing, plots
from seqpe_jax.reporting.stored import scale_of
from seqpe_jax.reporting.study import Run, Study

STORED = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results"
STUDIES = {
    "study_text": plots.extrapolation,
    "questions": plots.extrapolation_answers,
    "study_images": plots.extrapolation_sizes,
}
# Of a study with more rows than curves can be told apart.
ROWS = {
    "study_text": ("seqpe", "fox", "cable", "kerple", "alibi", "fire", "rotary", "learned", "none"),
    "study_images": ("seqpe", "rotary_mixed", "rotary_axial", "sinusoidal", "lookhere", "learned", "fire", "rotary"),
}
DIGEST = "Source"  # of the PNG's texts
NAMES = {"questions": "stdlib_qa"}  # of their data, where a length does not tell them from text


def study_of(name: str) -> Study:
    """Returns a stored study as far as plots read it: the results of its runs, and where they were trained."""
    results: dict[str, list[dict]] = {}
    with (STORED / f"{name}.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if not line.get("context")]
    for line in lines:
        sides = {"length": line["length"]} if "length" in line else {"size": line["size"].split("x")}
        numbers = {key: float(line[key]) for key in ("bits_per_byte", "contains", "top1") if line.get(key)}
        results.setdefault(line["run"], []).append(numbers | scale_of(_squared(sides)))
    runs = []
    for run, found in results.items():
        line = next(line for line in lines if line["run"] == run)
        if "training_length" in line:
            trained = {"length": int(line["training_length"])}
        else:
            trained = _squared({"size": line["training_size"].split("x")})
        data = trained | {"name": NAMES.get(name)}
        config = {"encoding": {"kind": line["encoding"]}, "seed": int(line["seed"]), "data": data}
        row = run.removesuffix(f"-{line['seed']}")
        if row not in ROWS.get(name, (row,)):
            continue
        runs.append(Run(run, config, [], {"results": found}, None, None, row=row))
    return Study(name, runs)


def _squared(sides: dict) -> dict:
    """Returns {"size": [height, width]} where one side is told for both."""
    return {"size": sides["size"] * 2} if len(sides.get("size", "")) == 1 else sides


def main(check: bool) -> int:
    """Draws and writes them, or tells which are stale; returns the exit code."""
    stale = 0
    for name, draw in STUDIES.items():
        path = STORED / f"{name}.png"
        shown = (STORED / f"{name}.csv").read_bytes() + repr(ROWS.get(name)).encode()
        digest = hashlib.sha256(shown).hexdigest()
        if path.exists() and Image.open(path).text.get(DIGEST) == digest:
            continue
        stale += 1
        if check:
            print(f"docs/results/{name}.png is not of {name}.csv: run launch/results_plots.py", file=sys.stderr)
            continue
        with matplotlib.rc_context(drawing.DRESS):
            plot = draw(study_of(name))
            plot.figure.savefig(path, dpi=drawing.DPI, metadata={DIGEST: digest})
        plots.close(plot)
        print(f"written: docs/results/{name}.png")
    return int(check and stale > 0)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        print(f"error: {' '.join(sys.argv[1:])}: give nothing, or --check", file=sys.stderr)
        sys.exit(2)
    sys.exit(main("--check" in sys.argv))
