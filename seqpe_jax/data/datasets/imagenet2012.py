"""ImageNet 2012 (ILSVRC, 1.28 million photos in 1000 classes) from the two archives that its site gives out."""

import io
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO

import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.image_base import PhotoBuilder
from seqpe_jax.errors import InputError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

Photo = tuple[str, bytes, str | int]


class Imagenet2012(PhotoBuilder, skip_registration=True):
    """Photos as they stand in the archives, {"image", "label", "file_name"}; classes are WordNet names in sorted order.

    Args:
      paths: the folder with the archives; none = DATA_DIR/downloads/manual.
    """

    VERSION = tfds.core.Version("5.1.0")
    FILES = (TRAIN, VALIDATION)

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names_file=tfds.core.tfds_path("datasets/imagenet2012/labels.txt")),
                "file_name": tfds.features.Text(),
            }
        )

    def contents(self) -> Mapping[str, Iterator[Photo]]:
        folder = pathlib.Path(self.paths[0])
        return {"train": self._train(folder / TRAIN), "validation": _validation(folder / VALIDATION)}

    def examples(self, content: Photo) -> list[dict]:
        name, photo, label = content
        return [{"image": photo, "label": label, "file_name": name}]

    def _train(self, file: pathlib.Path) -> Iterator[Photo]:
        known = set(self.info.features["label"].names)
        for archive, content in _members(file):
            label = pathlib.PurePosixPath(archive).stem
            if label not in known:
                raise InputError(f"'{file}' holds '{archive}', which is no class of ImageNet 2012: is it {TRAIN}?")
            for name, photo in _members(file, io.BytesIO(content)):
                yield name, photo, label


def _validation(file: pathlib.Path) -> Iterator[Photo]:
    # One label per line, in the order of the numbers in the names.
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    for name, photo in _members(file):
        number = re.search(r"_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise InputError(
                f"'{file}' holds '{name}', which is no validation image of ImageNet 2012: is it {VALIDATION}?"
            )
        yield name, photo, labels[int(number[1]) - 1]


def _members(file: pathlib.Path, content: IO[bytes] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the files in an archive, or in one that lies inside it; a class is 0.2 GB at most."""
    try:
        if content is None:
            _check_end(file)
        with tarfile.open(None if content else file, "r:", content) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"'{file}' is not a whole tar archive ({error}): get it again from image-net.org") from error


def _check_end(file: pathlib.Path) -> None:
    """Looks for the zeros that end an archive: cut between two files, one would be read as whole."""
    with open(file, "rb") as content:
        content.seek(max(0, file.stat().st_size - 2 * tarfile.BLOCKSIZE))
        if content.read().strip(b"\0"):
            raise tarfile.ReadError("its end is missing")
