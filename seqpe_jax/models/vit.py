"""The vision transformer over patches of any number of axes; positions come as a `PositionSignal`."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal, broadcast_to_batch
from seqpe_jax.errors import InputError
from seqpe_jax.models.transformer import make_blocks, run_block, run_blocks


def patches(images: jax.Array, patch: tuple[int, ...]) -> jax.Array:
    """Returns the non-overlapping patches of images, [B, L, values of a patch]: patches and values row-major.

    Args:
      images: [B, sides..., C], one side per entry of `patch`: images [B, H, W, C], clips [B, T, H, W, C].

    Raises:
      InputError: other axes than those of a patch, or a side that is no multiple of the patch's.
    """
    batch, *sides, channels = images.shape
    if len(sides) != len(patch) or any(side % part for side, part in zip(sides, patch, strict=False)):
        raise InputError(
            f"images of {' x '.join(map(str, sides))} do not divide into patches of {' x '.join(map(str, patch))}"
        )
    cut = [size for side, part in zip(sides, patch, strict=True) for size in (side // part, part)]
    axes = len(patch)
    counts, values = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    ordered = images.reshape(batch, *cut, channels).transpose(0, *counts, *values, 2 * axes + 1)
    return ordered.reshape(batch, math.prod(cut[0::2]), math.prod(patch) * channels)


class ViT(nn.Module):
    """A vision transformer that classifies by a class token (Dosovitskiy et al. 2021; timm's form, as the reference).

    Attributes:
      classes, layers, width, heads: sizes; mlp_width: 0 = four times the width; patch: sides of a patch.
      dropout, attention_dropout, embedding_dropout: rates while training.
      drop_path: share of samples that leave out a branch of the last block; it grows from 0 at the first one linearly.
      init_std: normal, residual projections too. The reference cuts at +-2, a hundred deviations out. Only the weights of
        the patch projection start uniform within 1 / sqrt(values of a patch), as the reference leaves them to PyTorch.
      dtype: of the arithmetic; parameters and logits are float32.
      remat, attention_kind, attention_block, scan: as of `models.gpt2.GPT2`.
    """

    classes: int
    patch: tuple[int, ...]
    layers: int
    width: int
    heads: int
    mlp_width: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    drop_path: float = 0.0
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-6
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention_kind: str = "auto"
    attention_block: int = 0
    scan: bool = False

    def setup(self) -> None:
        """Makes the patch projection, the class token, the blocks, the final norm and the head."""
        normal = nn.initializers.normal(self.init_std)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.projection = nn.Dense(self.width, dtype=self.dtype, kernel_init=uniform)
        self.class_token = self.param("class_token", normal, (1, self.width), jnp.float32)
        rates = tuple(self.drop_path * layer / max(self.layers - 1, 1) for layer in range(self.layers))
        self.blocks = make_blocks(self, rates, causal=False, scale_residual=False)
        self.final_norm = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype)
        self.head = nn.Dense(self.classes, kernel_init=normal)  # float32, whatever the features are
        self.embedding_drop = nn.Dropout(self.embedding_dropout)

    def __call__(self, images: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the logits of the classes, float32[B, V].

        Args:
          images: float[B, sides..., C], one side per entry of `patch`.
          signal: of 1 + L tokens, the class token first, then the patches row-major.

        Raises:
          InputError: the sides do not divide into patches.
        """
        return self.head(self.features(images, signal, deterministic))

    def features(self, images: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the final states of the class token, [B, D]; arguments and errors as of a call."""
        x_BLD = self._embed(images, signal, deterministic)
        return self.final_norm(run_blocks(self.blocks, x_BLD, signal, deterministic)[:, 0])

    def attention(self, images: jax.Array, signal: PositionSignal) -> jax.Array:
        """Returns the attention weights of the last layer, float32[B, H, 1 + L, 1 + L], for pictures."""
        x_BLD = self._embed(images, signal, True)
        last = self.layers - 1
        for layer in range(last):
            x_BLD = run_block(self.blocks, layer, "__call__", x_BLD, signal.at_layer(layer))
        return run_block(self.blocks, last, "weights", x_BLD, signal.at_layer(last))

    def _embed(self, images: jax.Array, signal: PositionSignal, deterministic: bool) -> jax.Array:
        """The tokens [B, 1 + L, D] that enter the first block."""
        x_BLD = self.projection(patches(images, self.patch).astype(self.dtype))
        first_BLD = jnp.broadcast_to(self.class_token.astype(self.dtype), (images.shape[0], 1, self.width))
        x_BLD = jnp.concatenate([first_BLD, x_BLD], axis=1)
        if signal.input_embedding is not None:
            x_BLD = x_BLD + broadcast_to_batch(signal.input_embedding, images.shape[0])
        return self.embedding_drop(x_BLD, deterministic=deterministic).astype(self.dtype)
