"""Any folder with a model in it -> `Model`: a run, an export, the authors' PyTorch files, a Hugging Face GPT-2."""

import dataclasses
import functools
import os
import sys
from typing import Any

import jax

from seqpe_jax import config
from seqpe_jax.config import Config
from seqpe_jax.data.tokenizers import load_tokenizer
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, parse_json
from seqpe_jax.inference.exported import SECTION, read_params
from seqpe_jax.interop import torch_model, torch_reference
from seqpe_jax.model import Model
from seqpe_jax.models.build import DataSpec, ModelSpec, Params
from seqpe_jax.tasks.data_spec import read_data_spec
from seqpe_jax.tasks.image_classification import known_data_spec
from seqpe_jax.tasks.language_modeling import with_run_tokenizer
from seqpe_jax.training.best_checkpoint import best_step
from seqpe_jax.training.checkpoint import CHECKPOINTS_DIR, Checkpointer, latest_valid_step, read_config
from seqpe_jax.training.checksums import DIGESTS_FILE, checksum_error, clear_cache

EXPECTED = (
    "give a --workdir of `train`, an --output of `export` or `convert`, a folder or .pth file of the PyTorch reference, or "
    "a directory of a Hugging Face GPT-2"
)


def load(path: str | os.PathLike, which: str = "latest") -> Model:
    """Returns the model of a folder or file, its parameters read; no data are opened.

    Args:
      path: a workdir of `train`, an output of `export` or `convert`, a folder or .pth file of the PyTorch reference, or
        a directory of a Hugging Face GPT-2.
      which: checkpoint of a run, "latest" or "best" (`open_model`).

    Raises:
      InputError: none of these, no checkpoint yet, a file missing, damaged or refused, a field of a newer version.
    """
    if not as_path(path).exists():
        raise InputError(f"{path} does not exist: {EXPECTED}")
    model = (
        open_model(str(path), which) if is_run_or_export(path) else _model_of_source(torch_reference.read(str(path)))
    )
    _ = model.params
    return model


def _model_of_source(source: torch_reference.ForeignCheckpoint) -> Model:
    """The model of a checkpoint of others, with the tokenizer that lies beside it."""
    model = torch_model.from_checkpoint(source)
    if not source.tokenizer_files:
        return model
    data = dataclasses.replace(model.config.data, tokenizer=str(source.tokenizer_files[0].parent))
    return dataclasses.replace(model, config=dataclasses.replace(model.config, data=data))


