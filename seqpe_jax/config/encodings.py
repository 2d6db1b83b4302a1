"""The encoding section of a config: one class for each encoding, with its fields, capabilities and builder.

A new encoding is a subclass of `EncodingConfig`, an entry in `ENCODINGS` and a Flax module that holds the config and
`ModelDims`. Flax modules are named here and imported when they are built, so that reading a config imports no JAX.
"""

import dataclasses
import functools
import importlib
import math
import re
import typing
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from seqpe_jax.config import limits
from seqpe_jax.config.decoder_presets import by_layer
from seqpe_jax.errors import InputError
from seqpe_jax.positions.counting import count_digits, largest_position

Gate = Literal["none", "forget", "cable"]
Axes = Literal["1", "2+", "any"]
Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]
# Published names of the kind `none` with a gate: FoX (arXiv 2503.02130) and CABLE (arXiv 2503.08067).
GATED = {"fox": "forget", "cable": "cable"}

T5_BUCKETS = 32  # Raffel et al. 2020 (arXiv 1910.10683, section 2.1)
T5_SHARE = 128 / 512  # distances up to 128 at a training length of 512 (the same, sections 2.1 and 3.1.2)
FIRE_SHARE = 512 / 2048  # threshold 512 at a training length of 2048 (Li et al. 2024, arXiv 2310.04418)
FIRE_SCALE = 0.1 * 2048  # c = 0.1 per token at that length
ROPE_ID_FASTEST = 32 / 4096  # a turn every 32 tokens at a training length of 4096 (Wertheimer et al. 2026, 2603.18017)
ROPE_ID_SLOWEST = 1 / 2  # two turns within the training length (the same)
YARN_BETA_FAST = 32.0  # rotations within the training window (Peng et al. 2023, arXiv 2309.00071, section 3.2)
# Scalings of rotary frequencies that a fixed factor describes, as checkpoints hold it; without one, the window's length does.
FACTOR_SCALINGS = ("linear", "ntk", "yarn", "llama3")
WINDOW_SCALINGS = ("dynamic", "longrope")  # their frequencies depend on the window's length also with a factor
PARABOLA_SHARE = 50 / 64  # of the columns of a head (Ohrstrom et al. 2026, arXiv 2602.01418)
DIRECTED_SHARE = 8 / 12  # of the heads (Fuller et al. 2024, arXiv 2405.13985)


@dataclasses.dataclass(frozen=True)
class CompatConfig:
    """Behaviour of the PyTorch reference that its checkpoints were trained with; `convert` sets it, and no config file.

    Each field belongs to one kind of encoding, and is refused with others.
    """

    qk_halves: bool = limits.field(False, "the halves of a vector are its query and key parts", kind="seqpe")
    flatten: bool = limits.field(False, "grids have one axis for all patches, row-major", kind="sinusoidal")
    reference_scramble: bool = limits.field(False, "heads and positions of rotations mixed up", kind="rotary_mixed")
    reference_scaling: bool = limits.field(False, "slopes over sqrt(head width)", kind="alibi")

    def check(self, kind: str) -> None:
        """Refuses behaviour of another encoding. Raises: InputError: names the field."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) and kind != field.metadata["kind"]:
                raise InputError(
                    f"compat.{field.name} is for encoding.kind='{field.metadata['kind']}', and this is '{kind}': leave it "
                    "out"
                )


@dataclasses.dataclass(frozen=True)
class ModelDims:
    """Sizes of the model, and of the window or grid that it trains on, for which an encoding is built.

    Attributes:
      layers: number of blocks.
      width: features per token.
      heads: attention heads per block.
      grid: positions of the training window or grid along each axis.
      prefix_tokens: number of leading tokens without a position, such as a class token.
      compat: behaviour of the PyTorch reference, for its checkpoints.
      head_width: features of one head; 0 = width / heads.
    """

    layers: int
    width: int
    heads: int
    grid: tuple[int, ...] = (1,)
    prefix_tokens: int = 0
    compat: CompatConfig = CompatConfig()
    head_width: int = 0

    def __post_init__(self) -> None:
        """Fills in the features of a head."""
        object.__setattr__(self, "head_width", self.head_width or self.width // self.heads)

    @property
    def axes(self) -> int:
        """Coordinates of a position: 1 for text, 2 for images, 3 for videos."""
        return len(self.grid)

    @property
    def num_positions(self) -> int:
        """Positions of the training window or grid."""
        return math.prod(self.grid)

    @property
    def length(self) -> float:
        """Length of the training window in tokens, or the diagonal of the training grid in patches."""
        return math.hypot(*self.grid)


def _field(default: Any, doc: str = "", **metadata: Any) -> Any:
    """Returns a field of an encoding, with limits (`config.limits`) as metadata."""
    return limits.field(default, doc=doc, **metadata)


def _kind(name: str) -> Any:
    """Returns the constant field `kind` of an encoding."""
    return dataclasses.field(default=name, init=False)


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
    """The encoding section of a config; an encoding subclasses it.

    Attributes of the class:
      MODULE: the Flax module, as "package.module:Class"; it takes the config and `ModelDims`.
      SUMMARY: one sentence on the encoding, for the documentation.
      SOURCE: the paper.
      AXES: number of coordinates of the positions it supports.
      CAUSAL_ONLY: it supports causal attention only.
      REAL_POSITIONS: positions may be fractional.
      PER_LAYER: its signal can differ by layer.
      HAS_VECTORS: it has position embeddings, which the contrastive and distillation losses train.
      SHIFT_INVARIANT: logits depend on differences of positions alone, so that moving all positions changes nothing.
      STARTS_AT_ZERO: it can begin without an effect (`start_at_zero`).
      REQUIRES: {field: (other_field, required_value)}: `field` is ignored unless `other_field == required_value`; a tuple means
        any of its values, None any non-default value. Map a field to None to drop an inherited requirement.
    """

    MODULE: ClassVar[str] = ""
    SUMMARY: ClassVar[str] = ""
    SOURCE: ClassVar[str] = ""
    AXES: ClassVar[Axes] = "any"
    CAUSAL_ONLY: ClassVar[bool] = False
    REAL_POSITIONS: ClassVar[bool] = True
    PER_LAYER: ClassVar[bool] = False
    HAS_VECTORS: ClassVar[bool] = False
    SHIFT_INVARIANT: ClassVar[bool] = False
    STARTS_AT_ZERO: ClassVar[bool] = False
    REQUIRES: ClassVar[dict[str, tuple[str, Any] | None]] = {}

    # Values for encodings that lack the field. Without annotations these are class attributes, not dataclass fields.
    max_position = 20000
    base = 10
    fraction_digits = 0
    resize = "extrapolate"
    position_heads = 0
    rotary_pairs = 0
    rotary_heads = 0
    rotary_layers = ()
    rotary_share = 1.0
    layers_with = ()
    parabolas = 0
    gate = "none"
    gate_bias_init = 0.0
    start_at_zero = False

    kind: str = _kind("")
    log_scaling: bool = _field(
        False, "queries that see more keys than in training are multiplied by the logarithm of their number"
    )

    @property
    def position_resolution(self) -> int:
        """Units of a position's fixed-point number in one token or patch."""
        return self.base**self.fraction_digits

    def rotary_width(self, head_width: int) -> int:
        """Returns the columns of a head that rotary frequencies are computed for, the first ones."""
        return int(head_width * self.rotary_share)

    @property
    def name(self) -> str:
        """Name of the encoding in reports, such as "alibi", "fox" or "seqpe+forget"."""
        return encoding_name(self.kind, self.gate)

    @property
    def real_positions(self) -> bool:
        """True where positions may be fractional."""
        return self.REAL_POSITIONS

    @property
    def reset_fields(self) -> tuple[str, ...]:
        """Fields of the position signal that change where positions begin anew within a window; the others do not show it."""
        if self.SHIFT_INVARIANT:
            return ("multiplicative",)  # of queries that see more keys than in training
        return "input_embedding", "rotation", "multiplicative", "additive", "position_query_key", "relative_bias"

    @property
    def knows_positions(self) -> bool:
        """True where anything depends on positions."""
        return True

    @property
    def window_dependence(self) -> str:
        """Field by which a token's signal depends on the length of its window, past the training length.

        Returns:
          The field with its value, such as "encoding.scaling='yarn'"; "" where a token has one signal in all windows.
        """
        return "encoding.resize='interpolate'" if self.resize == "interpolate" else ""

    def one_signal_until(self, trained: int) -> int:
        """Returns the length of the longest window whose tokens have the same signal as in shorter ones.

        Args:
          trained: tokens of the training window.
        """
        return trained

    @classmethod
    def has(cls, field: str) -> bool:
        """Returns whether the encoding has a field."""
        return field in limits.fields_of(cls)

    @classmethod
    def requires(cls) -> dict[str, tuple[str, Any]]:
        """Returns the merged `REQUIRES` of the class and its base classes."""
        found: dict[str, Any] = {}
        for one in reversed(cls.__mro__):
            found |= vars(one).get("REQUIRES", {})
        return {name: needed for name, needed in found.items() if needed}

    def without_effect(self) -> dict[str, tuple[str, Any]]:
        """Returns the fields that are ignored now, with the (other_field, required_value) of each."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}

        def is_met(other: str, value: Any) -> bool:
            own = getattr(self, other)
            return own != defaults[other] if value is None else own in (value if isinstance(value, tuple) else (value,))

        return {name: need for name, need in self.requires().items() if not is_met(*need)}

    def idle_options(self) -> dict[str, str]:
        """Returns fields that a config file may set beforehand, but that have no effect now, with the setting they need."""
        return {}

    def check(self, axes: int) -> None:
        """Refuses fields that contradict each other, or an encoding that does not support the number of axes.

        Raises:
          InputError: names the fields.
        """
        if self.AXES == "1" and axes > 1:
            raise InputError(
                f"encoding.kind='{self.kind}' is for text, and these positions have {axes} axes: choose one of "
                f"{', '.join(kinds_for(axes))}"
            )
        if self.AXES == "2+" and axes == 1:
            raise InputError(
                f"encoding.kind='{self.kind}' is for images, and these positions have one axis: choose one of "
                f"{', '.join(kinds_for(axes))}"
            )
        if self.gate != "none" and axes > 1:
            raise InputError(
                f"encoding.gate='{self.gate}' needs tokens in causal order, and images have none: set "
                "encoding.gate='none', or choose another variant than fox and cable"
            )

    def real_positions_on(self, axes: int) -> bool:
        """Returns whether positions with this number of axes may be fractional."""
        return self.real_positions

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses an encoding that does not fit a model. Raises: InputError: names the fields."""
        dims.compat.check(self.kind)
        for name in ("position_heads", "rotary_heads"):
            if getattr(self, name) > dims.heads:
                raise InputError(f"encoding.{name}={getattr(self, name)} is more than model.heads={dims.heads}")

    def resolved(self, dims: ModelDims) -> "EncodingConfig":
        """Replaces every 0 (automatic) length by its value for this model.

        A length that the authors of an encoding chose in tokens is scaled by the ratio of the training lengths, this
        model's to theirs.
        """
        return self

    def make_module(self, dims: ModelDims) -> Any:
        """Returns the Flax module of the encoding by itself."""
        return _imported(self.MODULE)(self.resolved(dims), dims)

    def build(self, dims: ModelDims) -> Any:
        """Returns the Flax module of the encoding, with the parts that it is combined with.

        Raises:
          InputError: fields contradict each other, or do not fit the model.
        """
        self.check(dims.axes)
        self.check_dims(dims)
        return _imported("seqpe_jax.encodings.composed:combined")(self, dims)


