"""Commands for tests of several processes: meshes that mix their devices, counted reads, a loader that sleeps.

`install` puts them in place; the environment variables READS and SLEEPS switch the last two on.

Meshes mix the devices of several processes, as those of a TPU slice do.

There the mesh follows the network between chips, so that the rows of a process are not consecutive. Here two devices of
each process follow each other, then two more of each.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from seqpe_jax import checksums
from seqpe_jax.data.loader import TrainLoader
from seqpe_jax.distributed import roll_call


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
    read, prefetch = checksums._checksum, TrainLoader.prefetch

    def counted(path: Any, scheme: str) -> str:
        """Appends {"file", "process", "bytes"} of each file that is read for its checksum to the file READS."""
        if "READS" in os.environ:
            line = {"file": str(path), "process": os.getpid(), "bytes": path.stat().st_size}
            with open(os.environ["READS"], "a") as log:
                log.write(json.dumps(line) + "\n")
        return read(path, scheme)

    def sleeping(loader: TrainLoader, start: int = 0, **options: Any) -> Iterator:
        """Is slow, and never yields a batch after SLEEPS steps."""
        for step, batch in prefetch(loader, start, **options):
            if "SLEEPS" in os.environ:
                time.sleep(0.02 if step < start + int(os.environ["SLEEPS"]) else 3600)
            yield step, batch

    checksums._checksum, TrainLoader.prefetch = counted, sleeping
    roll_call.ANSWER_SECONDS = 4.0
