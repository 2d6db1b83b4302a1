"""What lies in a store and is read many times: copied into this machine's cache, where it is a file like any other."""

import concurrent.futures
import glob
import os
import pathlib
from collections.abc import Sequence

import tqdm

from seqpe_jax.data.cache import locked
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_file, cache_root, is_remote, list_files

AT_ONCE = 16  # objects


def fetched(
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
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as several:
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
