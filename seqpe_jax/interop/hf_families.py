"""Families of Hugging Face decoders: the fields of their config.json, read into a config and written from one.

A `Family` is a table: fields that are read and written (`Part`s), fields that must have one value, and neutral fields. Any
other field is refused by its name, since it could change what the model computes, unless it is null or the user names it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from seqpe_jax import config as configs
from seqpe_jax.config import Config, ModelConfig
from seqpe_jax.config.decoder_presets import GATED_ACTIVATIONS, Parts, by_layer
from seqpe_jax.config.limits import LAYERS
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.interop import torch_config
from seqpe_jax.interop.hf import require_value
from seqpe_jax.interop.hf_rope import ROPE_KEYS, rope_from_hf, rope_to_hf
from seqpe_jax.interop.settings import COUNT, SIZE, Field

Settings = Mapping[str, Any]
REQUIRED = object()  # default of a field that a folder must have

# Fields that change nothing that a model computes from tokens: what transformers 3, 4 and 5 write by themselves, defaults
# of generation, and labels of other tasks.
NEUTRAL = frozenset(
    "_attn_implementation _attn_implementation_autoset _from_model_config _name_or_path _num_labels architectures "
    "bad_words_ids begin_suppress_tokens bos_token_id cache_implementation classifier_dropout cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing "
    "id2label is_decoder label2id length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_labels num_return_sequences output_attentions output_hidden_states output_past output_scores "
    "pad_token_id predict_special_tokens prefix problem_type remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class "
    "top_k top_p torch_dtype transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version "
    "use_cache".split()
)
# Fields that any config.json may have, with the only value that these decoders know.
COMMON_VALUES = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "torchscript": False,
    "use_bfloat16": False,
}
LAYER_COUNTS = {"num_hidden_layers", "n_layer"}
# Name of a function in Hugging Face's configs -> name here, and the other way: the first one is written.
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
GATES = {activation: mlp for mlp, activation in GATED_ACTIVATIONS.items()}


@dataclasses.dataclass(frozen=True)
class Part:
    """Some fields of a config.json that are read and written together.

    Attributes:
      fields: name there -> (type, value where the field is missing, or REQUIRED).
      read: function of these fields -> fields of a `Draft`.
      write: function of a config -> these fields.
    """

    fields: Mapping[str, tuple[type, Any]]
    read: Callable[[Settings], dict[str, Any]]
    write: Callable[[Config], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face.

    Attributes:
      kind: its model_type, and `model.kind` here.
      architecture: name of the class that `AutoModelForCausalLM` makes.
      parts: fields that are read and written.
      values: fields with the only value that can be read.
      neutral: fields that change nothing, in addition to those of all families.
      encodings: kinds of encodings that its folders have.
    """

    kind: str
    architecture: str
    parts: tuple[Part, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    neutral: frozenset[str] = frozenset()
    encodings: tuple[str, ...] = ("rotary",)

    @property
    def fields(self) -> dict[str, tuple[type, Any]]:
        """Name of each field that is read -> (type, default)."""
        return {name: field for part in self.parts for name, field in part.fields.items()}

    @property
    def has_rope(self) -> bool:
        """True for a family with rotary positions."""
        return "rotary" in self.encodings

    def known_settings(self, file: pathlib.Path, settings: Settings) -> dict[str, Any]:
        """Returns the fields that are read, with defaults for missing ones.

        Args:
          file: path of config.json, for messages.
          settings: its content.

        Raises:
          InputError: a field that is unknown, missing, of another type, or of another value than the one that is known.
        """
        fields, values = self.fields, COMMON_VALUES | dict(self.values)
        found = {name: default for name, (_, default) in fields.items()}
        for name, value in settings.items():
            if name == "model_type" or name in NEUTRAL | self.neutral:
                continue
            if name in fields:
                found[name] = _checked(file, name, value, *fields[name])
            elif name in values:
                if value is not None:
                    require_value(file, name, value, values[name])
            elif not (self.has_rope and name in ROPE_KEYS) and value is not None:
                known = {*fields, *values, *(ROPE_KEYS if self.has_rope else ())}
                near = suggest(str(name), known)
                raise InputError(
                    f"{file}: field '{name}' is unknown for model_type '{self.kind}', and may change what the model "
                    f"computes.{near if 'mean' in near else ''} --ignore-fields={name} passes over it"
                )
        for name, value in found.items():
            if value is REQUIRED:
                raise InputError(f"{file}: field '{name}' is missing")
        return found

    def config(self, file: pathlib.Path, settings: Settings) -> Config:
        """Returns the config of a folder.

        Args:
          file: path of config.json, for messages.
          settings: its content.

        Raises:
          InputError: as `known_settings`, or values that contradict each other.
        """
        known = self.known_settings(file, settings)
        try:
            return _config_of(self, known, settings)
        except InputError as error:
            raise InputError(f"{file}: {str(error).removeprefix('config.json: ')}") from error

    def settings(self, config: Config) -> dict[str, Any]:
        """Returns the config.json of a config, whose parts may be more than the family has.

        Raises:
          InputError: a value that cannot be written.
        """
        found: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.kind}
        for part in self.parts:
            found |= part.write(config)
        if self.has_rope:
            found |= _written_rope(self, config)
        return found


