"""Image augmentation inside the train step: mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), random crops."""

import jax
import jax.numpy as jnp


def mix_images(
    key: jax.Array, images: jax.Array, labels_B: jax.Array, *, mixup: float, cutmix: float, switch: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixes image i with image B - 1 - i, all images of the batch in the same way and proportion.

    Args:
      key: PRNG key.
      images: float32[B, sides..., C].
      labels_B: int32.
      mixup: alpha of the Beta(alpha, alpha) distribution of mixup proportions; 0 = no mixup.
      cutmix: alpha of the Beta(alpha, alpha) distribution of cutmix proportions; 0 = no cutmix.
      switch: probability of cutmix if both are on.

    Returns:
      (mixed images, int32[B] labels of the other images, float32[] proportion of the image's own label).
    """
    batch, *sides, _ = images.shape
    key_kind, key_proportion, key_center = jax.random.split(key, 3)
    cut = jax.random.uniform(key_kind) < switch if mixup and cutmix else jnp.asarray(bool(cutmix))
    alpha = jnp.where(cut, cutmix, mixup)
    proportion = jax.random.beta(key_proportion, alpha, alpha)
    # The box has the volume 1 - proportion before it is clipped to the image.
    half_side = 0.5 * (1.0 - proportion) ** (1 / len(sides))
    center_A = jax.random.uniform(key_center, (len(sides),))
    in_box = jnp.ones((), bool)
    for axis, side in enumerate(sides):
        low = jnp.round((center_A[axis] - half_side) * side)
        high = jnp.round((center_A[axis] + half_side) * side)
        pixels = jnp.arange(side)
        broadcast_shape = (-1,) + (1,) * (len(sides) - axis)
        in_box = in_box & ((pixels >= low) & (pixels < high)).reshape(broadcast_shape)
    own = jnp.where(cut, 1.0 - in_box, proportion)  # [sides..., 1], proportion of the own image in each pixel
    return own * images + (1.0 - own) * images[::-1], labels_B[::-1], own.mean()


def crop_and_resize(images: jax.Array, crop_boxes_PA2: jax.Array) -> jax.Array:
    """Crops image i to box i mod P and enlarges the crop to the size of the image, with cubic interpolation.

    Args:
      images: float32[B, sides..., C].
      crop_boxes_PA2: float32 (first, length) along each axis, as fractions of the side.

    Returns:
      float32[B, sides..., C].
    """
    sides = images.shape[1:-1]

    def resize(image: jax.Array, box_A2: jax.Array) -> jax.Array:
        scale_A = 1.0 / box_A2[:, 1]
        translation_A = -box_A2[:, 0] * scale_A * jnp.array(sides, jnp.float32)
        return jax.image.scale_and_translate(
            image, image.shape, tuple(range(len(sides))), scale_A, translation_A, "cubic", antialias=False
        )

    resize_sets = jax.vmap(resize)
    groups = images.reshape(-1, len(crop_boxes_PA2), *images.shape[1:])
    return jax.vmap(lambda group: resize_sets(group, crop_boxes_PA2))(groups).reshape(images.shape)
