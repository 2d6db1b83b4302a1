"""Model specifications: a position encoding, a network, and the shapes that both are built for.

`ModelSpec.of(config, data_spec)` builds the model of a config, for training, inference, exports and converted checkpoints.
Data, losses and device meshes are not known here.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.axes import all_gather_params
from seqpe_jax.config import Config
from seqpe_jax.encodings.composed import Composed
from seqpe_jax.encodings.position_signal import ParamBounds, PositionSignal
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError
from seqpe_jax.models.attention_tpu import KernelBlocks
from seqpe_jax.models.decoder import Decoder
from seqpe_jax.models.transformer import TransformerConfig
from seqpe_jax.models.vit import ViT
from seqpe_jax.positions.grids import PositionGrid

Params = Any
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Sizes that a model takes from its data; stored with a run, so that it opens without the data.

    Attributes:
      vocabulary: rows of the token embedding; 0 for images.
      classes: logits of an image; 0 for text.
      channels: channels of an image.
      mean: per channel, in 0..1, subtracted from pixels; () = unknown.
      std: per channel, in 0..1, by which pixels are divided; () = unknown.
    """

    vocabulary: int = 0
    classes: int = 0
    channels: int = 3
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """An encoding and the network that reads its signal.

    Attributes:
      encoding: module of positions -> `PositionSignal`.
      network: module of (inputs, signal, deterministic) -> logits; None for an encoder of positions alone.
      inputs: shape and dtype of an example, [1, L] of tokens or [1, sides..., C] of images.
      shape: the window or grid that the model trains on, one int per coordinate axis.
      max_position: coordinates are below it, in units of the position grid.
      base: base of the digits.
      heads: heads of the position vectors; None = one vector serves all of them.
      has_vectors: whether the encoding has vectors (SeqPE), which contrastive and distillation losses shape.
      position_grid: positions of windows and grids.
      max_grid: largest window or grid that an export serves, one int per coordinate axis; None = not an export.
    """

    encoding: nn.Module
    network: Any
    inputs: jax.ShapeDtypeStruct
    shape: Shape
    max_position: int
    base: int = 10
    heads: int | None = None
    has_vectors: bool = True
    position_grid: PositionGrid = PositionGrid()
    max_grid: Shape | None = None

    @classmethod
    def of(cls, config: Config, data_spec: DataSpec) -> "ModelSpec":
        """Returns the specification of a config.

        Raises:
          InputError: fields of the encoding contradict each other or the model.
        """
        encoding = config.encoding
        inputs = jax.ShapeDtypeStruct((1, *config.grid), jnp.int32)
        if config.is_image:
            inputs = jax.ShapeDtypeStruct((1, *config.data.size, data_spec.channels), jnp.float32)
        return cls(
            encoding=encoding.build(config.dims),
            network=_network(config, data_spec),
            inputs=inputs,
            shape=config.grid,
            max_position=encoding.max_position * encoding.position_resolution,
            base=encoding.base,
            heads=config.model.heads if getattr(encoding, "per_head", False) else None,
            has_vectors=encoding.HAS_VECTORS,
            position_grid=position_grid_of(config),
        )

    @property
    def num_positions(self) -> int:
        """Positions of one training example."""
        return math.prod(self.shape)

    @property
    def is_image(self) -> bool:
        """True for inputs that are images or videos, False for tokens."""
        return hasattr(self.network, "patch")

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the positions: the class token of images, and registers."""
        return 1 + self.network.num_registers if self.is_image else 0

    @property
    def encoder(self) -> SeqPE | None:
        """SeqPE, which has vectors of positions, without the parts that it is combined with; None for other encodings."""
        return self._main_encoding if isinstance(self._main_encoding, SeqPE) else None

    @property
    def param_bounds(self) -> ParamBounds:
        """Bounds to which training limits parameters of the encoding, by name."""
        return getattr(self._main_encoding, "PARAM_BOUNDS", {})

    @property
    def _main_encoding(self) -> nn.Module:
        """The encoding of the config, without the parts that it is combined with."""
        return self.encoding.parts[0] if isinstance(self.encoding, Composed) else self.encoding

    def grid_of(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the positions along each axis of inputs of a shape [B, L] or [B, sides..., C]; may be symbolic."""
        if not self.is_image:
            return tuple(inputs[1:])
        return tuple(side // part for side, part in zip(inputs[1:-1], self.network.patch, strict=True))

    def init(self, key: jax.Array) -> Params:
        """Returns initial parameters {"encoding": ..., "model": ...}; key: of the run."""
        encoding, signal = self.init_encoding(key)
        params = {"encoding": encoding.get("params", {}), "model": {}}
        if self.network is not None:
            inputs = jnp.zeros(self.inputs.shape, self.inputs.dtype)
            params["model"] = self.network.init(stream(key, "model"), inputs, signal)["params"]
        return params

    def init_encoding(self, key: jax.Array) -> tuple[Any, PositionSignal]:
        """Returns initial variables of the encoding, and its signal of the training grid; key: of the run."""
        positions_PLA = self.position_grid.positions(self.shape)[None]
        encoding: Any = self.encoding
        signal, variables = encoding.init_with_output(stream(key, "encoding"), positions_PLA, shape=self.shape)
        return variables, signal

    @property
    def shapes(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return _shapes(self)

    def encode(self, params: Params, *arguments: Any, **options: Any) -> Any:
        """Applies the encoding, or a method of it; sharded parameters are gathered."""
        encoding = all_gather_params(params["encoding"], "encoding")
        return self.encoding.apply({"params": encoding}, *arguments, **options)

    def signal(self, params: Params, positions_PLA: jax.Array, shape: Shape) -> PositionSignal:
        """Returns the signal of windows or grids of a shape, without dropout."""
        return self.encode(params, positions_PLA, shape=shape)

    def logits(self, params: Params, inputs: jax.Array) -> jax.Array:
        """Returns the logits of inputs whose positions start at the origin, without dropout.

        Args:
          params: {"encoding": ..., "model": ...}.
          inputs: tokens int32[B, L] or images float32[B, sides..., C]; sizes may be symbolic (`jax.export`).

        Returns:
          float32[B, L, V] for tokens, [B, V] for images.
        """
        shape = self.grid_of(inputs.shape)
        signal = self.signal(params, self.position_grid.positions(shape)[None], shape)
        return self.network.apply({"params": params["model"]}, inputs, signal)

    def with_precomputed_table(self, max_grid: Shape) -> "ModelSpec":
        """Returns the model of an export: windows or grids up to `max_grid`, with vectors from a table."""
        encoding = (
            self.encoding.with_precomputed_table(*self.position_grid.table_shape(max_grid))
            if self.has_vectors
            else self.encoding
        )
        return dataclasses.replace(self, encoding=encoding, max_grid=max_grid)


@functools.lru_cache(maxsize=64)  # traced once for all runs and checkpoints of a model
def _shapes(model_spec: ModelSpec) -> Params:
    return jax.eval_shape(model_spec.init, jax.ShapeDtypeStruct((2,), jnp.uint32))


def stream(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of a named random stream, the same in every process and version."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def dropout_key(key: jax.Array, random_bits: str) -> jax.Array:
    """Returns the key of dropout masks.

    Args:
      key: threefry key, uint32[2].
      random_bits: "threefry" (the key itself), or "rbg": bits of the device's own generator, which differ between kinds of
        devices; keys are split and folded in as with threefry.
    """
    if random_bits != "rbg":
        return key
    return jax.random.wrap_key_data(jnp.concatenate([key, jax.random.fold_in(key, 1)]), impl="rbg")


def block_weights(config: Config) -> int:
    """Returns the weights of one block by which each token is multiplied, without those of norms and biases.

    Of D x D maps with H = G heads of width D / H and an MLP of 4 D that is 12 D^2; forget gates have D H, and M parabolas 2 M D H.
    """
    model, parts = config.model, config.model.parts
    attention = (2 * parts.heads + 2 * parts.kv_heads) * parts.head_width  # q and out, k and v
    gates = 0 if config.encoding.gate == "none" else parts.heads
    gates += 2 * config.encoding.resolved(config.dims).parabolas * parts.heads
    return model.width * (attention + (3 if parts.gated else 2) * parts.mlp_width + gates)


def keys_per_query(config: Config) -> tuple[float, float]:
    """Returns the keys that a query is compared with, summed over layers: (on average where attention is causal, at most)."""
    num_positions, parts = math.prod(config.grid), config.model.parts
    averages, most = 0.0, 0
    for layer in range(config.model.layers):
        keys = min(parts.window_of(layer) or num_positions, num_positions)
        averages += keys if not config.is_causal else keys - keys**2 / (2 * num_positions)
        most += keys
    return averages, most


def model_flops(config: Config, vocabulary: int, *, tokens: int, training: bool) -> dict[str, float]:
    """Returns the floating-point operations of the network's matrix products, without the encoding's.

    Per token: 2 for each weight of a block (`block_weights`) and of the logits (D V), and 4 H K in each block for each key that
    attention compares it with: all L, or those of a window. A training step needs three times as many: forward, and twice
    that backward.

    Args:
      config: config of the model.
      vocabulary: classes of the logits.
      tokens: processed in all, in examples of the training size.
      training: whether gradients are computed as well.

    Returns:
      By the name of the utilisation computed from it: "mfu" counts half of the attention where it is causal, as MaxText does
      since 2025; "mfu_full_attention" counts all of it, as PaLM (arXiv 2204.02311, appendix B) and most reports before.
      For images, which are not causal, both are the same.
    """
    model, parts = config.model, config.model.parts
    weights = 2 * (model.layers * block_weights(config) + model.width * vocabulary)
    counted = zip(("mfu", "mfu_full_attention"), keys_per_query(config), strict=True)
    attention = {name: 4 * parts.heads * parts.head_width * keys for name, keys in counted}
    return {name: float(tokens * (weights + part) * (3 if training else 1)) for name, part in attention.items()}


def check_encoding(config: Config) -> None:
    """Refuses an encoding that does not fit the model and grid of a config, before any data are read.

    Raises:
      InputError: fields contradict each other.
    """
    config.encoding.build(config.dims)


def matmul_precision(config: Config) -> str:
    """Returns the precision of the network's products, which is read for float32 arrays alone; kernels refuse it for others."""
    return config.precision.matmul if config.precision.compute == "float32" else "default"


def position_grid_of(config: Config) -> PositionGrid:
    """Returns the positions of a config's windows and grids."""
    resolution, grid = config.encoding.position_resolution, config.grid
    if config.encoding.resize == "extrapolate":
        return PositionGrid(resolution)
    return PositionGrid(resolution, (0,) * (len(grid) - 2) + grid[-2:])  # frames of a video are never interpolated


def _network(config: Config, data_spec: DataSpec) -> Decoder | ViT:
    """The network of a config. Raises: InputError: the sizes of its data leave no model."""
    model, encoding = config.model, config.encoding
    for name in ("classes", "channels") if model.kind == "vit" else ("vocabulary",):
        if getattr(data_spec, name) < 1:
            raise InputError(
                f"the data of model.kind='{model.kind}' have {name}={getattr(data_spec, name)}, and it needs at least 1: "
                "sizes.json of the run is not that of its config.json"
            )
    parts = dataclasses.asdict(model.parts)
    if parts["attention_scale"] == model.parts.head_width**-0.5:
        parts["attention_scale"] = None  # attention divides by sqrt(K), as it always has
    transformer = TransformerConfig(
        layers=model.layers,
        width=model.width,
        **parts,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        embedding_dropout=model.embedding_dropout,
        drop_path=model.drop_path if model.kind == "vit" else 0.0,
        layer_scale=model.layer_scale if model.kind == "vit" else 0.0,
        layer_norm_epsilon=model.layer_norm_epsilon,
        init_std=model.init_std,
        remat=model.remat,
        attention_kind=model.attention_kind,
        attention_block=model.attention_block,
        kernel_blocks=KernelBlocks(
            model.kernel_block_q, model.kernel_block_k, model.kernel_block_q_backward, model.kernel_block_k_backward
        ),
        context_attention=config.mesh.context_attention,
        scan=model.scan,
        causal=config.is_causal,
        dtype=jnp.dtype(config.precision.compute),
        matmul_precision=matmul_precision(config),
        gate="" if encoding.gate == "none" else encoding.gate,
        gate_bias_init=encoding.gate_bias_init,
        gate_start_at_zero=encoding.gate != "none" and encoding.start_at_zero,
        parabolas=encoding.resolved(config.dims).parabolas,
    )
    if model.kind == "vit":
        return ViT(transformer, data_spec.classes, model.patch, model.pooling, model.registers)
    return Decoder(transformer, data_spec.vocabulary, model.tied)
