"""Base class of image data sets, random access to their splits, decoding of image files to RGB."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import CachedBuilder, prepare_dataset
from seqpe_jax.errors import InputError

MAX_READ_PIXELS = 1 << 24  # of one image; photos of cameras have as many
MAX_CLASSES_SHOWN = 10  # class names in a message
PILLOW_LIMIT = Image.MAX_IMAGE_PIXELS  # it warns above this number of pixels, and refuses above twice as many

LabelledArrays = Iterable[tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSource:
    """A split of labelled images or videos, with random access in Grain's sense.

    `source[i]` -> {"image": uint8[H, W, C], or [T, H, W, C] of a video, "label": int}; images of one source may differ
    in size, never in channels. Reading raises InputError if a file is damaged or a label is out of range.

    Attributes:
      name: name of the data set and split, for messages.
      class_names: label -> name.
      channels: 1 (grey) or 3 (RGB).
      mean: per channel in 0..1, for normalization.
      std: per channel in 0..1, for normalization.
      fingerprint: hex digits, equal for equal data on every machine.
      records: mappings with "image" and "label", in the order of the data set.
      decode: converts the image of a record to a uint8 array; None = it is one.
      labels: label of a record -> index in `class_names`; None = equal.
      content: converts the image of a record to the content of an image file; None = it is no file.
      images_by_class: number of images of each class, in the data's own order of classes; () = unknown.
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
    content: Callable[[Any], bytes] | None = dataclasses.field(default=None, repr=False)
    images_by_class: tuple[int, ...] = dataclasses.field(default=(), repr=False)

    @property
    def classes(self) -> int:
        """Number of classes; labels are 0 .. classes - 1."""
        return len(self.class_names)

    def relabel(self, class_names: Sequence[str], owner: str) -> "ImageSource":
        """Returns the same images with labels that are indices in other class names.

        Args:
          class_names: class names in any order, possibly of more classes.
          owner: owner of the class names, for the message.

        Raises:
          InputError: a class of this source is not among them.
        """
        indices = {name: label for label, name in enumerate(class_names)}
        unknown = [name for name in self.class_names if name not in indices]
        if unknown:
            raise InputError(
                f"{self.name} has {_list_names('class', 'classes', unknown)}, unknown to {owner}, whose "
                f"{_list_names('class is', 'classes are', class_names)}: give the folders these names, or leave others out"
            )
        labels = tuple(indices[name] for name in self.class_names)
        return dataclasses.replace(self, class_names=tuple(class_names), labels=labels)

    def file_name(self, index: int) -> str | None:
        """Returns the name of the file of an image; None of images that are not read from files."""
        record = self.records[index]
        name = record["image"] if isinstance(record["image"], str) else record.get("file_name")
        return name.decode() if isinstance(name, bytes) else name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        label, num_labels = int(record["label"]), self.classes if self.labels is None else len(self.labels)
        if not 0 <= label < num_labels:
            raise InputError(
                f"image {index} of {self.name} has label {label}, expected 0 to {num_labels - 1}: the prepared data set "
                "is not what its name says; remove its folder and prepare it again"
            )
        image = record["image"]
        return {
            "image": image if self.decode is None else self.decode(image),
            "label": label if self.labels is None else self.labels[label],
        }


