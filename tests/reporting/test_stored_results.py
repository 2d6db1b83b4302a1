"""A study's report from its results file alone: rows, missing runs, chosen parts, and the outcome for SeqPE."""

import json
import math

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.metric_registry import METRICS
from seqpe_jax.reporting import report, tuning_table
from seqpe_jax.reporting.significance import outcome_sentence, outcomes
from seqpe_jax.reporting.stored_results import StoredResults, read_stored_study
from tests.reporting.test_significance import study

LOSS, BITS = "eval/loss@64", METRICS["text"][0]
FIELDS = ["encoding.rotary_pairs", "encoding.gate", "optimizer.learning_rate"]
TRIALS = {  # settings, loss
    "plain": ({}, 2.0),
    "pairs": ({"encoding.rotary_pairs": 4}, 1.8),
    "gate": ({"encoding.gate": "forget"}, 1.9),
    "two": ({"encoding.rotary_pairs": 4, "encoding.gate": "forget"}, 1.7),
    "learning_rate=0.002": (
        {"encoding.rotary_pairs": 4, "encoding.gate": "forget", "optimizer.learning_rate": 0.002},
        1.6,
    ),
}
CHOSEN = TRIALS["learning_rate=0.002"][0]


def entry(kind, settings, loss=None, bits=None):
    metrics = [{"step": 10, "time": 1.0} | ({LOSS: loss} if loss else {})]
    results = [{"length": 64, "tokens": 9, "bits_per_byte": bits}]
    evaluation = {"step": 10, "parameters": 7, "training_flops": 5e5, "results": results} if bits else {}
    return {"settings": {"encoding.kind": kind} | settings, "metrics": metrics, "evaluation": evaluation}


@pytest.fixture
def results(tmp_path):
    """The content of a file: seqpe is finished; alibi has two of its trials; nothing of fox has begun."""
    shared = {"steps": 10, "seed": 0, "data.name": "stdlib", "data.length": 64, "optimizer.learning_rate": 0.004}
    shared |= {"encoding.rotary_pairs": 0, "encoding.gate": "none"}
    runs = {f"seqpe-{name}": entry("seqpe", own, loss) for name, (own, loss) in TRIALS.items()}
    runs |= {f"seqpe-{seed}": entry("seqpe", CHOSEN | {"seed": seed}, bits=1.5 + 0.1 * seed) for seed in (1, 2)}
    runs |= {f"alibi-{name}": entry("alibi", *TRIALS[name]) for name in ("plain", "pairs")}
    plan = {
        row: {
            "runs": [f"{row}-1", f"{row}-2"],
            "fields": FIELDS,
            "trials": [f"{row}-{trial}" for trial in TRIALS],
            "minimise": LOSS,
        }
        for row in ("seqpe", "alibi", "fox")
    }
    return {"shared": shared, "runs": runs, "plan": plan}


def read(content, folder):
    (folder / "study_tiny.json").write_text(json.dumps(content))
    return read_stored_study(folder / "study_tiny.json")


def test_a_study_that_is_not_finished_is_shown_as_far_as_it_has_come(results, tmp_path, without_plots):
    found = read(results, tmp_path)
    assert found.rows == ["seqpe", "alibi"] and found.not_begun == ["fox"]
    table = report.write_report(None, tmp_path / "out", results=tmp_path / "study_tiny.json")
    assert "| seqpe | **1.650** ± 0.635 | 7 | 500 k |\n| alibi | - | - | - |" in table
    assert report.notes(found) == [
        "Not begun, so in no table: fox",
        "alibi-1, alibi-2 are missing: not started",
        "alibi has 2 of its 5 trials",
    ]
    [parts] = tuning_table.tuning_tables(found)
    assert [[cell.text for cell in row[1:]] for row in parts.rows] == [
        ["5 of 5", "2.0000", "1.6000", "pairs + gate", "0.002", "-", "7", "500 k"],
        ["2 of 5", "2.0000", "1.8000", "so far alibi-pairs", "-", "-", "-", "-"],
    ]
    assert parts.note.endswith("Parts: pairs: rotary_pairs=4; gate: gate=forget.")


def test_shared_fields_that_an_encoding_lacks_are_left_out():
    shared = {"steps": 5, "encoding.kind": "seqpe", "encoding.width": 48, "encoding.layers_with": []}
    stored = StoredResults(shared, {"none-1": entry("none", {}), "seqpe-1": entry("seqpe", {})})
    assert stored.settings_of("none-1") == {"steps": 5, "encoding": {"kind": "none"}}
    assert stored.settings_of("seqpe-1")["encoding"] == {"kind": "seqpe", "width": 48, "layers_with": []}


def test_a_failed_trial_is_left_out_where_runs_are_there(results, tmp_path):
    del results["runs"]["seqpe-learning_rate=0.002"]
    [parts] = tuning_table.tuning_tables(read(results, tmp_path))
    assert [cell.text for cell in parts.rows[0][1:5]] == ["4 of 5", "2.0000", "1.7000", "pairs + gate"]
    del results["runs"]["seqpe-two"]
    for seed in (1, 2):
        del results["runs"][f"seqpe-{seed}"]["settings"]["encoding.gate"]
    [parts] = tuning_table.tuning_tables(read(results, tmp_path))
    assert [cell.text for cell in parts.rows[0][1:5]] == ["3 of 5", "2.0000", "1.8000", "pairs"]


def test_a_file_without_a_plan_or_another_one_is_refused(results, tmp_path):
    with pytest.raises(InputError, match=r"does not say which trials belong to which row.*--status=true"):
        read({"shared": results["shared"], "runs": results["runs"]}, tmp_path)
    with pytest.raises(InputError, match="has no run of its plan"):
        read(results | {"runs": {}}, tmp_path)
    with pytest.raises(InputError, match="is damaged"):
        read(results | {"plan": {"seqpe": {}}}, tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_stored_study(tmp_path / "none.json")


def test_the_outcome_is_against_the_strongest_row_of_another_encoding():
    """a is ahead of b and c at 64, ties with c at 128, is behind c at 256; another row of its kind does not count."""
    good, near, far = (1.0, 1.1, 1.2, 1.1), (1.0, 1.12, 1.19, 1.1), (2.0, 2.1, 2.2, 2.15)
    values = {
        "a": {64: good, 128: near, 256: far},
        "b": {64: far, 128: far, 256: far},
        "c": {64: far, 128: good, 256: good},
        "own": {64: (0.5,) * 4, 128: (0.5,) * 4, 256: (0.5,) * 4},
        "once": {64: (0.1,), 128: (0.1,), 256: (0.1,)},
    }
    made = study(values)
    for run in made.runs:
        if run.row == "own":
            run.config["encoding"]["kind"] = "a"
    found = outcomes(made, "text", BITS, "a")
    assert [(one.label, one.state, one.other) for one in found] == [
        ("64", "ahead", "b"),
        ("128", "tied", "c"),
        ("256", "behind", "c"),
    ]
    assert [one.margin for one in found] == pytest.approx([1.0125, -0.0025, -1.0125])
    words = outcome_sentence(found, BITS)
    assert words.startswith("a against the strongest other encoding: ahead of b at 64, by 1.012 (p ")
    assert "; tied with c at 128 (0.002 behind, p " in words and "; behind c at 256, by 1.012 (p " in words
    [alone] = outcomes(study({"a": {64: (1.0,)}, "b": {64: (1.5,)}}), "text", BITS, "a")
    assert alone.state == "untested" and math.isnan(alone.p)
    assert outcome_sentence([alone], BITS).endswith("ahead of b at 64, by 0.500 (one seed, so no test).")
