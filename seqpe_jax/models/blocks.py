"""The pre-LayerNorm transformer block."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.activations import ACTIVATIONS
from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.models.attention import Cache, attend, attend_cached, attention_weights

REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and in front of a residual sum.

    Attributes:
      width, heads, mlp_width: sizes; layers: of the whole model.
      dropout: after attention and MLP; attention_dropout: on attention weights.
      attention_block: see `models.attention.attend`; causal: attend to the past only.
      scale_residual: residual projections start smaller by sqrt(2 * layers).
      drop_path: share of samples for which a branch (attention or MLP) is left out while training; the others' branch is
        scaled up by as much (stochastic depth, Huang et al. 2016).
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
    scale_residual: bool = True
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        signal: PositionSignal,
        deterministic: bool = True,
        weights: bool = False,
        cache: Cache | None = None,
        places_PL: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Returns the next states [B, L, D], or the attention weights [B, H, L, L] if those are asked for.

        Args:
          signal: of this layer.
          cache, places_PL: see `models.attention.attend_cached`; given, (states, cache) is returned.
        """
        normal = nn.initializers.normal
        residual_init = normal(self.init_std / (math.sqrt(2 * self.layers) if self.scale_residual else 1.0))
        norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_epsilon, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=normal(self.init_std))
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        drop_path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=deterministic)

        qkv = dense(3 * self.width, name="qkv")(norm(name="norm_1")(x_BLD))
        query, key, value = (
            part.reshape(*part.shape[:-1], self.heads, self.width // self.heads) for part in jnp.split(qkv, 3, -1)
        )
        if weights:
            return attention_weights(query, key, signal, causal=self.causal)
        if cache is None:
            dropping = self.attention_dropout > 0 and not deterministic
            mixed = attend(
                query, key, value, signal, causal=self.causal, block=self.attention_block,
                dropout_rate=self.attention_dropout, dropout_key=self.make_rng("dropout") if dropping else None,
            )  # fmt: skip
        else:
            mixed, cache = attend_cached(query, key, value, signal, cache, places_PL, block=self.attention_block)
        mixed = mixed.reshape(x_BLD.shape)
        x_BLD = x_BLD + drop_path(drop(dense(self.width, name="out", kernel_init=residual_init)(mixed)))
        hidden = ACTIVATIONS[self.activation](dense(self.mlp_width, name="mlp_in")(norm(name="norm_2")(x_BLD)))
        x_BLD = x_BLD + drop_path(drop(dense(self.width, name="mlp_out", kernel_init=residual_init)(hidden)))
        return x_BLD if cache is None else (x_BLD, cache)
