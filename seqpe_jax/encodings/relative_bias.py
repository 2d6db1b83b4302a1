"""Encodings in which a logit gains a function of where its query and its key stand (`signal.RelativeBias`).

A function reads for each place its coordinates in tokens or patches, how large distances may be seen from there, and
whether it stands anywhere at all: tokens before a grid, such as a class token, stand nowhere, and nothing is added to
their logits.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal, RelativeBias
from seqpe_jax.encodings.bounds import ParamBounds, clip_straight_through
from seqpe_jax.encodings.fixed import alibi_slopes, require_one_axis, rotary_frequencies, rotary_head_width, unit_circle
from seqpe_jax.errors import InputError

MASKED = -1e30  # the addend of what a head does not see; finite, so that a mask can be added to it
FactorAndAddend = tuple[jax.Array | None, jax.Array]


def places(positions_PLA: jax.Array, unit: int, prefix: int) -> jax.Array:
    """Returns what functions read, float32[P, prefix + L, A + 2]: coordinates, reach of distances, 1 or 0 = nowhere."""
    own_PLA = positions_PLA.astype(jnp.float32) / unit
    if own_PLA.shape[-1] == 1:
        reach_PL1 = own_PLA  # all that a query sees lies before it
    else:
        sides = own_PLA.max(axis=1, keepdims=True) - own_PLA.min(axis=1, keepdims=True)
        reach_PL1 = jnp.broadcast_to(jnp.sqrt((sides**2).sum(axis=-1, keepdims=True)), (*own_PLA.shape[:-1], 1))
    read = jnp.concatenate([own_PLA, reach_PL1, jnp.ones_like(reach_PL1)], axis=-1)
    return jnp.pad(read, ((0, 0), (prefix, 0), (0, 0)))


def displacements(query_PLC: jax.Array, key_PSC: jax.Array) -> list[jax.Array]:
    """Returns query - key along each axis, float32[P, L, S]."""
    axes = query_PLC.shape[-1] - 2
    return [query_PLC[:, :, None, axis] - key_PSC[:, None, :, axis] for axis in range(axes)]


def distances(query_PLC: jax.Array, key_PSC: jax.Array) -> jax.Array:
    """Returns float32[P, L, S]: on one axis how far the key lies before the query, at least 0; on a grid Euclid's."""
    moves = displacements(query_PLC, key_PSC)
    if len(moves) == 1:
        return jnp.maximum(moves[0], 0.0)
    squares = sum(move**2 for move in moves)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)  # its slope at 0 is not infinite


def valid_mask(query_PLC: jax.Array, key_PSC: jax.Array) -> jax.Array:
    """Returns 1 where both stand somewhere and else 0, float32[P, 1, L, S]."""
    return (query_PLC[:, :, None, -1] * key_PSC[:, None, :, -1])[:, None]


