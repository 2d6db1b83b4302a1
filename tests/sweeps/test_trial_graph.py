"""Runs that wait for others: the best one decides once and is recorded, missing and failed runs are reported in a line."""

import dataclasses
import json
import os
import pathlib
import signal
import threading
import time

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.sweeps import local, slurm, spec, trial_graph
from seqpe_jax.sweeps.spec import BestOf, SweepFile, Trial, make_trial
from seqpe_jax.sweeps.trial_graph import TrialGraph
from tests.sweeps.fake import FakeRun, headers
from tests.tiny import ROOT

PAGE = f"{ROOT}/tests/tiny_text.py:alibi"
COMMON = {"steps": 3, "eval.every": 3, "data.paths": ("x",)}
DECIDES = BestOf(("t=1", "t=2", "t=3"), minimise="eval/loss@16")


def trial(name: str, best: BestOf | None = None, **fields) -> Trial:
    return dataclasses.replace(make_trial(name, PAGE, COMMON | fields), best={"batch_size": best} if best else {})


TRIALS = (
    *(trial(f"t={number}", batch_size=8 * number) for number in (1, 2, 3)),
    *(trial(f"s-{seed}", DECIDES, seed=seed) for seed in (1, 2)),
)


@pytest.fixture
def wishes(monkeypatch) -> dict[str, str]:
    """What the runs measure, or how they end, by name."""
    found: dict[str, str] = {"t=1": "0.5", "t=2": "0.25", "t=3": "0.5"}

    def made(trial, folder, evaluated=True):
        return FakeRun(trial, folder, evaluated=evaluated, wish=found.get(trial.name, "well"))

    monkeypatch.setattr(trial_graph, "SweepRun", made)
    return found


def begun(workdir: pathlib.Path, trials=TRIALS) -> TrialGraph:
    trial_graph.record_trials(workdir, SweepFile("sweep.py", PAGE, trials, None), trials)
    return TrialGraph(workdir, trials)


def worked(workdir: pathlib.Path, jobs: int = 1, trials=TRIALS, names=None, retry: bool = False) -> TrialGraph:
    """What the command does with it."""
    found = begun(workdir, trials)
    runs = list(found.runs.values())
    todo = [
        run
        for run in runs
        if run.remaining_commands() and run.name in (names or found.runs) and bool(run.failure()) == retry
    ]
    found.decide({run.name for run in todo})
    local.execute(list(found.runs.values()), found.updated(todo), jobs, found)
    return found


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_best_tuning_run_decides_and_is_recorded(tmp_path, wishes, jobs, capsys):
    found = worked(tmp_path, jobs)
    line = "s-1, s-2: batch_size=16 (t=2 has the best eval/loss@16, 0.25)"
    assert [one for one in capsys.readouterr().out.splitlines() if one == f"  {line}"] == [f"  {line}"]
    assert [headers(found.runs[name]) for name in ("t=2", "s-1", "s-2")] == [["train"], *[["train", "evaluate"]] * 2]
    assert found.runs["s-1"].trial.settings.batch_size == 16 and found.runs["s-1"].trial.overrides["batch_size"] == 16
    record = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert record["s-2"]["settings"]["batch_size"] == 16 and "decided" not in record["t=2"]
    assert record["s-2"]["best"] == {"batch_size": {"runs": ["t=1", "t=2", "t=3"], "minimise": "eval/loss@16"}}
    assert record["s-2"]["decided"] == {
        "batch_size": {
            "value": 16,
            "run": "t=2",
            "metric": "eval/loss@16",
            "measured": {"t=1": 0.5, "t=2": 0.25, "t=3": 0.5},
        }
    }
    before = (tmp_path / "sweep.json").stat().st_mtime_ns
    again = worked(tmp_path)
    assert not any(run.remaining_commands() for run in again.runs.values()) and headers(again.runs["s-1"]) == [
        "train",
        "evaluate",
    ]
    assert (tmp_path / "sweep.json").stat().st_mtime_ns == before and again.blocked_runs(
        list(again.runs.values())
    ) == []


def test_more_may_be_better_and_of_equal_ones_the_first_is_taken(tmp_path, wishes):
    most = BestOf(DECIDES.runs, maximise="eval/loss@16")
    found = worked(tmp_path, trials=(*TRIALS[:3], trial("s-1", most, seed=1)))
    assert found.runs["s-1"].trial.settings.batch_size == 8