def _imported(name: str) -> Any:
    """Returns an object given as "package.module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclasses.dataclass(frozen=True)
class _Positions(EncodingConfig):
    """Fields of encodings of numeric positions."""

    max_position: int = _field(20000, "training draws positions along an axis below it", low=1, high=2**30)
    base: int = _field(10, "base of the digits of a position", low=2, high=36)
    fraction_digits: int = _field(0, "digits after the point; 0 = positions are integers", low=0, high=30)
    resize: Literal["extrapolate", "interpolate"] = _field(
        "extrapolate", "larger windows and grids continue past the trained positions, or lie between them"
    )


@dataclasses.dataclass(frozen=True)
class _Heads(EncodingConfig):
    """Field of encodings that can be limited to some heads."""

    position_heads: int = _field(
        0, "the first heads that get the encoding, the others see no position; 0 = all", **limits.OPTIONAL_HEADS
    )


FLAGS: dict[str, Any] = {"low": 0, "high": 1}


@dataclasses.dataclass(frozen=True)
class _Layers(EncodingConfig):
    """Field of encodings that can be limited to some layers."""

    layers_with: tuple[int, ...] = _field(
        (),
        "1 or 0 for each layer: whether it gets the encoding; fewer flags are a pattern that repeats, () = all layers do",
        **FLAGS,
    )

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses flags that are no pattern of the model's layers. Raises: InputError."""
        super().check_dims(dims)
        _check_flags("layers_with", self.layers_with, dims.layers)


def _check_flags(name: str, flags: tuple[int, ...], layers: int) -> None:
    """Refuses more flags than layers, and flags without a 1.

    Args:
      name: field of the encoding.
      flags: its value.
      layers: layers of the model.

    Raises:
      InputError: names the field.
    """
    if len(flags) > layers:
        raise InputError(
            f"encoding.{name} has {len(flags)} flags, and model.layers={layers}: give at most one for each layer"
        )
    if flags and 1 not in by_layer(flags, layers):
        raise InputError(f"encoding.{name}={flags} leaves no layer with positions: set at least one of its flags to 1")


@dataclasses.dataclass(frozen=True)
class _StartAtZero(EncodingConfig):
    """Field of encodings that can be added to a trained model."""

    start_at_zero: bool = _field(
        False,
        "the encoding and its gate are multiplied by learned factors that start at 0, so that a trained model first computes "
        "what it did without them; rotary pairs are not",
    )

    def start_scale_shape(self, dims: ModelDims) -> tuple[int, ...]:
        """Returns the shape of the factors of the encoding, without its gate: (layers, heads) where its signal differs by layer."""
        return (dims.layers, dims.heads) if self.PER_LAYER else (dims.heads,)


@dataclasses.dataclass(frozen=True)
class _WithForgetGate(_StartAtZero):
    """Fields of encodings of text that can be combined with a forget gate on attention logits."""

    REQUIRES: ClassVar[dict[str, Any]] = {"gate_bias_init": ("gate", None), "start_at_zero": ("gate", None)}

    gate: Gate = _field("none", "data-dependent decay of attention logits: FoX forget gate or CABLE gate")
    gate_bias_init: float = _field(
        0.0, "initial gate bias; the initial forget gate is sigmoid(gate_bias_init)", low=-100.0, high=100.0
    )


