"""Config validation: constraints between fields, and fields of the command line that have no effect.

Each refusal is one line that says how to set the fields.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

from seqpe_jax.config.decoder_presets import TEXT_KINDS
from seqpe_jax.config.encodings import ENCODINGS, LearnedConfig, SeqPEConfig, kinds_for
from seqpe_jax.config.schema import Config, ContrastiveConfig, DistillationConfig, OptimizerConfig
from seqpe_jax.data import registry
from seqpe_jax.errors import InputError
from seqpe_jax.positions.counting import carry_levels

MAX_POSITION_UNITS = 2**30  # of positions along an axis, which are int32
MAX_POSITIONS_PER_STEP = 2**28
KERNEL_LANES = 128  # of a TPU: `attention_tpu.LANES`


def check(config: Config) -> None:
    """Raises InputError if fields of a config contradict each other."""
    config.compat.check(config.encoding.kind)
    _check_sources(config)
    registry.get(config.data.name).check_options(config.data)
    if config.data.prepared and not config.is_qa:
        registry.get(config.data.name).check_prepared()
    if config.is_image:
        _check_images(config)
    else:
        _check_text(config)
    _check_model(config)
    _check_step_size(config)
    _check_drawn_positions(config)
    _check_vector_losses(config)
    _check_real_positions(config)
    _check_batch(config)
    _check_optimizer(config)
    _check_checkpoint(config)
    _check_mesh(config)
    _check_kernel_blocks(config)
    trackers = config.report.trackers
    if twice := [name for name in trackers if trackers.count(name) > 1]:
        raise InputError(f"report.trackers names {twice[0]} twice: name it once")
    window = profile_window(config)
    if window is not None and window[1] > config.steps:
        raise InputError(f"profile.steps='{config.profile.steps}' ends beyond steps={config.steps}")


def profile_window(config: Config) -> tuple[int, int] | None:
    """Returns (first, end) of the profiled steps, or None.

    Raises:
      InputError: `profile.steps` is not "first:end" with first < end.
    """
    if not config.profile.steps:
        return None
    first, _, end = config.profile.steps.partition(":")
    written = re.fullmatch(r"[0-9]{1,18}:[0-9]{1,18}", config.profile.steps)
    if not (written and int(first) < int(end)):
        raise InputError(f"config field 'profile.steps' must be 'first:end' (e.g. 10:13), got {config.profile.steps!r}")
    return int(first), int(end)


# --- Positions


def check_length(config: Config, length: int, source: str, *, training: bool = False) -> None:
    """Refuses a length of text, or of an algorithmic task's input, as `check_positions` does its window. Raises: InputError."""
    check_positions(config, config.window_of(length), source, training=training, input_length=length)


def check_positions(
    config: Config, length: int, source: str, *, training: bool = False, input_length: int | None = None
) -> None:
    """Refuses a window that needs positions beyond those of the digits, or finer ones than they distinguish.

    Args:
      config: config of the run.
      length: tokens of the window.
      source: field or option that sets the length, for the message.
      training: the window is trained on, and must end below encoding.max_position.
      input_length: what the source says, if the window may hold an input with its output.

    Raises:
      InputError: says the largest position possible and the field to change.
    """
    encoding = config.encoding
    if encoding.resize == "interpolate":
        _check_resolution(config, (length,), config.grid, (1,), source)
        length = config.grid[0]  # interpolated positions stay within those of training
    if not isinstance(encoding, SeqPEConfig):
        return
    count, limit, field = _num_positions(encoding, training)
    if length > count:
        with_output = input_length is not None and input_length != length
        stated = f"{input_length}, with its output a window of {length}," if with_output else length
        raise InputError(
            f"{source} {stated} needs position {length - 1}, but the largest position possible is {count - 1} ({limit}): "
            f"raise {field} or lower {source}"
        )


