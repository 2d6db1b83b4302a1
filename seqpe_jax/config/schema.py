"""Sections of a config: frozen dataclasses, each field with its default, its meaning, its limits and the data that it is for.

`--help=SECTION` and the documentation show the meaning of each field. Units: lengths and positions in tokens (of text) or
patches (of images), sizes in pixels, steps in optimizer steps, losses in nats.
"""

import dataclasses
import functools
from typing import Literal

from seqpe_jax.config import decoder_presets, limits
from seqpe_jax.config.encodings import CompatConfig, EncodingConfig, ModelDims, SeqPEConfig
from seqpe_jax.config.limits import field as _field
from seqpe_jax.config.limits import section as _section
from seqpe_jax.data import registry
from seqpe_jax.data.registry import (
    DATA_IMAGE,
    DATA_QA,
    DATA_SEQUENCES,
    DATA_TEXT,
    IMAGE_LIKE,
    TEXT_LIKE,
    TOKENIZED,
)

Kind = Literal[
    "gpt2", "vit", "decoder", "llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma2", "gpt_neox", "granite"
]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images, made on the host."""

    crop_scale: tuple[float, ...] = _field(
        (1.0, 1.0), "area of a random resized crop as a fraction of the image, low and high; 1,1 = no crop", high=1.0
    )
    crop_aspect: tuple[float, ...] = _field((0.75, 4 / 3), "width to height of that crop, low and high", high=1e3)
    flip: float = _field(0.0, "probability that left and right are swapped", **limits.FRACTION)
    translate: int = _field(0, "largest shift in pixels, in each direction", low=0, high=2**16)
    randaugment_layers: int = _field(0, "RandAugment operations for each image; 0 = none", low=0, high=64)
    randaugment_magnitude: float = _field(9.0, "mean magnitude of these operations", low=0.0, high=10.0)
    randaugment_std: float = _field(0.5, "standard deviation of that magnitude", low=0.0, high=10.0)
    color_jitter: float = _field(0.0, "largest relative change of brightness, contrast, saturation", low=0.0, high=10.0)
    erasing: float = _field(0.0, "probability that a random rectangle is replaced by noise", **limits.FRACTION)


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """One source of text of `data.mixture`, all of which `data.name` reads."""

    name: str = _field("", "its name in the dict")
    paths: tuple[str, ...] = _field((), "as data.paths", path=True)
    prepared: str = _field("", "as data.prepared", path=True)
    weight: float = _field(1.0, "its share of the training windows, relative to the others'", low=1e-6, high=1e6)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data set, and the length or size of its examples."""

    name: str = _field("stdlib_text", "data set", choices=registry.names)
    paths: tuple[str, ...] = _field(
        (),
        "files, globs or folders of the data set; stored with ~ replaced, for another user has another home",
        path=True,
    )
    prepared: str = _field(
        "",
        "folder that `python -m seqpe_jax.prepare` wrote from this data set, read in place of data.paths; '' = none",
        path=True,
        of=(DATA_TEXT, DATA_IMAGE),
    )
    mixture: tuple[MixtureSource, ...] = _field(
        (),
        "several sources of text in place of data.paths: {NAME: {'paths': (...), 'weight': 1.0, 'prepared': ''}, ...}; windows are "
        "drawn by weight",
        of=(DATA_TEXT,),
    )
    length: int = _field(
        512,
        "tokens of a training window, or of prompt and answer; algorithmic: the longest input, whose lengths begin at 1",
        **limits.LENGTH,
        of=TEXT_LIKE,
    )
    task: str = _field(
        "parity_check",
        "algorithmic: the task (docs/standard_tests.md)",
        choices=lambda: tuple(registry.ALGORITHMIC_TASKS),
        of=(DATA_SEQUENCES,),
    )
    form: Literal["decoder", "encoder"] = _field(
        "decoder",
        "algorithmic: outputs follow their input from left to right, or are read at blanks by attention in both directions",
        of=(DATA_SEQUENCES,),
    )
    tokenizer: str = _field(
        "bytes",
        "'bytes', 'bytes_eos' (byte 255 ends a text), or path of a Hugging Face tokenizer.json",
        path=True,
        of=TOKENIZED,
    )
    packing: Literal["concatenated", "documents"] = _field(
        "concatenated",
        "windows of text that hold several documents: read as one, or attention stays in a document, whose first token is not "
        "predicted",
        of=(DATA_TEXT,),
    )
    reset_positions: bool = _field(True, "documents: positions begin anew in each", of=(DATA_TEXT,))
    split_on: str = _field(
        "",
        "text: string of plain text after which a document ends, such as '<|endoftext|>'; it is left out",
        of=(DATA_TEXT,),
    )
    text_key: str = _field(
        "text", "text: field of a record that holds its text; a.b = field b of field a", of=(DATA_TEXT,)
    )
    raw: bool = _field(False, "text_files: read files of JSON records, and tables, as they are", of=(DATA_TEXT,))
    lossy_tokenizer: bool = _field(False, "accept text that does not come back from its tokens", of=TOKENIZED)
    probe: str = _field(
        "passkey",
        "retrieval: what is hidden in the text (docs/standard_tests.md)",
        choices=lambda: registry.PROBES,
        of=(DATA_QA,),
    )
    depths: tuple[float, ...] = _field(
        (0.0, 0.25, 0.5, 0.75, 1.0),
        "retrieval: where in the text it is, 0 = at the beginning, in turn; training draws any",
        low=0.0,
        high=1.0,
        of=(DATA_QA,),
    )
    instructions: bool = _field(
        True, "retrieval: prompts begin with what they are about; False leaves room in short ones", of=(DATA_QA,)
    )
    prompt_weight: float = _field(0.0, "weight of the context's tokens in the loss", **limits.FRACTION, of=(DATA_QA,))
    question_weight: float = _field(
        0.0, "weight of the question's tokens in the loss", **limits.FRACTION, of=(DATA_QA,)
    )
    unanswerable: Literal["skip", "empty"] = _field(
        "skip",
        "squad_long: questions without an answer, left out or asked with an empty answer, whose end token is learned",
        of=(DATA_QA,),
    )
    size: tuple[int, ...] = _field(
        (), "(height, width), or (frames, height, width) of videos, in pixels", **limits.IMAGE_SIZE, of=IMAGE_LIKE
    )
    crop_ratio: float = _field(
        1.0, "side of the center crop at evaluation, as a fraction of the image's", low=0.1, high=1.0, of=IMAGE_LIKE
    )
    bit_depth: int = _field(
        0, "image_folder: bits of grey values in 16-bit files; 0 = 16, verified", low=0, high=16, of=IMAGE_LIKE
    )
    max_pixels: int = _field(
        0,
        "image_folder: largest image, in pixels; 0 = Pillow's limit, 178,956,970",
        low=0,
        high=2**40,
        of=IMAGE_LIKE,
    )
    augment: AugmentConfig = _section(AugmentConfig, of=IMAGE_LIKE)
    cache_dir: str = _field("", "folder of prepared data; '' = ~/.cache/seqpe_jax or $SEQPE_JAX_CACHE", path=True)
    threads: int = _field(1, "threads that make examples, in each process that makes some", low=1, high=256)
    workers: int = _field(0, "processes that make examples; 0 = the main one", low=0, high=256, of=IMAGE_LIKE)

    @functools.cached_property
    def mixture_weights(self) -> dict[str, float]:
        """Share of the training windows of each source of a mixture, by name."""
        total = sum(source.weight for source in self.mixture)
        return {source.name: source.weight / total for source in self.mixture}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Transformer over tokens or patches; '' or 0 in the parts of a block = as `kind` has it (docs/models.md)."""

    kind: Kind = _field("gpt2", "network: vit for images and videos, a decoder with the parts of its name for text")
    vocabulary: int = _field(
        0, "text: rows of the token embedding; 0 = the tokenizer's", **limits.OPTIONAL_LENGTH, of=TEXT_LIKE
    )
    tied: bool = _field(True, "text: the token embedding is the output layer too", of=TEXT_LIKE)
    classes: int = _field(0, "vit: number of classes; 0 = that of the data", **limits.OPTIONAL_LENGTH, of=IMAGE_LIKE)
    patch: tuple[int, ...] = _field(
        (), "vit: sides of a patch along each axis of data.size, in pixels", **limits.IMAGE_SIZE, of=IMAGE_LIKE
    )
    pooling: Literal["class_token", "mean"] = _field(
        "class_token",
        "vit: the head reads the class token, or the mean of the patches, after the last norm",
        of=IMAGE_LIKE,
    )
    registers: int = _field(
        0,
        "vit: learned tokens without a position after the class token (Darcet et al. 2023)",
        **limits.REGISTERS,
        of=IMAGE_LIKE,
    )
    layer_scale: float = _field(
        0.0,
        "vit: initial value of the learned factors of each branch's features (LayerScale); 0 = there are none",
        **limits.OPTIONAL_FACTOR,
        of=IMAGE_LIKE,
    )
    layers: int = _field(12, "transformer blocks", **limits.LAYERS)
    width: int = _field(768, "features of a token", **limits.WIDTH)
    heads: int = _field(12, "attention heads of a block", **limits.HEADS)
    kv_heads: int = _field(
        0, "heads of keys and values, each for heads / kv_heads queries; 0 = heads", **limits.OPTIONAL_HEADS
    )
    head_width: int = _field(0, "features of a head; 0 = width / heads", **limits.OPTIONAL_WIDTH)
    norm: decoder_presets.Norm = _field("", "norms of a block; rms_norm_plus_one: the weight is 1 + w, as Gemma's")
    norm_placement: decoder_presets.NormPlacement = _field(
        "", "norms of each branch's input (pre), of its output (post), or both"
    )
    mlp: decoder_presets.Mlp = _field("", "MLP: plain, or gated by silu (swiglu) or gelu_tanh (geglu)")
    bias: decoder_presets.Bias = _field("", "linear maps with a bias: all, none, or those of queries, keys and values")
    qk_norm: decoder_presets.QKNorm = _field("", "norm of queries and keys: none, of each head, or of all together")
    residual: decoder_presets.Residual = _field(
        "", "sequential: attention, then MLP; parallel: both read the same states"
    )
    attention_cap: float = _field(
        0.0, "c: attention logits become c tanh(logits / c); 0 = as model.kind has it", **limits.OPTIONAL_FACTOR
    )
    logit_cap: float = _field(0.0, "text: the same of the final logits", **limits.OPTIONAL_FACTOR, of=TEXT_LIKE)
    attention_scale: float = _field(
        0.0,
        "factor of q . k; 0 = as model.kind has it, 1 / sqrt(features of a head) in most",
        **limits.OPTIONAL_FACTOR,
    )
    embedding_multiplier: float = _field(
        0.0,
        "text: factor of the token embeddings; 0 = as model.kind has it, 1 in most",
        **limits.OPTIONAL_FACTOR,
        of=TEXT_LIKE,
    )
    residual_multiplier: float = _field(0.0, "factor of each branch of a block; 0 likewise", **limits.OPTIONAL_FACTOR)
    logit_multiplier: float = _field(
        0.0, "text: factor of the final logits, before their cap; 0 likewise", **limits.OPTIONAL_FACTOR, of=TEXT_LIKE
    )
    window: int = _field(
        0,
        "text: newest tokens that each token sees, itself among them; 0 = all",
        **limits.OPTIONAL_LENGTH,
        of=TEXT_LIKE,
    )
    window_layers: tuple[int, ...] = _field(
        (),
        "layers with model.window: 1 or 0 for each, a shorter list repeats; () = as model.kind has it, all in most",
        low=0,
        high=1,
        of=TEXT_LIKE,
    )
    mlp_width: int = _field(0, "hidden features of an MLP; 0 = four times the width", **limits.OPTIONAL_WIDTH)
    dropout: float = _field(0.1, "rate after attention and MLP", **limits.DROP_RATE)
    attention_dropout: float = _field(0.1, "rate of attention weights", **limits.DROP_RATE)
    embedding_dropout: float = _field(0.1, "rate of embeddings", **limits.DROP_RATE)
    drop_path: float = _field(
        0.0,
        "vit: rate of examples that skip the last block's branch; less in earlier ones",
        **limits.DROP_RATE,
        of=IMAGE_LIKE,
    )
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = _field("gelu_tanh", "nonlinearity of a plain MLP")
    layer_norm_epsilon: float = _field(1e-5, "added to the variance, or to the mean square", **limits.EPSILON)
    init_std: float = _field(0.02, "standard deviation of initial weights", **limits.STD)
    remat: Literal["none", "full", "dots", "offload"] = _field(
        "none",
        "recomputed in the backward pass: none, full blocks, dots = all but matrix products; offload keeps these in host memory",
    )
    attention_kind: Literal["auto", "reference", "blockwise", "flash"] = _field(
        "auto", "implementation of attention (models.attention_dispatch)"
    )
    attention_block: int = _field(0, "blockwise: queries and keys of a block; 0 = automatic", **limits.OPTIONAL_LENGTH)
    kernel_block_q: int = _field(
        0,
        "TPU kernel: queries of a tile, a multiple of 128; 0 = 512, or 384 or 256 for less padding",
        **limits.KERNEL_BLOCK,
    )
    kernel_block_k: int = _field(0, "TPU kernel: keys of a tile, likewise", **limits.KERNEL_BLOCK)
    kernel_block_q_backward: int = _field(
        0, "TPU kernel: queries of a tile for gradients; 0 = model.kernel_block_q", **limits.KERNEL_BLOCK
    )
    kernel_block_k_backward: int = _field(
        0, "TPU kernel: keys of a tile for gradients; 0 = model.kernel_block_k", **limits.KERNEL_BLOCK
    )
    scan: bool = _field(False, "compile one block and loop over stacked weights")

    @functools.cached_property
    def parts(self) -> decoder_presets.Parts:
        """Parts of the blocks, with the values that `kind` decides."""
        return decoder_presets.resolve(self)


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """Contrastive loss: vectors of near positions are similar."""

    weight: float = _field(0.1, "of the loss", **limits.WEIGHT)
    warmup_steps: int = _field(0, "steps over which the weight rises linearly", **limits.OPTIONAL_STEPS)
    batch: int = _field(32, "anchors of a step, over all devices", **limits.BATCH)
    candidates: int = _field(32, "positions that an anchor is compared with", **limits.BATCH)
    mixture: tuple[float, ...] = _field(
        (0.0, 0.4, 0.6), "probabilities of random, hard and distributional candidates", high=1.0
    )
    hard_fraction: float = _field(
        0.25, "hard draw: fraction of the candidates that are the anchor with 1 to 3 digits changed", **limits.FRACTION
    )
    window: int = _field(256, "range of distributional candidates", low=1, high=2**30)
    around_anchor: bool = _field(False, "center that range on the anchor instead of drawing its place")
    causal_only: bool = _field(False, "text: candidates before the anchor only, as in causal attention")
    space: Literal["vectors", "logits"] = _field(
        "vectors", "compare dot products of vectors, or attention logits per head"
    )
    per_head: bool = _field(False, "space=vectors: one loss per head")
    label_smoothing: float = _field(0.0, "fraction of the target spread over all candidates", **limits.DROP_RATE)
    scale: float = _field(1.0, "factor of the dot products", **limits.WEIGHT)
    floor: float = _field(
        0.0, "nats; an anchor whose loss is lower has no gradient; 0 = every anchor has one", low=0.0, high=100.0
    )
    head_scales: tuple[float, ...] = _field(
        (), "space=logits: factor for each head that has a position; () = 1", high=1e6
    )


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Distillation loss: vectors of far windows relate to each other as those of the window at the origin."""

    weight: float = _field(0.1, "of the loss", **limits.WEIGHT)
    warmup_steps: int = _field(0, "steps over which the weight rises linearly", **limits.OPTIONAL_STEPS)
    batch: int = _field(32, "student windows of a step, over all devices", **limits.BATCH)
    offsets: int = _field(32, "positions of a window", **limits.BATCH)
    metric: Literal["kl", "mse"] = _field("kl", "distance between teacher and student")
    beta: float = _field(
        1.0, "weight of the loss with a fixed teacher; the rest has a fixed student", **limits.FRACTION
    )
    reduction: Literal["elements", "rows"] = _field("elements", "mean over all elements, or sum over each row")
    space: Literal["vectors", "logits"] = _field(
        "vectors", "compare dot products of vectors, or attention logits per head"
    )
    per_head: bool = _field(True, "space=vectors: one loss per head")
    scale: float = _field(1.0, "factor of the dot products", **limits.WEIGHT)


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
    """Shifted windows: with probability `rate` a step trains on windows that do not start at 0."""

    rate: float = _field(0.0, "probability that a step is shifted", **limits.FRACTION)
    sets: int = _field(1, "different windows in a batch; example i has window i mod sets", **limits.BATCH)
    starts: int = _field(0, "number of fixed starts that are drawn from; 0 = all", **limits.UNITS)
    carries: float = _field(
        0.0,
        "share of the shifted windows that straddle a carry, as from 999 to 1000; few do by chance",
        **limits.FRACTION,
    )


