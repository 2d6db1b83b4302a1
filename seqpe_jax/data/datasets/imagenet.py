"""ImageNet 2012, full size and resized, prepared without TensorFlow from the archives of image-net.org."""

import functools
import io
import pathlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from seqpe_jax.archives import MAX_UNPACKED_BYTES, load_npz
from seqpe_jax.data import registry
from seqpe_jax.data.cache import locked
from seqpe_jax.data.datasets.base import CachedBuilder
from seqpe_jax.data.datasets.image_base import ImageSource, fingerprint_of, read_rgb
from seqpe_jax.errors import InputError, suggest

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
SIDES = (8, 16, 32, 64)
RESIZED_SIZES = tuple(f"{side}x{side}" for side in SIDES)

Photo = tuple[str, bytes, str | int]  # (file name, JPEG, class name or label)


class PhotoBuilder(CachedBuilder, skip_registration=True):
    """A data set of encoded photos with the names, versions and fields of one of TFDS's own.

    TFDS's own builders need TensorFlow to write such a data set; what they wrote as array_record on other machines is
    read as it is. The official validation split serves as "validation" and as "test".

    Attributes:
      ARCHIVES: files that the user puts into a folder by hand.
    """

    ITEM_NAME = "images"
    ARCHIVES: tuple[str, ...]

    @classmethod
    def choose(cls, paths: tuple[str, ...]) -> tuple[str | None, str]:
        """Returns (name of TFDS's configuration, folder with the archives or "") from `data.paths`.

        Raises:
          InputError: `data.paths` has another form.
        """
        if len(paths) > 1:
            raise InputError(
                f"data.paths: data set '{cls.name}' takes one folder, got {len(paths)} paths; give the folder that holds "
                f"{' and '.join(cls.ARCHIVES)}"
            )
        return None, paths[0] if paths else ""

    def archives(self) -> tuple[str, ...]:
        """Returns the names of the files that the user puts into the folder by hand."""
        return self.ARCHIVES

    @classmethod
    def open_split(
        cls, split: str, *, paths: tuple[str, ...], datasets: pathlib.Path, cache: pathlib.Path, progress: bool
    ) -> ImageSource:
        """Opens a split; arguments and errors as `ImageBuilder.open_split`."""
        config, chosen = cls.choose(paths)
        folder = pathlib.Path(chosen).expanduser().absolute() if chosen else datasets / "downloads" / "manual"
        builder = cls._open(folder, datasets, cache, config)
        if not builder._is_prepared():
            builder._check_archives(folder, datasets)
            with locked(datasets / f"{cls.name}-{config or 'all'}"):
                builder = cls._open(folder, datasets, cache, config)
                if not builder._is_prepared():
                    builder.prepare(progress=progress)
                    builder = cls._open(folder, datasets, cache, config)
        return builder._source(split, datasets)

    @classmethod
    def _open(
        cls, folder: pathlib.Path, datasets: pathlib.Path, cache: pathlib.Path, config: str | None
    ) -> "PhotoBuilder":
        try:
            return cls(paths=(str(folder),), downloads=cache / "downloads", data_dir=datasets, config=config)
        except ValueError as error:
            if "File format" in str(error):
                raise InputError(
                    f"data set '{cls.name}' in '{datasets}' is not in a format for random access: prepare it again "
                    "with file_format=array_record, or set data.data_dir to an empty folder"
                ) from None
            raise

    def _is_prepared(self) -> bool:
        return (self.data_path / "dataset_info.json").exists()  # TFDS's own `is_prepared` warns where it is not

    def _check_archives(self, folder: pathlib.Path, datasets: pathlib.Path) -> None:
        """Raises InputError if an archive is missing."""
        missing = [name for name in self.archives() if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"data set '{self.name}' is not prepared in '{datasets}', and '{folder}' lacks {' and '.join(missing)}: "
                f"get {'it' if len(missing) == 1 else 'them'} from image-net.org/download-images, put "
                f"{' and '.join(self.archives())} into '{folder}' and start again"
            )

    def _source(self, split: str, datasets: pathlib.Path) -> ImageSource:
        official = "train" if split == "train" else "validation"
        if official not in self.info.splits:
            raise InputError(
                f"data set '{self.name}' in '{datasets}' has no split '{official}' (it has {', '.join(self.info.splits)}): "
                "prepare it again from all its files"
            )
        info = self.info.splits[official]
        return ImageSource(
            name=f"{self.info.full_name}/{split}",
            class_names=tuple(self.info.features["label"].names),
            channels=3,
            mean=registry.PHOTO_MEAN,
            std=registry.PHOTO_STD,
            # Other preparations of the same photos may have another order.
            fingerprint=fingerprint_of(
                self.info.full_name, official, info.shard_lengths, info.num_bytes, self.info.disable_shuffling
            ),
            records=self.as_data_source(split=official, decoders={"image": tfds.decode.SkipDecoding()}),
            decode=self.decoder(),
            content=bytes,
        )

    @classmethod
    def decoder(cls, bit_depth: int = 0) -> Callable[[bytes], np.ndarray]:
        """Returns a function that decodes the content of a photo to uint8[H, W, 3]; `bit_depth` is not read."""
        del bit_depth
        return functools.partial(_decode_photo, name=cls.name)


