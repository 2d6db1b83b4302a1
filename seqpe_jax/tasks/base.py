"""Base of all tasks (data, loss, evaluation of a run), and the evaluation of a task at one length or size."""

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from seqpe_jax.axes import size_label
from seqpe_jax.config import Config
from seqpe_jax.data.loader import TrainLoader
from seqpe_jax.distributed import sharding
from seqpe_jax.errors import InputError
from seqpe_jax.inference.compiled import CompiledModel, Progress, no_progress
from seqpe_jax.inference.generate import generate
from seqpe_jax.losses.task import ClassificationLoss, NextTokenLoss
from seqpe_jax.models.build import DataSpec, ModelSpec, Params, Shape
from seqpe_jax.positions import sampling
from seqpe_jax.run_dir import Fingerprint
from seqpe_jax.tasks.predictions import WriteRecord

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class ExportSignature:
    """Input and output of an exported logits function.

    Attributes:
      name: name of the input.
      dtype: dtype of the input.
      shape: shape of the input, numbers and expressions such as "2*rows"; the first is "batch".
      limits: the largest value of each letter in `shape` except the batch; all start at 1.
      output: shape of the logits, float32.
      example: a Python expression that makes an input with NumPy.
      meaning: description of the input's values.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    limits: dict[str, int]
    output: tuple[str, ...]
    example: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """A model with its parameters at one evaluation size.

    Attributes:
      eval_step: a batch on the devices -> what the task's loss measures of each example.
      generate: (prompts, sampling, known_V, progress=...) -> generations; for tasks that generate answers.
      put: lays a host batch out over the devices.
      batch_size: examples of a batch.
      progress: called with the number of examples done, and of all.
      local_rows: number of rows of a batch -> indices of those that this process reads, if it does not read all.
      put_local_rows: lays out a batch of which this process has `local_rows`.
      write_prediction: called with a record of each example (`tasks.predictions`); None = nobody asks for them.
    """

    eval_step: Callable[[dict[str, Any]], dict[str, jax.Array]]
    generate: Callable[..., Any]
    put: Callable[[dict[str, Any]], dict[str, jax.Array]]
    batch_size: int
    progress: Progress = no_progress
    local_rows: Callable[[int], Sequence[int]] = range
    put_local_rows: Callable[[dict[str, Any]], dict[str, jax.Array]] | None = None
    write_prediction: WriteRecord | None = None


class Evaluator(Protocol):
    """Measures a model on a split at several evaluation sizes; a task is one.

    Attributes:
      size_name: key of the evaluation size in results: "length", "size" or "context".
      metric_names: metrics of a result that are printed.
      config: config of the run.
      task_loss: loss that the model is trained with.
    """

    size_name: str
    metric_names: tuple[str, ...]
    config: Config
    task_loss: NextTokenLoss | ClassificationLoss

    def eval_sizes(self) -> tuple[Shape, ...]:
        """Returns the evaluation sizes of the config."""

    def grid_of(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis of an example of this size."""

    def positions_at(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis that an evaluation needs, generated tokens included."""

    def check_eval_size(self, eval_size: Shape, split: str) -> None:
        """Raises InputError if the size cannot be evaluated on the split."""

    def evaluate(self, ctx: EvalContext, eval_size: Shape, split: str) -> dict[str, Any]:
        """Returns the result at one size."""


class Task(abc.ABC):
    """Data, loss and evaluation of a run; data are opened when they are first read.

    Attributes:
      kind: name of the task in results.
      count_name: unit of throughput, "tokens" or "images".
      size_name: key of the evaluation size in results.
      metric_names: metrics that evaluations during training report, over all data sets of the task.
      has_predictions: an evaluation writes what the model answers for each example (`EvalContext.write_prediction`).
      config: config of the run.
      task_loss: loss that the model is trained with.
      data_spec: data spec (vocabulary size, classes, channels).
      example: shape and dtype of each array of a training example.
      count_per_step: tokens or images of a training step.
      new_classes: the classes are others than those of the model that the run begins with (config.init_from).
    """

    kind: ClassVar[str]
    count_name: ClassVar[str]
    size_name: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]]
    has_predictions: ClassVar[bool] = True

    @classmethod
    def training_metrics(cls, config: Config) -> tuple[str, ...]:
        """Returns the metrics that evaluations during training report with this config."""
        return cls.metric_names

    config: Config
    task_loss: NextTokenLoss | ClassificationLoss
    data_spec: DataSpec
    example: dict[str, jax.ShapeDtypeStruct]
    count_per_step: int
    new_classes: bool = False

    @abc.abstractmethod
    def __init__(self, config: Config, data_available: bool = True, run_dir: str | os.PathLike = ""):
        """Reads the data section of the config, and opens them only if the model depends on their content.

        Args:
          config: config of the run.
          data_available: whether the data can be read on this machine.
          run_dir: folder of the run that the model comes from; "" = a new run.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns a description of the training data for the log."""

    @abc.abstractmethod
    def train_loader(self, rows: Sequence[int]) -> TrainLoader:
        """Returns the training batches; this process reads the given rows of each."""

    @abc.abstractmethod
    def fingerprint(self, split: str) -> Fingerprint:
        """Returns the fingerprint of a split and its size: {COUNT_NAME: count, "fingerprint": hex digits}.

        Raises:
          InputError: it cannot be read.
        """

    def fingerprints(self, splits: Iterable[str]) -> dict[str, Fingerprint]:
        """Returns the fingerprint of each split. Raises: InputError: one cannot be read."""
        return {split: self.fingerprint(split) for split in splits}

    def available_fingerprints(self) -> dict[str, Fingerprint]:
        """Returns the fingerprint of each split that exists and can be read: not all data have all splits."""
        found = {}
        for split in SPLITS:
            try:
                found[split] = self.fingerprint(split)
            except InputError:  # an evaluation of this split reports why it cannot be read
                continue
        return found

    @abc.abstractmethod
    def save_assets(self, workdir: str | os.PathLike) -> None:
        """Writes the files that token ids or labels need to be understood: the tokenizer, or class names."""

    @abc.abstractmethod
    def copy_assets(self, folder: str | os.PathLike) -> None:
        """Writes the same files, as far as they are known without opening the data."""

    @abc.abstractmethod
    def check_assets(self, workdir: str | os.PathLike) -> None:
        """Raises InputError if the folder's tokenizer or class names are others than this task's."""

    @abc.abstractmethod
    def eval_sizes(self) -> tuple[Shape, ...]:
        """Returns the evaluation sizes of the config: (length,), (height, width) or (frames, height, width)."""

    @abc.abstractmethod
    def grid_of(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis of an example of this size."""

    def positions_at(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis that an evaluation needs."""
        return self.grid_of(eval_size)

    @abc.abstractmethod
    def check_eval_size(self, eval_size: Shape, split: str) -> None:
        """Raises InputError if the size cannot be evaluated on the split."""

    @abc.abstractmethod
    def evaluate(self, ctx: EvalContext, eval_size: Shape, split: str) -> dict[str, Any]:
        """Returns the result at one size."""

    @abc.abstractmethod
    def export_signature(self, max_grid: Shape) -> ExportSignature:
        """Returns the inputs and outputs of an exported model that serves up to `max_grid` positions along each axis."""

    def extra_evaluators(self) -> tuple[Evaluator, ...]:
        """Returns the evaluators that the command `evaluate` runs in addition to the task."""
        return ()

    def sample_images(self, eval_size: Shape, split: str, count: int) -> tuple[Any, Any] | None:
        """Returns some images of a split, normalized and in 0..1; None for other data."""
        return None

    def sample_tokens(self, eval_size: Shape, split: str) -> np.ndarray | None:
        """Returns the first text of a split, int32[n] with at most the tokens of the size; None for other data."""
        return None

    def no_context_baseline(self, split: str) -> dict[str, Any] | None:
        """Returns the scores of answers that are guessed without the context; None if there are no questions."""
        return None


def check_eval_size(evaluator: Evaluator, max_grid: Shape | None, eval_size: Shape, split: str) -> None:
    """Refuses a size that needs positions that the model lacks, or more data than the split holds.

    Args:
      evaluator: a task, or another measure of its data.
      max_grid: positions along each axis that an export serves; None = a model that is no export.
      eval_size: (length,), (height, width) or (frames, height, width).
      split: name of the split.

    Raises:
      InputError: names the largest size possible.
    """
    evaluator.check_eval_size(eval_size, split)
    grid = evaluator.positions_at(eval_size)
    if max_grid is None or all(count <= most for count, most in zip(grid, max_grid, strict=True)):
        return
    patch = evaluator.config.model.patch or (1,)
    largest = "x".join(str(count * side) for count, side in zip(max_grid, patch, strict=True))
    option = "size" if evaluator.config.is_image else "length"
    fix = f"--max-{option}={max(eval_size[-2:] if len(eval_size) > 1 else grid)}"
    if len(eval_size) == 3 and grid[0] > max_grid[0]:
        fix = f"eval.frames={eval_size[0]}"
    raise InputError(
        f"evaluation {evaluator.size_name} {size_label(eval_size)} is beyond the exported range, up to {largest}: "
        f"choose less, or export the run again with {fix}"
    )


def evaluate_at(
    evaluator: Evaluator,
    compiled: CompiledModel,
    params: Params,
    eval_size: Shape,
    split: str,
    progress: Progress = no_progress,
    write_prediction: WriteRecord | None = None,
) -> dict[str, Any]:
    """Evaluates a model at one size; its position signal is computed once.

    Args:
      evaluator: a task, or another measure of its data.
      compiled: the model.
      params: its parameters.
      eval_size: (length,), (height, width) or (frames, height, width).
      split: name of the split.
      progress: called with the number of examples done, and of all.
      write_prediction: see `EvalContext`.

    Returns:
      The result, as the command `evaluate` writes it.

    Raises:
      InputError: the size cannot be evaluated.
    """
    check_eval_size(evaluator, compiled.model_spec.max_grid, eval_size, split)
    grid, shards = evaluator.grid_of(eval_size), sharding.batch_shards(compiled.mesh)
    batch_size = max(1, evaluator.config.eval.batch_tokens // math.prod(grid))
    if evaluator.config.eval.positions == "random":
        signal = compiled.signal_of(params, _random_positions(evaluator.config, compiled.model_spec, grid), grid)
    else:
        signal = compiled.signal(params, grid)
    ctx = EvalContext(
        eval_step=functools.partial(compiled.eval_step(evaluator.task_loss), params, signal),
        generate=functools.partial(generate, compiled, evaluator.config, params),
        put=functools.partial(sharding.from_full_batch, compiled.mesh),
        batch_size=math.ceil(batch_size / shards) * shards,
        progress=progress,
        local_rows=lambda count: sharding.rows_by_process(compiled.mesh, count)[jax.process_index()],
        put_local_rows=functools.partial(sharding.from_local_rows, compiled.mesh),
        write_prediction=write_prediction,
    )
    return evaluator.evaluate(ctx, eval_size, split)


def _random_positions(config: Config, model_spec: ModelSpec, grid: Shape) -> jax.Array:
    """Returns the random positions of an evaluation, int32[1, L, 1], the same at each one of the window's length."""
    resolution = model_spec.position_grid.position_resolution
    return sampling.random_positions(
        jax.random.key(grid[0]),
        num_sets=1,
        shape=grid,
        max_position=model_spec.max_position,
        position_range=(config.objective.skip.range or config.encoding.max_position) * resolution,
        position_resolution=resolution,
    )
