"""A run read back from its folder, or from its export: what evaluation, generation and export begin with."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from seqpe_jax import config
from seqpe_jax.build import Run, build
from seqpe_jax.build.text import with_kept_tokenizer
from seqpe_jax.config import Config
from seqpe_jax.errors import InputError
from seqpe_jax.interop import serving
from seqpe_jax.runtime import mesh as layout
from seqpe_jax.runtime.checkpoint import Checkpoints, read_config


def saved_config(checkpoint: str) -> Config:
    """Returns the config of the run of a folder, with its own tokenizer, for the devices of this machine.

    Raises:
      InputError: not a folder of a run or an export.
    """
    if not pathlib.Path(checkpoint).is_dir():
        raise InputError(
            f"no such directory: {checkpoint} (--checkpoint takes a --workdir of `train` or an --output of `export`)"
        )
    values = read_config(checkpoint)
    values.pop(serving.SECTION, None)
    settings = config.from_dict(values)
    return with_kept_tokenizer(dataclasses.replace(settings, mesh=config.MeshConfig()), checkpoint)


def export_section(checkpoint: str) -> dict[str, Any] | None:
    """Returns what the config.json of an export says of it, or None for a run's folder.

    Raises:
      InputError: it does not say which step and positions are served.
    """
    section = read_config(checkpoint).get(serving.SECTION)
    if section is not None and not (isinstance(section, dict) and {"step", "reach"} <= section.keys()):
        raise InputError(f"{checkpoint}/config.json: section '{serving.SECTION}' is damaged: export the run again")
    return section


def open_run(checkpoint: str, settings: Config, check: Callable[[Run], None] = lambda run: None) -> tuple[Run, Any, int]:
    """Returns (the linked parts, parameters, step) of a run's newest checkpoint, or of an export (see `Run.stored`).

    Args:
      settings: of `saved_config`; check: called before the parameters are read.

    Raises:
      InputError: no checkpoint, a damaged one, or what `check` raises.
    """
    exported = export_section(checkpoint)
    if exported is not None:
        run = build(settings).stored(tuple(exported["reach"]))
        check(run)
        expected = jax.eval_shape(run.objective.init, jax.random.PRNGKey(0))
        params = serving.read_params(checkpoint, expected)
        return run, jax.device_put(params, layout.replicated(run.mesh)), exported["step"]
    saved = Checkpoints(checkpoint, create=False)
    run = build(settings)
    check(run)
    params, step = saved.restore_params(run.shapes.params)
    saved.close()
    return run, params, step
