"""Far positions relate to each other as near ones do: the similarities of a window teach those of a shifted one."""

import jax
import jax.numpy as jnp


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
    """Returns the loss between the self-similarities of M vectors in range and of M out of range (reference criterion).

    Args:
      teacher_BME, student_BME: float32 vectors of the same offsets in two windows.
      heads: the vectors are split over that many heads; None = whole vectors.
      scale: of the dot products. Others: as of `distillation_logits_loss`.
    """

    def similarities(vectors_BME: jax.Array) -> jax.Array:
        batch, count, _ = vectors_BME.shape
        split = vectors_BME.reshape(batch, count, heads or 1, -1)
        return scale * jnp.einsum("bmhf,bnhf->bhmn", split, split)

    return distillation_logits_loss(
        similarities(teacher_BME), similarities(student_BME), metric=metric, beta=beta, reduction=reduction
    )


def distillation_logits_loss(
    teacher: jax.Array, student: jax.Array, *, metric: str = "kl", beta: float = 1.0, reduction: str = "elements"
) -> jax.Array:
    """Returns the loss between two tables of similarities [..., M, M], compared row by row as log-softmax.

    Args:
      metric: "kl" (both directions, KL(t||s) + KL(s||t)) or "mse" of the log-probabilities.
      beta: share in which the teacher is held fixed; 1 - beta counts with the student held fixed instead.
      reduction: "elements" averages over all M x M entries (as the reference), "rows" sums each row first.
    """
    teacher, student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)

    def compare(first: jax.Array, second: jax.Array) -> jax.Array:
        if metric == "mse":
            table = jnp.square(first - second)
        else:
            table = jnp.exp(first) * (first - second) + jnp.exp(second) * (second - first)
        return table.mean() if reduction == "elements" else table.sum(axis=-1).mean()

    loss = beta * compare(jax.lax.stop_gradient(teacher), student)
    if beta < 1:
        loss = loss + (1 - beta) * compare(teacher, jax.lax.stop_gradient(student))
    return loss
