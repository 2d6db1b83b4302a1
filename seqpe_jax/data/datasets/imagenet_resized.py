"""ImageNet 2012 in 8x8 to 64x64 pixels (Chrabaszcz et al., arXiv 1707.08819) from the archives that its site gives out."""

import io
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from seqpe_jax.archives import LARGEST, read_arrays
from seqpe_jax.data.datasets.image_base import PhotoBuilder
from seqpe_jax.errors import InputError, suggest

SIDES = (8, 16, 32, 64)
SIZES = tuple(f"{side}x{side}" for side in SIDES)


class ImagenetResized(PhotoBuilder, skip_registration=True):
    """Photos uint8[S, S, 3] stored as PNG, {"image", "label"}; classes in the data set's own order, not in ImageNet's.

    Args:
      paths: the folder with the archives; none = DATA_DIR/downloads/manual.
      config: 8x8, 16x16, 32x32 or 64x64.
    """

    VERSION = tfds.core.Version("0.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=size, version="0.1.0") for size in SIZES]

    @classmethod
    def choose(cls, paths: tuple[str, ...]) -> tuple[str, str]:
        size, folder = (paths + ("", ""))[:2]
        if size not in SIZES or len(paths) > 2:
            raise InputError(
                f"data set 'imagenet_resized' needs data.paths=('SIZE',) or ('SIZE', 'FOLDER WITH ITS ARCHIVES'), got "
                f"{paths}.{suggest(size, SIZES)}"
            )
        return size, folder

    def features(self) -> tfds.features.FeaturesDict:
        side = self.side
        names = tfds.core.tfds_path("image_classification/imagenet_resized_labels.txt")
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(side, side, 3)),
                "label": tfds.features.ClassLabel(names_file=names),
            }
        )

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return SIDES[SIZES.index(self.builder_config.name)]

    def files(self) -> tuple[str, ...]:
        train = ("train_part1", "train_part2") if self.side == 64 else ("train",)
        return tuple(f"Imagenet{self.side}_{part}_npz.zip" for part in (*train, "val"))

    def contents(self) -> Mapping[str, Iterator[tuple[np.ndarray, int]]]:
        *train, validation = [pathlib.Path(self.paths[0]) / name for name in self.files()]
        return {"train": self._rows(train), "validation": self._rows([validation])}

    def examples(self, content: tuple[np.ndarray, int]) -> list[dict]:
        image, label = content
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        return [{"image": encoded.getvalue(), "label": label}]

    def _rows(self, files: list[pathlib.Path]) -> Iterator[tuple[np.ndarray, int]]:
        for file in files:
            try:
                with zipfile.ZipFile(file) as archive:
                    for name in sorted(archive.namelist()):
                        if name.endswith(".npz"):
                            if archive.getinfo(name).file_size > LARGEST:
                                raise ValueError(f"{name} claims more than {LARGEST >> 30} GiB")
                            yield from self._arrays(archive.read(name))
            except (zipfile.BadZipFile, zlib.error, OSError, KeyError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"'{file}' is not a whole archive of {self.builder_config.name} images ({error}): get it again from "
                    "image-net.org"
                ) from error

    def _arrays(self, content: bytes) -> Iterator[tuple[np.ndarray, int]]:
        arrays = read_arrays(io.BytesIO(content))
        images, labels = arrays["data"], arrays["labels"]  # flat, channels first; labels count from 1
        images = images.reshape(-1, 3, self.side, self.side).transpose(0, 2, 3, 1)
        for image, label in zip(images, labels, strict=True):
            yield np.ascontiguousarray(image), int(label) - 1