class ImageBuilder(CachedBuilder, skip_registration=True):
    """A data set of images or videos of one shape: {"image": uint8[size, channels], "label": int64}.

    A subclass implements `sources` and `images`; size, channels, mean and std are those of its entry in
    `data.registry`.

    Attributes:
      CLASS_NAMES: label -> name.
    """

    ITEM_NAME = "images"
    CLASS_NAMES: tuple[str, ...]

    def features(self) -> tfds.features.FeaturesDict:
        dataset = registry.get(self.name)
        image = tfds.features.Tensor(shape=(*dataset.size, dataset.channels), dtype=np.uint8)
        return tfds.features.FeaturesDict(
            {"image": image, "label": tfds.features.ClassLabel(names=list(self.CLASS_NAMES))}
        )

    def images(self) -> Mapping[str, LabelledArrays]:
        """Returns the (uint8[size, channels], label) pairs of each split.

        Raises:
          InputError: there is no input.
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
        """Opens a split, after preparing the data set where that is not done yet.

        Args:
          split: "train", "validation" or "test".
          paths: `data.paths`, local.
          datasets: folder of prepared data sets.
          cache: folder of the cache.
          progress: show progress bars on stderr.

        Raises:
          InputError: there is no input, it is damaged, or a folder is not writable.
        """
        dataset, key = registry.get(cls.name), cls.source_key(paths)
        builder = prepare_dataset(cls, paths, datasets / f"{cls.name}-{key}", cache / "downloads", progress)
        return ImageSource(
            name=f"{cls.name}/{split}",
            class_names=cls.CLASS_NAMES,
            channels=dataset.channels,
            mean=dataset.mean,
            std=dataset.std,
            fingerprint=fingerprint_of(key, split),
            records=builder.as_data_source(split=split),
        )


def _list_names(one: str, many: str, names: Sequence[str]) -> str:
    """Returns "class a" or "classes a, b, c"; of many names the first few."""
    more = f" and {len(names) - MAX_CLASSES_SHOWN} more" if len(names) > MAX_CLASSES_SHOWN else ""
    return f"{one if len(names) == 1 else many} {', '.join(names[:MAX_CLASSES_SHOWN])}{more}"


def fingerprint_of(*identity: Any) -> str:
    """Returns 32 hex digits, equal for equal values."""
    return hashlib.sha256(json.dumps(identity, default=list).encode()).hexdigest()[:32]


def limit_pixels(max_pixels: int) -> None:
    """Sets the pixels above which this process refuses an image: such a file may be made to fill the memory.

    Args:
      max_pixels: `data.max_pixels`; 0 = Pillow's limit.
    """
    Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2) if max_pixels else PILLOW_LIMIT
    if max_pixels:  # who raises the limit need not be warned below it
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@contextlib.contextmanager
def image_errors(name: str, fix: str) -> Iterator[None]:
    """Converts errors of Pillow to an InputError of one line.

    Args:
      name: name of the image.
      fix: fix for an unreadable image.

    Raises:
      InputError: names the image and the reason.
    """
    try:
        yield
    except Image.DecompressionBombError as error:  # the file may be undamaged, so the fix is another
        raise InputError(
            f"image {name} is too large: it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, the limit; make it "
            "smaller, cut it into several, leave it out, or raise the limit with data.max_pixels"
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of any class
        reason = str(error) if str(error) and "BytesIO" not in str(error) else type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image, or of an unknown format"
        raise InputError(f"cannot read image {name} ({' '.join(reason.split())}): {fix}") from error


def read_rgb(file: str | io.BytesIO, name: str, fix: str, *, upright: bool = False, bit_depth: int = 0) -> np.ndarray:
    """Decodes an image: grey, palette and CMYK become RGB, 16 bits and floats become 8 bits.

    Transparent pixels show white. Of several frames (GIF, TIFF) the first is read. One of more than `MAX_READ_PIXELS` is
    read at a half, a third, ... of its size, so that it takes at most its own pixels (4 bytes each, of JPEG 1/4 of that or
    less) and 256 MB of memory.

    Args:
      file: name of the file, or its content.
      name: name of the image, for the message.
      fix: fix for an unreadable image, for the message.
      upright: rotate it as its EXIF orientation says. ImageNet is usually read without.
      bit_depth: bits of the grey values in files of 16 bits; 0 = 16.

    Returns:
      uint8[H, W, 3].

    Raises:
      InputError: not an image, a damaged one, or one whose values have no known range.
    """
    with image_errors(name, fix), Image.open(file) as image:
        factor = _reduction(image)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))  # only JPEG decodes fewer pixels
            factor = _reduction(image)
        if factor > 1:
            image = _reduced(image, factor, bit_depth)
        if upright:
            image = ImageOps.exif_transpose(image)
        return np.asarray(_to_rgb(image, bit_depth))


def _to_rgb(image: Image.Image, bit_depth: int) -> Image.Image:
    if image.mode[0] in "IF":  # more than 8 bits per pixel, which Pillow would clip at 255
        return Image.fromarray(_grey_to_8_bits(np.asarray(image), image.mode, bit_depth)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reduction(image: Image.Image) -> int:
    """Returns the smallest divisor of both sides that leaves at most `MAX_READ_PIXELS`."""
    return math.ceil(math.sqrt(image.width * image.height / MAX_READ_PIXELS))


def _reduced(image: Image.Image, factor: int, bit_depth: int) -> Image.Image:
    """Returns an RGB image of sides divided by a factor, means of its pixels; strips of it are converted one by one."""
    rows = factor * max(1, MAX_READ_PIXELS // (8 * factor * image.width))
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        small.paste(_to_rgb(strip, bit_depth).reduce(factor), (0, top // factor))
    small.getexif().update(image.getexif())
    return small


def verify_image(file: str, fix: str) -> tuple[str, int] | None:
    """Checks that a file is an image, and finds the largest value of one with 16 bits.

    Args:
      file: name of the file.
      fix: fix for an unreadable image, for the message.

    Returns:
      ("grey" or "colours", largest value in 0..65535) of an image with 16 bits, None of others. Of colours Pillow reads
      the upper 8 bits only.

    Raises:
      InputError: see `read_rgb`.
    """
    with image_errors(f"'{file}'", fix), Image.open(file) as image:
        has_16_bits = any(";16" in str(part) for part in image.tile)  # Pillow's name of the pixel format in the file
        if image.mode[0] in "IF":  # the range may be unknown, so the values are read
            values = np.asarray(image)
            _grey_to_8_bits(values, image.mode)
            return ("grey", int(values.max())) if image.mode[0] == "I" else None
        if has_16_bits:
            return "colours", 257 * int(np.asarray(image.convert("RGB")).max())
        image.verify()
    return None


def _grey_to_8_bits(values: np.ndarray, mode: str, bit_depth: int = 0) -> np.ndarray:
    """Scales grey values of more than 8 bits to uint8. Raises: ValueError: they are out of the known range."""
    values = values.astype(np.float64)
    largest = 1.0 if mode == "F" else 2.0 ** (bit_depth or 16) - 1
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= largest:  # also where one is NaN
        kind = "floating-point values" if mode == "F" else "integers"
        depth = f" (data.bit_depth={bit_depth})" if bit_depth and mode != "F" else ""
        raise ValueError(f"its {kind} range from {low:g} to {high:g}, but the known range is 0 to {largest:g}{depth}")
    return np.rint(values * (255 / largest)).astype(np.uint8)
