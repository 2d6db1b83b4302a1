"""Questions about the source of the running Python's standard library, answered by the line that they are taken from."""

import ast
import collections
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data.datasets import stdlib_text
from seqpe_jax.data.datasets.base import SPLITS, hash_fraction
from seqpe_jax.data.datasets.qa_base import QABuilder, Question

# Together with the separators and the end token 128 bytes, so that every question fits a window of 128.
MAX_PASSAGE_BYTES, MAX_CUE_BYTES, MAX_ANSWER_BYTES = 72, 32, 16  # bytes at most
MIN_CUE_BYTES, MIN_ANSWER_BYTES = 6, 2
MAX_QUESTIONS_PER_FILE = 60  # questions of a kind; tables of characters would be most of the data set otherwise
# How much of a question's end is unlike anything in the other passages; 0 = no more than all of it. What a small model
# learns first, following two or four bytes, leads it to the rest.
CLUE_BYTES = (2, 4, 0)
MAX_ANSWER_SHARE = 0.02  # an answer's share of its kind in a split; more of it is left out, or guessing would pay


class StdlibQA(QABuilder):
    """Extractive questions in the form of a line that breaks off: the passage says how it goes on.

    A passage is a few lines of source as they stand (up to 72 ASCII bytes, their common indent removed). The question is
    the text in it that stands right before the answer, the prompt's `>>> mode=` asking for the passage's `'r'`; in the
    kind "function" it is a docstring, and the answer the name of the function that has it. Kinds: argument (default
    value), keyword (value in a call), item (of a dict), iterated (by a loop), base (of a class), exception (raised),
    import (first name from a module), constant (of a module or class), variable, attribute, returned (expression),
    annotation (of what is returned), function. Splits are those of `stdlib_text`, by file; a question is asked once, in
    one split only, and its words do not hint at the answer. Other passages hold neither the answer as a word nor the
    question's `clue`.
    """

    VERSION = tfds.core.Version("1.0.0")
    PROMPT_SUFFIX = ">>> {}"

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return stdlib_text.StdlibText.sources(())

    def questions(self) -> Mapping[str, Iterable[Question]]:
        files = stdlib_text.files()
        asked: set[str] = set()
        # The largest split comes last and takes what is left, or memory of its answers would pay in the others.
        selected = {split: list(_selected(self._read(split, files[split]), asked)) for split in reversed(SPLITS)}
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
    """Returns the end of a question that stands nowhere but in its own passage: 2 or 4 bytes, or the whole question.

    Which of them depends on the question only; a third each.
    """
    size = CLUE_BYTES[int(hash_fraction(f"stdlib_qa clue {question}") * len(CLUE_BYTES))]
    return question[-size:] if size else question


def _has_word(text: str, word: str) -> bool:
    return word in text and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _selected(questions: Iterable[Question], asked: set[str]) -> Iterator[Question]:
    """Yields each question once, and no answer much more often than others of its kind.

    Args:
      asked: questions that were asked before, left out; those asked now are added.
    """
    found = list(questions)
    room = {kind: MAX_ANSWER_SHARE * count for kind, count in collections.Counter(one.kind for one in found).items()}
    answered, taken = collections.Counter(), collections.Counter()
    kept = []
    # In an order of chance, or the first files would fill what room an answer has.
    for place in sorted(range(len(found)), key=lambda place: hash_fraction(f"stdlib_qa {place} {found[place]}")):
        one = found[place]
        key, source = (one.kind, one.answers[0]), (one.kind, one.name)
        if one.question in asked or answered[key] >= room[one.kind] or taken[source] >= MAX_QUESTIONS_PER_FILE:
            continue
        asked.add(one.question)
        taken[source] += 1
        answered[key] += 1
        kept.append(place)
    for place in sorted(kept):
        yield found[place]


