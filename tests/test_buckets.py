"""Paths in buckets, which emulators on this machine serve: reading, writing, refusals, retries."""

import asyncio
import base64
import hashlib
import importlib.util
import threading
import time
import types

import jax
import jax.monitoring
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from seqpe_jax import checksums, files, stores
from seqpe_jax.distributed import processes
from seqpe_jax.errors import Failure, InputError, Outage, StoreError
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
    for address in ("gs://", "gs:///a", "gs://Capital/a", "gs://runs/a/../b", "s3://", "s3://Capital/a"):
        with pytest.raises(InputError):
            expand_path(address)


@pytest.mark.parametrize(
    ("address", "library", "words"),
    [("gs://runs/a", "gcsfs", "in Google Cloud Storage"), ("s3://runs/a", "s3fs", "in an S3 store")],
)
def test_a_library_that_is_not_installed_is_named(monkeypatch, address, library, words):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else there(name))
    with pytest.raises(InputError, match=f"{address} is {words}, .*: pip install {library}"):
        expand_path(address)


def test_places_where_nothing_can_be_written_are_reported_at_the_start(any_store):
    folder = as_path(any_store.folder)
    files.atomic_write(folder / "file", "")
    check_writable(folder, True, "--workdir")
    check_writable(folder / "new" / "deep", True, "--workdir")
    assert [path.name for path in files.list_files(folder)] == ["file"], "the trial is gone again"
    for path, is_folder, words in (
        (f"{any_store.scheme}no-such-bucket/run", True, "there is no bucket 'no-such-bucket'"),
        (f"{any_store.scheme}runs", True, "is a whole bucket"),
        (folder, False, "is a folder: name a file"),
        (folder / "file", True, "is a file: name a folder"),
        (folder / "file" / "list_files", True, "is a file, not a folder"),
    ):
        with pytest.raises(InputError, match=f"--output={path}.*{words}"):
            check_writable(path, is_folder, "--output")
    with pytest.raises(InputError, match="there is no bucket"):
        check_readable(f"{any_store.scheme}no-such-bucket/run", "--checkpoint")


@pytest.mark.parametrize(
    ("status", "words"), [(401, r"access denied .*log in \(.*or ask its owner"), (403, "access denied")]
)
def test_a_bucket_of_somebody_else_is_reported_in_one_line(any_store, status, words, caplog):
    any_store.fail(status)
    with pytest.raises(InputError, match=words) as caught:
        check_writable(f"{any_store.folder}/run", True, "--workdir")
    assert len(str(caught.value).splitlines()) == 1 and not caplog.records


def test_what_fails_is_asked_for_again(any_store):
    path = as_path(any_store.folder) / "file"
    files.atomic_write(path, "content")
    any_store.fail(503, requests=1)
    assert path.read_text() == "content" and any_store.failed() == 1


def test_what_fails_for_good_is_one_failure(any_store, monkeypatch):
    async def at_once(*_):
        """No time between two attempts."""

    path = as_path(any_store.folder) / "file"
    monkeypatch.setattr("asyncio.sleep", at_once)
    any_store.fail(503)
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
    for check in (lambda: check_readable(path, "--checkpoint"), lambda: check_writable(path, False, "--output")):
        with pytest.raises(Outage, match="cannot be read: the request failed") as caught:  # at the start of a command
            check()
        assert caught.value.code == 75 and "\n" not in str(caught.value)
    any_store.fail(503)
    with pytest.raises(StoreError):
        path.read_bytes()
    assert any_store.failed() == {"gs://": 6, "s3://": 12}[any_store.scheme], "as often as docs/pods.md says"


def test_an_answer_that_does_not_come_is_asked_for_again(any_store, monkeypatch):
    import aiohttp
    import fsspec

    path = as_path(any_store.folder) / "file"
    files.atomic_write(path, "content")
    short = {"requests_timeout": aiohttp.ClientTimeout(total=None, sock_read=0.2)}
    if any_store.scheme == "s3://":
        short = {"config_kwargs": fsspec.config.conf["s3"]["config_kwargs"] | {"read_timeout": 0.2}}
    monkeypatch.setitem(
        conf := fsspec.config.conf, name := {"gs://": "gcs", "s3://": "s3"}[any_store.scheme], conf[name] | short
    )
    any_store.fail(503, requests=1, seconds=8.0)
    began = time.monotonic()
    assert path.read_text() == "content"
    assert any_store.failed() == 1 and time.monotonic() - began < 7, "the first answer was not waited for"


def test_nobody_writes_an_object_piece_by_piece(any_store):
    path = as_path(any_store.folder) / "file"
    for mode in ("w", "a", "wb", "r+"):
        with pytest.raises(ValueError, match="written at once"):
            path.open(mode)


