"""Vision transformer over patches of images or videos; positions come as a `PositionSignal`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.axes import VOCABULARY, WIDTH
from seqpe_jax.encodings.position_signal import PositionSignal, broadcast_to_batch
from seqpe_jax.errors import InputError
from seqpe_jax.models.transformer import Linear, Network, make_blocks, make_norm, measure_attention, run_blocks


def extract_patches(images: jax.Array, patch: tuple[int, ...]) -> jax.Array:
    """Returns the non-overlapping patches of images, [B, L, values of a patch]; patches and values are row-major.

    Args:
      images: [B, sides..., C], one side per entry of `patch`: images [B, H, W, C], videos [B, T, H, W, C].
      patch: sides of a patch.

    Raises:
      InputError: the number of axes differs, or a side is no multiple of the patch's.
    """
    batch, *sides, channels = images.shape
    if len(sides) != len(patch) or any(side % part for side, part in zip(sides, patch, strict=False)):
        raise InputError(
            f"images of {' x '.join(map(str, sides))} do not divide into patches of {' x '.join(map(str, patch))}"
        )
    split_sides = [size for side, part in zip(sides, patch, strict=True) for size in (side // part, part)]
    axes = len(patch)
    patch_axes, value_axes = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    split = images.reshape(batch, *split_sides, channels)
    ordered = split.transpose(0, *patch_axes, *value_axes, 2 * axes + 1)
    return ordered.reshape(batch, math.prod(split_sides[0::2]), math.prod(patch) * channels)


class ViT(Network):
    """A vision transformer with a class token (Dosovitskiy et al. 2021), in timm's form as in the PyTorch reference.

    Initial weights are normal, those of residual projections too; the reference truncates them at +-2, which is a hundred
    standard deviations out. Only the patch projection starts uniform within 1 / sqrt(values of a patch), PyTorch's default,
    as in the reference.

    Attributes:
      config: hyperparameters of the blocks; its `causal` and `scale_residual` are not used.
      classes: number of classes.
      patch: sides of a patch, in pixels (and frames).
      pooling: what the head reads, "class_token" or "mean", the mean of the patches.
      num_registers: number of learned tokens after the class token (Darcet et al. 2023, arXiv 2309.16588).
    """

    classes: int
    patch: tuple[int, ...]
    pooling: str = "class_token"
    num_registers: int = 0

    def setup(self) -> None:
        """Creates the patch projection, the class token and registers, the blocks, the final norm and the head."""
        config = dataclasses.replace(self.config, causal=False, scale_residual=False)
        normal = nn.initializers.normal(config.init_std)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.projection = Linear((0, config.width), (None, WIDTH), config.dtype, uniform)
        self.class_token = self.param("class_token", normal, (1, config.width), jnp.float32)
        if self.num_registers:
            self.register_tokens = self.param("registers", normal, (self.num_registers, config.width), jnp.float32)
        self.blocks = make_blocks(config)
        self.final_norm = make_norm(config)
        # float32, whatever the dtype of the features
        self.head = Linear((config.width, self.classes), (WIDTH, VOCABULARY), jnp.float32, normal)
        self.embedding_drop = nn.Dropout(config.embedding_dropout)

    def __call__(self, images: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the logits of the classes, float32[B, V].

        Args:
          images: float[B, sides..., C], one side per entry of `patch`.
          signal: PositionSignal of 1 + R + L tokens: the class token, registers, then the patches row-major.
          deterministic: no dropout and no stochastic depth.

        Raises:
          InputError: the sides do not divide into patches.
        """
        return self.head(self.features(images, signal, deterministic))

    def features(self, images: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns what the head reads (`pooling`), normalized, [B, D]; arguments and errors as in `__call__`."""
        x_BLD = run_blocks(self.blocks, self._embed(images, signal, deterministic), signal, deterministic)
        if self.pooling == "mean":
            patches_BLD = x_BLD[:, 1 + self.num_registers :]
            return self.final_norm(patches_BLD.astype(jnp.float32).mean(axis=1).astype(x_BLD.dtype))
        return self.final_norm(x_BLD[:, 0])

    def attention(self, images: jax.Array, signal: PositionSignal, measure: Callable[[jax.Array], Any]) -> list[Any]:
        """Returns the results of a function of each layer's attention weights, float32[B, H, 1 + R + L, 1 + R + L]."""
        x_BLD = self._embed(images, signal, True)
        return measure_attention(self.blocks, self.config.layers, x_BLD, signal, measure)

    def _embed(self, images: jax.Array, signal: PositionSignal, deterministic: bool) -> jax.Array:
        """The tokens [B, 1 + R + L, D] that enter the first block."""
        dtype = self.config.dtype
        x_BLD = self.projection(extract_patches(images, self.patch).astype(dtype))
        first = [self.class_token, self.register_tokens] if self.num_registers else [self.class_token]
        first_BLD = [jnp.broadcast_to(one.astype(dtype), (images.shape[0], *one.shape)) for one in first]
        x_BLD = jnp.concatenate([*first_BLD, x_BLD], axis=1)
        if signal.input_embedding is not None:
            x_BLD = x_BLD + broadcast_to_batch(signal.input_embedding, images.shape[0])
        return self.embedding_drop(x_BLD, deterministic=deterministic).astype(dtype)
