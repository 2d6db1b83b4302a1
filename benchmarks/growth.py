"""Draws how a training step grows with length and width, docs/results/growth.png, from growth.csv in the same folder.

    python benchmarks/growth.py                    draws
    python benchmarks/growth.py --measure          measures first, all points taking turns in one run, and stores that

The model is `configs/speed_lm.py`: windows of 512 .. 8192 bytes, as many to a batch as make 8192 tokens, at width 256, and
widths of 128 .. 512 with heads of 64, in batches of 8 x 512. Times are medians over turns, as multiples of RoPE's first.
"""

import csv
import pathlib
import sys

import matplotlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from seqpe_jax import config
from seqpe_jax.distributed import processes
from seqpe_jax.profiling.benchmark import benchmark
from seqpe_jax.reporting.plot_style import COLOURS, DPI, RC_PARAMS, label_ends, log2_axis, style_axes

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORED, PLOT = ROOT / "docs" / "results" / "growth.csv", ROOT / "docs" / "results" / "growth.png"
NAMES = {"seqpe": "SeqPE", "rotary": "RoPE"}
LENGTHS, WIDTHS, TOKENS, TURNS = (512, 1024, 2048, 4096, 8192), (128, 256, 512), 8192, 5
MEASURED = {"time": "time of a step (RoPE's first = 1)", "megabytes": "memory of a step (GB)"}


def measure() -> None:
    """Measures every point, and stores them."""
    processes.enable_compilation_cache()
    processes.configure_malloc()
    points = [("length", n, {"data.length": n, "batch_size": TOKENS // n, "eval.lengths": (n,)}) for n in LENGTHS]
    points += [("width", n, {"model.width": n, "model.heads": n // 64}) for n in WIDTHS]
    named = [(*point, kind) for point in points for kind in NAMES]
    settings = {
        f"{kind}, {axis} {value}": config.load(f"{ROOT}/configs/speed_lm.py:{kind}", fields)
        for axis, value, fields, kind in named
    }
    runs = benchmark(settings, "train", TURNS, lambda done, total: print(f"turn {done} of {total}", flush=True))["runs"]
    first = {
        axis: next(run for one, run in zip(named, runs, strict=True) if one[0] == axis and one[3] == "rotary")
        for axis in ("length", "width")
    }
    with STORED.open("w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["axis", "value", "encoding", "time", "megabytes"])
        for (axis, value, _, kind), run in zip(named, runs, strict=True):
            relative = run["median_s"] / first[axis]["median_s"]
            writer.writerow([axis, value, kind, f"{relative:.3f}", f"{run['peak_bytes'] / 1e6:.0f}"])


def draw() -> None:
    """Draws the stored points: time and memory in rows, length and width in columns."""
    with STORED.open() as file:
        rows = list(csv.DictReader(file))
    with matplotlib.rc_context(RC_PARAMS):
        figure, grid = matplotlib.pyplot.subplots(2, 2, figsize=(9.6, 6.4), dpi=DPI, layout="constrained", sharex="col")
        for across, (axis, x) in enumerate({"length": "bytes of a window (8192 to a step)", "width": "width"}.items()):
            for down, (field, y) in enumerate(MEASURED.items()):
                axes, ends = style_axes(grid[down][across], x if down else "", "" if across else y), []
                for kind, name in NAMES.items():
                    own = [row for row in rows if (row["axis"], row["encoding"]) == (axis, kind)]
                    places = [float(row["value"]) for row in own]
                    heights = [float(row[field]) / (1000 if field == "megabytes" else 1) for row in own]
                    axes.plot(places, heights, color=COLOURS[kind][0], marker="o")
                    ends.append((places[-1], heights[-1], name, COLOURS[kind][0]))
                axes.set_ylim(0)
                log2_axis(axes, set(places), set())
                label_ends(axes, ends)
        figure.savefig(PLOT)
    print(f"written: {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--measure"]):
        print(f"error: {' '.join(sys.argv[1:])}: give nothing, or --measure", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:]:
        measure()
    draw()
