"""What strings of digits have in common: a tree of their prefixes, each of which a causal encoder reads once.

Shapes are static: the number of nodes of each level is bounded by what is known of the rows before they are drawn.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RowGroup(NamedTuple):
    """Rows that were drawn together.

    Attributes:
      windows: number of windows; sides: of each along the axes, row-major; () = rows that have nothing in common.
      num_chunks: that a window is cut into along each axis, with gaps between; rows: read of each window at most, 0 = all.
      spans: from the first to the last position along each axis, gaps left out; () = places next to each other.
      independent_axes: each row has coordinates of its own, which lie anywhere in the span, not those of its line of the grid.
    """

    windows: int
    sides: tuple[int, ...] = ()
    num_chunks: int = 1
    rows: int = 0
    spans: tuple[int, ...] = ()
    independent_axes: bool = False


class PrefixTrie(NamedTuple):
    """The distinct prefixes of R strings of N digits: U[0] of one digit, U[1] of two, ..., one level after the other.

    Attributes:
      digits_T: int32[T], the last digit of each; T = sum(U).
      ancestors_TN: int32[T, N], the nodes of a prefix's own prefixes and itself; past its length, 0.
      leaf_R: int32[R], the place of each string in the last level.
    """

    digits_T: jax.Array
    ancestors_TN: jax.Array
    leaf_R: jax.Array


def max_nodes_per_level(
    groups: Sequence[RowGroup], *, axes: int, base: int, digits: int, max_position: int
) -> tuple[int, ...]:
    """Returns how many prefixes of each length there can be, at most: one int for each of axes * digits lengths.

    Digits are padded to the left. A window whose positions span S has no more than S // base**k + 2 different numbers
    without their last k digits, and no more than it has places.
    """
    sizes = []
    for axis in range(axes):
        for rest in reversed(range(digits)):
            possible = max_position**axis * min(-(-max_position // base**rest), max_position)
            held = 0
            for group in groups:
                if not group.sides:
                    held += group.windows
                    continue
                spans = group.spans or tuple(side - 1 for side in group.sides)
                near = spans[axis] // base**rest + 2 * group.num_chunks
                if group.independent_axes:
                    known = math.prod(span + 1 for span in spans[:axis]) * near
                else:
                    known = math.prod(group.sides[:axis]) * min(group.sides[axis], near)
                held += group.windows * min(known, group.rows or math.prod(group.sides))
            sizes.append(min(possible, held))
    return tuple(sizes)


def build_trie(digits_RN: jax.Array, base: int, sizes: Sequence[int]) -> PrefixTrie:
    """Returns the tree of prefixes of strings; `sizes` holds as many nodes as each level needs, or more."""
    rows, length = digits_RN.shape
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int32)
    at_once = int(math.log(2**31 - 1, base))  # digits that an int32 holds
    words = [_number(digits_RN[:, first : first + at_once], base) for first in range(0, length, at_once)]
    *_, order_R = jax.lax.sort((*words, jnp.arange(rows, dtype=jnp.int32)), num_keys=len(words))
    # Of sorted strings, each prefix is a neighbour of its equals: where it differs from the last one, a node begins.
    sorted_RN = digits_RN[order_R]
    differs_RN = jnp.cumsum(sorted_RN != jnp.roll(sorted_RN, 1, axis=0), axis=1) > 0
    node_RN = jnp.cumsum(differs_RN.at[0].set(False), axis=0, dtype=jnp.int32)
    digits, ancestors = [], []
    for level, size in enumerate(sizes):
        first_U = jnp.searchsorted(node_RN[:, level], jnp.arange(size, dtype=jnp.int32))
        first_U = jnp.minimum(first_U, rows - 1)  # nodes to spare are copies of the last one
        digits.append(sorted_RN[first_U, level])
        above_UN = node_RN[first_U, : level + 1] + starts[: level + 1]
        ancestors.append(jnp.pad(above_UN, ((0, 0), (0, length - 1 - level))))
    leaf_R = jnp.zeros(rows, jnp.int32).at[order_R].set(node_RN[:, -1], unique_indices=True)
    return PrefixTrie(jnp.concatenate(digits), jnp.concatenate(ancestors), leaf_R)


def _number(digits_RN: jax.Array, base: int) -> jax.Array:
    """The numbers int32[R] that digits write."""
    number_R = jnp.zeros(digits_RN.shape[0], jnp.int32)
    for digit_R in digits_RN.T:
        number_R = number_R * base + digit_R
    return number_R
