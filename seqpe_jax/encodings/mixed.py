"""Rotary encoding whose frequencies are learned over all axes at once, for each layer and head."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.encodings.fixed import axis_frequencies, rotary_head_width, with_identity_prefix


class RotaryMixed(nn.Module):
    """RoPE-Mixed: pair f of head h turns by the dot product of position and a learned vector of frequencies.

    Fresh vectors point along A orthogonal directions that are drawn anew for each head, with the lengths of the axial
    form. Source: Heo et al. 2024 (arXiv 2403.13298), there with theta 10; the PyTorch reference's command line sets
    10000.

    Attributes:
      layers_model, width_model, heads_model: of the model; theta: base of the wavelengths at the start.
      unit: of positions, in which one token or patch measures `unit`.
      prefix: tokens before the positions that have none, such as a class token; they do not turn.
      reference_scramble: rotations [H, L] are read as if they were [L, H], as the PyTorch reference has it.
    """

    layers_model: int
    width_model: int
    heads_model: int
    theta: float = 10.0
    unit: int = 1
    prefix: int = 0
    reference_scramble: bool = False

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation`, stacked over layers, of prefix + L tokens for positions int32[P, L, A]; `shape` is not read.

        Raises:
          InputError: odd head width, or fewer pairs than axes.
        """
        axes = positions_PLA.shape[-1]
        pairs = rotary_head_width("rotary_mixed", self.width_model, self.heads_model, axes) // 2
        sizes = (self.layers_model, axes, self.heads_model, pairs)
        frequencies = self.param("frequencies", self._fresh, sizes)
        # N counts the layers, F the pairs. Angles stay float32 at full precision: a position may be large.
        angles = jnp.einsum(
            "pla,nahf->nplhf",
            positions_PLA.astype(jnp.float32) / self.unit,
            frequencies,
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.reference_scramble:
            angles = jnp.swapaxes(angles, 2, 3).reshape(angles.shape)
        return PositionSignal(
            rotation=with_identity_prefix(jnp.cos(angles), jnp.sin(angles), self.prefix), per_layer_fields=("rotation",)
        )

    def _fresh(self, key: jax.Array, sizes: tuple[int, int, int, int]) -> jax.Array:
        """Frequencies [layers, A, H, pairs], radians per position."""
        layers, axes, heads, pairs = sizes
        lengths = axis_frequencies(2 * pairs, axes, self.theta)
        direction = np.repeat(np.arange(axes), [len(part) for part in lengths])
        turns = jax.random.orthogonal(key, axes, (layers, heads))  # rows are directions
        turns = turns.at[..., -1, :].multiply(jnp.linalg.det(turns)[..., None])  # no reflections
        vectors = turns[..., direction, ::-1] * jnp.asarray(np.concatenate(lengths), jnp.float32)[:, None]
        return jnp.moveaxis(vectors, -1, 1).astype(jnp.float32)
