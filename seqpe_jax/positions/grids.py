"""Positions of windows (one axis) and grids (several axes) as fixed-point numbers."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class PositionGrid:
    """Maps token or patch indices to positions, fixed-point numbers held as integer multiples of a smallest step.

    Attributes:
      position_resolution: steps between neighboring training tokens or patches, base ** fractional digits; 1: integers.
      interpolated_sides: training tokens or patches along each axis. Along such an axis a longer window or a grid of another
        size is interpolated onto the training range, each patch at the center of its cell. 0: the axis extrapolates, longer
        ones continue beyond the training range. (): all axes extrapolate.
    """

    position_resolution: int = 1
    interpolated_sides: tuple[int, ...] = ()

    def first_position(self, axis: int) -> int:
        """Returns the first position of the training grid along an axis."""
        return self.position_resolution // 2 if self._training_side(axis) else 0

    def positions(self, shape: tuple[int, ...], first: jax.Array | int = 0, rows: int | None = None) -> jax.Array:
        """Returns the positions of a window or grid, int32[rows * prod(shape[1:]), A], row-major.

        Args:
          shape: tokens or patches along each axis; may be symbolic (jax.export).
          first: first index along the first axis; may be traced.
          rows: number of indices along the first axis; None = all.
        """
        rows = shape[0] if rows is None else rows
        return _cartesian_product(
            [
                self._axis_positions(axis, side, first + jnp.arange(rows) if axis == 0 else jnp.arange(side))
                for axis, side in enumerate(shape)
            ]
        )

    def crop_positions(self, shape: tuple[int, ...], crop_boxes_PA2: jax.Array) -> jax.Array:
        """Returns the positions int32[P, L, A] of grids of the training shape that cover crops of the training grid.

        Args:
          shape: sides of the training grid.
          crop_boxes_PA2: float32 (first, length) along each axis, as fractions of the side (`sampling.crop_boxes`).
        """

        def axis_positions(axis: int, side: int, box_2: jax.Array) -> jax.Array:
            if not self._training_side(axis):
                return self._axis_positions(axis, side, jnp.arange(side))
            first, length = box_2
            centers = first * side + (jnp.arange(side) + 0.5) * length
            return jnp.floor(centers * self.position_resolution).astype(jnp.int32)

        def positions(box_A2: jax.Array) -> jax.Array:
            return _cartesian_product([axis_positions(axis, side, box_A2[axis]) for axis, side in enumerate(shape)])

        return jax.vmap(positions)(crop_boxes_PA2)

    def spans(self, shape: tuple[int, ...], rows: int | None = None) -> tuple[int, ...]:
        """Returns an upper bound of the distance between first and last position along each axis; arguments: `positions`."""
        counts = (shape[0] if rows is None else rows, *shape[1:])
        return tuple(
            (count - 1) * (self._training_side(axis) * self.position_resolution) // side + 1
            if self._training_side(axis)
            else (count - 1) * self.position_resolution
            for axis, (count, side) in enumerate(zip(counts, shape, strict=True))
        )

    def table_shape(self, max_shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Returns (sides, step between positions) of a table with all positions of grids up to a shape."""
        if not any(self.interpolated_sides):
            return max_shape, self.position_resolution
        sides = tuple(
            (self._training_side(axis) or side) * self.position_resolution for axis, side in enumerate(max_shape)
        )
        return sides, 1

    def _axis_positions(self, axis: int, side: int, index: jax.Array) -> jax.Array:
        """Returns the positions int32[...] of indices along an axis with `side` tokens or patches."""
        training_side = self._training_side(axis)
        if not training_side:
            return (index * self.position_resolution).astype(jnp.int32)
        if len(self.interpolated_sides) == 1:  # a shorter text is not interpolated
            side = jax.core.max_dim(side, training_side)
        return _scale(2 * index + 1, training_side * self.position_resolution, 2 * side).astype(jnp.int32)

    def _training_side(self, axis: int) -> int:
        """Returns the training tokens or patches along an interpolated axis, else 0."""
        return self.interpolated_sides[axis] if self.interpolated_sides else 0


def _scale(numbers: jax.Array, numerator: int, denominator: int) -> jax.Array:
    """Returns floor(numbers * numerator / denominator), int32, without overflow of the products.

    Exact for numbers up to the denominator, numerators below 2**31 and denominators up to 2**20, which may be symbolic
    (jax.export).
    """
    quotient, remainder = numerator // denominator, numerator % denominator
    high = numbers // 512 * remainder
    low = high % denominator * 512 + numbers % 512 * remainder
    return numbers * quotient + high // denominator * 512 + low // denominator


def _cartesian_product(axes: list[jax.Array]) -> jax.Array:
    """Returns all combinations of coordinates, int32[count, A], row-major."""
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
