"""PaPE: logits gain parabolas of learned coordinates, whose shape the content of a query chooses."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.config import ModelDims, PaPEConfig
from seqpe_jax.encodings.position_signal import PositionSignal


class PaPE(nn.Module):
    """Parabolic position encoding: a linear map takes a position to coordinates p of each layer, head and parabola.

    Logits gain sum over m of -a_m (p_m[query] - p_m[key])^2 + b_m (p_m[query] - p_m[key]), over sqrt(head width) as the
    products of queries and keys are. The blocks of the network compute a_m >= 0 and b_m from a query's token
    (`models.transformer.parabola_query_key`). Source: Ohrstrom et al. 2026 (arXiv 2602.01418) and its code, where the class
    token is at the origin, before the grid; here it has no position, as for every encoding.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: PaPEConfig
    dims: ModelDims

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `parabola`, by layer, of prefix + L tokens for positions int32[P, L, A]; `shape` is not read."""
        config, dims, axes = self.config, self.dims, positions_PLA.shape[-1]
        limit = 1.0 / math.sqrt(axes)  # of PyTorch's linear layers

        def init(key: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, sizes, jnp.float32, -limit, limit)

        directions = self.param("directions", init, (dims.layers, axes, dims.heads, config.parabolas))
        own_PLA = positions_PLA.astype(jnp.float32) / config.position_resolution
        # N counts the layers, M the parabolas.
        coordinates = jnp.einsum("pla,nahm->nplhm", own_PLA, directions, precision=jax.lax.Precision.HIGHEST)
        before = ((0, 0), (0, 0), (dims.prefix_tokens, 0), (0, 0), (0, 0))
        has_position = jnp.ones((*coordinates.shape[:-2], 1, 1), jnp.float32)
        return PositionSignal(
            parabola=(jnp.pad(coordinates, before), jnp.pad(has_position, before)), per_layer_fields=("parabola",)
        )
