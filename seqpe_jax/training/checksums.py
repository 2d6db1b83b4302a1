"""What the files of a stored folder held when they were written, so that damage is found before they are used."""

import base64
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, atomic_write, file_versions, is_remote, list_files, parse_json

DIGESTS_FILE = "digests.json"
MD5 = "md5:"
CHECKPOINTS_DIR = "checkpoints"  # of a run
ORBAX_METADATA = (
    "_CHECKPOINT_METADATA"  # of a checkpoint; Orbax adds the time of its commit after the digests are written
)
COMMIT_TIME, WITHOUT_TIME = "commit_timestamp_nsecs", "without commit time:"
META_FILE = pathlib.PurePosixPath("meta", "metadata")  # of a checkpoint: what is saved beside the state
AGAIN = 'put back a copy of it, or write {"files": {}} into it, and none of the run\'s files is compared any more'
SIDE_FILES = "side_files"  # a key of that: the run's own folder has a `DIGESTS_FILE` too


def write_checksums(folder: AnyPath, name: str = "", but: tuple[str, ...] = ()) -> None:
    """Writes the digests of all files of a folder but some, and the name that it has or will get, into its `DIGESTS_FILE`.

    They are SHA-256; of an object in a store, its MD5, which the store keeps and tells without anybody reading it.
    """
    files = {str(path.relative_to(folder)): _digest(path, _kind(path)) for path in list_files(folder)}
    _write(folder, {file: digest for file, digest in files.items() if file not in (DIGESTS_FILE, *but)}, name)


def write_side_files(staged: pathlib.Path, folder: AnyPath) -> None:
    """Puts the files of a local folder into a run's folder, each with its SHA-256 in the run's `DIGESTS_FILE`.

    Where a listed file changes, both of its digests are listed while it is written: a process that is killed in between
    leaves no file that looks damaged. config.json, by which a run is known, comes first.
    """
    listed = _listed(folder)
    files = sorted(staged.iterdir(), key=lambda file: (file.name != "config.json", file.name))
    new = {file.name: _digest(file, "") for file in files}
    changed = {
        name: [*_any_of(listed[name]), digest] for name, digest in new.items() if listed.get(name, digest) != digest
    }
    if changed:
        _write(folder, listed | changed)
    for file in files:
        atomic_write(folder / file.name, file.read_bytes())
    if listed | new != listed:
        _write(folder, listed | new)


def check_side_files(folder: AnyPath) -> None:
    """Refuses a run or an export of which a small file (config.json, sizes.json, the tokenizer, ...) is damaged or gone.

    Folders of older versions list none, and nothing is known of theirs.

    Raises:
      InputError: names the file and says what to do.
    """
    try:
        listed = _listed(folder)
    except ValueError:
        raise InputError(f"{folder / DIGESTS_FILE} is damaged: {AGAIN}") from None
    if not listed and not (folder / DIGESTS_FILE).exists() and _lists_side_files(folder):
        raise InputError(f"{folder / DIGESTS_FILE} is missing, which this run had: {AGAIN}")
    for name, digests in listed.items():
        if "/" in name or not name.endswith(".json"):
            continue
        try:
            found = _digest(folder / name, _kind_of(digests))
        except FileNotFoundError:
            raise InputError(f"{folder / name} is missing, which was written with the model: put back a copy") from None
        if found not in _any_of(digests):
            raise InputError(
                f"{folder / name} has changed since it was written: put back a copy of it. Fields of a run are changed by "
                f"options of `train` (--config.FIELD=), not by hand; if the change is meant all the same, remove the entry "
                f"of {name} from {folder / DIGESTS_FILE}"
            )


def checksum_error(folder: AnyPath, named: bool = True, within: str = "") -> str:
    """Returns what is not as it was written, in words, or "".

    Folders of older versions have no digests: nothing is known of them.

    Args:
      named: whether the folder must still have its name.
      within: look only at the files of this folder in it; "" = all.
    """
    files = file_versions(folder)
    return _compared(folder, named, within, files) if DIGESTS_FILE in (name for name, *_ in files) else ""


