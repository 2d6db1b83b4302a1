"""What the builders of questions share: one record per question, and how its passage meets other passages in a prompt."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import CachedBuilder


class Question(NamedTuple):
    """A question about a passage.

    Attributes:
      name: where the passage comes from; passage: the text that holds the answer; question: "" for a passage that is
        there to distract only; kind: what is asked for; answers: accepted ones, the first preferred; none = the
        question has no answer.
    """

    name: str
    passage: str
    question: str
    kind: str
    answers: tuple[str, ...]


class QABuilder(CachedBuilder, skip_registration=True):
    """A data set of questions: {"name", "text" (the passage), "question", "kind", "answers"}, all UTF-8 text.

    A subclass says what it reads (`sources`) and yields questions by split (`questions`), in an order that is kept.
    """

    ITEM_NAME = "questions"
    PROMPT_SUFFIX: str  # the end of a prompt, with {} for the question

    def features(self) -> tfds.features.FeaturesDict:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        return tfds.features.FeaturesDict(
            {"name": text, "text": text, "question": text, "kind": text, "answers": texts}
        )

    def questions(self) -> Mapping[str, Iterable[Question]]:
        """Returns questions by split; lazily, as the data may be large.

        Raises:
          InputError: nothing there to read, or it is damaged.
        """
        raise NotImplementedError

    def contents(self) -> Mapping[str, Iterable[Question]]:
        return self.questions()

    def examples(self, content: Question) -> Iterator[dict]:
        name, passage, question, kind, answers = content
        yield {"name": name, "text": passage, "question": question, "kind": kind, "answers": list(answers)}

    @staticmethod
    def leaks_answer(text: str, question: str, answers: Iterable[str]) -> bool:
        """Returns whether a passage would answer a question that is about another one."""
        raise NotImplementedError
