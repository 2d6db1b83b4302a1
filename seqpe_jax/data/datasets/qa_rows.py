"""Rows of questions with their passage: JSON lines, a JSON list, Parquet or Arrow, as `datasets` writes SQuAD.

A row is {"context", "question"} with "answers" or "answer": a text, a list of texts, a list of {"text"}, or {"text": list of
texts}; none of them, null or [] = the question has no answer. "title" is optional.
"""

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

from seqpe_jax.data.datasets.text_records import RECORD_KINDS, detect
from seqpe_jax.data.formats import JSON_HEAD_BYTES, is_json_lines
from seqpe_jax.errors import InputError

LINE_SUFFIXES = (".jsonl", ".ndjson")
COLUMNS = ("title", "context", "question", "answers", "answer", "is_impossible")
ROW_FORM = '{"context": "...", "question": "...", "answers": ["..."]}'

Answered = tuple[str, list[str]]  # question, answers
Article = tuple[str, list[tuple[str, list[Answered]]]]  # title; (context, its questions)


def holds_rows(file: pathlib.Path) -> bool:
    """True for a file of JSON lines, Parquet or Arrow by its content, also compressed; False for other JSON."""
    try:
        with open(file, "rb") as content:
            head = content.read(JSON_HEAD_BYTES)
    except OSError:  # the reader of JSON says why
        return False
    named = any(suffix.lower() in LINE_SUFFIXES for suffix in file.suffixes[-2:])
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[", b""):
        return is_json_lines(head, len(head) < JSON_HEAD_BYTES, named)
    try:
        return detect(file, file.name).kind in RECORD_KINDS
    except InputError:  # the reader of JSON says what it is
        return False


def read_rows(file: pathlib.Path) -> list[Article]:
    """Returns the questions of a file of rows, grouped by title and context.

    Raises:
      InputError: the file is damaged, or a row has another form.
    """
    return group_rows(detect(file, file.name).rows(COLUMNS), f"'{file}'")


def group_rows(rows: Iterator[tuple[int, Any]], name: str) -> list[Article]:
    """Groups rows by title and context, both in their order; without titles each context is an article.

    Args:
      rows: (number from 0, row).
      name: name of the file, for messages.

    Raises:
      InputError: a row has another form.
    """
    articles: dict[str, dict[str, list[Answered]]] = {}
    for number, row in rows:
        context, question, answers = _parts(row, f"row {number + 1} of {name}")
        title = row.get("title") or title_of(context)
        articles.setdefault(str(title), {}).setdefault(context, []).append((question, answers))
    return [(title, list(paragraphs.items())) for title, paragraphs in articles.items()]


def title_of(context: str) -> str:
    """Returns a title for an article without one: the hash of its passage, by which it is split."""
    return f"context {hashlib.sha256(context.strip().encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def _parts(row: Any, where: str) -> tuple[str, str, list[str]]:
    """Returns (context, question, answers) of a row. Raises: InputError: it has another form."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is no object: expected {ROW_FORM}")
    for field in ("context", "question"):
        if not isinstance(row.get(field), str):
            fix = "; lines with 'input' and 'outputs' are read with data.name=qa_jsonl" if "input" in row else ""
            fields = ", ".join(map(str, list(row)[:8]))
            raise InputError(
                f"{where} has no '{field}' that is a text (its fields are {fields}): expected {ROW_FORM}{fix}"
            )
    given = row["answers"] if row.get("answers") is not None else row.get("answer")
    found = given.get("text") if isinstance(given, dict) else given
    found = [] if found is None or row.get("is_impossible") else [found] if isinstance(found, str) else found
    texts = (
        [answer.get("text") if isinstance(answer, dict) else answer for answer in found]
        if isinstance(found, list)
        else [None]
    )
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where} has answers of another form, {given!r:.60}: expected {ROW_FORM}")
    return row["context"], row["question"], texts
