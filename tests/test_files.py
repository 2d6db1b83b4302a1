"""Paths as users give them: homes, places where nothing can be written, modes."""

import os
import pathlib
import re

import pytest

from seqpe_jax import config, files
from seqpe_jax.errors import InputError, StoreError
from seqpe_jax.files import apply_umask, as_path, cache_root, check_writable, expand_path
from seqpe_jax.run_dir import OUTPUT_FILES, check_output_path
from tests.tiny import ROOT


def test_homes_are_written_out(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert expand_path("~/runs/x") == "/somewhere/runs/x" and expand_path("~") == "/somewhere"
    assert expand_path("a~b") == "a~b" and expand_path("./~x") == "./~x"
    with pytest.raises(InputError, match="no user 'nobodyhere'"):
        expand_path("~nobodyhere/runs")
    with pytest.raises(InputError, match="empty"):
        expand_path(" ")


def test_paths_of_a_config_are_written_out(monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    fields = {"data.name": "text_files", "data.paths": ("~/a", "b"), "data.cache_dir": "~/c", "init_from": "~/d"}
    found = config.load("~/configs/stdlib_lm.py", fields | {"data.tokenizer": "~/e.json"})
    assert found.data.paths == (f"{ROOT}/a", "b") and found.data.cache_dir == f"{ROOT}/c"
    assert (found.init_from, found.data.tokenizer) == (f"{ROOT}/d", f"{ROOT}/e.json")
    with pytest.raises(InputError, match="no user"):
        config.load("~/configs/stdlib_lm.py", fields | {"data.paths": ("~nobodyhere/a",)})


def test_places_where_nothing_can_be_written_are_reported_at_the_start(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    check_writable(tmp_path / "new" / "deep", True, "--workdir")
    check_writable(tmp_path / "new.json", False, "--output")
    for path, folder, words in (
        (tmp_path, False, "is a folder: name a file"),
        (file, True, "is a file: name a folder"),
        (file / "list_files", True, "is a file, not a folder"),
        (file / "below.json", False, "is a file, not a folder"),
    ):
        with pytest.raises(InputError, match=words):
            check_writable(path, folder, "--output")
    if pathlib.Path("/proc").is_dir():  # where root may write by the permissions, and nobody can
        with pytest.raises(InputError, match="/proc does not take new files"):
            check_writable("/proc/run", True, "--workdir")


@pytest.mark.parametrize("known", ["config.json", "checkpoints", "sweep.json"])
def test_what_a_run_keeps_is_no_output(tmp_path, known, monkeypatch):
    """No file that training, evaluation, a sweep or an export writes under a name of its own."""
    run = tmp_path / "run"
    (run / "sub").mkdir(parents=True)
    (run / known).mkdir()
    (tmp_path / "link").symlink_to(run)
    own = OUTPUT_FILES | {"answers_64.jsonl", "CONFIG.JSON", "sub/../metrics.jsonl", "sizes.json"}
    if known == "sweep.json":
        own = {known}
        check_output_path(run / "profile", "--workdir")  # a run of a sweep may have this name
    for name in own:
        for place in (run, tmp_path / "link"):
            with pytest.raises(InputError, match=f"--output=.* is the name of something that the run.*{run} keeps"):
                check_output_path(place / name, "--output")
    check_output_path(run / "evaluation.json", "--output", allowed=("evaluation.json",))
    for free in (run / "benchmark.json", run / "report", run / "answers.jsonl", tmp_path / "config.json"):
        check_output_path(free, "--output")
    monkeypatch.chdir(run)
    with pytest.raises(InputError, match="keeps: name another"):
        check_output_path(sorted(own)[-1], "--output")
    (run / "config.json").mkdir(exist_ok=True)
    for name in ("checkpoints/4/x.json", "checkpoints/7"):
        with pytest.raises(InputError, match="lies among the checkpoints of the run in"):
            check_output_path(run / name, "--output")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3:/bucket/run", "written s3://BUCKET/NAME"),
        ("az://bucket/run", "no way to az:// addresses: give gs://BUCKET/NAME or s3://BUCKET/NAME"),
        ("gs:/bucket/run", "written gs://BUCKET/NAME"),
    ],
)
def test_addresses_of_other_stores_are_reported_and_not_made_folders(path, words):
    """`az://bucket` would be a folder named `az:` on every host."""
    with pytest.raises(InputError, match=rf"{path}: .*{words}.*\./{path}"):
        expand_path(path)
    assert expand_path(f"./{path}") == f"./{path}" and expand_path("a/b.py:seqpe") == "a/b.py:seqpe"


def test_what_must_lie_on_this_machine_is_reported(monkeypatch):
    for local, read in {
        "config files are Python": lambda: config.load("gs://runs/config.py"),
        "data.cache_dir is a folder of this machine": lambda: config.load(
            f"{ROOT}/configs/stdlib_lm.py", {"data.cache_dir": "gs://runs/cache"}
        ),
        "prepared data, compiled programs and copies lie on a disk": cache_root,
    }.items():
        monkeypatch.setenv("SEQPE_JAX_CACHE", "gs://runs/cache")
        with pytest.raises(InputError, match=f"gs://runs/.*{local}.*mount it"):
            read()


def test_places_that_are_none_are_reported(tmp_path):
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
        apply_umask(made)
        assert made.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_every_option_that_is_a_path_goes_through_one_function():
    """What a command reads or writes is defined by `command.define_path`, never as a plain text."""
    names = ("workdir", "checkpoint", "output", "source", "init-from", "sweep", "tokenizer", "prompts-file")
    for page in pathlib.Path(ROOT / "seqpe_jax").glob("*.py"):
        for name in names:
            assert f'DEFINE_string("{name}"' not in page.read_text() or page.parent.name == "cli", page


def test_json_that_is_nested_too_deep_is_no_value():
    for content in ("[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deep"):
            files.parse_json(content)
    assert files.parse_json(b'{"a": [1, NaN]}')["a"][0] == 1


@pytest.mark.parametrize("path", ["a" * 300, "abc/" * 2000, "a\0b"])
def test_a_name_that_nothing_can_have_is_refused(path):
    with pytest.raises(InputError, match="cannot be the name of a file or folder") as caught:
        files.expand_path(path)
    assert len(str(caught.value)) < 500


def test_a_link_that_leads_nowhere_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for path, folder in (("link", True), ("link/below", True), ("link/below.json", False)):
        with pytest.raises(InputError, match="link is a link that leads nowhere: mend it"):
            files.check_writable(tmp_path / path, folder, "--output")


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
    """A folder that is not there yet: on a disk, and in a store."""
    if request.param == "disk":
        return tmp_path / "new" / "folder"
    return as_path(request.getfixturevalue("store").folder) / "folder"


def test_files_are_whole_on_a_disk_and_in_a_store(folder):
    assert not folder.exists() and not folder.is_dir()
    files.atomic_write(folder / "text", "ü\n")
    with files.atomic_file(folder / "deep" / "bytes") as part:
        part.write_bytes(b"12")
        assert not (folder / "deep" / "bytes").exists()
    with pytest.raises(ZeroDivisionError), files.atomic_file(folder / "text") as part:
        part.write_bytes(b"half of it")
        raise ZeroDivisionError
    assert (folder / "text").read_text(encoding="utf-8") == "ü\n" and (folder / "deep" / "bytes").read_bytes() == b"12"
    assert {path.name for path in folder.iterdir()} == {"text", "deep"} and (folder / "deep").is_dir()
    assert [str(path.relative_to(folder)) for path in files.list_files(folder)] == ["deep/bytes", "text"]
    assert [path.name for path in folder.glob("t*")] == ["text"]
    before = files.file_versions(folder)
    files.atomic_write(folder / "text", "more")
    assert files.file_versions(folder) != before


def test_what_is_not_there_is_not(folder):
    for act in (folder.read_bytes, folder.read_text, folder.unlink):
        with pytest.raises(FileNotFoundError) as caught:
            act()
        assert caught.value.strerror == "No such file or directory"
    folder.unlink(missing_ok=True)
    assert list(folder.glob("*")) == [] and files.list_files(folder) == []


def test_a_new_folder_is_there_whole_or_not_at_all(folder):
    with pytest.raises(ZeroDivisionError), files.atomic_dir(folder) as inside:
        (inside / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not folder.exists()
    with files.atomic_dir(folder) as inside:
        (inside / "deep").mkdir()
        (inside / "deep" / "b").write_text("b")
        (inside / "config.json").write_text("{}")
        assert not folder.exists()
    assert [str(path.relative_to(folder)) for path in files.list_files(folder)] == ["config.json", "deep/b"]
    with pytest.raises(InputError, match="there already"), files.atomic_dir(folder):
        pass


def test_a_folder_takes_another_name_and_goes(folder):
    for name in ("a", "deep/b"):
        files.atomic_write(folder / name, name)
    other = folder.with_name("other")
    files.move_dir(folder, other, first=("a",))
    assert not folder.exists()
    assert {str(path.relative_to(other)): path.read_text() for path in files.list_files(other)} == {
        "a": "a",
        "deep/b": "deep/b",
    }
    files.remove_dir(other)
    assert not other.exists()


def test_an_upload_that_fails_leaves_nothing(store, tmp_path, monkeypatch):
    """What a reader knows a folder by comes last, and what came before goes again."""
    for name in ("config.json", "a", "z"):
        (tmp_path / name).write_text(name)
    target, order = as_path(store.folder) / "folder", []
    upload = type(target).upload

    def failing(self, file):
        order.append(self.name)
        if self.name == "config.json":
            raise StoreError(5, "no answer", str(self))
        upload(self, file)

    monkeypatch.setattr(type(target), "upload", failing)
    with pytest.raises(StoreError):
        files.upload_dir(tmp_path, target)
    assert order == ["a", "z", "config.json"] and not target.exists()


def test_files_are_written_in_one_place():
    """Whole or not at all is the work of `files`: nothing else gives a finished file its name."""
    for page in pathlib.Path(ROOT / "seqpe_jax").rglob("*.py"):
        renamed = re.findall(r"\.rename\(|os\.replace\(|\.replace\(\w+\)", page.read_text())
        assert not renamed or page.relative_to(ROOT / "seqpe_jax").as_posix() in ("files.py", "data/cache.py"), (
            page,
            renamed,
        )
