"""Parameter names and layouts of the PyTorch reference, mapped to ours in both directions; rules of any other mapping.

The reference's Conv1D weights are (in, out) as here; its nn.Linear weights are (out, in) and are transposed. Names of its
position model have the prefix `pe_model.`, as in its image checkpoints.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from seqpe_jax.config import Config
from seqpe_jax.errors import InputError

State = Mapping[str, np.ndarray]
Tree = dict[str, Any]
ArrayMap = Callable[..., Any]

PE_PREFIX = "pe_model."


class Rule(NamedTuple):
    """One parameter here and its arrays in the reference.

    Attributes:
      path: path of the parameter here, such as "model/blocks_0/qkv/kernel".
      reference_names: names of the arrays; `parts` of them for each layer of a stacked parameter.
      to_ours: function from `parts` arrays there to one here.
      to_theirs: its inverse; returns a list for several parts.
      parts: number of arrays there that make one here.
      stacked: whether the parameter has a first axis of layers.
    """

    path: str
    reference_names: tuple[str, ...]
    to_ours: ArrayMap = np.asarray
    to_theirs: ArrayMap = np.asarray
    parts: int = 1
    stacked: bool = False

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Names of the arrays of each layer, or of the one parameter."""
        names = self.reference_names
        return [names[first : first + self.parts] for first in range(0, len(names), self.parts)]


def shape_of(state: State, name: str, rank: int) -> tuple[int, ...]:
    """Returns the shape of an array, from which sizes are read.

    Args:
      state: arrays by name.
      name: name of the array.
      rank: its number of sides.

    Raises:
      InputError: it is missing, has another number of sides, or one of them is 0.
    """
    if name not in state:
        raise InputError(f"the weights lack {name}: they are not those of these settings")
    shape = np.shape(state[name])
    if len(shape) != rank or 0 in shape:
        raise InputError(
            f"{name} has the shape {shape}, not one of {rank} sides of at least 1: the weights are damaged"
        )
    return shape


def make_rules(config: Config) -> list[Rule]:
    """Returns a rule for every parameter of a model of this config, with one block per layer (`model.scan` is not read)."""
    encoding, model = config.encoding, config.model
    images = model.kind == "vit"
    rules = (
        vit_rules(model.layers, model.heads, model.patch)
        if images
        else gpt2_rules(model.layers, model.heads, model.tied)
    )
    if encoding.kind == "seqpe":
        rules += encoder_rules(encoding.layers, len(config.grid), encoding.cls, encoding.final_norm)
        rules += qk_rules(encoding.qk, model.layers, images)
        if images:
            rules.append(CLASS_TOKEN_RULE)
    if encoding.kind == "learned":
        rules.append(
            Rule("encoding/table", ("pos_embed",), _drop_first_axis, _add_first_axis)
            if images
            else Rule("encoding/table", ("transformer.wpe.weight",))
        )
    if encoding.kind == "rotary_mixed":
        rules.append(mixed_rule(model.heads))
    return rules


def encoder_rules(layers: int, axes: int, cls: bool, final_norm: bool) -> list[Rule]:
    """Returns the rules of the digit encoder, a `SequentialPE` there."""
    path = "encoding/encoder"
    rules = [
        Rule(f"{path}/digit_embedding", (f"{PE_PREFIX}token_of_seqpe_embed.weight",)),
        Rule(f"{path}/place_embedding", (f"{PE_PREFIX}pos_of_seqpe_embed.weight",)),
        *_linear_rules(f"{path}/projection", f"{PE_PREFIX}out_proj"),
    ]
    if cls:
        rules.append(Rule(f"{path}/cls", (f"{PE_PREFIX}cls_token_embed",), _drop_first_axis, _add_first_axis))
    if axes > 1:
        rules.append(
            Rule(f"{path}/axis_embedding", (f"{PE_PREFIX}dim_token_embed",), _drop_second_axis, _add_second_axis)
        )
    if final_norm:
        rules += _norm_rules(f"{path}/final_norm", f"{PE_PREFIX}layernorm")
    for layer in range(layers):
        rules += _block_rules(f"{path}/block_{layer}", f"{PE_PREFIX}transformers.{layer}", "layernorm_1", "layernorm_2")
    return rules