_THETA: dict[str, Any] = {"low": 1.0, "high": 1e12}


@dataclasses.dataclass(frozen=True)
class _RoPEScaling(EncodingConfig):
    """Fields of rotary pairs that checkpoints have: a share of each head, and frequencies scaled for longer windows.

    The formulas are in `encodings.rope`, Hugging Face's names for the fields in `interop.hf_rope`.
    """

    REQUIRES: ClassVar[dict[str, Any]] = {
        "scaling_factor": ("scaling", FACTOR_SCALINGS + WINDOW_SCALINGS),
        "original_length": ("scaling", FACTOR_SCALINGS + WINDOW_SCALINGS),
        "attention_factor": ("scaling", ("yarn", "longrope")),
        "yarn_beta_fast": ("scaling", "yarn"),
        "yarn_beta_slow": ("scaling", "yarn"),
        "yarn_ramp": ("scaling", "yarn"),
        "yarn_truncate": ("yarn_ramp", "pairs"),
        "yarn_mscale": ("scaling", "yarn"),
        "yarn_mscale_all_dim": ("scaling", "yarn"),
        "low_freq_factor": ("scaling", "llama3"),
        "high_freq_factor": ("scaling", "llama3"),
        "short_factor": ("scaling", "longrope"),
        "long_factor": ("scaling", "longrope"),
    }

    rotary_share: float = _field(
        1.0,
        "share of a head's columns, the first ones, that rotate, with the frequencies of a head of that width (GPT-NeoX)",
        low=1e-3,
        high=1.0,
    )
    scaling: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"] = _field(
        "none", "scaling of rotary frequencies for windows longer than in training"
    )
    scaling_factor: float = _field(
        0.0,
        "factor of the scaling, at every length, as checkpoints hold it; 0 = the length of a longer window over "
        "original_length",
        zero=True,
        low=1.0,
        high=1e6,
    )
    original_length: int = _field(
        0, "tokens of the window before the scaling; 0 = the training window", **limits.OPTIONAL_LENGTH
    )
    attention_factor: float = _field(
        0.0,
        "yarn, longrope: factor of rotated queries and keys; 0 = as the factor of the scaling demands",
        zero=True,
        low=1e-3,
        high=1e3,
    )
    yarn_beta_fast: float = _field(
        0.0,
        "rotations from which on a pair stays; 0 = the authors' 32, at most those of the fastest pair",
        zero=True,
        low=1e-3,
        high=1e6,
    )
    yarn_beta_slow: float = _field(1.0, "rotations up to which a pair is interpolated", low=1e-3, high=1e6)
    yarn_ramp: Literal["rotations", "pairs"] = _field(
        "rotations", "between the two betas pairs are blended by their rotations (paper) or their index (checkpoints)"
    )
    yarn_truncate: bool = _field(True, "yarn_ramp=pairs: the blend begins and ends at whole pairs, outward")
    yarn_mscale: float = _field(
        0.0,
        "numerator's m of attention_factor (0.1 m ln f + 1) / (0.1 m' ln f + 1); 0 = no such fraction",
        **limits.WEIGHT,
    )
    yarn_mscale_all_dim: float = _field(0.0, "m' of its denominator", **limits.WEIGHT)
    low_freq_factor: float = _field(
        1.0, "rotations in original_length up to which a pair is interpolated", low=1e-3, high=1e6
    )
    high_freq_factor: float = _field(4.0, "rotations in original_length from which on a pair stays", low=1e-3, high=1e6)
    short_factor: tuple[float, ...] = _field(
        (), "divisors of the frequencies of each pair, in windows up to original_length", low=1e-6, high=1e6
    )
    long_factor: tuple[float, ...] = _field((), "divisors of the same in longer windows", low=1e-6, high=1e6)

    @property
    def rotates(self) -> bool:
        """True where pairs rotate: else their fields, which older versions stored for all encodings, are not read."""
        return True

    @property
    def has_rotation_scaling(self) -> bool:
        """True where rotated queries and keys themselves are multiplied, as checkpoints mean it, not all of their columns."""
        return self.scaling_factor > 0 or self.scaling == "longrope"

    @property
    def scales_by_window(self) -> bool:
        """True where frequencies depend on the length of the window."""
        by_window = self.scaling in WINDOW_SCALINGS or (self.scaling in FACTOR_SCALINGS and not self.scaling_factor)
        return self.rotates and by_window

    @property
    def window_dependence(self) -> str:
        """`resize` or `scaling`."""
        return super().window_dependence or (f"encoding.scaling='{self.scaling}'" if self.scales_by_window else "")

    def one_signal_until(self, trained: int) -> int:
        """Returns the length up to which frequencies are those of training."""
        longest = super().one_signal_until(trained)
        if not self.scales_by_window:
            return longest
        own = self.original_length or trained
        return min(own, longest) if super().window_dependence else own

    def check(self, axes: int) -> None:
        """Refuses fields of a scaling that contradict each other, or lack their partner. Raises: InputError."""
        super().check(axes)
        if not self.rotates:
            return
        fast, slow = self.yarn_beta_fast, self.yarn_beta_slow
        if fast and fast <= slow:
            raise InputError(f"encoding.yarn_beta_fast={fast} must be more than encoding.yarn_beta_slow={slow}, or 0")
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"encoding.high_freq_factor={self.high_freq_factor} must be more than "
                f"encoding.low_freq_factor={self.low_freq_factor}"
            )
        if self.scaling == "dynamic" and not self.scaling_factor:
            raise InputError(
                "encoding.scaling='dynamic' needs encoding.scaling_factor, at least 1: set it (1 is encoding.scaling='ntk')"
            )
        if self.scaling in ("linear", "ntk") and self.scaling_factor and self.original_length:
            raise InputError(
                f"encoding.original_length={self.original_length} is not read by encoding.scaling='{self.scaling}' with "
                f"encoding.scaling_factor={self.scaling_factor}: leave one of them out"
            )
        if bool(self.yarn_mscale) != bool(self.yarn_mscale_all_dim) or (self.yarn_mscale and self.attention_factor):
            raise InputError(
                f"encoding.yarn_mscale={self.yarn_mscale} and encoding.yarn_mscale_all_dim={self.yarn_mscale_all_dim} make "
                "encoding.attention_factor together: set both of them or that"
            )
        if self.log_scaling and self.scaling == "yarn" and not self.has_rotation_scaling:
            raise InputError(
                "encoding.log_scaling and encoding.scaling='yarn' both sharpen attention in longer windows: choose one of "
                "them"
            )

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses factors that are not one for each pair."""
        super().check_dims(dims)
        pairs = self.rotary_width(dims.head_width) // 2
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if self.rotates and self.scaling == "longrope" and len(factors) != pairs:
                raise InputError(
                    f"encoding.{name} has {len(factors)} numbers, and a head has {pairs} rotary pairs: give one for each"
                )


@dataclasses.dataclass(frozen=True)
class _WithOptionalPairs(EncodingConfig):
    """Fields of encodings without rotation, to which rotary pairs can be added."""

    REQUIRES: ClassVar[dict[str, Any]] = dict.fromkeys(
        ("rotary_heads", "rotary_layers", "theta"), ("rotary_pairs", None)
    )

    rotary_pairs: int = _field(
        0,
        "highest-frequency pairs of q and k that rotate; 0 = none (rotary, rotary_axial: all; scale_invariant: half)",
        **limits.OPTIONAL_WIDTH,
    )
    rotary_heads: int = _field(0, "the first heads in which they rotate; 0 = all", **limits.OPTIONAL_HEADS)
    rotary_layers: tuple[int, ...] = _field(
        (),
        "1 or 0 for each layer: whether they rotate in it; fewer flags are a pattern that repeats, () = in all",
        **FLAGS,
    )
    theta: float = _field(10000.0, "base of the wavelengths", **_THETA)

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses rotary pairs that the heads of a model do not have. Raises: InputError."""
        super().check_dims(dims)
        _check_flags("rotary_layers", self.rotary_layers, dims.layers)
        if self.rotary_pairs:
            _check_pairs(f"encoding.rotary_pairs={self.rotary_pairs}", self, dims.axes, dims.head_width)


