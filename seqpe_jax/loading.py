"""`load`: opens a run, an export, a checkpoint of the PyTorch reference or a folder of Hugging Face as a `Model`.

It is not part of `model`, since the modules of `interop` that read the last two import `Model`.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from seqpe_jax import config
from seqpe_jax.checksums import checksum_error
from seqpe_jax.config import Config
from seqpe_jax.data.tokenizers import load_tokenizer
from seqpe_jax.distributed import sharding
from seqpe_jax.distributed.hardware import find_chip
from seqpe_jax.errors import InputError, look_again
from seqpe_jax.inference.export import read_params
from seqpe_jax.interop import torch_model, torch_reference
from seqpe_jax.model import Model
from seqpe_jax.models.build import DataSpec, ModelSpec, Params
from seqpe_jax.run_dir import LOOKS, PARAMS_ONLY, RunDir
from seqpe_jax.tasks.image_classification import known_data_spec
from seqpe_jax.tasks.language_modeling import with_run_tokenizer
from seqpe_jax.training import optimizer as optimizers
from seqpe_jax.training.checkpoint import Checkpointer, check_together

EXPECTED = (
    "give a --workdir of `train`, an --output of `export` or `convert`, a folder or .pth file of the PyTorch reference, or "
    "a directory of a Hugging Face decoder or vision transformer"
)


def load(
    path: str | os.PathLike,
    which: str = "latest",
    mesh: Mapping[str, Any] | None = None,
    ignore_fields: Collection[str] = (),
    weights: str = "",
) -> Model:
    """Returns the model of a folder or file, with its parameters; opens no data set.

        model = seqpe_jax.load("runs/large", mesh={"fsdp": 8})

    Args:
      path: a workdir of `train`, an output of `export` or `convert`, a folder or .pth file of the PyTorch reference, or
        a directory of a Hugging Face decoder (`interop.hf_families.FAMILIES`) or of a vision transformer
        (`interop.hf_images`).
      which: checkpoint of a run, "latest" or "best" (`open_model`).
      mesh: fields of the config's mesh section (`open_model`).
      ignore_fields: fields of a Hugging Face folder's config.json that are passed over although they are unknown here.
      weights: of a run, "trained" or "averaged" (`open_model`).

    Raises:
      InputError: none of these, no checkpoint yet, a file missing, damaged or refused, a field of a newer version, weights that
        the run does not have, or a mesh that does not fit the devices or the model.
    """

    def read() -> Model:
        model = open_folder(path, which, mesh, ignore_fields, weights)
        _ = model.params
        return model

    return look_again(read, LOOKS)


def open_folder(
    path: RunDir | str | os.PathLike,
    which: str = "latest",
    mesh: Mapping[str, Any] | None = None,
    ignore_fields: Collection[str] = (),
    weights: str = "",
) -> Model:
    """Returns the model of any folder or file that `load` takes; parameters, but of images, are read at their first use.

    Args:
      path: as `load`.
      which: as `load`.
      mesh: as `load`.
      ignore_fields: as `load`.
      weights: as `load`.

    Raises:
      InputError: as `load`.
    """
    run = _existing(path, ignore_fields)
    if run.is_model():
        return open_model(run, which, mesh, weights)
    if which != "latest" or weights:
        raise InputError(f"{run} is no run, and holds one model: leave --{'weights' if weights else 'which'} out")
    return dataclasses.replace(_on_mesh(_foreign_model(str(run), ignore_fields), mesh), source=str(run))


def folder_config(path: RunDir | str | os.PathLike, ignore_fields: Collection[str] = ()) -> Config:
    """Returns the config of any folder or file that `load` takes, with the tokenizer of the folder and the default mesh.

    Raises:
      InputError: as `load`.
    """
    run = _existing(path, ignore_fields)
    return load_run_config(run) if run.is_model() else _foreign_model(str(run), ignore_fields).config


def _existing(path: RunDir | str | os.PathLike, ignore_fields: Collection[str]) -> RunDir:
    """A folder or file that exists. Raises: InputError: there is none, or fields are ignored of a run."""
    run = RunDir.of(path)
    if not run.path.exists():
        raise InputError(f"{run} does not exist: {EXPECTED}")
    if ignore_fields and run.is_model():
        raise InputError(f"--ignore-fields is for the config.json of Hugging Face, and {run} is a run: leave it out")
    return run


def _foreign_model(path: str, ignore_fields: Collection[str] = ()) -> Model:
    """The model of another program's checkpoint, with the tokenizer of its folder."""
    source = torch_reference.read(path, ignore_fields)
    model = torch_model.from_checkpoint(source)
    if not source.tokenizer_files:
        return model
    data = dataclasses.replace(model.config.data, tokenizer=str(source.tokenizer_files[0].parent))
    return dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))