def is_run_or_export(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of `train`, of `convert` or of `export`."""
    folder = as_path(path)
    if (folder / CHECKPOINTS_DIR).is_dir() or (folder / DIGESTS_FILE).is_file():
        return True
    try:
        values = parse_json((folder / "config.json").read_text())
    except (OSError, ValueError):  # not there, or of another kind: the reference's is YAML
        return False
    return isinstance(values, dict) and {"data", "model", "encoding"} <= values.keys()


def open_model(checkpoint: str, which: str = "latest") -> Model:
    """Returns the model of a run or an export, whose parameters are read when they are first asked for.

    Args:
      which: checkpoint of a run: "latest", the newest that is not damaged, or "best", by checkpoint.best of its config.

    Raises:
      InputError: neither of these; nothing is saved yet; there is no best checkpoint.
    """
    clear_cache()  # files may have changed since this process read them last
    settings = load_run_config(checkpoint)
    section, mesh = export_section(checkpoint), layout.make_mesh(0, 1)
    if section is not None:
        if which != "latest":
            raise InputError(f"{checkpoint} is an export, which holds one model: leave --which out")
        sizes = data_spec_of(settings, checkpoint)
        model_spec = ModelSpec.of(settings, sizes).with_precomputed_table(tuple(section["reach"]))
        read = functools.partial(_exported_params, checkpoint, model_spec, mesh)
        return Model(settings, model_spec, sizes, read, section["step"], str(checkpoint), mesh)
    saved = Checkpointer(checkpoint, create=False)
    step = saved.require_latest_step()
    saved.close()
    if which == "best":
        step, value = best_step(checkpoint, settings.checkpoint.best)
        print(f"{checkpoint}: step {step} is the best, {settings.checkpoint.best} {value:.6g}")
    else:
        for path, wrong in latest_valid_step(saved.folder)[1].items():
            print(f"checkpoint {path} is damaged ({wrong}): step {step} is read in its place", file=sys.stderr)
    sizes = data_spec_of(settings, checkpoint)
    model_spec = ModelSpec.of(settings, sizes)
    read = functools.partial(_saved_params, checkpoint, model_spec, mesh, step)
    return Model(settings, model_spec, sizes, read, step, str(checkpoint), mesh)


def load_run_config(checkpoint: str) -> Config:
    """Returns the config of the run of a folder, with its own tokenizer, for the devices of this machine.

    Raises:
      InputError: not a folder of a run or an export.
    """
    if not as_path(checkpoint).is_dir():
        raise InputError(
            f"no such directory: {checkpoint} (--checkpoint takes a --workdir of `train` or an --output of `export`)"
        )
    values = read_config(checkpoint)
    values.pop(SECTION, None)
    settings = config.from_dict(values)
    return with_run_tokenizer(dataclasses.replace(settings, mesh=config.MeshConfig()), checkpoint)


def export_section(checkpoint: str) -> dict[str, Any] | None:
    """Returns what the config.json of an export says of it, or None for a run's folder.

    Raises:
      InputError: it does not say which step and positions are served.
    """
    section = read_config(checkpoint).get(SECTION)
    if section is not None and not _tells_reach(section):
        raise InputError(f"{checkpoint}/config.json: section '{SECTION}' is damaged: export the run again")
    if section is not None and "digests" in section and not (as_path(checkpoint) / DIGESTS_FILE).is_file():
        raise InputError(f"{checkpoint}/{DIGESTS_FILE} is missing, which this export had: export the run again")
    return section


def _tells_reach(section: Any) -> bool:
    """Whether a section says which step is served, and how many positions along each axis."""
    if not isinstance(section, dict):
        return False
    step, max_grid = section.get("step"), section.get("reach")
    whole = isinstance(max_grid, list) and all(type(side) is int and 0 < side < 2**31 for side in max_grid)
    return type(step) is int and whole and bool(max_grid)


def data_spec_of(settings: Config, folder: str) -> DataSpec:
    """Returns what the model of a run took from its data, without opening them.

    Runs that are older than the file that keeps it have their tokenizer, or the names of their classes, beside them.

    Raises:
      InputError: the number of tokens or classes is not known.
    """
    if settings.is_image:
        sizes = known_data_spec(settings, folder)
        if not sizes.classes:
            raise InputError(f"{folder} does not say how many classes its model has: put back its classes.json")
        return sizes
    stored = read_data_spec(folder)
    if stored is not None:
        if not stored.vocabulary:
            raise InputError(f"{folder} does not say how many tokens its model has: put back its sizes.json")
        return stored
    if not settings.model.vocabulary and not settings.data.tokenizer:
        raise InputError(
            f"{folder} has no tokenizer and its config.json no model.vocabulary: put its tokenizer.json there"
        )
    return DataSpec(vocabulary=settings.model.vocabulary or load_tokenizer(settings.data.tokenizer).vocab_size)


def _saved_params(checkpoint: str, model_spec: ModelSpec, mesh: jax.sharding.Mesh, step: int) -> Params:
    """The parameters of a run's checkpoint, laid out on a mesh."""
    shapes, _ = layout.with_shardings(mesh, {"params": model_spec.shapes})
    saved = Checkpointer(checkpoint, create=False)
    params, _ = saved.restore_params(shapes["params"], step)
    saved.close()
    return params


def _exported_params(checkpoint: str, model_spec: ModelSpec, mesh: jax.sharding.Mesh) -> Params:
    """The parameters of an export, on every device of a mesh. Raises: InputError: the export is damaged."""
    wrong = checksum_error(as_path(checkpoint).absolute(), named=False)
    if wrong:
        raise InputError(f"{checkpoint} is damaged: {wrong}; export the run again")
    return jax.device_put(read_params(checkpoint, model_spec.shapes), layout.replicated(mesh))
