"""A keyed bijection of range(n): draws without replacement, and passes over all positions, with no table and no sort.

A Feistel network over the fewest bits that hold n, its halves as equal as can be, walked until it lands below n.
"""

import jax
import jax.numpy as jnp

ROUNDS = 6  # even, so that halves of different sizes end in their own places
LEAST_BITS = 6  # with fewer the orders of a few values are visibly uneven (pairs of 100 000 orders counted)
MAX_PERMUTATION_SIZE = 2**30  # positions that one permutation may hold


def permute(key: jax.Array, index: jax.Array, n: jax.Array | int) -> jax.Array:
    """Returns where each index stands in a pseudo-random order of range(n): distinct indices, distinct results.

    Args:
      key: PRNG key that fixes the order.
      index: int32[...], each in [0, n).
      n: 1 <= n <= 2**30; may be traced.
    """
    return permute_with_keys(jax.random.bits(key, (ROUNDS,), jnp.uint32), index, n)


def permute_with_keys(round_keys: jax.Array, index: jax.Array, n: jax.Array | int) -> jax.Array:
    """As `permute`, many orders at once.

    Args:
      round_keys: uint32[..., ROUNDS], random bits that fix the orders.
      index: int32[...], each in [0, n).
      n: int32 that broadcasts to [...].
    """
    n = jnp.asarray(n, jnp.uint32)
    bits = jnp.maximum(32 - jax.lax.clz(jnp.maximum(n, 2) - 1), LEAST_BITS)
    low = (bits + 1) // 2
    masks = (jnp.uint32(1) << (bits - low)) - 1, (jnp.uint32(1) << low) - 1

    def walk(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, walking = state
        left, right = value >> low, value & masks[1]
        for round_ in range(ROUNDS):
            left, right = right, left ^ (mix_bits(right ^ round_keys[..., round_]) & masks[round_ % 2])
        value = jnp.where(walking, left << low | right, value)
        return value, value >= n

    # The first step is inside the loop, too, so that the network is compiled once.
    shape = jnp.broadcast_shapes(round_keys.shape[:-1], jnp.shape(index), n.shape)
    start = jnp.broadcast_to(jnp.asarray(index).astype(jnp.uint32), shape)
    value, _ = jax.lax.while_loop(lambda state: state[1].any(), walk, (start, jnp.ones(shape, bool)))
    return value.astype(jnp.int32)


def mix_bits(value: jax.Array) -> jax.Array:
    """Spreads each bit of uint32[...] over its word by multiplying and shifting; a bijection of the 32-bit words."""
    value = (value ^ (value >> 16)) * jnp.uint32(0x7FEB352D)
    value = (value ^ (value >> 15)) * jnp.uint32(0x846CA68B)
    return value ^ (value >> 16)
