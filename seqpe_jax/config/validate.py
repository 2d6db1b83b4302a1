"""What the fields of a config demand of each other; each refusal is one line that says how to set them."""

import math
import re

from seqpe_jax.config.encodings import ENCODINGS, SeqPEConfig, kinds_for
from seqpe_jax.config.schema import Config
from seqpe_jax.data import registry
from seqpe_jax.errors import InputError

MAX_POSITION_UNITS = 2**30  # of positions along an axis, which are int32


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


def _positions(encoding: SeqPEConfig, training: bool) -> tuple[int, str, str]:
    """Returns how many positions an axis has, what limits them, and the field to raise.

    Args:
      encoding: with digits.
      training: positions that training draws from, below max_position; else those that the digits write.
    """
    if training:
        return encoding.max_position, f"encoding.max_position={encoding.max_position}", "encoding.max_position"
    digits = encoding.integer_digits
    count = min(encoding.base**digits, MAX_POSITION_UNITS // encoding.position_resolution)
    why = f"which {digits} digits in base {encoding.base} write"
    return count, why, "encoding.digits" if encoding.digits else "encoding.max_position"


def check_positions(config: Config, length: int, asked_by: str, *, training: bool = False) -> None:
    """Refuses a window that needs positions which the digits do not reach, or finer ones than they tell apart.

    Args:
      training: a window that is trained on, which must lie below encoding.max_position.

    Raises:
      InputError: says the largest position possible and the field to change.
    """
    encoding = config.encoding
    if encoding.resize == "interpolate":
        _check_finer(config, (length,), (config.data.length,), (1,), asked_by)
        length = config.data.length  # that of the positions, however many places stand on them
    if not isinstance(encoding, SeqPEConfig):
        return
    count, why, field = _positions(encoding, training)
    if length > count:
        raise InputError(
            f"{asked_by} {length} needs position {length - 1}, but the largest position possible is {count - 1} ({why}): "
            f"raise {field} or lower {asked_by}"
        )


def _check_finer(
    config: Config, places: tuple[int, ...], trained: tuple[int, ...], patch: tuple[int, ...], asked_by: str
) -> None:
    """Refuses places that are read between those of training and would come to stand together. Raises: InputError."""
    reach = tuple(count * config.encoding.position_resolution for count in trained)
    if any(count > limit for count, limit in zip(places, reach, strict=True)):
        asked, largest = (
            "x".join(str(count * side) for count, side in zip(counts, patch, strict=True)) for counts in (places, reach)
        )
        digits = config.encoding.fraction_digits
        raise InputError(
            f"{asked_by} {asked} is read between the positions of training (encoding.resize='interpolate'), where "
            f"encoding.fraction_digits={digits} tells so many of them apart that the largest size possible is {largest}: "
            f"raise encoding.fraction_digits or lower {asked_by}"
        )


def check_size(config: Config, size: tuple[int, ...], asked_by: str, *, training: bool = False) -> None:
    """Refuses an image or clip that patches do not divide or positions do not reach.

    Args:
      size: (height, width), or (frames, height, width) of a clip; asked_by: what asks for it, for the message.
      training: as in `check_positions`.

    Raises:
      InputError: says the largest size possible and the field to change.
    """
    sides, patch = config.sides_of(size), config.model.patch
    written, parts = "x".join(map(str, size)), patch[-len(size) :]
    if len(size) > len(patch):
        raise InputError(
            f"{asked_by} {written} has frames, but data.name='{config.data.name}' has images: name two sides"
        )
    if any(side < 1 or side % part for side, part in zip(sides, patch, strict=True)):
        raise InputError(
            f"{asked_by} {written} does not divide into patches of {'x'.join(map(str, parts))} pixels (model.patch): "
            f"choose multiples of {'x'.join(map(str, parts))}"
        )
    places = config.grid_of(sides)
    if config.encoding.resize == "interpolate":
        _check_finer(config, places[-2:], config.grid[-2:], patch[-2:], asked_by)
        places = (*places[:-2], *config.grid[-2:])  # those of the positions, however many patches stand on them
    if not isinstance(config.encoding, SeqPEConfig):
        return
    count, why, field = _positions(config.encoding, training)
    if max(places) > count:
        raise InputError(
            f"{asked_by} {written} needs position {max(places) - 1} along an axis, but the largest "
            f"position possible is {count - 1} ({why}), so the largest size possible is "
            f"{'x'.join(str(count * part) for part in parts)}: raise {field} or lower {asked_by}"
        )


def check(config: Config) -> None:
    """Refuses a config whose fields contradict each other. Raises: InputError."""
    objective = config.objective
    registry.get(config.data.name).check_paths(config.data.paths)
    if config.is_image:
        _check_images(config)
    else:
        _check_text(config)
    _check_sizes(config)
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
            f"objective.shift.sets={objective.shift.sets}: set that to a divisor"
        )
    _check_faults(config)
    optimizer = config.optimizer
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
    if config.optimizer.warmup_steps > config.steps:
        raise InputError(f"optimizer.warmup_steps={config.optimizer.warmup_steps} is beyond steps={config.steps}")
    if config.model.heads % config.mesh.tensor:
        raise InputError(
            f"model.heads={config.model.heads} does not divide over mesh.tensor={config.mesh.tensor}: choose a divisor"
        )
    if math.prod(config.grid) % config.mesh.context:
        field = "data.size" if config.is_image else "data.length"
        raise InputError(
            f"the {math.prod(config.grid)} positions of an example ({field}) do not divide over "
            f"mesh.context={config.mesh.context}: choose a divisor"
        )
    window = profile_window(config)
    if window is not None and window[1] > config.steps:
        raise InputError(f"profile.steps='{config.profile.steps}' ends beyond steps={config.steps}")