def questions_of_file(name: str, text: bytes) -> Iterator[Question]:
    """Yields the questions that a source file offers, in the order of its lines; none where it does not parse.

    Args:
      name: the file's; text: its UTF-8 source.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # kept as an example of bad source, or of another version of Python
        return
    lines = text.decode("utf-8").split("\n")
    for kind, first, answer in _answer_spans(tree):
        question = _question(name, lines, kind, first, answer)
        if question is not None:
            yield question
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            question = _named_function(name, lines, node)
            if question is not None:
                yield question


Span = tuple[int, int, int]  # line from 0, first and last column of the answer


def _answer_spans(tree: ast.Module) -> Iterator[tuple[str, int, Span]]:
    """Yields (kind, line from 0 where the passage begins, where the answer is)."""
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            line = getattr(node, "lineno", 1) - 1
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for default in [*node.args.defaults, *node.args.kw_defaults]:
                    if default is not None:
                        yield "argument", default.lineno - 1, _span(default)
                if node.returns is not None:
                    yield "annotation", node.returns.lineno - 1, _span(node.returns)
            elif isinstance(node, ast.ClassDef) and node.bases:
                yield "base", line, _span(node.bases[0])
            elif isinstance(node, ast.Raise) and node.exc is not None:
                called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                yield "exception", line - 1, _span(called)
            elif isinstance(node, ast.Return) and node.value is not None:
                yield "returned", line - 1, _span(node.value)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield "import", line, _span(node.names[0])
            elif isinstance(node, ast.For):
                yield "iterated", line, _span(node.iter)
            elif isinstance(node, ast.keyword) and node.arg:
                yield "keyword", node.value.lineno - 1, _span(node.value)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if key is not None and key.lineno == value.lineno:
                        yield "item", value.lineno - 1, _span(value)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1:
                if isinstance(node.targets[0], ast.Attribute):
                    yield "attribute", line, _span(node.value)
                elif isinstance(node.targets[0], ast.Name):
                    inside = isinstance(parent, ast.Module | ast.ClassDef)
                    yield "constant" if inside else "variable", line, _span(node.value)


def _span(node: ast.expr | ast.alias) -> Span:
    if isinstance(node, ast.alias):
        return node.lineno - 1, node.col_offset, node.col_offset + len(node.name)
    return node.lineno - 1, node.col_offset, node.end_col_offset if node.end_lineno == node.lineno else -1


def _question(name: str, lines: list[str], kind: str, first: int, span: Span) -> Question | None:
    line, start, end = span
    if first < 0 or end < 0 or not _ascii(lines[first : line + 1]):
        return None
    answer = lines[line][start:end]
    passage = _passage(lines, first, line)
    if passage is None or not _is_answerable(answer):
        return None
    indent = _indent(lines[first])
    before = "\n".join(part[indent:] for part in lines[first:line] + [lines[line][:start]]).rstrip()
    cue = _last(before, MAX_CUE_BYTES)
    if len(cue) < MIN_CUE_BYTES or passage.count(cue) != 1 or _is_guessable(cue, answer):
        return None
    return Question(name, passage, cue, kind, (answer,))


def _named_function(name: str, lines: list[str], node: ast.FunctionDef) -> Question | None:
    told = ast.get_docstring(node, clean=True)
    first, last = node.lineno - 1, node.body[0].lineno - 1
    if not told or node.name.startswith("__") or not _ascii(lines[first : last + 1]):
        return None
    cue = _last(told.split("\n")[0].rstrip(), MAX_CUE_BYTES - len(" def")).strip()
    passage = _passage(lines, first, last)
    if passage is None or len(cue) < MIN_CUE_BYTES or passage.count(cue) != 1 or _is_guessable(cue, node.name):
        return None
    return Question(name, passage, f"{cue} def", "function", (node.name,)) if _is_answerable(node.name) else None


def _is_guessable(cue: str, answer: str) -> bool:
    """Whether an answer could be guessed: `width = width_of(x)`, `for part in parts`, `self._args = args`."""
    words, wanted = re.findall(r"[^\W_]{3,}", cue.lower()), answer.lower()
    return wanted.strip("_") in cue.lower() or bool(words) and words[-1] in wanted


def _is_answerable(answer: str) -> bool:
    """Whether an answer is short, and more than punctuation and an article, of which scores take no notice."""
    words = re.findall(r"\w+", answer)
    return MIN_ANSWER_BYTES <= len(answer) <= MAX_ANSWER_BYTES and any(
        word.lower() not in ("a", "an", "the") for word in words
    )


def _passage(lines: list[str], first: int, last: int) -> str | None:
    """Returns the lines first to last, and those after them that are indented alike and find room; None if too long."""
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


def _ascii(lines: list[str]) -> bool:
    return all(line.isascii() and "\t" not in line and "\r" not in line for line in lines)


def _last(text: str, limit: int) -> str:
    """Returns the end of a text, whole words of it up to `limit` bytes; a longer word is cut."""
    if len(text) <= limit:
        return text
    end = text[-limit:]
    starts = [match.start() for match in re.finditer(r"(?<!\w)\w", text) if match.start() >= len(text) - limit]
    return text[starts[0] :] if starts and len(text) - starts[0] >= limit // 2 else end.lstrip()
