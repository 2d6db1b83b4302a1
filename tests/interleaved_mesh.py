"""Commands whose meshes mix the devices of several processes, as those of a TPU slice do, once `install` was called.

There the mesh follows the network between chips, so that the rows of a process are not consecutive. Here two devices of
each process follow each other, then two more of each.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils


def create_device_mesh(shape: Sequence[int], devices: Sequence[Any], **_: Any) -> np.ndarray:
    """Returns the devices in pairs, of one process after the other."""
    before: Counter[int] = Counter()
    order = []
    for device in devices:
        order.append((before[device.process_index] // 2, device.process_index, device.id))
        before[device.process_index] += 1
    pairs = sorted(zip(order, devices, strict=True), key=lambda one: one[0])
    return np.array([device for _, device in pairs]).reshape(shape)


def install() -> None:
    """Puts that order in JAX's place; `tests.commands.Commands` imports this module and calls it."""
    mesh_utils.create_device_mesh = create_device_mesh
