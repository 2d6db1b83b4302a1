"""RoPE as Hugging Face's config.json writes it, in both forms: of transformers 4 (`rope_scaling`) and 5 (`rope_parameters`)."""

from collections.abc import Mapping
from typing import Any

from seqpe_jax.config import RotaryConfig
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.interop.settings import MAX_FLOAT, SIZE, Field, check_names

DEFAULT_THETA = {"smollm3": 2_000_000.0}  # by model_type, where a folder names none; others have 10,000
# Architectures that read the share of a head that rotates, and the share where a folder names none; others rotate whole heads.
PARTIAL_SHARE = {"gpt_neox": 0.25}
# Fields of a config.json that `rope_from_hf` reads.
ROPE_KEYS = frozenset(
    {
        "rope_theta",
        "rotary_emb_base",
        "partial_rotary_factor",
        "rotary_pct",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
    }
)
ANY_TYPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
OF_BASE = ("rope_theta", "partial_rotary_factor")  # not of a scaling
ORIGINAL = "original_max_position_embeddings"
# Fields of each rope_type in addition to those of any type; true where it must be there.
TYPES: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "dynamic": {"factor": True},
    "yarn": dict.fromkeys(
        ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        False,
    ),
    "longrope": {
        "short_factor": True,
        "long_factor": True,
        "factor": False,
        "attention_factor": False,
        ORIGINAL: False,
    },
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True, ORIGINAL: False},
    "proportional": {"factor": False},
}
LAYER_TYPES = {"full_attention", "sliding_attention"}


def rope_from_hf(settings: Mapping[str, Any], head_width: int) -> dict[str, Any]:
    """Returns the fields of the encoding `rotary` that a config.json describes, as transformers 5 computes it.

    Args:
      settings: content of config.json, with model_type and max_position_embeddings.
      head_width: features of one head.

    Raises:
      InputError: a field that is not read, lacks its value or contradicts another one; names it.
    """
    architecture = settings.get("model_type", "")
    form, rope = _parameters(settings)
    theta = _agreeing(
        settings, ("rope_theta", "rotary_emb_base"), form, rope, DEFAULT_THETA.get(architecture, 10_000.0)
    )
    share = _agreeing(
        settings, ("partial_rotary_factor", "rotary_pct"), form, rope, PARTIAL_SHARE.get(architecture, 1.0)
    )
    kind, length = rope.get("rope_type", "default"), settings.get("max_position_embeddings")
    outer = settings.get(ORIGINAL)  # which transformers prefers
    original = (outer and _length(ORIGINAL, outer)) or rope.get(ORIGINAL) or length
    if original != length and ORIGINAL not in TYPES[kind]:
        raise InputError(
            f"config.json: {ORIGINAL}={original} is not read with rope_type='{kind}', which knows "
            f"max_position_embeddings={length} alone: leave it out"
        )
    if kind == "proportional":
        return {"theta": float(theta)} | _proportional(rope, share, head_width)
    if share != 1 and architecture not in PARTIAL_SHARE:
        raise InputError(
            f"config.json: partial_rotary_factor={share}: model_type='{architecture}' rotates whole heads; it must be 1 or absent"
        )
    fields: dict[str, Any] = {"theta": float(theta), "rotary_share": float(share)}
    if kind == "default":
        return fields
    if kind == "linear":
        return fields | {"scaling": kind, "scaling_factor": float(rope["factor"])}
    if not length:
        raise InputError(f"config.json: {form}.rope_type='{kind}' needs max_position_embeddings: set it")
    factor = rope.get("factor") or length / original
    fields |= {"scaling": kind, "scaling_factor": float(factor), "original_length": original}
    return fields | OF_TYPE.get(kind, lambda _: {})(rope)


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of YaRN; numbers of 0 are absent to transformers."""
    fields: dict[str, Any] = {
        "yarn_ramp": "pairs",
        "yarn_truncate": bool(rope.get("truncate", True)),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
    }
    if rope.get("attention_factor"):
        return fields | {"attention_factor": float(rope["attention_factor"])}
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        fields |= {f"yarn_{name}": float(rope[name]) for name in ("mscale", "mscale_all_dim")}
    return fields


def _longrope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of LongRoPE."""
    factors = {name: tuple(map(float, rope[name])) for name in ("short_factor", "long_factor")}
    return factors | ({"attention_factor": float(rope["attention_factor"])} if rope.get("attention_factor") else {})