def clear_cache() -> None:
    """Forgets what was compared, so that the next question reads every file again, as whoever opens a folder wants it."""
    _compared.cache_clear()


def sha256_of(folder: AnyPath, names: Iterable[str]) -> dict[str, str]:
    """Returns the SHA-256 of those of a folder's files that are there."""
    return {name: _digest(folder / name, "") for name in names if (folder / name).is_file()}


@functools.lru_cache(maxsize=64)  # a checkpoint is asked for several times, and hashing reads it whole
def _compared(folder: AnyPath, named: bool, within: str, written: tuple[Any, ...]) -> str:
    del written  # a file that is written meanwhile is read again
    try:
        told = parse_json((folder / DIGESTS_FILE).read_bytes())
        name, files = told["folder"], _listed(folder)
    except (ValueError, KeyError, TypeError):
        return f"its {DIGESTS_FILE} is no list of digests"
    if named and name != folder.name:
        return f"it was written as {name}"
    for file, digests in files.items():
        if within and file.partition("/")[0] != within:
            continue
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if _digest(path, _kind_of(digests)) not in _any_of(digests):
            return f"{file} has changed since it was written"
    return ""


def _listed(folder: AnyPath) -> dict[str, Any]:
    """The digests that a folder lists, by file; {} without a list. Raises: ValueError: it is none."""
    try:
        files = parse_json((folder / DIGESTS_FILE).read_bytes())["files"]
        good = all(all(isinstance(digest, str) for digest in _any_of(digests)) for digests in dict(files).values())
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no list of digests: {error}") from error
    if not good:
        raise ValueError("a digest is text")
    return dict(files)


def _any_of(digests: str | list[str]) -> list[str]:
    """The digests that a file may have: one, or several while it is written anew."""
    return [digests] if isinstance(digests, str) else list(digests) or [""]


def _write(folder: AnyPath, files: Mapping[str, Any], name: str = "") -> None:
    atomic_write(folder / DIGESTS_FILE, json.dumps({"folder": name or folder.name, "files": files}, indent=1) + "\n")


def _lists_side_files(folder: AnyPath) -> bool:
    """Whether a checkpoint of a run says that the run's folder lists digests of its own."""
    steps = (
        [path for path in (folder / CHECKPOINTS_DIR).iterdir() if path.name.isdecimal()]
        if (folder / CHECKPOINTS_DIR).is_dir()
        else []
    )
    return any(read_meta(step).get(SIDE_FILES) for step in steps)


def read_meta(step: AnyPath) -> dict[str, Any]:
    """Returns what was saved beside a checkpoint's state; {} where that is gone or damaged."""
    try:
        found = parse_json((step / META_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(path: AnyPath) -> str:
    """Which digest of a file costs least: the store's own, where it has one."""
    if path.name == ORBAX_METADATA:
        return WITHOUT_TIME
    return MD5 if is_remote(path) and path.info().get("md5Hash") else ""


def _kind_of(digests: str | list[str]) -> str:
    """Which digest of a file is listed."""
    return next((kind for kind in (MD5, WITHOUT_TIME) if _any_of(digests)[0].startswith(kind)), "")


def _digest(path: AnyPath, kind: str) -> str:
    """The digest of a file: SHA-256 as hex digits, or a kind and the digest: for `MD5` as stores write it."""
    if kind == MD5 and is_remote(path) and (told := path.info().get("md5Hash")):
        return MD5 + told
    if kind == WITHOUT_TIME:
        try:
            told = parse_json(path.read_bytes())
            timed = type(told.pop(COMMIT_TIME, None)) in (int, type(None))
            content = json.dumps([timed, told], sort_keys=True).encode()
        except (ValueError, AttributeError):
            content = b""
        return WITHOUT_TIME + hashlib.sha256(content).hexdigest()
    with path.open("rb") as file:
        if kind == MD5:  # a copy of what was in a store
            return MD5 + base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
        return hashlib.file_digest(file, "sha256").hexdigest()
