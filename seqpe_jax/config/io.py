"""Reading configs: config files with overrides, and stored configs of this and older versions, become a `Config`.

A config file defines get_config(variant=None), which returns a ConfigDict: `defaults()` plus assignments. `load` executes
it once, applies overrides, and validates the result once. Only this module and config files know ConfigDicts. The folder of
a model (a run, an export, a checkpoint of another program) serves as a config file: it has the config of that model.
"""

import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import math
import pathlib
import re
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import ml_collections

from seqpe_jax.config.encodings import (
    ENCODINGS,
    GATED,
    EncodingConfig,
    RotaryConfig,
    all_fields,
    any_encoding,
    kinds_with,
)
from seqpe_jax.config.limits import LARGEST, check_range, fields_of
from seqpe_jax.config.schema import Config, ContrastiveConfig, DistillationConfig, MeshConfig
from seqpe_jax.config.validate import check, check_heads, check_overrides_used
from seqpe_jax.data import registry
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.files import as_path, expand_path
from seqpe_jax.trees import flatten_dict

PACKAGE = pathlib.Path(__file__).parents[1]
LOCAL = "config files are Python, and run from a folder of this machine"  # the reason why a bucket is refused
# Sections that may change when a run resumes: they change where and how it runs, not its results.
RESUME_CHANGEABLE = ("eval", "checkpoint", "mesh", "report", "profile", "init_from", "ignore_fields")
WITH_ROPE = "+rotary"  # after the name of an encoding: the model's RoPE stays
TRAINING_MESH_FIELDS = {"compiler_options"}  # of the mesh section, which nothing else reads
# Name of a field in configs of older versions -> its name today.
RENAMED = {
    "encoding.gate_bias": "encoding.gate_bias_init",
    "encoding.place": "encoding.digit_index",
    "encoding.flatten": "compat.flatten",
    "encoding.reference_scramble": "compat.reference_scramble",
    "encoding.reference_scaling": "compat.reference_scaling",
    "objective.contrastive.around_pivot": "objective.contrastive.around_anchor",
    "objective.contrastive.past_only": "objective.contrastive.causal_only",
    "report.tensorboard": "report.trackers",
}
# Field, by its name today -> value in configs of older versions -> fields with the same meaning today.
RENAMED_VALUES = {
    "encoding.kind": {name: {"encoding.kind": "none", "encoding.gate": gate} for name, gate in GATED.items()},
    "encoding.resize": {
        "extend": {"encoding.resize": "extrapolate"},
        "stretch": {"encoding.resize": "interpolate"},
    },
    "encoding.digit_index": {"coordinate": {"encoding.digit_index": "per_axis"}},
    "encoding.qk": {"halves": {"encoding.qk": "none", "compat.qk_halves": True}},
    "model.attention_kind": {
        "plain": {"model.attention_kind": "reference"},
        "blocks": {"model.attention_kind": "blockwise"},
    },
    "report.trackers": {True: {"report.trackers": ("tensorboard",)}, False: {"report.trackers": ()}},
}
# Value that a stored config without a field was trained with, if it is not the field's default: a number, or a function of
# the stored config. Under the default, the model of an old checkpoint would be another one.
FORMER_DEFAULTS: dict[str, Any] = {
    "encoding.t5_buckets": 32,
    "encoding.t5_max_distance": 128,
    "encoding.fire_threshold": 512.0,
    "encoding.fire_scale": 0.1,
    "encoding.yarn_beta_fast": 32.0,
    "encoding.directed_heads": lambda stored: min(8, stored.model.heads),
    "encoding.undirected_slopes": "spread",
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
    "encoding.directed_heads": ("encoding.undirected_slopes", lambda stored: round(stored.model.heads * 2 / 3)),
}


