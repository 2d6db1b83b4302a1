"""PoPE: queries and keys in polar coordinates, magnitude from content and phase from position."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.config import ModelDims, PoPEConfig
from seqpe_jax.encodings.position_signal import ParamBounds, PositionSignal, clip_straight_through
from seqpe_jax.encodings.rope import unit_circle


class PoPE(nn.Module):
    """Polar position encoding: component k of a head has magnitude softplus(q_k) and phase position * theta^(-k / K).

    To a key's phase a learned angle of each layer, head and component is added, from -2 pi to 0. Source: Gopalakrishnan et
    al. 2025 (arXiv 2509.10534).

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
      PARAM_BOUNDS: training limits the keys' angles to -2 pi .. 0, as the paper does.
    """

    PARAM_BOUNDS: ClassVar[ParamBounds] = {"shift": (-2 * math.pi, 0.0)}

    config: PoPEConfig
    dims: ModelDims

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `polar_phase`, each float32[P, L, 1, K], and `polar_key_phase` for positions int32[P, L, 1]."""
        width = self.dims.head_width
        frequencies = self.config.theta ** (-np.arange(width) / width)
        cos, sin = unit_circle(positions_PLA[..., 0], frequencies / self.config.position_resolution)
        sizes = (self.dims.layers, self.dims.heads, width)
        shift = self.param("shift", nn.initializers.zeros, sizes, jnp.float32)
        return PositionSignal(
            polar_phase=(cos[:, :, None], sin[:, :, None]),
            polar_key_phase=clip_straight_through(shift, self.PARAM_BOUNDS["shift"]),
            per_layer_fields=("polar_key_phase",),
        )
