"""Values of `model.kind`: the parts of a decoder's blocks in published families, and the parts of one model, resolved.

`config.model.parts` is what all code reads. The raw fields of the section are '' or 0 wherever `model.kind` decides.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

Norm = Literal["", "layer_norm", "rms_norm", "rms_norm_plus_one"]
NormPlacement = Literal["", "pre", "post", "both"]
Mlp = Literal["", "plain", "swiglu", "geglu"]
Bias = Literal["", "all", "none", "qkv"]
QKNorm = Literal["", "none", "head", "all"]
Residual = Literal["", "sequential", "parallel"]

GATED_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_tanh"}  # activation of the gate of an MLP
GRANITE_BASE_WIDTH = 256  # width at which Granite's logits have the factor 1: 2048, 2560 and 4096 have 8, 10 and 16


@dataclasses.dataclass(frozen=True)
class BySize:
    """A value of a preset that depends on the size of the model.

    Attributes:
      text: formula, for the documentation.
      value: function of (model.width, features of a head).
    """

    text: str
    value: Callable[[int, int], float]


@dataclasses.dataclass(frozen=True)
class Preset:
    """The parts of a decoder, as the fields of the section `model` name them.

    Sizes, model.activation, model.layer_norm_epsilon and model.tied are not part of it: models of one family differ in them.

    Attributes:
      family: the models that have these parts, for the documentation.
      norm, norm_placement, mlp, bias, qk_norm, residual: see the fields of the section `model`.
      attention_cap, logit_cap: soft caps; 0 = none.
      attention_scale: factor of q . k; 0 = 1 / sqrt(features of a head).
      embedding_multiplier, residual_multiplier, logit_multiplier: factors.
      window_layers: pattern of the layers to which `model.window` applies; () = all.
    """

    family: str
    norm: str = "layer_norm"
    norm_placement: str = "pre"
    mlp: str = "plain"
    bias: str = "all"
    qk_norm: str = "none"
    residual: str = "sequential"
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    attention_scale: float | BySize = 0.0
    embedding_multiplier: float | BySize = 1.0
    residual_multiplier: float | BySize = 1.0
    logit_multiplier: float | BySize = 1.0
    window_layers: tuple[int, ...] = ()


_GPT2 = Preset("GPT-2")
_LLAMA = Preset("Llama 2 and 3", norm="rms_norm", mlp="swiglu", bias="none")

PRESETS = {
    "gpt2": _GPT2,
    "vit": dataclasses.replace(_GPT2, family="ViT, DeiT"),
    "decoder": dataclasses.replace(_GPT2, family="none: the parts of gpt2, changed one by one"),
    "llama": _LLAMA,
    "mistral": dataclasses.replace(_LLAMA, family="Mistral"),
    "qwen2": dataclasses.replace(_LLAMA, family="Qwen 2 and 2.5", bias="qkv"),
    "qwen3": dataclasses.replace(_LLAMA, family="Qwen 3", qk_norm="head"),
    "smollm3": dataclasses.replace(_LLAMA, family="SmolLM3"),
    "olmo2": dataclasses.replace(_LLAMA, family="OLMo 2", norm_placement="post", qk_norm="all"),
    "gemma2": dataclasses.replace(
        _LLAMA,
        family="Gemma 2",
        norm="rms_norm_plus_one",
        norm_placement="both",
        mlp="geglu",
        attention_cap=50.0,
        logit_cap=30.0,
        embedding_multiplier=BySize("sqrt(width)", lambda width, _: math.sqrt(width)),
        window_layers=(1, 0),
    ),
    "gpt_neox": dataclasses.replace(_GPT2, family="GPT-NeoX, Pythia", residual="parallel"),
    "granite": dataclasses.replace(
        _LLAMA,
        family="Granite 3 and 4.1",
        attention_scale=BySize("1 / head width", lambda _, head_width: 1 / head_width),
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logit_multiplier=BySize(f"{GRANITE_BASE_WIDTH} / width", lambda width, _: GRANITE_BASE_WIDTH / width),
    ),
}
TEXT_KINDS = tuple(kind for kind in PRESETS if kind != "vit")  # kinds that read text


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a model's blocks, with every value that `model.kind` or a size decides filled in.

    Attributes:
      norm: "layer_norm", "rms_norm", or "rms_norm_plus_one" with the weight 1 + w.
      norm_placement: "pre" of the branches' inputs, "post" of their outputs, or "both".
      mlp: "plain", or gated: "swiglu", "geglu".
      activation: of a plain MLP, or of the gate.
      mlp_width: hidden features of an MLP.
      heads: H, query heads of a block.
      kv_heads: G, key and value heads; divides H.
      head_width: K, features of a head.
      bias: linear maps that have biases, "all", "none" or "qkv".
      qk_norm: norm of queries and keys, "none", "head" (of each head) or "all" (of all heads together).
      residual: "sequential", or "parallel": attention and MLP read the same states.
      attention_cap: c of the cap c tanh(logits / c) of attention logits; 0 = none.
      logit_cap: the same of the final logits.
      attention_scale: factor of q . k.
      embedding_multiplier: factor of the token embeddings.
      residual_multiplier: factor of each branch.
      logit_multiplier: factor of the final logits, before the cap.
      window: keys that a query sees in the layers of `window_layers`; 0 = all.
      window_layers: whether each layer has the window; all False without one.
    """

    norm: str = "layer_norm"
    norm_placement: str = "pre"
    mlp: str = "plain"
    activation: str = "gelu_tanh"
    mlp_width: int = 0
    heads: int = 1
    kv_heads: int = 1
    head_width: int = 1
    bias: str = "all"
    qk_norm: str = "none"
    residual: str = "sequential"
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    attention_scale: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    window: int = 0
    window_layers: tuple[bool, ...] = ()

    @property
    def gated(self) -> bool:
        """True for an MLP with a gate."""
        return self.mlp in GATED_ACTIVATIONS

    def window_of(self, layer: int) -> int:
        """Returns the keys that a query of a layer sees; 0 = all."""
        return self.window if self.window and self.window_layers[layer] else 0


