"""Retention and its cost: numbers of the runs and of the benchmarks in their folder."""

import json

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.metric_registry import METRICS
from seqpe_jax.reporting import cost_table, plots, report, tables
from seqpe_jax.reporting.study import read_study
from tests.reporting.test_report import make_run

BITS, FOUND = METRICS["text"][0], METRICS["questions"][0]


def benchmark(path, mode="train", ratios=(("alibi", 2.0), ("rotary", 0.5)), **changed):
    """As `benchmark` writes it: alibi takes half the time of the first, rotary twice; memory 8, 4, 16 bytes."""
    kinds = ["seqpe", *(kind for kind, _ in ratios)]
    runs = [
        {"encoding": kind, "mode": mode, "length": 16, "batch": 2, "median_s": 1.0, "peak_bytes": held} | changed
        for kind, held in zip(kinds, (8, 4, 16), strict=True)
    ]
    pairs = {f"seqpe/{kind}": {"time": time, "memory": 1.0} for kind, time in ratios}
    path.write_text(json.dumps({"device": "cpu", "runs": runs, "ratios": pairs}))


def cells(table):
    return {row[0].text: [cell.text + cell.after for cell in row[1:]] for row in table.rows}


@pytest.fixture
def runs(tmp_path):
    make_run(tmp_path / "seqpe-0", bits=((16, 2.0), (64, 2.5), (128, 2.5), (256, 9.0)))
    make_run(tmp_path / "seqpe-1", seed=1, bits=((16, 2.0), (64, 2.5), (128, 2.0), (256, 9.0)))
    make_run(tmp_path / "alibi", "alibi", bits=((16, 3.0), (128, 1.5)))
    make_run(tmp_path / "fox", "fox", bits=((16, 3.0),))
    make_run(tmp_path / "rotary", "rotary", bits=())
    return tmp_path


def test_retention_is_of_each_run_and_says_its_direction(runs):
    table = cost_table.retention_table(read_study(runs), "text", BITS, [])
    assert (
        list(table.header) == ["encoding", "at 16 (1x)", "at 128 (8x)", "retention"]
        and "Retention: value at 16 over 128" in table.note
    )
    # Half the interval of two values is 12.706205 times their distance over 2, by t with one degree of freedom.
    assert cells(table) == {
        "seqpe": ["2.000 ± 0.000", "2.250 ± 3.177", "0.900 ± 1.271"],
        "alibi": ["3.000", "1.500", "2.000"],
        "fox": ["3.000", "-", "-"],
        "rotary": ["-", "-", "-"],
    }


def test_retention_of_an_accuracy_at_the_farthest_length_without_8x(tmp_path):
    for name, kind, far in (("a", "alibi", 40.0), ("b", "rotary", 0.0)):
        make_run(tmp_path / name, kind, bits=(), data={"name": "stdlib_qa", "length": 128})
        results = [{"length": 128, "examples": 9, "contains": 80.0}, {"length": 512, "examples": 9, "contains": far}]
        (tmp_path / name / "evaluation.json").write_text(json.dumps({"parameters": 1, "results": results}))
    table = cost_table.retention_table(read_study(tmp_path), "questions", FOUND, [])
    assert table.header[2] == "at 512 (4x)" and "Retention: value at 512 over 128" in table.note
    assert cells(table) == {"alibi": ["80.0", "40.0", "0.500"], "rotary": ["80.0", "0.0", "0.000"]}


def test_costs_are_relative_to_rope_and_missing_where_not_measured(runs):
    benchmark(runs / "benchmark_train.json")
    benchmark(runs / "benchmark_eval.json", "eval")
    benchmark(runs / "benchmark_decode.json", "decode")
    study, found = read_study(runs), cost_table.read_benchmarks(runs)
    table = cost_table.retention_table(study, "text", BITS, found)
    assert list(table.header[4:]) == ["training step at 16, time", "memory", "evaluation at 16, time", "memory"]
    assert "relative to rotary, measured in turns on cpu" in table.note
    # seqpe / rotary takes 0.5 of the time, seqpe / alibi 2: so alibi takes a quarter of rotary's.
    costed = {name: own[3:] for name, own in cells(table).items()}
    assert costed == {
        "seqpe": ["0.50", "0.50"] * 2,
        "alibi": ["0.25", "0.25"] * 2,
        "fox": ["-"] * 4,
        "rotary": ["1.00", "1.00"] * 2,
    }
    plot = plots.quality_and_cost(study, found)
    assert plot.alt.endswith("seqpe 2.250 at 0.50 times; alibi 1.500 at 0.25 times.")
    plots.close(plot)
    assert plots.quality_and_cost(study, []) is None and cost_table.missing_commands(study, runs, found) == ""


