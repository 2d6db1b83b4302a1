"""Config files and stored configs -> `Config`: types, ranges, and which options are read at all.

A config file returns a ConfigDict (`defaults()` plus assignments); `parse` checks it whole. Below this room nobody sees a
ConfigDict.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Collection, Iterable
from typing import Any, Literal

import ml_collections

from seqpe_jax.config.encodings import ENCODINGS, GATED, EncodingConfig, all_fields, any_encoding, kinds_with
from seqpe_jax.config.limits import LARGEST, check_range, format_value
from seqpe_jax.config.schema import Config, ContrastiveConfig, DistillationConfig
from seqpe_jax.config.scripts import call_user_code, execute_file, resolve_config_path
from seqpe_jax.config.validate import check
from seqpe_jax.data import registry
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import expand_path
from seqpe_jax.trees import flatten_dict

LOCAL = "config files are Python, and run from a folder of this machine"  # why they cannot lie in a store
# Sections that may differ when a run goes on: they change where and how it runs, not what it computes.
RESUME_CHANGEABLE = ("eval", "checkpoint", "mesh", "report", "profile", "init_from")
# Name of a field in configs of older versions -> its name today.
RENAMED = {
    "encoding.gate_bias": "encoding.gate_bias_init",
    "encoding.place": "encoding.digit_index",
    "objective.contrastive.around_pivot": "objective.contrastive.around_anchor",
    "objective.contrastive.past_only": "objective.contrastive.causal_only",
}
# Field, by its name today -> a value in configs of older versions -> the fields that say the same today.
RENAMED_VALUES = {
    "encoding.kind": {name: {"encoding.kind": "none", "encoding.gate": gate} for name, gate in GATED.items()},
    "encoding.resize": {
        "extend": {"encoding.resize": "extrapolate"},
        "stretch": {"encoding.resize": "interpolate"},
    },
    "encoding.digit_index": {"coordinate": {"encoding.digit_index": "per_axis"}},
    "model.attention_kind": {
        "plain": {"model.attention_kind": "reference"},
        "blocks": {"model.attention_kind": "blockwise"},
    },
}
# Value that a stored config without a field was trained with, where it is not the field's default: a number, or a function
# of the stored config. The model of an old checkpoint would be another one under the default.
FORMER_DEFAULTS: dict[str, Any] = {
    "encoding.t5_buckets": 32,
    "encoding.t5_max_distance": 128,
    "encoding.fire_threshold": 512.0,
    "encoding.fire_scale": 0.1,
    "encoding.yarn_beta_fast": 32.0,
    "encoding.directed_heads": lambda stored: min(8, stored.model.heads),
}
# Older versions stored the fields of all encodings, and did not always refuse values that nothing reads. A stored section
# with more than so many fields of others is one of theirs.
MAX_FOREIGN_FIELDS = 8
# Fields whose default came to mean something else together with a new field: (new field, function as above).
FORMER_MEANINGS: dict[str, tuple[str, Any]] = {
    "encoding.rotary_pairs": (
        "encoding.scale_invariant_tau",  # half of a head's pairs
        lambda stored: (
            max(1, stored.model.width // stored.model.heads // 4) * (stored.encoding.kind == "scale_invariant")
        ),
    ),
}


def defaults() -> ml_collections.ConfigDict:
    """Returns every field at its default, as a ConfigDict that config files fill in.

    Its encoding section has the fields of all encodings: a config file sets those of several, of which a variant chooses.
    """
    return ml_collections.ConfigDict(to_dict(Config()) | {"encoding": all_fields()})


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain dicts (tuples stay tuples)."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the validated config of nested dicts, such as a run's config.json (lists serve as tuples).

    Args:
      values: also of an older version (`apply_renames`).

    Raises:
      InputError: a field that does not exist, has the wrong type or range, or contradicts another one.
    """
    values = apply_renames(values)
    config = _with_former_defaults(_build(Config, _without_foreign_fields(values, stored=True), ""), values)
    check(config)
    return config


