"""Images as the network reads them, made inside compiled functions from the bytes that the host sends."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, Any]


def model_images(batch: Batch, mean: Sequence[float], std: Sequence[float], key: jax.Array | None = None) -> Batch:
    """Returns a batch whose images are normalized, flipped and partly erased, as `data.images` has chosen.

    Args:
      batch: {"images": uint8[B, sides..., C]} with the optional "flip": bool[B] and "erase": int32[B, 4], boxes (top,
        left, height, width) in all frames. Floating-point images are taken as normalized, and stay.
      mean: per channel in 0..1.
      std: per channel in 0..1.
      key: PRNG key of the noise in boxes; None = an evaluation, which has neither flips nor boxes.

    Returns:
      The batch with "images": float32[B, sides..., C], and without "flip" and "erase".
    """
    images = batch["images"]
    if jnp.issubdtype(images.dtype, jnp.floating):
        return batch
    images = normalize(images, mean, std)
    if key is not None and "flip" in batch:
        flipped = batch["flip"].reshape(-1, *(1,) * (images.ndim - 1))
        images = jnp.where(flipped, images[..., ::-1, :], images)
    if key is not None and "erase" in batch:
        noise = jax.random.normal(key, images.shape, images.dtype)
        images = jnp.where(_inside(batch["erase"], images.shape), noise, images)
    return {name: value for name, value in batch.items() if name not in ("flip", "erase")} | {"images": images}


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Scales uint8[..., C] to 0..1, subtracts the mean and divides by the standard deviation of the channel."""
    scaled = images.astype(jnp.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _inside(boxes_B4: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns bool[B, 1..., H, W, 1]: the pixel is inside the box of its image."""
    height, width = shape[-3:-1]
    top_B1, left_B1, high_B1, wide_B1 = (boxes_B4[:, index, None] for index in range(4))
    rows, columns = jnp.arange(height), jnp.arange(width)
    rows_BH = (rows >= top_B1) & (rows < top_B1 + high_B1)
    columns_BW = (columns >= left_B1) & (columns < left_B1 + wide_B1)
    inside_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
    return inside_BHW.reshape(len(boxes_B4), *(1,) * (len(shape) - 4), height, width, 1)
