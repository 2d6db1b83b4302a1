"""A run on questions: prompts with answers, answers generated and scored at any length."""

import functools
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import check_positions
from seqpe_jax.data import loader, qa
from seqpe_jax.data.tokenizers import RoundTrip, RoundTripLoss, check_round_trip
from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.evaluation import answers
from seqpe_jax.inference.decode import Sampling
from seqpe_jax.metrics import training_metrics
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.tasks.task import EvalContext, Evaluator

LOOKED_AT = 32  # questions of a split whose way to tokens and back is looked at
ANY_LENGTH = 1 << 40  # every question fits
ANSWERS_LOOKED_AT = 256  # about so many answers for training, whose length is looked at


class QuestionAnswering(LanguageModeling):
    """The questions of a config: a passage among others, a question, an answer.

    Raises:
      InputError: as `LanguageModeling`; the tokenizer has no token to end an answer with.
    """

    kind = "question_answering"
    metric_names = training_metrics("questions")

    def __init__(self, config: Any, data_available: bool = True, run_dir: str | os.PathLike = ""):
        super().__init__(config, data_available, run_dir)
        self.example |= {"weights": jax.ShapeDtypeStruct((config.data.length,), jnp.float32)}
        self.losses: dict[tuple[str, int], RoundTripLoss] = {}  # what the tokenizer loses of each split, by length
        if data_available:
            self.end = qa.answer_end_id(self.tokenizer)

    @classmethod
    def metrics(cls, config: Any) -> tuple[str, ...]:
        """Returns the loss and the scores of the answers of a config's data (`answers.metrics_of`)."""
        return ("loss", *answers.metrics_of(config.data.name))

    @functools.cache  # noqa: B019  a run has one of these
    def questions(self, split: str, length: int, max_bare_length: int = 0) -> qa.QASource:
        """Returns the questions of a split at a length; fits: as in `data.qa.qa_source`.

        Raises:
          InputError: as `data.qa.qa_source`, or the tokenizer loses text.
        """
        data, source = self.config.data, self._source(split, length, max_bare_length)
        places = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist()
        trip = RoundTrip(self.tokenizer, len(places))
        for record in map(source.__getitem__, places):
            trip.add(" ".join([record["input"], *record["outputs"]]).encode())
        check_round_trip(trip.loss, self.tokenizer, data.lossy_tokenizer)
        self.losses[split, length] = trip.loss
        return source

    def _source(self, split: str, length: int, max_bare_length: int = 0) -> qa.QASource:
        data = self.config.data
        return qa.qa_source(
            data.name,
            split=split,
            tokenizer=self.tokenizer,
            length=length,
            paths=data.paths,
            cache_dir=data.cache_dir,
            seed=self.config.seed,
            progress=is_main_process(),
            max_bare_length=max_bare_length,
        )

    def describe(self) -> str:
        """Returns what is trained on, in words."""
        length = self.config.data.length
        source = self.questions("train", length)
        lines = source.describe()
        end = f"byte {self.end}" if self.tokenizer.name == "bytes" else self._token_in_words(self.end)
        lines.append(f"answers end with {end}")
        every = max(1, len(source) // ANSWERS_LOOKED_AT)
        looked_at = [accepted for _, _, accepted in itertools.islice(source.questions(), 0, None, every)]
        if cut := self._cut_off(looked_at):
            lines.append(
                f"{cut} of {len(looked_at)} answers looked at take more than eval.new_tokens={self.config.eval.new_tokens} "
                "tokens: an evaluation cuts such answers off"
            )
        lines += self._loss_in_words(self.losses["train", length])
        return "\n  ".join([f"{self.config.batch_size} questions to a batch", *lines])

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the fingerprint of a split's questions, and their number. Raises: InputError as `questions`."""
        source = self._source(split, ANY_LENGTH)
        return {"questions": source.num_questions, "fingerprint": source.content_fingerprint}

    def train_loader(self, rows: Sequence[int]) -> loader.TrainLoader:
        """Returns the training batches, of which this process reads some rows."""
        config = self.config
        example = functools.partial(
            qa.training_example,
            tokenizer=self.tokenizer,
            length=config.data.length,
            prompt_weight=config.data.prompt_weight,
            question_weight=config.data.question_weight,
        )
        return loader.TrainLoader(
            self.questions("train", config.data.length),
            batch_size=config.batch_size,
            seed=config.seed,
            example=example,
            rows=rows,
            threads=config.data.threads,
        )

    def positions_at(self, eval_size: tuple[int]) -> tuple[int]:
        """Returns the positions of a window and of an answer past it; with a window that ends its texts, of that alone."""
        return (eval_size[0] + (0 if self.config.encoding.window_dependence else self.config.eval.new_tokens),)

    def check_eval_size(self, eval_size: tuple[int], split: str) -> None:
        """Refuses a length at which no question fits, or that positions do not reach. Raises: InputError."""
        (length,) = eval_size
        check_positions(self.config, *self.positions_at(eval_size), "evaluation length with its answer")
        self._evaluated(split, length)

    def _evaluated(self, split: str, length: int) -> qa.QASource:
        """The questions that are asked at a length: the same ones at every length, those that fit the shortest."""
        return self.questions(split, length, min(length, *(shortest for (shortest,) in self.eval_sizes())))

    def evaluate(self, asked: EvalContext, eval_size: tuple[int], split: str) -> dict[str, Any]:
        """Returns the result of one length.

        Where the signal depends on the length of the window, answers are generated under the signal that the loss is
        computed with, that of the evaluated length, and end with that window, which holds each accepted answer and its end.

        Returns:
          {"length", "examples", "cut_off": questions none of whose answers fits into eval.new_tokens, the scores
          of `answers.metrics_of` (percent), "loss" (nats per token of the answers and their ends), "answer_perplexity",
          "depth": the scores by depth of the passage, "distance": those by how many tokens back the answer stands,
          "answers": (records, hypotheses)}.
        """
        (length,), source = eval_size, self._evaluated(split, eval_size[0])
        count = min(len(source), self.config.eval.examples or len(source))
        records = [source[index] for index in range(count)]
        sampling = Sampling(self.config.eval.new_tokens, end=self.end)
        dependent = bool(self.config.encoding.window_dependence)
        prompts = [qa.prompt_tokens(record, self.tokenizer) for record in records]
        found = asked.generate(
            prompts,
            sampling,
            self.known_V,
            window=max(length, self.config.data.length) if dependent else None,
            cut=dependent,
            progress=lambda done, total: asked.progress(done * count // total, 2 * count),
        )
        pairs = zip(prompts, found, strict=True)
        hypotheses = [self.decode_continuation(prompt, one.content).strip() for prompt, one in pairs]
        loss = self._loss(asked, source, count, length)
        away = answers.distances(records, lambda text: len(self.tokenizer.encode(text.encode())))
        scored = answers.score(records, hypotheses, metrics=answers.metrics_of(self.config.data.name), away=away)
        return {
            "length": length,
            "cut_off": self._cut_off([record["outputs"] for record in records]),
            **scored,
            "loss": loss,
            "answer_perplexity": math.exp(min(loss, 700.0)),
            "answers": (records, hypotheses),
        }

    def extra_evaluators(self) -> tuple[Evaluator, ...]:
        """Returns nothing: questions have no tokens that every context could score."""
        return ()

    def no_context_baseline(self, split: str) -> dict[str, Any]:
        """Returns the scores of guessing without reading the passage (see `answers.no_context_baseline`)."""
        length = self.config.data.length
        known, asked = self.questions("train", length), self.questions(split, length)
        metrics = answers.metrics_of(self.config.data.name)
        return answers.no_context_baseline(known.questions(), asked.questions(), metrics)

    def _cut_off(self, accepted: Iterable[Sequence[str]]) -> int:
        """Of how many questions, given their accepted answers, none can be given whole."""

        def tokens(answer: str) -> int:
            return len(self.tokenizer.encode(f" {answer}".encode()))

        return sum(min(map(tokens, answers)) > self.config.eval.new_tokens for answers in accepted)

    def _loss(self, asked: EvalContext, source: qa.QASource, count: int, length: int) -> float:
        """The mean loss of the tokens of the first accepted answers, in nats."""

        def example(record: dict[str, Any]) -> dict[str, np.ndarray]:
            made = qa.training_example(record, tokenizer=self.tokenizer, length=length)
            return {"tokens": made["tokens"], "counted": made["weights"]}

        total = weight = 0.0
        for number, part in enumerate(loader.EvalBatches(source, asked.batch, count, example), 1):
            losses_BL = np.asarray(asked.eval_step(asked.put({"tokens": part["tokens"]}))["loss"], np.float64)
            counted_BL = part["counted"] * part["weights"][:, None]
            total, weight = total + float((losses_BL * counted_BL).sum()), weight + float(counted_BL.sum())
            asked.progress(count + min(number * asked.batch, count), 2 * count)
        return total / weight
