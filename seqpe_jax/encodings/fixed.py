"""Encodings without parameters: sinusoidal, rotary, axial rotary, ALiBi, none."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.errors import InputError

DIGIT = 64  # positions are read in base 64 where angles must stay exact
LEVELS = 5  # 64**5 positions, as many units as there may be (config.MAX_POSITION_UNITS)


def unit_circle(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) of position * frequency, float32[..., F], exact to rounding at any int32 position below 64**5.

    A float32 product would lose 1e-3 radians at position 16 384; here the angles of each base-64 digit come from
    float64 tables, and the digits' rotations are multiplied.

    Args:
      positions: int32[...]; frequencies: float64[F], radians per position.
    """
    cos, sin = jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32)
    for level in range(LEVELS):
        angles = np.arange(DIGIT)[:, None] * (float(DIGIT) ** level * np.asarray(frequencies, np.float64))
        digit = positions // DIGIT**level % DIGIT
        next_cos = jnp.asarray(np.cos(angles), jnp.float32)[digit]
        next_sin = jnp.asarray(np.sin(angles), jnp.float32)[digit]
        cos, sin = cos * next_cos - sin * next_sin, sin * next_cos + cos * next_sin
    return cos, sin


def row_major_index(positions_PLA: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the row-major index int32[P, L] of each position int32[P, L, A] in a grid of this shape at the origin."""
    index_PL = positions_PLA[..., 0]
    for axis in range(1, positions_PLA.shape[-1]):
        index_PL = index_PL * shape[axis] + positions_PLA[..., axis]
    return index_PL


def flatten_positions(positions_PLA: jax.Array, shape: tuple[int, ...], prefix: int) -> jax.Array:
    """Returns positions int32[P, prefix + L, 1] on one axis: the tokens before the grid, then its places row-major."""
    first_PL = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (positions_PLA.shape[0], prefix))
    return jnp.concatenate([first_PL, row_major_index(positions_PLA, shape) + prefix], axis=1)[..., None]


def axis_frequencies(width: int, axes: int, theta: float) -> list[np.ndarray]:
    """Returns the frequencies of each axis, float64 in radians per position: theta^(-2 i axes / width), i = 0, 1, ...

    The ceil(width / 2) pairs of columns are divided among the axes; the first axes get what does not divide.
    """
    parts = np.array_split(np.arange(-(-width // 2)), axes)
    return [theta ** (-2.0 * axes * np.arange(len(part)) / width) for part in parts]


def rotary_frequencies(width: int, axes: int, theta: float, pairs: int) -> list[np.ndarray]:
    """Returns `axis_frequencies`, cut down to the `pairs` fastest of them, shared out over the axes; 0 = all.

    Pairs whose period is shorter than the training window have been seen at all angles, so that they go on past it; the
    slow ones have not (Barbero et al. 2024, arXiv 2410.06205, and arXiv 2603.18017).

    Raises:
      InputError: more pairs than a head has, or fewer than there are axes.
    """
    frequencies = axis_frequencies(width, axes, theta)
    if not pairs:
        return frequencies
    if not axes <= pairs <= -(-width // 2):
        raise InputError(
            f"encoding.rotary_pairs={pairs} must lie between the {axes} axes and the {width // 2} pairs of a head of width "
            f"{width}, or be 0"
        )
    counts = [len(part) for part in np.array_split(np.arange(pairs), axes)]
    return [part[:count] for part, count in zip(frequencies, counts, strict=True)]


def position_interpolation(
    frequencies: np.ndarray, longer: float, trained: int, width: int, betas: tuple[float, float]
) -> np.ndarray:
    """Returns frequencies under which longer windows turn as far as those of training (Chen et al. 2023, arXiv 2306.15595).

    Args:
      frequencies: radians per token; longer: how many times as long; trained: tokens of training; width: of a head.
      betas: slow and fast, of `yarn_scaling`.
    """
    return frequencies / longer


def ntk_scaling(
    frequencies: np.ndarray, longer: float, trained: int, width: int, betas: tuple[float, float]
) -> np.ndarray:
    """Returns frequencies of a larger base, so that the slowest is as slow as interpolated, the fastest as it was.

    Source: bloc97 2023, as written in Peng et al. 2023 (arXiv 2309.00071, section 3.1). Arguments as of `position_interpolation`.
    """
    return frequencies * longer ** (-2.0 * np.arange(len(frequencies)) / max(width - 2, 1))


def yarn_scaling(
    frequencies: np.ndarray, longer: float, trained: int, width: int, betas: tuple[float, float]
) -> np.ndarray:
    """Returns YaRN's frequencies: slow ones interpolated, fast ones as they were, a blend between.

    Source: Peng et al. 2023 (arXiv 2309.00071, section 3.2, with betas 1 and 32 for LLaMA). Arguments as in `position_interpolation`.

    Args:
      betas: turns in training up to which a pair is interpolated, and from which on it stays as it was; where the second is
        not the larger, pairs of more turns than the first stay.
    """
    turns, (slow, fast) = trained * frequencies / (2 * math.pi), betas
    kept = np.clip((turns - slow) / (fast - slow), 0.0, 1.0) if fast > slow else (turns > slow).astype(float)
    return (1.0 - kept) * frequencies / longer + kept * frequencies


ROPE_SCALINGS = {"linear": position_interpolation, "ntk": ntk_scaling, "yarn": yarn_scaling}


def rotary_head_width(kind: str, width_model: int, heads_model: int, axes: int) -> int:
    """Returns the head width. Raises: InputError: it is odd, or has fewer pairs than there are axes."""
    width = width_model // heads_model
    if width % 2:
        raise InputError(f"encoding.kind='{kind}' turns pairs: model.width / model.heads = {width} must be even")
    if width < 2 * axes:
        raise InputError(
            f"encoding.kind='{kind}' turns at least one pair per axis: model.width / model.heads = {width} must be at "
            f"least {2 * axes} for {axes} axes"
        )
    return width


def require_one_axis(kind: str, positions_PLA: jax.Array) -> None:
    """Refuses grids. Raises: InputError."""
    if positions_PLA.shape[-1] != 1:
        raise InputError(f"encoding.kind='{kind}' knows distances along one axis, not on grids: choose another kind")


def with_identity_prefix(cos: jax.Array, sin: jax.Array, prefix: int) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin) [..., prefix + L, H, F] of rotations [..., L, H, F]: the tokens before them do not turn."""
    before = [(0, 0)] * (cos.ndim - 3) + [(prefix, 0), (0, 0), (0, 0)]
    return jnp.pad(cos, before, constant_values=1.0), jnp.pad(sin, before)


class NoPosition(nn.Module):
    """No encoding at all (NoPE): a causal model infers order from what each token can see."""

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns an empty signal."""
        return PositionSignal()


class Sinusoidal(nn.Module):
    """Sines (even columns) and cosines (odd columns) added to the tokens (Vaswani et al. 2017).

    On a grid the columns are divided among the axes, the first axis first (as the table of MAE, He et al. 2022); the
    tokens before the grid then get nothing. The PyTorch reference knows the flattened form only.

    Attributes:
      width_model: width of the tokens; theta: base of the wavelengths; amplitude: of the waves.
      unit: of positions, in which one token or patch measures `unit`.
      prefix: tokens before the positions that have none, such as a class token.
      flatten: one axis for the whole grid, row-major, on which the tokens before it come first.
    """

    width_model: int
    theta: float = 10000.0
    amplitude: float = 1.0
    unit: int = 1
    prefix: int = 0
    flatten: bool = False

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `input_embedding`, float32[P, prefix + L, D], for positions int32[P, L, A] of a grid of this shape.

        Raises:
          InputError: fewer pairs of columns than axes.
        """
        if self.flatten:
            positions_PLA = flatten_positions(positions_PLA, shape, self.prefix)
        axes = positions_PLA.shape[-1]
        if self.width_model < 2 * axes:
            raise InputError(f"encoding.kind='sinusoidal' needs model.width of at least {2 * axes} for {axes} axes")
        frequencies = axis_frequencies(self.width_model, axes, self.theta)
        circles = [unit_circle(positions_PLA[..., axis], frequencies[axis] / self.unit) for axis in range(axes)]
        cos, sin = (jnp.concatenate(part, axis=-1) for part in zip(*circles, strict=True))
        table_PLD = jnp.stack([sin, cos], axis=-1).reshape(*sin.shape[:-1], -1)[..., : self.width_model]
        if not self.flatten:
            table_PLD = jnp.pad(table_PLD, ((0, 0), (self.prefix, 0), (0, 0)))
        return PositionSignal(input_embedding=self.amplitude * table_PLD)


class Rotary(nn.Module):
    """RoPE: q and k turn by position times theta^(-2i / head width) in pairs (2i, 2i + 1) (Su et al. 2021).

    A grid is read as one axis, row-major, on which the tokens before it come first.

    Attributes:
      width_model, heads_model: of the model; theta: base of the wavelengths.
      rotary_pairs: how many of the fastest pairs turn, 0 = all; the others carry content alone.
      scaling: what becomes of the angles of a window or grid with more places than `table_shape`, one of `ROPE_SCALINGS`.
      yarn_beta_slow, yarn_beta_fast: of "yarn" (`yarn_scaling`), in turns.
      table_shape: the window or grid of training.
      unit: of positions, in which one token or patch measures `unit`.
      prefix: tokens before the positions that have none, such as a class token.
    """

    width_model: int
    heads_model: int
    theta: float = 10000.0
    rotary_pairs: int = 0
    scaling: str = "none"
    yarn_beta_slow: float = 1.0
    yarn_beta_fast: float = 32.0
    table_shape: tuple[int, ...] = ()
    unit: int = 1
    prefix: int = 0

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` of prefix + L tokens for positions int32[P, L, A] of a grid of this shape.

        Raises:
          InputError: odd head width; a scaling where the number of places is symbolic.
        """
        head_width = rotary_head_width("rotary", self.width_model, self.heads_model, 1)
        (frequencies,) = rotary_frequencies(head_width, 1, self.theta, self.rotary_pairs)
        longer = self._longer(shape)
        if longer > 1.0:
            betas = self.yarn_beta_slow, self.yarn_beta_fast
            frequencies = ROPE_SCALINGS[self.scaling](
                frequencies, longer, math.prod(self.table_shape), head_width, betas
            )
        cos, sin = unit_circle(flatten_positions(positions_PLA, shape, self.prefix)[..., 0], frequencies / self.unit)
        signal = PositionSignal(rotation=(cos[:, :, None], sin[:, :, None]))
        if longer > 1.0 and self.scaling == "yarn":
            sharper = jnp.full((1, cos.shape[1], 1, 1), 0.1 * math.log(longer) + 1.0)
            signal = signal.replace(multiplicative=(sharper, sharper))
        return signal

    def _longer(self, shape: tuple[int, ...]) -> float:
        """How many times as many places as in training there are, for a scaling; 1 = no more, or no scaling."""
        if self.scaling == "none":
            return 1.0
        if not all(isinstance(side, int) for side in shape):
            raise InputError(
                f"encoding.scaling='{self.scaling}' has other angles for every length, and an export has one program for "
                "all: evaluate the run itself"
            )
        return max(1.0, math.prod(shape) / math.prod(self.table_shape))


class RotaryAxial(nn.Module):
    """RoPE with the pairs of a head divided among the axes of a grid, the last axis first; tokens before it do not turn.

    Source: Heo et al. 2024 (arXiv 2403.13298), there with theta 100; the PyTorch reference's command line sets 10000.

    Attributes:
      width_model, heads_model: of the model; theta: base of the wavelengths.
      rotary_pairs: how many of the fastest pairs turn, over all axes, 0 = all; the others carry content alone.
      unit: of positions, in which one token or patch measures `unit`.
      prefix: tokens before the positions that have none, such as a class token.
    """

    width_model: int
    heads_model: int
    theta: float = 100.0
    rotary_pairs: int = 0
    unit: int = 1
    prefix: int = 0

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` of prefix + L tokens for positions int32[P, L, A]; `shape` is not read.

        Raises:
          InputError: odd head width, or fewer pairs than axes.
        """
        axes = positions_PLA.shape[-1]
        head_width = rotary_head_width("rotary_axial", self.width_model, self.heads_model, axes)
        frequencies = rotary_frequencies(head_width, axes, self.theta, self.rotary_pairs)
        circles = [
            unit_circle(positions_PLA[..., axes - 1 - part], frequencies[part] / self.unit) for part in range(axes)
        ]
        cos, sin = (jnp.concatenate(part, axis=-1)[:, :, None] for part in zip(*circles, strict=True))
        return PositionSignal(rotation=with_identity_prefix(cos, sin, self.prefix))


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
      slope_scale: factor of the slopes. The authors take the same slopes at every training length.
      unit: of positions, in which one token measures `unit`.
    """

    width_model: int
    heads_model: int
    reference_scaling: bool = False
    slope_scale: float = 1.0
    unit: int = 1

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `logit_query_key` for positions int32[P, L, 1]; right for causal attention, where j <= i."""
        require_one_axis("alibi", positions_PLA)
        slopes = alibi_slopes(self.heads_model)
        if self.reference_scaling:
            slopes = slopes / math.sqrt(self.width_model // self.heads_model)
        slopes_H = jnp.asarray(self.slope_scale * slopes, jnp.float32)
        place_PL1 = positions_PLA.astype(jnp.float32) / self.unit
        flat_PLH = jnp.broadcast_to(slopes_H, (*place_PL1.shape[:2], len(slopes)))
        query = jnp.stack([flat_PLH, -slopes_H * place_PL1], axis=-1)
        key = jnp.stack([place_PL1, jnp.ones_like(place_PL1)], axis=-1)
        return PositionSignal(logit_query_key=(query, key))


class LogScaling(nn.Module):
    """Queries grow with the logarithm of how many keys they see, so that attention stays as sharp as it was in training.

    A query that sees n keys is multiplied by log n / log N where n is more than the N of training; others are left as they
    are, so that training does not change. After Chiang and Cholak 2022 (arXiv 2202.12172, section 5.3), who scale by log n.

    Attributes:
      table_shape: the window or grid of training; prefix: tokens before its positions.
    """

    table_shape: tuple[int, ...]
    prefix: int = 0

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `multiplicative` of prefix + L tokens for positions int32[P, L, A]: of a text, each sees those up to itself."""
        tokens = self.prefix + positions_PLA.shape[1]
        seen_L = jnp.arange(1, tokens + 1) if len(self.table_shape) == 1 else jnp.full(tokens, tokens)
        trained = max(2, self.prefix + math.prod(self.table_shape))
        query_L = jnp.maximum(1.0, jnp.log(seen_L.astype(jnp.float32)) / math.log(trained))
        query = query_L[None, :, None, None]
        return PositionSignal(multiplicative=(query, jnp.ones_like(query)))
