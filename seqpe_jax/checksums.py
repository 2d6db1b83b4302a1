"""Checksums of a folder's files, written along with them, so that damage is found before a file is used.

They lie in the folder as digests.json: {"folder": its name, "files": {file: checksum, or a list of allowed ones}}. A checksum
is a file's SHA-256 in hex digits. Objects in a bucket have the MD5 that the bucket itself holds, if it does, so that nobody
needs to download them. Orbax's own metadata file has the SHA-256 of its content without the commit time, which Orbax adds later.
"""

import base64
import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, atomic_write, is_remote, list_files, parse_json

DIGESTS_FILE = "digests.json"
ORBAX_METADATA = "_CHECKPOINT_METADATA"
MD5 = "md5:"
WITHOUT_COMMIT_TIME = "without commit time:"
COMMIT_TIME = "commit_timestamp_nsecs"
HANDLERS = "item_handlers"
HASH_THREADS = min(8, os.cpu_count() or 1)  # files that a process reads at once
RESTORE_HINT = (
    'put back a copy of it, or write {"files": {}} into it, and none of the run\'s files is compared any more'
)


def write_checksums(
    folder: AnyPath, name: str = "", exclude: tuple[str, ...] = (), known: Mapping[str, Any] | None = None
) -> None:
    """Writes the checksums of all files of a folder.

    Args:
      folder: a folder that is complete but for its checksums.
      name: the name that the folder will get; "" = it has its name already.
      exclude: files that are not listed.
      known: checksums of some of the files, which are not read again (`checksums_of`).
    """
    found = dict(known or {})
    files = [str(path.relative_to(folder)) for path in list_files(folder)]
    found |= checksums_of(folder, [file for file in files if file not in (DIGESTS_FILE, *exclude, *found)])
    _write(folder, dict(sorted(found.items())), name)


def checksums_of(folder: AnyPath, files: Iterable[str]) -> dict[str, str]:
    """Returns the checksums of files of a folder; `HASH_THREADS` of them are read at once.

    Args:
      folder: the folder.
      files: their paths in it.
    """
    files = list(files)
    found = _in_threads(lambda file: _checksum(folder / file, _scheme_for(folder / file)), files)
    return dict(zip(files, found, strict=True))


def write_files(staged: pathlib.Path, folder: AnyPath) -> None:
    """Writes the files of a local folder into a run's folder, and their checksums.

    While a file changes, its old and its new checksum are both allowed, so that a process that is killed in between leaves
    no file that looks damaged. config.json, which makes a folder a run, is written first.
    """
    listed = read_checksums(folder)
    files = sorted(staged.iterdir(), key=lambda file: (file.name != "config.json", file.name))
    new = {file.name: _checksum(file, "") for file in files}
    changed = {
        name: [*_allowed(listed[name]), value] for name, value in new.items() if listed.get(name, value) != value
    }
    if changed:
        _write(folder, listed | changed)
    for file in files:
        atomic_write(folder / file.name, file.read_bytes())
    if listed | new != listed:
        _write(folder, listed | new)


def read_checksums(folder: AnyPath) -> dict[str, Any]:
    """Returns the listed checksums of a folder by file; {} without a list. Raises: ValueError: the list is damaged."""
    try:
        files = dict(parse_json((folder / DIGESTS_FILE).read_bytes())["files"])
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no list of checksums: {error}") from error
    if not all(isinstance(value, str) for values in files.values() for value in _allowed(values)):
        raise ValueError("a checksum is text")
    return files


def checksum_error(folder: AnyPath, check_name: bool = True, subfolder: str = "") -> str:
    """Returns a description of the differences from the checksums, or "" if there are none.

    A folder without a list, as older versions wrote it, passes.

    Args:
      folder: folder with a digests.json.
      check_name: the folder must still have the name that it was written under.
      subfolder: compare the files of this part only; "" = all.
    """
    error, files = listed_files(folder, check_name)
    if subfolder:
        files = {file: values for file, values in files.items() if file.partition("/")[0] == subfolder}
    return error or files_error(folder, files)


def listed_files(folder: AnyPath, check_name: bool = True) -> tuple[str, dict[str, Any]]:
    """Returns (what is wrong with the list of checksums or "", the listed checksums by file); reads no other file.

    Args:
      folder: folder with a digests.json; without one, nothing is listed.
      check_name: the folder must still have the name that it was written under.
    """
    try:
        name, files = parse_json((folder / DIGESTS_FILE).read_bytes())["folder"], read_checksums(folder)
    except FileNotFoundError:
        return "", {}
    except (ValueError, KeyError, TypeError):
        return f"its {DIGESTS_FILE} is no list of digests", {}
    if check_name and name != folder.name:
        return f"it was written as {name}", {}
    return "", files


