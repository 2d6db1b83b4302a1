"""What a run on images or clips needs of its data: augmented examples, top-1 and top-5 at any size."""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.config import Config, check_size
from seqpe_jax.data import images, loader
from seqpe_jax.errors import InputError
from seqpe_jax.evaluation.classification import accuracy
from seqpe_jax.objectives.task import Classification
from seqpe_jax.runtime.hosts import is_lead
from seqpe_jax.serving import Signature

COLOURED = ("image_folder", "imagenet2012", "imagenet_resized")  # always three channels
KEPT = "classes.json"  # of a run's folder: class names, in the order of their labels
CLASSES = {"imagenet2012": 1000, "imagenet_resized": 1000}  # of data that may not be there


class Images:
    """The images of a config; a model that names its classes can be built where they are not.

    Args:
      there: whether the data are there to be read; else ImageNet's classes are known, and those of folders must be named.
      kept: folder of a run whose class names the labels are places in; "" = a new run's, in the data's own order.

    Attributes:
      inputs: shape and type of an example for the model, [1, ...]; example: of each array of a training example.

    Raises:
      InputError: the training split cannot be read, has more classes than the model, or labels that are not its classes';
        the names kept cannot be read, or are more than the model's classes.
    """

    kind = "image_classification"
    unit = "images"
    option, scale_field = "sizes", "size"
    measured = ("loss", "top1", "top5")  # while training
    prefix = 1  # the class token

    def __init__(self, config: Config, there: bool = True, kept: str | pathlib.Path = ""):
        self.config = config
        self._names, self._owner = _kept_names(kept) if kept else None, kept
        classes, channels = config.model.classes, 3
        if self._names is not None:
            if 0 < classes < len(self._names):
                raise InputError(
                    f"model.classes={classes} is less than the {len(self._names)} classes of the run of {kept} (its "
                    f"{KEPT}): set it to {len(self._names)} or more"
                )
            classes = classes or len(self._names)
        if not there and not classes and config.data.name == "image_folder":
            raise InputError("data.name='image_folder' has as many classes as folders: name their number as model.classes")
        if not there:
            classes = classes or CLASSES.get(config.data.name, 0)
        if not classes or config.data.name not in COLOURED:
            found = self.source("train")
            channels = found.channels
            if classes and found.classes > classes:
                raise InputError(
                    f"{config.data.name} has {found.classes} classes, but the model only {classes} (model.classes)"
                )
            classes = classes or found.classes
        self.task = Classification(config.objective.label_smoothing, config.objective.mixing)
        self.inputs = jax.ShapeDtypeStruct((1, *config.data.size, channels), jnp.float32)
        self.example = {
            "images": jax.ShapeDtypeStruct(self.inputs.shape[1:], jnp.float32),
            "labels": jax.ShapeDtypeStruct((), jnp.int32),
        }
        self.model_fields = {"classes": classes}
        self.units_per_step = config.batch_size

    @functools.cache  # noqa: B019  a run has one of these
    def source(self, split: str) -> Any:
        """Returns the images of a split, with the labels of the run.

        Raises:
          InputError: as `data.images.image_source`; a class that the run does not know.
        """
        data = self.config.data
        found = images.image_source(data.name, split=split, paths=data.paths, cache_dir=data.cache_dir, progress=is_lead())
        return found if self._names is None else found.labelled_as(self._names, f"the run of {self._owner}")

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels. Raises: InputError as `source`."""
        return self._names or self.source("train").class_names

    def describe(self) -> str:
        """Returns what is trained on, in words."""
        source, size = self.source("train"), "x".join(map(str, self.config.data.size))
        return f"{len(source):,} training examples of {source.classes} classes, {size}, {self.config.batch_size} to a batch"

    def train_loader(self, host_index: int, host_count: int) -> loader.TrainLoader:
        """Returns this host's training batches."""
        config, source = self.config, self.source("train")

        def example(record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
            return images.train_example(
                record, config.data.size, config.data.augment, rng, mean=source.mean, std=source.std
            )

        return loader.TrainLoader(
            source, batch_size=config.batch_size, seed=config.seed, example=example, host_index=host_index,
            host_count=host_count, threads=config.data.threads,
        )  # fmt: skip

    def keep(self, workdir: str | pathlib.Path) -> None:
        """Puts the class names beside the checkpoints: without them, labels are numbers that mean nothing elsewhere."""
        path = pathlib.Path(workdir) / KEPT
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(self.class_names, indent=0) + "\n")
            part.replace(path)

    def check_kept(self, workdir: str | pathlib.Path) -> None:
        """Refuses to go on with other classes, or another order of them, than the run began with. Raises: InputError."""
        names = _kept_names(workdir)
        if names is not None and names != self.class_names:
            pairs = itertools.zip_longest(self.class_names, names, fillvalue="no class")
            label, (ours, theirs) = next((label, pair) for label, pair in enumerate(pairs) if pair[0] != pair[1])
            raise InputError(
                f"label {label} is '{ours}' in the data, but '{theirs}' in the run of {workdir} (its {KEPT}): use data "
                "with its classes, or a new --workdir"
            )

    def scales(self) -> tuple[tuple[int, int], ...]:
        """Returns the sizes that the config evaluates, each as (height, width)."""
        sizes = tuple((size, size) for size in self.config.eval.sizes)
        return sizes or (self.config.data.size[-2:],)

    def grid_of(self, scale: tuple[int, int]) -> tuple[int, ...]:
        """Returns the patches along each axis of an example of (height, width)."""
        return self.config.grid_of(self.config.sides_of(scale))

    def served(self, reach: tuple[int, ...]) -> Signature:
        """Returns what a model that serves grids of patches up to `reach` reads and returns."""
        source, (*frames, tall, wide) = self.source("train"), self.config.data.size
        height, width = self.config.model.patch[-2:]
        shape = ("batch", *map(str, frames), f"{height}*rows", f"{width}*columns", str(source.channels))
        sides = (*frames, min(tall, reach[-2] * height), min(wide, reach[-1] * width))
        mean, std = (", ".join(f"{value:.9g}" for value in values) for values in (source.mean, source.std))
        classes = str(self.model_fields["classes"])
        return Signature(
            "images", "float32", shape, {"rows": reach[-2], "columns": reach[-1]}, ("batch", classes),
            f"numpy.zeros((1, {', '.join(map(str, sides))}, {source.channels}), 'float32')",
            f"pixels in 0 to 1, then minus ({mean}) and divided by ({std}) for each channel; the logits are those of the "
            f"classes in {KEPT}, in its order",
        )  # fmt: skip

    def check_scale(self, scale: tuple[int, int], split: str) -> None:
        """Refuses a size that cannot be evaluated. Raises: InputError."""
        check_size(self.config, scale, "evaluation size")
        self.source(split)

    def evaluate(
        self, examine: Callable[..., dict[str, jax.Array]], scale: tuple[int, int], split: str, batch: int, *,
        put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]], progress: Callable[[int, int], None],
    ) -> dict[str, Any]:  # fmt: skip
        """Returns the result of one size (see `evaluation.classification`)."""
        source = self.source(split)
        batch = min(batch, -(-len(source) // jax.device_count()) * jax.device_count())
        batches = loader.EvaluationBatches(source, batch, len(source), self._example(scale, split))
        return accuracy(examine, batches, size=scale, put=put, progress=lambda done: progress(done, len(source)))

    def pictures(self, scale: tuple[int, int], split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first images of a split at a size, float32[count, sides..., C]: normalised, and in 0..1."""
        source, example = self.source(split), self._example(scale, split)
        chosen = np.linspace(0, len(source) - 1, count).astype(int)
        found = np.stack([example(source[int(index)])["images"] for index in chosen])
        shown = found * np.asarray(source.std, np.float32) + np.asarray(source.mean, np.float32)
        return found, np.clip(shown, 0.0, 1.0)

    def _example(self, scale: tuple[int, int], split: str) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
        source = self.source(split)
        return functools.partial(
            images.evaluation_example, size=self.config.sides_of(scale), crop_ratio=self.config.data.crop_ratio,
            mean=source.mean, std=source.std,
        )  # fmt: skip


def _kept_names(workdir: str | pathlib.Path) -> tuple[str, ...] | None:
    """Returns the class names in the folder of a run, or None where it has none. Raises: InputError: damaged."""
    path = pathlib.Path(workdir) / KEPT
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): put back the file that the run wrote") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} must hold a list of class names: put back the file that the run wrote")
    return tuple(names)
