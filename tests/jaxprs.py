"""Looking into traced programs."""

from collections.abc import Iterator

import numpy as np


def has_array_of_size(jaxpr, size: int) -> bool:
    """Whether any value in a program, or in the programs it calls, has so many elements."""
    for equation in jaxpr.eqns:
        if any(np.prod(out.aval.shape, dtype=int) >= size for out in equation.outvars if hasattr(out.aval, "shape")):
            return True
        if any(has_array_of_size(program, size) for program in subprograms(equation.params)):
            return True
    return False


def subprograms(params: dict) -> Iterator:
    """The programs that an equation calls."""
    for value in params.values():
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr
