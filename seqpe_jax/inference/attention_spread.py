"""Mean distance and entropy of the attention weights of each head: how far it attends, and how evenly."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.positions.grids import PositionGrid

MAX_TOKENS = 512  # of a text; its attention weights are held at once, layer by layer


class Spread(NamedTuple):
    """Means over queries and examples, of one layer.

    Attributes:
      distance_H: float32, distance from query to key in tokens or patches, weighted by attention.
      entropy_H: float32, entropy of the attention weights in nats; the logarithm of the number of keys if they are equal.
      weights_BHS: float32, attention weights of the first token; (B, H, 0) of a text.
    """

    distance_H: jax.Array
    entropy_H: jax.Array
    weights_BHS: jax.Array


def distances_between(shape: tuple[int, ...], prefix_tokens: int) -> np.ndarray:
    """Returns the Euclidean distances between all tokens, float32[L, S]; NaN from and to a prefix, such as a class token.

    Args:
      shape: shape of the window or grid.
      prefix_tokens: tokens before it.
    """
    positions_LA = np.asarray(PositionGrid().positions(shape), np.float32)
    between_LS = np.linalg.norm(positions_LA[:, None] - positions_LA, axis=-1)
    return np.pad(between_LS, ((prefix_tokens, 0),) * 2, constant_values=np.nan).astype(np.float32)


def measure(distance_LS: jax.Array, is_query_L: jax.Array, with_weights: bool) -> Callable[[jax.Array], Spread]:
    """Returns the function that measures the attention weights of a layer, float32[B, H, L, S].

    Args:
      distance_LS: as `distances_between` returns it; keys without a distance are left out of the mean distance.
      is_query_L: bool, queries over which means are taken.
      with_weights: whether the weights of the first token are returned.
    """

    def of_layer(weights_BHLS: jax.Array) -> Spread:
        known_LS = jnp.isfinite(distance_LS)
        seen_BHLS = jnp.where(known_LS, weights_BHLS, 0.0)
        sums_BHL = (seen_BHLS * jnp.where(known_LS, distance_LS, 0.0)).sum(axis=-1)
        distance_BHL = sums_BHL / jnp.maximum(seen_BHLS.sum(axis=-1), 1e-9)
        entropy_BHL = jax.scipy.special.entr(weights_BHLS).sum(axis=-1)
        of_queries = [
            jnp.where(is_query_L, values_BHL, 0.0).sum(axis=(0, 2)) / (is_query_L.sum() * weights_BHLS.shape[0])
            for values_BHL in (distance_BHL, entropy_BHL)
        ]
        return Spread(*of_queries, weights_BHLS[:, :, 0, : weights_BHLS.shape[-1] * with_weights])

    return of_layer