def _on_mesh(model: Model, mesh_values: Mapping[str, Any] | None) -> Model:
    """A model whose parameters are laid out over a mesh when they are read."""
    settings, mesh = _mesh_of(model.config, mesh_values)
    targets = _params_on_mesh(model.model_spec, mesh)
    stored = model.load_params
    return dataclasses.replace(
        model, config=settings, mesh=mesh, load_params=lambda: jax.tree.map(_put, stored(), targets)
    )


def is_run_or_export(path: str | os.PathLike) -> bool:
    """Returns True for a folder of `train`, `convert` or `export`."""
    return RunDir(path).is_model()


def open_model(
    checkpoint: RunDir | str | os.PathLike,
    which: str = "latest",
    mesh: Mapping[str, Any] | None = None,
    weights: str = "",
) -> Model:
    """Returns the model of a run or an export, whose parameters are read at their first use.

    Args:
      checkpoint: folder of a run or an export.
      which: checkpoint of a run: "latest", the newest that is not damaged, or "best", by checkpoint.best of its config.
      mesh: fields of the config's mesh section, such as {"fsdp": 8}, over which each parameter is split; by default every
        device has all parameters.
      weights: of a run: "trained", its parameters; "averaged", their average (`optimizer.ema`, or schedule-free AdamW); "", the
        average of schedule-free AdamW, and the parameters of all others.

    Raises:
      InputError: neither of these; nothing is saved yet; there is no best checkpoint, or no average; the mesh does not fit the
        devices or the model, or the parameters do not fit into the memory of a device.
    """
    run = RunDir.of(checkpoint)
    settings, devices = _mesh_of(load_run_config(run), mesh)
    section = run.export_section
    if section is not None:
        if which != "latest":
            raise InputError(f"{run} is an export, which holds one model: leave --which out")
        if weights:
            raise InputError(f"{run} is an export, which holds one model: leave --weights out")
        data_spec = data_spec_of(settings, run)
        model_spec = ModelSpec.of(settings, data_spec).with_precomputed_table(tuple(section["reach"]))
        load_params = functools.partial(_exported_params, run, _params_on_mesh(model_spec, devices))
        return Model(settings, model_spec, data_spec, load_params, section["step"], str(run), devices)
    check_together(run, every=which == "best")
    step = run.require_latest_step()
    if which == "best":
        step, value = run.best_step(settings.checkpoint.best)
        print(f"{run}: step {step} is the best, {settings.checkpoint.best} {value:.6g}")
    else:
        for path, error in run.latest_valid_step()[1].items():
            print(f"checkpoint {path} is damaged ({error}): step {step} is read in its place", file=sys.stderr)
    data_spec = data_spec_of(settings, run)
    model_spec = ModelSpec.of(settings, data_spec)
    average = _average_of(run, settings, weights, step)
    load_params = functools.partial(_saved_params, run, _params_on_mesh(model_spec, devices), step, average)
    averaged = average is not None
    return Model(settings, model_spec, data_spec, load_params, step, str(run), devices, averaged=averaged)


def _mesh_of(settings: Config, values: Mapping[str, Any] | None) -> tuple[Config, jax.sharding.Mesh]:
    """The config with a mesh of these sizes, and the mesh. Raises: InputError: it does not fit the devices or the model."""
    settings = config.mesh_from_values(settings, values or {})
    sizes = settings.mesh
    return settings, sharding.make_mesh(sizes.data, sizes.fsdp, sizes.context, sizes.tensor, slices=sizes.slices)


