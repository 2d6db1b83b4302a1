"""What all tasks have in common, and how any of them is evaluated at a length or size."""

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import jax

from seqpe_jax.axes import size_label
from seqpe_jax.config import Config
from seqpe_jax.data.loader import TrainLoader
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.inference.compiled import CompiledModel, Progress, no_progress
from seqpe_jax.inference.generate import generate
from seqpe_jax.losses.task import ClassificationLoss, NextTokenLoss
from seqpe_jax.models.build import DataSpec, Params, Shape


@dataclasses.dataclass(frozen=True)
class ExportSignature:
    """Input and output of an exported logits function.

    Attributes:
      name: of the input.
      dtype: of the input.
      shape: of the input, numbers and expressions such as "2*rows"; the first is "batch".
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
    """A model as evaluation asks it: one scale, one set of parameters.

    Attributes:
      examine: a laid-out batch -> what the criterion tells of each example.
      generate: of a task that asks questions, (prompts, sampling, known_V, progress=...) -> generations.
      put: lays a host batch out over the devices; batch: examples handled at once.
      progress: called with what is done, and how much there is.
    """

    eval_step: Callable[[dict[str, Any]], dict[str, jax.Array]]
    generate: Callable[..., Any]
    put: Callable[[dict[str, Any]], dict[str, jax.Array]]
    batch: int
    progress: Progress = no_progress


class Evaluator(Protocol):
    """What `evaluate_at` evaluates at one scale after another: a task, or a further measure of its data.

    Attributes:
      size_name: what a result calls an evaluation size.
      measured: the metrics of a result that are printed.
      config, criterion: as in `Task`.
    """

    size_name: str
    metric_names: tuple[str, ...]
    config: Config
    task_loss: NextTokenLoss | ClassificationLoss

    def eval_sizes(self) -> tuple[Shape, ...]:
        """Returns the scales that the config evaluates."""

    def grid_of(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis of an example of a scale."""

    def positions_at(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis that evaluating a scale needs, with those of what is generated."""

    def check_eval_size(self, eval_size: Shape, split: str) -> None:
        """Refuses a scale that cannot be evaluated. Raises: InputError."""

    def evaluate(self, ctx: EvalContext, eval_size: Shape, split: str) -> dict[str, Any]:
        """Returns the result of one scale."""


class Task(abc.ABC):
    """The data of a config, opened when something of them is first asked for.

    Attributes:
      kind: its name in results; count_name: what a training step counts.
      size_name: what a result calls an evaluation size.
      measured: what is reported while training, of any data (`metrics`: of a config's).
      config, criterion: what the model is trained for; sizes: what the model takes from the data.
      example: shape and type of each array of a training example; count_per_step: `count_name`s that one step reads.
    """

    kind: ClassVar[str]
    count_name: ClassVar[str]
    size_name: ClassVar[str]
    metric_names: ClassVar[tuple[str, ...]]

    @classmethod
    def metrics(cls, config: Config) -> tuple[str, ...]:
        """Returns what is reported of a run with this config while it trains."""
        return cls.metric_names

    config: Config
    task_loss: NextTokenLoss | ClassificationLoss
    data_spec: DataSpec
    example: dict[str, jax.ShapeDtypeStruct]
    count_per_step: int

    @abc.abstractmethod
    def __init__(self, config: Config, data_available: bool = True, run_dir: str | os.PathLike = ""):
        """Looks at what the config says of its data, and opens none that the model can do without.

        Args:
          there: whether the data are there to be read; kept: folder of a run whose task it is, "" = a new run's.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns what is trained on, in words."""

    @abc.abstractmethod
    def train_loader(self, rows: Sequence[int]) -> TrainLoader:
        """Returns the training batches, of which this process reads some rows."""

    @abc.abstractmethod
    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the fingerprint of a split and how much it holds: {UNIT: count, "fingerprint": hex digits}.

        Raises:
          InputError: it cannot be read.
        """

    @abc.abstractmethod
    def save_assets(self, workdir: str | os.PathLike) -> None:
        """Puts beside the checkpoints what their numbers mean nothing without: the tokenizer, or the classes' names."""

    @abc.abstractmethod
    def copy_assets(self, folder: str | os.PathLike) -> None:
        """Puts into another folder what lies beside the model already; no data are opened for it."""

    @abc.abstractmethod
    def check_assets(self, workdir: str | os.PathLike) -> None:
        """Refuses to go on with other meanings of the numbers than the run began with. Raises: InputError."""

    @abc.abstractmethod
    def eval_sizes(self) -> tuple[Shape, ...]:
        """Returns the lengths, each as (length,), or sizes that the config evaluates."""

    @abc.abstractmethod
    def grid_of(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis of an example of a scale."""

    def positions_at(self, eval_size: Shape) -> Shape:
        """Returns the positions along each axis that evaluation at a scale needs."""
        return self.grid_of(eval_size)

    @abc.abstractmethod
    def check_eval_size(self, eval_size: Shape, split: str) -> None:
        """Refuses a scale that cannot be evaluated. Raises: InputError."""

    @abc.abstractmethod
    def evaluate(self, ctx: EvalContext, eval_size: Shape, split: str) -> dict[str, Any]:
        """Returns the result of one scale."""

    @abc.abstractmethod
    def export_signature(self, max_grid: Shape) -> ExportSignature:
        """Returns what a model that serves up to `max_grid` positions along each axis reads and returns."""

    def extra_evaluators(self) -> tuple[Evaluator, ...]:
        """Returns what `evaluate` measures beside the task itself."""
        return ()

    def sample_images(self, eval_size: Shape, split: str, count: int) -> tuple[Any, Any] | None:
        """Returns the first images of a split, normalised and in 0..1, or None where there are none."""
        return None

    def no_context_baseline(self, split: str) -> dict[str, Any] | None:
        """Returns what guessing without reading scores, or None where nothing is asked."""
        return None


def check_eval_size(task: Evaluator, max_grid: Shape | None, eval_size: Shape, split: str) -> None:
    """Refuses a scale that needs positions that there are none of, or is more than the split holds.

    Args:
      task: what is evaluated, or a further measure of it.
      max_grid: of an export (`ModelSpec.max_grid`).

    Raises:
      InputError: says so, and how far the positions reach.
    """
    task.check_eval_size(eval_size, split)
    shape = task.positions_at(eval_size)
    if max_grid is None or all(side <= end for side, end in zip(shape, max_grid, strict=True)):
        return
    sides = task.config.model.patch or (1,)
    end = "x".join(str(count * side) for count, side in zip(max_grid, sides, strict=True))
    option = "size" if task.config.is_image else "length"
    again = f"--max-{option}={max(eval_size[-2:] if len(eval_size) > 1 else shape)}"
    if len(eval_size) == 3 and shape[0] > max_grid[0]:
        again = f"eval.frames={eval_size[0]}"
    raise InputError(
        f"evaluation {task.size_name} {size_label(eval_size)} is beyond the exported range, up to {end}: "
        f"choose less, or export the run again with {again}"
    )


def evaluate_at(
    task: Evaluator,
    compiled: CompiledModel,
    params: Params,
    eval_size: Shape,
    split: str,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Returns a task's result at one scale, (length,) or (height, width); the signal is computed once.

    Args:
      task: what is evaluated, or a further measure of it.

    Raises:
      InputError: as of `check_eval_size`.
    """
    check_eval_size(task, compiled.model_spec.max_grid, eval_size, split)
    shape, parts = task.grid_of(eval_size), layout.batch_shards(compiled.mesh)
    batch = max(1, task.config.eval.batch_tokens // math.prod(shape))
    ctx = EvalContext(
        eval_step=functools.partial(compiled.eval_step(task.task_loss), params, compiled.signal(params, shape)),
        generate=functools.partial(generate, compiled, task.config, params),
        put=functools.partial(layout.from_full_batch, compiled.mesh),
        batch=-(-batch // parts) * parts,
        progress=progress,
    )
    return task.evaluate(ctx, eval_size, split)
