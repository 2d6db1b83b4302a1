"""Relative position biases: logits gain a function of the positions of query and key (ALiBi, T5, KERPLE, FIRE, ...).

ALiBi's is a product of a query's and a key's part. The others are functions of both (`position_signal.RelativeBias`) that are computed
block by block. For each token they take its coordinates in tokens or patches, the largest distance possible from it, and
whether it has a position: tokens before a grid, such as a class token, have none, and their logits stay as they are.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.config import (
    ALiBiConfig,
    FireConfig,
    GridALiBiConfig,
    KerpleConfig,
    LookHereConfig,
    ModelDims,
    ScaleInvariantConfig,
    T5Config,
)
from seqpe_jax.encodings.position_signal import ParamBounds, PositionSignal, RelativeBias, clip_straight_through
from seqpe_jax.encodings.rope import rotary_frequencies, unit_circle

MASKED = -1e30  # the addend of keys that a head does not attend to; finite, so that a mask can be added to it
FIRE_HIDDEN = 32  # features of FIRE's network
FactorAndAddend = tuple[jax.Array | None, jax.Array]


def bias_inputs(
    positions_PLA: jax.Array, resolution: int, prefix_tokens: int, *, with_sides: bool = False
) -> jax.Array:
    """Returns the inputs of bias functions, float32[P, prefix + L, C].

    Args:
      positions_PLA: int32[P, L, A], in units.
      resolution: units of a token or patch.
      prefix_tokens: tokens before them, which have no position.
      with_sides: whether the function reads the sides of the grid.

    Returns:
      For each token its A coordinates, the A sides of its grid if they are read, the largest distance possible from it, and
      1; 0 throughout for one without position. Sides are the largest displacements along each axis.
    """
    own_PLA = positions_PLA.astype(jnp.float32) / resolution
    sides = own_PLA.max(axis=1, keepdims=True) - own_PLA.min(axis=1, keepdims=True)
    if own_PLA.shape[-1] == 1:
        max_distance_PL1 = own_PLA  # causal attention sees the tokens before
    else:
        diagonal = jnp.sqrt((sides**2).sum(axis=-1, keepdims=True))
        max_distance_PL1 = jnp.broadcast_to(diagonal, (*own_PLA.shape[:-1], 1))
    own = [own_PLA, jnp.broadcast_to(sides, own_PLA.shape)] if with_sides else [own_PLA]
    inputs = jnp.concatenate([*own, max_distance_PL1, jnp.ones_like(max_distance_PL1)], axis=-1)
    return jnp.pad(inputs, ((0, 0), (prefix_tokens, 0), (0, 0)))


def displacements(query_PLC: jax.Array, key_PSC: jax.Array) -> list[jax.Array]:
    """Returns query - key along each axis, float32[P, L, S]."""
    axes = query_PLC.shape[-1] - 2
    return [query_PLC[:, :, None, axis] - key_PSC[:, None, :, axis] for axis in range(axes)]


def distances(query_PLC: jax.Array, key_PSC: jax.Array) -> jax.Array:
    """Returns distances float32[P, L, S]: on one axis of a key before its query, at least 0; on grids Euclidean."""
    moves = displacements(query_PLC, key_PSC)
    if len(moves) == 1:
        return jnp.maximum(moves[0], 0.0)
    squares = sum(move**2 for move in moves)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)  # with a finite gradient at 0


def valid_mask(query_PLC: jax.Array, key_PSC: jax.Array) -> jax.Array:
    """Returns 1 where query and key both have a position, else 0, float32[P, 1, L, S]."""
    return (query_PLC[:, :, None, -1] * key_PSC[:, None, :, -1])[:, None]


@dataclasses.dataclass(frozen=True)
class BucketBias:
    """T5's bias: a number for each bucket of distances, in buckets that widen with distance.

    Attributes:
      buckets: their number.
      max_distance: tokens from which on all distances share the last bucket.
    """

    buckets: int
    max_distance: int

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]); params: {"buckets": float32[buckets, H]}."""
        distance, exact = distances(query, key)[:, None], self.buckets // 2
        table = params["buckets"][:, heads_H, None, None]
        # Each bucket adds its difference to the one before, from its first distance on: comparisons and sums fuse into one
        # loop, where an index would be gathered, and its gradient scattered.
        addend = table[0]
        for bucket in range(1, self.buckets):
            far = (bucket - exact) / (self.buckets - exact)
            first = bucket if bucket <= exact else exact * (self.max_distance / exact) ** far
            addend = addend + (table[bucket] - table[bucket - 1]) * (distance >= first)
        return None, addend * valid_mask(query, key)


