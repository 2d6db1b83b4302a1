"""Positions as strings of digits: each coordinate with a fixed number of digits, coordinates one after the other."""

import jax
import jax.numpy as jnp
import numpy as np

PAST_RANGE = 2**31 - 1  # int32 positions end below


def to_digits(positions_RA: jax.Array, *, base: int, digits: int, padding: str = "left") -> jax.Array:
    """Returns int32[R, A * digits]: each coordinate's digits, most significant first; (2, 3) -> 0 2 0 3.

    Args:
      positions_RA: int32[R, A] >= 0 and below base ** digits (higher digits are cut off).
      padding: zeros stand before the significant digits ("left"), or after them ("right").
    """
    powers_N = _powers(base, digits)
    digits_RAN = jnp.where(powers_N < PAST_RANGE, positions_RA[..., None] // powers_N % base, 0)
    if padding == "right":
        missing_RA1 = digits - _lengths(positions_RA, base, digits)[..., None]
        source_RAN = jnp.arange(digits) + missing_RA1
        taken_RAN = jnp.take_along_axis(digits_RAN, jnp.minimum(source_RAN, digits - 1), axis=-1)
        digits_RAN = jnp.where(source_RAN < digits, taken_RAN, 0)
    return digits_RAN.reshape(*positions_RA.shape[:-1], -1).astype(jnp.int32)


def significant_mask(positions_RA: jax.Array, *, base: int, digits: int, padding: str = "left") -> jax.Array:
    """Returns bool[R, A * digits], False on padded zeros; position 0 has one significant digit."""
    lengths_RA1 = _lengths(positions_RA, base, digits)[..., None]
    place_N = jnp.arange(digits)
    kept_RAN = place_N < lengths_RA1 if padding == "right" else place_N >= digits - lengths_RA1
    return kept_RAN.reshape(*positions_RA.shape[:-1], -1)


def from_digits(digits_RN: jax.Array, *, base: int, axes: int) -> jax.Array:
    """Returns int32[R, A] of left-padded strings int32[R, A * digits]; the inverse of `to_digits`."""
    digits_RAN = digits_RN.reshape(*digits_RN.shape[:-1], axes, -1)
    return (digits_RAN * _powers(base, digits_RAN.shape[-1])).sum(axis=-1).astype(jnp.int32)


def _lengths(positions: jax.Array, base: int, digits: int) -> jax.Array:
    """Significant digits of each coordinate, at least 1."""
    return jnp.maximum(1, (positions[..., None] >= _powers(base, digits)).sum(axis=-1))


def _powers(base: int, digits: int) -> np.ndarray:
    """base ** (digits - 1) ... base ** 0 as int32, those above every position as PAST_RANGE."""
    return np.array([min(base**power, PAST_RANGE) for power in reversed(range(digits))], np.int32)
