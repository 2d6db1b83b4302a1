"""What all tasks have in common, and how any of them is evaluated at a length or size."""

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import jax

from seqpe_jax.axes import scale_label
from seqpe_jax.config import Config
from seqpe_jax.data.loader import TrainLoader
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.inference.compiled import Programs, Progress, silent
from seqpe_jax.inference.exported import Signature
from seqpe_jax.inference.generate import generate
from seqpe_jax.losses.task import ClassificationLoss, NextTokenLoss
from seqpe_jax.models.build import Params, Shape, Sizes


@dataclasses.dataclass(frozen=True)
class Asked:
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
    progress: Progress = silent


class Measure(Protocol):
    """What `evaluate_at` evaluates at one scale after another: a task, or a further measure of its data.

    Attributes:
      scale_field: what a result calls a scale.
      measured: the metrics of a result that are printed.
      config, criterion: as in `Task`.
    """

    scale_field: str
    measured: tuple[str, ...]
    config: Config
    task_loss: NextTokenLoss | ClassificationLoss

    def scales(self) -> tuple[Shape, ...]:
        """Returns the scales that the config evaluates."""

    def grid_of(self, scale: Shape) -> Shape:
        """Returns the positions along each axis of an example of a scale."""

    def positions_at(self, scale: Shape) -> Shape:
        """Returns the positions along each axis that evaluating a scale needs, with those of what is generated."""

    def check_scale(self, scale: Shape, split: str) -> None:
        """Refuses a scale that cannot be evaluated. Raises: InputError."""

    def evaluate(self, asked: Asked, scale: Shape, split: str) -> dict[str, Any]:
        """Returns the result of one scale."""


class Task(abc.ABC):
    """The data of a config, opened when something of them is first asked for.

    Attributes:
      kind: its name in results; unit: what a training step counts.
      option: the flag of `evaluate` that names its scales; scale_field: what a result calls a scale.
      measured: what is reported while training, of any data (`metrics`: of a config's).
      config, criterion: what the model is trained for; sizes: what the model takes from the data.
      example: shape and type of each array of a training example; units_per_step: `unit`s that one step reads.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    option: ClassVar[str]
    scale_field: ClassVar[str]
    measured: ClassVar[tuple[str, ...]]

    @classmethod
    def metrics(cls, config: Config) -> tuple[str, ...]:
        """Returns what is reported of a run with this config while it trains."""
        return cls.measured

    config: Config
    task_loss: NextTokenLoss | ClassificationLoss
    sizes: Sizes
    example: dict[str, jax.ShapeDtypeStruct]
    units_per_step: int

    @abc.abstractmethod
    def __init__(self, config: Config, there: bool = True, kept: str | os.PathLike = ""):
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
    def keep(self, workdir: str | os.PathLike) -> None:
        """Puts beside the checkpoints what their numbers mean nothing without: the tokenizer, or the classes' names."""

    @abc.abstractmethod
    def carry(self, folder: str | os.PathLike) -> None:
        """Puts into another folder what lies beside the model already; no data are opened for it."""

    @abc.abstractmethod
    def check_kept(self, workdir: str | os.PathLike) -> None:
        """Refuses to go on with other meanings of the numbers than the run began with. Raises: InputError."""

    @abc.abstractmethod
    def scales(self) -> tuple[Shape, ...]:
        """Returns the lengths, each as (length,), or sizes that the config evaluates."""

    @abc.abstractmethod
    def grid_of(self, scale: Shape) -> Shape:
        """Returns the positions along each axis of an example of a scale."""

    def positions_at(self, scale: Shape) -> Shape:
        """Returns the positions along each axis that evaluation at a scale needs."""
        return self.grid_of(scale)

    @abc.abstractmethod
    def check_scale(self, scale: Shape, split: str) -> None:
        """Refuses a scale that cannot be evaluated. Raises: InputError."""

    @abc.abstractmethod
    def evaluate(self, asked: Asked, scale: Shape, split: str) -> dict[str, Any]:
        """Returns the result of one scale."""

    @abc.abstractmethod
    def served(self, reach: Shape) -> Signature:
        """Returns what a model that serves up to `reach` positions along each axis reads and returns."""

    def further_measures(self) -> tuple[Measure, ...]:
        """Returns what `evaluate` measures beside the task itself."""
        return ()

    def pictures(self, scale: Shape, split: str, count: int) -> tuple[Any, Any] | None:
        """Returns the first images of a split, normalised and in 0..1, or None where there are none."""
        return None

    def without_context(self, split: str) -> dict[str, Any] | None:
        """Returns what guessing without reading scores, or None where nothing is asked."""
        return None


def check_scale(task: Measure, reach: Shape | None, scale: Shape, split: str) -> None:
    """Refuses a scale that needs positions that there are none of, or is more than the split holds.

    Args:
      task: what is evaluated, or a further measure of it.
      reach: of an export (`Architecture.reach`).

    Raises:
      InputError: says so, and how far the positions reach.
    """
    task.check_scale(scale, split)
    shape = task.positions_at(scale)
    if reach is None or all(side <= end for side, end in zip(shape, reach, strict=True)):
        return
    sides = task.config.model.patch or (1,)
    end = "x".join(str(count * side) for count, side in zip(reach, sides, strict=True))
    option = "size" if task.config.reads_images else "length"
    again = f"--max-{option}={max(scale[-2:] if len(scale) > 1 else shape)}"
    if len(scale) == 3 and shape[0] > reach[0]:
        again = f"eval.frames={scale[0]}"
    raise InputError(
        f"evaluation {task.scale_field} {scale_label(scale)} is beyond the exported range, up to {end}: "
        f"choose less, or export the run again with {again}"
    )


def evaluate_at(
    task: Measure, programs: Programs, params: Params, scale: Shape, split: str, progress: Progress = silent
) -> dict[str, Any]:
    """Returns a task's result at one scale, (length,) or (height, width); the signal is computed once.

    Args:
      task: what is evaluated, or a further measure of it.

    Raises:
      InputError: as of `check_scale`.
    """
    check_scale(task, programs.architecture.reach, scale, split)
    shape, parts = task.grid_of(scale), layout.batch_shards(programs.mesh)
    batch = max(1, task.config.eval.batch_tokens // math.prod(shape))
    asked = Asked(
        eval_step=functools.partial(programs.examiner(task.task_loss), params, programs.signal(params, shape)),
        generate=functools.partial(generate, programs, task.config, params),
        put=functools.partial(layout.from_full_batch, programs.mesh),
        batch=-(-batch // parts) * parts,
        progress=progress,
    )
    return task.evaluate(asked, scale, split)
