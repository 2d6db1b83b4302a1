"""What a run's folder says of its data: read as it was written, and refused where it is not."""

import json

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.models.build import DataSpec
from seqpe_jax.run_dir import DATA_SPEC_FILE, RunDir

PHOTOS = DataSpec(classes=7, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.1))


@pytest.mark.parametrize("data_spec", [DataSpec(vocabulary=50257), PHOTOS, DataSpec(classes=2, channels=1)])
def test_sizes_come_back(tmp_path, data_spec):
    RunDir(tmp_path).write_data_spec(data_spec)
    assert RunDir(tmp_path).data_spec == data_spec
    assert RunDir(tmp_path / "older").data_spec is None


@pytest.mark.parametrize(
    "changes",
    [
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
    ],
    ids=str,
)
def test_other_values_are_refused(tmp_path, changes):
    RunDir(tmp_path).write_data_spec(PHOTOS)
    values = json.loads((tmp_path / DATA_SPEC_FILE).read_text())
    (tmp_path / DATA_SPEC_FILE).write_text(json.dumps(values | changes))
    with pytest.raises(InputError, match="sizes.json cannot be read .*: put back the file that the run wrote"):
        _ = RunDir(tmp_path).data_spec


@pytest.mark.parametrize("content", ["", "null", "[]", "3", "[" * 100_000, '{"a"'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / DATA_SPEC_FILE).write_text(content)
    with pytest.raises(InputError, match="sizes.json cannot be read"):
        _ = RunDir(tmp_path).data_spec
