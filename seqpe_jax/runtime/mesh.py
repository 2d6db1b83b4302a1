"""Devices as a mesh, and the layout of every array on it.

Axes: `data` splits the batch; `fsdp` splits the batch too, and the parameters and optimiser state with it.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqpe_jax.errors import InputError

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of (data, fsdp) over all devices; data = 0 takes the devices that fsdp leaves.

    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if count % fsdp or (data and data * fsdp != count):
        raise InputError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not make the {count} devices there are: set mesh.data=0 and "
            f"mesh.fsdp to a divisor of {count}"
        )
    return jax.make_mesh((count // fsdp, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Returns in how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch [B, ...]: B split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Returns the layout of a parameter or optimiser leaf: its largest dimension that fsdp divides is split over it."""
    size = mesh.shape["fsdp"]
    if size > 1 and leaf.ndim >= 2:
        for axis in sorted(range(leaf.ndim), key=lambda axis: -leaf.shape[axis]):
            if leaf.shape[axis] % size == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))
    return replicated(mesh)


def constrain_rows(mesh: Mesh, rows: jax.Array) -> jax.Array:
    """Splits encoder rows [R, ...] over all devices, of which R must be a multiple; inside jit."""
    return jax.lax.with_sharding_constraint(rows, batch_sharding(mesh))


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns global arrays of a batch, of which this host holds its slice."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def whole_to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns global arrays of a batch that every host holds whole."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_callback(value.shape, sharding, value.__getitem__) for name, value in batch.items()}