def apply_renames(values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested values with the names of today for fields and values that older versions called otherwise.

    Args:
      values: of a config, or of a part of one; what is no config is returned as it is, for others to refuse.

    Raises:
      InputError: a field is given under both names, or an old value says what another field contradicts.
    """
    if not isinstance(values, dict):
        return values
    found = dict(values)
    for old, new in RENAMED.items():
        section, name = _section_of(found, old)
        if name not in section:
            continue
        value = section.pop(name)
        section, name = _section_of(found, new)
        if name in section:
            raise InputError(f"config field '{old}' is called '{new}' now, and both are given: leave the old one out")
        section[name] = value
    for field, values_of in RENAMED_VALUES.items():
        section, name = _section_of(found, field)
        value = section.get(name)
        if not isinstance(value, str) or value not in values_of:
            continue
        for new, meant in values_of[value].items():
            section, name = _section_of(found, new)
            if new != field and section.get(name, meant) not in (meant, _default(new)):
                raise InputError(
                    f"{field}='{value}' means {new}={meant!r}, but {new}={section[name]!r} is given: leave one of them out"
                )
            section[name] = meant
    return found


def _refuse_old_names(values: dict[str, Any]) -> None:
    """Refuses names of older versions in a config that a user gives; published names of encodings are accepted.

    Raises:
      InputError: names the field, or its value, and the name of today.
    """
    leaves = flatten_dict(values, ".")
    for name in RENAMED:
        if name in leaves:
            raise InputError(unknown_field_message(name))
    for field, values_of in RENAMED_VALUES.items():
        value = leaves.get(field)
        meant = values_of.get(value, {}) if isinstance(value, str) else {}
        if list(meant) == [field]:
            raise InputError(f"config field '{field}': the value '{value}' is called '{meant[field]}' now")


def _section_of(values: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """The section that holds a dotted field, put into `values` as a copy, and the last part of the field's name.

    What is no section is left to those who check it: an empty one stands in for it.
    """
    *sections, last = field.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            return {}, last
        values[section] = dict(values[section])
        values = values[section]
    return values, last


def _default(field: str) -> Any:
    """The default of a dotted field."""
    return functools.reduce(getattr, field.split("."), Config())


def _with_former_defaults(config: Config, values: dict[str, Any]) -> Config:
    """Returns the config of a stored run with what it was trained with where its values name no such field.

    A config that a user gives names all fields (`defaults`), and is returned as it is.
    """
    idle = config.encoding.without_effect()
    former = {name: value for name, value in FORMER_DEFAULTS.items() if _lacks(values, name)}
    former |= {name: value for name, (newer, value) in FORMER_MEANINGS.items() if _lacks(values, newer)}
    for name, value in former.items():
        section, field = name.split(".")
        fields = getattr(config, section)
        if section == "encoding" and (field in idle or not config.encoding.has(field)):
            continue
        if getattr(fields, field) == getattr(type(fields)(), field):
            value = value(config) if callable(value) else value
            config = dataclasses.replace(config, **{section: dataclasses.replace(fields, **{field: value})})
    return config


def _lacks(values: dict[str, Any], name: str) -> bool:
    """Whether nested values have the section of a dotted field, but not the field."""
    section, field = name.split(".")
    return section in values and field not in values[section]


def parse(config: ml_collections.ConfigDict, overridden: Collection[str] = ()) -> Config:
    """Returns the validated, frozen form of a ConfigDict, as a user gives it.

    Args:
      overridden: dotted names of the fields whose value is the user's and not the config file's (`from_user_values`).

    Raises:
      InputError: as `from_dict`, or a field is set that nothing reads.
    """
    return from_user_values(_values(config), overridden)


def from_user_values(values: dict[str, Any], overridden: Collection[str] = ()) -> Config:
    """Returns the validated config of nested dicts as a user gives them.

    Args:
      overridden: dotted names of the fields whose value is the user's: what a config file evaluates belongs to the training
        length or size that it names, so that lengths and sizes below one that took its place are left out.

    Raises:
      InputError: as in `parse`.
    """
    _refuse_old_names(values)
    values = _without_foreign_fields(apply_renames(values), overridden)
    config = _following(_build(Config, values, ""), overridden)
    check(config)
    _check_ranges(config, "")
    _check_read(config)
    return config


def _values(page: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the values of a config file, those that are computed from other fields (`get_oneway_ref`) included.

    Raises:
      InputError: one cannot be computed from what was set.
    """
    try:
        return page.to_dict()
    except (ArithmeticError, TypeError) as error:
        raise InputError(
            f"a field that the config file computes from others, such as steps from batch_size, has no value ({error}): "
            "set those others to numbers above 0"
        ) from None


def _following(config: Config, overridden: Collection[str]) -> Config:
    """Returns a config whose eval section begins at the training length or size, where that is the user's.

    Args:
      overridden: see `from_user_values`; an eval field that the user named stays as it is.
    """
    data, changed = config.data, {}
    sides = data.size[-2:]
    trained = {
        "lengths": ("data.length", data.length),
        "sizes": ("data.size", sides[0] if len(set(sides)) == 1 else 0),
        "frames": ("data.size", data.size[0] if len(data.size) == 3 else 0),
    }
    for name, (field, own) in trained.items():
        asked = getattr(config.eval, name)
        if asked and field in overridden and f"eval.{name}" not in overridden:
            # Sizes are squares: beside another shape, that of training alone is left.
            changed[name] = (own, *(one for one in asked if one > own)) if own else ()
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changed)) if changed else config