# --- Files with code


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles a file each time. Python's cached bytecode is keyed by size and second, and misses an edit in that second."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def resolve_config_path(path: str) -> str:
    """Returns the path of a config or sweep file.

    The package contains the files of `configs/`. A path such as configs/stdlib_lm.py means the package's file if the
    current folder has none of that name, so that the same command works outside a clone.

    Args:
      path: path given by the user, optionally with a :variant.
    """
    name, colon, variant = path.partition(":")
    shipped = PACKAGE / name
    if pathlib.PurePath(name).parts[:1] != ("configs",) or pathlib.Path(name).exists() or not shipped.is_file():
        return path
    return f"{shipped}{colon}{variant}"


def execute_file(path: str, expected: str) -> types.ModuleType:
    """Executes a Python file and returns it as a module.

    Args:
      path: path of the file.
      expected: kind of the file and what it must define, for messages.

    Raises:
      InputError: there is no such file, it is no Python, or it raises; names the file and the line.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"no {expected.split()[0]} file at {path}")
    if not path.endswith(".py"):
        raise InputError(f"{path} is not a Python file: a {expected}")
    loader = _SourceLoader("seqpe_file", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    call_user_code(path, lambda: loader.exec_module(module))
    return module


def call_user_code(path: str, function: Callable[[], Any]) -> Any:
    """Calls code of a user's file; all that it raises becomes one line with the file's name and line number.

    Args:
      path: path of the file.
      function: calls the code.

    Raises:
      InputError: with the error that the code raised.
    """
    try:
        return function()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise InputError(f"{path}{line} cannot be read: SyntaxError: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a file may end Python, too
        numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = f", line {numbers[-1]}" if numbers else ""
        raise InputError(f"{path}{line} cannot be read: {type(error).__name__}: {error}") from error


# --- Stored configs, of this and older versions


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain dicts (tuples stay tuples); sources of a mixture by their names."""
    values = dataclasses.asdict(config)
    values["data"]["mixture"] = {source.pop("name"): source for source in values["data"]["mixture"]}
    return values


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the validated config of nested dicts, such as a run's config.json; lists serve as tuples.

    Args:
      values: fields and values of a config of this or an older version.

    Raises:
      InputError: a field that does not exist, has the wrong type or range, or contradicts another one.
    """
    values = apply_renames(values)
    config = _with_former_defaults(_build(Config, _without_foreign_fields(values, stored=True), ""), values)
    check(config)
    return config


def apply_renames(values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested values with today's names of fields and values that older versions named differently.

    Args:
      values: fields and values of a config, or of some of its sections; a value that is no dict is returned unchanged.

    Raises:
      InputError: a field is set under both names, or an old value contradicts another field.
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
            raise InputError(f"config field '{old}' is called '{new}' now, and both are set: leave the old one out")
        section[name] = value
    for field, values_of in RENAMED_VALUES.items():
        section, name = _section_of(found, field)
        value = section.get(name)
        if not isinstance(value, (str, bool)) or value not in values_of:
            continue
        for new, meant in values_of[value].items():
            section, name = _section_of(found, new)
            if new != field and section.get(name, meant) not in (meant, _default(new)):
                raise InputError(
                    f"{field}='{value}' means {new}={meant!r}, but {new}={section[name]!r} is set: leave one of them out"
                )
            section[name] = meant
    return found


def _refuse_old_names(values: dict[str, Any]) -> None:
    """Refuses names of older versions in a user's config; published names of encodings are accepted.

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
    """Returns the section of a dotted field, which it copies within `values`, and the last part of the field's name.

    A value that is no section is left for `_build` to refuse, and an empty section is returned.
    """
    *sections, last = field.split(".")
    for section in sections:
        if section == "compat":  # older versions have no such section
            values.setdefault(section, {})
        if not isinstance(values.get(section), dict):
            return {}, last
        values[section] = dict(values[section])
        values = values[section]
    return values, last


def _default(field: str) -> Any:
    """Returns the default of a dotted field."""
    return functools.reduce(getattr, field.split("."), Config())


