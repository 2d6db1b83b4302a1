"""Queries and keys as arrows: how long they are says what, where they point says where."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.encodings.bounds import ParamBounds, clip_straight_through
from seqpe_jax.encodings.fixed import require_one_axis, unit_circle


class PoPE(nn.Module):
    """Polar coordinates: number k of a head is an arrow as long as softplus(q_k), turned by position times theta^(-k / K).

    A key's arrow is turned on by a learned angle of each layer, head and number, from -2 pi to 0. Source: Gopalakrishnan et
    al. 2025 (arXiv 2509.10534).

    Attributes:
      layers_model, width_model, heads_model: of the model; theta: base of the wavelengths.
      unit: of positions, in which one token measures `unit`.
      PARAM_BOUNDS: training keeps the keys' angles between -2 pi and 0, as the paper does.
    """

    PARAM_BOUNDS: ClassVar[ParamBounds] = {"shift": (-2 * math.pi, 0.0)}

    layers_model: int
    width_model: int
    heads_model: int
    theta: float = 10000.0
    unit: int = 1

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `polar_phase`, each float32[P, L, 1, K], and `polar_key_phase` for positions int32[P, L, 1].

        Raises:
          InputError: a grid.
        """
        require_one_axis("pope", positions_PLA)
        width = self.width_model // self.heads_model
        frequencies = self.theta ** (-np.arange(width) / width)
        cos, sin = unit_circle(positions_PLA[..., 0], frequencies / self.unit)
        shift = self.param("shift", nn.initializers.zeros, (self.layers_model, self.heads_model, width), jnp.float32)
        shift = clip_straight_through(shift, self.PARAM_BOUNDS["shift"])
        return PositionSignal(
            polar_phase=(cos[:, :, None], sin[:, :, None]), polar_key_phase=shift, per_layer_fields=("polar_key_phase",)
        )
