"""Settings of the PyTorch reference <-> config.

A `ReferenceSpec` has the settings that its file formats share, in one flat mapping: {"kind": "gpt2", "n_layer", "n_embd",
..., "pe_type", "pe_apply_method", ..., "encoder": {...}}; {"kind": "vit", "depth", "embed_dim", ...}; or a digit encoder
alone, {"kind": "seqpe_encoder", "layer_num", ...}. An unknown field is refused, since it could change the computation.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from seqpe_jax import config as configs
from seqpe_jax.config import (
    ENCODINGS,
    CompatConfig,
    Config,
    EncodingConfig,
    ModelConfig,
    ModelDims,
    SeqPEConfig,
    limits,
)
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.interop.settings import Field, check_names

ReferenceSpec = Mapping[str, Any]

# The reference's name -> the name here.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
KINDS = {"seq_pe": "seqpe", "vanilla": "learned", "sin": "sinusoidal", "nope": "none", "alibi": "alibi"}
ROTARY = {"rotary": "rotary", "rotary_2d": "rotary_axial", "rotary_mixed": "rotary_mixed"}  # by pe_apply_method

DEFAULT_THETA = {"rotary_2d": 100, "rotary_mixed": 100}  # the reference's own; 10000 for other methods
APPLY_METHODS = {"sinusoidal": "input_add", "learned": "input_add", "none": "nope", "alibi": "alibi"}
APPLY_METHODS |= {kind: method for method, kind in ROTARY.items()}

_LAYERS = Field(int, limits.LAYERS)
_HEADS = Field(int, limits.HEADS)
_WIDTH = Field(int, limits.WIDTH)
_OPTIONAL_WIDTH = Field(int, limits.OPTIONAL_WIDTH, null=True)
_RATE = Field(float, limits.DROP_RATE)
_SWITCH = Field(bool)
_NAME = Field(str)
_PE_FIELDS = {
    "pe_type": _NAME,
    "pe_apply_method": Field(str, null=True),
    "use_pe_multi_head": _SWITCH,
    "use_pe_qk_per_layer": Field(str, null=True),
    "pe_out_dim": Field(int, {"low": -1, "high": 2**20}, null=True),  # -1 = the encoding has no vectors
    "seqpe_scalar_scale": Field(float, {"low": -1e6, "high": 1e6}),
    "sinusoidal_pe_base": Field(float, {"zero": True, "low": 1.0, "high": 1e12}, null=True),
    "pe_max_position": Field(int, {"low": 1, "high": 2**60}, null=True),  # of the whole grid
    "encoder": Field(dict, null=True),
}
# Where a spec comes from, and facts about the arrays that were recorded with it; nothing is computed from them but T.
_RECORDING_FIELDS = {"kind", "note", "T", "batch", "pe_batch", "eager_sdpa_maxdiff", "tied", "trained_img_size"}
SPEC_FIELDS: dict[str, dict[str, Field]] = {
    "gpt2": _PE_FIELDS
    | {
        "vocab_size": Field(int, {"low": 1, "high": 2**24}),
        "n_layer": _LAYERS,
        "n_embd": _WIDTH,
        "n_head": _HEADS,
        "n_inner": _OPTIONAL_WIDTH,
        "n_positions": Field(int, limits.OPTIONAL_LENGTH, null=True),
        "block_size": Field(int, limits.OPTIONAL_LENGTH, null=True),
        "activation_function": _NAME,
        "layer_norm_epsilon": Field(float, limits.EPSILON),
        "resid_pdrop": _RATE,
        "attn_pdrop": _RATE,
        "embd_pdrop": _RATE,
        "initializer_range": Field(float, limits.STD),
        "tie_word_embeddings": _SWITCH,
    },
    "vit": _PE_FIELDS
    | {
        "depth": _LAYERS,
        "embed_dim": _WIDTH,
        "img_size": Field(int, limits.IMAGE_SIZE),
        "mlp_ratio": Field(float, {"low": 1e-3, "high": 1e3}),
        "num_classes": Field(int, {"low": 1, "high": 2**24}),
        "num_heads": _HEADS,
        "patch_size": Field(int, limits.IMAGE_SIZE),
        "drop_path": _RATE,
        "data_name": _NAME,
    },
    "seqpe_encoder": {
        "attn_direction": _NAME,
        "attn_pdrop": _RATE,
        "data_dim": Field(int, {"low": 1, "high": 8}),
        "layer_num": _LAYERS,
        "left_padding": _SWITCH,
        "mask_padding": _SWITCH,
        "max_digits": Field(int, {"low": 1, "high": 64}),
        "num_attention_heads": _HEADS,
        "pe_embed_dim": _WIDTH,
        "resid_pdrop": _RATE,
        "use_cls_token": _SWITCH,
        "use_last_layernorm": _SWITCH,
        "out_proj_dim": Field(int, {"low": -1, "high": 2**20}, null=True),
        "activation_function": _NAME,
        "layer_norm_epsilon": Field(float, limits.EPSILON),
        "seqpe_temperature": Field(float, {"low": 1e-6, "high": 1e6}),
        "init_norm_weight": Field(float, {"low": -1e3, "high": 1e3}),
    },
}


REQUIRED_FIELDS = {
    "gpt2": ("vocab_size", "n_layer", "n_embd", "n_head", "pe_type"),
    "vit": ("depth", "embed_dim", "img_size", "num_classes", "num_heads", "patch_size", "pe_type"),
    "seqpe_encoder": ("layer_num", "max_digits", "num_attention_heads", "pe_embed_dim"),
}
# Fields of an encoding that the reference does not have: only their defaults can be written.
UNSUPPORTED_FIELDS = (
    "fraction_digits",
    "resize",
    "feature_width",
    "position_heads",
    "rotary_pairs",
    "rotary_heads",
    "rotary_share",
    "layers_with",
    "log_scaling",
    "scaling",
    "gate",
    "start_at_zero",
    "slope_scale",
)


def check_spec(spec: ReferenceSpec, kind: str | None = None) -> str:
    """Returns the kind of a spec.

    Args:
      spec: settings.
      kind: the expected kind; None = that in the spec.

    Raises:
      InputError: an unknown kind or field, a value of another type or outside of its range, or a required field is missing.
    """
    kind = kind or spec.get("kind")
    if not isinstance(kind, str) or kind not in SPEC_FIELDS:
        raise InputError(f"config kind is {format_value(kind)}.{suggest(format_value(kind), SPEC_FIELDS)}")
    fields = SPEC_FIELDS[kind]
    check_names("the config", spec)
    for name, value in spec.items():
        if name in fields:
            fields[name].check(f"config field '{name}' of a {kind}", value)
        elif name not in _RECORDING_FIELDS:
            known = {*fields, *_RECORDING_FIELDS}
            raise InputError(f"config field '{name}' of a {kind} is unknown.{suggest(name, known)}")
    missing = [name for name in REQUIRED_FIELDS[kind] if name not in spec]
    if missing:
        raise InputError(f"the config of a {kind} lacks {', '.join(missing)}")
    return kind


# ------------------------------------------------------------------------------------------------------- spec to config


def encoding_from_spec(spec: ReferenceSpec) -> EncodingConfig:
    """Returns the encoding section of a spec.

    Args:
      spec: a spec of any kind.

    Raises:
      InputError: a field or value without a counterpart here.
    """
    kind = check_spec(spec)
    if kind == "seqpe_encoder":
        out = max(spec.get("out_proj_dim") or 0, 0)  # -1 = none of its own
        return SeqPEConfig(**_encoder_fields(spec), output_width=out or spec["pe_embed_dim"])
    encoding = _encoding_kind(spec)
    if encoding == "seqpe":
        return _seqpe_from_spec(spec)
    config_class = ENCODINGS[encoding]
    if not config_class.has("theta") or "theta" in config_class.requires():
        return config_class()
    default = DEFAULT_THETA.get(spec.get("pe_apply_method", ""), 10000)
    return config_class(theta=float(spec.get("sinusoidal_pe_base") or default))


def _encoding_kind(spec: ReferenceSpec) -> str:
    """Returns encoding.kind of a spec of kind gpt2 or vit."""
    pe_type, method = spec["pe_type"], spec.get("pe_apply_method", "")
    encoding = ROTARY.get(method) if pe_type == "rotary" else KINDS.get(pe_type)
    if encoding is None:
        raise InputError(
            f"pe_type={format_value(pe_type)} with pe_apply_method={format_value(method)} is unknown: expected one of {', '.join(KINDS)}, or "
            f"rotary with {', '.join(ROTARY)}"
        )
    return encoding


def _seqpe_from_spec(spec: ReferenceSpec) -> SeqPEConfig:
    images, method = spec["kind"] == "vit", spec.get("pe_apply_method", "")
    width, heads = (spec["embed_dim"], spec["num_heads"]) if images else (spec["n_embd"], spec["n_head"])
    per_head, output_width = bool(spec.get("use_pe_multi_head")), spec.get("pe_out_dim") or 0
    qk = "none" if method in ("input_add", "rotary") else spec.get("use_pe_qk_per_layer") or "none"
    dims = ModelDims(1, width, heads, compat=compat_from_spec(spec))
    needed = SeqPEConfig(mode=method, qk=qk, per_head=per_head).needed_width(dims)
    encoder = spec.get("encoder")
    fields = _encoder_fields(encoder, spec.get("pe_max_position")) if encoder else {"width": width, "heads": heads}
    return SeqPEConfig(
        mode=method,
        qk=qk,
        per_head=per_head,
        output_width=0 if output_width == needed else max(output_width, 0),
        scalar_scale=float(spec.get("seqpe_scalar_scale", 1.0)),
        **fields,
    )


def compat_from_spec(spec: ReferenceSpec) -> CompatConfig:
    """Returns the compat section of a spec: behaviour of the reference that its checkpoints were trained with.

    Args:
      spec: a spec of kind gpt2 or vit.

    Raises:
      InputError: a field or value without a counterpart here.
    """
    images, encoding, method = check_spec(spec) == "vit", _encoding_kind(spec), spec.get("pe_apply_method", "")
    if encoding == "seqpe":
        as_wide_as_model = spec.get("pe_out_dim") == (spec["embed_dim"] if images else spec["n_embd"])
        has_map = bool(spec.get("use_pe_qk_per_layer")) or method in ("input_add", "rotary")
        return CompatConfig(qk_halves=not has_map and _halves_without_map(images, method, as_wide_as_model))
    return CompatConfig(
        flatten=images and encoding == "sinusoidal",
        reference_scramble=encoding == "rotary_mixed",
        reference_scaling=encoding == "alibi",
    )


def _halves_without_map(images: bool, method: str, as_wide_as_model: bool) -> bool:
    """Returns whether the reference splits vectors without a qk map into halves for query and key."""
    return method == "attn_scalar" if images else not as_wide_as_model


def _encoder_fields(spec: ReferenceSpec, max_position: int | None = None) -> dict[str, Any]:
    """Returns the fields of a digit encoder.

    Args:
      spec: a spec of kind seqpe_encoder.
      max_position: number of positions of the whole grid; None = all that the digits can write.
    """
    check_spec(spec, "seqpe_encoder")
    axes = spec.get("data_dim", 1)
    largest = 10 ** spec["max_digits"] if max_position is None else round(max_position ** (1 / axes))
    return {
        "max_position": min(largest, 10 ** spec["max_digits"]),
        "digits": spec["max_digits"],
        "layers": spec["layer_num"],
        "padding": "left" if spec.get("left_padding", True) else "right",
        "width": spec["pe_embed_dim"],
        "heads": spec["num_attention_heads"],
        "direction": spec.get("attn_direction", "causal"),
        "cls": spec.get("use_cls_token", True),
        "final_norm": spec.get("use_last_layernorm", True),
        "mask_padding": spec.get("mask_padding", False),
        "dropout": float(spec.get("resid_pdrop", 0.1)),
        "attention_dropout": float(spec.get("attn_pdrop", 0.0)),
        "temperature": float(spec.get("seqpe_temperature", 1.0)),
        "activation": activation(spec.get("activation_function", "gelu_new")),
        "layer_norm_epsilon": float(spec.get("layer_norm_epsilon", 1e-5)),
        "norm_init": float(spec.get("init_norm_weight", 1.0)),
        "init_distribution": "truncated_normal" if axes > 1 else "normal",
    }


def activation(name: str) -> str:
    """Returns the name here of an activation function of the reference.

    Args:
      name: such as "gelu_new".

    Raises:
      InputError: there is none here.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"activation_function={format_value(name)} is unknown.{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def config_from_spec(spec: ReferenceSpec) -> Config:
    """Returns the config of a spec.

    Args:
      spec: a spec of kind gpt2 or vit.

    Raises:
      InputError: a field or value without a counterpart here, or fields that contradict each other.
    """
    kind, encoding = check_spec(spec), encoding_from_spec(spec)
    compat = dataclasses.asdict(compat_from_spec(spec))
    if kind == "gpt2":
        length = 0 if encoding.kind == "learned" else spec.get("block_size")  # a table has n_positions rows
        length = length or spec.get("n_positions") or spec.get("T") or 512
        data = {"name": "wikitext103", "length": length, "tokenizer": ""}
        return config_of_sections(_gpt2_fields(spec), dataclasses.asdict(encoding), data, compat)
    size = (spec["img_size"], spec["img_size"])
    data = {"name": spec.get("data_name", "imagenet2012"), "size": size}
    return config_of_sections(_vit_fields(spec), dataclasses.asdict(encoding), data, compat)


