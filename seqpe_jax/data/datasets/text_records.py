"""Text files by content: plain text, JSON lines, Parquet, Arrow and ArrayRecord, also compressed; all are streamed."""

import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import lzma
import os
import pathlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module

from seqpe_jax.data.datasets.text_base import character_start, check_utf8, stream_parts
from seqpe_jax.data.formats import (
    BYTE_ORDER_MARK,
    HEAD_BYTES,
    JSON_HEAD_BYTES,
    check_no_table,
    check_plain_text,
    first_json_record,
    is_json_lines,
)
from seqpe_jax.errors import InputError
from seqpe_jax.files import parse_json

Kind = Literal["text", "json", "parquet", "arrow", "arrow stream", "array_record"]
RECORD_KINDS: tuple[Kind, ...] = ("json", "parquet", "arrow", "arrow stream", "array_record")
READ_BYTES = 1 << 20
ROWS_PER_READ = 1024
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
HELD_OUT = 0.05  # share of validation, and of test, where a user's files have no splits
MIN_FILES_TO_SPLIT_BY_FILE = 20
WHOLE = (0.0, 1.0)
SHARES = {"train": (0.0, 1 - 2 * HELD_OUT), "validation": (1 - 2 * HELD_OUT, 1 - HELD_OUT), "test": (1 - HELD_OUT, 1.0)}
MAX_BAD_SHARE = 0.01  # of records without text
MAX_PART_BYTES = 1 << 28  # of plain text between two ends of documents, which is held in memory
EARLY_RECORDS = 1000  # after which a source of which most have no text is refused

_OPENERS: dict[bytes, Callable[[str], BinaryIO]] = {
    b"\x1f\x8b": lambda file: gzip.open(file, "rb"),
    b"\x28\xb5\x2f\xfd": lambda file: io.BufferedReader(
        pyarrow.CompressedInputStream(pyarrow.OSFile(file), "zstd"), READ_BYTES
    ),
    b"\xfd7zXZ\0": lambda file: lzma.open(file, "rb"),
    b"BZh": lambda file: bz2.open(file, "rb"),
}
_RECORD_MAGIC: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1\0\0": "arrow",
    b"\xff\xff\xff\xff": "arrow stream",
    b"\x83\xafp\xd1\r\x88J?": "array_record",
}
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pyarrow.ArrowInvalid, OSError)