def _check_ranges(section: Any, prefix: str) -> None:
    """Refuses values that only older runs may hold. Raises: InputError."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            _check_ranges(value, name + ".")
        else:
            check_range(value, field.metadata, name)


def with_encoding(
    config: ml_collections.ConfigDict, variant: str | None, forms: dict[str, str] | None = None
) -> ml_collections.ConfigDict:
    """Sets the encoding that a config's variant names; what it does not read goes back to its default.

    Args:
      variant: an encoding kind, a name in `encodings.GATED` or in `forms`; None = seqpe.
      forms: further variants of a page, and the kind that each is a form of.

    Raises:
      InputError: the variant is none of these.
    """
    forms = {kind: kind for kind in ENCODINGS} | dict.fromkeys(GATED, "none") | (forms or {})
    variant = variant or "seqpe"
    if variant not in forms:
        raise InputError(f"unknown config variant '{variant}'.{suggest(variant, forms)}")
    section, default = config.encoding, all_fields()
    with section.unlocked():
        for name in default.keys() - set(section):
            section[name] = default[name]
    section.kind = forms[variant]
    if variant in GATED:
        section.gate = GATED[variant]
    chosen = ENCODINGS[section.kind]
    own = chosen(**{field.name: section[field.name] for field in dataclasses.fields(chosen) if field.init})
    for name in default:
        if name in own.without_effect() or not chosen.has(name):
            section[name] = default[name]
    if not own.real_positions_on(2 if registry.get(config.data.name).kind == registry.DATA_IMAGE else 1):
        section.fraction_digits, section.resize = 0, "extrapolate"
        config.objective.jitter.rate = config.objective.jitter.range = config.objective.zoom.rate = 0.0
    if not chosen.HAS_VECTORS:
        for name, loss in VECTOR_LOSSES.items():
            config.objective[name] = ml_collections.ConfigDict(dataclasses.asdict(loss(weight=0.0)))
        config.objective.shift.rate = 0.0
        config.objective.skip.rate = 0.0
    return config


VECTOR_LOSSES = {
    "contrastive": ContrastiveConfig,
    "distillation": DistillationConfig,
}  # on vectors, which SeqPE alone has


def reset_unused(config: Config) -> Config:
    """Returns a config with what nothing reads at its default; older runs may have kept other values of it."""
    plain = type(config.encoding)()
    idle = {name: getattr(plain, name) for name in config.encoding.without_effect()}
    encoding = dataclasses.replace(config.encoding, **idle)
    has_vectors = config.encoding.HAS_VECTORS
    losses = {} if has_vectors else {section: loss(weight=0.0) for section, loss in VECTOR_LOSSES.items()}
    config = dataclasses.replace(config, encoding=encoding, objective=dataclasses.replace(config.objective, **losses))
    return _of_data(config, config.data_kind)


def _without_foreign_fields(
    values: dict[str, Any], overridden: Collection[str] = (), stored: bool = False
) -> dict[str, Any]:
    """Returns values whose encoding section has no field of other encodings.

    Args:
      values: nested; the section may have the fields of all encodings, those of others at their defaults.
      overridden: dotted names of fields that the user gave by hand, which are refused if another encoding has them.
      stored: whether the values are those of a stored run, perhaps of an older version.

    Raises:
      InputError: there is no such encoding, or a field of another one is set; names the encodings that have it.
    """
    section = values.get("encoding") if isinstance(values, dict) else None
    if not isinstance(section, dict):
        return values
    kind = section.get("kind", "seqpe")
    if kind not in ENCODINGS:
        raise InputError(
            f"config field 'encoding.kind' is {format_value(kind)}.{suggest(format_value(kind), ENCODINGS)}"
        )
    default = all_fields()
    foreign = [name for name in section if name in default and not ENCODINGS[kind].has(name)]
    if not (stored and len(foreign) > MAX_FOREIGN_FIELDS):
        for name in foreign:
            if section[name] != default[name] or f"encoding.{name}" in overridden:
                raise InputError(
                    f"encoding.{name}={section[name]} is not read by encoding.kind='{kind}', only by "
                    f"{', '.join(kinds_with(name))}: leave it out"
                )
    return values | {"encoding": {name: value for name, value in section.items() if name not in foreign}}


def with_resolved_lengths(config: Config) -> Config:
    """Returns a config in which every length of the encoding is written out (`EncodingConfig.resolved`)."""
    return dataclasses.replace(config, encoding=config.encoding.resolved(config.dims))


def _of_data(section: Any, kind: str) -> Any:
    """A section in which what runs on this kind of data do not read is at its default."""
    changed = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if kind not in field.metadata.get("of", (kind,)):
            default = field.default is dataclasses.MISSING
            changed[field.name] = field.default_factory() if default else field.default
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _of_data(value, kind)
    return dataclasses.replace(section, **changed)


def _check_read(config: Config) -> None:
    """Refuses fields that were set although nothing reads them. Raises: InputError: names the kinds that do."""
    kind, optimizer = config.encoding.kind, config.optimizer
    if optimizer.end_learning_rate and optimizer.schedule == "constant":
        raise InputError(
            f"optimizer.end_learning_rate={optimizer.end_learning_rate} is not read by optimizer.schedule='constant', only "
            "by the others: leave it at 0.0"
        )
    of = _kinds_of_data(Config, "", ())
    for line in difference(to_dict(reset_unused(config)), to_dict(config)):
        (name, _, values), value = line.partition(": "), line.rpartition(" -> ")[2]
        if of.get(name) and config.data_kind not in of[name]:
            raise InputError(
                f"{name}={value} is not read by runs on {config.data_kind} (data.name='{config.data.name}'), only by those "
                f"on {' and '.join(of[name])}: leave it at {values.partition(' -> ')[0] or repr('')}"
            )
        if not name.startswith("encoding."):
            with_vectors = [kind for kind, encoding in ENCODINGS.items() if encoding.HAS_VECTORS]
            raise InputError(
                f"{name}={value} is not read by encoding.kind='{kind}', only by {', '.join(with_vectors)}: leave it out"
            )
        other, needed = config.encoding.needs()[name.removeprefix("encoding.")]
        if needed is not None:
            raise InputError(
                f"{name}={value} is not read without encoding.{other}='{needed}': set that, or leave it out"
            )
        raise InputError(
            f"{name}={value} is read by encoding.kind='{kind}' with encoding.{other} alone: set that too, or leave {name} "
            "out"
        )


def _kinds_of_data(section: type, prefix: str, inherited: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Field by its dotted name -> the kinds of data whose runs read it; () = all."""
    found, hints = {}, _hints(section)
    for field in dataclasses.fields(section):
        of, hint = field.metadata.get("of", inherited), hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _kinds_of_data(hint, f"{prefix}{field.name}.", of)
        else:
            found[prefix + field.name] = of
    return found