MAX_POSITIONS_PER_STEP = 2**28


def _check_sizes(config: Config) -> None:
    """Refuses fields that are no more than they may be, but make more together than fits. Raises: InputError."""
    data, objective = config.data, config.objective
    side = "data.size" if config.is_image else "data.length"
    counts = {
        f"batch_size={config.batch_size} and {side}": config.batch_size * math.prod(config.grid),
        f"the {math.prod(config.grid)} patches of data.size={data.size}, or its pixels,": math.prod(data.size),
        "objective.contrastive.batch and candidates": objective.contrastive.batch
        * (objective.contrastive.candidates + 1),
        "objective.distillation.batch and offsets": objective.distillation.batch * objective.distillation.offsets,
        "objective.shift.sets and " + side: objective.shift.sets * math.prod(config.grid),
    }
    for what, count in counts.items():
        if count > MAX_POSITIONS_PER_STEP:
            raise InputError(
                f"{what} make {count} places in one step, and at most {MAX_POSITIONS_PER_STEP} are possible: lower them"
            )


def _check_text(config: Config) -> None:
    if config.model.kind != "gpt2":
        raise InputError(f"model.kind='{config.model.kind}' reads images, but data.name='{config.data.name}' is text")
    config.encoding.check(axes=1)
    check_positions(config, config.data.length, "data.length", training=True)
    for length in config.eval.lengths:
        if length < 1:
            raise InputError(f"eval.lengths must be positive, got {length}")
        check_positions(config, length, "eval.lengths")
    _check_contexts(config)
    if not config.is_qa and (config.data.prompt_weight or config.data.question_weight):
        raise InputError(
            f"data.prompt_weight and data.question_weight are for questions, and data.name='{config.data.name}' is text: "
            "set them to 0"
        )


def _check_contexts(config: Config) -> None:
    """Refuses contexts that cannot be compared on the same tokens. Raises: InputError."""
    contexts, stride, targets = config.eval.contexts, config.eval.stride, config.eval.targets
    if not contexts:
        return
    if twice := [context for context in contexts if contexts.count(context) > 1]:
        raise InputError(f"eval.contexts (--contexts) names {twice[0]} more than once: name each context once")
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


def _check_faults(config: Config) -> None:
    """Refuses fields for when something goes wrong that would do nothing. Raises: InputError."""
    optimizer, checkpoint = config.optimizer, config.checkpoint
    if checkpoint.keep_every % checkpoint.every:
        raise InputError(
            f"checkpoint.keep_every={checkpoint.keep_every} is not a multiple of checkpoint.every={checkpoint.every}: only "
            "steps that are saved can be kept"
        )
    if checkpoint.best and (not config.eval.every or config.eval.every % checkpoint.every):
        raise InputError(
            f"checkpoint.best='{checkpoint.best}' needs eval.every to be a multiple of "
            f"checkpoint.every={checkpoint.every}, got {config.eval.every}: only a state that is evaluated and saved "
            "can be the best"
        )
    if optimizer.skips != 10 and optimizer.non_finite != "skip":
        raise InputError(
            f"optimizer.skips={optimizer.skips} is read by optimizer.non_finite='skip' alone: set that too"
        )


