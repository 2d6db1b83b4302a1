"""Questions about the source of the running Python's standard library, each answered by the line it is taken from."""

import ast
import collections
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data.datasets import stdlib_text
from seqpe_jax.data.datasets.base import SPLITS, hash_fraction
from seqpe_jax.data.datasets.qa_base import QABuilder, Question

# With the separators and the end token 128 bytes together, so that every question fits a window of 128.
MAX_PASSAGE_BYTES = 72
MAX_CUE_BYTES = 32
MAX_ANSWER_BYTES = 16
MIN_CUE_BYTES = 6
MIN_ANSWER_BYTES = 2
MAX_QUESTIONS_PER_FILE = 60  # of a type; else tables of characters would be most of the data set
# Length of the end of a question that no other passage holds; 0 = the whole question. A small model first learns to
# follow two or four bytes, and from there the rest.
CLUE_BYTES = (2, 4, 0)
MAX_ANSWER_SHARE = (
    0.02  # of an answer among those of its type and split; guessing the most frequent would pay otherwise
)


class StdlibQA(QABuilder):
    """Extractive questions in the form of an incomplete line, whose continuation is in the passage.

    A passage is a few lines of source (up to 72 ASCII bytes, without their common indent). The question is the text
    right before the answer: the prompt `>>> mode=` asks for the `'r'` of the passage. In the type "function" it is a
    docstring, and the answer the name of its function. Types: argument (default value), keyword (value in a call), item
    (of a dict), iterated (by a loop), base (of a class), exception (raised), import (first name from a module), constant (of
    a module or class), variable, attribute, returned (expression), annotation (of the return value), function. Splits
    are those of `stdlib_text`, by file; a question is in one split only, and its words do not hint at the answer.
    Distractor passages hold neither the answer as a word nor the `clue` of the question.
    """

    VERSION = tfds.core.Version("1.0.0")
    PROMPT_SUFFIX = ">>> {}"

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return stdlib_text.StdlibText.sources(())

    def questions(self) -> Mapping[str, Iterable[Question]]:
        files = stdlib_text.files()
        used: set[str] = set()
        # The largest split is last and takes the rest, else remembered answers would pay in the others.
        selected = {split: list(_select(self._read(split, files[split]), used)) for split in reversed(SPLITS)}
        return {split: selected[split] for split in SPLITS}

    def _read(self, split: str, files: Iterable[tuple[str, bytes]]) -> Iterator[Question]:
        title = f"read {self.name}/{split}"
        for name, text in tqdm.tqdm(files, title, unit=" files", delay=2.0, disable=not self._progress):
            yield from questions_of_file(name, text)

    @staticmethod
    def leaks_answer(text: str, question: str, answers: Iterable[str]) -> bool:
        return clue(question) in text or any(_has_word(text, answer) for answer in answers)


@functools.lru_cache(maxsize=1024)
def clue(question: str) -> str:
    """Returns the end of a question that no distractor holds: 2 bytes, 4 bytes or the whole question.

    The question alone decides which; a third each.
    """
    size = CLUE_BYTES[int(hash_fraction(f"stdlib_qa clue {question}") * len(CLUE_BYTES))]
    return question[-size:] if size else question


def _has_word(text: str, word: str) -> bool:
    return word in text and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _select(questions: Iterable[Question], used: set[str]) -> Iterator[Question]:
    """Yields each question once, and no answer much more often than others of its type.

    Args:
      questions: questions of a split.
      used: questions of other splits, which are skipped; those of this split are added.
    """
    found = list(questions)
    types = collections.Counter(question.question_type for question in found)
    limits = {question_type: MAX_ANSWER_SHARE * count for question_type, count in types.items()}
    by_answer, by_file = collections.Counter(), collections.Counter()
    selected = []
    # In random order, else the first files would use up the limit of an answer.
    for index in sorted(
        range(len(found)), key=lambda index: hash_fraction(f"stdlib_qa {index} {_identity(found[index])}")
    ):
        one = found[index]
        answer, file = (one.question_type, one.answers[0]), (one.question_type, one.name)
        if (
            one.question in used
            or by_answer[answer] >= limits[one.question_type]
            or by_file[file] >= MAX_QUESTIONS_PER_FILE
        ):
            continue
        used.add(one.question)
        by_file[file] += 1
        by_answer[answer] += 1
        selected.append(index)
    for index in sorted(selected):
        yield found[index]


