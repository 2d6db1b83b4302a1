"""Rotary encodings: RoPE with its scalings for longer windows, over the axes of a grid, and with learned frequencies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.config import ModelDims, RotaryAxialConfig, RotaryConfig, RotaryIDConfig, RotaryMixedConfig
from seqpe_jax.config.encodings import FACTOR_SCALINGS
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError

RADIX = 64  # base in which positions are split where angles must stay exact
RADIX_DIGITS = 5  # 64**5 positions, as many units as there may be (config.MAX_POSITION_UNITS)


def unit_circle(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) of position * frequency, float32[..., F], exact to rounding at any int32 position below 64**5.

    A float32 product would lose 1e-3 radians at position 16 384; here the angles of each base-64 digit come from
    float64 tables, and the digits' rotations are multiplied.

    Args:
      positions: int32[...].
      frequencies: float64[F], radians per position.
    """
    cos, sin = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    for level in range(RADIX_DIGITS):
        angles = np.arange(RADIX)[:, None] * (float(RADIX) ** level * np.asarray(frequencies, np.float64))
        digit = positions // RADIX**level % RADIX
        next_cos = jnp.asarray(np.cos(angles), jnp.float32)[digit]
        next_sin = jnp.asarray(np.sin(angles), jnp.float32)[digit]
        cos, sin = cos * next_cos - sin * next_sin, sin * next_cos + cos * next_sin
    return cos, sin


