"""SeqPE: a position is a string of digits, a light transformer reads it, its vector enters attention.

Source: arXiv 2506.13277 section 3, and the released code's conventions (CLS last and without a place, qk map's output
[query half | key half]).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.encodings.digit_encoder import DigitEncoder
from seqpe_jax.errors import InputError
from seqpe_jax.positions.counting import count_digits
from seqpe_jax.positions.prefix_trie import RowGroup, max_nodes_per_level

MAX_SHARED_FRACTION = 0.8  # prefixes are shared where that leaves less than this part of the places


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
      table_sides: sides of a parameter `table` of vectors [sides..., E] in place of the encoder, for models that are served;
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
    digit_index: str = "global"
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
    table_sides: tuple[int, ...] = ()
    table_stride: int = 1

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
        if self.table_sides:
            self.table = self.param("table", nn.initializers.zeros, (*self.table_sides, self.vector_width), jnp.float32)
        else:
            self.encoder = DigitEncoder(
                output_width=self.vector_width,
                axes=self.axes,
                base=self.base,
                digits=self.digits,
                padding=self.padding,
                width=self.width,
                heads=self.heads,
                layers=self.layers,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                activation=self.activation,
                layer_norm_epsilon=self.layer_norm_epsilon,
                direction=self.direction,
                cls=self.cls,
                final_norm=self.final_norm,
                mask_padding=self.mask_padding,
                digit_index=self.digit_index,
                temperature=self.temperature,
                norm_init=self.norm_init,
                kernel_init=kernel_init(self.init_std),
            )
        if self.qk in ("single", "multi"):
            width = self.feature_width or self.vector_width // (self.heads_model if self.per_head else 1)
            layers = self.layers_model if self.qk == "multi" else None
            self.qk_map = QKMap(layers, kernel_init(self.qk_init_std), self._parts * width)
        if self.prefix:
            shape = (self.prefix, self.vector_width)
            self.prefix_vectors = self.param("prefix_vectors", kernel_init(self.init_std), shape, jnp.float32)

    @classmethod
    def for_model(
        cls, *, layers: int, width: int, heads: int, max_position: int, axes: int = 1, base: int = 10, **options: Any
    ) -> "SeqPE":
        """Returns an encoding for a transformer of one's own, in the form of the recipes.

            encoding = SeqPE.for_model(layers=2, width=96, heads=4, max_position=10_000)
            params = encoding.init(key, jnp.arange(64))
            signal = encoding.apply(params, jnp.arange(1024))  # 16 times as long; give layer i signal.at_layer(i)

        Args:
          layers, width, heads: of the model; the encoder of digits has two layers of the model's width.
          max_position: coordinates lie below; it sets the number of digits.
          axes: coordinates of a position: 1 for text, 2 for images, 3 for clips.
          base: of the digits; options: any further field.
        """
        # Small encoders need larger fresh weights than the paper's 0.02, or they stay untrained.
        std = 0.02 if width >= 512 else 0.1
        chosen: dict[str, Any] = {"qk": "multi", "dropout": 0.0, "init_std": std, "qk_init_std": std}
        return cls(
            layers_model=layers,
            width_model=width,
            heads_model=heads,
            axes=axes,
            base=base,
            digits=count_digits(max_position, base),
            **chosen | {"width": width, "heads": heads} | options,
        )

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...] = (), deterministic: bool = True
    ) -> PositionSignal:
        """Returns the signal of positions int32[P, L, A], or of one set, int32[L, A] or int32[L]; `shape` is not read."""
        if positions_PLA.ndim < 3:
            positions_PLA = positions_PLA.reshape(1, positions_PLA.shape[0], -1)
        sets, length, axes = positions_PLA.shape
        vectors_RE = self.vectors(positions_PLA.reshape(-1, axes), deterministic=deterministic)
        return self.signal(vectors_RE.reshape(sets, length, -1), positions_PLA, shape=shape)

    def vectors(
        self, positions_RA: jax.Array, *, groups: Sequence[RowGroup] = (), deterministic: bool = True
    ) -> jax.Array:
        """Returns the vectors float32[R, E] of positions int32[R, A]; NaN for those past a stored table.

        Args:
          groups: what is known of the rows, in their order (`positions.prefixes`); () = nothing.
        """
        if self.table_sides:
            places = tuple(jnp.moveaxis(positions_RA // self.table_stride, -1, 0))
            return jnp.asarray(self.table).at[places].get(mode="fill", fill_value=jnp.nan)
        return self.encoder(positions_RA, sizes=self._sizes(positions_RA, groups), deterministic=deterministic)

    def _sizes(self, positions_RA: jax.Array, groups: Sequence[RowGroup]) -> tuple[int, ...] | None:
        """The bounds of shared prefixes, or None where nothing or little can be shared."""
        rows = positions_RA.shape[0]
        if not (self.share_prefixes and self.direction == "causal" and self.padding == "left") or self.mask_padding:
            return None
        if (
            not isinstance(rows, int) or self.axes * self.digits == 1
        ):  # a symbolic number of rows; nothing before a digit
            return None
        sizes = max_nodes_per_level(
            groups or [RowGroup(rows)],
            axes=self.axes,
            base=self.base,
            digits=self.digits,
            max_position=self.base**self.digits,
        )
        sizes = tuple(min(size, rows) for size in sizes)
        return sizes if sum(sizes) + sizes[-1] < MAX_SHARED_FRACTION * rows * (len(sizes) + 1) else None

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
            return PositionSignal(input_embedding=vectors_PLE)
        if self.mode == "rotary":
            heads = self.heads_model if self.per_head else 1
            sizes = (*vectors_PLE.shape[:-1], heads, vectors_PLE.shape[-1] // heads)
            sin, cos = jnp.split(vectors_PLE.reshape(sizes), 2, axis=-1)
            signal = PositionSignal(rotation=(cos, sin))
            return signal.for_heads(self.position_heads or self.heads_model, self.heads_model)
        pair = self.query_key(vectors_PLE)
        name = {"attn_add": "additive", "attn_mul": "multiplicative", "attn_scalar": "logit_query_key"}[self.mode]
        signal = PositionSignal(**{name: pair}, per_layer_fields=(name,) if self.qk == "multi" else ())
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

    def with_precomputed_table(self, sides: tuple[int, ...], step: int) -> "SeqPE":
        """Returns this encoding with a table of vectors in the encoder's place: of sides[a] positions, `step` apart."""
        return self.clone(table_sides=sides, table_stride=step)

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
            raise InputError(
                f"encoding.position_heads={self.position_heads} is more than model.heads={self.heads_model}"
            )
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
            raise InputError(
                f"encoding.mode='rotary' turns pairs: model.width / model.heads = {self.head_width} is odd"
            )
