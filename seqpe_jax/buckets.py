"""Paths in object stores, gs://BUCKET/NAME or s3://BUCKET/NAME, with the methods of `pathlib.Path`; `files` serves these and local paths.

A bucket has objects, no files: each is written at once, nothing is appended, renamed or locked, and a folder exists as long
as an object's name begins with it. etils' `epath.Path`, the base class, lacks what is defined here: errors as one line, the
version of an object, creation only if it does not exist, and listings of all objects of a folder.
"""

import contextlib
import errno
import functools
import importlib.util
import io
import os
import re
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, Self

import fsspec
from etils.epath import gpath

from seqpe_jax.errors import InputError, Outage, StoreError
from seqpe_jax.stores import STORES, Store


def _converts_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a method so that errors of the library become an OSError with the reason in `strerror`."""

    @functools.wraps(method)
    def converted(self: "RemotePath", *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except Exception as error:
            raise _as_os_error(error, self) from error

    return converted


class RemotePath(gpath.PosixGPath):
    """A path in a bucket; `str` gives its address. Methods raise FileNotFoundError or `StoreError`."""

    @property
    def store(self) -> Store:
        """The store that the bucket is in."""
        return STORES[f"{self.parts[1]}://"]

    @property
    def bucket(self) -> str:
        """The name of the bucket."""
        return self.parts[2]

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return self.store.file_system()

    @_converts_errors
    def info(self) -> dict[str, Any]:
        """Returns the metadata of an object: type, size and what the store adds."""
        return self._fs.info(str(self))

    def _type(self) -> str:
        """The type of a path: "file", "directory", or "" if there is nothing."""
        try:
            return self.info()["type"]
        except FileNotFoundError:
            return ""

    def exists(self) -> bool:
        """Returns whether there is an object or a folder of this name."""
        return bool(self._type())

    def is_file(self) -> bool:
        """Returns whether there is an object of this name."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Returns whether there is an object in a folder of this name."""
        return self._type() == "directory"

    @_converts_errors
    def iterdir(self) -> Iterator[Self]:
        """Returns the objects and folders of a folder, sorted."""
        names = {name.rstrip("/").rpartition("/")[2] for name in self._fs.ls(str(self), detail=False)}
        return (self / name for name in sorted(names - {self.name}))

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yields the entries of a folder that match a pattern of one part."""
        with contextlib.suppress(FileNotFoundError):
            yield from (path for path in self.iterdir() if path.match(pattern))

    @_converts_errors
    def list_files(self) -> list[Self]:
        """Returns all objects of a folder and its subfolders, sorted."""
        return [type(self)(self.store.scheme + name) for name in sorted(self._fs.find(str(self)))]

    @_converts_errors
    def file_versions(self) -> tuple[tuple[str, int, Any], ...]:
        """Returns (name in the folder, bytes, version) of all objects of a folder and its subfolders, sorted."""
        start = len(str(self)) - len(self.store.scheme) + 1
        objects = self._fs.find(str(self), detail=True).items()
        return tuple(sorted((name[start:], int(info["size"]), self.store.version(info)) for name, info in objects))

    @_converts_errors
    def md5(self) -> str:
        """Returns the MD5 of an object in base64, as the store holds it; "" if it holds none."""
        return self.store.md5(str(self))

    @_converts_errors
    def read_bytes(self) -> bytes:
        """Returns the content of an object."""
        return self._fs.cat_file(str(self))

    @_converts_errors
    def read_range(self, start: int, stop: int) -> bytes:
        """Returns the bytes of an object from `start` up to `stop`."""
        return self._fs.cat_file(str(self), start=start, end=stop)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Returns the content of an object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", **_: Any) -> IO[Any]:
        """Returns the content of an object as a file to read. Raises: ValueError: objects are not written in parts."""
        if mode not in ("r", "rb"):
            raise ValueError(
                f"{self}: objects are written at once, by files.atomic_file, not opened with mode '{mode}'"
            )
        content = io.BytesIO(self.read_bytes())
        return content if mode == "rb" else io.TextIOWrapper(content, encoding="utf-8")

    @_converts_errors
    def write_bytes(self, content: bytes, new: bool = False) -> None:
        """Writes an object; if `new`, only one that does not exist. Raises: FileExistsError."""
        self._fs.pipe_file(str(self), content, mode="create" if new else "overwrite")

    @_converts_errors
    def upload(self, file: str | os.PathLike) -> None:
        """Writes a local file's content to an object."""
        self.store.upload(os.fspath(file), str(self))

    @_converts_errors
    def download(self, file: str | os.PathLike) -> None:
        """Writes an object's content to a local file."""
        self._fs.get_file(str(self), os.fspath(file))

    @_converts_errors
    def copy_to(self, target: Self) -> None:
        """Copies an object within the bucket."""
        self._fs.cp_file(str(self), str(target))

    @_converts_errors
    def _remove(self) -> None:
        self._fs.rm_file(str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object."""
        try:
            self._remove()
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Does nothing: a folder exists with its first object."""

    def absolute(self) -> Self:
        """Returns the path itself."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Returns the path itself: there are no links."""
        return self

    def expanduser(self) -> Self:
        """Returns the path itself: there are no home folders."""
        return self


def check_address(address: str) -> str:
    """Returns a normalized address in a bucket.

    Raises:
      InputError: it names no bucket, or the library for its store is not installed.
    """
    scheme = next(scheme for scheme in STORES if address.startswith(scheme))
    store = STORES[scheme]
    match = re.fullmatch(r"/*([^/]+)(/.*)?", address.removeprefix(scheme))
    if not match or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", match[1]):
        raise InputError(
            f"{address} names no bucket: expected {scheme}BUCKET/NAME, with small letters in the bucket's name"
        )
    if importlib.util.find_spec(store.library) is None:
        raise InputError(f"{address} is in {store.title}, for which a library is missing: pip install {store.library}")
    store.configure()
    parts = [part for part in (match[2] or "").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InputError(f"{address}: a bucket has no parent folder ('..'): write the path out")
    return "/".join([scheme.removesuffix("/"), match[1], *parts])


def check_bucket(path: RemotePath, option: str) -> None:
    """Refuses a path in a bucket that does not exist or that this user cannot read.

    Raises:
      InputError: names the reason.
      Outage: the store does not answer.
    """
    try:
        path.store.require_bucket(path.bucket)
    except Exception as error:
        reason = _as_os_error(error, path)
        if isinstance(reason, FileNotFoundError):
            raise InputError(
                f"{option}={path}: there is no bucket '{path.bucket}'; make it, or name another"
            ) from error
        raise _refusal(f"{option}={path} cannot be read: {reason.strerror}", reason) from error


def check_writable(path: RemotePath, folder: bool, option: str) -> None:
    """Refuses a path that cannot be written, by writing an object next to it and removing it again.

    Args:
      path: path of the new object.
      folder: a folder is to be written, not a file.
      option: the option that names the path, for messages.

    Raises:
      InputError: names the reason.
      Outage: the store does not answer.
    """
    check_bucket(path, option)
    if len(path.parts) < 4:
        raise InputError(f"{option}={path} is a whole bucket: name a folder in it")
    try:
        if folder and path.is_file():
            raise InputError(f"{option}={path} is a file: name a folder")
        if not folder and path.is_dir():
            raise InputError(f"{option}={path} is a folder: name a file")
        for parent in list(path.parents)[:-3]:
            if parent.is_file():
                raise InputError(f"{option}={path} cannot be written: {parent} is a file, not a folder")
        probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.probe")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _refusal(f"{option}={path} cannot be written: {error.strerror}", error) from error


def _refusal(message: str, error: OSError) -> InputError | Outage:
    """Returns the error of a path: bad input, or, where the store does not answer, an outage."""
    return Outage(message) if error.errno == errno.ETIMEDOUT else InputError(message)


def _is_outage(error: BaseException | None) -> bool:
    """Returns whether the store itself failed, by the HTTP status of its answer, or did not answer in time."""
    while error is not None:
        answer = getattr(error, "response", None)
        answer = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}
        status = getattr(error, "status", None) or getattr(error, "code", None) or answer.get("HTTPStatusCode")
        if isinstance(status, int):
            return status >= 500 or status in (408, 429)
        if isinstance(error, TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _as_os_error(error: Exception, path: RemotePath) -> OSError:
    """The same error as an OSError that names the path and, in `strerror`, the reason."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.store.exists_already(error):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    message = " ".join(str(error).split()) or type(error).__name__
    denied = path.store.is_denied(error)
    if denied:
        reason = f"access denied ({message[:200]}): {path.store.access}"
    else:
        reason = f"the request failed ({type(error).__name__}: {message[:200]}), also when repeated"
    failure = errno.ETIMEDOUT if _is_outage(error) else errno.EIO
    return StoreError(errno.EACCES if denied else failure, reason, str(path))