def config_of_sections(
    model: Mapping[str, Any],
    encoding: Mapping[str, Any],
    data: Mapping[str, Any],
    compat: Mapping[str, Any] | None = None,
) -> Config:
    """Returns the validated config of a model of other programs, which is not trained with the losses of its own training.

    Args:
      model: fields of the section model.
      encoding: fields of the section encoding, with its kind.
      data: fields of the section data.
      compat: fields of the section compat.

    Raises:
      InputError: fields that contradict each other.
    """
    values = configs.to_dict(Config())
    values["encoding"] = dict(encoding)
    values["compat"] |= compat or {}
    values["model"] |= model
    values["data"] |= data
    for term in ("contrastive", "distillation"):
        values["objective"][term]["weight"] = 0.0
    return configs.from_dict(values)


def _gpt2_fields(spec: ReferenceSpec) -> dict[str, Any]:
    return {
        "kind": "gpt2",
        "layers": spec["n_layer"],
        "width": spec["n_embd"],
        "heads": spec["n_head"],
        "mlp_width": spec.get("n_inner") or 0,
        "vocabulary": spec["vocab_size"],
        "dropout": float(spec.get("resid_pdrop", 0.1)),
        "attention_dropout": float(spec.get("attn_pdrop", 0.1)),
        "embedding_dropout": float(spec.get("embd_pdrop", 0.1)),
        "activation": activation(spec.get("activation_function", "gelu_new")),
        "layer_norm_epsilon": float(spec.get("layer_norm_epsilon", 1e-5)),
        "init_std": float(spec.get("initializer_range", 0.02)),
        "tied": bool(spec.get("tie_word_embeddings", True)),
    }