@dataclasses.dataclass(frozen=True)
class SkipConfig:
    """Skip-wise positions (PoSE, arXiv 2309.10400): windows cut into chunks with random gaps between."""

    rate: float = _field(0.0, "probability that a step has gaps", **limits.FRACTION)
    chunks: int = _field(
        2,
        "chunks of a window; 0 = each token is one, and the first is moved too: random positions in rising order (Ruoss et "
        "al. 2023, arXiv 2305.16843)",
        zero=True,
        low=2,
        high=2**20,
    )
    range: int = _field(0, "positions that the chunks spread over; 0 = encoding.max_position", **limits.UNITS)


@dataclasses.dataclass(frozen=True)
class JitterConfig:
    """Jitter: with probability `rate` each coordinate of a step's positions moves at random."""

    rate: float = _field(0.0, "probability that a step is jittered", **limits.FRACTION)
    range: float = _field(0.0, "largest move in tokens or patches, to either side", low=0.0, high=2.0**30)


@dataclasses.dataclass(frozen=True)
class ZoomConfig:
    """Zoom: with probability `rate` a step trains on enlarged crops, whose patches have their positions in the full image."""

    rate: float = _field(0.0, "probability that a step is zoomed", **limits.FRACTION)
    smallest: float = _field(0.5, "smallest side of a crop, as a fraction of the image's", low=0.05, high=1.0)


