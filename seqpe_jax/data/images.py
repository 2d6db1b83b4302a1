"""Labelled images and clips: a split read at random, and what becomes of an image on its way into a batch."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from seqpe_jax.data import augment as changes
from seqpe_jax.data import registry
from seqpe_jax.data.cache import local_copies
from seqpe_jax.data.datasets.base import SPLITS
from seqpe_jax.data.datasets.image_base import ImageSource
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import cache_root


def image_source(
    name: str,
    *,
    split: str,
    paths: Sequence[str] = (),
    data_dir: str | os.PathLike = "",
    cache_dir: str | os.PathLike = "",
    progress: bool = True,
    bit_depth: int = 0,
) -> ImageSource:
    """Returns a split of a data set of images or clips, preparing it when that has not been done yet.

    Safe to call from several processes at once; a killed one leaves nothing that is read later.

    Args:
      name: digit_images, moving_digits, image_folder, imagenet2012 or imagenet_resized.
      split: train, validation or test.
      paths: the builder's.
      data_dir: prepared data sets; none = CACHE_DIR/datasets.
      cache_dir: none = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      progress: show how far long work is, on stderr.
      bit_depth: of image_folder, bits of the grey values in files of 16 bits; 0 = 16, and files that use fewer are refused.

    Raises:
      InputError: unknown name or split, nothing to read, damaged files, a folder not writable.
    """
    if isinstance(paths, str):
        paths = (paths,)
    builder = registry.load_builder(name, registry.DATA_IMAGE)
    registry.get(name).check_paths(paths)
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}'.{suggest(split, SPLITS)}")
    root = cache_root(cache_dir)
    options = {"bit_depth": bit_depth} if bit_depth else {}
    return builder.open_split(
        split,
        paths=local_copies([os.fspath(path) for path in paths], cache_dir, progress),
        datasets=pathlib.Path(data_dir).expanduser().absolute() if data_dir else root / "datasets",
        cache=root,
        progress=progress,
        **options,
    )


def train_example(
    record: Mapping[str, Any],
    size: Sequence[int],
    augment: Any,
    rng: np.random.Generator,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, np.ndarray]:
    """Returns a training example: part of the image, flipped, moved, recoloured as drawn, normalised, partly erased.

    Args:
      record: {"image": uint8[H, W, C], or [T, H, W, C] of a clip, "label": int}.
      size: (H, W) of the example, or (T, H, W) of a clip, of which T frames in a row are drawn.
      augment: the settings: crop_scale, crop_aspect, flip, translate, randaugment_layers, randaugment_magnitude,
        randaugment_std, color_jitter, erasing. What is done to a clip is the same in all its frames. A flip keeps the
        label, so flip=0 where left and right make it (moving_digits).
      rng: all that is drawn comes from it.
      mean, std: per channel, in 0..1.

    Returns:
      {"images": float32[*size, C], "labels": int32[]}.

    Raises:
      InputError: a clip and `size` do not fit, or a setting that does not work for clips.
    """
    frames, (height, width) = _frames(record["image"], size)
    is_clip, left_out = record["image"].ndim == 4, len(frames) - size[0]
    if is_clip:
        first = int(rng.integers(left_out + 1)) if left_out else 0
        frames = frames[first : first + size[0]]
    if is_clip and (augment.randaugment_layers or augment.color_jitter):
        raise InputError(
            "clips cannot be recoloured: set randaugment_layers=0 and color_jitter=0; crop_scale, flip, translate and "
            "erasing work for clips"
        )
    box = changes.crop_box(*frames.shape[1:3], augment.crop_scale, augment.crop_aspect, rng)
    pixels = _resized(frames, box, width, height)
    if rng.random() < augment.flip:
        pixels = pixels[..., ::-1, :]
    if augment.translate:
        pixels = changes.translate(pixels, augment.translate, rng)
    if augment.color_jitter or augment.randaugment_layers:
        picture = _to_image(pixels[0])
        if augment.color_jitter:
            picture = changes.color_jitter(picture, augment.color_jitter, rng)
        if augment.randaugment_layers:
            fill = tuple(round(255 * value) for value in mean)
            policy = (augment.randaugment_layers, augment.randaugment_magnitude, augment.randaugment_std, fill)
            picture = changes.rand_augment(picture, *policy, rng)
        pixels = _to_pixels([picture])
    pixels = normalize_pixels(pixels, mean, std)
    if rng.random() < augment.erasing:
        pixels = changes.erase(pixels, rng)
    return {"images": pixels if is_clip else pixels[0], "labels": np.int32(record["label"])}


def eval_example(
    record: Mapping[str, Any],
    size: Sequence[int],
    crop_ratio: float = 1.0,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, np.ndarray]:
    """Returns an example for evaluation: the middle of the image, or of a clip in time and space, normalised.

    The image is resized (bicubic), its aspect kept, to the smallest size that covers `size` / `crop_ratio`; for a square
    `size` its shorter side has size / crop_ratio then. The middle of it is cut out.

    Args:
      record, size, mean, std: as of `train_example`.
      crop_ratio: in (0, 1]; 0.875 is usual for photos, 1 leaves nothing out but the longer side's ends.

    Returns:
      {"images": float32[*size, C], "labels": int32[]}.

    Raises:
      InputError: a clip and `size` do not fit, or `crop_ratio` is out of range.
    """
    if not 0.0 < crop_ratio <= 1.0:
        raise InputError(f"crop_ratio must be above 0 and at most 1, got {crop_ratio}")
    frames, (height, width) = _frames(record["image"], size)
    if record["image"].ndim == 4:
        first = (len(frames) - size[0]) // 2
        frames = frames[first : first + size[0]]
    scale = max(height / crop_ratio / frames.shape[1], width / crop_ratio / frames.shape[2])
    whole = max(width, round(frames.shape[2] * scale)), max(height, round(frames.shape[1] * scale))
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    # The middle alone is resized: of a long strip the whole would take gigabytes.
    across, down = frames.shape[2], frames.shape[1]
    box = (
        left * across / whole[0],
        top * down / whole[1],
        (left + width) * across / whole[0],
        (top + height) * down / whole[1],
    )
    pixels = normalize_pixels(_resized(frames, box, width, height), mean, std)
    return {"images": pixels if record["image"].ndim == 4 else pixels[0], "labels": np.int32(record["label"])}


def _frames(image: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns all frames uint8[T, H, W, C] and the target (height, width); an image is a clip of one frame."""
    if len(size) != image.ndim - 1:
        kind, wanted = ("clips", "(frames, height, width)") if image.ndim == 4 else ("images", "(height, width)")
        raise InputError(f"the data set holds {kind}, so its size is {wanted}, got {tuple(size)}")
    if image.ndim == 3:
        return image[None], (size[0], size[1])
    if size[0] > len(image):
        raise InputError(f"the clips have {len(image)} frames, {size[0]} are asked for: lower the number of frames")
    return image, (size[1], size[2])


def _resized(frames: np.ndarray, box: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    """Returns the part (left, top, right, bottom) of uint8[T, H, W, C] as uint8[T, height, width, C]."""
    left, top, right, bottom = box
    if (right - left, bottom - top) == (
        width,
        height,
    ):  # what Pillow would give, at a tenth of the time for small clips
        return frames[:, int(top) : int(bottom), int(left) : int(right)]
    bicubic = Image.Resampling.BICUBIC
    return _to_pixels([_to_image(frame).resize((width, height), bicubic, box=box) for frame in frames])


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _to_pixels(pictures: list[Image.Image]) -> np.ndarray:
    """Returns uint8[T, H, W, C]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return pixels[..., None] if pixels.ndim == 3 else pixels


def normalize_pixels(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Returns pixels uint8[..., C] scaled to 0..1, less the mean and divided by the deviation of their channel, float32."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