def check_size(config: Config, size: tuple[int, ...], source: str, *, training: bool = False) -> None:
    """Refuses an image or video that patches do not divide, or that needs more positions than there are.

    Args:
      config: config of the run.
      size: (height, width), or (frames, height, width) of a video, in pixels.
      source: field or option that sets the size, for the message.
      training: as in `check_positions`.

    Raises:
      InputError: says the largest size possible and the field to change.
    """
    sides, patch = config.full_size(size), config.model.patch
    label, parts = "x".join(map(str, size)), patch[-len(size) :]
    if len(size) > len(patch):
        raise InputError(f"{source} {label} has frames, but data.name='{config.data.name}' has images: name two sides")
    if any(side < 1 or side % part for side, part in zip(sides, patch, strict=True)):
        raise InputError(
            f"{source} {label} does not divide into patches of {'x'.join(map(str, parts))} pixels (model.patch): "
            f"choose multiples of {'x'.join(map(str, parts))}"
        )
    grid = config.grid_of(sides)
    if config.encoding.resize == "interpolate":
        _check_resolution(config, grid[-2:], config.grid[-2:], patch[-2:], source)
        grid = (*grid[:-2], *config.grid[-2:])  # interpolated positions stay within those of training
    if not isinstance(config.encoding, SeqPEConfig):
        return
    count, limit, field = _num_positions(config.encoding, training)
    if max(grid) > count:
        raise InputError(
            f"{source} {label} needs position {max(grid) - 1} along an axis, but the largest "
            f"position possible is {count - 1} ({limit}), so the largest size possible is "
            f"{'x'.join(str(count * part) for part in parts)}: raise {field} or lower {source}"
        )


def _num_positions(encoding: SeqPEConfig, training: bool) -> tuple[int, str, str]:
    """Returns the number of positions along an axis, its limit in words, and the field to raise.

    Args:
      encoding: encoding section with digits.
      training: positions that training draws from, below max_position; else all that the digits write.
    """
    if training:
        return encoding.max_position, f"encoding.max_position={encoding.max_position}", "encoding.max_position"
    digits = encoding.integer_digits
    count = min(encoding.base**digits, MAX_POSITION_UNITS // encoding.position_resolution)
    limit = f"which {digits} digits in base {encoding.base} write"
    return count, limit, "encoding.digits" if encoding.digits else "encoding.max_position"


def _check_resolution(
    config: Config, grid: tuple[int, ...], trained_grid: tuple[int, ...], patch: tuple[int, ...], source: str
) -> None:
    """Raises InputError if several interpolated positions would be rounded to one."""
    most = tuple(count * config.encoding.position_resolution for count in trained_grid)
    if any(count > limit for count, limit in zip(grid, most, strict=True)):
        wanted, largest = (
            "x".join(str(count * side) for count, side in zip(counts, patch, strict=True)) for counts in (grid, most)
        )
        digits = config.encoding.fraction_digits
        raise InputError(
            f"{source} {wanted} is read between the positions of training (encoding.resize='interpolate'), of "
            f"which encoding.fraction_digits={digits} distinguishes so few that the largest size possible is {largest}: "
            f"raise encoding.fraction_digits or lower {source}"
        )


def _check_step_size(config: Config) -> None:
    """Raises InputError if fields within their limits make more positions in one step than fit."""
    data, objective = config.data, config.objective
    contrastive, distillation = objective.contrastive, objective.distillation
    num_positions = math.prod(config.grid)
    side = "data.size" if config.is_image else "data.length"
    counts = {
        f"batch_size={config.batch_size} and {side}": config.batch_size * num_positions,
        f"the {num_positions} patches of data.size={data.size}, or its pixels,": math.prod(data.size),
        "objective.contrastive.batch and candidates": contrastive.batch * (contrastive.candidates + 1),
        "objective.distillation.batch and offsets": distillation.batch * distillation.offsets,
        "objective.shift.sets and " + side: objective.shift.sets * num_positions,
    }
    for fields, count in counts.items():
        if count > MAX_POSITIONS_PER_STEP:
            raise InputError(
                f"{fields} make {count} positions in one step, and at most {MAX_POSITIONS_PER_STEP} are possible: "
                "lower them"
            )


def _check_real_positions(config: Config) -> None:
    """Raises InputError if the encoding lacks positions between whole numbers that other fields need."""
    encoding, jitter, zoom = config.encoding, config.objective.jitter, config.objective.zoom
    axes = len(config.grid)
    needing = {
        "encoding.fraction_digits": encoding.fraction_digits,
        "encoding.resize='interpolate'": encoding.resize == "interpolate",
        "objective.jitter.rate": jitter.rate,
        "objective.zoom.rate": zoom.rate,
    }
    for name, value in needing.items():
        if value and not encoding.real_positions_on(axes):
            reason = (
                "numbers the patches of a grid one after the other" if encoding.real_positions else "has integers alone"
            )
            if not encoding.knows_positions:
                reason = "has no positions without encoding.rotary_pairs"
            others = [kind for kind in kinds_for(axes) if ENCODINGS[kind].REAL_POSITIONS and kind != encoding.kind]
            raise InputError(
                f"{name} needs positions between whole numbers, and encoding.kind='{encoding.kind}' {reason}: leave it out, "
                f"or choose one of {', '.join(others)}"
            )
    numbered_axes = axes if config.objective.contrastive.weight else 1  # that loss numbers the positions of all axes
    if (encoding.max_position * encoding.position_resolution) ** numbered_axes > MAX_POSITION_UNITS:
        raise InputError(
            f"encoding.max_position={encoding.max_position} with encoding.fraction_digits={encoding.fraction_digits} in "
            f"base {encoding.base} makes more than {MAX_POSITION_UNITS} positions on {numbered_axes} axes: lower one of them"
        )
    if zoom.rate and not (config.is_image and encoding.resize == "interpolate"):
        raise InputError(
            "objective.zoom reads patches of images between those of training: set encoding.resize='interpolate', on images"
        )
    if bool(jitter.rate) != bool(jitter.range):
        raise InputError(
            f"objective.jitter.rate={jitter.rate} and objective.jitter.range={jitter.range}: set both, or both to 0"
        )
    if jitter.rate and round(jitter.range * encoding.position_resolution) < 1:
        raise InputError(
            f"objective.jitter.range={jitter.range} is less than half of the smallest step between positions, "
            f"1/{encoding.position_resolution}: raise it or encoding.fraction_digits"
        )


def _check_drawn_positions(config: Config) -> None:
    """Raises InputError if shifted or skip-wise windows do not fit into the positions."""
    encoding, shift, skip, side = config.encoding, config.objective.shift, config.objective.skip, max(config.grid)
    if isinstance(encoding, LearnedConfig) and not encoding.table_length and (shift.rate or skip.rate):
        raise InputError(
            "a learned table has entries for the training positions alone: set objective.shift.rate and skip.rate to 0, or "
            "encoding.table_length to the positions that are drawn"
        )
    if shift.carries:
        _check_carries(config)
    if shift.rate + skip.rate > 1:
        raise InputError("objective.shift.rate + objective.skip.rate must be at most 1: a step is shifted or skipped")
    skip_range = skip.range or encoding.max_position
    if skip.rate and not side <= skip_range <= encoding.max_position:
        raise InputError(
            f"objective.skip.range={skip_range} must be from the {side} positions of an example to "
            f"encoding.max_position={encoding.max_position}"
        )
    if skip.rate and skip.chunks > side:
        raise InputError(f"objective.skip.chunks={skip.chunks} is more than the {side} positions of an example")


def _check_carries(config: Config) -> None:
    """Raises InputError if no window can straddle a carry, or if the starts are fixed."""
    encoding, sides = config.encoding, config.grid
    if config.objective.shift.starts:
        raise InputError(
            f"objective.shift.starts={config.objective.shift.starts} fixes where windows start, and objective.shift.carries "
            "chooses other starts: set one of the two to 0"
        )
    resolution = encoding.position_resolution
    limit = encoding.max_position * resolution
    if not any(side > 1 and carry_levels((side - 1) * resolution, limit, encoding.base) for side in sides):
        raise InputError(
            f"objective.shift.carries={config.objective.shift.carries}: below encoding.max_position={encoding.max_position} no "
            f"power of encoding.base={encoding.base} is larger than a window of {max(sides)}: raise encoding.max_position, or "
            "set objective.shift.carries to 0"
        )


# --- Data


def _check_text(config: Config) -> None:
    data = config.data
    if config.model.kind == "vit":
        raise InputError(
            f"model.kind='vit' reads images, but data.name='{data.name}' is text: choose one of {', '.join(TEXT_KINDS)}"
        )
    config.encoding.check(axes=1)
    check_length(config, data.length, "data.length", training=True)
    for length in config.eval.lengths:
        if length < 1:
            raise InputError(f"eval.lengths must be positive, got {length}")
        check_length(config, length, "eval.lengths")
    _check_contexts(config)
    _check_sequences(config)
    if not config.is_qa and (data.prompt_weight or data.question_weight):
        raise InputError(
            f"data.prompt_weight and data.question_weight are for questions, and data.name='{data.name}' is text: "
            "set them to 0"
        )


def _check_sequences(config: Config) -> None:
    """Raises InputError if attention in both directions meets parts for one, or evaluations draw positions that there are not."""
    data, encoding = config.data, config.encoding
    if not config.is_causal:
        others = ", ".join(kind for kind in kinds_for(1) if not ENCODINGS[kind].CAUSAL_ONLY)
        if encoding.CAUSAL_ONLY or encoding.gate != "none":
            raise InputError(
                f"data.form='{data.form}' attends in both directions, and the encoding '{encoding.name}' needs causal order: "
                f"choose one of {others} without a gate, or data.form='decoder'"
            )
        if config.model.window:
            raise InputError(
                f"data.form='{data.form}' attends in both directions, and model.window={config.model.window} is of causal "
                "attention: set it to 0"
            )
    if config.eval.positions == "random":
        if not encoding.knows_positions:
            raise InputError(
                f"eval.positions='random' draws positions, and encoding.kind='{encoding.kind}' has none: leave it at "
                "'consecutive'"
            )
        for length in (*config.eval.lengths, data.length):
            check_random_positions(config, config.window_of(length))


def check_random_positions(config: Config, window: int) -> None:
    """Raises InputError if there are fewer positions to draw from than tokens of a window."""
    drawn = config.objective.skip.range or config.encoding.max_position
    if window > drawn:
        raise InputError(
            f"eval.positions='random' draws the {window} positions of a window from {drawn}: raise objective.skip.range or "
            "encoding.max_position (of a learned table encoding.table_length), or evaluate shorter inputs"
        )


MIN_SHARE = 1e-4  # of the windows of a mixture that a source has


def _check_sources(config: Config) -> None:
    """Raises InputError if the data set cannot be read from `data.paths`, or from the sources of `data.mixture`."""
    data, dataset = config.data, registry.get(config.data.name)
    if not data.mixture:
        dataset.check_paths(data.paths)
        return
    if dataset.kind != registry.DATA_TEXT:
        raise InputError(f"data.mixture is for text, and data.name='{data.name}' is {dataset.kind}: leave it out")
    if data.paths or data.prepared:
        raise InputError(
            "data.mixture names the paths of each source: leave data.paths and data.prepared out, or name them as a source"
        )
    if config.eval.contexts:
        raise InputError(
            "eval.contexts are measured on one source of text, and data.mixture has several: leave one out"
        )
    for source in data.mixture:
        try:
            dataset.check_paths(source.paths)
        except InputError as error:
            raise InputError(f"data.mixture.{source.name}: {error}") from None
        if source.prepared:
            dataset.check_prepared()
    small = {name: share for name, share in data.mixture_weights.items() if share < MIN_SHARE}
    if small:
        raise InputError(
            f"data.mixture: '{min(small)}' has a share of {small[min(small)]:.2g} of the windows, and the least is {MIN_SHARE}: "
            "raise its weight, or leave it out"
        )


def _check_contexts(config: Config) -> None:
    """Raises InputError if contexts cannot be compared on the same tokens."""
    contexts, stride, targets = config.eval.contexts, config.eval.stride, config.eval.targets
    if not contexts:
        return
    if repeated := [context for context in contexts if contexts.count(context) > 1]:
        raise InputError(f"eval.contexts (--contexts) names {repeated[0]} more than once: name each context once")
    if min(contexts) <= stride:
        raise InputError(
            f"eval.stride={stride} (--stride) must be less than the smallest of eval.contexts (--contexts), "
            f"{min(contexts)}, so that each target has context before it: lower it, or raise that context"
        )
    if targets < config.context_stride:
        raise InputError(
            f"eval.targets={targets} (--targets) is less than the {config.context_stride} targets of one window "
            "(eval.stride, --stride; by default half the smallest context): raise it, or lower the stride"
        )
    for context in contexts:
        check_positions(config, context, "eval.contexts (--contexts)")


def _check_images(config: Config) -> None:
    data, patch, dataset = config.data, config.model.patch, registry.get(config.data.name)
    if config.model.kind != "vit":
        raise InputError(
            f"model.kind='{config.model.kind}' reads text, but data.name='{data.name}' has images: set 'vit'"
        )
    axes = 3 if dataset.video else 2
    for name, value in (("data.size", data.size), ("model.patch", patch)):
        if len(value) != axes or min(value) < 1:
            wanted = "(frames, height, width)" if axes == 3 else "(height, width)"
            raise InputError(f"{name} must be {wanted} in pixels for data.name='{data.name}', got {value}")
    if axes == 2 and config.eval.frames:
        raise InputError(
            f"eval.frames={config.eval.frames} is for videos, but data.name='{data.name}' has none: leave it out"
        )
    check_size(config, data.size, "data.size", training=True)
    for eval_size in config.eval_sizes:
        check_size(config, eval_size, "eval.frames and eval.sizes" if config.eval.frames else "eval.sizes")
    config.encoding.check(axes)
    augment = data.augment
    for name, pair in (("crop_scale", augment.crop_scale), ("crop_aspect", augment.crop_aspect)):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise InputError(f"data.augment.{name} must be (low, high) with 0 < low <= high, got {pair}")
    if augment.crop_scale[1] > 1:
        raise InputError(f"data.augment.crop_scale is a fraction of the area, at most 1, got {augment.crop_scale}")
    mixing = config.objective.mixing
    if (mixing.mixup or mixing.cutmix) and config.batch_size // config.optimizer.accumulate % 2:
        raise InputError("objective.mixing pairs images: the batch (batch_size / optimizer.accumulate) must be even")


# --- Blocks


def _check_model(config: Config) -> None:
    """Raises InputError if the parts of the blocks contradict each other."""
    model = config.model
    if not model.head_width and model.width % model.heads:
        raise InputError(
            f"model.width={model.width} is not a multiple of model.heads={model.heads}: change one, or set model.head_width"
        )
    if model.kv_heads and model.heads % model.kv_heads:
        raise InputError(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}: each key and value head serves as "
            "many query heads, so choose a divisor"
        )
    if len(model.window_layers) > model.layers:
        raise InputError(
            f"model.window_layers has {len(model.window_layers)} flags, but there are model.layers={model.layers}: give one "
            "for each layer, or a pattern that repeats"
        )