def gpt2_rules(layers: int, heads: int, tied: bool = True) -> list[Rule]:
    """Returns the rules of GPT-2 without positions."""
    rules = [Rule("model/token_embedding/embedding", ("transformer.wte.weight",))]
    rules += [] if tied else [Rule("model/output_embedding/embedding", ("lm_head.weight",))]
    rules += _norm_rules("model/final_norm", "transformer.ln_f")
    for layer in range(layers):
        rules += _split_heads(_block_rules(f"model/blocks_{layer}", f"transformer.h.{layer}", "ln_1", "ln_2"), heads)
    return rules


def vit_rules(layers: int, heads: int, patch: tuple[int, ...]) -> list[Rule]:
    """Returns the rules of ViT without positions; its patches are [C, p, p] there, and [p, p, C] here."""

    def to_ours(kernel: np.ndarray) -> np.ndarray:
        return np.moveaxis(kernel, 1, -1).reshape(len(kernel), -1).T

    def to_theirs(kernel: np.ndarray) -> np.ndarray:
        return np.moveaxis(kernel.T.reshape(kernel.shape[1], *patch, -1), -1, 1)

    rules = [
        Rule("model/class_token", ("cls_token",), _drop_first_axis, _add_first_axis),
        Rule("model/projection/kernel", ("patch_embed.proj.weight",), to_ours, to_theirs),
        Rule("model/projection/bias", ("patch_embed.proj.bias",)),
        *_norm_rules("model/final_norm", "norm"),
        *_linear_rules("model/head", "head"),
    ]
    names = {"norm_1": "norm1", "norm_2": "norm2"}
    layers_of = {"qkv": "attn.qkv", "out": "attn.proj", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
    for layer in range(layers):
        path, reference_name = f"model/blocks_{layer}", f"blocks.{layer}"
        rules += [rule for name in names for rule in _norm_rules(f"{path}/{name}", f"{reference_name}.{names[name]}")]
        maps = [
            rule
            for name in layers_of
            for rule in _linear_rules(f"{path}/{name}", f"{reference_name}.{layers_of[name]}")
        ]
        rules += _split_heads(maps, heads)
    return rules


def qk_rules(qk: str, layers: int, images: bool) -> list[Rule]:
    """Returns the rules of the qk map: one, one per layer, or none."""
    single, blocks = ("pe_qk", "blocks") if images else ("transformer.pe_qk", "transformer.h")
    if qk == "single":
        return _linear_rules("encoding/qk_map", single)
    if qk == "multi":
        names = (f"{blocks}.{layer}.attn.pe_qk" for layer in range(layers))
        return [rule._replace(stacked=True) for rule in _linear_rules("encoding/qk_map", *names)]
    return []


def mixed_rule(heads: int) -> Rule:
    """Returns the rule of mixed rotary: there the column comes before the row, and heads and pairs share an axis."""

    def to_ours(frequencies: np.ndarray) -> np.ndarray:
        axes, layers, width = frequencies.shape
        return np.swapaxes(frequencies[::-1].reshape(axes, layers, heads, width // heads), 0, 1)

    def to_theirs(frequencies: np.ndarray) -> np.ndarray:
        layers, axes, *_ = frequencies.shape
        return np.swapaxes(frequencies, 0, 1).reshape(axes, layers, -1)[::-1]

    return Rule("encoding/frequencies", (f"{PE_PREFIX}freqs",), to_ours, to_theirs)


def to_params(rules: Iterable[Rule], state: State) -> Tree:
    """Returns the parameters from the reference's arrays, each of which is used exactly once.

    Args:
      rules: rules of all parameters.
      state: arrays by name.

    Raises:
      InputError: arrays are missing, or left over; names the first five.
    """
    rules = list(rules)
    wanted = [name for rule in rules for name in rule.reference_names]
    for fault, names in (
        ("lacks tensors that this model has", [name for name in wanted if name not in state]),
        ("has tensors that this model does not use", sorted(state.keys() - set(wanted))),
    ):
        if names:
            raise InputError(
                f"the checkpoint {fault}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if names[5:] else ''}; "
                "its config and its weights must belong together"
            )
    params: Tree = {"encoding": {}, "model": {}}
    for rule in rules:
        *path, last = rule.path.split("/")
        layers = [_fitted(rule, group, [np.asarray(state[name]) for name in group]) for group in rule.groups]
        tree = params
        for key in path:
            tree = tree.setdefault(key, {})
        if len({layer.shape for layer in layers}) > 1:
            raise InputError(
                f"the arrays of parameter {rule.path} differ in shape between layers: the weights are damaged"
            )
        tree[last] = np.ascontiguousarray(np.stack(layers) if rule.stacked else layers[0])
    return params


def _fitted(rule: Rule, names: tuple[str, ...], arrays: list[np.ndarray]) -> Any:
    """Returns one array here from those there. Raises: InputError: their shapes are of no such parameter."""
    try:
        if any(array.dtype.kind == "c" for array in arrays):
            raise TypeError("complex numbers")
        return rule.to_ours(*arrays)
    except (ValueError, IndexError, TypeError) as error:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in zip(names, arrays, strict=True))
        raise InputError(f"{shapes} cannot become parameter {rule.path} ({error}): the weights are damaged") from error


def to_state(rules: Iterable[Rule], params: Tree) -> dict[str, np.ndarray]:
    """Returns the reference's arrays from the parameters, the bit-exact inverse of `to_params`."""
    state = {}
    for rule in rules:
        leaf: Any = params
        for key in rule.path.split("/"):
            leaf = leaf[key]
        leaf = np.asarray(leaf)
        for layer, group in zip(leaf if rule.stacked else [leaf], rule.groups, strict=True):
            theirs = rule.to_theirs(layer)
            for array, name in zip(theirs if rule.parts > 1 else [theirs], group, strict=True):
                state[name] = np.ascontiguousarray(array)
    return state


def _split_heads(rules: list[Rule], heads: int) -> list[Rule]:
    """Returns the rules of a block whose attention maps have a dimension for heads here."""

    def qkv(rule: Rule) -> Rule:
        def to_ours(array: np.ndarray) -> np.ndarray:
            array = rule.to_ours(array)
            return array.reshape(*array.shape[:-1], 3, heads, -1)

        return rule._replace(
            to_ours=to_ours, to_theirs=lambda array: rule.to_theirs(array.reshape(*array.shape[:-3], -1))
        )

    def out(rule: Rule) -> Rule:
        def to_ours(array: np.ndarray) -> np.ndarray:
            array = rule.to_ours(array)
            return array.reshape(heads, -1, array.shape[-1])

        return rule._replace(
            to_ours=to_ours, to_theirs=lambda array: rule.to_theirs(array.reshape(-1, array.shape[-1]))
        )

    made = []
    for rule in rules:
        split = qkv if "/qkv/" in rule.path else out if rule.path.endswith("/out/kernel") else lambda rule: rule
        made.append(split(rule))
    return made


def _drop_first_axis(array: np.ndarray) -> np.ndarray:
    return array[0]


def _add_first_axis(array: np.ndarray) -> np.ndarray:
    return array[None]


def _drop_second_axis(array: np.ndarray) -> np.ndarray:
    return array[:, 0]


def _add_second_axis(array: np.ndarray) -> np.ndarray:
    return array[:, None]


def _block_rules(path: str, reference_name: str, norm_1: str, norm_2: str) -> list[Rule]:
    layers = {"qkv": "attn.c_attn", "out": "attn.c_proj", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
    rules = _norm_rules(f"{path}/norm_1", f"{reference_name}.{norm_1}") + _norm_rules(
        f"{path}/norm_2", f"{reference_name}.{norm_2}"
    )
    for name, layer in layers.items():
        rules.append(Rule(f"{path}/{name}/kernel", (f"{reference_name}.{layer}.weight",)))
        rules.append(Rule(f"{path}/{name}/bias", (f"{reference_name}.{layer}.bias",)))
    return rules


def _norm_rules(path: str, reference_name: str) -> list[Rule]:
    return [Rule(f"{path}/scale", (f"{reference_name}.weight",)), Rule(f"{path}/bias", (f"{reference_name}.bias",))]


def _linear_rules(path: str, *reference_names: str) -> list[Rule]:
    weights, biases = (
        tuple(f"{name}.weight" for name in reference_names),
        tuple(f"{name}.bias" for name in reference_names),
    )
    return [Rule(f"{path}/kernel", weights, np.transpose, np.transpose), Rule(f"{path}/bias", biases)]


# The class token's position vector.
CLASS_TOKEN_RULE = Rule("encoding/prefix_vectors", ("cls_token_pos_embed",), _drop_first_axis, _add_first_axis)
