"""Handwritten digits that come with scikit-learn: real images that need no download."""

import functools
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import SPLITS, hash_fraction
from seqpe_jax.data.datasets.image_base import ImageBuilder, LabelledArrays
from seqpe_jax.errors import InputError

HELD_OUT = 0.15  # share of validation, and of test, of each class
CONTENT = "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"  # sha256 of the images, then the labels


class DigitImages(ImageBuilder):
    """1797 grey 8x8 images in 10 classes (UCI's optical digits, test part), about 70/15/15 of each class."""

    VERSION = tfds.core.Version("1.0.0")
    CLASS_NAMES = tuple("0123456789")

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [CONTENT]

    def images(self) -> Mapping[str, LabelledArrays]:
        images, labels = load_digit_arrays()
        return {split: [(images[place], labels[place]) for place in split_indices()[split]] for split in SPLITS}


@functools.cache
def load_digit_arrays() -> tuple[np.ndarray, np.ndarray]:
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
def split_indices() -> dict[str, list[int]]:
    """Returns the places in `load_digit_arrays()` of each split, rising; the same everywhere and for ever."""
    _, labels = load_digit_arrays()
    places = {split: [] for split in SPLITS}
    for label in range(10):
        ranked = sorted(
            np.flatnonzero(labels == label).tolist(), key=lambda place: hash_fraction(f"digit_images {place}")
        )
        held = round(HELD_OUT * len(ranked))
        places["test"] += ranked[:held]
        places["validation"] += ranked[held : 2 * held]
        places["train"] += ranked[2 * held :]
    return {split: sorted(found) for split, found in places.items()}


FRAMES = 8
CANVAS = 16  # pixels of a side
DIRECTIONS = ("left", "right", "up", "down")


class MovingDigits(ImageBuilder):
    """Clips uint8[8, 16, 16, 1] of one digit moving one pixel per frame; label = digit * 4 + direction.

    Each digit image moves once in each direction; clips of a split show digits of that split of `digit_images` only.
    Both directions of an axis visit the same places, so frames without their order do not tell the direction.
    """

    VERSION = tfds.core.Version("1.0.0")
    ITEM_NAME = "clips"
    CLASS_NAMES = tuple(f"{digit} {direction}" for digit in range(10) for direction in DIRECTIONS)

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [CONTENT]

    def images(self) -> Mapping[str, LabelledArrays]:
        return {split: _videos(split_indices()[split]) for split in SPLITS}


def _videos(places: list[int]) -> Iterator[tuple[np.ndarray, int]]:
    images, labels = load_digit_arrays()
    for place in places:
        for number, direction in enumerate(DIRECTIONS):
            yield (
                make_video(images[place], direction, f"moving_digits {place} {direction}"),
                4 * int(labels[place]) + number,
            )


def make_video(digit: np.ndarray, direction: str, name: str) -> np.ndarray:
    """Returns the clip of a digit uint8[8, 8, 1], uint8[8, 16, 16, 1]; where it starts depends on `name` only."""
    side = len(digit)
    room = CANVAS - side  # a digit's corner stays in 0..room
    across = int(hash_fraction(f"{name} across") * (room + 1))
    first = int(hash_fraction(f"{name} along") * (room - FRAMES + 2))  # the low end of its way
    along = range(first, first + FRAMES)
    if direction in ("left", "up"):
        along = reversed(along)
    frames = np.zeros((FRAMES, CANVAS, CANVAS, 1), np.uint8)
    for frame, place in zip(frames, along, strict=True):
        top, left = (across, place) if direction in ("left", "right") else (place, across)
        frame[top : top + side, left : left + side] = digit
    return frames
