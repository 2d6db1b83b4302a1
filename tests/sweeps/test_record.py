"""A sweep that was edited after it began: new trials are added, changed ones refused by name."""

import dataclasses
import json

import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.sweeps import trial_graph
from seqpe_jax.sweeps.spec import Range, Search, SweepFile, Trial
from tests.tiny import tiny_config


def trial(name: str, **overrides) -> Trial:
    fields = {field.replace("__", "."): value for field, value in overrides.items()}
    return Trial(name, "tests/tiny_text.py", fields, tiny_config(**overrides))


def record_trials(workdir, *trials: Trial, search: Search | None = None) -> list[str]:
    return trial_graph.record_trials(workdir, SweepFile("sweep.py", "tests/tiny_text.py", trials, search), trials)


def test_new_trials_are_added_to_recorded_ones(tmp_path):
    workdir = tmp_path / "sweep"
    assert record_trials(workdir, trial("a"), trial("b", seed=1)) == []
    before = (workdir / "sweep.json").stat().st_mtime_ns
    assert record_trials(workdir, trial("a"), trial("b", seed=1)) == []
    assert (workdir / "sweep.json").stat().st_mtime_ns == before
    assert record_trials(workdir, trial("a"), trial("c", seed=2)) == ["b"]
    trials = json.loads((workdir / "sweep.json").read_text())["points"]
    assert list(trials) == ["a", "b", "c"]
    assert config.from_dict(trials["c"]["settings"]) == tiny_config(seed=2) and trials["b"]["overrides"] == {"seed": 1}


def test_changed_trials_are_refused_by_name(tmp_path):
    record_trials(tmp_path, trial("a"), trial("b", seed=1), trial("c", eval__lengths=(16,)))
    record = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(InputError) as refused:
        record_trials(
            tmp_path, trial("a"), trial("b", seed=2, steps=8), trial("c", eval__lengths=(32,)), trial("d", seed=5)
        )
    words = str(refused.value)
    assert "'b' (seed: 1 -> 2, steps: 6 -> 8)" in words and "'c' (eval.lengths: (16,) -> (32,))" in words
    assert "'a'" not in words and "'d'" not in words
    assert (tmp_path / "sweep.json").read_bytes() == record


def test_fields_that_came_later_are_no_change(tmp_path):
    record_trials(tmp_path, trial("a"))
    record = json.loads((tmp_path / "sweep.json").read_text())
    del record["points"]["a"]["settings"]["mesh"]
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    assert record_trials(tmp_path, trial("a")) == []
    record["points"]["a"]["settings"]["gone"] = 1
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="run 'a'.*gone"):
        record_trials(tmp_path, trial("a"))


def test_a_search_keeps_its_ranges(tmp_path):
    search = Search({"seed": Range(0, 9)}, minimise="eval/loss@16", trials=3)
    record_trials(tmp_path, search=search)
    record_trials(tmp_path, search=dataclasses.replace(search, trials=5))
    with pytest.raises(InputError, match=r"ranges.seed.high: 9 -> 8"):
        record_trials(tmp_path, search=dataclasses.replace(search, ranges={"seed": Range(0, 8)}))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": []}', '{"points": {"a": {}}}', '{"points": {"a": 3}}'])
def test_a_damaged_record_is_refused(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(InputError, match="sweep.json is damaged"):
        record_trials(tmp_path, trial("a"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(tiny_config())))
    with pytest.raises(InputError, match="holds other things"):
        record_trials(tmp_path, trial("a"))
    with pytest.raises(InputError, match="holds other things"):
        record_trials(tmp_path / "config.json", trial("a"))
    assert not (tmp_path / "sweep.json").exists()
