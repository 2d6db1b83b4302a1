"""The task's loss: cross-entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns (mean loss, losses) in nats.

    Args:
      logits: float[..., V]; labels: int32[...]; weights: float[...], elements count by it in the mean; at least one
        must be positive. label_smoothing: that share of the target is spread over all classes.
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * jax.nn.log_softmax(logits).mean(axis=-1)
    if weights is None:
        return losses.mean(), losses
    return (losses * weights).sum() / weights.sum(), losses


def token_losses(
    logits_of: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array, targets_BL: jax.Array, block: int
) -> jax.Array:
    """Returns each token's loss, float32[B, L], with the logits of only `block` places in memory at a time."""
    batch, length = targets_BL.shape
    count = -(-length // block)
    padding = ((0, 0), (0, count * block - length))
    hidden = jnp.pad(hidden_BLD, (*padding, (0, 0))).reshape(batch, count, block, -1).swapaxes(0, 1)
    targets = jnp.pad(targets_BL, padding).reshape(batch, count, block).swapaxes(0, 1)

    @jax.checkpoint  # else the backward pass would keep the logits of every block
    def losses_of(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(logits_of(hidden), targets)[1]

    losses = jax.lax.map(lambda part: losses_of(*part), (hidden, targets))
    return losses.swapaxes(0, 1).reshape(batch, -1)[:, :length]
