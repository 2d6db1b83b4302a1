"""Trees: nested dicts under flat names, the names of paths, and how many numbers there are.

JAX is imported where arrays are met, since commands flatten configs before they need it.
"""

import math
from typing import Any

Tree = dict[str, Any]


def flat(tree: Tree, separator: str = "/") -> dict[str, Any]:
    """Returns the leaves of nested dicts by name, such as "model/blocks_0/qkv/kernel"."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{name}{separator}{rest}": leaf for rest, leaf in flat(value, separator).items()}
        else:
            found[name] = value
    return found


def nested(leaves: dict[str, Any], separator: str = "/") -> Tree:
    """Returns the nested dicts of leaves by flat name; the inverse of `flat`, but for empty dicts."""
    tree: Tree = {}
    for name, value in leaves.items():
        *path, last = name.split(separator)
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def names(path: Any) -> list[str]:
    """Returns the names along a path of `jax.tree_util`, "" for a place in a list or tuple."""
    return [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of any tree of dicts by flat name, as `flat` does for plain dicts."""
    import jax

    return {"/".join(names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count(tree: Any) -> int:
    """Returns the number of parameters of a tree of arrays, or of their shapes."""
    import jax

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
