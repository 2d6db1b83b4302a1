"""What encodings keep of their quality past the training length, beside what they cost, as `benchmark` measured it."""

import json
import os
from collections.abc import Sequence
from typing import Any

from seqpe_jax.axes import size_label
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path
from seqpe_jax.reporting.study import Run, Study
from seqpe_jax.reporting.t_tests import interval
from seqpe_jax.reporting.tables import MEANS, MISSING, Cell, Metric, Table, heading, mean, number

FILES = "benchmark*.json"  # beside the runs, each of one mode
MODES = {"train": "training step", "eval": "evaluation"}
ROPES = (
    "rotary_axial",
    "rotary",
    "rotary_mixed",
)  # what costs are relative to, on images; in texts the second comes first
FACTOR = 8  # of the training length or size, at which it is told what is kept

Benchmark = dict[str, Any]


def read_benchmarks(workdir: str | os.PathLike) -> list[Benchmark]:
    """Returns the benchmarks of training and evaluation that lie beside a study's runs.

    Raises:
      InputError: a file that `benchmark --output` did not write.
    """
    found = []
    for path in sorted(as_path(workdir).glob(FILES)):
        try:
            one = json.loads(path.read_bytes())
            for run in one["runs"]:
                run["label"] = size_label(tuple(run["size"]) if "size" in run else (run["length"],))
                _ = run["encoding"] + run["mode"], run["median_s"] + run["peak_bytes"]
            _ = [one["ratios"][pair]["time"] + 0 for pair in _pairs(one)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not as `benchmark --output` writes it: write it again, or remove it"
            ) from error
        if one["runs"] and one["runs"][0]["mode"] in MODES:
            found.append(one)
    return sorted(found, key=lambda one: list(MODES).index(one["runs"][0]["mode"]))


def command(study: Study, workdir: str | os.PathLike, benchmarks: Sequence[Benchmark]) -> str:
    """Returns the commands that measure what is missing beside the runs; "" where nothing is."""
    there = {one["runs"][0]["mode"] for one in benchmarks}
    kinds = ",".join(dict.fromkeys([_reference([], study), *(_variant(study, run) for run in study.runs)]))
    config = (study.config or "CONFIG").partition(":")[0]
    return "\n".join(
        f"python -m seqpe_jax.benchmark --config={config} --compare={kinds} --mode={mode} "
        f"--output={as_path(workdir) / f'benchmark_{mode}.json'}"
        for mode in MODES
        if mode not in there
    )


def _variant(study: Study, run: Run) -> str:
    """The variant of the sweep's config file that a run has; where none is recorded, its kind of encoding."""
    return study.points.get(run.name, {}).get("config", "").partition(":")[2] or run.encoding


def summary(study: Study, data: str, metric: Metric, benchmarks: Sequence[Benchmark]) -> Table | None:
    """Returns row x quality at the training length, quality far beyond, the share of it that is kept, and the costs.

    Kept is the quality far beyond over that at the training length, of each run, or the reverse where lower is better: 1
    is all of it. Costs are of a training step and of an evaluation, relative to RoPE's. None without two lengths.
    """
    runs = [run for run in study.counted if run.data == data]
    scales = _scales(runs)
    if scales is None:
        return None
    near, far, factor = scales
    rows = []
    for row in dict.fromkeys(run.row for run in study.runs if run.data == data):
        own = [run for run in runs if run.row == row]
        rows.append(
            [
                Cell(row),
                *(
                    _mean([at.get(label) for at in (_measured(run, metric) for run in own)], metric.decimals)
                    for label in (near, far)
                ),
                _mean([_kept(_measured(run, metric), near, far, metric) for run in own], 3),
                *(cell for one in benchmarks for cell in _relative(study, row, one)),
            ]
        )
    title = f"{metric.title.rstrip(',')}, what is kept of it, and the cost"
    header = [heading(study), f"at {near} (1x)", f"at {far} ({factor:.3g}x)", "kept"]
    for one in benchmarks:
        first = one["runs"][0]
        header += [f"{MODES[first['mode']]} at {first['label']}, time", "memory"]
    kept = f"{far} over {near}" if metric.higher_is_better else f"{near} over {far}"
    note = f"Kept: {kept}, so that 1 is all, of each run. {MEANS}."
    if benchmarks:
        references = " and ".join(dict.fromkeys(_reference(_names(one), study) for one in benchmarks))
        devices = " and ".join(dict.fromkeys(str(one.get("device", "an unknown device")) for one in benchmarks))
        note += f" Time and memory: times those of {references}, taking turns on {devices}."
    return Table(title, header, rows, note)


