"""WikiText-103 (Merity et al., arXiv 1609.07843), raw release: read from where you put it, else downloaded."""

import contextlib
import http.client
import pathlib
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds
import tqdm  # TFDS brings it

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
RELEASE_SUFFIXES = (".raw", ".tokens", ".txt", ".parquet", ".zip")  # of two forms in one directory the first is read
WIKITEXT_USAGE = (
    "put wikitext-103-raw-v1.zip, its wiki.*.raw files or the parquet files of Salesforce/wikitext anywhere and set "
    "data.paths to that file or directory"
)
# An article opens with " = Title = " on a line of its own; sections have more equals signs.
_TITLE = re.compile(rb" = [^=\s](?:.*[^=\s])? = \r?\n?")


class Wikitext103(TextBuilder):
    """Wikipedia articles as they stand in the raw release, the release's own splits; one document is one article.

    All documents of a split joined give the release's text, byte for byte.

    Args:
      paths: the release as a zip, as `wiki.*.raw` (or *.txt) files, as parquet files, or a directory of one of these;
        none = downloaded, 310 MB.
    """

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        if not paths:
            return [RELEASE]
        return [file_signature(file, file.name) for file in _find(paths)]

    @classmethod
    def skipped(cls, paths: tuple[str, ...]) -> str:
        places = [pathlib.Path(path).expanduser().absolute() for path in paths]
        return "; ".join(filter(None, (str(_below(place).skipped) for place in places if place.is_dir())))

    def documents(self) -> Mapping[str, Documents]:
        files = _find(self.paths) if self.paths else download(self.downloads, progress=self._progress)
        lines: dict[str, list] = {split: [] for split in SPLITS}
        for file in files:
            for split, member in _members(file):
                lines[split].append((file, member))
        if not any(lines.values()):
            raise InputError(f"no WikiText split in {', '.join(map(str, files))}: names must say train, valid or test")
        return {split: _articles(split, _lines(places)) for split, places in lines.items() if places}


def download(folder: pathlib.Path, *, progress: bool = True) -> list[pathlib.Path]:
    """Returns the files of the release in `folder`, fetching those that are not there yet (each written whole).

    Raises:
      InputError: a file cannot be fetched; says where to put one by hand.
    """
    folder = folder / "wikitext-103-raw-v1"
    files = []
    for name in RELEASE_FILES:
        target = folder / name
        with locked(target):
            if not target.exists():
                _fetch(RELEASE + name, target, progress)
        files.append(target)
    return files


def _fetch(address: str, target: pathlib.Path, progress: bool) -> None:
    try:
        with atomic_file(target) as part:
            _download(address, part, target.name, progress)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"cannot download WikiText-103 from {address} ({reason}): {WIKITEXT_USAGE}") from error


def _download(address: str, path: pathlib.Path, name: str, progress: bool) -> None:
    """Fetches a file. Raises: OSError: fewer bytes came than there are."""
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, open(path, "wb") as out:
        expected, done = answer.headers.get("Content-Length"), 0
        size = int(expected) if expected else None
        with tqdm.tqdm(total=size, desc=f"download {name}", unit="B", unit_scale=True, disable=not progress) as bar:
            while block := answer.read(1 << 20):
                out.write(block)
                done += len(block)
                bar.update(len(block))
    if size is not None and done != size:
        raise OSError(f"{done} of {size} bytes came")


def _find(paths: tuple[str, ...]) -> list[pathlib.Path]:
    files: list[pathlib.Path] = []
    for path in paths:
        place = pathlib.Path(path).expanduser().absolute()
        if not place.exists():
            raise InputError(f"data.paths: '{path}' does not exist; {WIKITEXT_USAGE}")
        if place.is_file():
            files.append(place)
            continue
        root = absolute_path(str(place))  # as names are found; those of the caller count
        below = sorted(place / pathlib.Path(file).relative_to(root) for file in _below(place).files)
        below = [file for file in below if file.suffix in RELEASE_SUFFIXES]
        below = [file for file in below if "103-raw" in str(file.relative_to(place))] or below
        below = [file for file in below if file.suffix == ".zip" or _split(file.name)]
        if not below:
            raise InputError(f"data.paths: '{path}' holds no WikiText-103; {WIKITEXT_USAGE}")
        form = min((file.suffix for file in below), key=RELEASE_SUFFIXES.index)
        files += [file for file in below if file.suffix == form]
    return files


def _below(place: pathlib.Path) -> ResolvedPaths:
    return resolve_paths([str(place)], suffixes=RELEASE_SUFFIXES)


def _split(name: str) -> str | None:
    name = name.lower()
    for split, word in zip(SPLITS, ("train", "valid", "test"), strict=True):
        if word in name:
            return split
    return None


def _members(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields (split, member of the zip, or "") of a file."""
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
    with _opened_zip(file) as archive:
        for member in sorted(archive.namelist()):
            split = _split(pathlib.PurePosixPath(member).name)
            if split and member.endswith((".raw", ".tokens", ".txt")) and not member.startswith("__MACOSX"):
                yield split, member


@contextlib.contextmanager
def _opened_zip(file: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"'{file}' is not a whole zip file ({error}); {WIKITEXT_USAGE}") from error


def _lines(places: Iterable[tuple[pathlib.Path, str]]) -> Iterator[tuple[str, int, bytes]]:
    """Yields (file, byte offset, line with its newline) over the files of a split."""
    for file, member in places:
        if file.suffix == ".parquet":
            rows, name = _rows(file), str(file)
        elif member:
            rows, name = _unzipped(file, member), f"{file}:{member}"
        else:
            rows, name = _plain(file), str(file)
        offset = 0
        for line in rows:
            yield name, offset, line if offset else strip_bom(line)
            offset += len(line)


def _plain(file: pathlib.Path) -> Iterator[bytes]:
    with open(file, "rb") as lines:
        yield from lines


def _unzipped(file: pathlib.Path, member: str) -> Iterator[bytes]:
    with _opened_zip(file) as archive, archive.open(member) as lines:
        yield from lines


def _rows(file: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a parquet file, whose blank rows stand for the release's blank lines (" " and newline)."""
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
    number, body, name = 0, bytearray(), ""
    place, blank = ("", 0), True
    for file, offset, line in lines:
        if blank and _TITLE.fullmatch(line):
            if body.strip():  # the release starts with a blank line, which is no article
                yield name, check_utf8(bytes(body), *place)
                body.clear()
                number += 1
            title = line.strip(b" =\r\n").decode("utf-8", "replace")
            name = f"{split}/{number:05d} {title}"
        if not body:
            place, name = (file, offset), name or f"{split}/{number:05d}"
        body += line
        blank = not line.strip()
    if body:
        yield name, check_utf8(bytes(body), *place)