@dataclasses.dataclass(frozen=True)
class BucketBias:
    """T5's: a number for each bucket of distances; the farther, the wider the buckets."""

    buckets: int
    farthest: int

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]); params: {"buckets": float32[buckets, H]}."""
        distance, exact = distances(query, key)[:, None], self.buckets // 2
        table = params["buckets"][:, heads_H, None, None]
        # What each bucket adds to the one before it, from the distance on where it begins: comparisons and sums fuse into
        # one loop, where an index would be gathered, and its gradient scattered.
        addend = table[0]
        for bucket in range(1, self.buckets):
            far = (bucket - exact) / (self.buckets - exact)
            begins = bucket if bucket <= exact else exact * (self.farthest / exact) ** far
            addend = addend + (table[bucket] - table[bucket - 1]) * (distance >= begins)
        return None, addend * valid_mask(query, key)


@dataclasses.dataclass(frozen=True)
class LogBias:
    """KERPLE's: -r1 log(1 + r2 distance), r1 and r2 above 0 and of each head."""

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]); params: {"slope", "scale"}, each float32[H]."""
        slope, scale = (params[name][heads_H][:, None, None] for name in ("slope", "scale"))
        return None, -slope * jnp.log1p(scale * distances(query, key)[:, None]) * valid_mask(query, key)


@dataclasses.dataclass(frozen=True)
class InterpolatedBias:
    """FIRE's: a small network reads log(c distance + 1) / log(c max(reach, threshold) + 1)."""

    threshold: float

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]); params: see `Fire`."""
        scale, threshold = jnp.abs(params["scale"]), jnp.abs(params["threshold"]) * self.threshold
        reach_PL1 = jnp.maximum(query[:, :, None, -2], threshold)
        share = jnp.log1p(scale * distances(query, key)) / (jnp.log1p(scale * reach_PL1) + 1e-6)
        hidden = jax.nn.relu(share[..., None] * params["inward"] + params["inward_bias"])
        out, bias = params["outward"][:, heads_H], params["outward_bias"][heads_H]
        addend = jnp.einsum("plsw,wh->phls", hidden, out) + bias[:, None, None]
        return None, addend * valid_mask(query, key)


@dataclasses.dataclass(frozen=True)
class SlopedBias:
    """ALiBi's on a grid: -slope * distance; with directions, heads see one side alone (LookHere)."""

    slopes: tuple[float, ...]
    directed: bool = False

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (None, addend float32[P, H, L, S]).

        Args:
          params: None, or of a layer {"depth": float32[], a factor of the slopes; "direction": float32[H, 2], (down, right)
            of the side that a head sees, 0 = everywhere}.
        """
        slopes = jnp.asarray(self.slopes, jnp.float32)[heads_H][:, None, None]
        addend = -slopes * distances(query, key)[:, None] * (1.0 if params is None else params["depth"])
        if self.directed:
            down, right = displacements(query, key)[-2:]  # from the key to the query
            side_H2 = params["direction"][heads_H]
            ahead = side_H2[:, 0, None, None] * down[:, None] + side_H2[:, 1, None, None] * right[:, None]
            addend = jnp.where(ahead > 0, MASKED, addend)
        both = valid_mask(query, key)
        return None, jnp.where(both > 0, addend, 0.0)


@dataclasses.dataclass(frozen=True)
class ScaledLogits:
    """Scale-invariant attention's: logits times a and plus 1 - a^2, with a^2 = 2 log(distance / tau + 1) + 1."""

    tau: float

    def __call__(self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array) -> FactorAndAddend:
        """Returns (factor, addend), each float32[P, 1, L, S]."""
        square = 2.0 * jnp.log1p(distances(query, key) / self.tau)[:, None] * valid_mask(query, key) + 1.0
        return jnp.sqrt(square), 1.0 - square


def relative_bias_signal(
    positions_PLA: jax.Array, unit: int, prefix: int, function: Any, params: Any, by_layer: bool
) -> PositionSignal:
    """Returns the signal of a relation; params: of each layer along their first axis if `by_layer`."""
    read = places(positions_PLA, unit, prefix)
    per_layer_fields = ("bias_params",) if by_layer else ()
    return PositionSignal(
        relative_bias=RelativeBias(read, read, function), bias_params=params, per_layer_fields=per_layer_fields
    )