def resolve(model: Any) -> Parts:
    """Returns the parts of a model, from its section of a config."""
    preset = PRESETS[model.kind]
    head_width = model.head_width or model.width // model.heads

    def value(name: str) -> Any:
        own = getattr(model, name) or getattr(preset, name)
        return own.value(model.width, head_width) if isinstance(own, BySize) else own

    mlp = value("mlp")
    return Parts(
        norm=value("norm"),
        norm_placement=value("norm_placement"),
        mlp=mlp,
        activation=GATED_ACTIVATIONS.get(mlp, model.activation),
        mlp_width=model.mlp_width or 4 * model.width,
        heads=model.heads,
        kv_heads=model.kv_heads or model.heads,
        head_width=head_width,
        bias=value("bias"),
        qk_norm=value("qk_norm"),
        residual=value("residual"),
        attention_cap=value("attention_cap"),
        logit_cap=value("logit_cap"),
        attention_scale=value("attention_scale") or head_width**-0.5,
        embedding_multiplier=value("embedding_multiplier"),
        residual_multiplier=value("residual_multiplier"),
        logit_multiplier=value("logit_multiplier"),
        window=model.window,
        window_layers=by_layer(value("window_layers"), model.layers) if model.window else (False,) * model.layers,
    )


def by_layer(pattern: tuple[int, ...], layers: int) -> tuple[bool, ...]:
    """Returns the flag of each layer.

    Args:
      pattern: flags 0 or 1 of the first layers, repeated for those after them; () = 1 for all.
      layers: number of layers.
    """
    return tuple(bool(pattern[layer % len(pattern)]) if pattern else True for layer in range(layers))


def presets_table() -> str:
    """Returns the table of docs/models.md, in markdown."""
    names = ("norm", "norm_placement", "mlp", "bias", "qk_norm", "residual")
    rows = [f"| kind | families | {' | '.join(names)} | further |", f"|{' --- |' * (len(names) + 3)}"]
    for kind, preset in PRESETS.items():
        further = []
        for field in dataclasses.fields(preset):
            value = getattr(preset, field.name)
            if field.name not in ("family", *names) and value != field.default:
                further.append(f"{field.name} {value.text if isinstance(value, BySize) else _short(value)}")
        cells = [f"`{kind}`", preset.family, *(getattr(preset, name) for name in names), ", ".join(further)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _short(value: float | tuple[int, ...]) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
