"""ImageNet 2012, full size and resized, prepared without TensorFlow from the archives of image-net.org."""

import io
import pathlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from seqpe_jax.archives import LARGEST, read_arrays
from seqpe_jax.data import registry
from seqpe_jax.data.cache import locked
from seqpe_jax.data.datasets.base import CachedBuilder
from seqpe_jax.data.datasets.image_base import ImageSource, fingerprint_of, read_rgb
from seqpe_jax.errors import InputError, suggest

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
SIDES = (8, 16, 32, 64)
RESIZED_SIZES = tuple(f"{side}x{side}" for side in SIDES)

Photo = tuple[str, bytes, str | int]


class PhotoBuilder(CachedBuilder, skip_registration=True):
    """A data set of encoded photos under the names, versions and fields of one of TFDS's own.

    TFDS's own builders need TensorFlow to write such a data set; what they wrote elsewhere as array_record is read as it
    is. The official validation split serves as "validation" and as "test".
    """

    ITEM_NAME = "images"
    FILES: tuple[str, ...]  # to be put into a folder by hand

    @classmethod
    def choose(cls, paths: tuple[str, ...]) -> tuple[str | None, str]:
        """Returns (name of TFDS's configuration, folder with the files or "") as `data.paths` says.

        Raises:
          InputError: `data.paths` means nothing here.
        """
        if len(paths) > 1:
            raise InputError(
                f"data.paths: data set '{cls.name}' takes one folder, got {len(paths)} paths; give the folder that holds "
                f"{' and '.join(cls.FILES)}"
            )
        return None, paths[0] if paths else ""

    def files(self) -> tuple[str, ...]:
        """Returns the names of the files that are put into the folder by hand."""
        return self.FILES

    @classmethod
    def open_split(
        cls, split: str, *, paths: tuple[str, ...], datasets: pathlib.Path, cache: pathlib.Path, progress: bool
    ) -> ImageSource:
        """Returns a split, as `ImageBuilder.open_split` does."""
        config, chosen = cls.choose(paths)
        folder = pathlib.Path(chosen).expanduser().absolute() if chosen else datasets / "downloads" / "manual"

        def builder() -> PhotoBuilder:
            try:
                return cls(paths=(str(folder),), downloads=cache / "downloads", data_dir=datasets, config=config)
            except ValueError as error:
                if "File format" in str(error):
                    raise InputError(
                        f"data set '{cls.name}' in '{datasets}' is not in a format for random access: prepare it again "
                        "with file_format=array_record, or set data.data_dir to an empty folder"
                    ) from None
                raise

        def is_prepared(found: PhotoBuilder) -> bool:
            return (found.data_path / "dataset_info.json").exists()  # TFDS's own `is_prepared` warns where it is not

        found = builder()
        if not is_prepared(found):
            missing = [name for name in found.files() if not (folder / name).is_file()]
            if missing:
                raise InputError(
                    f"data set '{cls.name}' is not prepared in '{datasets}', and '{folder}' lacks {' and '.join(missing)}: "
                    f"get {'it' if len(missing) == 1 else 'them'} from image-net.org/download-images, put "
                    f"{' and '.join(found.files())} into '{folder}' and start again"
                )
            with locked(datasets / f"{cls.name}-{config or 'all'}"):
                found = builder()
                if not is_prepared(found):
                    found.prepare(progress=progress)
                    found = builder()
        official = "train" if split == "train" else "validation"
        if official not in found.info.splits:
            raise InputError(
                f"data set '{cls.name}' in '{datasets}' has no split '{official}' (it has {', '.join(found.info.splits)}): "
                "prepare it again from all its files"
            )
        facts = found.info.splits[official]
        return ImageSource(
            name=f"{found.info.full_name}/{split}",
            class_names=tuple(found.info.features["label"].names),
            channels=3,
            mean=registry.PHOTO_MEAN,
            std=registry.PHOTO_STD,
            # Other preparations of the same photos may keep them in another order.
            fingerprint=fingerprint_of(
                found.info.full_name, official, facts.shard_lengths, facts.num_bytes, found.info.disable_shuffling
            ),
            records=found.as_data_source(split=official, decoders={"image": tfds.decode.SkipDecoding()}),
            decode=lambda content: read_rgb(
                io.BytesIO(content), f"in data set '{cls.name}'", "prepare the data set again"
            ),
        )


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


class ImagenetResized(PhotoBuilder, skip_registration=True):
    """Photos uint8[S, S, 3] stored as PNG, {"image", "label"}; classes in the data set's own order, not in ImageNet's.

    Args:
      paths: the folder with the archives; none = DATA_DIR/downloads/manual.
      config: 8x8, 16x16, 32x32 or 64x64.
    """

    VERSION = tfds.core.Version("0.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=size, version="0.1.0") for size in RESIZED_SIZES]

    @classmethod
    def choose(cls, paths: tuple[str, ...]) -> tuple[str, str]:
        size, folder = (paths + ("", ""))[:2]
        if size not in RESIZED_SIZES or len(paths) > 2:
            raise InputError(
                f"data set 'imagenet_resized' needs data.paths=('SIZE',) or ('SIZE', 'FOLDER WITH ITS ARCHIVES'), got "
                f"{paths}.{suggest(size, RESIZED_SIZES)}"
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
        return SIDES[RESIZED_SIZES.index(self.builder_config.name)]

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