def load(path: str, overrides: dict[str, Any] | None = None) -> Config:
    """Returns the config of `FILE.py[:variant]` with dotted overrides, e.g. {"model.layers": 2}.

    Raises:
      InputError: no such file, variant or field, or values that do not fit.
    """
    return from_user_values(_with(_page(path), overrides or {}), overrides or {})


def load_variant(path: str, variant: str, overrides: dict[str, Any] | None = None) -> Config:
    """Returns the config of a variant of `FILE.py`, with those of the dotted overrides that it reads.

    Raises:
      InputError: as `load`.
    """
    page = _page(f"{path}:{variant}")
    values = ml_collections.ConfigDict(_with(page, overrides or {}))
    return parse(with_encoding(values, values.encoding.kind), overrides or {})


def _page(path: str) -> ml_collections.ConfigDict:
    """Returns what a config file makes of its variant. Raises: InputError."""
    name, _, variant = resolve_config_path(expand_path(path, local=LOCAL)).partition(":")
    what = "config file defines get_config(variant=None), which returns a ConfigDict (see configs/)"
    make = getattr(execute_file(name, what), "get_config", None)
    if not callable(make):
        raise InputError(f"{name} lacks get_config: a {what}")
    config = call_user_code(name, lambda: make(variant) if variant else make())
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"{name}: get_config returned {type(config).__name__}: a {what}")
    return config


