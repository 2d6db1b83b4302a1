"""Nested dicts under flat names, and the number of parameters.

`flax.traverse_util` has the first two as well, but importing it loads JAX, which commands that only read configs do without.
"""

from typing import Any

Tree = dict[str, Any]


def flatten_dict(tree: Tree, separator: str = "/") -> dict[str, Any]:
    """Returns the leaves of nested dicts by name, such as "model/blocks_0/qkv/kernel"."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= {f"{name}{separator}{rest}": leaf for rest, leaf in flatten_dict(value, separator).items()}
        else:
            leaves[name] = value
    return leaves


def unflatten_dict(leaves: dict[str, Any], separator: str = "/") -> Tree:
    """Returns the nested dicts of leaves by flat name; the inverse of `flatten_dict`, but for empty dicts."""
    tree: Tree = {}
    for name, value in leaves.items():
        *parents, last = name.split(separator)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def num_params(tree: Any) -> int:
    """Returns the number of parameters of a tree of arrays, or of their shapes."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(tree))