class T5(nn.Module):
    """Learned numbers for buckets of distances, the same in all layers (Raffel et al. 2020, arXiv 1910.10683).

    The first half of the buckets hold one distance each; the others grow with the logarithm up to `t5_max_distance`, and
    the last holds all that is beyond.

    Attributes:
      heads_model, width_model: of the model.
      t5_buckets: number of buckets; t5_max_distance: in tokens.
      unit: of positions, in which one token measures `unit`.
    """

    heads_model: int
    width_model: int
    t5_buckets: int
    t5_max_distance: int
    unit: int = 1

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of positions int32[P, L, 1].

        Raises:
          InputError: a grid, or a largest distance among those that have a bucket of their own.
        """
        require_one_axis("t5", positions_PLA)
        if self.t5_max_distance <= self.t5_buckets // 2:
            raise InputError(
                f"encoding.t5_max_distance={self.t5_max_distance} must be more than half of "
                f"encoding.t5_buckets={self.t5_buckets}, which hold one distance each: raise it or lower the buckets"
            )
        function = BucketBias(self.t5_buckets, self.t5_max_distance)
        init = nn.initializers.normal(self.width_model**-0.5)
        buckets = self.param("buckets", init, (function.buckets, self.heads_model), jnp.float32)
        return relative_bias_signal(positions_PLA, self.unit, 0, function, {"buckets": buckets}, by_layer=False)


class Kerple(nn.Module):
    """KERPLE's logarithmic kernel, its two numbers learned by layer and head (Chi et al. 2022, arXiv 2205.09921).

    Attributes:
      layers_model, heads_model: of the model.
      kerple_scale: a fresh r2 is drawn below, per token.
      unit: of positions, in which one token measures `unit`.
      PARAM_BOUNDS: training keeps r1 and r2 at 0.01 or more, as the authors' code does.
    """

    PARAM_BOUNDS: ClassVar[ParamBounds] = {"slope": (0.01, math.inf), "scale": (0.01, math.inf)}

    layers_model: int
    heads_model: int
    kerple_scale: float
    unit: int = 1

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of positions int32[P, L, 1]. Raises: InputError: a grid."""
        require_one_axis("kerple", positions_PLA)
        sizes = (self.layers_model, self.heads_model)
        fresh = {"slope": 2.0, "scale": self.kerple_scale}  # each is drawn evenly between 0 and this
        params = {
            name: clip_straight_through(
                self.param(name, _above(limit, self.PARAM_BOUNDS[name][0]), sizes), self.PARAM_BOUNDS[name]
            )
            for name, limit in fresh.items()
        }
        return relative_bias_signal(positions_PLA, self.unit, 0, LogBias(), params, by_layer=True)


class Fire(nn.Module):
    """FIRE: a network with 32 hidden units reads how far a key lies, as a share of how far it could (Li et al. 2024).

    In texts, a key could lie as far as the text's first token, or a learned threshold where that is more. On grids, where
    the paper says nothing, distances are Euclid's and could be the diagonal. Source: arXiv 2310.04418.

    Attributes:
      layers_model, heads_model: of the model.
      fire_threshold: of a fresh model, in tokens or patches; fire_scale: c of a fresh model, per token or patch.
      unit: of positions, in which one token or patch measures `unit`.
      prefix: tokens before the positions that have none, such as a class token.
    """

    layers_model: int
    heads_model: int
    fire_threshold: float
    fire_scale: float
    unit: int = 1
    prefix: int = 0

    @nn.compact
    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of prefix + L tokens for positions int32[P, L, A]."""
        layers, heads, hidden = self.layers_model, self.heads_model, 32
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        inward, outward = (_uniform(1.0 / math.sqrt(read)) for read in (1, hidden))
        params = {
            "scale": self.param("scale", nn.initializers.constant(self.fire_scale), (layers,), jnp.float32),
            "threshold": self.param("threshold", ones, (layers,), jnp.float32),
            "inward": self.param("inward", inward, (layers, hidden), jnp.float32),
            "inward_bias": self.param("inward_bias", inward, (layers, hidden), jnp.float32),
            "outward": self.param("outward", outward, (layers, hidden, heads), jnp.float32),
            "outward_bias": self.param("outward_bias", zeros, (layers, heads), jnp.float32),
        }
        function = InterpolatedBias(self.fire_threshold)
        return relative_bias_signal(positions_PLA, self.unit, self.prefix, function, params, by_layer=True)


def _uniform(limit: float) -> Any:
    """Draws between -limit and limit, as PyTorch's linear layers begin with 1 / sqrt(what they read)."""
    return lambda key, sizes, dtype: jax.random.uniform(key, sizes, dtype, -limit, limit)


def _above(limit: float, low: float) -> Any:
    """Draws evenly between 0 and a limit; what is below `low` begins there."""
    return lambda key, sizes: jnp.maximum(limit * jax.random.uniform(key, sizes, jnp.float32), low)


