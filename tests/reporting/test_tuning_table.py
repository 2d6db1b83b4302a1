"""A sweep with tuning runs in one report: they are in the table of the choice that they decide, and in no other."""

import copy
import json

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.reporting import report, tuning_table
from seqpe_jax.reporting.study import read_study
from tests.reporting.test_report import make_run

FIELD, METRIC = "optimizer.learning_rate", "eval/loss@16"
RATES = (0.001, 0.002, 0.004)


def rate(value):
    return {"optimizer": {"learning_rate": value}}


@pytest.fixture
def sweep(tmp_path):
    """alibi is decided and has one of two runs; rotary waits, as one of its tuning runs failed and one is missing."""
    settings = {"steps": 4, "batch_size": 2, "data": {"name": "text_files", "length": 16}}
    points = {}
    for kind, losses in (("alibi", (2.0, 1.5, 1.75)), ("rotary", (2.5, None, None))):
        best = {FIELD: {"runs": [f"{kind}-r={value}" for value in RATES], "minimise": METRIC}}
        for value, name, loss in zip(RATES, best[FIELD]["runs"], losses, strict=True):
            points[name] = {"settings": settings | rate(value) | {"seed": 0, "encoding": {"kind": kind}}}
            if loss is not None:
                make_run(tmp_path / name, kind, 0, bits=(), **rate(value))
                lines = [{"step": 2, METRIC: 0.5}, {"step": 4, "time": 3.0, METRIC: loss}]
                (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for seed in (1, 2):
            points[f"{kind}-{seed}"] = {
                "settings": settings | rate(0.001) | {"seed": seed, "encoding": {"kind": kind}},
                "best": best,
            }
    for seed in (1, 2):
        points[f"alibi-{seed}"]["decided"] = {FIELD: {"value": 0.002, "run": "alibi-r=0.002", "metric": METRIC}}
        points[f"alibi-{seed}"]["settings"] |= rate(0.002)
    make_run(tmp_path / "alibi-1", "alibi", 1, bits=((16, 3.0), (128, 3.5)), **rate(0.002))
    make_run(tmp_path / "rotary-r=0.004", "rotary", 0, bits=(), metrics=False, **rate(0.004))
    (tmp_path / "rotary-r=0.004" / "log.txt").write_text("== failed: train, exit code 1: step 3 is not finite\n")
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    return tmp_path


def test_tuning_runs_are_in_no_row(sweep, tmp_path_factory, without_plots):
    study = read_study(sweep)
    assert study.rows == ["alibi", "rotary"] and [run.name for run in study.runs_of("alibi")] == ["alibi-1", "alibi-2"]
    assert [run.name for run in study.tuning_runs] == [
        f"{kind}-r={value}" for kind in ("alibi", "rotary") for value in RATES
    ]
    out = tmp_path_factory.mktemp("out")
    main = report.write_report(sweep, out)
    assert "| alibi | **3.000** (1 of 2) | **3.500** (1 of 2) | 1,234 | 2.75 M |\n| rotary | - | - | - | - |" in main
    page, rows = (out / "report.md").read_text(), (out / "results.csv").read_text()
    assert "r=0.001" not in rows and "| alibi-r=0.001 | tuning | 0 | finished | 4 | - | 3 |" in page
    assert "| optimizer.learning_rate | 0.002 | alibi |" in page and "| not decided yet | rotary |" in page


def test_the_last_measurement_and_the_choice_are_shown(sweep):
    [table] = tuning_table.tuning_tables(read_study(sweep))
    assert (
        list(table.header) == ["encoding", "0.001", "0.002", "0.004", "chosen"]
        and "seed 0; lower is better" in table.note
    )
    shown = {row[0].text: [f"*{cell.text}*" if cell.best else cell.text for cell in row[1:]] for row in table.rows}
    assert shown == {
        "alibi": ["2.0000", "*1.5000*", "1.7500", "0.002"],
        "rotary": ["2.5000", "-", "-", "-"],
    }
    assert "may lie outside it" not in table.note


def test_the_best_of_several_runs_with_a_value_is_shown(sweep):
    """As where a constant of the encoding is combined with each learning rate: each field has a table of its own."""
    path = sweep / "sweep.json"
    record = json.loads(path.read_text())
    for run, theta in (("alibi-r=0.001", 10.0), ("alibi-r=0.002", 10.0), ("alibi-r=0.004", 100.0)):
        config = json.loads((sweep / run / "config.json").read_text())
        config["encoding"]["theta"] = record["points"][run]["settings"]["encoding"]["theta"] = theta
        (sweep / run / "config.json").write_text(json.dumps(config))
    for seed in (1, 2):
        point = record["points"][f"alibi-{seed}"]
        for part in ("best", "decided"):
            point[part]["encoding.theta"] = dict(point[part][FIELD])
        point["decided"]["encoding.theta"]["value"] = 10.0
    path.write_text(json.dumps(record))
    _, table = tuning_table.tuning_tables(read_study(sweep))
    assert table.header[1:] == ["10.0", "100.0", "chosen"] and "the best of several runs is shown" in table.note
    assert [[cell.text for cell in row] for row in table.rows] == [["alibi", "1.5000", "1.7500", "10.0"]]


def test_a_choice_at_an_end_of_the_grid_is_noted(sweep):
    path = sweep / "sweep.json"
    record = json.loads(path.read_text())
    for seed in (1, 2):
        record["points"][f"alibi-{seed}"]["decided"][FIELD] |= {"value": 0.004, "run": "alibi-r=0.004"}
    path.write_text(json.dumps(record))
    [table] = tuning_table.tuning_tables(read_study(sweep))
    assert table.note.endswith("so that the best value may lie outside it: alibi.")
    # The same where another row has one value more.
    record["points"]["rotary-r=0.008"] = copy.deepcopy(record["points"]["rotary-r=0.004"])
    record["points"]["rotary-r=0.008"]["settings"] |= rate(0.008)
    for seed in (1, 2):
        record["points"][f"rotary-{seed}"]["best"][FIELD]["runs"].append("rotary-r=0.008")
    path.write_text(json.dumps(record))
    [table] = tuning_table.tuning_tables(read_study(sweep))
    assert list(table.header)[1:] == ["0.001", "0.002", "0.004", "0.008", "chosen"]
    assert table.note.endswith("so that the best value may lie outside it: alibi.")


def test_missing_tuning_runs_are_noted_in_a_line_each(sweep):
    lines = [line for line in report.notes(read_study(sweep)) if "r=" in line]
    assert lines == [
        "rotary-r=0.002 is missing: not started; optimizer.learning_rate of rotary waits for it",
        "rotary-r=0.004 is missing: failed at step 0 of 4: train, exit code 1: step 3 is not finite; "
        "optimizer.learning_rate of rotary waits for it",
    ]
    (sweep / "alibi-r=0.001" / "metrics.jsonl").unlink()
    assert "alibi was chosen without it" in tuning_table.tuning_notes(read_study(sweep))[0]


@pytest.mark.parametrize(
    "best,message",
    [
        ({FIELD: {"minimise": METRIC}}, "does not say which runs decide"),
        ({FIELD: {"runs": ["nobody"], "minimise": METRIC}}, "has no point 'nobody', which decides others"),
    ],
)
def test_a_record_that_names_no_run_is_refused(sweep, best, message):
    path = sweep / "sweep.json"
    record = copy.deepcopy(json.loads(path.read_text()))
    record["points"]["alibi-1"]["best"] = best
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        read_study(sweep)


def test_rows_that_choose_their_parts_are_in_one_table(sweep):
    """alibi's best trial is its second; rotary's is open, and one of its trials failed."""
    path = sweep / "sweep.json"
    record = json.loads(path.read_text())
    for kind in ("alibi", "rotary"):
        del record["points"][f"{kind}-2"]
        one = record["points"][f"{kind}-1"]["best"][FIELD]
        fields = (FIELD, "encoding.rotary_pairs", "encoding.gate")
        record["points"][f"{kind}-1"]["best"] = dict.fromkeys(fields, one)
    decided = record["points"]["alibi-1"]["decided"]
    decided["encoding.gate"] = decided[FIELD] | {"value": "forget"}
    path.write_text(json.dumps(record))
    [table] = tuning_table.tuning_tables(read_study(sweep))
    assert [cell.text for cell in table.rows[0]] == [
        "alibi",
        "3 of 3",
        "2.0000",
        "1.5000",
        "none",
        "0.002",
        "gate=forget",
        "1,234",
        "2.75 M",
    ]
    assert [cell.text for cell in table.rows[1]][:5] == [
        "rotary",
        "1 of 3",
        "2.5000",
        "2.5000",
        "so far rotary-r=0.001",
    ]
    assert METRIC in table.note