def _with_former_defaults(config: Config, values: dict[str, Any]) -> Config:
    """Returns the config of a stored run with the values it was trained with of fields that its version did not have.

    A user's config has all fields (`defaults`), and is returned unchanged.
    """
    idle = config.encoding.without_effect()
    former = {name: value for name, (newer, value) in FORMER_MEANINGS.items() if _lacks(values, newer)}
    # A run of a still older version lacks both, and has its own default.
    former |= {name: value for name, value in FORMER_DEFAULTS.items() if _lacks(values, name)}
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
    """True if nested values have the section of a dotted field, but not the field."""
    section, field = name.split(".")
    return section in values and field not in values[section]


# --- Config files and overrides


def defaults() -> ml_collections.ConfigDict:
    """Returns all fields at their defaults, as a ConfigDict that config files change.

    Its encoding section has the fields of all encodings: a config file sets fields of several, and its variant chooses one.
    """
    return ml_collections.ConfigDict(to_dict(Config()) | {"encoding": all_fields()})


def load(path: str, overrides: dict[str, Any] | None = None) -> Config:
    """Returns the validated config of a config file, which is executed once, with overrides.

    Args:
      path: FILE.py or FILE.py:VARIANT; or FOLDER or FOLDER:VARIANT of a model, where the variant is another encoding, such as
        seqpe in place of the model's, or seqpe+rotary next to the model's RoPE.
      overrides: values by dotted field names, such as {"model.layers": 2}.

    Raises:
      InputError: there is no such file, variant or field, or values do not fit.
    """
    overrides = overrides or {}
    return from_user_values(_overridden(_read_config(path, overrides), overrides), overrides)


def load_variant(path: str, variant: str, overrides: dict[str, Any] | None = None) -> Config:
    """Returns the config of a variant of a config file, with those of the overrides that the variant reads.

    Args:
      path: FILE.py.
      variant: name of a variant.
      overrides: see `load`.

    Raises:
      InputError: see `load`.
    """
    overrides = overrides or {}
    values = ml_collections.ConfigDict(_overridden(_read_config(f"{path}:{variant}", overrides), overrides))
    chosen = ENCODINGS[values.encoding.kind]
    own = [name for name in overrides if name.partition(".")[0] != "encoding" or chosen.has(name.partition(".")[2])]
    return parse(with_encoding(values, chosen().kind), own)


