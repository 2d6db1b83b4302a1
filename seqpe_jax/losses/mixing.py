"""Mixing images of a batch with each other: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019)."""

import jax
import jax.numpy as jnp


def mix_images(
    key: jax.Array, images: jax.Array, labels_B: jax.Array, *, mixup: float, cutmix: float, switch: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (mixed images, partners' labels int32[B], share float32[] of an image's own label).

    Each image is mixed with the one that stands as far from the other end of the batch, all in one way and share.

    Args:
      images: float32[B, sides..., C].
      mixup, cutmix: alpha of the Beta(alpha, alpha) that shares are drawn from; 0 = never.
      switch: probability of cutmix where both are on.
    """
    batch, *sides, _ = images.shape
    key_kind, key_share, key_centre = jax.random.split(key, 3)
    cut = jax.random.uniform(key_kind) < switch if mixup and cutmix else jnp.asarray(bool(cutmix))
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(key_share, alpha, alpha)
    # The box is as much of each side as makes its volume 1 - share; what lies outside the image is lost.
    half = 0.5 * (1.0 - share) ** (1 / len(sides))
    centre_A = jax.random.uniform(key_centre, (len(sides),))
    inside = jnp.ones((), bool)
    for axis, side in enumerate(sides):
        low = jnp.round((centre_A[axis] - half) * side)
        high = jnp.round((centre_A[axis] + half) * side)
        places = jnp.arange(side)
        spread = (-1,) + (1,) * (len(sides) - axis)
        inside = inside & ((places >= low) & (places < high)).reshape(spread)
    own = jnp.where(cut, 1.0 - inside, share)  # [sides..., 1], each pixel's share of its own image
    return own * images + (1.0 - own) * images[::-1], labels_B[::-1], own.mean()
