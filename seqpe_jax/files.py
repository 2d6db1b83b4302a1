"""Paths as users give them, whether something can be written there, and the one way in which files are written.

A path is a place in a file system or, as gs://BUCKET/NAME, in an object store (`stores`): what is here serves both.
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
    from seqpe_jax.stores import RemotePath

GCS_SCHEME = "gs://"
AnyPath = Any  # a `pathlib.Path`, or a `stores.RemotePath`, which has the same methods and some more

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


def expand_path(path: str, *, local: str = "") -> str:
    """Returns a path as it is meant: `~` and `~user` stand for home folders, as in a shell.

    Args:
      local: why it must be of a file system, in words; "" = an address in a store will do.

    Raises:
      InputError: it is empty or too long, an address of no store that is known, there is no such user, or it cannot be
        looked at.
    """
    if not path.strip():
        raise InputError("a path is empty: give the name of a file or folder")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", path)
    if scheme and not local and path.startswith(GCS_SCHEME):
        from seqpe_jax import stores  # libraries that a run on a disk does without

        return stores.check_address(path)
    if scheme:
        mount = "mount it (gcsfuse, s3fs, mountpoint-s3) or give a folder that all hosts share"
        words = {
            "gs": f"{local}: {mount}" if local else "an address in a store is written gs://BUCKET/NAME",
            "s3": f"checkpoints cannot be saved to s3:// (Orbax has no way there): give gs://BUCKET/NAME, {mount}",
        }.get(scheme[1], f"there is no way to {scheme[1]}:// addresses: give gs://BUCKET/NAME, {mount}")
        raise InputError(f"{path}: {words}. A folder of that name is ./{path}")
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
        raise InputError(
            f"{_short(path)} cannot be the name of a file or folder here ({reason}): give another"
        ) from error
    return found


def _short(path: str) -> str:
    return path if len(path) <= 120 else f"{path[:60]}... ({len(path)} characters)"


def parse_json(content: str | bytes) -> Any:
    """Returns what JSON tells. Raises: ValueError: it is none, not UTF-8, or nested deeper than Python follows."""
    try:
        return json.loads(content.removeprefix("\ufeff") if isinstance(content, str) else content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def parse_json_text(content: str | bytes) -> Any:
    """Returns what JSON tells of texts, all of which can be written as UTF-8.

    Raises:
      ValueError: as `parse_json`, or an escape in it is half a surrogate pair.
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


def as_path(path: str | os.PathLike) -> AnyPath:
    """Returns a path that is a `pathlib.Path`, or has its methods where it is an address in a store."""
    if not os.fspath(path).startswith(GCS_SCHEME):
        return pathlib.Path(path)
    from seqpe_jax import stores  # as above

    return stores.RemotePath(stores.check_address(os.fspath(path)))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address in a store, where nothing can be appended, renamed or locked."""
    return os.fspath(path).startswith(GCS_SCHEME)


def cache_root(chosen: str | os.PathLike = "") -> pathlib.Path:
    """Returns `chosen`, else $SEQPE_JAX_CACHE, else ~/.cache/seqpe_jax, as an absolute path (not created)."""
    local = "what is prepared, compiled or copied is kept on a disk of this machine (data.cache_dir, SEQPE_JAX_CACHE)"
    path = os.fspath(chosen) or os.environ.get("SEQPE_JAX_CACHE") or "~/.cache/seqpe_jax"
    return pathlib.Path(expand_path(path, local=local)).absolute()


def check_writable(path: str | os.PathLike, folder: bool, option: str) -> None:
    """Refuses a place where nothing can be written, before any work is done.

    Args:
      folder: whether a folder is to be written, else a file; option: what names the place, for the message.

    Raises:
      InputError: a folder stands where a file should, or the reverse, or a device; the place is not writable, or no place.
    """
    target = as_path(path)
    if is_remote(target):
        from seqpe_jax import stores  # as above

        stores.check_writable(target, folder, option)
        return
    try:
        os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, links that go in circles, a folder that is closed
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{option}={path} cannot be written ({reason}): choose another place") from error
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(
            f"{option}={path} is a device, which a file would replace: name a file, or leave the option out"
        )
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
    try:  # permissions alone do not say: /proc and file systems that are read-only or full refuse root as well
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise InputError(
            f"{option}={path} cannot be written: {nearest} does not take new files ({error.strerror}); choose another path"
        ) from error


def check_readable(path: str | os.PathLike, option: str) -> None:
    """Refuses a bucket that is not there, or not for this user; files are told by who reads them. Raises: InputError."""
    if is_remote(path):
        from seqpe_jax import stores  # as above

        stores.check_bucket(as_path(path), option)


def free_space(folder: str | os.PathLike) -> int | None:
    """Returns the free bytes where a folder lies; None where that is not told, as by stores and some file systems."""
    if is_remote(folder):
        return None
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def apply_umask(path: str | os.PathLike) -> None:
    """Gives a file or folder the mode that the user's umask asks for, where a library made it for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)


