"""SeqPE: encodes the digit string of a position with a small transformer into an embedding used in attention.

With mode "input_add" the embedding is added to the input instead.

Source: arXiv 2506.13277 section 3, and the released code's conventions (CLS last and without a digit-index embedding, the
qk map's output [query half | key half]).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.axes import BATCH, LENGTH, POSITIONS, shard_map
from seqpe_jax.config import ModelDims, SeqPEConfig
from seqpe_jax.encodings.digit_encoder import DigitEncoder, initializer
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.positions.prefix_trie import PositionStructure, max_nodes_per_level

MAX_SHARED_FRACTION = 0.8  # use the trie only if it leaves at most this fraction of the encoder tokens


class QKMap(nn.Module):
    """Projects a position embedding to position queries and keys, with one linear map or one per layer.

    Attributes:
      layers: number of maps; None = a single one without a layer axis.
      kernel_init: initializer of the weights.
      part_width: width of the position query, and of the key, of all heads together.
    """

    layers: int | None
    kernel_init: nn.initializers.Initializer
    part_width: int

    @nn.compact
    def __call__(self, vectors: jax.Array, per_sample: bool = False) -> jax.Array:
        """Returns [(layers,) ..., 2 * part_width] of vectors [..., E]: query half, then key half.

        Args:
          vectors: position embeddings.
          per_sample: whether they are [B, L, E], those of each sample of a batch.
        """
        lead = () if self.layers is None else (self.layers,)
        kernel = self.param("kernel", self.kernel_init, (*lead, vectors.shape[-1], 2 * self.part_width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (*lead, 2 * self.part_width), jnp.float32)
        names = (BATCH, LENGTH, None) if per_sample else (*(None,) * (vectors.ndim - 2), POSITIONS, None)
        # Each device maps its own positions, so that the gradient of the kernel is summed as it is stored.
        product = shard_map(
            _apply_qk_map, (vectors,), (names,), params={"qk_map": {"kernel": kernel, "bias": bias}}, root="encoding"
        )
        return product if self.layers is None else jnp.moveaxis(product, -2, 0)


def _apply_qk_map(vectors: jax.Array, params: Any) -> jax.Array:
    """Returns [..., (layers,) 2 * part_width] of vectors [..., E]."""
    kernel, bias = params["qk_map"]["kernel"], params["qk_map"]["bias"]
    return jnp.tensordot(vectors, kernel, ((-1,), (-2,))) + bias


class SeqPE(nn.Module):
    """The sequential position encoding: digits -> embedding vectors -> PositionSignal.

    Attributes:
      config: encoding section of the config.
      dims: sizes of the model. Each prefix token, such as a class token, has a learned embedding, which only `signal` uses
        (the reference's `cls_token_pos_embed`).
      table_sides: shape (without E) of a precomputed embedding table that replaces the encoder at inference; () = use the
        encoder.
      table_stride: distance in fixed-point units between neighboring table entries.
    """

    config: SeqPEConfig
    dims: ModelDims
    table_sides: tuple[int, ...] = ()
    table_stride: int = 1

    @property
    def vector_width(self) -> int:
        """Width of a position embedding."""
        return self.config.vector_width(self.dims)

    def setup(self) -> None:
        """Creates the digit encoder or the table, and the qk map if `config.qk` asks for one."""
        config, dims = self.config, self.dims
        config.check_dims(dims)
        if self.table_sides:
            sizes = (*self.table_sides, self.vector_width)
            self.table = self.param("table", nn.initializers.zeros, sizes, jnp.float32)
        else:
            self.encoder = DigitEncoder(config, dims.axes, self.vector_width)
        if config.qk in ("single", "multi"):
            width = config.feature_width or self.vector_width // (dims.heads if config.per_head else 1)
            layers = dims.layers if config.qk == "multi" else None
            self.qk_map = QKMap(layers, initializer(config, config.qk_init_std), self._num_heads * width)
        if dims.prefix_tokens:
            sizes = (dims.prefix_tokens, self.vector_width)
            self.prefix_vectors = self.param("prefix_vectors", initializer(config, config.init_std), sizes, jnp.float32)

    @classmethod
    def for_model(
        cls, *, layers: int, width: int, heads: int, max_position: int, axes: int = 1, base: int = 10, **options: Any
    ) -> "SeqPE":
        """Returns an encoding for your own transformer, configured as in the recipes.

            encoding = SeqPE.for_model(layers=2, width=96, heads=4, max_position=10_000)
            params = encoding.init(key, jnp.arange(64))
            signal = encoding.apply(params, jnp.arange(1024))  # 16 times as long; give layer i signal.at_layer(i)

        Args:
          layers: number of layers of the model; the digit encoder has two layers.
          width: width of the model and of the digit encoder.
          heads: number of heads of the model and of the digit encoder.
          max_position: exclusive limit of coordinates; it sets the number of digits.
          axes: coordinates of a position: 1 for text, 2 for images, 3 for videos.
          base: base of the digits.
          options: any further field of `SeqPEConfig`.

        Raises:
          InputError: fields contradict each other or the model.
        """
        # Small encoders need larger initial weights than the paper's 0.02, or they stay untrained.
        std = 0.02 if width >= 512 else 0.1
        fields: dict[str, Any] = {"qk": "multi", "dropout": 0.0, "init_std": std, "qk_init_std": std}
        fields |= {"max_position": max_position, "base": base, "width": width, "heads": heads} | options
        config = SeqPEConfig(**fields)
        config.check(axes)
        return cls(config, ModelDims(layers, width, heads, grid=(max_position,) * axes))

    def __call__(
        self, positions_PLA: jax.Array, *, shape: tuple[int, ...] = (), deterministic: bool = True
    ) -> PositionSignal:
        """Returns the signal of positions int32[P, L, A], or of one set, int32[L, A] or int32[L]; `shape` is ignored."""
        if positions_PLA.ndim < 3:
            positions_PLA = positions_PLA.reshape(1, positions_PLA.shape[0], -1)
        sets, length, axes = positions_PLA.shape
        vectors_RE = self.vectors(positions_PLA.reshape(-1, axes), deterministic=deterministic)
        return self.signal(vectors_RE.reshape(sets, length, -1), positions_PLA, shape=shape)

    def vectors(
        self, positions_RA: jax.Array, *, structures: Sequence[PositionStructure] = (), deterministic: bool = True
    ) -> jax.Array:
        """Returns the embedding vectors of positions.

        Args:
          positions_RA: int32[R, A].
          structures: `PositionStructure` of consecutive rows; () = no known structure.
          deterministic: whether dropout is off.

        Returns:
          float32[R, E]; NaN for positions past a precomputed table.
        """
        if self.table_sides:
            indices = tuple(jnp.moveaxis(positions_RA // self.table_stride, -1, 0))
            return jnp.asarray(self.table).at[indices].get(mode="fill", fill_value=jnp.nan)
        max_nodes = self._max_nodes(positions_RA, structures)
        with jax.default_matmul_precision(self.config.matmul_precision):
            return self.encoder(positions_RA, max_nodes=max_nodes, deterministic=deterministic)

    def _max_nodes(self, positions_RA: jax.Array, structures: Sequence[PositionStructure]) -> tuple[int, ...] | None:
        """Nodes per level of a trie of shared prefixes; None if the trie would save little or nothing."""
        config, rows = self.config, positions_RA.shape[0]
        shareable = config.share_prefixes and config.direction == "causal" and config.padding == "left"
        if not shareable or config.mask_padding:
            return None
        if not isinstance(rows, int) or self.dims.axes * config.num_digits == 1:  # symbolic rows; single digits
            return None
        sizes = max_nodes_per_level(
            structures or [PositionStructure(rows)],
            axes=self.dims.axes,
            base=config.base,
            digits=config.num_digits,
            max_position=config.base**config.num_digits,
        )
        sizes = tuple(min(size, rows) for size in sizes)
        return sizes if sum(sizes) + sizes[-1] < MAX_SHARED_FRACTION * rows * (len(sizes) + 1) else None

    def signal(
        self,
        vectors_PLE: jax.Array,
        positions_PLA: jax.Array | None = None,
        *,
        shape: tuple[int, ...] = (),
        per_sample: bool = False,
    ) -> PositionSignal:
        """Returns the PositionSignal of prefix + L tokens from embedding vectors float32[P, L, E].

        Args:
          vectors_PLE: embedding vectors.
          positions_PLA: ignored here; other parts of a combined encoding use them.
          shape: ignored here.
          per_sample: whether there is a set for each sample of a batch, sharded as the batch is.
        """
        config, dims = self.config, self.dims
        if dims.prefix_tokens:
            sets, _, width = vectors_PLE.shape
            first_PLE = jnp.broadcast_to(self.prefix_vectors, (sets, dims.prefix_tokens, width))
            vectors_PLE = jnp.concatenate([first_PLE, vectors_PLE], axis=1)
        if config.mode == "input_add":
            return PositionSignal(input_embedding=vectors_PLE)
        if config.mode == "rotary":
            heads = dims.heads if config.per_head else 1
            sizes = (*vectors_PLE.shape[:-1], heads, vectors_PLE.shape[-1] // heads)
            sin, cos = jnp.split(vectors_PLE.reshape(sizes), 2, axis=-1)
            signal = PositionSignal(rotation=(cos, sin))
        else:
            pair = self.query_key(vectors_PLE, per_sample)
            name = {"attn_add": "additive", "attn_mul": "multiplicative", "attn_scalar": "position_query_key"}[
                config.mode
            ]
            signal = PositionSignal(**{name: pair}, per_layer_fields=(name,) if config.qk == "multi" else ())
        return signal.for_heads(config.position_heads or dims.heads, dims.heads)

    def query_key(self, vectors: jax.Array, per_sample: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns position queries and keys, each float32[(layers,) ..., position heads or 1, F], of vectors [..., E].

        For `per_sample` see `QKMap`. In mode attn_scalar queries are scaled by s / sqrt(head width), so that the dot product
        is a final attention logit.
        """
        config = self.config
        if config.qk != "none":
            with jax.default_matmul_precision(config.matmul_precision):
                query, key = jnp.split(self.qk_map(vectors, per_sample), 2, axis=-1)
        elif self.dims.compat.qk_halves:
            query, key = jnp.split(vectors, 2, axis=-1)
        else:
            query = key = vectors
        parts = self.dims.heads if config.qk == "none" and config.per_head else self._num_heads
        sizes = (*query.shape[:-1], parts, query.shape[-1] // parts)
        query, key = (part.reshape(sizes)[..., : self._num_heads, :] for part in (query, key))
        if config.mode == "attn_scalar":
            query = query * (config.scalar_scale / math.sqrt(self.dims.head_width))
        return query, key

    def with_precomputed_table(self, sides: tuple[int, ...], stride: int) -> "SeqPE":
        """Returns a copy whose encoder is replaced by a table of `sides` embeddings, one every `stride` fixed-point units."""
        return self.clone(table_sides=sides, table_stride=stride)

    @property
    def _num_heads(self) -> int:
        """Number of heads with separate position queries and keys; 1 = shared by all heads."""
        return (self.config.position_heads or self.dims.heads) if self.config.per_head else 1
