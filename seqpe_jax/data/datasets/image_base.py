"""What the builders of images share: the source that is read at random, arrays and photos in TFDS, pictures to RGB."""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import CachedBuilder, prepare_dataset
from seqpe_jax.errors import InputError

MAX_CLASSES_SHOWN = 10  # class names told in a message

LabelledArrays = Iterable[tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """A split of labelled images or clips, random access in Grain's sense.

    `source[i]` -> {"image": uint8[H, W, C], or [T, H, W, C] of a clip, "label": int}; images of one source may differ in
    size, never in channels. Reading raises InputError where a file is damaged or a label is out of range.

    Attributes:
      name: of the data set and split, for messages.
      class_names: label -> name.
      channels: 1 (grey) or 3 (RGB).
      mean, std: per channel, in 0..1; what pixels are normalised with.
      fingerprint: hex digits; equal for equal data, on every machine.
      records: what the data set holds, in order: mappings with "image" and "label".
      decode: a record's image -> uint8 array; none = it is one.
      labels: of `class_names`, by label of a record; none = the records' own.
    """

    name: str
    class_names: tuple[str, ...] = dataclasses.field(repr=False)
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    records: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    decode: Callable[[Any], np.ndarray] | None = dataclasses.field(default=None, repr=False)
    labels: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    @property
    def classes(self) -> int:
        """How many classes there are; labels are 0 .. classes - 1."""
        return len(self.class_names)

    def relabel(self, class_names: Sequence[str], owner: str) -> "ImageSource":
        """Returns the same images, with labels that are places in other names; a class keeps its name.

        Args:
          class_names: need not be in order, and may be of more classes.
          owner: whose names they are, for the message.

        Raises:
          InputError: a class that is not among them.
        """
        places = {name: label for label, name in enumerate(class_names)}
        unknown = [name for name in self.class_names if name not in places]
        if unknown:
            raise InputError(
                f"{self.name} has {_listed('class', 'classes', unknown)}, unknown to {owner}, whose "
                f"{_listed('class is', 'classes are', class_names)}: give the folders these names, or leave others out"
            )
        labels = tuple(places[name] for name in self.class_names)
        return dataclasses.replace(self, class_names=tuple(class_names), labels=labels)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        label, known = int(record["label"]), self.classes if self.labels is None else len(self.labels)
        if not 0 <= label < known:
            raise InputError(
                f"image {index} of {self.name} has label {label}, expected 0 to {known - 1}: the prepared data set "
                "is not what its name says; remove its folder and prepare it again"
            )
        image = record["image"]
        return {
            "image": image if self.decode is None else self.decode(image),
            "label": label if self.labels is None else self.labels[label],
        }


class ImageBuilder(CachedBuilder, skip_registration=True):
    """A data set of images or clips of one shape: {"image": uint8[SHAPE], "label": int64}.

    A subclass says what it reads (`sources`) and yields labelled arrays by split (`images`).
    """

    ITEM_NAME = "images"
    CLASS_NAMES: tuple[str, ...]

    def features(self) -> tfds.features.FeaturesDict:
        dataset = registry.get(self.name)
        shape = (*dataset.size, dataset.channels)
        label = tfds.features.ClassLabel(names=list(self.CLASS_NAMES))
        return tfds.features.FeaturesDict({"image": tfds.features.Tensor(shape=shape, dtype=np.uint8), "label": label})

    def images(self) -> Mapping[str, LabelledArrays]:
        """Returns (uint8[SHAPE], label) pairs by split.

        Raises:
          InputError: nothing there to read.
        """
        raise NotImplementedError

    def contents(self) -> Mapping[str, LabelledArrays]:
        return self.images()

    def examples(self, content: tuple[np.ndarray, int]) -> list[dict]:
        image, label = content
        return [{"image": image, "label": int(label)}]

    @classmethod
    def open_split(
        cls, split: str, *, paths: tuple[str, ...], datasets: pathlib.Path, cache: pathlib.Path, progress: bool
    ) -> ImageSource:
        """Returns a split, preparing the data set when that has not been done yet.

        Args:
          split: train, validation or test.
          paths: what the user points at.
          datasets: folder of prepared data sets.
          cache: folder of everything else that is kept.

        Raises:
          InputError: nothing to read, damaged data, a folder not writable.
        """
        key = cls.source_key(paths)
        builder = prepare_dataset(cls, paths, datasets / f"{cls.name}-{key}", cache / "downloads", progress)
        fingerprint = fingerprint_of(key, split)
        records = builder.as_data_source(split=split)
        dataset = registry.get(cls.name)
        return ImageSource(
            f"{cls.name}/{split}", cls.CLASS_NAMES, dataset.channels, dataset.mean, dataset.std, fingerprint, records
        )


def _listed(one: str, many: str, names: Sequence[str]) -> str:
    """Returns "class a" or "classes a, b, c"; of many names the first few."""
    shown = ", ".join(names[:MAX_CLASSES_SHOWN]) + (
        f" and {len(names) - MAX_CLASSES_SHOWN} more" if len(names) > MAX_CLASSES_SHOWN else ""
    )
    return f"{one if len(names) == 1 else many} {shown}"


def fingerprint_of(*identity: Any) -> str:
    """Returns 32 hex digits that tell values apart."""
    return hashlib.sha256(json.dumps(identity, default=list).encode()).hexdigest()[:32]


@contextlib.contextmanager
def image_errors(name: str, cure: str) -> Iterator[None]:
    """Tells in one line what Pillow cannot read, and what to do about it.

    Raises:
      InputError: names the image and the reason.
    """
    try:
        yield
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        reason = str(error) if str(error) and "BytesIO" not in str(error) else type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image, or of an unknown format"
        if isinstance(
            error, Image.DecompressionBombError
        ):  # the file may be whole, so its words and the cure are others
            raise InputError(
                f"image {name} is too large: it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, the most that "
                "are read; make it smaller, cut it into several, or leave it out"
            ) from error
        raise InputError(f"cannot read image {name} ({' '.join(reason.split())}): {cure}") from error


def read_rgb(file: str | io.BytesIO, name: str, cure: str, *, upright: bool = False, bit_depth: int = 0) -> np.ndarray:
    """Returns the pixels of an encoded image, uint8[H, W, 3]: grey, palette and CMYK become RGB, 16 bit and floats 8 bit.

    What is transparent shows white behind it. Of several frames (GIF, TIFF) the first is read.

    Args:
      file: a file's name, or what is in it.
      name, cure: what to call it, and what to do about it, where it cannot be read.
      upright: turn it as the camera's mark says which side is up (EXIF); ImageNet's pictures are read as they lie, as is
        usual.
      bit_depth: bits of the grey values in files of 16 bits; 0 = 16.

    Raises:
      InputError: not an image, a damaged one, or one whose values have no known range.
    """
    with image_errors(name, cure), Image.open(file) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # more than 8 bits a pixel, which Pillow would clip at 255
            return np.repeat(_grey(np.asarray(image), image.mode, bit_depth)[..., None], 3, axis=-1)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(behind, image)
        return np.asarray(image.convert("RGB"))


def verify_image(file: str, cure: str) -> tuple[str, int] | None:
    """Checks that a file is an image, and measures the values of one with 16 bits each.

    Returns:
      ("grey" or "colours", the largest value in 0..65535) of an image of 16 bits, None of others. Of colours Pillow reads
      the upper 8 bits alone.

    Raises:
      InputError: as `read_rgb`.
    """
    with image_errors(f"'{file}'", cure), Image.open(file) as image:
        of_16_bits = any(";16" in str(part) for part in image.tile)  # what Pillow calls the file's own form of pixels
        if image.mode[0] in "IF":  # values whose range may be unknown are looked at themselves
            values = np.asarray(image)
            _grey(values, image.mode)
            return ("grey", int(values.max())) if image.mode[0] == "I" else None
        if of_16_bits:
            return "colours", 257 * int(np.asarray(image.convert("RGB")).max())
        image.verify()
    return None


def _grey(values: np.ndarray, mode: str, bit_depth: int = 0) -> np.ndarray:
    """Grey values of more than 8 bits as uint8. Raises: ValueError: they lie outside of what is known of their range."""
    values = values.astype(np.float64)
    largest = 1.0 if mode == "F" else 2.0 ** (bit_depth or 16) - 1
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= largest:  # a NaN compares to nothing
        kind = "floating-point values" if mode == "F" else "whole numbers"
        given = f" (data.bit_depth={bit_depth})" if bit_depth and mode != "F" else ""
        raise ValueError(
            f"its {kind} go from {low:g} to {high:g}, and only 0 to {largest:g} is known as a range{given}"
        )
    return np.rint(values * (255 / largest)).astype(np.uint8)
