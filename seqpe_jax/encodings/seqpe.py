"""SeqPE: a position is a string of digits, a light transformer reads it, its vector enters attention.

Source: arXiv 2506.13277 section 3, and the released code's conventions (CLS last and without a place, qk map's output
[query half | key half]).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.activations import ACTIVATIONS
from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.positions.digits import significant, to_digits
from seqpe_jax.positions.prefixes import Group, Tree, level_sizes, tree

Mix = Callable[[jax.Array, jax.Array, jax.Array, nn.Module], jax.Array]
Read = Callable[[jax.Array], jax.Array]
How = Callable[[bool, bool], tuple[Mix, Read]]  # (the first layer, the last layer) -> what its places read
WORTH = 0.8  # prefixes are shared where that leaves less than this part of the places


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
      place: "global" numbers the places over the whole string, "coordinate" anew for each coordinate.
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
    place: str
    temperature: float
    norm_init: float
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, positions_RA: jax.Array, *, sizes: tuple[int, ...] | None = None, deterministic: bool = True
    ) -> jax.Array:
        """Returns one vector per position.

        Args:
          sizes: of `positions.prefixes.level_sizes`: each prefix of digits that positions share is read once; None = each
            string is read by itself. Without dropout both give the same; with it, sharing a prefix shares its mask.
        """
        length = self.axes * self.digits
        written = {"base": self.base, "digits": self.digits, "padding": self.padding}
        places = length if self.place == "global" else self.digits
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
            shared = tree(digits_RN, self.base, sizes)
            x, how = self._prefixes(shared, sizes, digit_BE, place_NE, cls_E)
        for layer in range(self.layers):
            block = EncoderBlock(
                self.width, self.heads, self.dropout, self.attention_dropout, self.activation,
                self.layer_norm_epsilon, self.norm_init, self.kernel_init, name=f"block_{layer}",
            )  # fmt: skip
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
            kept_RN = significant(positions_RA, base=self.base, digits=self.digits, padding=self.padding)
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
        self, shared: Tree, sizes: tuple[int, ...], digit_BE: jax.Array, place_NE: jax.Array, cls_E: jax.Array | None
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


class QKMap(nn.Module):
    """One linear map of a position's vector to its query and key parts, or one per layer.

    Attributes:
      layers: number of maps, or None for a single one without a layer axis; kernel_init: of the weights.
      part_width: width of a query part, and of a key part, all heads together.
    """

    layers: int | None
    kernel_init: nn.initializers.Initializer
    part_width: int

    @nn.compact
    def __call__(self, vectors: jax.Array) -> jax.Array:
        """Returns [(layers,) ..., 2 * part_width] of vectors [..., E]: query half, then key half."""
        lead = () if self.layers is None else (self.layers,)
        kernel = self.param("kernel", self.kernel_init, (*lead, vectors.shape[-1], 2 * self.part_width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (*lead, 2 * self.part_width), jnp.float32)
        if self.layers is None:
            return vectors @ kernel + bias
        between = (1,) * (vectors.ndim - 1)
        return jnp.einsum("...e,lef->l...f", vectors, kernel) + bias.reshape(self.layers, *between, -1)


class SeqPE(nn.Module):
    """The sequential position encoding: digits -> vectors -> signal.

    Attributes:
      mode: how a vector enters the model; qk: "single" or "multi" linear map(s) to query and key parts, "none" (the
        vector is both), "halves" (its first half is the query part, its second half the key part).
      per_head: the vector is split over the model's heads, else one head-wide vector serves them all.
      position_heads: the first heads of the model that get query and key parts, 0 = all; the others see no position.
      feature_width: of attn_scalar's query and key parts in each head, 0 = head width.
      output_width: width of a vector; 0 = what the above ask for.
      init_distribution, init_std, qk_init_std: of fresh weights; scalar_scale: s of attn_scalar.
      share_prefixes: digits that positions begin with in common are read once (`DigitEncoder`), where that pays.
      prefix: tokens before the positions that have none, such as a class token; each learns a vector of its own, which
        only `signal` sees (the reference's `cls_token_pos_embed`).
      stored: sides of a parameter `table` of vectors [sides..., E] in place of the encoder, for models that are served;
        stored_step: from one position of the table to the next.
      Others: as of `DigitEncoder`; *_model, axes: of the model that reads the signal.
    """

    layers_model: int
    width_model: int
    heads_model: int
    axes: int = 1
    mode: str = "attn_scalar"
    qk: str = "single"
    per_head: bool = True
    position_heads: int = 0
    feature_width: int = 0
    base: int = 10
    digits: int = 5
    padding: str = "left"
    layers: int = 2
    width: int = 768
    heads: int = 12
    direction: str = "causal"
    cls: bool = True
    final_norm: bool = True
    mask_padding: bool = False
    temperature: float = 1.0
    output_width: int = 0
    place: str = "global"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    norm_init: float = 1.0
    init_distribution: str = "normal"
    init_std: float = 0.02
    qk_init_std: float = 0.02
    scalar_scale: float = 1.0
    share_prefixes: bool = True
    prefix: int = 0
    stored: tuple[int, ...] = ()
    stored_step: int = 1

    @property
    def head_width(self) -> int:
        """Width of one head of the model."""
        return self.width_model // self.heads_model

    @property
    def vector_width(self) -> int:
        """Width of a position's vector."""
        needed = self.width_model if self.per_head or self.mode == "input_add" else self.head_width
        if self.qk == "halves" and self.mode in ("attn_add", "attn_mul"):
            needed *= 2
        return self.output_width or needed

    def setup(self) -> None:
        """Makes the digit encoder and, where there is one, the qk map."""
        self._check()
        make = {"normal": nn.initializers.normal, "truncated_normal": nn.initializers.truncated_normal}
        kernel_init = make[self.init_distribution]
        if self.stored:
            self.table = self.param("table", nn.initializers.zeros, (*self.stored, self.vector_width), jnp.float32)
        else:
            self.encoder = DigitEncoder(
                output_width=self.vector_width, axes=self.axes, base=self.base, digits=self.digits,
                padding=self.padding, width=self.width, heads=self.heads, layers=self.layers, dropout=self.dropout,
                attention_dropout=self.attention_dropout, activation=self.activation,
                layer_norm_epsilon=self.layer_norm_epsilon, direction=self.direction, cls=self.cls,
                final_norm=self.final_norm, mask_padding=self.mask_padding, place=self.place,
                temperature=self.temperature, norm_init=self.norm_init, kernel_init=kernel_init(self.init_std),
            )  # fmt: skip
        if self.qk in ("single", "multi"):
            width = self.feature_width or self.vector_width // (self.heads_model if self.per_head else 1)
            layers = self.layers_model if self.qk == "multi" else None
            self.qk_map = QKMap(layers, kernel_init(self.qk_init_std), self._parts * width)
        if self.prefix:
            shape = (self.prefix, self.vector_width)
            self.prefix_vectors = self.param("prefix_vectors", kernel_init(self.init_std), shape, jnp.float32)

    def __call__(self, positions_PLA: jax.Array, *, shape: tuple[int, ...], deterministic: bool = True) -> PositionSignal:
        """Returns the signal of positions int32[P, L, A]; `shape` is not read."""
        sets, length, axes = positions_PLA.shape
        vectors_RE = self.vectors(positions_PLA.reshape(-1, axes), deterministic=deterministic)
        return self.signal(vectors_RE.reshape(sets, length, -1), positions_PLA, shape=shape)

    def vectors(self, positions_RA: jax.Array, *, groups: Sequence[Group] = (), deterministic: bool = True) -> jax.Array:
        """Returns the vectors float32[R, E] of positions int32[R, A]; NaN for those past a stored table.

        Args:
          groups: what is known of the rows, in their order (`positions.prefixes`); () = nothing.
        """
        if self.stored:
            places = tuple(jnp.moveaxis(positions_RA // self.stored_step, -1, 0))
            return jnp.asarray(self.table).at[places].get(mode="fill", fill_value=jnp.nan)
        return self.encoder(positions_RA, sizes=self._sizes(positions_RA, groups), deterministic=deterministic)

    def _sizes(self, positions_RA: jax.Array, groups: Sequence[Group]) -> tuple[int, ...] | None:
        """The bounds of shared prefixes, or None where nothing or little can be shared."""
        rows = positions_RA.shape[0]
        if not (self.share_prefixes and self.direction == "causal" and self.padding == "left") or self.mask_padding:
            return None
        if not isinstance(rows, int) or self.axes * self.digits == 1:  # a symbolic number of rows; nothing before a digit
            return None
        sizes = level_sizes(
            groups or [Group(rows)], axes=self.axes, base=self.base, digits=self.digits,
            max_position=self.base**self.digits,
        )  # fmt: skip
        sizes = tuple(min(size, rows) for size in sizes)
        return sizes if sum(sizes) + sizes[-1] < WORTH * rows * (len(sizes) + 1) else None

    def signal(
        self, vectors_PLE: jax.Array, positions_PLA: jax.Array | None = None, *, shape: tuple[int, ...] = ()
    ) -> PositionSignal:
        """Returns how given vectors float32[P, L, E] enter the model, as the signal of prefix + L tokens.

        The positions of the vectors are not read: they are for parts that stand beside this one (`encodings.composed`).
        """
        if self.prefix:
            sets, _, width = vectors_PLE.shape
            first_PLE = jnp.broadcast_to(self.prefix_vectors, (sets, self.prefix, width))
            vectors_PLE = jnp.concatenate([first_PLE, vectors_PLE], axis=1)
        if self.mode == "input_add":
            return PositionSignal(added=vectors_PLE)
        if self.mode == "rotary":
            heads = self.heads_model if self.per_head else 1
            sizes = (*vectors_PLE.shape[:-1], heads, vectors_PLE.shape[-1] // heads)
            sin, cos = jnp.split(vectors_PLE.reshape(sizes), 2, axis=-1)
            signal = PositionSignal(rotation=(cos, sin))
            return signal.for_heads(self.position_heads or self.heads_model, self.heads_model)
        pair = self.query_key(vectors_PLE)
        name = {"attn_add": "shifts", "attn_mul": "factors", "attn_scalar": "features"}[self.mode]
        signal = PositionSignal(**{name: pair}, stacked=(name,) if self.qk == "multi" else ())
        return signal.for_heads(self.position_heads or self.heads_model, self.heads_model)

    def query_key(self, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the query and key parts, each float32[(layers,) ..., position heads or 1, F], of vectors [..., E].

        In mode attn_scalar the query part carries s / sqrt(head width): their dot product is a final attention logit.
        """
        if self.qk == "none":
            query = key = vectors
        else:
            mapped = vectors if self.qk == "halves" else self.qk_map(vectors)
            query, key = jnp.split(mapped, 2, axis=-1)
        parts = self.heads_model if self.qk in ("none", "halves") and self.per_head else self._parts
        sizes = (*query.shape[:-1], parts, query.shape[-1] // parts)
        query, key = (part.reshape(sizes)[..., : self._parts, :] for part in (query, key))
        if self.mode == "attn_scalar":
            query = query * (self.scalar_scale / math.sqrt(self.head_width))
        return query, key

    def storing(self, sides: tuple[int, ...], step: int) -> "SeqPE":
        """Returns this encoding with a table of vectors in the encoder's place: of sides[a] positions, `step` apart."""
        return self.clone(stored=sides, stored_step=step)

    @property
    def _parts(self) -> int:
        """Heads that have query and key parts of their own."""
        return (self.position_heads or self.heads_model) if self.per_head else 1

    def _check(self) -> None:
        """Refuses fields that contradict each other. Raises: InputError."""
        if self.direction == "bi" and not self.cls:
            raise InputError("encoding.direction='bi' reads the vector from CLS: set encoding.cls=True")
        if self.width % self.heads:
            raise InputError(f"encoding.width={self.width} is not a multiple of encoding.heads={self.heads}")
        if self.position_heads > self.heads_model:
            raise InputError(f"encoding.position_heads={self.position_heads} is more than model.heads={self.heads_model}")
        if self.position_heads and self.mode == "input_add":
            raise InputError("encoding.mode='input_add' reaches all heads: set encoding.position_heads=0")
        if self.feature_width and (self.mode != "attn_scalar" or self.qk not in ("single", "multi")):
            raise InputError(
                "encoding.feature_width is the width of what a qk map gives to attention logits: set "
                "encoding.mode='attn_scalar' and encoding.qk='single' or 'multi', or encoding.feature_width=0"
            )
        if self.mode in ("input_add", "rotary") and self.qk != "none":
            raise InputError(f"encoding.mode='{self.mode}' has no query and key parts: set encoding.qk='none'")
        width = self.vector_width
        needed = {
            "input_add": self.width_model,
            "rotary": self.width_model if self.per_head else self.head_width,
        }.get(self.mode, width)
        if self.mode in ("attn_add", "attn_mul"):
            needed = (self.width_model if self.per_head else self.head_width) * (2 if self.qk == "halves" else 1)
        if width != needed:
            raise InputError(
                f"encoding.mode='{self.mode}' with encoding.qk='{self.qk}' needs vectors of width {needed}, but "
                f"encoding.output_width={width}: set it to 0 or {needed}"
            )
        parts = (self.heads_model if self.per_head else 1) * (2 if self.qk == "halves" else 1)
        if width % parts:
            raise InputError(f"vectors of width {width} do not split into {parts} parts: change encoding.output_width")
        if self.mode == "rotary" and self.head_width % 2:
            raise InputError(f"encoding.mode='rotary' turns pairs: model.width / model.heads = {self.head_width} is odd")