def lock_file(file: Any, wait: bool = False) -> bool | None:
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
def atomic_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a file that takes the place of `path` when the block ends well, so that nobody ever sees half of it.

    Its folder is made where there is none. Several may write at once, and the last one to end stays: the file's name holds
    the process's number, or it lies in a folder of its own, from which it is put into a store.
    """
    target = as_path(path)
    if is_remote(target):
        with tmp_dir() as folder:
            part = folder / (target.name or "part")
            yield part
            target.upload(part)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file whole or not at all, text as UTF-8; one that holds the content already is left alone."""
    data = (
        content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    )  # names may be any bytes
    target = as_path(path)
    if is_remote(target):
        target.write_bytes(data)
        return
    if target.is_file() and target.read_bytes() == data:
        return
    with atomic_file(target) as part:
        part.write_bytes(data)


def require_empty(folder: str | os.PathLike, option: str = "--output") -> None:
    """Refuses to write over anything. Raises: InputError: something is there that is not an empty folder."""
    path = as_path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{option}={folder} is there already and not an empty folder: choose another, or remove it")


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike, option: str = "--output") -> Iterator[pathlib.Path]:
    """Yields an empty folder that takes the name `path` when the block ends well, and vanishes otherwise.

    In a store its files come one by one, those in deeper folders first and config.json, by which a folder is known, last.

    Args:
      option: what names the place, for messages.

    Raises:
      InputError: the folder cannot be written, or the name is taken.
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
        apply_umask(folder)  # mkdtemp's folders are for their owner alone
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def tmp_dir() -> Iterator[pathlib.Path]:
    """Yields an empty folder on this machine's disk, which goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix="seqpe_jax_", ignore_cleanup_errors=True) as folder:
        yield pathlib.Path(folder)


@contextlib.contextmanager
def staged_dir(folder: AnyPath) -> Iterator[pathlib.Path]:
    """Yields the folder for who writes to a file system alone; what is written is put into a store when the block ends."""
    if not is_remote(folder):
        yield folder
        return
    with tmp_dir() as here:
        yield here
        upload_dir(here, folder)


def list_files(folder: AnyPath) -> list[AnyPath]:
    """Returns all files of a folder and of those in it, sorted."""
    return folder.files() if is_remote(folder) else sorted(path for path in folder.rglob("*") if path.is_file())


def upload_dir(folder: pathlib.Path, target: "RemotePath") -> None:
    """Puts all files of a folder into a store; what was put goes again where one of them cannot be."""
    write_bytes: list[Any] = []
    try:
        for file in sorted(list_files(folder), key=lambda file: (file.name == "config.json", -len(file.parts), file)):
            write_bytes.append(target / file.relative_to(folder))
            write_bytes[-1].upload(file)
    except BaseException:
        for one in write_bytes:
            with contextlib.suppress(OSError):
                one.unlink(missing_ok=True)
        raise


def move_dir(folder: AnyPath, target: AnyPath, first: tuple[str, ...] = ()) -> None:
    """Gives a folder another name. In a store its files are copied, then removed: at no time is one of them nowhere.

    Args:
      first: files that are removed first, for without them nobody takes the folder for a whole one.
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
    """Removes a folder and all in it, as far as that can be done."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        for file in list_files(folder):
            file.unlink(missing_ok=True)


def file_version(file: AnyPath) -> int:
    """Returns a number that changes when a file is written. Raises: FileNotFoundError."""
    return int(file.info()["generation"]) if is_remote(file) else file.stat().st_mtime_ns


def file_versions(folder: AnyPath) -> tuple[tuple[str, int, int], ...]:
    """Returns (name in the folder, bytes, stamp) of all files below a folder, which differs once one of them is written."""
    if is_remote(folder):
        return folder.file_versions()
    found = []
    for path in list_files(folder):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found.append((str(path.relative_to(folder)), path.stat().st_size, file_version(path)))
    return tuple(found)
