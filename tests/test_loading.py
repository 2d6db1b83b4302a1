"""What the config.json of a folder says of the model in it."""

import json

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.loading import data_spec_of, is_run_or_export, load_run_config
from seqpe_jax.run_dir import RunDir
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    "section",
    [
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
    ],
    ids=str,
)
def test_an_export_that_does_not_say_what_it_serves_is_refused(tmp_path, section):
    (tmp_path / "config.json").write_text(json.dumps({"export": section}))
    with pytest.raises(InputError, match="section 'export' is damaged: export the run again"):
        _ = RunDir(tmp_path).export_section
    (tmp_path / "config.json").write_text(json.dumps({"export": {"step": 3, "reach": [8, 8]}}))
    assert RunDir(tmp_path).export_section["reach"] == [8, 8]


@pytest.mark.parametrize("content", ["", "null", "[]", "3", '"config"', "[" * 100_000, '{"a":' * 100_000])
def test_a_config_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert not is_run_or_export(tmp_path)
    with pytest.raises(InputError, match="config.json (cannot be read|is no object of fields)") as caught:
        load_run_config(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_run_on_text_that_does_not_say_how_many_tokens_it_has_is_refused(tmp_path):
    (tmp_path / "sizes.json").write_text('{"vocabulary": 256}')
    assert data_spec_of(tiny_config(), str(tmp_path)).vocabulary == 256
    for content in ("{}", '{"classes": 3}'):
        (tmp_path / "sizes.json").write_text(content)
        with pytest.raises(InputError, match="does not say how many tokens its model has: put back its sizes.json"):
            data_spec_of(tiny_config(), str(tmp_path))
