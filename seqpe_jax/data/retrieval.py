"""Questions of the data set `retrieval`: prompts that fill a length with a tokenizer."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from seqpe_jax.data.datasets.base import SPLITS, check_split
from seqpe_jax.data.datasets.image_base import fingerprint_of
from seqpe_jax.data.datasets.retrieval import MAKERS, NAME, VERSION, Prompt
from seqpe_jax.data.qa import QASource, QuestionAnswers, Record
from seqpe_jax.data.qa_index import count_example_tokens
from seqpe_jax.data.tokenizers import Tokenizer
from seqpe_jax.errors import InputError

EXAMPLES = {"train": 2**20, "validation": 200, "test": 200}
CHECKED = (
    32  # prompts without filler that must fit; others may have a few tokens more, and are refused when they are read
)
SAMPLE = 256  # questions of a split that are counted, and guessed without their text


class PromptTooLongError(InputError):
    """No prompt of a probe fits a length."""


class RetrievalQuestions(QASource):
    """Prompts of a probe at a length, each made when it is read.

    Attributes:
      name: name of the data set and the split.
      length: tokens of prompt, answer and end, at most.
      skipped: number of skipped questions by reason: none are.
      fingerprint: hex digits, equal for equal prompts.
      content_fingerprint: the same, whatever the length.
      num_questions: number of prompts.

    Args:
      split: "train", "validation" or "test".
      tokenizer: tokenizer that counts tokens.
      length: length in tokens.
      probe: one of `registry.PROBES`.
      depths: where the answer is, in turn, in 0 (first) to 1 (last); training draws any depth.
      instructions: whether prompts begin with what they are about.
      seed: seed of the prompts.

    Raises:
      PromptTooLongError: the length is too short for any prompt.
    """

    def __init__(
        self,
        split: str,
        *,
        tokenizer: Tokenizer,
        length: int,
        probe: str,
        depths: Sequence[float] = (),
        instructions: bool = True,
        seed: int = 0,
    ):
        check_split(split)
        self.name, self.length, self.skipped = f"{NAME}/{split}", length, {}
        self._split, self._tokenizer, self._probe = split, tokenizer, probe
        self._depths = () if split == "train" else tuple(depths)
        self._instructions, self._seed = instructions, seed
        identity = (NAME, VERSION, split, probe, self._depths, instructions, seed)
        self.content_fingerprint = fingerprint_of(*identity)
        self.fingerprint = fingerprint_of(*identity, length, tokenizer.fingerprint)
        self.num_questions = EXAMPLES[split]
        smallest = max(self._count(self._prompt(index, 0)) for index in range(CHECKED))
        if smallest > length:
            raise PromptTooLongError(
                f"no prompt of data.probe='{probe}' fits {length} tokens: the smallest workable length is {smallest}"
                + ("" if not instructions else ", or less with data.instructions=False")
            )

    def __len__(self) -> int:
        return self.num_questions

    def __getitem__(self, index: int) -> Record:
        prompt = self._fitted(int(index))
        start = self._start(prompt)
        return {
            "index": int(index),
            "input": f"{start}{prompt.context}\n{prompt.question}",
            "question": prompt.question,
            "outputs": prompt.answers,
            "answer": ", ".join(prompt.answers),
            "depth": None if prompt.gold is None else self._depth(int(index)),
            "kind": self._probe,
            "passage": None if prompt.gold is None else len(start) + prompt.gold,
        }

    def questions(self) -> Iterator[QuestionAnswers]:
        """Yields (question, type, answers) of some prompts, in order, without any context."""
        for index in range(min(len(self), SAMPLE)):
            prompt = self._prompt(index, 0)
            yield prompt.question, self._probe, prompt.answers

    def describe(self, sample: int = 4) -> list[str]:
        """Returns lines for people on the prompts."""
        tokens = [self._count(self._fitted(index)) for index in range(sample)]
        return [
            f"{self.name}: prompts of {self._probe} in {self.length} tokens ({min(tokens)} to {max(tokens)} with their answers)"
        ]

    def _start(self, prompt: Prompt) -> str:
        return f"{prompt.instructions}\n" if self._instructions else ""

    def _rng(self, index: int) -> np.random.Generator:
        words = (self._seed, SPLITS.index(self._split), zlib.crc32(self._probe.encode()), index)
        return np.random.default_rng(words)

    def _depth(self, index: int) -> float:
        if self._depths:
            return self._depths[index % len(self._depths)]
        return float(np.random.default_rng((self._seed, SPLITS.index(self._split), index)).random())

    def _prompt(self, index: int, size: int) -> Prompt:
        return MAKERS[self._probe](self._rng(index), size, self._depth(index))

    def _count(self, prompt: Prompt) -> int:
        text = f"{self._start(prompt)}{prompt.context}\n{prompt.question}"
        return count_example_tokens(self._tokenizer, text, (", ".join(prompt.answers),))

    def _fitted(self, index: int) -> Prompt:
        """The longest prompt that fits, by doubling and bisection of its filler."""
        low, prompt = 0, self._prompt(index, 0)
        if self._count(prompt) > self.length:
            raise PromptTooLongError(
                f"prompt {index} of data.probe='{self._probe}' takes {self._count(prompt)} tokens, more than {self.length}: "
                "choose a longer length"
            )
        high = 1
        while self._count(self._prompt(index, high)) <= self.length:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._count(self._prompt(index, middle)) <= self.length else (low, middle)
        return self._prompt(index, low)
