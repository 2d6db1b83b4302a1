"""Questions at any length: a passage among others of its split, the question, the answer; and the training example of it.

The text is prompt + " " + answer + end token, as in the reference (text_seqpe/qa_sft.py), and the prompt is tokenised apart
from " " + answer, so that the prompt's tokens begin every training sequence. A prompt built here is passages with blank
lines between them, then the builder's form of the question.
"""

import abc
import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from seqpe_jax.data.builders import base, qa_jsonl, question_builder_class
from seqpe_jax.data.builders.base import prepared
from seqpe_jax.data.builders.qa_jsonl import QaJsonl
from seqpe_jax.data.builders.questions import QuestionBuilder
from seqpe_jax.data.cache import cache_root, locked, new_directory
from seqpe_jax.data.tokenizers import ByteTokenizer, Tokenizer
from seqpe_jax.errors import InputError, suggest

FORMAT = 1  # of the files below; a new number makes old caches unread
TEXTS, QUESTIONS, TABLE = "texts.bin", "questions.bin", "table.npz"
SEPARATOR = "\n\n"
ANCHOR = "x"  # stands for what is on the other side of a separator when tokens are counted
PIECE = 8  # tokens; a smaller piece of a passage is not made where there is a choice
BYTE_END = 0  # ends an answer in bytes: no text holds it
BINS = 10  # of the histograms

Record = dict[str, Any]


def end_token(tokenizer: Tokenizer) -> int:
    """Returns the token after an answer: the tokenizer's end of text, or byte 0.

    Raises:
      InputError: the tokenizer has none.
    """
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    if tokenizer.name == ByteTokenizer.name:
        return BYTE_END
    raise InputError(
        f"tokenizer '{tokenizer.name}' has no end-of-text token, which an answer must end with: use "
        'data.tokenizer="bytes", or a tokenizer.json that has one, like GPT-2\'s'
    )


