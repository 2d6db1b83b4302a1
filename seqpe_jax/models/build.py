"""What a model is: an encoding of positions, a network, and the shapes that both are made for.

Nothing here reads data, computes a loss, or knows a mesh of devices. `ModelSpec.of(config, data_spec)` is the one way from
a config to a model; training, inference, exports and checkpoints of others all begin with it.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.axes import all_gather_params
from seqpe_jax.config import ADDED_PAIRS, Config, DataConfig, EncodingConfig, ModelConfig, digits_of, resolve_lengths
from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.encodings.bounds import ParamBounds
from seqpe_jax.encodings.composed import Composed
from seqpe_jax.encodings.fixed import LogScaling
from seqpe_jax.encodings.registry import ENCODINGS
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError
from seqpe_jax.models.gpt2 import GPT2
from seqpe_jax.models.transformer import TransformerConfig
from seqpe_jax.models.vit import ViT
from seqpe_jax.positions.grids import PositionGrid

Params = Any
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a model takes from its data where the config leaves it open; stored with a run, so that it opens without them.

    Attributes:
      vocabulary: rows of the token embedding; 0 for images.
      classes: logits of an image; 0 for text.
      channels: of an image.
      mean, std: per channel, in 0..1; what pixels were normalised with. Empty where nobody knows.
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
      inputs: shape and type of an example, [1, L] of tokens or [1, sides..., C] of images.
      shape: the window or grid that the model trains on, one int per coordinate axis.
      max_position: coordinates lie below, in units of the spacing.
      base: of the digits.
      heads: heads of the position vectors, or None where one vector serves them all.
      has_vectors: the encoding has vectors (SeqPE), which contrastive and distillation terms shape.
      spacing: where the places of windows and grids stand.
      max_grid: of an export, the positions that it serves along each axis; else None.
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
    def of(cls, config: Config, sizes: DataSpec) -> "ModelSpec":
        """Returns the specification of a config.

        Raises:
          InputError: fields of the encoding contradict each other or the model.
        """
        model, encoding = config.model, config.encoding
        inputs = jax.ShapeDtypeStruct((1, config.data.length), jnp.int32)
        if config.is_image:
            inputs = jax.ShapeDtypeStruct((1, *config.data.size, sizes.channels), jnp.float32)
        return cls(
            encoding=_encoding(config),
            network=_network(config, sizes),
            inputs=inputs,
            shape=config.grid,
            max_position=encoding.max_position * encoding.unit,
            base=encoding.base,
            heads=model.heads if encoding.per_head else None,
            has_vectors=encoding.kind == "seqpe",
            position_grid=position_grid_of(config),
        )

    @property
    def num_positions(self) -> int:
        """Positions of one training example."""
        return math.prod(self.shape)

    @property
    def is_image(self) -> bool:
        """Whether inputs are images or clips, else tokens."""
        return hasattr(self.network, "patch")

    @property
    def prefix(self) -> int:
        """Tokens before those that have positions: the class token of images."""
        return int(self.is_image)

    @property
    def encoder(self) -> SeqPE | None:
        """The part of the encoding that makes vectors of positions, or None."""
        return self._named if isinstance(self._named, SeqPE) else None

    @property
    def param_bounds(self) -> ParamBounds:
        """Bounds within which training keeps parameters of the encoding, by name."""
        return getattr(self._named, "PARAM_BOUNDS", {})

    @property
    def _named(self) -> nn.Module:
        """The part of the encoding that the config names."""
        return self.encoding.parts[0] if isinstance(self.encoding, Composed) else self.encoding

    def grid_of(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the positions along each axis of inputs of a shape [B, L] or [B, sides..., C]; may be symbolic."""
        if not self.is_image:
            return tuple(inputs[1:])
        return tuple(side // part for side, part in zip(inputs[1:-1], self.network.patch, strict=True))

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters {"encoding": ..., "model": ...}."""
        encoding, signal = self.init_encoding(key)
        params = {"encoding": encoding.get("params", {}), "model": {}}
        if self.network is not None:
            inputs = jnp.zeros(self.inputs.shape, self.inputs.dtype)
            params["model"] = self.network.init(stream(key, "model"), inputs, signal)["params"]
        return params

    def init_encoding(self, key: jax.Array) -> tuple[Any, PositionSignal]:
        """Returns fresh variables of the encoding, and its signal of the training grid; key: of the run."""
        positions_PLA = self.position_grid.positions(self.shape)[None]
        encoding: Any = self.encoding
        signal, variables = encoding.init_with_output(stream(key, "encoding"), positions_PLA, shape=self.shape)
        return variables, signal

    @functools.cached_property
    def shapes(self) -> Params:
        """Shapes and types of the parameters."""
        return jax.eval_shape(self.init, jax.ShapeDtypeStruct((2,), jnp.uint32))

    def encode(self, params: Params, *arguments: Any, **options: Any) -> Any:
        """Applies the encoding, or a method of it, with its parameters gathered where they are split for storage."""
        encoding = all_gather_params(params["encoding"], "encoding")
        return self.encoding.apply({"params": encoding}, *arguments, **options)

    def signal(self, params: Params, positions_PLA: jax.Array, shape: Shape) -> PositionSignal:
        """Returns the signal of windows or grids of a shape, without dropout."""
        return self.encode(params, positions_PLA, shape=shape)

    def logits(self, params: Params, inputs: jax.Array) -> jax.Array:
        """Returns logits, float32: [B, L, V] of tokens int32[B, L], [B, V] of images float32[B, sides..., C].

        Args:
          inputs: at the origin; sizes may be symbolic (`jax.export`).
        """
        shape = self.grid_of(inputs.shape)
        signal = self.signal(params, self.position_grid.positions(shape)[None], shape)
        return self.network.apply({"params": params["model"]}, inputs, signal)

    def with_precomputed_table(self, max_grid: Shape) -> "ModelSpec":
        """Returns this model as an export serves it: positions below `max_grid` alone, their vectors read from a table."""
        encoding = (
            self.encoding.with_precomputed_table(*self.position_grid.table_shape(max_grid))
            if self.has_vectors
            else self.encoding
        )
        return dataclasses.replace(self, encoding=encoding, max_grid=max_grid)


def stream(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of a named stream, the same in every process and version."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def dropout_key(key: jax.Array, random_bits: str) -> jax.Array:
    """Returns the key from which masks are drawn, given one of threefry, uint32[2].

    Args:
      random_bits: "threefry" (the key itself), or "rbg": bits of the device's own generator, which differ between kinds of
        devices; keys are split and folded as before.
    """
    if random_bits != "rbg":
        return key
    return jax.random.wrap_key_data(jnp.concatenate([key, jax.random.fold_in(key, 1)]), impl="rbg")


def model_flops(config: Config, vocabulary: int, *, tokens: int, training: bool) -> dict[str, float]:
    """Returns the floating-point operations that the network's matrix products need, the encoding's left out.

    Per token: 2 for each weight of a block (12 D^2 with an MLP of 4 D, D H of gates) and of the logits (D V), and 4 L D in
    each block for attention to all L keys. A training step needs three times as many: forward, and twice that backward.

    Args:
      tokens: read in all, as examples of the training size.

    Returns:
      By the name of the utilisation that they make: "mfu" counts half of the attention where it is causal, as MaxText does
      since 2025; "mfu_full_attention" counts all of it, as PaLM (arXiv 2204.02311, appendix B) and most reports before.
      For images, which are not causal, both are the same.
    """
    model, num_positions = config.model, int(np.prod(config.grid))
    width, mlp = model.width, model.mlp_width or 4 * model.width
    gates = 0 if config.encoding.gate == "none" else width * model.heads
    weights = model.layers * 2 * (4 * width**2 + 2 * width * mlp + gates) + 2 * width * vocabulary
    attention = model.layers * 4 * num_positions * width
    counted = {"mfu": attention if config.is_image else attention / 2, "mfu_full_attention": attention}
    return {name: float(tokens * (weights + part) * (3 if training else 1)) for name, part in counted.items()}


def check_encoding(config: Config) -> None:
    """Refuses an encoding that cannot serve the model and grid of a config, before any data are read.

    Raises:
      InputError: fields contradict each other.
    """
    _check_encoding(config.data, config.model, config.encoding)


@functools.lru_cache
def _check_encoding(data: DataConfig, model: ModelConfig, encoding: EncodingConfig) -> None:
    """Takes a moment, once for all runs that have the same of all three."""
    model_spec = ModelSpec.of(Config(data=data, model=model, encoding=encoding), DataSpec(1, 1))
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)  # a key itself would take the devices, which others may need
    jax.eval_shape(model_spec.init_encoding, key)


def position_grid_of(config: Config) -> PositionGrid:
    """Returns where the places of a config's windows and grids stand."""
    interpolated_sides = (0,) * (len(config.grid) - 2) + config.grid[
        -2:
    ]  # a longer clip goes on, a larger frame is read between
    return PositionGrid(config.encoding.unit, interpolated_sides if config.encoding.resize == "interpolate" else ())


def _network(config: Config, sizes: DataSpec) -> GPT2 | ViT:
    """Returns the network that a config names."""
    model, encoding = config.model, config.encoding
    transformer = TransformerConfig(
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        mlp_width=model.mlp_width,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        embedding_dropout=model.embedding_dropout,
        drop_path=model.drop_path if model.kind == "vit" else 0.0,
        activation=model.activation,
        layer_norm_epsilon=model.layer_norm_epsilon,
        init_std=model.init_std,
        remat=model.remat,
        attention_kind=model.attention_kind,
        attention_block=model.attention_block,
        scan=model.scan,
        dtype=jnp.dtype(config.precision.compute),
        gate="" if encoding.gate == "none" else encoding.gate,
        gate_bias_init=encoding.gate_bias_init,
    )
    if model.kind == "vit":
        return ViT(transformer, sizes.classes, model.patch)
    return GPT2(transformer, sizes.vocabulary, model.tied)


def _encoding(config: Config) -> nn.Module:
    """The encoding that a config names, combined with rotary pairs and log scaling, each for the heads that get it.

    Gates are no part of it: the network's blocks compute them from its tokens.

    Raises:
      InputError: more heads than there are, or pairs that cannot rotate beside the encoding.
    """
    model, encoding = config.model, config.encoding
    for name in ("position_heads", "rotary_heads"):
        if getattr(encoding, name) > model.heads:
            raise InputError(f"encoding.{name}={getattr(encoding, name)} is more than model.heads={model.heads}")
    offered = dataclasses.asdict(encoding) | {
        "digits": digits_of(encoding),
        "layers_model": model.layers,
        "width_model": model.width,
        "heads_model": model.heads,
        "axes": len(config.grid),
        "table_shape": config.grid,
        "prefix": int(config.is_image),
        "unit": encoding.unit,
        **resolve_lengths(config),
    }
    parts, max_grid = [_module(ENCODINGS[encoding.kind], offered)], [encoding.position_heads or model.heads]
    if encoding.kind == "seqpe":
        max_grid = [model.heads]  # it leaves out heads by itself, since it need not compute what they would get
    if encoding.kind in ADDED_PAIRS and encoding.rotary_pairs:
        _check_pairs(config)
        parts.append(_module(ENCODINGS["rotary_axial"], offered))  # on one axis, the same as rotary
        max_grid.append(encoding.rotary_heads or model.heads)
    if encoding.log_scaling:
        parts.append(_module(LogScaling, offered))
        max_grid.append(model.heads)
    return parts[0] if max_grid == [model.heads] else Composed(tuple(parts), model.heads, tuple(max_grid))


def _check_pairs(config: Config) -> None:
    """Refuses rotary pairs that cannot be added to an encoding. Raises: InputError."""
    encoding, axes = config.encoding, len(config.grid)
    width = config.model.width // config.model.heads
    if encoding.kind == "seqpe" and encoding.mode == "rotary":
        raise InputError(
            f"encoding.mode='rotary' and encoding.rotary_pairs={encoding.rotary_pairs} both turn queries and keys: "
            "choose another mode, or set encoding.rotary_pairs=0"
        )
    if width % 2:
        raise InputError(
            f"encoding.rotary_pairs={encoding.rotary_pairs}: model.width / model.heads = {width} must be even for "
            "columns to turn in pairs"
        )
    if width < 2 * axes:
        raise InputError(
            f"encoding.rotary_pairs={encoding.rotary_pairs} turns at least one pair per axis: model.width / "
            f"model.heads = {width} must be at least {2 * axes} for {axes} axes"
        )


def _module(kind: type, offered: dict[str, Any]) -> Any:
    """Returns a Flax module made of those values that are fields of its."""
    fields = {field.name for field in dataclasses.fields(kind)} - {"name", "parent"}
    return kind(**{name: value for name, value in offered.items() if name in fields})