def test_a_variant_of_an_encoding_does_not_have_the_cost_of_another(runs):
    make_run(runs / "other", bits=((16, 2.0),), encoding={"kind": "seqpe", "width": 9})
    benchmark(runs / "benchmark.json")
    table = cost_table.retention_table(read_study(runs), "text", BITS, cost_table.read_benchmarks(runs))
    assert [own[3] for name, own in cells(table).items() if name.startswith("seqpe")] == ["-", "-"]


def test_the_commands_that_measure_missing_costs_are_named(runs, tmp_path_factory, without_plots):
    points = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/config.json")}
    variants = {name: own["encoding"]["kind"] for name, own in points.items()}
    variants |= {name: "alibi_far" for name, kind in variants.items() if kind == "alibi"}
    trials = {name: {"config": f"configs/x.py:{variants[name]}", "settings": own} for name, own in points.items()}
    (runs / "sweep.json").write_text(json.dumps({"points": trials}))
    benchmark(runs / "benchmark_eval.json", "eval")
    out = tmp_path_factory.mktemp("out")
    report.write_report(runs, out)
    compared = "--compare=rotary,seqpe,alibi_far,fox"
    line = f"python -m seqpe_jax.benchmark --config=configs/x.py {compared} --mode=train --output={runs}"
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert f"{line}/benchmark_train.json" in text and "--mode=eval" not in text


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"runs": [{}]}', '{"runs": [{"length": 3}], "ratios": {}}'])
def test_a_broken_benchmark_is_named(tmp_path, content):
    make_run(tmp_path / "run")
    (tmp_path / "benchmark.json").write_text(content)
    with pytest.raises(InputError, match=r"benchmark.json is not as `benchmark --output` writes it"):
        report.write_report(tmp_path, tmp_path / "out")


def test_a_benchmark_without_its_ratios_is_named(tmp_path):
    benchmark(tmp_path / "benchmark.json")
    content = json.loads((tmp_path / "benchmark.json").read_text())
    (tmp_path / "benchmark.json").write_text(json.dumps(content | {"ratios": {}}))
    with pytest.raises(InputError, match="write it again, or remove it"):
        cost_table.read_benchmarks(tmp_path)


def test_answers_by_distance_are_those_of_the_longest_prompts(tmp_path, without_plots):
    def distance(near, far, counts=(30, 10)):
        return [
            {"from": low, "to": high, "examples": count, "contains": found}
            for low, high, count, found in ((0, 32, counts[0], near), (32, 64, counts[1], far))
        ]

    for seed, own in ((0, distance(90.0, 50.0)), (1, distance(80.0, None, (40, 0)))):
        folder = tmp_path / f"alibi-{seed}"
        make_run(folder, "alibi", seed, bits=(), data={"name": "stdlib_qa", "length": 128})
        results = [
            {"length": 128, "examples": 40, "contains": 99.0, "distance": distance(99.0, 99.0)},
            {"length": 256, "examples": 40, "contains": 9.0, "distance": own},
        ]
        results[0] |= (
            {"exact_match": 71.0} if seed else {"exact_match_strict": 62.0}
        )  # of an older evaluation, of this one
        (folder / "evaluation.json").write_text(json.dumps({"parameters": 1, "results": results}))
    make_run(tmp_path / "rotary", "rotary", bits=(), data={"name": "stdlib_qa", "length": 128})
    table = tables.by_distance(read_study(tmp_path))
    assert list(table.header) == ["encoding", "0 to 31 (n=35)", "32 to 63 (n=5)"]
    assert cells(table) == {"alibi": ["85.0 ± 63.5", "50.0"], "rotary": ["-", "-"]}
    assert "prompts of 256 tokens" in table.note and "over 1 or 2 seeds" in table.note
    report.write_report(tmp_path, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| alibi | 85.0 ± 63.5 | 50.0 |" in page and "Exact match, as it is written, in percent" in page
    assert "alibi-1: exact matches and F1 are normalised as SQuAD's" in page and "alibi-0: exact" not in page