@dataclasses.dataclass(frozen=True)
class MixingConfig:
    """Mixup and CutMix of training images, on the device."""

    mixup: float = _field(0.0, "alpha of the Beta distribution of mixup; 0 = off", zero=True, low=1e-3, high=1e3)
    cutmix: float = _field(0.0, "alpha of the Beta distribution of CutMix; 0 = off", zero=True, low=1e-3, high=1e3)
    switch: float = _field(0.5, "probability of CutMix if both are on", **limits.FRACTION)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Task loss, weighted losses on position vectors, and the positions that training draws."""

    label_smoothing: float = _field(
        0.0, "fraction of the target spread over all classes", **limits.DROP_RATE, of=IMAGE_LIKE
    )
    z_loss: float = _field(
        0.0, "weight of the squared logarithm of the softmax's denominator; 0 = none", **limits.WEIGHT
    )
    mixing: MixingConfig = _section(MixingConfig, of=IMAGE_LIKE)
    contrastive: ContrastiveConfig = _section(ContrastiveConfig)
    distillation: DistillationConfig = _section(DistillationConfig)
    shift: ShiftConfig = _section(ShiftConfig)
    skip: SkipConfig = _section(SkipConfig)
    jitter: JitterConfig = _section(JitterConfig)
    zoom: ZoomConfig = _section(ZoomConfig, of=IMAGE_LIKE)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer; the gradients of the model and of the digit encoder are clipped separately."""

    kind: Literal["adamw", "muon", "lion", "adafactor", "sgd", "schedule_free_adamw"] = _field(
        "adamw", "optimizer; muon: of the hidden matrices of blocks, AdamW for all other parameters"
    )
    learning_rate: float = _field(5e-5, "peak learning rate", low=1e-12, high=100.0, once=True)
    encoder_learning_rate: float = _field(
        0.0,
        "peak learning rate of the position encoding's parameters, gates included, under the same schedule; 0 = "
        "optimizer.learning_rate",
        zero=True,
        low=1e-12,
        high=100.0,
    )
    embedding_learning_rate: float = _field(
        0.0,
        "peak learning rate of the token embeddings, under the same schedule; 0 = optimizer.learning_rate",
        zero=True,
        low=1e-12,
        high=100.0,
        of=TEXT_LIKE,
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = _field(
        "linear", "decay after warm-up; wsd: stable, then a linear decay at the end"
    )
    decay_steps: int = _field(0, "wsd: steps of the decay; 0 = a tenth of all", **limits.OPTIONAL_STEPS)
    warmup_steps: int = _field(0, "steps over which the learning rate rises linearly", **limits.OPTIONAL_STEPS)
    end_learning_rate: float = _field(0.0, "learning rate at the last step", low=0.0, high=100.0)
    b1: float = _field(0.9, "decay of the mean of gradients", **limits.DROP_RATE)
    b2: float = _field(0.999, "decay of the mean of squared gradients", **limits.DROP_RATE)
    epsilon: float = _field(1e-8, "added to the root of the squared gradients", low=1e-20, high=1.0, once=True)
    momentum: float = _field(0.95, "muon, sgd: decay of the momentum; 0 = none", **limits.DROP_RATE)
    state_dtype: Literal["float32", "bfloat16"] = _field(
        "float32", "dtype in which the mean of gradients is stored; that of squared gradients is always float32"
    )
    weight_decay: float = _field(
        0.0, "of the model's matrices; never of biases, norms, embeddings", low=0.0, high=100.0
    )
    encoder_weight_decay: float = _field(0.0, "of the digit encoder's matrices", low=0.0, high=100.0)
    clip: float = _field(5.0, "largest global norm of gradients; 0 = no clipping", zero=True, low=1e-6, high=1e6)
    ema: float = _field(
        0.0,
        "decay of a moving average of the parameters, evaluated and saved next to them; 0 = none",
        **limits.DROP_RATE,
    )
    freeze: tuple[str, ...] = _field(
        (), "patterns of the names of parameters that are not trained, such as model/*; () = none"
    )
    freeze_steps: int = _field(
        0, "first steps in which optimizer.freeze holds; 0 = all, without moments", **limits.OPTIONAL_STEPS
    )
    accumulate: int = _field(1, "micro-batches of a batch, whose gradients are averaged", **limits.BATCH)
    non_finite: Literal["stop", "skip"] = _field(
        "stop", "at a loss or gradient that is not finite: stop the run, or skip the update"
    )
    skips: int = _field(10, "non_finite=skip: consecutive skipped updates that stop the run", **limits.NUM_STEPS)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training (validation split), and the defaults of the command `evaluate` (test split)."""

    every: int = _field(0, "steps between evaluations during training; 0 = none", **limits.OPTIONAL_STEPS)
    lengths: tuple[int, ...] = _field((), "window lengths; () = the training length", **limits.LENGTH, of=TEXT_LIKE)
    sizes: tuple[int, ...] = _field(
        (), "sides of square images in pixels; () = the training size", **limits.IMAGE_SIZE, of=IMAGE_LIKE
    )
    frames: tuple[int, ...] = _field(
        (), "videos: frames at each of eval.sizes; () = as in training", **limits.IMAGE_SIZE, of=IMAGE_LIKE
    )
    tokens: int = _field(0, "tokens scored per length, at most; 0 = the whole split", low=0, high=2**40, of=TOKENIZED)
    contexts: tuple[int, ...] = _field(
        (),
        "`evaluate` alone: score the same tokens with so many tokens of context; () = no",
        low=2,
        high=2**24,
        of=(DATA_TEXT,),
    )
    stride: int = _field(
        0, "targets of a window of eval.contexts; 0 = half of the smallest", **limits.OPTIONAL_LENGTH, of=(DATA_TEXT,)
    )
    targets: int = _field(16384, "tokens scored under each of eval.contexts, at most", **limits.LENGTH, of=(DATA_TEXT,))
    key_gain: float = _field(
        2.0,
        "eval.contexts: nats by which the loss of a key token falls from the smallest to the largest (LongPPL)",
        low=0.0,
        high=100.0,
        of=(DATA_TEXT,),
    )
    key_loss: float = _field(
        2.0, "nats below which its loss is under the largest", low=1e-3, high=100.0, of=(DATA_TEXT,)
    )
    examples: int = _field(
        0,
        "questions asked, at most, 0 = the whole split; algorithmic: examples of each of eval.lengths, 0 = 512",
        **limits.UNITS,
        of=(DATA_QA, DATA_SEQUENCES),
    )
    positions: Literal["consecutive", "random"] = _field(
        "consecutive",
        "algorithmic: random positions in rising order, as objective.skip.chunks=0 trains them, in evaluations too",
        of=(DATA_SEQUENCES,),
    )
    new_tokens: int = _field(16, "tokens generated for an answer, at most", **limits.LENGTH, of=(DATA_QA,))
    batch_tokens: int = _field(16384, "tokens or patches of an evaluation batch", low=1, high=2**28)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving of the training state."""

    every: int = _field(1000, "steps between checkpoints", **limits.NUM_STEPS)
    keep: int = _field(2, "newest checkpoints that are retained", **limits.NUM_STEPS)
    keep_every: int = _field(0, "retain those of multiples of so many steps too; 0 = none", **limits.OPTIONAL_STEPS)
    best: str = _field("", "retain the best checkpoint by this metric too, such as loss@512; '' = none")
    failed_saves: int = _field(3, "consecutive failed saves that end the run", **limits.NUM_STEPS)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Mesh of devices; the product of data, fsdp, context and tensor is their number."""

    data: int = _field(0, "split of the batch alone; 0 = all devices that the other axes leave", low=0, high=2**20)
    fsdp: int = _field(1, "split of the batch, and of stored parameters and optimizer state", **limits.DEVICES)
    context: int = _field(1, "split of a sequence, and of what fsdp stores in parts", **limits.DEVICES)
    context_attention: Literal["auto", "gather", "ring"] = _field(
        "auto",
        "context above 1: gather all keys and values, or pass them around a ring of devices; auto: the ring above 1 GiB of them",
    )
    tensor: int = _field(1, "split of heads, hidden units and vocabulary", **limits.DEVICES)
    slices: int = _field(0, "TPU slices, over which data is split first; 0 = as many as there are", low=0, high=2**20)
    compiler_options: tuple[str, ...] = _field(
        ("auto",), "XLA options of the training step, each NAME=VALUE; auto: those of platform and mesh; () = none"
    )


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic of the model; parameters, softmax, losses and position products are float32."""

    compute: Literal["float32", "bfloat16"] = _field("float32", "dtype of activations and matrix products")
    matmul: limits.MatmulPrecision = _field(
        "default", "compute=float32: matrix products of the network; default: one bfloat16 pass on TPU, TF32 on GPU"
    )
    random_bits: Literal["auto", "threefry", "rbg"] = _field(
        "auto", "generator of dropout masks; auto: rbg on TPU and GPU, or as the run began"
    )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Metrics of a run."""

    every: int = _field(50, "steps between lines of metrics.jsonl", **limits.NUM_STEPS)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = _field(
        ("tensorboard",), "also record metrics there: tensorboard, wandb, mlflow; () = in metrics.jsonl alone"
    )
    watchdog: float = _field(
        300.0,
        "seconds without a step (and at least 10 steps' time) after which the run ends with all stacks; 0 = never",
        zero=True,
        low=1.0,
        high=1e6,
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Traces of the JAX profiler, in WORKDIR/profile."""

    steps: str = _field("", "steps to trace, FIRST:END, such as 10:13 for steps 10, 11 and 12; '' = none")
    processes: tuple[int, ...] = _field((0,), "processes that trace; () = all", low=0, high=2**16)


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run is a function of."""

    seed: int = _field(0, "of parameters, order of examples, and random draws", low=0, high=2**63 - 1)
    steps: int = _field(1000, "training steps", **limits.NUM_STEPS)
    batch_size: int = _field(32, "examples of a step, over all devices", **limits.BATCH)
    init_from: str = _field(
        "", "run or converted checkpoint whose parameters a new run begins with; '' = random ones", path=True
    )
    ignore_fields: tuple[str, ...] = _field(
        (),
        "fields of the config.json of a Hugging Face folder, in init_from or --config, that are unknown and passed over",
    )
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
    compat: CompatConfig = _section(CompatConfig)

    @property
    def data_kind(self) -> str:
        """Kind of the data: DATA_TEXT, DATA_QA or DATA_IMAGE of `data.registry`."""
        return registry.get(self.data.name).kind

    @property
    def is_image(self) -> bool:
        """True for images and videos."""
        return self.data_kind == DATA_IMAGE

    @property
    def is_qa(self) -> bool:
        """True for question answering."""
        return self.data_kind == DATA_QA

    @property
    def is_sequences(self) -> bool:
        """True for algorithmic tasks."""
        return self.data_kind == DATA_SEQUENCES

    @property
    def is_causal(self) -> bool:
        """True where tokens attend to those before them alone."""
        return not (self.is_image or (self.is_sequences and self.data.form == "encoder"))

    @property
    def grid(self) -> tuple[int, ...]:
        """Positions of a training example along each axis: (tokens of its window,), or the patches of an image."""
        return self.grid_of(self.data.size) if self.is_image else (self.window_of(self.data.length),)

    @property
    def dims(self) -> ModelDims:
        """Sizes for which the encoding is built. A class token and registers come before the patches of an image."""
        return ModelDims(
            self.model.layers,
            self.model.width,
            self.model.heads,
            head_width=self.model.parts.head_width,
            grid=self.grid,
            prefix_tokens=1 + self.model.registers if self.is_image else 0,
            compat=self.compat,
        )

    def window_of(self, length: int) -> int:
        """Returns the tokens of a window of text of a length: of an algorithmic task, its input with its output."""
        return registry.window_of_task(self.data.task, self.data.form, length) if self.is_sequences else length

    def grid_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the patches along each axis of an image or video of this size in pixels."""
        return tuple(side // part for side, part in zip(size, self.model.patch, strict=True))

    def full_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the full size of an example evaluated at (height, width) or (frames, height, width).

        A video without frames in its size has those of training.
        """
        return (*self.data.size[: -len(size)], *size)

    @property
    def context_stride(self) -> int:
        """Targets of each window of `eval.contexts`."""
        return self.eval.stride or min(self.eval.contexts) // 2

    @property
    def eval_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Evaluation sizes: each (length,), (height, width) or (frames, height, width)."""
        if not self.is_image:
            return tuple((length,) for length in self.eval.lengths or (self.data.length,))
        sizes = tuple((side, side) for side in self.eval.sizes) or (self.data.size[-2:],)
        if not self.eval.frames:
            return tuple(self.full_size(size) for size in sizes)
        return tuple((frames, *size) for frames in self.eval.frames for size in sizes)
