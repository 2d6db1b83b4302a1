"""Ahead-of-time compilation of the training step for a TPU slice that is not here: memory, collectives and roofline."""

import importlib.metadata
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from seqpe_jax.distributed import sharding as layout
from seqpe_jax.distributed.hardware import find_chip
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.profiling.collectives import collectives
from seqpe_jax.profiling.hlo import HloModule
from seqpe_jax.profiling.roofline import roofline
from seqpe_jax.training.trainer import Trainer

SIZES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SIZES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Generation -> (most chips of a slice, usual slices, libtpu's name of the setting in which a chip's two cores are one
# device; "" = its default). Source: cloud.google.com/tpu/docs, the page of each generation.
GENERATIONS = {
    "v2": (256, ("2x2", "4x4", "8x8", "16x16"), ""),
    "v3": (1024, ("2x2", "4x4", "8x8", "16x16", "32x32"), ""),
    "v4": (4096, SIZES_3D, "megacore"),
    "v5e": (256, SIZES_2D, ""),
    "v5p": (6144, SIZES_3D, ""),
    "v6e": (256, SIZES_2D, ""),
    "tpu7x": (9216, SIZES_3D, ""),
}
MAX_CHIPS = 2**16  # of all slices together, far beyond any that train together
# Settings that libtpu otherwise requests from a TPU VM, and one that lets several processes compile at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)"


def libtpu() -> str:
    """Returns the requirement of libtpu that goes with this JAX, as pip reads it."""
    found = [line.partition(";")[0].strip() for line in importlib.metadata.requires("jax") or ()]
    return next((name for name in found if name.startswith("libtpu")), "libtpu")


def topology_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a TPU slice, for which programs can be compiled without having it.

    Args:
      topology: such as "v5e:4x4", or "2xv5e:4x4" for two slices.

    Raises:
      InputError: there is no such slice, or libtpu is not installed.
    """
    count, given = re.fullmatch(r"(?:([1-9]\d{0,5})x)?(.*)", topology, re.DOTALL).groups(default="1")
    generation, _, sides = given.partition(":")
    if generation not in GENERATIONS:
        known = [f"{name}:{size}" for name, (_, sizes, _) in GENERATIONS.items() for size in sizes]
        raise InputError(
            f"there is no TPU '{generation}' (--topology={topology}): write GENERATION:SIZES, e.g. v5e:4x4, or "
            f"2xv5e:4x4 for two slices."
            f"{suggest(given, known)} Generations: {', '.join(GENERATIONS)}"
        )
    most, usual, chip_config = GENERATIONS[generation]
    known = [f"{generation}:{size}" for size in usual]
    wrong = f"there is no TPU slice '{topology}'"
    form = "AxBxC" if usual is SIZES_3D else "AxB"
    if not re.fullmatch(form.translate(dict.fromkeys(map(ord, "ABC"), r"[1-9]\d*")), sides):
        raise InputError(f"{wrong}: write {generation}:{form}.{suggest(given, known)}")
    if (chips := math.prod(map(int, sides.split("x")))) > most:
        raise InputError(f"{wrong}: that is {chips} chips, and slices of {generation} have at most {most}")
    if int(count) * chips > MAX_CHIPS:
        raise InputError(
            f"--topology={topology} has {int(count) * chips} chips: give at most {MAX_CHIPS} in all slices"
        )
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError(
            f"compiling for TPU needs libtpu, but no TPU, and it is not installed: pip install '{libtpu()}'"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"chip_config_name": chip_config} if chip_config else {}
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if count != "1":
        options["num_slices"] = int(count)
    try:
        return list(topologies.get_topology_desc(given, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise InputError(f"{wrong} ({reason}).{suggest(given, known)}") from error


def compile_step(trainer: Trainer) -> dict[str, Any]:
    """Compiles a trainer's step for its mesh, whose devices need not exist, and returns its cost.

    Args:
      trainer: trainer of the config and the mesh.

    Returns:
      A dictionary with
      - "devices", "chip", "mesh", "rows" ({process: rows that it reads of a batch});
      - "memory": bytes of one device by use (`_memory`); "shortfall" is 0 where it fits;
      - "whole": dimensions that every device holds unsharded (`distributed.sharding.UnshardedDim`);
      - "collectives": {kind: {"count", "bytes"}} of one device and step; None where it does not fit;
      - "open_loops": loops with collectives that count once, since their trip count is unknown;
      - "roofline": see `profiling.roofline`; None where it does not fit; "unit": of its "per_second";
      - "flops", "flops_full_attention": of a step on all devices (`models.build.model_flops`); "compile_seconds".
    """
    split, batch_size = layout.batch_sharding(trainer.mesh), trainer.config.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype, sharding=split)
        for name, leaf in trainer.task.example.items()
    }
    chip, start = find_chip(trainer.mesh.devices.flat[0].device_kind), time.monotonic()
    compiled, sent, bound, needed, available = None, None, None, 0, chip.memory
    try:
        compiled = trainer.jit_train_step().lower(trainer.abstract_state, batch).compile()
        program = HloModule(compiled.as_text())
        sent = collectives(program)
        bound = roofline(
            program,
            trainer.mesh,
            chip,
            model_flops=trainer.flops_per_step,
            units=trainer.task.count_per_step,
            sent=sent,
        )
    except jax.errors.JaxRuntimeError as error:
        needed, available = _parse_out_of_memory(error)
    return {
        "devices": trainer.mesh.size,
        "chip": chip.name,
        "mesh": dict(trainer.mesh.shape),
        "rows": {process: len(rows) for process, rows in layout.rows_by_process(trainer.mesh, batch_size).items()},
        "memory": _memory(trainer, batch, compiled, needed, available),
        "whole": [dimension._asdict() for dimension in trainer.unsharded_dims],
        "collectives": sent.by_kind if sent else None,
        "open_loops": sent.unknown_trip_loops if sent else None,
        "roofline": bound,
        "unit": trainer.task.count_name,
        "flops": trainer.flops_per_step["mfu"],
        "flops_full_attention": trainer.flops_per_step["mfu_full_attention"],
        "compile_seconds": time.monotonic() - start,
    }


def _memory(trainer: Trainer, batch: dict[str, Any], compiled: Any, needed: int, available: int) -> dict[str, int]:
    """Returns bytes of one device: arguments by part, temporaries (activations, gradients, gathered arrays) and total."""
    found = {
        "parameters": layout.device_bytes(trainer.abstract_state.params),
        "optimizer": layout.device_bytes(trainer.abstract_state.opt_state),
        "batch": layout.device_bytes(batch),
    }
    if compiled is not None:
        stats = compiled.memory_analysis()
        found |= {"temporaries": stats.temp_size_in_bytes, "program": stats.generated_code_size_in_bytes}
        needed = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        needed += found["temporaries"] + found["program"]
        found["padding"] = needed - sum(found.values())  # of tiles; and the metrics that the step returns
    return found | {"total": needed, "hbm": available, "shortfall": max(0, needed - available)}


def _parse_out_of_memory(error: jax.errors.JaxRuntimeError) -> tuple[int, int]:
    """Returns the bytes that the compiler needed and had; any other error is raised again."""
    patterns = (rf"Used {SIZE} of {SIZE} hbm", rf"\({SIZE}\) exceeds available HBM \({SIZE}\)")
    for pattern in patterns:
        if found := re.search(pattern, str(error)):
            needed, unit, available, of = found.groups()
            return int(float(needed) * UNITS[unit]), int(float(available) * UNITS[of])
    raise error
