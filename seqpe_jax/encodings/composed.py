"""An encoding combined with added rotary pairs and log scaling, each for some heads: their signals are joined."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.config import EncodingConfig, ModelDims, RotaryAxialConfig
from seqpe_jax.config.decoder_presets import by_layer
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.encodings.rope import RotaryAxial


def combined(config: EncodingConfig, dims: ModelDims) -> nn.Module:
    """Returns an encoding with the parts that its config combines it with; without any, the encoding by itself.

    Gates are no part of it: the blocks of the network compute them from its tokens.
    """
    every_layer = by_layer((), dims.layers)
    parts, heads = [config.make_module(dims)], [config.position_heads or dims.heads]
    layers = [by_layer(config.layers_with, dims.layers)]
    if config.HAS_VECTORS:
        heads = [dims.heads]  # SeqPE limits its own heads, and computes no vectors for the others
    if config.has("rotary_heads") and config.rotary_pairs:
        parts.append(_rotary_part(config, dims))
        heads.append(config.rotary_heads or dims.heads)
        layers.append(by_layer(config.rotary_layers, dims.layers))
    if config.log_scaling:
        parts.append(LogScaling(dims))
        heads.append(dims.heads)
        layers.append(every_layer)
    scale_shape = config.start_scale_shape(dims) if config.STARTS_AT_ZERO and config.start_at_zero else ()
    if heads == [dims.heads] and layers == [every_layer] and not scale_shape:
        return parts[0]
    return Composed(tuple(parts), dims.heads, tuple(heads), tuple(layers), scale_shape)


def _rotary_part(config: EncodingConfig, dims: ModelDims) -> nn.Module:
    """The rotary pairs that a config adds to its encoding: on one axis RoPE with its scalings, on grids those of each axis."""
    if dims.axes == 1:
        return config.rotary_part().make_module(dims)
    rotary = RotaryAxialConfig(
        base=config.base,
        fraction_digits=config.fraction_digits,
        rotary_pairs=config.rotary_pairs,
        theta=config.theta,
    )
    return RotaryAxial(rotary, dims)


class Composed(nn.Module):
    """Several encodings of the same positions at once, such as SeqPE's logit bias and a few rotary pairs.

    The first part is that of the config; it keeps the names of its parameters, so that checkpoints are the same with and
    without the others, and it alone may have vectors.

    Attributes:
      parts: the encodings; no two of them fill the same field of the signal.
      heads: number of heads of the model.
      part_heads: heads that get each part, the first ones.
      part_layers: flags of the layers that get each part.
      start_scale_shape: shape of the learned factors of the first part, which start at 0; () = it has none.
    """

    parts: tuple[nn.Module, ...]
    heads: int
    part_heads: tuple[int, ...]
    part_layers: tuple[tuple[bool, ...], ...]
    start_scale_shape: tuple[int, ...] = ()

    def setup(self) -> None:
        """Shares this module's scope with the first part, whose parameters keep their names."""
        nn.share_scope(self, self.parts[0])
        if self.start_scale_shape:
            self.start_scale = self.param("start_scale", nn.initializers.zeros, self.start_scale_shape, jnp.float32)

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns the joined signal of positions int32[P, L, A] of a window or grid of this shape."""
        own = self.parts[0](positions_PLA, shape=shape, deterministic=deterministic)
        return self._joined(own, positions_PLA, shape)

    def vectors(self, positions_RA: jax.Array, **options) -> jax.Array:
        """Returns the vectors float32[R, E] of positions int32[R, A]; options: of the first part."""
        return self.parts[0].vectors(positions_RA, **options)

    def signal(
        self, vectors_PLE: jax.Array, positions_PLA: jax.Array, *, shape: tuple[int, ...], per_sample: bool = False
    ) -> PositionSignal:
        """Returns the joined signal of positions int32[P, L, A] with vectors float32[P, L, E]; options: as in `SeqPE.signal`."""
        own = self.parts[0].signal(vectors_PLE, positions_PLA, shape=shape, per_sample=per_sample)
        return self._joined(own, positions_PLA, shape)

    def query_key(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the query and key parts of vectors [..., E], as the first part does; by layer, of those that get it."""
        query, key = self.parts[0].query_key(vectors)
        if self.parts[0].config.qk == "multi" and not all(self.part_layers[0]):
            own = np.flatnonzero(self.part_layers[0])
            query, key = query[own], key[own]
        return query, key

    def with_precomputed_table(self, sides: tuple[int, ...], stride: int) -> "Composed":
        """Returns this encoding with a table of vectors in place of the encoder of the first part."""
        return self.clone(parts=(self.parts[0].with_precomputed_table(sides, stride), *self.parts[1:]))

    def _joined(self, own: PositionSignal, positions_PLA: jax.Array, shape: tuple[int, ...]) -> PositionSignal:
        """The first part's signal, joined with those of the others."""
        if self.start_scale_shape:
            own = own.scaled(self.start_scale)
        signal = own.for_heads(self.part_heads[0], self.heads).for_layers(self.part_layers[0])
        for part, count, flags in zip(self.parts[1:], self.part_heads[1:], self.part_layers[1:], strict=True):
            other = part(positions_PLA, shape=shape).for_heads(count, self.heads).for_layers(flags)
            signal = signal.joined(other)
        return signal


class LogScaling(nn.Module):
    """Queries are multiplied by the logarithm of the number of their keys, so that attention stays as sharp as in training.

    A query that sees n keys is multiplied by log n / log N where n is more than the N of training; others stay as they are,
    so that training does not change. After Chiang and Cholak 2022 (arXiv 2202.12172, section 5.3), who scale by log n.

    Attributes:
      dims: sizes of the model.
    """

    dims: ModelDims

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True
    ) -> PositionSignal:
        """Returns `multiplicative` of prefix + L tokens for positions int32[P, L, A]; tokens of text see those before."""
        tokens = self.dims.prefix_tokens + positions_PLA.shape[1]
        keys_L = jnp.arange(1, tokens + 1) if self.dims.axes == 1 else jnp.full(tokens, tokens)
        trained = max(2, self.dims.prefix_tokens + self.dims.num_positions)
        query_L = jnp.maximum(1.0, jnp.log(keys_L.astype(jnp.float32)) / math.log(trained))
        query = query_L[None, :, None, None]
        return PositionSignal(multiplicative=(query, jnp.ones_like(query)))
