"""Peak arithmetic, memory and interconnect of accelerators, by JAX device kind; utilization and peak memory."""

import dataclasses
import importlib.metadata
import os
import time

import jax
import jax.numpy as jnp

GIB = 2**30
TPU_SOURCE = "cloud.google.com/tpu/docs/system-architecture-tpu-vm"
NVIDIA_SOURCE = "NVIDIA's data sheets"  # dense, not sparse


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device; a chip that JAX shows as two devices has half of its published figures in each.

    Attributes:
      name: name of the chip.
      flops: peak bf16 FLOP/s.
      memory: bytes of HBM.
      source: publication of the figures.
      bandwidth: bandwidth of the memory, bytes/s, reads and writes together; 0 = unknown.
      link: bytes/s to another device, one way: of a TPU to one neighbor, of an NVIDIA GPU over all of NVLink; 0 = unknown.
      sides: axes of the torus of links; 0 = a switch.
      closed: length at which an axis of a slice wraps around; on a torus of 3 axes, also its multiples.
      clock: cycles/s of a TPU core; 0 = unknown.
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
    """A chip by its published figures.

    teraflops: bf16; gibibytes: of HBM; gigabytes, link: per second; units: multipliers of the matrix units, each with one
    product per cycle; devices: that JAX shows for a chip.
    """
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
    """A GPU by its published figures; nvlink: GB/s, both ways together."""
    return Chip(name, teraflops * 1e12, gibibytes * GIB, NVIDIA_SOURCE, gigabytes * 1e9, nvlink / 2 * 1e9)


# Links: the published interconnect of a chip, both ways together, divided by 2 ways and 4 or 6 links; of v2 and v3 the 496
# and 656 Gbit/s of a link.
MXU_128 = 128 * 128  # multipliers of a matrix unit
MXU_256 = 256 * 256  # of v6e and TPU7x
V5E = _tpu("TPU v5e", 197, 16, 819, 50, 2, 16, 4 * MXU_128)
V5P = _tpu("TPU v5p", 459, 95, 2765, 100, 3, 4, 8 * MXU_128)
V6E = _tpu("TPU v6e", 918, 32, 1638, 100, 2, 16, 4 * MXU_256)
A100, A100_80 = _nvidia("A100 40 GB", 312, 40, 1555, 600), _nvidia("A100 80 GB", 312, 80, 2039, 600)

# Device kinds as JAX spells them, matched exactly: "TPU v5" is not "TPU v5 lite", and a MIG slice is not its GPU.
CHIPS = {
    "TPU v2": _tpu("TPU v2", 46, 16, 700, 62, 2, 16, 2 * MXU_128, devices=2),
    "TPU v3": _tpu("TPU v3", 123, 32, 900, 82, 2, 32, 4 * MXU_128, devices=2),
    "TPU v4": _tpu("TPU v4", 275, 32, 1200, 50, 3, 4, 8 * MXU_128),  # both cores make one device
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": _tpu("TPU7x", 2307, 192, 7380, 100, 3, 4, 8 * MXU_256, devices=2),
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
MATMUL_SIZE = 2048  # rows of a square product
MATMUL_REPEATS = 5


GPU_FILES = {"cuda": ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"), "rocm": ("/dev/kfd", "/dev/dxg")}


def expected_platform() -> str:
    """Returns the platform that JAX will take, "cpu", "gpu" or "tpu", without starting it.

    Importing JAX on a TPU VM has set its platforms already.
    """
    chosen = (jax.config.jax_platforms or "").partition(",")[0]
    if chosen:
        return "gpu" if chosen in GPU_FILES else chosen
    plugins = [plugin.name for plugin in importlib.metadata.entry_points(group="jax_plugins")]
    for name, files in GPU_FILES.items():
        if any(name in plugin for plugin in plugins) and any(os.path.exists(file) for file in files):
            return "gpu"
    return "cpu"


def find_chip(kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`; None if it is not in the table."""
    return CHIPS.get(kind)


def measure_chip() -> Chip:
    """Returns a device of this machine with the FLOP/s of its fastest float32 matrix product; the rest is unknown.

    CPU devices share the machine's FLOP/s equally. The bandwidth of their memory is no bound, since most traffic stays in
    caches.
    """
    product, seconds = jax.jit(lambda matrix: matrix @ matrix), []
    matrix = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    for _ in range(1 + MATMUL_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix))
        seconds.append(time.perf_counter() - start)
    flops = 2 * MATMUL_SIZE**3 / min(seconds) / jax.local_device_count()
    return Chip(jax.devices()[0].device_kind, flops, 0, MEASURED)


def utilisation(flops: float, seconds: float) -> float | None:
    """Returns the model FLOPs utilization of all devices; None on unknown chips.

    Args:
      flops: FLOPs of the model.
      seconds: duration in seconds.
    """
    chip = find_chip(jax.devices()[0].device_kind)
    return None if chip is None else flops / seconds / (chip.flops * jax.device_count())


def peak_memory() -> int | None:
    """Returns the peak memory of this process's devices, in bytes, of the one with most; None if it is not counted."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in statistics if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)
