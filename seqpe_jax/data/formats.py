"""File format detection from the first bytes: formats other than plain UTF-8 text are refused by name."""

import json
import pathlib
import re
from typing import Any

from seqpe_jax.errors import InputError
from seqpe_jax.files import parse_json

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it before UTF-8 text; it is no part of the text
HEAD_BYTES = 1 << 16  # of a file that are read for detection
JSON_HEAD_BYTES = 1 << 20  # of a file that starts like JSON
MAX_JSON_LINES = 20  # that are parsed for detection
TABLE_SUFFIXES = (".csv", ".tsv")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
MAX_ZERO_BYTE_SHARE = 1 / 16  # text has no zero bytes, UTF-16 every other one, a tar archive of texts complete blocks

HOW_TO_UNPACK = "unpack it"
HOW_TO_EXTRACT_TEXT = "write its text into a plain UTF-8 file"
HOW_TO_CONVERT = "convert it to UTF-8 (iconv -f {} -t UTF-8 OLD > NEW)"
# (first bytes, their offset, format, fix); the first match counts.
MAGIC_BYTES = (
    (b"\x1f\x8b", 0, "compressed with gzip", "unpack it (gunzip)"),
    (b"\x28\xb5\x2f\xfd", 0, "compressed with zstd", "unpack it (unzstd)"),
    (b"\xfd7zXZ\0", 0, "compressed with xz", "unpack it (unxz)"),
    (b"\x04\x22\x4d\x18", 0, "compressed with lz4", "unpack it (unlz4)"),
    (b"\xff\x06\0\0sNaPpY", 0, "compressed with snappy", HOW_TO_UNPACK),
    (b"\x1f\x9d", 0, "compressed with compress", "unpack it (uncompress)"),
    (b"PK\x03\x04", 0, "a zip archive, or a document or program in one", HOW_TO_UNPACK),
    (b"PK\x05\x06", 0, "an empty zip archive", "leave it out"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", HOW_TO_UNPACK),
    (b"Rar!\x1a\x07", 0, "a rar archive", HOW_TO_UNPACK),
    (b"ustar", 257, "a tar archive", "unpack it (tar -xf)"),
    (b"PAR1", 0, "a Parquet file", HOW_TO_EXTRACT_TEXT),
    (b"ARROW1\0\0", 0, "an Arrow file", HOW_TO_EXTRACT_TEXT),
    (b"Obj\x01", 0, "an Avro file", HOW_TO_EXTRACT_TEXT),
    (b"SQLite format 3\0", 0, "an SQLite database", HOW_TO_EXTRACT_TEXT),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", HOW_TO_EXTRACT_TEXT),
    (b"\x93NUMPY", 0, "a NumPy array", HOW_TO_EXTRACT_TEXT),
    (b"%PDF-", 0, "a PDF document", HOW_TO_EXTRACT_TEXT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "an Office document", HOW_TO_EXTRACT_TEXT),
    (b"{\\rtf", 0, "an RTF document", HOW_TO_EXTRACT_TEXT),
    (b"\x89PNG\r\n", 0, "a PNG image", "leave it out"),
    (b"\xff\xd8\xff", 0, "a JPEG image", "leave it out"),
    (b"GIF8", 0, "a GIF image", "leave it out"),
    (b"\x7fELF", 0, "a program", "leave it out"),
    (b"\xff\xfe\0\0", 0, "UTF-32 text", HOW_TO_CONVERT.format("UTF-32")),
    (b"\0\0\xfe\xff", 0, "UTF-32 text", HOW_TO_CONVERT.format("UTF-32")),
    (b"\xff\xfe", 0, "UTF-16 text", HOW_TO_CONVERT.format("UTF-16")),
    (b"\xfe\xff", 0, "UTF-16 text", HOW_TO_CONVERT.format("UTF-16")),
)
# (pattern of the first bytes, format, fix).
MAGIC_PATTERNS = (
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "compressed with bzip2", "unpack it (bunzip2)"),
    # The marker of a message, and the length of the first one.
    (re.compile(rb"\xff{4}.{3}\0", re.DOTALL), "an Arrow stream", HOW_TO_EXTRACT_TEXT),
)


def strip_bom(text: bytes) -> bytes:
    """Returns UTF-8 text without a byte order mark at its start."""
    return text.removeprefix(BYTE_ORDER_MARK)


