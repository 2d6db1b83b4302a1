"""Digits of positions: each coordinate has a fixed number of digits, one coordinate after the other."""

import jax
import jax.numpy as jnp
import numpy as np

INT32_MAX = 2**31 - 1


def to_digits(positions_RA: jax.Array, *, base: int, digits: int, padding: str = "left") -> jax.Array:
    """Returns the digits of positions, int32[R, A * digits], most significant first; (2, 3) -> 0 2 0 3 with two digits.

    Args:
      positions_RA: int32, at least 0 and below base ** digits (higher digits are cut off).
      base: base of the digits.
      digits: number of digits of a coordinate.
      padding: zeros before ("left") or after ("right") the significant digits.
    """
    powers_N = _powers(base, digits)
    digits_RAN = jnp.where(powers_N < INT32_MAX, positions_RA[..., None] // powers_N % base, 0)
    if padding == "right":
        num_leading_RA1 = digits - _num_significant(positions_RA, base, digits)[..., None]
        source_RAN = jnp.arange(digits) + num_leading_RA1
        shifted_RAN = jnp.take_along_axis(digits_RAN, jnp.minimum(source_RAN, digits - 1), axis=-1)
        digits_RAN = jnp.where(source_RAN < digits, shifted_RAN, 0)
    return digits_RAN.reshape(*positions_RA.shape[:-1], -1).astype(jnp.int32)


def significant_mask(positions_RA: jax.Array, *, base: int, digits: int, padding: str = "left") -> jax.Array:
    """Returns bool[R, A * digits], False at padding zeros; position 0 has one significant digit. Arguments: `to_digits`."""
    num_significant_RA1 = _num_significant(positions_RA, base, digits)[..., None]
    index_N = jnp.arange(digits)
    if padding == "right":
        mask_RAN = index_N < num_significant_RA1
    else:
        mask_RAN = index_N >= digits - num_significant_RA1
    return mask_RAN.reshape(*positions_RA.shape[:-1], -1)


def from_digits(digits_RN: jax.Array, *, base: int, axes: int) -> jax.Array:
    """Returns the positions int32[R, A] of left-padded digits int32[R, A * digits]; the inverse of `to_digits`."""
    digits_RAN = digits_RN.reshape(*digits_RN.shape[:-1], axes, -1)
    return (digits_RAN * _powers(base, digits_RAN.shape[-1])).sum(axis=-1).astype(jnp.int32)


def _num_significant(positions: jax.Array, base: int, digits: int) -> jax.Array:
    """Returns the number of significant digits of each coordinate, at least 1."""
    return jnp.maximum(1, (positions[..., None] >= _powers(base, digits)).sum(axis=-1))


def _powers(base: int, digits: int) -> np.ndarray:
    """Returns base ** (digits - 1) ... base ** 0, int32; powers beyond every position are INT32_MAX."""
    return np.array([min(base**exponent, INT32_MAX) for exponent in reversed(range(digits))], np.int32)
