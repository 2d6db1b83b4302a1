"""The cache of prepared data: locks, folders that appear complete or not at all, local copies of remote files."""

import concurrent.futures
import contextlib
import glob
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import tqdm

from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.files import AnyPath, as_path, atomic_file, cache_root, is_remote, list_files, lock_file

PARALLEL_DOWNLOADS = 16
UNFINISHED_PREFIX = ".unfinished-"

T = TypeVar("T")


@contextlib.contextmanager
def locked(target: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of `target`, a file in the same folder, after any other process that holds it.

    Yields:
      True while the lock is held; False where the file system has no locks, and two processes may do the same work.

    Raises:
      InputError: the folder is not writable, or its name is not UTF-8.
    """
    check_utf8_name(target.parent, "the cache (data.cache_dir, or SEQPE_JAX_CACHE)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = open(target.parent / f".{target.name}.lock", "a")
    except OSError as error:
        raise InputError(
            f"cannot write to the cache '{target.parent}' ({error.strerror}): set data.cache_dir, or SEQPE_JAX_CACHE, "
            "to a writable folder"
        ) from error
    with handle:
        acquired = lock_file(handle)
        if acquired is False:
            print(f"waiting for another process that prepares {target.name}", file=sys.stderr, flush=True)
            acquired = lock_file(handle, wait=True)
        yield bool(acquired)


@contextlib.contextmanager
def staged_directory(target: pathlib.Path, *, alone: bool) -> Iterator[pathlib.Path]:
    """Yields an empty folder that is renamed to `target` when the block succeeds, and removed otherwise.

    A reader sees `target` complete or not at all.

    Args:
      target: folder to make.
      alone: the lock is held: a damaged `target` and the leftovers of killed processes are removed. Else an existing
        `target` stays, since another process has just finished it.
    """
    prefix = f"{UNFINISHED_PREFIX}{target.name}-"
    if alone:
        for leftover in target.parent.glob(prefix + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = target.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
        if alone and target.exists():
            shutil.rmtree(target)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_or_build(
    target: pathlib.Path, load: Callable[[pathlib.Path], T | None], build: Callable[[pathlib.Path], None]
) -> T:
    """Loads a folder of the cache, which one process builds first where it is missing or damaged.

    Several processes may call it at once; a killed one leaves nothing that is read later.

    Args:
      target: the folder.
      load: returns the content of a folder, or None where it is missing or damaged.
      build: writes the content into an empty folder.

    Returns:
      What `load` returns.

    Raises:
      InputError: see `build`; or the cache is not writable.
    """
    found = load(target)
    if found is not None:
        return found
    with locked(target) as alone:
        found = load(target)
        if found is None:
            with staged_directory(target, alone=alone) as folder:
                build(folder)
            found = load(target)
    if found is None:
        raise RuntimeError(f"'{target}' cannot be read back: is the disk full?")
    return found


def local_copies(
    paths: Sequence[str], cache_dir: str | os.PathLike = "", progress: bool = True, option: str = "data.paths"
) -> tuple[str, ...]:
    """Replaces remote paths by those of copies in the cache; a copy is made again when the object has changed.

    Args:
      paths: local paths, which stay, and addresses in buckets.
      cache_dir: "" = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      progress: show a progress bar on stderr.
      option: the option that names the paths, for messages.

    Raises:
      InputError: nothing is there, or it cannot be read.
    """
    return tuple(str(_local_copy(path, cache_dir, progress, option)) if is_remote(path) else path for path in paths)


def _local_copy(address: str, cache_dir: str | os.PathLike, progress: bool, option: str) -> pathlib.Path:
    if glob.has_magic(address):
        raise InputError(
            f"{option}: '{address}' is a pattern, which works for local files only: give a folder or an object"
        )
    source = as_path(address)
    target = cache_root(cache_dir).joinpath("fetched", *source.parts[2:])
    try:
        with locked(target):
            if source.is_file():
                _download(source, target)
            else:
                _download_folder(source, target, progress, option)
    except OSError as error:
        raise InputError(f"{option}: '{error.filename or address}' cannot be downloaded ({error.strerror})") from error
    return target


def _download_folder(source: AnyPath, target: pathlib.Path, progress: bool, option: str) -> None:
    """Synchronizes a local folder with a remote one: files are added, replaced and removed."""
    names = {str(file.relative_to(source)): file for file in list_files(source)}
    names = {name: file for name, file in names.items() if ".." not in pathlib.PurePosixPath(name).parts}
    if not names:
        raise InputError(f"{option}: there is nothing at '{source}': give a folder or an object of a bucket")
    with concurrent.futures.ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
        downloads = pool.map(lambda name: _download(names[name], target / name), names)
        for _ in tqdm.tqdm(downloads, f"download {source}", len(names), unit=" files", delay=2.0, disable=not progress):
            pass
    for file in list_files(target):
        if str(file.relative_to(target)) not in names:
            file.unlink()


def _download(source: AnyPath, file: pathlib.Path) -> None:
    """Copies an object unless the copy has its size and time; the time is part of the identity of data."""
    status = source.info()
    mtime_ns = round(status["mtime"].timestamp() * 1e6) * 1000
    if file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (status["size"], mtime_ns):
        return
    with atomic_file(file) as part:
        source.download(part)
        os.utime(part, ns=(mtime_ns, mtime_ns))
