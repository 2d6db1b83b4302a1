"""Saves and restores train states: Orbax in the background, under WORKDIR/checkpoints, each with checksums of its files.

Damage is detected by `RunDir.checkpoint_error`.
"""

import contextlib
import errno
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint import type_handlers
from orbax.checkpoint.args import Composite, JsonRestore, JsonSave, StandardSave

from seqpe_jax.checksums import DIGESTS_FILE, checksums_of, write_checksums
from seqpe_jax.distributed import processes
from seqpe_jax.distributed.sharding import abstract_state_with_shardings
from seqpe_jax.errors import CheckpointGone, Failure, InputError, check_utf8_name
from seqpe_jax.files import AnyPath, free_space, is_remote, list_files, remove_dir
from seqpe_jax.run_dir import CHECKPOINTS_DIR, COMMIT_MARKER, RunDir, best_of, metric_in
from seqpe_jax.training import orbax_s3
from seqpe_jax.training.optimizer import averaged_params, is_of_average, make_optimizer

ARRAY_METADATA_BYTES = 4096  # at most
STATE_METADATA_BYTES = 65536  # at most
TMP_SUFFIX = ".orbax-checkpoint-tmp"
STATE_DIR = "state"  # of a checkpoint: its arrays
ARRAYS_WRITTEN = "async_write_complete"  # where Orbax's processes meet when each has written its arrays
SAVE_SECONDS = 1200  # time-out of a save, to which the time for its bytes is added
SLOWEST_RATE = 2 * 2**20  # bytes per second at which a process at least writes, and reads back, its part of a save
REPLICA_AXIS = 0  # of a mesh: `data`, over which no array of a state is split


def _reaches_user(record: logging.LogRecord) -> bool:
    """Filters out warnings of Orbax (waits for a save are in the run's own clock) and the tracebacks that its threads log.

    Such an error is raised as well, and reported in one line.
    """
    return "orbax" not in record.pathname or (record.levelno > logging.WARNING and not record.exc_info)


