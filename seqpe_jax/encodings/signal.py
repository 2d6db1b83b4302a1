"""What attention learns of positions: one small pytree that every encoding produces and every model reads."""

import flax
import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class PositionSignal:
    """The effect of P position sets of L positions on tokens, queries and keys; absent fields have none.

    Attributes:
      added: float[P, L, D], added to the tokens.
      rotation: (cos, sin), each float[P, L, H or 1, K/2], rotating pairs (2i, 2i + 1) of q and k.
      factors: (for q, for k), each float[P, L, H or 1, K], multiplied onto q and k.
      shifts: the same, added to q and k.
      features: (f_q, f_k), each float32[P, L, H or 1, F]; final attention logits gain f_q . f_k.
      bias: float32[H or 1, L, S], added to the final attention logits.
      stacked: every field but `added` has a leading layer axis.
    """

    added: jax.Array | None = None
    rotation: Pair | None = None
    factors: Pair | None = None
    shifts: Pair | None = None
    features: Pair | None = None
    bias: jax.Array | None = None
    stacked: bool = flax.struct.field(pytree_node=False, default=False)

    def at_layer(self, layer: int) -> "PositionSignal":
        """Returns what one layer sees."""
        if not self.stacked:
            return self
        return jax.tree.map(lambda field: field[layer], self.replace(added=None)).replace(stacked=False)

    def at_places(self, places_PL: jax.Array) -> "PositionSignal":
        """Returns what one layer's tokens get at places int32[P, L] of a window, as P position sets without a bias.

        The window's signal has one position set. A bias tells of pairs of places, so the reader of both picks its rows.
        """
        return jax.tree.map(lambda field: field[0][places_PL], self.replace(bias=None))


def fit_batch(field: jax.Array, batch: int) -> jax.Array:
    """Returns [1 or batch, ...] of a field of P position sets: sample i uses set i mod P."""
    sets = field.shape[0]
    return field if sets == 1 else jnp.tile(field, (batch // sets,) + (1,) * (field.ndim - 1))
