"""What training carries from step to step."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """A run at a step. Everything random is a function of `key` and `step`, so nothing else need be restored.

    Attributes:
      step: int32[], optimiser steps done.
      key: uint32[2], the run's key; never changes.
      params: {"encoding": ..., "model": ...}, float32.
      opt_state: optax state of `params`.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    opt_state: optax.OptState


def key_from_seed(seed: int) -> jax.Array:
    """Returns the key of a run's seed, from 0 to 2**63 - 1, of which JAX itself takes the last 32 bits alone."""
    key = jax.random.PRNGKey(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def create_train_state(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Returns the state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), key, params, optimizer.init(params))


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree are finite, bool[]."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