def _checked(file: pathlib.Path, name: str, value: Any, kind: type, default: Any) -> Any:
    """Returns the value of a field; null = its default where that is not null. Raises: InputError: another type."""
    if value is None:
        return None if default is None or name in NULL_MEANS_NONE else default
    limits: Mapping[str, Any] = {}
    if kind is int:
        limits = LAYERS if name in LAYER_COUNTS else COUNT if default is REQUIRED else SIZE
    return Field(kind, limits).check(f"{file}: field '{name}'", value)


# --- Parts


def _same(name: str, field: str, kind: type = int, default: Any = REQUIRED) -> Part:
    """A field that has the same meaning there and here; field: dotted name, of the section model without a section."""
    section, _, last = field.rpartition(".")

    def write(config: Config) -> dict[str, Any]:
        owner = getattr(config, section or "model")
        return {name: getattr(owner.parts if last in PART_NAMES and not section else owner, last)}

    return Part({name: (kind, default)}, lambda known: {field: known[name] or kind()}, write)


PART_NAMES = {field.name for field in dataclasses.fields(Parts)}
# Fields of which null is a value of its own, though they have a default.
NULL_MEANS_NONE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}


def _sizes(epsilon: str, default_epsilon: float, tied: bool) -> tuple[Part, ...]:
    """The sizes of a decoder under the names that all families but GPT-2 share."""
    return (
        _same("vocab_size", "vocabulary"),
        _same("hidden_size", "width"),
        _same("num_hidden_layers", "layers"),
        _same("num_attention_heads", "heads"),
        _same("intermediate_size", "mlp_width"),
        _same("max_position_embeddings", "data.length", default=2048),
        _same("initializer_range", "init_std", float, 0.02),
        _same("attention_dropout", "attention_dropout", float, 0.0),
        _same(epsilon, "layer_norm_epsilon", float, default_epsilon),
        _same("tie_word_embeddings", "tied", bool, tied),
    )


def _heads(kv_heads: int | None = None, head_width: int | None = None) -> Part:
    """Heads of keys and values, and the width of a head; arguments: defaults, None = as many as queries, width / heads."""

    def read(known: Settings) -> dict[str, Any]:
        heads, width = known["num_attention_heads"], known["hidden_size"]
        kv_heads, head_dim = known["num_key_value_heads"] or heads, known["head_dim"] or width // heads
        return {
            "kv_heads": 0 if kv_heads == heads else kv_heads,
            "head_width": 0 if head_dim * heads == width else head_dim,
        }

    return Part(
        {"num_key_value_heads": (int, kv_heads), "head_dim": (int, head_width)},
        read,
        lambda config: {"num_key_value_heads": config.model.parts.kv_heads, "head_dim": config.model.parts.head_width},
    )


