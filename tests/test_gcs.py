"""Paths in a bucket, which an emulator on this machine serves: reading, writing, refusals, retries."""

import importlib.util
import time

import jax
import jax.monitoring
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from seqpe_jax import files
from seqpe_jax.distributed import processes
from seqpe_jax.errors import Failure, InputError, StoreError
from seqpe_jax.files import as_path, check_readable, check_writable, expand_path

CACHE_OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def test_addresses_are_written_one_way():
    assert expand_path("gs://runs//a/./b/") == "gs://runs/a/b"
    path = as_path("gs://runs/a") / "b.json"
    assert (str(path), path.name, str(path.parent), path.parts[2]) == (
        "gs://runs/a/b.json",
        "b.json",
        "gs://runs/a",
        "runs",
    )
    assert path.absolute() == path.resolve() == path.expanduser() == path
    for address in ("gs://", "gs:///a", "gs://Capital/a", "gs://runs/a/../b"):
        with pytest.raises(InputError):
            expand_path(address)


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else there(name))
    with pytest.raises(InputError, match="gs://runs/a is in Google Cloud Storage, .*: pip install gcsfs"):
        expand_path("gs://runs/a")


def test_places_where_nothing_can_be_written_are_reported_at_the_start(store):
    folder = as_path(store.folder)
    files.atomic_write(folder / "file", "")
    check_writable(folder, True, "--workdir")
    check_writable(folder / "new" / "deep", True, "--workdir")
    assert [path.name for path in files.list_files(folder)] == ["file"], "the trial is gone again"
    for path, is_folder, words in (
        ("gs://no-such-bucket/run", True, "there is no bucket 'no-such-bucket'"),
        ("gs://runs", True, "is a whole bucket"),
        (folder, False, "is a folder: name a file"),
        (folder / "file", True, "is a file: name a folder"),
        (folder / "file" / "list_files", True, "is a file, not a folder"),
    ):
        with pytest.raises(InputError, match=f"--output={path}.*{words}"):
            check_writable(path, is_folder, "--output")
    with pytest.raises(InputError, match="there is no bucket"):
        check_readable("gs://no-such-bucket/run", "--checkpoint")


@pytest.mark.parametrize(("status", "words"), [(401, "gcloud auth application-default login"), (403, "access denied")])
def test_a_bucket_of_somebody_else_is_reported_in_one_line(store, status, words, caplog):
    store.fail(status)
    with pytest.raises(InputError, match=words) as caught:
        check_writable(f"{store.folder}/run", True, "--workdir")
    assert len(str(caught.value).splitlines()) == 1 and not caplog.records


def test_what_fails_is_asked_for_again(store):
    path = as_path(store.folder) / "file"
    files.atomic_write(path, "content")
    store.fail(503, requests=1)
    assert path.read_text() == "content" and store.failed() == 1


def test_what_fails_for_good_is_one_failure(store, monkeypatch):
    async def at_once(*_):
        """No time between two attempts."""

    path = as_path(store.folder) / "file"
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    store.fail(503)
    for act in (
        path.exists,
        path.read_bytes,
        lambda: files.atomic_write(path, "x"),
        lambda: files.list_files(path),
        path.unlink,
    ):
        with pytest.raises(StoreError, match="file: the request failed .*failed on purpose") as caught:
            act()
        assert isinstance(caught.value, OSError) and isinstance(caught.value, Failure) and caught.value.code == 1
    assert store.failed() > 5


def test_an_answer_that_does_not_come_is_asked_for_again(store, monkeypatch):
    import aiohttp
    import fsspec

    path = as_path(store.folder) / "file"
    files.atomic_write(path, "content")
    monkeypatch.setitem(fsspec.config.conf["gcs"], "requests_timeout", aiohttp.ClientTimeout(total=None, sock_read=0.2))
    store.fail(503, requests=1, seconds=8.0)
    began = time.monotonic()
    assert path.read_text() == "content"
    assert store.failed() == 1 and time.monotonic() - began < 7, "the first answer was not waited for"


def test_nobody_writes_an_object_piece_by_piece(store):
    path = as_path(store.folder) / "file"
    for mode in ("w", "a", "wb", "r+"):
        with pytest.raises(ValueError, match="written at once"):
            path.open(mode)


def test_an_object_that_must_be_new_is(store):
    path = as_path(store.folder) / "file"
    path.write_bytes(b"first", new=True)
    with pytest.raises(FileExistsError):
        path.write_bytes(b"second", new=True)
    assert path.read_bytes() == b"first"


def test_what_others_write_is_seen(store):
    import fsspec

    folder = as_path(store.folder)
    files.atomic_write(folder / "ours", "")
    assert [path.name for path in folder.iterdir()] == ["ours"]
    fsspec.filesystem("gcs", skip_instance_cache=True).pipe_file(f"{store.folder}/theirs", b"")
    assert [path.name for path in folder.iterdir()] == ["ours", "theirs"] and (folder / "theirs").is_file()


def test_compiled_programs_are_stored_in_a_bucket(store, monkeypatch):
    """A program is compiled once: another start finds it there. Where the bucket fails, it is compiled."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "SEQPE_JAX_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    before = {name: getattr(jax.config, name) for name in CACHE_OPTIONS}
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
    )
    try:
        processes.enable_compilation_cache(store.folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for expected in (0, 1):
            compilation_cache.reset_cache()
            assert float(jax.jit(lambda x: 3 * x + 41)(np.float32(1.0))) == 44.0
            assert (len(hits), len(list((as_path(store.folder) / "compiled").iterdir()))) == (expected, 1)
        compilation_cache.reset_cache()
        store.fail(403, about="compiled")
        with pytest.warns(UserWarning, match="compilation cache entry"):
            assert float(jax.jit(lambda x: 3 * x + 42)(np.float32(1.0))) == 45.0
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
