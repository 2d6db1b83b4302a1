"""Base class of question answering data sets: one record per question, with the passage that answers it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import CachedBuilder


class Question(NamedTuple):
    """A question about a passage.

    Attributes:
      name: source of the passage, such as a file or an article.
      passage: the text that holds the answer.
      question: "" for a passage that serves as a distractor only.
      question_type: category of the question, such as "who".
      answers: accepted answers, the preferred one first; () = the question has no answer.
    """

    name: str
    passage: str
    question: str
    question_type: str
    answers: tuple[str, ...]


class QABuilder(CachedBuilder, skip_registration=True):
    """A data set of questions: {"name", "text" (the passage), "question", "kind" (its type), "answers"}, all UTF-8.

    A subclass implements `sources`, `questions` and `leaks_answer`.

    Attributes:
      PROMPT_SUFFIX: end of a prompt, with {} in place of the question.
    """

    ITEM_NAME = "questions"
    PROMPT_SUFFIX: str

    def features(self) -> tfds.features.FeaturesDict:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        return tfds.features.FeaturesDict(
            {"name": text, "text": text, "question": text, "kind": text, "answers": texts}
        )

    def questions(self) -> Mapping[str, Iterable[Question]]:
        """Returns the questions of each split in a fixed order, lazily, since the data may be large.

        Raises:
          InputError: there is no input, or it is damaged.
        """
        raise NotImplementedError

    def contents(self) -> Mapping[str, Iterable[Question]]:
        return self.questions()

    def examples(self, content: Question) -> Iterator[dict]:
        yield {
            "name": content.name,
            "text": content.passage,
            "question": content.question,
            "kind": content.question_type,
            "answers": list(content.answers),
        }

    @staticmethod
    def leaks_answer(text: str, question: str, answers: Iterable[str]) -> bool:
        """Returns True for a passage that would answer a question about another passage."""
        raise NotImplementedError
