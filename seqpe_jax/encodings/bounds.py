"""Bounds of parameters, within which training keeps them.

An encoding names them in `PARAM_BOUNDS`. Training projects the parameter itself after each update
(`training.optimizer.projection`), so that one that has reached a bound has a gradient and can come back.
"""

import jax
import jax.numpy as jnp

ParamBounds = dict[str, tuple[float, float]]  # name of a parameter -> (smallest value, largest value)


def clip_straight_through(parameter: jax.Array, bounds: tuple[float, float]) -> jax.Array:
    """Returns a parameter within its bounds, with the gradient that it has without them.

    A parameter that training has projected is returned as it is. One outside comes from a checkpoint of version 0.1.0 or
    older, whose model clipped it: the value is the same as there.
    """
    return parameter + jax.lax.stop_gradient(jnp.clip(parameter, *bounds) - parameter)
