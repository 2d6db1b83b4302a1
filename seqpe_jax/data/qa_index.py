"""Index of a split of questions: offsets of its passages and questions, and their lengths in tokens, computed once."""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from seqpe_jax.archives import load_npz
from seqpe_jax.data.cache import load_or_build
from seqpe_jax.data.datasets import qa_jsonl
from seqpe_jax.data.datasets.qa_base import QABuilder
from seqpe_jax.data.tokenizers import Tokenizer
from seqpe_jax.errors import InputError

CACHE_FORMAT = 2  # of the three files; caches of another format are not read
PASSAGES_FILE = "texts.bin"
QUESTIONS_FILE = "questions.bin"
INDEX_FILE = "table.npz"
PASSAGE_SEPARATOR = "\n\n"
PLACEHOLDER = "x"  # on the other side of a separator when tokens are counted

Index = dict[str, np.ndarray]


def load_index(
    root: pathlib.Path, name: str, identity: Sequence[str], build: Callable[[pathlib.Path], None]
) -> tuple[pathlib.Path, Index]:
    """Returns (folder, arrays) of the index of a split, built by one process if the cache lacks it.

    Args:
      root: folder of all indices.
      name: name of the data set and the split.
      identity: identity of the data and the tokenizer.
      build: writes the index into a folder.
    """
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, *identity]).encode()).hexdigest()[:16]
    folder = root / f"{name}-{digest}"
    return folder, load_or_build(folder, _read_index, build)


def _read_index(folder: pathlib.Path) -> Index | None:
    """Returns the arrays of an index, or None if they are missing or damaged."""
    try:
        index = load_npz(folder / INDEX_FILE)
        for name, start in ((PASSAGES_FILE, "text_start"), (QUESTIONS_FILE, "question_start")):
            if start in index and (folder / name).stat().st_size != index[start][-1]:
                return None
        return index
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


