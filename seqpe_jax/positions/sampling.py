"""Random positions of a train step as pure functions of a key: permutations, offsets, PoSE skips, jitter, crops, windows.

Rules: arXiv 2506.13277 section 3 and the released samplers without their defects: every position stays inside the range.

Each function takes all its randomness from one call of `jax.random.bits`: on CPU every further call adds a good part of a
second to the compilation of a train step. Integers below n are random words modulo n, whose bias is at most n / 2**32.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.errors import InputError
from seqpe_jax.positions.counting import carry_levels

ROUNDS = 6  # of the Feistel network; even, so that halves of different widths end at their own sides
MIN_BITS = 6  # with fewer the orders of a few values are visibly uneven (counted over pairs of 100,000 orders)
MAX_PERMUTATION_SIZE = 2**30


class DistillationPositions(NamedTuple):
    """Pairs of equal windows: at the origin (teacher) and out of range (student).

    Attributes:
      indices_BM: int32, flat indices of M positions of the training grid.
      positions_BMA: int32, the same positions of a window out of range.
    """

    indices_BM: jax.Array
    positions_BMA: jax.Array


def permute(key: jax.Array, index: jax.Array, n: jax.Array | int) -> jax.Array:
    """Returns a pseudo-random permutation of range(n) at some indices, without a table and without sorting.

    A Feistel network over the fewest bits that represent n - 1, iterated until its value is below n (cycle walking).

    Args:
      key: PRNG key of the permutation.
      index: int32[...], each in [0, n).
      n: size of the permutation, 1 to 2**30; may be traced.

    Returns:
      int32[...]: distinct values of distinct indices.
    """
    return permute_with_keys(jax.random.bits(key, (ROUNDS,), jnp.uint32), index, n)


def permute_with_keys(round_keys: jax.Array, index: jax.Array, n: jax.Array | int) -> jax.Array:
    """Returns the same of many permutations at once.

    Args:
      round_keys: uint32[..., ROUNDS], random words that determine the permutations.
      index: int32[...], each in [0, n).
      n: int32[...], sizes of the permutations.
    """
    n = jnp.asarray(n, jnp.uint32)
    bits = jnp.maximum(32 - jax.lax.clz(jnp.maximum(n, 2) - 1), MIN_BITS)
    low = (bits + 1) // 2
    masks = (jnp.uint32(1) << (bits - low)) - 1, (jnp.uint32(1) << low) - 1

    def walk(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, walking = state
        left, right = value >> low, value & masks[1]
        for round_ in range(ROUNDS):
            left, right = right, left ^ (mix_bits(right ^ round_keys[..., round_]) & masks[round_ % 2])
        value = jnp.where(walking, left << low | right, value)
        return value, value >= n

    # The first iteration is inside the loop as well, so that the network is compiled once.
    shape = jnp.broadcast_shapes(round_keys.shape[:-1], jnp.shape(index), n.shape)
    start = jnp.broadcast_to(jnp.asarray(index).astype(jnp.uint32), shape)
    value, _ = jax.lax.while_loop(lambda state: state[1].any(), walk, (start, jnp.ones(shape, bool)))
    return value.astype(jnp.int32)


def mix_bits(words: jax.Array) -> jax.Array:
    """Returns a bijective hash of uint32[...] by multiplications and shifts, in which each bit affects the entire word."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
    return words ^ (words >> 16)


def integers_below(bits: jax.Array, limit: jax.Array | np.ndarray | int) -> jax.Array:
    """Maps random words uint32[...] to int32[...] in [0, limit); 0 if the limit is below 1."""
    return (bits % jnp.maximum(limit, 1).astype(jnp.uint32)).astype(jnp.int32)


def uniform_floats(bits: jax.Array) -> jax.Array:
    """Maps random words uint32[...] to float32[...] in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def unravel(flat: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Maps flat indices int32[...] of an array to its row-major indices int32[..., A]."""
    coordinates = []
    for side in reversed(shape):
        coordinates.append(flat % side)
        flat = flat // side
    return jnp.stack(coordinates[::-1], axis=-1)


