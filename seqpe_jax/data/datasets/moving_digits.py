"""Clips of a handwritten digit that moves: the smallest data whose label needs the order of the frames."""

from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import SPLITS, chance
from seqpe_jax.data.datasets.digit_images import CONTENT, check_no_paths, digits, split_places
from seqpe_jax.data.datasets.image_base import ImageBuilder, LabelledArrays

FRAMES, CANVAS = 8, 16  # frames; pixels of a side
DIRECTIONS = ("left", "right", "up", "down")


class MovingDigits(ImageBuilder):
    """Clips uint8[8, 16, 16, 1] of one digit moving one pixel per frame; label = digit * 4 + direction.

    Each digit image moves once in each direction; clips of a split show digits of that split of `digit_images` only.
    Both directions of an axis visit the same places, so frames without their order do not tell the direction.
    """

    VERSION = tfds.core.Version("1.0.0")
    UNIT = "clips"
    SHAPE = (FRAMES, CANVAS, CANVAS, 1)
    CLASS_NAMES = tuple(f"{digit} {direction}" for digit in range(10) for direction in DIRECTIONS)
    MEAN, STD = (0.0763,), (0.2298,)  # of the train split

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        check_no_paths(cls.name, paths)
        return [CONTENT]

    def images(self) -> Mapping[str, LabelledArrays]:
        return {split: _clips(split_places()[split]) for split in SPLITS}


def _clips(places: list[int]) -> Iterator[tuple[np.ndarray, int]]:
    images, labels = digits()
    for place in places:
        for number, direction in enumerate(DIRECTIONS):
            yield clip(images[place], direction, f"moving_digits {place} {direction}"), 4 * int(labels[place]) + number


def clip(digit: np.ndarray, direction: str, name: str) -> np.ndarray:
    """Returns the clip of a digit uint8[8, 8, 1], uint8[8, 16, 16, 1]; where it starts depends on `name` only."""
    side = len(digit)
    room = CANVAS - side  # a digit's corner stays in 0..room
    across = int(chance(f"{name} across") * (room + 1))
    first = int(chance(f"{name} along") * (room - FRAMES + 2))  # the low end of its way
    along = range(first, first + FRAMES)
    if direction in ("left", "up"):
        along = reversed(along)
    frames = np.zeros((FRAMES, CANVAS, CANVAS, 1), np.uint8)
    for frame, place in zip(frames, along, strict=True):
        top, left = (across, place) if direction in ("left", "right") else (place, across)
        frame[top : top + side, left : left + side] = digit
    return frames
