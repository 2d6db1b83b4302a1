"""Train state and the pure train step: (state, batch) -> (state, metrics), jitted in `training.trainer`.

Independent of model, data and devices.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from seqpe_jax.training.optimizer import PARAM_GROUPS, param_groups

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]
LossFunction = Callable[..., tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """State of a run after some steps. All randomness is a function of `key` and `step`, so that nothing else is restored.

    Attributes:
      step: int32[], optimizer steps done.
      key: uint32[2], PRNG key of the run; it never changes.
      params: {"encoding": ..., "model": ...}, float32.
      opt_state: optax state of `params`.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    opt_state: optax.OptState


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def key_from_seed(seed: int) -> jax.Array:
    """Returns the PRNG key of a seed in [0, 2**63), uint32[2]; `jax.random.PRNGKey` alone drops all but the low 32 bits."""
    key = jax.random.PRNGKey(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def create_train_state(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Returns the state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), key, params, optimizer.init(params))


def all_finite(tree: Any) -> jax.Array:
    """Returns bool[]: all numbers of a tree are finite."""
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int = 1,
    weight: Callable[[Batch], jax.Array] | None = None,
    skip: bool = False,
    project: Callable[[Any], Any] = lambda params: params,
    average: Callable[[Any, Any, jax.Array], Any] = lambda opt_state, params, step: opt_state,
) -> TrainStep:
    """Returns the train step of a loss.

    Args:
      loss: (params, batch, key, step, microbatch_index, microbatch_weight) -> (scalar, metrics). Means over the examples
        of a batch are multiplied by the weight, which is 1 without gradient accumulation.
      optimizer: optax transformation.
      schedule: learning rate by step, for the metric `learning_rate`.
      accumulate: number of consecutive microbatches of a batch; their losses, metrics and gradients are averaged.
        Positions are sampled per step, not per microbatch, so that without dropout the step equals the plain one.
      weight: microbatch -> float32[], such as its number of tokens with a loss; microbatch weights are scaled to a mean
        of 1. None: all microbatches weigh the same.
      skip: leave parameters and moments unchanged in a step whose loss, gradients or new parameters are not finite, and
        report the metric `skipped`, 1 or 0. Counts of the optimizer still advance, so that the schedule follows the step.
      project: maps updated parameters into their bounds.
      average: (optimizer state, updated parameters, step) -> optimizer state whose average of parameters has moved.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def loss_gradients(state: TrainState, batch: Batch) -> tuple[Any, Metrics]:
        if accumulate == 1:
            (_, metrics), grads = value_and_grad(state.params, batch, state.key, state.step, 0, 1.0)
            return grads, metrics
        shared, microbatches = _split_batch(batch, accumulate)
        raw_weights = jax.vmap(weight)(microbatches) if weight else jnp.ones(accumulate)
        weights = raw_weights / jnp.where(raw_weights.sum() > 0, raw_weights.mean(), 1.0)

        def add(total: Any, indexed: tuple[jax.Array, Batch, jax.Array]) -> tuple[Any, None]:
            index, microbatch, weight = indexed
            (_, metrics), grads = value_and_grad(
                state.params, microbatch | shared, state.key, state.step, index, weight
            )
            return jax.tree.map(lambda sum_, value: sum_ + value / accumulate, total, (grads, metrics)), None

        first = jax.tree.map(lambda value: value[0], microbatches)
        shapes = jax.eval_shape(value_and_grad, state.params, first | shared, state.key, state.step, 0, weights[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[1], shapes[0][1]))
        (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), microbatches, weights))
        return grads, metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = loss_gradients(state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = project(optax.apply_updates(state.params, updates))
        opt_state = average(opt_state, params, state.step)
        metrics |= _gradient_norms(grads) | {"learning_rate": jnp.asarray(schedule(state.step))}
        if skip:
            finite = all_finite((metrics["loss"], grads, params))
            params, opt_state = _select_floats(finite, (params, opt_state), (state.params, state.opt_state))
            metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
        return TrainState(state.step + 1, state.key, params, opt_state), metrics

    return train_step


def _split_batch(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """Returns (arrays that all microbatches share, arrays with a leading axis over consecutive microbatches)."""
    shared = {name: value for name, value in batch.items() if name == "sampled_positions"}
    microbatches = {
        name: value.reshape(count, value.shape[0] // count, *value.shape[1:])
        for name, value in batch.items()
        if name not in shared
    }
    return shared, microbatches


def _gradient_norms(grads: Any) -> Metrics:
    """Returns the gradient norm of each non-empty parameter group, `gradient_norm/GROUP`."""
    grouped = list(zip(jax.tree.leaves(param_groups(grads)), jax.tree.leaves(grads), strict=True))
    norms = {}
    for group in PARAM_GROUPS:
        leaves = [leaf for name, leaf in grouped if name == group]
        if leaves:
            norms[f"gradient_norm/{group}"] = optax.tree.norm(leaves)
    return norms


def _select_floats(finite: jax.Array, new: Any, old: Any) -> Any:
    """Returns the floating-point leaves of `new` if finite, else of `old`; integer leaves (counts) are always the new ones."""

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return jax.tree.map(select, new, old)