def files_error(folder: AnyPath, files: Mapping[str, Any]) -> str:
    """Returns which of some files, the first of them, is missing or differs from its checksum, or "".

    Args:
      folder: the folder.
      files: the allowed checksum or checksums of each file.
    """

    def error(file: str) -> str:
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        return "" if _matches(path, files[file]) else f"{file} has changed since it was written"

    return next(filter(None, _in_threads(error, files)), "")


def check_small_files(folder: AnyPath) -> None:
    """Refuses a run or an export with a damaged or missing small file (config.json, sizes.json, the tokenizer, ...).

    Raises:
      InputError: names the file and the cure.
    """
    try:
        listed = read_checksums(folder)
    except ValueError:
        raise InputError(f"{folder / DIGESTS_FILE} is damaged: {RESTORE_HINT}") from None
    for name, values in listed.items():
        if "/" in name or not name.endswith(".json"):
            continue
        try:
            same = _matches(folder / name, values)
        except FileNotFoundError:
            raise InputError(f"{folder / name} is missing, which was written with the model: put back a copy") from None
        if not same:
            raise InputError(
                f"{folder / name} has changed since it was written: put back a copy of it. Fields of a run are changed by "
                f"options of `train` (--config.FIELD=), not by hand; if the change is meant all the same, remove the entry "
                f"of {name} from {folder / DIGESTS_FILE}"
            )


def sha256_of(folder: AnyPath, names: Iterable[str]) -> dict[str, str]:
    """Returns the SHA-256 of those files of a folder that exist, by name."""
    return {name: _checksum(folder / name, "") for name in names if (folder / name).is_file()}


def md5_of(path: AnyPath) -> str:
    """Returns the MD5 of a file in base64; of an object in a bucket the one that the bucket stores, if it does."""
    return _checksum(path, MD5).removeprefix(MD5)


def _in_threads(function: Callable[[str], str], files: Iterable[str]) -> list[str]:
    """The results of a function of each file, in their order."""
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(function, files))


def _allowed(values: str | list[str]) -> list[str]:
    """The checksums that a file may have: one, or several while it is rewritten."""
    return [values] if isinstance(values, str) else list(values) or [""]


def _matches(path: AnyPath, values: str | list[str]) -> bool:
    allowed = _allowed(values)
    scheme = next((scheme for scheme in (MD5, WITHOUT_COMMIT_TIME) if allowed[0].startswith(scheme)), "")
    if _checksum(path, scheme) in allowed:
        return True
    # Orbax adds the handlers in a thread of its own, on a busy machine after the checksums were written.
    return scheme == WITHOUT_COMMIT_TIME and _metadata_checksum(path, with_handlers=False) in allowed


def _scheme_for(path: AnyPath) -> str:
    if path.name == ORBAX_METADATA:
        return WITHOUT_COMMIT_TIME
    return MD5 if is_remote(path) and path.md5() else ""


def _checksum(path: AnyPath, scheme: str) -> str:
    """The checksum of a file, which begins with its scheme; the scheme "" is plain SHA-256. Raises: FileNotFoundError."""
    if scheme == MD5 and is_remote(path) and (stored := path.md5()):
        return MD5 + stored
    if scheme == WITHOUT_COMMIT_TIME:
        return _metadata_checksum(path)
    with path.open("rb") as file:
        if scheme == MD5:  # a copy on a disk of what was in a bucket
            return MD5 + base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata_checksum(path: AnyPath, with_handlers: bool = True) -> str:
    """The checksum of Orbax's metadata file, without its commit time and, if asked for, without its handlers."""
    try:
        values = parse_json(path.read_bytes())
        has_time = type(values.pop(COMMIT_TIME, None)) in (int, type(None))
        if not with_handlers:
            values[HANDLERS] = None
        content = json.dumps([has_time, values], sort_keys=True).encode()
    except (ValueError, AttributeError, TypeError):
        content = b""
    return WITHOUT_COMMIT_TIME + hashlib.sha256(content).hexdigest()


def _write(folder: AnyPath, files: Mapping[str, Any], name: str = "") -> None:
    atomic_write(folder / DIGESTS_FILE, json.dumps({"folder": name or folder.name, "files": files}, indent=1) + "\n")
