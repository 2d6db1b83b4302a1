"""One optimiser step, pure: (state, batch) -> (state, metrics). Knows neither model nor data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seqpe_jax.training.optimizer import PARTS, labels
from seqpe_jax.training.state import TrainState, all_finite

LossFunction = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
TrainStep = Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int = 1,
    weight: Callable[[dict[str, Any]], jax.Array] | None = None,
    skip: bool = False,
    project: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
    """Returns the train step of a loss.

    Args:
      loss: (params, batch, key, step, part, share) -> (scalar, metrics). What it averages over the examples of a batch
        it multiplies by `share`, 1 for a batch that is read at once.
      optimizer: an optax transformation; schedule: its learning rate by step, for the metrics.
      accumulate: the batch is read in that many consecutive parts, whose losses, metrics and gradients are averaged.
        Positions are drawn per step, not per part, so without dropout the step equals the plain one.
      weight: by how much a part counts, such as its tokens that have a loss; the shares of the parts are their weights,
        scaled to a mean of 1. None = all parts count the same.
      skip: a step whose loss, gradients or update are not finite leaves parameters and moments as they were; the metric
        `skipped` is then 1, else 0. The optimiser's own counts go on, so the learning rate stays that of the step.
      project: brings updated parameters back to where they may be.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def gradients(state: TrainState, batch: dict[str, Any]) -> tuple[Any, dict[str, jax.Array]]:
        if accumulate == 1:
            (_, metrics), grads = gradient(state.params, batch, state.key, state.step, 0, 1.0)
            return grads, metrics
        shared, parts = _parts(batch, accumulate)
        weights = jax.vmap(weight)(parts) if weight else jnp.ones(accumulate)
        shares = weights / jnp.where(weights.sum() > 0, weights.mean(), 1.0)

        def add(total: Any, numbered: tuple[jax.Array, Any, jax.Array]) -> tuple[Any, None]:
            index, part, share = numbered
            (_, metrics), grads = gradient(state.params, part | shared, state.key, state.step, index, share)
            return jax.tree.map(lambda sum_, value: sum_ + value / accumulate, total, (grads, metrics)), None

        first = jax.tree.map(lambda value: value[0], parts)
        shapes = jax.eval_shape(gradient, state.params, first | shared, state.key, state.step, 0, shares[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1]))
        (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts, shares))
        return grads, metrics

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, metrics = gradients(state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = project(optax.apply_updates(state.params, updates))
        metrics |= _norms(grads) | {"learning_rate": jnp.asarray(schedule(state.step))}
        if skip:
            fine = all_finite((metrics["loss"], grads, params))
            params, opt_state = _chosen(fine, (params, opt_state), (state.params, state.opt_state))
            metrics["skipped"] = 1.0 - fine.astype(jnp.float32)
        return TrainState(state.step + 1, state.key, params, opt_state), metrics

    return train_step


def _parts(batch: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what all parts of a batch share, and the batch with a leading axis over its consecutive parts."""
    shared = {name: value for name, value in batch.items() if name == "sampled_positions"}
    parts = {
        name: value.reshape(count, value.shape[0] // count, *value.shape[1:])
        for name, value in batch.items()
        if name != "sampled_positions"
    }
    return shared, parts


def _norms(grads: Any) -> dict[str, jax.Array]:
    """Returns the norm of the gradients of each part that is there."""
    tagged = list(zip(jax.tree.leaves(labels(grads)), jax.tree.leaves(grads), strict=True))
    norms = {}
    for part in PARTS:
        leaves = [leaf for label, leaf in tagged if label == part]
        if leaves:
            norms[f"gradient_norm/{part}"] = optax.tree.norm(leaves)
    return norms


def _chosen(fine: jax.Array, new: Any, old: Any) -> Any:
    """Returns the floats of `new` where the step was fine, else of `old`; counts are the new ones."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(fine, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return jax.tree.map(choose, new, old)
