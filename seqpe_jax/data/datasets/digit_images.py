"""Handwritten digits that come with scikit-learn: real images that need no download."""

import functools
import hashlib
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import SPLITS, chance
from seqpe_jax.data.datasets.image_base import ImageBuilder, LabelledArrays
from seqpe_jax.errors import InputError

HELD_OUT = 0.15  # share of validation, and of test, of each class
CONTENT = "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"  # sha256 of the images, then the labels


class DigitImages(ImageBuilder):
    """1797 grey 8x8 images in 10 classes (UCI's optical digits, test part), about 70/15/15 of each class."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE = (8, 8, 1)
    CLASS_NAMES = tuple("0123456789")
    MEAN, STD = (0.3051,), (0.3761,)  # of the train split

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        check_no_paths(cls.name, paths)
        return [CONTENT]

    def images(self) -> Mapping[str, LabelledArrays]:
        images, labels = digits()
        return {split: [(images[place], labels[place]) for place in split_places()[split]] for split in SPLITS}


def check_no_paths(name: str, paths: tuple[str, ...]) -> None:
    """Raises: InputError, the user points at files that this data set does not read."""
    if paths:
        raise InputError(f"data.name='{name}' takes no data.paths; for your own images: data.name='image_folder'")


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns (uint8[1797, 8, 8, 1], uint8[1797] labels 0..9).

    Raises:
      InputError: scikit-learn is missing, or its images are no longer the ones that the splits were made for.
    """
    try:
        from sklearn.datasets import load_digits  # seconds to import, and needed once
    except ImportError as error:
        raise InputError(f"the digit images come with scikit-learn ({error}): pip install scikit-learn") from None
    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = found.target.astype(np.uint8)
    if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != CONTENT:
        raise InputError(
            "scikit-learn's load_digits gives other images than the 1797 known ones: install scikit-learn 1.x"
        )
    return images, labels


@functools.cache
def split_places() -> dict[str, list[int]]:
    """Returns the places in `digits()` of each split, rising; the same everywhere and for ever."""
    _, labels = digits()
    places = {split: [] for split in SPLITS}
    for label in range(10):
        ranked = sorted(np.flatnonzero(labels == label).tolist(), key=lambda place: chance(f"digit_images {place}"))
        held = round(HELD_OUT * len(ranked))
        places["test"] += ranked[:held]
        places["validation"] += ranked[held : 2 * held]
        places["train"] += ranked[2 * held :]
    return {split: sorted(found) for split, found in places.items()}
