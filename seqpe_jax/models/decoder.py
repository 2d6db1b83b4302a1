"""Decoders of text, from GPT-2 to Gemma 2: their parts are those of a config, and positions come as a `PositionSignal`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.axes import (
    BATCH,
    BATCH_SHARDS,
    LENGTH,
    OUTER_BATCH,
    PARAM_SHARDS,
    VOCABULARY,
    WIDTH,
    all_gather_param,
    with_logical_constraint,
)
from seqpe_jax.encodings.position_signal import PositionSignal, broadcast_to_batch
from seqpe_jax.matmul import matmul
from seqpe_jax.models.attention import KVCache, position_logits
from seqpe_jax.models.attention_inputs import cap_logits
from seqpe_jax.models.transformer import Network, make_blocks, make_norm, measure_attention, run_block, run_blocks


class Decoder(Network):
    """A causal language model; `config.decoder_presets` has the parts of published families.

    Attributes:
      config: hyperparameters of the blocks and embeddings.
      vocabulary: V, rows of the token embedding.
      tied: logits are products with the token embedding, else with an output embedding.
    """

    vocabulary: int
    tied: bool = True

    def setup(self) -> None:
        """Creates the embeddings, the blocks and the final norm."""
        config = self.config
        init = nn.initializers.normal(config.init_std)
        self.token_embedding = nn.Embed(self.vocabulary, config.width, embedding_init=init)
        if not self.tied:
            self.output_embedding = nn.Embed(self.vocabulary, config.width, embedding_init=init)
        self.blocks = make_blocks(config)
        self.final_norm = make_norm(config)
        self.embedding_drop = nn.Dropout(config.embedding_dropout)

    def __call__(self, tokens_BL: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the logits of the next token, float32[B, L, V].

        Args:
          tokens_BL: int32 token ids.
          signal: PositionSignal of L positions.
          deterministic: whether dropout is off.
        """
        return self.logits(self.hidden(tokens_BL, signal, deterministic))

    def hidden(self, tokens_BL: jax.Array, signal: PositionSignal, deterministic: bool = True) -> jax.Array:
        """Returns the final states [B, L, D]; arguments as in `__call__`."""
        x_BLD = self._embed(tokens_BL, signal.input_embedding, deterministic)
        x_BLD = self.final_norm(run_blocks(self.blocks, x_BLD, signal, deterministic))
        return with_logical_constraint(x_BLD, BATCH, LENGTH, None)

    def forward_cached(
        self,
        tokens_BL: jax.Array,
        signal: PositionSignal,
        cache: tuple[KVCache, ...],
        token_index_PL: jax.Array,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Returns the final states [B, L, D] of new tokens of a window, and the cache with them written: prefill and decode.

        The states equal those of `hidden` on the whole window, if the cache holds all tokens before them.

        Args:
          tokens_BL: int32, the new tokens.
          signal: PositionSignal of the whole window, one position set.
          cache: KV cache of each layer, `init_cache` before the first tokens; for the window, or for as many of its first indices as
            are attended to.
          token_index_PL: int32, indices of the new tokens in the window (`attention.attend_cached`).
          lengths_B: int32, number of new tokens that are no padding; None = all.
        """
        input_embedding = None if signal.input_embedding is None else signal.input_embedding[0][token_index_PL]
        x_BLD = self._embed(tokens_BL, input_embedding, True)
        # One array for all layers of a kind; not for several tokens, for which it would be large.
        is_shared = tokens_BL.shape[1] == 1 and not {"position_query_key", "bias"} & set(signal.per_layer_fields)
        caches, shared = [], {}
        for layer in range(self.config.layers):
            of_layer, window = signal.at_layer(layer), self.config.window_of(layer)
            kind = window, signal.absent(layer)
            if is_shared and kind not in shared:
                shared[kind] = position_logits(of_layer, token_index_PL, cache[layer].key.shape[1], window)
            arguments = (of_layer, cache[layer], token_index_PL, shared.get(kind), lengths_B)
            x_BLD, layer_cache = run_block(self.blocks, layer, "forward_cached", x_BLD, *arguments)
            caches.append(layer_cache)
        return self.final_norm(x_BLD), tuple(caches)

    def init_cache(self, batch: int, length: int, signal: PositionSignal) -> tuple[KVCache, ...]:
        """Returns the empty cache of each layer; that of a layer with a window has no more rows than the window.

        Args:
          batch: number of samples.
          length: S, tokens of the window.
          signal: PositionSignal of the window.
        """
        config = self.config

        def of_layer(layer: int) -> KVCache:
            rows = min(length, config.window_of(layer) or length)
            value = jnp.zeros((batch, rows, config.kv_heads, config.head_width), config.dtype)
            is_polar = signal.polar_phase is not None and "polar_phase" not in signal.absent(layer)
            key = jnp.concatenate([value, value], axis=-1) if is_polar else value
            return KVCache(key, value, jnp.zeros((batch, rows, config.heads)) if config.gate else None)

        return tuple(map(of_layer, range(config.layers)))

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """Returns the logits float32[B, L, V] of final states."""
        embedding_VD = all_gather_param(self.logit_embedding().astype(self.config.dtype), VOCABULARY, WIDTH)
        logits_BLV = matmul(hidden_BLD, embedding_VD.T, dtype=jnp.float32)
        multiplier, cap = self.logit_scaling()
        logits_BLV = cap_logits(logits_BLV if multiplier == 1.0 else logits_BLV * multiplier, cap)
        return with_logical_constraint(logits_BLV, BATCH, LENGTH, VOCABULARY)

    @nn.nowrap
    def logit_scaling(self) -> tuple[float, float]:
        """Returns the factor of the logits, and the cap that they have after it, 0 = none."""
        return self.config.logit_multiplier, self.config.logit_cap

    def attention(self, tokens_BL: jax.Array, signal: PositionSignal, measure: Callable[[jax.Array], Any]) -> list[Any]:
        """Returns the results of a function of each layer's attention weights, float32[B, H, L, L]."""
        x_BLD = self._embed(tokens_BL, signal.input_embedding, True)
        return measure_attention(self.blocks, self.config.layers, x_BLD, signal, measure)

    def logit_embedding(self) -> jax.Array:
        """Returns the embedding whose products with final states become the logits, float32[V, D] as stored."""
        return (self.token_embedding if self.tied else self.output_embedding).embedding

    def _embed(self, tokens_BL: jax.Array, position_PLD: jax.Array | None, deterministic: bool) -> jax.Array:
        """The states [B, L, D] that enter the first block; position_PLD: position embedding that is added."""
        # Each device looks up its columns of the table as stored, for the tokens of all devices that share it; an
        # all-to-all of states follows, in place of an all-gather of the table.
        embedding_VD = with_logical_constraint(self.token_embedding.embedding, VOCABULARY, PARAM_SHARDS)
        tokens_BL = with_logical_constraint(tokens_BL, OUTER_BATCH, None)
        x_BLD = jnp.take(embedding_VD, tokens_BL, axis=0)
        x_BLD = with_logical_constraint(x_BLD, OUTER_BATCH, None, PARAM_SHARDS)
        # One mesh axis after the other: the compiler would gather all states for both at once.
        x_BLD = with_logical_constraint(x_BLD, OUTER_BATCH, LENGTH, BATCH_SHARDS)
        x_BLD = with_logical_constraint(x_BLD, BATCH, LENGTH, None)
        if self.config.embedding_multiplier != 1.0:
            # Rounded to the dtype of the arithmetic, as the checkpoints that have one were trained.
            x_BLD = x_BLD * jnp.asarray(self.config.embedding_multiplier, self.config.dtype).astype(x_BLD.dtype)
        if position_PLD is not None:
            x_BLD = x_BLD + broadcast_to_batch(position_PLD, tokens_BL.shape[0])
        return self.embedding_drop(x_BLD, deterministic=deterministic).astype(self.config.dtype)
