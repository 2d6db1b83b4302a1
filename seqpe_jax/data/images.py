"""Images and videos for batches: splits read at random, training examples with augmentation, evaluation examples.

Examples are uint8; `losses.image_input` normalizes, flips and erases them on the device.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from seqpe_jax.data import augment as augmentation
from seqpe_jax.data import registry
from seqpe_jax.data.cache import local_copies
from seqpe_jax.data.datasets.base import check_split, datasets_folder
from seqpe_jax.data.datasets.image_base import ImageSource, limit_pixels, read_rgb
from seqpe_jax.data.image_records import prepared_images
from seqpe_jax.errors import InputError
from seqpe_jax.files import cache_root

DRAWN_SIZE = (32, 32)  # where no size is asked for
HOW_TO_REPAIR = "replace it by an undamaged PNG or JPEG file, or leave it out"


def image_source(
    name: str,
    *,
    split: str,
    paths: Sequence[str] = (),
    data_dir: str | os.PathLike = "",
    cache_dir: str | os.PathLike = "",
    progress: bool = True,
    bit_depth: int = 0,
    max_pixels: int = 0,
    prepared: str | os.PathLike = "",
    size: Sequence[int] = (),
) -> ImageSource:
    """Opens a split of a data set of images or videos, after preparing it where that is not done yet.

    Several processes may call it at once; a killed one leaves nothing that is read later.

    Args:
      name: an image data set of `data.registry`.
      split: "train", "validation" or "test".
      paths: `data.paths`.
      data_dir: folder of prepared data sets; "" = CACHE_DIR/datasets.
      cache_dir: "" = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      progress: show progress bars and warnings on stderr.
      bit_depth: bit depth of image_folder, bits of the grey values in files of 16 bits; 0 = 16, and files that use fewer are
        refused.
      max_pixels: largest image of image_folder, in pixels; 0 = Pillow's limit.
      prepared: folder of shards that `data.prepare` wrote, which are read in place of `paths`; "" = none.
      size: (height, width) at which images are drawn, of a data set that draws them.

    Raises:
      InputError: unknown name or split, nothing to read, damaged files, a folder that is not writable, a prepared folder
        that is incomplete or holds other data.
    """
    if isinstance(paths, str):
        paths = (paths,)
    builder = registry.load_builder(name, registry.DATA_IMAGE)
    registry.get(name).check_paths(paths)
    check_split(split)
    if prepared:
        return prepared_images(prepared, name, split, bit_depth, max_pixels)
    options: dict[str, Any] = {
        name: value for name, value in (("bit_depth", bit_depth), ("max_pixels", max_pixels)) if value
    }
    if registry.get(name).is_drawn:
        options["size"] = size or DRAWN_SIZE
    return builder.open_split(
        split,
        paths=local_copies([os.fspath(path) for path in paths], cache_dir, progress),
        datasets=datasets_folder(data_dir, cache_dir),
        cache=cache_root(cache_dir),
        progress=progress,
        **options,
    )


def read_image(file: str, channels: int, bit_depth: int = 0, max_pixels: int = 0) -> np.ndarray:
    """Returns the pixels of an image file, upright, uint8[H, W, channels].

    Args:
      file: name of the file.
      channels: 3, or 1 for grey values.
      bit_depth: see `image_source`.
      max_pixels: see `image_source`.

    Raises:
      InputError: not an image, a damaged one, or one whose values have no known range.
    """
    limit_pixels(max_pixels)
    pixels = read_rgb(file, f"'{file}'", HOW_TO_REPAIR, upright=True, bit_depth=bit_depth)
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def train_example(
    record: Mapping[str, Any], size: Sequence[int], augment: Any, rng: np.random.Generator, *, mean: Sequence[float]
) -> dict[str, np.ndarray]:
    """Returns a training example: a random crop, translated and recoloured, with the changes that the device makes.

    Args:
      record: {"image": uint8[H, W, C], or [T, H, W, C] of a video, "label": int}.
      size: (H, W) of the example, or (T, H, W) of a video, of which T consecutive frames are sampled.
      augment: the fields crop_scale, crop_aspect, flip, translate, randaugment_layers, randaugment_magnitude,
        randaugment_std, color_jitter and erasing. All frames of a video are changed alike. A flip keeps the label, so
        use flip=0 where left and right decide it (moving_digits).
      rng: source of all random numbers.
      mean: per channel in 0..1; RandAugment fills uncovered pixels with it.

    Returns:
      {"images": uint8[*size, C], "labels": int32[]}, with "flip": bool[] if augment.flip, and with "erase": int32[4], the
      box (top, left, height, width) of which a height of 0 is none, if augment.erasing.

    Raises:
      InputError: an image and a size of videos or the reverse, or an augmentation that does not work for videos.
    """
    frames, (height, width) = _frames(record["image"], size)
    is_video = record["image"].ndim == 4
    spare_frames = len(frames) - size[0]
    if is_video:
        first = int(rng.integers(spare_frames + 1)) if spare_frames else 0
        frames = frames[first : first + size[0]]
    if is_video and (augment.randaugment_layers or augment.color_jitter):
        raise InputError(
            "videos cannot be recoloured: set randaugment_layers=0 and color_jitter=0; crop_scale, flip, translate and "
            "erasing work for videos"
        )
    box = augmentation.crop_box(*frames.shape[1:3], augment.crop_scale, augment.crop_aspect, rng)
    pixels = _resize(frames, box, width, height)
    flip = rng.random() < augment.flip
    if augment.translate:
        pixels = augmentation.translate(pixels, augment.translate, rng, mirrored=flip)
    if augment.color_jitter or augment.randaugment_layers:
        pixels = _recolor(pixels, augment, mean, rng)
    example = {"images": pixels if is_video else pixels[0], "labels": np.int32(record["label"])}
    if augment.flip:
        example["flip"] = np.bool_(flip)
    if rng.random() < augment.erasing:
        example["erase"] = np.array(augmentation.erased_box(height, width, rng), np.int32)
    elif augment.erasing:
        example["erase"] = np.zeros(4, np.int32)
    return example


def _recolor(pixels: np.ndarray, augment: Any, mean: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Applies color jitter and RandAugment to uint8[1, H, W, C]."""
    image = _to_image(pixels[0])
    if augment.color_jitter:
        image = augmentation.color_jitter(image, augment.color_jitter, rng)
    if augment.randaugment_layers:
        fill = tuple(round(255 * value) for value in mean)
        policy = (augment.randaugment_layers, augment.randaugment_magnitude, augment.randaugment_std, fill)
        image = augmentation.rand_augment(image, *policy, rng)
    return _to_pixels([image])