class GridALiBi(nn.Module):
    """ALiBi on grids: logits fall with Euclid's distance, by ALiBi's slopes; those of the class token do not.

    Attributes:
      heads_model: of the model; slope_scale: factor of the slopes.
      unit: of positions, in which one patch measures `unit`; prefix: tokens before them.
    """

    heads_model: int
    slope_scale: float = 1.0
    unit: int = 1
    prefix: int = 0

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of prefix + L tokens for positions int32[P, L, A]. Raises: InputError: one axis."""
        if positions_PLA.shape[-1] == 1:
            raise InputError("encoding.kind='alibi_grid' is for grids: choose 'alibi', which is for texts")
        function = SlopedBias(tuple((self.slope_scale * alibi_slopes(self.heads_model)).tolist()))
        return relative_bias_signal(positions_PLA, self.unit, self.prefix, function, None, by_layer=False)


class LookHere(nn.Module):
    """LookHere: heads see one side of the grid alone, and what lies there fades with distance (Fuller et al. 2024).

    Directed heads look up, down, left and right in turn, 180 degrees each, and each layer continues where the layer before
    ended, so that all sides are seen where their number is not a multiple of four. The other heads see everything. Slopes
    fall from 1.5 times their value in the first layer to half of it in the last. Source: arXiv 2405.13985, the form LH-180,
    which has 8 directed heads of 12.

    Attributes:
      layers_model, heads_model: of the model; directed_heads: the first ones, that see one side; slope_scale: factor of the
        slopes.
      unit: of positions, in which one patch measures `unit`.
      prefix: tokens before the positions that have none, such as a class token.
    """

    layers_model: int
    heads_model: int
    directed_heads: int
    slope_scale: float = 1.0
    unit: int = 1
    prefix: int = 0

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the `relative_bias` of prefix + L tokens for positions int32[P, L, A].

        Raises:
          InputError: one axis, or more directed heads than heads.
        """
        if positions_PLA.shape[-1] == 1:
            raise InputError("encoding.kind='lookhere' is for grids: choose another kind for texts")
        layers, heads, directed = self.layers_model, self.heads_model, self.directed_heads
        if directed > heads:
            raise InputError(f"encoding.directed_heads={directed} is more than model.heads={heads}")
        around = heads - directed
        slopes = [0.5 ** (1 + head // 4) for head in range(directed)]
        slopes += [0.25 ** (1 + 4 * head // around) for head in range(around)]
        slopes = tuple(self.slope_scale * slope for slope in slopes)
        sides = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)], np.float32)  # (down, right): up, down, left, right
        direction = np.zeros((layers, heads, 2), np.float32)
        direction[:, :directed] = sides[np.arange(layers * directed) % len(sides)].reshape(layers, directed, 2)
        params = {"depth": jnp.linspace(1.5, 0.5, layers), "direction": jnp.asarray(direction)}
        function = SlopedBias(slopes, directed=True)
        return relative_bias_signal(positions_PLA, self.unit, self.prefix, function, params, by_layer=True)


class ScaleInvariant(nn.Module):
    """Scale-invariant attention over partial rotation (Anson et al. 2025, arXiv 2505.17083).

    Logits are scaled and lowered by distance such that every scale of distances gets as much attention. The fastest pairs
    of a head rotate, half of them in the paper (p-RoPE, Barbero et al. 2024, arXiv 2410.06205).

    Attributes:
      width_model, heads_model: of the model.
      scale_invariant_tau: distance in tokens below which logits hardly change.
      theta: base of the wavelengths; rotary_pairs: how many of the fastest pairs rotate, 0 = all.
      unit: of positions, in which one token measures `unit`.
    """

    width_model: int
    heads_model: int
    scale_invariant_tau: float
    theta: float = 10000.0
    rotary_pairs: int = 0
    unit: int = 1

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `rotation` and `relative_bias` of positions int32[P, L, 1]. Raises: InputError: a grid, an odd head width."""
        require_one_axis("scale_invariant", positions_PLA)
        width = rotary_head_width("scale_invariant", self.width_model, self.heads_model, 1)
        (frequencies,) = rotary_frequencies(width, 1, self.theta, self.rotary_pairs)
        cos, sin = unit_circle(positions_PLA[..., 0], frequencies / self.unit)
        signal = relative_bias_signal(
            positions_PLA, self.unit, 0, ScaledLogits(self.scale_invariant_tau), None, by_layer=False
        )
        return signal.replace(rotation=(cos[:, :, None], sin[:, :, None]))
