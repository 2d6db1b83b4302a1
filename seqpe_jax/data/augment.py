"""Random changes of training pictures. Each draws from the generator it is given, so an example can be made again."""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

ATTEMPTS = 10  # to draw a box that fits, before the usual fallback
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # Zhong et al., arXiv 1708.04896

LEVELS = 10.0  # a magnitude is in 0..LEVELS
OP_PROBABILITY = 0.5  # that a drawn operation is applied

# What an operation does at the highest magnitude (Cubuk et al., arXiv 1805.09501 and 1909.13719).
ROTATION = 30.0  # degrees
SHEAR = 0.3
SHIFT = 0.45  # of the side
ENHANCEMENT = 0.9  # a factor of 1 - 0.9 or 1 + 0.9
POSTERIZED_BITS = 4  # the bits of a channel go from 4 down
SOLARIZE_ADDED = 110


def crop_box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random part of a picture.

    Its share of the area is uniform in `scale`, the logarithm of width / height in that of `aspect`; where no drawn box
    fits, it is the largest one in the middle whose aspect is allowed. scale=(1, 1) is the whole picture, whatever its
    aspect. After Szegedy et al., arXiv 1409.4842.
    """
    if tuple(scale) == (1.0, 1.0):
        return 0, 0, width, height
    for _ in range(ATTEMPTS):
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


def translate(pixels: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Returns pixels[..., H, W, C] moved by up to `limit` pixels each way, zeros where nothing was."""
    height, width = pixels.shape[-3:-1]
    down, right = (int(rng.integers(-limit, limit + 1)) for _ in range(2))
    moved = np.zeros_like(pixels)
    to_rows, from_rows = _overlap(down, height)
    to_columns, from_columns = _overlap(right, width)
    moved[..., to_rows, to_columns, :] = pixels[..., from_rows, from_columns, :]
    return moved


def _overlap(offset: int, length: int) -> tuple[slice, slice]:
    kept = max(0, length - abs(offset))
    if offset >= 0:
        return slice(length - kept, length), slice(0, kept)
    return slice(0, kept), slice(length - kept, length)


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Returns an image with brightness, contrast and saturation each times a factor in 1 +- `strength`, in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in rng.permutation(len(enhancers)):
        image = enhancers[place](image).enhance(rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength))
    return image


def erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns normalised pixels float32[..., H, W, C] with one box of normal noise, in the same place of all frames."""
    height, width = pixels.shape[-3:-1]
    for _ in range(ATTEMPTS):
        area = rng.uniform(*ERASED_AREA) * height * width
        ratio = math.exp(rng.uniform(*np.log(ERASED_ASPECT)))
        wide, high = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if wide < width and high < height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            erased = pixels.copy()
            box = erased[..., top : top + high, left : left + wide, :]
            box[...] = rng.standard_normal(box.shape, dtype=np.float32)
            return erased
    return pixels


def rand_augment(
    image: Image.Image, layers: int, magnitude: float, std: float, fill: tuple[int, ...], rng: np.random.Generator
) -> Image.Image:
    """Returns an image after `layers` drawn operations, all of which do more at a higher magnitude.

    Operations are drawn with replacement, each applied with probability 1/2 at a magnitude that is normal around
    `magnitude`, clipped to 0..10. RandAugment (Cubuk et al., arXiv 1909.13719) in the form in which DeiT and Swin use it.

    Args:
      image: grey or RGB, 8 bit.
      fill: what comes in from outside, one number in 0..255 per channel.
    """
    for place in rng.integers(len(OPERATIONS), size=layers):
        if rng.random() < OP_PROBABILITY:
            level = min(max(rng.normal(magnitude, std), 0.0), LEVELS) / LEVELS
            image = list(OPERATIONS.values())[place](image, level, fill, rng)
    return image


Operation = Callable[[Image.Image, float, tuple[int, ...], np.random.Generator], Image.Image]


def _signed(value: float, rng: np.random.Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _enhanced(enhancer: type) -> Operation:
    def operation(image, level, fill, rng):
        return enhancer(image).enhance(1.0 + _signed(ENHANCEMENT * level, rng))

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
    return image.rotate(_signed(ROTATION * level, rng), Image.Resampling.BICUBIC, fillcolor=_color(fill))


def _posterize(image, level, fill, rng):
    # One bit is left at least: without any the picture is black.
    return ImageOps.posterize(image, max(1, POSTERIZED_BITS - int(POSTERIZED_BITS * level)))


def _solarize(image, level, fill, rng):
    return ImageOps.solarize(image, 256 - int(256 * level))


def _solarize_add(image, level, fill, rng):
    added = int(SOLARIZE_ADDED * level)
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
    "shear_x": _affine(lambda level, image: (1, SHEAR * level, 0, 0, 1, 0)),
    "shear_y": _affine(lambda level, image: (1, 0, 0, SHEAR * level, 1, 0)),
    "translate_x": _affine(lambda level, image: (1, 0, SHIFT * level * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda level, image: (1, 0, 0, 0, 1, SHIFT * level * image.height)),
}