class _IgnoreClosedLoop:
    """A `sys.unraisablehook` that is silent about arrays whose save continues in a bucket's library after another's failed.

    Args:
      hook: gets all the rest.
    """

    def __init__(self, hook: Callable[[Any], object]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._hook(unraisable)


def checkpoint_bytes(state: Any) -> int:
    """Returns the most bytes that a checkpoint of a state, arrays or shapes, takes with its metadata."""
    leaves = jax.tree.leaves(state)
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return arrays + ARRAY_METADATA_BYTES * len(leaves) + STATE_METADATA_BYTES


def save_timeout(size: int) -> int:
    """Returns the seconds after which a save has failed.

    Args:
      size: bytes that this process saves.
    """
    return SAVE_SECONDS + math.ceil(size / SLOWEST_RATE)


def check_together(run: RunDir, metric: str = "", every: bool = False) -> None:
    """Checks the checkpoints of a run, each process its part of the bytes; all processes of a run must call it.

    Later calls of `RunDir.checkpoint_error` return the results. A single process checks when they are called.

    Args:
      run: the run's folder.
      metric: metric of the best checkpoint, which is checked besides the newest; "" = there is none.
      every: check all checkpoints.

    Raises:
      InputError: this host sees another folder than process 0.
    """
    if processes.is_multiprocess():
        for step in processes.from_main("steps", run.steps()):
            processes.check_shared(run.step_dir(step))
        run.check_shared(processes.exchange, jax.process_index(), jax.process_count(), metric, every)


def local_bytes(state: Any) -> int:
    """Returns the bytes of a state (arrays, or shapes with shardings) on this process's devices, each shard once."""
    total = 0
    for leaf in jax.tree.leaves(state):
        shards = {str(index) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
        total += len(shards) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


class SaveError(Failure):
    """A state could not be saved; those saved before are intact."""


class BestCheckpointPolicy:
    """An Orbax preservation policy that keeps the best checkpoint, of equal ones the first.

    Orbax's own `BestN` reads metrics that were saved through Orbax. Here the metadata of each checkpoint has them, also
    in runs of older versions.

    Args:
      run: folder of the run, in which no checkpoint may be damaged (`RunDir.quarantine`).
      metric: `eval/NAME@SCALE`.
    """

    def __init__(self, run: RunDir | str | os.PathLike, metric: str):
        self._metric = metric
        self._values = RunDir.of(run).metric_values(metric)

    def add(self, step: int, meta: dict[str, Any]) -> None:
        """Records a state that is about to be saved, with its metadata."""
        value = metric_in(meta, self._metric)
        if value is not None:
            self._values[step] = value

    def remove(self, step: int | None) -> None:
        """Forgets a state that could not be saved."""
        self._values.pop(step, None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it stays; Orbax asks."""
        steps = [info.step for info in checkpoints]
        best = best_of({step: value for step, value in self._values.items() if step in steps}, self._metric)
        return [step == best for step in steps]


class Checkpointer:
    """The saved states of one run: the newest `keep`, multiples of `keep_every` steps, and the best.

    Args:
      run: the run's folder.
      keep: newest states that stay.
      keep_every: states of multiples of so many steps stay for good; 0 = none do.
      best: the policy by which the best state stays; None = none does.
      size: bytes that this process saves (`local_bytes`), from which the time-out follows.
      create: makes the folder of checkpoints; False for a reader.

    Attributes:
      run: the run's folder.
      failed: saves in a row that failed, up to now.
      before_save: called before each save, which fails if this does: it writes what must exist when the state does.
    """

    def __init__(
        self,
        run: RunDir | str | os.PathLike,
        *,
        keep: int = 1,
        keep_every: int = 0,
        best: BestCheckpointPolicy | None = None,
        size: int = 0,
        create: bool = True,
    ):
        self.run = RunDir.of(run)
        self.folder = self.run.checkpoints_dir
        check_utf8_name(self.folder.parent, "a folder with checkpoints (--workdir)")
        logging.getLogger("absl").addFilter(_reaches_user)
        if create and not isinstance(sys.unraisablehook, _IgnoreClosedLoop):  # a reader saves nothing
            sys.unraisablehook = _IgnoreClosedLoop(sys.unraisablehook)
        if not create and not self.folder.is_dir():
            raise InputError(
                f"no checkpoints in {self.run}: expected a folder '{CHECKPOINTS_DIR}' as `train --workdir` writes it"
            )
        self._best = best
        policies: list[Any] = [managers.LatestN(keep)]
        if keep_every:
            policies.append(managers.EveryNSteps(keep_every))
        if best is not None:
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            create=create,
            temporary_path_class=orbax_s3.temporary_path_class(self.folder),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=save_timeout(size),
                barrier_sync_fn=self._barrier if processes.is_multiprocess() else None,
                post_finalization_callback=self._write_checksums,
            ),
        )
        self._manager = ocp.CheckpointManager(epath.Path(str(self.folder)), options=options)
        self._saving: int | None = None
        self._written: dict[str, str] = {}  # checksums of the arrays of the save under way, on the main process
        self.failed = 0
        self.before_save: Callable[[], None] = lambda: None

    def latest_step(self) -> int | None:
        """Returns the newest undamaged step, or None."""
        return self.run.latest_valid_step()[0]

    def saved_step(self) -> int | None:
        """Returns the newest saved step, whose files are not read to check it, or None."""
        return max((step for step in self.run.steps() if self.run.is_saved(step)), default=None)

    def is_saving(self) -> bool:
        """Returns whether the files of a save are being written in the background."""
        step = self._saving
        return step is not None and not self.run.is_saved(step)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to save a state; its buffers may be donated right afterwards.

        Args:
          step: step of the state.
          state: a tree of arrays.
          meta: JSON that is saved with it.

        Raises:
          SaveError: this save failed, or the one before it if nobody has waited for that (`wait`).
        """
        if step == self._manager.latest_step():
            return
        self.wait()  # the checksums of the save before are written by then
        self._saving, self._written = step, {}
        with self._handle_errors():
            self.before_save()
            if self.failed:  # after a failed save Orbax has forgotten which checkpoints were to be removed
                self._manager.reload()
            free = free_space(self.folder)
            if free is not None and free < checkpoint_bytes(state):  # else TensorStore logs each array without room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._best:
                self._best.add(step, meta)
            meta = meta | {"step": step, "digests": DIGESTS_FILE}  # so that checksums that are missing are noticed
            self._manager.save(step, args=Composite(state=StandardSave(state), meta=JsonSave(meta)))

    def wait(self) -> None:
        """Waits for the save that is under way. Raises: SaveError."""
        with self._handle_errors():
            self._manager.wait_until_finished()
        if self._saving is not None:
            self._saving, self.failed = None, 0

    @contextlib.contextmanager
    def _handle_errors(self) -> Iterator[None]:
        """Converts any error of a save to a `SaveError` of one line, and removes the unfinished save."""
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its threads raise
            step, self._saving = self._saving, None
            self.failed += 1
            if self._best:
                self._best.remove(step)
            with contextlib.suppress(OSError):  # what cannot be removed is removed by the next start
                for folder in self._unfinished(step) if jax.process_index() == 0 else ():
                    remove_dir(folder)
            message = " ".join(str(error).split())
            is_full = "No space left" in message
            reason = "no space is left on the device" if is_full else f"{type(error).__name__}: {message[:200]}"
            raise SaveError(f"the save of step {step} failed ({reason})") from error

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits in Orbax's threads for the other processes; for as long as it takes, since a lost one ends the run.

        Each process computes the checksums of its arrays before, so that the main one need not read those of all.
        """
        del timeout_ms
        if ARRAYS_WRITTEN in key:
            processes.exchange(key, self._own_checksums(), self._merge)
        else:
            processes.exchange(key, None, lambda values: None)

    def _own_checksums(self) -> dict[str, str]:
        """The checksums of the arrays that this process has written, by file of the checkpoint."""
        suffix = "" if is_remote(self.folder) else TMP_SUFFIX  # of both folders, until all is written
        folder = self.folder / f"{self._saving}{suffix}" / f"{STATE_DIR}{suffix}"
        own = list_files(folder / f"ocdbt.process_{jax.process_index()}")
        found = checksums_of(folder, [str(path.relative_to(folder)) for path in own])
        return {f"{STATE_DIR}/{file}": value for file, value in found.items()}

    def _merge(self, found: list[dict[str, str]]) -> None:
        self._written = {file: value for own in found for file, value in own.items()}

    def _write_checksums(self) -> None:
        """Called by Orbax when all files of a checkpoint are written, before it gives the checkpoint its name."""
        if jax.process_index() == 0:
            for folder in self._unfinished(self._saving):  # one save at a time
                write_checksums(folder, name=folder.name.removesuffix(TMP_SUFFIX), known=self._written)

    def _unfinished(self, step: int | None) -> list[AnyPath]:
        """The folders of a save that is not finished: one, or none."""
        if not is_remote(self.folder):
            return list(self.folder.glob(f"*{TMP_SUFFIX}"))
        folder = self.folder / str(step)
        return [] if (folder / COMMIT_MARKER).exists() else [folder]

    def restore(self, state: Any, step: int | None = None) -> Any:
        """Returns a saved state.

        Args:
          state: a tree of ShapeDtypeStructs with the shardings to restore to.
          step: None = the newest undamaged one.

        Raises:
          InputError: there is no checkpoint, or it is damaged or of another model.
        """
        step = self.run.require_latest_step() if step is None else step
        try:
            return _read(self.folder / str(step) / STATE_DIR, state)
        except Exception as error:  # Orbax raises many types for a damaged or foreign checkpoint
            raise self._unreadable(step, error) from error

    def restore_params(self, params: Any, step: int | None = None, average: Any = None) -> tuple[Any, int]:
        """Returns (params, step) of a saved state, of whose optimizer state no more is read than the average needs.

        Args:
          params: a tree of ShapeDtypeStructs with the shardings to restore to.
          step: None = the newest undamaged one.
          average: `optimizer` section of the run's config: its average of the parameters is returned; None = they are.

        Raises:
          InputError: there is no checkpoint, it is damaged, of a model of other sizes, or has no average.
        """
        step = self.run.require_latest_step() if step is None else step
        path = self.folder / str(step) / STATE_DIR
        try:
            stored = ocp.PyTreeCheckpointHandler().metadata(epath.Path(str(path))).tree
        except Exception as error:  # as in `restore`
            raise self._unreadable(step, error) from error
        check_shapes(path.parent, _shapes(stored["params"]), _shapes(params))
        if average is not None and "opt_state" not in stored:
            raise InputError(f"checkpoint {path.parent} holds parameters alone, and no average: leave --weights out")
        targets = {"params": params}
        if average is not None:  # Orbax reads all of the rest, unless each array of it has a placeholder
            targets = (
                dict.fromkeys(stored, ocp.PLACEHOLDER) | targets | {"opt_state": _average_targets(params, average)}
            )
        try:
            found = _read(path, targets, partial=average is None)
        except Exception as error:  # as in `restore`
            raise self._unreadable(step, error) from error
        restored = found["params"]
        if average is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
            arrays = jax.tree.map(lambda leaf: None if leaf is ocp.PLACEHOLDER else leaf, found["opt_state"])
            compute = jax.jit(functools.partial(averaged_params, average), out_shardings=shardings)
            restored = compute(arrays, restored)
        check_finite(path.parent, restored)
        return restored, step

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """Returns the metadata saved with a state; step None = the newest undamaged one. Raises: InputError."""
        step = self.run.require_latest_step() if step is None else step
        try:
            return self._manager.restore(step, args=Composite(meta=JsonRestore())).meta
        except Exception as error:  # as in `restore`
            raise self._unreadable(step, error) from error

    def close(self) -> None:
        """Waits for the save that is under way, then releases Orbax's threads."""
        self.wait()
        self._manager.close()

    def _unreadable(self, step: int, error: Exception) -> InputError:
        first = " ".join(str(error).split())[:300]
        if not self.run.is_saved(step):
            return CheckpointGone(
                f"checkpoint {self.folder / str(step)} was removed while it was read, as a run that trains does with old ones "
                "(checkpoint.keep): read it again"
            )
        cure = "it is damaged or of another model; delete that folder to fall back on an older one"
        if is_remote(self.folder):  # its checksums were right
            cure = "the store did not give it, or it is of another model; try again"
        return InputError(
            f"checkpoint {self.folder / str(step)} cannot be read ({type(error).__name__}: {first}): {cure}"
        )


def _read(path: AnyPath, targets: Any, partial: bool = False) -> Any:
    """Returns the arrays of a saved state.

    Each process reads what its devices need, each shard once. Where the mesh axis `data` lies over several processes, so that
    they need the same shards, only those of its first index read, and send the others what they read.

    Args:
      path: the folder of the arrays.
      targets: a tree of ShapeDtypeStructs with the shardings to restore to.
      partial: read only the arrays of `targets`, of more that are stored; placeholders of Orbax are not read.
    """
    options: dict[str, Any] = {}
    arguments = ocp.ArrayRestoreArgs
    read = [leaf for leaf in jax.tree.leaves(targets) if leaf is not ocp.PLACEHOLDER]
    if _replicas_on_other_processes(read[0].sharding):
        handler = type_handlers.SingleReplicaArrayHandler(replica_axis_index=REPLICA_AXIS, primary_replica_id=0)
        options["type_handler_registry"] = type_handlers.create_type_handler_registry((jax.Array, handler))
        arguments = type_handlers.SingleReplicaArrayRestoreArgs
    restore_args = jax.tree.map(
        lambda leaf: (
            ocp.RestoreArgs()
            if leaf is ocp.PLACEHOLDER
            else arguments(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
        ),
        targets,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as reader:
        request = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args, partial_restore=partial)
        return reader.restore(epath.Path(str(path)), args=request)


def _average_targets(params: Any, settings: Any) -> Any:
    """Returns the targets of what `averaged_params` reads of an optimizer state, and placeholders for the rest.

    Args:
      params: a tree of ShapeDtypeStructs with shardings on a mesh.
      settings: `optimizer` section of the run's config.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    shapes = jax.eval_shape(make_optimizer(settings, 1).init, params)
    state = abstract_state_with_shardings(mesh, {"params": params, "opt_state": shapes})[0]["opt_state"]
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if is_of_average(path) else ocp.PLACEHOLDER, state)


def _replicas_on_other_processes(sharding: jax.sharding.Sharding) -> bool:
    """Returns whether some processes have no device at the first index of the axis over which arrays are replicated."""
    if not isinstance(sharding, jax.sharding.NamedSharding):  # on one device
        return False
    devices = sharding.mesh.devices

    def processes(devices: np.ndarray) -> set[int]:
        return {device.process_index for device in devices.flat}

    return processes(devices[0]) != processes(devices)


def check_finite(checkpoint: AnyPath, params: Any) -> None:
    """Refuses parameters that are not finite, as older versions saved them. Raises: InputError: names one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for part in leaf.addressable_shards:
            if part.replica_id == 0 and not np.isfinite(np.asarray(part.data)).all():
                raise InputError(
                    f"checkpoint {checkpoint} is of no use: its {_path_name(path)} is infinite or not a number; move that folder away "
                    "to fall back on an older one"
                )


def _path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {_path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# Parameters with a row, or column, for each token or class: (their dimension, the field that sets it, what it counts).
COUNTED = {
    "model/token_embedding/embedding": (0, "model.vocabulary", "tokens"),
    "model/head/kernel": (1, "model.classes", "classes"),
}


def check_shapes(checkpoint: AnyPath, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses a checkpoint of a model of other sizes.

    Args:
      checkpoint: its folder, for the message.
      stored: shape of each of its parameters, by name.
      wanted: shapes of the parameters that are wanted.

    Raises:
      InputError: names one whose shape differs.
    """
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
