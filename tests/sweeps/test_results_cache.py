"""The results file: a sweep goes on with it in an empty folder, and mixes nothing up."""

import dataclasses
import json
import pathlib

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.reporting import study
from seqpe_jax.sweeps import local, trial_graph
from seqpe_jax.sweeps.results_cache import ResultsCache
from seqpe_jax.sweeps.spec import FolderOf
from tests.sweeps.fake import FakeRun, headers
from tests.sweeps.test_trial_graph import TRIALS, begun, trial, wishes  # noqa: F401


def worked(
    workdir: pathlib.Path, file: pathlib.Path, trials=TRIALS, names=None
) -> tuple[trial_graph.TrialGraph, list[str], list[str]]:
    """What the command does with `--results`."""
    cache = ResultsCache(file, trials)
    found = begun(workdir, trials)
    restored, decided = cache.restore(found)
    runs = list(found.runs.values())
    todo = [run for run in runs if run.remaining_commands() and run.name in (names or found.runs)]
    local.execute(runs, todo, 1, found, cache.update)
    cache.update(found.runs.values())
    return found, restored, decided


def test_a_sweep_goes_on_in_an_empty_folder_with_its_results_file(tmp_path, wishes):  # noqa: F811
    file = tmp_path / "results" / "study.json"
    first, restored, decided = worked(tmp_path / "first", file, names={"t=1", "t=2", "t=3", "s-1"})
    assert not restored and not decided and first.runs["s-2"].remaining_commands()
    before = file.read_bytes()
    assert [*json.loads(before)["runs"]] == ["t=1", "t=2", "t=3", "s-1"]
    chosen = {"fields": ["batch_size"], "trials": ["t=1", "t=2", "t=3"], "minimise": "eval/loss@16"}
    assert json.loads(before)["plan"] == {"s": {"runs": ["s-1", "s-2"]} | chosen}
    older = before.decode().replace("encoding.gate_bias_init", "encoding.gate_bias")  # as versions of before named it
    assert older != before.decode() and file.write_text(older)

    second, restored, decided = worked(tmp_path / "second", file)
    assert restored == ["t=1", "t=2", "t=3", "s-1"]
    assert decided == ["s-1, s-2: batch_size=16 (t=2 has the best eval/loss@16, 0.25)"]
    assert (
        headers(second.runs["s-2"]) == ["train", "evaluate"] and not (tmp_path / "second" / "s-1" / "log.txt").exists()
    )
    assert not any(run.remaining_commands() for run in second.runs.values())
    after = json.loads(file.read_text())
    assert after["runs"].pop("s-2")["metrics"][-1]["step"] == 3 and after == json.loads(before)

    written = file.stat().st_mtime_ns
    third, restored, _ = worked(tmp_path / "third", file)
    assert (
        len(restored) == 5
        and not any(run.remaining_commands() for run in third.runs.values())
        and file.stat().st_mtime_ns == written
    )
    runs = {run.name: run for run in study.read_study(tmp_path / "third").runs}
    assert runs["s-1"].config["batch_size"] == 16 and runs["s-1"].config["seed"] == 1 and not runs["s-1"].unfinished
    assert worked(tmp_path / "third", file)[1] == []


def test_what_a_folder_has_itself_stays(tmp_path, wishes):  # noqa: F811
    file = tmp_path / "study.json"
    worked(tmp_path / "first", file, TRIALS[:3])
    (tmp_path / "second" / "t=1").mkdir(parents=True)
    (tmp_path / "second" / "t=1" / "config.json").write_text("{}")
    (tmp_path / "second" / "sweep.json").write_text((tmp_path / "first" / "sweep.json").read_text())
    second, restored, _ = worked(tmp_path / "second", file, TRIALS[:3])
    assert restored == ["t=2", "t=3"] and headers(second.runs["t=1"])[:1] == ["train"]


def test_evaluations_are_stored_without_their_curves_and_paths(tmp_path):
    run = FakeRun(trial("a"), tmp_path / "a")
    (run.folder / "checkpoints" / "3").mkdir(parents=True)
    (run.folder / "config.json").write_text("{}")
    lines = [{"step": 1, "train/loss": 1.0}, {"step": 2, "eval/loss@16": 0.5}, {"step": 3, "train/loss": 0.75}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"length": 16, "loss": 0.1 + 0.2}
    (run.folder / "evaluation.json").write_text(
        json.dumps(
            {
                "checkpoint": str(run.folder),
                "step": 3,
                "results": [result | {"loss_by_position": {"position": [1], "loss": [1.0]}}],
            }
        )
    )
    ResultsCache(tmp_path / "results.json").update([run])
    cache = json.loads((tmp_path / "results.json").read_text())
    assert cache["runs"]["a"] == {"settings": {}, "metrics": lines[1:], "evaluation": {"step": 3, "results": [result]}}
    assert cache["shared"]["batch_size"] == run.trial.settings.batch_size
    assert ResultsCache(tmp_path / "results.json").restore(begun(tmp_path / "again", (run.trial,))) == (["a"], [])
    [stored] = study.read_study(tmp_path / "again").runs
    assert stored.state == "finished" and stored.steps_done == 3