def test_an_object_that_must_be_new_is(any_store):
    path = as_path(any_store.folder) / "file"
    path.write_bytes(b"first", new=True)
    with pytest.raises(FileExistsError):
        path.write_bytes(b"second", new=True)
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize("code, exists", [("ConditionalRequestConflict", True), ("412", True), ("SlowDown", False)])
def test_a_write_at_the_same_moment_is_one_of_an_object_that_exists(code, exists):
    """What S3 answers when two processes create an object at once; s3fs has no exception of its own for it."""
    error, cause = OSError("failed"), Exception()
    cause.response = {"Error": {"Code": code}}
    error.__cause__ = cause
    assert stores.S3().exists_already(error) is exists


def test_what_others_write_is_seen(any_store):
    import fsspec

    folder = as_path(any_store.folder)
    files.atomic_write(folder / "ours", "")
    assert [path.name for path in folder.iterdir()] == ["ours"]
    fsspec.filesystem(any_store.scheme[:2], skip_instance_cache=True).pipe_file(f"{any_store.folder}/theirs", b"")
    assert [path.name for path in folder.iterdir()] == ["ours", "theirs"] and (folder / "theirs").is_file()
    versions = set()
    for content in (b"1", b"2"):  # of the same size, within a second
        (folder / "theirs").write_bytes(content)
        versions.add(folder.file_versions())
    assert len(versions) == 2


def test_checksums_of_s3_are_of_the_content_however_it_was_written(s3_store, tmp_path):
    """By one request, in parts, or encrypted with a key of KMS, where the store's ETag is no MD5; a copy keeps its own."""
    folder, content = as_path(s3_store.folder), bytes(range(256)) * 41_000
    expected = base64.b64encode(hashlib.md5(content).digest()).decode()
    (tmp_path / "large").write_bytes(content)
    (folder / "once").write_bytes(content)
    folder._fs.put_file(str(tmp_path / "large"), f"{folder}/parts", chunksize=5 * 2**20)
    folder._fs.pipe_file(f"{folder}/encrypted", content, ServerSideEncryption="aws:kms")
    assert [(folder / name).md5() for name in ("once", "parts", "encrypted")] == [expected, "", ""]
    checksums.write_checksums(folder)
    listed = checksums.read_checksums(folder)
    assert [listed[name].startswith("md5:") for name in ("once", "parts", "encrypted")] == [True, False, False]
    with pytest.MonkeyPatch.context() as patch:  # what this package uploads in parts carries its MD5
        patch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * 2**20)
        (folder / "uploaded").upload(tmp_path / "large")
    tag = (folder / "uploaded").info()["ETag"]
    assert "-" in tag and (folder / "uploaded").md5() == expected
    (folder / "uploaded").copy_to(folder / "copied")
    assert (folder / "copied").md5() == expected
    assert checksums.checksum_error(folder) == ""
    before = folder.file_versions()
    for name in ("parts", "encrypted"):
        (folder / name).write_bytes(content[:-1] + b"x")
        assert checksums.checksum_error(folder) == f"{name} has changed since it was written"
        (folder / name).write_bytes(content)
    assert checksums.checksum_error(folder) == "" and folder.file_versions() != before


def test_credentials_that_are_absent_are_one_line(s3_store, monkeypatch):
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(InputError, match="Unable to locate credentials.*set AWS_PROFILE, or AWS_ACCESS") as caught:
            check_writable(f"{s3_store.folder}/run", True, "--workdir")
        assert len(str(caught.value).splitlines()) == 1
        monkeypatch.setenv("AWS_PROFILE", "absent")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(InputError, match="access denied .*absent.*could not be found"):
            check_readable(f"{s3_store.folder}/run", "--checkpoint")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("endpoint", "method", "expected"),
    [
        ("https://s3.eu-west-1.amazonaws.com", "iam-role", {"aws_credentials": {"type": "imds"}}),
        ("https://s3.amazonaws.com", "container-role", {"aws_credentials": {"type": "ecs"}}),
        ("https://s3.cn-north-1.amazonaws.com.cn", "sso", {}),
        (
            "https://minio:9000",
            "env",
            {"endpoint": "https://minio:9000", "aws_region": "r", "aws_credentials": {"type": "environment"}},
        ),
        (
            "https://amazonaws.com.example.org",
            "config-file",
            {
                "endpoint": "https://amazonaws.com.example.org",
                "aws_region": "r",
                "aws_credentials": {"type": "profile", "profile": "p"},
            },
        ),
    ],
)
def test_tensorstore_gets_the_store_and_the_keys_of_s3fs(monkeypatch, endpoint, method, expected):
    class Session:
        async def get_credentials(self):
            return types.SimpleNamespace(method=method)

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    meta = types.SimpleNamespace(endpoint_url=endpoint, region_name="r")
    client = types.SimpleNamespace(meta=meta)
    files = types.SimpleNamespace(connect=lambda: None, s3=client, session=Session(), loop=loop)
    monkeypatch.setattr(stores.S3, "file_system", lambda self: files)
    monkeypatch.setenv("AWS_PROFILE", "p")
    assert stores.S3().tensorstore_driver() == {"driver": "s3"} | expected
    loop.call_soon_threadsafe(loop.stop)


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