def quality_and_cost_values(
    study: Study, data: str, metric: Metric, benchmarks: Sequence[Benchmark]
) -> dict[str, tuple]:
    """Returns row -> (time of a training step relative to RoPE, quality far beyond), of rows that have both."""
    table = summary(study, data, metric, [one for one in benchmarks if one["runs"][0]["mode"] == "train"][:1])
    if table is None or len(table.header) < 5:
        return {}
    return {row[0].text: (row[4].value, row[2].value) for row in table.rows if None not in (row[4].value, row[2].value)}


def _scales(runs: Sequence[Run]) -> tuple[str, str, float] | None:
    """The labels of the training length and of one FACTOR times as far, or else the furthest; and how far that is."""
    trained = {run.training["label"]: run.training["extent"] for run in runs if run.results}
    extents = {result["label"]: result["extent"] for run in runs for result in run.results}
    if len(trained) != 1 or not trained.keys() <= extents.keys():
        return None
    [(near, extent)] = trained.items()
    factors = {label: far / extent for label, far in extents.items() if far > extent}
    if not factors:
        return None
    far = min(factors, key=lambda label: (factors[label] != FACTOR, -factors[label]))
    return near, far, factors[far]


def _measured(run: Run, metric: Metric) -> dict[str, float]:
    return {result["label"]: result[metric.name] for result in run.results if metric.name in result}


def _kept(measured: dict[str, float], near: str, far: str, metric: Metric) -> float | None:
    over, under = (far, near) if metric.higher_is_better else (near, far)
    return measured[over] / measured[under] if {near, far} <= measured.keys() and measured[under] else None


def _mean(values: Sequence[float | None], decimals: int) -> Cell:
    there = [value for value in values if value is not None]
    if not there:
        return Cell(MISSING)
    after = f" ± {number(interval(there), decimals)}" if len(there) > 1 else ""
    after += f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return Cell(number(mean(there), decimals), mean(there), after=after)


def _names(one: Benchmark) -> list[str]:
    return [run["encoding"] for run in one["runs"]]


def _pairs(one: Benchmark) -> list[str]:
    first, *others = _names(one)
    return [f"{first}/{other}" for other in others]


def _reference(names: Sequence[str], study: Study) -> str:
    """The RoPE that costs are relative to, or what is there in its place."""
    ropes = ROPES if study.runs[0].data == "images" else ("rotary", *ROPES)
    return next((kind for kind in ropes if not names or kind in names), names[0] if names else "")


def _relative(study: Study, row: str, one: Benchmark) -> list[Cell]:
    """Time and memory of a row's encoding, as times those of RoPE in the same run of `benchmark`.

    A row is measured under its own name, or under its kind of encoding where that has one row alone: a form of an encoding
    may cost something else.
    """
    names = _names(one)
    kinds = {own: study.of(own)[0].encoding for own in study.rows}
    name = row if row in names else kinds[row]
    if name not in names or (name != row and list(kinds.values()).count(name) > 1):
        return [Cell(MISSING), Cell(MISSING)]
    # Of turns, so that what else the machine did falls on both alike; the first encoding over each other one.
    behind = {names[0]: 1.0} | {other: one["ratios"][f"{names[0]}/{other}"]["time"] for other in names[1:]}
    held = {run["encoding"]: run["peak_bytes"] for run in one["runs"]}
    rope = _reference(names, study)
    return [Cell(f"{value:.2f}", value) for value in (behind[rope] / behind[name], held[name] / held[rope])]