def _with(page: ml_collections.ConfigDict, overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested values of a config file with dotted overrides. Raises: InputError: there is no such field."""
    stored = flatten_dict(_values(page), ".")
    fitting = {name: value for name, value in overrides.items() if name in stored and _fits(stored[name], value)}
    page.update_from_flattened_dict(fitting)  # what the file computes from these follows
    values = _values(page)
    for key, value in overrides.items():
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if not isinstance(target, dict) or last not in target:
            raise InputError(unknown_field_message(key))
        target[last] = value
    return values


def _fits(stored: Any, value: Any) -> bool:
    """Whether a value has the type of the one that a ConfigDict holds, and is no number that overflows."""
    return type(value) is type(stored) and not (type(value) is int and abs(value) >= LARGEST)


def unknown_field_message(name: str, also: Iterable[str] = ()) -> str:
    """Returns what a message says of a field that does not exist: its name of today, or the nearest names.

    Args:
      also: further names that could be meant.
    """
    if name in RENAMED:
        return f"unknown config field '{name}': it is called '{RENAMED[name]}' now."
    return f"unknown config field '{name}'.{suggest(name, [*field_names(), *also])}"


def _hints(section: type) -> dict[str, Any]:
    """Types of the fields of a section; the encoding section has those of all encodings."""
    hints = typing.get_type_hints(section)
    return {
        field.name: any_encoding() if hints[field.name] is EncodingConfig else hints[field.name]
        for field in dataclasses.fields(section)
    }


def field_names() -> list[str]:
    """Returns the dotted names of all fields."""
    return list(field_types())


def field_types(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """Returns the type of each field by its dotted name."""
    types = {}
    for name, hint in _hints(kind).items():
        types |= field_types(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return types


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """Type, default and meaning of one field.

    Attributes:
      type: the annotation of the field.
      default: value where no config sets it.
      doc: one line, with the unit.
    """

    type: Any
    default: Any
    doc: str


def field_docs(section: type = Config, prefix: str = "") -> dict[str, FieldDoc]:
    """Returns what help and documentation say of each field, by its dotted name."""
    docs, hints = {}, _hints(section)
    for field in dataclasses.fields(section):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            docs |= field_docs(hint, f"{name}.")
        else:
            docs[name] = FieldDoc(hint, field.default, field.metadata.get("doc", ""))
    return docs


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
    if kind is EncodingConfig:
        kind = ENCODINGS[values.get("kind", "seqpe")]
        values = {name: value for name, value in values.items() if name != "kind"}
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise InputError(unknown_field_message(prefix + name))
    built = {}
    for name, value in values.items():
        hint, full = hints[name], prefix + name
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise InputError(f"config section '{full}' must hold fields, got {format_value(value)}")
            built[name] = _build(hint, value, full + ".")
        else:
            built[name] = _value(hint, value, full)
            choices = fields[name].metadata.get("choices")
            if choices is not None and built[name] not in choices():
                raise InputError(
                    f"config field '{full}' is {format_value(value)}.{suggest(format_value(value), choices())}"
                )
            check_range(built[name], fields[name].metadata, full, new=False)
            if fields[name].metadata.get("path"):
                built[name] = _written_out(built[name], full)
    return kind(**built)


def _written_out(value: Any, name: str) -> Any:
    """The path or paths of a field, `files.expand_path`; none stays none."""
    if isinstance(value, tuple):
        return tuple(map(expand_path, value))
    local = f"{name} is a folder of this machine" if name == "data.cache_dir" else ""
    return expand_path(value, local=local) if value else value


def _value(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise InputError(f"config field '{name}' is {format_value(value)}.{suggest(format_value(value), choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise InputError(f"config field '{name}' must be a list, got {format_value(value)}")
        return tuple(_value(typing.get_args(hint)[0], item, name) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < LARGEST else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(
            f"config field '{name}' must be {hint.__name__}, got {format_value(value)} ({type(value).__name__})"
        )
    if hint is float and not math.isfinite(value):
        raise InputError(f"config field '{name}' must be finite, got {value}")
    return value
