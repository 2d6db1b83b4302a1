"""Question answering: prompts with answers as training examples; generated answers, scored at any length."""

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import check_positions
from seqpe_jax.data import loader, qa, registry
from seqpe_jax.data.datasets.qa_jsonl import QaJsonl
from seqpe_jax.data.datasets.retrieval import NAME as RETRIEVAL
from seqpe_jax.data.retrieval import RetrievalQuestions
from seqpe_jax.data.tokenizers import RoundTrip, RoundTripLoss, check_round_trip
from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.inference.decode import Sampling
from seqpe_jax.metric_registry import training_metrics
from seqpe_jax.tasks.base import EvalContext, Evaluator
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.tasks.metrics import (
    answer_distances,
    answer_lines,
    answer_metrics,
    bounded_exp,
    no_context_baseline,
    score_answers,
)

ROUND_TRIP_SAMPLE = 32  # questions of a split whose text is encoded and decoded, to see whether text is lost
ANY_LENGTH = 1 << 40  # every question fits
ANSWER_SAMPLE = 256  # about so many training answers are checked for their length


class QuestionAnswering(LanguageModeling):
    """Question answering on the data of a config: passages of which one holds the answer, a question, an answer.

    Attributes:
      lost_text: text that the tokenizer loses, by split and length.
      end: id of the token that ends an answer.

    Raises:
      InputError: see `LanguageModeling`; or the tokenizer has no token to end an answer with.
    """

    kind = "question_answering"
    metric_names = training_metrics("questions")

    def __init__(self, config: Any, data_available: bool = True, run_dir: str | os.PathLike = ""):
        super().__init__(config, data_available, run_dir)
        self.example |= {"weights": jax.ShapeDtypeStruct((config.data.length,), jnp.float32)}
        self.lost_text: dict[tuple[str, int], RoundTripLoss] = {}
        if data_available:
            self.end = qa.answer_end_id(self.tokenizer)

    @classmethod
    def training_metrics(cls, config: Any) -> tuple[str, ...]:
        """Returns the loss and the scores that fit the answers of the data set."""
        return ("loss", *answer_metrics(config.data.name))

    @functools.cache  # noqa: B019  a process has few tasks
    def questions(self, split: str, length: int, max_bare_length: int = 0) -> qa.QASource:
        """Returns the questions of a split at a length, in tokens.

        Args:
          split: name of the split.
          length: length of the prompts with their answers.
          max_bare_length: see `data.qa.qa_source`.

        Raises:
          InputError: the data cannot be read, no question fits, or the tokenizer loses text.
        """
        data, source = self.config.data, self._source(split, length, max_bare_length)
        sample = np.unique(np.linspace(0, len(source) - 1, ROUND_TRIP_SAMPLE).astype(int)).tolist()
        trip = RoundTrip(self.tokenizer, len(sample))
        for record in map(source.__getitem__, sample):
            trip.add(" ".join([record["input"], *record["outputs"]]).encode())
        check_round_trip(trip.loss, self.tokenizer, data.lossy_tokenizer)
        self.lost_text[split, length] = trip.loss
        return source

    def _source(self, split: str, length: int, max_bare_length: int = 0) -> qa.QASource:
        data = self.config.data
        if data.name == RETRIEVAL:
            return RetrievalQuestions(
                split,
                tokenizer=self.tokenizer,
                length=length,
                probe=data.probe,
                depths=data.depths,
                instructions=data.instructions,
                seed=self.config.seed,
            )
        return qa.qa_source(
            data.name,
            split=split,
            tokenizer=self.tokenizer,
            length=length,
            paths=data.paths,
            cache_dir=data.cache_dir,
            seed=self.config.seed,
            progress=is_main_process(),
            options=registry.get(data.name).options_of(data),
            max_bare_length=max_bare_length,
        )

    def describe(self) -> str:
        """Returns a description of the training data for the log."""
        length = self.config.data.length
        source = self.questions("train", length)
        lines = source.describe()
        end = f"byte {self.end}" if self.tokenizer.name == "bytes" else self._describe_token(self.end)
        lines.append(f"answers end with {end}")
        data = self.config.data
        if data.name == QaJsonl.name and QaJsonl.is_one_file(data.paths):
            lines.append(
                "one file is every split: evaluations ask the questions that training reads (a folder with train.jsonl, "
                "validation.jsonl and test.jsonl has others)"
            )
        every = max(1, len(source) // ANSWER_SAMPLE)
        sample = [accepted for _, _, accepted in itertools.islice(source.questions(), 0, None, every)]
        if cut := self._count_cut_off(sample):
            lines.append(
                f"{cut} of {len(sample)} sampled answers take more than eval.new_tokens={self.config.eval.new_tokens} "
                "tokens: an evaluation cuts such answers off"
            )
        lines += self._describe_lost_text(self.lost_text["train", length])
        return "\n  ".join([f"{self.config.batch_size} questions to a batch", *lines])

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the fingerprint of a split's questions, and their number. Raises: InputError: the data cannot be read."""
        source = self._source(split, ANY_LENGTH)
        return {"questions": source.num_questions, "fingerprint": source.content_fingerprint}

    def train_loader(self, rows: Sequence[int]) -> loader.TrainLoader:
        """Returns the training batches; this process reads the given rows of each."""
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
        """Returns the positions of a window and of an answer after it; of the window alone if its length changes its signal."""
        return (eval_size[0] + (0 if self.config.encoding.window_dependence else self.config.eval.new_tokens),)

    def check_eval_size(self, eval_size: tuple[int], split: str) -> None:
        """Raises InputError if no question fits into the length, or there are too few positions."""
        (length,) = eval_size
        check_positions(self.config, *self.positions_at(eval_size), "evaluation length with its answer")
        self._evaluated_questions(split, length)

    def sample_tokens(self, eval_size: tuple[int], split: str) -> np.ndarray:
        """Returns the first prompt that an evaluation of a split asks at a length, int32[n]."""
        source = self._evaluated_questions(split, eval_size[0])
        return qa.prompt_tokens(source[0], self.tokenizer)[: eval_size[0]]

    def _evaluated_questions(self, split: str, length: int) -> qa.QASource:
        """Returns the questions that are asked at a length: at every length those that fit into the shortest."""
        return self.questions(split, length, min(length, *(shortest for (shortest,) in self.eval_sizes())))

    def evaluate(self, ctx: EvalContext, eval_size: tuple[int], split: str) -> dict[str, Any]:
        """Generates and scores the answers at one length.

        If the position signal depends on the window's length, answers are generated under the signal of the evaluated length,
        which the loss is computed with too, and end with that window, which holds each accepted answer and its end.

        Returns:
          {"length", "examples", "cut_off": number of questions none of whose answers fits into eval.new_tokens, the scores
          of `answer_metrics` in percent, "loss": nats per token of the answers and their ends, "answer_perplexity", "depth":
          the scores by depth of the passage, "distance": the scores by distance of the answer in tokens, "answers":
          (records, hypotheses)}.
        """
        (length,), source = eval_size, self._evaluated_questions(split, eval_size[0])
        count = min(len(source), self.config.eval.examples or len(source))
        records = [source[index] for index in range(count)]
        hypotheses = self._generate_answers(ctx, records, length)
        loss = self._answer_loss(ctx, source, count, length)
        metrics = answer_metrics(self.config.data.name)
        if ctx.write_prediction is not None:
            for line, record in zip(answer_lines(records, hypotheses, metrics), records, strict=True):
                ctx.write_prediction({"length": length, **line, "prompt": record["input"]})
        scores = score_answers(
            records,
            hypotheses,
            metrics=metrics,
            distances=answer_distances(records, lambda text: len(self.tokenizer.encode(text.encode()))),
        )
        return {
            "length": length,
            "cut_off": self._count_cut_off([record["outputs"] for record in records]),
            **scores,
            "loss": loss,
            "answer_perplexity": bounded_exp(loss),
            "answers": (records, hypotheses),
        }

    def _generate_answers(self, ctx: EvalContext, records: Sequence[dict[str, Any]], length: int) -> list[str]:
        """Returns the generated answer of each record; half of the evaluation's work, by the progress that it reports."""
        count, depends_on_window = len(records), bool(self.config.encoding.window_dependence)
        prompts = [qa.prompt_tokens(record, self.tokenizer) for record in records]
        generations = ctx.generate(
            prompts,
            Sampling(self.config.eval.new_tokens, end=self.end),
            self.known_V,
            window=max(length, self.config.data.length) if depends_on_window else None,
            cut=depends_on_window,
            progress=lambda done, total: ctx.progress(done * count // total, 2 * count),
        )
        pairs = zip(prompts, generations, strict=True)
        return [self.decode_continuation(prompt, generation.content).strip() for prompt, generation in pairs]

    def extra_evaluators(self) -> tuple[Evaluator, ...]:
        """Returns none: questions have no tokens that could be scored under every context."""
        return ()

    def no_context_baseline(self, split: str) -> dict[str, Any]:
        """Returns the scores of answers that are guessed without the context."""
        length = self.config.data.length
        train, heldout = self.questions("train", length), self.questions(split, length)
        return no_context_baseline(train.questions(), heldout.questions(), answer_metrics(self.config.data.name))

    def _count_cut_off(self, accepted: Iterable[Sequence[str]]) -> int:
        """Returns the number of questions none of whose accepted answers fits into eval.new_tokens."""

        def num_tokens(answer: str) -> int:
            return len(self.tokenizer.encode(qa.answer_text(answer)))

        return sum(min(map(num_tokens, answers)) > self.config.eval.new_tokens for answers in accepted)

    def _answer_loss(self, ctx: EvalContext, source: qa.QASource, count: int, length: int) -> float:
        """Returns the mean loss of the tokens of the first accepted answers, in nats."""

        def example(record: dict[str, Any]) -> dict[str, np.ndarray]:
            made = qa.training_example(record, tokenizer=self.tokenizer, length=length)
            return {"tokens": made["tokens"], "counted": made["weights"]}

        total = weight = 0.0
        for number, batch in enumerate(loader.EvalBatches(source, ctx.batch_size, count, example), 1):
            losses_BL = np.asarray(ctx.eval_step(ctx.put({"tokens": batch["tokens"]}))["loss"], np.float64)
            counted_BL = batch["counted"] * batch["weights"][:, None]
            total += float((losses_BL * counted_BL).sum())
            weight += float(counted_BL.sum())
            ctx.progress(count + min(number * ctx.batch_size, count), 2 * count)
        return total / weight
