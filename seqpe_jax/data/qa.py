"""Questions at any prompt length: the gold passage among distractors, the question, the answer, and training examples.

The text of an example is prompt + " " + answer + end token, as in the reference (text_seqpe/qa_sft.py). The prompt is
tokenized separately from " " + answer, so that every training example starts with the tokens of the prompt. A prompt
made here is passages separated by blank lines, then the question in the form of its data set.
"""

import abc
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from seqpe_jax.data import qa_index, registry
from seqpe_jax.data.cache import local_copies
from seqpe_jax.data.datasets import base, qa_jsonl
from seqpe_jax.data.datasets.qa_base import QABuilder
from seqpe_jax.data.datasets.qa_jsonl import QaJsonl
from seqpe_jax.data.qa_index import (
    PASSAGE_SEPARATOR,
    PASSAGES_FILE,
    QUESTIONS_FILE,
    FileSlices,
    Index,
    answer_text,
    count_example_tokens,
    make_passage_counter,
    truncate_passage,
)
from seqpe_jax.data.tokenizers import ByteTokenizer, Tokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.files import cache_root, parse_json

MIN_PASSAGE_TOKENS = 8  # shorter parts of a passage are avoided
BYTE_ANSWER_END = 0  # ends an answer in bytes; no text holds it
HISTOGRAM_BINS = 10
MAX_LEAKING_CUTS = 100  # give up filling after this many truncated passages that contain the answer

Record = dict[str, Any]
QuestionAnswers = tuple[str, str, tuple[str, ...]]  # (question, question type, accepted answers)


def answer_end_id(tokenizer: Tokenizer) -> int:
    """Returns the token after an answer: the tokenizer's EOS token, or byte 0.

    Raises:
      InputError: the tokenizer has none.
    """
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id
    if tokenizer.name == ByteTokenizer.name:
        return BYTE_ANSWER_END
    raise InputError(
        f"tokenizer '{tokenizer.name}' has no EOS token, which an answer must end with: use data.tokenizer=\"bytes\", or a "
        "tokenizer.json that has one, like GPT-2's"
    )


