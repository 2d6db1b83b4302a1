"""Image and video classification: augmented examples, class names, top-1 and top-5 accuracy at any size."""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.axes import size_label
from seqpe_jax.config import Config, ModelConfig, check_size
from seqpe_jax.data import images, loader, registry
from seqpe_jax.data.datasets.image_base import ImageSource
from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_write
from seqpe_jax.losses.task import ClassificationLoss
from seqpe_jax.metric_registry import training_metrics
from seqpe_jax.models.build import DataSpec, Shape
from seqpe_jax.run_dir import CLASS_NAMES_FILE, RunDir
from seqpe_jax.tasks.base import EvalContext, ExportSignature, Task
from seqpe_jax.tasks.metrics import accuracy
from seqpe_jax.tasks.predictions import WriteRecord, class_name, top_classes


class ImageClassification(Task):
    """Classification of the images or videos of a config; a model that names its classes needs no data to be built.

    Args:
      config: config of the run.
      data_available: whether the data can be read; if not, the number of classes must be known.
      run_dir: folder of the run whose data spec the model has, and whose class names give labels their order; "" = a new
        run, in the data's own order. A new run that begins with that run's parameters (config.init_from) has its own classes
        where its data have some that the other run does not know.

    Raises:
      InputError: the number of classes is unknown and the training split cannot be read; the run's class names cannot be
        read, or are more than the model's classes.
    """

    kind = "image_classification"
    count_name = "images"
    size_name = "size"
    metric_names = training_metrics("images")

    def __init__(self, config: Config, data_available: bool = True, run_dir: str | os.PathLike = ""):
        self.config = config
        self._names = RunDir(run_dir).class_names if run_dir else None
        self._run_dir = run_dir
        own_classes = self._own_classes() if data_available and run_dir and str(run_dir) == config.init_from else 0
        if own_classes:
            self._names, self._run_dir, self.new_classes = None, "", True
            pixels = known_data_spec(dataclasses.replace(config, model=ModelConfig()), run_dir)
            self.data_spec = dataclasses.replace(pixels, classes=config.model.classes or own_classes)
        else:
            self.data_spec = known_data_spec(config, run_dir)
        if not self.data_spec.classes and not data_available:
            raise InputError(
                f"data.name='{config.data.name}' takes its classes from its files, which are not read here: set model.classes to their number"
            )
        if not self.data_spec.classes:
            self.data_spec = dataclasses.replace(self.data_spec, classes=self.source("train").classes)
        self.task_loss = ClassificationLoss(
            config.objective.label_smoothing,
            config.objective.mixing,
            self.data_spec.mean,
            self.data_spec.std,
            config.objective.z_loss,
        )
        self.example = {
            "images": jax.ShapeDtypeStruct((*config.data.size, self.data_spec.channels), jnp.uint8),
            "labels": jax.ShapeDtypeStruct((), jnp.int32),
        }
        if config.data.augment.flip:
            self.example["flip"] = jax.ShapeDtypeStruct((), jnp.bool_)
        if config.data.augment.erasing:
            self.example["erase"] = jax.ShapeDtypeStruct((4,), jnp.int32)
        self.count_per_step = config.batch_size

    @functools.cache  # noqa: B019  a process has few tasks
    def source(self, split: str, size: Shape = ()) -> Any:
        """Returns the images of a split, with the labels of the run.

        Args:
          split: name of the split.
          size: (height, width) at which images are drawn, of data sets that draw them; () = that of training.

        Raises:
          InputError: the data cannot be read; they have a class that the run does not know, other channels or more
            classes than the model.
        """
        found, data, data_spec = self._images(split, size), self.config.data, self.data_spec
        if found.channels != data_spec.channels:
            raise InputError(
                f"{data.name} has images of {found.channels} channel(s), but the model reads {data_spec.channels}: evaluate it "
                "on images like those that it was trained on"
            )
        if self._names is not None:
            return found.relabel(self._names, f"the run of {self._run_dir}")
        if self._run_dir and not self.config.model.classes and found.classes != data_spec.classes > 0:
            raise InputError(
                f"{data.name} has {found.classes} classes, and the run of {self._run_dir} {data_spec.classes}, but it does not "
                f"name them: put back its {CLASS_NAMES_FILE}"
            )
        if 0 < data_spec.classes < found.classes:
            raise InputError(
                f"{data.name} has {found.classes} classes, but the model only {data_spec.classes} (model.classes)"
            )
        return found

    @functools.cache  # noqa: B019  as `source`
    def _images(self, split: str, size: Shape = ()) -> Any:
        """The images of a split, with the labels of the data."""
        data = self.config.data
        return images.image_source(
            data.name,
            split=split,
            paths=data.paths,
            cache_dir=data.cache_dir,
            progress=is_main_process(),
            bit_depth=data.bit_depth,
            max_pixels=data.max_pixels,
            prepared=data.prepared,
            size=size or data.size,
        )

    def _own_classes(self) -> int:
        """The number of the data's classes, if the run that this one begins with has others; else 0."""
        found, stored = self._images("train"), RunDir(self._run_dir).data_spec
        if self._names is not None:
            return 0 if set(found.class_names) <= set(self._names) else found.classes
        return found.classes if stored is not None and stored.classes != found.classes else 0

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels. Raises: InputError: the data cannot be read."""
        return self._names or self.source("train").class_names

    def describe(self) -> str:
        """Returns a description of the training data for the log."""
        source, size = self.source("train"), "x".join(map(str, self.config.data.size))
        line = f"{len(source):,} training examples of {source.classes} classes, {size}, {self.config.batch_size} to a batch"
        counts = self._images("train").images_by_class
        if not counts:
            return line
        names = self._images("train").class_names
        fewest, most = (counts.index(extreme(counts)) for extreme in (min, max))
        if counts[fewest] == counts[most]:
            return f"{line}\n  {counts[most]:,} images of each class"
        return (
            f"{line}\n  images of a class: {counts[fewest]:,} ('{names[fewest]}') to {counts[most]:,} ('{names[most]}'), which to "
            f"guess for all is right for {100 * counts[most] / sum(counts):.1f}%"
        )

    def train_loader(self, rows: Sequence[int]) -> loader.TrainLoader:
        """Returns the training batches; this process reads the given rows of each."""
        config = self.config
        # A worker process receives the function; a method would take the task with it.
        example = functools.partial(
            _train_example, size=config.data.size, augment=config.data.augment, mean=self.data_spec.mean
        )
        return loader.TrainLoader(
            self.source("train"),
            batch_size=config.batch_size,
            seed=config.seed,
            example=example,
            rows=rows,
            threads=config.data.threads,
            workers=config.data.workers,
        )

    def fingerprint(self, split: str) -> dict[str, Any]:
        """Returns the fingerprint of a split's images, and their number. Raises: InputError: the data cannot be read."""
        source = self.source(split)
        return {"images": len(source), "fingerprint": source.fingerprint}

    def save_assets(self, workdir: str | os.PathLike) -> None:
        """Writes the class names, which give labels their meaning, into a run's folder."""
        path = as_path(workdir) / CLASS_NAMES_FILE
        if not path.exists():
            atomic_write(path, json.dumps(self.class_names, indent=0) + "\n")

    def copy_assets(self, folder: str | os.PathLike) -> None:
        """Writes the class names into another folder, if they are known without the data."""
        if self._names is not None:
            self.save_assets(folder)

    def check_assets(self, workdir: str | os.PathLike) -> None:
        """Raises InputError if the classes, or their order, are others than the run began with."""
        if self.new_classes and str(workdir) == self.config.init_from:
            return
        names = RunDir(workdir).class_names
        if names is not None and names != self.class_names:
            pairs = itertools.zip_longest(self.class_names, names, fillvalue="no class")
            label, (ours, theirs) = next((label, pair) for label, pair in enumerate(pairs) if pair[0] != pair[1])
            raise InputError(
                f"label {label} is '{ours}' in the data, but '{theirs}' in the run of {workdir} (its {CLASS_NAMES_FILE}): use data "
                "with its classes, or a new --workdir"
            )

    def eval_sizes(self) -> tuple[Shape, ...]:
        """Returns the evaluation sizes of the config: (height, width), or (frames, height, width) of videos."""
        return self.config.eval_sizes

    def grid_of(self, eval_size: Shape) -> Shape:
        """Returns the patches along each axis of an example of this size."""
        return self.config.grid_of(self.config.full_size(eval_size))

    def export_signature(self, max_grid: tuple[int, ...]) -> ExportSignature:
        """Returns the inputs and outputs of an exported model that serves grids of patches up to `max_grid`."""
        data_spec, patch = self.data_spec, self.config.model.patch
        axis_names = ("frames", "rows", "columns")[-len(patch) :]
        if patch[0] > 1 and len(patch) == 3:
            axis_names = ("steps", *axis_names[1:])  # of time: several frames make one
        shape = (
            "batch",
            *(f"{part}*{axis_name}" for part, axis_name in zip(patch, axis_names, strict=True)),
            str(data_spec.channels),
        )
        sides = (min(side, end * part) for side, end, part in zip(self.config.data.size, max_grid, patch, strict=True))
        mean, std = (", ".join(f"{value:.9g}" for value in values) for values in (data_spec.mean, data_spec.std))
        classes = str(data_spec.classes)
        return ExportSignature(
            "images",
            "float32",
            shape,
            dict(zip(axis_names, max_grid, strict=True)),
            ("batch", classes),
            f"numpy.zeros((1, {', '.join(map(str, sides))}, {data_spec.channels}), 'float32')",
            f"pixels in 0 to 1, then minus ({mean}) and divided by ({std}) for each channel; the logits are those of the "
            f"classes in {CLASS_NAMES_FILE}, in its order",
        )

    def check_eval_size(self, eval_size: Shape, split: str) -> None:
        """Raises InputError if the size cannot be evaluated on the split."""
        check_size(self.config, eval_size, "evaluation size")
        source = self.source(split)
        if len(eval_size) == 3 and eval_size[0] > (frames := len(source[0]["image"])):
            label = size_label(eval_size)
            raise InputError(
                f"evaluation size {label} has {eval_size[0]} frames, but the videos have {frames}: name fewer"
            )

    def evaluate(self, ctx: EvalContext, eval_size: Shape, split: str) -> dict[str, Any]:
        """Returns the accuracy at one size."""
        source = self.source(split, eval_size)
        devices = jax.device_count()
        batch_size = min(ctx.batch_size, math.ceil(len(source) / devices) * devices)
        batches = loader.EvalBatches(
            source,
            batch_size,
            len(source),
            self._example(eval_size),
            rows=ctx.local_rows(batch_size),
            threads=self.config.data.threads,
            workers=self.config.data.workers,
        )
        return accuracy(
            ctx.eval_step,
            batches,
            size=eval_size,
            put=ctx.put_local_rows or ctx.put,
            progress=lambda done: ctx.progress(done, len(source)),
            class_names=source.class_names,
            record=functools.partial(_write_classes, ctx.write_prediction, eval_size, source)
            if ctx.write_prediction
            else None,
        )

    def sample_images(self, eval_size: Shape, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns images spread over a split, float32[count, sides..., C]: normalized, and in 0..1."""
        source, example = self.source(split, eval_size), self._example(eval_size)
        chosen = np.linspace(0, len(source) - 1, count).astype(int)
        pixels = np.stack([example(source[int(index)])["images"] for index in chosen])
        normalized = images.normalize_pixels(pixels, self.data_spec.mean, self.data_spec.std)
        return normalized, pixels.astype(np.float32) / np.float32(255)

    def _example(self, eval_size: Shape) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
        return functools.partial(
            images.eval_example,
            size=self.config.full_size(eval_size),
            crop_ratio=self.config.data.crop_ratio,
        )


def _write_classes(
    write: WriteRecord,
    eval_size: Shape,
    source: ImageSource,
    index: int,
    labels_K: np.ndarray,
    probabilities_K: np.ndarray,
    label: int,
) -> None:
    """Writes the likeliest classes of an image."""
    write(
        {
            "size": list(eval_size),
            "index": index,
            "file": source.file_name(index),
            "label": class_name(label, source.class_names),
            "top": top_classes(labels_K, probabilities_K, source.class_names),
        }
    )


def _train_example(record: dict[str, Any], rng: np.random.Generator, **settings: Any) -> dict[str, np.ndarray]:
    return images.train_example(record, rng=rng, **settings)


def known_data_spec(config: Config, run_dir: RunDir | str | os.PathLike = "") -> DataSpec:
    """Returns the data spec as far as it is known without opening the data; classes = 0 if their number is unknown.

    Args:
      config: config of the run.
      run_dir: folder of a run: its stored data spec, or else the number of its class names, comes first; "" = none.

    Raises:
      InputError: model.classes is less than the number of the run's class names.
    """
    run, dataset = RunDir.of(run_dir) if run_dir else None, registry.get(config.data.name)
    stored, names = (run.data_spec, run.class_names) if run else (None, None)
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
