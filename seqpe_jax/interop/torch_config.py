"""The PyTorch reference's settings <-> our config.

One vocabulary stands between its formats and ours, flat and plain (`ReferenceSpec`): {"kind": "gpt2", "n_layer", "n_embd", ...,
"pe_type", "pe_apply_method", ..., "encoder": {...}}, or {"kind": "vit", "depth", "embed_dim", ...}, or a digit encoder
alone, {"kind": "seqpe_encoder", "layer_num", ...}. A field that nobody knows is refused: it could change what is computed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from seqpe_jax import config as configs
from seqpe_jax.config import ENCODINGS, CompatConfig, Config, EncodingConfig, ModelDims, SeqPEConfig
from seqpe_jax.errors import InputError, suggest

ReferenceSpec = Mapping[str, Any]

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
KINDS = {"seq_pe": "seqpe", "vanilla": "learned", "sin": "sinusoidal", "nope": "none", "alibi": "alibi"}
ROTARY = {"rotary": "rotary", "rotary_2d": "rotary_axial", "rotary_mixed": "rotary_mixed"}
THETA = {"rotary_2d": 100, "rotary_mixed": 100}  # the reference's own defaults; others 10000

_POSITIONS = {
    "pe_type",
    "pe_apply_method",
    "use_pe_multi_head",
    "use_pe_qk_per_layer",
    "pe_out_dim",
    "seqpe_scalar_scale",
    "sinusoidal_pe_base",
    "pe_max_position",
    "encoder",
}
_ABOUT = {
    "kind",
    "note",
    "T",
    "batch",
    "pe_batch",
    "eager_sdpa_maxdiff",
    "tied",
    "trained_img_size",
}  # of recorded arrays
FIELDS = {
    "gpt2": _POSITIONS
    | {
        "vocab_size",
        "n_layer",
        "n_embd",
        "n_head",
        "n_inner",
        "n_positions",
        "block_size",
        "activation_function",
        "layer_norm_epsilon",
        "resid_pdrop",
        "attn_pdrop",
        "embd_pdrop",
        "initializer_range",
        "tie_word_embeddings",
    },
    "vit": _POSITIONS
    | {
        "depth",
        "embed_dim",
        "img_size",
        "mlp_ratio",
        "num_classes",
        "num_heads",
        "patch_size",
        "drop_path",
        "data_name",
    },
    "seqpe_encoder": {
        "attn_direction",
        "attn_pdrop",
        "data_dim",
        "layer_num",
        "left_padding",
        "mask_padding",
        "max_digits",
        "num_attention_heads",
        "pe_embed_dim",
        "resid_pdrop",
        "use_cls_token",
        "use_last_layernorm",
        "out_proj_dim",
        "activation_function",
        "layer_norm_epsilon",
        "seqpe_temperature",
        "init_norm_weight",
    },
}


def check_spec(spec: ReferenceSpec, kind: str | None = None) -> str:
    """Returns the kind of a spec. Raises: InputError: an unknown kind or field, or one missing."""
    kind = kind or spec.get("kind")
    if kind not in FIELDS:
        raise InputError(f"config kind is {kind!r}.{suggest(str(kind), FIELDS)}")
    known = FIELDS[kind] | _ABOUT
    for name in spec:
        if name not in known:
            raise InputError(f"config field '{name}' of a {kind} is unknown.{suggest(name, known)}")
    needed = {
        "gpt2": ("vocab_size", "n_layer", "n_embd", "n_head", "pe_type"),
        "vit": ("depth", "embed_dim", "img_size", "num_classes", "num_heads", "patch_size", "pe_type"),
        "seqpe_encoder": ("layer_num", "max_digits", "num_attention_heads", "pe_embed_dim"),
    }[kind]
    missing = [name for name in needed if name not in spec]
    if missing:
        raise InputError(f"the config of a {kind} lacks {', '.join(missing)}")
    return kind


def encoding_from_spec(spec: ReferenceSpec) -> EncodingConfig:
    """Returns the encoding section of a spec. Raises: InputError: a field or value that we do not have."""
    kind = check_spec(spec)
    if kind == "seqpe_encoder":
        return SeqPEConfig(**_encoder(spec), output_width=spec.get("out_proj_dim") or spec["pe_embed_dim"])
    images = kind == "vit"
    width, heads = (spec["embed_dim"], spec["num_heads"]) if images else (spec["n_embd"], spec["n_head"])
    pe_type, method = spec["pe_type"], spec.get("pe_apply_method", "")
    ours = ROTARY.get(method) if pe_type == "rotary" else KINDS.get(pe_type)
    if ours is None:
        raise InputError(
            f"pe_type='{pe_type}' with pe_apply_method='{method}' is unknown: expected one of {', '.join(KINDS)}, or "
            f"rotary with {', '.join(ROTARY)}"
        )
    if ours != "seqpe":
        chosen = ENCODINGS[ours]
        if not chosen.has("theta") or "theta" in chosen.needs():
            return chosen()
        return chosen(theta=float(spec.get("sinusoidal_pe_base") or THETA.get(method, 10000)))
    per_head, out = bool(spec.get("use_pe_multi_head")), spec.get("pe_out_dim") or 0
    qk = "none" if method in ("input_add", "rotary") else spec.get("use_pe_qk_per_layer") or "none"
    encoder = spec.get("encoder") or {}
    dims = ModelDims(1, width, heads, compat=compat_from_spec(spec))
    usual = SeqPEConfig(mode=method, qk=qk, per_head=per_head).needed_width(dims)
    return SeqPEConfig(
        mode=method,
        qk=qk,
        per_head=per_head,
        output_width=0 if out == usual else max(out, 0),
        scalar_scale=float(spec.get("seqpe_scalar_scale", 1.0)),
        **(_encoder(encoder, spec.get("pe_max_position")) if encoder else {"width": width, "heads": heads}),
    )


def compat_from_spec(spec: ReferenceSpec) -> CompatConfig:
    """Returns the compat section of a spec (kinds gpt2 and vit): what its checkpoints were trained with."""
    images, pe_type, method = check_spec(spec) == "vit", spec["pe_type"], spec.get("pe_apply_method", "")
    ours = ROTARY.get(method) if pe_type == "rotary" else KINDS.get(pe_type)
    if ours == "seqpe":
        width = spec["embed_dim"] if images else spec["n_embd"]
        unmapped = not spec.get("use_pe_qk_per_layer") and method not in ("input_add", "rotary")
        return CompatConfig(qk_halves=unmapped and _halves_without_map(images, method, spec.get("pe_out_dim") == width))
    return CompatConfig(
        flatten=images and ours == "sinusoidal",
        reference_scramble=ours == "rotary_mixed",
        reference_scaling=ours == "alibi",
    )


def _halves_without_map(images: bool, method: str, of_model_width: bool) -> bool:
    """Whether the reference splits vectors that have no qk map into halves; else each is query and key part."""
    return method == "attn_scalar" if images else not of_model_width


def _encoder(spec: ReferenceSpec, max_position: int | None = None) -> dict[str, Any]:
    """The fields of an encoding that describe its digit encoder."""
    check_spec(spec, "seqpe_encoder")
    axes = spec.get("data_dim", 1)
    reach = 10 ** spec["max_digits"]  # of each coordinate
    side = reach if max_position is None else round(max_position ** (1 / axes))
    return {
        "max_position": min(side, reach),
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
    """Returns our name of an activation function. Raises: InputError: we do not have it."""
    if name not in ACTIVATIONS:
        raise InputError(f"activation_function='{name}' is unknown.{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def config_from_spec(spec: ReferenceSpec) -> Config:
    """Returns the config of a spec (kinds gpt2 and vit).

    Raises:
      InputError: a field or value that we do not have, or that contradicts another.
    """
    kind, encoding = check_spec(spec), encoding_from_spec(spec)
    values = configs.to_dict(Config())
    values["encoding"] = dataclasses.asdict(encoding)
    values["compat"] = dataclasses.asdict(compat_from_spec(spec))
    for term in ("contrastive", "distillation"):  # what it was trained with is not what it will be trained with
        values["objective"][term]["weight"] = 0.0
    if kind == "gpt2":
        table = encoding.kind == "learned"
        length = (0 if table else spec.get("block_size")) or spec.get("n_positions") or spec.get("T") or 512
        values["model"] |= {
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
        values["data"] |= {"name": "wikitext103", "length": length, "tokenizer": ""}
    else:
        patch, side, ratio = spec["patch_size"], spec["img_size"], spec.get("mlp_ratio", 4.0)
        values["model"] |= {
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
        values["data"] |= {"name": spec.get("data_name", "imagenet2012"), "size": (side, side)}
    return configs.from_dict(values)


def spec_from_config(config: Config, vector_width: int) -> dict[str, Any]:
    """Returns the spec of a config, for writing it in the reference's formats.

    Args:
      config: with its vocabulary or classes; vector_width: of a position's vector, 0 where there is none.

    Raises:
      InputError: the reference has nothing like a field's value.
    """
    encoding, model = config.encoding, config.model
    images = model.kind == "vit"
    _writable(config, images)
    theirs = {ours: name for name, ours in (KINDS | dict.fromkeys(ROTARY, "rotary")).items()}
    methods = {"sinusoidal": "input_add", "learned": "input_add", "none": "nope", "alibi": "alibi"}
    methods |= {ours: name for name, ours in ROTARY.items()}
    seqpe, theta = isinstance(encoding, SeqPEConfig), getattr(encoding, "theta", 10000.0)
    spec: dict[str, Any] = {
        "kind": model.kind,
        "pe_type": "rotary" if encoding.kind in ROTARY.values() else theirs[encoding.kind],
        "pe_apply_method": encoding.mode if seqpe else methods[encoding.kind],
        "use_pe_multi_head": seqpe and encoding.per_head,
        "use_pe_qk_per_layer": encoding.qk if seqpe and encoding.qk in ("single", "multi") else None,
        "pe_out_dim": vector_width
        or {"rotary": model.width // model.heads, "sinusoidal": model.width}.get(encoding.kind, -1),
        "seqpe_scalar_scale": getattr(encoding, "scalar_scale", 1.0),
        "sinusoidal_pe_base": int(theta) if theta.is_integer() else theta,
    }
    if images:
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
            "activation_function": _theirs(model.activation),
            "layer_norm_epsilon": model.layer_norm_epsilon,
            "resid_pdrop": model.dropout,
            "attn_pdrop": model.attention_dropout,
            "embd_pdrop": model.embedding_dropout,
            "initializer_range": model.init_std,
        }
    axes = len(config.grid)
    spec["pe_max_position"] = encoding.max_position**axes
    if seqpe:
        spec["encoder"] = {
            "attn_direction": encoding.direction,
            "attn_pdrop": encoding.attention_dropout,
            "data_dim": axes,
            "layer_num": encoding.layers,
            "mask_padding": encoding.mask_padding,
            "max_digits": encoding.num_digits,
            "num_attention_heads": encoding.heads,
            "pe_embed_dim": encoding.width,
            "resid_pdrop": encoding.dropout,
            "use_last_layernorm": encoding.final_norm,
            "out_proj_dim": vector_width,
            "activation_function": _theirs(encoding.activation),
            "seqpe_temperature": encoding.temperature,
            "init_norm_weight": encoding.norm_init,
        }
    check_spec(spec)
    return spec


def training_settings(config: Config) -> dict[str, Any]:
    """Returns the reference's settings of how a run was trained, which its scripts read too."""
    shift, near, far = config.objective.shift, config.objective.contrastive, config.objective.distillation
    return {
        "PE_MAIN_BATCH_SIZE": shift.sets,
        "PE_USE_RANDOM_SHIFT": shift.rate > 0,
        "PE_RANDOM_SHIFT_RATE": shift.rate,
        "PE_RANDOM_SHIFT_DOWNSAMPLE": shift.starts or 320,
        "SEQPE_DIST_SAMPLE_RANGE": near.window,
        "SEQPE_CONTRASTIVE_WEIGHT": near.weight,
        "SEQPE_CONTRASTIVE_BATCH_SIZE": near.batch,
        "SEQPE_CONTRASTIVE_NUM": near.candidates,
        "SEQPE_TRANSFER_WEIGHT": far.weight,
        "SEQPE_TRANSFER_BATCH_SIZE": far.batch,
        "SEQPE_TRANSFER_NUM": far.offsets,
        "SEQPE_TRANSFER_BETA": far.beta,
        "SEQPE_TRANSFER_METRIC": {"kl": "kl_div", "mse": "mse"}[far.metric],
        "SEQPE_LOGIT_SCALED_LOSS": far.scale,
        "SEQPE_DECAY": config.optimizer.encoder_weight_decay,
        "SEQPE_FREEZE_EPOCH_NUM": -1,
        "SEQPE_PRETRAINED": None,
    }