# --- Losses on vectors


def _check_vector_losses(config: Config) -> None:
    contrastive, distillation = config.objective.contrastive, config.objective.distillation
    if not config.encoding.HAS_VECTORS:
        for name, value in (("contrastive.weight", contrastive.weight), ("distillation.weight", distillation.weight)):
            if value:
                raise InputError(
                    f"objective.{name}={value}: encoding.kind='{config.encoding.kind}' has no vectors to train; set it to 0"
                )
    if contrastive.weight:
        _check_contrastive(config)
    if distillation.weight:
        _check_distillation(config)


def _check_contrastive(config: Config) -> None:
    encoding, contrastive, axes = config.encoding, config.objective.contrastive, len(config.grid)
    if len(contrastive.mixture) != 3 or min(contrastive.mixture) < 0 or abs(sum(contrastive.mixture) - 1) > 1e-6:
        raise InputError(
            "objective.contrastive.mixture must be three probabilities (random, hard, distributional) that add up "
            f"to 1, got {contrastive.mixture}"
        )
    most = encoding.max_position**axes - 2
    if contrastive.candidates > most:
        raise InputError(
            f"objective.contrastive.candidates={contrastive.candidates}: encoding.max_position="
            f"{encoding.max_position} leaves at most {most}"
        )
    if contrastive.causal_only and axes > 1:
        raise InputError("objective.contrastive.causal_only needs text: positions of images have no order")
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
            "dissimilar: give 0 or more for each head"
        )


