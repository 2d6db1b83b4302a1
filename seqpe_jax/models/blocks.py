"""The pre-LayerNorm transformer block."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.models.attention import attend

ACTIVATIONS = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and in front of a residual sum.

    Attributes:
      width, heads, mlp_width: sizes; layers: of the whole model, which scales the residual projections at the start.
      dropout: after attention and MLP; attention_dropout: on attention weights.
      attention_block: see `models.attention.attend`; causal: attend to the past only.
    """

    width: int
    heads: int
    mlp_width: int
    layers: int
    dropout: float
    attention_dropout: float
    activation: str
    layer_norm_epsilon: float
    init_std: float
    dtype: jnp.dtype
    attention_block: int
    causal: bool = True

    @nn.compact
    def __call__(self, x_BLD: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the next states [B, L, D]; `signal` is that of this layer."""
        normal = nn.initializers.normal
        residual_init = normal(self.init_std / math.sqrt(2 * self.layers))
        norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_epsilon, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=normal(self.init_std))
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        qkv = dense(3 * self.width, name="qkv")(norm(name="norm_1")(x_BLD))
        query, key, value = (
            part.reshape(*part.shape[:-1], self.heads, self.width // self.heads) for part in jnp.split(qkv, 3, -1)
        )
        dropping = self.attention_dropout > 0 and not deterministic
        mixed = attend(
            query, key, value, signal, causal=self.causal, block=self.attention_block,
            dropout_rate=self.attention_dropout, dropout_key=self.make_rng("dropout") if dropping else None,
        ).reshape(x_BLD.shape)  # fmt: skip
        x_BLD = x_BLD + drop(dense(self.width, name="out", kernel_init=residual_init)(mixed))
        hidden = ACTIVATIONS[self.activation](dense(self.mlp_width, name="mlp_in")(norm(name="norm_2")(x_BLD)))
        return x_BLD + drop(dense(self.width, name="mlp_out", kernel_init=residual_init)(hidden))