def _check_images(config: Config) -> None:
    data, patch = config.data, config.model.patch
    if config.model.kind != "vit":
        raise InputError(
            f"model.kind='{config.model.kind}' reads text, but data.name='{data.name}' has images: set 'vit'"
        )
    dataset = registry.get(data.name)
    axes = 3 if dataset.video else 2
    for name, value in (("data.size", data.size), ("model.patch", patch)):
        if len(value) != axes or min(value) < 1:
            wanted = "(frames, height, width)" if axes == 3 else "(height, width)"
            raise InputError(f"{name} must be {wanted} in pixels for data.name='{data.name}', got {value}")
    if axes == 2 and config.eval.frames:
        raise InputError(
            f"eval.frames={config.eval.frames} is for clips, but data.name='{data.name}' has none: drop it"
        )
    check_size(config, data.size, "data.size", training=True)
    for scale in config.eval_sizes:
        check_size(config, scale, "eval.frames and eval.sizes" if config.eval.frames else "eval.sizes")
    config.encoding.check(axes)
    augment = data.augment
    for name, pair in (("crop_scale", augment.crop_scale), ("crop_aspect", augment.crop_aspect)):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            raise InputError(f"data.augment.{name} must be (low, high) with 0 < low <= high, got {pair}")
    if augment.crop_scale[1] > 1:
        raise InputError(f"data.augment.crop_scale is a share of the area, at most 1, got {augment.crop_scale}")
    if data.bit_depth and not dataset.has_bit_depth:
        readers = ", ".join(one.name for one in registry.DATASETS.values() if one.has_bit_depth)
        raise InputError(
            f"data.bit_depth={data.bit_depth} is not read by data.name='{data.name}', only by {readers}: leave it at 0"
        )
    mixing = config.objective.mixing
    if (mixing.mixup or mixing.cutmix) and config.batch_size // config.optimizer.accumulate % 2:
        raise InputError("objective.mixing pairs images: the batch (batch_size / optimizer.accumulate) must be even")


def _check_fractions(config: Config) -> None:
    """Refuses positions between whole numbers where an encoding knows none, or moves that would move nothing."""
    encoding, jitter = config.encoding, config.objective.jitter
    grid_axes = len(config.grid)
    wanted = {
        "encoding.fraction_digits": encoding.fraction_digits,
        "encoding.resize='interpolate'": encoding.resize == "interpolate",
        "objective.jitter.rate": jitter.rate,
        "objective.zoom.rate": config.objective.zoom.rate,
    }
    for name, value in wanted.items():
        if value and not encoding.real_positions_on(grid_axes):
            why = (
                "numbers the patches of a grid one after the other" if encoding.real_positions else "has integers alone"
            )
            if not encoding.knows_positions:
                why = "has no positions without encoding.rotary_pairs"
            others = [kind for kind in kinds_for(grid_axes) if ENCODINGS[kind].REAL_POSITIONS and kind != encoding.kind]
            raise InputError(
                f"{name} needs positions between whole numbers, and encoding.kind='{encoding.kind}' {why}: leave it as it "
                f"is, or choose one of {', '.join(others)}"
            )
    axes = len(config.grid) if config.objective.contrastive.weight else 1  # which numbers the positions of all axes
    if (encoding.max_position * encoding.position_resolution) ** axes > MAX_POSITION_UNITS:
        raise InputError(
            f"encoding.max_position={encoding.max_position} with encoding.fraction_digits={encoding.fraction_digits} in "
            f"base {encoding.base} makes more than {MAX_POSITION_UNITS} positions on {axes} axes: lower one of them"
        )
    if config.objective.zoom.rate and not (config.is_image and encoding.resize == "interpolate"):
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


def _check_terms(config: Config) -> None:
    encoding, objective, length = config.encoding, config.objective, math.prod(config.grid)
    axes, side = len(config.grid), max(config.grid)
    contrastive, distillation = objective.contrastive, objective.distillation
    if not encoding.HAS_VECTORS:
        for name, value in (("contrastive.weight", contrastive.weight), ("distillation.weight", distillation.weight)):
            if value:
                raise InputError(f"objective.{name}={value}: '{encoding.kind}' has no vectors to train; set it to 0")
    if not encoding.has("max_position") and (objective.shift.rate or objective.skip.rate):
        raise InputError("a learned table has no entries elsewhere: set objective.shift.rate and skip.rate to 0")
    if objective.shift.rate + objective.skip.rate > 1:
        raise InputError("objective.shift.rate + objective.skip.rate must be at most 1: a step is shifted or skipped")
    if contrastive.weight:
        _check_contrastive(config)
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
        raise InputError(
            f"objective.skip.chunks={objective.skip.chunks} is more than the {side} positions of an example"
        )


def _check_contrastive(config: Config) -> None:
    encoding, contrastive, axes = config.encoding, config.objective.contrastive, len(config.grid)
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
    if contrastive.causal_only and axes > 1:
        raise InputError("objective.contrastive.causal_only needs text: there is no before on a grid")
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
