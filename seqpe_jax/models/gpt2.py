"""GPT-2 without positions of its own: they come as a `PositionSignal`."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.axes import BATCH, LENGTH, VOCABULARY, WIDTH, with_logical_constraint
from seqpe_jax.encodings.base import PositionSignal, broadcast_to_batch
from seqpe_jax.models.attention import KVCache, position_logits
from seqpe_jax.models.transformer import make_blocks, run_block, run_blocks


class GPT2(nn.Module):
    """A causal language model (Radford et al. 2019).

    Attributes:
      vocabulary, layers, width, heads: sizes; mlp_width: 0 = four times the width.
      dropout, attention_dropout, embedding_dropout: rates while training.
      init_std: normal; residual projections start smaller by sqrt(2 * layers).
      dtype: of the arithmetic; parameters are float32.
      remat: "none", "full" (blocks are computed again in the backward pass), "dots" (matrix products are kept) or "offload"
        (they are kept in the host's memory).
      attention_kind, attention_block: kind and block of `models.attention.attend`.
      scan: the blocks are compiled once and looped over (`models.blocks.ScannedBlocks`), else one after another.
      fade, gate_bias_init: as in `models.blocks.Block`.
      tied: logits are products with the token embedding, else with an embedding of their own.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    mlp_width: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    embedding_dropout: float = 0.1
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    init_std: float = 0.02
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention_kind: str = "auto"
    attention_block: int = 0
    scan: bool = False
    gate: str = ""
    gate_bias_init: float = 0.0
    tied: bool = True

    def setup(self) -> None:
        """Makes the embedding, the blocks and the final norm."""
        init = nn.initializers.normal(self.init_std)
        self.token_embedding = nn.Embed(self.vocabulary, self.width, embedding_init=init)
        if not self.tied:
            self.output_embedding = nn.Embed(self.vocabulary, self.width, embedding_init=init)
        self.blocks = make_blocks(self, gate=self.gate, gate_bias_init=self.gate_bias_init)
        self.final_norm = nn.LayerNorm(epsilon=self.layer_norm_epsilon, dtype=self.dtype)
        self.embedding_drop = nn.Dropout(self.embedding_dropout)

    def __call__(self, tokens_BL: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the logits of the next token, float32[B, L, V], of tokens int32[B, L]."""
        return self.logits(self.hidden(tokens_BL, signal, deterministic))

    def hidden(self, tokens_BL: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the final states [B, L, D]."""
        x_BLD = self._embed(tokens_BL, signal.input_embedding, deterministic)
        return self.final_norm(run_blocks(self.blocks, x_BLD, signal, deterministic))

    def forward_cached(
        self, tokens_BL: jax.Array, signal: PositionSignal, cache: tuple[KVCache, ...], token_index_PL: jax.Array
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Returns the final states [B, L, D] of tokens at some places of a window, and the cache with them in it.

        Equal to those places of `hidden` on the whole window, if the cache holds all places before them.

        Args:
          signal: of the whole window, one position set.
          cache: of each layer, at the start `init_cache`, for the window or as many of its first places as are seen;
            places_PL: see `models.attention.attend_cached`.
        """
        input_embedding = None if signal.input_embedding is None else signal.input_embedding[0][token_index_PL]
        x_BLD = self._embed(tokens_BL, input_embedding, True)
        shared = None
        # For more tokens than one, the logits would be a large array.
        if tokens_BL.shape[1] == 1 and not {"logit_query_key", "bias"} & set(signal.per_layer_fields):
            shared = position_logits(signal, token_index_PL, cache[0].key.shape[1])
        extended = []
        for layer in range(self.layers):
            own = (signal.at_layer(layer), cache[layer], token_index_PL, shared)
            x_BLD, kept = run_block(self.blocks, layer, "forward_cached", x_BLD, *own)
            extended.append(kept)
        return self.final_norm(x_BLD), tuple(extended)

    def init_cache(self, batch: int, places: int, signal: PositionSignal) -> tuple[KVCache, ...]:
        """Returns the cache of a window in which no place is written; signal: of the window."""
        value = jnp.zeros((batch, places, self.heads, self.width // self.heads), self.dtype)
        key = value if signal.polar_phase is None else jnp.concatenate([value, value], axis=-1)
        gate = jnp.zeros((batch, places, self.heads)) if self.gate else None
        return (KVCache(key, value, gate),) * self.layers

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """Returns the logits float32[B, L, V] of final states, through the transposed token or output embedding."""
        rows = self.token_embedding if self.tied else self.output_embedding
        embedding_VD = with_logical_constraint(rows.embedding.astype(self.dtype), VOCABULARY, WIDTH)
        logits_BLV = jnp.einsum("bld,vd->blv", hidden_BLD, embedding_VD, preferred_element_type=jnp.float32)
        return with_logical_constraint(logits_BLV, BATCH, LENGTH, VOCABULARY)

    def _embed(self, tokens_BL: jax.Array, added_PLD: jax.Array | None, deterministic: bool) -> jax.Array:
        """The states [B, L, D] that enter the first block."""
        embedding_VD = with_logical_constraint(self.token_embedding.embedding, VOCABULARY, WIDTH)
        x_BLD = with_logical_constraint(jnp.take(embedding_VD, tokens_BL, axis=0), BATCH, LENGTH, None)
        if added_PLD is not None:
            x_BLD = x_BLD + broadcast_to_batch(added_PLD, tokens_BL.shape[0])
        return self.embedding_drop(x_BLD, deterministic=deterministic).astype(self.dtype)
