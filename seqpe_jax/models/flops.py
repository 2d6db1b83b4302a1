"""Floating-point operations of matrix products, counted in a traced function."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax


def param_matmul_flops(function: Callable[..., Any], params: Any, *arguments: Any) -> float:
    """Returns the FLOPs of all matrix products of function(params, *arguments) that depend on the parameters.

    Args:
      function: traced, not computed.
      params: shapes and dtypes of the parameters.
      *arguments: shapes and dtypes of the other arguments.
    """
    jaxpr = jax.make_jaxpr(function)(params, *arguments).jaxpr
    num_params = len(jax.tree.leaves(params))
    flops, _ = _count(jaxpr, [index < num_params for index in range(len(jaxpr.invars))])
    return flops


def _count(jaxpr: Any, depends_in: Iterable[bool]) -> tuple[float, list[bool]]:
    """Returns (FLOPs of parameter-dependent products, parameter dependence of each output).

    Args:
      jaxpr: a program.
      depends_in: parameter dependence of each input.
    """
    dependent = {var for var, depends in zip(jaxpr.invars, depends_in, strict=True) if depends}
    total = 0.0
    for equation in jaxpr.eqns:
        depends = [not hasattr(var, "val") and var in dependent for var in equation.invars]
        if not any(depends):
            continue
        flops, depends_out = _count_equation(equation, depends)
        total += flops
        dependent |= {var for var, depends in zip(equation.outvars, depends_out, strict=True) if depends}
    return total, [not hasattr(var, "val") and var in dependent for var in jaxpr.outvars]


def _count_equation(equation: Any, depends: list[bool]) -> tuple[float, list[bool]]:
    """Returns the same of one operation with a parameter-dependent input, with the programs that it calls."""
    depends_out = [True] * len(equation.outvars)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        output_shape, left_shape = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
        return 2.0 * math.prod(output_shape) * math.prod(left_shape[axis] for axis in contracted), depends_out
    bodies = list(_bodies(equation.params.values()))
    if not bodies:
        return 0.0, depends_out
    # A simple call passes its inputs on in order; otherwise all inputs of a body are taken as dependent.
    is_call = len(bodies) == 1 and len(bodies[0].invars) == len(depends) and equation.primitive.name != "scan"
    counts = [_count(body, depends if is_call else [True] * len(body.invars)) for body in bodies]
    flops = sum(count for count, _ in counts)
    match equation.primitive.name:
        case "cond":
            flops = max(count for count, _ in counts)
        case "scan":
            flops *= equation.params["length"]
        case "while" if flops:
            raise NotImplementedError("cannot count the matrix products of a loop of unknown length")
    if is_call and len(counts[0][1]) == len(depends_out):
        depends_out = counts[0][1]
    return flops, depends_out


def _bodies(values: Iterable[Any]) -> Iterable[Any]:
    """Yields the programs among the parameters of an operation."""
    for value in values:
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
