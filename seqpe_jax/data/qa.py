"""Questions at any length: a passage among others of its split, the question, the answer; and the training example of it.

The text is prompt + " " + answer + end token, as in the reference (text_seqpe/qa_sft.py), and the prompt is tokenised apart
from " " + answer, so that the prompt's tokens begin every training sequence. A prompt built here is passages with blank
lines between them, then the builder's form of the question.
"""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from seqpe_jax.data import qa_index, registry
from seqpe_jax.data.cache import local_copies
from seqpe_jax.data.datasets import base, qa_jsonl
from seqpe_jax.data.datasets.base import prepare_dataset
from seqpe_jax.data.datasets.qa_base import QABuilder
from seqpe_jax.data.datasets.qa_jsonl import QaJsonl
from seqpe_jax.data.qa_index import (
    PASSAGE_SEPARATOR,
    PASSAGES_FILE,
    QUESTIONS_FILE,
    FileSlices,
    count_example_tokens,
    make_passage_counter,
    truncate_passage,
)
from seqpe_jax.data.tokenizers import ByteTokenizer, Tokenizer
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import cache_root, parse_json

MIN_PASSAGE_TOKENS = 8  # tokens; a smaller piece of a passage is not made where there is a choice
BYTE_ANSWER_END = 0  # ends an answer in bytes: no text holds it
HISTOGRAM_BINS = 10  # of the histograms

Record = dict[str, Any]


def answer_end_id(tokenizer: Tokenizer) -> int:
    """Returns the token after an answer: the tokenizer's end of text, or byte 0.

    Raises:
      InputError: the tokenizer has none.
    """
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id
    if tokenizer.name == ByteTokenizer.name:
        return BYTE_ANSWER_END
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
      record: of a `QASource`.
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
    prompt, end = prompt_tokens(record, tokenizer), answer_end_id(tokenizer)
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


class QASource(abc.ABC):
    """Questions of a split, random access in Grain's sense, each the same whenever it is read.

    `source[i]` -> {"index": int, "input": prompt, "question": its last part, "outputs": tuple of accepted answers, "depth":
    where in the context the gold passage stands, 0 (first) to 1 (last), or None, "kind": what is asked for, "passage": the
    character of the prompt at which the gold passage begins, or None}. Prompt + " " + the longest answer + end token takes
    at most `length` tokens.

    Attributes:
      name: of the data set and split; length: in tokens; skipped: questions left out, by reason; fingerprint: hex digits,
        equal for equal questions, on every machine.
      content_fingerprint: hex digits, equal for equal passages and questions, whatever the length; num_questions: how many questions there
        are, too long ones included.
    """

    content_fingerprint: str
    num_questions: int

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
        tokens = [count_example_tokens(self._tokenizer, record["input"], record["outputs"]) for record in records]
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


def qa_source(
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
    max_bare_length: int = 0,
) -> QASource:
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
      fits: skip questions that are longer than so many tokens without other passages, so that sources of several lengths
        ask the same questions; 0 = length. Of qa_jsonl, whose prompts are as the file has them, the length alone decides.

    Raises:
      InputError: unknown name or split, nothing to read, malformed files, no question fits the length, a folder not
        writable, a tokenizer without an end.
    """
    builder = registry.load_builder(name, registry.DATA_QA)
    registry.get(name).check_paths([paths] if isinstance(paths, str) else paths)
    paths = local_copies(
        [paths] if isinstance(paths, str) else [os.fspath(path) for path in paths], cache_dir, progress
    )
    if split not in base.SPLITS:
        raise InputError(f"unknown split '{split}'.{suggest(split, base.SPLITS)}")
    if length < 1:
        raise InputError(f"the length of examples must be at least 1 token, got {length}")
    answer_end_id(tokenizer)
    root, title = cache_root(cache_dir), f"{name}/{split}"
    if builder is QaJsonl:
        file = QaJsonl.file(split, paths)
        key = base.file_signature(file, name)
    else:
        key = builder.source_key(paths)

    def write(folder: pathlib.Path) -> None:
        if builder is QaJsonl:
            qa_index.index_lines(file, tokenizer, folder, title, progress)
            return
        datasets = pathlib.Path(data_dir).expanduser().absolute() if data_dir else root / "datasets"
        written = prepare_dataset(builder, paths, datasets / f"{name}-{key}", root / "downloads", progress)
        if split not in written.info.splits:
            raise InputError(
                f"data set '{name}' has no questions in split '{split}' (it has {', '.join(written.info.splits)}): "
                "give more data in data.paths"
            )
        qa_index.index_records(written.as_data_source(split=split), builder, tokenizer, folder, title, progress)

    target, table = qa_index.load_index(
        root / "questions", f"{name}-{split}", (key, split, tokenizer.fingerprint), write
    )
    max_bare_length = min(max_bare_length or length, length)
    identity = [
        table["content"].tobytes().hex(),
        tokenizer.fingerprint,
        length,
        seed,
        *([max_bare_length] if max_bare_length < length else []),
    ]
    fingerprint = hashlib.sha256(json.dumps(identity).encode())
    shared = (title, length, tokenizer, table, fingerprint.hexdigest()[:32])
    source = (
        JsonlQuestions(*shared, file)
        if builder is QaJsonl
        else AssembledQuestions(*shared, target, builder, seed, max_bare_length)
    )
    source.content_fingerprint, source.num_questions = table["content"].tobytes().hex()[:32], len(table["smallest"])
    return source


def _select_questions(table: Mapping[str, np.ndarray], length: int, title: str) -> tuple[np.ndarray, dict[str, int]]:
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


class AssembledQuestions(QASource):
    """Questions whose context is made when they are read: the gold passage among others of the split.

    The others come in an order drawn from (seed, index), those that would give the answer away left out; where the room
    before or after the gold passage ends, the last is cut, between words where that is near enough. None comes twice before
    all have been used; then they come again in another order. Where all would give the answer away, the gold passage
    stands alone and the example stays short.
    """

    def __init__(
        self,
        title,
        length,
        tokenizer,
        table,
        fingerprint,
        folder: pathlib.Path,
        builder: type[QABuilder],
        seed: int,
        max_bare_length: int,
    ):
        self._select_questions, skipped = _select_questions(table, max_bare_length, title)
        super().__init__(title, length, tokenizer, skipped, fingerprint)
        self._builder, self._seed = builder, seed
        self._passage_of, self._passage_tokens = table["passage_of"], table["passage_tokens"]
        self._around = table["smallest"] - self._passage_tokens[self._passage_of]  # tokens of all but the passages
        self._texts = FileSlices(folder / PASSAGES_FILE, table["text_start"])
        self._questions = FileSlices(folder / QUESTIONS_FILE, table["question_start"])
        self._count = make_passage_counter(tokenizer)

    def __len__(self) -> int:
        return len(self._select_questions)

    def _fact(self, place: int) -> tuple[str, str, tuple[str, ...]]:
        question, kind, answers = parse_json(self._questions[place])
        return question, kind, tuple(answers)

    def questions(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        for place in self._select_questions.tolist():
            yield self._fact(place)

    def __getitem__(self, index: int) -> Record:
        place = int(self._select_questions[index])
        question, kind, answers = self._fact(place)
        gold = int(self._passage_of[place])
        tail = self._builder.PROMPT_SUFFIX.format(question)
        room = self.length - int(self._around[place]) - int(self._passage_tokens[gold])
        spare = room
        while True:
            before, after, depth = self._context(index, question, answers, spare)
            prompt = PASSAGE_SEPARATOR.join([*before, self._text(gold), *after, tail])
            # A tokenizer may join what was counted apart.
            over = count_example_tokens(self._tokenizer, prompt, answers) - self.length
            if over <= 0 or spare <= 0:
                break
            spare = max(0, spare - over)
        return {
            "index": index,
            "input": prompt,
            "question": tail,
            "outputs": answers,
            "depth": depth,
            "kind": kind,
            "passage": sum(len(text) + len(PASSAGE_SEPARATOR) for text in before),
        }

    def _text(self, passage: int) -> str:
        return self._texts[passage].decode()

    def _context(
        self, index: int, question: str, answers: tuple[str, ...], room: int
    ) -> tuple[list[str], list[str], float]:
        """Returns (passages before the gold one, after it, its depth), of `room` tokens together."""
        rng = np.random.default_rng([self._seed, index])
        first = round(float(rng.random()) * room)
        if first < MIN_PASSAGE_TOKENS:
            first = 0
        elif room - first < MIN_PASSAGE_TOKENS:
            first = room

        def leaks_answer(text: str) -> bool:
            return self._builder.leaks_answer(text, question, answers)

        others = self._others(rng, leaks_answer)
        before, used = self._fill(others, first, leaks_answer)
        after, more = self._fill(others, room - used, leaks_answer)
        return before, after, used / (used + more) if used + more else 0.0

    def _others(self, rng: np.random.Generator, leaks_answer: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
        """Yields (text, tokens) of passages that do not give the answer away (so not the gold one), round after round."""
        found = True
        while found:
            found = False
            for passage in rng.permutation(len(self._passage_tokens)).tolist():
                text = self._text(passage)
                if not leaks_answer(text):
                    found = True
                    yield text, int(self._passage_tokens[passage])

    def _fill(
        self, others: Iterator[tuple[str, int]], room: int, leaks_answer: Callable[[str], bool]
    ) -> tuple[list[str], int]:
        """Returns (texts, their tokens), the last cut so that they have `room` tokens, or up to 1% of the length less."""
        texts, used = [], 0
        tries = 0
        while room - used > self._count("") and tries < 100:
            text, tokens = next(others, ("", 0))
            if not text:
                break
            if tokens > room - used:
                text, tokens = truncate_passage(text, room - used, self._count, slack=self.length // 100)
                if not text or leaks_answer(text):  # half a word may be the answer
                    tries += 1
                    continue
                texts.append(text)
                return texts, used + tokens
            texts.append(text)
            used += tokens
        return texts, used


class JsonlQuestions(QASource):
    """Questions whose prompts are read from a file with one object per line."""

    def __init__(self, title, length, tokenizer, table, fingerprint, file: pathlib.Path):
        self._select_questions, skipped = _select_questions(table, length, title)
        super().__init__(title, length, tokenizer, skipped, fingerprint)
        self._lines, self._numbers, self._file = FileSlices(file, table["line_start"]), table["line_number"], file

    def __len__(self) -> int:
        return len(self._select_questions)

    def __getitem__(self, index: int) -> Record:
        place = int(self._select_questions[index])
        number, prompt, answers = qa_jsonl.parse(self._lines[place], f"'{self._file}', line {self._numbers[place]}")
        question = prompt.rpartition(PASSAGE_SEPARATOR)[2]
        return {
            "index": number,
            "input": prompt,
            "question": question,
            "outputs": answers,
            "depth": None,
            "kind": "any",
            "passage": None,
        }

    def questions(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        for index in range(len(self)):
            record = self[index]
            yield record["question"], record["kind"], record["outputs"]


def _histogram(values: Sequence[float], limits: tuple[float, float] | None) -> dict[str, list]:
    """Without limits the values are whole numbers, and so are the edges."""
    if limits is None:
        low, span = min(values), max(values) - min(values) + 1
        width = -(-span // HISTOGRAM_BINS)
        edges = low + width * np.arange(-(-span // width) + 1)
    else:
        edges = np.linspace(*limits, HISTOGRAM_BINS + 1)
    counts, _ = np.histogram(values, edges)
    return {"from": edges.tolist(), "count": counts.tolist()}
