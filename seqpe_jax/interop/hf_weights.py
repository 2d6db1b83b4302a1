"""Arrays of Hugging Face decoders <-> parameters: names, layouts, and the order of the columns that rotary positions rotate.

Hugging Face rotates the pairs (i, i + R / 2) of the first R columns of a head, models here (2 i, 2 i + 1): the columns of the
maps that make queries and keys, of their biases and of their norms change places. Weights there are (out, in).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqpe_jax.config import Config
from seqpe_jax.errors import InputError
from seqpe_jax.interop.hf_families import Family
from seqpe_jax.interop.weights import Rule, gpt2_rules

LAYER = "{layer}"


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a family's modules.

    Attributes:
      prefix: prefix of the arrays of the network without its output layer.
      embedding: token embedding.
      head: output layer, if it is none of the embedding.
      final_norm: last norm.
      layer: a block, with {layer}.
      norms: parameter here -> norm of a block.
      query, key, value: maps of a block; for `fused` all have the name of the one map.
      out: map of attention's output.
      mlp: parameter here -> map of the MLP.
      fused: one map makes queries, keys and values, those of a head side by side.
    """

    prefix: str = "model."
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    layer: str = "model.layers.{layer}"
    norms: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    )
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    mlp: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"mlp_gate": "mlp.gate_proj", "mlp_in": "mlp.up_proj", "mlp_out": "mlp.down_proj"}
    )
    fused: bool = False


_LLAMA = Names()
_NEOX = "attention.query_key_value"
NAMES = {
    "olmo2": Names(norms={"post_norm_1": "post_attention_layernorm", "post_norm_2": "post_feedforward_layernorm"}),
    "gemma2": Names(
        norms={
            "norm_1": "input_layernorm",
            "post_norm_1": "post_attention_layernorm",
            "norm_2": "pre_feedforward_layernorm",
            "post_norm_2": "post_feedforward_layernorm",
        }
    ),
    "gpt_neox": Names(
        prefix="gpt_neox.",
        embedding="gpt_neox.embed_in",
        head="embed_out",
        final_norm="gpt_neox.final_layer_norm",
        layer="gpt_neox.layers.{layer}",
        query=_NEOX,
        key=_NEOX,
        value=_NEOX,
        out="attention.dense",
        mlp={"mlp_in": "mlp.dense_h_to_4h", "mlp_out": "mlp.dense_4h_to_h"},
        fused=True,
    ),
}
GPT2_NAMES = Names(prefix="transformer.", embedding="transformer.wte")
# Buffers that older versions stored as weights, and that this package computes.
BUFFERS = {
    r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$": "frequencies of rotary positions",
    r"\.(attn|attention|self_attn)\.(bias|masked_bias)$": "causal mask",
}


def names_of(family: Family) -> Names:
    """Returns the names of a family's modules."""
    return GPT2_NAMES if family.kind == "gpt2" else NAMES.get(family.kind, _LLAMA)


def make_rules(family: Family, config: Config, rotary_columns: int) -> list[Rule]:
    """Returns a rule for every parameter of a decoder, with one block per layer (`model.scan` is not read).

    Args:
      family: family whose names the arrays have.
      config: config of the model.
      rotary_columns: R, columns of a head that rotate; 0 = none.
    """
    model, names = config.model, names_of(family)
    if family.kind == "gpt2":
        table = Rule("encoding/table", ("transformer.wpe.weight",))
        return [*gpt2_rules(model.layers, model.heads, model.tied), table]
    rules = [Rule("model/token_embedding/embedding", (f"{names.embedding}.weight",))]
    rules += [] if model.tied else [Rule("model/output_embedding/embedding", (f"{names.head}.weight",))]
    rules += _norm_rules("model/final_norm", names.final_norm, config)
    order = column_order(model.parts.head_width, rotary_columns)
    for layer in range(model.layers):
        path, block = f"model/blocks_{layer}", names.layer.format(layer=layer)
        for ours, theirs in names.norms.items():
            rules += _norm_rules(f"{path}/{ours}", f"{block}.{theirs}", config)
        rules += _attention_rules(path, block, names, config, order)
        for ours, theirs in names.mlp.items():
            rules += _linear_rules(f"{path}/{ours}", f"{block}.{theirs}", model.parts.bias == "all")
    return rules


def column_order(head_width: int, rotary_columns: int) -> np.ndarray:
    """Returns the column there of each column of a head here, int[K]: halves become pairs that lie side by side."""
    halves = np.arange(rotary_columns).reshape(2, -1).T.reshape(-1)
    return np.concatenate([halves, np.arange(rotary_columns, head_width)])