def prompt_tokens(record: Mapping[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens that an answer is generated from, int32[n]; every `training_example` of the record begins so."""
    return tokenizer.encode(record["input"].encode()).astype(np.int32)


def training_example(
    record: Mapping[str, Any],
    rng: np.random.Generator | None = None,
    *,
    tokenizer: Tokenizer,
    length: int,
    prompt_weight: float = 0.0,
    question_weight: float = 0.0,
) -> dict[str, np.ndarray]:
    """Returns prompt + " " + answer + end token, filled up on the right with end tokens.

    Args:
      record: of a `QuestionSource`.
      rng: draws which of the accepted answers; none = the first.
      length: L; inputs are tokens[:L], targets tokens[1:].
      prompt_weight, question_weight: of the tokens of the context and of the question in the loss, in 0..1 (the
        reference: 0). Questions that repeat words of the passage, as those of stdlib_qa do, teach to look them up.
    Returns:
      {"tokens": int32[L + 1], "weights": float32[L]}: the weight of each target, 1 for the answer and its end, 0 for what
      fills up.
    Raises:
      InputError: it takes more than L tokens.
    """
    answers = record["outputs"]
    answer = answers[0 if rng is None else int(rng.integers(len(answers)))]
    prompt, end = prompt_tokens(record, tokenizer), end_token(tokenizer)
    sequence = np.concatenate([prompt, tokenizer.encode(f" {answer}".encode()), [end]])
    if len(sequence) > length:
        raise InputError(
            f"question {record['index']} takes {len(sequence)} tokens with its answer, more than {length}: read the "
            "data set at that length"
        )
    tokens = np.full(length + 1, end, np.int32)
    tokens[: len(sequence)] = sequence
    weights = np.zeros(length, np.float32)
    weights[: len(prompt) - 1] = prompt_weight
    asked = len(prompt) - len(tokenizer.encode(record["input"].removesuffix(record["question"]).encode()))
    weights[len(prompt) - 1 - asked : len(prompt) - 1] = question_weight
    weights[len(prompt) - 1 : len(sequence) - 1] = 1.0
    return {"tokens": tokens, "weights": weights}


class QuestionSource(abc.ABC):
    """Questions of a split, random access in Grain's sense, each the same whenever it is read.

    `source[i]` -> {"index": int, "input": prompt, "question": its last part, "outputs": tuple of accepted answers, "depth":
    where in the context the gold passage stands, 0 (first) to 1 (last), or None, "kind": what is asked for}. Prompt + " " +
    the longest answer + end token takes at most `length` tokens.

    Attributes:
      name: of the data set and split; length: in tokens; skipped: questions left out, by reason; fingerprint: hex digits,
        equal for equal questions, on every machine.
    """

    def __init__(self, name: str, length: int, tokenizer: Tokenizer, skipped: Mapping[str, int], fingerprint: str):
        self.name, self.length, self.skipped, self.fingerprint = name, length, dict(skipped), fingerprint
        self._tokenizer = tokenizer

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @abc.abstractmethod
    def questions(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yields (question, kind, accepted answers) in order, without any context."""

    def statistics(self, sample: int = 256) -> dict[str, Any]:
        """Returns what is in the split.

        Args:
          sample: histograms are over at most that many examples, evenly spaced.
        Returns:
          {"examples", "length", "skipped": {reason: count}, "kinds": {kind: count}, "sampled", "tokens": {"from": edges,
          "count"}, "depth": the same, or None}; tokens are those of prompt + " " + longest answer + end.
        """
        kinds: dict[str, int] = {}
        for _, kind, _ in self.questions():
            kinds[kind] = kinds.get(kind, 0) + 1
        places = np.unique(np.linspace(0, len(self) - 1, min(sample, len(self))).astype(int))
        records = [self[int(place)] for place in places]
        tokens = [_tokens(self._tokenizer, record["input"], record["outputs"]) for record in records]
        depths = [record["depth"] for record in records if record["depth"] is not None]
        return {
            "examples": len(self),
            "length": self.length,
            "skipped": dict(self.skipped),
            "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
            "sampled": len(records),
            "tokens": _histogram(tokens, None),
            "depth": _histogram(depths, (0.0, 1.0)) if depths else None,
        }

    def describe(self, sample: int = 256) -> list[str]:
        """Returns `statistics` as lines for people."""
        found = self.statistics(sample)
        skipped = ", ".join(f"{reason} {count:,}" for reason, count in found["skipped"].items() if count)
        lines = [
            f"{self.name}: {len(self):,} questions at {self.length} tokens; skipped: {skipped or 'none'}",
            "kinds: " + ", ".join(f"{kind} {100 * count / len(self):.0f}%" for kind, count in found["kinds"].items()),
        ]
        for title, form in (("tokens", "{:.0f}"), ("depth", "{:.1f}")):
            if found[title]:
                bins = zip(found[title]["from"], found[title]["count"], strict=False)
                shown = ", ".join(f"{form.format(edge)}+: {count}" for edge, count in bins)
                lines.append(f"{title} of {found['sampled']} examples: {shown}")
        return lines


def question_source(
    name: str,
    *,
    split: str,
    tokenizer: Tokenizer,
    length: int,
    paths: Sequence[str] = (),
    data_dir: str | os.PathLike = "",
    cache_dir: str | os.PathLike = "",
    seed: int = 0,
    progress: bool = True,
) -> QuestionSource:
    """Returns the questions of a split at a length, preparing and counting them when that has not been done yet.

    Safe to call from several processes at once; a killed one leaves nothing that is read later.

    Args:
      name: stdlib_qa, squad_long or qa_jsonl.
      split: train, validation or test.
      tokenizer: see `load_tokenizer`.
      length: tokens of prompt + " " + longest answer + end token: what examples are filled up to with other passages (at
        least 98% of it), or for qa_jsonl the most that they may have. Longer questions are skipped and counted.
      paths: the builder's.
      data_dir: prepared data sets; none = CACHE_DIR/datasets.
      cache_dir: counted questions; none = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      seed: of the passages around the gold one, and of where it stands among them.
      progress: show how far long work is, on stderr.
    Raises:
      InputError: unknown name or split, nothing to read, malformed files, no question fits the length, a folder not
        writable, a tokenizer without an end.
    """
    paths = (paths,) if isinstance(paths, str) else tuple(os.fspath(path) for path in paths)
    builder = question_builder_class(name)
    if split not in base.SPLITS:
        raise InputError(f"unknown split '{split}'.{suggest(split, base.SPLITS)}")
    if length < 1:
        raise InputError(f"the length of examples must be at least 1 token, got {length}")
    end_token(tokenizer)
    root = cache_root(cache_dir)
    title = f"{name}/{split}"
    if builder is QaJsonl:
        file = QaJsonl.file(split, paths)
        key = base.describe_file(file, name)

        def write(folder: pathlib.Path) -> None:
            _index_lines(file, tokenizer, folder, title, progress)

    else:
        key = builder.source_key(paths)

        def write(folder: pathlib.Path) -> None:
            datasets = pathlib.Path(data_dir).expanduser().absolute() if data_dir else root / "datasets"
            written = prepared(builder, paths, datasets / f"{name}-{key}", root / "downloads", progress)
            if split not in written.info.splits:
                raise InputError(
                    f"data set '{name}' has no questions in split '{split}' (it has {', '.join(written.info.splits)}): "
                    "give more data in data.paths"
                )
            _index_records(written.as_data_source(split=split), builder, tokenizer, folder, title, progress)

    identity = json.dumps([FORMAT, key, split, tokenizer.fingerprint])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    target = root / "questions" / f"{name}-{split}-{digest}"
    table = _read_table(target)
    if table is None:
        with locked(target) as alone:
            if (table := _read_table(target)) is None:
                with new_directory(target, alone=alone) as folder:
                    write(folder)
                table = _read_table(target)
    if table is None:
        raise RuntimeError(f"'{target}' cannot be read back: is the disk full?")
    identity = json.dumps([table["content"].tobytes().hex(), tokenizer.fingerprint, length, seed])
    fingerprint = hashlib.sha256(identity.encode())
    shared = (title, length, tokenizer, table, fingerprint.hexdigest()[:32])
    if builder is QaJsonl:
        return _Lines(*shared, file)
    return _Assembled(*shared, target, builder, seed)


def _read_table(target: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Returns the arrays of a counted split, or None where they are not there or damaged."""
    try:
        with np.load(target / TABLE) as loaded:
            table = {field: loaded[field] for field in loaded.files}
        for name, start in ((TEXTS, "text_start"), (QUESTIONS, "question_start")):
            if start in table and (target / name).stat().st_size != table[start][-1]:
                return None
        return table
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _kept(table: Mapping[str, np.ndarray], length: int, title: str) -> tuple[np.ndarray, dict[str, int]]:
    """Returns (places of the questions that can be asked at a length, count of the others by reason).

    Raises:
      InputError: there is no question, or none fits.
    """
    skipped = {"without_answer": int(table["without_answer"]), "answer_not_in_text": int(table["answer_not_in_text"])}
    smallest = table["smallest"]
    if not len(smallest):
        raise InputError(
            f"{title} has no question that can be asked: {skipped['without_answer']} have no answer, "
            f"{skipped['answer_not_in_text']} none that is in its paragraph: check data.paths"
        )
    kept = np.flatnonzero(smallest <= length)
    if not len(kept):
        raise InputError(
            f"no question of {title} fits {length} tokens: the smallest workable length is {smallest.min()} (and "
            f"{smallest.max()} for all of its {len(smallest)} questions)"
        )
    return kept, skipped | {"too_long": len(smallest) - len(kept)}


class _Assembled(QuestionSource):
    """Questions whose context is made when they are read: the gold passage among others of the split.

    The others come in an order drawn from (seed, index), those that would give the answer away left out; where the room
    before or after the gold passage ends, the last is cut, between words where that is near enough. None comes twice before
    all have been used; then they come again in another order. Where all would give the answer away, the gold passage
    stands alone and the example stays short.
    """

    def __init__(
        self, title, length, tokenizer, table, fingerprint, folder: pathlib.Path, builder: type[QuestionBuilder], seed: int
    ):
        self._kept, skipped = _kept(table, length, title)
        super().__init__(title, length, tokenizer, skipped, fingerprint)
        self._builder, self._seed = builder, seed
        self._passage_of, self._passage_tokens = table["passage_of"], table["passage_tokens"]
        self._around = table["smallest"] - self._passage_tokens[self._passage_of]  # tokens of all but the passages
        self._texts = _Slices(folder / TEXTS, table["text_start"])
        self._questions = _Slices(folder / QUESTIONS, table["question_start"])
        self._count = _counter(tokenizer)

    def __len__(self) -> int:
        return len(self._kept)

    def _fact(self, place: int) -> tuple[str, str, tuple[str, ...]]:
        question, kind, answers = json.loads(self._questions[place])
        return question, kind, tuple(answers)

    def questions(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        for place in self._kept.tolist():
            yield self._fact(place)

    def __getitem__(self, index: int) -> Record:
        place = int(self._kept[index])
        question, kind, answers = self._fact(place)
        gold = int(self._passage_of[place])
        tail = self._builder.TAIL.format(question)
        room = self.length - int(self._around[place]) - int(self._passage_tokens[gold])
        spare = room
        while True:
            before, after, depth = self._context(index, question, answers, spare)
            prompt = SEPARATOR.join([*before, self._text(gold), *after, tail])
            # A tokenizer may join what was counted apart.
            over = _tokens(self._tokenizer, prompt, answers) - self.length
            if over <= 0 or spare <= 0:
                break
            spare = max(0, spare - over)
        return {
            "index": index, "input": prompt, "question": tail, "outputs": answers, "depth": depth, "kind": kind,
        }  # fmt: skip

    def _text(self, passage: int) -> str:
        return self._texts[passage].decode()

    def _context(
        self, index: int, question: str, answers: tuple[str, ...], room: int
    ) -> tuple[list[str], list[str], float]:
        """Returns (passages before the gold one, after it, its depth), of `room` tokens together."""
        rng = np.random.default_rng([self._seed, index])
        first = round(float(rng.random()) * room)
        if first < PIECE:
            first = 0
        elif room - first < PIECE:
            first = room

        def leaks(text: str) -> bool:
            return self._builder.leaks(text, question, answers)

        others = self._others(rng, leaks)
        before, used = self._fill(others, first, leaks)
        after, more = self._fill(others, room - used, leaks)
        return before, after, used / (used + more) if used + more else 0.0

    def _others(self, rng: np.random.Generator, leaks: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
        """Yields (text, tokens) of passages that do not give the answer away (so not the gold one), round after round."""
        found = True
        while found:
            found = False
            for passage in rng.permutation(len(self._passage_tokens)).tolist():
                text = self._text(passage)
                if not leaks(text):
                    found = True
                    yield text, int(self._passage_tokens[passage])

    def _fill(self, others: Iterator[tuple[str, int]], room: int, leaks: Callable[[str], bool]) -> tuple[list[str], int]:
        """Returns (texts, their tokens), the last cut so that they have `room` tokens, or up to 1% of the length less."""
        texts, used = [], 0
        tries = 0
        while room - used > self._count("") and tries < 100:
            text, tokens = next(others, ("", 0))
            if not text:
                break
            if tokens > room - used:
                text, tokens = _cut(text, room - used, self._count, slack=self.length // 100)
                if not text or leaks(text):  # half a word may be the answer
                    tries += 1
                    continue
                texts.append(text)
                return texts, used + tokens
            texts.append(text)
            used += tokens
        return texts, used


class _Lines(QuestionSource):
    """Questions whose prompts are read from a file with one object per line."""

    def __init__(self, title, length, tokenizer, table, fingerprint, file: pathlib.Path):
        self._kept, skipped = _kept(table, length, title)
        super().__init__(title, length, tokenizer, skipped, fingerprint)
        self._lines, self._numbers, self._file = _Slices(file, table["line_start"]), table["line_number"], file

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Record:
        place = int(self._kept[index])
        number, prompt, answers = qa_jsonl.parse(self._lines[place], f"'{self._file}', line {self._numbers[place]}")
        question = prompt.rpartition(SEPARATOR)[2]
        return {
            "index": number, "input": prompt, "question": question, "outputs": answers, "depth": None, "kind": "any",
        }  # fmt: skip

    def questions(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        for index in range(len(self)):
            record = self[index]
            yield record["question"], record["kind"], record["outputs"]


@dataclasses.dataclass(frozen=True)
class _Slices:
    """Pieces of a file, read when they are asked for: [i] -> the bytes from start[i] to start[i + 1]."""

    file: pathlib.Path
    start: np.ndarray

    def __getitem__(self, place: int) -> bytes:
        begin, end = int(self.start[place]), int(self.start[place + 1])
        with open(self.file, "rb") as content:
            content.seek(begin)
            return content.read(end - begin)


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """Returns a function that counts the tokens that a passage and the separator after it add to a prompt."""
    empty = len(tokenizer.encode(f"{ANCHOR}{SEPARATOR}{ANCHOR}".encode()))
    separator = empty - 2 * len(tokenizer.encode(ANCHOR.encode()))

    def count(text: str) -> int:
        if not text:
            return separator
        return len(tokenizer.encode(f"{ANCHOR}{SEPARATOR}{text}{SEPARATOR}{ANCHOR}".encode())) - empty

    return count


def _tokens(tokenizer: Tokenizer, prompt: str, answers: Sequence[str]) -> int:
    """Returns the tokens of prompt + " " + longest answer + end."""
    encoded = tokenizer.encode_many([prompt.encode(), *(f" {answer}".encode() for answer in answers)])
    return len(encoded[0]) + max(map(len, encoded[1:])) + 1


def _cut(text: str, room: int, count: Callable[[str], int], slack: int) -> tuple[str, int]:
    """Returns (the beginning of a text, its tokens), at most `room`; cut after a word, or anywhere to lose less than
    `slack`.

    Empty where not even one character finds room.
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


def _index_records(
    records: Sequence[Mapping[str, Any]],
    builder: type[QuestionBuilder],
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
    count = _counter(tokenizer)
    left = len(tokenizer.encode(f"{ANCHOR}{SEPARATOR}{ANCHOR}".encode())) - len(tokenizer.encode(ANCHOR.encode()))
    bar = tqdm.tqdm(total=len(records), desc=f"count {title}", unit=" questions", delay=2.0, disable=not progress)
    with bar, open(folder / TEXTS, "wb") as texts, open(folder / QUESTIONS, "wb") as questions:
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
            asked = f"{ANCHOR}{SEPARATOR}{builder.TAIL.format(question)}"
            around.append(_tokens(tokenizer, asked, found) - left)
    passage_of = np.array(passage_of, np.int64)
    tokens = np.array(tokens, np.int64)
    np.savez(
        folder / TABLE,
        text_start=np.array(text_start, np.int64),
        question_start=np.array(question_start, np.int64),
        passage_of=passage_of,
        passage_tokens=tokens,
        smallest=np.array(around, np.int64) + tokens[passage_of],
        without_answer=np.int64(without_answer),
        answer_not_in_text=np.int64(not_in_text),
        content=np.frombuffer(content.digest(), np.uint8),
    )


def _index_lines(file: pathlib.Path, tokenizer: Tokenizer, folder: pathlib.Path, title: str, progress: bool) -> None:
    """Writes where the lines of a file begin, and the tokens of each; checks each."""
    starts, numbers, tokens, end = [], [], [], 0
    content = hashlib.sha256()
    bar = tqdm.tqdm(qa_jsonl.lines(file), f"count {title}", unit=" lines", delay=2.0, disable=not progress)
    for number, offset, line in bar:
        _, prompt, answers = qa_jsonl.parse(line, f"'{file}', line {number}")
        tokens.append(_tokens(tokenizer, prompt, answers))
        starts.append(offset)
        numbers.append(number)
        content.update(line)
        end = offset + len(line)
    if not starts:
        raise InputError(f"'{file}' holds no line; {qa_jsonl.HOW}")
    np.savez(
        folder / TABLE,
        line_start=np.array([*starts, end], np.int64),
        line_number=np.array(numbers, np.int64),
        smallest=np.array(tokens, np.int64),
        without_answer=np.int64(0),
        answer_not_in_text=np.int64(0),
        content=np.frombuffer(content.digest(), np.uint8),
    )


def _histogram(values: Sequence[float], limits: tuple[float, float] | None) -> dict[str, list]:
    """Without limits the values are whole numbers, and so are the edges."""
    if limits is None:
        low, span = min(values), max(values) - min(values) + 1
        width = -(-span // BINS)
        edges = low + width * np.arange(-(-span // width) + 1)
    else:
        edges = np.linspace(*limits, BINS + 1)
    counts, _ = np.histogram(values, edges)
    return {"from": edges.tolist(), "count": counts.tolist()}
