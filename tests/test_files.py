"""Paths as users give them: homes, places where nothing can be written, modes."""

import os
import pathlib

import pytest

from seqpe_jax import config, files
from seqpe_jax.errors import InputError
from seqpe_jax.files import check_writable, expanded, open_to_all
from tests.tiny import ROOT


def test_homes_are_written_out(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/runs/x") == "/somewhere/runs/x" and expanded("~") == "/somewhere"
    assert expanded("a~b") == "a~b" and expanded("./~x") == "./~x"
    with pytest.raises(InputError, match="no user 'nobodyhere'"):
        expanded("~nobodyhere/runs")
    with pytest.raises(InputError, match="empty"):
        expanded(" ")


def test_paths_of_a_config_are_written_out(monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    fields = {"data.name": "text_files", "data.paths": ("~/a", "b"), "data.cache_dir": "~/c", "init_from": "~/d"}
    found = config.load("~/configs/stdlib_lm.py", fields | {"data.tokenizer": "~/e.json"})
    assert found.data.paths == (f"{ROOT}/a", "b") and found.data.cache_dir == f"{ROOT}/c"
    assert (found.init_from, found.data.tokenizer) == (f"{ROOT}/d", f"{ROOT}/e.json")
    with pytest.raises(InputError, match="no user"):
        config.load("~/configs/stdlib_lm.py", fields | {"data.paths": ("~nobodyhere/a",)})


def test_places_where_nothing_can_be_written_are_told_at_the_start(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    check_writable(tmp_path / "new" / "deep", True, "--workdir")
    check_writable(tmp_path / "new.json", False, "--output")
    for path, folder, words in (
        (tmp_path, False, "is a folder: name a file"), (file, True, "is a file: name a folder"),
        (file / "below", True, "is a file, not a folder"), (file / "below.json", False, "is a file, not a folder"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_writable(path, folder, "--output")


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "gcs://bucket/run", "gs:/bucket/run"])
def test_object_stores_are_told_and_not_made_folders(path):
    """`gs://bucket` would be a folder named `gs:` on every host."""
    scheme = path.partition(":")[0]
    with pytest.raises(InputError, match=rf"not {scheme}:// addresses; mount it .*\./{path}"):
        expanded(path)
    assert expanded(f"./{path}") == f"./{path}" and expanded("a/b.py:seqpe") == "a/b.py:seqpe"


def test_places_that_are_none_are_told(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    refused = {"/dev/null": "is a device", tmp_path / ("x" * 300): "too long", tmp_path / "circle": "symbolic links"}
    for path, words in refused.items():
        for folder in (False, True):
            with pytest.raises(InputError, match=f"--output=.*{words}"):
                check_writable(path, folder, "--output")


def test_modes_are_those_of_the_umask(tmp_path):
    made, before = tmp_path / "made", os.umask(0o027)
    try:
        made.write_text("")
        made.chmod(0o600)
        open_to_all(made)
        assert made.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_every_option_that_is_a_path_goes_through_one_function():
    """What a command reads or writes is defined by `command.define_path`, never as a plain text."""
    names = ("workdir", "checkpoint", "output", "source", "init-from", "sweep", "tokenizer", "prompts-file")
    for page in pathlib.Path(ROOT / "seqpe_jax").glob("*.py"):
        for name in names:
            assert f'DEFINE_string("{name}"' not in page.read_text() or page.name == "command.py", page


def test_json_that_is_nested_too_deep_is_no_value():
    for content in ("[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deep"):
            files.from_json(content)
    assert files.from_json(b'{"a": [1, NaN]}')["a"][0] == 1


@pytest.mark.parametrize("path", ["a" * 300, "abc/" * 2000, "a\0b"])
def test_a_name_that_nothing_can_have_is_refused(path):
    with pytest.raises(InputError, match="cannot be the name of a file or folder") as caught:
        files.expanded(path)
    assert len(str(caught.value)) < 500


def test_a_link_that_leads_nowhere_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for path, folder in (("link", True), ("link/below", True), ("link/below.json", False)):
        with pytest.raises(InputError, match="link is a link that leads nowhere: mend it"):
            files.check_writable(tmp_path / path, folder, "--output")
