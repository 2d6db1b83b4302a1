"""The cache of prepared data: locks, folders that appear complete or not at all, copies of objects in buckets."""

import concurrent.futures
import contextlib
import glob
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence

import tqdm

from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.files import AnyPath, as_path, atomic_file, cache_root, is_remote, list_files, lock_file

PARALLEL_DOWNLOADS = 16  # objects
UNFINISHED_PREFIX = ".unfinished-"


@contextlib.contextmanager
def locked(target: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of `target` (a file beside it), waiting for a process that has it.

    Yields:
      Whether the lock is held; False where the file system has no locks, and processes may do the same work twice.

    Raises:
      InputError: the folder cannot be written, or its name is not UTF-8.
    """
    check_utf8_name(target.parent, "the cache (data.cache_dir, or SEQPE_JAX_CACHE)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = open(target.parent / f".{target.name}.lock", "a")
    except OSError as error:
        raise InputError(
            f"cannot write to the cache '{target.parent}' ({error.strerror}): set data.cache_dir, or SEQPE_JAX_CACHE, "
            "to a folder that can be written"
        ) from error
    with handle:
        yield _lock(handle, target)


def _lock(handle, target: pathlib.Path) -> bool:
    ours = lock_file(handle)
    if ours is False:
        print(f"waiting for another process that prepares {target.name}", file=sys.stderr, flush=True)
        ours = lock_file(handle, wait=True)
    return bool(ours)  # without locks, directories are still moved into place whole


@contextlib.contextmanager
def staged_directory(target: pathlib.Path, *, alone: bool) -> Iterator[pathlib.Path]:
    """Yields an empty folder beside `target` that takes its name when the block ends well, and vanishes otherwise.

    Whoever reads `target` sees it whole or not at all. With `alone` (the lock is held), what a killed process left and
    a damaged `target` are removed; without, an existing `target` is kept, as another process has just finished it.
    """
    prefix = f"{UNFINISHED_PREFIX}{target.name}-"
    if alone:
        for left in target.parent.glob(prefix + "*"):
            shutil.rmtree(left, ignore_errors=True)
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


def local_copies(
    paths: Sequence[str], cache_dir: str | os.PathLike = "", progress: bool = True, option: str = "data.paths"
) -> tuple[str, ...]:
    """Returns paths of this machine: addresses in a store give way to copies in the cache, made where they are new.

    Args:
      option: what names the paths, for messages.

    Raises:
      InputError: nothing is there, or it cannot be read.
    """
    return tuple(str(_fetched(path, cache_dir, progress, option)) if is_remote(path) else path for path in paths)


def _fetched(address: str, cache_dir: str | os.PathLike, progress: bool, option: str) -> pathlib.Path:
    if glob.has_magic(address):
        raise InputError(
            f"{option}: '{address}' is a pattern, which is for files of this machine: give a folder or an object"
        )
    place = as_path(address)
    target = cache_root(cache_dir).joinpath("fetched", *place.parts[2:])
    try:
        with locked(target):
            if place.is_file():
                _fetch(place, target)
            else:
                _fetch_folder(place, target, progress, option)
    except OSError as error:
        raise InputError(f"{option}: '{error.filename or address}' cannot be fetched ({error.strerror})") from error
    return target


def _fetch_folder(place: AnyPath, target: pathlib.Path, progress: bool, option: str) -> None:
    """Makes a folder hold what one of a store holds, and nothing else."""
    names = {str(one.relative_to(place)): one for one in list_files(place)}
    names = {name: one for name, one in names.items() if ".." not in pathlib.PurePosixPath(name).parts}
    if not names:
        raise InputError(f"{option}: there is nothing at '{place}': give a folder or an object of a bucket")
    with concurrent.futures.ThreadPoolExecutor(PARALLEL_DOWNLOADS) as several:
        work = several.map(lambda name: _fetch(names[name], target / name), names)
        for _ in tqdm.tqdm(work, f"fetch {place}", len(names), unit=" files", delay=2.0, disable=not progress):
            pass
    for file in list_files(target):
        if str(file.relative_to(target)) not in names:
            file.unlink()


def _fetch(place: AnyPath, file: pathlib.Path) -> None:
    """Copies an object unless that version of it is here; the copy has the object's time, by which data are told apart."""
    told = place.info()
    changed = round(told["mtime"].timestamp() * 1e6) * 1000
    if file.is_file() and (file.stat().st_size, file.stat().st_mtime_ns) == (told["size"], changed):
        return
    with atomic_file(file) as part:
        place.download(part)
        os.utime(part, ns=(changed, changed))
