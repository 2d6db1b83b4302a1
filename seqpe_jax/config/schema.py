"""The fields of a config: typed, frozen dataclasses, each field with its limits, its default and who reads it.

Units: lengths and positions in tokens, rates and weights as plain numbers, steps in optimiser steps.
"""

import dataclasses
from typing import Literal

from seqpe_jax.config import limits
from seqpe_jax.config.encodings import EncodingConfig, ModelDims, SeqPEConfig
from seqpe_jax.config.limits import field as _field
from seqpe_jax.config.limits import section as _section
from seqpe_jax.data import registry
from seqpe_jax.data.registry import DATA_IMAGE, DATA_QA, DATA_TEXT, IMAGE_LIKE, TEXT_LIKE


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

    name: str = _field("stdlib_text", choices=registry.names)  # a data set of `data.registry`
    # Paths are stored as they were meant when the run began: with `~` written out, for another user has another home.
    # paths: of text_files files, globs or directories; of image_folder its root; of others the release.
    paths: tuple[str, ...] = _field((), path=True)
    length: int = _field(512, **limits.Length, of=TEXT_LIKE)  # tokens of a training window, or of prompt and answer
    tokenizer: str = _field("bytes", path=True, of=TEXT_LIKE)  # "bytes", or the path of a Hugging Face tokenizer.json
    lossy_tokenizer: bool = _field(False, of=TEXT_LIKE)  # text that does not come back from its tokens is accepted
    prompt_weight: float = _field(0.0, **limits.Fraction, of=(DATA_QA,))  # weight of the context's tokens in the loss
    question_weight: float = _field(
        0.0, **limits.Fraction, of=(DATA_QA,)
    )  # weight of the question's tokens in the loss
    size: tuple[int, ...] = _field(
        (), **limits.ImageSize, of=IMAGE_LIKE
    )  # pixels: (height, width), or (frames, height, width)
    crop_ratio: float = _field(1.0, low=0.1, high=1.0, of=IMAGE_LIKE)  # images: side of the centre crop at evaluation
    bit_depth: int = _field(
        0, low=0, high=16, of=IMAGE_LIKE
    )  # image_folder: of grey values in 16-bit files; 0 = 16, checked
    augment: AugmentConfig = _section(AugmentConfig, of=IMAGE_LIKE)
    cache_dir: str = _field("", path=True)  # prepared data; "" = ~/.cache/seqpe_jax or $SEQPE_JAX_CACHE
    threads: int = _field(1, low=1, high=256)  # training examples made at once


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer that reads the tokens or the patches."""

    kind: Literal["gpt2", "vit"] = "gpt2"
    vocabulary: int = _field(
        0, **limits.OptionalLength, of=TEXT_LIKE
    )  # gpt2: rows of the token embedding; 0 = the tokenizer's
    tied: bool = _field(True, of=TEXT_LIKE)  # gpt2: the token embedding gives the logits too
    classes: int = _field(0, **limits.OptionalLength, of=IMAGE_LIKE)  # vit: 0 = as many as the data have
    patch: tuple[int, ...] = _field(
        (), **limits.ImageSize, of=IMAGE_LIKE
    )  # vit: pixels of a patch along each axis of data.size
    layers: int = _field(12, **limits.Layers)
    width: int = _field(768, **limits.Width)
    heads: int = _field(12, **limits.Heads)
    mlp_width: int = _field(0, **limits.OptionalWidth)  # 0 = four times the width
    dropout: float = _field(0.1, **limits.DropRate)  # after attention and MLP
    attention_dropout: float = _field(0.1, **limits.DropRate)
    embedding_dropout: float = _field(0.1, **limits.DropRate)
    drop_path: float = _field(0.0, **limits.DropRate, of=IMAGE_LIKE)  # vit: samples without a branch of the last block
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    layer_norm_epsilon: float = _field(1e-5, **limits.Epsilon)
    init_std: float = _field(0.02, **limits.Std)
    remat: Literal["none", "full", "dots", "offload"] = "none"  # what the backward pass has of the layers
    attention_kind: Literal["auto", "reference", "blockwise", "flash"] = "auto"  # backend (models.attention_dispatch)
    attention_block: int = _field(0, **limits.OptionalLength)  # queries and keys at once, of blocks; 0 = automatic
    scan: bool = False  # layers are compiled once and looped over; their weights are stacked


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Near positions, near vectors."""

    weight: float = _field(0.1, **limits.Weight)
    warmup_steps: int = _field(0, **limits.OptionalSteps)
    batch: int = _field(32, **limits.Batch)  # pivots of one step, over all devices
    candidates: int = _field(32, **limits.Batch)
    mixture: tuple[float, ...] = _field((0.0, 0.4, 0.6), high=1.0)  # of random, hard and distributional candidates
    hard_fraction: float = _field(0.25, **limits.Fraction)
    window: int = _field(256, low=1, high=2**30)  # range of distributional candidates
    around_anchor: bool = False  # that window lies around the pivot instead of anywhere
    causal_only: bool = False  # candidates before the pivot only, as causal attention sees them
    space: Literal["vectors", "logits"] = "vectors"  # dot products of vectors, or attention logits per head
    per_head: bool = False  # space=vectors: one loss per head
    label_smoothing: float = _field(0.0, **limits.DropRate)
    scale: float = _field(1.0, **limits.Weight)
    floor: float = _field(0.0, low=0.0, high=100.0)  # nats; a pivot whose loss is below it has no gradient; 0 = none
    head_scales: tuple[float, ...] = _field((), high=1e6)  # space=logits: of each head with a position; () = 1


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Far vectors relate to each other as near ones do."""

    weight: float = _field(0.1, **limits.Weight)
    warmup_steps: int = _field(0, **limits.OptionalSteps)
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

    label_smoothing: float = _field(
        0.0, **limits.DropRate, of=IMAGE_LIKE
    )  # share of the target spread over all classes
    mixing: MixingConfig = _section(MixingConfig, of=IMAGE_LIKE)
    contrastive: ContrastiveConfig = _section(ContrastiveConfig)
    distillation: DistillationConfig = _section(DistillationConfig)
    shift: ShiftConfig = _section(ShiftConfig)
    skip: SkipConfig = _section(SkipConfig)
    jitter: JitterConfig = _section(JitterConfig)
    zoom: ZoomConfig = _section(ZoomConfig, of=IMAGE_LIKE)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; model and position encoder are clipped apart."""

    learning_rate: float = _field(5e-5, low=1e-12, high=100.0, once=True)
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"  # wsd: warm-up, stable, decay
    decay_steps: int = _field(0, **limits.OptionalSteps)  # wsd: of the linear decay at the end; 0 = a tenth of `steps`
    warmup_steps: int = _field(0, **limits.OptionalSteps)
    end_learning_rate: float = _field(0.0, low=0.0, high=100.0)
    b1: float = _field(0.9, **limits.DropRate)
    b2: float = _field(0.999, **limits.DropRate)
    epsilon: float = _field(1e-8, low=1e-20, high=1.0, once=True)
    weight_decay: float = _field(
        0.0, low=0.0, high=100.0
    )  # on matrices of the model; never on biases, norms, embeddings
    encoder_weight_decay: float = _field(0.0, low=0.0, high=100.0)
    clip: float = _field(5.0, zero=True, low=1e-6, high=1e6)  # global norm; 0 = no clipping
    accumulate: int = _field(1, **limits.Batch)  # the batch is read in that many parts
    non_finite: Literal["stop", "skip"] = "stop"  # what happens at a step whose loss or gradients are not finite
    skips: int = _field(10, **limits.NumSteps)  # of such steps in a row at most, under skip


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training (validation split), and the lengths that `evaluate` takes by default (test split)."""

    every: int = _field(0, **limits.OptionalSteps)  # steps; 0 = never while training
    lengths: tuple[int, ...] = _field((), **limits.Length, of=TEXT_LIKE)  # text; () = the training length
    sizes: tuple[int, ...] = _field(
        (), **limits.ImageSize, of=IMAGE_LIKE
    )  # images: sides in pixels; () = the training size
    frames: tuple[int, ...] = _field(
        (), **limits.ImageSize, of=IMAGE_LIKE
    )  # clips: each size at so many; () = as in training
    tokens: int = _field(
        0, low=0, high=2**40, of=TEXT_LIKE
    )  # text: score at most that many per length; 0 = the whole split
    # Text, by `evaluate` alone: the same tokens, the targets, under contexts of so many tokens; () = not measured.
    contexts: tuple[int, ...] = _field((), low=2, high=2**24, of=(DATA_TEXT,))
    stride: int = _field(
        0, **limits.OptionalLength, of=(DATA_TEXT,)
    )  # targets of a window; 0 = half the smallest context
    targets: int = _field(
        16384, **limits.Length, of=(DATA_TEXT,)
    )  # score at most that many, the same under each context
    examples: int = _field(0, **limits.Units, of=(DATA_QA,))  # questions: ask at most that many; 0 = all of the split
    new_tokens: int = _field(16, **limits.Length, of=(DATA_QA,))  # questions: tokens generated for an answer, at most
    batch_tokens: int = _field(16384, low=1, high=2**28)  # tokens or patches handled at once


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = _field(1000, **limits.NumSteps)
    keep: int = _field(2, **limits.NumSteps)  # the newest ones that stay
    keep_every: int = _field(0, **limits.OptionalSteps)  # those of every so many steps stay for good; 0 = none
    best: str = ""  # a metric measured while training, as loss@512: the best checkpoint by it stays as well; "" = none
    failed_saves: int = _field(3, **limits.NumSteps)  # in a row end the run


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

    every: int = _field(50, **limits.NumSteps)  # steps between lines of metrics.jsonl
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps recorded by the JAX profiler into WORKDIR/profile."""

    steps: str = ""  # "10:13" = steps 10, 11 and 12


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run is a function of."""

    seed: int = _field(0, low=0, high=2**63 - 1)
    steps: int = _field(1000, **limits.NumSteps)
    batch_size: int = _field(32, **limits.Batch)  # sequences of one step, over all devices
    init_from: str = _field("", path=True)  # a run or converted checkpoint whose parameters a new run begins with
    data: DataConfig = _section(DataConfig)
    model: ModelConfig = _section(ModelConfig)
    encoding: EncodingConfig = _section(SeqPEConfig)
    objective: ObjectiveConfig = _section(ObjectiveConfig)
    optimizer: OptimizerConfig = _section(OptimizerConfig)
    eval: EvalConfig = _section(EvalConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig)
    mesh: MeshConfig = _section(MeshConfig)
    precision: PrecisionConfig = _section(PrecisionConfig)
    report: ReportConfig = _section(ReportConfig)
    profile: ProfileConfig = _section(ProfileConfig)

    @property
    def is_image(self) -> bool:
        """Whether the data are images or videos, else text."""
        return self.data_kind == DATA_IMAGE

    @property
    def data_kind(self) -> str:
        """Kind of the data: DATA_TEXT, DATA_QA or DATA_IMAGE of `data.registry`."""
        return registry.get(self.data.name).kind

    @property
    def is_qa(self) -> bool:
        """Whether the data are questions with answers."""
        return self.data_kind == DATA_QA

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions of a training example along each axis: (length,), or the patches of an image."""
        return self.grid_of(self.data.size) if self.is_image else (self.data.length,)

    @property
    def dims(self) -> ModelDims:
        """Sizes for which the encoding is built. A class token comes before the patches of an image."""
        return ModelDims(
            self.model.layers, self.model.width, self.model.heads, grid=self.grid, prefix_tokens=int(self.is_image)
        )

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
    def eval_sizes(self) -> tuple[tuple[int, ...], ...]:
        """What the eval section evaluates: each (length,), (height, width) or (frames, height, width)."""
        if not self.is_image:
            return tuple((length,) for length in self.eval.lengths or (self.data.length,))
        sizes = tuple((side, side) for side in self.eval.sizes) or (self.data.size[-2:],)
        if not self.eval.frames:
            return tuple(self.sides_of(size) for size in sizes)
        return tuple((frames, *size) for frames in self.eval.frames for size in sizes)
