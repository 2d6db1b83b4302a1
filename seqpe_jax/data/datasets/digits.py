"""Handwritten digits of scikit-learn, as images and as videos that move: real data without a download."""

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
FRAMES = 8  # of a video
CANVAS = 16  # pixels of a side of a video
DIRECTIONS = ("left", "right", "up", "down")


class DigitImages(ImageBuilder):
    """1797 grey 8x8 images in 10 classes (UCI's optical digits, test part), about 70/15/15 of each class."""

    VERSION = tfds.core.Version("1.0.0")
    CLASS_NAMES = tuple("0123456789")

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [CONTENT]

    def images(self) -> Mapping[str, LabelledArrays]:
        images, labels = load_digit_arrays()
        return {split: [(images[index], labels[index]) for index in split_indices()[split]] for split in SPLITS}


class MovingDigits(ImageBuilder):
    """Videos uint8[8, 16, 16, 1] of one digit that moves one pixel per frame; label = digit * 4 + direction.

    Each digit image moves once in each direction; the videos of a split show digits of that split of `digit_images`
    only. Both directions of an axis visit the same positions, so that frames without their order do not give the
    direction.
    """

    VERSION = tfds.core.Version("1.0.0")
    ITEM_NAME = "videos"
    CLASS_NAMES = tuple(f"{digit} {direction}" for digit in range(10) for direction in DIRECTIONS)

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [CONTENT]

    def images(self) -> Mapping[str, LabelledArrays]:
        return {split: _videos(split_indices()[split]) for split in SPLITS}


@functools.cache
def load_digit_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Returns (uint8[1797, 8, 8, 1], uint8[1797] labels 0..9).

    Raises:
      InputError: scikit-learn is missing, or its images are not the ones that the splits were made for.
    """
    try:
        from sklearn.datasets import load_digits  # takes seconds to import, and is needed once
    except ImportError as error:
        raise InputError(f"the digit images come with scikit-learn ({error}): pip install scikit-learn") from None
    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = loaded.target.astype(np.uint8)
    if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != CONTENT:
        raise InputError(
            "scikit-learn's load_digits gives other images than the 1797 known ones: install scikit-learn 1.x"
        )
    return images, labels


@functools.cache
def split_indices() -> dict[str, list[int]]:
    """Returns the rising indices in `load_digit_arrays()` of each split, equal on every machine."""
    _, labels = load_digit_arrays()
    indices = {split: [] for split in SPLITS}
    for label in range(10):
        of_class = np.flatnonzero(labels == label).tolist()
        ranked = sorted(of_class, key=lambda index: hash_fraction(f"digit_images {index}"))
        held_out = round(HELD_OUT * len(ranked))
        indices["test"] += ranked[:held_out]
        indices["validation"] += ranked[held_out : 2 * held_out]
        indices["train"] += ranked[2 * held_out :]
    return {split: sorted(found) for split, found in indices.items()}


def _videos(indices: list[int]) -> Iterator[tuple[np.ndarray, int]]:
    images, labels = load_digit_arrays()
    for index in indices:
        for number, direction in enumerate(DIRECTIONS):
            video = make_video(images[index], direction, f"moving_digits {index} {direction}")
            yield video, 4 * int(labels[index]) + number


def make_video(digit: np.ndarray, direction: str, name: str) -> np.ndarray:
    """Returns a video of a moving digit.

    Args:
      digit: uint8[8, 8, 1].
      direction: one of `DIRECTIONS`.
      name: decides where the digit starts.

    Returns:
      uint8[8, 16, 16, 1].
    """
    side = len(digit)
    free = CANVAS - side  # a corner of the digit is in 0..free
    across = int(hash_fraction(f"{name} across") * (free + 1))
    first = int(hash_fraction(f"{name} along") * (free - FRAMES + 2))  # the lower end of its path
    path = range(first, first + FRAMES)
    if direction in ("left", "up"):
        path = reversed(path)
    frames = np.zeros((FRAMES, CANVAS, CANVAS, 1), np.uint8)
    for frame, along in zip(frames, path, strict=True):
        top, left = (across, along) if direction in ("left", "right") else (along, across)
        frame[top : top + side, left : left + side] = digit
    return frames
