"""The bound of a step agrees with what a person counts, and links with how a slice is wired."""

import functools
import math
import types

import jax
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.distributed import hardware
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.profiling.hlo import HloModule
from seqpe_jax.profiling.roofline import Interconnect, roofline
from seqpe_jax.training.trainer import Trainer
from tests.repository.test_equal_steps import SMALL, TEXT
from tests.tiny import ROOT

V5E = hardware.find_chip("TPU v5e")


@functools.cache
def step_of(path, values, **axes):
    """(trainer, program) of a config's step on eight devices."""
    fields = dict(values) | {f"mesh.{name}": size for name, size in axes.items()}
    trainer = Trainer.of(config.load(f"{ROOT}/configs/{path}", fields))
    split = layout.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct((trainer.config.batch_size, *leaf.shape), leaf.dtype, sharding=split)
        for name, leaf in trainer.task.example.items()
    }
    return trainer, HloModule(trainer.jit_train_step().lower(trainer.abstract_state, batch).compile().as_text())


def bound(trainer, program, chip):
    units = trainer.task.count_per_step
    return roofline(program, trainer.mesh, chip, model_flops=trainer.flops_per_step, units=units)


def text(**axes):
    return step_of("stdlib_lm.py:alibi", tuple((TEXT | {"model.layers": 2, "model.scan": True}).items()), **axes)


def images(**axes):
    return step_of("digits_vit.py:none", tuple(SMALL.items()), **axes)


def check(found, flops, all_reduced, chip):
    """Against hand counts: FLOPs of a device and bytes of the gradients that it sums with others."""
    assert found["flops"] == pytest.approx(flops, rel=0.05)
    assert found["arithmetic_s"] == pytest.approx(flops / chip.flops, rel=0.05)
    assert found["memory_s"] == found["hbm_bytes"] / chip.bandwidth
    summed = [one for one in found["collectives"] if one["kind"] == "all-reduce"]
    assert [one["axes"] for one in summed] == [["data"]]
    assert summed[0]["bytes"] == pytest.approx(all_reduced, rel=0.05)
    seconds = 2 * 7 / 8 * all_reduced / chip.link
    assert found["interconnect_s"] == found["links"]["NVLink"] == pytest.approx(seconds, rel=0.05)
    assert found["exposed_s"] == pytest.approx(seconds, rel=0.05), "nothing hides a sum on a CPU's program"
    assert found["seconds"] == max(found["arithmetic_s"], found["memory_s"]) + found["exposed_s"]
    assert found["open_loops"] == 0 and not found["kernels"]


def test_the_bound_of_a_step_of_text_is_that_counted_by_hand():
    chip = hardware.find_chip("NVIDIA A100-SXM4-80GB")
    trainer, program = text(data=8)
    found = bound(trainer, program, chip)
    width, length, vocabulary, layers, tokens = 16, 16, 256, 2, 16  # of a device: one sample
    per_token = layers * (2 * 12 * width**2 + 4 * length * width) + 2 * width * vocabulary
    # The embedding's gradient is summed in two parts, as input and as output.
    numbers = 2 * vocabulary * width + layers * (12 * width**2 + 13 * width) + 2 * width
    check(found, 3 * tokens * per_token, 4 * numbers, chip)
    assert found["bound"] == "memory", "so small a model moves more than it computes"
    assert found["per_second"] == pytest.approx(8 * tokens / found["seconds"])
    seen = per_token - layers * 2 * length * width  # a query sees half of the keys
    for name, flops in (("mfu", seen), ("mfu_full_attention", per_token)):
        assert found[name] == pytest.approx(8 * 3 * tokens * flops / (found["seconds"] * 8 * chip.flops))