@dataclasses.dataclass(frozen=True)
class LogBias:
    """KERPLE's bias: -r1 log(1 + r2 distance), r1 and r2 above 0 and of each head."""

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]); params: {"slope", "scale"}, each float32[H]."""
        slope, scale = (params[name][heads_H][:, None, None] for name in ("slope", "scale"))
        return None, -slope * jnp.log1p(scale * distances(query, key)[:, None]) * valid_mask(query, key)


@dataclasses.dataclass(frozen=True)
class NetworkBias:
    """FIRE's bias: a small network of log(c distance + 1) / log(c max(largest distance, threshold) + 1).

    With signs, the network reads one such share for each axis: of the displacement along it, with its sign, and of the side
    of the grid.

    Attributes:
      threshold: initial, in tokens or patches; the learned one is a factor of it.
      signed_axes: A of inputs with sides (`bias_inputs`); 0 = the network reads distances.
    """

    threshold: float
    signed_axes: int = 0

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]); params: see `Fire`."""
        scale, threshold = jnp.abs(params["scale"]), jnp.abs(params["threshold"]) * self.threshold

        def share(distance_PLS: jax.Array, max_distance_PL: jax.Array) -> jax.Array:
            largest = jnp.maximum(max_distance_PL[:, :, None], threshold)
            return jnp.log1p(scale * distance_PLS) / (jnp.log1p(scale * largest) + 1e-6)

        if self.signed_axes:
            hidden = params["inward_bias"]
            for axis in range(self.signed_axes):
                move = query[:, :, None, axis] - key[:, None, :, axis]
                own = jnp.sign(move) * share(jnp.abs(move), query[..., self.signed_axes + axis])
                hidden = hidden + own[..., None] * params["inward"][axis]
        else:
            hidden = share(distances(query, key), query[..., -2])[..., None] * params["inward"] + params["inward_bias"]
        hidden = jax.nn.relu(hidden)
        out, bias = params["outward"][:, heads_H], params["outward_bias"][heads_H]
        addend = jnp.einsum("plsw,wh->phls", hidden, out) + bias[:, None, None]
        return None, addend * valid_mask(query, key)


@dataclasses.dataclass(frozen=True)
class SlopedBias:
    """ALiBi's bias on a grid, -slope * distance; with directions, heads attend to one side alone (LookHere).

    Attributes:
      slopes: slopes of each head, per patch.
      directed: whether parameters have directions.
    """

    slopes: tuple[float, ...]
    directed: bool = False

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]).

        Args:
          params: None, or of a layer {"depth": float32[], a factor of the slopes; "direction": float32[H, 2], (down, right)
            of the side that a head attends to, 0 = all sides}.
        """
        slopes = jnp.asarray(self.slopes, jnp.float32)[heads_H][:, None, None]
        addend = -slopes * distances(query, key)[:, None] * (1.0 if params is None else params["depth"])
        if self.directed:
            down, right = displacements(query, key)[-2:]  # from the key to the query
            side_H2 = params["direction"][heads_H]
            ahead = side_H2[:, 0, None, None] * down[:, None] + side_H2[:, 1, None, None] * right[:, None]
            addend = jnp.where(ahead > 0, MASKED, addend)
        return None, jnp.where(valid_mask(query, key) > 0, addend, 0.0)


@dataclasses.dataclass(frozen=True)
class ScaledLogits:
    """Scale-invariant attention's logits: times a and plus 1 - a^2, with a^2 = 2 log(distance / tau + 1) + 1.

    Attributes:
      tau: tokens.
    """

    tau: float

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (factor, addend), each float32[P, 1, L, S]."""
        square = 2.0 * jnp.log1p(distances(query, key) / self.tau)[:, None] * valid_mask(query, key) + 1.0
        return jnp.sqrt(square), 1.0 - square


