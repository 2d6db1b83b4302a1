"""The encoding section of a config: the kinds of encodings, what each can do, and their fields."""

import dataclasses
from typing import Any, Literal, get_args

from seqpe_jax.config import limits
from seqpe_jax.config.limits import field as _field
from seqpe_jax.positions.counting import count_digits

EncodingKind = Literal[
    "seqpe",
    "learned",
    "sinusoidal",
    "rotary",
    "rotary_axial",
    "rotary_mixed",
    "alibi",
    "alibi_grid",
    "t5",
    "kerple",
    "fire",
    "lookhere",
    "scale_invariant",
    "pope",
    "none",
]
Gate = Literal["none", "forget", "cable"]
# Published names of the kind `none` with a gate: FoX (arXiv 2503.02130) and CABLE (arXiv 2503.08067).
GATED = {"fox": "forget", "cable": "cable"}

# Kinds of encodings by what they can do; `reads` of a field names those that read it.
SEQPE = ("seqpe",)
# Logits gain a function of how far the key lies.
OF_DISTANCES = ("alibi", "alibi_grid", "t5", "kerple", "fire", "lookhere", "scale_invariant")
# Positions need not be whole numbers.
REAL_POSITIONS = ("seqpe", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed", *OF_DISTANCES, "pope")
SLOPED = ("alibi", "alibi_grid", "lookhere")  # logits fall with distance by a fixed slope of each head
TEXT_ONLY = ("alibi", "t5", "kerple", "scale_invariant", "pope")  # know one axis, or what came before
GRID_ONLY = ("alibi_grid", "lookhere")
MOVABLE = REAL_POSITIONS  # windows may stand elsewhere than at the origin
WAVES = ("sinusoidal", "rotary", "rotary_axial", "rotary_mixed", "scale_invariant", "pope")
# What they do can be limited to some heads; what is added to the tokens reaches all.
IN_HEADS = ("seqpe", "rotary", "rotary_axial", "rotary_mixed", *OF_DISTANCES, "pope")
OWN_PAIRS = ("rotary", "rotary_axial", "scale_invariant")  # rotate pairs themselves; all, or half, by default
# Take rotary pairs beside what they do themselves: all that do not rotate queries and keys already.
ADDED_PAIRS = ("seqpe", "learned", "sinusoidal", "alibi", "alibi_grid", "t5", "kerple", "fire", "lookhere", "none")


def encoding_name(kind: str, gate: str) -> str:
    """Returns the name of an encoding in reports: its kind, "fox" or "cable", or "KIND+GATE"."""
    if gate == "none":
        return kind
    published = {named: name for name, named in GATED.items()}
    return published[gate] if kind == "none" and gate in published else f"{kind}+{gate}"


# Field of a part that encodings are combined with -> its value without the part.
PARTS: dict[str, Any] = {"rotary_pairs": 0, "gate": "none"}
_PAIRS = {"rotary_pairs": ADDED_PAIRS}
_GATES = {"gate": tuple(kind for kind in get_args(EncodingKind) if kind not in GRID_ONLY)}
_YARN: dict[str, Any] = {"reads": ("rotary",), "under": {"scaling": "yarn"}}
_MOVED = {"rotary_pairs": ("none",)}  # has no positions but those by which its pairs rotate


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
    """How positions reach attention.

    `reads` says which kinds read a field, and `combined` which further kinds read it where another field is set: that of a
    part with which they are combined (`PARTS`). `under` names values of other fields without which no kind reads it. For
    all others it keeps its default.
    """

    kind: EncodingKind = "seqpe"
    # how a position is written
    # Training draws positions along an axis below max_position.
    max_position: int = _field(20000, low=1, high=2**30, reads=MOVABLE, combined=_MOVED)
    base: int = _field(10, low=2, high=36, reads=REAL_POSITIONS, combined=_MOVED)  # of the digits
    # after the point; 1 = a token or a patch
    fraction_digits: int = _field(0, low=0, high=30, reads=REAL_POSITIONS, combined=_MOVED)
    # larger than trained: on, or between
    resize: Literal["extrapolate", "interpolate"] = _field("extrapolate", reads=REAL_POSITIONS, combined=_MOVED)
    digits: int = _field(0, low=0, high=64, reads=SEQPE)  # before the point; 0 = as many as max_position needs
    padding: Literal["left", "right"] = _field("left", reads=SEQPE)
    # the encoder of the digits
    layers: int = _field(2, **limits.Layers, reads=SEQPE)
    width: int = _field(768, **limits.Width, reads=SEQPE)
    heads: int = _field(12, **limits.Heads, reads=SEQPE)
    direction: Literal["causal", "bi"] = _field("causal", reads=SEQPE)
    cls: bool = _field(True, reads=SEQPE)
    final_norm: bool = _field(True, reads=SEQPE)
    mask_padding: bool = _field(False, reads=SEQPE)
    temperature: float = _field(1.0, low=1e-6, high=1e6, reads=SEQPE)
    output_width: int = _field(0, **limits.OptionalWidth, reads=SEQPE)  # 0 = what mode, qk and per_head ask for
    digit_index: Literal["global", "per_axis"] = _field("global", reads=SEQPE)
    dropout: float = _field(0.1, **limits.DropRate, reads=SEQPE)
    attention_dropout: float = _field(0.0, **limits.DropRate, reads=SEQPE)
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = _field("gelu_tanh", reads=SEQPE)
    layer_norm_epsilon: float = _field(1e-5, **limits.Epsilon, reads=SEQPE)
    norm_init: float = _field(1.0, low=-1e3, high=1e3, reads=SEQPE)
    init_distribution: Literal["normal", "truncated_normal"] = _field("normal", reads=SEQPE)
    init_std: float = _field(0.02, **limits.Std, reads=("seqpe", "learned"))
    share_prefixes: bool = _field(
        True, reads=SEQPE
    )  # common leading digits are read once; dropout masks are shared too
    # how its vectors enter attention
    mode: Literal["input_add", "attn_add", "attn_mul", "attn_scalar", "rotary"] = _field("attn_scalar", reads=SEQPE)
    qk: Literal["single", "multi", "none", "halves"] = _field("single", reads=SEQPE)
    per_head: bool = _field(True, reads=SEQPE)  # the vector is split over the heads, else one head-wide one serves all
    feature_width: int = _field(
        0, **limits.OptionalWidth, reads=SEQPE
    )  # attn_scalar: of a head's parts; 0 = head width
    qk_init_std: float = _field(0.02, **limits.Std, reads=SEQPE)
    scalar_scale: float = _field(1.0, low=-1e6, high=1e6, reads=SEQPE)
    # in which heads, and combined with what
    position_heads: int = _field(
        0, **limits.OptionalHeads, reads=IN_HEADS
    )  # the first heads that get the encoding; 0 = all
    # The fastest pairs of q and k that rotate; 0 = none, but rotary all and scale_invariant half of them.
    rotary_pairs: int = _field(0, **limits.OptionalWidth, reads=(*OWN_PAIRS, *ADDED_PAIRS))
    # The first heads in which added pairs rotate; 0 = all.
    rotary_heads: int = _field(0, **limits.OptionalHeads, reads=(), combined=_PAIRS)
    # Logits of a key fall with what the tokens after it say, in all heads: FoX's forget gates, or CABLE's biases.
    gate: Gate = "none"
    # Bias that gates begin with, larger = more open: they let through sigmoid(gate_bias_init) of what came before a token.
    gate_bias_init: float = _field(0.0, low=-100.0, high=100.0, reads=(), combined=_GATES)
    log_scaling: bool = False  # queries that see more keys than in training grow with the logarithm of their number
    # baselines
    theta: float = _field(10000.0, low=1.0, high=1e12, reads=WAVES, combined=_PAIRS)  # base of the wavelengths
    scaling: Literal["none", "linear", "ntk", "yarn"] = _field(
        "none", reads=("rotary",)
    )  # of angles, in longer windows
    flatten: bool = _field(False, reads=("sinusoidal",))  # on grids: one axis for all places, not columns for each axis
    reference_scramble: bool = _field(False, reads=("rotary_mixed",))  # heads and positions mixed up, as in PyTorch
    amplitude: float = _field(1.0, **limits.Weight, reads=("sinusoidal",))
    reference_scaling: bool = _field(
        False, reads=("alibi",)
    )  # slopes over sqrt(head width), as in the PyTorch reference
    # Lengths of the baselines in tokens or patches, and constants that derive from one. 0 = the authors' share of the
    # training length, computed by `config.lengths.resolve_lengths`, which has the sources.
    t5_buckets: int = _field(0, zero=True, low=2, high=4096, reads=("t5",))  # distance buckets
    t5_max_distance: int = _field(0, **limits.OptionalLength, reads=("t5",))  # tokens; the last bucket begins below
    fire_threshold: float = _field(
        0.0, zero=True, low=1e-3, high=2.0**30, reads=("fire",)
    )  # of a fresh model, in tokens
    fire_scale: float = _field(0.0, zero=True, low=1e-6, high=1e6, reads=("fire",))  # c of a fresh model, per token
    kerple_scale: float = _field(1.0, low=0.02, high=1e6, reads=("kerple",))  # upper end of fresh r2, per token
    scale_invariant_tau: float = _field(10.0, low=1e-3, high=2.0**30, reads=("scale_invariant",))  # tokens
    yarn_beta_fast: float = _field(0.0, zero=True, low=1e-3, high=1e6, **_YARN)  # pairs of more turns stay
    yarn_beta_slow: float = _field(1.0, low=1e-3, high=1e6, **_YARN)  # turns up to which it is interpolated
    slope_scale: float = _field(1.0, low=1e-6, high=1e6, reads=SLOPED)  # factor of the slopes, per token or patch
    directed_heads: int = _field(0, **limits.OptionalHeads, reads=("lookhere",))  # that see one side; 0 = two thirds

    @property
    def unit(self) -> int:
        """Units of a position's fixed-point number in one token or patch."""
        return self.base**self.fraction_digits

    @property
    def name(self) -> str:
        """The name of the encoding in reports, such as "alibi", "fox" or "seqpe+forget"."""
        return encoding_name(self.kind, self.gate)

    @property
    def real_positions(self) -> bool:
        """Whether positions need not be whole numbers; `none` has positions where pairs rotate."""
        return self.kind in REAL_POSITIONS or (self.kind == "none" and self.rotary_pairs > 0)

    def reads(self, field: dataclasses.Field) -> bool:
        """Returns whether this encoding reads one of its fields."""
        if any(getattr(self, name) != value for name, value in field.metadata.get("under", {}).items()):
            return False
        if self.kind in field.metadata.get("reads", (self.kind,)):
            return True
        combined = field.metadata.get("combined", {})
        return any(self.kind in kinds and getattr(self, part) != PARTS[part] for part, kinds in combined.items())

    @property
    def window_dependence(self) -> str:
        """The field by which a token's position signal depends on the length of its window, past the training length.

        Returns:
          The field with its value, as "encoding.scaling='yarn'"; "" where a token has one signal in all windows.
        """
        if self.kind == "learned":
            return "encoding.kind='learned'"
        if self.resize == "interpolate":
            return "encoding.resize='interpolate'"
        return f"encoding.scaling='{self.scaling}'" if self.scaling != "none" else ""


def digits_of(encoding: EncodingConfig) -> int:
    """Returns the digits per coordinate: `digits`, or as many as `max_position` needs, and those after the point."""
    return (encoding.digits or count_digits(encoding.max_position, encoding.base)) + encoding.fraction_digits
