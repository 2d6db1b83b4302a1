"""Local paths and addresses in buckets alike: as users give them, checks before work starts, atomic writes, file locks.

`buckets` has the paths in buckets; it is imported only for them, since a run on a disk does without its libraries.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from seqpe_jax.errors import InputError

if TYPE_CHECKING:
    from seqpe_jax.buckets import RemotePath

BUCKET_SCHEMES = ("gs://", "s3://")
COMPILED_DIR = "compiled"  # compiled programs, in the cache or in the folder of a run in a bucket
AnyPath = Any  # a `pathlib.Path`, or a `buckets.RemotePath`, which has the same methods and a few more

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


# ------------------------------------------------------------------------------------------------------------------- paths


def expand_path(path: str, *, local: str = "") -> str:
    """Returns a path with `~` and `~user` expanded, or a normalized address in a bucket.

    Args:
      path: path given by the user; it need not exist.
      local: the reason why it must be local, in words; "" = an address is allowed.

    Raises:
      InputError: it is empty, too long or cannot be looked up, an address of an unknown kind, or there is no such user.
    """
    if not path.strip():
        raise InputError("a path is empty: give the name of a file or folder")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", path)
    if scheme and not local and path.startswith(BUCKET_SCHEMES):
        from seqpe_jax import buckets

        return buckets.check_address(path)
    if scheme:
        mount = "mount it (gcsfuse, s3fs, mountpoint-s3) or give a folder that all hosts share"
        written = f"{scheme[1]}://BUCKET/NAME"
        if f"{scheme[1]}://" not in BUCKET_SCHEMES:
            hint = f"there is no way to {scheme[1]}:// addresses: give gs://BUCKET/NAME or s3://BUCKET/NAME, {mount}"
        else:
            hint = f"{local}: {mount}" if local else f"an address in a bucket is written {written}"
        raise InputError(f"{path}: {hint}. A folder of that name is ./{path}")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.split("/")[0]
        raise InputError(f"{path}: there is no user '{user[1:]}' with a home folder; a folder of that name is ./{user}")
    try:
        os.lstat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be created; a reader reports that it is missing
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = path if len(path) <= 120 else f"{path[:60]}... ({len(path)} characters)"
        raise InputError(f"{shown} cannot be the name of a file or folder here ({reason}): give another") from error
    return expanded


def as_path(path: str | os.PathLike) -> AnyPath:
    """Returns a `pathlib.Path`, or a `buckets.RemotePath` for an address in a bucket."""
    if not is_remote(path):
        return pathlib.Path(path)
    from seqpe_jax import buckets

    return buckets.RemotePath(buckets.check_address(os.fspath(path)))


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is an address in a bucket, where nothing can be appended, renamed or locked."""
    return os.fspath(path).startswith(BUCKET_SCHEMES)


def cache_root(chosen: str | os.PathLike = "") -> pathlib.Path:
    """Returns `chosen`, else $SEQPE_JAX_CACHE, else ~/.cache/seqpe_jax, as an absolute path (not created)."""
    local = (
        "prepared data, compiled programs and copies lie on a disk of this machine (data.cache_dir, SEQPE_JAX_CACHE)"
    )
    path = os.fspath(chosen) or os.environ.get("SEQPE_JAX_CACHE") or "~/.cache/seqpe_jax"
    return pathlib.Path(expand_path(path, local=local)).absolute()


# -------------------------------------------------------------------------------------------------------------------- JSON


def parse_json(content: str | bytes) -> Any:
    """Returns the value of a JSON text. Raises: ValueError: it is no JSON, not UTF-8, or nested too deep for Python."""
    try:
        return json.loads(content.removeprefix("\ufeff") if isinstance(content, str) else content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_json_text(content: str | bytes) -> Any:
    """Returns the value of a JSON text, of which all strings can be written as UTF-8.

    Raises:
      ValueError: see `parse_json`; or a string holds half a surrogate pair.
    """
    value = parse_json(content)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(f"a text in it holds half a surrogate pair, \\u{half:04x}, which is no character") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


# ------------------------------------------------------------------------------------------------------------------ checks


def check_writable(path: str | os.PathLike, folder: bool, option: str) -> None:
    """Refuses a path that cannot be written, before any work is done.

    Args:
      path: path of the new file.
      folder: a folder is to be written, not a file.
      option: the option that names the path, for messages.

    Raises:
      InputError: it is a folder and not a file, or the reverse, a device, or cannot be written.
    """
    target = as_path(path)
    if is_remote(target):
        from seqpe_jax import buckets

        buckets.check_writable(target, folder, option)
        return
    try:
        os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, a circle of links, a folder without permission
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option}={path} cannot be written ({reason}): choose another path") from error
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(
            f"{option}={path} is a device, which a file would replace: name a file, or leave the option out"
        )
    if not folder and target.is_dir():
        raise InputError(f"{option}={path} is a folder: name a file")
    if folder and target.exists() and not target.is_dir():
        raise InputError(f"{option}={path} is a file: name a folder")
    parent = target if folder else target.parent
    while not parent.exists() and parent != parent.parent:
        if parent.is_symlink():
            raise InputError(f"{option}={path} cannot be written: {parent} is a link that leads nowhere: mend it")
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{option}={path} cannot be written: {parent} is a file, not a folder")
    try:  # permissions do not suffice: /proc and read-only or full file systems refuse root as well
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise InputError(
            f"{option}={path} cannot be written: {parent} does not take new files ({error.strerror}); choose another path"
        ) from error