def prompt_tokens(record: Mapping[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens of a prompt, int32[n]; every `training_example` of the record starts with them."""
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
    """Returns prompt + " " + answer + end token, padded on the right with end tokens; after an empty answer no space.

    Args:
      record: a record of a `QASource`.
      rng: samples one of the accepted answers; None = the first. Of a record with an "answer", that is trained.
      tokenizer: tokenizer of the text.
      length: L; inputs are tokens[:L], targets tokens[1:].
      prompt_weight: loss weight of the context tokens, in 0..1 (the reference: 0).
      question_weight: loss weight of the question tokens, in 0..1. Questions that repeat words of the passage, as those
        of stdlib_qa do, train the look-up.

    Returns:
      {"tokens": int32[L + 1], "weights": float32[L]}: the loss weight of each target, 1 for the answer and its end, 0
      for padding.

    Raises:
      InputError: it takes more than L tokens.
    """
    answers = record["outputs"]
    answer = record.get("answer") or answers[0 if rng is None else int(rng.integers(len(answers)))]
    prompt, end = prompt_tokens(record, tokenizer), answer_end_id(tokenizer)
    sequence = np.concatenate([prompt, tokenizer.encode(answer_text(answer)), [end]])
    if len(sequence) > length:
        raise InputError(
            f"question {record['index']} takes {len(sequence)} tokens with its answer, more than {length}: read the "
            "data set at that length"
        )
    tokens = np.full(length + 1, end, np.int32)
    tokens[: len(sequence)] = sequence
    question_start = len(tokenizer.encode(record["input"].removesuffix(record["question"]).encode())) - 1
    weights = np.zeros(length, np.float32)
    weights[: len(prompt) - 1] = prompt_weight
    weights[question_start : len(prompt) - 1] = question_weight
    weights[len(prompt) - 1 : len(sequence) - 1] = 1.0
    return {"tokens": tokens, "weights": weights}


class QASource(abc.ABC):
    """Questions of a split with random access in Grain's sense, each equal whenever it is read.

    `source[i]` -> {"index": int, "input": prompt, "question": its last part, "outputs": tuple of accepted answers,
    "depth": position of the gold passage in the context, 0 (first) to 1 (last), or None, "kind": question type,
    "passage": the character of the prompt at which the gold passage starts, or None}. Prompt + " " + longest answer +
    end token takes at most `length` tokens.

    Attributes:
      name: name of the data set and the split.
      length: length in tokens.
      skipped: number of skipped questions by reason.
      fingerprint: hex digits, equal for equal questions on every machine.
      content_fingerprint: hex digits, equal for equal passages and questions, whatever the length.
      num_questions: including those that are too long.
    """

    def __init__(self, split: "_IndexedSplit", max_tokens: int):
        index = split.index
        self.name = split.name
        self.length = split.length
        self.fingerprint = split.fingerprint
        self.content_fingerprint = index["content"].tobytes().hex()[:32]
        self.num_questions = len(index["smallest"])
        self._tokenizer = split.tokenizer
        self._selected, self.skipped = _select_questions(index, max_tokens, split.name)

    def __len__(self) -> int:
        return len(self._selected)

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @abc.abstractmethod
    def questions(self) -> Iterator[QuestionAnswers]:
        """Yields (question, question type, accepted answers) in order, without any context."""

    def statistics(self, sample: int = 256) -> dict[str, Any]:
        """Returns statistics of the split.

        Args:
          sample: histograms are of at most that many examples, evenly spaced.

        Returns:
          {"examples", "length", "skipped": {reason: count}, "unanswerable": questions whose answer is empty, "kinds": {question type: count}, "sampled", "tokens":
          {"from": edges, "count"}, "depth": the same, or None}; tokens are those of prompt + " " + longest answer +
          end.
        """
        kinds: dict[str, int] = {}
        unanswerable = 0
        for _, kind, answers in self.questions():
            kinds[kind] = kinds.get(kind, 0) + 1
            unanswerable += answers == ("",)
        indices = np.unique(np.linspace(0, len(self) - 1, min(sample, len(self))).astype(int))
        records = [self[int(index)] for index in indices]
        tokens = [count_example_tokens(self._tokenizer, record["input"], record["outputs"]) for record in records]
        depths = [record["depth"] for record in records if record["depth"] is not None]
        return {
            "examples": len(self),
            "length": self.length,
            "skipped": dict(self.skipped),
            "unanswerable": unanswerable,
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
        if found["skipped"].get("without_answer"):
            lines.append(
                f"{found['skipped']['without_answer']:,} questions have no answer and are left out (data.unanswerable=empty asks "
                "squad_long's)"
            )
        if found["unanswerable"]:
            lines.append(f"{found['unanswerable']:,} questions have no answer: the end token alone is right after them")
        for title, form in (("tokens", "{:.0f}"), ("depth", "{:.1f}")):
            if found[title]:
                bins = zip(found[title]["from"], found[title]["count"], strict=False)
                counts = ", ".join(f"{form.format(edge)}+: {count}" for edge, count in bins)
                lines.append(f"{title} of {found['sampled']} examples: {counts}")
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
    options: base.Options = (),
) -> QASource:
    """Returns the questions of a split at a length, after preparing and indexing the data set if the cache lacks it.

    Several processes may call it at once; a killed one leaves nothing that is read later.

    Args:
      name: a question answering data set of `data.registry`.
      split: "train", "validation" or "test".
      tokenizer: see `load_tokenizer`.
      length: tokens of prompt + " " + longest answer + end token. Prompts are filled up with distractor passages to at
        least 98% of it; of qa_jsonl it is the limit. Longer questions are skipped and counted.
      paths: `data.paths`.
      data_dir: folder of prepared data sets; "" = CACHE_DIR/datasets.
      cache_dir: folder of indices; "" = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      seed: seed of the distractors, and of the position of the gold passage among them.
      progress: show progress bars on stderr.
      max_bare_length: skip questions with more tokens without distractors, so that sources of several lengths have the
        same questions; 0 = length. Not for qa_jsonl, whose prompts are fixed.
      options: values of the fields of `data` that the data set alone reads (`Dataset.options_of`).

    Raises:
      InputError: unknown name or split, nothing to read, malformed files, no question fits the length, a folder that is
        not writable, a tokenizer without an end token.
    """
    paths = [paths] if isinstance(paths, str) else [os.fspath(path) for path in paths]
    builder = registry.load_builder(name, registry.DATA_QA)
    registry.get(name).check_paths(paths)
    base.check_split(split)
    if not issubclass(builder, QABuilder | QaJsonl):
        raise InputError(f"data.name='{name}' is made on the fly, not read: use data.retrieval.RetrievalQuestions")
    if length < 1:
        raise InputError(f"the length of examples must be at least 1 token, got {length}")
    answer_end_id(tokenizer)
    paths = local_copies(paths, cache_dir, progress)
    title, max_bare_length = f"{name}/{split}", min(max_bare_length or length, length)
    file = QaJsonl.file(split, paths) if builder is QaJsonl else None
    key = base.file_signature(file, name) if file else builder.source_key(paths, options)

    def build(folder: pathlib.Path) -> None:
        if file:
            qa_index.index_lines(file, tokenizer, folder, title, progress)
        else:
            records = base.prepared_split(builder, split, key, paths, data_dir, cache_dir, progress, options)
            qa_index.index_records(records, builder, tokenizer, folder, title, progress)

    folder, index = qa_index.load_index(
        cache_root(cache_dir) / "questions", f"{name}-{split}", (key, split, tokenizer.fingerprint), build
    )
    identity = [index["content"].tobytes().hex(), tokenizer.fingerprint, length, seed]
    identity += [max_bare_length] if max_bare_length < length else []
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    indexed = _IndexedSplit(title, length, tokenizer, index, fingerprint)
    if file:
        return JsonlQuestions(indexed, file)
    return AssembledQuestions(indexed, max_bare_length, folder, builder, seed)


@dataclasses.dataclass(frozen=True)
class _IndexedSplit:
    """An indexed split at a length.

    Attributes:
      name: name of the data set and the split.
      length: length in tokens.
      tokenizer: tokenizer of the index.
      index: see `qa_index`.
      fingerprint: fingerprint of the source.
    """

    name: str
    length: int
    tokenizer: Tokenizer
    index: Index
    fingerprint: str


def _select_questions(index: Index, max_tokens: int, name: str) -> tuple[np.ndarray, dict[str, int]]:
    """Selects the questions that fit a number of tokens.

    Returns:
      (numbers of the questions, number of the others by reason).

    Raises:
      InputError: there is no question, or none fits.
    """
    skipped = {"without_answer": int(index["without_answer"]), "answer_not_in_text": int(index["answer_not_in_text"])}
    tokens = index["smallest"]  # minimum tokens of each question
    if not len(tokens):
        raise InputError(
            f"{name} has no usable question: {skipped['without_answer']} have no answer, "
            f"{skipped['answer_not_in_text']} none that is in its paragraph: check data.paths"
        )
    selected = np.flatnonzero(tokens <= max_tokens)
    if not len(selected):
        raise InputError(
            f"no question of {name} fits {max_tokens} tokens: the smallest workable length is {tokens.min()} (and "
            f"{tokens.max()} for all of its {len(tokens)} questions)"
        )
    return selected, skipped | {"too_long": len(tokens) - len(selected)}


class AssembledQuestions(QASource):
    """Questions whose context is assembled when they are read: the gold passage among distractors of its split.

    Distractors are in an order sampled from (seed, index), without those that would give the answer away. The last one
    before and the last one after the gold passage are cut to fit, between words if that is near enough. None occurs twice
    before all have been used; then they are used again in another order. If all would give the answer away, the gold
    passage is alone and the example stays short.

    Args:
      split: the indexed split.
      max_bare_length: limit of the tokens without distractors.
      folder: folder of the index.
      builder: class of the data set.
      seed: seed of the distractors.
    """

    def __init__(
        self, split: _IndexedSplit, max_bare_length: int, folder: pathlib.Path, builder: type[QABuilder], seed: int
    ):
        super().__init__(split, max_bare_length)
        index = split.index
        self._builder, self._seed = builder, seed
        self._passage_of, self._passage_tokens = index["passage_of"], index["passage_tokens"]
        self._min_tokens = index["smallest"]  # of the gold passage, the question, the longest answer and its end
        self._passages = FileSlices(folder / PASSAGES_FILE, index["text_start"])
        self._questions = FileSlices(folder / QUESTIONS_FILE, index["question_start"])
        self._count = make_passage_counter(split.tokenizer)

    def _question(self, number: int) -> QuestionAnswers:
        question, question_type, answers = parse_json(self._questions[number])
        return question, question_type, tuple(answers)

    def questions(self) -> Iterator[QuestionAnswers]:
        for number in self._selected.tolist():
            yield self._question(number)

    def __getitem__(self, index: int) -> Record:
        number = int(self._selected[index])
        question, question_type, answers = self._question(number)
        gold = self._passage(int(self._passage_of[number]))
        prompt_end = self._builder.PROMPT_SUFFIX.format(question)
        distractor_budget = self.length - int(self._min_tokens[number])
        while True:
            before, after, depth = self._distractors(index, question, answers, distractor_budget)
            prompt = PASSAGE_SEPARATOR.join([*before, gold, *after, prompt_end])
            # A tokenizer may merge across texts that were counted separately.
            excess = count_example_tokens(self._tokenizer, prompt, answers) - self.length
            if excess <= 0 or distractor_budget <= 0:
                break
            distractor_budget = max(0, distractor_budget - excess)
        return {
            "index": index,
            "input": prompt,
            "question": prompt_end,
            "outputs": answers,
            "depth": depth,
            "kind": question_type,
            "passage": sum(len(text) + len(PASSAGE_SEPARATOR) for text in before),
        }

    def _passage(self, number: int) -> str:
        return self._passages[number].decode()

    def _distractors(
        self, index: int, question: str, answers: tuple[str, ...], distractor_budget: int
    ) -> tuple[list[str], list[str], float]:
        """Returns (passages before the gold one, passages after it, its depth), at most `distractor_budget` tokens."""
        rng = np.random.default_rng([self._seed, index])
        budget_before = round(float(rng.random()) * distractor_budget)
        if budget_before < MIN_PASSAGE_TOKENS:
            budget_before = 0
        elif distractor_budget - budget_before < MIN_PASSAGE_TOKENS:
            budget_before = distractor_budget
        candidates = self._candidates(rng, question, answers)
        before, used_before = self._fill(candidates, budget_before, question, answers)
        after, used_after = self._fill(candidates, distractor_budget - used_before, question, answers)
        used = used_before + used_after
        return before, after, used_before / used if used else 0.0

    def _candidates(
        self, rng: np.random.Generator, question: str, answers: tuple[str, ...]
    ) -> Iterator[tuple[str, int]]:
        """Yields (passage, tokens) in random order, round after round, without those that give the answer away.

        The gold passage is among those.
        """
        found = True
        while found:
            found = False
            for number in rng.permutation(len(self._passage_tokens)).tolist():
                text = self._passage(number)
                if not self._builder.leaks_answer(text, question, answers):
                    found = True
                    yield text, int(self._passage_tokens[number])

    def _fill(
        self, candidates: Iterator[tuple[str, int]], distractor_budget: int, question: str, answers: tuple[str, ...]
    ) -> tuple[list[str], int]:
        """Collects passages of up to `distractor_budget` tokens; the last one is truncated, with 1% of the length as tolerance.

        Returns:
          (passages, their tokens).
        """
        texts, used, leaking_cuts = [], 0, 0
        while distractor_budget - used > self._count("") and leaking_cuts < MAX_LEAKING_CUTS:
            text, tokens = next(candidates, ("", 0))
            if not text:
                break
            if tokens <= distractor_budget - used:
                texts.append(text)
                used += tokens
                continue
            text, tokens = truncate_passage(text, distractor_budget - used, self._count, slack=self.length // 100)
            if text and not self._builder.leaks_answer(text, question, answers):  # part of a word may be the answer
                texts.append(text)
                return texts, used + tokens
            leaking_cuts += 1
        return texts, used


class JsonlQuestions(QASource):
    """Questions with complete prompts, read from a file with one object per line.

    Args:
      split: the indexed split.
      file: the file.
    """

    def __init__(self, split: _IndexedSplit, file: pathlib.Path):
        super().__init__(split, split.length)
        self._lines = FileSlices(file, split.index["line_start"])
        self._line_numbers, self._file = split.index["line_number"], file

    def __getitem__(self, index: int) -> Record:
        number = int(self._selected[index])
        where = f"'{self._file}', line {self._line_numbers[number]}"
        identifier, prompt, answers = qa_jsonl.parse(self._lines[number], where, int(self._line_numbers[number]) - 1)
        return {
            "index": identifier,
            "input": prompt,
            "question": prompt.rpartition(PASSAGE_SEPARATOR)[2],
            "outputs": answers,
            "depth": None,
            "kind": "any",
            "passage": None,
        }

    def questions(self) -> Iterator[QuestionAnswers]:
        for index in range(len(self)):
            record = self[index]
            yield record["question"], record["kind"], record["outputs"]


def _histogram(values: Sequence[float], limits: tuple[float, float] | None) -> dict[str, list]:
    """Returns {"from": bin edges, "count": values per bin}; without limits values and edges are integers."""
    if limits is None:
        low, span = min(values), max(values) - min(values) + 1
        width = -(-span // HISTOGRAM_BINS)
        edges = low + width * np.arange(-(-span // width) + 1)
    else:
        edges = np.linspace(*limits, HISTOGRAM_BINS + 1)
    counts, _ = np.histogram(values, edges)
    return {"from": edges.tolist(), "count": counts.tolist()}