def _read_config(path: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns the content of a config file, or of the folder of a model. Raises: InputError."""
    folder, variant = split_folder(path)
    return _folder_config(folder, variant, overrides) if folder else _execute_config(path)


def split_folder(path: str) -> tuple[str, str]:
    """Returns (folder, variant) of a config that is a folder, ("", "") for a config file."""
    if re.search(r"\.py(:|$)", path):
        return "", ""
    name, _, variant = path.rpartition(":")
    for folder, own in ((path, ""), (name if "/" not in variant else "", variant)):
        if folder and as_path(expand_path(folder)).is_dir():
            return expand_path(folder), own
    return "", ""


def _folder_config(folder: str, variant: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns the config of a model's folder, as a config file would return it.

    With another encoding, the fields of the one before that it does not have are dropped; losses on position vectors begin at
    their defaults where only the new encoding has such vectors. Where the training length or size is overridden, automatic
    lengths of the encoding stay those of the folder's model.

    Args:
      folder: folder of a run, an export, or another program's checkpoint.
      variant: another encoding, or with +rotary one next to the folder's RoPE; "" = that of the overrides, or else the folder's.
      overrides: values by dotted field.

    Raises:
      InputError: it is no such folder, or there is no such encoding.
    """
    # `loading` lies above this package; it reads the folders of other programs too.
    loading, ignored = importlib.import_module("seqpe_jax.loading"), overrides.get("ignore_fields", ())
    stored: Config = reset_unused(loading.folder_config(folder, () if loading.is_run_or_export(folder) else ignored))
    if {"data.length", "data.size", "model.patch"} & overrides.keys():
        stored = with_resolved_lengths(stored)
    values = to_dict(stored)
    values["encoding"] = all_fields() | values["encoding"]
    config = ml_collections.ConfigDict(values)
    if variant.endswith(WITH_ROPE):
        variant = variant.removesuffix(WITH_ROPE)
        config.encoding.update(_with_rope(folder, stored, variant))
    kind = variant or overrides.get("encoding.kind", stored.encoding.kind)
    if kind == stored.encoding.kind:
        return config
    for name, value in overrides.items():
        section, _, field = name.partition(".")
        if section == "encoding" and field in config.encoding and _fits(config.encoding[field], value):
            config.encoding[field] = value
    with_encoding(config, kind)
    if ENCODINGS[config.encoding.kind].HAS_VECTORS and not stored.encoding.HAS_VECTORS:
        for name, loss in VECTOR_LOSSES.items():
            config.objective[name] = ml_collections.ConfigDict(dataclasses.asdict(loss()))
        if stored.model.width < config.encoding.width:  # a digit encoder is no wider than the model that reads it
            config.encoding.update({"width": stored.model.width, "heads": stored.model.heads})
    return config


def _with_rope(folder: str, stored: Config, kind: str) -> dict[str, Any]:
    """Returns fields of an encoding that is added to a model with RoPE; it begins without an effect, if it can.

    Raises:
      InputError: the model has no RoPE, or the encoding takes no rotary pairs next to it.
    """
    chosen, own = ENCODINGS.get(kind), stored.encoding
    if not isinstance(own, RotaryConfig):
        raise InputError(
            f"--config={folder}:{kind}{WITH_ROPE}: the model's encoding.kind is '{own.kind}', and it has no RoPE that could "
            f"stay: leave {WITH_ROPE} out"
        )
    if chosen is None or not chosen.has("rotary_layers"):
        others = [name for name, one in ENCODINGS.items() if one.has("rotary_layers") and one.AXES != "2+"]
        raise InputError(
            f"--config={folder}:{kind}{WITH_ROPE}: '{kind}' is no encoding that allows RoPE next to it: choose one of "
            f"{', '.join(others)}"
        )
    begins = {"start_at_zero": True} if chosen.has("start_at_zero") else {}
    return own.as_part(stored.dims.head_width) | begins


def _execute_config(path: str) -> ml_collections.ConfigDict:
    """Returns the result of get_config of a config file, for its variant. Raises: InputError."""
    name, _, variant = resolve_config_path(expand_path(path, local=LOCAL)).partition(":")
    expected = "config file defines get_config(variant=None), which returns a ConfigDict (see configs/)"
    get_config = getattr(execute_file(name, expected), "get_config", None)
    if not callable(get_config):
        raise InputError(f"{name} lacks get_config: a {expected}")
    config = call_user_code(name, lambda: get_config(variant) if variant else get_config())
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(f"{name}: get_config returned {type(config).__name__}: a {expected}")
    return config


def _overridden(config: ml_collections.ConfigDict, overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested values of a config file with dotted overrides. Raises: InputError: there is no such field."""
    stored = flatten_dict(_values(config), ".")
    fitting = {name: value for name, value in overrides.items() if name in stored and _fits(stored[name], value)}
    config.update_from_flattened_dict(fitting)  # fields that the file computes from these follow
    values = _values(config)
    for name, value in overrides.items():
        *sections, last = name.split(".")
        target = values
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if not isinstance(target, dict) or (last not in target and name not in field_names()):
            raise InputError(unknown_field_message(name))
        target[last] = value
    return values


def _fits(stored: Any, value: Any) -> bool:
    """True if a value has the type of the one in a ConfigDict, and is no number that overflows."""
    return type(value) is type(stored) and not (type(value) is int and abs(value) >= LARGEST)


def parse(config: ml_collections.ConfigDict, overridden: Collection[str] = ()) -> Config:
    """Returns the validated config of a user's ConfigDict.

    Args:
      config: result of get_config of a config file.
      overridden: dotted names of the fields that the user has overridden.

    Raises:
      InputError: see `from_dict`; or a field is set that has no effect.
    """
    return from_user_values(_values(config), overridden)


def from_user_values(values: dict[str, Any], overridden: Collection[str] = ()) -> Config:
    """Returns the validated config of a user's values, for a new run.

    Args:
      values: nested dicts.
      overridden: dotted names of the fields that the user has overridden. The evaluation lengths and sizes of a config file
        belong to its training length or size: those below an overridden one are dropped.

    Raises:
      InputError: see `parse`.
    """
    _refuse_old_names(values)
    values = _without_foreign_fields(apply_renames(values), overridden)
    config = _with_eval_from_training_size(_build(Config, values, ""), overridden)
    check(config)
    _check_ranges(config, "")
    _check_fields_used(config)
    return config


def _values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the values of a ConfigDict; those computed from other fields (`get_oneway_ref`) are numbers then.

    Raises:
      InputError: one cannot be computed.
    """
    try:
        return config.to_dict()
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(
            f"a field that the config file computes from others, such as steps from batch_size, has no value ({error}): "
            "set those others to numbers above 0"
        ) from None


def _with_eval_from_training_size(config: Config, overridden: Collection[str]) -> Config:
    """Returns a config whose eval section starts at the training length or size, if that is overridden.

    Args:
      config: config with the overrides applied.
      overridden: dotted names of the fields that the user has overridden; an eval field among them stays unchanged.
    """
    data, changed = config.data, {}
    sides = data.size[-2:]
    trained = {
        "lengths": ("data.length", data.length),
        "sizes": ("data.size", sides[0] if len(set(sides)) == 1 else 0),
        "frames": ("data.size", data.size[0] if len(data.size) == 3 else 0),
    }
    for name, (field, own) in trained.items():
        evaluated = getattr(config.eval, name)
        if evaluated and field in overridden and f"eval.{name}" not in overridden:
            # Evaluation sizes are squares: if the training size is none, it alone is evaluated.
            changed[name] = (own, *(size for size in evaluated if size > own)) if own else ()
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changed)) if changed else config


