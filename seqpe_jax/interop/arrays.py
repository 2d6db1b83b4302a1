"""Files of others -> arrays and settings: safetensors and pickles, whole or in shards, JSON and YAML."""

import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16, which safetensors asks NumPy for
import numpy as np
import safetensors
import yaml

from seqpe_jax.errors import InputError
from seqpe_jax.interop import pickles

MODEL, PICKLED = "model.safetensors", "pytorch_model.bin"


def read_weights(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], list[pathlib.Path]]:
    """Returns (arrays by name, files) of a model's weights: one file, or shards with an index of them.

    Raises:
      InputError: there are none, a shard is missing or damaged, or an index names what is not there.
    """
    for name, read in (
        (MODEL, read_safetensors),
        (PICKLED, lambda file: check_state_dict(pickles.read(file), file)),
    ):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return read(file), [file]
        if index.is_file():
            return _shards(index, read)
    raise InputError(f"{folder / MODEL} is missing: it holds the model's weights")


def _shards(index: pathlib.Path, read: Callable[[pathlib.Path], dict[str, np.ndarray]]) -> tuple[dict[str, Any], list]:
    """Returns (arrays by name, files) of the shards that an index names."""
    places = read_mapping(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{index} must hold a weight_map, tensor -> file: get it again from where the checkpoint came")
    names = sorted(set(places.values()))
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise InputError(f"{index} names a file outside of its folder, '{name}': get it again")
        if not (index.parent / name).is_file():
            raise InputError(
                f"{index.parent / name} is missing: {index.name} names {len(names)} parts, and this is one"
            )
    found: dict[str, np.ndarray] = {}
    for name in names:
        part = read(index.parent / name)
        missing = [tensor for tensor, place in places.items() if place == name and tensor not in part]
        if missing:
            raise InputError(
                f"{index.parent / name} lacks {missing[0]}, which {index.name} says is there: get it again"
            )
        found |= {tensor: part[tensor] for tensor, place in places.items() if place == name}
    return found, [index, *(index.parent / name for name in names)]


def read_mapping(file: pathlib.Path, *, missing: bool = False) -> dict[str, Any]:
    """Returns the mapping of a JSON or YAML file; {} where it may be missing and is."""
    if missing and not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8, an impossible date, nested too deep
        raise InputError(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} must hold a mapping of settings")
    return found


def read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file. Raises: InputError: it is missing, damaged or cut short."""
    if not file.is_file():
        raise InputError(f"{file} is missing: it holds weights")
    try:
        with safetensors.safe_open(file, "np") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dict
    except Exception as error:  # the library raises several kinds
        raise InputError(f"{file} is damaged or cut short: {error}") from error


def check_state_dict(found: Any, file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns what a pickle held, arrays by name. Raises: InputError: it held something else."""
    if not isinstance(found, dict) or not all(isinstance(leaf, np.ndarray) for leaf in found.values()):
        raise InputError(f"{file} is no state dict: expected tensors by name")
    return dict(found)
