"""Checkpoints of a run, saved in the background by Orbax under WORKDIR/checkpoints, each with the digests of its files."""

import contextlib
import errno
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint.args import Composite, JsonRestore, JsonSave, StandardRestore, StandardSave

from seqpe_jax.errors import Failure, InputError, check_utf8_name
from seqpe_jax.files import (
    COMMIT_MARKER,
    AnyPath,
    as_path,
    atomic_write,
    free_space,
    is_remote,
    move_dir,
    parse_json,
    remove_dir,
)
from seqpe_jax.training.checksums import (
    CHECKPOINTS_DIR,
    DIGESTS_FILE,
    META_FILE,
    ORBAX_METADATA,
    check_side_files,
    checksum_error,
    read_meta,
    write_checksums,
)
from seqpe_jax.training.tensorstore_json import patch_tensorstore_json
from seqpe_jax.trees import named

ABOUT_AN_ARRAY, ABOUT_A_STATE = 4096, 65536  # bytes of metadata, at most
TMP_SUFFIX = ".orbax-checkpoint-tmp"


def _no_trace_of_a_save(record: logging.LogRecord) -> bool:
    """Leaves out the tracebacks in which Orbax's threads tell an error: it is raised, too, and told in one line."""
    return not (record.exc_info and "orbax" in record.pathname)


class _NoClosedLoop:
    """Leaves out what is told of arrays whose save goes on in a store's library after that of another has failed.

    Args:
      tell: the hook of `sys` that was there before, which is told all the rest.
    """

    def __init__(self, warn: Callable[[Any], object]):
        self._tell = warn

    def __call__(self, told: Any) -> None:
        if not (isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"):
            self._tell(told)


def checkpoint_bytes(state: Any) -> int:
    """Returns the bytes that a checkpoint of a state, arrays or shapes, takes at most, with what is told of each array."""
    leaves = jax.tree.leaves(state)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) + ABOUT_AN_ARRAY * len(leaves) + ABOUT_A_STATE