def _check_ranges(section: Any, prefix: str) -> None:
    """Refuses values that only stored runs of older versions may have. Raises: InputError."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            _check_ranges(value, name + ".")
        else:
            check_range(value, field.metadata, name)


# --- Variants of the encoding, and fields without effect


def with_encoding(
    config: ml_collections.ConfigDict, variant: str | None, forms: dict[str, str] | None = None
) -> ml_collections.ConfigDict:
    """Sets the encoding of a config file's variant; fields that it does not have go back to their defaults.

    Args:
      config: content of the config file, with fields of several encodings.
      variant: an encoding kind, a name in `encodings.GATED` or in `forms`; None = seqpe.
      forms: further variants of a config file, and the kind of encoding of each.

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


# Losses on vectors of positions, which SeqPE alone has.
VECTOR_LOSSES = {"contrastive": ContrastiveConfig, "distillation": DistillationConfig}


def reset_unused(config: Config) -> Config:
    """Returns a config with fields without effect at their defaults; configs of older versions may have other values."""
    plain = type(config.encoding)()
    idle = {name: getattr(plain, name) for name in config.encoding.without_effect()}
    encoding = dataclasses.replace(config.encoding, **idle)
    has_vectors = config.encoding.HAS_VECTORS
    losses = {} if has_vectors else {section: loss(weight=0.0) for section, loss in VECTOR_LOSSES.items()}
    config = dataclasses.replace(config, encoding=encoding, objective=dataclasses.replace(config.objective, **losses))
    return _reset_of_other_data(config, config.data_kind)


