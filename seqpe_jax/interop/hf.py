"""Files of a folder in Hugging Face's layout: settings, weights in safetensors or pickles, in shards or not, a tokenizer."""

import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16, which safetensors asks NumPy for
import numpy as np
import safetensors
import yaml

from seqpe_jax.data.tokenizers import TOKENIZER_FILE_SETS
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.files import parse_json
from seqpe_jax.interop import pickles
from seqpe_jax.interop.settings import check_names

MODEL_FILE = "model.safetensors"
PICKLED_MODEL_FILE = "pytorch_model.bin"
MAX_YAML = 2**20  # characters; PyYAML takes a minute for a megabyte


def read_mapping(file: pathlib.Path, *, missing: bool = False) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML file.

    Args:
      file: path of the file.
      missing: return {} where there is no such file.

    Raises:
      InputError: the file cannot be read, or is not a mapping.
    """
    if missing and not file.is_file():
        return {}
    try:
        found = _parse(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8, an impossible date, nested too deep
        raise InputError(f"{file} is neither JSON nor YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} must hold a mapping of settings")
    check_names(str(file), found)
    return found


class _Loader(yaml.SafeLoader):
    """A reader of YAML without aliases, ten lines of which may stand for more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Returns the next node. Raises: ValueError: it is an alias of another."""
        if self.check_event(yaml.events.AliasEvent):
            raise ValueError(
                f"line {self.peek_event().start_mark.line + 1} repeats a value by an alias (*): write it out"
            )
        return super().compose_node(parent, index)


def _parse(content: str) -> Any:
    """Returns the content of a JSON file, or of a YAML file, whose numbers such as 1e-06 would be texts."""
    try:
        return parse_json(content)
    except ValueError as error:
        if len(content) > MAX_YAML:
            raise ValueError(f"{error}; YAML of more than {MAX_YAML} characters is no file of settings") from None
        try:
            return yaml.load(content, _Loader)  # noqa: S506  a safe one
        except yaml.YAMLError:
            if content.lstrip().startswith("{"):
                raise error from None
            raise


def without_fields(file: pathlib.Path, settings: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Returns settings without some fields.

    Args:
      file: path of the settings, for messages.
      settings: its content.
      ignored: names of the fields; a dot leads into a field that has fields, such as rope_scaling.finetuned.

    Raises:
      InputError: there is no such field.
    """
    found = dict(settings)
    for name in ignored:
        *sections, last = name.split(".")
        section: Any = found
        for key in sections:
            if isinstance(section.get(key), dict):
                section[key] = dict(section[key])
            section = section.get(key) if isinstance(section.get(key), dict) else {}
        if last not in section:
            raise InputError(f"--ignore-fields: {file} has no field '{name}'.{suggest(name, map(str, settings))}")
        del section[last]
    return found


def require_value(file: pathlib.Path, name: str, value: Any, required: Any) -> None:
    """Raises InputError where a field has another value than the only one that this code computes."""
    if isinstance(value, bool) != isinstance(required, bool) or value != required:  # 1 is not true
        raise InputError(f"{file}: field '{name}' is {format_value(value)}, only {required!r} is supported")


def read_weights(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], list[pathlib.Path]]:
    """Returns (arrays by name, files read) of a model's weights, in one file or in shards with an index.

    Raises:
      InputError: there are no weights, a shard is missing or damaged, or an index names arrays that are not there.
    """
    for name, read in ((MODEL_FILE, read_safetensors), (PICKLED_MODEL_FILE, _read_pickled)):
        file, index = folder / name, folder / f"{name}.index.json"
        if file.is_file():
            return read(file), [file]
        if index.is_file():
            return _read_shards(index, read)
    raise InputError(f"{folder / MODEL_FILE} is missing: it holds the model's weights")


def read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file by name.

    Raises:
      InputError: the file is missing, damaged or cut short.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing: it holds weights")
    try:
        with safetensors.safe_open(file, "np") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  not a dict
    except Exception as error:  # the library raises several kinds
        raise InputError(f"{file} is damaged or cut short: {error}") from error


def check_state_dict(found: Any, file: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays by name that a pickle held.

    Raises:
      InputError: it held something else.
    """
    if not isinstance(found, dict) or not all(isinstance(leaf, np.ndarray) for leaf in found.values()):
        raise InputError(f"{file} is no state dict: expected tensors by name")
    return dict(found)


def _read_pickled(file: pathlib.Path) -> dict[str, np.ndarray]:
    return check_state_dict(pickles.read(file), file)


def _read_shards(
    index: pathlib.Path, read: Callable[[pathlib.Path], dict[str, np.ndarray]]
) -> tuple[dict[str, Any], list[pathlib.Path]]:
    """Returns (arrays by name, files read) of the shards that an index names."""
    file_of = read_mapping(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(file, str) for file in file_of.values()):
        raise InputError(f"{index} must hold a weight_map, tensor -> file: get it again from where the checkpoint came")
    shards = sorted(set(file_of.values()))
    for shard in shards:
        if pathlib.PurePath(shard).name != shard:
            raise InputError(f"{index} names a file outside of its folder, '{shard}': get it again")
        if not (index.parent / shard).is_file():
            raise InputError(
                f"{index.parent / shard} is missing: {index.name} names {len(shards)} parts, and this is one"
            )
    found: dict[str, np.ndarray] = {}
    for shard in shards:
        arrays = read(index.parent / shard)
        names = [name for name, file in file_of.items() if file == shard]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise InputError(
                f"{index.parent / shard} lacks {missing[0]}, which {index.name} says is there: get it again"
            )
        found |= {name: arrays[name] for name in names}
    return found, [index, *(index.parent / shard for shard in shards)]


def fold_attention_scaling(
    state: Mapping[str, np.ndarray], width: int, heads: int, scaling: Mapping[str, bool]
) -> dict[str, np.ndarray]:
    """Returns the arrays of a GPT-2 with the scaling of attention logits multiplied into the queries' third of c_attn.

    Args:
      state: arrays by name, with the prefix `transformer.`.
      width: features of a token.
      heads: attention heads.
      scaling: values of the fields in `hf_families.GPT2_SCALING`.
    """
    scaled = dict(state)
    for name in state:
        found = re.fullmatch(r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)", name)
        if found:
            factor = 1.0 if scaling["scale_attn_weights"] else (width / heads) ** 0.5
            factor /= int(found[1]) + 1 if scaling["scale_attn_by_inverse_layer_idx"] else 1
            array = np.array(state[name], np.float32)
            array[..., :width] *= np.float32(factor)
            scaled[name] = array
    return scaled


def tokenizer_files(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Returns the files of a folder's tokenizer; () without one."""
    offered = (tuple(folder / name for name in names) for names in TOKENIZER_FILE_SETS)
    return next((files for files in offered if all(file.is_file() for file in files)), ())
