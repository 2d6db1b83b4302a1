"""Folders of vision transformers: ViT and DeiT of Hugging Face, and timm's, read as a model `vit` with learned positions.

Sizes are those of the arrays; the config.json says what arrays do not: heads, epsilon, activation, pooling, pixels. A part that
is not known here has arrays of its own, which are refused by their names.
"""

import dataclasses
import math
import os
import pathlib
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from seqpe_jax import config as configs
from seqpe_jax.config import Config, limits
from seqpe_jax.data.registry import PHOTO_MEAN, PHOTO_STD
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.files import as_path, parse_json
from seqpe_jax.interop import hf, torch_config, weights
from seqpe_jax.interop.foreign import Arrays, ForeignCheckpoint
from seqpe_jax.interop.hf_families import ACTIVATIONS, COMMON_VALUES, NEUTRAL, Settings
from seqpe_jax.interop.settings import SIZE, Field
from seqpe_jax.interop.weights import Rule
from seqpe_jax.models.build import DataSpec

KINDS = ("vit", "deit")  # model_type of Hugging Face's folders
PIXELS_FILE = "preprocessor_config.json"
_RATE = Field(float, limits.DROP_RATE)
_CHANNELS = Field(int, {"low": 1, "high": 16})
# Fields of Hugging Face's config.json that are read; `image_size` and `patch_size` may have two numbers.
HF_FIELDS = {
    "hidden_size": Field(int, limits.WIDTH),
    "num_hidden_layers": Field(int, limits.LAYERS),
    "intermediate_size": Field(int, limits.OPTIONAL_WIDTH),
    "num_channels": _CHANNELS,
    "num_attention_heads": Field(int, limits.HEADS),
    "hidden_act": Field(str),
    "layer_norm_eps": Field(float, limits.EPSILON),
    "initializer_range": Field(float, limits.STD),
    "hidden_dropout_prob": _RATE,
    "attention_probs_dropout_prob": _RATE,
}
HF_SIDES = ("image_size", "patch_size")
HF_VALUES = COMMON_VALUES | {"qkv_bias": True}  # the only value that is known
HF_UNREAD = NEUTRAL | {"encoder_stride", "pooler_act", "pooler_output_size", "model_type"}  # of other heads
# Names of timm -> names of Hugging Face, the first that fits the beginning; PREFIX is the model_type.
HF_NAMES = {
    "cls_token": "PREFIX.embeddings.cls_token",
    "reg_token": "PREFIX.embeddings.distillation_token",
    "pos_embed": "PREFIX.embeddings.position_embeddings",
    "patch_embed.proj": "PREFIX.embeddings.patch_embeddings.projection",
    "norm": "PREFIX.layernorm",
    "head": "classifier",
}
HF_BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
LEFT_OUT = {"pooler.dense.": "a pooler, which no head reads", "embeddings.mask_token": "the token of masked patches"}
# Models of timm whose blocks are those of `vit`, and their attention heads by size.
ARCHITECTURE = re.compile(
    r"(?:vit|deit|deit3)_(tiny|small|medium|base|large|huge)_patch\d+(?:_reg\d+)?(?:_(?:dinov2|dino|mae|\d+))*"
)
TIMM_HEADS = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16}
TIMM_FIELDS = {
    "architecture": Field(str),
    "num_classes": Field(int, SIZE),
    "num_features": Field(int, limits.WIDTH),
    "global_pool": Field(str),
    "model_args": Field(dict),
    "pretrained_cfg": Field(dict),
}
# Arguments of a timm model that are read, or that the arrays say too.
TIMM_ARGUMENTS = {
    "in_chans": _CHANNELS,
    "num_classes": Field(int, SIZE),
    "embed_dim": Field(int, limits.WIDTH),
    "depth": Field(int, limits.LAYERS),
    "num_heads": Field(int, limits.HEADS),
    "mlp_ratio": Field(float, {"low": 1e-3, "high": 1e3}),
    "init_values": Field(float),
    "reg_tokens": Field(int, limits.REGISTERS),
    "no_embed_class": Field(bool),
    "class_token": Field(bool),
    "dynamic_img_size": Field(bool),
    "global_pool": Field(str),
}
TIMM_SIDES = ("img_size", "patch_size")
POOLING = {"token": "class_token", "avg": "mean"}  # timm's name -> model.pooling
TIMM_EPSILON = 1e-6
HEADLESS_CLASSES = 1000
SIDE = Field(int, limits.IMAGE_SIZE)
SMALLEST_STD = 1e-3  # of pixels, which are divided by it
# Fields of each that the arrays say too.
HF_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "num_channels")
TIMM_SIZES = ("num_features", "embed_dim", "depth", "patch_size", "in_chans", "reg_tokens")
LAYER_SCALE = 1e-5  # DINOv2's and most others': of layers that are drawn anew


