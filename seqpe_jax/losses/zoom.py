"""Parts of images, enlarged to the size of the whole, whose patches stand where they are in it."""

import jax
import jax.numpy as jnp


def zoom(images: jax.Array, crop_boxes_PA2: jax.Array) -> jax.Array:
    """Returns each image's box, brought to the size of the whole image; sample i takes box i mod P.

    Cubic along each axis, as images are resized for evaluation.

    Args:
      images: float32[B, sides..., C]; boxes_PA2: (first, length) along each axis, as shares of the side.
    """
    sides = images.shape[1:-1]

    def enlarged(image: jax.Array, box_A2: jax.Array) -> jax.Array:
        scale_A = 1.0 / box_A2[:, 1]
        move_A = -box_A2[:, 0] * scale_A * jnp.array(sides, jnp.float32)
        return jax.image.scale_and_translate(
            image, image.shape, tuple(range(len(sides))), scale_A, move_A, "cubic", antialias=False
        )

    sets = jax.vmap(enlarged)
    grouped = images.reshape(-1, len(crop_boxes_PA2), *images.shape[1:])
    return jax.vmap(lambda group: sets(group, crop_boxes_PA2))(grouped).reshape(images.shape)
