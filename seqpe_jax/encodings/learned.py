"""One learned vector per position, interpolated when a window or grid is not that of the table."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.encodings.fixed import row_major_index
from seqpe_jax.errors import InputError

CUBIC = -0.75  # the free constant of the cubic kernel; that of PyTorch's bicubic interpolation (Keys 1981: -0.5)


def resize(table: jax.Array, shape: tuple[int, ...], method: str) -> jax.Array:
    """Returns a table float[..., D] of one entry per place of a grid, read at the places of a grid of another shape.

    Half-pixel centres; beyond the border its entry is repeated; no smoothing where the grid gets smaller.

    Args:
      shape: may be symbolic (jax.export); method: "linear" or "cubic" along each axis.
    """
    for axis, side in enumerate(shape):
        places, weights = _taps(table.shape[axis], side, method)
        spread = (-1,) + (1,) * (table.ndim - axis - 1)
        table = sum(
            jnp.take(table, places[tap], axis=axis) * weights[tap].astype(table.dtype).reshape(spread)
            for tap in range(len(places))
        )
    return table


def _taps(old: int, new: int, method: str) -> tuple[jax.Array, jax.Array]:
    """Which of `old` entries each of `new` reads, int32[taps, new], and how much of each, float32[taps, new]."""
    # The centre (i + 1/2) old / new - 1/2 as whole part and rest, in whole numbers: exact at any size.
    doubled = (2 * jnp.arange(new) + 1) * old - new
    reach = {"linear": 1, "cubic": 2}[method]
    taps = np.arange(1 - reach, 1 + reach)[:, None]
    places = doubled // (2 * new) + taps
    distance = jnp.abs((doubled % (2 * new)).astype(jnp.float32) / (2 * new) - taps)
    if method == "linear":
        weights = 1.0 - distance
    else:
        near = (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
        far = CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weights = jnp.where(distance <= 1, near, far)
    return jnp.clip(places, 0, old - 1), weights


class Learned(nn.Module):
    """A learned table added to the tokens (GPT-2's `wpe`, ViT's `pos_embed`).

    Attributes:
      width_model: width of the tokens; table_shape: the window or grid of the table; init_std: of the fresh table.
      prefix: tokens before the positions, such as a class token; the table's first entries are theirs.
    """

    width_model: int
    table_shape: tuple[int, ...]
    init_std: float = 0.02
    prefix: int = 0

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `input_embedding`, float32[P, prefix + L, D], for positions int32[P, L, A] inside of `shape`.

        A longer window reads the table stretched to its length (linear), a shorter one its beginning. A grid of another
        shape reads the table brought to its shape (cubic along each axis), as the PyTorch reference evaluates images.

        Raises:
          InputError: the table has another number of axes.
        """
        axes, sides = positions_PLA.shape[-1], tuple(self.table_shape)
        if axes != len(sides):
            raise InputError(
                f"encoding.kind='learned' has a table of {len(sides)} axes and cannot read {axes} coordinates"
            )
        init = nn.initializers.normal(self.init_std)
        table = self.param("table", init, (self.prefix + int(np.prod(sides)), self.width_model), jnp.float32)
        first, places = table[: self.prefix], table[self.prefix :].reshape(*sides, self.width_model)
        if axes == 1:
            shape = (jax.core.max_dim(shape[0], sides[0]),)
        if shape != sides:
            places = resize(places, shape, "linear" if axes == 1 else "cubic")
        found_PLD = jnp.take(places.reshape(-1, self.width_model), row_major_index(positions_PLA, shape), axis=0)
        first_PLD = jnp.broadcast_to(first, (positions_PLA.shape[0], *first.shape))
        return PositionSignal(input_embedding=jnp.concatenate([first_PLD, found_PLD], axis=1))
