"""A model written as a run folder, which train, evaluate and export take."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from seqpe_jax import config as configs
from seqpe_jax.checksums import DIGESTS_FILE, write_checksums
from seqpe_jax.files import atomic_dir, require_empty
from seqpe_jax.models.build import DataSpec, Params
from seqpe_jax.run_dir import CONVERSION_FILE, PARAMS_ONLY, SIDE_FILES_KEY, RunDir
from seqpe_jax.training.checkpoint import Checkpointer


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
    """Writes a model as a run: config.json, sizes.json, checkpoints/STEP, and its tokenizer or class names.

    Args:
      output: path of a folder that does not exist or is empty.
      config: config of the run.
      params: parameters of the model.
      data_spec: data spec of the data that the model was trained on.
      step: number of the checkpoint.
      save_assets: function that writes the tokenizer, or the names of the classes, into a folder.
      report: content of conversion.json; None = no such file.

    Raises:
      InputError: the folder is taken. Nothing is written then.
    """
    require_empty(output)
    with atomic_dir(output) as folder:
        RunDir(folder).write_config(configs.to_dict(config))
        RunDir(folder).write_data_spec(data_spec)
        if save_assets is not None:
            save_assets(folder)
        write_checksums(folder)
        checkpoints = Checkpointer(folder)
        meta = {PARAMS_ONLY: True, SIDE_FILES_KEY: DIGESTS_FILE} | ({"converted": report["source"]} if report else {})
        checkpoints.save(step, {"params": params}, meta)
        checkpoints.close()
        if report is not None:
            (folder / CONVERSION_FILE).write_text(json.dumps(report, indent=1) + "\n")
