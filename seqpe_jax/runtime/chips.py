"""What the accelerators can do: peak arithmetic and memory of one JAX device, by its kind."""

import dataclasses

import jax

GIB = 2**30
TPU_SOURCE = "cloud.google.com/tpu/docs/system-architecture-tpu-vm"
NVIDIA_SOURCE = "NVIDIA's data sheets"  # dense, not sparse


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device.

    Attributes:
      name: of the chip; flops: peak bf16 FLOP/s; memory: bytes of HBM.
      source: where the figures are published, for the whole chip; a core of a chip that JAX shows as two has half.
    """

    name: str
    flops: float
    memory: int
    source: str


def _tpu(name: str, teraflops: float, gibibytes: int, devices: int = 1) -> Chip:
    return Chip(name, teraflops * 1e12 / devices, gibibytes * GIB // devices, TPU_SOURCE)


def _nvidia(name: str, teraflops: float, gibibytes: int) -> Chip:
    return Chip(name, teraflops * 1e12, gibibytes * GIB, NVIDIA_SOURCE)


V5E, V5P, V6E = _tpu("TPU v5e", 197, 16), _tpu("TPU v5p", 459, 95), _tpu("TPU v6e", 918, 32)
A100, A100_80 = _nvidia("A100 40 GB", 312, 40), _nvidia("A100 80 GB", 312, 80)

# Kinds as JAX spells them, matched whole: "TPU v5" is not "TPU v5 lite", and a slice of a GPU (MIG) is no whole one.
CHIPS = {
    "TPU v2": _tpu("TPU v2", 46, 16, devices=2),
    "TPU v3": _tpu("TPU v3", 123, 32, devices=2),
    "TPU v4": _tpu("TPU v4", 275, 32),  # both cores make one device
    "TPU v5 lite": V5E, "TPU v5e": V5E,
    "TPU v5": V5P, "TPU v5p": V5P,
    "TPU v6 lite": V6E, "TPU v6e": V6E,
    "TPU7x": _tpu("TPU7x", 2307, 192, devices=2),
    "NVIDIA A100-SXM4-40GB": A100, "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100_80, "NVIDIA A100 80GB PCIe": A100_80,
    "NVIDIA H100 80GB HBM3": _nvidia("H100 SXM", 989, 80),
    "NVIDIA H100 PCIe": _nvidia("H100 PCIe", 756, 80),
    "NVIDIA H100 NVL": _nvidia("H100 NVL", 835, 94),
    "NVIDIA GH200 480GB": _nvidia("GH200", 989, 96),
    "NVIDIA H200": _nvidia("H200 SXM", 989, 141),
    "NVIDIA H200 NVL": _nvidia("H200 NVL", 835, 141),
    "NVIDIA B200": _nvidia("B200", 2250, 180),
}  # fmt: skip


def chip_of(kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`; None for one that is not in the table."""
    return CHIPS.get(kind)


def utilisation(flops: float, seconds: float) -> float | None:
    """Returns MFU: the share of all devices' peak that so many useful FLOPs in that time are; None on unknown chips."""
    chip = chip_of(jax.devices()[0].device_kind)
    return None if chip is None else flops / seconds / (chip.flops * jax.device_count())


def peak_memory() -> int | None:
    """Returns the most bytes that any of this host's devices has held so far; None where the backend does not count."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks, default=None)
