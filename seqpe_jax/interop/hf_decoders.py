"""Folders of Hugging Face decoders: config.json, weights and tokenizer, read as a model and written from one."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from seqpe_jax.config import Config
from seqpe_jax.data.tokenizers import TOKENIZER_CONFIG_FILE, load_tokenizer, write_byte_level
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.files import apply_umask, as_path, atomic_dir, require_empty
from seqpe_jax.interop import hf, hf_families, hf_weights, weights
from seqpe_jax.interop.foreign import Arrays, ForeignCheckpoint
from seqpe_jax.interop.hf_families import FAMILIES, GPT2_SCALING, Family, Settings
from seqpe_jax.models import transformer
from seqpe_jax.run_dir import TOKENIZER_FILE, RunDir
from seqpe_jax.trees import num_params

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Files of a tokenizer that are copied as they are from one folder of Hugging Face to another.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def read(path: pathlib.Path, settings: Settings) -> ForeignCheckpoint:
    """Returns the checkpoint of a folder.

    Args:
      path: the folder.
      settings: content of its config.json.

    Raises:
      InputError: a family or field that is unknown, or values that contradict each other.
    """
    file = path / "config.json"
    kind = settings.get("model_type", "gpt2")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(
            f"{file}: model_type {format_value(kind)} is none of the decoders that can be read, {', '.join(FAMILIES)}."
            f"{suggest(format_value(kind), FAMILIES)}"
        )
    family = FAMILIES[kind]
    config = family.config(file, settings)
    scaling = {name: bool(settings.get(name, default)) for name, default in GPT2_SCALING.items()}
    return ForeignCheckpoint(
        config,
        tuple(hf_weights.make_rules(family, config, hf_families.rotary_columns(config))),
        functools.partial(_read_arrays, path, family, config, scaling if kind == "gpt2" else GPT2_SCALING),
        hf.tokenizer_files(path),
        {name: settings[name] for name in TOKEN_IDS if settings.get(name) is not None},
    )


def _read_arrays(path: pathlib.Path, family: Family, config: Config, scaling: Mapping[str, bool]) -> Arrays:
    arrays, files = hf.read_weights(path)
    state, left_out = hf_weights.known_state(family, arrays, config.model.tied, files[0])
    if scaling != GPT2_SCALING:
        state = hf.fold_attention_scaling(state, config.model.width, config.model.heads, scaling)
    return Arrays(state, left_out, {}, (path / "config.json", *files))


def write(model: Any, output: str | os.PathLike, dtype: str = "float32") -> dict[str, Any]:
    """Writes a model as a folder that `transformers.AutoModelForCausalLM` opens, with its tokenizer.

    Args:
      model: a `seqpe_jax.Model` that is no export.
      output: path of a folder that does not exist or is empty.
      dtype: of the stored weights, a key of `DTYPES`.

    Returns:
      {"source", "step", "files", "encoding", "parameters", "mapped": {parameter here: [arrays there]}, "architecture",
      "tokenizer": whether the folder has one}.

    Raises:
      InputError: parts or positions that no architecture of Hugging Face has. Nothing is written then.
    """
    require_empty(output)
    if model.model_spec.max_grid is not None:
        raise InputError(
            f"{model.folder} is an export, which has no positions of its own: give the --workdir of its run"
        )
    config = model.config
    section = dataclasses.replace(config.model, vocabulary=model.data_spec.vocabulary)
    config = dataclasses.replace(config, model=section)
    family, settings = hf_families.settings_of(config)
    rules = hf_weights.make_rules(family, config, hf_families.rotary_columns(config))
    params = jax.tree.map(np.asarray, model.params)
    if config.model.scan:
        params = params | {"model": transformer.unstack_layers(params["model"], config.model.layers)}
    state = {name: array.astype(DTYPES[dtype]) for name, array in weights.to_state(rules, params).items()}
    with atomic_dir(output) as folder:
        token_ids = _write_tokenizer(model, folder)
        # An absent id would be the default of the architecture, a token that this vocabulary may not have.
        settings |= {"dtype": dtype, "torch_dtype": dtype} | dict.fromkeys(TOKEN_IDS) | token_ids
        _write_json(folder / "config.json", settings)
        _write_json(folder / "generation_config.json", {"_from_model_config": True} | token_ids)
        save_file(state, folder / hf.MODEL_FILE, metadata={"format": "pt"})
        apply_umask(folder / hf.MODEL_FILE)  # safetensors makes it for its owner alone
        names = sorted(file.name for file in folder.iterdir())
    return {
        "source": model.folder or model.source,
        "step": model.step,
        "files": names,
        "encoding": config.encoding.kind,
        "parameters": num_params(model.params),
        "mapped": {rule.path: list(rule.reference_names) for rule in rules},
        "architecture": family.architecture,
        "tokenizer": TOKENIZER_FILE in names or "vocab.json" in names,
    }


def _write_tokenizer(model: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Writes the tokenizer of a model, and returns the ids of its special tokens by their names in a config.json."""
    source = as_path(model.folder or model.source) if model.folder or model.source else None
    if source is not None and not model.folder:  # a folder of Hugging Face: its files as they are
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
        settings = hf.read_mapping(source / "config.json", missing=True)
        return {name: settings[name] for name in TOKEN_IDS if settings.get(name) is not None}
    token_ids = RunDir(source).conversion.get("settings", {}) if source is not None else {}
    stored = source / TOKENIZER_FILE if source is not None else None
    if stored is not None and stored.is_file():
        tokenizer = load_tokenizer(stored)
    elif model.config.data.tokenizer:
        tokenizer = load_tokenizer(model.config.data.tokenizer)
    else:
        return token_ids
    if tokenizer.name == "bytes":
        write_byte_level(folder)
    else:
        tokenizer.save(folder)
    config_file = folder / TOKENIZER_CONFIG_FILE
    names = json.loads(config_file.read_text()) if config_file.is_file() else {}
    _write_json(config_file, names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return token_ids or ({} if tokenizer.eos_id is None else {"eos_token_id": int(tokenizer.eos_id)})


def _write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
