"""Windows (one axis) and grids (more axes) of positions."""

import jax
import jax.numpy as jnp


def grid(start_A: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the positions of a box, int32[prod(shape), A], row-major: the first axis changes slowest.

    Args:
      start_A: int32[A], the box's lowest corner; may be traced.
      shape: static side along each axis; (L,) is a window of L positions.
    """
    sides = jnp.meshgrid(*(jnp.arange(side, dtype=jnp.int32) for side in shape), indexing="ij")
    return jnp.stack(sides, axis=-1).reshape(-1, len(shape)) + jnp.asarray(start_A, jnp.int32)