def _without_foreign_fields(
    values: dict[str, Any], overridden: Collection[str] = (), stored: bool = False
) -> dict[str, Any]:
    """Returns values whose encoding section has no field of other encodings.

    Args:
      values: nested; the section may have the fields of all encodings, those of others at their defaults.
      overridden: dotted names of the fields that the user has overridden, which are refused if another encoding has them.
      stored: the values are those of a stored run, perhaps of an older version.

    Raises:
      InputError: there is no such encoding, or a field of another one is set; names the encodings that have it.
    """
    section = values.get("encoding") if isinstance(values, dict) else None
    if not isinstance(section, dict):
        return values
    kind = section.get("kind", "seqpe")
    if not isinstance(kind, str) or kind not in ENCODINGS:
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
    """Returns a config in which each length of the encoding is a number (`EncodingConfig.resolved`)."""
    return dataclasses.replace(config, encoding=config.encoding.resolved(config.dims))


def _reset_of_other_data(section: Any, data_kind: str) -> Any:
    """Returns a section in which fields of other kinds of data are at their defaults."""
    changed = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if data_kind not in field.metadata.get("of", (data_kind,)):
            is_section = field.default is dataclasses.MISSING
            changed[field.name] = field.default_factory() if is_section else field.default
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _reset_of_other_data(value, data_kind)
    return dataclasses.replace(section, **changed)


def _check_fields_used(config: Config) -> None:
    """Refuses fields that are set without effect. Raises: InputError: names the encodings or data that they are for."""
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
            *others, last = of[name]
            kinds = f"{', '.join(others)} and {last}" if others else last
            raise InputError(
                f"{name}={value} is not read by runs on {config.data_kind} (data.name='{config.data.name}'), only by those "
                f"on {kinds}: leave it at {values.partition(' -> ')[0] or repr('')}"
            )
        if not name.startswith("encoding."):
            with_vectors = [kind for kind, encoding in ENCODINGS.items() if encoding.HAS_VECTORS]
            raise InputError(
                f"{name}={value} is not read by encoding.kind='{kind}', only by {', '.join(with_vectors)}: leave it out"
            )
        other, needed = config.encoding.requires()[name.removeprefix("encoding.")]
        if needed is not None:
            values = " or ".join(f"'{one}'" for one in (needed if isinstance(needed, tuple) else (needed,)))
            raise InputError(f"{name}={value} is not read without encoding.{other}={values}: set that, or leave it out")
        raise InputError(
            f"{name}={value} is read by encoding.kind='{kind}' with encoding.{other} alone: set that too, or leave {name} "
            "out"
        )


