"""Trie of digit prefixes: a causal encoder encodes each distinct prefix once instead of once per position.

Shapes are static: the structure of the positions, known before they are sampled, bounds the number of nodes of each level.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class PositionStructure(NamedTuple):
    """Structure of positions that are encoded together, used to compute a static bound on distinct prefixes.

    Attributes:
      num_windows: number of windows or grids; number of positions if these have no structure.
      sides: tokens or patches of a window along each axis, row-major; () = unrelated positions.
      num_chunks: chunks of a window along each axis, with gaps between them.
      max_rows: maximum number of encoded positions of each window; 0 = all.
      spans: distance of first and last position along each axis without gaps; () = neighboring integers.
      independent_axes: each position has its own coordinates, anywhere in the span, instead of those of its grid line.
    """

    num_windows: int
    sides: tuple[int, ...] = ()
    num_chunks: int = 1
    max_rows: int = 0
    spans: tuple[int, ...] = ()
    independent_axes: bool = False


class PrefixTrie(NamedTuple):
    """Distinct prefixes of R strings of N digits: U[0] of one digit, U[1] of two, ..., level after level; T = sum(U).

    Attributes:
      digits_T: int32, last digit of each prefix.
      ancestors_TN: int32, nodes of the prefixes of a prefix and of itself; 0 beyond its length.
      leaf_R: int32, index of each string in the last level.
    """

    digits_T: jax.Array
    ancestors_TN: jax.Array
    leaf_R: jax.Array


def max_nodes_per_level(
    structures: Sequence[PositionStructure], *, axes: int, base: int, digits: int, max_position: int
) -> tuple[int, ...]:
    """Returns upper bounds of the number of distinct prefixes of each length, one for each of axes * digits lengths.

    Digits are left-padded. A window that spans S has at most S // base**k + 2 distinct numbers without their last k digits,
    and no more than it has positions.

    Args:
      structures: structure of all positions.
      axes: coordinates of a position.
      base: base of the digits.
      digits: number of digits of a coordinate.
      max_position: exclusive limit of coordinates.
    """
    return tuple(
        min(
            max_position**axis * min(-(-max_position // base**dropped), max_position),
            sum(_max_nodes(structure, axis, base**dropped) for structure in structures),
        )
        for axis in range(axes)
        for dropped in reversed(range(digits))
    )


def _max_nodes(structure: PositionStructure, axis: int, divisor: int) -> int:
    """Returns the bound of one group, of prefixes that end within an axis, whose coordinate is divided by the divisor."""
    if not structure.sides:
        return structure.num_windows
    spans = structure.spans or tuple(side - 1 for side in structure.sides)
    along_axis = spans[axis] // divisor + 2 * structure.num_chunks
    if structure.independent_axes:
        count = math.prod(span + 1 for span in spans[:axis]) * along_axis
    else:
        count = math.prod(structure.sides[:axis]) * min(structure.sides[axis], along_axis)
    return structure.num_windows * min(count, structure.max_rows or math.prod(structure.sides))


def build_trie(digits_RN: jax.Array, base: int, num_nodes: Sequence[int]) -> PrefixTrie:
    """Returns the trie of the prefixes of strings.

    Args:
      digits_RN: int32.
      base: base of the digits.
      num_nodes: number of nodes of each level, at least as many as needed.
    """
    rows, length = digits_RN.shape
    level_starts = np.cumsum([0, *num_nodes[:-1]], dtype=np.int32)
    digits_per_int32 = int(math.log(2**31 - 1, base))
    words = [
        _to_number(digits_RN[:, first : first + digits_per_int32], base) for first in range(0, length, digits_per_int32)
    ]
    *_, order_R = jax.lax.sort((*words, jnp.arange(rows, dtype=jnp.int32)), num_keys=len(words))
    # Equal prefixes of sorted strings are neighbors: a node begins at each prefix that differs from the one before.
    sorted_RN = digits_RN[order_R]
    differs_RN = jnp.cumsum(sorted_RN != jnp.roll(sorted_RN, 1, axis=0), axis=1) > 0
    node_RN = jnp.cumsum(differs_RN.at[0].set(False), axis=0, dtype=jnp.int32)
    digits, ancestors = [], []
    for level, count in enumerate(num_nodes):
        first_U = jnp.searchsorted(node_RN[:, level], jnp.arange(count, dtype=jnp.int32))
        first_U = jnp.minimum(first_U, rows - 1)  # surplus nodes are copies of the last one
        digits.append(sorted_RN[first_U, level])
        ancestors_UN = node_RN[first_U, : level + 1] + level_starts[: level + 1]
        ancestors.append(jnp.pad(ancestors_UN, ((0, 0), (0, length - 1 - level))))
    leaf_R = jnp.zeros(rows, jnp.int32).at[order_R].set(node_RN[:, -1], unique_indices=True)
    return PrefixTrie(jnp.concatenate(digits), jnp.concatenate(ancestors), leaf_R)


def _to_number(digits_RN: jax.Array, base: int) -> jax.Array:
    """Returns the numbers int32[R] of digits."""
    number_R = jnp.zeros(digits_RN.shape[0], jnp.int32)
    for digit_R in digits_RN.T:
        number_R = number_R * base + digit_R
    return number_R