def eval_example(record: Mapping[str, Any], size: Sequence[int], crop_ratio: float = 1.0) -> dict[str, np.ndarray]:
    """Returns an evaluation example: the centre of the image, or of a video in time and space.

    The image is resized (bicubic, same aspect ratio) to the smallest size that covers `size` / `crop_ratio`, and the
    centre crop is taken; for a square `size` the shorter side is resized to size / crop_ratio.

    Args:
      record: see `train_example`.
      size: see `train_example`.
      crop_ratio: ratio in (0, 1]; 0.875 is usual for photos, 1 crops the longer side only.

    Returns:
      {"images": uint8[*size, C], "labels": int32[]}.

    Raises:
      InputError: an image and a size of videos or the reverse, or `crop_ratio` is out of range.
    """
    if not 0.0 < crop_ratio <= 1.0:
        raise InputError(f"crop_ratio must be above 0 and at most 1, got {crop_ratio}")
    frames, (height, width) = _frames(record["image"], size)
    is_video = record["image"].ndim == 4
    if is_video:
        first = (len(frames) - size[0]) // 2
        frames = frames[first : first + size[0]]
    old_height, old_width = frames.shape[1:3]
    scale = max(height / crop_ratio / old_height, width / crop_ratio / old_width)
    new_width, new_height = max(width, round(old_width * scale)), max(height, round(old_height * scale))
    left, top = (new_width - width) // 2, (new_height - height) // 2
    # Only the crop is resized: a long strip would take gigabytes.
    box = (
        left * old_width / new_width,
        top * old_height / new_height,
        (left + width) * old_width / new_width,
        (top + height) * old_height / new_height,
    )
    pixels = _resize(frames, box, width, height)
    return {"images": pixels if is_video else pixels[0], "labels": np.int32(record["label"])}


def _frames(image: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns all frames uint8[T, H, W, C], one of an image, and the target (height, width)."""
    if len(size) != image.ndim - 1:
        kind, wanted = ("videos", "(frames, height, width)") if image.ndim == 4 else ("images", "(height, width)")
        raise InputError(f"the data set holds {kind}, so the size must be {wanted}, got {tuple(size)}")
    if image.ndim == 3:
        return image[None], (size[0], size[1])
    if size[0] > len(image):
        raise InputError(f"the videos have {len(image)} frames, but the size has {size[0]}: lower the number of frames")
    return image, (size[1], size[2])


def _resize(frames: np.ndarray, box: tuple[float, float, float, float], width: int, height: int) -> np.ndarray:
    """Resizes the box (left, top, right, bottom) of uint8[T, H, W, C] to uint8[T, height, width, C]."""
    left, top, right, bottom = box
    if (right - left, bottom - top) == (width, height):  # equal to Pillow's result, in a tenth of the time
        return frames[:, int(top) : int(bottom), int(left) : int(right)]
    bicubic = Image.Resampling.BICUBIC
    return _to_pixels([_to_image(frame).resize((width, height), bicubic, box=box) for frame in frames])


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _to_pixels(images: list[Image.Image]) -> np.ndarray:
    """Returns uint8[T, H, W, C]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return pixels[..., None] if pixels.ndim == 3 else pixels


def normalize_pixels(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Scales uint8[..., C] to 0..1, subtracts the mean and divides by the standard deviation of the channel.

    Returns:
      float32[..., C].
    """
    scaled = pixels.astype(np.float32) / np.float32(255)
    return (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