@dataclasses.dataclass(frozen=True)
class _Known:
    """Values that a config.json says and arrays do not.

    Attributes:
      heads: attention heads.
      model: further fields of the section model.
      side: height and width of the images, in pixels.
      mean: of pixels by channel, in 0..1.
      std: likewise.
      sizes: fields that the arrays say too, by their names there.
    """

    heads: int
    model: dict[str, Any]
    side: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: dict[str, Any]


def is_image_folder(settings: Settings) -> bool:
    """Returns whether a config.json is that of a vision transformer."""
    return settings.get("model_type") in KINDS or "architecture" in settings


def class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Returns the names of the classes that a folder's config.json gives (id2label); () without names."""
    try:
        names = parse_json((as_path(path) / "config.json").read_bytes()).get("id2label")
        names = tuple(str(names[str(label)]) for label in range(len(names)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no folder of Hugging Face, or no such names
        return ()
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def read(path: pathlib.Path, settings: Settings) -> ForeignCheckpoint:
    """Returns the checkpoint of a folder.

    Args:
      path: the folder.
      settings: content of its config.json.

    Raises:
      InputError: a model, field or value that is unknown, weights that are missing, damaged or of other parts.
    """
    file = path / "config.json"
    kind = settings["model_type"] if "architecture" not in settings else None
    known = _known_timm(file, settings) if kind is None else _known_hf(file, settings, path)
    arrays, files = hf.read_weights(path)
    state, left_out = (dict(arrays), {}) if kind is None else _with_prefix(arrays, kind)
    if any(name.startswith(("head_dist.", "distillation_classifier.")) for name in state):
        raise InputError(
            f"{file.parent} has two heads, of the class token and of the distillation token, whose mean answers: only models "
            "of one head are read"
        )
    _add_head(path, state, "head" if kind is None else "classifier")
    try:
        config, rules = _config_and_rules(known, state, kind)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    data_spec = DataSpec(classes=config.model.classes, channels=len(known.mean), mean=known.mean, std=known.std)
    return ForeignCheckpoint(
        config,
        tuple(rules),
        lambda: Arrays(state, left_out, {}, (file, *files)),
        data_spec=data_spec,
    )


def _add_head(path: pathlib.Path, state: dict[str, np.ndarray], name: str) -> None:
    """Adds a head of zeros, and says so, where a folder has the features alone, to be trained further."""
    norm = next((array for array_name, array in state.items() if "norm" in array_name), None)
    if norm is not None and not any(other.startswith(f"{name}.") for other in state):
        print(
            f"note: {path} has no head of classes: it gets one of {HEADLESS_CLASSES} classes that answers 0 until it is trained",
            file=sys.stderr,
            flush=True,
        )
        state[f"{name}.weight"] = np.zeros((HEADLESS_CLASSES, len(norm)), np.float32)
        state[f"{name}.bias"] = np.zeros(HEADLESS_CLASSES, np.float32)


def _checked(
    file: pathlib.Path, settings: Settings, fields: Mapping[str, Field], sides: Collection[str], others: Collection[str]
) -> dict[str, Any]:
    """The fields that are read, without null ones.

    Args:
      file: path of config.json, for messages.
      settings: its content, or a section of it.
      fields: type and range of each field.
      sides: names of fields of one or two sides in pixels.
      others: names that are known and not read.

    Raises:
      InputError: an unknown field, or a value of another type or outside of its range.
    """
    found = {}
    for name, value in settings.items():
        if value is None or name in others:
            continue
        if name in fields:
            found[name] = fields[name].check(f"{file}: field '{name}'", value)
        elif name in sides:
            found[name] = _sides(file, name, value)
        else:
            raise _unknown(file, name, {*fields, *sides, *others})
    return found


def _known_hf(file: pathlib.Path, settings: Settings, path: pathlib.Path) -> _Known:
    for name, required in HF_VALUES.items():
        if settings.get(name) is not None:
            hf.require_value(file, name, settings[name], required)
    known = _checked(file, settings, HF_FIELDS, HF_SIDES, {*HF_UNREAD, *HF_VALUES})
    activation = known.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(f"{file}: field 'hidden_act' is {format_value(activation)}.{suggest(activation, ACTIVATIONS)}")
    model = {
        "dropout": known.get("hidden_dropout_prob", 0.0),
        "attention_dropout": known.get("attention_probs_dropout_prob", 0.0),
        "activation": ACTIVATIONS[activation],
        "layer_norm_epsilon": known.get("layer_norm_eps", 1e-12),
        "init_std": known.get("initializer_range", 0.02),
    }
    pixels = hf.read_mapping(path / PIXELS_FILE, missing=True)
    channels = known.get("num_channels", 3)
    usual = {"image_mean": PHOTO_MEAN, "image_std": PHOTO_STD} if settings["model_type"] == "deit" else {}
    mean, std = (
        _by_channel(path / PIXELS_FILE, name, pixels.get(name), usual.get(name) or (0.5,) * channels, low)
        for name, low in (("image_mean", 0.0), ("image_std", SMALLEST_STD))
    )
    sizes = {name: known[name] for name in HF_SIZES if name in known}
    return _Known(known.get("num_attention_heads", 12), model, known.get("image_size", (224, 224)), mean, std, sizes)


def _known_timm(file: pathlib.Path, settings: Settings) -> _Known:
    known = _checked(file, settings, TIMM_FIELDS, (), ())
    pretrained, name = known.get("pretrained_cfg", {}), known.get("architecture", "")
    arguments = _checked(file, known.get("model_args", {}), TIMM_ARGUMENTS, TIMM_SIDES, ())
    found = ARCHITECTURE.fullmatch(name)
    if found is None:
        raise InputError(
            f"{file}: architecture {format_value(name)} is none of the vision transformers of timm that can be read: vit, deit "
            f"and deit3 of the sizes {', '.join(TIMM_HEADS)}, such as vit_small_patch16_224"
        )
    pooling = arguments.get("global_pool") or known.get("global_pool") or "token"
    if pooling not in POOLING:
        raise InputError(
            f"{file}: field 'global_pool' is {format_value(pooling)}, only {' and '.join(POOLING)} are known"
        )
    model = {
        "pooling": POOLING[pooling],
        "activation": "gelu",
        "layer_norm_epsilon": TIMM_EPSILON,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    side = arguments.get("img_size")
    if side is None:
        shape = pretrained.get("input_size") or (3, 224, 224)
        side = _sides(file, "pretrained_cfg.input_size", shape[1:] if isinstance(shape, (list, tuple)) else shape)
    mean, std = (
        _by_channel(file, f"pretrained_cfg.{field}", pretrained.get(field), default, low)
        for field, default, low in (("mean", PHOTO_MEAN, 0.0), ("std", PHOTO_STD, SMALLEST_STD))
    )
    sizes = {name: value for name, value in (known | arguments).items() if name in TIMM_SIZES}
    return _Known(arguments.get("num_heads", TIMM_HEADS[found[1]]), model, side, mean, std, sizes)


def _config_and_rules(known: _Known, state: Mapping[str, np.ndarray], kind: str | None) -> tuple[Config, list[Rule]]:
    """The config of arrays, and the rules of their names; kind: model_type of Hugging Face, None = timm's names."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        """The shape of an array under its name of timm."""
        return weights.shape_of(state, name if kind is None else _hf_name(name, kind), rank)

    width, channels, *patch = shape("patch_embed.proj.weight", 4)
    pattern = re.compile(r"blocks\.(\d+)\." if kind is None else rf"{kind}\.encoder\.layer\.(\d+)\.")
    layers = len({found[1] for name in state if (found := pattern.match(name))})
    mlp_width = shape("blocks.0.mlp.fc1.weight", 2)[0]
    if (
        width % known.heads
        or channels != len(known.mean)
        or any(side % part for side, part in zip(known.side, patch, strict=True))
    ):
        raise InputError(
            f"the arrays have {width} features, patches of {' x '.join(map(str, patch))} and {channels} channel(s), which do not "
            f"fit the {known.heads} heads, images of {' x '.join(map(str, known.side))} pixels and {len(known.mean)} channel(s) "
            "of config.json"
        )
    registers = "reg_token" if kind is None else _hf_name("reg_token", kind)
    num_registers = shape("reg_token", 3)[1] if registers in state else 0
    own: dict[str, Any] = dict.fromkeys(("hidden_size", "num_features", "embed_dim"), width)
    own |= {"num_hidden_layers": layers, "depth": layers, "intermediate_size": mlp_width, "patch_size": tuple(patch)}
    own |= {"num_channels": channels, "in_chans": channels, "reg_tokens": num_registers}
    for name, value in known.sizes.items():
        if value != own[name]:
            raise InputError(
                f"field '{name}' of config.json is {value}, but the arrays have {own[name]}: they are of two models"
            )
    model = {
        "kind": "vit",
        "layers": layers,
        "width": width,
        "heads": known.heads,
        "mlp_width": 0 if mlp_width == 4 * width else mlp_width,
        "classes": shape("head.weight", 2)[0],
        "patch": tuple(patch),
        "registers": num_registers,
        "layer_scale": LAYER_SCALE if "blocks.0.ls1.gamma" in state else 0.0,
        "embedding_dropout": 0.0,
        **known.model,
    }
    data = {"name": "imagenet2012", "size": known.side}
    encoding = dataclasses.asdict(configs.ENCODINGS["learned"]())
    config = torch_config.config_of_sections(model, encoding, data)
    rules = _timm_rules(config)
    return config, rules if kind is None else [_hf_rule(rule, kind) for rule in rules]


def _timm_rules(config: Config) -> list[Rule]:
    model = config.model
    rules = weights.vit_rules(model.layers, model.heads, model.patch)
    if model.pooling == "mean":
        rules = [
            rule._replace(reference_names=tuple(f"fc_{name}" for name in rule.reference_names))
            if rule.path.startswith("model/final_norm")
            else rule
            for rule in rules
        ]
    if model.registers:
        rules.append(Rule("model/registers", ("reg_token",), lambda array: array[0], lambda array: array[None]))
    if model.layer_scale:
        for layer in range(model.layers):
            for branch in (1, 2):
                path = f"model/blocks_{layer}/layer_scale_{branch}"
                rules.append(Rule(path, (f"blocks.{layer}.ls{branch}.gamma",)))
    prefix, positions = config.dims.prefix_tokens, math.prod(config.grid)

    def table(array: np.ndarray) -> np.ndarray:
        """Rows of the tokens before the patches, 0 where the array has none for them (timm's no_embed_class)."""
        missing = prefix + positions - array.shape[1]
        if missing not in (0, prefix):
            raise InputError(
                f"the table of positions has {array.shape[1]} rows, not the {positions} of the patches of an image of "
                f"{' x '.join(map(str, config.data.size))} pixels with or without the {prefix} token(s) before them"
            )
        return np.pad(array[0], ((missing, 0), (0, 0)))

    return [*rules, Rule("encoding/table", ("pos_embed",), table, lambda array: array[None])]


def _hf_name(name: str, kind: str) -> str:
    """The name of Hugging Face of an array that timm calls `name`, but of queries, keys and values, which are one there."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is not None:
        return f"{kind}.encoder.layer.{block[1]}.{HF_BLOCK_NAMES[block[2]]}.{block[3]}"
    found = next(first for first in HF_NAMES if name.startswith(first))
    return HF_NAMES[found].replace("PREFIX", kind) + name.removeprefix(found)


def _hf_rule(rule: Rule, kind: str) -> Rule:
    """The rule of Hugging Face, from that of timm; it splits the map of queries, keys and values."""
    if "/qkv/" not in rule.path:
        return rule._replace(reference_names=tuple(_hf_name(name, kind) for name in rule.reference_names))
    _, layer, _, _, leaf = rule.reference_names[0].split(".")
    names = (f"{kind}.encoder.layer.{layer}.attention.attention.{part}.{leaf}" for part in ("query", "key", "value"))
    return rule._replace(
        reference_names=tuple(names),
        parts=3,
        to_ours=lambda *parts: rule.to_ours(np.concatenate(parts)),
        to_theirs=lambda array: np.split(rule.to_theirs(array), 3),
    )


def _with_prefix(arrays: Mapping[str, np.ndarray], kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays under their full names, {array left out: reason}); those of a base model lack the prefix."""
    state, left_out = {}, {}
    for name, array in arrays.items():
        full = (
            name
            if name.startswith((f"{kind}.", "classifier.", "cls_classifier.", "distillation_"))
            else f"{kind}.{name}"
        )
        reason = next((text for part, text in LEFT_OUT.items() if full.startswith(f"{kind}.{part}")), None)
        if reason is None:
            state[full] = array
        else:
            left_out[name] = reason
    return state, left_out


def _sides(file: pathlib.Path, name: str, size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2:
        raise InputError(f"{file}: field '{name}' must be one or two whole numbers of pixels, got {format_value(size)}")
    first, second = (SIDE.check(f"{file}: field '{name}'", side) for side in sides)
    return first, second


def _by_channel(
    file: pathlib.Path, name: str, values: Any, default: tuple[float, ...], low: float
) -> tuple[float, ...]:
    """Numbers of the channels of pixels in 0..1; null = the default. Raises: InputError: no such numbers."""
    if values is None:
        return default
    where = f"{file}: field '{name}'"
    numbers = Field(list).check(where, values)
    if not 1 <= len(numbers) <= _CHANNELS.limits["high"]:
        raise InputError(f"{where} must have a number for each channel, got {format_value(values)}")
    return tuple(Field(float, {"low": low, "high": 1.0}).check(where, number) for number in numbers)


def _unknown(file: pathlib.Path, name: str, known: Any) -> InputError:
    return InputError(
        f"{file}: field '{name}' is unknown, and may change what the model computes.{suggest(name, known)} "
        f"--ignore-fields={name} passes over it"
    )