def _decode_photo(content: bytes, name: str) -> np.ndarray:
    return read_rgb(io.BytesIO(content), f"in data set '{name}'", "prepare the data set again")


class Imagenet2012(PhotoBuilder, skip_registration=True):
    """Original photos, {"image", "label", "file_name"}; classes are WordNet names in sorted order.

    Args:
      paths: the folder with the archives; () = DATA_DIR/downloads/manual.
    """

    VERSION = tfds.core.Version("5.1.0")
    ARCHIVES = (TRAIN_ARCHIVE, VALIDATION_ARCHIVE)

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
        return {
            "train": self._train_photos(folder / TRAIN_ARCHIVE),
            "validation": _validation_photos(folder / VALIDATION_ARCHIVE),
        }

    def examples(self, content: Photo) -> list[dict]:
        name, photo, label = content
        return [{"image": photo, "label": label, "file_name": name}]

    def _train_photos(self, file: pathlib.Path) -> Iterator[Photo]:
        known = set(self.info.features["label"].names)
        for archive, content in _tar_members(file):
            label = pathlib.PurePosixPath(archive).stem
            if label not in known:
                raise InputError(
                    f"'{file}' holds '{archive}', which is no class of ImageNet 2012: is it {TRAIN_ARCHIVE}?"
                )
            for name, photo in _tar_members(file, io.BytesIO(content)):
                yield name, photo, label


def _validation_photos(file: pathlib.Path) -> Iterator[Photo]:
    # One label per line, in the order of the numbers in the file names.
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    for name, photo in _tar_members(file):
        number = re.search(r"_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise InputError(
                f"'{file}' holds '{name}', which is no validation image of ImageNet 2012: is it {VALIDATION_ARCHIVE}?"
            )
        yield name, photo, labels[int(number[1]) - 1]


def _tar_members(file: pathlib.Path, content: IO[bytes] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the files in an archive.

    Args:
      file: the archive.
      content: content of an archive inside it, which is read instead; that of a class has 0.2 GB at most.
    """
    try:
        if content is None:
            _check_end(file)
        with tarfile.open(None if content else file, "r:", content) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"'{file}' is not a complete tar archive ({error}): get it again from image-net.org"
        ) from error


def _check_end(file: pathlib.Path) -> None:
    """Looks for the zeros that end an archive; one cut between two files would look complete otherwise."""
    with open(file, "rb") as content:
        content.seek(max(0, file.stat().st_size - 2 * tarfile.BLOCKSIZE))
        if content.read().strip(b"\0"):
            raise tarfile.ReadError("its end is missing")


class ImagenetResized(PhotoBuilder, skip_registration=True):
    """ImageNet 2012 in 8x8 to 64x64 pixels (Chrabaszcz et al., arXiv 1707.08819), stored as PNG, {"image", "label"}.

    Classes are in the order of this data set, which is not that of ImageNet.

    Args:
      paths: (size, folder with the archives); without a folder DATA_DIR/downloads/manual.
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

    @property
    def side(self) -> int:
        """Pixels of a side."""
        return SIDES[RESIZED_SIZES.index(self.builder_config.name)]

    def features(self) -> tfds.features.FeaturesDict:
        names = tfds.core.tfds_path("image_classification/imagenet_resized_labels.txt")
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(self.side, self.side, 3)),
                "label": tfds.features.ClassLabel(names_file=names),
            }
        )

    def archives(self) -> tuple[str, ...]:
        train = ("train_part1", "train_part2") if self.side == 64 else ("train",)
        return tuple(f"Imagenet{self.side}_{part}_npz.zip" for part in (*train, "val"))

    def contents(self) -> Mapping[str, Iterator[tuple[np.ndarray, int]]]:
        *train, validation = [pathlib.Path(self.paths[0]) / name for name in self.archives()]
        return {"train": self._labelled_arrays(train), "validation": self._labelled_arrays([validation])}

    def examples(self, content: tuple[np.ndarray, int]) -> list[dict]:
        image, label = content
        encoded = io.BytesIO()
        Image.fromarray(image).save(encoded, "PNG")
        return [{"image": encoded.getvalue(), "label": label}]

    def _labelled_arrays(self, files: list[pathlib.Path]) -> Iterator[tuple[np.ndarray, int]]:
        for file in files:
            try:
                with zipfile.ZipFile(file) as archive:
                    for name in sorted(archive.namelist()):
                        if name.endswith(".npz"):
                            if archive.getinfo(name).file_size > MAX_UNPACKED_BYTES:
                                raise ValueError(f"{name} claims more than {MAX_UNPACKED_BYTES >> 30} GiB")
                            yield from self._arrays_of(archive.read(name))
            except (zipfile.BadZipFile, zlib.error, OSError, KeyError, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"'{file}' is not a complete archive of {self.builder_config.name} images ({error}): get it again from "
                    "image-net.org"
                ) from error

    def _arrays_of(self, content: bytes) -> Iterator[tuple[np.ndarray, int]]:
        arrays = load_npz(io.BytesIO(content))
        images, labels = arrays["data"], arrays["labels"]  # flat, channels first; labels start at 1
        images = images.reshape(-1, 3, self.side, self.side).transpose(0, 2, 3, 1)
        for image, label in zip(images, labels, strict=True):
            yield np.ascontiguousarray(image), int(label) - 1
