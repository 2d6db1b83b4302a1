"""Checkpoints of a run, saved in the background by Orbax under WORKDIR/checkpoints."""

import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.args import Composite, JsonRestore, JsonSave, StandardRestore, StandardSave

from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.files import write_whole
from seqpe_jax.trees import named

FOLDER = "checkpoints"


class Checkpoints:
    """The saved states of one run; the newest `keep` are kept."""

    def __init__(self, workdir: str | pathlib.Path, *, keep: int = 1, create: bool = True):
        self.folder = (pathlib.Path(workdir) / FOLDER).absolute()
        check_utf8_name(self.folder.parent, "a folder with checkpoints (--workdir)")
        if not create and not self.folder.is_dir():
            raise InputError(f"no checkpoints in {workdir}: expected a folder '{FOLDER}' as `train --workdir` writes it")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the newest saved step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begins to save a state; it is safe to donate the state's buffers right after."""
        if step != self.latest():
            self._manager.save(step, args=Composite(state=StandardSave(state), meta=JsonSave(meta)))

    def restore(self, state: Any, step: int | None = None) -> Any:
        """Returns a saved state in the layout of `state`, a tree of ShapeDtypeStructs with shardings.

        Raises:
          InputError: there is no checkpoint, or it is damaged or of another model.
        """
        step = self.newest() if step is None else step
        try:
            return self._manager.restore(step, args=Composite(state=StandardRestore(state))).state
        except Exception as error:  # Orbax raises many kinds for a damaged or foreign checkpoint
            raise self._unreadable(step, error) from error

    def restore_params(self, params: Any, step: int | None = None) -> tuple[Any, int]:
        """Returns (params, step) of a saved state, without reading its optimiser state.

        Args:
          params: tree of ShapeDtypeStructs with shardings.

        Raises:
          InputError: there is no checkpoint, it is damaged, or of a model of other sizes.
        """
        step = self.newest() if step is None else step
        path = self.folder / str(step) / "state"
        targets = {"params": params}
        arguments = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), targets
        )
        try:
            stored = ocp.PyTreeCheckpointHandler().metadata(path).tree["params"]
        except Exception as error:  # as above
            raise self._unreadable(step, error) from error
        _check_shapes(path.parent, _shapes(stored), _shapes(params))
        try:
            with ocp.PyTreeCheckpointer() as reader:
                request = ocp.args.PyTreeRestore(item=targets, restore_args=arguments, partial_restore=True)
                return reader.restore(path, args=request)["params"], step
        except Exception as error:  # as above
            raise self._unreadable(step, error) from error

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Returns what was saved beside the state."""
        step = self.newest() if step is None else step
        try:
            return self._manager.restore(step, args=Composite(meta=JsonRestore())).meta
        except Exception as error:  # as above
            raise self._unreadable(step, error) from error

    def close(self) -> None:
        """Waits for saves under way, then lets go."""
        self._manager.wait_until_finished()
        self._manager.close()

    def newest(self) -> int:
        """Returns the newest saved step. Raises: InputError: nothing is saved yet."""
        step = self.latest()
        if step is None:
            raise InputError(f"no finished checkpoint in {self.folder}: train until the first save (checkpoint.every)")
        return step

    def _unreadable(self, step: int, error: Exception) -> InputError:
        first = " ".join(str(error).split())[:300]
        return InputError(
            f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: {first}): it is damaged or of "
            "another model; delete that folder to fall back on an older one"
        )


def saved_step(workdir: str | pathlib.Path) -> int | None:
    """Returns the newest finished step of a run's folder, or None; creates nothing."""
    folder = (pathlib.Path(workdir) / FOLDER).absolute()
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as manager:
        return manager.latest_step()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named(tree).items()}


# Parameters with a row, or column, for each token or class: (their dimension, the field that sets it, what it counts).
COUNTED = {
    "model/token_embedding/embedding": (0, "model.vocabulary", "tokens"),
    "model/head/kernel": (1, "model.classes", "classes"),
}


def _check_shapes(checkpoint: pathlib.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, (dimension, field, unit) in COUNTED.items():
        theirs, ours = stored.get(name), wanted.get(name)
        if theirs and ours and theirs[dimension] != ours[dimension]:
            cure = f"set --config.{field}={theirs[dimension]}, or " if theirs[dimension] > ours[dimension] else ""
            raise InputError(
                f"the model of checkpoint {checkpoint} has {theirs[dimension]} {unit}, and this one {ours[dimension]} "
                f"({field}, else what the data have): {cure}give it the data or the tokenizer that it was trained with"
            )
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            raise InputError(
                f"checkpoint {checkpoint} is of another model: its {name} has shape {stored.get(name)}, but config.json "
                f"and the tokenizer, or the classes of images, ask for {shape}: put back what the run was trained with"
            )


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """Returns the config stored beside a run's checkpoints, as nested dicts.

    Raises:
      InputError: the directory is not a run.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir} is not a run: no config.json there; give a --workdir of `train`")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def write_config(workdir: str | pathlib.Path, config: dict[str, Any]) -> None:
    """Writes config.json, whole or not at all; leaves it alone when nothing changes."""
    write_whole(pathlib.Path(workdir) / "config.json", json.dumps(config, indent=2) + "\n")