def check_plain_text(head: bytes, name: str) -> None:
    """Refuses a file that is not plain UTF-8 text, by its first bytes.

    Args:
      head: the first `HEAD_BYTES`, or all of a shorter file.
      name: the option and the file, for the message.

    Raises:
      InputError: names the format and the fix.
    """
    found = [(file_format, fix) for start, offset, file_format, fix in MAGIC_BYTES if head.startswith(start, offset)]
    found += [(file_format, fix) for pattern, file_format, fix in MAGIC_PATTERNS if pattern.match(head)]
    if not found and head.count(0) > MAX_ZERO_BYTE_SHARE * len(head):
        found.append(("binary, or UTF-16 text without a byte order mark", HOW_TO_EXTRACT_TEXT))
    if found:
        file_format, fix = found[0]
        choice = "" if fix.endswith("leave it out") else ", or leave it out"
        raise InputError(f"{name} is {file_format}, but plain UTF-8 text is expected: {fix}{choice}")


def check_no_table(file: pathlib.Path, name: str) -> None:
    """Refuses a file that is named as a table; name: the option and the file, for the message. Raises: InputError: says how to convert it."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    if suffixes[-1:] and suffixes[-1] in TABLE_SUFFIXES:
        raise InputError(
            f"{name} is named as a table, which would be trained on with its commas and quotes: make JSON lines of it (python -c "
            "'import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin)]' < OLD > NEW.jsonl) and name "
            "the column of the text with data.text_key, or rename it to .txt if it is text"
        )


def check_text_file(file: pathlib.Path, option: str = "data.paths", *, raw: bool = False) -> None:
    """Refuses a file of a corpus that is another format than plain text, or JSON records or a table.

    Args:
      file: path of the file.
      option: the option that names it, for messages.
      raw: accept JSON records and tables as plain text (`data.raw`).

    Raises:
      InputError: see `check_plain_text`; or JSON records or a table; or unreadable.
    """
    name = f"{option}: '{file}'"
    try:
        with open(file, "rb") as content:
            head = content.read(HEAD_BYTES)
            check_plain_text(head, name)
            if not raw:
                check_no_table(file, name)
            if raw or strip_bom(head).lstrip()[:1] not in (b"{", b"["):
                return
            head += content.read(JSON_HEAD_BYTES - HEAD_BYTES)
            complete = not content.read(1)
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check {option}") from error
    record = first_json_record(head, complete)
    if record is not None:
        fields = ", ".join(map(repr, list(record)[:5]))
        raise InputError(
            f"{name} holds JSON records (fields {fields}), which would be trained on as raw JSON: data.name=text reads the text "
            "in field data.text_key of JSON lines, data.name=qa_jsonl questions with answers (docs/data.md); data.raw=True of "
            "data.name=text_files reads the file as it is"
        )


def first_json_record(head: bytes, complete: bool) -> dict[str, Any] | None:
    """Returns the first record of a file of JSON lines or of one JSON list, or None if it is neither.

    Args:
      head: start of the file.
      complete: `head` is the complete file.
    """
    text = strip_bom(head).lstrip()
    if text.startswith(b"["):
        items = text[1:].decode("utf-8", "ignore").lstrip()
        try:
            record, end = json.JSONDecoder().raw_decode(items)
        except (ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) and items[end:].lstrip()[:1] in (",", "]") else None
    records = _json_objects(text, complete)
    return records[0] if records is not None and len(records) > 1 else None


def is_json_lines(head: bytes, complete: bool, named: bool) -> bool:
    """True where the first lines of a file are JSON objects.

    Args:
      head: start of the file.
      complete: `head` is the complete file.
      named: the file's name says so: a single line, or one longer than `head`, then counts.
    """
    text = strip_bom(head).lstrip()
    records = _json_objects(text, complete) if text.startswith(b"{") else None
    return records is not None and (named or len(records) > 1)


def _json_objects(text: bytes, complete: bool) -> list[dict[str, Any]] | None:
    """Returns the objects of the first lines; None where a line is none."""
    lines = text.split(b"\n") if complete else text.split(b"\n")[:-1]  # the last one is cut
    try:
        records = [parse_json(line) for line in [line for line in lines if line.strip()][:MAX_JSON_LINES]]
    except ValueError:
        return None
    return records if all(isinstance(record, dict) for record in records) else None
