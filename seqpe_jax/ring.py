"""Sums over devices that travel from device to device while these compute, inside `shard_map`.

A TPU's compiler turns `jax.lax.psum_scatter` into an all-reduce of all shards, for which the device waits, unless the axis
that is split is the outermost in memory. Sums that travel, one half of the columns in each direction of the ring, are a half
of those bytes and need no waiting.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def reduce_scatter(array: jax.Array, axis: int, mesh_axes: tuple[str, ...]) -> jax.Array:
    """Returns this device's shard, along an axis, of the sum over devices.

    Args:
      array: this device's summands of all shards.
      axis: its axis that is split; not the last.
      mesh_axes: names of the mesh axes over which devices are added up, one after the other.
    """
    for name in mesh_axes:
        if (count := jax.lax.axis_size(name)) > 1:
            array = _in_both_directions(functools.partial(_part, count=count, axis=axis), array, name)
    return array


def _part(array: jax.Array, shard: jax.Array, count: int, axis: int) -> jax.Array:
    length = array.shape[axis] // count
    return jax.lax.dynamic_slice_in_dim(array, shard * length, length, axis)


def matmul_reduce_scatter(left_TV: jax.Array, right_VD: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """Returns this device's rows of the sum over devices of left @ right, in the dtype of `left`.

    The rows of each device are multiplied when their sum passes by, so that the next sum travels during a product.

    Args:
      left_TV: its rows divide over the devices.
      right_VD: second factor.
      mesh_axes: names of the mesh axes over which devices are added up, one after the other.
    """
    names = [name for name in mesh_axes if jax.lax.axis_size(name) > 1]
    if not names:
        return left_TV @ right_VD
    first, *others = names

    def summand(columns: jax.Array, shard: jax.Array) -> jax.Array:
        rows = _part(left_TV, shard, jax.lax.axis_size(first), 0)
        return jnp.matmul(rows, columns, preferred_element_type=jnp.float32)

    return reduce_scatter(_in_both_directions(summand, right_VD, first).astype(left_TV.dtype), 0, tuple(others))


def _in_both_directions(
    summand: Callable[[jax.Array, jax.Array], jax.Array], array: jax.Array, mesh_axis: str
) -> jax.Array:
    """Returns this device's shard of a sum, of which each half of the columns travels in its own direction.

    Args:
      summand: (half of the columns, index of a shard) -> this device's summand of that part of that shard.
      array: its last dimension is the columns.
      mesh_axis: name of the mesh axis over which devices are added up.
    """
    half = array.shape[-1] // 2
    if not half:
        return _travelling_sum(summand, array, mesh_axis, 1)
    columns = array[..., :half], array[..., half:]
    sums = [_travelling_sum(summand, part, mesh_axis, step) for part, step in zip(columns, (1, -1), strict=True)]
    return jnp.concatenate(sums, axis=-1)


def _travelling_sum(
    summand: Callable[[jax.Array, jax.Array], jax.Array], array: jax.Array, mesh_axis: str, step: int
) -> jax.Array:
    """Returns this device's shard of a sum in the dtype of `array`, sent on by `step` = 1 or -1 devices at a time.

    The sum of a shard begins at the device after its own and ends at its own.
    """
    count, device = jax.lax.axis_size(mesh_axis), jax.lax.axis_index(mesh_axis)
    pairs = [(source, (source + step) % count) for source in range(count)]

    def own(turn: int) -> jax.Array:
        return summand(array, (device - step * (1 + turn)) % count)

    total = own(0).astype(array.dtype)
    for turn in range(1, count):
        sent = jax.lax.ppermute(total, mesh_axis, pairs)
        total = (sent.astype(jnp.float32) + own(turn).astype(jnp.float32)).astype(array.dtype)
    return total
