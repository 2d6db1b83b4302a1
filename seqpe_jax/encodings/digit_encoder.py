"""The digit encoder: a small transformer over the digits of positions, with shared digit prefixes computed once.

Source: arXiv 2506.13277 section 3, and the released code's conventions (CLS last and without a digit-index embedding).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.config import SeqPEConfig
from seqpe_jax.matmul import dense_dot_general
from seqpe_jax.positions.digits import significant_mask, to_digits
from seqpe_jax.positions.prefix_trie import PrefixTrie, build_trie

# Activation functions by their name in configs; the blocks of `models.transformer` use them too.
ACTIVATIONS = {
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "gelu": functools.partial(nn.gelu, approximate=False),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Embeddings(NamedTuple):
    """Embeddings of the tokens of a digit string.

    Attributes:
      digit_BW: float32[base, W], digit embeddings.
      index_NW: float32[N, W], digit-index embeddings, including the axis embeddings.
      cls_W: float32[W], embedding of the CLS token after the last digit; None = no CLS token.
    """

    digit_BW: jax.Array
    index_NW: jax.Array
    cls_W: jax.Array | None


class DenseDigitAttention(NamedTuple):
    """Dense attention within R digit strings of N tokens.

    Attributes:
      mask: bool[R or 1, 1, N, N], keys by query.
      last_only: whether only the last token is needed by the next layer.
    """

    mask: jax.Array
    last_only: bool

    def select(self, x: jax.Array) -> jax.Array:
        """Returns the tokens of x [R, N, ...] that the next layer needs."""
        return x[:, -1:] if self.last_only else x

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, dropout: nn.Module) -> jax.Array:
        """Returns weighted values [R, n, H, K] of selected queries and all keys and values, each [R, N, H, K]."""
        mask = self.mask[..., -1:, :] if self.last_only else self.mask
        logits = _masked(jnp.einsum("rnhk,rmhk->rhnm", query, key), mask)
        return jnp.einsum("rhnm,rmhk->rnhk", dropout(nn.softmax(logits)), value)


class TokenTypeAttention(NamedTuple):
    """First-layer attention of trie nodes, computed by token type: there are few types, each digit at each index, and CLS.

    Attributes:
      type_TU: one-hot [T, U], the type of each node.
      mask_TU: bool[T, U], the types of each node's ancestors and of itself.
      leaves: number of last nodes that the next layer needs; None = all.
    """

    type_TU: jax.Array
    mask_TU: jax.Array
    leaves: int | None

    def select(self, x_UW: jax.Array) -> jax.Array:
        """Returns the states [t, ...] of the nodes that the next layer needs, from those of the types [U, ...]."""
        return jnp.tensordot(_last(self.type_TU, self.leaves), x_UW, 1, precision=jax.lax.Precision.HIGHEST)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, dropout: nn.Module) -> jax.Array:
        """Returns weighted values [t, H, K] of selected queries, keys and values [U, H, K]."""
        logits = _masked(jnp.einsum("thk,uhk->thu", query, key), _last(self.mask_TU, self.leaves)[:, None])
        return jnp.einsum("thu,uhk->thk", dropout(nn.softmax(logits)), value)


class TrieAttention(NamedTuple):
    """Attention of trie nodes to their ancestors and themselves.

    Attributes:
      ancestors_TN: int32[T, N], ancestors of each node and the node itself.
      mask_TN: bool[T, N], valid entries of `ancestors_TN`.
      leaves: number of last nodes that the next layer needs; None = all.
    """

    ancestors_TN: jax.Array
    mask_TN: np.ndarray
    leaves: int | None

    def select(self, x_TW: jax.Array) -> jax.Array:
        """Returns the states of the nodes that the next layer needs."""
        return _last(x_TW, self.leaves)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, dropout: nn.Module) -> jax.Array:
        """Returns weighted values [t, H, K] of selected queries, keys and values [T, H, K]."""
        node_ancestors_TN = _last(self.ancestors_TN, self.leaves)
        logits = jnp.einsum("thk,tnhk->thn", query, key[node_ancestors_TN])
        logits = _masked(logits, _last(self.mask_TN, self.leaves)[:, None])
        return jnp.einsum("thn,tnhk->thk", dropout(nn.softmax(logits)), value[node_ancestors_TN])


Attention = DenseDigitAttention | TokenTypeAttention | TrieAttention


def _masked(logits: jax.Array, mask: jax.Array | np.ndarray) -> jax.Array:
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def _last(array: jax.Array, count: int | None) -> jax.Array:
    """The last rows of an array; all of them if `count` is None."""
    return array if count is None else array[-count:]


class EncoderBlock(nn.Module):
    """A pre-LayerNorm transformer block over the digits of each position.

    Attributes:
      config: fields of the encoding.
    """

    config: SeqPEConfig

    @nn.compact
    def __call__(self, x: jax.Array, attention: Attention, *, deterministic: bool) -> jax.Array:
        """Returns the next states of the selected tokens.

        Args:
          x: [..., W], states of tokens; tokens that are not selected are only keys and values.
          attention: selects tokens and computes their attention.
          deterministic: whether dropout is off.
        """
        config, width = self.config, self.config.width
        norm = functools.partial(
            nn.LayerNorm, epsilon=config.layer_norm_epsilon, scale_init=nn.initializers.constant(config.norm_init)
        )
        kernel_init = initializer(config, config.init_std)
        dense = functools.partial(nn.Dense, kernel_init=kernel_init, dot_general=dense_dot_general)
        dropout = nn.Dropout(config.dropout, deterministic=deterministic)
        head_width = width // config.heads
        qkv = dense(3 * width, name="qkv")(norm(name="norm_1")(x))
        query, key, value = (
            part.reshape(*part.shape[:-1], config.heads, head_width) for part in jnp.split(qkv, 3, axis=-1)
        )
        x = attention.select(x)
        attention_dropout = nn.Dropout(config.attention_dropout, deterministic=deterministic)
        values = attention.attend(attention.select(query) / math.sqrt(head_width), key, value, attention_dropout)
        x = x + dropout(dense(width, name="out")(values.reshape(x.shape)))
        hidden = ACTIVATIONS[config.activation](dense(4 * width, name="mlp_in")(norm(name="norm_2")(x)))
        return x + dropout(dense(width, name="mlp_out")(hidden))


class DigitEncoder(nn.Module):
    """Encodes positions int32[R, A] by their digits as embedding vectors float32[R, output_width].

    Attributes:
      config: fields of the encoding.
      axes: coordinates of a position.
      output_width: width of an embedding vector.
    """

    config: SeqPEConfig
    axes: int
    output_width: int

    @nn.compact
    def __call__(
        self, positions_RA: jax.Array, *, max_nodes: tuple[int, ...] | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Returns one vector per position.

        Args:
          positions_RA: int32[R, A], fixed-point integers (1 token = base**fraction_digits).
          max_nodes: result of `prefix_trie.max_nodes_per_level`: each shared digit prefix is computed once; None = each
            string is computed separately. Results are equal without dropout; with it, a shared prefix has one mask.
          deterministic: whether dropout is off.
        """
        config = self.config
        embeddings = self._embeddings()
        digits_RN = to_digits(positions_RA, base=config.base, digits=config.num_digits, padding=config.padding)
        if max_nodes is None:
            trie = None
            x, layers = string_layers(config, embeddings, digits_RN, self._mask(positions_RA))
        else:
            trie = build_trie(digits_RN, config.base, max_nodes)
            x, layers = trie_layers(config, embeddings, trie, max_nodes)
        for layer, attention in enumerate(layers):
            x = EncoderBlock(config, name=f"block_{layer}")(x, attention, deterministic=deterministic)
        x = x[:, -1] if trie is None else x
        if config.final_norm:
            scale_init = nn.initializers.constant(config.norm_init)
            x = nn.LayerNorm(epsilon=config.layer_norm_epsilon, scale_init=scale_init, name="final_norm")(x)
        projection = nn.Dense(self.output_width, kernel_init=initializer(config, config.init_std), name="projection")
        x_RE = projection(x) / config.temperature
        return x_RE if trie is None else x_RE[trie.leaf_R]

    def _embeddings(self) -> Embeddings:
        """Creates the embeddings; `place_embedding` is the digit-index embedding, whose old name keeps checkpoints readable."""
        config, length = self.config, self.axes * self.config.num_digits
        init = initializer(config, config.init_std)
        indices = length if config.digit_index == "global" else config.num_digits
        index_NW = self.param("place_embedding", init, (indices, config.width), jnp.float32)
        digit_BW = self.param("digit_embedding", init, (config.base, config.width), jnp.float32)
        index_NW = jnp.tile(index_NW, (length // indices, 1))
        if self.axes > 1:
            axis_AW = self.param("axis_embedding", init, (self.axes, config.width), jnp.float32)
            index_NW = index_NW + jnp.repeat(axis_AW, config.num_digits, axis=0)
        cls_W = self.param("cls", init, (1, config.width), jnp.float32)[0] if config.cls else None
        return Embeddings(digit_BW, index_NW, cls_W)

    def _mask(self, positions_RA: jax.Array) -> jax.Array:
        """Attention mask of the digit strings, bool[R or 1, 1, N, N]."""
        config = self.config
        length = self.axes * config.num_digits
        tokens = length + config.cls
        causal = config.direction == "causal"
        mask = jnp.tril(jnp.ones((tokens, tokens), bool)) if causal else jnp.ones((1, tokens), bool)
        mask = jnp.broadcast_to(mask, (1, 1, tokens, tokens))
        if config.mask_padding:
            keys_RN = significant_mask(positions_RA, base=config.base, digits=config.num_digits, padding=config.padding)
            keys_RN = jnp.pad(keys_RN, ((0, 0), (0, tokens - length)), constant_values=True)
            mask = mask & keys_RN[:, None, None, :]
        return mask


def initializer(config: SeqPEConfig, std: float) -> nn.initializers.Initializer:
    """Returns the weight initializer with a standard deviation."""
    make = {"normal": nn.initializers.normal, "truncated_normal": nn.initializers.truncated_normal}
    return make[config.init_distribution](std)


def string_layers(
    config: SeqPEConfig, embeddings: Embeddings, digits_RN: jax.Array, mask: jax.Array
) -> tuple[jax.Array, list[Attention]]:
    """Returns the tokens of each string, and the attention of each layer.

    Args:
      config: fields of the encoding.
      embeddings: embeddings of the tokens.
      digits_RN: int32[R, N].
      mask: bool[R or 1, 1, N, N], including CLS.

    Returns:
      States float32[R, N, W], whose last token is the output; one `DenseDigitAttention` per layer.
    """
    x_RNW = embeddings.digit_BW[digits_RN] + embeddings.index_NW
    if embeddings.cls_W is not None:
        cls_R1W = jnp.broadcast_to(embeddings.cls_W, (len(x_RNW), 1, config.width))
        x_RNW = jnp.concatenate([x_RNW, cls_R1W], axis=1)
    return x_RNW, [DenseDigitAttention(mask, layer == config.layers - 1) for layer in range(config.layers)]


def trie_layers(
    config: SeqPEConfig, embeddings: Embeddings, trie: PrefixTrie, max_nodes: tuple[int, ...]
) -> tuple[jax.Array, list[Attention]]:
    """Returns the tokens of a trie of prefixes, and the attention of each layer.

    Args:
      config: fields of the encoding.
      embeddings: embeddings of the tokens.
      trie: trie of the digit strings, T nodes.
      max_nodes: number of nodes of each level.

    Returns:
      States float32[U, W] of the token types, since nodes of one type have the same first state; the attention of each
      layer, the last of which returns only the states of complete strings.
    """
    (length, _), base = embeddings.index_NW.shape, len(embeddings.digit_BW)
    x_UW = (embeddings.index_NW[:, None] + embeddings.digit_BW).reshape(-1, config.width)
    type_T = trie.digits_T + np.repeat(np.arange(length) * base, max_nodes)
    ancestors_TN, levels = trie.ancestors_TN, max_nodes
    if embeddings.cls_W is not None:  # CLS after each complete string
        leaves = max_nodes[-1]
        x_UW = jnp.concatenate([x_UW, embeddings.cls_W[None]])
        type_T = jnp.pad(type_T, (0, leaves), constant_values=length * base)
        own_RN = jnp.concatenate([ancestors_TN[-leaves:], (sum(max_nodes) + jnp.arange(leaves))[:, None]], axis=1)
        ancestors_TN = jnp.concatenate([jnp.pad(ancestors_TN, ((0, 0), (0, 1))), own_RN])
        levels = (*max_nodes, leaves)
    mask_TN = np.repeat(np.tril(np.ones((len(levels), len(levels)), bool)), levels, axis=0)
    type_TU = jax.nn.one_hot(type_T, len(x_UW), dtype=x_UW.dtype)
    # Products with zeros and ones, whose backward pass needs no scatter.
    mask_TU = jnp.einsum("tn,tnu->tu", mask_TN, jax.nn.one_hot(type_T[ancestors_TN], len(x_UW))) > 0
    layers: list[Attention] = []
    for layer in range(config.layers):
        leaves_only = levels[-1] if layer == config.layers - 1 else None
        if layer == 0:
            layers.append(TokenTypeAttention(type_TU, mask_TU, leaves_only))
        else:
            layers.append(TrieAttention(ancestors_TN, mask_TN, leaves_only))
    return x_UW, layers
