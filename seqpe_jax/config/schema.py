"""The fields of a config: typed, frozen dataclasses, each field with its limits, its default and who reads it.

Units: lengths and positions in tokens, rates and weights as plain numbers, steps in optimiser steps.
"""

import dataclasses
from typing import Any, Literal, get_args

from seqpe_jax.config import limits
from seqpe_jax.config.kinds import (
    ADDED_PAIRS,
    ASKED,
    GRID_ONLY,
    IMAGES,
    IN_HEADS,
    MOVABLE,
    OWN_PAIRS,
    PICTURED,
    PICTURES,
    QUESTIONS,
    REAL_POSITIONS,
    SEQPE,
    SLOPED,
    TEXT,
    WAVES,
    WRITTEN,
    EncodingKind,
    Gate,
    encoding_name,
)
from seqpe_jax.config.limits import field as _field
from seqpe_jax.config.limits import section as _section
from seqpe_jax.positions.counting import count_digits


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How training images are changed, on the host, one by one."""

    crop_scale: tuple[float, ...] = _field((1.0, 1.0), high=1.0)  # of the area, of a random resized crop; 1 = all of it
    crop_aspect: tuple[float, ...] = _field((0.75, 4 / 3), high=1e3)  # width to height of that crop
    flip: float = _field(0.0, **limits.Fraction)  # left and right exchanged, with that probability
    translate: int = _field(0, low=0, high=2**16)  # pixels moved at most, in each direction
    randaugment_layers: int = _field(0, low=0, high=64)  # operations for each image
    randaugment_magnitude: float = _field(9.0, low=0.0, high=10.0)
    randaugment_std: float = _field(0.5, low=0.0, high=10.0)
    color_jitter: float = _field(0.0, low=0.0, high=10.0)  # brightness, contrast and saturation change by at most
    erasing: float = _field(0.0, **limits.Fraction)  # probability that a rectangle turns to noise


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and in windows of which length or images of which size."""

    name: Literal[
        "stdlib_text",
        "text_files",
        "wikitext103",
        "stdlib_qa",
        "squad_long",
        "qa_jsonl",
        "digit_images",
        "moving_digits",
        "image_folder",
        "imagenet2012",
        "imagenet_resized",
    ] = "stdlib_text"
    # Paths are stored as they were meant when the run began: with `~` written out, for another user has another home.
    # paths: of text_files files, globs or directories; of image_folder its root; of others the release.
    paths: tuple[str, ...] = _field((), path=True)
    length: int = _field(512, **limits.Length, of=WRITTEN)  # tokens of a training window, or of prompt and answer
    tokenizer: str = _field("bytes", path=True, of=WRITTEN)  # "bytes", or the path of a Hugging Face tokenizer.json
    lossy_tokenizer: bool = _field(False, of=WRITTEN)  # text that does not come back from its tokens is accepted
    prompt_weight: float = _field(0.0, **limits.Fraction, of=(ASKED,))  # weight of the context's tokens in the loss
    question_weight: float = _field(0.0, **limits.Fraction, of=(ASKED,))  # weight of the question's tokens in the loss
    size: tuple[int, ...] = _field(
        (), **limits.Sides, of=PICTURES
    )  # pixels: (height, width), or (frames, height, width)
    crop_ratio: float = _field(1.0, low=0.1, high=1.0, of=PICTURES)  # images: side of the centre crop at evaluation
    bit_depth: int = _field(
        0, low=0, high=16, of=PICTURES
    )  # image_folder: of grey values in 16-bit files; 0 = 16, checked
    augment: AugmentConfig = _section(AugmentConfig, of=PICTURES)
    cache_dir: str = _field("", path=True)  # prepared data; "" = ~/.cache/seqpe_jax or $SEQPE_JAX_CACHE
    threads: int = _field(1, low=1, high=256)  # training examples made at once


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer that reads the tokens or the patches."""

    kind: Literal["gpt2", "vit"] = "gpt2"
    vocabulary: int = _field(
        0, **limits.LengthOrNone, of=WRITTEN
    )  # gpt2: rows of the token embedding; 0 = the tokenizer's
    tied: bool = _field(True, of=WRITTEN)  # gpt2: the token embedding gives the logits too
    classes: int = _field(0, **limits.LengthOrNone, of=PICTURES)  # vit: 0 = as many as the data have
    patch: tuple[int, ...] = _field(
        (), **limits.Sides, of=PICTURES
    )  # vit: pixels of a patch along each axis of data.size
    layers: int = _field(12, **limits.Layers)
    width: int = _field(768, **limits.Width)
    heads: int = _field(12, **limits.Heads)
    mlp_width: int = _field(0, **limits.WidthOrNone)  # 0 = four times the width
    dropout: float = _field(0.1, **limits.LeftOut)  # after attention and MLP
    attention_dropout: float = _field(0.1, **limits.LeftOut)
    embedding_dropout: float = _field(0.1, **limits.LeftOut)
    drop_path: float = _field(0.0, **limits.LeftOut, of=PICTURES)  # vit: samples without a branch of the last block
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    layer_norm_epsilon: float = _field(1e-5, **limits.Epsilon)
    init_std: float = _field(0.02, **limits.Std)
    remat: Literal["none", "full", "dots", "offload"] = "none"  # what the backward pass has of the layers
    attention_kind: Literal["auto", "plain", "blocks", "flash"] = "auto"  # implementation (models.choice)
    attention_block: int = _field(0, **limits.LengthOrNone)  # queries and keys at once, of blocks; 0 = automatic
    scan: bool = False  # layers are compiled once and looped over; their weights are stacked


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
    resize: Literal["extend", "stretch"] = _field("extend", reads=REAL_POSITIONS, combined=_MOVED)
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
    output_width: int = _field(0, **limits.WidthOrNone, reads=SEQPE)  # 0 = what mode, qk and per_head ask for
    place: Literal["global", "coordinate"] = _field("global", reads=SEQPE)
    dropout: float = _field(0.1, **limits.LeftOut, reads=SEQPE)
    attention_dropout: float = _field(0.0, **limits.LeftOut, reads=SEQPE)
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
    feature_width: int = _field(0, **limits.WidthOrNone, reads=SEQPE)  # attn_scalar: of a head's parts; 0 = head width
    qk_init_std: float = _field(0.02, **limits.Std, reads=SEQPE)
    scalar_scale: float = _field(1.0, low=-1e6, high=1e6, reads=SEQPE)
    # in which heads, and combined with what
    position_heads: int = _field(
        0, **limits.HeadsOrNone, reads=IN_HEADS
    )  # the first heads that get the encoding; 0 = all
    # The fastest pairs of q and k that rotate; 0 = none, but rotary all and scale_invariant half of them.
    rotary_pairs: int = _field(0, **limits.WidthOrNone, reads=(*OWN_PAIRS, *ADDED_PAIRS))
    # The first heads in which added pairs rotate; 0 = all.
    rotary_heads: int = _field(0, **limits.HeadsOrNone, reads=(), combined=_PAIRS)
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
    # training length, computed by `config.lengths.lengths_of`, which has the sources.
    t5_buckets: int = _field(0, zero=True, low=2, high=4096, reads=("t5",))  # distance buckets
    t5_max_distance: int = _field(0, **limits.LengthOrNone, reads=("t5",))  # tokens; the last bucket begins below
    fire_threshold: float = _field(
        0.0, zero=True, low=1e-3, high=2.0**30, reads=("fire",)
    )  # of a fresh model, in tokens
    fire_scale: float = _field(0.0, zero=True, low=1e-6, high=1e6, reads=("fire",))  # c of a fresh model, per token
    kerple_scale: float = _field(1.0, low=0.02, high=1e6, reads=("kerple",))  # upper end of fresh r2, per token
    scale_invariant_tau: float = _field(10.0, low=1e-3, high=2.0**30, reads=("scale_invariant",))  # tokens
    yarn_beta_fast: float = _field(0.0, zero=True, low=1e-3, high=1e6, **_YARN)  # pairs of more turns stay
    yarn_beta_slow: float = _field(1.0, low=1e-3, high=1e6, **_YARN)  # turns up to which it is interpolated
    slope_scale: float = _field(1.0, low=1e-6, high=1e6, reads=SLOPED)  # factor of the slopes, per token or patch
    directed_heads: int = _field(0, **limits.HeadsOrNone, reads=("lookhere",))  # that see one side; 0 = two thirds

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
        if self.resize == "stretch":
            return "encoding.resize='stretch'"
        return f"encoding.scaling='{self.scaling}'" if self.scaling != "none" else ""


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Near positions, near vectors."""

    weight: float = _field(0.1, **limits.Weight)
    warmup_steps: int = _field(0, **limits.StepsOrNone)
    batch: int = _field(32, **limits.Batch)  # pivots of one step, over all devices
    candidates: int = _field(32, **limits.Batch)
    mixture: tuple[float, ...] = _field((0.0, 0.4, 0.6), high=1.0)  # of random, hard and distributional candidates
    hard_fraction: float = _field(0.25, **limits.Fraction)
    window: int = _field(256, low=1, high=2**30)  # range of distributional candidates
    around_pivot: bool = False  # that window lies around the pivot instead of anywhere
    past_only: bool = False  # candidates before the pivot only, as causal attention sees them
    space: Literal["vectors", "logits"] = "vectors"  # dot products of vectors, or attention logits per head
    per_head: bool = False  # space=vectors: one loss per head
    label_smoothing: float = _field(0.0, **limits.LeftOut)
    scale: float = _field(1.0, **limits.Weight)
    floor: float = _field(0.0, low=0.0, high=100.0)  # nats; a pivot whose loss is below it has no gradient; 0 = none
    head_scales: tuple[float, ...] = _field((), high=1e6)  # space=logits: of each head with a position; () = 1


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Far vectors relate to each other as near ones do."""

    weight: float = _field(0.1, **limits.Weight)
    warmup_steps: int = _field(0, **limits.StepsOrNone)
    batch: int = _field(32, **limits.Batch)  # student windows of one step, over all devices
    offsets: int = _field(32, **limits.Batch)
    metric: Literal["kl", "mse"] = "kl"
    beta: float = _field(1.0, **limits.Fraction)
    reduction: Literal["elements", "rows"] = "elements"
    space: Literal["vectors", "logits"] = "vectors"
    per_head: bool = True
    scale: float = _field(1.0, **limits.Weight)


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
    """With probability `rate` a step reads windows that start elsewhere."""

    rate: float = _field(0.0, **limits.Fraction)
    sets: int = _field(1, **limits.Batch)  # different windows in one batch; sample i uses window i mod sets
    starts: int = _field(0, **limits.Units)  # a fixed subset of that many starts; 0 = all


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """With probability `rate` a step reads windows cut into chunks with random gaps (arXiv 2309.10400)."""

    rate: float = _field(0.0, **limits.Fraction)
    chunks: int = _field(2, low=2, high=2**20)
    range: int = _field(0, **limits.Units)  # the window spreads over positions below; 0 = encoding.max_position


@dataclasses.dataclass(frozen=True)
class JitterConfig:
    """With probability `rate` a step reads windows whose places do not stand where they should."""

    rate: float = _field(0.0, **limits.Fraction)
    range: float = _field(0.0, low=0.0, high=2.0**30)  # tokens or patches that a coordinate moves at most, either way


@dataclasses.dataclass(frozen=True)
class ZoomConfig:
    """With probability `rate` a step reads parts of images, enlarged, whose patches stand where they are in the whole."""

    rate: float = _field(0.0, **limits.Fraction)
    smallest: float = _field(0.5, low=0.05, high=1.0)  # sides of a part as a share of the image's, at least


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """Training images mixed with each other, on the device; 0 = off."""

    mixup: float = _field(0.0, zero=True, low=1e-3, high=1e3)  # alpha of the Beta distribution of shares
    cutmix: float = _field(0.0, zero=True, low=1e-3, high=1e3)
    switch: float = _field(0.5, **limits.Fraction)  # probability of cutmix where both are on


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Task loss + weighted terms on the position vectors."""

    label_smoothing: float = _field(0.0, **limits.LeftOut, of=PICTURES)  # share of the target spread over all classes
    mixing: MixingConfig = _section(MixingConfig, of=PICTURES)
    contrastive: ContrastiveConfig = _section(ContrastiveConfig)
    distillation: DistillationConfig = _section(DistillationConfig)
    shift: ShiftConfig = _section(ShiftConfig)
    skip: SkipConfig = _section(SkipConfig)
    jitter: JitterConfig = _section(JitterConfig)
    zoom: ZoomConfig = _section(ZoomConfig, of=PICTURES)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; model and position encoder are clipped apart."""

    learning_rate: float = _field(5e-5, low=1e-12, high=100.0, once=True)
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"  # wsd: warm-up, stable, decay
    decay_steps: int = _field(0, **limits.StepsOrNone)  # wsd: of the linear decay at the end; 0 = a tenth of `steps`
    warmup_steps: int = _field(0, **limits.StepsOrNone)
    end_learning_rate: float = _field(0.0, low=0.0, high=100.0)
    b1: float = _field(0.9, **limits.LeftOut)
    b2: float = _field(0.999, **limits.LeftOut)
    epsilon: float = _field(1e-8, low=1e-20, high=1.0, once=True)
    weight_decay: float = _field(
        0.0, low=0.0, high=100.0
    )  # on matrices of the model; never on biases, norms, embeddings
    encoder_weight_decay: float = _field(0.0, low=0.0, high=100.0)
    clip: float = _field(5.0, zero=True, low=1e-6, high=1e6)  # global norm; 0 = no clipping
    accumulate: int = _field(1, **limits.Batch)  # the batch is read in that many parts
    non_finite: Literal["stop", "skip"] = "stop"  # what happens at a step whose loss or gradients are not finite
    skips: int = _field(10, **limits.Steps)  # of such steps in a row at most, under skip


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training (validation split), and the lengths that `evaluate` takes by default (test split)."""

    every: int = _field(0, **limits.StepsOrNone)  # steps; 0 = never while training
    lengths: tuple[int, ...] = _field((), **limits.Length, of=WRITTEN)  # text; () = the training length
    sizes: tuple[int, ...] = _field((), **limits.Sides, of=PICTURES)  # images: sides in pixels; () = the training size
    frames: tuple[int, ...] = _field(
        (), **limits.Sides, of=PICTURES
    )  # clips: each size at so many; () = as in training
    tokens: int = _field(
        0, low=0, high=2**40, of=WRITTEN
    )  # text: score at most that many per length; 0 = the whole split
    # Text, by `evaluate` alone: the same tokens, the targets, under contexts of so many tokens; () = not measured.
    contexts: tuple[int, ...] = _field((), low=2, high=2**24, of=(TEXT,))
    stride: int = _field(0, **limits.LengthOrNone, of=(TEXT,))  # targets of a window; 0 = half the smallest context
    targets: int = _field(16384, **limits.Length, of=(TEXT,))  # score at most that many, the same under each context
    examples: int = _field(0, **limits.Units, of=(ASKED,))  # questions: ask at most that many; 0 = all of the split
    new_tokens: int = _field(16, **limits.Length, of=(ASKED,))  # questions: tokens generated for an answer, at most
    batch_tokens: int = _field(16384, low=1, high=2**28)  # tokens or patches handled at once


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = _field(1000, **limits.Steps)
    keep: int = _field(2, **limits.Steps)  # the newest ones that stay
    keep_every: int = _field(0, **limits.StepsOrNone)  # those of every so many steps stay for good; 0 = none
    best: str = ""  # a metric measured while training, as loss@512: the best checkpoint by it stays as well; "" = none
    failed_saves: int = _field(3, **limits.Steps)  # in a row end the run


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices split what; the product of the first four is the number of devices."""

    data: int = _field(0, low=0, high=2**20)  # the batch alone; 0 = all devices that the others leave
    fsdp: int = _field(1, **limits.Devices)  # the batch, and parameters and optimiser state in store
    context: int = _field(1, **limits.Devices)  # the length of a sequence
    tensor: int = _field(1, **limits.Devices)  # heads, hidden units and vocabulary
    slices: int = _field(0, low=0, high=2**20)  # TPU slices, over which data is split first; 0 = as many as there are


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic of the model; parameters, optimiser state, softmax, losses and position products are float32."""

    compute: Literal["float32", "bfloat16"] = "float32"
    random_bits: Literal["auto", "threefry", "rbg"] = "auto"  # of masks; auto: rbg on TPU and GPU, or as the run began


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What a run writes about itself."""

    every: int = _field(50, **limits.Steps)  # steps between lines of metrics.jsonl
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps recorded by the JAX profiler into WORKDIR/profile."""

    steps: str = ""  # "10:13" = steps 10, 11 and 12


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is a function of."""

    seed: int = _field(0, low=0, high=2**63 - 1)
    steps: int = _field(1000, **limits.Steps)
    batch_size: int = _field(32, **limits.Batch)  # sequences of one step, over all devices
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
    def read_as(self) -> str:
        """The kind of the data: TEXT, ASKED or PICTURED."""
        return PICTURED if self.reads_images else ASKED if self.asks_questions else TEXT

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
        """Returns the sides of an example evaluated at (height, width), or of a clip at (frames, height, width).

        A clip for which no frames are named has those of training.
        """
        return (*self.data.size[: -len(size)], *size)

    @property
    def context_stride(self) -> int:
        """Targets that a window of each of `eval.contexts` scores."""
        return self.eval.stride or min(self.eval.contexts) // 2

    @property
    def scales(self) -> tuple[tuple[int, ...], ...]:
        """What the eval section evaluates: each (length,), (height, width) or (frames, height, width)."""
        if not self.reads_images:
            return tuple((length,) for length in self.eval.lengths or (self.data.length,))
        sizes = tuple((side, side) for side in self.eval.sizes) or (self.data.size[-2:],)
        if not self.eval.frames:
            return tuple(self.sides_of(size) for size in sizes)
        return tuple((frames, *size) for frames in self.eval.frames for size in sizes)


def digits_of(encoding: EncodingConfig) -> int:
    """Returns the digits per coordinate: `digits`, or as many as `max_position` needs, and those after the point."""
    return (encoding.digits or count_digits(encoding.max_position, encoding.base)) + encoding.fraction_digits