@dataclasses.dataclass(frozen=True)
class _WithOptionalRoPE(_WithOptionalPairs, _RoPEScaling):
    """The same for encodings of text, whose rotary pairs can be those of a checkpoint: a share of a head, scaled."""

    REQUIRES: ClassVar[dict[str, Any]] = dict.fromkeys(("rotary_share", "scaling"), ("rotary_pairs", None))

    @property
    def rotates(self) -> bool:
        """True where rotary pairs are added."""
        return self.rotary_pairs > 0

    def check(self, axes: int) -> None:
        """Refuses scaled rotary pairs on grids, whose axes they would share."""
        super().check(axes)
        for name in ("scaling", "rotary_share"):
            if axes > 1 and self.rotates and getattr(self, name) != getattr(type(self), name):
                raise InputError(
                    f"encoding.{name}={getattr(self, name)!r} of added rotary pairs is for text: on images leave it out, or set "
                    "encoding.kind='rotary'"
                )

    def rotary_part(self) -> "RotaryConfig":
        """Returns the added rotary pairs as an encoding of text."""
        return RotaryConfig(
            base=self.base,
            fraction_digits=self.fraction_digits,
            **{name: getattr(self, name) for name in RotaryConfig.rope_fields()},
        )


@dataclasses.dataclass(frozen=True)
class _PartialRoPE(EncodingConfig):
    """Field of RoPE encodings that can rotate a part of the pairs (partial RoPE)."""

    rotary_pairs: int = _field(
        0,
        "highest-frequency pairs of q and k that rotate, the others carry content alone; 0 = all, or half of them",
        **limits.OPTIONAL_WIDTH,
    )


