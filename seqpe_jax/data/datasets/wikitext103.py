"""WikiText-103 (Merity et al., arXiv 1609.07843), raw release: read from `data.paths`, else downloaded."""

import contextlib
import http.client
import pathlib
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data.cache import locked
from seqpe_jax.data.datasets.base import SPLITS, file_signature
from seqpe_jax.data.datasets.text_base import Documents, TextBuilder, check_utf8
from seqpe_jax.data.formats import check_text_file, strip_bom
from seqpe_jax.data.paths import ResolvedPaths, absolute_path, resolve_paths
from seqpe_jax.errors import InputError
from seqpe_jax.files import atomic_file

RELEASE = "https://huggingface.co/datasets/Salesforce/wikitext/resolve/main/wikitext-103-raw-v1/"
RELEASE_FILES = (
    "train-00000-of-00002.parquet",
    "train-00001-of-00002.parquet",
    "validation-00000-of-00001.parquet",
    "test-00000-of-00001.parquet",
)
TIMEOUT = 30.0  # seconds without a byte
RELEASE_SUFFIXES = (".raw", ".tokens", ".txt", ".parquet", ".zip")  # of several in one folder, the first is read
WIKITEXT_USAGE = (
    "put wikitext-103-raw-v1.zip, its wiki.*.raw files or the parquet files of Salesforce/wikitext anywhere and set "
    "data.paths to that file or directory"
)
# An article starts with " = Title = " on a line of its own; sections have more equals signs.
_TITLE = re.compile(rb" = [^=\s](?:.*[^=\s])? = \r?\n?")


class Wikitext103(TextBuilder):
    """Wikipedia articles of the raw release in its own splits; one document is one article.

    All documents of a split joined are the text of the release, byte for byte.

    Args:
      paths: the release as a zip, as `wiki.*.raw` (or *.txt) files, as parquet files, or a folder of one of these;
        () = downloaded, 310 MB.
    """

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        if not paths:
            return [RELEASE]
        return [file_signature(file, file.name) for file in _release_files(paths)]

    @classmethod
    def input_bytes(cls, paths: tuple[str, ...]) -> int:
        return sum(file.stat().st_size for file in _release_files(paths)) if paths else 0

    @classmethod
    def skipped(cls, paths: tuple[str, ...]) -> str:
        roots = [pathlib.Path(path).expanduser().absolute() for path in paths]
        return "; ".join(filter(None, (str(_resolve(root).skipped) for root in roots if root.is_dir())))

    def documents(self) -> Mapping[str, Documents]:
        files = _release_files(self.paths) if self.paths else download(self.downloads, progress=self._progress)
        members: dict[str, list] = {split: [] for split in SPLITS}
        for file in files:
            for split, member in _members(file):
                members[split].append((file, member))
        if not any(members.values()):
            raise InputError(f"no WikiText split in {', '.join(map(str, files))}: names must say train, valid or test")
        return {split: _articles(split, _lines(found)) for split, found in members.items() if found}


def download(folder: pathlib.Path, *, progress: bool = True) -> list[pathlib.Path]:
    """Returns the files of the release in `folder`, after downloading the missing ones (each appears complete).

    Raises:
      InputError: the download fails; says where to put a file by hand.
    """
    folder = folder / "wikitext-103-raw-v1"
    files = []
    for name in RELEASE_FILES:
        target = folder / name
        with locked(target):
            if not target.exists():
                _download_file(RELEASE + name, target, progress)
        files.append(target)
    return files


def _download_file(address: str, target: pathlib.Path, progress: bool) -> None:
    try:
        with atomic_file(target) as part:
            _copy_response(address, part, target.name, progress)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"cannot download WikiText-103 from {address} ({reason}): {WIKITEXT_USAGE}") from error


def _copy_response(address: str, path: pathlib.Path, name: str, progress: bool) -> None:
    """Writes the response of an address into a file. Raises: OSError: the response ends too early."""
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response, open(path, "wb") as out:
        length, received = response.headers.get("Content-Length"), 0
        size = int(length) if length else None
        with tqdm.tqdm(total=size, desc=f"download {name}", unit="B", unit_scale=True, disable=not progress) as bar:
            while block := response.read(1 << 20):
                out.write(block)
                received += len(block)
                bar.update(len(block))
    if size is not None and received != size:
        raise OSError(f"{received} of {size} bytes received")


