"""Questions with passages: SQuAD's files (v1.1, v2) or rows of context, question and answers, asked among many paragraphs."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import SPLITS, file_signature, hash_fraction, split_of_name
from seqpe_jax.data.datasets.qa_base import QABuilder, Question
from seqpe_jax.data.datasets.qa_rows import Article, group_rows, holds_rows, read_rows, title_of
from seqpe_jax.data.formats import HEAD_BYTES, check_plain_text
from seqpe_jax.data.paths import resolve_paths
from seqpe_jax.errors import InputError
from seqpe_jax.files import parse_json_text

HELD_OUT = 0.1  # share of the articles in validation, and in test, of a single file
QUESTION_WORDS = ("who", "whom", "whose", "what", "when", "where", "which", "why", "how")
SQUAD_USAGE = registry.get("squad_long").paths_hint

DATA_FILE = re.compile(r".*\.(json|jsonl|ndjson|parquet|arrow)(\.(gz|zst|xz|bz2))?", re.IGNORECASE)
EMPTY = "empty"  # of data.unanswerable: such a question is asked, and its answer is empty


class SquadLong(QABuilder):
    """Questions on paragraphs of articles; the type of a question is its first question word, or "other".

    A single file is split by article: the tenth with the lowest hashes of their titles is the test split, the next tenth
    validation. In a folder the names of files say the split (train-v1.1.json, validation-00000-of-00001.parquet); where one of
    validation and test is missing, the articles of the other are split in halves the same way. An article without a title has
    the hash of its first passage. Questions without an answer are stored without one, and `QASource` skips them, or with "".

    Args:
      paths: the file or the folder.
      options: {"unanswerable": "empty" = questions without an answer have the answer ""}.
    """

    VERSION = tfds.core.Version("1.0.0")
    PROMPT_SUFFIX = "Question: {}\nAnswer:"

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [file_signature(file, f"{part} {file.name}") for part, file in _files(paths)]

    def questions(self) -> Mapping[str, Iterable[Question]]:
        articles: dict[str, list[Article]] = {}  # by part
        for part, file in _files(self.paths):
            articles.setdefault(part, []).extend(_read_articles(file))
        shares = {"whole": (HELD_OUT, HELD_OUT), "dev": (0.5, 0.5), "train": (0.0, 0.0)}
        shares |= {"validation": (0.0, 1.0), "test": (1.0, 0.0)}
        splits: dict[str, list[Article]] = {split: [] for split in SPLITS}
        for part, found in articles.items():
            for split, titles in _split_titles({title for title, _ in found}, *shares[part]).items():
                splits[split] += [article for article in found if article[0] in titles]
        no_answer = ("",) if self.options.get("unanswerable") == EMPTY else ()
        return {split: _questions(found, no_answer) for split, found in splits.items()}

    @staticmethod
    def leaks_answer(text: str, question: str, answers: Iterable[str]) -> bool:
        text = text.lower()
        return any(answer and answer.lower() in text for answer in answers)


def _files(paths: tuple[str, ...]) -> list[tuple[str, pathlib.Path]]:
    """Returns (part, file): "whole", or "train" and either "dev", which is split in halves, or "validation" and "test"."""
    registry.get(SquadLong.name).check_paths(paths)
    path = pathlib.Path(paths[0]).expanduser().absolute()
    if path.is_file():
        return [("whole", path)]
    if not path.is_dir():
        raise InputError(f"data.paths: '{path}' does not exist; {SQUAD_USAGE}")
    resolved = resolve_paths([str(path)])
    files = [pathlib.Path(file) for file in resolved.files if DATA_FILE.fullmatch(file)]
    named = [(split_of_name(os.path.relpath(file, path)), file) for file in files]
    if len(files) == 1 and named[0][0] in (None, "train"):
        return [("whole", files[0])]
    found = [(split, file) for split, file in named if split is not None]
    splits = {split for split, _ in found}
    if "train" not in splits:
        skipped = f"; skipped: {resolved.skipped}" if str(resolved.skipped) else ""
        raise InputError(
            f"data.paths: folder '{path}' holds no file of data whose name says 'train', such as train-v1.1.json or "
            f"train.parquet{skipped}; {SQUAD_USAGE}"
        )
    if splits == {"train"}:
        return [("whole", file) for _, file in found]
    halved = not {"validation", "test"} <= splits
    order = {split: number for number, split in enumerate(SPLITS)}
    return [
        ("dev" if halved and split != "train" else split, file)
        for split, file in sorted(found, key=lambda item: order[item[0]])
    ]


def _split_titles(titles: set[str], test: float, validation: float) -> dict[str, set[str]]:
    """Returns the titles of each split: fixed shares, at least one title in a split with a share above 0."""
    ranked = sorted(titles, key=lambda title: (hash_fraction(f"squad_long {title}"), title))
    num_test = max(1, round(test * len(ranked))) if test else 0
    num_validation = max(1, round(validation * len(ranked))) if validation else 0
    if test + validation == 1.0:
        num_validation = len(ranked) - num_test
    held_out = num_test + num_validation
    return {
        "test": set(ranked[:num_test]),
        "validation": set(ranked[num_test:held_out]),
        "train": set(ranked[held_out:]),
    }


def _read_articles(file: pathlib.Path) -> list[Article]:
    """Returns the checked articles of a file."""
    if holds_rows(file):
        return read_rows(file)
    content = _read_json(file)
    if isinstance(content, list):
        return group_rows(enumerate(content), f"'{file}'")
    return [_article(file, article, where) for where, article in _items(file, content, "", "data")]


def _article(file: pathlib.Path, article: Any, where: str) -> Article:
    """Returns (title, paragraphs)."""
    paragraphs = [_paragraph(file, paragraph, below) for below, paragraph in _items(file, article, where, "paragraphs")]
    if article.get("title") is None and paragraphs:
        return title_of(paragraphs[0][0]), paragraphs
    return _field(file, article, where, "title", str), paragraphs


def _paragraph(file: pathlib.Path, paragraph: Any, where: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """Returns (context, [(question, answers), ...])."""
    questions = []
    for below, question in _items(file, paragraph, where, "qas"):
        answers = [
            _field(file, answer, inner, "text", str) for inner, answer in _items(file, question, below, "answers")
        ]
        questions.append(
            (_field(file, question, below, "question", str), [] if question.get("is_impossible") else answers)
        )
    return _field(file, paragraph, where, "context", str), questions


def _read_json(file: pathlib.Path) -> Any:
    try:
        content = file.read_bytes()
        check_plain_text(content[:HEAD_BYTES], f"data.paths: '{file}'")
        return parse_json_text(content)
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"'{file}', line {error.lineno} is not JSON ({error.msg}, column {error.colno}): download the file again"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"'{file}' is not UTF-8 text (byte offset {error.start}): download the file again") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"'{file}' is not JSON ({error}): repair it, or download the file again") from None


def _items(file: pathlib.Path, owner: Any, where: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yields (path of the item in the file, item) of a list field."""
    for number, item in enumerate(_field(file, owner, where, name, list)):
        yield f"{where}{'.' if where else ''}{name}[{number}]", item


def _field(file: pathlib.Path, owner: Any, where: str, name: str, kind: type) -> Any:
    """Returns a field of an object. Raises: InputError: it is missing or of another type."""
    value = owner.get(name) if isinstance(owner, dict) else None
    if not isinstance(value, kind):
        wanted = {list: "a list", str: "a text"}[kind]
        problem = "is no object" if not isinstance(owner, dict) else f"has no '{name}' that is {wanted}"
        raise InputError(f"'{file}' is not in SQuAD's format: {where or 'the file'} {problem}; {SQUAD_USAGE}")
    return value


def _questions(articles: list[Article], no_answer: tuple[str, ...] = ()) -> Iterator[Question]:
    """Yields the questions of articles; no_answer: the accepted answers of those without one."""
    for title, paragraphs in articles:
        for context, questions in paragraphs:
            passage = context.strip()
            if not passage:
                continue
            for question, answers in questions:
                words = re.findall(r"\w+", question.lower())
                question_type = next((word for word in words if word in QUESTION_WORDS), "other")
                accepted = tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
                yield Question(title, passage, question.strip(), question_type, accepted or no_answer)
            if not questions:
                yield Question(title, passage, "", "other", ())