class BadRecords:
    """Counts records without text, by reason, and refuses a source that has too many of them."""

    def __init__(self) -> None:
        self.seen, self._reasons, self._first = 0, Counter[str](), dict[str, str]()

    def add(self, where: str, reason: str) -> None:
        """Counts one; where: file and number of the record."""
        self._reasons[reason] += 1
        self._first.setdefault(reason, where)
        if self.seen >= EARLY_RECORDS and self._reasons.total() > self.seen / 2:
            self.check()

    def check(self) -> None:
        """Raises InputError where more than `MAX_BAD_SHARE` of all records have no text."""
        bad = self._reasons.total()
        if bad > MAX_BAD_SHARE * self.seen:
            raise InputError(
                f"data.paths: {bad:,} of {self.seen:,} records have no text ({self}); at most {MAX_BAD_SHARE:.0%} may: name "
                "the field that holds it with data.text_key (a.b = field b of field a), or mend the files"
            )

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {count:,}, first in {self._first[reason]}" for reason, count in self._reasons.most_common()
        )


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of a corpus.

    Attributes:
      path: path of the file.
      name: its name in messages and of its documents.
      kind: format of its content, after decompression.
      split_on: string after which a document of plain text ends; b"" = the text is one document.
    """

    path: pathlib.Path
    name: str
    kind: Kind
    split_on: bytes = b""

    @property
    def has_records(self) -> bool:
        """True where each record or part of the text is a document, False for plain text, which is one."""
        return self.kind in RECORD_KINDS or bool(self.split_on)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Yields a stream of the decompressed content. Raises: InputError: the file is damaged or unreadable."""
        with _naming(self.path), _stream(self.path) as stream:
            yield stream

    def num_bytes(self) -> int:
        """Returns the size of the decompressed content, without a byte order mark."""
        if _opener(self.path) is None:
            return self.path.stat().st_size - self._start
        with self.open() as stream:
            return sum(len(block) for block in iter(lambda: stream.read(READ_BYTES), b"")) - self._start

    def text(self, first: int = 0, last: int | None = None) -> Iterator[bytes]:
        """Yields UTF-8 text in parts, as `split_document` makes them.

        Args:
          first: byte offset of the first character, after a byte order mark.
          last: byte offset after the last one; None = the end.

        Raises:
          InputError: it is not UTF-8, or the file is damaged.
        """
        with self.open() as stream:
            _skip(stream, self._start + first)
            offset = self._start + first
            for part in stream_parts(stream, None if last is None else last - first):
                yield check_utf8(part, str(self.path), offset)
                offset += len(part)

    def line_start(self, offset: int, limit: int) -> int:
        """Returns the offset of the next line if it starts within `limit` bytes, else of the next character."""
        with self.open() as stream:
            _skip(stream, self._start + offset)
            near = stream.read(max(4, limit))
        newline = near.find(b"\n", 0, limit)
        return offset + (newline + 1 if newline >= 0 else character_start(near, 0))

    @functools.cached_property
    def _start(self) -> int:
        """Offset of the text: the size of a byte order mark, or 0."""
        with self.open() as stream:
            return len(BYTE_ORDER_MARK) if stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK else 0

    def rows(self, columns: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
        """Yields (number from 0, record) of all records; of tables, with those of the columns that they have.

        Raises:
          InputError: a line is not JSON, or the file is damaged or holds plain text.
        """
        read = {"json": self._json_records, "array_record": self._array_records}.get(self.kind)
        with _naming(self.path):
            if read is not None:
                yield from read("", lambda number: True)
                return
            number = 0
            for batch in self._table_batches(lambda schema: [name for name in columns if name in schema.names]):
                yield from enumerate(batch.to_pylist(), number)
                number += batch.num_rows

    def records(self, key: str, select: Callable[[int], bool], bad: BadRecords) -> Iterator[tuple[int, bytes]]:
        """Yields (number from 0, UTF-8 text) of selected records.

        Args:
          key: name of the field that holds the text; dots lead into nested ones.
          select: number of a record -> whether it is read.
          bad: counts records that are read, and those of them without text.

        Raises:
          InputError: a line is not JSON, no record has the field, or the file is damaged.
        """
        if self.kind == "text":
            yield from self._parts(select, bad)
            return
        read = {"json": self._json_records, "array_record": self._array_records}.get(self.kind, self._table_records)
        with _naming(self.path):
            for number, record in read(key, select):
                bad.seen += 1
                text, reason = text_of(record, key)
                if text is None:
                    fields = f" with {', '.join(map(str, list(record)[:5]))}" if isinstance(record, dict) else ""
                    bad.add(f"'{self.name}' record {number + 1}{fields}", reason)
                else:
                    yield number, text

    def _parts(self, select: Callable[[int], bool], bad: BadRecords) -> Iterator[tuple[int, bytes]]:
        """Yields (number from 0, UTF-8 text) of selected parts between `split_on`; those of white space alone are none."""
        number, held = 0, b""

        def is_chosen(part: bytes) -> bool:
            nonlocal number
            if not part.strip():
                return False
            number += 1
            chosen = select(number - 1)
            bad.seen += chosen
            return chosen

        for block in self.text():
            *whole, held = (held + block).split(self.split_on)
            for part in whole:
                if is_chosen(part):
                    yield number - 1, part
            if len(held) > MAX_PART_BYTES:
                raise InputError(
                    f"data.split_on={self.split_on.decode()!r}: '{self.path}' has more than {MAX_PART_BYTES:,} bytes without it: "
                    "give the string that ends its documents, or leave data.split_on out"
                )
        if is_chosen(held):
            yield number - 1, held

    def _json_records(self, key: str, select: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
        del key
        with self.open() as stream:
            number = 0
            for line_number, line in enumerate(stream, 1):
                line = line.removeprefix(BYTE_ORDER_MARK) if line_number == 1 else line
                if not line.strip():
                    continue
                if select(number):
                    try:
                        record = parse_json(line)
                    except ValueError as error:
                        raise InputError(
                            f"data.paths: line {line_number} of '{self.path}' is not JSON ({error}): mend or remove it"
                        ) from None
                    yield number, record
                number += 1

    def _array_records(self, key: str, select: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
        del key
        reader = array_record_module.ArrayRecordReader(os.fspath(self.path))
        try:
            for number in filter(select, range(reader.num_records())):
                (content,) = reader.read([number])
                try:
                    yield number, parse_json(content)
                except ValueError:  # plain text
                    yield number, content
        finally:
            reader.close()

    def _table_records(self, key: str, select: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
        number = 0
        for batch in self._table_batches(lambda schema: [_column(key, schema, self.path)]):
            chosen = [row for row in range(batch.num_rows) if select(number + row)]
            for row, record in zip(chosen, batch.take(pyarrow.array(chosen, "int64")).to_pylist(), strict=True):
                yield number + row, record
            number += batch.num_rows

    def _table_batches(self, choose: Callable[[pyarrow.Schema], list[str]]) -> Iterator[pyarrow.RecordBatch]:
        """Yields the rows of a Parquet or Arrow file, with the columns that are chosen of its schema."""
        if self.kind == "parquet":
            with pyarrow.parquet.ParquetFile(self.path) as table:
                yield from table.iter_batches(ROWS_PER_READ, columns=choose(table.schema_arrow))
            return
        with pyarrow.memory_map(os.fspath(self.path)) as content:
            if self.kind == "arrow":
                reader = pyarrow.ipc.open_file(content)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(content)
                batches = iter(reader)
            columns = choose(reader.schema)
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_PER_READ):
                    yield batch.select(columns).slice(start, ROWS_PER_READ)


def text_span(file: TextFile, share: tuple[float, float]) -> Iterator[bytes]:
    """Yields the parts of a plain file's text from one share of its bytes to another, cut at lines where they are near."""
    if share == WHOLE:
        return file.text()
    size = file.num_bytes()

    def offset(part: float) -> int:
        return int(part) * size if part in WHOLE else file.line_start(int(size * part), max(1, size // 100))

    return file.text(offset(share[0]), offset(share[1]))


def detect(path: pathlib.Path, name: str) -> TextFile:
    """Returns a file with the format of its content.

    Raises:
      InputError: no format that holds text, a JSON file that is not of JSON lines, a table, or unreadable.
    """
    with _naming(path):
        compressed = _opener(path) is not None
        with _stream(path) as stream:
            head = stream.read(HEAD_BYTES)
        kind = next((kind for start, kind in _RECORD_MAGIC.items() if head.startswith(start)), None)
        if kind is not None and compressed:
            raise InputError(f"data.paths: '{path}' is a compressed file of another format ({kind}): unpack it")
        if kind is None:
            check_plain_text(head, f"data.paths: '{path}'")
            check_no_table(path, f"data.paths: '{path}'")
            if head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1] in (b"{", b"["):  # a record may be long
                with _stream(path) as stream:
                    head = stream.read(JSON_HEAD_BYTES)
            kind = "json" if _is_json(path, head, len(head) < JSON_HEAD_BYTES) else "text"
    return TextFile(path, name, kind)


def text_of(record: Any, key: str) -> tuple[bytes | None, str]:
    """Returns (UTF-8 text of a record, or None; reason where there is none).

    Args:
      record: a mapping, or the text itself in bytes.
      key: name of the field; dots lead into nested ones.
    """
    if isinstance(record, dict):
        value: Any = record
        for part in [key] if key in record else key.split("."):
            if not isinstance(value, dict) or part not in value:
                return None, f"no field '{key}'"
            value = value[part]
    elif isinstance(record, bytes):
        value = record
    else:
        return None, "no object"
    if value is None:
        return None, f"'{key}' is null"
    if not isinstance(value, str | bytes):
        return None, f"'{key}' is no text"
    try:
        text = value.encode("utf-8") if isinstance(value, str) else value.decode("utf-8").encode()
    except UnicodeError:
        return None, f"'{key}' has characters that UTF-8 has not"
    return (text, "") if text.strip() else (None, f"'{key}' is empty")


def _is_json(path: pathlib.Path, head: bytes, complete: bool) -> bool:
    """True for JSON lines. Raises: InputError: one JSON value, or a name that promises lines."""
    named = any(suffix.lower() in JSON_SUFFIXES for suffix in path.suffixes[-2:])
    if is_json_lines(head, complete, named):
        return True
    if named:
        raise InputError(
            f"data.paths: '{path}' is named as JSON, but is not JSON lines, one object per line: convert it (jq -c '.[]' OLD > "
            "NEW.jsonl makes lines of a list), or name it .txt if it is text"
        )
    if first_json_record(head, complete) is not None:
        raise InputError(
            f"data.paths: '{path}' is one JSON list, which would be trained on as raw JSON: make lines of it (jq -c '.[]' OLD > "
            "NEW.jsonl)"
        )
    return False


def _column(key: str, schema: pyarrow.Schema, path: pathlib.Path) -> str:
    """Returns the column that holds a field. Raises: InputError: there is none, or it holds no text."""
    column = key if key in schema.names else key.partition(".")[0]
    if column not in schema.names:
        raise InputError(
            f"data.paths: '{path}' has no column '{key}', but {', '.join(schema.names[:10])}: name the one that holds the "
            "text with data.text_key"
        )
    return column


def _opener(path: pathlib.Path) -> Callable[[str], BinaryIO] | None:
    """Returns a function that opens a compressed file; None for others."""
    with open(path, "rb") as content:
        head = content.read(16)
    return next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)


def _stream(path: pathlib.Path) -> BinaryIO:
    return (_opener(path) or (lambda file: open(file, "rb")))(os.fspath(path))


def _skip(stream: BinaryIO, count: int) -> None:
    """Moves a stream on by `count` bytes."""
    try:
        stream.seek(count)
    except io.UnsupportedOperation:  # of a compressed file that is read forward only
        while count > 0 and (block := stream.read(min(count, READ_BYTES))):
            count -= len(block)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Names the file in errors of reading it."""
    try:
        yield
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"data.paths: '{path}' cannot be read, it may be damaged or cut short ({' '.join(str(reason).split())[:200]})"
        ) from error