def _check_distillation(config: Config) -> None:
    encoding, distillation, grid = config.encoding, config.objective.distillation, config.grid
    length = math.prod(grid)
    if distillation.offsets > length:
        raise InputError(
            f"objective.distillation.offsets={distillation.offsets} is more than the {length} positions of an example"
        )
    # A student window starts at a quarter of the length at the earliest; a student grid has no overlap with the teacher's.
    needed = length + max(1, length // 4) if len(grid) == 1 else 2 * min(grid)
    if encoding.max_position < needed:
        raise InputError(
            f"objective.distillation needs positions past the {max(grid)} of an example, but the largest "
            f"position possible is {encoding.max_position - 1}: raise encoding.max_position, or set "
            "objective.distillation.weight=0"
        )
    if distillation.space == "logits" and encoding.mode != "attn_scalar":
        raise InputError("objective.distillation.space='logits' needs encoding.mode='attn_scalar'")


# --- Training


def _moves_positions(config: Config) -> bool:
    """True if some training steps have positions other than those from 0."""
    objective = config.objective
    return max(objective.shift.rate, objective.skip.rate, objective.jitter.rate, objective.zoom.rate) > 0


def _check_batch(config: Config) -> None:
    accumulate, sets = config.optimizer.accumulate, config.objective.shift.sets
    if config.batch_size % accumulate:
        raise InputError(f"batch_size={config.batch_size} is not a multiple of optimizer.accumulate={accumulate}")
    micro_batch = config.batch_size // accumulate
    if _moves_positions(config) and micro_batch % sets:
        raise InputError(
            f"a micro-batch has {micro_batch} examples (batch_size / optimizer.accumulate), not a multiple of "
            f"objective.shift.sets={sets}: set that to a divisor"
        )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.skips != OptimizerConfig.skips and optimizer.non_finite != "skip":
        raise InputError(
            f"optimizer.skips={optimizer.skips} is read by optimizer.non_finite='skip' alone: set that too"
        )
    if optimizer.decay_steps and optimizer.schedule != "wsd":
        raise InputError(
            f"optimizer.decay_steps={optimizer.decay_steps} is not read by optimizer.schedule='{optimizer.schedule}', only "
            "by wsd: leave it out"
        )
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + optimizer.decay_steps > config.steps:
        raise InputError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} and optimizer.decay_steps={optimizer.decay_steps} are more "
            f"than steps={config.steps}: lower one of them"
        )
    if optimizer.freeze_steps and not optimizer.freeze:
        raise InputError(
            f"optimizer.freeze_steps={optimizer.freeze_steps} is read with optimizer.freeze alone: set that too, such as "
            "model/*"
        )
    if optimizer.kind == "schedule_free_adamw":
        _check_schedule_free(optimizer)
    if optimizer.freeze_steps >= config.steps:
        raise InputError(
            f"optimizer.freeze_steps={optimizer.freeze_steps} is not less than steps={config.steps}: lower it, or leave it at "
            "0, which freezes in all steps"
        )
    if optimizer.warmup_steps > config.steps:
        raise InputError(f"optimizer.warmup_steps={optimizer.warmup_steps} is beyond steps={config.steps}")


