"""What strings of digits have in common: a tree of their prefixes, each of which a causal encoder reads once.

Shapes are static: the number of nodes of each level is bounded by what is known of the rows before they are drawn.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Group(NamedTuple):
    """Rows that were drawn together.

    Attributes:
      windows: number of windows; sides: of each along the axes, row-major; () = rows that have nothing in common.
      pieces: that a window is cut into along each axis, with gaps between; rows: read of each window at most, 0 = all.
    """

    windows: int
    sides: tuple[int, ...] = ()
    pieces: int = 1
    rows: int = 0


class Tree(NamedTuple):
    """The distinct prefixes of R strings of N digits: U[0] of one digit, U[1] of two, ..., one level after the other.

    Attributes:
      digits_T: int32[T], the last digit of each; T = sum(U).
      ancestors_TN: int32[T, N], the nodes of a prefix's own prefixes and itself; past its length, 0.
      leaf_R: int32[R], the place of each string in the last level.
    """

    digits_T: jax.Array
    ancestors_TN: jax.Array
    leaf_R: jax.Array


def level_sizes(groups: Sequence[Group], *, axes: int, base: int, digits: int, max_position: int) -> tuple[int, ...]:
    """Returns how many prefixes of each length there can be, at most: one int for each of axes * digits lengths.

    Digits are padded to the left. A window of L consecutive positions has no more than (L - 1) // base**k + 2 different
    numbers without their last k digits.
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
                known = math.prod(group.sides[:axis]) * min(
                    group.sides[axis], (group.sides[axis] - 1) // base**rest + 2 * group.pieces
                )
                held += group.windows * min(known, group.rows or math.prod(group.sides))
            sizes.append(min(possible, held))
    return tuple(sizes)


def tree(digits_RN: jax.Array, base: int, sizes: Sequence[int]) -> Tree:
    """Returns the tree of prefixes of strings; `sizes` holds as many nodes as each level needs, or more."""
    node_R = jnp.zeros(digits_RN.shape[0], jnp.int32)
    starts = np.cumsum([0, *sizes])
    digits, ancestors = [], []
    above_UN = jnp.zeros((1, 0), jnp.int32)
    for level, size in enumerate(sizes):
        # A prefix is known by its parent and its last digit; equal ones are neighbours when sorted.
        prefix_U, node_R = jnp.unique(node_R * base + digits_RN[:, level], size=size, return_inverse=True)
        above_UN = above_UN[prefix_U // base]
        above_UN = jnp.concatenate([above_UN, (starts[level] + jnp.arange(size, dtype=jnp.int32))[:, None]], axis=1)
        digits.append(prefix_U % base)
        ancestors.append(jnp.pad(above_UN, ((0, 0), (0, len(sizes) - 1 - level))))
    return Tree(jnp.concatenate(digits), jnp.concatenate(ancestors), node_R)
