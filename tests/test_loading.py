"""Opening a folder: the export section, damaged configs, the number of tokens, and how often files are read."""

import collections
import json
import pathlib

import jax
import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.loading import data_spec_of, is_run_or_export, load_run_config, open_model
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.trainer import Trainer
from tests.tiny import random_state, tiny_config


def test_an_export_section_without_step_or_range_is_refused(tmp_path):
    for section in (
        [],
        "served",
        {},
        {"step": 3},
        {"step": "3", "reach": [8]},
        {"step": 3, "reach": 8},
        {"step": 3, "reach": []},
        {"step": 3, "reach": ["8"]},
        {"step": 3, "reach": [0]},
        {"step": 3, "reach": [8, None]},
        {"step": 3, "reach": [2**40]},
    ):
        (tmp_path / "config.json").write_text(json.dumps({"export": section}))
        with pytest.raises(InputError, match="section 'export' is damaged: export the run again"):
            _ = RunDir(tmp_path).export_section
    (tmp_path / "config.json").write_text(json.dumps({"export": {"step": 3, "reach": [8, 8]}}))
    assert RunDir(tmp_path).export_section["reach"] == [8, 8]


def test_a_config_that_is_no_object_is_refused(tmp_path):
    for content in ("", "null", "[]", "3", '"config"', "[" * 100_000, '{"a":' * 100_000):
        (tmp_path / "config.json").write_text(content)
        assert not is_run_or_export(tmp_path)
        with pytest.raises(InputError, match="config.json (cannot be read|is no object of fields)") as caught:
            load_run_config(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_an_unknown_number_of_tokens_is_refused(tmp_path):
    (tmp_path / "sizes.json").write_text('{"vocabulary": 256}')
    assert data_spec_of(tiny_config(), str(tmp_path)).vocabulary == 256
    for content in ("{}", '{"classes": 3}'):
        (tmp_path / "sizes.json").write_text(content)
        with pytest.raises(InputError, match="does not say how many tokens its model has: put back its sizes.json"):
            data_spec_of(tiny_config(), str(tmp_path))


def test_each_small_file_is_read_once(tmp_path, monkeypatch):
    """Once for its content, and once more where a checksum is verified."""
    settings = tiny_config(variant="none")
    trainer = Trainer.of(settings, jax.devices()[:1])
    run = RunDir(tmp_path / "run")
    checkpointer = Checkpointer(run.path)
    checkpointer.save(3, random_state(trainer, 0.2), {})
    checkpointer.close()
    run.write_config(config.to_dict(settings))
    run.write_data_spec(trainer.task.data_spec)
    reads, read = collections.Counter(), pathlib.Path.open

    def counted(path, *arguments, **options):
        reads[str(path.relative_to(run.path)) if path.is_relative_to(run.path) else ""] += 1
        return read(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", counted)
    opened = RunDir(run.path)
    assert not load_run_config(opened).is_image and open_model(opened).step == 3
    assert reads["config.json"] == reads["sizes.json"] == 1, reads