def _check_schedule_free(optimizer: OptimizerConfig) -> None:
    """Refuses what an average in place of a decaying learning rate contradicts."""
    for name, allowed, reason in (
        ("schedule", optimizer.schedule == "constant", "averages in place of a decay: set optimizer.schedule=constant"),
        ("b1", optimizer.b1 > 0, "weighs its average by it: give a number above 0"),
        ("freeze_steps", not optimizer.freeze_steps, "has an average of all steps: leave it out"),
        ("ema", not optimizer.ema, "evaluates an average of its own: leave it out"),
    ):
        if not allowed:
            raise InputError(
                f"optimizer.{name}={getattr(optimizer, name)} is not read by optimizer.kind='schedule_free_adamw', which {reason}"
            )


def _check_checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.keep_every % checkpoint.every:
        raise InputError(
            f"checkpoint.keep_every={checkpoint.keep_every} is not a multiple of checkpoint.every={checkpoint.every}: only "
            "steps that are saved can be retained"
        )
    if checkpoint.best and (not config.eval.every or config.eval.every % checkpoint.every):
        raise InputError(
            f"checkpoint.best='{checkpoint.best}' needs eval.every to be a multiple of "
            f"checkpoint.every={checkpoint.every}, got {config.eval.every}: only a state that is evaluated and saved "
            "can be the best"
        )


def check_heads(config: Config) -> None:
    """Raises InputError if the heads do not divide over mesh.tensor.

    Heads of keys and values are split too where they divide; where several devices share one, all have all of them.
    """
    parts, tensor = config.model.parts, config.mesh.tensor
    if parts.heads % tensor:
        raise InputError(f"model.heads={parts.heads} does not divide over mesh.tensor={tensor}: choose a divisor")
    if parts.kv_heads % tensor and tensor % parts.kv_heads:
        raise InputError(
            f"mesh.tensor={tensor} is neither a divisor nor a multiple of model.kv_heads={parts.kv_heads}, so that a device would "
            "need parts of several heads of keys: choose another mesh.tensor"
        )


def _check_mesh(config: Config) -> None:
    check_heads(config)
    for option in config.mesh.compiler_options:
        if option != "auto" and not re.fullmatch(r"xla_\w+=\S*", option):
            raise InputError(
                f"mesh.compiler_options: '{option}' must be 'auto' or NAME=VALUE with a name that starts with xla_, such as "
                "xla_gpu_deterministic_ops=true; give the option once for each"
            )
    if math.prod(config.grid) % config.mesh.context:
        field = "data.size" if config.is_image else "data.length"
        raise InputError(
            f"the {math.prod(config.grid)} positions of an example ({field}) do not divide over "
            f"mesh.context={config.mesh.context}: choose a divisor"
        )


