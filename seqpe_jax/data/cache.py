"""Where prepared data lives, and how several processes write there without harm."""

import contextlib
import pathlib
import shutil
import sys
import uuid
from collections.abc import Iterator

from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.files import lock

UNFINISHED = ".unfinished-"


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
    ours = lock(handle)
    if ours is False:
        print(f"waiting for another process that prepares {target.name}", file=sys.stderr, flush=True)
        ours = lock(handle, wait=True)
    return bool(ours)  # without locks, directories are still moved into place whole


@contextlib.contextmanager
def new_directory(target: pathlib.Path, *, alone: bool) -> Iterator[pathlib.Path]:
    """Yields an empty folder beside `target` that takes its name when the block ends well, and vanishes otherwise.

    Whoever reads `target` sees it whole or not at all. With `alone` (the lock is held), what a killed process left and
    a damaged `target` are removed; without, an existing `target` is kept, as another process has just finished it.
    """
    prefix = f"{UNFINISHED}{target.name}-"
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
