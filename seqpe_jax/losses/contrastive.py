"""Near positions, near vectors: cross-entropy that picks the nearest candidate of each pivot."""

import jax
import jax.numpy as jnp

from seqpe_jax.losses.task import cross_entropy


def contrastive_loss(
    anchors_BE: jax.Array,
    candidates_BCE: jax.Array,
    labels_B: jax.Array,
    *,
    heads: int | None = None,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    floor: float = 0.0,
) -> jax.Array:
    """Returns the mean loss (nats) of dot products pivot . candidate (arXiv 2506.13277 section 3; reference criterion).

    Args:
      pivots_BE, candidates_BCE: float32 vectors; labels_B: int32, index of the nearest candidate.
      heads: the vectors are split over that many heads, each with a loss of its own; None = whole vectors.
      label_smoothing: share of the target spread over all candidates; scale: of the dot products.
      floor: see `contrastive_logits_loss`.
    """
    batch, count, _ = candidates_BCE.shape
    anchors = anchors_BE.reshape(batch, heads or 1, -1)
    candidates = candidates_BCE.reshape(batch, count, heads or 1, -1)
    logits_HBC = scale * jnp.einsum("bhf,bchf->hbc", anchors, candidates)
    return contrastive_logits_loss(logits_HBC, labels_B, label_smoothing=label_smoothing, floor=floor)


def contrastive_logits_loss(
    logits: jax.Array, labels_B: jax.Array, *, label_smoothing: float = 0.0, floor: float = 0.0
) -> jax.Array:
    """Returns the mean loss (nats) of given logits [..., B, C], such as attention logits of every head and layer.

    Args:
      labels_B, label_smoothing: see `contrastive_loss`.
      floor: loss (nats) of one pivot in one head below which it is near enough: it counts as the floor and has no gradient.
    """
    labels = jnp.broadcast_to(labels_B, logits.shape[:-1])
    mean, losses = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return jnp.maximum(losses, floor).mean() if floor else mean
