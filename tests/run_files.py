"""Reading the files of a run, and damaging them."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

# Metrics that differ between two runs of one config.
CLOCK = (
    "time",
    "train/tokens_per_second",
    "train/step_seconds",
    "train/data_seconds",
    "train/save_seconds",
    "train/goodput",
    "train/mfu",
    "hosts/slowest_process",
    "hosts/slowest_seconds",
    "hosts/median_seconds",
    "device/memory_bytes",
)


def lines(workdir) -> list[dict]:
    """Returns the complete lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def measured(workdir) -> list[dict]:
    """Returns the same without times and rates."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines(workdir)]


def newest(workdir) -> int:
    """Returns the last step whose checkpoint is finished, or 0."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)


def stored_state(step: pathlib.Path):
    """Returns the state of a checkpoint's folder, optimizer and all, as NumPy arrays."""
    path = (step / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a saved state by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(stored_state(workdir / "checkpoints" / str(step)))
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def bits(named: dict[str, np.ndarray]) -> dict[str, tuple]:
    """Returns dtype, shape and bytes of arrays, for a comparison bit by bit."""
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in named.items()}


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns all files of a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def largest(step: pathlib.Path) -> pathlib.Path:
    """Returns the largest file of a checkpoint's arrays."""
    return max(files_of(step / "state"), key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path, place: int | None = None) -> None:
    """Flips a bit of the byte at a place, or in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)