# Fields of an encoding at whose defaults alone the reference computes the same.
OURS_ALONE = (
    "fraction_digits",
    "resize",
    "feature_width",
    "position_heads",
    "rotary_pairs",
    "rotary_heads",
    "log_scaling",
    "scaling",
    "gate",
    "slope_scale",
)


def _writable(config: Config, images: bool) -> None:
    """Refuses what the reference has nothing like. Raises: InputError."""
    encoding, model, compat = config.encoding, config.model, config.compat
    known = (*KINDS.values(), *ROTARY.values())
    if encoding.kind not in known:
        raise InputError(
            f"encoding.kind='{encoding.kind}': the reference knows {', '.join(dict.fromkeys(known))} alone, so this run "
            "cannot be written in its format"
        )
    fixed: dict[str, tuple[Any, Any]] = {}
    if isinstance(encoding, SeqPEConfig):
        fixed = {
            "encoding.base": (encoding.base, 10),
            "encoding.digit_index": (encoding.digit_index, "global"),
            "encoding.cls": (encoding.cls, True),
            "encoding.padding": (encoding.padding, "left"),
            "encoding.layer_norm_epsilon": (encoding.layer_norm_epsilon, 1e-5),
        }
        if encoding.mode not in ("input_add", "rotary"):
            width = encoding.output_width or (model.width if encoding.per_head else model.width // model.heads)
            if encoding.qk == "none":
                halves = _halves_without_map(images, encoding.mode, width == model.width)
                fixed["compat.qk_halves"] = (compat.qk_halves, halves)
    if encoding.kind == "sinusoidal":
        fixed = {"encoding.amplitude": (encoding.amplitude, 1.0), "compat.flatten": (compat.flatten, images)}
    if encoding.kind == "rotary_mixed":
        fixed = {"compat.reference_scramble": (compat.reference_scramble, True)}
    if encoding.kind == "alibi":
        fixed = {"compat.reference_scaling": (compat.reference_scaling, True)}
    fixed["model.tied"] = (model.tied, True)
    plain = type(encoding)()
    for name in filter(encoding.has, OURS_ALONE):
        fixed[f"encoding.{name}"] = (getattr(encoding, name), getattr(plain, name))
    if images:
        square = (model.patch[0],) * 2
        fixed |= {
            "model.patch": (model.patch, square),
            "data.size": (config.data.size, (config.data.size[0],) * 2),
            "model.activation": (model.activation, "gelu"),
            "model.layer_norm_epsilon": (model.layer_norm_epsilon, 1e-6),
        }
    for name, (value, wanted) in fixed.items():
        if value != wanted:
            raise InputError(
                f"{name}={value!r}: the reference's format knows {wanted!r} alone, so this run cannot be written in it"
            )


def _theirs(ours: str) -> str:
    return next(name for name, value in ACTIVATIONS.items() if value == ours)