def _release_files(paths: tuple[str, ...]) -> list[pathlib.Path]:
    """Returns the files that paths name, and of each folder those of the release. Raises: InputError: there is none."""
    files: list[pathlib.Path] = []
    for path in paths:
        root = pathlib.Path(path).expanduser().absolute()
        if not root.exists():
            raise InputError(f"data.paths: '{path}' does not exist; {WIKITEXT_USAGE}")
        if root.is_file():
            files.append(root)
            continue
        real_root = absolute_path(str(root))  # prefix of the files found; the cache key has the name that was given
        found = sorted(root / pathlib.Path(file).relative_to(real_root) for file in _resolve(root).files)
        found = [file for file in found if file.suffix in RELEASE_SUFFIXES]
        found = [file for file in found if "103-raw" in str(file.relative_to(root))] or found
        found = [file for file in found if file.suffix == ".zip" or _split(file.name)]
        if not found:
            raise InputError(f"data.paths: '{path}' holds no WikiText-103; {WIKITEXT_USAGE}")
        suffix = min((file.suffix for file in found), key=RELEASE_SUFFIXES.index)
        files += [file for file in found if file.suffix == suffix]
    return files


def _resolve(root: pathlib.Path) -> ResolvedPaths:
    return resolve_paths([str(root)], suffixes=RELEASE_SUFFIXES)


def _split(name: str) -> str | None:
    """Returns the split that a file's name says."""
    name = name.lower()
    for split, word in zip(SPLITS, ("train", "valid", "test"), strict=True):
        if word in name:
            return split
    return None


def _members(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields (split, member of the zip archive, or "") of a file."""
    if file.suffix != ".zip":
        split = _split(file.name)
        if split is None:
            raise InputError(
                f"data.paths: '{file}' is of no split: its name must say train, valid or test; {WIKITEXT_USAGE}"
            )
        if file.suffix != ".parquet":
            check_text_file(file)
        yield split, ""
        return
    with _open_zip(file) as archive:
        for member in sorted(archive.namelist()):
            split = _split(pathlib.PurePosixPath(member).name)
            if split and member.endswith((".raw", ".tokens", ".txt")) and not member.startswith("__MACOSX"):
                yield split, member


@contextlib.contextmanager
def _open_zip(file: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"'{file}' is not a complete zip file ({error}); {WIKITEXT_USAGE}") from error


def _lines(members: Iterable[tuple[pathlib.Path, str]]) -> Iterator[tuple[str, int, bytes]]:
    """Yields (file, byte offset, line with its newline) over the files of a split."""
    for file, member in members:
        if file.suffix == ".parquet":
            lines, name = _parquet_lines(file), str(file)
        elif member:
            lines, name = _zip_lines(file, member), f"{file}:{member}"
        else:
            lines, name = _file_lines(file), str(file)
        offset = 0
        for line in lines:
            yield name, offset, line if offset else strip_bom(line)
            offset += len(line)


def _file_lines(file: pathlib.Path) -> Iterator[bytes]:
    with open(file, "rb") as lines:
        yield from lines


def _zip_lines(file: pathlib.Path, member: str) -> Iterator[bytes]:
    with _open_zip(file) as archive, archive.open(member) as lines:
        yield from lines


def _parquet_lines(file: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a parquet file; its blank rows are the blank lines (" " and newline) of the release."""
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                line = (text or "").encode()
                yield b" \n" if not line.strip() else line if line.endswith(b"\n") else line + b"\n"
    except (pyarrow.ArrowException, OSError, IndexError) as error:
        raise InputError(f"'{file}' is not a parquet file with a column 'text' ({error}); {WIKITEXT_USAGE}") from error


def _articles(split: str, lines: Iterator[tuple[str, int, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, text) of each article of a split."""
    number, body, name = 0, bytearray(), ""
    start, after_blank = ("", 0), True
    for file, offset, line in lines:
        if after_blank and _TITLE.fullmatch(line):
            if body.strip():  # the release starts with a blank line, which is no article
                yield name, check_utf8(bytes(body), *start)
                body.clear()
                number += 1
            title = line.strip(b" =\r\n").decode("utf-8", "replace")
            name = f"{split}/{number:05d} {title}"
        if not body:
            start, name = (file, offset), name or f"{split}/{number:05d}"
        body += line
        after_blank = not line.strip()
    if body:
        yield name, check_utf8(bytes(body), *start)
