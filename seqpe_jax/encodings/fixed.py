"""Encodings without parameters: sinusoidal, rotary, ALiBi, none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.errors import InputError

DIGIT = 64  # positions are read in base 64 where angles must stay exact
LEVELS = 4  # 64**4 positions


def unit_circle(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) of position * frequency, float32[..., F], exact to rounding at any int32 position below 64**4.

    A float32 product would lose 1e-3 radians at position 16 384; here the angles of each base-64 digit come from
    float64 tables, and the digits' rotations are multiplied.

    Args:
      positions: int32[...]; frequencies: float64[F], radians per position.
    """
    cos, sin = jnp.ones(()), jnp.zeros(())
    for level in range(LEVELS):
        angles = np.arange(DIGIT)[:, None] * (float(DIGIT) ** level * np.asarray(frequencies, np.float64))
        digit = positions // DIGIT**level % DIGIT
        next_cos = jnp.asarray(np.cos(angles), jnp.float32)[digit]
        next_sin = jnp.asarray(np.sin(angles), jnp.float32)[digit]
        cos, sin = cos * next_cos - sin * next_sin, sin * next_cos + cos * next_sin
    return cos, sin


class NoPosition(nn.Module):
    """No encoding at all (NoPE): a causal model infers order from what each token can see."""

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns an empty signal."""
        return PositionSignal()


class Sinusoidal(nn.Module):
    """Sines (even columns) and cosines (odd columns) added to the tokens (Vaswani et al. 2017).

    Attributes:
      width_model: width of the tokens; theta: base of the wavelengths; amplitude: of the waves.
    """

    width_model: int
    theta: float = 10000.0
    amplitude: float = 1.0

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `added` for positions int32[P, L, 1]."""
        if positions_PLA.shape[-1] != 1:
            raise InputError("encoding.kind='sinusoidal' reads one coordinate")
        pairs = -(-self.width_model // 2)
        frequencies = self.theta ** (-2.0 * np.arange(pairs) / self.width_model)
        cos, sin = unit_circle(positions_PLA[..., 0], frequencies)
        table_PLD = jnp.stack([sin, cos], axis=-1).reshape(*sin.shape[:-1], -1)[..., : self.width_model]
        return PositionSignal(added=self.amplitude * table_PLD)


class Rotary(nn.Module):
    """RoPE: q and k turn by position times theta^(-2i / head width) in pairs (2i, 2i + 1) (Su et al. 2021).

    Attributes:
      width_model, heads_model: of the model; theta: base of the wavelengths.
    """

    width_model: int
    heads_model: int
    theta: float = 10000.0

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` for positions int32[P, L, 1]."""
        if positions_PLA.shape[-1] != 1:
            raise InputError("encoding.kind='rotary' reads one coordinate")
        head_width = self.width_model // self.heads_model
        if head_width % 2:
            raise InputError(
                f"encoding.kind='rotary' turns pairs: model.width / model.heads = {head_width} must be even"
            )
        frequencies = self.theta ** (-np.arange(0, head_width, 2) / head_width)
        cos, sin = unit_circle(positions_PLA[..., 0], frequencies)
        return PositionSignal(rotation=(cos[:, :, None], sin[:, :, None]))


def alibi_slopes(heads: int) -> np.ndarray:
    """Returns the slope of each head, float64[heads] (Press et al. 2022).

    A geometric sequence from 2^(-8 / heads) for a power of two; else that of the power below, filled up with every
    other slope of the power above.
    """

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 / count * np.arange(1, count + 1))

    below = 2 ** math.floor(math.log2(heads))
    return np.concatenate([geometric(below), geometric(2 * below)[::2][: heads - below]])


class ALiBi(nn.Module):
    """Attention logits fall linearly with distance, -slope * (i - j), as two features per head.

    Attributes:
      width_model, heads_model: of the model.
      reference_scaling: slopes divided by sqrt(head width), as the PyTorch reference has it.
    """

    width_model: int
    heads_model: int
    reference_scaling: bool = False

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `features` for positions int32[P, L, 1]; right for causal attention, where j <= i."""
        if positions_PLA.shape[-1] != 1:
            raise InputError("encoding.kind='alibi' reads one coordinate")
        slopes = alibi_slopes(self.heads_model)
        if self.reference_scaling:
            slopes = slopes / math.sqrt(self.width_model // self.heads_model)
        slopes_H = jnp.asarray(slopes, jnp.float32)
        place_PL1 = positions_PLA.astype(jnp.float32)
        flat_PLH = jnp.broadcast_to(slopes_H, (*place_PL1.shape[:2], len(slopes)))
        query = jnp.stack([flat_PLH, -slopes_H * place_PL1], axis=-1)
        key = jnp.stack([place_PL1, jnp.ones_like(place_PL1)], axis=-1)
        return PositionSignal(features=(query, key))
