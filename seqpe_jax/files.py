"""Paths as users give them, and whether something can be written there."""

import os
import pathlib

from seqpe_jax.errors import InputError


def expanded(path: str) -> str:
    """Returns a path as it is meant: `~` and `~user` stand for home folders, as in a shell.

    Raises:
      InputError: it is empty, or there is no such user.
    """
    if not path.strip():
        raise InputError("a path is empty: give the name of a file or folder")
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = found.split("/")[0]
        raise InputError(f"{path}: there is no user '{user[1:]}' with a home folder; a folder of that name is ./{user}")
    return found


def check_writable(path: str | os.PathLike, folder: bool, option: str) -> None:
    """Refuses a place where nothing can be written, before any work is done.

    Args:
      folder: whether a folder is to be written, else a file; option: what names the place, for the message.

    Raises:
      InputError: a folder stands where a file should, or the reverse, or the place is not writable.
    """
    target = pathlib.Path(path)
    if not folder and target.is_dir():
        raise InputError(f"{option}={path} is a folder: name a file")
    if folder and target.exists() and not target.is_dir():
        raise InputError(f"{option}={path} is a file: name a folder")
    nearest = target if folder else target.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise InputError(f"{option}={path} cannot be written: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option}={path} cannot be written: no leave to write in {nearest}; choose another place")


def open_to_all(path: str | os.PathLike) -> None:
    """Gives a file or folder the mode that the user's umask asks for, where a library made it for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)
