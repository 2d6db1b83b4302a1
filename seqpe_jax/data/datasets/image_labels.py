"""Image files whose classes a CSV file names: a row for each image, with its file, its class and, if given, its split."""

import csv
import io
import os
import pathlib
from collections.abc import Iterator

from seqpe_jax.data.datasets.base import SPLITS, split_of_name
from seqpe_jax.data.formats import BYTE_ORDER_MARK
from seqpe_jax.errors import InputError

FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_path", "path", "filepath", "image_id", "id")
LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "breed", "species")
SPLIT_COLUMNS = ("split", "set", "subset", "fold")
SUFFIXES = (".csv", ".tsv")
MAX_BYTES = 1 << 30
CSV_FORM = "a header and rows such as file,label: a/1.jpg,cat"


def is_label_file(path: pathlib.Path) -> bool:
    """True for the name of a CSV or TSV file."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def read_labels(path: pathlib.Path, suffixes: tuple[str, ...]) -> tuple[list[tuple[str, str, str | None]], bool]:
    """Reads a file of labels.

    A name may lack its suffix or its folder, as ids of images do: it then stands for the one image of that name below the
    folder of the file.

    Args:
      path: CSV, or TSV.
      suffixes: endings of image files.

    Returns:
      ((file relative to the folder of `path`, class, split or None) in the order of the rows; whether rows name splits).

    Raises:
      InputError: unreadable, no columns of files and classes, a file that is missing, ambiguous or named twice, or a split
        that is unknown.
    """
    reader = _reader(path)
    header = next(reader, [])
    columns: dict[str, int] = {}
    for number, name in enumerate(header):
        columns.setdefault(name.strip().lower(), number)
    file_column = _column(path, columns, FILE_COLUMNS, "the files")
    label_column = _column(path, columns, LABEL_COLUMNS, "the classes")
    split_column = next((columns[name] for name in SPLIT_COLUMNS if name in columns), None)
    names = _Names(path.parent, suffixes)
    found: dict[str, tuple[str, str | None]] = {}
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        where = f"data.paths: line {reader.line_num} of '{path}'"
        if len(row) != len(header):
            raise InputError(f"{where} has {len(row)} cells, and the header {len(header)}: mend it")
        label = row[label_column].strip()
        if not label:
            raise InputError(f"{where} names no class: fill it in, or remove the row")
        file = names.resolve(row[file_column].strip(), where)
        split = None if split_column is None else split_of_name(row[split_column])
        if split_column is not None and split is None:
            raise InputError(f"{where} has the split '{row[split_column]}': expected {', '.join(SPLITS)}")
        if found.setdefault(file, (label, split)) != (label, split):
            raise InputError(f"{where} names '{file}' again, with another class or split: an image has one")
    if not found:
        raise InputError(f"data.paths: '{path}' has no rows: expected {CSV_FORM}")
    return [(file, *labels) for file, labels in found.items()], split_column is not None


def _reader(path: pathlib.Path) -> "csv._reader":
    """Returns a reader of rows. Raises: InputError: unreadable, too large, or no UTF-8 text."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(
                f"data.paths: '{path}' is larger than {MAX_BYTES >> 20} MiB: it cannot be a table of labels"
            )
        text = path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read '{path}' ({error.strerror}): check data.paths") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data.paths: '{path}' is not UTF-8 text (byte offset {error.start}): convert it") from None
    first = text.partition("\n")[0]
    delimiter = max("\t;,", key=first.count) if first else ","
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def _column(path: pathlib.Path, columns: dict[str, int], known: tuple[str, ...], what: str) -> int:
    """Returns the number of the first known column. Raises: InputError: there is none."""
    for name in known:
        if name in columns:
            return columns[name]
    raise InputError(
        f"data.paths: '{path}' has no column of {what}; its header names {', '.join(columns) or 'nothing'}: rename one to "
        f"'{known[0]}' ({CSV_FORM})"
    )


class _Names:
    """The image files below a folder, found by their path, their name, or their name without its suffix."""

    def __init__(self, folder: pathlib.Path, suffixes: tuple[str, ...]):
        self._folder, self._suffixes = folder, suffixes
        self._by_name: dict[str, list[str]] | None = None

    def resolve(self, name: str, where: str) -> str:
        """Returns the path of a file relative to the folder. Raises: InputError: there is none, or several."""
        if name and os.path.isfile(self._folder / name):
            return os.path.normpath(name)
        if self._by_name is None:
            self._by_name = {}
            for file in self._files():
                base = os.path.basename(file)
                for key in {base, os.path.splitext(base)[0], os.path.splitext(file)[0]}:
                    self._by_name.setdefault(key, []).append(file)
        files = self._by_name.get(os.path.normpath(name), []) if name else []
        if len(files) != 1:
            problem = (
                f"which {len(files)} files below '{self._folder}' may be" if files else f"and '{self._folder}' has none"
            )
            raise InputError(f"{where} names the image '{name}', {problem}: give its path from that folder")
        return files[0]

    def _files(self) -> Iterator[str]:
        for parent, folders, names in os.walk(self._folder):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(self._suffixes):
                    yield os.path.relpath(os.path.join(parent, name), self._folder)
