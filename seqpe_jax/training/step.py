"""One optimiser step, pure: (state, batch) -> (state, metrics). Knows neither model nor data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seqpe_jax.training.optimizer import PARTS, labels
from seqpe_jax.training.state import TrainState

LossFunction = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
TrainStep = Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int = 1,
    weight: Callable[[dict[str, Any]], jax.Array] | None = None,
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
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def gradients(state: TrainState, batch: dict[str, Any]) -> tuple[Any, dict[str, jax.Array]]:
        if accumulate == 1:
            (_, metrics), grads = gradient(state.params, batch, state.key, state.step, 0, 1.0)
            return grads, metrics
        shared = {name: value for name, value in batch.items() if name == "draws"}
        parts = {
            name: value.reshape(accumulate, value.shape[0] // accumulate, *value.shape[1:])
            for name, value in batch.items()
            if name != "draws"
        }

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
        params = optax.apply_updates(state.params, updates)
        tagged = list(zip(jax.tree.leaves(labels(grads)), jax.tree.leaves(grads), strict=True))
        for part in PARTS:
            leaves = [leaf for label, leaf in tagged if label == part]
            if leaves:
                metrics[f"gradient_norm/{part}"] = optax.tree.norm(leaves)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step))
        return TrainState(state.step + 1, state.key, params, opt_state), metrics

    return train_step
