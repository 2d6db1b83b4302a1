"""Buckets of an object store as paths; `files` is the way in, and this what it stands on where a path is gs://BUCKET/NAME.

A store has objects, not files: each is put as a whole, nothing is appended or renamed, a folder is what names share and is
there as long as an object is in it.
"""

import contextlib
import errno
import functools
import importlib.util
import io
import logging
import os
import re
import uuid
from collections.abc import Iterator
from typing import IO, Any, Self

import fsspec
from etils.epath import gpath

from seqpe_jax.errors import InputError, StoreError

# What a store's own library may wait for: an answer that does not come is asked for again, six times in all.
CONNECT_SECONDS, ANSWER_SECONDS = 20.0, 60.0


class RemotePath(gpath.PosixGPath):
    """A place in a bucket, with the methods of `pathlib.Path` that are used of it; its text is the address.

    All that goes wrong is raised as an OSError with its reason in `strerror`: FileNotFoundError, else a `StoreError`.
    """

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return file_system()

    def exists(self) -> bool:
        """Whether an object has this name, or a name below it."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether an object has this name."""
        found = self._info()
        return found is not None and found["type"] == "file"

    def is_dir(self) -> bool:
        """Whether an object has a name below this one."""
        found = self._info()
        return found is not None and found["type"] == "directory"

    def _info(self) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError), _told(self):
            return self._fs.info(str(self))
        return None

    def info(self) -> dict[str, Any]:
        """Returns what the store tells of an object: its size, md5Hash, generation and more. Raises: FileNotFoundError."""
        with _told(self):
            return self._fs.info(str(self))

    def iterdir(self) -> Iterator[Self]:
        """Yields what is in a folder. Raises: FileNotFoundError."""
        with _told(self):
            names = self._fs.ls(str(self), detail=False)
        yield from (
            self / name for name in sorted({name.rstrip("/").rpartition("/")[2] for name in names} - {self.name})
        )

    def files(self) -> list[Self]:
        """Returns all objects below a folder, sorted; none where there are none."""
        with _told(self):
            return [type(self)(f"gs://{name}") for name in sorted(self._fs.find(str(self)))]

    def file_versions(self) -> tuple[tuple[str, int, int], ...]:
        """Returns (name in the folder, bytes, generation) of all objects below a folder, sorted."""
        with _told(self):
            found = self._fs.find(str(self), detail=True).items()
        above = len(str(self)) - len("gs://") + 1
        return tuple(sorted((name[above:], int(told["size"]), int(told["generation"])) for name, told in found))

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yields what is in a folder under names of a pattern of one part."""
        with contextlib.suppress(FileNotFoundError):
            yield from (path for path in self.iterdir() if path.match(pattern))

    def read_bytes(self) -> bytes:
        """Returns an object's content. Raises: FileNotFoundError."""
        with _told(self):
            return self._fs.cat_file(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Returns an object's content as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def open(self, mode: str = "r", **_: Any) -> IO[Any]:
        """Opens an object to be read. What is written is written whole, through `files`. Raises: ValueError."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: objects are written whole, by files.whole, and not opened with mode '{mode}'")
        content = io.BytesIO(self.read_bytes())
        return content if mode == "rb" else io.TextIOWrapper(content, encoding="utf-8")

    def write_bytes(self, content: bytes, new: bool = False) -> None:
        """Writes an object whole. Raises: FileExistsError: it must be `new`, and is not."""
        with _told(self):
            self._fs.pipe_file(str(self), content, mode="create" if new else "overwrite")

    def upload(self, file: str | os.PathLike) -> None:
        """Writes an object whole, from a file."""
        with _told(self):
            self._fs.put_file(os.fspath(file), str(self))

    def download(self, file: str | os.PathLike) -> None:
        """Writes an object's content into a file."""
        with _told(self):
            self._fs.get_file(str(self), os.fspath(file))

    def copy_to(self, target: Self) -> None:
        """Copies an object within the store."""
        with _told(self):
            self._fs.cp_file(str(self), str(target))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes an object."""
        try:
            with _told(self):
                self._fs.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Does nothing: a folder is there with its first object."""

    def absolute(self) -> Self:
        """Returns the path itself: an address is always whole."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """Returns the path itself: there are no links."""
        return self

    def expanduser(self) -> Self:
        """Returns the path itself: there are no homes."""
        return self


def file_system() -> fsspec.AbstractFileSystem:
    """Returns the library's view of Google Cloud Storage, made once; Orbax and TensorStore have views of their own."""
    return fsspec.filesystem("gcs", finalize_on_close=True)  # as Orbax asks for it, so that there is one


@functools.cache
def _set_up() -> None:
    """Says how the library is to work, to all who use it in this process."""
    import aiohttp  # comes with gcsfs

    # Errors are told to its logger and raised; they are told once, by who catches them.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)
    limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
    # No listing is remembered: other processes write there, and so do libraries in this one.
    fsspec.config.conf.setdefault("gcs", {"use_listings_cache": False, "requests_timeout": limits})


def check_address(address: str) -> str:
    """Returns the address of a place in a bucket, without what it could do without.

    Raises:
      InputError: it names no bucket, or the library that speaks to the store is not installed.
    """
    found = re.fullmatch(r"gs://+([^/]+)(/.*)?", address)
    if not found or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", found[1]):
        raise InputError(
            f"{address} names no bucket: expected gs://BUCKET/NAME, with small letters in the bucket's name"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{address} is in Google Cloud Storage, for which a library is missing: pip install gcsfs")
    _set_up()
    parts = [part for part in (found[2] or "").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InputError(f"{address}: a bucket has no folder above another ('..'): write the place out")
    return "/".join(["gs:/", found[1], *parts])


def check_bucket(path: RemotePath, option: str) -> None:
    """Refuses a bucket that is not there, or not for this user. Raises: InputError."""
    bucket = path.parts[2]
    try:
        with _told(path):
            path._fs.call("GET", "b/{}/o", bucket, maxResults=1)
    except FileNotFoundError as error:
        raise InputError(f"{option}={path}: there is no bucket '{bucket}'; make it, or name another") from error
    except StoreError as error:
        raise InputError(f"{option}={path} cannot be read: {error.strerror}") from error


def check_writable(path: RemotePath, folder: bool, option: str) -> None:
    """Refuses a place where nothing can be written, by writing an object there and removing it. Raises: InputError."""
    check_bucket(path, option)
    if len(path.parts) < 4:
        raise InputError(f"{option}={path} is a whole bucket: name a folder in it")
    try:
        if folder and path.is_file():
            raise InputError(f"{option}={path} is a file: name a folder")
        if not folder and path.is_dir():
            raise InputError(f"{option}={path} is a folder: name a file")
        for above in list(path.parents)[:-3]:
            if above.is_file():
                raise InputError(f"{option}={path} cannot be written: {above} is a file, not a folder")
        trial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.trial")
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        raise InputError(f"{option}={path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _told(path: RemotePath) -> Iterator[None]:
    """Raises what a store's library raises, of many kinds, as an OSError that says what is wrong in `strerror`."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        refused = getattr(error, "code", None) in (401, 403) or words.startswith("Forbidden")
        if refused or type(error).__module__.startswith("google.auth"):
            words = (
                f"no leave to use it ({words[:200]}): log in (gcloud auth application-default login) or ask its owner"
            )
        else:
            words = f"the store gave no good answer ({type(error).__name__}: {words[:200]}), also when asked again"
        raise StoreError(errno.EACCES if refused else errno.EIO, words, str(path)) from error
