"""Configuration: typed, frozen dataclasses, and the one door from an ml-collections ConfigDict to them.

A config file returns a ConfigDict (`defaults()` plus assignments); `parse` checks types, ranges and everything that
fields demand of each other, and returns a `Config`. Below this file nobody sees a ConfigDict.
Units: lengths and positions in tokens, rates and weights as plain numbers, steps in optimiser steps.
"""

import dataclasses
import importlib.util
import math
import pathlib
import typing
from typing import Any, Literal

import ml_collections

from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import expanded
from seqpe_jax.positions.digits import count_digits, largest_position

EncodingKind = Literal["seqpe", "learned", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed", "alibi", "none"]
TEXTS = ("stdlib_text", "text_files", "wikitext103")
QUESTIONS = ("stdlib_qa", "squad_long", "qa_jsonl")
IMAGES = ("digit_images", "moving_digits", "image_folder", "imagenet2012", "imagenet_resized")
Fraction = {"low": 0.0, "high": 1.0}
Positive = {"low": 1}
NonNegative = {"low": 0}


# Kinds of encodings by what they can do; `reads` of a field names those that read it.
SEQPE = ("seqpe",)
REAL_POSITIONS = ("seqpe", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed", "alibi")  # not whole numbers alone
MOVABLE = REAL_POSITIONS  # windows may stand elsewhere than at the origin
WAVES = ("seqpe", "sinusoidal", "rotary", "rotary_axial", "rotary_mixed")
IN_HEADS = ("seqpe", "rotary", "rotary_axial", "rotary_mixed", "alibi")  # what they do can be left to some heads
PARTLY_TURNED = ("seqpe", "rotary", "rotary_axial")


def _field(default: Any, **metadata: Any) -> Any:
    """A field with limits (`low`, `high`) and, where not every kind of encoding reads it, the kinds that do (`reads`)."""
    return dataclasses.field(default=default, metadata=metadata)


def _section(kind: type) -> Any:
    return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How training images are changed, on the host, one by one."""

    crop_scale: tuple[float, ...] = (1.0, 1.0)  # share of the area of a random resized crop; 1 = the whole image
    crop_aspect: tuple[float, ...] = (0.75, 4 / 3)  # width to height of that crop
    flip: float = _field(0.0, **Fraction)  # left and right exchanged, with that probability
    translate: int = _field(0, **NonNegative)  # pixels moved at most, in each direction
    randaugment_layers: int = _field(0, **NonNegative)  # operations for each image
    randaugment_magnitude: float = _field(9.0, low=0.0, high=10.0)
    randaugment_std: float = _field(0.5, low=0.0)
    color_jitter: float = _field(0.0, low=0.0)  # brightness, contrast and saturation change by that share at most
    erasing: float = _field(0.0, **Fraction)  # probability that a rectangle turns to noise


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and in windows of which length or images of which size."""

    name: Literal[
        "stdlib_text", "text_files", "wikitext103", "stdlib_qa", "squad_long", "qa_jsonl",
        "digit_images", "moving_digits", "image_folder", "imagenet2012", "imagenet_resized",
    ] = "stdlib_text"  # fmt: skip
    # Paths are stored as they were meant when the run began: with `~` written out, for another user has another home.
    # paths: of text_files files, globs or directories; of image_folder its root; of others the release.
    paths: tuple[str, ...] = _field((), path=True)
    length: int = _field(512, **Positive)  # text: tokens of a training window; questions: of prompt and answer
    tokenizer: str = _field("bytes", path=True)  # "bytes", or the path of a Hugging Face tokenizer.json
    lossy_tokenizer: bool = False  # text that does not come back from its tokens is accepted
    prompt_weight: float = _field(0.0, **Fraction)  # questions: weight of the context's tokens in the loss
    question_weight: float = _field(0.0, **Fraction)  # questions: weight of the question's tokens in the loss
    size: tuple[int, ...] = ()  # images: (height, width), clips: (frames, height, width), in pixels
    crop_ratio: float = _field(1.0, low=0.1, high=1.0)  # images: side of the centre crop at evaluation
    augment: AugmentConfig = _section(AugmentConfig)
    cache_dir: str = _field("", path=True)  # prepared data; "" = ~/.cache/seqpe_jax or $SEQPE_JAX_CACHE
    threads: int = _field(1, **Positive)  # training examples made at once


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer that reads the tokens or the patches."""

    kind: Literal["gpt2", "vit"] = "gpt2"
    vocabulary: int = _field(0, **NonNegative)  # gpt2: rows of the token embedding; 0 = as many as the tokenizer has
    classes: int = _field(0, **NonNegative)  # vit: 0 = as many as the data have
    patch: tuple[int, ...] = ()  # vit: pixels of a patch along each axis of data.size
    layers: int = _field(12, **Positive)
    width: int = _field(768, **Positive)
    heads: int = _field(12, **Positive)
    mlp_width: int = _field(0, **NonNegative)  # 0 = four times the width
    dropout: float = _field(0.1, **Fraction)  # after attention and MLP
    attention_dropout: float = _field(0.1, **Fraction)
    embedding_dropout: float = _field(0.1, **Fraction)
    drop_path: float = _field(0.0, **Fraction)  # vit: samples for which a branch of the last block is left out
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    layer_norm_epsilon: float = _field(1e-5, low=0.0)
    init_std: float = _field(0.02, low=0.0)
    remat: Literal["none", "full", "dots"] = "none"  # what the backward pass computes again
    attention_kind: Literal["auto", "plain", "blocks", "flash"] = "auto"  # implementation (models.choice)
    attention_block: int = _field(0, **NonNegative)  # queries and keys at once, of blocks; 0 = automatic
    scan: bool = False  # layers are compiled once and looped over; their weights are stacked


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
    """How positions reach attention. `reads` says which kinds read a field; for all others it keeps its default."""

    kind: EncodingKind = "seqpe"
    # how a position is written
    max_position: int = _field(20000, **Positive, reads=MOVABLE)  # positions along an axis: 0 .. max_position - 1
    base: int = _field(10, low=2, high=36, reads=REAL_POSITIONS)  # of the digits
    fraction_digits: int = _field(0, low=0, high=30, reads=REAL_POSITIONS)  # after the point; 1 = a token or a patch
    resize: Literal["extend", "stretch"] = _field("extend", reads=REAL_POSITIONS)  # larger than trained: on, or between
    digits: int = _field(0, **NonNegative, reads=SEQPE)  # before the point; 0 = as many as max_position needs
    padding: Literal["left", "right"] = _field("left", reads=SEQPE)
    # the encoder of the digits
    layers: int = _field(2, **Positive, reads=SEQPE)
    width: int = _field(768, **Positive, reads=SEQPE)
    heads: int = _field(12, **Positive, reads=SEQPE)
    direction: Literal["causal", "bi"] = _field("causal", reads=SEQPE)
    cls: bool = _field(True, reads=SEQPE)
    final_norm: bool = _field(True, reads=SEQPE)
    mask_padding: bool = _field(False, reads=SEQPE)
    temperature: float = _field(1.0, low=1e-6, reads=SEQPE)
    output_width: int = _field(0, **NonNegative, reads=SEQPE)  # 0 = what mode, qk and per_head ask for
    place: Literal["global", "coordinate"] = _field("global", reads=SEQPE)
    dropout: float = _field(0.1, **Fraction, reads=SEQPE)
    attention_dropout: float = _field(0.0, **Fraction, reads=SEQPE)
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = _field("gelu_tanh", reads=SEQPE)
    layer_norm_epsilon: float = _field(1e-5, low=0.0, reads=SEQPE)
    norm_init: float = _field(1.0, reads=SEQPE)
    init_distribution: Literal["normal", "truncated_normal"] = _field("normal", reads=SEQPE)
    init_std: float = _field(0.02, low=0.0, reads=("seqpe", "learned"))
    share_prefixes: bool = _field(True, reads=SEQPE)  # common leading digits are read once; dropout masks are shared too
    # how its vectors enter attention
    mode: Literal["input_add", "attn_add", "attn_mul", "attn_scalar", "rotary"] = _field("attn_scalar", reads=SEQPE)
    qk: Literal["single", "multi", "none", "halves"] = _field("single", reads=SEQPE)
    per_head: bool = _field(True, reads=SEQPE)  # the vector is split over the heads, else one head-wide one serves all
    feature_width: int = _field(0, **NonNegative, reads=SEQPE)  # attn_scalar: of a head's parts; 0 = head width
    qk_init_std: float = _field(0.02, low=0.0, reads=SEQPE)
    scalar_scale: float = _field(1.0, reads=SEQPE)
    # in which heads, and with what beside it
    position_heads: int = _field(0, **NonNegative, reads=IN_HEADS)  # the first heads that get the encoding; 0 = all
    rotary_pairs: int = _field(0, **NonNegative, reads=PARTLY_TURNED)  # fastest pairs that turn; 0: all, seqpe none
    rotary_heads: int = _field(0, **NonNegative, reads=SEQPE)  # the first heads in which these pairs turn; 0 = all
    log_scaling: bool = False  # queries that see more keys than in training grow with the logarithm of their number
    # baselines
    theta: float = _field(10000.0, low=1.0, reads=WAVES)  # base of the wavelengths
    flatten: bool = _field(False, reads=("sinusoidal",))  # on grids: one axis for all places, not columns for each axis
    reference_scramble: bool = _field(False, reads=("rotary_mixed",))  # heads and positions mixed up, as in PyTorch
    amplitude: float = _field(1.0, low=0.0, reads=("sinusoidal",))
    reference_scaling: bool = _field(False, reads=("alibi",))  # slopes over sqrt(head width), as in the PyTorch reference

    @property
    def unit(self) -> int:
        """Units of a position's fixed-point number in one token or patch."""
        return self.base**self.fraction_digits


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Near positions, near vectors."""

    weight: float = _field(0.1, low=0.0)
    warmup_steps: int = _field(0, **NonNegative)
    batch: int = _field(32, **Positive)  # pivots of one step, over all devices
    candidates: int = _field(32, **Positive)
    mixture: tuple[float, ...] = (0.0, 0.4, 0.6)  # probabilities of random, hard and distributional candidates
    hard_fraction: float = _field(0.25, **Fraction)
    window: int = _field(256, **Positive)  # range of distributional candidates
    around_pivot: bool = False  # that window lies around the pivot instead of anywhere
    past_only: bool = False  # candidates before the pivot only, as causal attention sees them
    space: Literal["vectors", "logits"] = "vectors"  # dot products of vectors, or attention logits per head
    per_head: bool = False  # space=vectors: one loss per head
    label_smoothing: float = _field(0.0, **Fraction)
    scale: float = _field(1.0, low=0.0)
    head_scales: tuple[float, ...] = ()  # space=logits: a factor more for each head that has a position; () = 1 for all


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Far vectors relate to each other as near ones do."""

    weight: float = _field(0.1, low=0.0)
    warmup_steps: int = _field(0, **NonNegative)
    batch: int = _field(32, **Positive)  # student windows of one step, over all devices
    offsets: int = _field(32, **Positive)
    metric: Literal["kl", "mse"] = "kl"
    beta: float = _field(1.0, **Fraction)
    reduction: Literal["elements", "rows"] = "elements"
    space: Literal["vectors", "logits"] = "vectors"
    per_head: bool = True
    scale: float = _field(1.0, low=0.0)


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
    """With probability `rate` a step reads windows that start elsewhere."""

    rate: float = _field(0.0, **Fraction)
    sets: int = _field(1, **Positive)  # different windows in one batch; sample i uses window i mod sets
    starts: int = _field(0, **NonNegative)  # a fixed subset of that many starts; 0 = all


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """With probability `rate` a step reads windows cut into chunks with random gaps (arXiv 2309.10400)."""

    rate: float = _field(0.0, **Fraction)
    chunks: int = _field(2, low=2)
    range: int = _field(0, **NonNegative)  # the window spreads over positions below; 0 = encoding.max_position


@dataclasses.dataclass(frozen=True)
class JitterConfig:
    """With probability `rate` a step reads windows whose places do not stand where they should."""

    rate: float = _field(0.0, **Fraction)
    range: float = _field(0.0, low=0.0)  # tokens or patches by which a coordinate is moved at most, either way


@dataclasses.dataclass(frozen=True)
class ZoomConfig:
    """With probability `rate` a step reads parts of images, enlarged, whose patches stand where they are in the whole."""

    rate: float = _field(0.0, **Fraction)
    smallest: float = _field(0.5, low=0.05, high=1.0)  # sides of a part as a share of the image's, at least


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """Training images mixed with each other, on the device; 0 = off."""

    mixup: float = _field(0.0, low=0.0)  # alpha of the Beta distribution of shares
    cutmix: float = _field(0.0, low=0.0)
    switch: float = _field(0.5, **Fraction)  # probability of cutmix where both are on


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Task loss + weighted terms on the position vectors."""

    label_smoothing: float = _field(0.0, **Fraction)  # images: share of the target spread over all classes
    mixing: MixingConfig = _section(MixingConfig)
    contrastive: ContrastiveConfig = _section(ContrastiveConfig)
    distillation: DistillationConfig = _section(DistillationConfig)
    shift: ShiftConfig = _section(ShiftConfig)
    skip: SkipConfig = _section(SkipConfig)
    jitter: JitterConfig = _section(JitterConfig)
    zoom: ZoomConfig = _section(ZoomConfig)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; model and position encoder are clipped apart."""

    learning_rate: float = _field(5e-5, low=0.0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = _field(0, **NonNegative)
    end_learning_rate: float = _field(0.0, low=0.0)
    b1: float = _field(0.9, **Fraction)
    b2: float = _field(0.999, **Fraction)
    epsilon: float = _field(1e-8, low=0.0)
    weight_decay: float = _field(0.0, low=0.0)  # on matrices of the model; never on biases, norms, embeddings
    encoder_weight_decay: float = _field(0.0, low=0.0)
    clip: float = _field(5.0, low=0.0)  # global norm; 0 = no clipping
    accumulate: int = _field(1, **Positive)  # the batch is read in that many parts


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training (validation split), and the lengths that `evaluate` takes by default (test split)."""

    every: int = _field(0, **NonNegative)  # steps; 0 = never while training
    lengths: tuple[int, ...] = ()  # text; () = the training length
    sizes: tuple[int, ...] = ()  # images: sides in pixels; () = the training size
    tokens: int = _field(0, **NonNegative)  # read at most that many per length; 0 = the whole split
    examples: int = _field(0, **NonNegative)  # questions: ask at most that many per length; 0 = all of the split
    new_tokens: int = _field(16, **Positive)  # questions: tokens generated for an answer, at most
    batch_tokens: int = _field(16384, **Positive)  # tokens or patches handled at once


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = _field(1000, **Positive)
    keep: int = _field(2, **Positive)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices split what; their product is the number of devices."""

    data: int = _field(0, **NonNegative)  # the batch alone; 0 = all devices that the others leave
    fsdp: int = _field(1, **Positive)  # the batch, and parameters and optimiser state in store
    context: int = _field(1, **Positive)  # the length of a sequence
    tensor: int = _field(1, **Positive)  # heads, hidden units and vocabulary


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic of the model; parameters, optimiser state, softmax, losses and position products are float32."""

    compute: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What a run writes about itself."""

    every: int = _field(50, **Positive)  # steps between lines of metrics.jsonl
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps recorded by the JAX profiler into WORKDIR/profile."""

    steps: str = ""  # "10:13" = steps 10, 11 and 12


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is a function of."""

    seed: int = _field(0, **NonNegative)
    steps: int = _field(1000, **Positive)
    batch_size: int = _field(32, **Positive)  # sequences of one step, over all devices
    init_from: str = _field("", path=True)  # a run or converted checkpoint whose parameters a new run begins with
    data: DataConfig = _section(DataConfig)
    model: ModelConfig = _section(ModelConfig)
    encoding: EncodingConfig = _section(EncodingConfig)
    objective: ObjectiveConfig = _section(ObjectiveConfig)
    optimizer: OptimizerConfig = _section(OptimizerConfig)
    eval: EvalConfig = _section(EvalConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig)
    mesh: MeshConfig = _section(MeshConfig)
    precision: PrecisionConfig = _section(PrecisionConfig)
    report: ReportConfig = _section(ReportConfig)
    profile: ProfileConfig = _section(ProfileConfig)

    @property
    def reads_images(self) -> bool:
        """Whether the data are images or clips, else text."""
        return self.data.name in IMAGES

    @property
    def asks_questions(self) -> bool:
        """Whether the data are questions with answers."""
        return self.data.name in QUESTIONS

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions of a training example along each axis: (length,), or the patches of an image."""
        return self.grid_of(self.data.size) if self.reads_images else (self.data.length,)

    def grid_of(self, sides: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the patches along each axis of an image or clip with these sides in pixels."""
        return tuple(side // part for side, part in zip(sides, self.model.patch, strict=True))

    def sides_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sides of an example evaluated at (height, width): clips keep their frames."""
        return (*self.data.size[:-2], *size)


# Sections that may differ when a run goes on: they change where and how it runs, not what it computes.
FREE_SECTIONS = ("eval", "checkpoint", "mesh", "report", "profile", "init_from")


def defaults() -> ml_collections.ConfigDict:
    """Returns every field at its default, as a ConfigDict that config files fill in."""
    return ml_collections.ConfigDict(to_dict(Config()))


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain dicts (tuples stay tuples)."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the validated config of nested dicts, such as a run's config.json (lists serve as tuples).

    Raises:
      InputError: a field that does not exist, has the wrong type or range, or contradicts another one.
    """
    config = _build(Config, values, "")
    _check(config)
    return config


def parse(config: ml_collections.ConfigDict) -> Config:
    """Returns the validated, frozen form of a ConfigDict, as a user gives it.

    Raises:
      InputError: as `from_dict`, or a field is set that nothing reads.
    """
    return _given(config.to_dict())


def _given(values: dict[str, Any]) -> Config:
    config = from_dict(values)
    _check_read(config)
    return config


def with_encoding(
    config: ml_collections.ConfigDict, variant: str | None, forms: dict[str, str] | None = None
) -> ml_collections.ConfigDict:
    """Sets the encoding kind that a config's variant names; what that kind does not read goes back to its default.

    Args:
      variant: an encoding kind, or a name in `forms`; None = seqpe.
      forms: further variants of a page, and the kind that each is a form of.

    Raises:
      InputError: the variant is none of these.
    """
    forms = {kind: kind for kind in typing.get_args(EncodingKind)} | (forms or {})
    variant = variant or "seqpe"
    if variant not in forms:
        raise InputError(f"unknown config variant '{variant}'.{suggest(variant, forms)}")
    kind = config.encoding.kind = forms[variant]
    for field in dataclasses.fields(EncodingConfig):
        if kind not in field.metadata.get("reads", (kind,)):
            config.encoding[field.name] = field.default
    if kind not in REAL_POSITIONS or kind == "rotary" and config.data.name in IMAGES:  # whole numbers alone
        config.encoding.fraction_digits, config.encoding.resize = 0, "extend"
        config.objective.jitter.rate = config.objective.jitter.range = config.objective.zoom.rate = 0.0
    if kind != "seqpe":
        for section, terms in VECTOR_TERMS.items():
            config.objective[section] = ml_collections.ConfigDict(dataclasses.asdict(terms(weight=0.0)))
        config.objective.shift.rate = 0.0
        config.objective.skip.rate = 0.0
    return config


VECTOR_TERMS = {"contrastive": ContrastiveConfig, "distillation": DistillationConfig}  # on vectors, which SeqPE alone has


def as_read(config: Config) -> Config:
    """Returns a config with what nothing reads at its default; older runs may have kept other values of it."""
    kind, plain = config.encoding.kind, EncodingConfig()
    unread = [field.name for field in dataclasses.fields(plain) if kind not in field.metadata.get("reads", (kind,))]
    if kind == "seqpe" and not config.encoding.rotary_pairs:
        unread += OF_PAIRS
    encoding = dataclasses.replace(config.encoding, **{name: getattr(plain, name) for name in unread})
    terms = {} if kind == "seqpe" else {section: terms(weight=0.0) for section, terms in VECTOR_TERMS.items()}
    return dataclasses.replace(config, encoding=encoding, objective=dataclasses.replace(config.objective, **terms))


OF_PAIRS = ["theta", "rotary_heads"]  # of the pairs beside SeqPE


def _check_read(config: Config) -> None:
    """Refuses fields that were set although nothing reads them. Raises: InputError: names the kinds that do."""
    kind = config.encoding.kind
    reads = {f"encoding.{field.name}": field.metadata.get("reads", ()) for field in dataclasses.fields(EncodingConfig)}
    for line in difference(to_dict(as_read(config)), to_dict(config)):
        name, value = line.partition(": ")[0], line.rpartition(" -> ")[2]
        kinds = reads.get(name, SEQPE)  # terms on vectors
        if kind in kinds:
            raise InputError(f"{name} is of the rotary pairs beside SeqPE: set encoding.rotary_pairs, or leave it out")
        raise InputError(f"{name}={value} is not read by encoding.kind='{kind}', only by {', '.join(kinds)}: leave it out")


def load(path: str, overrides: dict[str, Any] | None = None) -> Config:
    """Returns the config of `FILE.py[:variant]` with dotted overrides, e.g. {"model.layers": 2}.

    Raises:
      InputError: no such file, variant or field, or values that do not fit.
    """
    name, _, variant = expanded(path).partition(":")
    if not pathlib.Path(name).is_file():
        raise InputError(f"no config file at {name}")
    spec = importlib.util.spec_from_file_location("seqpe_config", name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant) if variant else module.get_config()
    values = config.to_dict()
    for key, value in (overrides or {}).items():
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise InputError(f"unknown config field '{key}'.{suggest(key, field_names())}")
        target[last] = value
    return _given(values)


def field_names() -> list[str]:
    """Returns the dotted names of all fields."""
    return list(field_types())


def field_types(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """Returns the type of each field by its dotted name."""
    types = {}
    for name, hint in typing.get_type_hints(kind).items():
        types |= field_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return types


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns one `field: old -> new` per leaf that differs between two nested dicts."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += difference(before, after, f"{prefix}{key}.")
        elif _plain(before) != _plain(after):
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _build(kind: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise InputError(f"unknown config field '{prefix}{name}'.{suggest(prefix + name, field_names())}")
    built = {}
    for name, value in values.items():
        hint, full = hints[name], prefix + name
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"config section '{full}' must hold fields, got {value!r}")
            built[name] = _build(hint, value, full + ".")
        else:
            built[name] = _value(hint, value, full)
            _limits(built[name], fields[name].metadata, full)
            if fields[name].metadata.get("path"):
                built[name] = _written_out(built[name])
    return kind(**built)


def _written_out(value: Any) -> Any:
    """The path or paths of a field, `files.expanded`; none stays none."""
    return tuple(map(expanded, value)) if isinstance(value, tuple) else expanded(value) if value else value


def _value(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise InputError(f"config field '{name}' is {value!r}.{suggest(str(value), choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise InputError(f"config field '{name}' must be a list, got {value!r}")
        return tuple(_value(typing.get_args(hint)[0], item, name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"config field '{name}' must be {hint.__name__}, got {value!r} ({type(value).__name__})")
    if hint is float and not math.isfinite(value):
        raise InputError(f"config field '{name}' must be finite, got {value}")
    return value


def _limits(value: Any, limits: Any, name: str) -> None:
    low, high = limits.get("low"), limits.get("high")
    if low is not None and value < low:
        raise InputError(f"config field '{name}' must be at least {low}, got {value}")
    if high is not None and value > high:
        raise InputError(f"config field '{name}' must be at most {high}, got {value}")


def profile_window(config: Config) -> tuple[int, int] | None:
    """Returns (first, end) of the profiled steps, or None.

    Raises:
      InputError: `profile.steps` is not "first:end" with first < end.
    """
    if not config.profile.steps:
        return None
    first, _, end = config.profile.steps.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise InputError(f"config field 'profile.steps' must be 'first:end' (e.g. 10:13), got {config.profile.steps!r}")
    return int(first), int(end)


def digits_of(encoding: EncodingConfig) -> int:
    """Returns the digits per coordinate: `digits`, or as many as `max_position` needs, and those after the point."""
    return (encoding.digits or count_digits(encoding.max_position, encoding.base)) + encoding.fraction_digits


def check_positions(config: Config, length: int, asked_by: str) -> None:
    """Refuses a window that needs positions which the digits do not reach, or finer ones than they tell apart.

    Raises:
      InputError: says the largest position possible and the field to change.
    """
    encoding = config.encoding
    if encoding.resize == "stretch":
        _check_finer(config, (length,), (config.data.length,), (1,), asked_by)
        length = config.data.length  # that of the positions, however many places stand on them
    if encoding.kind == "seqpe" and length > encoding.max_position:
        raise InputError(
            f"{asked_by} {length} needs position {length - 1}, but the largest position possible is "
            f"{encoding.max_position - 1} (encoding.max_position={encoding.max_position}): "
            f"raise encoding.max_position or lower {asked_by}"
        )


def _check_finer(
    config: Config, places: tuple[int, ...], trained: tuple[int, ...], patch: tuple[int, ...], asked_by: str
) -> None:
    """Refuses places that are read between those of training and would come to stand together. Raises: InputError."""
    reach = tuple(count * config.encoding.unit for count in trained)
    if any(count > limit for count, limit in zip(places, reach, strict=True)):
        asked, largest = (
            "x".join(str(count * side) for count, side in zip(counts, patch, strict=True)) for counts in (places, reach)
        )
        digits = config.encoding.fraction_digits
        raise InputError(
            f"{asked_by} {asked} is read between the positions of training (encoding.resize='stretch'), where "
            f"encoding.fraction_digits={digits} tells so many of them apart that the largest size possible is {largest}: "
            f"raise encoding.fraction_digits or lower {asked_by}"
        )


def check_size(config: Config, size: tuple[int, ...], asked_by: str) -> None:
    """Refuses an image or clip of (height, width) that patches do not divide or positions do not reach.

    Raises:
      InputError: says the largest size possible and the field to change.
    """
    sides, patch, reach = config.sides_of(size), config.model.patch, config.encoding.max_position
    written = "x".join(map(str, size))
    if len(sides) != len(patch) or any(side < 1 or side % part for side, part in zip(sides, patch, strict=False)):
        raise InputError(
            f"{asked_by} {written} does not divide into patches of {'x'.join(map(str, patch[-2:]))} pixels "
            f"(model.patch): choose multiples of {'x'.join(map(str, patch[-2:]))}"
        )
    places = config.grid_of(sides)
    if config.encoding.resize == "stretch":
        _check_finer(config, places[-2:], config.grid[-2:], patch[-2:], asked_by)
        places = (*places[:-2], *config.grid[-2:])  # those of the positions, however many patches stand on them
    if config.encoding.kind == "seqpe" and max(places) > reach:
        raise InputError(
            f"{asked_by} {written} needs position {max(places) - 1} along an axis, but the largest "
            f"position possible is {reach - 1} (encoding.max_position={reach}), so the largest size possible is "
            f"{'x'.join(str(reach * part) for part in patch[-2:])}: raise encoding.max_position or lower {asked_by}"
        )


def _check(config: Config) -> None:
    encoding, objective = config.encoding, config.objective
    digits = digits_of(encoding) - encoding.fraction_digits
    if encoding.kind == "seqpe":
        reach = largest_position(digits, encoding.base)
        if encoding.max_position - 1 > reach:
            needed = count_digits(encoding.max_position, encoding.base)
            raise InputError(
                f"encoding.max_position={encoding.max_position} needs {needed} digits in base {encoding.base}, but with "
                f"encoding.digits={digits} the largest position possible is {reach}: set encoding.digits={needed}, or "
                f"encoding.max_position to at most {reach + 1}"
            )
    if config.reads_images:
        _check_images(config)
    else:
        _check_text(config)
    _check_terms(config)
    _check_fractions(config)
    if config.model.width % config.model.heads:
        raise InputError(f"model.width={config.model.width} is not a multiple of model.heads={config.model.heads}")
    if config.batch_size % config.optimizer.accumulate:
        raise InputError(
            f"batch_size={config.batch_size} is not a multiple of optimizer.accumulate={config.optimizer.accumulate}"
        )
    part = config.batch_size // config.optimizer.accumulate
    moved = max(objective.shift.rate, objective.skip.rate, objective.jitter.rate, objective.zoom.rate) > 0
    if moved and part % objective.shift.sets:
        raise InputError(
            f"a part of the batch has {part} sequences (batch_size / optimizer.accumulate), not a multiple of "
            f"objective.shift.sets={objective.shift.sets}"
        )
    if config.optimizer.warmup_steps > config.steps:
        raise InputError(f"optimizer.warmup_steps={config.optimizer.warmup_steps} is beyond steps={config.steps}")
    if config.model.heads % config.mesh.tensor:
        raise InputError(
            f"model.heads={config.model.heads} does not divide over mesh.tensor={config.mesh.tensor}: choose a divisor"
        )
    if math.prod(config.grid) % config.mesh.context:
        field = "data.size" if config.reads_images else "data.length"
        raise InputError(
            f"the {math.prod(config.grid)} positions of an example ({field}) do not divide over "
            f"mesh.context={config.mesh.context}: choose a divisor"
        )
    window = profile_window(config)
    if window is not None and window[1] > config.steps:
        raise InputError(f"profile.steps='{config.profile.steps}' ends beyond steps={config.steps}")


def _check_text(config: Config) -> None:
    if config.model.kind != "gpt2":
        raise InputError(f"model.kind='{config.model.kind}' reads images, but data.name='{config.data.name}' is text")
    check_positions(config, config.data.length, "data.length")
    for length in config.eval.lengths:
        if length < 1:
            raise InputError(f"eval.lengths must be positive, got {length}")
        check_positions(config, length, "eval.lengths")
    if config.data.name in ("squad_long", "qa_jsonl") and not config.data.paths:
        wanted = {"squad_long": "a SQuAD-format JSON file", "qa_jsonl": "a file with one question per line"}
        raise InputError(f"data.name='{config.data.name}' needs data.paths: {wanted[config.data.name]}")
    if config.data.name in TEXTS and (config.data.prompt_weight or config.data.question_weight):
        raise InputError(
            f"data.prompt_weight and data.question_weight are for questions, and data.name='{config.data.name}' is text: "
            "set them to 0"
        )
    if config.data.name == "text_files" and not config.data.paths:
        raise InputError("data.name='text_files' needs data.paths: files, globs or directories of UTF-8 text")


def _check_images(config: Config) -> None:
    data, patch = config.data, config.model.patch
    if config.model.kind != "vit":
        raise InputError(f"model.kind='{config.model.kind}' reads text, but data.name='{data.name}' has images: set 'vit'")
    axes = 3 if data.name == "moving_digits" else 2
    for name, value in (("data.size", data.size), ("model.patch", patch)):
        if len(value) != axes or min(value) < 1:
            wanted = "(frames, height, width)" if axes == 3 else "(height, width)"
            raise InputError(f"{name} must be {wanted} in pixels for data.name='{data.name}', got {value}")
    if axes == 3 and data.size[0] % patch[0]:
        raise InputError(f"data.size={data.size}: {data.size[0]} frames do not divide by {patch[0]} (model.patch={patch})")
    check_size(config, data.size[-2:], "data.size")
    for size in config.eval.sizes:
        check_size(config, (size, size), "eval.sizes")
    if config.encoding.kind == "alibi":
        raise InputError("encoding.kind='alibi' knows distances along one axis, not on grids: choose another kind")
    augment = data.augment
    for name, pair in (("crop_scale", augment.crop_scale), ("crop_aspect", augment.crop_aspect)):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise InputError(f"data.augment.{name} must be (low, high) with 0 < low <= high, got {pair}")
    if augment.crop_scale[1] > 1:
        raise InputError(f"data.augment.crop_scale is a share of the area, at most 1, got {augment.crop_scale}")
    if data.name == "image_folder" and len(data.paths) != 1:
        raise InputError("data.name='image_folder' needs data.paths: one directory that holds a folder for each class")
    mixing = config.objective.mixing
    if (mixing.mixup or mixing.cutmix) and config.batch_size // config.optimizer.accumulate % 2:
        raise InputError("objective.mixing pairs images: the batch (batch_size / optimizer.accumulate) must be even")


LARGEST_UNITS = 2**30


def _check_fractions(config: Config) -> None:
    """Refuses positions between whole numbers where an encoding knows none, or moves that would move nothing."""
    encoding, jitter = config.encoding, config.objective.jitter
    numbered = len(config.grid) > 1 and (encoding.kind == "rotary" or encoding.kind == "sinusoidal" and encoding.flatten)
    wanted = {
        "encoding.fraction_digits": encoding.fraction_digits, "encoding.resize='stretch'": encoding.resize == "stretch",
        "objective.jitter.rate": jitter.rate, "objective.zoom.rate": config.objective.zoom.rate,
    }  # fmt: skip
    for name, value in wanted.items():
        if value and (encoding.kind not in REAL_POSITIONS or numbered):
            why = "numbers the places of a grid one after the other" if numbered else "has whole positions alone"
            raise InputError(
                f"{name} needs positions between whole numbers, and encoding.kind='{encoding.kind}' {why}: leave it as it "
                f"is, or choose one of {', '.join(kind for kind in REAL_POSITIONS if kind != encoding.kind)}"
            )
    axes = len(config.grid) if config.objective.contrastive.weight else 1  # which numbers the positions of all axes
    if (encoding.max_position * encoding.unit) ** axes > LARGEST_UNITS:
        raise InputError(
            f"encoding.max_position={encoding.max_position} with encoding.fraction_digits={encoding.fraction_digits} in "
            f"base {encoding.base} makes more than {LARGEST_UNITS} positions on {axes} axes: lower one of them"
        )
    if encoding.fraction_digits and encoding.padding == "right":
        raise InputError("encoding.padding='right' would move the point: set it to 'left', or encoding.fraction_digits=0")
    if config.objective.zoom.rate and not (config.reads_images and encoding.resize == "stretch"):
        raise InputError(
            "objective.zoom reads patches of images between those of training: set encoding.resize='stretch', on images"
        )
    if encoding.log_scaling and encoding.kind == "seqpe" and encoding.mode == "attn_mul":
        raise InputError("encoding.log_scaling and encoding.mode='attn_mul' both multiply queries: choose one of them")
    if bool(jitter.rate) != bool(jitter.range):
        raise InputError(
            f"objective.jitter.rate={jitter.rate} and objective.jitter.range={jitter.range}: set both, or both to 0"
        )
    if jitter.rate and round(jitter.range * encoding.unit) < 1:
        raise InputError(
            f"objective.jitter.range={jitter.range} is less than half of the smallest step between positions, "
            f"1/{encoding.unit}: raise it or encoding.fraction_digits"
        )


def _check_terms(config: Config) -> None:
    encoding, objective, length = config.encoding, config.objective, math.prod(config.grid)
    axes, side = len(config.grid), max(config.grid)
    contrastive, distillation = objective.contrastive, objective.distillation
    if encoding.kind != "seqpe":
        for name, value in (("contrastive.weight", contrastive.weight), ("distillation.weight", distillation.weight)):
            if value:
                raise InputError(f"objective.{name}={value}: '{encoding.kind}' has no vectors to train; set it to 0")
    if encoding.kind == "learned" and (objective.shift.rate or objective.skip.rate):
        raise InputError("a learned table has no entries elsewhere: set objective.shift.rate and skip.rate to 0")
    if objective.shift.rate + objective.skip.rate > 1:
        raise InputError("objective.shift.rate + objective.skip.rate must be at most 1: a step is shifted or skipped")
    if contrastive.weight:
        if len(contrastive.mixture) != 3 or min(contrastive.mixture) < 0 or abs(sum(contrastive.mixture) - 1) > 1e-6:
            raise InputError(
                "objective.contrastive.mixture must be three probabilities (random, hard, distributional) that add up "
                f"to 1, got {contrastive.mixture}"
            )
        room = encoding.max_position**axes - 2
        if contrastive.candidates > room:
            raise InputError(
                f"objective.contrastive.candidates={contrastive.candidates}: encoding.max_position="
                f"{encoding.max_position} leaves at most {room}"
            )
        if contrastive.past_only and axes > 1:
            raise InputError("objective.contrastive.past_only needs text: there is no before on a grid")
        if contrastive.space == "logits" and encoding.mode != "attn_scalar":
            raise InputError("objective.contrastive.space='logits' needs encoding.mode='attn_scalar'")
        heads = (encoding.position_heads or config.model.heads) if encoding.per_head else 1
        if contrastive.head_scales and (contrastive.space != "logits" or len(contrastive.head_scales) != heads):
            raise InputError(
                f"objective.contrastive.head_scales={contrastive.head_scales}: give one factor for each of the {heads} "
                "heads that have a position, with objective.contrastive.space='logits', or ()"
            )
        if min(contrastive.head_scales, default=0.0) < 0:
            raise InputError(
                f"objective.contrastive.head_scales={contrastive.head_scales}: a factor below 0 would make near positions "
                "far: give 0 or more for each head"
            )
    if distillation.weight:
        if distillation.offsets > length:
            raise InputError(
                f"objective.distillation.offsets={distillation.offsets} is more than the {length} positions of an example"
            )
        # The shifted window starts at a quarter of the length at the earliest; a shifted grid leaves the one at the origin.
        if encoding.max_position < (length + max(1, length // 4) if axes == 1 else 2 * min(config.grid)):
            raise InputError(
                f"objective.distillation needs room past the {side} positions of an example, but the largest "
                f"position possible is {encoding.max_position - 1}: raise encoding.max_position, or set "
                "objective.distillation.weight=0"
            )
        if distillation.space == "logits" and encoding.mode != "attn_scalar":
            raise InputError("objective.distillation.space='logits' needs encoding.mode='attn_scalar'")
    skip_range = objective.skip.range or encoding.max_position
    if objective.skip.rate and not side <= skip_range <= encoding.max_position:
        raise InputError(
            f"objective.skip.range={skip_range} must lie between the {side} positions of an example and those there are "
            f"(encoding.max_position={encoding.max_position})"
        )
    if objective.skip.rate and objective.skip.chunks > side:
        raise InputError(f"objective.skip.chunks={objective.skip.chunks} is more than the {side} positions of an example")