def relative_bias_signal(
    positions_PLA: jax.Array,
    resolution: int,
    dims: ModelDims,
    function: Any,
    params: Any = None,
    *,
    per_layer: bool,
    with_sides: bool = False,
) -> PositionSignal:
    """Returns the signal of a bias function.

    Args:
      positions_PLA: int32[P, L, A], in units.
      resolution: units of a token or patch.
      dims: sizes of the model.
      function: function of `position_signal.RelativeBias`.
      params: parameters of the function; None = it has none.
      per_layer: whether parameters have a leading layer axis.
      with_sides: whether the function reads the sides of the grid.
    """
    inputs = bias_inputs(positions_PLA, resolution, dims.prefix_tokens, with_sides=with_sides)
    fields = ("bias_params",) if per_layer else ()
    return PositionSignal(
        relative_bias=RelativeBias(inputs, inputs, function), bias_params=params, per_layer_fields=fields
    )


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
    """Attention logits fall linearly with distance, -slope * (i - j), as a product of a query and a key part per head.

    The authors take the same slopes at every training length.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: ALiBiConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `position_query_key` for positions int32[P, L, 1]; right for causal attention, where j <= i."""
        slopes = self.config.slope_scale * alibi_slopes(self.dims.heads)
        if self.dims.compat.reference_scaling:
            slopes = slopes / math.sqrt(self.dims.head_width)
        slopes_H = jnp.asarray(slopes, jnp.float32)
        position_PL1 = positions_PLA.astype(jnp.float32) / self.config.position_resolution
        flat_PLH = jnp.broadcast_to(slopes_H, (*position_PL1.shape[:2], len(slopes)))
        query = jnp.stack([flat_PLH, -slopes_H * position_PL1], axis=-1)
        key = jnp.stack([position_PL1, jnp.ones_like(position_PL1)], axis=-1)
        return PositionSignal(position_query_key=(query, key))


class T5(nn.Module):
    """A learned bias for each bucket of distances, the same in all layers (Raffel et al. 2020, arXiv 1910.10683).

    The first half of the buckets hold one distance each; the others grow with the logarithm up to `t5_max_distance`, and
    the last holds all beyond.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: T5Config
    dims: ModelDims

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of positions int32[P, L, 1]."""
        config, dims = self.config, self.dims
        init = nn.initializers.normal(dims.width**-0.5)
        buckets = self.param("buckets", init, (config.t5_buckets, dims.heads), jnp.float32)
        function = BucketBias(config.t5_buckets, config.t5_max_distance)
        return relative_bias_signal(
            positions_PLA, config.position_resolution, dims, function, {"buckets": buckets}, per_layer=False
        )


class Kerple(nn.Module):
    """KERPLE's logarithmic kernel, its two numbers learned by layer and head (Chi et al. 2022, arXiv 2205.09921).

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
      PARAM_BOUNDS: training limits r1 and r2 to at least 0.01, as the authors' code does.
    """

    PARAM_BOUNDS: ClassVar[ParamBounds] = {"slope": (0.01, math.inf), "scale": (0.01, math.inf)}

    config: KerpleConfig
    dims: ModelDims

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of positions int32[P, L, 1]."""
        sizes = (self.dims.layers, self.dims.heads)
        params = {}
        for name, limit in (("slope", 2.0), ("scale", self.config.kerple_scale)):
            bounds = self.PARAM_BOUNDS[name]
            params[name] = clip_straight_through(self.param(name, _uniform_above(limit, bounds[0]), sizes), bounds)
        return relative_bias_signal(
            positions_PLA, self.config.position_resolution, self.dims, LogBias(), params, per_layer=True
        )


class Fire(nn.Module):
    """FIRE: a small network reads the distance of a key as a share of the largest one possible (Li et al. 2024).

    In text, the largest distance is that to the first token, or a learned threshold if that is more. On grids, where the
    paper says nothing, distances are Euclidean and the largest one is the diagonal; with `fire_signed` the network reads the
    displacement along each axis instead, with its sign, as a share of the side. Source: arXiv 2310.04418.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: FireConfig
    dims: ModelDims

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of prefix + L tokens for positions int32[P, L, A]."""
        config, layers, heads, hidden = self.config, self.dims.layers, self.dims.heads, FIRE_HIDDEN
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        signed_axes = positions_PLA.shape[-1] if config.fire_signed else 0
        inward, outward = (_uniform(1.0 / math.sqrt(inputs)) for inputs in (max(1, signed_axes), hidden))
        sizes = (layers, signed_axes, hidden) if signed_axes else (layers, hidden)
        params = {
            "scale": self.param("scale", nn.initializers.constant(config.fire_scale), (layers,), jnp.float32),
            "threshold": self.param("threshold", ones, (layers,), jnp.float32),
            "inward": self.param("inward", inward, sizes, jnp.float32),
            "inward_bias": self.param("inward_bias", inward, (layers, hidden), jnp.float32),
            "outward": self.param("outward", outward, (layers, hidden, heads), jnp.float32),
            "outward_bias": self.param("outward_bias", zeros, (layers, heads), jnp.float32),
        }
        return relative_bias_signal(
            positions_PLA,
            config.position_resolution,
            self.dims,
            NetworkBias(config.fire_threshold, signed_axes),
            params,
            per_layer=True,
            with_sides=config.fire_signed,
        )


def _uniform(limit: float) -> Any:
    """Initializer between -limit and limit; PyTorch's linear layers take 1 / sqrt(inputs)."""
    return lambda key, sizes, dtype: jax.random.uniform(key, sizes, dtype, -limit, limit)


