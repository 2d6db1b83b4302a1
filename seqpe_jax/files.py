"""Paths as users give them, whether something can be written there, and the one way in which files are written."""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from seqpe_jax.errors import InputError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


def expanded(path: str) -> str:
    """Returns a path as it is meant: `~` and `~user` stand for home folders, as in a shell.

    Raises:
      InputError: it is empty or too long, names an object store, there is no such user, or it cannot be looked at.
    """
    if not path.strip():
        raise InputError("a path is empty: give the name of a file or folder")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", path)
    if scheme:
        raise InputError(
            f"{path}: this version reads and writes folders of a file system, not {scheme[1]}:// addresses; mount it "
            "(gcsfuse, s3fs, mountpoint-s3) or give a folder that all hosts share. A folder of that name is ./" + path
        )
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.split("/")[0]
        raise InputError(f"{path}: there is no user '{user[1:]}' with a home folder; a folder of that name is ./{user}")
    try:
        os.lstat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be to be made, and who reads it says what is missing
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{_short(path)} cannot be the name of a file or folder here ({reason}): give another") from error
    return found


def _short(path: str) -> str:
    return path if len(path) <= 120 else f"{path[:60]}... ({len(path)} characters)"


def from_json(content: str | bytes) -> Any:
    """Returns what JSON tells. Raises: ValueError: it is none, not UTF-8, or nested deeper than Python follows."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def check_writable(path: str | os.PathLike, folder: bool, option: str) -> None:
    """Refuses a place where nothing can be written, before any work is done.

    Args:
      folder: whether a folder is to be written, else a file; option: what names the place, for the message.

    Raises:
      InputError: a folder stands where a file should, or the reverse, or a device; the place is not writable, or no place.
    """
    target = pathlib.Path(path)
    try:
        os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, links that go in circles, a folder that is closed
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option}={path} cannot be written ({reason}): choose another place") from error
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(f"{option}={path} is a device, which a file would replace: name a file, or leave the option out")
    if not folder and target.is_dir():
        raise InputError(f"{option}={path} is a folder: name a file")
    if folder and target.exists() and not target.is_dir():
        raise InputError(f"{option}={path} is a file: name a folder")
    nearest = target if folder else target.parent
    while not nearest.exists() and nearest != nearest.parent:
        if nearest.is_symlink():
            raise InputError(f"{option}={path} cannot be written: {nearest} is a link that leads nowhere: mend it")
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"{option}={path} cannot be written: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option}={path} cannot be written: no leave to write in {nearest}; choose another place")


def free_space(folder: str | os.PathLike) -> int | None:
    """Returns the free bytes where a folder lies; None where that is not told, as by some shared file systems."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def open_to_all(path: str | os.PathLike) -> None:
    """Gives a file or folder the mode that the user's umask asks for, where a library made it for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)


def lock(file: Any, wait: bool = False) -> bool | None:
    """Takes the lock of an open file; the kernel lets it go when the file is closed or its process ends, however it ends.

    Args:
      file: an open file or its number; wait: until another process has let it go.

    Returns:
      Whether this process has it now; None where there are no locks, as on some file systems that machines share.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a file beside `path` that takes its name when the block ends well, so that nobody ever sees half of it.

    Its folder is made where there is none. The name holds the process's number: several may write at once, and the last
    one to end stays.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file whole or not at all, text as UTF-8; one that holds the content already is left alone."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content  # names may be any bytes
    target = pathlib.Path(path)
    if target.is_file() and target.read_bytes() == data:
        return
    with whole(target) as part:
        part.write_bytes(data)


def check_free(folder: str | os.PathLike, option: str = "--output") -> None:
    """Refuses to write over anything. Raises: InputError: something is there that is not an empty folder."""
    path = pathlib.Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{option}={folder} is there already and not an empty folder: choose another, or remove it")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, option: str = "--output") -> Iterator[pathlib.Path]:
    """Yields an empty folder that takes the name `path` when the block ends well, and vanishes otherwise.

    Args:
      option: what names the place, for messages.

    Raises:
      InputError: the folder cannot be written, or the name is taken.
    """
    check_free(path, option)
    target = pathlib.Path(path).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise InputError(f"{option}={path} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield folder
        check_free(target, option)
        open_to_all(folder)  # mkdtemp's folders are for their owner alone
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
