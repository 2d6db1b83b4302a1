"""Warm start: a new run that begins with the parameters of another model; what it takes of them, and what it draws anew.

Everything but the position encoding must fit. An encoding that differs is drawn anew, with what it adds to the blocks of the
model; learned tables are interpolated or cut to their new size, and the head of other classes is drawn anew.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax import config as configs
from seqpe_jax.config import Config, ModelConfig, RotaryConfig, SeqPEConfig
from seqpe_jax.data.tokenizers import BYTE_TOKENIZERS
from seqpe_jax.distributed import sharding
from seqpe_jax.encodings.absolute import resize_table
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path
from seqpe_jax.inference.compiled import CompiledModel
from seqpe_jax.models import transformer
from seqpe_jax.models.build import ModelSpec, Params
from seqpe_jax.tasks import Task
from seqpe_jax.training.checkpoint import check_shapes
from seqpe_jax.training.optimizer import is_of_encoding
from seqpe_jax.trees import flatten_dict

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
    "log_scaling",  # within the lengths of training it changes nothing
}
# Fields that add something next to the encoding's own parameters, which mean the same with and without.
PARTS = {"gate", "start_at_zero", "rotary_heads", "rotary_layers", "layers_with", "resize", *RotaryConfig.rope_fields()}
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
WINDOW = ("window", "window_layers")  # which tokens see which, without parameters of their own
TABLE = "encoding/table"  # of learned positions
HEAD = "model/head/"  # of an image's classes
GATE_PARAMS = "fading"  # parameters of a gate in each block


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """The model that a new run begins with, and what the run takes of its parameters.

    Attributes:
      config: config of the new run.
      source: the other model, a `seqpe_jax.Model`.
      targets: shapes, dtypes and shardings of the run's parameters.
      shapes: shape of each parameter of the source, by name, stacked over layers as the run's are.
      reused: names of the parameters that are taken as they are.
      resized: names of the tables that are interpolated or cut.
      changes: `field: old -> new` of the fields that change what the model computes: the encoding, and windows of attention.
    """

    config: Config
    source: Any
    targets: Params
    shapes: dict[str, tuple[int, ...]]
    reused: frozenset[str]
    resized: frozenset[str]
    changes: tuple[str, ...]

    def params(self, drawn: Params) -> Params:
        """Returns the parameters that the run begins with.

        Args:
          drawn: fresh parameters of the run, {"encoding": ..., "model": ...}, float32; they stay as they are where the source
            has none that fit.
        """
        stored = flatten_dict(self._in_layout(self.source.params))
        prefix = self.config.dims.prefix_tokens
        resize = functools.partial(_resized, old=self.source.config.grid, new=self.config.grid, prefix=prefix)

        def choose(path: Any, fresh: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name in self.reused:
                return jax.device_put(stored[name], target.sharding)
            if name in self.resized:
                return jax.jit(resize, out_shardings=target.sharding)(stored[name])
            return fresh

        return jax.tree_util.tree_map_with_path(choose, drawn, self.targets)

    def describe(self) -> str:
        """Returns one line on what is reused, drawn and dropped."""
        targets = {name: leaf.size for name, leaf in flatten_dict(self.targets).items()}
        stored = {name: int(np.prod(shape)) for name, shape in self.shapes.items()}
        reused = sum(targets[name] for name in self.reused)
        drawn = {name: size for name, size in targets.items() if name not in self.reused | self.resized}
        dropped = {name: size for name, size in stored.items() if name not in targets}
        parts = [f"keeps {'all ' * (len(self.reused) == len(stored))}{reused:,} parameters"]
        for verb, sizes in (("draws", drawn), ("drops", dropped)):
            if sizes:
                parts.append(f"{verb} {sum(sizes.values()):,} ({', '.join(_parts_of_model(sizes))})")
        if self.resized:
            old, new = (int(np.prod(one.grid)) for one in (self.source.config, self.config))
            verb = "cuts" if len(self.config.grid) == 1 and new < old else "interpolates"
            parts.append(f"{verb} the learned table from {old} to {new} positions")
        if self.replaces_head:
            old, new = (shapes[f"{HEAD}kernel"][-1] for shapes in (self.shapes, _shapes_of(self.targets)))
            parts.append(f"the head is drawn for {new} classes in place of {old}")
        begins = f"starting from {self.config.init_from}"
        if len(parts) == 1 and not self.changes:
            return begins
        return f"{begins}: {'; '.join([*parts, *self.changes])}"

    @property
    def replaces_head(self) -> bool:
        """True if the head of the source's classes is not taken."""
        return any(name.startswith(HEAD) and name not in self.reused for name in self.shapes)

    @property
    def losses_differ(self) -> bool:
        """True if the new run may begin with another loss than the source has, which can be compared."""
        return bool(self.changes or self.resized) and not self.replaces_head

    def losses(
        self, task: Task, batch: dict[str, Any], model_spec: ModelSpec, params: Params
    ) -> tuple[float, float] | None:
        """Returns the mean loss in nats of a batch under the source and under the new run's parameters.

        Args:
          task: task of the run.
          batch: a training batch, laid out over the mesh.
          model_spec: model of the run.
          params: parameters of the run.

        Returns:
          (loss of the source, loss of the run); None if the source does not reach the positions of a training example.
        """
        grid, source = self.config.grid, self.source
        reach = source.model_spec.max_grid
        if reach is not None and any(side > most for side, most in zip(grid, reach, strict=True)):
            return None
        if isinstance(source.config.encoding, SeqPEConfig) and max(grid) > source.config.encoding.max_position:
            return None
        inputs = {name: batch[name] for name in ("tokens", "images", "labels") if name in batch}
        weights = np.asarray(batch["weights"]) if "weights" in batch else None
        found = []
        for spec, own in ((source.model_spec, source.params), (model_spec, params)):
            compiled = CompiledModel(spec, source.mesh)
            signal = compiled.signal(own, grid)
            losses = np.asarray(compiled.eval_step(task.task_loss)(own, signal, inputs)["loss"])
            found.append(float(np.average(losses, weights=weights)))
        return found[0], found[1]

    def _in_layout(self, params: Params) -> Params:
        """The source's parameters, one array per layer or stacked over layers as the run has them."""
        convert = _layout_change(self.source.config.model, self.config.model)
        if convert is None:
            return params
        shapes = jax.eval_shape(convert, params)
        targets = sharding.abstract_state_with_shardings(self.source.mesh, {"params": shapes})[0]["params"]
        return jax.jit(convert, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, targets))(params)


