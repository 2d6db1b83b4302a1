"""What the files of a stored folder held when they were written, so that damage is found before they are used."""

import functools
import hashlib
import json
import os
import pathlib

from seqpe_jax.files import from_json, write_whole

FILE = "digests.json"


def write_digests(folder: pathlib.Path, name: str = "", but: tuple[str, ...] = ()) -> None:
    """Writes the SHA-256 of all files of a folder but some, and the name that it has or will get, into its `FILE`."""
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {file: digest for file, digest in files.items() if file not in (FILE, *but)}
    write_whole(folder / FILE, json.dumps({"folder": name or folder.name, "files": files}, indent=1) + "\n")


def damage(folder: pathlib.Path, named: bool = True) -> str:
    """Returns what is not as it was written, in words, or "".

    Folders of older versions, or of a process that was killed before it wrote the digests, have none: nothing is known of
    them.

    Args:
      named: whether the folder must still have its name.
    """
    path = folder / FILE
    try:
        return _compared(folder, named, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return ""


@functools.lru_cache(maxsize=64)  # a checkpoint is asked for several times, and hashing reads it whole
def _compared(folder: pathlib.Path, named: bool, written: int) -> str:
    try:
        told = from_json((folder / FILE).read_bytes())
        name, files = told["folder"], dict(told["files"])
    except (ValueError, KeyError, TypeError):
        return f"its {FILE} is no list of digests"
    if named and name != folder.name:
        return f"it was written as {name}"
    for file, digest in files.items():
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if _digest(path) != digest:
            return f"{file} has changed since it was written"
    return ""


def _digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