def _llama3(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Llama 3's scaling."""
    return {name: float(rope[name]) for name in ("low_freq_factor", "high_freq_factor")}


OF_TYPE = {"yarn": _yarn, "longrope": _longrope, "llama3": _llama3}


def _proportional(rope: Mapping[str, Any], share: float, head_width: int) -> dict[str, Any]:
    """Fields of p-RoPE, which transformers calls proportional: the highest-frequency pairs of a head rotate."""
    pairs = int(share * head_width // 2)
    if not pairs:
        raise InputError(
            f"config.json: partial_rotary_factor={share} of a head of width {head_width} leaves no rotary pair"
        )
    fields: dict[str, Any] = {"rotary_pairs": 0 if pairs == head_width // 2 else pairs}
    factor = rope.get("factor") or 1.0
    return fields | ({"scaling": "linear", "scaling_factor": float(factor)} if factor != 1 else {})


def _agreeing(
    settings: Mapping[str, Any], names: tuple[str, ...], form: str, rope: Mapping[str, Any], default: float
) -> float:
    """The number of the fields of these names that are there, outside and inside of `rope`, which must agree."""
    values = {name: settings[name] for name in names if settings.get(name) is not None}
    for name, value in values.items():
        _check_number(name, value)
    values |= {f"{form}.{name}": rope[name] for name in names if name in rope}
    if len(set(values.values())) > 1:
        raise InputError(
            f"config.json: {' and '.join(f'{name}={value}' for name, value in values.items())} differ: keep one"
        )
    return next(iter(values.values()), default)


def _parameters(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the form that describes the rotations, and its fields, checked, with rope_type; null ones are absent."""
    found = {form: _form(form, settings[form]) for form in ("rope_scaling", "rope_parameters") if settings.get(form)}
    if len(found) == 2:
        own = [{name: value for name, value in one.items() if name not in OF_BASE} for one in found.values()]
        if own[0] != own[1]:
            raise InputError(
                "config.json: rope_scaling and rope_parameters describe different rotations: keep one of them"
            )
    return next(reversed(found.items()), ("rope_parameters", {}))


def _form(form: str, own: Any) -> dict[str, Any]:
    """The fields of one form, which it may have for each type of layer."""
    if not isinstance(own, Mapping):
        raise InputError(f"config.json: {form} must hold fields, got {format_value(own)}")
    check_names(f"config.json: {form}", own)
    nested = {name: own[name] for name in own if name in LAYER_TYPES}
    if not nested:
        return _checked(form, own)
    if len(nested) < len(own):
        raise InputError(
            f"config.json: {form} names layer types and other fields side by side: {format_value(tuple(own))}"
        )
    for name, value in nested.items():
        if not isinstance(value, Mapping):
            raise InputError(
                f"config.json: {form}.{name}={format_value(value)}: rotations of a layer type must hold fields"
            )
    each = [_checked(f"{form}.{name}", value) for name, value in nested.items()]
    if any(one != each[0] for one in each):
        raise InputError(
            f"config.json: {form} differs between {' and '.join(nested)}: one RoPE for all layers can be read"
        )
    return each[0]


def _checked(where: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one RoPE that are not null, with rope_type in place of type. Raises: InputError: names a field."""
    check_names(f"config.json: {where}", rope)
    rope = {name: value for name, value in rope.items() if value is not None}
    kinds = {
        Field(str).check(f"config.json: {where}.{name}", rope[name]) for name in ("rope_type", "type") if name in rope
    }
    if len(kinds) > 1:
        raise InputError(f"config.json: {where}.rope_type and {where}.type differ: keep one of them")
    kind = next(iter(kinds), "default")
    if kind not in TYPES:
        raise InputError(f"config.json: unknown {where}.rope_type {format_value(kind)}.{suggest(kind, TYPES)}")
    for name, value in rope.items():
        _check_field(where, kind, name, value)
    for name, needed in TYPES[kind].items():
        if needed and name not in rope:
            raise InputError(f"config.json: {where} lacks {name}, which rope_type='{kind}' needs: set it")
    return {name: value for name, value in rope.items() if name != "type"} | {"rope_type": kind}


def _check_field(where: str, kind: str, name: str, value: Any) -> None:
    """Refuses a field that a rope_type does not read, or a value of another type. Raises: InputError: names it."""
    if name not in ANY_TYPE and name not in TYPES[kind] and not (kind == "dynamic" and name == ORIGINAL):
        known = (*ANY_TYPE, *TYPES[kind])
        raise InputError(
            f"config.json: {where}.{name} is not read with rope_type='{kind}', which reads {', '.join(known)}; "
            f"--ignore-fields={where}.{name} passes over it"
        )
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"config.json: {where}.{name} must be a list of numbers, got {format_value(value)}")
        for item in value:
            _check_number(f"{where}.{name}", item)
    elif name == "truncate":
        if not isinstance(value, bool):
            raise InputError(f"config.json: {where}.truncate must be true or false, got {format_value(value)}")
    elif name == ORIGINAL:
        _length(f"{where}.{name}", value)
    elif name not in ("rope_type", "type"):
        _check_number(f"{where}.{name}", value)
        if name == "attention_factor" and not value:
            raise InputError(f"config.json: {where}.attention_factor must be above 0")


def _length(name: str, value: Any) -> int:
    """Returns a number of tokens; 0 = absent. Raises: InputError: names its field."""
    return Field(int, SIZE).check(f"config.json: {name}", value)


def _check_number(name: str, value: Any) -> None:
    """Refuses a value that is no number of at least 0, or none that float32 holds. Raises: InputError: names its field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_FLOAT:
        raise InputError(f"config.json: {name} must be a number of at least 0, got {format_value(value)}")


def rope_to_hf(encoding: RotaryConfig, head_width: int, length: int, model_type: str) -> dict[str, Any]:
    """Returns the fields of a config.json for an encoding, in both forms: `rope_from_hf` backwards.

    The layers and heads that have the encoding are the caller's part.

    Args:
      encoding: RoPE.
      head_width: features of one head.
      length: max_position_embeddings of the folder, tokens.
      model_type: architecture of the folder.

    Raises:
      InputError: transformers has no such RoPE; names the field.
    """
    for name in ("fraction_digits", "position_heads", "log_scaling"):
        if getattr(encoding, name):
            raise _no_form(name, getattr(encoding, name))
    if encoding.resize != "extrapolate":
        raise _no_form("resize", encoding.resize)
    theta, share, rope = encoding.theta, encoding.rotary_share, _scaling_to_hf(encoding, head_width, length)
    if "theta" in rope:
        theta = rope.pop("theta")
    if encoding.rotary_pairs and encoding.rotary_pairs != encoding.rotary_width(head_width) // 2:
        if share != 1 or rope.get("rope_type") not in (None, "linear"):
            raise _no_form("rotary_pairs", encoding.rotary_pairs)
        rope |= {"rope_type": "proportional", "partial_rotary_factor": 2 * encoding.rotary_pairs / head_width}
    elif share != 1 and model_type not in PARTIAL_SHARE:
        raise _no_form("rotary_share", share)
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    if rope:
        fields["rope_scaling"] = rope | {"type": rope["rope_type"]}
    if model_type in PARTIAL_SHARE:
        fields |= {"rotary_emb_base": theta, "rotary_pct": share, "partial_rotary_factor": share}
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share} | rope
    else:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta} | rope
    return fields


def _scaling_to_hf(encoding: RotaryConfig, head_width: int, length: int) -> dict[str, Any]:
    """The fields of rope_scaling; {} for none, {"theta": base} for a scaling that is a larger base."""
    kind, factor = encoding.scaling, encoding.scaling_factor
    original = encoding.original_length or length
    if kind == "none":
        return {}
    if kind == "ntk" and factor:
        width = encoding.rotary_width(head_width)
        return {"theta": encoding.theta * factor ** (width / max(width - 2, 1))}
    if kind in ("ntk", "dynamic"):  # NTK by the window's length is dynamic scaling with the factor 1
        if original != length:
            raise _no_form("original_length", original, f", which begins to scale at max_position_embeddings={length}")
        return {"rope_type": "dynamic", "factor": factor or 1.0}
    if not factor and not (kind == "longrope" and encoding.attention_factor):
        raise _no_form("scaling", kind, " without encoding.scaling_factor")
    rope: dict[str, Any] = {"rope_type": kind} | ({"factor": factor} if factor else {})
    if kind == "linear":
        return rope
    rope[ORIGINAL] = original
    if encoding.attention_factor:
        rope["attention_factor"] = encoding.attention_factor
    if kind == "llama3":
        return rope | {name: getattr(encoding, name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "longrope":
        return rope | {name: list(getattr(encoding, name)) for name in ("short_factor", "long_factor")}
    if encoding.yarn_ramp != "pairs":
        raise _no_form("yarn_ramp", encoding.yarn_ramp)
    betas = {"beta_fast": encoding.yarn_beta_fast or 32.0, "beta_slow": encoding.yarn_beta_slow}
    mscales = {"mscale": encoding.yarn_mscale, "mscale_all_dim": encoding.yarn_mscale_all_dim}
    return rope | betas | {"truncate": encoding.yarn_truncate} | {name: m for name, m in mscales.items() if m}


def _no_form(name: str, value: Any, rest: str = "") -> InputError:
    return InputError(
        f"encoding.{name}={value!r}{rest} has no form in Hugging Face's configs: export the model as StableHLO (`export`)"
    )