def open_source(config: Config, targets: Params, new_classes: bool = False) -> WarmStart:
    """Opens the model of `config.init_from`, whose parameters are read later, and finds what a new run takes of them.

    Args:
      config: config of the new run.
      targets: shapes, dtypes and shardings of its parameters.
      new_classes: its classes are others than the model's, even if equally many (`Task.new_classes`).

    Raises:
      InputError: the folder holds no model, it is damaged, or parameters other than the encoding's have other sizes.
    """
    mesh = {
        field.name: getattr(config.mesh, field.name)
        for field in dataclasses.fields(config.mesh)
        if field.name in configs.model_mesh_fields() and getattr(config.mesh, field.name) != field.default
    }
    # It lies above this package: it opens folders of every kind, also those of other programs.
    loading = importlib.import_module("seqpe_jax.loading")
    ignored = () if loading.is_run_or_export(config.init_from) else config.ignore_fields
    source = loading.open_folder(config.init_from, mesh=mesh, ignore_fields=ignored)
    shapes = source.model_spec.shapes
    convert = _layout_change(source.config.model, config.model)
    stored = _shapes_of(shapes if convert is None else jax.eval_shape(convert, shapes))
    wanted = _shapes_of(targets)
    theirs, ours = _comparable(source.config), _comparable(config)
    keeps_encoding, changes = _encoding_changes(theirs, ours)
    both_learned = theirs.encoding.kind == ours.encoding.kind == "learned" and len(theirs.grid) == len(ours.grid)
    reused, resized, fixed = set(), set(), {}
    for name, shape in wanted.items():
        same = stored.get(name) == shape
        if not is_of_encoding(name):
            if not name.startswith(HEAD):
                fixed[name] = shape
            if same and not (new_classes and name.startswith(HEAD)):
                reused.add(name)
            continue
        meant = theirs.encoding.gate == ours.encoding.gate if GATE_PARAMS in name else keeps_encoding
        if name == TABLE and both_learned:
            (reused if theirs.grid == ours.grid else resized).add(name)
        elif same and meant:
            reused.add(name)
    check_shapes(as_path(config.init_from), stored, fixed)
    changes += _window_changes(theirs.model, ours.model)
    return WarmStart(config, source, targets, stored, frozenset(reused), frozenset(resized), tuple(changes))


