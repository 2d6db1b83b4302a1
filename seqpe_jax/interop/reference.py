"""The PyTorch reference's parameter names -> our parameter trees.

Its Conv1D weights are (in, out) like ours; its nn.Linear weights are (out, in) and are transposed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

State = Mapping[str, np.ndarray]
Tree = dict[str, Any]


def encoder_params(state: State) -> Tree:
    """Returns the digit encoder's parameters of a `SequentialPE` state dict."""
    params: Tree = {
        "digit_embedding": state["token_of_seqpe_embed.weight"],
        "place_embedding": state["pos_of_seqpe_embed.weight"],
        "projection": _linear(state, "out_proj"),
    }
    if "cls_token_embed" in state:
        params["cls"] = state["cls_token_embed"][0]
    if "dim_token_embed" in state:
        params["axis_embedding"] = state["dim_token_embed"][:, 0]
    if "layernorm.weight" in state:
        params["final_norm"] = _norm(state, "layernorm")
    for layer in _layers(state, "transformers."):
        params[f"block_{layer}"] = _block(state, f"transformers.{layer}", "layernorm_1", "layernorm_2")
    return params


def gpt2_params(state: State) -> Tree:
    """Returns the model's parameters of a GPT-2 state dict (`transformer.*`); the output embedding is tied."""
    params: Tree = {
        "token_embedding": {"embedding": state["transformer.wte.weight"]},
        "final_norm": _norm(state, "transformer.ln_f"),
    }
    for layer in _layers(state, "transformer.h."):
        params[f"blocks_{layer}"] = _block(state, f"transformer.h.{layer}", "ln_1", "ln_2")
    return params


def vit_params(state: State) -> Tree:
    """Returns the model's parameters of a ViT state dict; its patches are images [C, p, p], ours [p, p, C]."""
    kernel = state["patch_embed.proj.weight"]
    params: Tree = {
        "class_token": state["cls_token"][0],
        "projection": {
            "kernel": np.moveaxis(kernel, 1, -1).reshape(len(kernel), -1).T,
            "bias": state["patch_embed.proj.bias"],
        },
        "final_norm": _norm(state, "norm"),
        "head": _linear(state, "head"),
    }
    for layer in _layers(state, "blocks."):
        params[f"blocks_{layer}"] = {
            "norm_1": _norm(state, f"blocks.{layer}.norm1"),
            "qkv": _linear(state, f"blocks.{layer}.attn.qkv"),
            "out": _linear(state, f"blocks.{layer}.attn.proj"),
            "norm_2": _norm(state, f"blocks.{layer}.norm2"),
            "mlp_in": _linear(state, f"blocks.{layer}.mlp.fc1"),
            "mlp_out": _linear(state, f"blocks.{layer}.mlp.fc2"),
        }
    return params


def qk_map_params(state: State) -> Tree:
    """Returns the qk map's parameters of a GPT-2 or ViT state dict, stacked over layers where each has its own."""
    gpt2 = "transformer.wte.weight" in state
    single, blocks = ("transformer.pe_qk", "transformer.h.") if gpt2 else ("pe_qk", "blocks.")
    if f"{single}.weight" in state:
        return _linear(state, single)
    maps = [_linear(state, f"{blocks}{layer}.attn.pe_qk") for layer in _layers(state, blocks)]
    return {name: np.stack([entry[name] for entry in maps]) for name in ("kernel", "bias")}


def prefix_params(state: State) -> Tree:
    """Returns the class token's position vector of a ViT state dict, as SeqPE's parameters have it."""
    return {"prefix_vectors": state["cls_token_pos_embed"][0]}


def learned_params(state: State) -> Tree:
    """Returns the learned table's parameters of a GPT-2 or ViT state dict; ViT's begins with the class token."""
    if "pos_embed" in state:
        return {"table": state["pos_embed"][0]}
    return {"table": state["transformer.wpe.weight"]}


def rotary_mixed_params(state: State, heads: int) -> Tree:
    """Returns the parameters of a mixed rotary state dict: there column before row, and heads and pairs in one axis."""
    axes, layers, width = state["freqs"].shape
    frequencies = state["freqs"][::-1].reshape(axes, layers, heads, width // heads)
    return {"frequencies": np.swapaxes(frequencies, 0, 1)}


def _layers(state: State, prefix: str) -> list[int]:
    return sorted({int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)})


def _block(state: State, prefix: str, norm_1: str, norm_2: str) -> Tree:
    return {
        "norm_1": _norm(state, f"{prefix}.{norm_1}"),
        "qkv": _conv1d(state, f"{prefix}.attn.c_attn"),
        "out": _conv1d(state, f"{prefix}.attn.c_proj"),
        "norm_2": _norm(state, f"{prefix}.{norm_2}"),
        "mlp_in": _conv1d(state, f"{prefix}.mlp.c_fc"),
        "mlp_out": _conv1d(state, f"{prefix}.mlp.c_proj"),
    }


def _norm(state: State, name: str) -> Tree:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def _conv1d(state: State, name: str) -> Tree:
    return {"kernel": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def _linear(state: State, name: str) -> Tree:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}