def axis_frequencies(width: int, axes: int, theta: float) -> list[np.ndarray]:
    """Returns the frequencies of each axis, float64 in radians per position: theta^(-2 i axes / width), i = 0, 1, ...

    The ceil(width / 2) pairs of columns are divided among the axes; the first axes get what does not divide.
    """
    parts = np.array_split(np.arange(-(-width // 2)), axes)
    return [theta ** (-2.0 * axes * np.arange(len(part)) / width) for part in parts]


def rotary_frequencies(width: int, axes: int, theta: float, pairs: int) -> list[np.ndarray]:
    """Returns the highest `axis_frequencies` of a head, `pairs` of them divided among the axes; 0 = all.

    Pairs whose period is shorter than the training window have been seen at all angles, so that they extrapolate; those of
    low frequency have not (p-RoPE: Barbero et al. 2024, arXiv 2410.06205, and arXiv 2603.18017).
    """
    frequencies = axis_frequencies(width, axes, theta)
    if not pairs:
        return frequencies
    counts = [len(part) for part in np.array_split(np.arange(pairs), axes)]
    return [part[:count] for part, count in zip(frequencies, counts, strict=True)]


def rotation(cos: jax.Array, sin: jax.Array, prefix_tokens: int) -> PositionSignal:
    """Returns the signal of rotations [..., L, H, F], preceded by the identity for tokens without a position."""
    before = [(0, 0)] * (cos.ndim - 3) + [(prefix_tokens, 0), (0, 0), (0, 0)]
    return PositionSignal(rotation=(jnp.pad(cos, before, constant_values=1.0), jnp.pad(sin, before)))


def row_major_index(positions_PLA: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the row-major index int32[P, L] of positions int32[P, L, A] in a grid of this shape at the origin."""
    index_PL = positions_PLA[..., 0]
    for axis in range(1, positions_PLA.shape[-1]):
        index_PL = index_PL * shape[axis] + positions_PLA[..., axis]
    return index_PL


def flatten_positions(positions_PLA: jax.Array, shape: tuple[int, ...], prefix_tokens: int) -> jax.Array:
    """Returns positions int32[P, prefix + L, 1] on one axis: of the tokens before the grid, then of the grid, row-major."""
    first_PL = jnp.broadcast_to(jnp.arange(prefix_tokens, dtype=jnp.int32), (positions_PLA.shape[0], prefix_tokens))
    index_PL = row_major_index(positions_PLA, shape) + prefix_tokens
    return jnp.concatenate([first_PL, index_PL], axis=1)[..., None]


def linear_scaling(frequencies: np.ndarray, ratio: float) -> np.ndarray:
    """Returns the frequencies of position interpolation (Chen et al. 2023, arXiv 2306.15595).

    Args:
      frequencies: radians per token.
      ratio: length of the window over that of training, above 1.
    """
    return frequencies / ratio


def ntk_scaling(frequencies: np.ndarray, ratio: float, width: int) -> np.ndarray:
    """Returns the frequencies of a larger base: the lowest is interpolated, the highest stays.

    Source: bloc97 2023, as written in Peng et al. 2023 (arXiv 2309.00071, section 3.1).

    Args:
      frequencies: radians per token.
      ratio: length of the window over that of training, above 1.
      width: columns of a head that have frequencies.
    """
    return frequencies * ratio ** (-2.0 * np.arange(len(frequencies)) / max(width - 2, 1))


def yarn_scaling(frequencies: np.ndarray, ratio: float, trained: int, slow: float, fast: float) -> np.ndarray:
    """Returns YaRN's frequencies: low ones interpolated, high ones unchanged, a blend between.

    Source: Peng et al. 2023 (arXiv 2309.00071, section 3.2, where slow is 1 and fast 32 for LLaMA).

    Args:
      frequencies: radians per token.
      ratio: length of the window over that of training, above 1.
      trained: tokens of the training window.
      slow: rotations within the training window up to which a pair is interpolated.
      fast: rotations from which on it is unchanged; if this is not above `slow`, all pairs above `slow` are.
    """
    rotations = trained * frequencies / (2 * math.pi)
    if fast > slow:
        unchanged = np.clip((rotations - slow) / (fast - slow), 0.0, 1.0)
    else:
        unchanged = (rotations > slow).astype(float)
    return (1.0 - unchanged) * frequencies / ratio + unchanged * frequencies


def yarn_pair_scaling(
    frequencies: np.ndarray,
    ratio: float,
    trained: int,
    slow: float,
    fast: float,
    *,
    theta: float,
    width: int,
    whole_pairs: bool,
) -> np.ndarray:
    """Returns YaRN's frequencies as its authors' code and checkpoints have them, blended by the index of a pair.

    Args:
      frequencies, ratio, trained, slow, fast: see `yarn_scaling`.
      theta: base of the wavelengths.
      width: columns of a head that have frequencies.
      whole_pairs: the blend begins and ends at indices of pairs, the next ones outward.
    """

    def index_of(rotations: float) -> float:
        return width * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(fast), index_of(slow)
    if whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 1e-3
    interpolated = np.clip((np.arange(len(frequencies)) - first) / (last - first), 0.0, 1.0)
    return interpolated * frequencies / ratio + (1.0 - interpolated) * frequencies


def yarn_attention_factor(ratio: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """Returns YaRN's factor of queries and of keys (arXiv 2309.00071, section 3.4), a fraction of two where both m are set."""

    def factor(m: float) -> float:
        return 0.1 * m * math.log(ratio) + 1.0 if ratio > 1 else 1.0

    return factor(mscale) / factor(mscale_all_dim) if mscale and mscale_all_dim else factor(1.0)


def longrope_attention_factor(ratio: float, trained: int) -> float:
    """Returns LongRoPE's factor of queries and of keys (Ding et al. 2024, arXiv 2402.13753; its code)."""
    return math.sqrt(1.0 + math.log(ratio) / math.log(trained)) if ratio > 1 else 1.0


def scaled_rotation(config: RotaryConfig, head_width: int, trained: int, window: int) -> tuple[np.ndarray, float]:
    """Returns the frequencies of a window, float64[F] in radians per token, and the factor of queries and of keys.

    Args:
      config: fields of the encoding, resolved.
      head_width: features of one head.
      trained: positions of the training window.
      window: positions of the window.
    """
    width = config.rotary_width(head_width)
    (frequencies,) = rotary_frequencies(width, 1, config.theta, config.rotary_pairs)
    original = config.original_length or trained
    ratio = config.scaling_factor or max(1.0, window / original)
    factor = 1.0
    if config.scaling in FACTOR_SCALINGS and ratio == 1.0:
        return frequencies, config.attention_factor or factor
    if config.scaling == "linear":
        frequencies = linear_scaling(frequencies, ratio)
    elif config.scaling == "ntk":
        frequencies = ntk_scaling(frequencies, ratio, width)
    elif config.scaling == "dynamic":
        frequencies = ntk_scaling(frequencies, ratio * max(window, original) / original - (ratio - 1), width)
    elif config.scaling == "llama3":  # YaRN's blend by rotations (Llama Team 2024, arXiv 2407.21783; its code)
        frequencies = yarn_scaling(frequencies, ratio, original, config.low_freq_factor, config.high_freq_factor)
    elif config.scaling == "yarn":
        ends = original, config.yarn_beta_slow, config.yarn_beta_fast
        if config.yarn_ramp == "pairs":
            blend = {"theta": config.theta, "width": width, "whole_pairs": config.yarn_truncate}
            frequencies = yarn_pair_scaling(frequencies, ratio, *ends, **blend)
        else:
            frequencies = yarn_scaling(frequencies, ratio, *ends)
        factor = yarn_attention_factor(ratio, config.yarn_mscale, config.yarn_mscale_all_dim)
    elif config.scaling == "longrope":
        divisors = config.long_factor if window > original else config.short_factor
        frequencies = frequencies / np.asarray(divisors[: len(frequencies)])
        factor = longrope_attention_factor(ratio, original)
    return frequencies, config.attention_factor or factor


class Rotary(nn.Module):
    """RoPE: q and k rotate by position times theta^(-2i / width) in pairs (2i, 2i + 1) (Su et al. 2021).

    The width is that of a head, or of the share of it that rotates. Frequencies may be scaled for longer windows
    (`scaled_rotation`); where that depends on the length of the window, all its tokens have the same frequencies, in a
    prefill and while it is decoded. A grid is read as one axis, row-major, on which the tokens before it come first.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: RotaryConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` of prefix + L tokens for positions int32[P, L, A] of a grid of this shape.

        Raises:
          InputError: a scaling of a window of symbolic length.
        """
        positions_PL1 = flatten_positions(positions_PLA, shape, self.dims.prefix_tokens)
        original = self.config.original_length or self.dims.num_positions
        if all(isinstance(side, int) for side in shape) or not self.config.scales_by_window:
            window = math.prod(shape) if self.config.scales_by_window else original
            return self._signal(positions_PL1, window)
        if (
            self.config.scaling == "longrope" and self.config.scaling_factor
        ):  # two sets of frequencies serve all lengths
            short, long = (self._signal(positions_PL1, window) for window in (original, original + 1))
            is_long = jnp.asarray(math.prod(shape)) > original
            return jax.tree.map(lambda one, other: jnp.where(is_long, other, one), short, long)
        raise InputError(
            f"encoding.scaling='{self.config.scaling}' has other angles for every length, and an export has one "
            "program for all: evaluate the run itself"
        )

    def _signal(self, positions_PL1: jax.Array, window: int) -> PositionSignal:
        """The signal of positions int32[P, L, 1] in a window of so many positions."""
        config = self.config
        frequencies, factor = scaled_rotation(config, self.dims.head_width, self.dims.num_positions, window)
        cos, sin = unit_circle(positions_PL1[..., 0], frequencies / config.position_resolution)
        signal = PositionSignal(rotation=(cos[:, :, None], sin[:, :, None]))
        if factor == 1.0:
            return signal
        if config.has_rotation_scaling:  # of the rotated columns alone
            return signal.replace(rotation=tuple(factor * part for part in signal.rotation))
        sharper = jnp.full((1, cos.shape[1], 1, 1), factor)
        return signal.replace(multiplicative=(sharper, sharper))


class RotaryID(nn.Module):
    """RoPE-ID: half of the pairs rotate, fast enough to have made whole turns within the training length.

    Their periods are a geometric series; the other pairs carry content alone. Beyond the training length logits are scaled by
    YaRN's temperature, for the number of keys that a query sees. Source: Wertheimer et al. 2026 (arXiv 2603.18017).

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: RotaryIDConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` and `multiplicative` of positions int32[P, L, 1]; `shape` is not read."""
        config, length = self.config, positions_PLA.shape[1]
        periods = np.geomspace(config.fastest_period, config.slowest_period, config.rotary_pairs)
        cos, sin = unit_circle(positions_PLA[..., 0], 2 * math.pi / periods / config.position_resolution)
        keys_L = jnp.arange(1, length + 1).astype(jnp.float32)
        sharper_L = 0.1 * jnp.log(jnp.maximum(1.0, keys_L / self.dims.num_positions)) + 1.0
        query = (sharper_L**2)[None, :, None, None]  # YaRN multiplies queries and keys
        return PositionSignal(rotation=(cos[:, :, None], sin[:, :, None]), multiplicative=(query, jnp.ones_like(query)))


class RotaryAxial(nn.Module):
    """RoPE with the pairs of a head divided among the axes of a grid, the last axis first; tokens before it do not rotate.

    Source: Heo et al. 2024 (arXiv 2403.13298), there with theta 100; the PyTorch reference's command line sets 10000.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: RotaryAxialConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` of prefix + L tokens for positions int32[P, L, A]; `shape` is not read."""
        config, axes = self.config, positions_PLA.shape[-1]
        frequencies = rotary_frequencies(self.dims.head_width, axes, config.theta, config.rotary_pairs)
        circles = [
            unit_circle(positions_PLA[..., axes - 1 - part], frequencies[part] / config.position_resolution)
            for part in range(axes)
        ]
        cos, sin = (jnp.concatenate(part, axis=-1)[:, :, None] for part in zip(*circles, strict=True))
        return rotation(cos, sin, self.dims.prefix_tokens)


class RotaryMixed(nn.Module):
    """RoPE-Mixed: pair f of head h rotates by the dot product of position and a learned vector of frequencies.

    Fresh vectors point along A orthogonal directions that are drawn anew for each head, with the lengths of the axial
    form. Source: Heo et al. 2024 (arXiv 2403.13298), there with theta 10; the PyTorch reference's command line sets
    10000.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model; tokens before the positions do not rotate.
    """

    config: RotaryMixedConfig
    dims: ModelDims

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation`, by layer, of prefix + L tokens for positions int32[P, L, A]; `shape` is not read."""
        sizes = (self.dims.layers, positions_PLA.shape[-1], self.dims.heads, self.dims.head_width // 2)
        frequencies = self.param("frequencies", self._init_frequencies, sizes)
        # N counts the layers, F the pairs. Angles are float32 at full precision: a position may be large.
        angles = jnp.einsum(
            "pla,nahf->nplhf",
            positions_PLA.astype(jnp.float32) / self.config.position_resolution,
            frequencies,
            precision=jax.lax.Precision.HIGHEST,
        )
        if self.dims.compat.reference_scramble:
            angles = jnp.swapaxes(angles, 2, 3).reshape(angles.shape)
        signal = rotation(jnp.cos(angles), jnp.sin(angles), self.dims.prefix_tokens)
        return signal.replace(per_layer_fields=("rotation",))

    def _init_frequencies(self, key: jax.Array, sizes: tuple[int, int, int, int]) -> jax.Array:
        """Initial frequencies float32[layers, A, H, pairs], radians per position."""
        layers, axes, heads, pairs = sizes
        magnitudes = axis_frequencies(2 * pairs, axes, self.config.theta)
        direction = np.repeat(np.arange(axes), [len(part) for part in magnitudes])
        rotations = jax.random.orthogonal(key, axes, (layers, heads))  # rows are directions
        rotations = rotations.at[..., -1, :].multiply(jnp.linalg.det(rotations)[..., None])  # no reflections
        vectors = rotations[..., direction, ::-1] * jnp.asarray(np.concatenate(magnitudes), jnp.float32)[:, None]
        return jnp.moveaxis(vectors, -1, 1).astype(jnp.float32)
