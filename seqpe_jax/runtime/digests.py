"""What the files of a stored folder held when they were written, so that damage is found before they are used."""

import base64
import functools
import hashlib
import json

from seqpe_jax.files import Place, below, from_json, in_store, stamp, write_whole

FILE = "digests.json"
MD5 = "md5:"


def write_digests(folder: Place, name: str = "", but: tuple[str, ...] = ()) -> None:
    """Writes the digests of all files of a folder but some, and the name that it has or will get, into its `FILE`.

    They are SHA-256; of an object in a store, its MD5, which the store keeps and tells without anybody reading it.
    """
    files = {str(path.relative_to(folder)): _digest(path, _kind(path)) for path in below(folder)}
    files = {file: digest for file, digest in files.items() if file not in (FILE, *but)}
    write_whole(folder / FILE, json.dumps({"folder": name or folder.name, "files": files}, indent=1) + "\n")


def damage(folder: Place, named: bool = True, within: str = "") -> str:
    """Returns what is not as it was written, in words, or "".

    Folders of older versions, or of a process that was killed before it wrote the digests, have none: nothing is known of
    them.

    Args:
      named: whether the folder must still have its name.
      within: look only at the files of this folder in it; "" = all.
    """
    path = folder / FILE
    try:
        return _compared(folder, named, within, stamp(path))
    except FileNotFoundError:
        return ""


@functools.lru_cache(maxsize=64)  # a checkpoint is asked for several times, and hashing reads it whole
def _compared(folder: Place, named: bool, within: str, written: int) -> str:
    try:
        told = from_json((folder / FILE).read_bytes())
        name, files = told["folder"], dict(told["files"])
        if not all(isinstance(digest, str) for digest in files.values()):
            raise ValueError("a digest is text")
    except (ValueError, KeyError, TypeError):
        return f"its {FILE} is no list of digests"
    if named and name != folder.name:
        return f"it was written as {name}"
    for file, digest in files.items():
        if within and file.partition("/")[0] != within:
            continue
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if _digest(path, MD5 if digest.startswith(MD5) else "") != digest:
            return f"{file} has changed since it was written"
    return ""


def _kind(path: Place) -> str:
    """Which digest of a file costs least: the store's own, where it has one."""
    return MD5 if in_store(path) and path.info().get("md5Hash") else ""


def _digest(path: Place, kind: str) -> str:
    """The digest of a file: SHA-256 as hex digits, or `MD5` and the digest as stores write it."""
    if kind == MD5 and in_store(path) and (told := path.info().get("md5Hash")):
        return MD5 + told
    with path.open("rb") as file:
        if kind == MD5:  # a copy of what was in a store
            return MD5 + base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        return hashlib.file_digest(file, "sha256").hexdigest()