def test_the_best_parts_are_combined_and_later_trials_start_from_the_best_so_far(tmp_path, wishes, capsys):
    """plain 0.5, a 0.4, b 0.3, c 0.45: `two` has the parts of b and a; it wins, so `rate` and then the seed have both."""
    wishes |= {"plain": "0.5", "a": "0.4", "b": "0.3", "c": "0.45", "two": "0.2", "rate": "0.25"}
    metric = "eval/loss@16"
    fields = ("batch_size", "encoding.gate", "encoding.gate_bias_init", "report.every")
    two = BestOf(("a", "b", "c"), metric, count=2, base="plain")
    parts = {
        "a": {"batch_size": 16},
        "b": {"encoding.gate": "forget", "encoding.gate_bias_init": 4.0},
        "c": {"report.every": 7},
    }
    body = {"plain": {}, **parts, "two": dict.fromkeys(fields, two)}
    body["rate"] = {**dict.fromkeys(fields, BestOf(tuple(body), metric)), "optimizer.learning_rate": 0.5}
    body["s-1"] = {"seed": 1, **dict.fromkeys((*fields, "optimizer.learning_rate"), BestOf(tuple(body), metric))}
    trials = spec._checked_trials(PAGE, ((name, COMMON | own) for name, own in body.items()))
    found = worked(tmp_path, trials=trials)
    values = {name: [spec.value_of(found.runs[name].trial.settings, field) for field in fields] for name in body}
    both = [16, "forget", 4.0, values["plain"][3]]
    assert values["two"] == values["rate"] == values["s-1"] == both
    assert found.runs["rate"].trial.settings.optimizer.learning_rate == 0.5
    assert (
        found.runs["s-1"].trial.settings.optimizer.learning_rate
        == found.runs["two"].trial.settings.optimizer.learning_rate
    )
    assert "report.every" not in found.runs["s-1"].trial.overrides  # the config's own value is no option
    lines = capsys.readouterr().out
    assert "two: batch_size=16 (as in a, eval/loss@16 0.4)" in lines
    assert "encoding.gate=forget (two has the best eval/loss@16, 0.2)" in lines
    assert json.loads((tmp_path / "sweep.json").read_text())["points"]["two"]["best"]["batch_size"]["count"] == 2
    again = worked(tmp_path, trials=trials)
    assert again.runs["s-1"].trial == found.runs["s-1"].trial


def test_a_gate_that_no_chosen_run_has_leaves_no_option_behind(tmp_path, wishes):
    """`gate_bias_init` is refused as an option without a gate."""
    wishes |= {"plain": "0.1", "b": "0.3"}
    fields = ("encoding.gate", "encoding.gate_bias_init")
    body = {"plain": {}, "b": {"encoding.gate": "forget", "encoding.gate_bias_init": 4.0}}
    body["s-1"] = {"seed": 1, **dict.fromkeys(fields, BestOf(("plain", "b"), "eval/loss@16"))}
    trials = spec._checked_trials(PAGE, ((name, COMMON | own) for name, own in body.items()))
    chosen = worked(tmp_path, trials=trials).runs["s-1"].trial
    assert chosen.settings.encoding.gate == "none" and not chosen.overrides.keys() & set(fields)


def test_a_sweep_that_was_killed_goes_on_with_what_was_decided(tmp_path, wishes):
    """A seed that is added later takes the rate of those that have begun, whatever a run would measure now."""
    worked(tmp_path, names=["t=1", "t=2", "t=3", "s-1"])
    path = tmp_path / "t=1" / "metrics.jsonl"
    path.write_text(path.read_text().replace("0.5", "0.125"))
    trials = (*TRIALS, trial("s-3", DECIDES, seed=3))
    found = worked(tmp_path, trials=trials)
    assert [found.runs[f"s-{seed}"].trial.settings.batch_size for seed in (1, 2, 3)] == [16] * 3
    assert {name for name in trial_graph.recorded_decisions(tmp_path)} == {"s-1", "s-2", "s-3"}


def test_a_failed_run_is_left_out_and_named(tmp_path, wishes, capsys):
    wishes["t=2"] = "fails"
    found = worked(tmp_path)
    line = "s-1, s-2: batch_size=8 (t=1 has the best eval/loss@16, 0.5; without t=2, which failed)"
    assert line in capsys.readouterr().out
    assert found.decisions["s-1"]["batch_size"]["measured"] == {"t=1": 0.5, "t=2": None, "t=3": 0.5}
    assert not found.runs["s-2"].remaining_commands()