def _kinds_of_data(section: type, prefix: str, inherited: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Returns the kinds of data whose runs read a field, by its dotted name; () = all."""
    found, hints = {}, _hints(section)
    for field in dataclasses.fields(section):
        of, hint = field.metadata.get("of", inherited), hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _kinds_of_data(hint, f"{prefix}{field.name}.", of)
        else:
            found[prefix + field.name] = of
    return found


def mesh_from_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a trained model's config with a mesh to use it on.

    Args:
      config: config of the run.
      values: fields of the section, such as {"fsdp": 8}; those left out have their defaults.

    Raises:
      InputError: a field or value that no mesh has, or that has no effect, or heads that do not divide over mesh.tensor.
    """
    if training := TRAINING_MESH_FIELDS & values.keys():
        raise InputError(f"mesh.{min(training)} is read by training alone: leave it out")
    mesh = _build(MeshConfig, dict(values), "mesh.")
    _check_ranges(mesh, "mesh.")
    config = dataclasses.replace(config, mesh=mesh)
    check_heads(config)
    check_overrides_used(config, (f"mesh.{name}" for name in values))
    return config


# --- Fields: names, types, differences


def unknown_field_message(name: str, also: Iterable[str] = ()) -> str:
    """Returns the message on a field that does not exist, with its name of today or the most similar names.

    Args:
      name: dotted name.
      also: further names that could be meant.
    """
    if name in RENAMED:
        return f"unknown config field '{name}': it is called '{RENAMED[name]}' now."
    inside = [field for field in field_names() if field.startswith(f"{name}.")]
    if inside:
        field = f"{name}.kind" if f"{name}.kind" in inside else inside[0]
        return f"'{name}' is a section of the config: set one of its fields, such as {field}"
    return f"unknown config field '{name}'.{suggest(name, [*field_names(), *also])}"


_type_hints = functools.cache(typing.get_type_hints)  # which takes long, and a sweep asks for them thousands of times


def _hints(section: type) -> dict[str, Any]:
    """Returns the types of the fields of a section; the encoding section has those of all encodings."""
    hints = _type_hints(section)
    return {
        field.name: any_encoding() if hints[field.name] is EncodingConfig else hints[field.name]
        for field in dataclasses.fields(section)
    }


def model_mesh_fields() -> dict[str, "FieldDoc"]:
    """Returns the fields of the mesh section that the use of a trained model reads, by their names in the section."""
    return {name: doc for name, doc in field_docs(MeshConfig).items() if name not in TRAINING_MESH_FIELDS}


def field_names() -> list[str]:
    """Returns the dotted names of all fields."""
    return list(field_types())


@functools.cache
def _field_types(encodings: tuple[type, ...]) -> dict[str, Any]:
    """Returns what `field_types` does, as long as the registered encodings are these."""
    return {name: field.type for name, field in field_docs().items()}


def field_types() -> dict[str, Any]:
    """Returns the type of each field by its dotted name."""
    return dict(_field_types(tuple(ENCODINGS.values())))


@dataclasses.dataclass(frozen=True)
class FieldDoc:
    """Type, default and meaning of one field.

    Attributes:
      type: the annotation of the field.
      default: value where no config sets it.
      doc: one line, with the unit.
      choices: allowed values; () = by type and range.
    """

    type: Any
    default: Any
    doc: str
    choices: tuple[str, ...] = ()


def field_docs(section: type = Config, prefix: str = "") -> dict[str, FieldDoc]:
    """Returns type, default and meaning of each field, by its dotted name."""
    docs, hints = {}, _hints(section)
    for field in dataclasses.fields(section):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            docs |= field_docs(hint, f"{name}.")
        else:
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            if "choices" in field.metadata:
                choices = field.metadata["choices"]()
            docs[name] = FieldDoc(hint, field.default, field.metadata.get("doc", ""), choices)
    return docs


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns a line `field: old -> new` for each leaf that differs between two nested dicts."""
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


# --- Values of the right types and ranges


def _build(kind: type, values: dict[str, Any], prefix: str) -> Any:
    if kind is EncodingConfig:
        kind = ENCODINGS[values.get("kind", "seqpe")]
        values = {name: value for name, value in values.items() if name != "kind"}
    hints = _type_hints(kind)
    fields = fields_of(kind)
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
                built[name] = _expanded(built[name], full)
    return kind(**built)


def _expanded(value: Any, name: str) -> Any:
    """Returns the path or paths of a field with ~ replaced; "" stays ""."""
    if isinstance(value, tuple):
        return tuple(map(expand_path, value))
    local = f"{name} is a folder of this machine" if name == "data.cache_dir" else ""
    return expand_path(value, local=local) if value else value


def _named_sections(kind: type, value: Any, name: str) -> tuple[Any, ...]:
    """Returns sections in the order of their names, which they have in a dict."""
    if value == ():
        return ()
    if not isinstance(value, dict) or not all(isinstance(fields, dict) for fields in value.values()):
        fields = ", ".join(f"'{field.name}': ..." for field in dataclasses.fields(kind)[1:])
        raise InputError(
            f"config field '{name}' must be a dict of sources, {{NAME: {{{fields}}}}}, got {format_value(value)}"
        )
    for own in value:
        if not isinstance(own, str) or not re.fullmatch(r"[\w-]+", own):
            raise InputError(
                f"config field '{name}': a source's name has letters, digits, '_' and '-' alone, got {format_value(own)}"
            )
    return tuple(_build(kind, {"name": own} | value[own], f"{name}.{own}.") for own in sorted(value))


def _value(hint: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise InputError(f"config field '{name}' is {format_value(value)}.{suggest(format_value(value), choices)}")
        return value
    if origin is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        return _named_sections(typing.get_args(hint)[0], value, name)
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
