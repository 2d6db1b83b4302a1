"""Saving, restoring onto another mesh, and what a damaged checkpoint says."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.runtime import mesh as layout
from seqpe_jax.runtime.checkpoint import Checkpoints

KERNEL = np.arange(64.0, dtype=np.float32).reshape(8, 8)
STATE = {"params": {"model": {"head": {"kernel": KERNEL, "bias": np.ones(3, np.float32)}}}, "step": 4}


def placed(mesh):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype), STATE)
    return layout.with_shardings(mesh, shapes)[0]


@pytest.fixture
def saved(tmp_path):
    mesh = layout.make_mesh(4, 2)
    shapes = placed(mesh)
    state = jax.tree.map(lambda leaf, shape: jax.device_put(jnp.asarray(leaf), shape.sharding), STATE, shapes)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 6):
        checkpoints.save(step, state, {"seconds": float(step)})
    checkpoints.close()
    return tmp_path


def test_restore_on_another_mesh(saved):
    checkpoints = Checkpoints(saved, create=False)
    assert checkpoints.latest() == 6 and checkpoints.meta()["seconds"] == 6.0
    mesh = layout.make_mesh(2, 4)
    restored = checkpoints.restore(placed(mesh))
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)
    kernel = restored["params"]["model"]["head"]["kernel"]
    assert kernel.sharding.mesh.shape["fsdp"] == 4 and kernel.sharding.shard_shape(kernel.shape) == (2, 8)
    params, step = checkpoints.restore_params(placed(mesh)["params"])
    jax.tree.map(np.testing.assert_array_equal, params, STATE["params"])
    assert step == 6
    checkpoints.close()


def test_only_the_newest_are_kept(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["4", "6"]


def test_a_damaged_checkpoint_is_told_in_one_line(saved):
    shutil.rmtree(saved / "checkpoints" / "6" / "state" / "d", ignore_errors=True)
    for path in (saved / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpoints(saved, create=False)
    for read in (checkpoints.restore, lambda shapes: checkpoints.restore_params(shapes["params"])):
        with pytest.raises(InputError, match="cannot be read") as caught:
            read(placed(layout.make_mesh(8, 1)))
        assert "\n" not in str(caught.value)
    checkpoints.close()


def test_a_folder_without_checkpoints_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no checkpoints in"):
        Checkpoints(tmp_path, create=False)
