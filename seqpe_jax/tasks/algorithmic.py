"""Algorithmic tasks: outputs of strings, trained on short inputs and scored at every length up to those of the config."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import Config, check_length, check_random_positions
from seqpe_jax.data import loader
from seqpe_jax.data.datasets.algorithmic import Algorithmic, HeldOutExamples, TrainingExamples, describe
from seqpe_jax.losses.task import OutputLoss
from seqpe_jax.metric_registry import training_metrics
from seqpe_jax.run_dir import Fingerprint
from seqpe_jax.tasks.base import EvalContext, Evaluator
from seqpe_jax.tasks.language_modeling import LanguageModeling

EXAMPLES = 512  # of each evaluation length, as the authors' 512 of each
INPUTS = ("tokens", "targets", "padding")  # arrays of a batch that the model reads


class AlgorithmicSequences(LanguageModeling):
    """An algorithmic task of `data.datasets.algorithmic`, whose symbols are bytes.

    Attributes:
      examples: the task.
    """

    kind = "algorithmic"
    has_predictions = False
    metric_names = training_metrics("sequences")

    def __init__(self, config: Config, data_available: bool = True, run_dir: str | os.PathLike = ""):
        super().__init__(config, data_available, run_dir)
        self.task_loss = OutputLoss()
        self.examples = Algorithmic(config.data.task, config.data.form, config.seed)
        (window,) = config.grid
        types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        if not config.is_causal:
            types["padding"] = jnp.bool_
        self.example = {name: jax.ShapeDtypeStruct((window,), dtype) for name, dtype in types.items()}
        self.count_per_step = config.batch_size * window

    def describe(self) -> str:
        """Returns a description of the training data for the log."""
        data = self.config.data
        lines = [
            f"{data.task}, inputs of length 1 to {data.length} in windows of {self.config.grid[0]}, {self.config.batch_size} to a batch",
            f"for example {describe(self.examples, min(data.length, 8))}",
        ]
        return "\n  ".join(lines)

    def fingerprint(self, split: str) -> Fingerprint:
        """Returns the fingerprint of a split's examples, of which there is no end."""
        return {"fingerprint": self.examples.fingerprint(split)}

    def train_loader(self, rows: Sequence[int]) -> loader.TrainLoader:
        """Returns the training batches; this process reads the given rows of each."""
        config = self.config
        return loader.TrainLoader(
            TrainingExamples(self.examples, config.data.length),
            batch_size=config.batch_size,
            seed=config.seed,
            rows=rows,
            threads=config.data.threads,
        )

    def grid_of(self, eval_size: tuple[int]) -> tuple[int]:
        """Returns the tokens of a window for inputs of up to a length, with their outputs."""
        return (self.config.window_of(*eval_size),)

    def check_eval_size(self, eval_size: tuple[int], split: str) -> None:
        """Raises InputError if there are too few positions."""
        check_length(self.config, *eval_size, "evaluation length")
        if self.config.eval.positions == "random":
            check_random_positions(self.config, *self.grid_of(eval_size))

    def lengths_of(self, eval_size: tuple[int]) -> range:
        """Returns the lengths of inputs of an evaluation: those above the next smaller evaluation length."""
        (longest,) = eval_size
        return range(1 + max((length for (length,) in self.eval_sizes() if length < longest), default=0), longest + 1)

    def evaluate(self, ctx: EvalContext, eval_size: tuple[int], split: str) -> dict[str, Any]:
        """Scores the outputs of inputs of each length up to one, from above the next smaller one of eval.lengths.

        In the decoder's form each output is predicted from the right ones before it. All of them are right just where greedy
        generation gives them: exact matches are those of generated outputs.

        Returns:
          {"length", "examples", "accuracy": percent of the outputs, "exact_match": percent of the inputs, "loss": nats per
          output, "by_length": {"length", "examples", "accuracy", "exact_match"}}; the first three are means over lengths,
          as the authors' score.
        """
        lengths, devices = self.lengths_of(eval_size), jax.device_count()
        count = max(self.config.eval.examples or EXAMPLES, len(lengths))
        rows = min(ctx.batch_size, math.ceil(count / devices) * devices)
        source = HeldOutExamples(self.examples, split, lengths, count)
        sums_N5 = np.zeros((len(lengths), 5))
        for number, batch in enumerate(loader.EvalBatches(source, rows, count), 1):
            found = ctx.eval_step(ctx.put({name: batch[name] for name in INPUTS if name in batch}))
            right_BL, losses_BL = np.asarray(found["right"]), np.asarray(found["loss"], np.float64)
            scored_BL, real_B = batch["scored"], batch["weights"] > 0
            columns = (
                np.ones(len(right_BL)),
                scored_BL.sum(axis=1),
                (right_BL & scored_BL).sum(axis=1),
                (right_BL | ~batch["required"]).all(axis=1),
                (losses_BL * scored_BL).sum(axis=1),
            )
            np.add.at(sums_N5, batch["length"][real_B] - lengths[0], np.stack(columns, axis=1)[real_B])
            ctx.progress(min(number * rows, count), count)
        return {"length": eval_size[0], "examples": count, **_means(lengths, sums_N5)}

    def sample_tokens(self, eval_size: tuple[int], split: str) -> np.ndarray:
        """Returns the first example of the largest length, int32[n]."""
        example = self.examples.example(split, eval_size[0], 0, *self.grid_of(eval_size))
        return example["tokens"]

    def extra_evaluators(self) -> tuple[Evaluator, ...]:
        """Returns none: contexts are those of the task."""
        return ()


def _means(lengths: range, sums_N5: np.ndarray) -> dict[str, Any]:
    """Returns scores by length and their means over lengths; sums of examples, outputs, right ones, exact matches and losses."""
    examples_N, outputs_N, right_N, exact_N, losses_N = sums_N5.T
    accuracy_N, exact_match_N = 100 * right_N / outputs_N, 100 * exact_N / examples_N
    return {
        "loss": float((losses_N / outputs_N).mean()),
        "accuracy": float(accuracy_N.mean()),
        "exact_match": float(exact_match_N.mean()),
        "by_length": {
            "length": list(lengths),
            "examples": examples_N.astype(int).tolist(),
            "accuracy": accuracy_N.tolist(),
            "exact_match": exact_match_N.tolist(),
        },
    }
