"""Encodings that are added to the tokens, sinusoidal or learned, and the model without an encoding."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.config import LearnedConfig, ModelDims, NoPositionConfig, SinusoidalConfig
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.encodings.rope import axis_frequencies, flatten_positions, row_major_index, unit_circle
from seqpe_jax.errors import InputError

CUBIC = -0.75  # the free constant of the cubic kernel; that of PyTorch's bicubic interpolation (Keys 1981: -0.5)


class NoPosition(nn.Module):
    """No encoding (NoPE): a causal model infers order from what each token can see.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: NoPositionConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns an empty signal."""
        return PositionSignal()


class Sinusoidal(nn.Module):
    """Sines (even columns) and cosines (odd columns) added to the tokens (Vaswani et al. 2017).

    On a grid the columns are divided among the axes, the first axis first (as the table of MAE, He et al. 2022); the
    tokens before the grid then get nothing. The PyTorch reference has the flattened form alone.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: SinusoidalConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `input_embedding`, float32[P, prefix + L, D], for positions int32[P, L, A] of a grid of this shape."""
        config, width = self.config, self.dims.width
        if self.dims.compat.flatten:
            positions_PLA = flatten_positions(positions_PLA, shape, self.dims.prefix_tokens)
        axes = positions_PLA.shape[-1]
        frequencies = axis_frequencies(width, axes, config.theta)
        circles = [
            unit_circle(positions_PLA[..., axis], frequencies[axis] / config.position_resolution)
            for axis in range(axes)
        ]
        cos, sin = (jnp.concatenate(part, axis=-1) for part in zip(*circles, strict=True))
        table_PLD = jnp.stack([sin, cos], axis=-1).reshape(*sin.shape[:-1], -1)[..., :width]
        if not self.dims.compat.flatten:
            table_PLD = jnp.pad(table_PLD, ((0, 0), (self.dims.prefix_tokens, 0), (0, 0)))
        return PositionSignal(input_embedding=config.amplitude * table_PLD)


class Learned(nn.Module):
    """A learned table added to the tokens (GPT-2's `wpe`, ViT's `pos_embed`).

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model; the table's first entries are those of the tokens before the positions.
    """

    config: LearnedConfig
    dims: ModelDims

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `input_embedding`, float32[P, prefix + L, D], for positions int32[P, L, A] inside of `shape`.

        A longer window interpolates the table to its length (linear), a shorter one reads its beginning. A grid of another
        shape interpolates the table to its shape (cubic along each axis), as the PyTorch reference evaluates images.

        Raises:
          InputError: the table has another number of axes.
        """
        axes, sides, prefix, width = positions_PLA.shape[-1], self.dims.grid, self.dims.prefix_tokens, self.dims.width
        sides = (self.config.table_length,) if self.config.table_length else sides
        if axes != len(sides):
            raise InputError(
                f"encoding.kind='learned' has a table of {len(sides)} axes and cannot read {axes} coordinates"
            )
        init = nn.initializers.normal(self.config.init_std)
        table = self.param("table", init, (prefix + int(np.prod(sides)), width), jnp.float32)
        first, entries = table[:prefix], table[prefix:].reshape(*sides, width)
        if axes == 1:
            shape = (jax.core.max_dim(shape[0], sides[0]),)
        if shape != sides:
            entries = resize_table(entries, shape, "linear" if axes == 1 else "cubic")
        own_PLD = jnp.take(entries.reshape(-1, width), row_major_index(positions_PLA, shape), axis=0)
        first_PLD = jnp.broadcast_to(first, (positions_PLA.shape[0], *first.shape))
        return PositionSignal(input_embedding=jnp.concatenate([first_PLD, own_PLD], axis=1))


def resize_table(table: jax.Array, shape: tuple[int, ...], method: str) -> jax.Array:
    """Returns a table of one entry per position of a grid, interpolated to a grid of another shape.

    Half-pixel centres; entries at the border are repeated beyond it; no smoothing where the grid gets smaller.

    Args:
      table: float[sides..., D].
      shape: shape of the new grid; may be symbolic (jax.export).
      method: "linear" or "cubic" along each axis.
    """
    for axis, side in enumerate(shape):
        indices, weights = _interpolation_taps(table.shape[axis], side, method)
        spread = (-1,) + (1,) * (table.ndim - axis - 1)
        table = sum(
            jnp.take(table, indices[tap], axis=axis) * weights[tap].astype(table.dtype).reshape(spread)
            for tap in range(len(indices))
        )
    return table


def _interpolation_taps(old: int, new: int, method: str) -> tuple[jax.Array, jax.Array]:
    """Entries of `old` that each of `new` is a sum of, int32[taps, new], and their weights, float32[taps, new]."""
    # The centre (i + 1/2) old / new - 1/2 as integer part and rest, in integers: exact at any size.
    doubled = (2 * jnp.arange(new) + 1) * old - new
    radius = {"linear": 1, "cubic": 2}[method]
    taps = np.arange(1 - radius, 1 + radius)[:, None]
    indices = doubled // (2 * new) + taps
    distance = jnp.abs((doubled % (2 * new)).astype(jnp.float32) / (2 * new) - taps)
    if method == "linear":
        weights = 1.0 - distance
    else:
        near = (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
        far = CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        weights = jnp.where(distance <= 1, near, far)
    return jnp.clip(indices, 0, old - 1), weights