def _params_on_mesh(model_spec: ModelSpec, mesh: jax.sharding.Mesh) -> Params:
    """Shapes, dtypes and shardings of the parameters. Raises: InputError: they do not fit into a device's memory."""
    params = sharding.abstract_state_with_shardings(mesh, {"params": model_spec.shapes})[0]["params"]
    chip = find_chip(mesh.devices.flat[0].device_kind)
    size = sharding.device_bytes(params)
    if chip is not None and size > chip.memory:
        raise InputError(
            f"the parameters take {size / 2**30:,.1f} GiB of each device, and a {chip.name} has {chip.memory / 2**30:,.0f}: "
            f"split them over more of the {mesh.size} devices with --config.mesh.fsdp or --config.mesh.tensor (Python: "
            "mesh={'fsdp': 8})"
        )
    return params


def _put(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """An array on the devices of a target's sharding, each of which gets its shard alone."""
    return jax.make_array_from_callback(target.shape, target.sharding, lambda index: np.asarray(array[index]))


def load_run_config(checkpoint: RunDir | str | os.PathLike) -> Config:
    """Returns the config of a run or an export, with the tokenizer of its folder and the default mesh.

    Raises:
      InputError: not a folder of a run or an export.
    """
    run = RunDir.of(checkpoint)
    if not run.path.is_dir():
        raise InputError(
            f"no such directory: {run} (--checkpoint takes a --workdir of `train` or an --output of `export`)"
        )
    return with_run_tokenizer(dataclasses.replace(run.config, mesh=config.MeshConfig()), run.path)


def data_spec_of(settings: Config, checkpoint: RunDir | str | os.PathLike) -> DataSpec:
    """Returns the vocabulary or classes, channels and pixel statistics of a run's model, without opening its data.

    Older runs have no file of them; there the tokenizer or the class names in the folder give the numbers.

    Raises:
      InputError: the number of tokens or classes is not known.
    """
    run = RunDir.of(checkpoint)
    if settings.is_image:
        data_spec = known_data_spec(settings, run)
        if not data_spec.classes:
            raise InputError(f"{run} does not say how many classes its model has: put back its classes.json")
        return data_spec
    stored = run.data_spec
    if stored is not None:
        if not stored.vocabulary:
            raise InputError(f"{run} does not say how many tokens its model has: put back its sizes.json")
        return stored
    if not settings.model.vocabulary and not settings.data.tokenizer:
        raise InputError(
            f"{run} has no tokenizer and its config.json no model.vocabulary: put its tokenizer.json there"
        )
    return DataSpec(vocabulary=settings.model.vocabulary or load_tokenizer(settings.data.tokenizer).vocab_size)


def _average_of(run: RunDir, settings: Config, weights: str, step: int) -> Any:
    """The `optimizer` section of a run whose average is to be read, or None. Raises: InputError: there is no average."""
    optimizer = settings.optimizer
    if weights not in ("", "trained", "averaged"):
        raise InputError(f"weights must be 'trained' or 'averaged', got '{weights}'")
    if weights == "averaged" and not optimizers.has_average(optimizer):
        raise InputError(
            f"{run} has no average of its parameters: train with --config.optimizer.ema=0.999, or leave --weights out"
        )
    if not weights and optimizers.evaluates_average(optimizer):
        checkpointer = Checkpointer(run, create=False)
        weights = "trained" if checkpointer.meta(step).get(PARAMS_ONLY) else "averaged"
        checkpointer.close()
    return optimizer if weights == "averaged" else None


def _saved_params(run: RunDir, targets: Params, step: int, average: Any = None) -> Params:
    """The parameters of a run's checkpoint; targets: their shapes, dtypes and shardings; average: see `_average_of`."""
    checkpointer = Checkpointer(run, create=False)
    params, _ = checkpointer.restore_params(targets, step, average)
    checkpointer.close()
    return params


def _exported_params(run: RunDir, targets: Params) -> Params:
    """The parameters of an export; targets: as in `_saved_params`. Raises: InputError: the export is damaged."""
    error = checksum_error(run.path.absolute(), check_name=False)
    if error:
        raise InputError(f"{run} is damaged: {error}; export the run again")
    return read_params(run.path, targets, _put)
