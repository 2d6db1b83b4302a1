"""Augmentation of training images on the host; all random numbers come from the given generator."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_ATTEMPTS = 10  # to sample a box that fits, before the fallback
ERASED_AREA = (0.02, 1 / 3)  # share of the image, Zhong et al., arXiv 1708.04896
ERASED_ASPECT = (0.3, 1 / 0.3)

MAX_MAGNITUDE = 10.0
OP_PROBABILITY = 0.5  # that a sampled operation is applied

# Strength of the operations at the highest magnitude (Cubuk et al., arXiv 1805.09501 and 1909.13719).
MAX_ROTATION = 30.0  # degrees
MAX_SHEAR = 0.3
MAX_SHIFT = 0.45  # of the side
MAX_ENHANCEMENT = 0.9  # a factor of 1 - 0.9 or 1 + 0.9
MAX_POSTERIZED_BITS = 4  # of a channel, that are removed
MAX_SOLARIZE_ADDED = 110


def crop_box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Samples the box of a random resized crop (Szegedy et al., arXiv 1409.4842).

    If no sampled box fits, it is the largest centred one with an allowed aspect ratio.

    Args:
      height: height of the image, in pixels.
      width: width of the image, in pixels.
      scale: range of the share of the area, sampled uniformly; (1, 1) = the complete image, whatever its aspect ratio.
      aspect: range of width / height, whose logarithm is sampled uniformly.
      rng: source of random numbers.

    Returns:
      (left, top, right, bottom).
    """
    if tuple(scale) == (1.0, 1.0):
        return 0, 0, width, height
    for _ in range(MAX_ATTEMPTS):
        area = rng.uniform(*scale) * height * width
        ratio = math.exp(rng.uniform(*np.log(aspect)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    ratio = min(max(width / height, aspect[0]), aspect[1])
    wide, high = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def translate(pixels: np.ndarray, limit: int, rng: np.random.Generator, *, mirrored: bool = False) -> np.ndarray:
    """Moves pixels[..., H, W, C] by up to `limit` pixels along both axes, with zeros at the uncovered border.

    If `mirrored`, they move left instead of right, as if they had been flipped before and were flipped back now.
    """
    height, width = pixels.shape[-3:-1]
    down, right = (int(rng.integers(-limit, limit + 1)) for _ in range(2))
    moved = np.zeros_like(pixels)
    to_rows, from_rows = _overlap(down, height)
    to_columns, from_columns = _overlap(-right if mirrored else right, width)
    moved[..., to_rows, to_columns, :] = pixels[..., from_rows, from_columns, :]
    return moved


def _overlap(offset: int, length: int) -> tuple[slice, slice]:
    size = max(0, length - abs(offset))
    if offset >= 0:
        return slice(length - size, length), slice(0, size)
    return slice(0, size), slice(length - size, length)


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Multiplies brightness, contrast and saturation by factors in 1 +- `strength`, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(len(enhancers)):
        image = enhancers[number](image).enhance(rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength))
    return image


def erased_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Samples the box of random erasing (Zhong et al., arXiv 1708.04896).

    Args:
      height: height of the image, in pixels.
      width: width of the image, in pixels.
      rng: source of random numbers.

    Returns:
      (top, left, height, width); all zeros if no sampled box fits.
    """
    for _ in range(MAX_ATTEMPTS):
        area = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(*np.log(ERASED_ASPECT)))
        wide, high = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if wide < width and high < height:
            top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
            return top, left, high, wide
    return 0, 0, 0, 0


def rand_augment(
    image: Image.Image, layers: int, magnitude: float, std: float, fill: tuple[int, ...], rng: np.random.Generator
) -> Image.Image:
    """RandAugment (Cubuk et al., arXiv 1909.13719), in the variant of DeiT and Swin.

    Operations are sampled with replacement; each is applied with probability 1/2, at a magnitude from a normal
    distribution clipped to 0..10.

    Args:
      image: grey or RGB, 8 bits.
      layers: number of sampled operations.
      magnitude: mean strength, in 0..10.
      std: standard deviation of the strength.
      fill: value of uncovered pixels, one number in 0..255 per channel.
      rng: source of random numbers.
    """
    for number in rng.integers(len(OPERATIONS), size=layers):
        if rng.random() < OP_PROBABILITY:
            level = min(max(rng.normal(magnitude, std), 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
            image = list(OPERATIONS.values())[number](image, level, fill, rng)
    return image


Operation = Callable[[Image.Image, float, tuple[int, ...], np.random.Generator], Image.Image]


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _enhanced(enhancer: type) -> Operation:
    def operation(image, level, fill, rng):
        return enhancer(image).enhance(1.0 + _signed(MAX_ENHANCEMENT * level, rng))

    return operation


def _affine(matrix: Callable[[float, Image.Image], tuple[float, ...]]) -> Operation:
    def operation(image, level, fill, rng):
        data = matrix(_signed(level, rng), image)
        return image.transform(
            image.size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC, fillcolor=_color(fill)
        )

    return operation


def _color(fill: tuple[int, ...]) -> int | tuple[int, ...]:
    return fill[0] if len(fill) == 1 else fill  # Pillow wants a number for grey images


def _rotate(image, level, fill, rng):
    return image.rotate(_signed(MAX_ROTATION * level, rng), Image.Resampling.BICUBIC, fillcolor=_color(fill))


def _posterize(image, level, fill, rng):
    # At least one bit stays: without any the image is black.
    return ImageOps.posterize(image, max(1, MAX_POSTERIZED_BITS - int(MAX_POSTERIZED_BITS * level)))


def _solarize(image, level, fill, rng):
    return ImageOps.solarize(image, 256 - int(256 * level))


def _solarize_add(image, level, fill, rng):
    added = int(MAX_SOLARIZE_ADDED * level)
    return image.point(
        [min(255, value + added) if value < 128 else value for value in range(256)] * len(image.getbands())
    )


# Each takes (image, level in 0..1, fill, generator).
OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, level, fill, rng: ImageOps.autocontrast(image),
    "equalize": lambda image, level, fill, rng: ImageOps.equalize(image),
    "invert": lambda image, level, fill, rng: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda level, image: (1, MAX_SHEAR * level, 0, 0, 1, 0)),
    "shear_y": _affine(lambda level, image: (1, 0, 0, MAX_SHEAR * level, 1, 0)),
    "translate_x": _affine(lambda level, image: (1, 0, MAX_SHIFT * level * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda level, image: (1, 0, 0, 0, 1, MAX_SHIFT * level * image.height)),
}
