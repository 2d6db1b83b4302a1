"""Windows (one axis) and grids (more axes) of positions, and how fine the ruler is that their places stand on."""

import dataclasses

import jax
import jax.numpy as jnp


def grid(start_A: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the positions of a box, int32[prod(shape), A], row-major: the first axis changes slowest.

    Args:
      start_A: int32[A], the box's lowest corner; may be traced.
      shape: static side along each axis; (L,) is a window of L positions.
    """
    return _product([jnp.arange(side, dtype=jnp.int32) for side in shape]) + jnp.asarray(start_A, jnp.int32)


@dataclasses.dataclass(frozen=True)
class PositionGrid:
    """Where the places of windows and grids stand: a position is a fixed-point number, held as a whole number of units.

    Attributes:
      position_resolution: units from one training token or patch to the next, base ** (digits after the point); 1 = whole numbers.
      stretched: the places of the training grid along each axis, on whose length every longer text and every grid of
        another size is read, each place in the middle of its cell; 0 for an axis along which longer ones go on past it,
        () = along all.
    """

    position_resolution: int = 1
    interpolated_sides: tuple[int, ...] = ()

    def first_position(self, axis: int) -> int:
        """Returns the first position of the training grid along an axis, in units."""
        return self.position_resolution // 2 if self._training_side(axis) else 0

    def positions(self, shape: tuple[int, ...], first: jax.Array | int = 0, rows: int | None = None) -> jax.Array:
        """Returns the positions of a window or grid in units, int32[rows * rest of the shape, A], row-major.

        Args:
          shape: places along each axis; may be symbolic (jax.export).
          first, rows: only that part of the first axis; `first` may be traced. None = all of it.
        """
        rows = shape[0] if rows is None else rows
        return _product(
            [
                self._position_of(axis, side, first + jnp.arange(rows) if axis == 0 else jnp.arange(side))
                for axis, side in enumerate(shape)
            ]
        )

    def crop_positions(self, shape: tuple[int, ...], crop_boxes_PA2: jax.Array) -> jax.Array:
        """Returns the positions int32[P, L, A] of grids of the training shape, each laid over a part of the whole one.

        Args:
          boxes_PA2: (first, length) of the parts along each axis, as shares of the side (`sampling.boxes`).
        """

        def positions_of(box_A2: jax.Array) -> jax.Array:
            return _product(
                [
                    jnp.floor((first * side + (jnp.arange(side) + 0.5) * length) * self.position_resolution).astype(
                        jnp.int32
                    )
                    if self._training_side(axis)
                    else self._position_of(axis, side, jnp.arange(side))
                    for axis, (side, (first, length)) in enumerate(zip(shape, box_A2, strict=True))
                ]
            )

        return jax.vmap(positions_of)(crop_boxes_PA2)

    def spans(self, shape: tuple[int, ...], rows: int | None = None) -> tuple[int, ...]:
        """Returns the units between the first and the last position along each axis, at most; arguments as of `grid`."""
        counts = (shape[0] if rows is None else rows, *shape[1:])
        return tuple(
            (count - 1) * (self._training_side(axis) * self.position_resolution) // side + 1
            if self._training_side(axis)
            else (count - 1) * self.position_resolution
            for axis, (count, side) in enumerate(zip(counts, shape, strict=True))
        )

    def table_shape(self, reach: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Returns (sides, step) of a table that holds all positions which grids of up to `reach` places stand on."""
        if not any(self.interpolated_sides):
            return reach, self.position_resolution
        return tuple(
            (self._training_side(axis) or places) * self.position_resolution for axis, places in enumerate(reach)
        ), 1

    def _position_of(self, axis: int, side: int, places: jax.Array) -> jax.Array:
        """Positions int32[...] of some places of an axis with `side` of them."""
        length = self._training_side(axis)
        if not length:
            return (places * self.position_resolution).astype(jnp.int32)
        if len(self.interpolated_sides) == 1:  # a text that is shorter stands at the beginning
            side = jax.core.max_dim(side, length)
        return _scaled(2 * places + 1, length * self.position_resolution, 2 * side).astype(jnp.int32)

    def _training_side(self, axis: int) -> int:
        """Training places along an axis that is stretched, else 0."""
        return self.interpolated_sides[axis] if self.interpolated_sides else 0


def _scaled(numbers: jax.Array, amount: int, parts: int) -> jax.Array:
    """floor(numbers * amount / parts), int32, for numbers up to `parts`, whose products with the amount may be larger.

    Exact for amounts below 2**31 and parts up to 2**20; parts may be symbolic (jax.export).
    """
    whole, rest = amount // parts, amount % parts
    high = numbers // 512 * rest
    low = high % parts * 512 + numbers % 512 * rest
    return numbers * whole + high // parts * 512 + low // parts


def _product(sides: list[jax.Array]) -> jax.Array:
    """All combinations of the coordinates of each axis, int32[count, A], the first axis changing slowest."""
    return jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(sides))
