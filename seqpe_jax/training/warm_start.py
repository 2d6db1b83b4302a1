"""A run that begins with the parameters of another: which may differ, and how they are read."""

import dataclasses
from typing import Any

import jax

from seqpe_jax import config
from seqpe_jax.config import Config, EncodingConfig, ModelConfig, digits_of
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path
from seqpe_jax.models import transformer
from seqpe_jax.tasks import Task
from seqpe_jax.training.checkpoint import Checkpointer, read_config

# What a run that begins with another's parameters may choose anew: nothing that the parameters were made for.
FREE_ENCODING = {
    "max_position",
    "digits",
    "dropout",
    "attention_dropout",
    "norm_init",
    "init_distribution",
    "init_std",
    "qk_init_std",
    "gate_bias_init",
    "fire_scale",
    "kerple_scale",  # of a fresh model
    "log_scaling",
    "yarn_beta_fast",
    "yarn_beta_slow",  # within the lengths of training these change nothing
}
FREE_MODEL = {
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "drop_path",
    "init_std",
    "remat",
    "attention_kind",
    "attention_block",
    "scan",
    "vocabulary",
    "classes",
}


def first_params(settings: Config, mesh: jax.sharding.Mesh, shapes: Any) -> Any:
    """Returns the parameters of the newest checkpoint of `init_from`, in the layout of `shapes`.

    Raises:
      InputError: no or a damaged checkpoint, or one of other sizes.
    """
    saved = Checkpointer(settings.init_from, create=False)
    model, scanned = settings.model, config.from_dict(read_config(settings.init_from)).model.scan
    if scanned == model.scan:
        params, _ = saved.restore_params(shapes)
    else:  # the same blocks, kept in the other way
        other, own = (
            (transformer.unstack_layers, transformer.stack_layers)
            if model.scan
            else (transformer.stack_layers, transformer.unstack_layers)
        )
        theirs = jax.eval_shape(lambda params: params | {"model": other(params["model"], model.layers)}, shapes)
        params, _ = saved.restore_params(layout.with_shardings(mesh, {"params": theirs})[0]["params"])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        params = jax.jit(
            lambda params: params | {"model": own(params["model"], model.layers)}, out_shardings=shardings
        )(params)
    saved.close()
    return params


def check_source(settings: Config, task: Task, checkpoint: str) -> None:
    """Refuses parameters that were made for something else.

    Raises:
      InputError: not a run, or one with another encoding, model, tokenizer or other classes; names what differs.
    """
    if not as_path(checkpoint).is_dir():
        raise InputError(
            f"no such directory: {checkpoint} (--init-from takes a --workdir of `train` or an output of `convert`)"
        )
    # With lengths written out, which would be others where the training length is another one.
    theirs, ours = (
        config.reset_unused(config.with_resolved_lengths(one))
        for one in (config.from_dict(read_config(checkpoint)), settings)
    )
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
    task.check_assets(checkpoint)


def _differences(section: str, theirs: EncodingConfig | ModelConfig, ours: Any, free: set[str]) -> list[str]:
    before, after = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    kept = before.keys() - free if section == "model" or theirs.kind == ours.kind else {"kind"}
    return config.difference({name: before[name] for name in kept}, {name: after[name] for name in kept}, f"{section}.")