def _uniform_above(limit: float, low: float) -> Any:
    """Initializer between 0 and a limit, clipped at `low`."""
    return lambda key, sizes: jnp.maximum(limit * jax.random.uniform(key, sizes, jnp.float32), low)


class GridALiBi(nn.Module):
    """ALiBi on grids: logits fall with Euclidean distance, by ALiBi's slopes; those of the class token do not.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: GridALiBiConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of prefix + L tokens for positions int32[P, L, A]."""
        function = SlopedBias(tuple((self.config.slope_scale * alibi_slopes(self.dims.heads)).tolist()))
        return relative_bias_signal(
            positions_PLA, self.config.position_resolution, self.dims, function, per_layer=False
        )


class LookHere(nn.Module):
    """LookHere: directed heads attend to one side of the grid, with logits that fall with distance (Fuller et al. 2024).

    Directed heads look up, down, left and right in turn, 180 degrees each, and each layer continues where the layer before
    ended, so that all sides are seen where their number is not a multiple of four. The other heads see everything; their
    slopes are the authors' 1/4, 1/16, 1/64 and 1/256. Slopes fall from 1.5 times their value in the first layer to half of it
    in the last. Source: arXiv 2405.13985, the form LH-180, which has 8 directed heads of 12, and its code.

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: LookHereConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of prefix + L tokens for positions int32[P, L, A]."""
        layers, heads, directed = self.dims.layers, self.dims.heads, self.config.directed_heads
        undirected = heads - directed
        slopes = [0.5 ** (1 + head // 4) for head in range(directed)]
        if self.config.undirected_slopes == "spread":
            slopes += [0.25 ** (1 + 4 * head // undirected) for head in range(undirected)]
        else:
            slopes += [0.25 ** min(4, 1 + head // max(1, undirected // 4)) for head in range(undirected)]
        sides = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], np.float32)  # (down, right): up, down, left, right
        direction = np.zeros((layers, heads, 2), np.float32)
        direction[:, :directed] = sides[np.arange(layers * directed) % len(sides)].reshape(layers, directed, 2)
        params = {"depth": jnp.linspace(1.5, 0.5, layers), "direction": jnp.asarray(direction)}
        function = SlopedBias(tuple(self.config.slope_scale * slope for slope in slopes), directed=True)
        return relative_bias_signal(
            positions_PLA, self.config.position_resolution, self.dims, function, params, per_layer=True
        )


class ScaleInvariant(nn.Module):
    """Scale-invariant attention over p-RoPE (Anson et al. 2025, arXiv 2505.17083).

    Logits are scaled and lowered by distance such that every scale of distances gets as much attention. The
    highest-frequency pairs of a head rotate, half of them in the paper (Barbero et al. 2024, arXiv 2410.06205).

    Attributes:
      config: fields of the encoding.
      dims: sizes of the model.
    """

    config: ScaleInvariantConfig
    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` and `relative_bias` of positions int32[P, L, 1]."""
        config, resolution = self.config, self.config.position_resolution
        (frequencies,) = rotary_frequencies(self.dims.head_width, 1, config.theta, config.rotary_pairs)
        cos, sin = unit_circle(positions_PLA[..., 0], frequencies / resolution)
        function = ScaledLogits(config.scale_invariant_tau)
        signal = relative_bias_signal(positions_PLA, resolution, self.dims, function, per_layer=False)
        return signal.replace(rotation=(cos[:, :, None], sin[:, :, None]))
