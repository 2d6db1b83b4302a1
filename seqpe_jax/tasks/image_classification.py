"""A run on images or clips: the class of each, augmented examples, top-1 and top-5 at any size."""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.axes import size_label
from seqpe_jax.config import Config, check_size
from seqpe_jax.data import images, loader, registry
from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.errors import InputError
from seqpe_jax.evaluation.classification import accuracy
from seqpe_jax.files import as_path, atomic_write
from seqpe_jax.losses.task import ClassificationLoss
from seqpe_jax.metrics import training_metrics
from seqpe_jax.models.build import DataSpec, Shape
from seqpe_jax.run_dir import CLASS_NAMES_FILE, RunDir
from seqpe_jax.tasks.task import EvalContext, ExportSignature, Task


class ImageClassification(Task):
    """The images of a config; a model that names its classes can be built where they are not.

    Args:
      there: whether the data are there to be read; else the classes of folders must be named.
      kept: folder of a run whose sizes the model has, and whose class names the labels are places in; "" = a new run's,
        in the data's own order.

    Raises:
      InputError: the number of classes is open and the training split cannot be read; the names kept cannot be read, or
        are more than the model's classes.
    """

    kind = "image_classification"
    count_name = "images"
    size_name = "size"
    metric_names = training_metrics("images")

    def __init__(self, config: Config, data_available: bool = True, run_dir: str | os.PathLike = ""):
        self.config = config
        self._names, self._owner = RunDir(run_dir).class_names if run_dir else None, run_dir
        self.data_spec = known_data_spec(config, run_dir)
        if not self.data_spec.classes and not data_available:
            raise InputError(
                f"data.name='{config.data.name}' has as many classes as its files say: name their number as model.classes"
            )
        if not self.data_spec.classes:
            self.data_spec = dataclasses.replace(self.data_spec, classes=self.source("train").classes)
        self.task_loss = ClassificationLoss(config.objective.label_smoothing, config.objective.mixing)
        self.example = {
            "images": jax.ShapeDtypeStruct((*config.data.size, self.data_spec.channels), jnp.float32),
            "labels": jax.ShapeDtypeStruct((), jnp.int32),
        }
        self.count_per_step = config.batch_size

    @functools.cache  # noqa: B019  a run has one of these
    def source(self, split: str) -> Any:
        """Returns the images of a split, with the labels of the run.

        Raises:
          InputError: as `data.pictures.image_source`; a class that the run does not know, other channels or more classes
            than the model's.
        """
        data, data_spec = self.config.data, self.data_spec
        found = images.image_source(
            data.name,
            split=split,
            paths=data.paths,
            cache_dir=data.cache_dir,
            progress=is_main_process(),
            bit_depth=data.bit_depth,
        )
        if found.channels != data_spec.channels:
            raise InputError(
                f"{data.name} has images of {found.channels} channel(s), but the model reads {data_spec.channels}: evaluate it "
                "on images like those that it was trained on"
            )
        if self._names is not None:
            return found.relabel(self._names, f"the run of {self._owner}")
        if self._owner and not self.config.model.classes and found.classes != data_spec.classes > 0:
            raise InputError(
                f"{data.name} has {found.classes} classes, and the run of {self._owner} {data_spec.classes}, but it does not "
                f"say which: put back its {CLASS_NAMES_FILE}"
            )
        if 0 < data_spec.classes < found.classes:
            raise InputError(
                f"{data.name} has {found.classes} classes, but the model only {data_spec.classes} (model.classes)"
            )
        return found

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels. Raises: InputError as `source`."""
        return self._names or self.source("train").class_names

    def describe(self) -> str:
        """Returns what is trained on, in words."""
        source, size = self.source("train"), "x".join(map(str, self.config.data.size))
        return f"{len(source):,} training examples of {source.classes} classes, {size}, {self.config.batch_size} to a batch"

    def train_loader(self, rows: Sequence[int]) -> loader.TrainLoader:
        """Returns the training batches, of which this process reads some rows."""
        config, source = self.config, self.source("train")

        def example(record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
            return images.train_example(
                record, config.data.size, config.data.augment, rng, mean=self.data_spec.mean, std=self.data_spec.std
            )

        return loader.TrainLoader(
            source,
            batch_size=config.batch_size,
            seed=config.seed,
            example=example,
            rows=rows,
            threads=config.data.threads,
        )

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the fingerprint of a split's images, and their number. Raises: InputError as `source`."""
        source = self.source(split)
        return {"images": len(source), "fingerprint": source.fingerprint}

    def save_assets(self, workdir: str | os.PathLike) -> None:
        """Puts the class names beside the checkpoints: without them, labels are numbers that mean nothing elsewhere."""
        path = as_path(workdir) / CLASS_NAMES_FILE
        if not path.exists():
            atomic_write(path, json.dumps(self.class_names, indent=0) + "\n")

    def copy_assets(self, folder: str | os.PathLike) -> None:
        """Puts the class names into another folder, where they are known without the data."""
        if self._names is not None:
            self.save_assets(folder)

    def check_assets(self, workdir: str | os.PathLike) -> None:
        """Refuses to go on with other classes, or another order of them, than the run began with. Raises: InputError."""
        names = RunDir(workdir).class_names
        if names is not None and names != self.class_names:
            pairs = itertools.zip_longest(self.class_names, names, fillvalue="no class")
            label, (ours, theirs) = next((label, pair) for label, pair in enumerate(pairs) if pair[0] != pair[1])
            raise InputError(
                f"label {label} is '{ours}' in the data, but '{theirs}' in the run of {workdir} (its {CLASS_NAMES_FILE}): use data "
                "with its classes, or a new --workdir"
            )

    def eval_sizes(self) -> tuple[Shape, ...]:
        """Returns the sizes that the config evaluates, each as (height, width), or (frames, height, width) of clips."""
        return self.config.eval_sizes

    def grid_of(self, eval_size: Shape) -> Shape:
        """Returns the patches along each axis of an example of a size."""
        return self.config.grid_of(self.config.sides_of(eval_size))

    def export_signature(self, max_grid: tuple[int, ...]) -> ExportSignature:
        """Returns what a model that serves grids of patches up to `max_grid` reads and returns."""
        data_spec, patch = self.data_spec, self.config.model.patch
        letters = ("frames", "rows", "columns")[-len(patch) :]
        if patch[0] > 1 and len(patch) == 3:
            letters = ("steps", *letters[1:])  # of time: several frames make one
        shape = (
            "batch",
            *(f"{part}*{letter}" for part, letter in zip(patch, letters, strict=True)),
            str(data_spec.channels),
        )
        sides = (min(side, end * part) for side, end, part in zip(self.config.data.size, max_grid, patch, strict=True))
        mean, std = (", ".join(f"{value:.9g}" for value in values) for values in (data_spec.mean, data_spec.std))
        classes = str(data_spec.classes)
        return ExportSignature(
            "images",
            "float32",
            shape,
            dict(zip(letters, max_grid, strict=True)),
            ("batch", classes),
            f"numpy.zeros((1, {', '.join(map(str, sides))}, {data_spec.channels}), 'float32')",
            f"pixels in 0 to 1, then minus ({mean}) and divided by ({std}) for each channel; the logits are those of the "
            f"classes in {CLASS_NAMES_FILE}, in its order",
        )

    def check_eval_size(self, eval_size: Shape, split: str) -> None:
        """Refuses a size that cannot be evaluated. Raises: InputError."""
        check_size(self.config, eval_size, "evaluation size")
        source = self.source(split)
        if len(eval_size) == 3 and eval_size[0] > (there := len(source[0]["image"])):
            label = size_label(eval_size)
            raise InputError(
                f"evaluation size {label} has {eval_size[0]} frames, but the clips have {there}: name fewer"
            )

    def evaluate(self, ctx: EvalContext, eval_size: Shape, split: str) -> dict[str, Any]:
        """Returns the result of one size (see `evaluation.classification`)."""
        source = self.source(split)
        batch = min(ctx.batch, -(-len(source) // jax.device_count()) * jax.device_count())
        batches = loader.EvalBatches(source, batch, len(source), self._example(eval_size))
        return accuracy(
            ctx.eval_step, batches, size=eval_size, put=ctx.put, progress=lambda done: ctx.progress(done, len(source))
        )

    def sample_images(self, eval_size: Shape, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first images of a split at a size, float32[count, sides..., C]: normalised, and in 0..1."""
        source, example = self.source(split), self._example(eval_size)
        chosen = np.linspace(0, len(source) - 1, count).astype(int)
        found = np.stack([example(source[int(index)])["images"] for index in chosen])
        shown = found * np.asarray(self.data_spec.std, np.float32) + np.asarray(self.data_spec.mean, np.float32)
        return found, np.clip(shown, 0.0, 1.0)

    def _example(self, eval_size: Shape) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
        return functools.partial(
            images.eval_example,
            size=self.config.sides_of(eval_size),
            crop_ratio=self.config.data.crop_ratio,
            mean=self.data_spec.mean,
            std=self.data_spec.std,
        )


def known_data_spec(config: Config, run_dir: str | os.PathLike = "") -> DataSpec:
    """Returns what a model takes from images, as far as it is known without them; classes = 0 where it is not.

    Args:
      kept: folder of a run: the sizes that it keeps, whatever is read now, else as many classes as it has names of.

    Raises:
      InputError: the config has fewer classes than the run has names of.
    """
    stored, dataset = RunDir(run_dir).data_spec if run_dir else None, registry.get(config.data.name)
    names = RunDir(run_dir).class_names if run_dir else None
    classes = config.model.classes or (stored.classes if stored else 0)
    if names is not None and 0 < classes < len(names):
        raise InputError(
            f"model.classes={classes} is less than the {len(names)} classes of the run of {run_dir} (its {CLASS_NAMES_FILE}): set it to "
            f"{len(names)} or more"
        )
    classes = classes or len(names or ()) or dataset.num_classes
    if stored is not None:
        return dataclasses.replace(stored, classes=classes)
    return DataSpec(classes=classes, channels=dataset.channels, mean=dataset.mean, std=dataset.std)