def known_state(
    family: Family, arrays: Mapping[str, np.ndarray], tied: bool, source: Any
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns (arrays under their full names, {array left out: reason}) of a folder.

    Args:
      family: family of the folder.
      arrays: arrays by name; those of a base model lack the prefix.
      tied: whether the output layer is the token embedding.
      source: path of the weights, for messages.

    Raises:
      InputError: an output layer of its own is missing.
    """
    names = names_of(family)
    state, left_out = {}, {}
    for name, array in arrays.items():
        full = re.sub(r"^lm_head\.", f"{names.head}.", name)  # transformers 5 calls every output layer so in memory
        full = full if full.startswith((names.prefix, f"{names.head}.")) else names.prefix + full
        reason = next((text for pattern, text in BUFFERS.items() if re.search(pattern, full)), None)
        if reason is not None:
            left_out[name] = reason
        else:
            state[full] = array
    head = f"{names.head}.weight"
    if tied:
        if state.pop(head, None) is not None:
            left_out[head] = "tied to the token embedding"
    elif head not in state:
        raise InputError(f"{source} lacks {head}, and config.json has tie_word_embeddings=false: give all its weights")
    return state, left_out


def _norm_rules(path: str, name: str, config: Config) -> list[Rule]:
    """Rules of a norm; a LayerNorm has a bias."""
    rules = [Rule(f"{path}/scale", (f"{name}.weight",))]
    if config.model.parts.norm == "layer_norm":
        rules.append(Rule(f"{path}/bias", (f"{name}.bias",)))
    return rules


def _linear_rules(path: str, name: str, bias: bool) -> list[Rule]:
    rules = [Rule(f"{path}/kernel", (f"{name}.weight",), np.transpose, np.transpose)]
    return rules + ([Rule(f"{path}/bias", (f"{name}.bias",))] if bias else [])


def _attention_rules(path: str, block: str, names: Names, config: Config, order: np.ndarray) -> list[Rule]:
    """Rules of the maps into and out of the heads of a block, and of the norms of queries and keys."""
    parts = config.model.parts
    heads, width = parts.heads, parts.head_width
    query, key, value = (f"{block}.{name}" for name in (names.query, names.key, names.value))
    if names.fused:
        rules = [_fused_rule(f"{path}/qkv/kernel", f"{query}.weight", heads, order)]
        rules += [_fused_rule(f"{path}/qkv/bias", f"{query}.bias", heads, order)] if parts.bias != "none" else []
    elif parts.kv_heads == heads:
        rules = _head_rules(f"{path}/qkv", (query, key, value), (True, True, False), parts, heads, order)
    else:
        rules = _head_rules(f"{path}/q", (query,), (True,), parts, heads, order)
        rules += _head_rules(f"{path}/kv", (key, value), (True, False), parts, parts.kv_heads, order)

    def out_to_ours(array: np.ndarray) -> np.ndarray:
        return array.T.reshape(heads, width, -1)

    def out_to_theirs(array: np.ndarray) -> np.ndarray:
        return array.reshape(heads * width, -1).T

    out = f"{block}.{names.out}"
    rules.append(Rule(f"{path}/out/kernel", (f"{out}.weight",), out_to_ours, out_to_theirs))
    rules += [Rule(f"{path}/out/bias", (f"{out}.bias",))] if parts.bias == "all" else []
    if parts.qk_norm != "none":
        for name, count in (("q_norm", heads), ("k_norm", parts.kv_heads)):
            count = count if parts.qk_norm == "all" else 0
            rules.append(_qk_norm_rule(f"{path}/{name}/scale", f"{block}.self_attn.{name}.weight", count, order))
    return rules


def _head_rules(
    path: str, names: tuple[str, ...], rotates: tuple[bool, ...], parts: Any, heads: int, order: np.ndarray
) -> list[Rule]:
    """Rules of a map [D, n, heads, K], or [D, heads, K] for n = 1, and of its bias, from n maps.

    Args:
      path: path of the map here.
      names: names of the n maps there.
      rotates: for each of them, whether its columns rotate.
      parts: parts of the model.
      heads: heads of each map.
      order: result of `column_order`.
    """
    back = np.argsort(order)

    def to_ours(*arrays: np.ndarray) -> np.ndarray:
        split = [array.T.reshape(*array.T.shape[:-1], heads, -1) for array in arrays]
        ordered = [array[..., order] if rotate else array for array, rotate in zip(split, rotates, strict=True)]
        return ordered[0] if len(ordered) == 1 else np.stack(ordered, axis=-3)

    def to_theirs(array: np.ndarray) -> Any:
        split = [array] if len(names) == 1 else [array[..., part, :, :] for part in range(len(names))]
        ordered = [one[..., back] if rotate else one for one, rotate in zip(split, rotates, strict=True)]
        found = [one.reshape(*one.shape[:-2], -1).T for one in ordered]
        return found[0] if len(found) == 1 else found

    rules = [Rule(f"{path}/kernel", tuple(f"{name}.weight" for name in names), to_ours, to_theirs, len(names))]
    if parts.bias != "none":
        rules.append(Rule(f"{path}/bias", tuple(f"{name}.bias" for name in names), to_ours, to_theirs, len(names)))
    return rules


def _fused_rule(path: str, name: str, heads: int, order: np.ndarray) -> Rule:
    """Rule of a map or bias [..., 3, H, K], which has the parts of a head side by side there."""
    back = np.argsort(order)

    def reorder(array: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.concatenate([array[..., :2, :, :][..., columns], array[..., 2:, :, :]], axis=-3)

    def to_ours(array: np.ndarray) -> np.ndarray:
        array = array.T
        return reorder(np.moveaxis(array.reshape(*array.shape[:-1], heads, 3, -1), -2, -3), order)

    def to_theirs(array: np.ndarray) -> np.ndarray:
        array = np.moveaxis(reorder(array, back), -3, -2)
        return array.reshape(*array.shape[:-3], -1).T

    return Rule(path, (name,), to_ours, to_theirs)


def _qk_norm_rule(path: str, name: str, heads: int, order: np.ndarray) -> Rule:
    """Rule of the norm of queries or keys: of a head [K], for heads = 0, or of all heads [heads, K], a vector there."""
    back = np.argsort(order)

    def to_ours(array: np.ndarray) -> np.ndarray:
        return array.reshape(heads, -1)[:, order] if heads else array[order]

    return Rule(path, (name,), to_ours, lambda array: array[..., back].reshape(-1))
