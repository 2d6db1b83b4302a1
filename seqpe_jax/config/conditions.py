"""Fields that are read only under certain values of other fields.

A config file may set such a field for a part that is off, so that switching the part on needs one option. An option that
a user gives is another matter: if nothing reads it, the run would not be what was asked for, so it is refused.
"""

import dataclasses
from collections.abc import Callable, Iterable

from seqpe_jax.config.schema import Config, ContrastiveConfig, DistillationConfig
from seqpe_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Condition:
    """The values of other fields under which some fields are read.

    Attributes:
      fields: dotted names of the fields.
      holds: whether a config reads them.
      needs: the setting that makes a config read them, for messages.
    """

    fields: tuple[str, ...]
    holds: Callable[[Config], bool]
    needs: str


def _fields_of(section: type, prefix: str, without: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{field.name}" for field in dataclasses.fields(section) if field.name != without)


def _moves(config: Config) -> bool:
    objective = config.objective
    return max(objective.shift.rate, objective.skip.rate, objective.jitter.rate, objective.zoom.rate) > 0


def _mixes_both(config: Config) -> bool:
    mixing = config.objective.mixing
    return mixing.mixup > 0 and mixing.cutmix > 0


def _moves_nothing(config: Config) -> bool:
    moved = config.objective.shift.rate or config.objective.skip.rate
    return bool(moved) and not config.encoding.knows_positions


CONTRASTIVE, DISTILLATION = "objective.contrastive", "objective.distillation"
CONDITIONS = (
    Condition(
        _fields_of(ContrastiveConfig, CONTRASTIVE, without="weight"),
        lambda config: config.objective.contrastive.weight > 0,
        f"{CONTRASTIVE}.weight above 0",
    ),
    Condition(
        (f"{CONTRASTIVE}.hard_fraction",),
        lambda config: len(config.objective.contrastive.mixture) < 2 or config.objective.contrastive.mixture[1] > 0,
        f"a share of hard candidates, the second number of {CONTRASTIVE}.mixture",
    ),
    Condition(
        (f"{CONTRASTIVE}.window", f"{CONTRASTIVE}.around_anchor"),
        lambda config: len(config.objective.contrastive.mixture) < 3 or config.objective.contrastive.mixture[2] > 0,
        f"a share of distributional candidates, the third number of {CONTRASTIVE}.mixture",
    ),
    Condition(
        (f"{CONTRASTIVE}.per_head",),
        lambda config: config.objective.contrastive.space == "vectors",
        f"{CONTRASTIVE}.space='vectors'",
    ),
    Condition(
        (f"{CONTRASTIVE}.head_scales",),
        lambda config: config.objective.contrastive.space == "logits",
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
        _moves,
        "a rate above 0 of objective.shift, objective.skip, objective.jitter or objective.zoom",
    ),
    Condition(
        ("objective.shift.rate", "objective.skip.rate"),
        lambda config: not _moves_nothing(config),
        "an encoding that knows positions: encoding.kind other than 'none', or encoding.rotary_pairs",
    ),
    Condition(
        ("objective.shift.starts",), lambda config: config.objective.shift.rate > 0, "objective.shift.rate above 0"
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
    Condition(
        ("model.attention_block",),
        lambda config: config.model.attention_kind in ("auto", "blockwise"),
        "model.attention_kind='auto' or 'blockwise'",
    ),
    Condition(
        ("optimizer.encoder_weight_decay",),
        lambda config: config.encoding.HAS_VECTORS,
        "encoding.kind='seqpe', the encoding with a digit encoder",
    ),
    Condition(("eval.stride", "eval.targets"), lambda config: bool(config.eval.contexts), "eval.contexts"),
    Condition(
        ("optimizer.skips",), lambda config: config.optimizer.non_finite == "skip", "optimizer.non_finite='skip'"
    ),
)


def check_overrides_used(config: Config, names: Iterable[str]) -> None:
    """Refuses options that a config does not read under the values of its other fields.

    Args:
      config: with the options applied.
      names: dotted names of the fields that the user set, on the command line or in a sweep.

    Raises:
      InputError: names the first such option and the setting that it needs.
    """
    given = set(names)
    for condition in CONDITIONS:
        unread = given.intersection(condition.fields)
        if unread and not condition.holds(config):
            name = min(unread)
            raise InputError(f"{name} is not read here, it needs {condition.needs}: set that too, or leave {name} out")
    for field, needs in config.encoding.idle_options().items():
        if f"encoding.{field}" in given:
            raise InputError(
                f"encoding.{field} is not read here, it needs {needs}: set that too, or leave encoding.{field} out"
            )