def random_offsets(
    key: jax.Array,
    *,
    num_sets: int,
    shape: tuple[int, ...],
    max_position: int,
    position_resolution: int = 1,
    num_start_positions: int = 0,
    subset_key: jax.Array | None = None,
    carry_share: float = 0.0,
    base: int = 10,
    grid_start_A: np.ndarray | int = 0,
) -> jax.Array:
    """Returns first positions int32[P, A] of grids anywhere in range.

    A carry is where a digit changes that stays the same in most windows: at the multiples of each power of the base that is
    larger than a window. From 999 to 1000 all digits change at once, but a window of 64 rarely holds both.

    Args:
      key: PRNG key.
      num_sets: P.
      shape: sides of the grid.
      max_position: coordinates are below.
      position_resolution: distance of neighboring positions.
      num_start_positions: sample from a fixed subset of so many first positions; 0: from all.
      subset_key: PRNG key that determines the subset.
      carry_share: share of the grids that straddle a carry along an axis, each power of the base equally often.
      base: base of the digits.
      grid_start_A: int32, position of the first element of the grid at the origin, to which the result is added.

    Raises:
      InputError: the grid does not fit into the range, or the subset cannot be chosen.
    """
    free_range = _free_range(shape, max_position, position_resolution)
    if carry_share:
        return _starts_across_carries(
            key,
            carry_share,
            num_sets,
            extents=tuple((side - 1) * position_resolution for side in shape),
            free_range=free_range,
            base=base,
            grid_start_A=np.broadcast_to(grid_start_A, len(shape)),
        )
    if not num_start_positions:
        return integers_below(jax.random.bits(key, (num_sets, len(shape)), jnp.uint32), np.array(free_range))
    total = math.prod(free_range)
    if total > MAX_PERMUTATION_SIZE:
        raise InputError(f"objective.shift.starts: {total} starts are too many to choose a subset of; set it to 0")
    if subset_key is None:
        raise InputError(f"objective.shift.starts={num_start_positions} needs a key that determines the subset")
    index = integers_below(jax.random.bits(key, (num_sets,), jnp.uint32), min(num_start_positions, total))
    return unravel(permute(subset_key, index, total), free_range)


