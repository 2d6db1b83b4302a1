"""TPU slices as far as a mesh looks at them: the order, coordinates and processes of real ones, without libtpu."""

import dataclasses
import itertools
import math

KINDS = {
    "v2": "TPU v2",
    "v3": "TPU v3",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}
TWO_CORES = ("v2", "v3", "tpu7x")  # generations in which each core of a chip is a device


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU slice.

    Attributes:
      coords: of its chip in the slice.
      id: number over all slices.
      process_index: of the host that holds its block of 2 x 2 chips, over all slices.
    """

    coords: tuple[int, int, int]
    id: int
    process_index: int
    device_kind: str
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"


def topology_devices(topology: str, slices: int = 1) -> list[Chip]:
    """Returns the devices of a topology such as "v5e:4x4", in the order of `jax.devices()`, of several slices."""
    generation, _, sides = topology.partition(":")
    x, y, z = (*map(int, sides.split("x")), 1)[:3]
    cores = 2 if generation in TWO_CORES else 1
    block = (min(x, 2), min(y, 2))
    hosts = list(itertools.product(range(z), range(0, y, block[1]), range(0, x, block[0])))
    found = []
    for number, (process, (level, row, column)) in itertools.product(range(slices), enumerate(hosts)):
        for down, right, core in itertools.product(range(block[1]), range(block[0]), range(cores)):
            coords = (column + right, row + down, level)
            own = ((level * y + coords[1]) * x + coords[0]) * cores + core
            identity = own if slices == 1 else 100_000 * (number + 1) + own
            process_index = number * len(hosts) + process
            found.append(Chip(coords, identity, process_index, KINDS[generation], core, number))
    assert len(found) == slices * math.prod((x, y, z, cores))
    return found
