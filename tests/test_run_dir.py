"""A run's folder as one object: each file is read once, and anew after `reload` or by another object."""

import json
import types

import pytest

from seqpe_jax import config, files
from seqpe_jax.errors import CheckpointGone, InputError, look_again
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training.checkpoint import Checkpointer
from tests.tiny import tiny_config


@pytest.fixture(params=["disk", "bucket"])
def path(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "run"
    return files.as_path(request.getfixturevalue("store").folder) / "run"


def test_files_come_back_and_are_read_once(path):
    settings, run = tiny_config(), RunDir(path)
    assert not run.exists and not run.is_model() and run.latest_step() is None and run.read_metrics() == []
    run.write_config(config.to_dict(settings))
    run.write_fingerprints({"train": {"tokens": 7, "fingerprint": "0a1b2c3d4e5f6789"}})
    assert run.exists and run.is_model() and run.config == settings and run.data_spec is None
    assert run.fingerprints["train"]["tokens"] == 7 and run.tokenizer_file is run.class_names is run.export_section
    files.atomic_write(run.path / "config.json", json.dumps(config.to_dict(settings) | {"steps": 3}))
    assert run.config.steps == settings.steps and RunDir(path).config.steps == 3
    run.reload()
    assert run.config.steps == 3
    with pytest.raises(InputError, match="the data of the run of .* have changed .*train: 7 tokens .* -> 8 tokens"):
        run.check_same_data({"train": {"tokens": 8, "fingerprint": "f" * 16}})


def test_checkpoints_that_are_removed_while_they_are_read_are_not_damaged(tmp_path, monkeypatch):
    """As a run that trains removes them: the next one is read, and a reader begins anew."""
    run = RunDir(tmp_path)
    run.step_dir(2).mkdir(parents=True)

    def removed(path):
        if path.name != "2":
            return ""
        path.rmdir()
        run.step_dir(4).mkdir()
        return "state is missing"

    monkeypatch.setattr("seqpe_jax.run_dir._checkpoint_error", removed)
    assert run.latest_valid_step() == (4, {})
    run.step_dir(6).mkdir()
    monkeypatch.setattr("seqpe_jax.run_dir._checkpoint_error", lambda path: "state is missing" * (path.name == "6"))
    assert run.latest_valid_step() == (4, {run.step_dir(6): "state is missing"})

    found = iter((CheckpointGone("one"), CheckpointGone("two"), 4))

    def read():
        if isinstance(one := next(found), Exception):
            raise one
        return one

    assert look_again(read, 3) == 4
    checkpoints = Checkpointer(tmp_path, create=False)
    assert isinstance(checkpoints._unreadable(2, ValueError("no such file")), CheckpointGone)
    assert "delete that folder" in str(checkpoints._unreadable(4, ValueError("no such file")))
    checkpoints.close()


def test_starts_are_counted_from_the_first_of_the_same_run(path, monkeypatch):
    now = iter((100.0, 200.0, 300.0))
    monkeypatch.setattr("seqpe_jax.run_dir.time", types.SimpleNamespace(time=lambda: next(now)))
    run = RunDir(path)
    assert run.starts() == [] and run.record_start(0, 2, anew=True) == 100.0
    file = run.path / "starts.jsonl"
    file.write_bytes(file.read_bytes() + b'{"time": 1')  # a line that was cut short
    assert run.record_start(4, 1, anew=False) == 100.0
    assert run.starts() == [{"time": 100.0, "step": 0, "processes": 2}, {"time": 200.0, "step": 4, "processes": 1}]
    assert run.record_start(0, 1, anew=True) == 300.0, "another config: the starts before were another run's"


def test_an_evaluation_holds_as_long_as_config_and_checkpoint_are_the_same(path):
    run = RunDir(path)
    files.atomic_write(run.path / "config.json", "{}")
    files.atomic_write(run.step_dir(2) / "digests.json", "{}")
    assert run.evaluated_step() is None
    files.atomic_write(run.path / "evaluation.json", json.dumps({"step": 2, "made_from": run.evaluation_sources(2)}))
    assert run.evaluated_step() == 2 and len(run.evaluation_sources(2)) == 2
    files.atomic_write(run.path / "config.json", '{"steps": 3}')
    assert run.evaluated_step() is None
