"""Questions of a split, counted once: where each text begins, how many tokens it has, and what can be asked at a length."""

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

from seqpe_jax.archives import read_arrays
from seqpe_jax.data.cache import locked, staged_directory
from seqpe_jax.data.datasets import qa_jsonl
from seqpe_jax.data.datasets.qa_base import QABuilder
from seqpe_jax.data.tokenizers import Tokenizer
from seqpe_jax.errors import InputError

CACHE_FORMAT = 1  # of the files below; a new number makes old caches unread
PASSAGES_FILE, QUESTIONS_FILE, INDEX_FILE = "texts.bin", "questions.bin", "table.npz"
PASSAGE_SEPARATOR = "\n\n"
PLACEHOLDER = "x"  # stands for what is on the other side of a separator when tokens are counted


def load_index(
    root: pathlib.Path, name: str, identity: Sequence[str], write: Callable[[pathlib.Path], None]
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """Returns (folder, arrays) of a counted split, counted by one process where that has not been done yet.

    Args:
      identity: what the split is counted from; write: puts it into a folder.
    """
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, *identity]).encode()).hexdigest()[:16]
    target = root / f"{name}-{digest}"
    table = _read_index(target)
    if table is None:
        with locked(target) as alone:
            if (table := _read_index(target)) is None:
                with staged_directory(target, alone=alone) as folder:
                    write(folder)
                table = _read_index(target)
    if table is None:
        raise RuntimeError(f"'{target}' cannot be read back: is the disk full?")
    return target, table


def _read_index(target: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a counted split, or None where they are not there or damaged."""
    try:
        table = read_arrays(target / INDEX_FILE)
        for name, start in ((PASSAGES_FILE, "text_start"), (QUESTIONS_FILE, "question_start")):
            if start in table and (target / name).stat().st_size != table[start][-1]:
                return None
        return table
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def index_records(
    records: Sequence[Mapping[str, Any]],
    builder: type[QABuilder],
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    title: str,
    progress: bool,
) -> None:
    """Writes the passages, each once, the questions that can be asked, and the tokens of both."""
    passages: dict[bytes, int] = {}
    text_start, question_start, passage_of, tokens, around = [0], [0], [], [], []
    without_answer = not_in_text = 0
    content = hashlib.sha256()
    count = make_passage_counter(tokenizer)
    left = len(tokenizer.encode(f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{PLACEHOLDER}".encode())) - len(
        tokenizer.encode(PLACEHOLDER.encode())
    )
    bar = tqdm.tqdm(total=len(records), desc=f"count {title}", unit=" questions", delay=2.0, disable=not progress)
    with bar, open(folder / PASSAGES_FILE, "wb") as texts, open(folder / QUESTIONS_FILE, "wb") as questions:
        for number in range(len(records)):
            record = records[number]
            bar.update()
            text = record["text"].decode()
            known = hashlib.sha256(record["text"]).digest()
            if known not in passages:
                passages[known] = len(passages)
                text_start.append(text_start[-1] + texts.write(record["text"]))
                tokens.append(count(text))
                content.update(record["text"])
            answers = [answer.decode() for answer in record["answers"]]
            if not record["question"]:
                continue
            found = [answer for answer in answers if answer in text]
            if not found:
                without_answer, not_in_text = without_answer + (not answers), not_in_text + bool(answers)
                continue
            question = record["question"].decode()
            line = json.dumps([question, record["kind"].decode(), found]).encode()
            question_start.append(question_start[-1] + questions.write(line))
            content.update(line)
            passage_of.append(passages[known])
            asked = f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{builder.PROMPT_SUFFIX.format(question)}"
            around.append(count_example_tokens(tokenizer, asked, found) - left)
    passage_of = np.array(passage_of, np.int64)
    tokens = np.array(tokens, np.int64)
    np.savez(
        folder / INDEX_FILE,
        text_start=np.array(text_start, np.int64),
        question_start=np.array(question_start, np.int64),
        passage_of=passage_of,
        passage_tokens=tokens,
        smallest=np.array(around, np.int64) + tokens[passage_of],
        without_answer=np.int64(without_answer),
        answer_not_in_text=np.int64(not_in_text),
        content=np.frombuffer(content.digest(), np.uint8),
    )


def index_lines(file: pathlib.Path, tokenizer: Tokenizer, folder: pathlib.Path, title: str, progress: bool) -> None:
    """Writes where the lines of a file begin, and the tokens of each; checks each."""
    starts, numbers, tokens, end = [], [], [], 0
    content = hashlib.sha256()
    bar = tqdm.tqdm(qa_jsonl.lines(file), f"count {title}", unit=" lines", delay=2.0, disable=not progress)
    for number, offset, line in bar:
        _, prompt, answers = qa_jsonl.parse(line, f"'{file}', line {number}")
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
    """Returns a function that counts the tokens that a passage and the separator after it add to a prompt."""
    empty = len(tokenizer.encode(f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{PLACEHOLDER}".encode()))
    separator = empty - 2 * len(tokenizer.encode(PLACEHOLDER.encode()))

    def count(text: str) -> int:
        if not text:
            return separator
        return (
            len(tokenizer.encode(f"{PLACEHOLDER}{PASSAGE_SEPARATOR}{text}{PASSAGE_SEPARATOR}{PLACEHOLDER}".encode()))
            - empty
        )

    return count


def count_example_tokens(tokenizer: Tokenizer, prompt: str, answers: Sequence[str]) -> int:
    """Returns the tokens of prompt + " " + longest answer + end."""
    encoded = tokenizer.encode_many([prompt.encode(), *(f" {answer}".encode() for answer in answers)])
    return len(encoded[0]) + max(map(len, encoded[1:])) + 1


@dataclasses.dataclass(frozen=True)
class FileSlices:
    """Pieces of a file, read when they are asked for: [i] -> the bytes from start[i] to start[i + 1]."""

    file: pathlib.Path
    start: np.ndarray

    def __getitem__(self, place: int) -> bytes:
        begin, end = int(self.start[place]), int(self.start[place + 1])
        with open(self.file, "rb") as content:
            content.seek(begin)
            return content.read(end - begin)


def truncate_passage(text: str, room: int, count: Callable[[str], int], slack: int) -> tuple[str, int]:
    """Returns (the beginning of a text, the number of its tokens), which is at most `room`.

    It ends after a word, or anywhere where that loses `slack` tokens or more. Empty where not even one character finds room.
    """

    def longest(ends: Sequence[int]) -> int:
        low, high = 0, len(ends)  # of how many ends the text before them finds room
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(text[: ends[middle - 1]]) <= room else (low, middle - 1)
        return ends[low - 1] if low else 0

    spaces = [place for place in range(1, len(text)) if text[place].isspace() and not text[place - 1].isspace()]
    end = longest([*spaces, len(text)])
    if not end or room - count(text[:end]) > slack:
        end = max(end, longest(range(1, len(text) + 1)))
    return (text[:end], count(text[:end])) if end else ("", 0)