def _gated_mlp(name: str, default: str) -> Part:
    """The function of a gated MLP."""

    def read(known: Settings) -> dict[str, Any]:
        activation = ACTIVATIONS.get(known[name])
        if activation not in GATES:
            names = [there for there, here in ACTIVATIONS.items() if here in GATES]
            raise InputError(
                f"field '{name}' is {format_value(known[name])}, only {', '.join(names)} are known for a gated MLP"
            )
        return {"mlp": GATES[activation]}

    return Part({name: (str, default)}, read, lambda config: {name: _their_activation(config)})


def _plain_mlp(name: str, default: str) -> Part:
    """The function of a plain MLP."""

    def read(known: Settings) -> dict[str, Any]:
        if known[name] not in ACTIVATIONS:
            raise InputError(f"field '{name}' is {format_value(known[name])}.{suggest(known[name], ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[known[name]]}

    return Part({name: (str, default)}, read, lambda config: {name: _their_activation(config)})


def _their_activation(config: Config) -> str:
    ours = config.model.parts.activation
    preferred = "gelu_new" if config.model.kind == "gpt2" else "gelu_pytorch_tanh"
    return preferred if ours == "gelu_tanh" else next(there for there, here in ACTIVATIONS.items() if here == ours)


def _biases(mlp: bool) -> Part:
    """Biases of attention, and of the MLP where the family has that field: of all maps, or of none."""

    def read(known: Settings) -> dict[str, Any]:
        attention, hidden = known["attention_bias"], known.get("mlp_bias", known["attention_bias"])
        if attention != hidden or (attention and not mlp):
            raise InputError(
                f"field 'attention_bias' is {attention!r}{f' and mlp_bias {hidden!r}' if mlp else ''}: biases of all "
                "linear maps or of none are known"
            )
        return {"bias": "all" if attention else "none"}

    def write(config: Config) -> dict[str, Any]:
        found = {"attention_bias": config.model.parts.bias == "all"}
        return found | ({"mlp_bias": found["attention_bias"]} if mlp else {})

    return Part({"attention_bias": (bool, False)} | ({"mlp_bias": (bool, False)} if mlp else {}), read, write)


def _window(default: int | None) -> Part:
    """A window of all layers (Mistral)."""
    return Part(
        {"sliding_window": (int, default)},
        lambda known: {"window": known["sliding_window"] or 0, "window_layers": ()},
        lambda config: {"sliding_window": config.model.window or None},
    )


def _window_by_layer(pattern: Callable[[Settings], list[bool]], default: int | None, switch: bool) -> Part:
    """A window of some layers.

    Args:
      pattern: function of the fields -> whether each layer has the window, where a folder has no layer_types.
      default: window where the folder has none.
      switch: whether the family has the fields use_sliding_window and max_window_layers.
    """

    def read(known: Settings) -> dict[str, Any]:
        window = known["sliding_window"] or 0
        if switch and not known["use_sliding_window"]:
            window = 0
        kinds = known["layer_types"]
        if kinds is None:
            flags = pattern(known) if window else []
        else:
            wrong = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
            if wrong or len(kinds) != known["num_hidden_layers"]:
                raise InputError(
                    f"field 'layer_types' must name sliding_attention or full_attention for each of the "
                    f"{known['num_hidden_layers']} layers, got {format_value(kinds)}"
                )
            flags = [kind == "sliding_attention" for kind in kinds]
        if any(flags) and not window:
            raise InputError("field 'layer_types' has sliding_attention, and field 'sliding_window' no window for it")
        return {"window": window if any(flags) else 0, "window_layers": tuple(map(int, flags)) if any(flags) else ()}

    def write(config: Config) -> dict[str, Any]:
        parts = config.model.parts
        flags = parts.window_layers if parts.window else (False,) * config.model.layers
        found: dict[str, Any] = {
            "sliding_window": parts.window or None,
            "layer_types": ["sliding_attention" if flag else "full_attention" for flag in flags],
        }
        if not switch:
            return found
        first = next((layer for layer, flag in enumerate(flags) if flag), config.model.layers)
        return found | {"use_sliding_window": any(flags), "max_window_layers": first}

    fields: dict[str, tuple[type, Any]] = {"sliding_window": (int, default), "layer_types": (list, None)}
    if switch:
        fields |= {"use_sliding_window": (bool, False), "max_window_layers": (int, 28)}
    return Part(fields, read, write)


def _qwen_pattern(known: Settings) -> list[bool]:
    return [layer >= known["max_window_layers"] for layer in range(known["num_hidden_layers"])]


def _smollm3_pattern(known: Settings) -> list[bool]:
    return [not flag for flag in _rope_flags(known)]


def _gemma2_pattern(known: Settings) -> list[bool]:
    return [layer % 2 == 0 for layer in range(known["num_hidden_layers"])]


def _rope_flags(known: Settings) -> list[bool]:
    """Flags of the layers of a SmolLM3 that have rotary positions."""
    layers, flags = known["num_hidden_layers"], known["no_rope_layers"]
    if flags is None:
        interval = known["no_rope_layer_interval"] or 1
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(flags) < layers or any(flag not in (0, 1) for flag in flags):
        raise InputError(
            f"field 'no_rope_layers' must have 1 or 0 for each of the {layers} layers, got {format_value(flags)}"
        )
    return [bool(flag) for flag in flags[:layers]]


def _layers_without_rope() -> Part:
    """The layers of a SmolLM3 that have no positions."""

    def read(known: Settings) -> dict[str, Any]:
        flags = _rope_flags(known)
        return {"rope_layers": () if all(flags) else tuple(map(int, flags))}

    def write(config: Config) -> dict[str, Any]:
        layers, pattern = config.model.layers, config.encoding.layers_with
        if config.encoding.kind == "none":
            return {"no_rope_layers": [0] * layers}
        return {"no_rope_layers": [int(pattern[layer % len(pattern)]) if pattern else 1 for layer in range(layers)]}

    return Part({"no_rope_layers": (list, None), "no_rope_layer_interval": (int, 4)}, read, write)


def _multipliers() -> Part:
    """Granite's factors."""
    return Part(
        {
            "embedding_multiplier": (float, 1.0),
            "residual_multiplier": (float, 1.0),
            "attention_multiplier": (float, 1.0),
            "logits_scaling": (float, 1.0),
        },
        lambda known: {
            "embedding_multiplier": known["embedding_multiplier"],
            "residual_multiplier": known["residual_multiplier"],
            "attention_scale": known["attention_multiplier"],
            "logit_multiplier": _inverse("logits_scaling", known["logits_scaling"]),
        },
        lambda config: {
            "embedding_multiplier": config.model.parts.embedding_multiplier,
            "residual_multiplier": config.model.parts.residual_multiplier,
            "attention_multiplier": config.model.parts.attention_scale,
            "logits_scaling": _short(1 / config.model.parts.logit_multiplier),
        },
    )


def _gemma2_scales() -> Part:
    """Gemma 2's caps, and the number whose root divides attention logits; embeddings are multiplied by sqrt(width)."""
    return Part(
        {
            "attn_logit_softcapping": (float, 50.0),
            "final_logit_softcapping": (float, 30.0),
            "query_pre_attn_scalar": (float, 256.0),
        },
        lambda known: {
            "attention_cap": known["attn_logit_softcapping"] or 0.0,
            "logit_cap": known["final_logit_softcapping"] or 0.0,
            "attention_scale": _inverse("query_pre_attn_scalar", known["query_pre_attn_scalar"]) ** 0.5,
            "embedding_multiplier": math.sqrt(known["hidden_size"]),
        },
        lambda config: {
            "attn_logit_softcapping": config.model.parts.attention_cap or None,
            "final_logit_softcapping": config.model.parts.logit_cap or None,
            "query_pre_attn_scalar": _short(config.model.parts.attention_scale**-2),
        },
    )


def _inverse(name: str, value: float) -> float:
    if not value > 0:
        raise InputError(f"field '{name}' must be above 0, got {format_value(value)}")
    return 1 / value


def _short(value: float) -> float | int:
    """A number without the rounding of two inversions; an int where it is one."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value


_PARALLEL = Part(
    {"use_parallel_residual": (bool, True)},
    lambda known: {"residual": "parallel" if known["use_parallel_residual"] else "sequential"},
    lambda config: {"use_parallel_residual": config.model.parts.residual == "parallel"},
)
_NEOX_DROPOUT = Part(
    {"hidden_dropout": (float, 0.0)},
    lambda known: {"dropout": known["hidden_dropout"], "embedding_dropout": known["hidden_dropout"]},
    lambda config: {"hidden_dropout": config.model.dropout},
)
_GPT2 = tuple(
    _same(*row)
    for row in (
        ("vocab_size", "vocabulary"),
        ("n_layer", "layers"),
        ("n_embd", "width"),
        ("n_head", "heads"),
        ("n_positions", "data.length", int, 1024),
        ("n_inner", "mlp_width", int, None),
        ("layer_norm_epsilon", "layer_norm_epsilon", float, 1e-5),
        ("resid_pdrop", "dropout", float, 0.1),
        ("attn_pdrop", "attention_dropout", float, 0.1),
        ("embd_pdrop", "embedding_dropout", float, 0.1),
        ("initializer_range", "init_std", float, 0.02),
        ("tie_word_embeddings", "tied", bool, True),
    )
) + (_plain_mlp("activation_function", "gelu_new"),)
# How attention logits of a GPT-2 are scaled. Models here divide them by the square root of the head width, so that the
# weights which make queries take up any other scaling (`hf.fold_attention_scaling`).
GPT2_SCALING = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
_GPT2_SCALING = Part(
    {name: (bool, value) for name, value in GPT2_SCALING.items()}, lambda known: {}, lambda config: dict(GPT2_SCALING)
)
_LLAMA_NEUTRAL = frozenset({"is_llama_config"})

FAMILIES = {
    family.kind: family
    for family in (
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            (*_GPT2, _GPT2_SCALING),
            neutral=frozenset(
                "n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels summary_type "
                "summary_use_proj".split()
            ),
            encodings=("learned",),
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            (*_sizes("rms_norm_eps", 1e-6, tied=False), _heads(), _gated_mlp("hidden_act", "silu"), _biases(mlp=True)),
            {"pretraining_tp": 1, "rope_interleaved": False},
            _LLAMA_NEUTRAL,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            (
                *_sizes("rms_norm_eps", 1e-6, tied=False),
                _heads(kv_heads=8),
                _gated_mlp("hidden_act", "silu"),
                _window(4096),
            ),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            (
                *_sizes("rms_norm_eps", 1e-6, tied=False),
                _heads(kv_heads=32),
                _gated_mlp("hidden_act", "silu"),
                _window_by_layer(_qwen_pattern, 4096, switch=True),
            ),
            {"use_mrope": False},
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (
                *_sizes("rms_norm_eps", 1e-6, tied=False),
                _heads(kv_heads=32, head_width=128),
                _gated_mlp("hidden_act", "silu"),
                _biases(mlp=False),
                _window_by_layer(_qwen_pattern, 4096, switch=True),
            ),
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            (
                *_sizes("rms_norm_eps", 1e-6, tied=True),
                _heads(kv_heads=4),
                _gated_mlp("hidden_act", "silu"),
                _biases(mlp=True),
                _layers_without_rope(),
                _window_by_layer(_smollm3_pattern, None, switch=True),
            ),
            {"pretraining_tp": 1},
            encodings=("rotary", "none"),
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            (
                *_sizes("rms_norm_eps", 1e-5, tied=False),
                _heads(),
                _gated_mlp("hidden_act", "silu"),
                _biases(mlp=False),
            ),
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            (
                *_sizes("rms_norm_eps", 1e-6, tied=True),
                _heads(kv_heads=4, head_width=256),
                _gated_mlp("hidden_activation", "gelu_pytorch_tanh"),
                _biases(mlp=False),
                _window_by_layer(_gemma2_pattern, 4096, switch=False),
                _gemma2_scales(),
            ),
            {"use_bidirectional_attention": False},
            frozenset({"hidden_act"}),  # transformers reads hidden_activation alone
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            (
                *_sizes("layer_norm_eps", 1e-5, tied=False),
                _plain_mlp("hidden_act", "gelu"),
                _PARALLEL,
                _NEOX_DROPOUT,
            ),
            {"attention_bias": True},
        ),
        Family(
            "granite",
            "GraniteForCausalLM",
            (
                *_sizes("rms_norm_eps", 1e-6, tied=False),
                _heads(),
                _gated_mlp("hidden_act", "silu"),
                _biases(mlp=True),
                _multipliers(),
            ),
        ),
    )
}


# --- Fields read -> config

# Fields of the section model that `model.kind` decides where they are '' or 0.
PRESET_FIELDS = (
    "norm",
    "norm_placement",
    "mlp",
    "activation",
    "bias",
    "qk_norm",
    "residual",
    "attention_cap",
    "logit_cap",
    "attention_scale",
    "embedding_multiplier",
    "residual_multiplier",
    "logit_multiplier",
    "window_layers",
)
# Fields of an encoding that change nothing at the positions of a window.
FREE_ENCODING = {"max_position", "base"}


def _config_of(family: Family, known: Settings, settings: Settings) -> Config:
    """The config of fields that were read; settings: all of config.json, for the rotary ones."""
    draft: dict[str, Any] = {"dropout": 0.0, "embedding_dropout": 0.0}
    for part in family.parts:
        draft |= part.read(known)
    if not draft.get("head_width") and draft["width"] < draft["heads"]:
        raise InputError(
            f"config.json: {draft['heads']} heads share a width of {draft['width']}, which leaves none for a head: the width "
            "must be a multiple of the number of heads"
        )
    length, rope_layers = draft.pop("data.length"), draft.pop("rope_layers", ())
    model = _model_section(family.kind, draft)
    kind, encoding = family.encodings[0], {}
    if family.has_rope:
        encoding = rope_from_hf(settings, ModelConfig(**model).parts.head_width)
    if rope_layers and not any(rope_layers):
        kind, encoding = "none", {}
    elif rope_layers:
        encoding |= {"layers_with": rope_layers}
    section = dataclasses.asdict(configs.ENCODINGS[kind](**encoding))
    return torch_config.config_of_sections(model, section, {"name": "wikitext103", "length": length, "tokenizer": ""})


def rotary_columns(config: Config) -> int:
    """Returns R, the columns of a head that rotary positions rotated; 0 = none. Raises: InputError: they are no pairs."""
    encoding, width = config.encoding, config.model.parts.head_width
    if encoding.kind != "rotary":
        return 0
    columns = encoding.rotary_width(width)
    if columns % 2:
        raise InputError(
            f"config.json: the share {encoding.rotary_share:g} of a head of width {width} rotates {columns} columns, which are "
            "no pairs: partial_rotary_factor (rotary_pct) must give an even number"
        )
    return columns


def _model_section(kind: str, draft: Mapping[str, Any]) -> dict[str, Any]:
    """The section model of values that were read.

    It has the family's kind, or the kind decoder where that cannot have one of the values, such as a cap of 0. Fields that the
    kind itself decides in the same way stay at '' or 0.
    """
    sizes = {name: value for name, value in draft.items() if name not in PRESET_FIELDS}
    chosen = {name: value for name, value in draft.items() if name in PRESET_FIELDS}
    wanted = dataclasses.asdict(ModelConfig(kind=kind, **sizes, **chosen).parts)
    wanted |= {name: value for name, value in chosen.items() if name != "window_layers"}
    for name in (kind, "decoder"):
        model = ModelConfig(kind=name, **sizes)
        own = dataclasses.asdict(model.parts)
        changes = {field: wanted[field] for field in PRESET_FIELDS if wanted[field] != own[field]}
        if wanted["mlp"] in GATED_ACTIVATIONS:
            changes.pop("activation", None)  # which the gate decides
        if "window_layers" in changes:
            changes["window_layers"] = tuple(map(int, changes["window_layers"]))
        if dataclasses.asdict(dataclasses.replace(model, **changes).parts) == wanted:
            return {"kind": name} | sizes | changes
    raise InputError(f"no model.kind has the parts {wanted}")


# --- Config -> fields


def _written_rope(family: Family, config: Config) -> dict[str, Any]:
    """The rotary fields of a config.json, in the forms of transformers 4 and 5."""
    encoding = config.encoding if config.encoding.kind == "rotary" else configs.RotaryConfig()
    return rope_to_hf(encoding, config.model.parts.head_width, config.data.length, family.kind)


def settings_of(config: Config) -> tuple[Family, dict[str, Any]]:
    """Returns the family that has all parts of a config, and its config.json.

    Args:
      config: config with its vocabulary.

    Raises:
      InputError: no family has them; names what the nearest one lacks.
    """
    kind = config.encoding.kind
    families = [family for family in FAMILIES.values() if kind in family.encodings]
    families.sort(key=lambda family: family.kind != config.model.kind)
    if not families or not config.is_causal:
        what = f"encoding.kind='{kind}'"
        if not config.is_causal:
            what = "a model of images" if config.is_image else "data.form='encoder'"
        raise InputError(f"{what}: Hugging Face has no architecture with it; {EXPORT_HINT}")
    reasons = []
    for family in families:
        try:
            settings = family.settings(config)
            lacks = _differences(config, family.config(pathlib.Path("config.json"), settings))
        except InputError as error:
            reasons.append((0, f"{family.kind}: {error}"))
            continue
        if not lacks:
            return family, settings
        reasons.append((len(lacks), f"{family.kind} has {', '.join(lacks)}"))
    own = families[0].kind == config.model.kind
    counted = [] if own else [reason for reason in reasons if reason[0]]
    nearest = min(counted, key=lambda reason: reason[0], default=reasons[0])
    raise InputError(f"no architecture of Hugging Face has all parts of this model ({nearest[1]}); {EXPORT_HINT}")


EXPORT_HINT = (
    "`python -m seqpe_jax.export` writes the model as StableHLO, which runs with JAX alone and without this package"
)


def _differences(config: Config, back: Config) -> list[str]:
    """Fields in which a config that was written and read again differs: "field=value, here value"."""
    pairs = {
        f"model.{name}": (value, getattr(config.model.parts, name))
        for name, value in dataclasses.asdict(back.model.parts).items()
    }
    for name in ("layers", "width", "vocabulary", "tied", "layer_norm_epsilon"):
        pairs[f"model.{name}"] = (getattr(back.model, name), getattr(config.model, name))
    idle = set(config.encoding.without_effect()) | FREE_ENCODING
    theirs, ours = dataclasses.asdict(back.encoding), dataclasses.asdict(config.encoding)
    for one in (theirs, ours):
        one["layers_with"] = by_layer(one.get("layers_with", ()), config.model.layers)
    pairs |= {f"encoding.{name}": (theirs.get(name), value) for name, value in ours.items() if name not in idle}
    if config.encoding.kind == "learned":
        pairs["data.length"] = (back.data.length, config.data.length)
    return [f"{name}={value!r}, here {own!r}" for name, (value, own) in pairs.items() if not _equal(value, own)]


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, (int, float)):
        return math.isclose(first, second, rel_tol=1e-9)
    return first == second
