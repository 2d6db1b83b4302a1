"""Writes the tables of README.md and docs/ from the stored results of the studies, docs/results/STUDY.csv.

    python launch/results_tables.py            rewrites every table between its two marks
    python launch/results_tables.py --check    says which page differs, and changes nothing
    python launch/results_tables.py --curve SWEEP METRIC STUDY     stores what runs measured while training

A study's file is the results.csv that `report` wrote for it. A table stands between `<!-- results: STUDY METRIC [rows] -->`
and `<!-- end of results -->`: a line for each name of runs (less their seeds), or for those named (comma-separated, in that
order), a column for each evaluated length or size; mean and deviation over seeds, the best mean of a column in bold.
"""

import csv
import json
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- results: (\S+) (\S+)(?: (\S+))? -->\n).*?(<!-- end of results -->)", re.DOTALL)
# Metrics: decimals, and whether more is better.
METRICS = {"bits_per_byte": (3, False), "exact_match": (1, True), "exact_match_strict": (1, True), "top1": (1, True)}


def pages() -> list[pathlib.Path]:
    """Returns the pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table(study: str, metric: str, rows: str = "") -> str:
    """Returns the markdown table of a metric of a stored study; rows: names, comma-separated, "" = all as they come."""
    decimals, more_is_better = METRICS[metric]
    found: dict[str, dict[str, list[float]]] = {}
    with (ROOT / "docs" / "results" / f"{study}.csv").open() as file:
        for line in csv.DictReader(file):
            if "step" in line:
                label = line["step"]
            else:
                scale, trained = (line.get(f"{part}length") or line[f"{part}size"] for part in ("", "training_"))
                label = f"{scale} ({int(scale.split('x')[-1]) / int(trained.split('x')[-1]):g}x)"
            if line.get(metric):
                name = line["run"].removesuffix(f"-{line['seed']}")
                found.setdefault(name, {}).setdefault(label, []).append(float(line[metric]))
    names = rows.split(",") if rows else list(found)
    labels = sorted(set().union(*map(found.get, names)), key=lambda label: [*map(int, label.split()[0].split("x"))])
    means = {(name, label): statistics.fmean(values) for name in names for label, values in found[name].items()}
    choose = max if more_is_better else min
    lines = [["run", *labels], ["---", *["---:"] * len(labels)]]
    for name in names:
        cells = []
        for label in labels:
            values, best = found[name].get(label), choose(mean for (_, at), mean in means.items() if at == label)
            if not values:
                cells.append("-")
                continue
            text = f"{means[name, label]:.{decimals}f}"
            text = f"**{text}**" if means[name, label] == best else text
            cells.append(text + (f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""))
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def store_curve(sweep: str, metric: str, study: str) -> int:
    """Stores a metric of the validation split by step, of all finished runs of a sweep's folder; returns the exit code."""
    rows = []
    for folder in sorted(path.parent for path in pathlib.Path(sweep).glob("*/evaluation.json")):
        seed = json.loads((folder / "config.json").read_text())["seed"]
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        rows += [[folder.name, seed, x["step"], x[f"eval/{metric}"]] for x in lines if f"eval/{metric}" in x]
    lines = [["run", "seed", "step", metric.partition("@")[0]], *rows]
    (ROOT / "docs" / "results" / f"{study}.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return 0 if rows else 1


def rewritten(page: str) -> str:
    """Returns the text of a page with its tables made anew."""
    return MARKED.sub(lambda mark: f"{mark[1]}{table(mark[2], mark[3], mark[4] or '')}{mark[5]}", page)


def main(check: bool) -> int:
    """Rewrites the pages, or tells which would change; returns the exit code."""
    stale = [page for page in pages() if rewritten(page.read_text()) != page.read_text()]
    for page in stale:
        name = page.relative_to(ROOT)
        if check:
            print(f"{name} does not hold what docs/results says: run launch/results_tables.py", file=sys.stderr)
        else:
            page.write_text(rewritten(page.read_text()))
            print(f"written: {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--curve"] and len(sys.argv) == 5:
        sys.exit(store_curve(*sys.argv[2:]))
    if sys.argv[1:] not in ([], ["--check"]):
        print(f"error: {' '.join(sys.argv[1:])}: give nothing, --check, or --curve SWEEP METRIC STUDY", file=sys.stderr)
        sys.exit(2)
    sys.exit(main("--check" in sys.argv))