def test_where_all_failed_nothing_begins_and_one_line_says_so(tmp_path, wishes):
    wishes |= dict.fromkeys(("t=1", "t=2", "t=3"), "fails")
    found = worked(tmp_path)
    [line] = found.blocked_runs(list(found.runs.values()))
    assert line == "s-1, s-2 wait for t=1 (failed), t=2 (failed), t=3 (failed) to decide batch_size"
    assert not (tmp_path / "s-1").exists() and trial_graph.recorded_decisions(tmp_path) == {}
    wishes |= {"t=1": "0.5", "t=2": "0.5", "t=3": "0.25"}
    worked(tmp_path, retry=True)
    found = worked(tmp_path)
    assert found.runs["s-1"].trial.settings.batch_size == 24 and not found.runs["s-1"].remaining_commands()


def test_a_mended_run_counts_as_long_as_nothing_has_begun(tmp_path, wishes):
    wishes["t=2"] = "fails"
    worked(tmp_path, names=["t=1", "t=2", "t=3"])
    worked(tmp_path, retry=True)
    assert trial_graph.recorded_decisions(tmp_path) == {}, "a run that is tried again is waited for"
    assert begun(tmp_path).decide() and trial_graph.recorded_decisions(tmp_path)["s-1"]["batch_size"]["value"] == 8
    wishes["t=2"] = "0.125"
    worked(tmp_path, retry=True)
    assert worked(tmp_path).runs["s-1"].trial.settings.batch_size == 16


def test_a_run_without_its_number_is_named(tmp_path, wishes):
    wishes |= dict.fromkeys(("t=1", "t=2", "t=3"), "1e999")
    found = worked(tmp_path)
    [line] = found.blocked_runs(list(found.runs.values()))
    assert line.startswith("s-1, s-2 wait for t=1 (measured no number)")


def test_a_stop_of_tuning_runs_starts_no_other_run(tmp_path, wishes):
    wishes["t=2"] = "waits"

    def send():
        while not (tmp_path / "t=2" / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    found = worked(tmp_path)
    sender.join()
    assert not (tmp_path / "s-1").exists()
    [line] = found.blocked_runs(list(found.runs.values()))
    assert line == "s-1, s-2 wait for t=2 (not finished), t=3 (not finished) to decide batch_size"
    wishes["t=2"] = "0.25"
    assert worked(tmp_path).runs["s-2"].trial.settings.batch_size == 16


def test_runs_chosen_without_those_that_decide_are_refused(tmp_path, wishes):
    found = begun(tmp_path)
    with pytest.raises(InputError, match="'s-1' depends on t=1, t=2, t=3 .they select batch_size.: add them to --only"):
        found.check_selection([found.runs["s-1"]])
    found.check_selection(list(found.runs.values()))
    found = worked(tmp_path, names=["t=1", "t=2", "t=3"])
    found.check_selection([found.runs["s-1"]])


def test_the_runs_that_decide_cannot_change(tmp_path, wishes):
    worked(tmp_path)
    fewer = BestOf(("t=1", "t=2"), minimise="eval/loss@16")
    for best in (fewer, BestOf(DECIDES.runs, maximise="eval/loss@16")):
        with pytest.raises(InputError, match=r"has changed since .*, in 's-1' \(batch_size\."):
            begun(tmp_path, (*TRIALS[:3], trial("s-1", best, seed=1), TRIALS[4]))
    with pytest.raises(InputError, match=r"in 's-1' \(seed: 1 -> 7\)"):
        begun(tmp_path, (*TRIALS[:3], trial("s-1", DECIDES, seed=7), TRIALS[4]))


def test_slurm_gets_one_array_after_another(tmp_path, wishes, monkeypatch):
    arrays = []

    def execute_array(workdir, runs, todo, jobs, options, *, cluster):
        arrays.append([(run.name, run.trial.settings.batch_size) for run in todo])
        return local.execute(runs, todo, 2)

    monkeypatch.setattr(slurm, "execute_array", execute_array)
    found = begun(tmp_path)
    assert slurm.execute(tmp_path, list(found.runs.values()), list(found.runs.values()), None, {}, found) is None
    assert arrays == [[("t=1", 8), ("t=2", 16), ("t=3", 24)], [("s-1", 16), ("s-2", 16)]]
