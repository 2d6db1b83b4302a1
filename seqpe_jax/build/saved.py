"""A run read back from its folder: what evaluation, generation and export begin with."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from seqpe_jax import config
from seqpe_jax.build import Run, build
from seqpe_jax.build.text import with_kept_tokenizer
from seqpe_jax.config import Config
from seqpe_jax.errors import InputError
from seqpe_jax.runtime.checkpoint import Checkpoints, read_config


def saved_config(checkpoint: str) -> Config:
    """Returns the config of a run's folder, with its own tokenizer, for the devices of this machine.

    Raises:
      InputError: not a folder of a run.
    """
    if not pathlib.Path(checkpoint).is_dir():
        raise InputError(f"no such directory: {checkpoint} (--checkpoint takes a --workdir of `train`)")
    settings = config.from_dict(read_config(checkpoint))
    return with_kept_tokenizer(dataclasses.replace(settings, mesh=config.MeshConfig()), checkpoint)


def open_run(checkpoint: str, settings: Config, check: Callable[[Run], None] = lambda run: None) -> tuple[Run, Any, int]:
    """Returns (the linked parts, parameters, step) of a run's newest checkpoint.

    Args:
      settings: of `saved_config`; check: called before the parameters are read.

    Raises:
      InputError: no checkpoint, a damaged one, or what `check` raises.
    """
    saved = Checkpoints(checkpoint, create=False)
    run = build(settings)
    check(run)
    params, step = saved.restore_params(run.shapes.params)
    saved.close()
    return run, params, step