@dataclasses.dataclass(frozen=True)
class _RoPEBase(EncodingConfig):
    """Field of RoPE encodings: the base of the wavelengths."""

    theta: float = _field(10000.0, "base of the wavelengths", **_THETA)

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses heads whose columns do not pair. Raises: InputError."""
        super().check_dims(dims)
        _check_pairs(f"encoding.kind='{self.kind}'", self, self.pair_axes(dims), dims.head_width)

    def pair_axes(self, dims: ModelDims) -> int:
        """Returns the axes over which the pairs of a head are divided."""
        return dims.axes


def _check_pairs(setting: str, encoding: EncodingConfig, axes: int, width: int) -> None:
    """Refuses rotary pairs that a head does not have.

    Args:
      setting: field that rotates the pairs, with its value, for messages.
      encoding: config with `rotary_pairs` and `rotary_share`.
      axes: number of axes that share the pairs.
      width: width of a head.

    Raises:
      InputError: the width is odd, or there are fewer pairs than axes, or more than the head has.
    """
    pairs, columns = encoding.rotary_pairs, f"model.width / model.heads = {width}"
    if encoding.rotary_share < 1:
        share, width = width, encoding.rotary_width(width)
        columns = f"encoding.rotary_share={encoding.rotary_share} of {share} columns = {width}"
    if width % 2:
        raise InputError(f"{setting} rotates pairs of columns: {columns} must be even")
    if width < 2 * axes:
        raise InputError(
            f"{setting} rotates at least one pair per axis: {columns} must be at least {2 * axes} for {axes} axes"
        )
    if pairs and not axes <= pairs <= width // 2:
        raise InputError(
            f"encoding.rotary_pairs={pairs} must lie between the {axes} axes and the {width // 2} pairs of a head of width "
            f"{width}, or be 0"
        )


@dataclasses.dataclass(frozen=True)
class SeqPEConfig(_Positions, _Heads, _Layers, _WithOptionalRoPE, _WithForgetGate):
    """SeqPE, the sequential position encoding (arXiv 2506.13277)."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.seqpe:SeqPE"
    SUMMARY: ClassVar[str] = "A light transformer reads the digits of a position; its vector enters attention."
    SOURCE: ClassVar[str] = "arXiv 2506.13277"
    PER_LAYER: ClassVar[bool] = True
    HAS_VECTORS: ClassVar[bool] = True
    STARTS_AT_ZERO: ClassVar[bool] = True
    REQUIRES: ClassVar[dict[str, Any]] = {"start_at_zero": None}  # also without a gate

    kind: str = _kind("seqpe")
    digits: int = _field(0, "before the point; 0 = as many as max_position needs", low=0, high=64)
    padding: Literal["left", "right"] = _field("left", "side on which shorter positions are filled up with zeros")
    # the encoder of the digits
    layers: int = _field(2, "blocks of the digit encoder", **limits.LAYERS)
    width: int = _field(768, "features of the digit encoder", **limits.WIDTH)
    heads: int = _field(12, "attention heads of the digit encoder", **limits.HEADS)
    direction: Literal["causal", "bi"] = _field("causal", "digits attend to those before them, or to all")
    cls: bool = _field(True, "a learned token after the last digit is read out, else the last digit is")
    final_norm: bool = _field(True, "LayerNorm before the projection")
    mask_padding: bool = _field(False, "zeros that fill up a position are no keys")
    temperature: float = _field(1.0, "vectors are divided by it", low=1e-6, high=1e6)
    output_width: int = _field(
        0, "features of a vector; 0 = as many as mode, qk and per_head need", **limits.OPTIONAL_WIDTH
    )
    digit_index: Literal["global", "per_axis"] = _field(
        "global", "digit indices are counted over all axes, or for each axis from 0"
    )
    dropout: float = _field(0.1, "dropout rate of the digit encoder, after attention and MLP", **limits.DROP_RATE)
    attention_dropout: float = _field(0.0, "dropout rate of attention weights in the digit encoder", **limits.DROP_RATE)
    activation: Activation = _field("gelu_tanh", "activation function of the digit encoder")
    layer_norm_epsilon: float = _field(1e-5, "added to variances in the digit encoder's LayerNorms", **limits.EPSILON)
    norm_init: float = _field(1.0, "initial weight of each LayerNorm", low=-1e3, high=1e3)
    init_distribution: Literal["normal", "truncated_normal"] = _field("normal", "distribution of initial weights")
    init_std: float = _field(0.02, "standard deviation of initial weights", **limits.STD)
    share_prefixes: bool = _field(
        True, "leading digits that positions have in common are computed once; dropout masks are then shared too"
    )
    matmul_precision: limits.MatmulPrecision = _field(
        "highest", "float32 products of digit encoder and qk map: 1, 3 or 6 bfloat16 passes on TPU"
    )
    # how its vectors enter attention
    mode: Literal["input_add", "attn_add", "attn_mul", "attn_scalar", "rotary"] = _field(
        "attn_scalar",
        "how vectors enter the model: added to tokens, added to or multiplied onto q and k, as logit bias, as rotation",
    )
    qk: Literal["single", "multi", "none"] = _field(
        "single", "linear map of the vector to query and key parts: one, one per layer, or none"
    )
    per_head: bool = _field(True, "the vector is split over the heads, else one head-wide vector serves all")
    feature_width: int = _field(
        0, "attn_scalar: features of a head's query and key parts; 0 = head width", **limits.OPTIONAL_WIDTH
    )
    qk_init_std: float = _field(0.02, "standard deviation of initial weights of the qk map", **limits.STD)
    scalar_scale: float = _field(1.0, "attn_scalar: factor of the logit bias", low=-1e6, high=1e6)

    @property
    def integer_digits(self) -> int:
        """Digits before the point."""
        return self.digits or count_digits(self.max_position, self.base)

    @property
    def num_digits(self) -> int:
        """Digits of a coordinate, those after the point included."""
        return self.integer_digits + self.fraction_digits

    def start_scale_shape(self, dims: ModelDims) -> tuple[int, ...]:
        """Returns the shape of the factors of the encoding: one number where it is added to tokens."""
        if self.mode == "input_add":
            return (1,)
        heads = dims.heads if self.per_head else 1
        return (dims.layers, heads) if self.qk == "multi" else (heads,)

    def needed_width(self, dims: ModelDims) -> int:
        """Returns the features of a vector that mode, qk and per_head need."""
        heads = dims.heads if self.per_head else 1
        needed = dims.width if self.mode == "input_add" else heads * dims.head_width
        return 2 * needed if dims.compat.qk_halves and self.mode in ("attn_add", "attn_mul") else needed

    def vector_width(self, dims: ModelDims) -> int:
        """Returns the features of a position's vector."""
        return self.output_width or self.needed_width(dims)

    def idle_options(self) -> dict[str, str]:
        """Returns options of the qk map and of the logit bias, where there is none."""
        requires = {"qk_init_std": "encoding.qk='single' or 'multi'", "scalar_scale": "encoding.mode='attn_scalar'"}
        if self.qk in ("single", "multi"):
            del requires["qk_init_std"]
        if self.mode == "attn_scalar":
            del requires["scalar_scale"]
        return requires

    def check(self, axes: int) -> None:
        """Refuses digits that do not write max_position, and parts that fill the same field of the signal."""
        super().check(axes)
        largest = largest_position(self.integer_digits, self.base)
        if self.max_position - 1 > largest:
            needed = count_digits(self.max_position, self.base)
            raise InputError(
                f"encoding.max_position={self.max_position} needs {needed} digits in base {self.base}, but with "
                f"encoding.digits={self.digits} the largest position possible is {largest}: set encoding.digits={needed}, "
                f"or encoding.max_position to at most {largest + 1}"
            )
        if self.fraction_digits and self.padding == "right":
            raise InputError(
                "encoding.padding='right' would move the point: set it to 'left', or encoding.fraction_digits=0"
            )
        if self.log_scaling and self.mode == "attn_mul":
            raise InputError(
                "encoding.log_scaling and encoding.mode='attn_mul' both multiply queries: choose one of them"
            )
        if self.rotates and self.scaling == "yarn" and not self.scaling_factor and self.mode == "attn_mul":
            raise InputError(
                "encoding.scaling='yarn' without encoding.scaling_factor and encoding.mode='attn_mul' both multiply queries: "
                "set a factor, or choose another mode"
            )

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses widths and heads that do not fit the model or each other."""
        super().check_dims(dims)
        if self.direction == "bi" and not self.cls:
            raise InputError("encoding.direction='bi' reads the vector from CLS: set encoding.cls=True")
        if self.width % self.heads:
            raise InputError(f"encoding.width={self.width} is not a multiple of encoding.heads={self.heads}")
        if self.position_heads and self.mode == "input_add":
            raise InputError("encoding.mode='input_add' reaches all heads: set encoding.position_heads=0")
        if self.layers_with and self.mode == "input_add":
            raise InputError("encoding.mode='input_add' reaches all layers: leave encoding.layers_with out")
        if self.feature_width and (self.mode != "attn_scalar" or self.qk not in ("single", "multi")):
            raise InputError(
                "encoding.feature_width is the width of what a qk map gives to attention logits: set "
                "encoding.mode='attn_scalar' and encoding.qk='single' or 'multi', or encoding.feature_width=0"
            )
        if self.mode in ("input_add", "rotary") and self.qk != "none":
            raise InputError(f"encoding.mode='{self.mode}' has no query and key parts: set encoding.qk='none'")
        if dims.compat.qk_halves and (self.qk != "none" or self.mode in ("input_add", "rotary")):
            raise InputError(
                "compat.qk_halves splits a vector into query and key parts: set encoding.qk='none' and a mode that has them"
            )
        width, needed = self.vector_width(dims), self.needed_width(dims)
        if self.mode != "attn_scalar" and width != needed:
            raise InputError(
                f"encoding.mode='{self.mode}' with encoding.qk='{self.qk}' needs vectors of width {needed}, but "
                f"encoding.output_width={width}: set it to 0 or {needed}"
            )
        parts = (dims.heads if self.per_head else 1) * (2 if dims.compat.qk_halves else 1)
        if width % parts:
            raise InputError(f"vectors of width {width} do not split into {parts} parts: change encoding.output_width")
        if self.mode == "rotary" and dims.head_width % 2:
            raise InputError(
                f"encoding.mode='rotary' rotates pairs of columns: model.width / model.heads = {dims.head_width} is odd"
            )
        if self.mode == "rotary" and self.rotary_pairs:
            raise InputError(
                f"encoding.mode='rotary' and encoding.rotary_pairs={self.rotary_pairs} both rotate queries and keys: "
                "choose another mode, or set encoding.rotary_pairs=0"
            )


@dataclasses.dataclass(frozen=True)
class LearnedConfig(_WithOptionalRoPE, _WithForgetGate):
    """A learned table of position embeddings."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.absolute:Learned"
    SUMMARY: ClassVar[str] = "A learned table added to the tokens, interpolated beyond its size."
    SOURCE: ClassVar[str] = "Gehring et al. 2017"
    REAL_POSITIONS: ClassVar[bool] = False

    kind: str = _kind("learned")
    init_std: float = _field(0.02, "standard deviation of initial weights", **limits.STD)
    table_length: int = _field(
        0,
        "text: entries of the table, of which objective.shift and objective.skip train those past a window; 0 = the training "
        "window's",
        **limits.OPTIONAL_LENGTH,
    )

    @property
    def max_position(self) -> int:  # type: ignore[override]  # others have a field
        """Training draws positions below it."""
        return self.table_length or EncodingConfig.max_position

    @property
    def window_dependence(self) -> str:
        """The kind: a longer window interpolates the table."""
        return "encoding.kind='learned'"

    def one_signal_until(self, trained: int) -> int:
        """Returns the entries of the table."""
        return max(trained, self.table_length)

    def check(self, axes: int) -> None:
        """Refuses a longer table of a grid. Raises: InputError: names the field."""
        super().check(axes)
        if self.table_length and axes > 1:
            raise InputError(f"encoding.table_length={self.table_length} is for text: on images set it to 0")

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses a table that is shorter than the training window. Raises: InputError: names the field."""
        super().check_dims(dims)
        if 0 < self.table_length < dims.num_positions:
            raise InputError(
                f"encoding.table_length={self.table_length} is less than the {dims.num_positions} positions of a training "
                "window: raise it, or set it to 0"
            )


@dataclasses.dataclass(frozen=True)
class SinusoidalConfig(_Positions, _WithOptionalRoPE, _WithForgetGate):
    """Sinusoidal position embeddings."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.absolute:Sinusoidal"
    SUMMARY: ClassVar[str] = "Sines and cosines added to the tokens."
    SOURCE: ClassVar[str] = "arXiv 1706.03762"
    REQUIRES: ClassVar[dict[str, Any]] = {"theta": None}  # also without rotary pairs

    kind: str = _kind("sinusoidal")
    amplitude: float = _field(1.0, "factor of the sinusoids", **limits.WEIGHT)

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses a model with fewer pairs of columns than axes."""
        super().check_dims(dims)
        if dims.compat.flatten and (self.fraction_digits or self.resize != "extrapolate"):
            raise InputError(
                "compat.flatten numbers the patches of a grid one after the other: set encoding.fraction_digits=0 and "
                "encoding.resize='extrapolate'"
            )
        if dims.width < 2 * dims.axes:
            raise InputError(
                f"encoding.kind='sinusoidal' needs model.width of at least {2 * dims.axes} for {dims.axes} axes"
            )


@dataclasses.dataclass(frozen=True)
class RotaryConfig(_Positions, _Heads, _Layers, _RoPEScaling, _RoPEBase, _PartialRoPE, _WithForgetGate):
    """Rotary position embedding (RoPE)."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.rope:Rotary"
    SUMMARY: ClassVar[str] = (
        "RoPE; `rotary_pairs` limits it to the highest frequencies, `rotary_share` to a part of a head, `scaling` fits it to "
        "longer windows."
    )
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = (
        "arXiv 2104.09864, 2410.06205 (p-RoPE), 2306.15595 (linear), 2309.00071 (ntk, dynamic, yarn), 2407.21783 (llama3), "
        "2402.13753 (longrope)"
    )

    kind: str = _kind("rotary")

    @staticmethod
    def rope_fields() -> list[str]:
        """Returns the names of the fields that describe its rotations, which added rotary pairs have as well."""
        own = {field.name for field in dataclasses.fields(_RoPEScaling)}
        return ["rotary_pairs", "theta", *sorted(own - {field.name for field in dataclasses.fields(EncodingConfig)})]

    def as_part(self, head_width: int) -> dict[str, Any]:
        """Returns the fields by which another encoding of text also has these rotations, such as SeqPE.

        Args:
          head_width: features of one head.
        """
        own = {name: getattr(self, name) for name in self.rope_fields()}
        own |= {"rotary_heads": self.position_heads, "rotary_layers": self.layers_with}
        return own | {"rotary_pairs": self.rotary_pairs or self.rotary_width(head_width) // 2}

    def pair_axes(self, dims: ModelDims) -> int:
        """Returns 1: a grid is read as one axis."""
        return 1

    def real_positions_on(self, axes: int) -> bool:
        """Returns whether positions are real: those of a grid are numbered one after the other."""
        return axes == 1

    def resolved(self, dims: ModelDims) -> "RotaryConfig":
        """Returns the config with YaRN's upper bound, at most the rotations of the fastest pair in training."""
        fastest = (self.original_length or dims.num_positions) / (2 * math.pi)  # a grid is read as one axis
        return dataclasses.replace(self, yarn_beta_fast=self.yarn_beta_fast or min(YARN_BETA_FAST, fastest))


@dataclasses.dataclass(frozen=True)
class RotaryAxialConfig(_Positions, _Heads, _Layers, _RoPEBase, _PartialRoPE, _WithForgetGate):
    """RoPE whose pairs are divided among the axes."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.rope:RotaryAxial"
    SUMMARY: ClassVar[str] = "RoPE whose pairs are divided among the axes."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2403.13298"

    kind: str = _kind("rotary_axial")


@dataclasses.dataclass(frozen=True)
class RotaryMixedConfig(_Positions, _Heads, _Layers, _RoPEBase, _WithForgetGate):
    """RoPE with learned frequencies over all axes."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.rope:RotaryMixed"
    SUMMARY: ClassVar[str] = "RoPE whose pairs learn frequencies over all axes, for each layer and head."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2403.13298"
    PER_LAYER: ClassVar[bool] = True

    kind: str = _kind("rotary_mixed")


@dataclasses.dataclass(frozen=True)
class RotaryIDConfig(_Positions, _Heads, _Layers, _PartialRoPE, _WithForgetGate):
    """RoPE-ID: fast rotations of half of the pairs."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.rope:RotaryID"
    SUMMARY: ClassVar[str] = "RoPE-ID: half of the pairs rotate, each at least twice within the training length."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2603.18017"
    AXES: ClassVar[Axes] = "1"
    CAUSAL_ONLY: ClassVar[bool] = True

    kind: str = _kind("rope_id")
    fastest_period: float = _field(
        0.0,
        "tokens of a turn of the fastest pair; 0 = 1/128 of the training length, at least RoPE's 2 pi",
        zero=True,
        low=2.0,
        high=2.0**30,
    )
    slowest_period: float = _field(
        0.0, "tokens of a turn of the slowest pair; 0 = half of the training length", zero=True, low=2.0, high=2.0**30
    )

    def resolved(self, dims: ModelDims) -> "RotaryIDConfig":
        """Replaces every 0 (automatic) by its value for this model."""
        slowest = self.slowest_period or max(2.0, ROPE_ID_SLOWEST * dims.length)
        fastest = self.fastest_period or min(slowest, max(2 * math.pi, ROPE_ID_FASTEST * dims.length))
        pairs = self.rotary_pairs or max(1, dims.head_width // 4)
        return dataclasses.replace(self, rotary_pairs=pairs, fastest_period=fastest, slowest_period=slowest)

    def check(self, axes: int) -> None:
        """Refuses two scalings of the queries."""
        super().check(axes)
        if self.log_scaling:
            raise InputError(
                "encoding.log_scaling and encoding.kind='rope_id' both sharpen attention in longer windows: set "
                "encoding.log_scaling=False"
            )

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses heads without such pairs, and periods in the wrong order. Raises: InputError."""
        super().check_dims(dims)
        _check_pairs(f"encoding.kind='{self.kind}'", self, 1, dims.head_width)
        own = self.resolved(dims)
        if own.fastest_period > own.slowest_period:
            raise InputError(
                f"encoding.fastest_period={own.fastest_period:g} must be at most "
                f"encoding.slowest_period={own.slowest_period:g}: lower it, or raise the other"
            )


_SLOPE_SCALE: dict[str, Any] = {"low": 1e-6, "high": 1e6}


@dataclasses.dataclass(frozen=True)
class ALiBiConfig(_Positions, _Heads, _Layers, _WithOptionalRoPE, _WithForgetGate):
    """Attention with linear biases (ALiBi)."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.relative_bias:ALiBi"
    SUMMARY: ClassVar[str] = "Logits fall linearly with distance, each head with its slope."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2108.12409"
    AXES: ClassVar[Axes] = "1"
    CAUSAL_ONLY: ClassVar[bool] = True
    STARTS_AT_ZERO: ClassVar[bool] = True
    REQUIRES: ClassVar[dict[str, Any]] = {"start_at_zero": None}  # also without a gate

    kind: str = _kind("alibi")
    slope_scale: float = _field(1.0, "factor of the slopes, per token", **_SLOPE_SCALE)


@dataclasses.dataclass(frozen=True)
class GridALiBiConfig(_Positions, _Heads, _Layers, _WithOptionalPairs, _StartAtZero):
    """ALiBi by Euclidean distance on grids."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.relative_bias:GridALiBi"
    SUMMARY: ClassVar[str] = "ALiBi by Euclidean distance."
    SOURCE: ClassVar[str] = "arXiv 2108.12409"
    AXES: ClassVar[Axes] = "2+"
    STARTS_AT_ZERO: ClassVar[bool] = True

    kind: str = _kind("alibi_grid")
    slope_scale: float = _field(1.0, "factor of the slopes, per patch", **_SLOPE_SCALE)


@dataclasses.dataclass(frozen=True)
class T5Config(_Positions, _Heads, _Layers, _WithOptionalRoPE, _WithForgetGate):
    """T5's relative position bias."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.relative_bias:T5"
    SUMMARY: ClassVar[str] = "A learned bias for each bucket of distances, one table for all layers."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 1910.10683"
    AXES: ClassVar[Axes] = "1"
    CAUSAL_ONLY: ClassVar[bool] = True
    STARTS_AT_ZERO: ClassVar[bool] = True
    REQUIRES: ClassVar[dict[str, Any]] = {"start_at_zero": None}  # also without a gate

    kind: str = _kind("t5")
    t5_buckets: int = _field(0, "distance buckets; 0 = 32, at most the training length", zero=True, low=2, high=4096)
    t5_max_distance: int = _field(
        0,
        "tokens from which on all distances share a bucket; 0 = a quarter of the training length, at least t5_buckets",
        **limits.OPTIONAL_LENGTH,
    )

    def resolved(self, dims: ModelDims) -> "T5Config":
        """Replaces every 0 (automatic) length by its value for this model.

        The largest distance is at least the number of buckets, so that each bucket can hold one distance.
        """
        buckets = self.t5_buckets or min(T5_BUCKETS, max(2, math.floor(dims.length)))
        farthest = self.t5_max_distance or max(buckets, round(T5_SHARE * dims.length))
        return dataclasses.replace(self, t5_buckets=buckets, t5_max_distance=farthest)

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses a largest distance that is within the buckets of one distance each. Raises: InputError."""
        super().check_dims(dims)
        own = self.resolved(dims)
        if own.t5_max_distance <= own.t5_buckets // 2:
            raise InputError(
                f"encoding.t5_max_distance={own.t5_max_distance} must be more than half of "
                f"encoding.t5_buckets={own.t5_buckets}, which hold one distance each: raise it or lower the buckets"
            )


@dataclasses.dataclass(frozen=True)
class KerpleConfig(_Positions, _Heads, _Layers, _WithOptionalRoPE, _WithForgetGate):
    """KERPLE's logarithmic kernel.

    `kerple_scale` is not rescaled with the training length (see docs/encodings.md).
    """

    MODULE: ClassVar[str] = "seqpe_jax.encodings.relative_bias:Kerple"
    SUMMARY: ClassVar[str] = "Logits fall with the logarithm of the distance, learned by layer and head."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2205.09921"
    AXES: ClassVar[Axes] = "1"
    CAUSAL_ONLY: ClassVar[bool] = True
    PER_LAYER: ClassVar[bool] = True
    STARTS_AT_ZERO: ClassVar[bool] = True
    REQUIRES: ClassVar[dict[str, Any]] = {"start_at_zero": None}  # also without a gate

    kind: str = _kind("kerple")
    kerple_scale: float = _field(1.0, "initial r2 is drawn between 0 and this, per token", low=0.02, high=1e6)


@dataclasses.dataclass(frozen=True)
class FireConfig(_Positions, _Heads, _Layers, _WithOptionalRoPE, _WithForgetGate):
    """FIRE, functional interpolation of relative positions."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.relative_bias:Fire"
    SUMMARY: ClassVar[str] = "A small network reads the distance as a share of the largest one possible."
    SOURCE: ClassVar[str] = "arXiv 2310.04418"
    PER_LAYER: ClassVar[bool] = True
    STARTS_AT_ZERO: ClassVar[bool] = True
    REQUIRES: ClassVar[dict[str, Any]] = {"start_at_zero": None}  # also without a gate

    kind: str = _kind("fire")
    fire_threshold: float = _field(
        0.0,
        "initial threshold, in tokens or patches; 0 = a quarter of the training length",
        zero=True,
        low=1e-3,
        high=2.0**30,
    )
    fire_scale: float = _field(
        0.0, "initial c, per token or patch; 0 = 204.8 over the training length", zero=True, low=1e-6, high=1e6
    )
    fire_signed: bool = _field(
        False, "on grids the network reads the displacement along each axis with its sign, else the distance alone"
    )

    def check(self, axes: int) -> None:
        """Refuses signs in text, where every key is before its query. Raises: InputError: names the field."""
        super().check(axes)
        if self.fire_signed and axes == 1:
            raise InputError(
                "encoding.fire_signed=True is for images: in text every key is before its query, so that distances say all; "
                "leave it out"
            )

    def resolved(self, dims: ModelDims) -> "FireConfig":
        """Replaces every 0 (automatic) length by its value for this model.

        Threshold and scale are scaled together, so that the network's input is the same at the same fraction of the window.
        """
        threshold, scale = self.fire_threshold or FIRE_SHARE * dims.length, self.fire_scale or FIRE_SCALE / dims.length
        return dataclasses.replace(self, fire_threshold=threshold, fire_scale=scale)


@dataclasses.dataclass(frozen=True)
class LookHereConfig(_Positions, _Heads, _Layers, _WithOptionalPairs):
    """LookHere's directed attention on grids."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.relative_bias:LookHere"
    SUMMARY: ClassVar[str] = "Each directed head sees one side of the grid, with logits that fall with distance."
    SOURCE: ClassVar[str] = "arXiv 2405.13985"
    AXES: ClassVar[Axes] = "2+"
    PER_LAYER: ClassVar[bool] = True

    kind: str = _kind("lookhere")
    slope_scale: float = _field(1.0, "factor of the slopes, per patch", **_SLOPE_SCALE)
    directed_heads: int = _field(
        0, "heads that see one side; 0 = two thirds, a multiple of four if there are as many", **limits.OPTIONAL_HEADS
    )
    undirected_slopes: Literal["authors", "spread"] = _field(
        "authors",
        "slopes of the heads that see all sides: the authors' from the largest on, or the same four spread over the heads, "
        "as before there was a choice",
    )

    def resolved(self, dims: ModelDims) -> "LookHereConfig":
        """Replaces a `directed_heads` of 0 (automatic) by its value for this model: 4 of 6, 8 of 12 or 16, as the authors."""
        share = round(DIRECTED_SHARE * dims.heads)
        return dataclasses.replace(self, directed_heads=self.directed_heads or (share if share < 4 else share // 4 * 4))

    def check_dims(self, dims: ModelDims) -> None:
        """Refuses more directed heads than heads."""
        super().check_dims(dims)
        if self.directed_heads > dims.heads:
            raise InputError(f"encoding.directed_heads={self.directed_heads} is more than model.heads={dims.heads}")


@dataclasses.dataclass(frozen=True)
class PaPEConfig(_Positions, _Heads, _Layers, _WithOptionalPairs):
    """Parabolic position encoding (PaPE)."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.pape:PaPE"
    SUMMARY: ClassVar[str] = "Logits gain parabolas of learned coordinates, whose shape the query's content chooses."
    SOURCE: ClassVar[str] = "arXiv 2602.01418"
    AXES: ClassVar[Axes] = "2+"
    PER_LAYER: ClassVar[bool] = True

    kind: str = _kind("pape")
    parabolas: int = _field(0, "parabolas of a head; 0 = the authors' 50 for 64 columns", **limits.OPTIONAL_WIDTH)

    def resolved(self, dims: ModelDims) -> "PaPEConfig":
        """Replaces a number of 0 (automatic) by its value for this model."""
        return dataclasses.replace(self, parabolas=self.parabolas or max(1, round(PARABOLA_SHARE * dims.head_width)))


@dataclasses.dataclass(frozen=True)
class ScaleInvariantConfig(_Positions, _Heads, _Layers, _RoPEBase, _PartialRoPE, _WithForgetGate):
    """Scale-invariant attention over p-RoPE."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.relative_bias:ScaleInvariant"
    SUMMARY: ClassVar[str] = "Logits are scaled by distance so that each scale of distances gets as much attention."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2505.17083"
    AXES: ClassVar[Axes] = "1"
    CAUSAL_ONLY: ClassVar[bool] = True

    kind: str = _kind("scale_invariant")
    scale_invariant_tau: float = _field(
        10.0, "distance in tokens below which logits hardly change", low=1e-3, high=2.0**30
    )

    def resolved(self, dims: ModelDims) -> "ScaleInvariantConfig":
        """Replaces a `rotary_pairs` of 0 (automatic) by its value for this model.

        Of the half of the pairs that the authors rotate, those with a period within the training window (see
        docs/encodings.md).
        """
        width = dims.head_width
        periods = (2 * math.pi * self.theta ** (2.0 * pair / max(1, width)) for pair in range(width // 4))
        pairs = self.rotary_pairs or max(1, sum(period <= dims.length for period in periods))
        return dataclasses.replace(self, rotary_pairs=pairs)


@dataclasses.dataclass(frozen=True)
class PoPEConfig(_Positions, _Heads, _Layers, _WithForgetGate):
    """Polar position encoding (PoPE)."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.pope:PoPE"
    SUMMARY: ClassVar[str] = "Queries and keys in polar coordinates: magnitude from content, phase from position."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2509.10534"
    AXES: ClassVar[Axes] = "1"
    PER_LAYER: ClassVar[bool] = True

    kind: str = _kind("pope")
    theta: float = _field(10000.0, "base of the wavelengths", **_THETA)


@dataclasses.dataclass(frozen=True)
class NoPositionConfig(_Positions, _WithOptionalRoPE, _WithForgetGate):
    """No position encoding (NoPE); positions matter where rotary pairs are added."""

    MODULE: ClassVar[str] = "seqpe_jax.encodings.absolute:NoPosition"
    SUMMARY: ClassVar[str] = "Nothing: a causal model infers order from what each token can see."
    SHIFT_INVARIANT: ClassVar[bool] = True
    SOURCE: ClassVar[str] = "arXiv 2305.19466"
    REAL_POSITIONS: ClassVar[bool] = False
    REQUIRES: ClassVar[dict[str, Any]] = {
        name: ("rotary_pairs", None) for name in ("max_position", "base", "fraction_digits", "resize")
    }

    kind: str = _kind("none")

    @property
    def real_positions(self) -> bool:
        """True where pairs rotate."""
        return self.rotary_pairs > 0

    @property
    def knows_positions(self) -> bool:
        """True where pairs rotate."""
        return self.rotary_pairs > 0


ENCODINGS: dict[str, type[EncodingConfig]] = {
    "seqpe": SeqPEConfig,
    "learned": LearnedConfig,
    "sinusoidal": SinusoidalConfig,
    "rotary": RotaryConfig,
    "rotary_axial": RotaryAxialConfig,
    "rotary_mixed": RotaryMixedConfig,
    "rope_id": RotaryIDConfig,
    "alibi": ALiBiConfig,
    "alibi_grid": GridALiBiConfig,
    "t5": T5Config,
    "kerple": KerpleConfig,
    "fire": FireConfig,
    "lookhere": LookHereConfig,
    "pape": PaPEConfig,
    "scale_invariant": ScaleInvariantConfig,
    "pope": PoPEConfig,
    "none": NoPositionConfig,
}


def encoding_name(kind: str, gate: str) -> str:
    """Returns the name of an encoding in reports: its kind, "fox" or "cable", or "KIND+GATE"."""
    if gate == "none":
        return kind
    published = {named: name for name, named in GATED.items()}
    return published[gate] if kind == "none" and gate in published else f"{kind}+{gate}"


def kinds_for(axes: int) -> list[str]:
    """Returns the kinds of encodings that support this number of axes."""
    other = "2+" if axes == 1 else "1"
    return [kind for kind, encoding in ENCODINGS.items() if encoding.AXES != other]


def kinds_with(field: str) -> list[str]:
    """Returns the kinds of encodings that have a field."""
    return [kind for kind, encoding in ENCODINGS.items() if encoding.has(field)]


def all_fields() -> dict[str, Any]:
    """Returns the fields of all encodings with their defaults; one that several have has the same default in each."""
    return dict(_all_fields(tuple(ENCODINGS.values())))


@functools.cache
def _all_fields(encodings: tuple[type, ...]) -> dict[str, Any]:
    names = {field.name: field.default for encoding in encodings for field in dataclasses.fields(encoding)}
    return names | {"kind": "seqpe"}


def any_encoding() -> type:
    """Returns a dataclass with the fields of all encodings, for their types, limits and documentation."""
    return _any_encoding(tuple(ENCODINGS.values()))


@functools.cache
def _any_encoding(encodings: tuple[type, ...]) -> type:
    fields: dict[str, tuple[str, Any, Any]] = {}
    for encoding in encodings:
        types = typing.get_type_hints(encoding)
        for field in dataclasses.fields(encoding):
            own = limits.field(field.default, **field.metadata)
            fields.setdefault(field.name, (field.name, types[field.name], own))
    fields["kind"] = ("kind", str, _field("seqpe", "the encoding", choices=lambda: tuple(ENCODINGS)))
    return dataclasses.make_dataclass("AnyEncoding", fields.values())


def encodings_table() -> str:
    """Returns the table of docs/encodings.md, in markdown."""
    rows = ["| kind | what it does | for | fields of its own | source |", "| --- | --- | --- | --- | --- |"]
    shared = {field.name for one in (EncodingConfig, *_PARTS) for field in dataclasses.fields(one)}
    takes = {"1": "text", "2+": "images", "any": "text, images"}
    for kind, encoding in ENCODINGS.items():
        own = [f"`{field.name}`" for field in dataclasses.fields(encoding) if field.name not in shared]
        if encoding.HAS_VECTORS:
            own = ["those of the digit encoder"]
        source = re.sub(r"(?:arXiv )?(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", encoding.SOURCE)
        rows.append(
            f"| `{kind}` | {encoding.SUMMARY} | {takes[encoding.AXES]}{', causal' * encoding.CAUSAL_ONLY} | "
            f"{', '.join(own)} | {source} |"
        )
    return "\n".join(rows) + "\n"


_PARTS: Iterable[type] = (
    _Positions,
    _Heads,
    _Layers,
    _StartAtZero,
    _WithForgetGate,
    _WithOptionalRoPE,
    _PartialRoPE,
    _RoPEBase,
)
