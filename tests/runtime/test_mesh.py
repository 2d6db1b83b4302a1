"""The mesh takes all devices or says why not."""

import jax
import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.runtime import mesh as layout


def test_zero_takes_the_rest():
    assert layout.make_mesh(0, 2).shape == {"data": 4, "fsdp": 2}


@pytest.mark.parametrize("data,fsdp", [(3, 1), (0, 3), (2, 2)])
def test_axes_that_do_not_fit_are_named(data, fsdp):
    with pytest.raises(InputError, match=f"mesh.data={data} x mesh.fsdp={fsdp} .* 8 devices"):
        layout.make_mesh(data, fsdp)


def test_a_batch_is_split_over_all_devices():
    mesh = layout.make_mesh(4, 2)
    batch = layout.to_global(mesh, {"tokens": np.arange(32).reshape(16, 2)})["tokens"]
    assert batch.shape == (16, 2)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(jax.device_get(batch), np.arange(32).reshape(16, 2))


def test_large_leaves_are_split_over_fsdp_and_small_ones_are_not():
    mesh = layout.make_mesh(2, 4)
    spec = lambda *shape: layout.state_sharding(mesh, jax.ShapeDtypeStruct(shape, np.float32)).spec  # noqa: E731
    assert spec(8, 16) == jax.sharding.PartitionSpec(None, "fsdp")
    assert spec(16, 3) == jax.sharding.PartitionSpec("fsdp")
    assert spec(3, 5) == jax.sharding.PartitionSpec() == spec(16)
