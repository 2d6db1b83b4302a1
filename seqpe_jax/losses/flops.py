"""Floating-point operations of a training step, counted in its traced loss, with the position encoding's own."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax.losses.train_loss import TrainLoss

BACKWARD = 2  # times the forward pass: a product's gradients of both operands are products of the same size


def training_flops(
    train_loss: TrainLoss, example: dict[str, jax.ShapeDtypeStruct], batch_size: int, accumulate: int = 1
) -> float:
    """Returns the FLOPs of a training step, forward and backward, on all devices.

    They are those of matrix products that parameters enter: of the network, in whose attention all queries meet all keys,
    and the features of positions once where examples share positions; of the position encoder, for its windows and for the
    positions of the contrastive and distillation losses; and of these losses. Recomputation (`model.remat`) and elementwise
    work, such as rotating queries and keys, do not count.

    Args:
      train_loss: what is trained.
      example: shape and type of each array of a training example.
      batch_size: examples of a step.
      accumulate: parts in which the batch is read; each encodes its positions anew.
    """
    model_spec = train_loss.model_spec
    network = model_spec.network.clone(attention_kind="reference")  # no loop over blocks, no kernel
    train_loss = dataclasses.replace(train_loss, model_spec=dataclasses.replace(model_spec, network=network))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size // accumulate, *leaf.shape), leaf.dtype)
        for name, leaf in example.items()
    }
    key, step = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.make_jaxpr(train_loss.loss)(model_spec.shapes, batch, key, step)
    trained = len(jax.tree.leaves(model_spec.shapes))
    flops, _ = _count(traced.jaxpr, [at < trained for at in range(len(traced.jaxpr.invars))])
    return (1 + BACKWARD) * accumulate * flops


def _count(jaxpr: Any, trained: Iterable[bool]) -> tuple[float, list[bool]]:
    """Returns the FLOPs of products that parameters enter, and which results depend on parameters.

    Args:
      jaxpr: a program.
      trained: which of its inputs depend on parameters.
    """
    dependent = {var for var, own in zip(jaxpr.invars, trained, strict=True) if own}
    total = 0.0
    for equation in jaxpr.eqns:
        depends = [not hasattr(var, "val") and var in dependent for var in equation.invars]
        inner, results = 0.0, [any(depends)] * len(equation.outvars)
        bodies = list(_bodies(equation.params.values()))
        if any(depends) and bodies:
            one_to_one = (
                len(bodies) == 1 and len(bodies[0].invars) == len(depends) and equation.primitive.name != "scan"
            )
            found = [_count(body, depends if one_to_one else [True] * len(body.invars)) for body in bodies]
            inner = sum(flops for flops, _ in found)
            if equation.primitive.name == "cond":
                inner = max(flops for flops, _ in found)
            elif equation.primitive.name == "scan":
                inner *= equation.params["length"]
            elif equation.primitive.name == "while" and inner:
                raise NotImplementedError("a loop of unknown length holds matrix products")
            if one_to_one and len(found[0][1]) == len(results):
                results = found[0][1]
        elif any(depends) and equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            made, left = equation.outvars[0].aval.shape, equation.invars[0].aval.shape
            inner = 2.0 * math.prod(made) * math.prod(left[axis] for axis in contracted)
        total += inner
        dependent |= {var for var, own in zip(equation.outvars, results, strict=True) if own}
    return total, [not hasattr(var, "val") and var in dependent for var in jaxpr.outvars]


def _bodies(values: Iterable[Any]) -> Iterable[Any]:
    """The programs among an equation's parameters."""
    for value in values:
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
