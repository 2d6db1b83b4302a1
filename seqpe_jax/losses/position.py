"""Losses on position vectors: contrastive learning of nearness, and distillation.

Distillation transfers the in-range similarity matrix to shifted, out-of-range windows.
"""

import jax
import jax.numpy as jnp

from seqpe_jax.losses.task import cross_entropy


def dot_products(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """Returns an einsum of vectors or of position queries and keys at float32 precision, which TPU and GPU do not default to."""
    return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)


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
    """Contrastive loss of dot products anchor . candidate: the nearest candidate is the positive one.

    Source: arXiv 2506.13277 section 3, and the criterion of the reference code.

    Args:
      anchors_BE: float32 vectors.
      candidates_BCE: float32 vectors.
      labels_B: int32, index of the candidate nearest to the anchor.
      heads: split the vectors over so many heads, each with its own loss; None: one loss of complete vectors.
      label_smoothing: share of the target spread over all candidates.
      scale: multiplier of the dot products.
      floor: lower limit of each loss, see `contrastive_logits_loss`.

    Returns:
      Mean loss over anchors and heads, float32[], nats.
    """
    batch, num_candidates, _ = candidates_BCE.shape
    anchors = anchors_BE.reshape(batch, heads or 1, -1)
    candidates = candidates_BCE.reshape(batch, num_candidates, heads or 1, -1)
    logits_HBC = scale * dot_products("bhf,bchf->hbc", anchors, candidates)
    return contrastive_logits_loss(logits_HBC, labels_B, label_smoothing=label_smoothing, floor=floor)


def contrastive_logits_loss(
    logits: jax.Array, labels_B: jax.Array, *, label_smoothing: float = 0.0, floor: float = 0.0
) -> jax.Array:
    """Contrastive loss of logits, such as attention logits of every head and layer.

    Args:
      logits: float[..., B, C].
      labels_B: int32, index of the candidate nearest to the anchor.
      label_smoothing: share of the target spread over all candidates.
      floor: lower limit (nats) of the loss of one anchor in one head; below it the loss is constant, without gradient.

    Returns:
      Mean loss, float32[], nats.
    """
    labels = jnp.broadcast_to(labels_B, logits.shape[:-1])
    mean, losses = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return jnp.maximum(losses, floor).mean() if floor else mean


def distillation_loss(
    teacher_BME: jax.Array,
    student_BME: jax.Array,
    *,
    heads: int | None = None,
    metric: str = "kl",
    beta: float = 1.0,
    scale: float = 1.0,
    reduction: str = "elements",
) -> jax.Array:
    """Distillation loss: the self-similarities of a window in range teach those of the same window out of range.

    Source: arXiv 2506.13277 section 3, and the criterion of the reference code.

    Args:
      teacher_BME: float32 vectors of M positions in range.
      student_BME: float32 vectors of the same M offsets in a window out of range.
      heads: split the vectors over so many heads, each with its own similarities; None: complete vectors.
      metric: see `distillation_logits_loss`.
      beta: see `distillation_logits_loss`.
      scale: multiplier of the dot products.
      reduction: see `distillation_logits_loss`.

    Returns:
      Loss, float32[], nats.
    """

    def similarities(vectors_BME: jax.Array) -> jax.Array:
        batch, count, _ = vectors_BME.shape
        vectors = vectors_BME.reshape(batch, count, heads or 1, -1)
        return scale * dot_products("bmhf,bnhf->bhmn", vectors, vectors)

    return distillation_logits_loss(
        similarities(teacher_BME), similarities(student_BME), metric=metric, beta=beta, reduction=reduction
    )


def distillation_logits_loss(
    teacher: jax.Array, student: jax.Array, *, metric: str = "kl", beta: float = 1.0, reduction: str = "elements"
) -> jax.Array:
    """Distillation loss of similarity matrices, whose rows are compared after log-softmax.

    Args:
      teacher: float32[..., M, M].
      student: float32[..., M, M].
      metric: "kl": KL(teacher || student) + KL(student || teacher); "mse": squared error of the log-probabilities.
      beta: weight of the loss with a fixed teacher; 1 - beta is the weight of the loss with a fixed student.
      reduction: "elements": mean over all M x M elements, as in the reference; "rows": sum over each row, mean over rows.

    Returns:
      Loss, float32[], nats.
    """
    teacher, student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)

    def compare(first: jax.Array, second: jax.Array) -> jax.Array:
        if metric == "mse":
            elements = jnp.square(first - second)
        else:
            elements = jnp.exp(first) * (first - second) + jnp.exp(second) * (second - first)
        return elements.mean() if reduction == "elements" else elements.sum(axis=-1).mean()

    loss = beta * compare(jax.lax.stop_gradient(teacher), student)
    if beta < 1:
        loss = loss + (1 - beta) * compare(teacher, jax.lax.stop_gradient(student))
    return loss
