"""A run read back from its folder, or from its export: what evaluation, generation and export begin with."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from seqpe_jax import config, serving
from seqpe_jax.build import Run, build
from seqpe_jax.build.text import with_kept_tokenizer
from seqpe_jax.config import Config, EncodingConfig, ModelConfig, digits_of
from seqpe_jax.errors import InputError
from seqpe_jax.models import blocks
from seqpe_jax.runtime import mesh as layout
from seqpe_jax.runtime.checkpoint import Checkpoints, read_config
from seqpe_jax.training.state import TrainState


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


# What a run that begins with another's parameters may choose anew: nothing that the parameters were made for.
FREE_ENCODING = {
    "max_position", "digits", "dropout", "attention_dropout", "norm_init", "init_distribution", "init_std", "qk_init_std",
    "log_scaling",  # within the lengths of training it changes nothing
}  # fmt: skip
FREE_MODEL = {
    "dropout", "attention_dropout", "embedding_dropout", "drop_path", "init_std", "remat", "attention_kind",
    "attention_block", "scan", "vocabulary", "classes",
}  # fmt: skip


def first_state(run: Run) -> TrainState:
    """Returns a run's state at step 0: fresh parameters, or those of the newest checkpoint of `init_from`.

    Raises:
      InputError: no or a damaged checkpoint, or one of other sizes.
    """
    state = run.init_state()
    if not run.config.init_from:
        return state
    saved = Checkpoints(run.config.init_from, create=False)
    model, scanned = run.config.model, config.from_dict(read_config(run.config.init_from)).model.scan
    if scanned == model.scan:
        params, _ = saved.restore_params(run.shapes.params)
    else:  # the same blocks, kept in the other way
        other = blocks.unstack if model.scan else blocks.stack
        shapes = jax.eval_shape(lambda params: params | {"model": other(params["model"], model.layers)}, run.shapes.params)
        params, _ = saved.restore_params(layout.with_shardings(run.mesh, {"params": shapes})[0]["params"])
        own = blocks.stack if model.scan else blocks.unstack
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.shapes.params)
        params = jax.jit(lambda params: params | {"model": own(params["model"], model.layers)}, out_shardings=shardings)(
            params
        )
    saved.close()
    return state.replace(params=params)


def check_source(run: Run, checkpoint: str) -> None:
    """Refuses parameters that were made for something else.

    Raises:
      InputError: not a run, or one with another encoding, model, tokenizer or other classes; names what differs.
    """
    if not pathlib.Path(checkpoint).is_dir():
        raise InputError(
            f"no such directory: {checkpoint} (--init-from takes a --workdir of `train` or an output of `convert`)"
        )
    theirs, ours = config.as_read(config.from_dict(read_config(checkpoint))), config.as_read(run.config)
    lines = _differences("encoding", theirs.encoding, ours.encoding, FREE_ENCODING)
    if theirs.encoding.kind == ours.encoding.kind == "seqpe" and digits_of(theirs.encoding) != digits_of(ours.encoding):
        lines.append(f"encoding.digits: {digits_of(theirs.encoding)} -> {digits_of(ours.encoding)}")
    lines += _differences("model", theirs.model, ours.model, FREE_MODEL)
    if theirs.encoding.kind == ours.encoding.kind == "learned" and theirs.grid != ours.grid:
        lines.append(f"positions of the table: {theirs.grid} -> {ours.grid}")
    if len(theirs.grid) != len(ours.grid):
        lines.append(f"coordinates of a position: {len(theirs.grid)} -> {len(ours.grid)}")
    if lines:
        raise InputError(
            f"--init-from={checkpoint}: its parameters were made for another config; it differs in {'; '.join(lines)}. Set "
            "these fields as they are there"
        )
    if theirs.data.tokenizer == "bytes" != ours.data.tokenizer:
        raise InputError(
            f"--init-from={checkpoint} reads bytes, but data.tokenizer={ours.data.tokenizer}: set it to 'bytes'"
        )
    run.data.check_kept(checkpoint)


def _differences(section: str, theirs: EncodingConfig | ModelConfig, ours: Any, free: set[str]) -> list[str]:
    before, after = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    kept = before.keys() - free if section == "model" or theirs.kind == ours.kind else {"kind"}
    return config.difference({name: before[name] for name in kept}, {name: after[name] for name in kept}, f"{section}.")


def open_run(checkpoint: str, settings: Config, check: Callable[[Run], None] = lambda run: None) -> tuple[Run, Any, int]:
    """Returns (the linked parts, parameters, step) of a run's newest checkpoint, or of an export (see `Run.stored`).

    Args:
      settings: of `saved_config`; check: called before the parameters are read.

    Raises:
      InputError: no checkpoint, a damaged one, or what `check` raises.
    """
    exported = export_section(checkpoint)
    if exported is not None:
        run = build(settings, kept=checkpoint).stored(tuple(exported["reach"]))
        check(run)
        expected = jax.eval_shape(run.objective.init, jax.random.PRNGKey(0))
        params = serving.read_params(checkpoint, expected)
        return run, jax.device_put(params, layout.replicated(run.mesh)), exported["step"]
    saved = Checkpoints(checkpoint, create=False)
    run = build(settings, kept=checkpoint)
    check(run)
    params, step = saved.restore_params(run.shapes.params)
    saved.close()
    return run, params, step