class _IndexWriter:
    """Writes distinct passages and questions into two files and collects their offsets and lengths.

    Args:
      passages: open binary file.
      questions: open binary file.
      suffix: `QABuilder.PROMPT_SUFFIX`.
      tokenizer: tokenizer that counts tokens.
    """

    def __init__(self, passages, questions, suffix: str, tokenizer: Tokenizer):
        self._passages_file, self._questions_file = passages, questions
        self._suffix, self._tokenizer = suffix, tokenizer
        self._count_passage = make_passage_counter(tokenizer)
        with_neighbors = len(tokenizer.encode(f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{PLACEHOLDER}".encode()))
        self._separator_tokens = with_neighbors - len(tokenizer.encode(PLACEHOLDER.encode()))
        self._known: dict[bytes, int] = {}  # hash of a passage -> its number
        self._content = hashlib.sha256()
        self._passage_start = [0]
        self._question_start = [0]
        self._passage_tokens: list[int] = []
        self._passage_of: list[int] = []
        self._question_tokens: list[int] = []  # of the suffix with the question and its longest answer
        self._without_answer = 0
        self._answer_not_in_passage = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds the record of one question; one without a question adds its passage only."""
        passage = record["text"].decode()
        number = self._add_passage(record["text"], passage)
        answers = [answer.decode() for answer in record["answers"]]
        if not record["question"]:
            return
        found = [answer for answer in answers if answer in passage]
        if not answers:
            self._without_answer += 1
        elif not found:
            self._answer_not_in_passage += 1
        else:
            self._add_question(record["question"].decode(), record["kind"].decode(), found, number)

    def _add_passage(self, content: bytes, passage: str) -> int:
        key = hashlib.sha256(content).digest()
        if key not in self._known:
            self._known[key] = len(self._known)
            self._passage_start.append(self._passage_start[-1] + self._passages_file.write(content))
            self._passage_tokens.append(self._count_passage(passage))
            self._content.update(content)
        return self._known[key]

    def _add_question(self, question: str, question_type: str, answers: list[str], passage: int) -> None:
        line = json.dumps([question, question_type, answers]).encode()
        self._question_start.append(self._question_start[-1] + self._questions_file.write(line))
        self._content.update(line)
        self._passage_of.append(passage)
        prompt_end = f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{self._suffix.format(question)}"
        tokens = count_example_tokens(self._tokenizer, prompt_end, answers)
        self._question_tokens.append(tokens - self._separator_tokens)

    def arrays(self) -> Index:
        """Returns the arrays of the index."""
        passage_of = np.array(self._passage_of, np.int64)
        passage_tokens = np.array(self._passage_tokens, np.int64)
        return {
            "text_start": np.array(self._passage_start, np.int64),
            "question_start": np.array(self._question_start, np.int64),
            "passage_of": passage_of,
            "passage_tokens": passage_tokens,
            "smallest": np.array(self._question_tokens, np.int64) + passage_tokens[passage_of],
            "without_answer": np.int64(self._without_answer),
            "answer_not_in_text": np.int64(self._answer_not_in_passage),
            "content": np.frombuffer(self._content.digest(), np.uint8),
        }


def index_records(
    records: Sequence[Mapping[str, Any]],
    builder: type[QABuilder],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    title: str,
    progress: bool,
) -> None:
    """Writes each passage once, the answerable questions, and the index of both.

    Args:
      records: records of a split, as `QABuilder` writes them.
      builder: class of the data set.
      tokenizer: tokenizer that counts tokens.
      folder: folder to write into.
      title: title of the progress bar.
      progress: show it on stderr.
    """
    bar = tqdm.tqdm(range(len(records)), f"index {title}", unit=" questions", delay=2.0, disable=not progress)
    with open(folder / PASSAGES_FILE, "wb") as passages, open(folder / QUESTIONS_FILE, "wb") as questions:
        writer = _IndexWriter(passages, questions, builder.PROMPT_SUFFIX, tokenizer)
        for number in bar:
            writer.add(records[number])
    np.savez(folder / INDEX_FILE, **writer.arrays())


def index_lines(file: pathlib.Path, tokenizer: Tokenizer, folder: pathlib.Path, title: str, progress: bool) -> None:
    """Writes the index of a file of JSON lines, after checking every line.

    Args:
      file: file in the format of `qa_jsonl.lines`.
      tokenizer: tokenizer that counts tokens.
      folder: folder to write into.
      title: title of the progress bar.
      progress: show it on stderr.

    Raises:
      InputError: the file is empty, or a line has another form.
    """
    starts, numbers, tokens, end = [], [], [], 0
    content = hashlib.sha256()
    bar = tqdm.tqdm(qa_jsonl.lines(file), f"index {title}", unit=" lines", delay=2.0, disable=not progress)
    for number, offset, line in bar:
        _, prompt, answers = qa_jsonl.parse(line, f"'{file}', line {number}", number - 1)
        tokens.append(count_example_tokens(tokenizer, prompt, answers))
        starts.append(offset)
        numbers.append(number)
        content.update(line)
        end = offset + len(line)
    if not starts:
        raise InputError(f"'{file}' holds no line; {qa_jsonl.QA_JSONL_USAGE}")
    np.savez(
        folder / INDEX_FILE,
        line_start=np.array([*starts, end], np.int64),
        line_number=np.array(numbers, np.int64),
        smallest=np.array(tokens, np.int64),
        without_answer=np.int64(0),
        answer_not_in_text=np.int64(0),
        content=np.frombuffer(content.digest(), np.uint8),
    )


def make_passage_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Returns a function that counts the tokens which a passage and the separator after it add to a prompt."""
    empty = len(tokenizer.encode(f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{PLACEHOLDER}".encode()))
    separator = empty - 2 * len(tokenizer.encode(PLACEHOLDER.encode()))

    def count(passage: str) -> int:
        if not passage:
            return separator
        text = f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{passage}{PASSAGE_SEPARATOR}{PLACEHOLDER}"
        return len(tokenizer.encode(text.encode())) - empty

    return count


def answer_text(answer: str) -> bytes:
    """Returns the text of an answer after its prompt: a space and the answer, or nothing for an empty one."""
    return f" {answer}".encode() if answer else b""


def count_example_tokens(tokenizer: Tokenizer, prompt: str, answers: Sequence[str]) -> int:
    """Returns the number of tokens of prompt + " " + longest answer + end token."""
    encoded = tokenizer.encode_many([prompt.encode(), *map(answer_text, answers)])
    return len(encoded[0]) + max(map(len, encoded[1:])) + 1


@dataclasses.dataclass(frozen=True)
class FileSlices:
    """Random access to parts of a file: [i] -> the bytes from start[i] to start[i + 1].

    Attributes:
      file: path.
      start: int64[n + 1], byte offsets.
    """

    file: pathlib.Path
    start: np.ndarray

    def __getitem__(self, index: int) -> bytes:
        begin, end = int(self.start[index]), int(self.start[index + 1])
        with open(self.file, "rb") as content:
            content.seek(begin)
            return content.read(end - begin)


def truncate_passage(text: str, max_tokens: int, count: Callable[[str], int], slack: int) -> tuple[str, int]:
    """Cuts a text after a word, or inside a word if that would leave `slack` tokens or more unused.

    Args:
      text: text to truncate.
      max_tokens: limit.
      count: returns the number of tokens of a text.
      slack: allowed unused tokens.

    Returns:
      (start of the text, its tokens); ("", 0) if not even one character fits.
    """

    def longest(ends: Sequence[int]) -> int:
        """Returns the last of rising ends up to which the text fits, by bisection; 0 if none does."""
        low, high = 0, len(ends)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(text[: ends[middle - 1]]) <= max_tokens else (low, middle - 1)
        return ends[low - 1] if low else 0

    word_ends = [index for index in range(1, len(text)) if text[index].isspace() and not text[index - 1].isspace()]
    end = longest([*word_ends, len(text)])
    if not end or max_tokens - count(text[:end]) > slack:
        end = max(end, longest(range(1, len(text) + 1)))
    return (text[:end], count(text[:end])) if end else ("", 0)
