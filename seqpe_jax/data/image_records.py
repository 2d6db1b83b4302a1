"""Image files with their labels as records of ArrayRecord shards, on a disk or in a bucket, read at random.

A record is the label, four bytes, little-endian, and then the content of the image file.
"""

import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import grain
from array_record.python import array_record_module

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.image_base import ImageSource
from seqpe_jax.data.shards import PreparedSplit, open_prepared
from seqpe_jax.errors import Failure, InputError

SUFFIX = ".array_record"
LABEL = struct.Struct("<I")
WRITER_OPTIONS = "group_size:1,uncompressed"  # random access; image files are compressed already


def encode(source: ImageSource, index: int) -> bytes:
    """Returns the record of an image of a source of image files. Raises: InputError: the file cannot be read."""
    record = source.records[index]
    return LABEL.pack(int(record["label"])) + source.content(record["image"])


def open_writer(path: pathlib.Path) -> array_record_module.ArrayRecordWriter:
    """Returns a writer of a shard on a disk, with the methods `write` and `close`."""
    return array_record_module.ArrayRecordWriter(os.fspath(path), WRITER_OPTIONS)


class ImageRecords(Sequence):
    """The records of a prepared split: [i] -> {"image": content of the file, "label": int}.

    Args:
      split: a split of images.
    """

    def __init__(self, split: PreparedSplit):
        self._name = str(split.folder)
        # With their ranges, so that no shard is opened before one of its records is read.
        files = [f"{split.folder / shard.file}[0:{shard.count}]" for shard in split.shards]
        self._source = grain.sources.ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            record = self._source[index]
        except Exception as error:  # the library raises RuntimeError and ValueError, also for a bucket without answer
            raise Failure(
                f"image {index} of data.prepared='{self._name}' cannot be read ({' '.join(str(error).split())[:200]}): run "
                "the preparation again, which replaces damaged shards"
            ) from error
        return {"image": record[LABEL.size :], "label": LABEL.unpack_from(record)[0]}


def prepared_images(path: str | os.PathLike, name: str, split: str, bit_depth: int, max_pixels: int = 0) -> ImageSource:
    """Opens a split of images that `data.prepare` wrote.

    Args:
      path: `data.prepared`.
      name: `data.name`.
      split: "train", "validation" or "test".
      bit_depth: `data.bit_depth`, which must be that of the preparation.
      max_pixels: `data.max_pixels`.

    Raises:
      InputError: see `shards.open_prepared`; or another bit depth.
    """
    found = open_prepared(path, name, split)
    facts = found.facts
    if facts["bit_depth"] != bit_depth:
        raise InputError(
            f"data.prepared='{found.folder}' was prepared with data.bit_depth={facts['bit_depth']}, not {bit_depth}: set "
            "that, or prepare it again"
        )
    limits = {"max_pixels": max_pixels} if max_pixels else {}  # of image_folder alone
    return ImageSource(
        name=f"{name}/{split}",
        class_names=tuple(facts["class_names"]),
        channels=facts["channels"],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        images_by_class=tuple(facts.get("images_by_class", ())),  # older indices have none
        fingerprint=facts["fingerprint"],
        records=ImageRecords(found),
        decode=registry.load_builder(name, registry.DATA_IMAGE).decoder(bit_depth, **limits),
    )
