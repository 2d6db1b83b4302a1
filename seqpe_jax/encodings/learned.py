"""One learned vector per position, interpolated when a window is longer than the table."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.errors import InputError


class Learned(nn.Module):
    """A learned table added to the tokens (GPT-2's `wpe`).

    Attributes:
      width_model: width of the tokens; table_length: entries; init_std: of the fresh table.
    """

    width_model: int
    table_length: int
    init_std: float = 0.02

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `added` for positions int32[P, L, 1] below max(table_length, shape[0]).

        A longer window reads the table stretched to its length (linear, half-pixel centres).
        """
        if positions_PLA.shape[-1] != 1:
            raise InputError("encoding.kind='learned' reads one coordinate")
        table = self.param("table", nn.initializers.normal(self.init_std), (self.table_length, self.width_model))
        if shape[0] > self.table_length:
            table = jax.image.resize(table, (shape[0], self.width_model), "linear")
        return PositionSignal(added=jnp.take(table, positions_PLA[..., 0], axis=0))