def _starts_across_carries(
    key: jax.Array,
    carry_share: float,
    num_sets: int,
    *,
    extents: tuple[int, ...],
    free_range: tuple[int, ...],
    base: int,
    grid_start_A: np.ndarray,
) -> jax.Array:
    """Returns first positions int32[P, A], of which a share has a carry between first and last position along each axis."""
    bits = jax.random.bits(key, (len(extents), 5, num_sets), jnp.uint32)
    starts = []
    for axis, (extent, free) in enumerate(zip(extents, free_range, strict=True)):
        origin, words = int(grid_start_A[axis]), bits[axis]
        start_P = integers_below(words[0], free)
        levels = np.array(carry_levels(extent, origin + free + extent, base), np.int32)
        if extent and len(levels):
            level_P = jnp.asarray(levels)[integers_below(words[1], len(levels))]
            carry_P = level_P * (1 + integers_below(words[2], (origin + free + extent - 1) // level_P))
            across_P = jnp.clip(carry_P - origin - 1 - integers_below(words[3], extent), 0, free - 1)
            start_P = jnp.where(uniform_floats(words[4]) < carry_share, across_P, start_P)
        starts.append(start_P)
    return jnp.stack(starts, axis=-1)


def pose_skip(
    key: jax.Array,
    *,
    num_sets: int,
    shape: tuple[int, ...],
    max_position: int,
    num_chunks: int,
    position_range: int,
    position_resolution: int = 1,
) -> jax.Array:
    """Returns positions int32[P, L, A] of windows cut into chunks with random gaps (PoSE, arXiv 2309.10400).

    The first chunk starts at 0; positions increase strictly. Each axis of a grid is cut separately.

    Args:
      key: PRNG key.
      num_sets: P.
      shape: sides of the grid.
      max_position: coordinates must be below.
      num_chunks: chunks of each axis.
      position_range: sampled coordinates are below.
      position_resolution: distance of neighboring positions within a chunk.

    Raises:
      InputError: the range is smaller than the window or larger than max_position.
    """
    _free_range(shape, position_range, position_resolution)
    if position_range > max_position:
        raise InputError(f"objective.skip.range={position_range} is beyond encoding.max_position={max_position}")
    bits = jax.random.bits(key, (len(shape), num_sets, ROUNDS + num_chunks), jnp.uint32)

    def axis_positions(bits: jax.Array, side: int) -> jax.Array:
        chunks = min(num_chunks, side)
        cuts = bits[:, :0]
        if chunks > 1:
            cuts = 1 + permute_with_keys(bits[:, None, :ROUNDS], jnp.arange(chunks - 1), side - 1)
        free = position_range - (side - 1) * position_resolution
        gaps = jnp.sort(integers_below(bits[:, ROUNDS : ROUNDS + chunks - 1], free), axis=1)
        gaps = jnp.pad(gaps, ((0, 0), (1, 0)))
        index = jnp.arange(side)
        chunk_PL = (index[:, None] >= cuts[:, None]).sum(axis=2)
        return index * position_resolution + jnp.take_along_axis(gaps, chunk_PL, axis=1)

    return _grids_of([axis_positions(bits[axis], side) for axis, side in enumerate(shape)])


def random_positions(
    key: jax.Array,
    *,
    num_sets: int,
    shape: tuple[int, ...],
    max_position: int,
    position_range: int,
    position_resolution: int = 1,
) -> jax.Array:
    """Returns random positions in rising order, int32[P, L, A] (randomized positions, arXiv 2305.16843).

    Along each axis they are a subset of the multiples of the resolution, each equally likely.

    Args:
      key: PRNG key.
      num_sets: P.
      shape: sides of the grid.
      max_position: coordinates must be below.
      position_range: sampled coordinates are below.
      position_resolution: least distance of neighboring positions.

    Raises:
      InputError: see `pose_skip`.
    """
    _free_range(shape, position_range, position_resolution)
    if position_range > max_position:
        raise InputError(f"objective.skip.range={position_range} is beyond encoding.max_position={max_position}")
    bits = jax.random.bits(key, (len(shape), num_sets, 1, ROUNDS), jnp.uint32)
    count = (position_range - 1) // position_resolution + 1
    sides = [
        position_resolution * jnp.sort(permute_with_keys(bits[axis], jnp.arange(side), count), axis=1)
        for axis, side in enumerate(shape)
    ]
    return _grids_of(sides)


def _grids_of(sides: list[jax.Array]) -> jax.Array:
    """Returns the grids int32[P, L, A] of coordinates int32[P, side] along each axis."""
    grids = jax.vmap(lambda *sides: jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1))(*sides)
    return grids.reshape(len(grids), -1, len(sides)).astype(jnp.int32)


def jitter(
    key: jax.Array, positions_PLA: jax.Array, *, max_distance: int, max_position: int, ordered: bool
) -> jax.Array:
    """Moves each coordinate by a random integer in [-max_distance, max_distance].

    Args:
      key: PRNG key.
      positions_PLA: int32.
      max_distance: maximum distance of a move.
      max_position: coordinates are clipped to [0, max_position).
      ordered: sort the positions along their one axis, as a causal model needs it; two may become equal.
    """
    bits = jax.random.bits(key, positions_PLA.shape, jnp.uint32)
    moved_PLA = positions_PLA + integers_below(bits, 2 * max_distance + 1) - max_distance
    moved_PLA = jnp.clip(moved_PLA, 0, max_position - 1)
    return jnp.sort(moved_PLA, axis=1) if ordered else moved_PLA


def crop_boxes(key: jax.Array, *, num_sets: int, axes: int, smallest: float) -> jax.Array:
    """Returns random crops of images or videos, float32[P, A, 2]: (first, length) along each axis, as fractions of a side.

    Height and width are cropped to the same fraction, whose logarithm is uniform from `smallest` to 1. Crops of a video,
    whose first axis is time, have all its frames.
    """
    uniform = uniform_floats(jax.random.bits(key, (num_sets, 3), jnp.uint32))
    length_P1 = smallest ** uniform[:, :1]
    first_P2 = (1 - length_P1) * uniform[:, 1:]
    frame_P22 = jnp.stack([first_P2, jnp.broadcast_to(length_P1, first_P2.shape)], axis=-1)
    all_frames = jnp.broadcast_to(jnp.array([0.0, 1.0]), (num_sets, axes - 2, 2))
    return jnp.concatenate([all_frames, frame_P22], axis=1)


def distillation_positions(
    key: jax.Array, *, batch: int, offsets: int, shape: tuple[int, ...], max_position: int, position_resolution: int = 1
) -> DistillationPositions:
    """Returns M random positions of the grid at the origin, and the same positions of a grid that starts out of range.

    First positions are uniform: on one axis in [L / 4, max_position - L], on more axes wherever the grid does not lie
    entirely in the grid at the origin.

    Args:
      key: PRNG key.
      batch: B, number of pairs.
      offsets: M.
      shape: sides of the grid.
      max_position: coordinates are below.
      position_resolution: distance of neighboring positions; the grid may start between them.

    Raises:
      InputError: there is no such first position, or the grid has fewer than M positions.
    """
    free_range, size = _free_range(shape, max_position, position_resolution), math.prod(shape)
    if offsets > size:
        raise InputError(f"objective.distillation.offsets={offsets} is more than the {size} positions of a window")
    lows, highs = _out_of_range_boxes(shape, free_range, position_resolution)
    volumes = np.prod(highs - lows, axis=1, dtype=np.float64)
    if volumes.sum() <= 0:
        raise InputError(
            f"objective.distillation finds no window of {shape} out of range below encoding.max_position={max_position}: "
            "raise it"
        )
    edges = np.cumsum(volumes)[:-1] / volumes.sum()

    axes = len(shape)
    bits = jax.random.bits(key, (batch, 1 + axes + ROUNDS), jnp.uint32)
    box_B = (uniform_floats(bits[:, :1]) >= edges).sum(axis=1)
    low_BA, high_BA = jnp.asarray(lows, jnp.int32)[box_B], jnp.asarray(highs, jnp.int32)[box_B]
    first_BA = low_BA + integers_below(bits[:, 1 : 1 + axes], high_BA - low_BA)
    indices_BM = permute_with_keys(bits[:, None, 1 + axes :], jnp.arange(offsets), size)
    positions_BMA = unravel(indices_BM, shape) * position_resolution + first_BA[:, None]
    return DistillationPositions(indices_BM, positions_BMA)


def _out_of_range_boxes(
    shape: tuple[int, ...], free_range: tuple[int, ...], position_resolution: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns disjoint boxes (lows, highs) of first positions out of range, int[boxes, A].

    With several axes, the first axis along which a grid of box i starts beyond the grid at the origin is axis i.
    """
    sides = [side * position_resolution for side in shape]
    if len(shape) == 1:
        low = min(sides[0] // 4, free_range[0])
        return np.array([[low]]), np.array([free_range])
    in_range = np.minimum(sides, free_range)
    highs = np.where(np.tri(len(shape), k=-1, dtype=bool), in_range, np.array(free_range))
    return np.diag(in_range), highs


def _free_range(shape: tuple[int, ...], max_position: int, position_resolution: int) -> tuple[int, ...]:
    """Returns the number of first positions along each axis with which a grid stays in range. Raises: InputError."""
    if (max(shape) - 1) * position_resolution >= max_position:
        raise InputError(
            f"a window of {max(shape)} does not fit below encoding.max_position={max_position // position_resolution}: "
            "raise it or shorten the window"
        )
    return tuple(max_position - (side - 1) * position_resolution for side in shape)