def _check_kernel_blocks(config: Config) -> None:
    model = config.model
    for side in "qk":
        forward, backward = (f"kernel_block_{side}{rest}" for rest in ("", "_backward"))
        sizes = getattr(model, forward), getattr(model, backward)
        for name, size in zip((forward, backward), sizes, strict=True):
            if size % KERNEL_LANES:
                raise InputError(
                    f"model.{name}={size} is not a multiple of {KERNEL_LANES}, the lanes of a TPU: choose one"
                )
        if all(sizes) and max(sizes) % min(sizes):
            raise InputError(
                f"model.{forward}={sizes[0]} and model.{backward}={sizes[1]}: the larger must be a multiple of the smaller, "
                "for the same padding serves both"
            )
        if sizes[1] and not sizes[0]:
            raise InputError(f"model.{backward}={sizes[1]} needs model.{forward}: set that too")


# --- Fields of the command line that have no effect under the values of other fields


@dataclasses.dataclass(frozen=True)
class Condition:
    """Values of other fields without which some fields have no effect.

    Attributes:
      fields: dotted names of the fields.
      holds: whether the fields have an effect in a config.
      needs: setting that gives them one, for messages.
    """

    fields: tuple[str, ...]
    holds: Callable[[Config], bool]
    needs: str


def _fields_of(section: type, prefix: str, without: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{field.name}" for field in dataclasses.fields(section) if field.name != without)


def _has_mixture(config: Config, index: int) -> bool:
    mixture = config.objective.contrastive.mixture
    return len(mixture) <= index or mixture[index] > 0


def _reads(field: str, *kinds: str) -> Condition:
    """Returns the condition that an optimizer reads a field; kinds: those that do."""
    words = " or ".join(f"'{kind}'" for kind in kinds)
    return Condition((f"optimizer.{field}",), lambda config: config.optimizer.kind in kinds, f"optimizer.kind={words}")


def _mixes_both(config: Config) -> bool:
    mixing = config.objective.mixing
    return mixing.mixup > 0 and mixing.cutmix > 0


CONTRASTIVE, DISTILLATION = "objective.contrastive", "objective.distillation"
CONDITIONS = (
    # Before the weights, which other encodings refuse.
    Condition(
        _fields_of(ContrastiveConfig, CONTRASTIVE, without="weight")
        + _fields_of(DistillationConfig, DISTILLATION, without="weight"),
        lambda config: config.encoding.HAS_VECTORS,
        "encoding.kind='seqpe', the encoding with a digit encoder",
    ),
    Condition(
        _fields_of(ContrastiveConfig, CONTRASTIVE, without="weight"),
        lambda config: config.objective.contrastive.weight > 0,
        f"{CONTRASTIVE}.weight above 0",
    ),
    Condition(
        (f"{CONTRASTIVE}.hard_fraction",),
        lambda config: _has_mixture(config, 1),
        f"a share of hard candidates, the second number of {CONTRASTIVE}.mixture",
    ),
    Condition(
        (f"{CONTRASTIVE}.window", f"{CONTRASTIVE}.around_anchor"),
        lambda config: _has_mixture(config, 2),
        f"a share of distributional candidates, the third number of {CONTRASTIVE}.mixture",
    ),
    Condition(
        (f"{CONTRASTIVE}.per_head",),
        lambda config: config.objective.contrastive.space == "vectors",
        f"{CONTRASTIVE}.space='vectors'",
    ),
    Condition(
        (f"{CONTRASTIVE}.head_scales",),
        # () is how the factors of a config file are left out, which other spaces ask for.
        lambda config: config.objective.contrastive.space == "logits" or not config.objective.contrastive.head_scales,
        f"{CONTRASTIVE}.space='logits'",
    ),
    Condition(
        _fields_of(DistillationConfig, DISTILLATION, without="weight"),
        lambda config: config.objective.distillation.weight > 0,
        f"{DISTILLATION}.weight above 0",
    ),
    Condition(
        (f"{DISTILLATION}.per_head",),
        lambda config: config.objective.distillation.space == "vectors",
        f"{DISTILLATION}.space='vectors'",
    ),
    Condition(
        ("objective.shift.sets",),
        _moves_positions,
        "a rate above 0 of objective.shift, objective.skip, objective.jitter or objective.zoom",
    ),
    Condition(
        ("objective.shift.rate", "objective.skip.rate"),
        lambda config: (
            not (config.objective.shift.rate or config.objective.skip.rate) or config.encoding.knows_positions
        ),
        "an encoding that knows positions: encoding.kind other than 'none', or encoding.rotary_pairs",
    ),
    Condition(
        ("objective.shift.starts",), lambda config: config.objective.shift.rate > 0, "objective.shift.rate above 0"
    ),
    Condition(
        ("objective.shift.carries",),
        lambda config: config.objective.shift.rate > 0 and isinstance(config.encoding, SeqPEConfig),
        "objective.shift.rate above 0 and encoding.kind='seqpe', which reads digits",
    ),
    Condition(
        ("objective.skip.chunks", "objective.skip.range"),
        lambda config: config.objective.skip.rate > 0,
        "objective.skip.rate above 0",
    ),
    Condition(
        ("objective.zoom.smallest",), lambda config: config.objective.zoom.rate > 0, "objective.zoom.rate above 0"
    ),
    Condition(
        ("objective.mixing.switch",), _mixes_both, "objective.mixing.mixup and objective.mixing.cutmix both above 0"
    ),
    Condition(
        ("data.augment.crop_aspect",),
        lambda config: tuple(config.data.augment.crop_scale) != (1.0, 1.0),
        "data.augment.crop_scale below 1",
    ),
    Condition(
        ("data.augment.randaugment_magnitude", "data.augment.randaugment_std"),
        lambda config: config.data.augment.randaugment_layers > 0,
        "data.augment.randaugment_layers above 0",
    ),
    Condition(
        ("data.lossy_tokenizer",), lambda config: config.data.tokenizer != "bytes", "data.tokenizer other than 'bytes'"
    ),
    Condition(("data.reset_positions",), lambda config: config.data.packing == "documents", "data.packing='documents'"),
    Condition(
        ("model.activation",),
        lambda config: not config.model.parts.gated,
        "model.mlp='plain'; swiglu is gated by silu, and geglu by gelu_tanh",
    ),
    Condition(("model.window_layers",), lambda config: config.model.window > 0, "model.window"),
    Condition(
        ("model.attention_block",),
        lambda config: config.model.attention_kind in ("auto", "blockwise"),
        "model.attention_kind='auto' or 'blockwise'",
    ),
    Condition(
        tuple(f"model.kernel_block_{part}" for part in ("q", "k", "q_backward", "k_backward")),
        lambda config: config.model.attention_kind in ("auto", "flash"),
        "model.attention_kind='auto' or 'flash'",
    ),
    Condition(("mesh.context_attention",), lambda config: config.mesh.context > 1, "mesh.context above 1"),
    _reads("b1", "adamw", "muon", "lion", "schedule_free_adamw"),
    _reads("b2", "adamw", "muon", "lion", "schedule_free_adamw"),
    _reads("epsilon", "adamw", "muon", "schedule_free_adamw"),
    _reads("momentum", "muon", "sgd"),
    _reads("state_dtype", "adamw", "muon", "lion", "sgd"),
    Condition(
        ("optimizer.encoder_weight_decay",),
        lambda config: config.encoding.HAS_VECTORS,
        "encoding.kind='seqpe', the encoding with a digit encoder",
    ),
    Condition(
        ("precision.matmul",), lambda config: config.precision.compute == "float32", "precision.compute='float32'"
    ),
    Condition(
        ("eval.stride", "eval.targets", "eval.key_gain", "eval.key_loss"),
        lambda config: bool(config.eval.contexts),
        "eval.contexts",
    ),
    Condition(("profile.processes",), lambda config: bool(config.profile.steps), "profile.steps"),
    Condition(
        ("optimizer.skips",), lambda config: config.optimizer.non_finite == "skip", "optimizer.non_finite='skip'"
    ),
)


def check_overrides_used(config: Config, names: Iterable[str]) -> None:
    """Refuses fields that a user sets although they have no effect under the values of other fields.

    A config file may set such a field for a part that is off, so that one option switches the part on. An option of the
    command line or of a sweep is refused: the run would not be what was asked for.

    Args:
      config: config with the options applied.
      names: dotted names of the fields that the user set.

    Raises:
      InputError: names the first such option and the setting that it needs.
    """
    overridden = set(names)
    for condition in CONDITIONS:
        unused = overridden.intersection(condition.fields)
        if unused and not condition.holds(config):
            raise _unused(min(unused), condition.needs)
    for field, needs in config.encoding.idle_options().items():
        if f"encoding.{field}" in overridden:
            raise _unused(f"encoding.{field}", needs)


def _unused(name: str, needs: str) -> InputError:
    return InputError(f"{name} is not read here, it needs {needs}: set that too, or leave {name} out")
