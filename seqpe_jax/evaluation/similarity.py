"""How alike the vectors of positions are: cosine of some pivots' vectors with those of a whole window."""

import jax
import jax.numpy as jnp
import numpy as np


def cosine(vectors_RE: jax.Array, pivots: np.ndarray) -> jax.Array:
    """Returns the cosine float32[len(pivots), R] of rows `pivots` with all rows."""
    unit_RE = vectors_RE / jnp.linalg.norm(vectors_RE, axis=-1, keepdims=True)
    return unit_RE[jnp.asarray(pivots)] @ unit_RE.T