def _identity(question: Question) -> str:
    """Returns the text whose hash orders the questions; it must never change, or the data set does."""
    name, passage, text, question_type, answers = question
    return (
        f"Question(name={name!r}, passage={passage!r}, question={text!r}, kind={question_type!r}, answers={answers!r})"
    )


def questions_of_file(name: str, text: bytes) -> Iterator[Question]:
    """Yields the questions on a source file, in the order of the syntax tree; none if the file does not parse.

    Args:
      name: name of the file.
      text: its UTF-8 source.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # an example of bad source, or of another version of Python
        return
    lines = text.decode("utf-8").split("\n")
    for question_type, first, answer in _answer_spans(tree):
        question = _line_question(name, lines, question_type, first, answer)
        if question is not None:
            yield question
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            question = _function_question(name, lines, node)
            if question is not None:
                yield question


Span = tuple[int, int, int]  # line from 0, first and last column of the answer
AnswerSpan = tuple[str, int, Span]  # question type, line from 0 where the passage starts, span of the answer


def _answer_spans(tree: ast.Module) -> Iterator[AnswerSpan]:
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if type(node) in SPAN_FINDERS:
                yield from SPAN_FINDERS[type(node)](node, parent)


def _function_spans(node: ast.FunctionDef | ast.AsyncFunctionDef, parent: ast.AST) -> Iterator[AnswerSpan]:
    for default in [*node.args.defaults, *node.args.kw_defaults]:
        if default is not None:
            yield "argument", default.lineno - 1, _span(default)
    if node.returns is not None:
        yield "annotation", node.returns.lineno - 1, _span(node.returns)


def _class_spans(node: ast.ClassDef, parent: ast.AST) -> Iterator[AnswerSpan]:
    if node.bases:
        yield "base", node.lineno - 1, _span(node.bases[0])


def _raise_spans(node: ast.Raise, parent: ast.AST) -> Iterator[AnswerSpan]:
    if node.exc is not None:
        yield "exception", node.lineno - 2, _span(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)


def _return_spans(node: ast.Return, parent: ast.AST) -> Iterator[AnswerSpan]:
    if node.value is not None:
        yield "returned", node.lineno - 2, _span(node.value)


def _import_spans(node: ast.ImportFrom, parent: ast.AST) -> Iterator[AnswerSpan]:
    if node.module:
        yield "import", node.lineno - 1, _span(node.names[0])


def _loop_spans(node: ast.For, parent: ast.AST) -> Iterator[AnswerSpan]:
    yield "iterated", node.lineno - 1, _span(node.iter)


def _keyword_spans(node: ast.keyword, parent: ast.AST) -> Iterator[AnswerSpan]:
    if node.arg:
        yield "keyword", node.value.lineno - 1, _span(node.value)


def _dict_spans(node: ast.Dict, parent: ast.AST) -> Iterator[AnswerSpan]:
    for key, value in zip(node.keys, node.values, strict=True):
        if key is not None and key.lineno == value.lineno:
            yield "item", value.lineno - 1, _span(value)


def _assignment_spans(node: ast.Assign, parent: ast.AST) -> Iterator[AnswerSpan]:
    if len(node.targets) != 1:
        return
    if isinstance(node.targets[0], ast.Attribute):
        yield "attribute", node.lineno - 1, _span(node.value)
    elif isinstance(node.targets[0], ast.Name):
        outside = isinstance(parent, ast.Module | ast.ClassDef)
        yield "constant" if outside else "variable", node.lineno - 1, _span(node.value)


SPAN_FINDERS: dict[type, Callable[[Any, ast.AST], Iterator[AnswerSpan]]] = {
    ast.FunctionDef: _function_spans,
    ast.AsyncFunctionDef: _function_spans,
    ast.ClassDef: _class_spans,
    ast.Raise: _raise_spans,
    ast.Return: _return_spans,
    ast.ImportFrom: _import_spans,
    ast.For: _loop_spans,
    ast.keyword: _keyword_spans,
    ast.Dict: _dict_spans,
    ast.Assign: _assignment_spans,
}


def _span(node: ast.expr | ast.alias) -> Span:
    if isinstance(node, ast.alias):
        return node.lineno - 1, node.col_offset, node.col_offset + len(node.name)
    return node.lineno - 1, node.col_offset, node.end_col_offset if node.end_lineno == node.lineno else -1


def _line_question(name: str, lines: list[str], question_type: str, first: int, span: Span) -> Question | None:
    """Returns the question whose answer has a span, or None if it does not make a good one."""
    line, start, end = span
    if first < 0 or end < 0 or not _is_ascii(lines[first : line + 1]):
        return None
    answer = lines[line][start:end]
    passage = _passage(lines, first, line)
    if passage is None or not _is_answerable(answer):
        return None
    indent = _indent(lines[first])
    before = "\n".join(part[indent:] for part in lines[first:line] + [lines[line][:start]]).rstrip()
    cue = _last_words(before, MAX_CUE_BYTES)
    if len(cue) < MIN_CUE_BYTES or passage.count(cue) != 1 or _is_guessable(cue, answer):
        return None
    return Question(name, passage, cue, question_type, (answer,))


def _function_question(name: str, lines: list[str], node: ast.FunctionDef) -> Question | None:
    """Returns the question for the name of a function by its docstring, or None if it does not make a good one."""
    docstring = ast.get_docstring(node, clean=True)
    first, last = node.lineno - 1, node.body[0].lineno - 1
    if not docstring or node.name.startswith("__") or not _is_ascii(lines[first : last + 1]):
        return None
    cue = _last_words(docstring.split("\n")[0].rstrip(), MAX_CUE_BYTES - len(" def")).strip()
    passage = _passage(lines, first, last)
    if passage is None or len(cue) < MIN_CUE_BYTES or passage.count(cue) != 1 or _is_guessable(cue, node.name):
        return None
    return Question(name, passage, f"{cue} def", "function", (node.name,)) if _is_answerable(node.name) else None


def _is_guessable(cue: str, answer: str) -> bool:
    """True if the cue hints at the answer: `width = width_of(x)`, `for part in parts`, `self._args = args`."""
    words, wanted = re.findall(r"[^\W_]{3,}", cue.lower()), answer.lower()
    return wanted.strip("_") in cue.lower() or bool(words) and words[-1] in wanted


def _is_answerable(answer: str) -> bool:
    """True for a short answer that is more than punctuation and an article, which scores ignore."""
    words = re.findall(r"\w+", answer)
    return MIN_ANSWER_BYTES <= len(answer) <= MAX_ANSWER_BYTES and any(
        word.lower() not in ("a", "an", "the") for word in words
    )


def _passage(lines: list[str], first: int, last: int) -> str | None:
    """Returns lines first to last, and as many equally indented ones after them as fit; None if they are too long."""
    indent = _indent(lines[first])
    if not lines[first].strip() or any(line.strip() and _indent(line) < indent for line in lines[first : last + 1]):
        return None
    passage = "\n".join(line[indent:].rstrip() for line in lines[first : last + 1])
    if len(passage) > MAX_PASSAGE_BYTES:
        return None
    for line in lines[last + 1 :]:
        longer = f"{passage}\n{line[indent:].rstrip()}"
        if not line.strip() or _indent(line) < indent or len(longer) > MAX_PASSAGE_BYTES or not line.isascii():
            break
        passage = longer
    return passage


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _is_ascii(lines: list[str]) -> bool:
    return all(line.isascii() and "\t" not in line and "\r" not in line for line in lines)


def _last_words(text: str, limit: int) -> str:
    """Returns the last complete words of a text, up to `limit` bytes; a longer word is cut."""
    if len(text) <= limit:
        return text
    end = text[-limit:]
    starts = [match.start() for match in re.finditer(r"(?<!\w)\w", text) if match.start() >= len(text) - limit]
    return text[starts[0] :] if starts and len(text) - starts[0] >= limit // 2 else end.lstrip()
