"""The data spec in a run's folder: read as it was written, and refused if it is damaged."""

import json

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.models.build import DataSpec
from seqpe_jax.run_dir import DATA_SPEC_FILE, RunDir

PHOTOS = DataSpec(classes=7, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.1))


def test_a_data_spec_is_read_as_written(tmp_path):
    for data_spec in (DataSpec(vocabulary=50257), PHOTOS, DataSpec(classes=2, channels=1)):
        RunDir(tmp_path).write_data_spec(data_spec)
        assert RunDir(tmp_path).data_spec == data_spec
    assert RunDir(tmp_path / "older").data_spec is None


def test_a_damaged_data_spec_is_refused(tmp_path):
    RunDir(tmp_path).write_data_spec(PHOTOS)
    values = json.loads((tmp_path / DATA_SPEC_FILE).read_text())
    changes = [
        {"vocabulary": "many"},
        {"vocabulary": -1},
        {"vocabulary": 2**63},
        {"vocabulary": True},
        {"classes": [3]},
        {"colours": 3},
        {"channels": 10**9},
        {"mean": [0.5]},
        {"mean": ["x", "y", "z"]},
        {"mean": 0.5},
        {"std": [0.0, 0.1, 0.1]},
        {"std": [float("nan")] * 3},
        {"std": {}},
        {"mean": None},
    ]
    contents = [json.dumps(values | change) for change in changes] + ["", "null", "[]", "3", "[" * 100_000, '{"a"']
    for content in contents:
        (tmp_path / DATA_SPEC_FILE).write_text(content)
        with pytest.raises(InputError, match="sizes.json cannot be read .*: put back the file that the run wrote"):
            _ = RunDir(tmp_path).data_spec