@pytest.mark.slow
def test_the_bound_of_a_step_of_images_is_that_counted_by_hand():
    chip = hardware.find_chip("NVIDIA H100 80GB HBM3")
    trainer, program = images(data=8)
    found = bound(trainer, program, chip)
    model, classes = trainer.config.model, 10
    side = math.prod(size // patch for size, patch in zip(trainer.config.data.size, model.patch, strict=True))
    width, tokens, pixels = model.width, side + 1, math.prod(model.patch)
    blocks = tokens * (2 * 12 * width**2 + 4 * tokens * width)
    # Nothing asks for the gradient of the pixels.
    flops = 3 * (blocks + 2 * width * classes) + 2 * side * 2 * pixels * width
    numbers = 12 * width**2 + 13 * width + 2 * width + pixels * width + width + width + width * classes + classes
    check(found, flops, 4 * numbers, chip)


@pytest.mark.slow
def test_what_fsdp_gathers_is_counted_in_every_turn_of_the_layers():
    trainer, program = text(fsdp=8)
    found = bound(trainer, program, hardware.find_chip("NVIDIA A100-SXM4-80GB"))
    all_gathered = sum(one["bytes"] for one in found["collectives"] if one["kind"] == "all-gather")
    width, layers = 16, 2
    assert all_gathered >= layers * 12 * width**2 * 4, "the matrices of each layer, once at least"


def torus(*sides, kind="TPU v5e", shape=None, slices=1):
    """Links of a slice that is not there, its devices numbered along the last side first."""
    devices = [
        types.SimpleNamespace(coords=place, platform="tpu", slice_index=number)
        for number in range(slices)
        for place in np.ndindex(*sides)
    ]
    array = np.empty(len(devices), object)
    array[:] = devices
    shape = shape or (len(devices), 1, 1, 1)
    mesh = types.SimpleNamespace(devices=array.reshape(shape), size=len(devices), axis_names=layout.AXES)
    return Interconnect(mesh, hardware.find_chip(kind))


def test_a_ring_has_two_ways_in_and_a_line_one():
    links = torus(16, 16)
    assert links.rates([range(16)]) == {"y": 2 * V5E.link}, "a side of 16 is closed"
    assert links.rates([range(8)]) == {"y": V5E.link}, "half of it is a line"
    assert links.rates([range(0, 256, 16)]) == {"x": 2 * V5E.link}
    assert links.rates([]) == {"x": 2 * V5E.link, "y": 2 * V5E.link}, "all devices"
    assert torus(4, 4).rates([]) == {"x": V5E.link, "y": V5E.link}, "a small slice is not closed"
    v5p = hardware.find_chip("TPU v5p")
    assert torus(4, 4, 4, kind="TPU v5p").rates([range(4)]) == {"z": 2 * v5p.link}
    assert torus(2, 4, 4, kind="TPU v5p").rates([range(4)]) == {"z": v5p.link}


def test_two_cores_of_a_chip_and_two_slices():
    assert torus(2, 2, slices=2).rates([]) == {"network": 0.0}
    assert torus(2, 2, slices=2).rates([range(4)]) == {"x": V5E.link, "y": V5E.link}
    links = torus(1, 1, 1, kind="TPU7x")
    assert links.rates([[0, 0]]) == {}


def test_axes_of_the_mesh():
    links = torus(4, 4, shape=(2, 8, 1, 1))
    assert (
        links.mesh_axes([range(8)]) == ["fsdp"]
        and links.mesh_axes([[0, 8]]) == ["data"]
        and links.mesh_axes([]) == ["data", "fsdp"]
    )


SENT = """\
ENTRY %main (x.1: f32[1024]) -> f32[1024] {
  %x.1 = f32[1024]{0} parameter(0)
  %a.1 = f32[1024]{0} all-reduce(%x.1), channel_id=1, replica_groups=[16,16]<=[256]
  %b.1 = f32[1024]{0} all-reduce(%a.1), channel_id=2, replica_groups=[16,16]<=[16,16]T(1,0)
  ROOT %c.1 = f32[1024]{0} all-reduce(%b.1), channel_id=3, replica_groups=[1,256]<=[256]
}
"""


def test_links_are_busy_for_all_that_goes_over_them():
    links = torus(16, 16, shape=(16, 16, 1, 1))
    found = roofline(HloModule(SENT), links.mesh, V5E, model_flops={"mfu": 1.0}, units=1)
    alone = 2 * 4096 * 15 / 16 / (2 * V5E.link)
    shared = 2 * 4096 * 255 / 256 / (4 * V5E.link)
    assert found["links"] == {"x": pytest.approx(alone + shared), "y": pytest.approx(alone + shared)}
    assert [(one["axes"], one["over"]) for one in found["collectives"]] == [
        (["fsdp"], ["y"]),
        (["data"], ["x"]),
        (["data", "fsdp"], ["x", "y"]),
    ]
    waits = 2 * alone + shared
    assert found["exposed_s"] == pytest.approx(waits) and found["bound"] == "memory"
    assert found["seconds"] == pytest.approx(waits + found["memory_s"])
    hidden = SENT.replace("all-reduce(", "all-reduce-start(")
    found = roofline(HloModule(hidden), links.mesh, V5E, model_flops={"mfu": 1.0}, units=1)
    assert found["bound"] == "interconnect" and found["seconds"] == max(found["links"].values())
    assert found["exposed_s"] == 0 and all(one["hidden"] for one in found["collectives"])


def test_what_is_not_known_bounds_nothing():
    mesh = torus(2, 2, slices=2).mesh
    sent = HloModule(SENT.replace("256", "8").replace("[16,16]", "[2,4]"))
    found = roofline(sent, mesh, V5E, model_flops={"mfu": 0.0}, units=1)
    assert found["links"].keys() == {"x", "y"} and found["collectives"][-1]["seconds"] is None and found["mfu"] is None
    measured = hardware.Chip("some CPU", 1e9, 0, "measured")
    cpu = types.SimpleNamespace(devices=np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), size=1, axis_names=layout.AXES)
    found = roofline(HloModule(PRODUCT), cpu, measured, model_flops={"mfu": 0.0}, units=8)
    assert found["memory_s"] is None and found["bound"] == "arithmetic"
    assert (found["seconds"], found["per_second"]) == (2 * 8**3 / 1e9, 8 / (2 * 8**3 / 1e9))


PRODUCT = """\
ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {
  %x.1 = f32[8,8]{1,0} parameter(0)
  ROOT %y.1 = f32[8,8]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
