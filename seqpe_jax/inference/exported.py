"""A model as a folder that needs neither this package nor Flax: StableHLO, parameters by flat names, a model card."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors.numpy

from seqpe_jax.errors import InputError
from seqpe_jax.files import apply_umask, as_path, is_remote
from seqpe_jax.trees import Tree, flat, nested

PARAMS, FUNCTION, CARD = "params.safetensors", "model.stablehlo", "README.md"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class ExportSignature:
    """What a served model reads and returns.

    Attributes:
      name, dtype: of the input; shape: its sizes as numbers and expressions such as "2*rows"; the first is "batch".
      limits: the largest value of each letter in `shape` but the batch; all start at 1.
      output: shape of the logits, float32; example: a Python expression that makes an input with NumPy.
      meaning: of the input's values, in words.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    limits: dict[str, int]
    output: tuple[str, ...]
    example: str
    meaning: str


def check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    """Returns the platforms, each once. Raises: InputError: none, or one that is not of `PLATFORMS`."""
    for platform in platforms or [""]:
        if platform not in PLATFORMS:
            raise InputError(
                f"--platforms: '{platform}' is not one of {', '.join(PLATFORMS)}; give some, e.g. cpu,cuda"
            )
    return tuple(dict.fromkeys(platforms))


def serialise(
    function: Callable[[Tree, jax.Array], jax.Array], params: Tree, signature: ExportSignature, platforms: Sequence[str]
) -> bytes:
    """Returns the StableHLO of a function of ({flat name: parameter}, input) -> logits, as `jax.export` reads it.

    Args:
      function: of nested parameters; params: those, or their shapes and types.
    """
    leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat(params).items()}
    limits = [f"{letter} <= {limit}" for letter, limit in signature.limits.items()]
    shape = jax.export.symbolic_shape(", ".join(signature.shape), constraints=limits)
    served = jax.jit(lambda leaves, inputs: function(_whole(params, nested(leaves)), inputs))
    exported = jax.export.export(served, platforms=platforms)(leaves, jax.ShapeDtypeStruct(shape, signature.dtype))
    return bytes(exported.serialize())


def write_params(folder: pathlib.Path, params: Tree) -> None:
    """Writes parameters into a folder."""
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in flat(params).items()}
    safetensors.numpy.save_file(leaves, folder / PARAMS)
    apply_umask(folder / PARAMS)  # safetensors makes it for its owner alone


def read_params(folder: str | os.PathLike, expected: Tree) -> Tree:
    """Returns the parameters of an export, numpy arrays in nested dicts.

    Args:
      expected: their shapes and types.

    Raises:
      InputError: the file cannot be read, or holds other parameters.
    """
    path = as_path(folder) / PARAMS
    try:
        leaves = safetensors.numpy.load(path.read_bytes()) if is_remote(path) else safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): export the run again") from error
    wanted = flat(expected)
    for name in sorted(wanted.keys() | leaves.keys()):
        found, right = (_described(there.get(name)) for there in (leaves, wanted))
        if found != right:
            raise InputError(f"{path}: {name} is {found}, but config.json asks for {right}: export the run again")
    return _whole(expected, nested(leaves))


def card(title: str, facts: dict[str, str], signature: ExportSignature, notes: Sequence[str], measured: str) -> str:
    """Returns the model card, markdown.

    Args:
      facts: what the table at the top says; notes: further sentences; measured: markdown, or "".
    """
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    ranges = ", ".join(f"{letter} 1 to {limit}" for letter, limit in signature.limits.items())
    listed = "".join(f"- {note}\n" for note in notes)
    section = f"\n## Measured\n{measured}" if measured else ""
    return f"""# {title}

| | |
| --- | --- |
{table}
## Use
`pip install jax flatbuffers safetensors`; then, in this folder:
```python
import jax, jax.export, numpy, safetensors.numpy
params = safetensors.numpy.load_file("{PARAMS}")
model = jax.export.deserialize(open("{FUNCTION}", "rb").read())
inputs = {signature.example}
logits = jax.jit(model.call)(params, inputs)
```
- `inputs`: {signature.name}, {signature.dtype}[{", ".join(signature.shape)}], any batch, {ranges}:
  {signature.meaning}. Other sizes are refused ("Error refining shapes").
- `logits`: float32[{", ".join(signature.output)}].
{listed}{section}"""


def _whole(like: Tree, tree: Tree) -> Tree:
    """A tree with the empty dicts of another, which flat names cannot tell."""
    empty = {name: {} for name, value in like.items() if isinstance(value, dict) and not value}
    return empty | tree


def _described(leaf: Any) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}[{', '.join(map(str, leaf.shape))}]"
