"""Roofline: the least time that a compiled program can take on its devices, from peak FLOPs, bandwidth and link rates.

Arithmetic and memory can be busy at the same time, and links as well with collectives that run in the background; a device
waits for the other collectives, whose time is added. The counts are those of the program, not of the model: they include
layers that are recomputed, and arrays that are written and read again. A real step also waits for units that a small product
does not fill, for the host, and for a collective in the background that nothing is left to hide.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from seqpe_jax.distributed.hardware import Chip
from seqpe_jax.distributed.sharding import slice_index
from seqpe_jax.profiling.collectives import Collective, Collectives, collectives
from seqpe_jax.profiling.hlo import HloModule
from seqpe_jax.profiling.program_cost import program_cost

NETWORK = "network"  # between hosts of GPUs, or slices; its rate is unknown


@dataclasses.dataclass(frozen=True)
class Interconnect:
    """Links between the devices of a mesh.

    Attributes:
      mesh: the devices.
      chip: kind of the devices.
    """

    mesh: jax.sharding.Mesh
    chip: Chip

    def rates(self, groups: Sequence[Sequence[int]]) -> dict[str, float]:
        """Returns {link: bytes/s that enter a device by it} for collectives between groups of devices; 0 = unknown.

        On a torus, a group has the links along each side over which it extends: two where it fills a side that is a ring,
        else one, since a device at an end has no more.

        Args:
          groups: device numbers that communicate with each other; () = all devices.
        """
        group = list(groups[0]) if groups else list(range(self.mesh.size))
        devices = [self.mesh.devices.flat[number] for number in group]
        if len({_domain(device) for device in devices}) > 1:
            return {NETWORK: 0.0}
        if not self.chip.sides:
            return {"NVLink" if self.chip.link else "memory": self.chip.link}
        spread = [len(set(along)) for along in zip(*(device.coords for device in devices), strict=True)]
        found = {}
        for name, size, side in zip("xyz", spread, self.torus, strict=False):
            if size > 1:
                found[name] = self.chip.link * (2 if size == side and self._is_ring(side) else 1)
        return found  # empty between the two cores of a chip

    @property
    def torus(self) -> tuple[int, ...]:
        """Number of chips along each side of the slice."""
        return tuple(1 + np.max([device.coords for device in self.mesh.devices.flat], axis=0))

    def _is_ring(self, side: int) -> bool:
        if self.chip.sides == 2:
            return side == self.chip.closed
        return all(size % self.chip.closed == 0 for size in self.torus)

    def mesh_axes(self, groups: Sequence[Sequence[int]]) -> list[str]:
        """Returns the names of the mesh axes over which a group of devices extends.

        Args:
          groups: device numbers that communicate with each other; () = all devices.
        """
        names, shape = self.mesh.axis_names, self.mesh.devices.shape
        group = groups[0] if groups else range(self.mesh.size)
        return [
            name for name, along in zip(names, np.unravel_index(list(group), shape), strict=True) if len(set(along)) > 1
        ]


def _domain(device: jax.Device) -> int:
    """Returns a number that devices share which no network separates: of a TPU slice, or of the process of GPUs."""
    if device.platform == "tpu":
        return slice_index(device)
    return device.process_index


def roofline(
    program: HloModule,
    mesh: jax.sharding.Mesh,
    chip: Chip,
    *,
    model_flops: Mapping[str, float],
    units: int,
    sent: Collectives | None = None,
) -> dict[str, Any]:
    """Returns the bound of a compiled program.

    Args:
      program: compiled program of one device.
      mesh: its devices, which need not exist.
      chip: kind of the devices.
      model_flops: {name of a utilisation: FLOPs of all devices that count as useful for it} (`models.build.model_flops`).
      units: tokens or images of a run.
      sent: collectives of the program; None = computed here.

    Returns:
      A dictionary with
      - "flops", "hbm_bytes": of one device; "arithmetic_s", "memory_s", "interconnect_s" (None where a rate is unknown);
      - "links": {side of the torus or kind of link: seconds};
      - "collectives": [{"kind", "hidden", "axes" (of the mesh), "over" (links), "count", "bytes", "largest" (bytes of one),
        "received" (bytes that must enter a device), "seconds" (None where the links' rate is unknown)}];
      - "exposed_s": seconds of the collectives that nothing hides, as far as the rates of their links are known;
      - "bound": arithmetic or memory, which with the exposed collectives takes longest, or interconnect; "seconds": that time;
      - "mfu", "mfu_full_attention" (names of `model_flops`; None where these are 0) and "per_second" at that bound;
      - "compiler_s": the compiler's estimate for its instructions, without collectives and kernels; None without one;
      - "kernels", "open_loops": see `ProgramCost.kernels` and `ProgramCost.unknown_trip_loops`; "peaks": of the chip.
    """
    found, sent, links = program_cost(program), sent or collectives(program), Interconnect(mesh, chip)
    rows: dict[Any, dict[str, Any]] = {}
    busy: dict[str, float] = {}
    for one in sent.collectives:
        row = _row(one, links)
        for name in row["over"] if row["seconds"] is not None else ():
            busy[name] = busy.get(name, 0.0) + row["seconds"]
        same = rows.setdefault((one.kind, one.hidden, *row["axes"], *row["over"]), row)
        if same is not row:
            same["largest"] = max(same["largest"], row["largest"])
            for name in ("count", "bytes", "received", "seconds"):
                same[name] = None if same[name] is None else same[name] + row[name]
    exposed = sum(row["seconds"] or 0.0 for row in rows.values() if not row["hidden"])
    parts = {
        "arithmetic": found.flops / chip.flops,
        "memory": found.bytes / chip.bandwidth if chip.bandwidth else None,
        "interconnect": max(
            busy.values(), default=None if any(row["seconds"] is None for row in rows.values()) else 0.0
        ),
    }
    waiting = {name: (parts[name] or 0.0) + exposed for name in ("arithmetic", "memory")}
    times = waiting | {"interconnect": parts["interconnect"] or 0.0}
    bound = max(times, key=times.get)
    seconds = times[bound]
    return {
        "flops": found.flops,
        "hbm_bytes": found.bytes,
        **{f"{name}_s": value for name, value in parts.items()},
        "exposed_s": exposed,
        "links": busy,
        "collectives": list(rows.values()),
        "bound": bound,
        "seconds": seconds,
        **{name: flops / (seconds * chip.flops * mesh.size) if flops else None for name, flops in model_flops.items()},
        "per_second": units / seconds,
        "compiler_s": found.cycles / chip.clock if chip.clock and found.cycles else None,
        "kernels": found.kernels,
        "open_loops": found.unknown_trip_loops,
        "peaks": {"flops": chip.flops, "bandwidth": chip.bandwidth, "link": chip.link, "source": chip.source},
    }


def _row(one: Collective, links: Interconnect) -> dict[str, Any]:
    """Returns the entry of a collective; its seconds are those for which each of its links is busy."""
    rates, received = links.rates(one.groups), one.bytes_received(links.mesh.size)
    seconds = received / sum(rates.values()) if rates and all(rates.values()) else None if rates else 0.0
    return {
        "kind": one.kind,
        "hidden": one.hidden,
        "axes": links.mesh_axes(one.groups),
        "over": list(rates),
        "count": one.count,
        "bytes": one.bytes,
        "largest": one.largest,
        "received": received,
        "seconds": seconds,
    }
