"""Published figures of chips by JAX's device kind, utilization and peak memory."""

import types

import pytest

from seqpe_jax.distributed import hardware


class Device:
    """A device as JAX shows it."""

    def __init__(self, kind: str, stats: dict | None = None):
        self.device_kind, self._stats = kind, stats

    def memory_stats(self) -> dict | None:
        return self._stats


@pytest.mark.parametrize(
    "kind, teraflops, gibibytes",
    [
        ("TPU v3", 61.5, 16),  # one of a chip's two cores
        ("TPU v4", 275, 32),
        ("TPU v5 lite", 197, 16),
        ("TPU v5", 459, 95),
        ("TPU v5p", 459, 95),
        ("TPU v6 lite", 918, 32),
        ("TPU7x", 1153.5, 96),
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA H100 80GB HBM3", 989, 80),
        ("NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H200", 989, 141),
        ("NVIDIA B200", 2250, 180),
    ],
)
def test_a_known_chip(kind, teraflops, gibibytes):
    chip = hardware.find_chip(kind)
    assert (chip.flops, chip.memory) == (teraflops * 1e12, gibibytes * 2**30)
    assert chip.source


@pytest.mark.parametrize(
    "kind",
    ["cpu", "", "TPU v5 lite pod", "TPU v9", "NVIDIA RTX A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GB200"],
)
def test_an_unknown_chip_is_no_chip(kind, monkeypatch):
    assert hardware.find_chip(kind) is None
    monkeypatch.setattr(hardware.jax, "devices", lambda: [Device(kind)])
    assert hardware.utilisation(1e12, 1.0) is None


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=hardware.CHIPS)
def test_every_known_chip_has_a_memory_and_links(chip):
    assert 300e9 <= chip.bandwidth <= 8e12 and 25e9 <= chip.link <= 900e9
    assert bool(chip.sides) == bool(chip.closed) == bool(chip.clock) == chip.name.startswith("TPU")
    # An operation on each number of bf16 that is read takes longer to read than to compute, on all of them.
    assert 50 < chip.flops / chip.bandwidth < 600


def test_links_as_published():
    v5e, v5p, h100 = (hardware.find_chip(kind) for kind in ("TPU v5e", "TPU v5p", "NVIDIA H100 80GB HBM3"))
    assert (2 * 4 * v5e.link, 2 * 6 * v5p.link, 2 * h100.link) == (400e9, 1200e9, 900e9), "both ways, all links"
    assert v5e.clock == pytest.approx(1.5e9, rel=0.01) and v5p.clock == pytest.approx(1.75e9, rel=0.01)


def test_a_chip_that_nobody_knows_is_measured():
    chip = hardware.measure_chip()
    assert chip.flops > 1e8 and (chip.bandwidth, chip.link) == (0, 0) and "measured" in chip.source


def test_utilisation_is_of_all_devices(monkeypatch):
    monkeypatch.setattr(hardware.jax, "devices", lambda: [Device("TPU v5 lite")] * 4)
    monkeypatch.setattr(hardware.jax, "device_count", lambda: 4)
    assert hardware.utilisation(197e12, 0.5) == pytest.approx(0.5)


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    monkeypatch.setattr(
        hardware.jax, "local_devices", lambda: [Device("a", {"peak_bytes_in_use": n}) for n in (3, 7, 5)]
    )
    assert hardware.peak_memory() == 7
    monkeypatch.setattr(hardware.jax, "local_devices", lambda: [Device("a"), Device("b", {})])
    assert hardware.peak_memory() is None


@pytest.mark.parametrize(
    "chosen, plugins, files, expected",
    [
        ("tpu,cpu", [], [], "tpu"),
        ("cuda", [], [], "gpu"),
        ("cpu", ["xla_cuda13"], ["/dev/nvidia0"], "cpu"),
        (None, ["xla_cuda13"], ["/dev/nvidia0"], "gpu"),
        (None, ["xla_rocm7"], ["/dev/kfd"], "gpu"),
        (None, ["xla_cuda13"], ["/dev/kfd"], "cpu"),
        (None, [], ["/dev/nvidia0"], "cpu"),
    ],
)
def test_the_platform_is_known_before_jax_starts(chosen, plugins, files, expected, monkeypatch):
    monkeypatch.setattr(hardware.jax, "config", types.SimpleNamespace(jax_platforms=chosen))
    entries = [types.SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(hardware.importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setattr(hardware.os.path, "exists", files.__contains__)
    assert hardware.expected_platform() == expected