def check_readable(path: str | os.PathLike, option: str) -> None:
    """Refuses a path in a bucket that does not exist or that this user cannot read. Raises: InputError."""
    if is_remote(path):
        from seqpe_jax import buckets

        buckets.check_bucket(as_path(path), option)


def require_empty(folder: str | os.PathLike, option: str = "--output") -> None:
    """Refuses to overwrite. Raises: InputError: the path exists and is not an empty folder."""
    path = as_path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{option}={folder} is there already and not an empty folder: choose another, or remove it")


def free_space(folder: str | os.PathLike) -> int | None:
    """Returns the free bytes on the disk of a folder; None if unknown, as in a bucket and on some file systems."""
    if is_remote(folder):
        return None
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


# ------------------------------------------------------------------------------------------------------- locks and writing


def lock_file(file: Any, wait: bool = False) -> bool | None:
    """Locks an open file; the kernel releases the lock when the file is closed or the process ends, however it ends.

    Not filelock: a run's lock is on the file that names its owner, which filelock truncates, and the lock of a sweep's log
    passes to the commands that the sweep starts, in which filelock closes the file.

    Args:
      file: an open file or its number.
      wait: until another process has released it.

    Returns:
      Whether this process has the lock; None if there are no locks, as on some shared file systems.
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


def apply_umask(path: str | os.PathLike) -> None:
    """Sets the mode of a file or folder to that of the user's umask, if a library made it private."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary local file that becomes `path` if the block succeeds, so that no reader sees half of it.

    The parent folder is made. Of several processes that write at once, the last one wins.
    """
    target = as_path(path)
    if is_remote(target):
        with tmp_dir() as folder:
            temporary = folder / (target.name or "part")
            yield temporary
            target.upload(temporary)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file atomically, text as UTF-8 (file names in it may be any bytes); an equal file is not touched."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    target = as_path(path)
    if is_remote(target):
        target.write_bytes(data)
    elif not target.is_file() or target.read_bytes() != data:
        with atomic_file(target) as temporary:
            temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike, option: str = "--output") -> Iterator[pathlib.Path]:
    """Yields a temporary local folder that becomes `path` if the block succeeds, and is removed if not.

    In a bucket its files are uploaded one by one, config.json last, by which a folder is known to be a run or an export.

    Args:
      path: path of the folder.
      option: the option that names it, for messages.

    Raises:
      InputError: the folder cannot be written, or is not empty.
    """
    require_empty(path, option)
    if is_remote(path):
        with tmp_dir() as folder:
            yield folder
            require_empty(path, option)
            upload_dir(folder, as_path(path))
        return
    target = pathlib.Path(path).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise InputError(f"{option}={path} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield folder
        require_empty(target, option)
        apply_umask(folder)  # mkdtemp makes private folders
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def tmp_dir() -> Iterator[pathlib.Path]:
    """Yields an empty local folder that is removed at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="seqpe_jax_", ignore_cleanup_errors=True) as folder:
        yield pathlib.Path(folder)


@contextlib.contextmanager
def staged_dir(folder: AnyPath) -> Iterator[pathlib.Path]:
    """Yields a folder for a library that writes local files only; they are uploaded at the end of the block."""
    if not is_remote(folder):
        yield folder
        return
    with tmp_dir() as local:
        yield local
        upload_dir(local, folder)


# ----------------------------------------------------------------------------------------------------------------- folders


def list_files(folder: AnyPath) -> list[AnyPath]:
    """Returns all files of a folder and its subfolders, sorted."""
    if is_remote(folder):
        return folder.list_files()
    return sorted(path for path in folder.rglob("*") if path.is_file())


def file_versions(folder: AnyPath) -> tuple[tuple[str, int, Any], ...]:
    """Returns (name, bytes, version or mtime) of all files of a folder; it differs once one of them is written."""
    if is_remote(folder):
        return folder.file_versions()
    versions = []
    for path in list_files(folder):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            status = path.stat()
            versions.append((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return tuple(versions)


def upload_dir(folder: pathlib.Path, target: "RemotePath") -> None:
    """Uploads all files of a folder, config.json last; removes them again if one fails."""
    uploaded: list[Any] = []
    try:
        for file in sorted(list_files(folder), key=lambda file: (file.name == "config.json", -len(file.parts), file)):
            uploaded.append(target / file.relative_to(folder))
            uploaded[-1].upload(file)
    except BaseException:
        for file in uploaded:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        raise


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """Returns the bytes of a file from `start` up to `stop`; in a bucket no others are transferred."""
    if is_remote(path):
        return path.read_range(start, stop)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def move_dir(folder: AnyPath, target: AnyPath, first: tuple[str, ...] = ()) -> None:
    """Renames a folder. In a bucket all files are copied before any is removed.

    Args:
      folder: folder to rename.
      target: its new path.
      first: files that are removed first, without which nobody takes the folder for complete.
    """
    if not is_remote(folder):
        folder.rename(target)
        return
    files = list_files(folder)
    for file in files:
        file.copy_to(target / file.relative_to(folder))
    for file in sorted(files, key=lambda file: str(file.relative_to(folder)) not in first):
        file.unlink(missing_ok=True)


def remove_dir(folder: AnyPath) -> None:
    """Removes a folder with all files, as far as possible."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for file in list_files(folder):
            file.unlink(missing_ok=True)