def check_source(config: Config, task: Task, checkpoint: str) -> None:
    """Checks that the parameters of a model, other than its encoding's, fit a new run.

    Args:
      config: config of the new run.
      task: task of the new run.
      checkpoint: folder of a run, an export, or a converted or other program's checkpoint.

    Raises:
      InputError: the folder holds no model, or its model, tokenizer or classes differ; names the fields.
    """
    if not as_path(checkpoint).exists():
        raise InputError(
            f"no such directory: {checkpoint} (--init-from takes a --workdir of `train`, an output of `convert` or `export`, "
            "or another program's checkpoint)"
        )
    loading = importlib.import_module("seqpe_jax.loading")
    ignored = () if loading.is_run_or_export(checkpoint) else config.ignore_fields
    stored = loading.folder_config(checkpoint, ignored)
    theirs, ours = _comparable(stored), _comparable(config)
    lines = _differing("model", _model_values(theirs.model), _model_values(ours.model))
    if len(theirs.grid) != len(ours.grid):
        lines.append(f"coordinates of a position: {len(theirs.grid)} -> {len(ours.grid)}")
    if lines:
        raise InputError(
            f"--init-from={checkpoint}: its parameters belong to another model; it differs in {'; '.join(lines)}. Set "
            f"these fields to the values of the checkpoint, or take its config: --config={checkpoint}"
        )
    if theirs.data.tokenizer in BYTE_TOKENIZERS and ours.data.tokenizer not in BYTE_TOKENIZERS:
        raise InputError(
            f"--init-from={checkpoint} reads bytes, but data.tokenizer={ours.data.tokenizer}: set it to 'bytes'"
        )
    task.check_assets(checkpoint)


def _comparable(config: Config) -> Config:
    """A config with explicit lengths (their defaults depend on the training length), and without values that nothing reads."""
    return configs.reset_unused(configs.with_resolved_lengths(config))


def _encoding_changes(theirs: Config, ours: Config) -> tuple[bool, list[str]]:
    """Returns whether the parameters of the encoding mean the same, and `field: theirs -> ours` of what differs."""
    fields, other_fields = (dataclasses.asdict(one.encoding) for one in (theirs, ours))
    if theirs.encoding.kind != ours.encoding.kind:
        fields, other_fields = ({name: one[name] for name in ("kind",)} for one in (fields, other_fields))
    lines = _differing("encoding", _without(fields, FREE_ENCODING), _without(other_fields, FREE_ENCODING))
    keeps = {line.partition(":")[0].removeprefix("encoding.") for line in lines} <= PARTS
    if theirs.encoding.kind != ours.encoding.kind and theirs.encoding.gate != ours.encoding.gate:
        lines.append(f"encoding.gate: {theirs.encoding.gate} -> {ours.encoding.gate}")
    digits = [one.encoding.num_digits for one in (theirs, ours) if isinstance(one.encoding, SeqPEConfig)]
    compat = _differing("compat", *(dataclasses.asdict(one.compat) for one in (theirs, ours)))
    if len(set(digits)) > 1:
        lines.append(f"encoding.digits: {digits[0]} -> {digits[1]}")
    return keeps and not compat and len(set(digits)) < 2, lines + compat


def _window_changes(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Returns `model.field: theirs -> ours` of the windows of attention, which have no parameters."""
    windows = ({name: getattr(model.parts, name) for name in WINDOW} for model in (theirs, ours))
    return _differing("model", *windows)


def _model_values(model: ModelConfig) -> dict[str, Any]:
    """The values on which the meaning of a model's parameters depends; a kind is no more than the parts it stands for."""
    parts = dataclasses.asdict(model.parts)
    network = {"kind": model.kind if model.kind == "vit" else "decoder"}
    return _without(dataclasses.asdict(model) | parts | network, FREE_MODEL.union(WINDOW))


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _differing(section: str, theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Returns `section.field: theirs -> ours` for each field that differs."""
    return configs.difference(theirs, ours, f"{section}.")


def _layout_change(theirs: ModelConfig, ours: ModelConfig) -> Callable[[Params], Params] | None:
    """Returns what converts between one array per layer and arrays stacked over layers; None where both have the same."""
    if theirs.scan == ours.scan:
        return None
    change = transformer.stack_layers if ours.scan else transformer.unstack_layers
    return lambda params: params | {"model": change(params["model"], ours.layers)}


def _resized(table: jax.Array, old: tuple[int, ...], new: tuple[int, ...], prefix: int) -> jax.Array:
    """Returns a learned table float32[prefix + P, D] of a grid of another size, as `encodings.absolute.Learned` reads it."""
    first, entries = table[:prefix], table[prefix:].reshape(*old, -1)
    if len(new) == 1 and new < old:
        entries = entries[: new[0]]
    else:
        entries = resize_table(entries, new, "linear" if len(new) == 1 else "cubic")
    return jnp.concatenate([first, entries.reshape(-1, table.shape[-1])])


def _shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flatten_dict(params).items()}


def _parts_of_model(names: Iterable[str]) -> list[str]:
    """Returns the modules that parameters belong to, such as "encoding/encoder" and "model/blocks/mlp_in", each once."""
    found = []
    for name in names:
        parts = re.sub(r"blocks_\d+|blocks/layers", "blocks", name).split("/")
        found.append("/".join(parts[: 3 if parts[1] == "blocks" else 2]))
    return list(dict.fromkeys(found))