def local_bytes(state: Any) -> int:
    """Returns the bytes of a state's arrays, or shapes with shardings, that this process's devices hold, each part once."""
    total = 0
    for leaf in jax.tree.leaves(state):
        parts = {str(part) for part in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
        total += len(parts) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


class SaveError(Failure):
    """A state could not be saved; those saved before are whole."""


class Checkpointer:
    """The saved states of one run: the newest `keep`, and those of multiples of `keep_every` steps, which stay for good.

    Args:
      best: says which one stays too, for being the best (`best.BestCheckpointPolicy`); None = none does.

    Attributes:
      failed: saves in a row that failed, up to now.
      first: done before each save, which has failed where this does: it writes what is to be there when the state is.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, keep: int = 1, keep_every: int = 0, best: Any = None, create: bool = True
    ):
        self.folder = (as_path(workdir) / CHECKPOINTS_DIR).absolute()
        check_utf8_name(self.folder.parent, "a folder with checkpoints (--workdir)")
        logging.getLogger("absl").addFilter(_no_trace_of_a_save)
        if create:  # who only reads has no saves, and his process is left as it is
            patch_tensorstore_json()
            if not isinstance(sys.unraisablehook, _NoClosedLoop):
                sys.unraisablehook = _NoClosedLoop(sys.unraisablehook)
        if not create and not self.folder.is_dir():
            raise InputError(
                f"no checkpoints in {workdir}: expected a folder '{CHECKPOINTS_DIR}' as `train --workdir` writes it"
            )
        self._best = best
        staying = [managers.LatestN(keep), *([managers.EveryNSteps(keep_every)] if keep_every else ())]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([*staying, *([best] if best else ())]),
            create=create,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(epath.Path(str(self.folder)), options=options)
        self._under_way: int | None = None
        self.failed = 0
        self.first: Callable[[], None] = lambda: None

    def latest_step(self) -> int | None:
        """Returns the newest saved step that is not damaged, or None."""
        return latest_valid_step(self.folder)[0]

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begins to save a state; it is safe to donate the state's buffers right after.

        Raises:
          SaveFailed: this save, or the one before it where nobody has waited for that (`wait`).
        """
        if step == self._manager.latest_step():
            return
        self.wait()  # else the digests of the one before would be looked for in this one's folder
        self._under_way = step
        with self._telling():
            self.first()
            if self.failed:  # Orbax has forgotten the checkpoints that were to go after a save that failed
                self._manager.reload()
            free = free_space(self.folder)
            if free is not None and free < checkpoint_bytes(
                state
            ):  # TensorStore would tell each array that has no room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._best:
                self._best.note(step, meta)
            meta = meta | {"step": step, "digests": DIGESTS_FILE}  # by which their absence, or other files, are known
            self._manager.save(step, args=Composite(state=StandardSave(state), meta=JsonSave(meta)))

    def wait(self) -> None:
        """Waits for a save under way. Raises: SaveFailed."""
        with self._telling():
            self._manager.wait_until_finished()
        if self._under_way is not None:
            self._under_way, self.failed = None, 0

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns an error of a save into one line, and makes room for the next: what it left unfinished goes."""
        try:
            yield
        except Exception as error:  # Orbax hands on what its threads raise, of many kinds
            step, self._under_way = self._under_way, None
            self.failed += 1
            if self._best:
                self._best.forget(step)
            with contextlib.suppress(OSError):  # what cannot be removed is removed by the next start
                for unfinished in self._unfinished(step) if jax.process_index() == 0 else ():
                    remove_dir(unfinished)
            words = " ".join(str(error).split())
            full = "No space left" in words
            reason = "no space is left on the device" if full else f"{type(error).__name__}: {words[:200]}"
            raise SaveError(f"the save of step {step} failed ({reason})") from error

    def _seal(self) -> None:
        """Writes the digests of what has been saved; called by Orbax when all is there, before it gives it its name."""
        if jax.process_index() == 0:
            for unnamed in self._unfinished(self._under_way):  # one save at a time
                write_checksums(unnamed, name=unnamed.name.removesuffix(TMP_SUFFIX))

    def _unfinished(self, step: int | None) -> list[AnyPath]:
        """Where the save of a step lies until it is finished."""
        if not is_remote(self.folder):
            return list(self.folder.glob(f"*{TMP_SUFFIX}"))
        folder = self.folder / str(step)
        return [] if (folder / COMMIT_MARKER).exists() else [folder]

    def restore(self, state: Any, step: int | None = None) -> Any:
        """Returns a saved state in the layout of `state`, a tree of ShapeDtypeStructs with shardings.

        Raises:
          InputError: there is no checkpoint, or it is damaged or of another model.
        """
        step = self.require_latest_step() if step is None else step
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
        step = self.require_latest_step() if step is None else step
        path = self.folder / str(step) / "state"
        place = epath.Path(str(path))
        targets = {"params": params}
        arguments = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype),
            targets,
        )
        try:
            stored = ocp.PyTreeCheckpointHandler().metadata(place).tree["params"]
        except Exception as error:  # as above
            raise self._unreadable(step, error) from error
        _check_shapes(path.parent, _shapes(stored), _shapes(params))
        try:
            with ocp.PyTreeCheckpointer() as reader:
                request = ocp.args.PyTreeRestore(item=targets, restore_args=arguments, partial_restore=True)
                restored = reader.restore(place, args=request)["params"]
        except Exception as error:  # as above
            raise self._unreadable(step, error) from error
        check_finite(path.parent, restored)
        return restored, step

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Returns what was saved beside the state."""
        step = self.require_latest_step() if step is None else step
        try:
            return self._manager.restore(step, args=Composite(meta=JsonRestore())).meta
        except Exception as error:  # as above
            raise self._unreadable(step, error) from error

    def close(self) -> None:
        """Waits for saves under way, then lets go."""
        self.wait()
        self._manager.close()

    def require_latest_step(self) -> int:
        """Returns the newest saved step that is not damaged. Raises: InputError: there is none."""
        step, damaged = latest_valid_step(self.folder)
        if step is None and damaged:
            path, wrong = next(iter(damaged.items()))
            raise InputError(f"all checkpoints are damaged; of the newest, {path}, {wrong}: put back a copy of one")
        if step is None:
            raise InputError(f"no finished checkpoint in {self.folder}: train until the first save (checkpoint.every)")
        return step

    def _unreadable(self, step: int, error: Exception) -> InputError:
        first = " ".join(str(error).split())[:300]
        cure = "it is damaged or of another model; delete that folder to fall back on an older one"
        if is_remote(self.folder):  # its files are as they were written, or this would not be asked
            cure = "the store did not give it, or it is of another model; try again"
        return InputError(
            f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: {first}): {cure}"
        )


