"""Warm start: a new run with the parameters of another checkpoint; loading them, and the fields that may differ."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from seqpe_jax import config as configs
from seqpe_jax.config import CompatConfig, Config, EncodingConfig, ModelConfig, SeqPEConfig
from seqpe_jax.distributed import sharding
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path
from seqpe_jax.models import transformer
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks import Task
from seqpe_jax.training.checkpoint import Checkpointer, check_together

# Fields that may differ from those of the checkpoint: parameters do not depend on them.
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
    "kernel_block_q",
    "kernel_block_k",
    "kernel_block_q_backward",
    "kernel_block_k_backward",
    "scan",
    "vocabulary",
    "classes",
}


def load_params(config: Config, mesh: jax.sharding.Mesh, abstract_params: Any) -> Any:
    """Returns the parameters of the newest checkpoint of `config.init_from`.

    Args:
      config: config of the new run.
      mesh: devices.
      abstract_params: shapes, dtypes and shardings of the parameters.

    Raises:
      InputError: the checkpoint is missing, damaged or of other sizes.
    """
    checkpointer = Checkpointer(config.init_from, create=False)
    check_together(checkpointer.run)
    model, source_scans = config.model, checkpointer.run.config.model.scan
    if source_scans == model.scan:
        params, _ = checkpointer.restore_params(abstract_params)
    else:  # convert between one array per layer and arrays stacked over layers
        to_source, from_source = transformer.unstack_layers, transformer.stack_layers
        if source_scans:
            to_source, from_source = from_source, to_source

        def convert(params: Any, change: Callable[[Any, int], Any]) -> Any:
            return params | {"model": change(params["model"], model.layers)}

        source_params = jax.eval_shape(lambda params: convert(params, to_source), abstract_params)
        params, _ = checkpointer.restore_params(
            sharding.abstract_state_with_shardings(mesh, {"params": source_params})[0]["params"]
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params)
        params = jax.jit(lambda params: convert(params, from_source), out_shardings=shardings)(params)
    checkpointer.close()
    return params


def check_source(config: Config, task: Task, checkpoint: str) -> None:
    """Checks that the parameters of a checkpoint fit a new run.

    Args:
      config: config of the new run.
      task: task of the new run.
      checkpoint: folder of a run or converted checkpoint.

    Raises:
      InputError: the folder is no run, or its encoding, model, tokenizer or classes differ; names the fields.
    """
    if not as_path(checkpoint).is_dir():
        raise InputError(
            f"no such directory: {checkpoint} (--init-from takes a --workdir of `train` or an output of `convert`)"
        )
    # With explicit lengths: their defaults depend on the training length, which may differ.
    theirs, ours = (
        configs.reset_unused(configs.with_resolved_lengths(one)) for one in (RunDir(checkpoint).config, config)
    )
    lines = _differences("encoding", theirs.encoding, ours.encoding, FREE_ENCODING)
    digits = [one.encoding.num_digits for one in (theirs, ours) if isinstance(one.encoding, SeqPEConfig)]
    if len(set(digits)) > 1:
        lines.append(f"encoding.digits: {digits[0]} -> {digits[1]}")
    lines += _differences("compat", theirs.compat, ours.compat, set())
    lines += _differences("model", theirs.model, ours.model, FREE_MODEL)
    if theirs.encoding.kind == ours.encoding.kind == "learned" and theirs.grid != ours.grid:
        lines.append(f"positions of the table: {theirs.grid} -> {ours.grid}")
    if len(theirs.grid) != len(ours.grid):
        lines.append(f"coordinates of a position: {len(theirs.grid)} -> {len(ours.grid)}")
    if lines:
        raise InputError(
            f"--init-from={checkpoint}: its parameters belong to another config; it differs in {'; '.join(lines)}. Set "
            "these fields to the values of the checkpoint"
        )
    if theirs.data.tokenizer == "bytes" != ours.data.tokenizer:
        raise InputError(
            f"--init-from={checkpoint} reads bytes, but data.tokenizer={ours.data.tokenizer}: set it to 'bytes'"
        )
    task.check_assets(checkpoint)


def _differences(
    section: str, theirs: EncodingConfig | CompatConfig | ModelConfig, ours: Any, free: set[str]
) -> list[str]:
    """Returns `section.field: theirs -> ours` for each field that differs, except the free ones."""
    theirs_dict, ours_dict = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    names = {"kind"} if section == "encoding" and theirs.kind != ours.kind else theirs_dict.keys() - free
    return configs.difference(
        {name: theirs_dict[name] for name in names}, {name: ours_dict[name] for name in names}, f"{section}."
    )
