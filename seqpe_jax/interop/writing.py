"""A model written as a run of ours, or in the layout of the PyTorch reference."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax import config as configs
from seqpe_jax.data.tokenizers import TOKENIZER_FILE, load_tokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_dir, require_empty
from seqpe_jax.interop import torch_config, torch_reference, weights
from seqpe_jax.models.build import DataSpec, ModelSpec, Params
from seqpe_jax.tasks.data_spec import write_data_spec
from seqpe_jax.training.checkpoint import Checkpointer, write_config
from seqpe_jax.training.checksums import DIGESTS_FILE, SIDE_FILES, write_checksums
from seqpe_jax.trees import count

REPORT = "conversion.json"


def write_run(
    output: str | os.PathLike,
    config: configs.Config,
    params: Params,
    data_spec: DataSpec,
    step: int,
    *,
    save_assets: Callable[[pathlib.Path], None] | None = None,
    report: dict[str, Any] | None = None,
) -> None:
    """Writes a model as a run: config.json, sizes.json, checkpoints/STEP, and what the parameters mean nothing without.

    Args:
      output: a folder that does not exist or is empty.
      save_assets: writes the tokenizer, or the names of the classes, into the folder; report: kept as conversion.json.

    Raises:
      InputError: the folder is taken. Nothing is written then.
    """
    require_empty(output)
    with atomic_dir(output) as folder:
        write_config(folder, configs.to_dict(config))
        write_data_spec(folder, data_spec)
        if save_assets is not None:
            save_assets(folder)
        write_checksums(folder)
        checkpoints = Checkpointer(folder)
        meta = {"params_only": True, SIDE_FILES: DIGESTS_FILE} | ({"converted": report["source"]} if report else {})
        checkpoints.save(step, {"params": params}, meta)
        checkpoints.close()
        if report is not None:
            (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def write_reference(model: Any, output: str | os.PathLike) -> dict[str, Any]:
    """Writes a model in the reference's text or image layout.

    Args:
      model: a `seqpe_jax.Model` of a run; output: a folder that does not exist or is empty.

    Returns:
      {"source", "step", "files", "encoding", "parameters", "mapped": {ours: theirs}}.

    Raises:
      InputError: a field that the reference has nothing like. Nothing is written then.
    """
    require_empty(output)
    config, kind, name = model.config, model.config.encoding.kind, model.folder or "the model"
    if model.model_spec.max_grid is not None:
        raise InputError(
            f"{name} is an export, which has no encoder of positions any more: give the --workdir of its run"
        )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocabulary=model.data_spec.vocabulary, classes=model.data_spec.classes),
    )
    spec = torch_config.spec_from_config(config, getattr(model.model_spec.encoding, "vector_width", 0))
    rules = weights.rules(config)
    state = weights.to_state(rules, jax.tree.map(np.asarray, model.params))
    if num_channels(state) != 3:
        raise InputError(f"{name} reads images of one channel: the reference's format knows three alone")
    if not config.is_image and kind in ("sinusoidal", "rotary", "alibi"):
        rows = config.encoding.max_position + (kind != "alibi")  # as many as the reference makes
        state[f"{weights.ENCODER}weight"] = fixed_table(config, model.model_spec, rows)
    kept = as_path(model.folder) / TOKENIZER_FILE if model.folder else None
    with atomic_dir(output) as folder:
        files = (torch_reference.write_images if config.is_image else torch_reference.write_text)(
            folder, spec, torch_config.training_settings(config), state
        )
        if kept is not None and kept.is_file():
            load_tokenizer(kept).save(folder)
        names = [str(file.relative_to(folder)) for file in files]
    return {
        "source": model.folder,
        "step": model.step,
        "files": names,
        "encoding": kind,
        "parameters": count(model.params),
        "mapped": {rule.ours: list(rule.theirs) for rule in rules},
    }


def num_channels(state: weights.State) -> int:
    """Returns the channels of the images that a state reads; 3 where it reads none."""
    kernel = state.get("patch_embed.proj.weight")
    return 3 if kernel is None else np.shape(kernel)[1]


def fixed_table(config: configs.Config, model_spec: ModelSpec, rows: int) -> np.ndarray:
    """Returns the first rows of the table that the reference stores for a fixed encoding on one axis.

    Sinusoidal: [rows, width]; rotary: sines, then cosines, [rows, head width]; ALiBi: slope times index, [rows, heads].
    """
    kind, encoding = config.encoding.kind, model_spec.encoding
    if getattr(encoding, "prefix", 0):  # its rows count the class token
        encoding = encoding.clone(prefix=0)
    signal = encoding.apply({}, jnp.arange(rows, dtype=jnp.int32)[None, :, None], shape=(rows,))
    if kind == "sinusoidal":
        return np.asarray(signal.input_embedding[0])
    if kind == "rotary":
        cos, sin = (np.asarray(part[0, :, 0]) for part in signal.rotation)
        return np.concatenate([sin, cos], axis=-1)
    query, key = (np.asarray(part[0], np.float64) for part in signal.logit_query_key)
    head_width = config.model.width // config.model.heads
    return (np.einsum("hf,lhf->lh", query[0], np.broadcast_to(key, (rows, *query.shape[1:]))) * head_width**0.5).astype(
        np.float32
    )