def saved_step(workdir: str | os.PathLike) -> int | None:
    """Returns the newest saved step of a run's folder that is not damaged, or None; changes nothing.

    Raises:
      InputError: there are checkpoints, and all are damaged.
    """
    step, damaged = latest_valid_step((as_path(workdir) / CHECKPOINTS_DIR).absolute())
    if damaged and step is None:
        path, wrong = next(iter(damaged.items()))
        raise InputError(
            f"all checkpoints of {workdir} are damaged; of the newest, {path}, {wrong}: put back a copy of one, or use a "
            "new --workdir"
        )
    return step


def latest_valid_step(folder: AnyPath) -> tuple[int | None, dict[AnyPath, str]]:
    """Returns the newest step of a folder of checkpoints that is as it was written, or None, and newer ones that are not.

    Returns:
      Those by folder, with what is wrong with each, in words.
    """
    found: dict[AnyPath, str] = {}
    for path in reversed(steps_of(folder)):
        wrong = checkpoint_error(path)
        if not wrong:
            return int(path.name), found
        found[path] = wrong
    return None, found


def steps_of(folder: AnyPath) -> list[AnyPath]:
    """Returns the steps in a folder of checkpoints, the newest last; in a store, without one whose save was cut short.

    The next save of that step takes its place.
    """
    steps = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()] if folder.is_dir() else []
    return sorted((path for path in steps if not _cut_short(path)), key=lambda path: int(path.name))


def _cut_short(step: AnyPath) -> bool:
    return is_remote(step) and not any((step / name).is_file() for name in (COMMIT_MARKER, DIGESTS_FILE))


def checkpoint_error(step: AnyPath) -> str:
    """Returns what is not as it was written of a step, in words, or ""."""
    needed = (COMMIT_MARKER, ORBAX_METADATA, META_FILE) if is_remote(step) else (ORBAX_METADATA, META_FILE)
    missing = next((str(name) for name in needed if not (step / name).is_file()), "")
    if wrong := f"{missing} is missing" if missing else checksum_error(step):
        return wrong
    meta = read_meta(step)  # of older versions, it names neither
    if meta.get("step", int(step.name)) != int(step.name):
        return f"it was written as {meta['step']}"
    if "digests" in meta and not (step / DIGESTS_FILE).is_file():
        return f"its {DIGESTS_FILE} is missing"
    return "" if meta else f"its {META_FILE} cannot be read"


def quarantine(workdir: str | os.PathLike) -> list[str]:
    """Renames damaged checkpoints that are newer than the newest good one, and returns what was done, in words.

    Nothing is deleted. Orbax would save no step below one that is there, and so never again.
    """
    step, damaged = latest_valid_step((as_path(workdir) / CHECKPOINTS_DIR).absolute())
    told = []
    for path, wrong in damaged.items():
        told.append(
            f"checkpoint {path} is damaged ({wrong}): renamed to {quarantine_step(path)}, going on from step {step}"
        )
    return told


def quarantine_step(step: AnyPath) -> str:
    """Gives a damaged checkpoint a name that nobody takes for a step's, and returns that."""
    aside, number = step.with_name(f"{step.name}.damaged"), 1
    while aside.exists():
        aside, number = step.with_name(f"{step.name}.damaged{number}"), number + 1
    move_dir(step, aside, first=(COMMIT_MARKER,))
    return aside.name


def check_finite(checkpoint: AnyPath, params: Any) -> None:
    """Refuses parameters that older versions saved though they are of no use. Raises: InputError: names one."""
    for name, leaf in named(params).items():
        for part in leaf.addressable_shards:
            if part.replica_id == 0 and not np.isfinite(np.asarray(part.data)).all():
                raise InputError(
                    f"checkpoint {checkpoint} is of no use: its {name} is infinite or not a number; move that folder away "
                    "to fall back on an older one"
                )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named(tree).items()}


# Parameters with a row, or column, for each token or class: (their dimension, the field that sets it, what it counts).
COUNTED = {
    "model/token_embedding/embedding": (0, "model.vocabulary", "tokens"),
    "model/head/kernel": (1, "model.classes", "classes"),
}


def _check_shapes(checkpoint: AnyPath, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
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


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """Returns the config stored beside a run's checkpoints, as nested dicts.

    Raises:
      InputError: the directory is not a run, or a file of it is damaged (`check_side_files`).
    """
    path = as_path(workdir) / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir} is not a run: no config.json there; give a --workdir of `train`")
    check_side_files(as_path(workdir))
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(
            f"{path} is no object of fields, as `train` writes it: put back the file that the run began with"
        )
    return found


def write_config(workdir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Writes config.json, whole or not at all; leaves it alone when nothing changes."""
    atomic_write(as_path(workdir) / "config.json", json.dumps(config, indent=2) + "\n")