def test_another_run_of_the_name_is_refused_and_nothing_is_made(tmp_path, wishes):  # noqa: F811
    file = tmp_path / "study.json"
    worked(tmp_path / "first", file, TRIALS[:3])
    changed = (*TRIALS[:2], trial("t=3", batch_size=5))
    with pytest.raises(InputError, match=r"run 't=3' is another one there \(batch_size: 24 -> 5\): give it a new name"):
        ResultsCache(file).restore(begun(tmp_path / "second", changed))
    assert not (tmp_path / "second" / "t=3").exists()
    old = json.loads(file.read_text())
    old["runs"]["t=1"]["settings"] = {"batch_sise": 3}
    file.write_text(json.dumps(old))
    with pytest.raises(InputError, match="run 't=1' cannot be read by this version: .*batch_sise"):
        ResultsCache(file).restore(begun(tmp_path / "third", TRIALS[:3]))


def test_a_run_that_was_a_trial_is_evaluated_here(tmp_path, wishes):  # noqa: F811
    file = tmp_path / "study.json"
    worked(tmp_path / "first", file, TRIALS)
    alone = (dataclasses.replace(TRIALS[0]),)
    again, restored, _ = worked(tmp_path / "second", file, alone)
    assert restored == [] and headers(again.runs["t=1"]) == ["train", "evaluate"]
    assert json.loads(file.read_text())["runs"]["t=1"]["evaluation"]["step"] == 3


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"runs": {}}', '{"shared": {}, "runs": []}', '{"shared": {}, "runs": {"a": {"metrics": 1}}}'],
)
def test_another_file_is_refused_in_a_line(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="holds no results of a sweep, or is damaged"):
        ResultsCache(tmp_path / "results.json")


def test_a_run_begins_with_the_folder_of_another(tmp_path, wishes):  # noqa: F811
    """In whichever folder the sweep is: the results file has the name alone."""
    base, tuned = trial("base-1", seed=1), trial("tuned-1", seed=1, batch_size=16)
    trials = (base, dataclasses.replace(tuned, best={"init_from": FolderOf("base-1")}))
    file = tmp_path / "study.json"
    first = worked(tmp_path / "first", file, trials)[0]
    assert [headers(run) for run in first.runs.values()] == [["train", "evaluate"]] * 2
    folder = str(tmp_path / "first" / "base-1")
    assert first.runs["tuned-1"].trial.overrides["init_from"] == folder
    assert f"--config.init_from={folder}" in first.runs["tuned-1"].trial.arguments
    recorded = json.loads((tmp_path / "first" / "sweep.json").read_text())["points"]["tuned-1"]
    assert recorded["begins_with"] == {"init_from": "base-1"} and "best" not in recorded
    assert recorded["decided"] == {"init_from": {"value": folder, "run": "base-1"}}
    second, restored, decided = worked(tmp_path / "second", file, trials)
    assert restored == ["base-1", "tuned-1"] and str(tmp_path) not in file.read_text()
    assert decided == [f"tuned-1: init_from={tmp_path}/second/base-1 (base-1 is finished)"]
    rows = {run.name: run.row for run in study.read_study(tmp_path / "second").runs}
    assert rows == {"base-1": "base-1", "tuned-1": "tuned-1"} and not second.blocked_runs([])
    more = (*trials, dataclasses.replace(trial("longer-1", seed=1), best={"init_from": FolderOf("base-1")}))
    added, restored, _ = worked(tmp_path / "added", file, more)
    assert restored == ["tuned-1"], "base-1 is trained again: the file has no checkpoint for longer-1"
    assert [headers(added.runs[name]) for name in ("base-1", "longer-1")] == [["train", "evaluate"]] * 2
    wishes["base-1"] = "fails"
    third = worked(tmp_path / "third", tmp_path / "other.json", trials)[0]
    assert third.blocked_runs([third.runs["tuned-1"]]) == ["tuned-1 waits for base-1 (failed) to decide init_from"]
