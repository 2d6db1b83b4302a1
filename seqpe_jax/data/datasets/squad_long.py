"""SQuAD's questions (v1.1 or v2, or any file in that format), to be asked among many paragraphs."""

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import SPLITS, file_signature, hash_fraction
from seqpe_jax.data.datasets.qa_base import QABuilder, Question
from seqpe_jax.data.formats import HEAD_BYTES, JSON_HEAD_BYTES, check_plain_text, first_json_record
from seqpe_jax.errors import InputError
from seqpe_jax.files import parse_json_text

HELD_OUT = 0.1  # share of the articles in validation, and in test, where all are in one file
KINDS = ("who", "whom", "whose", "what", "when", "where", "which", "why", "how")
SQUAD_USAGE = registry.get("squad_long").paths_hint


class SquadLong(QABuilder):
    """Questions on paragraphs of articles; a question's kind is its first question word (who, what, ...), or "other".

    One file is split by article: a tenth of them (those of the lowest hash of their title) are the test split, the next
    tenth validation. In a folder, train-*.json are the train split, and the articles of dev-*.json are split in halves
    like that: validation and test. Questions of SQuAD v2 that have no answer are kept without one, and skipped by
    whoever asks.

    Args:
      paths: the file or the folder.
    """

    VERSION = tfds.core.Version("1.0.0")
    PROMPT_SUFFIX = "Question: {}\nAnswer:"

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [file_signature(file, f"{part} {file.name}") for part, file in _files(paths)]

    def questions(self) -> Mapping[str, Iterable[Question]]:
        articles: dict[str, list[tuple[str, list]]] = {}  # by part: whole, train or dev
        for part, file in _files(self.paths):
            articles.setdefault(part, []).extend(_articles(file))
        shares = {"whole": (HELD_OUT, HELD_OUT), "dev": (0.5, 0.5), "train": (0.0, 0.0)}
        splits: dict[str, list[tuple[str, list]]] = {split: [] for split in SPLITS}
        for part, found in articles.items():
            for split, titles in _divided({title for title, _ in found}, *shares[part]).items():
                splits[split] += [article for article in found if article[0] in titles]
        return {split: _questions(found) for split, found in splits.items()}

    @staticmethod
    def leaks_answer(text: str, question: str, answers: Iterable[str]) -> bool:
        text = text.lower()
        return any(answer.lower() in text for answer in answers)


def _files(paths: tuple[str, ...]) -> list[tuple[str, pathlib.Path]]:
    """Returns (whole, train or dev; file)."""
    registry.get(SquadLong.name).check_paths(paths)
    path = pathlib.Path(paths[0]).expanduser().absolute()
    if path.is_file():
        return [("whole", path)]
    if not path.is_dir():
        raise InputError(f"data.paths: '{path}' does not exist; {SQUAD_USAGE}")
    found = [(part, file) for part in ("train", "dev") for file in sorted(path.glob(f"{part}-*.json"))]
    if not found:
        raise InputError(f"data.paths: folder '{path}' holds neither train-*.json nor dev-*.json; {SQUAD_USAGE}")
    return found


def _divided(titles: set[str], test: float, validation: float) -> dict[str, set[str]]:
    """Returns the titles of each split: fixed shares of them, at least one where there are enough for every split."""
    ranked = sorted(titles, key=lambda title: (hash_fraction(f"squad_long {title}"), title))
    held = max(1, round(test * len(ranked))) if test else 0
    kept = max(1, round(validation * len(ranked))) if validation else 0
    if test + validation == 1.0:
        kept = len(ranked) - held
    return {
        "test": set(ranked[:held]),
        "validation": set(ranked[held : held + kept]),
        "train": set(ranked[held + kept :]),
    }


def _articles(file: pathlib.Path) -> list[tuple[str, list]]:
    """Returns (title, its paragraphs, checked)."""
    try:
        read = file.read_bytes()
        check_plain_text(read[:HEAD_BYTES], f"data.paths: '{file}'")
        content = parse_json_text(read)
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error
    except json.JSONDecodeError as error:
        if first_json_record(read[:JSON_HEAD_BYTES], len(read) <= JSON_HEAD_BYTES) is not None:
            raise InputError(
                f"'{file}' holds JSON lines, where data.name='squad_long' reads one object: {SQUAD_USAGE}; lines with 'input' and "
                "'outputs' are read with data.name=qa_jsonl"
            ) from None
        raise InputError(
            f"'{file}', line {error.lineno} is not JSON ({error.msg}, column {error.colno}): download the file again"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"'{file}' is not UTF-8 text (byte offset {error.start}): download the file again") from None
    except ValueError as error:
        raise InputError(f"'{file}' is not JSON ({error}): mend it, or download the file again") from None
    found = []
    for place, article in _listed(file, content, "", "data"):
        paragraphs = []
        for below, paragraph in _listed(file, article, place, "paragraphs"):
            text = _field(file, paragraph, below, "context", str)
            asked = []
            for deeper, question in _listed(file, paragraph, below, "qas"):
                answers = [
                    _field(file, answer, deepest, "text", str)
                    for deepest, answer in _listed(file, question, deeper, "answers")
                ]
                if question.get("is_impossible"):
                    answers = []
                asked.append((_field(file, question, deeper, "question", str), answers))
            paragraphs.append((text, asked))
        found.append((_field(file, article, place, "title", str), paragraphs))
    return found


def _listed(file: pathlib.Path, owner: Any, place: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yields (where, object) for each of a list of objects."""
    for number, item in enumerate(_field(file, owner, place, name, list)):
        yield f"{place}{'.' if place else ''}{name}[{number}]", item


def _field(file: pathlib.Path, owner: Any, place: str, name: str, kind: type) -> Any:
    value = owner.get(name) if isinstance(owner, dict) else None
    if not isinstance(value, kind):
        wanted = {list: "a list", str: "a text"}[kind]
        has = "is no object" if not isinstance(owner, dict) else f"has no '{name}' that is {wanted}"
        raise InputError(f"'{file}' is not in SQuAD's format: {place or 'the file'} {has}; {SQUAD_USAGE}")
    return value


def _questions(articles: list[tuple[str, list]]) -> Iterator[Question]:
    for title, paragraphs in articles:
        for text, asked in paragraphs:
            passage = text.strip()
            if not passage:
                continue
            for question, answers in asked:
                kind = next((word for word in re.findall(r"\w+", question.lower()) if word in KINDS), "other")
                accepted = tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
                yield Question(title, passage, question.strip(), kind, accepted)
            if not asked:
                yield Question(title, passage, "", "other", ())