def _vit_fields(spec: ReferenceSpec) -> dict[str, Any]:
    patch, ratio = spec["patch_size"], spec.get("mlp_ratio", 4.0)
    return {
        "kind": "vit",
        "layers": spec["depth"],
        "width": spec["embed_dim"],
        "heads": spec["num_heads"],
        "mlp_width": 0 if ratio == 4 else round(ratio * spec["embed_dim"]),
        "classes": spec["num_classes"],
        "patch": (patch, patch),
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "drop_path": float(spec.get("drop_path", 0.0)),
        "activation": "gelu",
        "layer_norm_epsilon": 1e-6,
    }


# ------------------------------------------------------------------------------------------------------- config to spec


def spec_from_config(config: Config, vector_width: int) -> dict[str, Any]:
    """Returns the spec of a config, to be written in the reference's formats.

    Args:
      config: config with its vocabulary or classes.
      vector_width: width of a position's vector; 0 = the encoding has none.

    Raises:
      InputError: a value that the reference does not have.
    """
    encoding, model = config.encoding, config.model
    check_writable(config)
    seqpe, theta = isinstance(encoding, SeqPEConfig), getattr(encoding, "theta", 10000.0)
    pe_type = {kind: name for name, kind in KINDS.items()} | dict.fromkeys(ROTARY.values(), "rotary")
    table_width = {"rotary": model.width // model.heads, "sinusoidal": model.width}.get(encoding.kind, -1)
    spec: dict[str, Any] = {
        "kind": model.kind,
        "pe_type": pe_type[encoding.kind],
        "pe_apply_method": encoding.mode if seqpe else APPLY_METHODS[encoding.kind],
        "use_pe_multi_head": seqpe and encoding.per_head,
        "use_pe_qk_per_layer": encoding.qk if seqpe and encoding.qk in ("single", "multi") else None,
        "pe_out_dim": vector_width or table_width,
        "seqpe_scalar_scale": getattr(encoding, "scalar_scale", 1.0),
        "sinusoidal_pe_base": int(theta) if theta.is_integer() else theta,
        "pe_max_position": encoding.max_position ** len(config.grid),
    }
    if model.kind == "vit":
        spec |= {
            "depth": model.layers,
            "embed_dim": model.width,
            "num_heads": model.heads,
            "patch_size": model.patch[0],
            "img_size": config.data.size[0],
            "mlp_ratio": (model.mlp_width or 4 * model.width) / model.width,
            "num_classes": model.classes,
            "drop_path": model.drop_path,
            "data_name": config.data.name,
        }
    else:
        spec |= {
            "vocab_size": model.vocabulary,
            "n_layer": model.layers,
            "n_embd": model.width,
            "n_head": model.heads,
            "n_inner": model.mlp_width or None,
            "n_positions": config.data.length,
            "block_size": config.data.length,
            "activation_function": _reference_activation(model.parts.activation),
            "layer_norm_epsilon": model.layer_norm_epsilon,
            "resid_pdrop": model.dropout,
            "attn_pdrop": model.attention_dropout,
            "embd_pdrop": model.embedding_dropout,
            "initializer_range": model.init_std,
        }
    if seqpe:
        spec["encoder"] = {
            "attn_direction": encoding.direction,
            "attn_pdrop": encoding.attention_dropout,
            "data_dim": len(config.grid),
            "layer_num": encoding.layers,
            "mask_padding": encoding.mask_padding,
            "max_digits": encoding.num_digits,
            "num_attention_heads": encoding.heads,
            "pe_embed_dim": encoding.width,
            "resid_pdrop": encoding.dropout,
            "use_last_layernorm": encoding.final_norm,
            "out_proj_dim": vector_width,
            "activation_function": _reference_activation(encoding.activation),
            "seqpe_temperature": encoding.temperature,
            "init_norm_weight": encoding.norm_init,
        }
    check_spec(spec)
    return spec


def _reference_activation(name: str) -> str:
    return next(reference for reference, ours in ACTIVATIONS.items() if ours == name)


def training_settings(config: Config) -> dict[str, Any]:
    """Returns the settings of a run's training under the reference's names, which its scripts read too.

    Args:
      config: config of the run.
    """
    shift, contrastive = config.objective.shift, config.objective.contrastive
    distillation = config.objective.distillation
    return {
        "PE_MAIN_BATCH_SIZE": shift.sets,
        "PE_USE_RANDOM_SHIFT": shift.rate > 0,
        "PE_RANDOM_SHIFT_RATE": shift.rate,
        "PE_RANDOM_SHIFT_DOWNSAMPLE": shift.starts or 320,
        "SEQPE_DIST_SAMPLE_RANGE": contrastive.window,
        "SEQPE_CONTRASTIVE_WEIGHT": contrastive.weight,
        "SEQPE_CONTRASTIVE_BATCH_SIZE": contrastive.batch,
        "SEQPE_CONTRASTIVE_NUM": contrastive.candidates,
        "SEQPE_TRANSFER_WEIGHT": distillation.weight,
        "SEQPE_TRANSFER_BATCH_SIZE": distillation.batch,
        "SEQPE_TRANSFER_NUM": distillation.offsets,
        "SEQPE_TRANSFER_BETA": distillation.beta,
        "SEQPE_TRANSFER_METRIC": {"kl": "kl_div", "mse": "mse"}[distillation.metric],
        "SEQPE_LOGIT_SCALED_LOSS": distillation.scale,
        "SEQPE_DECAY": config.optimizer.encoder_weight_decay,
        "SEQPE_FREEZE_EPOCH_NUM": -1,
        "SEQPE_PRETRAINED": None,
    }


def check_writable(config: Config) -> None:
    """Raises InputError where a config has a value that the reference does not have."""
    encoding, model = config.encoding, config.model
    known = dict.fromkeys((*KINDS.values(), *ROTARY.values()))
    if encoding.kind not in known:
        raise InputError(
            f"encoding.kind='{encoding.kind}': the reference knows {', '.join(known)} alone, so this run cannot be written "
            "in its format"
        )
    required = _required_encoding_values(config) | {"model.tied": (model.tied, True)}
    defaults = type(encoding)()
    for name in filter(encoding.has, UNSUPPORTED_FIELDS):
        required[f"encoding.{name}"] = (getattr(encoding, name), getattr(defaults, name))
    own = {name: getattr(model, name) for name in ("layers", "width", "heads", "mlp_width", "activation")}
    reference = ModelConfig(kind="vit" if model.kind == "vit" else "gpt2", **own).parts
    for part in dataclasses.fields(reference):
        required[f"model.{part.name}"] = (getattr(model.parts, part.name), getattr(reference, part.name))
    if model.kind == "vit":
        required |= {
            "model.patch": (model.patch, (model.patch[0],) * 2),
            "model.pooling": (model.pooling, "class_token"),
            "model.registers": (model.registers, 0),
            "model.layer_scale": (model.layer_scale, 0.0),
            "data.size": (config.data.size, (config.data.size[0],) * 2),
            "model.activation": (model.parts.activation, "gelu"),
            "model.layer_norm_epsilon": (model.layer_norm_epsilon, 1e-6),
        }
    for name, (value, only) in required.items():
        if value != only:
            raise InputError(
                f"{name}={value!r}: the reference's format knows {only!r} alone, so this run cannot be written in it"
            )


def _required_encoding_values(config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (value, the only value of the reference)} of an encoding and of the compat section."""
    encoding, compat, model, images = config.encoding, config.compat, config.model, config.model.kind == "vit"
    if encoding.kind == "sinusoidal":
        return {"encoding.amplitude": (encoding.amplitude, 1.0), "compat.flatten": (compat.flatten, images)}
    if encoding.kind == "rotary_mixed":
        return {"compat.reference_scramble": (compat.reference_scramble, True)}
    if encoding.kind == "alibi":
        return {"compat.reference_scaling": (compat.reference_scaling, True)}
    if not isinstance(encoding, SeqPEConfig):
        return {}
    required = {
        "encoding.base": (encoding.base, 10),
        "encoding.digit_index": (encoding.digit_index, "global"),
        "encoding.cls": (encoding.cls, True),
        "encoding.padding": (encoding.padding, "left"),
        "encoding.layer_norm_epsilon": (encoding.layer_norm_epsilon, 1e-5),
    }
    if encoding.mode not in ("input_add", "rotary") and encoding.qk == "none":
        width = encoding.output_width or (model.width if encoding.per_head else model.width // model.heads)
        halves = _halves_without_map(images, encoding.mode, width == model.width)
        required["compat.qk_halves"] = (compat.qk_halves, halves)
    return required
