"""What the accelerators can do: peak arithmetic, memory and links of one JAX device, by its kind."""

import dataclasses
import time

import jax
import jax.numpy as jnp

GIB = 2**30
TPU_SOURCE = "cloud.google.com/tpu/docs/system-architecture-tpu-vm"
NVIDIA_SOURCE = "NVIDIA's data sheets"  # dense, not sparse


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
      name: of the chip; flops: peak bf16 FLOP/s; memory: bytes of HBM; bandwidth: of its memory, bytes/s, reads and
        writes together, 0 = unknown.
      link: bytes/s that a link to another device carries one way: a TPU's to one neighbour, an NVIDIA GPU's whole NVLink;
        0 = unknown. sides: axes of the torus that the links make, 0 = a switch.
      closed: sides of a slice of that length close to a ring, or of its multiples on a torus of 3 axes, where all do.
      clock: cycles/s of a TPU's core, 0 = unknown.
      source: where the figures are published, for the whole chip; a core of a chip that JAX shows as two has half.
    """

    name: str
    flops: float
    memory: int
    source: str
    bandwidth: float = 0.0
    link: float = 0.0
    sides: int = 0
    closed: int = 0
    clock: float = 0.0


def _tpu(
    name: str,
    teraflops: float,
    gibibytes: int,
    gigabytes: float,
    link: float,
    sides: int,
    closed: int,
    units: int,
    devices: int = 1,
) -> Chip:
    """gigabytes, link: per second; units: multipliers of the chip's matrix units, which take a product each cycle."""
    flops = teraflops * 1e12
    return Chip(
        name,
        flops / devices,
        gibibytes * GIB // devices,
        TPU_SOURCE,
        gigabytes * 1e9 / devices,
        link * 1e9 / devices,
        sides,
        closed,
        flops / (2 * units),
    )


def _nvidia(name: str, teraflops: float, gibibytes: int, gigabytes: float, nvlink: float) -> Chip:
    """nvlink: GB/s as published, which is both ways together."""
    return Chip(name, teraflops * 1e12, gibibytes * GIB, NVIDIA_SOURCE, gigabytes * 1e9, nvlink / 2 * 1e9)


# Links: the interconnect that is published for a chip, both ways together, over 2 ways and its 4 or 6 links; of v2 and v3
# the 496 and 656 Gbit/s of a link. Matrix units: 128 x 128, of v6e and TPU7x 256 x 256.
SMALL, LARGE = 128 * 128, 256 * 256
V5E = _tpu("TPU v5e", 197, 16, 819, 50, 2, 16, 4 * SMALL)
V5P = _tpu("TPU v5p", 459, 95, 2765, 100, 3, 4, 8 * SMALL)
V6E = _tpu("TPU v6e", 918, 32, 1638, 100, 2, 16, 4 * LARGE)
A100, A100_80 = _nvidia("A100 40 GB", 312, 40, 1555, 600), _nvidia("A100 80 GB", 312, 80, 2039, 600)

# Kinds as JAX spells them, matched whole: "TPU v5" is not "TPU v5 lite", and a slice of a GPU (MIG) is no whole one.
CHIPS = {
    "TPU v2": _tpu("TPU v2", 46, 16, 700, 62, 2, 16, 2 * SMALL, devices=2),
    "TPU v3": _tpu("TPU v3", 123, 32, 900, 82, 2, 32, 4 * SMALL, devices=2),
    "TPU v4": _tpu("TPU v4", 275, 32, 1200, 50, 3, 4, 8 * SMALL),  # both cores make one device
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": _tpu("TPU7x", 2307, 192, 7380, 100, 3, 4, 8 * LARGE, devices=2),
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100_80,
    "NVIDIA A100 80GB PCIe": _nvidia("A100 80 GB PCIe", 312, 80, 1935, 600),
    "NVIDIA H100 80GB HBM3": _nvidia("H100 SXM", 989, 80, 3350, 900),
    "NVIDIA H100 PCIe": _nvidia("H100 PCIe", 756, 80, 2000, 600),
    "NVIDIA H100 NVL": _nvidia("H100 NVL", 835, 94, 3900, 600),
    "NVIDIA GH200 480GB": _nvidia("GH200", 989, 96, 4000, 900),
    "NVIDIA H200": _nvidia("H200 SXM", 989, 141, 4800, 900),
    "NVIDIA H200 NVL": _nvidia("H200 NVL", 835, 141, 4800, 900),
    "NVIDIA B200": _nvidia("B200", 2250, 180, 8000, 1800),
}

MEASURED = "measured on this machine just now, in float32"
PRODUCT, TAKES = 2048, 5  # rows of a square product, and how often it is taken


def find_chip(kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`; None for one that is not in the table."""
    return CHIPS.get(kind)


def measure_chip() -> Chip:
    """Returns one device of this machine by the fastest of some large products in float32; the rest stays unknown.

    Of devices that share a machine, as CPU devices do, each has its part. Their memory's rate would bound nothing, since
    most of what a program moves stays in caches.
    """
    product, found = jax.jit(lambda one: one @ one), []
    square = jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    for _ in range(1 + TAKES):
        start = time.perf_counter()
        jax.block_until_ready(product(square))
        found.append(time.perf_counter() - start)
    return Chip(jax.devices()[0].device_kind, 2 * PRODUCT**3 / min(found) / jax.local_device_count(), 0, MEASURED)


def utilisation(flops: float, seconds: float) -> float | None:
    """Returns MFU: the share of all devices' peak that so many useful FLOPs in that time are; None on unknown chips."""
    chip = find_chip(jax.devices()[0].device_kind)
    return None if chip is None else flops / seconds / (chip.flops * jax.device_count())


def peak_memory() -> int | None:
    """Returns the most bytes that any of this host's devices has held so far; None where the backend does not count."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)
