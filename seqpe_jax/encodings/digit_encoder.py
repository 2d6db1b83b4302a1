"""The light transformer that reads a position's digits; prefixes that positions share are read once.

Source: arXiv 2506.13277 section 3, and the released code's conventions (CLS last and without a place).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.activations import ACTIVATIONS
from seqpe_jax.positions.digits import significant_mask, to_digits
from seqpe_jax.positions.prefix_trie import PrefixTrie, build_trie

Mix = Callable[[jax.Array, jax.Array, jax.Array, nn.Module], jax.Array]
Read = Callable[[jax.Array], jax.Array]
How = Callable[[bool, bool], tuple[Mix, Read]]  # (the first layer, the last layer) -> what its places read


class EncoderBlock(nn.Module):
    """A pre-LayerNorm transformer block over the digits of each row.

    Attributes: as of `DigitEncoder`.
    """

    width: int
    heads: int
    dropout: float
    attention_dropout: float
    activation: str
    layer_norm_epsilon: float
    norm_init: float
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, mix: Mix, read: Read, *, deterministic: bool) -> jax.Array:
        """Returns the next states of the places that are read.

        Args:
          x: [..., W], states of places.
          mix: queries of those that are read, keys and values of all, [..., H, K] -> [..., H, K]: attention.
          read: all states -> those that are read, a linear map; places that are not serve as keys and values alone.
        """
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.layer_norm_epsilon, scale_init=nn.initializers.constant(self.norm_init)
        )
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init)
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        head_width = self.width // self.heads

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.heads, head_width)

        query, key, value = map(heads, jnp.split(dense(3 * self.width, name="qkv")(norm(name="norm_1")(x)), 3, -1))
        x = read(x)
        drop_weights = nn.Dropout(self.attention_dropout, deterministic=deterministic)
        mixed = mix(read(query) / math.sqrt(head_width), key, value, drop_weights).reshape(x.shape)
        x = x + drop(dense(self.width, name="out")(mixed))
        hidden = ACTIVATIONS[self.activation](dense(4 * self.width, name="mlp_in")(norm(name="norm_2")(x)))
        return x + drop(dense(self.width, name="mlp_out")(hidden))


class DigitEncoder(nn.Module):
    """Reads strings of digits: positions int32[R, A] -> float32[R, output_width].

    Attributes:
      axes, base, digits, padding: how a position is written.
      width, heads, layers, dropout, attention_dropout, activation, layer_norm_epsilon: of the transformer.
      direction: "causal" or "bi"; cls: a learned vector after the last digit is read out, else the last digit is.
      final_norm: LayerNorm before the projection; mask_padding: padded zeros are no keys.
      digit_index: "global" numbers the digits over the whole string, "per_axis" anew for each coordinate.
      temperature: divides the vectors; norm_init: LayerNorm weights at the start; kernel_init: of everything else.
    """

    output_width: int
    axes: int
    base: int
    digits: int
    padding: str
    width: int
    heads: int
    layers: int
    dropout: float
    attention_dropout: float
    activation: str
    layer_norm_epsilon: float
    direction: str
    cls: bool
    final_norm: bool
    mask_padding: bool
    digit_index: str
    temperature: float
    norm_init: float
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, positions_RA: jax.Array, *, sizes: tuple[int, ...] | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Returns one vector per position.

        Args:
          sizes: of `positions.prefixes.max_nodes_per_level`: each prefix of digits that positions share is read once; None = each
            string is read by itself. Without dropout both give the same; with it, sharing a prefix shares its mask.
        """
        length = self.axes * self.digits
        written = {"base": self.base, "digits": self.digits, "padding": self.padding}
        places = length if self.digit_index == "global" else self.digits
        place_NE = self.param("place_embedding", self.kernel_init, (places, self.width), jnp.float32)
        digit_BE = self.param("digit_embedding", self.kernel_init, (self.base, self.width), jnp.float32)
        place_NE = jnp.tile(place_NE, (length // places, 1))
        if self.axes > 1:
            axis_AE = self.param("axis_embedding", self.kernel_init, (self.axes, self.width), jnp.float32)
            place_NE = place_NE + jnp.repeat(axis_AE, self.digits, axis=0)
        cls_E = self.param("cls", self.kernel_init, (1, self.width), jnp.float32)[0] if self.cls else None
        digits_RN = to_digits(positions_RA, **written)
        if sizes is None:
            mask = self._mask(positions_RA)
            x, how = self._strings(digits_RN, digit_BE, place_NE, cls_E, mask)
        else:
            shared = build_trie(digits_RN, self.base, sizes)
            x, how = self._prefixes(shared, sizes, digit_BE, place_NE, cls_E)
        for layer in range(self.layers):
            block = EncoderBlock(
                self.width,
                self.heads,
                self.dropout,
                self.attention_dropout,
                self.activation,
                self.layer_norm_epsilon,
                self.norm_init,
                self.kernel_init,
                name=f"block_{layer}",
            )
            x = block(x, *how(layer == 0, layer == self.layers - 1), deterministic=deterministic)
        x = x[:, -1] if sizes is None else x
        if self.final_norm:
            scale_init = nn.initializers.constant(self.norm_init)
            x = nn.LayerNorm(epsilon=self.layer_norm_epsilon, scale_init=scale_init, name="final_norm")(x)
        x_RE = nn.Dense(self.output_width, kernel_init=self.kernel_init, name="projection")(x) / self.temperature
        return x_RE if sizes is None else x_RE[shared.leaf_R]

    def _mask(self, positions_RA: jax.Array) -> jax.Array:
        """Which place reads which, bool[R or 1, 1, N, N]."""
        length = self.axes * self.digits
        places = length + self.cls
        mask = jnp.tril(jnp.ones((places, places), bool)) if self.direction == "causal" else jnp.ones((1, places), bool)
        mask = jnp.broadcast_to(mask, (1, 1, places, places))
        if self.mask_padding:
            kept_RN = significant_mask(positions_RA, base=self.base, digits=self.digits, padding=self.padding)
            kept_RN = jnp.pad(kept_RN, ((0, 0), (0, places - length)), constant_values=True)
            mask = mask & kept_RN[:, None, None, :]
        return mask

    def _strings(
        self, digits_RN: jax.Array, digit_BE: jax.Array, place_NE: jax.Array, cls_E: jax.Array | None, mask: jax.Array
    ) -> tuple[jax.Array, How]:
        """States [R, N, W] of the strings themselves; their last places are read out."""
        x_RND = digit_BE[digits_RN] + place_NE
        if cls_E is not None:
            x_RND = jnp.concatenate([x_RND, jnp.broadcast_to(cls_E, (len(x_RND), 1, self.width))], axis=1)

        def how(first: bool, last: bool) -> tuple[Mix, Read]:
            def mix(query: jax.Array, key: jax.Array, value: jax.Array, drop: nn.Module) -> jax.Array:
                logits = jnp.einsum("rnhk,rmhk->rhnm", query, key)
                logits = jnp.where(mask[..., -1:, :] if last else mask, logits, jnp.finfo(logits.dtype).min)
                return jnp.einsum("rhnm,rmhk->rnhk", drop(nn.softmax(logits)), value)

            return mix, lambda x: x[:, -1:] if last else x

        return x_RND, how

    def _prefixes(
        self,
        shared: PrefixTrie,
        sizes: tuple[int, ...],
        digit_BE: jax.Array,
        place_NE: jax.Array,
        cls_E: jax.Array | None,
    ) -> tuple[jax.Array, How]:
        """The same of T prefixes: a place reads the places of its own prefixes.

        The first layer's states are those of the few digits that there are at each place, and CLS: [U, W].
        """
        length, base = len(sizes), len(digit_BE)
        x_UD = (place_NE[:, None] + digit_BE).reshape(-1, self.width)
        kind_T = shared.digits_T + np.repeat(np.arange(length) * base, sizes)
        ancestors_TN = shared.ancestors_TN
        if cls_E is not None:  # CLS after each whole string
            leaves = sizes[-1]
            x_UD = jnp.concatenate([x_UD, cls_E[None]])
            kind_T = jnp.pad(kind_T, (0, leaves), constant_values=length * base)
            own_RN = jnp.concatenate([ancestors_TN[-leaves:], (sum(sizes) + jnp.arange(leaves))[:, None]], axis=1)
            ancestors_TN = jnp.concatenate([jnp.pad(ancestors_TN, ((0, 0), (0, 1))), own_RN])
            sizes = (*sizes, leaves)
        seen_TN = np.repeat(np.tril(np.ones((len(sizes), len(sizes)), bool)), sizes, axis=0)
        kinds_TU = jax.nn.one_hot(kind_T, len(x_UD), dtype=x_UD.dtype)
        # Products with zeros and ones, whose backward pass needs no scatter.
        seen_TU = jnp.einsum("tn,tnu->tu", seen_TN, jax.nn.one_hot(kind_T[ancestors_TN], len(x_UD))) > 0

        def how(first: bool, last: bool) -> tuple[Mix, Read]:
            def read(x: jax.Array) -> jax.Array:
                return x[-sizes[-1] :] if last else x

            if first:
                own_TU = read(kinds_TU)

                def mix(query: jax.Array, key: jax.Array, value: jax.Array, drop: nn.Module) -> jax.Array:
                    logits = jnp.einsum("thk,uhk->thu", query, key)
                    logits = jnp.where(read(seen_TU)[:, None], logits, jnp.finfo(logits.dtype).min)
                    return jnp.einsum("thu,uhk->thk", drop(nn.softmax(logits)), value)

                return mix, lambda x: jnp.tensordot(own_TU, x, 1, precision=jax.lax.Precision.HIGHEST)

            above_TN = read(ancestors_TN)

            def mix(query: jax.Array, key: jax.Array, value: jax.Array, drop: nn.Module) -> jax.Array:
                logits = jnp.einsum("thk,tnhk->thn", query, key[above_TN])
                logits = jnp.where(read(seen_TN)[:, None], logits, jnp.finfo(logits.dtype).min)
                return jnp.einsum("thn,tnhk->thk", drop(nn.softmax(logits)), value[above_TN])

            return mix, read

        return x_UD, how
